"""Inputs of a case: seeded, with enough copies of the weight that no cache holds them all."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases import DTYPES, EMBED, Case, Layer
from bench.costmodel import weight_bytes
from lora_kernels import NF4Weight, use_backend
from lora_kernels.functional import RankPages, page_adapters, page_embedding_adapters
from tools.op_inputs.source import Source

MAX_COPIES = 128
MANY_COPIES = 512  # of one small layer: 128 of SmolLM2's in 4 bits would fit into a large cache
INPUT_COPIES = 4  # an activation has just been written by the layer before: a few are enough


@dataclass(frozen=True)
class Projection:
    """One layer's tensors; A and B have no row and no column where there is no adapter."""

    w: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor


class CaseData:
    """Tensors of one case, made when first asked for and shared by all providers.

    Args:
        case: what is measured.
        device: where the tensors live.
        rotate_bytes: the weights' copies take at least this much together (at most 512 copies).
        seed: of the values.

    Attributes:
        projections: one for each layer; `source`, `bias`, `a` and `b` are the first one's.
        x: an input for each call in turn; `up`, of a gated activation alone, is its second one.
    """

    def __init__(
        self, case: Case, device: torch.device, rotate_bytes: int = 1 << 30, seed: int = 0
    ) -> None:
        self.case = case
        self.device = device
        self.rotate_bytes = rotate_bytes
        self.dtype = DTYPES[case.dtype]
        self.adapter_dtype = DTYPES[case.adapter_dtype]
        self._source = self._seeded(seed)
        self.projections = [self._projection(layer) for layer in case.layers if case.has_weight]
        self.x = self._inputs(case.n if case.op == "glu" else case.k)
        self.up = self._inputs(case.n) if case.op == "glu" else []

    def _seeded(self, seed: int) -> Source:
        """Draws where the tensors live: one thread of a CPU takes minutes for a large GPU's."""
        return Source(seed, self.device)

    def _projection(self, layer: Layer) -> Projection:
        # The values a trained layer has: activations of unit size, outputs too.
        case, n, k, draw = self.case, layer.n, layer.k, self._source
        w = draw.weight(n, k, self.dtype)
        bias = draw.normal(n, std=0.1, dtype=self.dtype) if layer.bias else None
        a = draw.weight(case.r, k, self.adapter_dtype)
        b = draw.normal(n, case.r, std=0.1, dtype=self.adapter_dtype)
        for adapter in (a, b):
            adapter.requires_grad_(case.backward)
        return Projection(w, bias, a, b)

    def _inputs(self, width: int) -> list[Tensor]:
        case = self.case
        if case.op == EMBED:
            size = (INPUT_COPIES, case.m)
            ids = self._source.integers(0, case.k, INPUT_COPIES * case.m, torch.int64)
            return [row.clone() for row in ids.view(size)]
        drawn = [self._source.normal(case.m, width, dtype=self.dtype) for _ in range(INPUT_COPIES)]
        return [t.requires_grad_(case.backward) for t in drawn]

    @property
    def source(self) -> Tensor:
        return self.projections[0].w

    @property
    def bias(self) -> Tensor | None:
        return self.projections[0].bias

    @property
    def a(self) -> Tensor:
        return self.projections[0].a

    @property
    def b(self) -> Tensor:
        return self.projections[0].b

    @functools.cached_property
    def magnitude(self) -> Tensor:
        """DoRA's: the norms of W + scale·B·A, after some training."""
        p = self.projections[0]
        with torch.no_grad():
            merged = p.w.float() + self.case.scale * (p.b.float() @ p.a.float())
            norm = torch.linalg.vector_norm(merged, dim=1)
        moved = 1 + self._seeded(3).normal(self.case.n, std=0.1)
        return (norm * moved).to(self.adapter_dtype).requires_grad_(self.case.backward)

    @functools.cached_property
    def trained(self) -> dict[str, Tensor]:
        """What an adapter learns, by name: a and b, of several projections a0, b0, a1, ..."""
        case = self.case
        if not case.has_adapter:
            return {}
        if case.op == "dora_linear":
            return {"a": self.a, "b": self.b, "magnitude": self.magnitude}
        if case.is_gather:
            return {"a": self.pages.a, "b": self.pages.b}
        many = len(self.projections) > 1
        return {
            f"{name}{i if many else ''}": t
            for i, p in enumerate(self.projections)
            for name, t in (("a", p.a), ("b", p.b))
        }

    @functools.cached_property
    def pages(self) -> RankPages:
        """The pool of a case with many adapters; the rows of a page past a rank are zeros."""
        case, source = self.case, self._seeded(4)
        share = (1, 3, 5, 7) if case.mixed else (4,)
        ranks = [max(1, case.r * share[i % len(share)] // 4) for i in range(case.loaded)]
        a = [source.weight(r, case.k, self.adapter_dtype) for r in ranks]
        b = [source.normal(case.n, r, std=0.1, dtype=self.adapter_dtype) for r in ranks]
        page = page_embedding_adapters if case.op == EMBED else page_adapters
        pages = page(a, b, [case.scale] * case.loaded)
        for t in (pages.a, pages.b):
            t.requires_grad_(case.backward)
        return pages

    @functools.cached_property
    def page_copies(self) -> list[RankPages]:
        """Copies of the pool, as many as make caches honest."""
        p, nbytes = self.pages, self.pages.a.nbytes + self.pages.b.nbytes
        if self.case.backward:
            return [p]
        return [p._replace(a=p.a.clone(), b=p.b.clone()) for _ in range(self.copies(nbytes))]

    @functools.cached_property
    def slots(self) -> Tensor:
        """The slots of the adapters in use, far from each other in the pool, token by token."""
        case = self.case
        if case.adapters == 0:
            return torch.full((case.m,), -1, dtype=torch.int32, device=self.device)
        used = torch.arange(case.adapters) * (case.loaded // case.adapters)
        return used[torch.arange(case.m) % case.adapters].to(torch.int32).to(self.device)

    @functools.cached_property
    def dy(self) -> list[tuple[Tensor, ...]]:
        """The gradient of each output."""
        c, source = self.case, self._seeded(1)
        return [
            tuple(source.normal(c.m, n, dtype=self.dtype) for n in c.widths)
            for _ in range(INPUT_COPIES)
        ]

    @functools.cached_property
    def labels(self) -> Tensor:
        """A token of the vocabulary for each row of x."""
        return self._seeded(2).integers(0, self.case.n, self.case.m, torch.int64)

    def copies(self, nbytes: int) -> int:
        """How many copies of so many bytes make caches honest."""
        most = MAX_COPIES if self.case.is_gather else MANY_COPIES
        return max(1, min(most, -(-self.rotate_bytes // max(nbytes, 1))))

    @functools.cached_property
    def quantised_layers(self) -> list[NF4Weight]:
        """The 4-bit weights that every quantised provider of the case holds, byte for byte."""
        c = self.case
        form = (c.block_size, c.nested, c.quant_type)
        return [self._source.quantised(p.w, form) for p in self.projections]

    @property
    def quantised(self) -> NF4Weight:
        """The first one's."""
        return self.quantised_layers[0]

    @functools.cached_property
    def dense_layers(self) -> list[Tensor]:
        """The dense weights: of a quantised case, the decoded ones, so that all results agree."""
        if not self.case.is_quantised:
            return [p.w for p in self.projections]
        with use_backend("reference"):
            return [q.dequantize(self.dtype) for q in self.quantised_layers]

    @property
    def weight(self) -> Tensor:
        """The first one's."""
        return self.dense_layers[0]

    @functools.cached_property
    def source_copies(self) -> list[Tensor]:
        """Copies of the weight before any quantisation, to quantise."""
        return [self.source.clone() for _ in range(self.copies(self.source.nbytes))]

    @functools.cached_property
    def dense_copies(self) -> list[Tensor]:
        return [self.weight.clone() for _ in range(self.copies(self.weight.nbytes))]

    @functools.cached_property
    def table_copies(self) -> list[Tensor]:
        """Copies of an embedding's weight [K, N]."""
        return [self.weight.T.contiguous() for _ in range(self.copies(self.weight.nbytes))]

    @functools.cached_property
    def layer_copies(self) -> list[list[Tensor]]:
        """Copies of the dense weights of all layers; of one layer those of `dense_copies`."""
        if len(self.projections) == 1:
            return [[w] for w in self.dense_copies]
        copies = self.copies(sum(w.nbytes for w in self.dense_layers))
        return [[w.clone() for w in self.dense_layers] for _ in range(copies)]

    def quantised_layer_copies(self) -> list[list[NF4Weight]]:
        """Fresh copies of the 4-bit weights; each caller has its own and may destroy them."""
        return [
            [
                q.with_tensors({name: t.clone() for name, t in q.tensors().items()})
                for q in self.quantised_layers
            ]
            for _ in range(self.copies(weight_bytes(self.case)))
        ]

    def quantised_copies(self) -> list[NF4Weight]:
        """The same of the first one."""
        return [layers[0] for layers in self.quantised_layer_copies()]
