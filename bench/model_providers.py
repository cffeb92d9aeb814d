"""Whole models: who takes part, and how each puts its adapters on the same weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.cases import DTYPES, LAYERS, PROMPT, WHOLE, WHOLE_MODELS

_GENERATE = ("generate",)
B_STD = 0.02  # of a trained adapter, where the model only answers


@dataclass(frozen=True)
class ModelProvider:
    """One that runs a whole model, in a process of its own.

    Attributes:
        quantised, adapted: whether the base is in 4 bits, whether there are adapters.
        needs: packages beside torch.
        ops: what it does.
        unasked: whether it runs where no provider is named.
        heavy: not unasked over a large model: all together would not fit into 24 GiB.
        fused: ours after `lora_kernels.fuse_projections`.
        compiled: after `lora_kernels.compile_decoding`.
    """

    name: str
    quantised: bool = False
    adapted: bool = False
    needs: tuple[str, ...] = ()
    ops: tuple[str, ...] = WHOLE
    unasked: bool = True
    heavy: bool = False
    fused: bool = False
    compiled: bool = False

    @property
    def writes_files(self) -> bool:
        """Whether loading takes the model twice for a while."""
        return self.name.startswith(("llama.cpp", "unsloth"))

    @property
    def ours(self) -> bool:
        return self.name.startswith("ours")


def _ours(name: str, quantised: bool) -> list[ModelProvider]:
    plain = ModelProvider(name, quantised, adapted=True)
    return [
        plain,
        replace(plain, name=f"{name}+fused", fused=True, unasked=False),
        replace(plain, name=f"{name}+compile", compiled=True, heavy=True, ops=_GENERATE),
    ]


MODEL_PROVIDERS: dict[str, ModelProvider] = {
    p.name: p
    for p in (
        *_ours("ours", True),
        *_ours("ours-dense", False),
        ModelProvider("dense"),
        ModelProvider("dense+compile", ops=_GENERATE, compiled=True, heavy=True),
        ModelProvider("peft", adapted=True, needs=("peft",)),
        ModelProvider("bnb", True, needs=("bitsandbytes",)),
        ModelProvider("peft+bnb", True, True, needs=("peft", "bitsandbytes")),
        ModelProvider("unsloth", True, True, needs=("unsloth",)),
        *(
            ModelProvider(
                f"llama.cpp-{form}{lora}",
                form == "q4_0",
                bool(lora),
                needs=("llama_cpp", "gguf"),
                ops=_GENERATE,
                heavy=form == "bf16" or not lora,
            )
            for form in ("bf16", "q4_0")
            for lora in ("", "+lora")
        ),
    )
}


@dataclass(frozen=True)
class ModelSpec:
    """What a process is told: the model, the work, the adapters.

    `model` is a path or name as `lora-kernels finetune --model` takes it, None the demo's model, or
    one of `bench.cases.WHOLE_MODELS` with random weights. `weights` is a file that another process
    wrote (`save_weights`), which all of them then read. `tokens` are those of a row in a step, the
    new ones in `generate`, the prompt's in `prefill`.
    """

    op: str = "step"
    model: str | None = None
    weights: str | None = None
    batch: int = 4
    tokens: int = 256
    prompt: int = PROMPT
    r: int = 16
    alpha: int = 32
    dropout: float = 0.05
    dtype: str = "bf16"
    learning_rate: float = 1e-3


def random_config(name: str) -> Any:
    """The configuration of a model of `WHOLE_MODELS`, its vocabulary's head tied."""
    from transformers import LlamaConfig

    model, q, k = WHOLE_MODELS[name], LAYERS[f"{name}.q_proj"], LAYERS[f"{name}.k_proj"]
    assert k.n * model.heads == q.n * model.kv_heads
    return LlamaConfig(
        vocab_size=model.vocabulary,
        hidden_size=q.k,
        intermediate_size=LAYERS[f"{name}.gate_proj"].n,
        num_hidden_layers=model.blocks,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        tie_word_embeddings=True,
    )


def load_model(spec: ModelSpec, device: torch.device) -> Any:
    """The plain dense model, in evaluation mode."""
    from transformers import LlamaForCausalLM

    dtype = DTYPES[spec.dtype]
    if spec.weights is not None:
        saved = torch.load(spec.weights, weights_only=False)
        with torch.device("meta"):
            model: Any = LlamaForCausalLM(saved["config"])
        model.load_state_dict(saved["state"], strict=False, assign=True)
        model.tie_weights()
        model.model.rotary_emb = type(model.model.rotary_emb)(saved["config"])
    elif spec.model in WHOLE_MODELS:
        torch.manual_seed(0)
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = LlamaForCausalLM(random_config(spec.model))
        finally:
            torch.set_default_dtype(default)
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    else:
        from lora_kernels.cli.finetune.models import load_model as load
        from lora_kernels.cli.finetune.models import quiet_transformers
        from lora_kernels.cli.finetune.source import Source

        quiet_transformers()
        model = load(Source.of(spec.model), dtype)
    model.config.use_cache = spec.op == "generate"
    model.generation_config.eos_token_id = None  # every sequence is as long as asked for
    return model.to(device).eval()


