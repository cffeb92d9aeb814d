"""One provider's fine-tuning step in a process of its own: `python -m bench.step_worker`.

Reads one JSON command a line, answers one JSON line each:
    {"do": "load", "provider": ..., "device": ..., "threads": ..., <fields of StepSpec>}
    {"do": "step"}      one optimiser step: {"seconds", "loss"}
    {"do": "memory"}    one more step under a fresh peak: {"peak_bytes", "resident_bytes"}
An error is answered by {"error": ...} and ends the process.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TextIO

import torch
from torch import nn

from bench import memory

PROVIDERS = ("ours", "ours-dense", "peft+bnb", "peft")


@dataclass(frozen=True)
class StepSpec:
    """The step: the model, the batch and the adapters.

    `model` is a path or name as `lora-kernels finetune --model` takes it, None the demo's model;
    "tiny" a random Llama of two layers, for tests.
    """

    model: str | None = None
    batch: int = 4
    tokens: int = 256
    r: int = 16
    alpha: int = 32
    dropout: float = 0.05
    dtype: str = "bf16"
    learning_rate: float = 1e-3


def load_model(spec: StepSpec, device: torch.device) -> nn.Module:
    from bench.cases import DTYPES

    dtype = DTYPES[spec.dtype]
    if spec.model == "tiny":
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        model: Any = LlamaForCausalLM(config).to(dtype)
    else:
        from lora_kernels.cli.finetune.models import load_model as load
        from lora_kernels.cli.finetune.models import quiet_transformers
        from lora_kernels.cli.finetune.source import Source

        quiet_transformers()
        model = load(Source.of(spec.model), dtype)
    model.config.use_cache = False
    return model.to(device)


def adapt(model: nn.Module, provider: str, spec: StepSpec) -> nn.Module:
    """Freeze the model and put adapters on every linear layer but the head.

    Adapters are fp32, PEFT's default and ours. Both 4-bit providers hold the same bytes. Ours
    computes the loss without the logits, as `lora-kernels finetune` does.
    """
    if provider in ("ours", "ours-dense"):
        from lora_kernels import fuse_loss
        from lora_kernels.adapters import apply_lora

        quantize = "nf4" if provider == "ours" else None
        apply_lora(model, spec.r, spec.alpha, spec.dropout, quantize=quantize)  # type: ignore[arg-type]
        fuse_loss(model)
        return model
    from peft import LoraConfig, get_peft_model

    model.requires_grad_(False)
    if provider == "peft+bnb":
        quantise_for_bnb(model)
    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)  # type: ignore[arg-type]


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


def same_start(model: nn.Module) -> list[nn.Parameter]:
    """Trainable parameters, with the same A in the same layer for every provider, and B zero."""
    generator = torch.Generator().manual_seed(0)
    trainable = []
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            trainable.append(p)
            if "lora_A" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * p.shape[1] ** -0.5)
            else:
                p.zero_()
    return trainable


class Worker:
    """A model, its optimiser and one fixed batch."""

    def __init__(self, provider: str, device: torch.device, spec: StepSpec) -> None:
        if provider not in PROVIDERS:
            raise ValueError(f"provider: got {provider!r}, expected one of {', '.join(PROVIDERS)}")
        self.device = device
        self.model = adapt(load_model(spec, device), provider, spec).train()
        self.parameters = same_start(self.model)
        self.optimiser = torch.optim.AdamW(self.parameters, lr=spec.learning_rate)
        vocabulary: int = self.model.config.vocab_size  # type: ignore[union-attr,assignment]
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(vocabulary, (spec.batch, spec.tokens), generator=generator)
        self.tokens = tokens.to(device)
        torch.manual_seed(2)

    def step(self) -> dict[str, Any]:
        self._synchronize()
        start = time.perf_counter()
        loss = self.model(input_ids=self.tokens, labels=self.tokens).loss
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self._synchronize()
        return {"seconds": time.perf_counter() - start, "loss": loss.item()}

    def memory(self) -> dict[str, Any]:
        """The whole process on a CPU, torch's allocations on CUDA; loading is over by then."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            resident = torch.cuda.memory_allocated(self.device)
            self.step()
            peak = torch.cuda.max_memory_allocated(self.device)
            return {"peak_bytes": peak, "resident_bytes": resident}
        if not memory.reset_peak() or (before := memory.resident_bytes()) is None:
            return {"peak_bytes": None, "resident_bytes": None}
        self.step()
        after = memory.resident_bytes()
        assert after is not None
        return {"peak_bytes": after[1], "resident_bytes": before[0]}

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def serve(commands: TextIO, answer: Callable[[dict[str, Any]], None]) -> int:
    """Answer commands until there are no more; 1 after an error."""
    worker: Worker | None = None
    for line in commands:
        command = json.loads(line)
        try:
            if command["do"] == "load":
                torch.set_num_threads(command["threads"])
                spec = StepSpec(**{f.name: command[f.name] for f in fields(StepSpec)})
                worker = Worker(command["provider"], torch.device(command["device"]), spec)
                trainable = sum(p.numel() for p in worker.parameters)
                answer({"trainable": trainable})
            elif worker is None:
                raise ValueError("do: got a command before load")
            else:
                answer({"step": worker.step, "memory": worker.memory}[command["do"]]())
        except Exception as error:  # whatever a peer raises goes to the parent
            answer({"error": f"{type(error).__name__}: {error}"})
            return 1
    return 0


def main() -> int:
    # Whatever libraries print must not get between the answers.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return serve(sys.stdin, lambda value: print(json.dumps(value), file=channel, flush=True))


if __name__ == "__main__":
    sys.exit(main())
