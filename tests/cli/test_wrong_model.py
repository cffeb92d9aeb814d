"""Models that are no causal language model, or not a whole one, are refused before training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers
from safetensors.torch import load_file, save_file

from lora_kernels.cli import main
from lora_kernels.cli.errors import UsageError
from lora_kernels.cli.finetune.causal import check_reads_backwards
from lora_kernels.cli.finetune.source import Source

from .conftest import make_model, make_tokenizer

SIZES = {
    "vocab_size": 259,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
}
LLAMA = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
TIED = transformers.Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True)
BERT = transformers.BertConfig(**SIZES)
ROBERTA = transformers.RobertaConfig(**SIZES)
T5 = transformers.T5Config(vocab_size=259, d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16)
MODELS: dict[str, tuple[Any, str]] = {
    "classifier": (
        lambda: transformers.LlamaForSequenceClassification(LLAMA),
        "is a LlamaForSequenceClassification, expected a causal language model",
    ),
    # Its head would be the embedding: nothing is missing, and it is still the wrong model.
    "tied classifier": (
        lambda: transformers.Qwen2ForTokenClassification(TIED),
        "is a Qwen2ForTokenClassification, expected a causal language model",
    ),
    "no head": (lambda: transformers.LlamaModel(LLAMA), "lack lm_head.weight, which would be rand"),
    "encoder": (lambda: transformers.BertForMaskedLM(BERT), "is a BertForMaskedLM, expected"),
    "bare encoder": (lambda: transformers.BertModel(BERT), "lack cls.predictions"),
    # What transformers makes of an encoder, and saves under the name of a language model.
    "encoder with a causal name": (
        lambda: transformers.RobertaForCausalLM(ROBERTA),
        "is an encoder (RobertaForCausalLM",
    ),
    "encoder and decoder": (
        lambda: transformers.T5ForConditionalGeneration(T5),
        "is an encoder with a decoder (T5ForConditionalGeneration)",
    ),
}


def command(name: str, model: Path, pairs: Path, out: Path) -> list[str]:
    if name == "finetune":
        return [name, "--model", str(model), "--data", str(pairs), "--output", str(out)]
    return [name, "--model", str(model), "--adapters", "1", "--batch", "1", "--plot", f"{out}.png"]


@pytest.mark.parametrize("kind", MODELS)
def test_refused(kind, tmp_path, pairs, capsys):
    make, message = MODELS[kind]
    make().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    for name in ("finetune", "serve-demo"):
        capsys.readouterr()
        assert main(command(name, tmp_path / "model", pairs, tmp_path / "out")) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith(f"lora-kernels {name}: error: --model: ") and message in line
    assert not (tmp_path / "out").exists()


def test_a_layer_that_the_file_lacks_or_has_in_another_size(tiny, tmp_path, pairs, capsys):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    weights = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    for other, message in ((None, f"lack {name}"), (torch.zeros(95, 64), "cannot load")):
        changed = {k: v for k, v in weights.items() if k != name}
        changed |= {} if other is None else {name: other}
        save_file(changed, model / "model.safetensors", {"format": "pt"})
        assert main(command("finetune", model, pairs, tmp_path / "out")) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_read_backwards_pass(dtype):
    decoder = transformers.BertConfig(**SIZES, is_decoder=True)
    experts = transformers.MixtralConfig(
        **SIZES, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
    )
    models = [
        make_model(),
        transformers.BertLMHeadModel(decoder),
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=2)
        ),
        transformers.MixtralForCausalLM(experts),
    ]
    for model in models:
        check_reads_backwards(model.to(dtype).eval(), Source("here"))
    with pytest.raises(UsageError, match="encoder"):
        model = transformers.BertLMHeadModel(BERT).to(dtype).eval()
        check_reads_backwards(model, Source("here"))


def test_lengths(finetune, pairs, tmp_path):
    with pytest.raises(UsageError, match="--max-length: got 257, expected at most 256, the model"):
        finetune("--data", pairs, "--max-length", 257)
    assert not (tmp_path / "out").exists()
    # The default is what the model takes; a resumed run keeps it.
    assert finetune("--data", pairs, "--max-steps", 1) == 0
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["settings"]["max_length"] == 256
    assert finetune("--resume") == 0


def test_long_prompts_are_answered_within_the_models_length(tmp_path, finetune):
    """Learned positions: one token too many is an index error."""
    config = transformers.OPTConfig(
        vocab_size=259,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    )
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    make_tokenizer().save_pretrained(tmp_path / "opt")
    data = tmp_path / "long.jsonl"
    rows = [{"prompt": "Q" * (10 + 90 * (i % 2)), "response": "abc"} for i in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--model", tmp_path / "opt", "--data", data, "--max-steps", 1, "--generate", 4)
    assert finetune(*options, "--dtype", "float32", "--eval-fraction", 0) == 0
    answers = json.loads((tmp_path / "out" / "generations.json").read_text())
    assert len(answers) == 4