def save_weights(model: Any, path: str) -> None:
    """For the processes that come after: they need not make them again."""
    torch.save({"config": model.config, "state": model.state_dict()}, path)


def adapt(model: Any, provider: ModelProvider, spec: ModelSpec) -> Any:
    """Freeze the model and, where the provider has them, put adapters on every linear layer but the
    head. Ready to train or to answer.

    Adapters are fp32, PEFT's default and ours. All 4-bit providers hold the same bytes. Ours
    computes a step's loss without the logits, as `lora-kernels finetune` does.
    """
    if provider.name == "unsloth":
        model = _unsloth(model, spec)
    elif provider.ours:
        _adapt_ours(model, provider, spec)
    else:
        model.requires_grad_(False)
        if provider.quantised:
            quantise_for_bnb(model)
        if provider.adapted:
            model = _adapt_peft(model, spec)
    same_start(model, 0.0 if spec.op == "step" else B_STD)
    model.train(spec.op == "step")
    if provider.compiled:
        import lora_kernels

        lora_kernels.compile_decoding(model)  # of the plain model too
    return model


def _adapt_ours(model: Any, provider: ModelProvider, spec: ModelSpec) -> None:
    import lora_kernels

    quantize: Any = "nf4" if provider.quantised else None
    lora_kernels.apply_lora(model, spec.r, spec.alpha, spec.dropout, quantize=quantize)
    if spec.op == "step":
        lora_kernels.fuse_loss(model)
    if provider.fused:
        fuse_projections()(model)


def fuse_projections() -> Callable[[nn.Module], object]:
    """The package's, where this version has it.

    Raises:
        ValueError: it has none.
    """
    import lora_kernels

    found = getattr(lora_kernels, "fuse_projections", None)
    if found is None:
        raise ValueError(f"lora_kernels {lora_kernels.__version__} has no fuse_projections")
    return found  # type: ignore[no-any-return]


def _adapt_peft(model: Any, spec: ModelSpec) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def quantise_for_bnb(model: nn.Module) -> None:
    """Every linear layer but the head becomes a Linear4bit, as bitsandbytes' loader makes them."""
    from bench.providers.peers import bnb_layer
    from lora_kernels import NF4Weight

    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or name.endswith("lm_head"):
            continue
        weight = NF4Weight.quantize(module.weight.detach())
        bias = None if module.bias is None else module.bias.detach()
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], bnb_layer(weight, bias, module.weight.dtype))


def same_start(model: nn.Module, b_std: float = 0.0) -> list[nn.Parameter]:
    """Trainable parameters, with the same values in the same layer for every provider."""
    generator = torch.Generator().manual_seed(0)
    trainable = []
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            trainable.append(p)
            std = p.shape[1] ** -0.5 if "lora_A" in name else b_std
            p.copy_(torch.randn(p.shape, generator=generator) * std)
    return trainable


def _unsloth(model: Any, spec: ModelSpec) -> Any:
    """Unsloth's CPU mode loads from a folder; it has to be imported before the model's classes are
    used, which `bench.step_worker` sees to."""
    import tempfile

    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from unsloth import FastLanguageModel  # type: ignore[import-not-found]

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        words = Tokenizer(WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
        PreTrainedTokenizerFast(
            tokenizer_object=words, unk_token="<unk>", eos_token="<eos>", pad_token="<unk>"
        ).save_pretrained(folder)
        loaded, _ = FastLanguageModel.from_pretrained(
            folder,
            max_seq_length=1024,
            dtype=DTYPES[spec.dtype],
            load_in_4bit=True,
            use_gradient_checkpointing=False,
        )
    names = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if _is_target(n, m)})
    adapted = FastLanguageModel.get_peft_model(
        loaded,
        r=spec.r,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=names,
        use_gradient_checkpointing=False,
    )
    adapted.generation_config.eos_token_id = None
    return adapted


def _is_target(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and not name.endswith("lm_head")


def use_cpu_mode_of_unsloth() -> None:
    os.environ.update(UNSLOTH_FORCE_CPU="1", UNSLOTH_DISABLE_STATISTICS="1", HF_HUB_OFFLINE="1")
    import unsloth  # type: ignore[import-not-found]  # noqa: F401


def scratch(folder: str | Path, name: str) -> str:
    """A file's path in the folder that the processes of a case share."""
    return str(Path(folder) / name)
