"""The demo's data set: fixed, clean, and nothing of the held-out modules in the training part."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from lora_kernels.cli.finetune import docstrings


@pytest.fixture(scope="module")
def built():
    return docstrings.build()


def test_sizes(built):
    train, held_out = built
    assert len(train) > 1500 and len(held_out) > 100
    assert {e.module for e in held_out} == set(docstrings.HELD_OUT_MODULES)


def test_no_leak(built):
    train, held_out = built
    assert not {e.module for e in train} & {e.module for e in held_out}

    def plain(text: str) -> str:
        return re.sub(r"\W+", "", text).lower()

    assert not {plain(e.response) for e in train} & {plain(e.response) for e in held_out}
    for part in built:
        answers = [plain(e.response) for e in part]
        assert len(answers) == len(set(answers))


def test_examples_are_clean(built):
    for example in (*built[0], *built[1]):
        assert "`" + example.module + "`" in example.prompt
        assert " at 0x" not in example.prompt
        assert docstrings.MIN_ANSWER <= len(example.response) <= docstrings.MAX_ANSWER
        assert "\n" not in example.response and ">>>" not in example.response[:4]


def test_nothing_of_this_machine(built):
    texts = [text for part in built for example in part for text in map(str, example)]
    assert not any(sys.executable in text or sys.prefix in text for text in texts)


def test_the_same_in_another_process(built):
    code = (
        "from lora_kernels.cli.finetune import docstrings; import hashlib, sys; "
        "print(hashlib.sha256(repr(docstrings.build()).encode()).hexdigest()); "
        "print('tkinter' in sys.modules, 'this' in sys.modules, 'antigravity' in sys.modules)"
    )
    import hashlib

    run = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", code],
        capture_output=True,
        text=True,
        check=True,
    )
    digest, modules = run.stdout.splitlines()  # nothing else was printed by an import
    assert digest == hashlib.sha256(repr(built).encode()).hexdigest()
    assert modules == "False False False"


@pytest.mark.parametrize(
    "doc, expected",
    [
        ("Do it.\n\nMore.", "Do it."),
        ("f(x) -> None\n\nReturn the\n  thing.", "Return the thing."),
        ("f(x)\nReturn ``x``.", "Return `x`."),
        (">>> f()\n3\n\nProse at last.", "Prose at last."),
        ("", ""),
    ],
)
def test_first_paragraph(doc, expected):
    assert docstrings.first_paragraph(doc) == expected
