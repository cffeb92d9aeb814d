"""The demo's data: questions about the Python standard library, answered by its docstrings.

There is one example for each public class, function and method of a fixed list of modules that
import without side effects. Nothing is downloaded, and the set depends only on the Python version.
Whole modules are held out, and an answer that occurs in a held-out module is never trained on.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

TRAIN_MODULES = [
    "abc",
    "argparse",
    "array",
    "ast",
    "asyncio.events",
    "asyncio.locks",
    "asyncio.queues",
    "asyncio.streams",
    "base64",
    "bisect",
    "bz2",
    "cmath",
    "cmd",
    "code",
    "codecs",
    "collections",
    "compileall",
    "concurrent.futures.thread",
    "configparser",
    "contextlib",
    "copy",
    "csv",
    "dataclasses",
    "datetime",
    "decimal",
    "dis",
    "email.message",
    "email.utils",
    "enum",
    "filecmp",
    "fileinput",
    "fnmatch",
    "ftplib",
    "functools",
    "getopt",
    "glob",
    "gzip",
    "hashlib",
    "hmac",
    "html",
    "http.client",
    "http.cookies",
    "http.cookiejar",
    "imaplib",
    "importlib.util",
    "inspect",
    "io",
    "itertools",
    "json.decoder",
    "json.encoder",
    "linecache",
    "locale",
    "logging",
    "logging.handlers",
    "lzma",
    "mailbox",
    "math",
    "mimetypes",
    "netrc",
    "numbers",
    "operator",
    "optparse",
    "os",
    "pathlib",
    "pickle",
    "pickletools",
    "pkgutil",
    "platform",
    "plistlib",
    "poplib",
    "pprint",
    "queue",
    "random",
    "re",
    "reprlib",
    "runpy",
    "sched",
    "secrets",
    "selectors",
    "shelve",
    "shlex",
    "signal",
    "smtplib",
    "socket",
    "socketserver",
    "ssl",
    "stat",
    "string",
    "struct",
    "subprocess",
    "symtable",
    "sysconfig",
    "tarfile",
    "threading",
    "time",
    "timeit",
    "tokenize",
    "trace",
    "traceback",
    "tracemalloc",
    "types",
    "typing",
    "unittest.case",
    "unittest.mock",
    "urllib.parse",
    "urllib.request",
    "urllib.robotparser",
    "uuid",
    "wave",
    "weakref",
    "webbrowser",
    "xml.dom.minidom",
    "xml.etree.ElementTree",
    "xml.sax.handler",
    "zipfile",
    "zlib",
]
HELD_OUT_MODULES = [
    "calendar",
    "difflib",
    "fractions",
    "heapq",
    "ipaddress",
    "shutil",
    "statistics",
    "tempfile",
    "textwrap",
    "posixpath",
]

SIGNATURE_LINE = re.compile(r"[\w.]+\((?:[^()]|\([^()]*\))*\)(\s*->.*)?$")
# Other programs assign to these, so their values are not fixed.
REPLACEABLE = {"excepthook"}
MIN_ANSWER = 25  # characters; shorter docstrings ("Return self.") teach nothing
MAX_ANSWER = 220
MAX_SIGNATURE = 90


class DocExample(NamedTuple):
    """One question and its answer; `module` says where both come from."""

    module: str
    prompt: str
    response: str


def first_paragraph(doc: str) -> str:
    """The docstring's first paragraph of prose on one line, "" when it has none.

    Lines that only repeat the signature ("insort(a, x) -> None") are dropped.
    """
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(doc)):
        lines = [line.strip() for line in paragraph.splitlines()]
        while lines and SIGNATURE_LINE.match(lines[0]):
            lines.pop(0)
        text = re.sub(r"\s+", " ", " ".join(lines)).strip()
        text = text.replace("``", "`")
        if text and not text.startswith((">>>", "*", "-", "+")):
            return text
    return ""


def _signature(obj: object) -> str:
    try:
        text = str(inspect.signature(obj))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return "(...)"
    # A default such as an address or sys.executable would differ from machine to machine.
    if len(text) > MAX_SIGNATURE or " at 0x" in text or sys.executable in text:
        return "(...)"
    return text


def _answer(doc: object) -> str:
    if not isinstance(doc, str):
        return ""
    text = first_paragraph(doc)
    if len(text) > MAX_ANSWER:
        # Whole sentences only.
        cut = text.rfind(". ", 0, MAX_ANSWER)
        text = text[: cut + 1] if cut >= MIN_ANSWER else ""
    return text if len(text) >= MIN_ANSWER else ""


def _members(module: ModuleType) -> Iterator[tuple[str, str, object]]:
    """(kind, qualified name, object) of the module's public classes, functions and methods."""
    names = getattr(module, "__all__", None)
    if names is None:  # defined in the module, not imported
        names = [
            name
            for name, obj in vars(module).items()
            if not name.startswith("_") and getattr(obj, "__module__", None) == module.__name__
        ]
    for name in sorted(set(names) - REPLACEABLE):
        obj = vars(module).get(name)
        if inspect.isclass(obj):
            yield "class", name, obj
            for attribute in sorted(vars(obj)):
                member = vars(obj)[attribute]
                if isinstance(member, staticmethod | classmethod):
                    member = member.__func__
                if not attribute.startswith("_") and _is_native(member):
                    yield "method", f"{name}.{attribute}", member
        elif _is_native(obj):
            yield "function", name, obj


def _is_native(obj: object) -> bool:
    """Whether the standard library defines a function. Some packages add methods to its classes."""
    home = getattr(obj, "__module__", None) or "builtins"
    return inspect.isroutine(obj) and home.partition(".")[0] in sys.stdlib_module_names


def module_examples(name: str) -> list[DocExample]:
    """The examples of one module, sorted by name; [] if this Python is built without it."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        return []
    examples = []
    for kind, qualified, obj in _members(module):
        answer = _answer(getattr(obj, "__doc__", None))
        if answer:
            signature = "" if kind == "class" else _signature(obj)
            question = (
                f"What does the {kind} `{qualified}{signature}` of Python's `{name}` module do?"
            )
            if kind == "class":
                question = f"What is the class `{qualified}` of Python's `{name}` module?"
            examples.append(DocExample(name, question, answer))
    return examples


def build() -> tuple[list[DocExample], list[DocExample]]:
    """(training examples, held-out examples), in a fixed order.

    An answer occurs once in each list, and never in both.
    """
    held_out = _unique(HELD_OUT_MODULES, set())
    train = _unique(TRAIN_MODULES, {_key(e.response) for e in held_out})
    return train, held_out


def _key(answer: str) -> str:
    return re.sub(r"\W+", "", answer).lower()


def _unique(modules: list[str], seen: set[str]) -> list[DocExample]:
    seen = set(seen)
    examples = []
    for module in modules:
        for example in module_examples(module):
            if _key(example.response) not in seen:
                seen.add(_key(example.response))
                examples.append(example)
    return examples
