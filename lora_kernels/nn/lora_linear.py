"""LoRALinear: nn.Linear with a low-rank adapter beside its weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_kernels import functional
from lora_kernels.nn.common import check_linear_layer, frozen, parameter
from lora_kernels.nn.lora import LoRAMixin, check_adapter_options


class LoRALinear(LoRAMixin, nn.Linear):  # type: ignore[misc]
    """nn.Linear plus scale·drop(x)·Aᵀ·Bᵀ (Hu et al., 2021, "LoRA"); the base is frozen.

    `weight`, `bias`, `in_features`, `out_features` and their state-dict keys are nn.Linear's own;
    `lora_A` [r, K], `lora_B` [N, r] and with `use_dora` `lora_magnitude_vector` [N] are added. A
    checkpoint of the plain layer loads with strict=True and leaves A and B as they are; the
    magnitude becomes the norm of the loaded W + scale·B·A.

    Args:
        in_features, out_features: K and N.
        bias: whether the base has a bias (frozen as the weight is).
        r: the adapter's rank, at least 1.
        alpha: scale = alpha/r, or alpha/√r with `use_rslora`.
        dropout: probability of dropping an element of x on the branch, in training mode only.
        init: how A is drawn, "kaiming" (uniform, a=√5) or "gaussian" (std 1/r); B is zero.
        adapter_dtype: fp32 over a 16-bit base by default, else the base's dtype.
        use_dora: learn each output's magnitude apart from its direction (Liu et al., 2024, "DoRA").
            `functional.dora_linear` states the maths.
        device, dtype: of the base.

    Raises:
        TypeError, ValueError: an option is of the wrong type or out of its range.

    Examples:
        >>> layer = lk.LoRALinear.from_linear(torch.nn.Linear(64, 32), r=8, alpha=16)
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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_adapter_options(r, alpha, dropout, init)
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        frozen(self.weight)
        frozen(self.bias)
        self._add_adapter(
            r, alpha, dropout, use_rslora, init, adapter_dtype, self.weight.device, use_dora
        )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        use_rslora: bool = False,
        init: str = "kaiming",
        adapter_dtype: torch.dtype | None = None,
        use_dora: bool = False,
    ) -> LoRALinear:
        """Put an adapter on an existing layer.

        The weight and bias parameters are shared, not copied, and frozen; training or eval mode is
        kept, hooks are not. Options as in the class.

        Raises:
            TypeError: `linear` is not a plain nn.Linear, or an option has the wrong type.
            ValueError: an option is out of its range.
        """
        check_linear_layer(linear)
        check_adapter_options(r, alpha, dropout, init)
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module.in_features, module.out_features = linear.in_features, linear.out_features
        module.register_parameter("weight", frozen(linear.weight))
        module.register_parameter("bias", frozen(linear.bias))
        module._add_adapter(
            r, alpha, dropout, use_rslora, init, adapter_dtype, linear.weight.device, use_dora
        )
        return module.train(linear.training)

    def _base_dtype(self) -> torch.dtype:
        return self.weight.dtype

    def _dense_base(self, dtype: torch.dtype) -> Tensor:
        return self.weight

    def _base_forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def _adapter_forward(self, x: Tensor, dropout_p: float) -> Tensor:
        bias = parameter(self, "bias")
        if parameter(self, "lora_magnitude_vector") is not None:
            return self._dora_forward(x, bias, dropout_p)
        return functional.lora_linear(
            x,
            parameter(self, "weight"),
            parameter(self, "lora_A"),
            parameter(self, "lora_B"),
            scale=self._scale,
            bias=bias,
            dropout_p=dropout_p,
        )

    def _merged_forward(self, x: Tensor) -> Tensor:
        assert self._merged_weight is not None
        return F.linear(x, self._merged_weight, self.bias)
