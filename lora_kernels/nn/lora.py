"""The adapter half of a linear layer, shared by the dense and the 4-bit base.

y = x·Wᵀ + scale·drop(x)·Aᵀ·Bᵀ + bias, with A [r, K] and B [N, r] (Hu et al., 2021, "LoRA") and
scale = alpha/r, or alpha/√r (Kalajdzievski, 2023, "rsLoRA"). With a magnitude [N] each output is
multiplied by magnitude / ‖W + scale·B·A‖ of its row, bias apart (Liu et al., 2024, "DoRA").
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lora_kernels import functional
from lora_kernels.nn.common import draw_kaiming, fill, make_linear, set_buffer, whole
from lora_kernels.nn.open_calls import take
from lora_kernels.ops.common.checks import FLOATS, has_values, names
from lora_kernels.ops.dora import dora_norm, output_scale

INITS = ("kaiming", "gaussian")
ADAPTER = ("lora_A", "lora_B", "lora_magnitude_vector")
_SCALE = {"r", "alpha", "use_rslora"}  # the attributes that determine the scale


def check_adapter_options(r: int, alpha: float, dropout: float, init: str) -> None:
    """Raise TypeError or ValueError, naming the option, unless all four make sense."""
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"r: got {r!r}, expected an int of at least 1")
    if r < 1:
        raise ValueError(f"r: got {r}, expected at least 1")
    for name, value in (("alpha", alpha), ("dropout", dropout)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name}: got {value!r}, expected a number")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha: got {alpha}, expected a finite number")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: got {dropout}, expected 0 <= dropout < 1")
    if init not in INITS:
        raise ValueError(f"init: got {init!r}, expected one of {', '.join(INITS)}")


def check_adapter_dtype(dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise TypeError(f"adapter_dtype: got {names([dtype])}, expected {names(FLOATS)}")


def default_adapter_dtype(base_dtype: torch.dtype) -> torch.dtype:
    """The base's dtype, but fp32 over a 16-bit base, as in PEFT: 16 bits lose small updates."""
    return torch.float32 if base_dtype in (torch.float16, torch.bfloat16) else base_dtype


def scale_of(alpha: float, r: int, use_rslora: bool) -> float:
    """The factor of the adapter's branch: alpha/r, or alpha/√r with `use_rslora`."""
    return float(alpha) / (math.sqrt(r) if use_rslora else r)


@torch.no_grad()
def draw_adapter(a: Tensor, b: Tensor, init: str, generator: torch.Generator | None = None) -> None:
    """Fill A [r, K] as `init` says (Kaiming-uniform with a=√5, or normal with std 1/r), B with
    zeros."""
    if init == "gaussian":
        nn.init.normal_(a, std=1 / a.shape[0], generator=generator)
    else:
        draw_kaiming(a, generator)
    nn.init.zeros_(b)


