"""QLoRALinear: a low-rank adapter over a 4-bit base."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

from lora_kernels import functional
from lora_kernels.nn.common import cast_like
from lora_kernels.nn.linear4bit import weight_from_linear4bit
from lora_kernels.nn.lora import LoRAMixin, check_adapter_options
from lora_kernels.nn.nf4_linear import NF4Linear, quantize_linear
from lora_kernels.ops.common.kinds import check_kinds
from lora_kernels.ops.nf4.weight import NF4Weight

_MERGED = "merged_"


class QLoRALinear(LoRAMixin, NF4Linear):
    """y = x·Wᵀ + scale·drop(x)·Aᵀ·Bᵀ + bias, W in 4 bits (Dettmers et al., 2023, "QLoRA").

    `lora_A` [r, K], `lora_B` [N, r] and with `use_dora` `lora_magnitude_vector` [N] are the only
    trainable parameters. The state dict holds them and NF4Linear's keys, which are bitsandbytes'. A
    checkpoint of the base alone loads as in LoRALinear. Arguments as in NF4Linear and LoRALinear.

    Examples:
        >>> layer = lk.QLoRALinear.from_linear(torch.nn.Linear(64, 32), r=8, alpha=16)
        >>> [name for name, p in layer.named_parameters() if p.requires_grad]
        ['lora_A', 'lora_B']
        >>> layer(torch.randn(3, 64)).shape
        torch.Size([3, 32])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        use_rslora: bool = False,
        init: str = "kaiming",
        adapter_dtype: torch.dtype | None = None,
        use_dora: bool = False,
        block_size: int = 64,
        double_quant: bool = True,
        quant_type: str = "nf4",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_adapter_options(r, alpha, dropout, init)
        super().__init__(
            in_features,
            out_features,
            bias,
            block_size=block_size,
            double_quant=double_quant,
            quant_type=quant_type,
            device=device,
            dtype=dtype,
        )
        self._add_adapter(
            r, alpha, dropout, use_rslora, init, adapter_dtype, self.weight.device, use_dora
        )

    @classmethod
    def from_weight(  # type: ignore[override]
        cls,
        weight: NF4Weight,
        bias: Parameter | None = None,
        r: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        use_rslora: bool = False,
        init: str = "kaiming",
        adapter_dtype: torch.dtype | None = None,
        use_dora: bool = False,
    ) -> QLoRALinear:
        """Put an adapter on an existing NF4Weight (such as `NF4Linear.weight`), which is shared."""
        check_adapter_options(r, alpha, dropout, init)
        check_kinds(cls.from_weight, locals())
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module._set_base(weight.check(), bias)
        module._add_adapter(
            r, alpha, dropout, use_rslora, init, adapter_dtype, weight.device, use_dora
        )
        return module

    @classmethod
    def from_linear(  # type: ignore[override]
        cls,
        linear: nn.Linear,
        r: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        use_rslora: bool = False,
        init: str = "kaiming",
        adapter_dtype: torch.dtype | None = None,
        use_dora: bool = False,
        *,
        block_size: int = 64,
        double_quant: bool = True,
        quant_type: str = "nf4",
    ) -> QLoRALinear:
        """Quantise a plain linear layer and put an adapter on it.

        The bias is shared and frozen, training or eval mode kept; hooks are not.

        Raises:
            TypeError: `linear` is not a plain nn.Linear.
            ValueError: its weight holds non-finite values or has no storage, or an option is out
                of its range.
        """
        check_adapter_options(r, alpha, dropout, init)
        weight = quantize_linear(linear, block_size, double_quant, quant_type)
        module = cls.from_weight(
            weight, linear.bias, r, alpha, dropout, use_rslora, init, adapter_dtype, use_dora
        )
        return module.train(linear.training)

    @classmethod
    def from_linear4bit(  # type: ignore[override]
        cls,
        layer: nn.Module,
        r: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        use_rslora: bool = False,
        init: str = "kaiming",
        adapter_dtype: torch.dtype | None = None,
        use_dora: bool = False,
    ) -> QLoRALinear:
        """Put an adapter on a bitsandbytes Linear4bit, whose weight and bias are shared.

        Raises:
            TypeError: `layer` is no Linear4bit.
            ValueError: bitsandbytes has already repacked the weight for CPU inference, or an
                option is out of its range.
        """
        module = cls.from_weight(
            weight_from_linear4bit(layer),
            layer.bias,  # type: ignore[arg-type]
            r,
            alpha,
            dropout,
            use_rslora,
            init,
            adapter_dtype,
            use_dora,
        )
        return module.train(layer.training)

    @property
    def merged(self) -> bool:
        """Whether forward runs on a merged weight, dense or requantised."""
        return self._buffers["_merged_weight"] is not None or _MERGED in self._weights

    def merge(self, *, safe: bool = False, requantize: bool = False) -> None:
        """Run as one linear layer with W + scale·B·A.

        The 4-bit base is kept beside the merged weight, so `unmerge` is exact to the bit and
        `state_dict` is the same merged or not.

        Args:
            safe: refuse a merged weight that is not finite, and change nothing.
            requantize: keep the merged weight in the base's 4-bit format, which rounds it again.
                By default it is dense, in the dtype that the base had before it was quantised.

        Raises:
            ValueError: the merged weight holds an infinity or NaN, and `safe` or `requantize` is
                set.
        """
        if self._warn_if(self.merged, "already merged"):
            return
        if requantize:
            self._store(_MERGED, self.requantized_weight())
        else:
            self._keep_merged(self.merged_weight(safe=safe))

    def requantized_weight(self) -> NF4Weight:
        """W + scale·B·A, summed in fp32, in the base's 4-bit format; ValueError if not finite."""
        base = self.weight
        merged = self.merged_weight(safe=True, dtype=torch.float32)
        weight = self._quantize_like(base, merged)
        return replace(weight, dtype=base.dtype)

    def to_nf4_linear(self) -> NF4Linear:
        """An NF4Linear with the merged weight, quantised again; the bias is shared."""
        return NF4Linear.from_weight(self.requantized_weight(), self.bias).train(self.training)

    def _drop_merged(self) -> None:
        super()._drop_merged()
        if _MERGED in self._weights:
            self._forget(_MERGED)

    def refresh_merged(self) -> None:
        super().refresh_merged()
        if _MERGED in self._weights and not self.lora_A.is_meta:
            self._store(_MERGED, self.requantized_weight())

    def _base_dtype(self) -> torch.dtype:
        return self._weights[""].dtype

    def _dense_base(self, dtype: torch.dtype) -> Tensor:
        return self.weight.dequantize(dtype)

    def _base_forward(self, x: Tensor) -> Tensor:
        return NF4Linear.forward(self, x)

    def _adapter_forward(self, x: Tensor, dropout_p: float) -> Tensor:
        if self.lora_magnitude_vector is not None:
            return self._dora_forward(x, cast_like(self.bias, x), dropout_p)
        return functional.nf4_lora_linear(
            x,
            self.weight,
            self.lora_A,
            self.lora_B,
            scale=self.scale,
            bias=cast_like(self.bias, x),
            dropout_p=dropout_p,
        )

    def _merged_forward(self, x: Tensor) -> Tensor:
        bias = cast_like(self.bias, x)
        if self._merged_weight is None:
            return functional.nf4_linear(x, self._stored(_MERGED), bias=bias)
        merged = cast_like(self._merged_weight, x)
        assert merged is not None
        return F.linear(x, merged, bias)
