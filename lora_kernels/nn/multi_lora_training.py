"""TrainableMultiLoRALinear: a frozen linear layer under many adapters that train in one batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lora_kernels import functional
from lora_kernels.nn.common import cast_like
from lora_kernels.nn.lora import check_adapter_options, draw_adapter, scale_of
from lora_kernels.nn.multi_lora import fit_slots
from lora_kernels.nn.nf4_linear import NF4Linear
from lora_kernels.ops.common.philox import check_dropout, threshold
from lora_kernels.ops.gather.api import rows_of_slots
from lora_kernels.ops.lora.api import draw_seed


class SlotAdapter(nn.Module):
    """The part of one adapter at one layer; as in LoRAMixin, but without the base.

    Attributes:
        lora_A: Parameter [r, K], drawn as `init` says.
        lora_B: Parameter [N, r], zero at first.
    """

    use_dora = False
    lora_magnitude_vector = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        r: int,
        alpha: float,
        dropout: float,
        use_rslora: bool,
        init: str,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        check_adapter_options(r, alpha, dropout, init)
        check_dropout(dropout)
        self.r, self.alpha, self.dropout = r, alpha, dropout
        self.use_rslora, self.init = use_rslora, init
        self.lora_A = Parameter(torch.empty(r, in_features, dtype=dtype, device=device))
        self.lora_B = Parameter(torch.empty(out_features, r, dtype=dtype, device=device))
        draw_adapter(self.lora_A, self.lora_B, init, generator)

    @property
    def scale(self) -> float:
        """The factor of the adapter's branch."""
        return scale_of(self.alpha, self.r, self.use_rslora)

    def extra_repr(self) -> str:
        return f"r={self.r}, alpha={self.alpha:g}, dropout={self.dropout:g}"


class BatchRoute:
    """Which adapter each token of a batch uses, and the dropout of each adapter.

    An adapter's dropout is the same as if it were trained alone. Its seeds come from its own
    generator, one for each layer in the order of the calls, and the rows of its mask are counted
    over its own tokens. A layer that is called again in the same step (activation checkpointing)
    uses its seed again.

    Args:
        slots: int32 [B, L], the adapter of each token; −1 for padding added between adapters.
        generators: by slot, for each slot in the batch, on the slots' device.
    """

    def __init__(self, slots: Tensor, generators: Mapping[int, torch.Generator]) -> None:
        self.slots = slots
        self.generators = dict(generators)
        self.mask_rows = rows_of_slots(slots.reshape(-1))
        self._seeds: dict[tuple[str, int], Tensor] = {}

    def seed(self, layer: str, slot: int) -> Tensor:
        """int64 [1], the seed of a slot's dropout mask at a layer."""
        key = layer, slot
        if key not in self._seeds:
            self._seeds[key] = draw_seed(self.slots.device, self.generators[slot])
        return self._seeds[key]


class RouteHolder:
    """Shared by the layers of one model. It holds the route of the current batch, or None."""

    route: BatchRoute | None = None


class TrainableMultiLoRALinear(nn.Module):
    """y = x·Wᵀ + bias + scale·drop(x)·Aᵀ·Bᵀ, with A, B, scale and dropout of each token's adapter.

    The base is frozen. Each adapter has its own parameters, so each can have its own optimiser.
    Those of an adapter without tokens in the batch get no gradient (None). Outside a route, and if
    no adapter of the batch is on this layer, the layer computes what its base does.

    Args:
        base: nn.Linear or NF4Linear; it is not changed.
        slots: how many adapters the model has in all.
        holder: gives the route of the current batch.
        name: the module's name in the model.
    """

    def __init__(
        self, base: nn.Linear | NF4Linear, slots: int, holder: RouteHolder, name: str
    ) -> None:
        super().__init__()
        self.base, self.slots, self.holder, self.name = base, slots, holder, name
        self.in_features, self.out_features = base.in_features, base.out_features
        self.adapters = nn.ModuleDict()  # by slot, as text
        self.train(base.training)

    def add(self, slot: int, adapter: SlotAdapter) -> None:
        """Put an adapter into an empty slot."""
        if not 0 <= slot < self.slots or str(slot) in self.adapters:
            raise ValueError(f"slot: got {slot}, expected one of 0 to {self.slots - 1} without")
        self.adapters[str(slot)] = adapter.train(self.training)

    def adapter(self, slot: int) -> SlotAdapter | None:
        """The adapter of a slot; None if it is not on this layer."""
        if str(slot) not in self.adapters:
            return None
        found = self.adapters[str(slot)]
        assert isinstance(found, SlotAdapter)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, K] or [B·L, K] to y [..., N]."""
        route = self.holder.route
        here = {} if route is None else self._present(route.generators)
        if route is None or not here:
            return self.base(x)
        base, slots = self.base, fit_slots(self.name, route.slots, x)
        order = [here.get(slot) for slot in range(self.slots)]
        pages = functional.page_adapters(
            [None if adapter is None else adapter.lora_A for adapter in order],
            [None if adapter is None else adapter.lora_B for adapter in order],
            [0.0 if adapter is None else adapter.scale for adapter in order],
        )
        return functional.gather_lora(
            x,
            pages,
            slots,
            base=base.weight,
            bias=cast_like(base.bias, x) if isinstance(base, NF4Linear) else base.bias,
            dropout=self._dropout(route, here, x.device) if self.training else None,
        )

    def _present(self, slots: Iterable[int]) -> dict[int, SlotAdapter]:
        found = {slot: self.adapter(slot) for slot in slots}
        return {slot: adapter for slot, adapter in found.items() if adapter is not None}

    def _dropout(
        self, route: BatchRoute, here: Mapping[int, SlotAdapter], device: torch.device
    ) -> functional.SlotDropout | None:
        """Dropout by slot. A seed is drawn only if dropout > 0, as in a layer trained alone."""
        dropping = {slot: a.dropout for slot, a in here.items() if a.dropout > 0}
        if not dropping:
            return None
        none = torch.zeros(1, dtype=torch.int64, device=device)
        seeds = [route.seed(self.name, s) if s in dropping else none for s in range(self.slots)]
        thresholds = [threshold(dropping.get(slot, 0.0)) for slot in range(self.slots)]
        return functional.SlotDropout(
            torch.cat(seeds),
            torch.tensor(thresholds, dtype=torch.int32, device=device),
            route.mask_rows,
        )

    def extra_repr(self) -> str:
        return f"name={self.name!r}"
