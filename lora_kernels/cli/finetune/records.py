"""Reading data files as conversations, from rows of several layouts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_kernels.cli.errors import UsageError

Message = dict[str, Any]  # role, content, and whatever else the chat template reads
TEXT = "plain text"  # the role of a row of plain text

# Names of the speakers in ShareGPT's and other files, and the roles of chat templates.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
# (prompt, addition to it, answer): the first layout whose prompt and answer are there counts.
PAIRS = (
    ("prompt", None, "response"),
    ("prompt", None, "completion"),
    ("instruction", "input", "output"),  # Alpaca
    ("instruction", "context", "response"),  # Dolly
    ("question", None, "answer"),
    ("input", None, "output"),
)
TABLES = (".csv", ".tsv", ".xlsx", ".parquet", ".arrow")  # else learned with their commas
EXPECTED = (
    'expected {"prompt": ..., "response": ...}, {"messages": [...]}, {"text": ...}, or the keys of '
    "Alpaca (instruction, output) or ShareGPT (conversations)"
)


class Conversation(list[Message]):
    """Messages, and `where` they were read: file and row; "" if not from a file."""

    def __init__(self, messages: list[Message], where: str = "") -> None:
        super().__init__(messages)
        self.where = where


def pair(prompt: Any, response: Any) -> list[Message]:
    """One question and its answer."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def check_file(path: Path) -> None:
    """Raise UsageError unless the path is a file."""
    if path.is_dir():
        raise UsageError(f"--data: {str(path)!r} is a folder, expected a .jsonl or a text file")
    if not path.exists():
        raise UsageError(f"--data: no file {str(path)!r}")
    if path.suffix.lower() in TABLES:
        raise UsageError(
            f"--data: {str(path)!r} is a table; write its rows as .jsonl (a .txt is plain text)"
        )


def read_text(path: Path) -> str:
    """The file's text, without a byte order mark, with line feeds at the ends of lines.

    Raises:
        UsageError: it is not a file, cannot be read, or is not UTF-8.
    """
    check_file(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UsageError(f"--data: cannot read {str(path)!r}: {error.strerror}") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"{path}, line {line}: not UTF-8 text ({error.reason}); save the file as UTF-8"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_conversations(path: Path) -> list[Conversation]:
    """The rows of a JSON Lines file, or of a JSON file that holds an array.

    Raises:
        UsageError: a row cannot be used; the message names the file and the row.
    """
    rows = [_conversation(record, where) for where, record in _records(path)]
    if not rows:
        raise UsageError(f"{path}: holds no example")
    return rows


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, row) of each row."""
    text = read_text(path)
    if path.suffix.lower() == ".json" or text.lstrip().startswith("["):
        found = _array(text)
        if found is not None:
            yield from ((f"{path}, row {i}", record) for i, record in enumerate(found, 1))
            return
    # str.splitlines also splits at U+2028 and others, which may be inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{where}: not JSON ({error}){_expected_lines(text)}") from None


def _expected_lines(text: str) -> str:
    """What was expected of a file whose lines are not JSON, as the end of a message."""
    if text.lstrip()[:1] in "[{" and text.count("\n") > text.count("}\n"):
        return "; expected one object in each line, or a file that is one array"
    return "; expected one object in each line"


def _array(text: str) -> list[Any] | None:
    """The rows of a text that is one JSON value: an array, or an object that holds one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        if _layout(value) is not None:
            return [value]
        lists = [v for v in value.values() if isinstance(v, list)]
        return lists[0] if len(lists) == 1 else [value]
    if isinstance(value, list) and all(isinstance(record, dict) for record in value):
        return value
    return None


def _layout(record: dict[str, Any]) -> Any:
    """The layout of a row: a key of messages, a triple of PAIRS, or "text"; None if unknown."""
    for key in ("messages", "conversations", "conversation"):
        if record.get(key) is not None:
            return key
    for names in PAIRS:
        if record.get(names[0]) is not None and record.get(names[2]) is not None:
            return names
    return "text" if record.get("text") is not None else None


def _conversation(record: Any, where: str) -> Conversation:
    if not isinstance(record, dict):
        raise UsageError(f"{where}: got {type(record).__name__}, {EXPECTED}")
    layout = _layout(record)
    if layout is None:
        raise UsageError(f"{where}: got the keys {sorted(record)}, {EXPECTED}")
    if layout == "text":
        if not isinstance(record["text"], str) or not record["text"].strip():
            raise UsageError(f"{where}: `text` must be a text that is not empty")
        messages = [{"role": TEXT, "content": record["text"]}]
    else:
        given = record[layout] if isinstance(layout, str) else _pair(record, layout)
        if not isinstance(given, list) or not given:
            raise UsageError(f"{where}: {layout} must be a list that is not empty")
        messages = [_message(message, where) for message in given]
        if not any(m["role"] == "assistant" and (m["content"] or calls(m)) for m in messages):
            raise UsageError(f"{where}: no answer to learn (an assistant message with content)")
    try:
        json.dumps(messages, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start].encode("unicode_escape").decode()
        raise UsageError(
            f"{where}: invalid Unicode ({half}, half of a character); write the character itself "
            "or both halves, or remove it"
        ) from None
    return Conversation(messages, where)


def _pair(record: dict[str, Any], names: tuple[str, str | None, str]) -> list[Any]:
    """The messages of a row with a prompt and an answer, each a text or a list of messages."""
    prompt, more, answer = (record.get(name) if name else None for name in names)
    if isinstance(more, str) and more.strip() and isinstance(prompt, str):
        prompt = f"{prompt}\n\n{more}"
    system = record.get("system")
    first = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
    if isinstance(prompt, list) and isinstance(answer, list):
        return [*first, *prompt, *answer]
    return first + pair(prompt, answer)


def calls(message: Message) -> Any:
    """The tools that a message calls. Such a message needs no content."""
    return message.get("tool_calls")


def _message(message: Any, where: str) -> Message:
    needs = f"{where}: every message needs a text `role` and a text `content`"
    if not isinstance(message, dict):
        raise UsageError(f"{needs}, got {type(message).__name__}")
    own = dict(message)
    if "from" in own and "role" not in own:
        own["role"] = own.pop("from")
    if "value" in own and "content" not in own:
        own["content"] = own.pop("value")
    if not isinstance(own.get("role"), str) or ("content" not in own and not calls(own)):
        raise UsageError(f"{needs}, got the keys {sorted(message)}")
    own["role"] = ROLES.get(own["role"], own["role"])
    content = own.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    if content is not None and not isinstance(content, str):
        raise UsageError(f"{needs}, got {type(content).__name__}")
    own["content"] = content or ""
    return own


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    if kind == "text" and isinstance(part, dict) and isinstance(part.get("text"), str):
        return part["text"]
    raise UsageError(
        f"{where}: a content part of type {kind!r}; only parts of type 'text' with a `text` can be "
        "learned, remove the others"
    )
