"""L = Σ_m (log Σ_v exp(z[m, v]) - z[m, label[m]]) / n with z = x·Wᵀ, over rows with a label.

The logits z [M, V] are the largest tensor of a language model's training step; here they exist a
few rows at a time. Their gradient p - one-hot(label), p = softmax(z), is known as soon as they are,
so the forward turns it at once into
    dx = (p - one-hot)·W / n,   dW = (p - one-hot)ᵀ·x / n
and keeps these, without 1 / n and the gradient of L, for the backward.

Source: Hsu et al., 2024, "Liger Kernel"; Wijmans et al., 2025, "Cut Your Losses".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_kernels.dispatch.registry import run
from lora_kernels.dispatch.settings import KeepsSettings
from lora_kernels.ops.common.flatten import autocast, needs_grad, to_rows
from lora_kernels.ops.common.kinds import check_kinds
from lora_kernels.ops.cross_entropy.schema import LinearCrossEntropy, check_linear_cross_entropy


class LinearCrossEntropyFunction(KeepsSettings):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, divisor: Tensor
    ) -> Tensor:
        needs = [int(need) for need in ctx.needs_input_grad[:2]]
        losses, dx, dw = torch.ops.lora_kernels.linear_cross_entropy(
            x, weight, labels, ignore_index, needs
        )
        ctx.save_for_backward(dx, dw, divisor)
        ctx.dtype = weight.dtype
        return _mean(losses, divisor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dx, dw, divisor = ctx.saved_tensors
        # Without a label the loss is 0 / 0, and the gradient nothing, as torch has it.
        factor = torch.where(divisor == 0, 0.0, dloss / divisor)
        dx = (dx * factor).to(dx.dtype) if ctx.needs_input_grad[0] else None
        dw = (dw * factor).to(ctx.dtype) if ctx.needs_input_grad[1] else None
        return dx, dw, None, None, None


def _mean(losses: Tensor, divisor: Tensor) -> Tensor:
    # In fp32 the sum of many losses alone would take the result's last bits.
    return (losses.sum(dtype=torch.float64) / divisor).to(losses.dtype)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    num_items: Tensor | float | None = None,
) -> Tensor:
    """The mean cross-entropy of the logits x·Wᵀ, which never exist as a whole.

    Equal to `torch.nn.functional.cross_entropy((x @ weight.T).float(), labels)`: logits are rounded
    to x's dtype, losses computed in fp32. Differentiable in x and weight; between forward and
    backward their gradients are kept, nothing else; of an fp16 weight in fp32, as its sum over the
    rows may be beyond fp16. Under autocast x and weight are cast.

    Args:
        x: [..., K]; fp32, fp16, bf16 (fp64 on the reference).
        weight: W [V, K] in x's dtype, V the size of the vocabulary.
        labels: [...] int64, each in 0 .. V - 1 or `ignore_index`; already shifted.
        ignore_index: the label of rows that count for nothing.
        num_items: divides the sum of the losses; by default the number of rows that have a label.
            Without any the loss is NaN and its gradients are zeros, as torch has it. A one-element
            tensor or a number.

    Returns:
        fp32 scalar.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.

    Source: Hsu et al., 2024, "Liger Kernel: Efficient Triton Kernels for LLM Training".

    Examples:
        >>> hidden, head = torch.randn(5, 64), torch.randn(100, 64, requires_grad=True)
        >>> labels = torch.tensor([3, 99, -100, 0, 7])  # -100: not counted
        >>> loss = lk.functional.linear_cross_entropy(hidden, head, labels)
        >>> loss.backward()
        >>> loss.shape, head.grad.shape
        (torch.Size([]), torch.Size([100, 64]))
    """
    try:
        x, weight = autocast(x, weight)
        check_linear_cross_entropy(x, weight, labels)
        labels = labels.reshape(-1)
        if num_items is None:
            num_items = (labels != ignore_index).sum()
        if not isinstance(num_items, (Tensor, int, float)):
            raise TypeError(
                f"num_items: got {type(num_items).__name__}, expected a number or a tensor"
            )
        divisor = torch.as_tensor(num_items, device=x.device)
        if divisor.numel() != 1:
            raise ValueError(f"num_items: got shape {list(divisor.shape)}, expected one element")
        rows, divisor = to_rows(x), divisor.reshape(())
        if needs_grad(x, weight):
            return LinearCrossEntropyFunction.apply(rows, weight, labels, ignore_index, divisor)
        call = LinearCrossEntropy(rows, weight, labels, ignore_index, [0, 0])
        return _mean(run("linear_cross_entropy", call)[0], divisor)
    except Exception:
        check_kinds(linear_cross_entropy, locals())
        raise
