"""Training data: files to token ids and labels.

An example is `{"input_ids": [...], "labels": [...]}`; a label of -100 gives no loss.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_kernels.cli.errors import UsageError

IGNORE = -100
Message = dict[str, str]
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
        """A digest of every token and label: two runs with the same one saw the same data."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            digest.update(b"part")
            for example in part:
                digest.update(repr((example["input_ids"], example["labels"])).encode())
        return digest.hexdigest()[:16]


def read_conversations(path: Path) -> list[list[Message]]:
    """The conversations of a JSONL file: each line has `prompt` and `response`, or `messages`.

    Raises:
        UsageError: naming the file and the line that is not such an object.
    """
    conversations = []
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UsageError(f"{path}, line {number}: not JSON ({error})") from None
            conversations.append(_conversation(record, f"{path}, line {number}"))
    if not conversations:
        raise UsageError(f"{path}: holds no example")
    return conversations


def pair(prompt: Any, response: Any) -> list[Any]:
    """One question and its answer."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def check_file(path: Path) -> None:
    """Raise UsageError unless it is a file."""
    if path.is_dir():
        raise UsageError(f"--data: {str(path)!r} is a folder, expected a .jsonl or a text file")
    if not path.exists():
        raise UsageError(f"--data: no file {str(path)!r}")


def _read_text(path: Path) -> str:
    check_file(path)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text ({error})") from None


def _conversation(record: Any, where: str) -> list[Message]:
    expected = 'expected {"prompt": ..., "response": ...} or {"messages": [...]}'
    if not isinstance(record, dict):
        raise UsageError(f"{where}: got {type(record).__name__}, {expected}")
    if "messages" in record:
        messages = record["messages"]
    elif "prompt" in record and "response" in record:
        messages = pair(record["prompt"], record["response"])
    else:
        raise UsageError(f"{where}: got the keys {sorted(record)}, {expected}")
    if not isinstance(messages, list) or not messages:
        raise UsageError(f"{where}: messages must be a list that is not empty")
    for message in messages:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise UsageError(f"{where}: every message needs a text `role` and a text `content`")
    if not any(m["role"] == "assistant" and m["content"] for m in messages):
        raise UsageError(f"{where}: no answer to learn (an assistant message with content)")
    return messages


def split(items: Sequence[Any], fraction: float, seed: int) -> tuple[list[Any], list[Any]]:
    """(train, held out): a seeded random share is held out, both in their first order."""
    count = held_out_count(len(items), fraction)
    chosen = set(random.Random(seed).sample(range(len(items)), count))
    train = [item for i, item in enumerate(items) if i not in chosen]
    return train, [items[i] for i in sorted(chosen)]


def held_out_count(total: int, fraction: float) -> int:
    """How many of `total` examples are held out: at least one, and one at least is trained on.

    Raises:
        UsageError: with fewer than two examples, where a share is asked for.
    """
    if fraction == 0:
        return 0
    if total < 2:
        raise UsageError(
            f"--data: {total} example(s); at least 2 are needed to hold one out "
            "(--eval-fraction 0 trains without a held-out loss)"
        )
    return min(max(1, round(total * fraction)), total - 1)


def segments(tokenizer: Any, messages: list[Message]) -> list[tuple[str, bool]]:
    """The conversation as pieces of text, in order, each with "is this learned?".

    Only the assistant's words and the token that ends its turn are learned. The pieces are
    tokenised one by one, so that a prompt has the ids it has when the model is asked.

    Raises:
        UsageError: the chat template rewrites earlier turns when one is added.
    """
    if not tokenizer.chat_template:
        if len(messages) == 2 and messages[0]["role"] == "user":
            bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
            return [
                (f"{bos}{messages[0]['content']}\n", False),
                (messages[1]["content"] + eos, True),
            ]
        raise UsageError(
            "--data: the model has no chat template, so only prompt/response pairs can be used"
        )
    pieces: list[tuple[str, bool]] = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:i], prompt=True)
        after = render(tokenizer, messages[: i + 1])
        if not before.startswith(done) or not after.startswith(before):
            raise UsageError(
                "--data: this model's chat template rewrites earlier turns, so the answers cannot "
                "be told from the prompts; use single-turn data"
            )
        answer = after[len(before) :]
        learned = answer.rstrip()  # the line break after the end-of-turn token is the template's
        pieces += [(before[len(done) :], False), (learned, True)]
        done = before + learned
    return pieces


def render(tokenizer: Any, messages: list[Message], prompt: bool = False) -> str:
    """The messages through the model's chat template; with `prompt`, up to where it answers."""
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)


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
    tokenizer: Any, conversations: Iterable[list[Message]], max_length: int
) -> tuple[list[Example], int, int]:
    """(examples, how many were cut, how many were dropped because no answer was left)."""
    examples, truncated, dropped = [], 0, 0
    for messages in conversations:
        example = encode(tokenizer, segments(tokenizer, messages), max_length + 1)
        if len(example["input_ids"]) > max_length:
            truncated += 1
            example = {key: value[:max_length] for key, value in example.items()}
        # The first token of a sequence is never predicted.
        if any(label != IGNORE for label in example["labels"][1:]):
            examples.append(example)
        else:
            dropped += 1
    return examples, truncated, dropped


def load_chat(
    tokenizer: Any,
    train: list[list[Message]],
    held_out: list[list[Message]],
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
        last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
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
    text = _read_text(path)
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
    for block in held_out or train:
        start = min(16, len(block) // 2)
        data.prompts.append(tokenizer.decode(block[:start]))
        data.references.append(tokenizer.decode(block[start : start + 48]))
    return data


def load_file(
    tokenizer: Any, path: Path, *, fraction: float, max_length: int, seed: int
) -> Dataset:
    """A data file: `.jsonl` and `.json` hold conversations, anything else is plain text."""
    if path.suffix.lower() in (".jsonl", ".json"):
        train, held_out = split(read_conversations(path), fraction, seed)
        return load_chat(tokenizer, train, held_out, max_length)
    return load_text(tokenizer, path, fraction, max_length)
