"""Training data: files to token ids and labels.

An example is `{"input_ids": [...], "labels": [...]}`. A label of -100 is not learned.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_kernels.cli.errors import UsageError, one_line
from lora_kernels.cli.finetune.records import (
    TEXT,
    Message,
    calls,
    read_conversations,
    read_text,
)

IGNORE = -100
THINK = "<think>"
Example = dict[str, list[int]]


@dataclass
class Dataset:
    """Encoded examples, and for each held-out example the prompt to generate from."""

    train: list[Example]
    held_out: list[Example]
    prompts: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    truncated: int = 0
    dropped: int = 0

    def fingerprint(self) -> str:
        """A digest of all tokens and labels. Runs with the same digest saw the same data."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            digest.update(b"part")
            for example in part:
                digest.update(repr((example["input_ids"], example["labels"])).encode())
        return digest.hexdigest()[:16]


def split(items: Sequence[Any], fraction: float, seed: int) -> tuple[list[Any], list[Any]]:
    """(train, held out). A seeded random share is held out; both keep their order."""
    count = held_out_count(len(items), fraction)
    chosen = set(random.Random(seed).sample(range(len(items)), count))
    train = [item for i, item in enumerate(items) if i not in chosen]
    return train, [items[i] for i in sorted(chosen)]


def held_out_count(total: int, fraction: float) -> int:
    """How many of `total` examples are held out: at least one, and not all.

    Raises:
        UsageError: a share is asked for, and there are fewer than two examples.
    """
    if fraction == 0:
        return 0
    if total < 2:
        raise UsageError(
            f"--data: {total} example(s); at least 2 are needed to hold one out "
            "(--eval-fraction 0 trains without a held-out loss)"
        )
    return min(max(1, round(total * fraction)), total - 1)


class Rewritten(UsageError):
    """The chat template renders an earlier turn differently once another turn follows."""


def segments(tokenizer: Any, messages: Sequence[Message]) -> list[tuple[str, bool]]:
    """The conversation as (text, whether it is learned) pieces, in order.

    Only the assistant's words and the token that ends its turn are learned. Each piece is tokenised
    by itself, so that a prompt gets the same ids as when the model generates.

    Raises:
        Rewritten: the chat template rewrites earlier turns when one is added.
        UsageError: it cannot render the conversation at all.
    """
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    if messages[0]["role"] == TEXT:
        return [(f"{bos}{messages[0]['content']}{eos}", True)]
    if not tokenizer.chat_template:
        if len(messages) == 2 and messages[0]["role"] == "user":
            return [
                (f"{bos}{messages[0]['content']}\n", False),
                (messages[1]["content"] + eos, True),
            ]
        raise UsageError(
            "the model has no chat template, so only prompt/response pairs and `text` can be used"
        )
    pieces: list[tuple[str, bool]] = []
    done = ""
    for i in answers(messages):
        before, learned = turn(tokenizer, messages, i)
        if not before.startswith(done):
            raise Rewritten(
                "this model's chat template rewrites earlier turns, so the answers cannot be told "
                "from the prompts; use single-turn data"
            )
        pieces += [(before[len(done) :], False), (learned, is_answer(messages[i]))]
        done = before + learned
    return pieces


def answers(messages: Sequence[Message]) -> list[int]:
    """The indices of the assistant's messages."""
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def is_answer(message: Message) -> bool:
    """Whether a message is an answer to learn. An empty one would teach silence."""
    return bool(message["content"] or calls(message))


def turn(tokenizer: Any, messages: Sequence[Message], i: int) -> tuple[str, str]:
    """(prompt, answer) as text, for the answer at index `i`.

    If the template opens a reasoning block for the model and renders the answer without one, the
    model learns to close the block at once.
    """
    before = render(tokenizer, messages[:i], prompt=True)
    after = render(tokenizer, messages[: i + 1])
    thought = ""
    if not after.startswith(before):
        head, opened, _ = before.rpartition(THINK)
        if not opened or before[len(head) + len(THINK) :].strip() or not after.startswith(head):
            raise UsageError(
                "this model's chat template rewrites earlier turns when an answer follows, so the "
                "answer cannot be told from the prompt; use another --model, or `text` rows"
            )
        answer = after[len(head) :]
        if answer.startswith(THINK):  # only the white space differs
            return before, answer[len(THINK) :].strip()
        thought = f"\n{THINK.replace('<', '</')}\n\n"
        after = before + answer.lstrip()
    # The line break after the end-of-turn token belongs to the template.
    return before, thought + after[len(before) :].rstrip()


def render(tokenizer: Any, messages: Sequence[Message], prompt: bool = False) -> str:
    """The messages rendered by the model's chat template; with `prompt`, up to the next answer.

    Raises:
        UsageError: the template refuses them; the message quotes it.
    """
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompt
        )
    except Exception as error:  # the template's, of any kind
        roles = ", ".join(message["role"] for message in messages)
        raise UsageError(
            f"the model's chat template refuses the roles {roles} ({one_line(error)}); leave out "
            "or merge the messages that it does not take"
        ) from error


