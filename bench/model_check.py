"""Does a whole model answer right? Its logits beside those of the same weights in fp64.

The oracle is transformers' own model whose linear layers are the plain expression, in fp64 on the
stored values; the yardstick is the same in the model's dtype. As of a layer (`bench.verify`), ours
must stay within the package's budget, and a peer within its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from bench.cases import DTYPES
from bench.model_providers import (
    B_STD,
    ModelProvider,
    ModelSpec,
    load_model,
    same_start,
    save_weights,
)
from bench.providers.plain import plain_lora
from bench.verify import Verdict, peer_gate
from lora_kernels import NF4Weight, use_backend
from lora_kernels.testing import assert_within_budget

CHECKED = 8  # positions


class PlainLinear(nn.Module):
    """The plain expression in x's dtype over a weight in its own; the fp32 adapter may be off.

    `stored`, where it is set, gives another weight.
    """

    def __init__(self, weight: Tensor, r: int, scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        n, k = weight.shape
        self.weight, self.scale, self.dtype = weight, scale, dtype
        self.quantised = self.adapted = False
        self.stored: Callable[[], Tensor] | None = None
        self.lora_A = nn.Parameter(torch.zeros(r, k))
        self.lora_B = nn.Parameter(torch.zeros(n, r))

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight if self.stored is None else self.stored()
        wide = x.dtype == torch.float64
        if self.quantised:
            quantised = NF4Weight.quantize(self.weight)
            with use_backend("reference"):
                w = quantised.dequantize(x.dtype)
        w = w.to(x.dtype)
        if not self.adapted:
            return linear(x, w)
        a, b = (t.double() if wide else t for t in (self.lora_A, self.lora_B))
        return plain_lora(x, w, a, b, None, self.scale, 0.0)


class Oracle:
    """The worker that answers `exact`; it also writes the weights that the others read."""

    trainable = 0

    def __init__(self, device: torch.device, spec: ModelSpec) -> None:
        self.dtype = DTYPES[spec.dtype]
        self.model: Any = load_model(spec, device)
        self.spec = spec

    def write(self, path: str) -> dict[str, Any]:
        save_weights(self.model, path)
        self._prepare()
        return {}

    def _prepare(self) -> None:
        spec, head = self.spec, self.model.get_output_embeddings()
        self.layers: dict[str, PlainLinear] = {}
        for name, module in list(self.model.named_modules()):
            if type(module) is not nn.Linear or module is head:
                continue
            plain = PlainLinear(module.weight.detach(), spec.r, spec.alpha / spec.r, self.dtype)
            parent, _, own = name.rpartition(".")
            self.model.get_submodule(parent).add_module(own, plain)
            self.layers[f"{name}.weight"] = plain
        self.model.requires_grad_(False)
        for layer in self.layers.values():
            layer.lora_A.requires_grad_()
            layer.lora_B.requires_grad_()
        same_start(self.model, B_STD)
        self.tied = head.weight
        head.forward = self._head
        embedding = self.model.get_input_embeddings()
        embedding.forward = lambda ids: self.tied[ids].to(self.compute)

    def _head(self, x: Tensor) -> Tensor:
        """In parts: a large vocabulary's in fp64 would take gigabytes."""
        return torch.cat([linear(x, w.to(x.dtype)) for w in self.tied.split(1 << 14)], -1)

    @torch.no_grad()
    def exact(
        self,
        path: str,
        tokens: list[int],
        first: int,
        quantised: bool,
        adapted: bool,
        weights: str | None = None,
    ) -> dict[str, Any]:
        """Write the logits from position `first` on, in fp64 and in the model's dtype. `weights` is
        a GGUF file to take them from."""
        kept, stored = self.tied, {}
        if weights is not None:
            from bench.llama_cpp import gguf_name, read_weights

            read = read_weights(weights, self.model.config)
            stored = {name: read[gguf_name(name)] for name in self.layers}
            self.tied = read["token_embd.weight"]()
        for name, layer in self.layers.items():
            layer.quantised, layer.adapted = quantised, adapted
            layer.stored = stored.get(name)
        found = {"oracle": self._logits(torch.float64, tokens, first)}
        found["plain"] = self._logits(self.dtype, tokens, first)
        self.tied = kept
        torch.save(found, path)
        return {}

    def _logits(self, dtype: torch.dtype, tokens: list[int], first: int) -> Tensor:
        self.compute = dtype
        ids, rows = torch.tensor([tokens]), len(tokens) - first
        logits: Tensor = self.model(input_ids=ids, use_cache=False, logits_to_keep=rows).logits[0]
        return logits


def verdict(provider: ModelProvider, got: Path, exact: Path) -> Verdict:
    """Whether a provider's logits are as near to the oracle's as they must be."""
    logits, want = torch.load(got), torch.load(exact)
    try:
        if provider.ours:
            assert_within_budget(logits, want["oracle"], want["plain"], "logits")
        else:
            peer_gate("logits", logits, want["oracle"], want["plain"])
    except AssertionError as error:
        return Verdict(False, str(error).splitlines()[0])
    return Verdict(True)
