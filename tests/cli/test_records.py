"""The rows that people have: every form reads as what it says, or one line names file and row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from lora_kernels.cli import main
from lora_kernels.cli.errors import UsageError
from lora_kernels.cli.finetune import data
from lora_kernels.cli.finetune.records import TEXT, read_conversations

from .conftest import TEMPLATE, make_tokenizer
from .test_data import assistant, labelled, user


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


QA = [user("Q"), assistant("A")]
FORMS = [
    ({"prompt": "Q", "response": "A"}, QA),
    ({"prompt": "Q", "completion": "A"}, QA),
    ({"prompt": [system("S"), user("Q")], "completion": [assistant("A")]}, [system("S"), *QA]),
    ({"prompt": "Q", "response": "A", "system": "S"}, [system("S"), *QA]),
    ({"prompt": "Q", "response": None, "completion": "A", "text": None}, QA),
    ({"instruction": "Q", "input": "", "output": "A"}, QA),
    ({"instruction": "Q", "input": None, "output": "A"}, QA),
    ({"instruction": "Q", "input": "more", "output": "A"}, [user("Q\n\nmore"), assistant("A")]),
    # Alpaca's own file holds all of it as `text` too.
    ({"instruction": "Q", "input": "", "output": "A", "text": "Below is ... Q A"}, QA),
    ({"instruction": "Q", "context": "c", "response": "A"}, [user("Q\n\nc"), assistant("A")]),
    ({"question": "Q", "answer": "A"}, QA),
    (
        {
            "conversations": [
                {"from": "system", "value": "S"},
                {"from": "human", "value": "Q"},
                {"from": "gpt", "value": "A"},
            ]
        },
        [system("S"), *QA],
    ),
    ({"conversations": QA}, QA),
    ({"messages": QA, "prompt": "Q", "response": "other"}, QA),
    ({"messages": [{"role": "human", "content": "Q"}, {"role": "gpt", "content": "A"}]}, QA),
    (
        {
            "messages": [
                user([{"type": "text", "text": "Q1 "}, {"type": "text", "text": "Q2"}]),
                assistant([{"text": "A"}]),
            ]
        },
        [user("Q1 Q2"), assistant("A")],
    ),
    (
        {"messages": [user("Q"), assistant(None), user("Q"), assistant("A")]},
        [user("Q"), assistant(""), user("Q"), assistant("A")],
    ),
    ({"text": "all of it"}, [{"role": TEXT, "content": "all of it"}]),
]


@pytest.mark.parametrize(("row", "expected"), FORMS)
def test_forms(tmp_path, row, expected):
    for name, text in (
        ("a.jsonl", json.dumps(row)),
        ("b.json", json.dumps([row, row])),
        ("c.json", json.dumps([row], indent=2)),
        ("d.json", json.dumps({"version": 1, "data": [row]}, indent=2)),
        ("e.json", json.dumps(row, indent=2)),
        ("f.json", f"{json.dumps(row)}\n{json.dumps(row)}\n"),
        ("g.jsonl", json.dumps([row], indent=2)),
        ("h.ndjson", f"\ufeff{json.dumps(row)}\r\n\r\n{json.dumps(row)}"),
    ):
        (tmp_path / name).write_bytes(text.encode())
        for found in read_conversations(tmp_path / name):
            assert found == expected, name


def test_calls_of_tools_are_kept_and_need_no_content(tmp_path):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    tool = {"role": "tool", "name": "f", "content": "42"}
    for first in (call, call | {"content": None}):
        path = write(tmp_path / "a.jsonl", [{"messages": [user("Q"), first, tool]}])
        assert read_conversations(path) == [[user("Q"), call | {"content": ""}, tool]]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\ufeff"])
def test_marks_inside_a_string_are_no_line_ends(tmp_path, mark):
    row = {"prompt": f"a{mark}b", "response": f"c{mark}d"}
    text = json.dumps(row, ensure_ascii=mark < " ")
    (tmp_path / "a.jsonl").write_text(f"{text}\n{text}\n", "utf-8")
    expected = [user(f"a{mark}b"), assistant(f"c{mark}d")]
    assert read_conversations(tmp_path / "a.jsonl") == [expected] * 2


def test_plain_text_without_its_mark_and_with_one_kind_of_line_end(tmp_path):
    tokenizer = make_tokenizer()
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    loaded = data.load_file(tokenizer, tmp_path / "a.txt", fraction=0, max_length=99, seed=0)
    assert tokenizer.decode(loaded.train[0]["input_ids"]) == "one\ntwo\nthree\n"


GOOD = json.dumps({"prompt": "a", "response": "b"})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("d.jsonl", GOOD + '\n{"prompt": "a\\ud83d", "response": "b"}', r"line 2: .*\\ud83d, half"),
        ("d.json", f'[{GOOD}, {{"messages": [3]}}]', "row 2: every message needs"),
        ("d.json", f"[{GOOD}, {GOOD[:-1]}", "line 1: not JSON"),
        ("d.jsonl", json.dumps(json.loads(GOOD), indent=1)[:-1], "one object in each line, or a"),
        ("d.jsonl", '{"text": ""}', "line 1: `text` must be"),
        ("d.jsonl", '{"text": ["a"]}', "line 1: `text` must be"),
        ("d.json", '{"prompt": ["a", "b"], "response": ["c", "d"]}', "row 1: every message"),
        ("d.jsonl", '{"messages": [{"role": "user", "content": 3}]}', "got int"),
        ("d.jsonl", '{"messages": [{"role": "assistant", "content": null}]}', "no answer to learn"),
        (
            "d.jsonl",
            '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            "line 1: a content part of type 'image_url'; only parts of type 'text'",
        ),
        ("d.jsonl", "[" * 100_000, "line 1: not JSON"),
        ("d.json", "[]", "holds no example"),
    ],
)
def test_bad_rows(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        read_conversations(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["d.jsonl", "d.txt"])
def test_another_encoding_names_the_line(tmp_path, name):
    (tmp_path / name).write_bytes(f"{GOOD}\n".encode() + "ä\n".encode("latin-1"))
    with pytest.raises(UsageError, match=r"line 2: not UTF-8 text .*; save the file as UTF-8"):
        data.load_file(make_tokenizer(), tmp_path / name, fraction=0, max_length=9, seed=0)


def load(tokenizer: Any, path: Path, rows: list[Any]) -> data.Dataset:
    return data.load_file(tokenizer, write(path, rows), fraction=0, max_length=512, seed=0)


def test_text_rows_are_learned_whole_and_end(tmp_path):
    tokenizer = make_tokenizer(chat=False)
    found = load(tokenizer, tmp_path / "a.jsonl", [{"text": "all of it"}])
    assert labelled(tokenizer, found.train[0]) == "all of it<|end|>"
    assert found.prompts[0] + found.references[0] == "all of it<|end|>"


def test_an_empty_turn_is_not_learned(tmp_path):
    tokenizer = make_tokenizer()
    row = {"messages": [user("Q"), assistant(None), user("Q"), assistant("A")]}
    found = load(tokenizer, tmp_path / "a.jsonl", [row])
    assert labelled(tokenizer, found.train[0]) == "A<|end|>"


REFUSING = (
    "{% for m in messages %}{% if m['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% endfor %}" + TEMPLATE
)


def test_a_template_that_refuses_a_role(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = REFUSING
    rows = [{"messages": QA}, {"messages": [system("S"), *QA]}]
    message = r"a\.jsonl, line 2: .* refuses the roles system, user \(System role not supported\); "
    with pytest.raises(UsageError, match=message + "leave out or merge"):
        load(tokenizer, tmp_path / "a.jsonl", rows)


# As reasoning models do: the prompt opens a thought, and a shown answer has lost its own.
THINKING = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{{ m['content'].split('</think>')[-1].lstrip('\n') }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n<think>\n{% endif %}"
)


def test_an_open_thought_is_closed(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = THINKING
    row = {"messages": [user("one"), assistant("first"), user("two"), assistant("second")]}
    found = load(tokenizer, tmp_path / "a.jsonl", [row])
    # Each answer after what the model will see when it is asked for it: no thought of before.
    one, two = (tokenizer.decode(e["input_ids"]) for e in found.train)
    closed = "<|start|>assistant\n<think>\n\n</think>\n\n"
    assert one == f"<|start|>user\none<|end|>\n{closed}first<|end|>"
    assert two == (
        "<|start|>user\none<|end|>\n<|start|>assistant\nfirst<|end|>\n"
        f"<|start|>user\ntwo<|end|>\n{closed}second<|end|>"
    )
    assert labelled(tokenizer, found.train[0]) == "\n</think>\n\nfirst<|end|>"
    assert labelled(tokenizer, found.train[1]) == "\n</think>\n\nsecond<|end|>"
    for example, prompt in zip(
        found.train, (row["messages"][:1], row["messages"][:3]), strict=True
    ):
        asked = data.render(tokenizer, prompt, prompt=True)
        assert tokenizer.decode(example["input_ids"]).startswith(asked)


# As Qwen3 does: the last answer is shown with an empty thought, those before without.
REWRITING = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{% if loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = REWRITING
    row = {"messages": [user("one"), assistant("first"), user("two"), assistant("second")]}
    found = load(tokenizer, tmp_path / "a.jsonl", [row, {"messages": QA}])
    thought = "<think>\n\n</think>\n\n"
    assert [labelled(tokenizer, e) for e in found.train] == [
        f"{thought}first<|end|>",
        f"{thought}second<|end|>",
        f"{thought}A<|end|>",
    ]
    for example, messages in zip(
        found.train, (row["messages"][:2], row["messages"], QA), strict=True
    ):
        text = data.render(tokenizer, messages).rstrip()
        assert tokenizer.decode(example["input_ids"]) == text


def test_rows_that_no_template_can_show_are_named(tmp_path):
    row = {"messages": [system("S"), *QA]}
    with pytest.raises(UsageError, match=r"a\.jsonl, line 2: the model has no chat template"):
        load(make_tokenizer(chat=False), tmp_path / "a.jsonl", [{"messages": QA}, row])
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(UsageError, match=r"a\.jsonl, line 1: .* rewrites earlier turns"):
        load(tokenizer, tmp_path / "a.jsonl", [{"messages": QA}])


def test_the_command_trains_on_every_form(finetune, tmp_path):
    rows = [row for row, _ in FORMS]
    (tmp_path / "all.json").write_text("\ufeff" + json.dumps(rows, indent=1), "utf-8")
    options = ("--data", tmp_path / "all.json", "--max-steps", 1, "--batch-size", 4)
    assert finetune(*options, "--eval-fraction", 0.5, "--quantize", "none") == 0


def test_a_question_that_is_not_unicode(tiny, capsys):
    assert main(["serve-demo", "--model", str(tiny), "--question", "a\udcff"]) == 2
    assert r"--question: got 'a\udcff', which is not UTF-8" in capsys.readouterr().err