def encode(tokenizer: Any, pieces: Iterable[tuple[str, bool]], max_length: int) -> Example:
    """Token ids and labels of the pieces, cut at `max_length` tokens."""
    ids: list[int] = []
    labels: list[int] = []
    for text, learned in pieces:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += tokens
        labels += tokens if learned else [IGNORE] * len(tokens)
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def encode_all(
    tokenizer: Any, conversations: Iterable[Sequence[Message]], max_length: int
) -> tuple[list[Example], int, int]:
    """(examples, how many were cut, how many were dropped because no answer was left)."""
    encoded, truncated, dropped = [], 0, 0
    for messages in conversations:
        for pieces in _located(tokenizer, messages):
            example = encode(tokenizer, pieces, max_length + 1)
            if len(example["input_ids"]) > max_length:
                truncated += 1
                example = {key: value[:max_length] for key, value in example.items()}
            # The first token of a sequence is never predicted.
            if any(label != IGNORE for label in example["labels"][1:]):
                encoded.append(example)
            else:
                dropped += 1
    return encoded, truncated, dropped


def _located(tokenizer: Any, messages: Sequence[Message]) -> list[list[tuple[str, bool]]]:
    """The pieces of each example of a conversation. Errors name its row.

    A conversation is one example. If the template rewrites earlier turns, it is one example for
    each answer, so that each is learned after the prompt that the model will see.
    """
    try:
        try:
            return [segments(tokenizer, messages)]
        except Rewritten:
            turns = (
                turn(tokenizer, messages, i) for i in answers(messages) if is_answer(messages[i])
            )
            return [[(before, False), (learned, True)] for before, learned in turns]
    except UsageError as error:
        raise UsageError(f"{getattr(messages, 'where', '') or '--data'}: {error}") from error


def load_chat(
    tokenizer: Any,
    train: Sequence[Sequence[Message]],
    held_out: Sequence[Sequence[Message]],
    max_length: int,
) -> Dataset:
    """Encode conversations that are already split.

    Raises:
        UsageError: no training example is left after cutting to `max_length`.
    """
    train_examples, cut_a, dropped_a = encode_all(tokenizer, train, max_length)
    held_out_examples, cut_b, dropped_b = encode_all(tokenizer, held_out, max_length)
    if not train_examples or (held_out and not held_out_examples):
        raise UsageError(f"--max-length {max_length}: no answer is left in the data at that length")
    data = Dataset(train_examples, held_out_examples)
    data.truncated, data.dropped = cut_a + cut_b, dropped_a + dropped_b
    for messages in held_out or train:
        if messages[0]["role"] == TEXT:
            add_text_prompt(data, tokenizer, encode(tokenizer, segments(tokenizer, messages), 64))
            continue
        last = max(i for i in answers(messages) if is_answer(messages[i]))
        if tokenizer.chat_template:
            data.prompts.append(render(tokenizer, messages[:last], prompt=True))
        else:
            data.prompts.append(segments(tokenizer, messages)[0][0])
        data.references.append(messages[last]["content"])
    return data


def load_text(tokenizer: Any, path: Path, fraction: float, max_length: int) -> Dataset:
    """Plain text, cut into blocks of `max_length` tokens; the end of the file is held out.

    Raises:
        UsageError: the file holds fewer than two tokens, or too few for a held-out block.
    """
    text = read_text(path)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"] if text.strip() else []
    blocks = [tokens[i : i + max_length] for i in range(0, len(tokens), max_length)]
    blocks = [block for block in blocks if len(block) > 1]
    if not blocks:
        raise UsageError(f"{path}: holds no text to train on")
    count = held_out_count(len(blocks), fraction)
    train, held_out = blocks[: len(blocks) - count], blocks[len(blocks) - count :]
    data = Dataset(
        [{"input_ids": block, "labels": list(block)} for block in train],
        [{"input_ids": block, "labels": list(block)} for block in held_out],
    )
    for example in data.held_out or data.train:
        add_text_prompt(data, tokenizer, example)
    return data


def add_text_prompt(data: Dataset, tokenizer: Any, example: Example) -> None:
    """The beginning of a text, as a prompt."""
    block = example["input_ids"]
    start = min(16, len(block) // 2)
    data.prompts.append(tokenizer.decode(block[:start]))
    data.references.append(tokenizer.decode(block[start : start + 48]))


def load_file(
    tokenizer: Any, path: Path, *, fraction: float, max_length: int, seed: int
) -> Dataset:
    """A data file: `.jsonl` and `.json` hold rows, anything else is plain text."""
    if path.suffix.lower() in (".jsonl", ".json", ".ndjson"):
        train, held_out = split(read_conversations(path), fraction, seed)
        return load_chat(tokenizer, train, held_out, max_length)
    return load_text(tokenizer, path, fraction, max_length)
