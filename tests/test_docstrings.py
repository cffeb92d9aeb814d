"""Every public function and class has an example in its docstring, which runs as it stands.

An example may use `torch` and `lk` (this package), and `model` and `tokenizer`, a small Llama of
transformers: docs/api.md says so to its readers.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_kernels as lk
from lora_kernels.dispatch import registry

API = Path(__file__).resolve().parents[1] / "docs" / "api.md"
# In this order: an object is tested where it is first met.
MODULES = (
    "lora_kernels",
    "lora_kernels.functional",
    "lora_kernels.nn",
    "lora_kernels.adapters",
    "lora_kernels.serving",
    "lora_kernels.training",
    "lora_kernels.dispatch",
    "lora_kernels.testing",
    "lora_kernels.integrations.peft",
    "lora_kernels.integrations.bitsandbytes",
)


def public() -> dict[str, Any]:
    """Every public function and class by the name that a user writes."""
    found: dict[str, Any] = {}
    for name in MODULES:
        module = importlib.import_module(name)
        own = [k for k, v in vars(module).items() if getattr(v, "__module__", "") == name]
        for key in getattr(module, "__all__", own):
            value = getattr(module, key)
            is_code = inspect.isclass(value) or inspect.isfunction(value)
            if is_code and not key.startswith("_") and value not in found.values():
                found[f"{name}.{key}"] = value
    return found


PUBLIC = public()


def globals_of(text: str) -> dict[str, Any]:
    """What an example may use without making it."""
    names: dict[str, Any] = {"torch": torch, "lk": lk}
    if re.search(r"\b(model|tokenizer)\b", text):
        pytest.importorskip("transformers", reason="transformers is not installed")
        from tests.cli.conftest import make_model, make_tokenizer

        names |= {"model": make_model(), "tokenizer": make_tokenizer()}
    if "from peft import" in text:
        pytest.importorskip("peft", reason="PEFT is not installed")
    if "integrations.bitsandbytes" in text:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return names


def docstrings(name: str) -> dict[str, str]:
    """The docstring of a public name, and those of a class's own methods."""
    value = PUBLIC[name]
    found = {name: value.__doc__}
    for key, member in vars(value).items() if inspect.isclass(value) else ():
        code = getattr(member, "__func__", None) or getattr(member, "fget", None) or member
        if inspect.isfunction(code):
            found[f"{name}.{key}"] = code.__doc__
    return {where: inspect.cleandoc(text or "") for where, text in found.items()}


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = docstrings(name)
    assert "\nExamples:\n    >>> " in texts[name], f"{name}: its docstring has no example"
    for where, text in texts.items():
        if ">>>" in text:
            run(where, text)


def run(where: str, text: str) -> None:
    example = doctest.DocTestParser().get_doctest(text, globals_of(text), where, None, 0)
    said: list[str] = []
    known = set(registry.ops())
    try:
        result = doctest.DocTestRunner(verbose=False).run(example, out=said.append)
    finally:
        for op in set(registry.ops()) - known:
            del registry._ops[op]
    assert result.attempted and not result.failed, "".join(said)


_SECTION = re.compile(r"^(?:Args|Attributes):\n((?:(?:    .*)?\n)+)", re.MULTILINE)
_NAMES = re.compile(r"^    (\w+(?:, \w+)*): ", re.MULTILINE)


def test_documented_arguments_are_there():
    """One line may describe several arguments, which the site's builder does not check."""
    found = 0
    for name, value in PUBLIC.items():
        if not inspect.isfunction(value):
            continue
        for section in _SECTION.findall(docstrings(name)[name] + "\n"):
            names = {n for line in _NAMES.findall(section) for n in line.split(", ")}
            unknown = names - set(inspect.signature(value).parameters)
            assert not unknown, f"{name} has no argument {unknown}"
            found += len(names)
    assert found


def test_reference_shows_every_public_name():
    """Each module is listed, the package itself with what no module below has."""
    text = API.read_text(encoding="utf-8")
    listed = re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)
    assert sorted(listed) == sorted(MODULES)
    elsewhere = {n for m in MODULES[1:] for n in getattr(importlib.import_module(m), "__all__", ())}
    own = [n for n in lk.__all__ if n not in elsewhere and callable(getattr(lk, n))]
    shown = re.search(
        r"^::: lora_kernels\n    options:\n      members: \[(.+)\]$", text, re.MULTILINE
    )
    assert shown and sorted(shown[1].split(", ")) == sorted(own)