class LoRAMixin(nn.Module):
    """Adapter parameters, merging and checkpoint rules of a linear layer.

    A class that mixes this in provides `in_features`, `out_features`, `weight`, `bias` and the
    methods that raise NotImplementedError here.

    Attributes:
        lora_A: Parameter [r, K].
        lora_B: Parameter [N, r], zero at first, so that a new adapter changes nothing.
        lora_magnitude_vector: Parameter [N] with `use_dora`, else None; ‖W + scale·B·A‖ at first.
        r, alpha, use_rslora: these determine `scale`; `alpha` may be set at any time.
        dropout: probability, in [0, 1), of dropping an element of x on the adapter's branch, in
            training mode only.
        adapter_enabled: False computes the base layer alone.
        in_group: `fuse_projections` runs the layer as one with others where it can.

    Examples:
        >>> layer = lk.LoRALinear(64, 32, r=8, alpha=16)
        >>> isinstance(layer, lk.nn.LoRAMixin), layer.scale
        (True, 2.0)
        >>> layer.merge()
        >>> layer.merged
        True
        >>> layer.unmerge()
    """

    in_features: int
    out_features: int
    bias: Parameter | None
    lora_A: Parameter
    lora_B: Parameter
    lora_magnitude_vector: Parameter | None
    weight: Any
    r: int
    alpha: float
    dropout: float
    use_rslora: bool
    init: str
    adapter_enabled: bool
    use_dora: bool = False
    in_group: bool = False
    _merged_weight: Tensor | None
    _scale: float

    def _base_dtype(self) -> torch.dtype:
        """The dtype of the dense weight, and of the merged one."""
        raise NotImplementedError

    def _dense_base(self, dtype: torch.dtype) -> Tensor:
        """W [N, K], as it is stored or decoded to `dtype`. Callers must not write to it."""
        raise NotImplementedError

    def _base_forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _adapter_forward(self, x: Tensor, dropout_p: float) -> Tensor:
        raise NotImplementedError

    def _merged_forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _add_adapter(
        self,
        r: int,
        alpha: float,
        dropout: float,
        use_rslora: bool,
        init: str,
        dtype: torch.dtype | None,
        device: torch.device,
        use_dora: bool = False,
    ) -> None:
        check_adapter_options(r, alpha, dropout, init)
        dtype = dtype or default_adapter_dtype(self._base_dtype())
        check_adapter_dtype(dtype)
        self.r, self.alpha, self.dropout = r, alpha, dropout
        self.use_rslora, self.use_dora, self.init = bool(use_rslora), bool(use_dora), init
        self.adapter_enabled = True
        self.lora_A = Parameter(torch.empty(r, self.in_features, device=device, dtype=dtype))
        self.lora_B = Parameter(torch.empty(self.out_features, r, device=device, dtype=dtype))
        magnitude = torch.empty(self.out_features, device=device, dtype=dtype)
        self.register_parameter("lora_magnitude_vector", Parameter(magnitude) if use_dora else None)
        self._keep_merged(None)
        self.reset_adapter()

    def reset_parameters(self) -> None:
        """Draw the base as nn.Linear does (a 4-bit one is quantised then), and the adapter as
        `init` says."""
        super().reset_parameters()  # type: ignore[misc]
        if "lora_A" in self._parameters:  # not while the base is made
            self.reset_adapter()
            self.refresh_merged()

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Draw new values of A (Kaiming-uniform with a=√5, or normal with std 1/r), and set B and
        the magnitude so that the layer computes what its base does."""
        draw_adapter(self.lora_A, self.lora_B, self.init)
        self.reset_magnitude()

    @torch.no_grad()
    def reset_magnitude(self) -> None:
        """Set the magnitude to ‖W + scale·B·A‖, for which DoRA computes what LoRA does."""
        magnitude = self.lora_magnitude_vector
        if magnitude is not None and not magnitude.is_meta:
            fill(magnitude, self._norm())

    def _norm(self) -> Tensor:
        """‖W + scale·B·A‖ of each row, in fp32 (fp64 for an fp64 base)."""
        weight, a, b = map(whole, (self.weight, self.lora_A, self.lora_B))
        return dora_norm(weight, a, b, scale=self.scale)

    @property
    def scale(self) -> float:
        """The factor of the adapter's branch: alpha/r, or alpha/√r with `use_rslora`."""
        return self._scale

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _SCALE and self.__dict__.keys() >= _SCALE:
            # Stored as one float, so that compiled layers which differ in it can share a graph.
            self.__dict__["_scale"] = scale_of(self.alpha, self.r, self.use_rslora)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to y [..., N]."""
        if self.in_group and (y := take(self, x)) is not None:
            return y
        if not self.adapter_enabled:
            return self._base_forward(x)
        if self.merged:
            self._refuse_to_train_merged()
            return self._merged_forward(x)
        return self._adapter_forward(x, self.dropout if self.training else 0.0)

    def _dora_forward(self, x: Tensor, bias: Tensor | None, dropout_p: float) -> Tensor:
        assert self.lora_magnitude_vector is not None
        return functional.dora_linear(
            x,
            self.weight,
            self.lora_A,
            self.lora_B,
            self.lora_magnitude_vector,
            scale=self.scale,
            bias=bias,
            dropout_p=dropout_p,
        )

    def _refuse_to_train_merged(self) -> None:
        if (
            self.training
            and torch.is_grad_enabled()
            and any(p is not None and p.requires_grad for p in self._adapter().values())
        ):
            raise RuntimeError(
                "the adapter is merged, so training would give it no gradient: call unmerge() "
                "to train, or eval() (or torch.no_grad()) to run the merged layer"
            )

    def _adapter(self) -> dict[str, Parameter | None]:
        return {name: self._parameters[name] for name in ADAPTER}

    def delta_weight(self) -> Tensor:
        """scale·B·A [N, K] in fp32 (fp64 for fp64 adapters), not scaled by DoRA's magnitude."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        a, b = whole(self.lora_A), whole(self.lora_B)
        # torch has no autocast for the meta device.
        kind = "cpu" if a.is_meta else a.device.type
        with torch.no_grad(), torch.autocast(kind, enabled=False):
            return (b.to(dtype) @ a.to(dtype)).mul_(self.scale)

    @torch.no_grad()
    def merged_weight(self, *, safe: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        """W + scale·B·A [N, K]: summed in fp32 (fp64 for an fp64 base or adapter), rounded once.

        With `use_dora` each row is scaled to its magnitude before the rounding.

        Args:
            safe: refuse a result that is not finite.
            dtype: the result's dtype; the base weight's by default.

        Raises:
            ValueError: with `safe`, the result holds an infinity or NaN.
        """
        base_dtype = self._base_dtype()
        delta = self.delta_weight()
        total = delta.to(torch.promote_types(delta.dtype, base_dtype))
        total.add_(whole(self._dense_base(total.dtype)))
        if self.lora_magnitude_vector is not None:
            total.mul_(output_scale(whole(self.lora_magnitude_vector), self._norm())[:, None])
        merged = total.to(dtype or base_dtype)
        if safe and has_values(merged) and not bool(torch.isfinite(merged).all()):
            raise ValueError(
                f"merge: the merged weight {list(merged.shape)} holds non-finite values in "
                f"{names([merged.dtype])}; nothing was changed"
            )
        return merged

    @property
    def merged(self) -> bool:
        """Whether forward runs on a merged weight."""
        return self._buffers["_merged_weight"] is not None  # torch's way to a buffer is long

    @property
    def merged_dense(self) -> bool:
        """Whether forward runs on a merged weight that is dense, whatever the base's format is."""
        return self._buffers["_merged_weight"] is not None

    def merge(self, *, safe: bool = False) -> None:
        """Run as one linear layer with W + scale·B·A.

        The base weight is kept beside the merged one. This costs a second copy of the weight. In
        return `unmerge` is exact to the bit, `state_dict` is the same merged or not, and a tied
        weight is not changed. A later change of A, B or alpha takes effect only after `unmerge`
        and `merge`; loading a state dict merges again by itself. Merging twice warns and changes
        nothing.

        Args:
            safe: refuse a merged weight that is not finite, and change nothing.

        Raises:
            ValueError: with `safe`, the merged weight holds an infinity or NaN.
        """
        if self._warn_if(self.merged, "already merged"):
            return
        self._keep_merged(self.merged_weight(safe=safe))

    def unmerge(self) -> None:
        """Drop the merged weight; the base weight was never changed. Warns if not merged."""
        if not self._warn_if(not self.merged, "not merged"):
            self._drop_merged()

    @staticmethod
    def _warn_if(condition: bool, state: str) -> bool:
        if condition:
            warnings.warn(f"the adapter is {state}: nothing to do", stacklevel=3)
        return condition

    def _keep_merged(self, weight: Tensor | None) -> None:
        set_buffer(self, "_merged_weight", weight)

    def _drop_merged(self) -> None:
        self._keep_merged(None)

    def refresh_merged(self) -> None:
        """If merged, merge again, after A, B, alpha or the base weight has changed."""
        if self._merged_weight is not None and not self.lora_A.is_meta:
            self._keep_merged(self.merged_weight())

    def to_linear(self, *, safe: bool = False, dtype: torch.dtype | None = None) -> nn.Linear:
        """A plain, frozen nn.Linear with the merged weight; the bias is shared, not copied.

        Args:
            safe: refuse a merged weight that is not finite (ValueError).
            dtype: dtype of the new weight; the base weight's by default.
        """
        return make_linear(
            self.merged_weight(safe=safe, dtype=dtype), self.bias, training=self.training
        )

    def _load_from_state_dict(  # type: ignore[override]
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        adapter = [prefix + name for name in ADAPTER]
        # A checkpoint of the plain layer has no adapter: A and B then stay as they are.
        if not any(key in state_dict for key in adapter):
            missing_keys[:] = [key for key in missing_keys if key not in adapter]
        changed = any(key in state_dict for key in (prefix + "weight", *adapter))
        if changed and adapter[-1] not in state_dict:
            self.reset_magnitude()  # the old one belongs to the old W, A and B
        self.refresh_merged()

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), f"r={self.r}", f"alpha={self.alpha:g}"]
        if self.dropout:
            parts.append(f"dropout={self.dropout:g}")
        if self.use_rslora:
            parts.append("use_rslora=True")
        if self.use_dora:
            parts.append("use_dora=True")
        if self.lora_A.dtype != self._base_dtype():
            parts.append(f"adapter_dtype={names([self.lora_A.dtype])}")
        if self.merged:
            parts.append("merged")
        if not self.adapter_enabled:
            parts.append("adapter disabled")
        return ", ".join(parts)
