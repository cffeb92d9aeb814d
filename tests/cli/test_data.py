"""From files to token ids and labels: every position, and every way a file can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from lora_kernels.cli.errors import UsageError
from lora_kernels.cli.finetune import data
from lora_kernels.cli.finetune.collate import Collator, LengthGroupedSampler

from .conftest import make_model, make_tokenizer

PAD, START, END = 256, 257, 258


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def labelled(tokenizer, example) -> str:
    return tokenizer.decode([t for t in example["labels"] if t != data.IGNORE])


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_single_turn_labels_are_the_answer_and_its_end(tokenizer):
    pieces = data.segments(tokenizer, [user("Q?"), assistant("An A.")])
    example = data.encode(tokenizer, pieces, 100)
    prompt = [START, *ids(tokenizer, "user\nQ?"), END, *ids(tokenizer, "\n")]
    prompt += [START, *ids(tokenizer, "assistant\n")]
    answer = [*ids(tokenizer, "An A."), END]
    assert example["input_ids"] == prompt + answer
    assert example["labels"] == [data.IGNORE] * len(prompt) + answer


def test_prompt_has_the_ids_it_has_when_the_model_is_asked(tokenizer):
    messages = [user("Q?"), assistant("A")]
    example = data.encode(tokenizer, data.segments(tokenizer, messages), 100)
    asked = ids(tokenizer, data.render(tokenizer, messages[:1], prompt=True))
    assert example["input_ids"][: len(asked)] == asked


def test_every_assistant_turn_is_learned_and_nothing_else(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        user("one"),
        assistant("first"),
        user("two"),
        assistant("second"),
        user("never answered"),
    ]
    example = data.encode(tokenizer, data.segments(tokenizer, messages), 1000)
    assert labelled(tokenizer, example) == "first<|end|>second<|end|>"
    # The text is the template's own, up to the last answer.
    assert tokenizer.decode(example["input_ids"]) == data.render(tokenizer, messages[:5]).rstrip()


def test_without_a_chat_template():
    tokenizer = make_tokenizer(chat=False)
    example = data.encode(tokenizer, data.segments(tokenizer, [user("Q"), assistant("A")]), 100)
    assert tokenizer.decode(example["input_ids"]) == "Q\nA<|end|>"
    assert labelled(tokenizer, example) == "A<|end|>"
    with pytest.raises(UsageError, match="no chat template"):
        data.segments(tokenizer, [user("a"), assistant("b"), user("c"), assistant("d")])


def test_a_template_that_rewrites_history_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    with pytest.raises(UsageError, match="rewrites earlier turns"):
        data.segments(tokenizer, [user("a"), assistant("b"), user("c"), assistant("d")])


def test_cut_and_dropped(tokenizer):
    long = [user("Q"), assistant("x" * 50)]
    prompt = len(ids(tokenizer, data.render(tokenizer, long[:1], prompt=True)))
    examples, cut, dropped = data.encode_all(tokenizer, [long], prompt + 3)
    assert (cut, dropped) == (1, 0)
    assert examples[0]["labels"][-3:] == ids(tokenizer, "xxx")
    assert data.encode_all(tokenizer, [long], prompt) == ([], 1, 1)
    exact = prompt + 51
    assert data.encode_all(tokenizer, [long], exact)[1:] == (0, 0)


def test_both_jsonl_forms_read_the_same(tmp_path: Path):
    path = tmp_path / "d.jsonl"
    pair = {"prompt": "é?", "response": "ok"}
    chat = {"messages": [user("é?"), assistant("ok")]}
    path.write_text(f"{json.dumps(pair)}\n\n{json.dumps(chat, ensure_ascii=False)}\n", "utf-8")
    first, second = data.read_conversations(path)
    assert first == second == chat["messages"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "holds no example"),
        ("\n \n", "holds no example"),
        ('{"prompt": "a", "response": "b"}\n{"prompt": ', "line 2: not JSON"),
        ("[1]", "line 1: got list"),
        ('{"prompt": "a"}', r"line 1: got the keys \['prompt'\]"),
        ('{"messages": []}', "line 1: messages must be"),
        ('{"messages": [{"role": "user"}]}', "line 1: every message needs"),
        ('{"prompt": 1, "response": "b"}', "line 1: every message needs"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "line 1: no answer"),
        ('{"prompt": "a", "response": ""}', "line 1: no answer"),
    ],
)
def test_bad_jsonl(tmp_path: Path, text, message):
    path = tmp_path / "d.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        data.read_conversations(path)


def test_bad_files(tmp_path: Path, tokenizer):
    def load(path: Path) -> data.Dataset:
        return data.load_file(tokenizer, path, fraction=0.5, max_length=8, seed=0)

    with pytest.raises(UsageError, match="is a folder"):
        load(tmp_path)
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        load(tmp_path / "b.txt")
    (tmp_path / "c.txt").write_text(" \n")
    with pytest.raises(UsageError, match="no text"):
        load(tmp_path / "c.txt")
    (tmp_path / "d.txt").write_text("abcd")
    with pytest.raises(UsageError, match="at least 2"):
        load(tmp_path / "d.txt")


def test_text_blocks_cover_the_file_and_its_end_is_held_out(tmp_path: Path, tokenizer):
    text = "".join(chr(97 + i % 26) for i in range(95))
    (tmp_path / "t.txt").write_text(text)
    loaded = data.load_file(tokenizer, tmp_path / "t.txt", fraction=0.2, max_length=10, seed=0)
    assert [len(e["input_ids"]) for e in loaded.train + loaded.held_out] == [10] * 9 + [5]
    tokens = [t for e in loaded.train + loaded.held_out for t in e["input_ids"]]
    assert tokenizer.decode(tokens) == text
    assert len(loaded.held_out) == 2
    assert all(e["labels"] == e["input_ids"] for e in loaded.train)


def test_split_is_a_partition_that_the_seed_decides():
    items = list(range(50))
    train, held_out = data.split(items, 0.1, seed=3)
    assert sorted(train + held_out) == items and len(held_out) == 5
    assert data.split(items, 0.1, seed=3) == (train, held_out)
    assert data.split(items, 0.1, seed=4) != (train, held_out)
    assert data.split(items, 0, seed=3) == (items, [])
    assert len(data.split([1, 2], 0.01, seed=0)[1]) == 1
    assert len(data.split([1, 2], 0.99, seed=0)[0]) == 1


def test_fingerprint_sees_labels_and_the_split():
    a, b = {"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [1, 2], "labels": [-100, 2]}
    prints = {
        data.Dataset(*parts).fingerprint() for parts in (([a], [b]), ([b], [a]), ([a, b], []))
    }
    assert len(prints) == 3


EXAMPLES = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9]},
    {"input_ids": [1, 2, 3], "labels": [-100, -100, 3]},
]


def test_collator_pads_to_the_longest():
    batch = Collator(PAD, trim_logits=False, max_length=5)(EXAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [1, 2, 3, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8, 9], [-100, -100, 3, -100, -100]]


@pytest.mark.parametrize(
    ("longest", "most", "length"),
    [(5, None, 32), (32, None, 32), (33, None, 64), (5, 512, 32), (33, 40, 40), (9, 4, 9)],
)
def test_few_lengths_are_used(longest: int, most: int | None, length: int):
    """What fills up has no label, and is masked; a batch is never longer than it must or may be."""
    ids = list(range(1, longest + 1))
    examples = [{"input_ids": ids, "labels": ids}, *EXAMPLES]
    batch = Collator(PAD, False, most)(examples)
    assert {tuple(t.shape) for t in batch.values()} == {(3, length)}
    assert batch["attention_mask"].sum(1).tolist() == [longest, 5, 3]
    assert (batch["labels"] != -100).sum(1).tolist() == [longest, 3, 1]
    assert batch["input_ids"][0, longest:].tolist() == [PAD] * (length - longest)


def test_trimmed_logits_keep_the_columns_with_labels():
    batch = Collator(PAD, trim_logits=True)(EXAMPLES)
    assert batch["logits_to_keep"].tolist() == [1, 2, 3]
    assert batch["shift_labels"].tolist() == [[7, 8, 9], [3, -100, -100]]
    assert batch["labels"][:, 1:].tolist() == batch["shift_labels"].tolist()


def test_trimming_changes_neither_loss_nor_token_losses():
    from lora_kernels.cli.finetune.trainer import token_losses
    from lora_kernels.testing import assert_within_budget

    def run(model, trim):
        batch = Collator(PAD, trim)(EXAMPLES)
        out = model(**batch)
        losses = token_losses(out.logits, batch["labels"])
        return torch.cat((out.loss[None], losses[losses != data.IGNORE])).detach()

    model = make_model().eval()
    whole, trimmed = run(model, False), run(model, True)
    exact = run(model.double(), False).double()
    assert len(exact) == 5
    assert_within_budget(trimmed, exact, whole)
    assert_within_budget(trimmed[1:].mean(), exact[0], whole[0])


def test_sampler_is_a_permutation_with_like_lengths():
    lengths = [(i * 37) % 101 + 1 for i in range(203)]
    sampler = LengthGroupedSampler(lengths, 8, seed=1)
    order = list(sampler)
    assert sorted(order) == list(range(203)) and list(sampler) == order

    def waste(indices: list[int]) -> int:
        batches = [indices[i : i + 8] for i in range(0, len(indices), 8)]
        return sum(max(lengths[i] for i in b) * len(b) for b in batches) - sum(lengths)

    assert waste(order) < waste(list(range(203))) / 3
    sampler.set_epoch(1)
    assert list(sampler) != order
    sampler.set_epoch(0)
    assert list(sampler) == order
    assert list(LengthGroupedSampler(lengths[:3], 8, seed=1)) != []


def batches_of(lengths: list[int], epoch: int, first: int, seed: int = 1) -> list[list[int]]:
    """The lengths of each batch of eight."""
    sampler = LengthGroupedSampler(lengths, 8, seed, longest_first=first)
    sampler.set_epoch(epoch)
    order = [lengths[i] for i in sampler]
    return [order[i : i + 8] for i in range(0, len(order), 8)]


@pytest.mark.parametrize("count", [8, 200, 203, 257, 1000])
@pytest.mark.parametrize("first", [1, 2, 6, 10**6])
def test_the_longest_batches_come_first_in_the_first_epoch(count: int, first: int):
    """They are those of the shuffled order, and the others keep theirs."""
    lengths = [(i * 37) % 401 + 1 for i in range(count)]
    plain, sorted_ = batches_of(lengths, 0, 0), batches_of(lengths, 0, first)
    whole = [b for b in plain if len(b) == 8]
    largest = sorted(whole, key=lambda b: (max(b), sum(b)), reverse=True)[:first]
    assert sorted_[: len(largest)] == largest
    assert sorted_[len(largest) :] == [b for b in plain if b not in largest]
    assert max(sorted_[0]) == max(lengths)  # which a short batch at the end would keep for later
    assert batches_of(lengths, 1, first) == batches_of(lengths, 1, 0)


def test_of_batches_as_long_the_fullest_comes_first():
    lengths = [64] * 8 + [64, *[40] * 7] * 20
    longest = batches_of(lengths, 0, 1)[0]
    assert longest == [64] * 8


def test_fewer_examples_than_a_batch():
    for count in (0, 1, 7):
        assert sorted(LengthGroupedSampler(range(count), 8, 1, longest_first=2)) == [*range(count)]
