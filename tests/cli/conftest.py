"""A tiny random Llama with a chat tokenizer, made in a second, and a way to run the command."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Tiny matrices: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_tokenizer(chat: bool = True) -> Any:
    """Bytes as tokens, with <|start|>, <|end|> and padding."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True) for t in ("<|pad|>", "<|start|>", "<|end|>")]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>"
    )
    if chat:
        fast.chat_template = TEMPLATE
    return fast


def make_model(vocab: int = 259) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=256,
        bos_token_id=None,
        eos_token_id=258,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Twenty prompt/response lines of different lengths."""
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"Say {'very ' * (i % 4)}{i}", "response": "abc " * (1 + i % 5) + str(i)}
        for i in range(20)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


Command = Callable[..., int]


@pytest.fixture
def finetune(tiny: Path, tmp_path: Path) -> Command:
    """`lora-kernels finetune` on the tiny model, into tmp_path/out unless told otherwise."""
    import argparse

    from lora_kernels.cli.finetune.args import add_arguments, parse

    def call(*options: Any, callbacks: list[Any] | None = None) -> int:
        from lora_kernels.cli.finetune.job import finetune

        argv = [str(option) for option in options]
        if "--output" not in argv:
            argv += ["--output", str(tmp_path / "out")]
        if "--resume" not in argv and "--model" not in argv:
            argv += ["--model", str(tiny), "--dtype", "float32", "--generate", "1"]
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        return finetune(parse(parser, argv), callbacks)

    return call
