"""One call of each public function that has a gradient, over named tensors that all require one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_kernels import NF4Weight
from lora_kernels import functional as F
from tests.ops.variants import as_tuple

M, N, K, R = 6, 12, 20, 3
SEED = torch.tensor([5])
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Call:
    """`shapes` of the tensors that learn; `run` takes them, and constants from `fixed`."""

    name: str
    shapes: dict[str, tuple[int, ...]]
    run: Callable[[Tensors, dict], object]
    fixed: Callable[[], dict] = dict

    def tensors(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensors:
        g = torch.Generator().manual_seed(seed)
        return {
            name: (torch.randn(shape, generator=g, dtype=torch.float64) / 2)
            .to(dtype)
            .requires_grad_()
            for name, shape in self.shapes.items()
        }

    def outputs(self, t: Tensors, fixed: dict) -> tuple[Tensor, ...]:
        return as_tuple(self.run(t, fixed))

    def __str__(self) -> str:
        return self.name


def _quantised(n: int = N, k: int = K, nested: bool = True) -> NF4Weight:
    g = torch.Generator().manual_seed(9)
    return NF4Weight.quantize(torch.randn(n, k, generator=g) / k**0.5, 32, nested)


def _weight() -> dict:
    return {"w": _quantised(), "seed": SEED}


def _three() -> dict:
    return {"w": [_quantised(N), _quantised(8), _quantised(4)], "seed": SEED}


def _slots() -> dict:
    slots = torch.tensor([1, 0, -1, 1, 0, 0], dtype=torch.int32)
    drops = torch.tensor([3, 4]), torch.tensor([0, 20000], dtype=torch.int32)
    rows = torch.tensor([0, 0, 0, 1, 1, 2], dtype=torch.int32)
    return {"slots": slots, "drops": F.SlotDropout(*drops, rows), "w": _quantised()}


def _labels() -> dict:
    return {"labels": torch.tensor([3, -100, 0, 11, 5, 5])}


LAYER = {"x": (M, K), "a": (R, K), "b": (N, R)}
PACKED = {"x": (M, K), **{f"a{i}": (R, K) for i in range(3)}}
PACKED |= {f"b{i}": (n, R) for i, n in enumerate((N, 8, 4))}
MLP = {"x": (M, K), "a0": (R, K), "a1": (R, K), "a2": (R, N)}
MLP |= {"b0": (N, R), "b1": (N, R), "b2": (K, R)}
PAGED = {"x": (M, K), "a0": (R, K), "b0": (N, R), "a1": (18, K), "b1": (N, 18)}
EMBEDDED = {"w": (N, 8), "a0": (R, N), "b0": (8, R), "a1": (18, N), "b1": (8, 18)}


def _pages(t: Tensors, make: Callable = F.page_adapters) -> F.RankPages:
    return make([t["a0"], t["a1"]], [t["b0"], t["b1"]], [0.5, 2.0])


def _factors(t: Tensors) -> tuple[list[Tensor], list[Tensor]]:
    return [t[f"a{i}"] for i in range(3)], [t[f"b{i}"] for i in range(3)]


def _packed(t: Tensors, f: dict, weights: list) -> tuple[Tensor, ...]:
    return F.lora_packed_linear(
        t["x"], weights, *_factors(t), scales=[0.5, 1.0, 2.0], dropout_p=0.3, seed=f["seed"]
    )


CALLS = (
    Call(
        "nf4_linear",
        {"x": (M, K), "bias": (N,)},
        lambda t, f: F.nf4_linear(t["x"], f["w"], bias=t["bias"]),
        _weight,
    ),
    Call(
        "lora_linear",
        {**LAYER, "w": (N, K), "bias": (N,), "d": (R,), "g": (N,)},
        lambda t, f: F.lora_linear(
            *(t["x"], t["w"], t["a"], t["b"]),
            bias=t["bias"],
            rank_diag=t["d"],
            out_diag=t["g"],
            dropout_p=0.3,
            seed=f["seed"],
        ),
        _weight,
    ),
    Call(
        "nf4_lora_linear",
        LAYER,
        lambda t, f: F.nf4_lora_linear(
            t["x"], f["w"], t["a"], t["b"], dropout_p=0.3, seed=f["seed"]
        ),
        _weight,
    ),
    Call(
        "dora_linear",
        {**LAYER, "w": (N, K), "m": (N,)},
        lambda t, f: F.dora_linear(t["x"], t["w"], t["a"], t["b"], t["m"]),
    ),
    Call(
        "nf4_dora_linear",
        {**LAYER, "m": (N,), "bias": (N,)},
        lambda t, f: F.dora_linear(
            *(t["x"], f["w"], t["a"], t["b"], t["m"]),
            bias=t["bias"],
            dropout_p=0.3,
            seed=f["seed"],
        ),
        _weight,
    ),
    Call(
        "lora_packed_linear",
        {**PACKED, "w0": (N, K), "w1": (8, K), "w2": (4, K)},
        lambda t, f: _packed(t, f, [t["w0"], t["w1"], t["w2"]]),
        _three,
    ),
    Call("nf4_lora_packed_linear", PACKED, lambda t, f: _packed(t, f, f["w"]), _three),
    Call(
        "lora_mlp",
        {**MLP, "w0": (N, K), "w1": (N, K), "w2": (K, N)},
        lambda t, f: F.lora_mlp(
            t["x"], [t["w0"], t["w1"], t["w2"]], *_factors(t), scales=[0.5, 1.0, 2.0]
        ),
    ),
    Call(
        "nf4_lora_mlp",
        MLP,
        lambda t, f: F.lora_mlp(
            t["x"], f["w"], *_factors(t), scales=[0.5, 1.0, 2.0], dropout_p=0.3, seed=f["seed"]
        ),
        lambda: {"w": [_quantised(), _quantised(), _quantised(K, N)], "seed": SEED},
    ),
    Call(
        "gated_activation",
        {"g": (M, N), "u": (M, N)},
        lambda t, f: F.gated_activation(t["g"], t["u"]),
    ),
    Call(
        "linear_cross_entropy",
        {"x": (M, K), "w": (N, K)},
        lambda t, f: F.linear_cross_entropy(t["x"], t["w"], f["labels"]),
        _labels,
    ),
    Call(
        "gather_lora",
        {**PAGED, "w": (N, K), "bias": (N,)},
        lambda t, f: F.gather_lora(
            t["x"], _pages(t), f["slots"], base=t["w"], bias=t["bias"], dropout=f["drops"]
        ),
        _slots,
    ),
    Call(
        "nf4_gather_lora",
        PAGED,
        lambda t, f: F.gather_lora(t["x"], _pages(t), f["slots"], base=f["w"]),
        _slots,
    ),
    Call(
        "gather_lora_embedding",
        EMBEDDED,
        lambda t, f: F.gather_lora_embedding(
            f["ids"], _pages(t, F.page_embedding_adapters), f["slots"], weight=t["w"]
        ),
        lambda: {"ids": torch.tensor([3, 3, 0, 11, 7, 7]), **_slots()},
    ),
)


def results_and_gradients(outputs: Sequence[Tensor], tensors: Tensors) -> list[Tensor]:
    """The outputs, and the gradient of each tensor where a weighted sum of them is the loss."""
    weighted = (y * torch.linspace(-1, 2, y.numel()).view_as(y) for y in outputs)
    sum(y.sum() for y in weighted).backward()
    return [*(y.detach() for y in outputs), *(v.grad for v in tensors.values())]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    """Equal to the bit, and none is missing."""
    for got, want in zip(found, expected, strict=True):
        assert want is not None and torch.equal(got, want)
