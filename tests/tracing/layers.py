"""Every kind of layer that the package has, made on any device, for what looks at models without
running them for real: meta and fake tensors, torch.jit, torch.export, torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels import functional as F
from lora_kernels.nn import (
    LoRAGateUp,
    LoRALinear,
    LoRAMLP,
    LoRAQKV,
    NF4Linear,
    QLoRALinear,
)
from lora_kernels.nn.multi_lora import MultiLoRALinear
from lora_kernels.nn.multi_lora_embedding import MultiLoRAEmbedding
from lora_kernels.nn.multi_lora_training import (
    BatchRoute,
    RouteHolder,
    SlotAdapter,
    TrainableMultiLoRALinear,
)

ROWS, TOKENS, K, N, INNER, VOCABULARY = 3, 5, 96, 48, 64, 100
KINDS = {"lora": LoRALinear, "qlora": QLoRALinear}


def adapted(kind: str, device: str = "cpu", k: int = K, n: int = N, **options: Any) -> Any:
    """A layer whose adapter does something."""
    layer = KINDS[kind](k, n, r=4, device=device, **options)
    nn.init.normal_(layer.lora_B, std=0.1)
    return layer


def packed(kind: str, device: str = "cpu", **options: Any) -> LoRAQKV:
    return LoRAQKV.from_layers(*(adapted(kind, device, n=n, **options) for n in (N, 16, 16)))


def gate_up(kind: str, device: str = "cpu", **options: Any) -> LoRAGateUp:
    return LoRAGateUp.from_layers(*(adapted(kind, device, **options) for _ in range(2)))


def mlp(kind: str, device: str = "cpu", **options: Any) -> LoRAMLP:
    gate, up = (adapted(kind, device, K, INNER, **options) for _ in range(2))
    return LoRAMLP.from_layers(gate, up, adapted(kind, device, INNER, K, **options))


def merged(kind: str, device: str, **options: Any) -> nn.Module:
    layer = adapted(kind, device).eval()
    layer.merge(**options)
    return layer


class Router:
    """The pages of two adapters, and rows that use one, both and none."""

    def __init__(self, pages: F.RankPages) -> None:
        self.all_pages = pages
        self.slots = torch.tensor([0, 1, -1], dtype=torch.int32, device=pages.a.device)

    def active_slots(self) -> Tensor:
        return self.slots

    def active_tokens(self) -> None:
        return None

    def pages(self, module: str) -> F.RankPages:
        return self.all_pages


def _router(make: Callable[..., F.RankPages], k: int, device: str) -> Router:
    def factors(*shapes: tuple[int, int]) -> list[Tensor]:
        return [torch.randn(shape, device=device) for shape in shapes]

    return Router(make(factors((3, k), (17, k)), factors((N, 3), (N, 17)), [1.0, 0.5]))


def pooled(base: type[nn.Module], device: str) -> nn.Module:
    return MultiLoRALinear(base(K, N, device=device), _router(F.page_adapters, K, device), "q_proj")


class Embedding(nn.Module):
    """Of a number that x says, so that it takes what the other layers take."""

    def __init__(self, device: str) -> None:
        super().__init__()
        base = nn.Embedding(VOCABULARY, N, device=device)
        router = _router(F.page_embedding_adapters, VOCABULARY, device)
        self.layer = MultiLoRAEmbedding(base, router, "embed_tokens")

    def forward(self, x: Tensor) -> Tensor:
        return self.layer((x[..., 0].abs() * 8).long().clamp(max=VOCABULARY - 1))


class Loss(nn.Module):
    def __init__(self, device: str) -> None:
        super().__init__()
        self.head = nn.Parameter(torch.randn(VOCABULARY, K, device=device))

    def forward(self, x: Tensor) -> Tensor:
        labels = (x[..., 0].abs() * 8).long().clamp(max=VOCABULARY - 1)
        return F.linear_cross_entropy(x, self.head, labels)


def in_training(base: type[nn.Module], device: str) -> nn.Module:
    """Two adapters in one batch, both with a dropout."""
    holder = RouteHolder()
    layer = TrainableMultiLoRALinear(base(K, N, device=device), 2, holder, "q_proj")
    generators = {slot: torch.Generator().manual_seed(slot) for slot in (0, 1)}
    options = {"use_rslora": False, "init": "kaiming", "dtype": torch.float32}
    for slot, generator in generators.items():
        adapter = SlotAdapter(
            *(K, N), r=3 + slot, alpha=4.0, dropout=0.1, **options,
            device=torch.device(device), generator=generator,
        )  # fmt: skip
        layer.add(slot, adapter)
    slots = torch.tensor([0, 1, -1], dtype=torch.int32, device=device)
    holder.route = BatchRoute(slots[:, None].repeat(1, TOKENS), generators)
    return layer


LAYERS: dict[str, Callable[[str], nn.Module]] = {
    f"{kind}-{name}": partial(make, kind)
    for kind in KINDS
    for name, make in {
        "plain": adapted,
        "bf16": partial(adapted, dtype=torch.bfloat16),
        "dropout": partial(adapted, dropout=0.1),
        "dora": partial(adapted, use_dora=True),
        "dora-dropout": partial(adapted, use_dora=True, dropout=0.1),
        "qkv": packed,
        "gate-up": gate_up,
        "mlp": mlp,
        "merged": merged,
    }.items()
} | {
    "requantised": partial(merged, "qlora", requantize=True),
    "nf4": lambda device: NF4Linear(K, N, device=device),
    "nf4-plain-scales": lambda device: NF4Linear(K, N, double_quant=False, device=device),
    "pooled": partial(pooled, nn.Linear),
    "nf4-pooled": partial(pooled, NF4Linear),
    "pooled-embedding": Embedding,
    "in-training": partial(in_training, nn.Linear),
    "nf4-in-training": partial(in_training, NF4Linear),
    "loss": Loss,
}


def input_for(layer: nn.Module, device: str = "cpu", seed: int = 0) -> Tensor:
    """x [ROWS, TOKENS, K] in the layer's dtype."""
    g = torch.Generator().manual_seed(seed)
    weight = getattr(layer, "weight", None)
    dtype = torch.bfloat16 if getattr(weight, "dtype", None) == torch.bfloat16 else torch.float32
    return torch.randn(ROWS, TOKENS, K, generator=g).to(dtype).to(device)
