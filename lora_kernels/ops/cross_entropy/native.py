"""What the compiled cross-entropy takes (csrc/bindings/cross_entropy.cpp), and the products around
it, which are the vendor's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lora_kernels.dispatch.op import NATIVE_NAMESPACE, Implementation
from lora_kernels.dispatch.registry import register
from lora_kernels.ops.common.native import refuse_device, refuse_dtypes, register_native
from lora_kernels.ops.common.rank import rank_dtype
from lora_kernels.ops.cross_entropy.schema import CrossEntropy, LinearCrossEntropy, loss_dtype

# Rows of logits in existence at a time: as many as these bytes hold, which malloc still recycles
# (more are mapped anew at each call), but enough for the products over a large vocabulary. 1,024
# rows, 49,152 tokens, two threads: 128 rows 192 ms, 256 178, 341 139, 512 185, all 321; 151,936
# tokens: 110 rows 884 ms, 256 667, 512 593.
LOGITS_BYTES = 32 << 20
LEAST_ROWS = 256
# The number of rows of a piece is a multiple of this; the last piece is padded. oneDNN keeps code
# for each new shape of a product (1.1 MiB), and the number of rows differs from batch to batch.
ROWS_STEP = 64


def _refuse(c: CrossEntropy) -> str | None:
    return refuse_device("cross_entropy", c.logits.device) or refuse_dtypes(c.logits)


def _refuse_linear(c: LinearCrossEntropy) -> str | None:
    return refuse_device("cross_entropy", c.x.device) or refuse_dtypes(c.x, c.weight)


def linear_cross_entropy(c: LinearCrossEntropy) -> tuple[Tensor, Tensor, Tensor]:
    """Some rows at a time: the logits never exist as a whole."""
    x, weight, needs = c.x, c.weight, c.needs
    most = max(LOGITS_BYTES // (weight.shape[0] * x.element_size()), LEAST_ROWS)
    rows = max(most // ROWS_STEP, 1) * ROWS_STEP
    losses = x.new_empty(x.shape[0], dtype=loss_dtype(x.dtype))
    dx = x.new_empty(x.shape if needs[0] else 0)
    dw = weight.new_zeros(weight.shape if needs[1] else 0, dtype=torch.float32)
    wide = rank_dtype(weight.dtype)
    loss = getattr(torch.ops, NATIVE_NAMESPACE).cross_entropy.default
    for begin in range(0, x.shape[0], rows):
        part = slice(begin, begin + rows)
        x_part, label = x[part], c.labels[part]
        count = x_part.shape[0]
        missing = -count % ROWS_STEP
        if missing:
            x_part = pad(x_part, (0, 0, 0, missing))
            label = pad(label, (0, missing), value=c.ignore_index)
        loss_part, dlogits = loss(x_part @ weight.T, label, c.ignore_index, any(needs))
        losses[part] = loss_part[:count]
        if needs[0] and missing:
            dx[part] = (dlogits @ weight)[:count]
        elif needs[0]:
            torch.mm(dlogits, weight, out=dx[part])
        if needs[1]:
            dw += dlogits.T.to(wide) @ x_part.to(wide)
    return losses, dx, dw.to(wide)


register_native("cross_entropy", _refuse)
register("linear_cross_entropy", Implementation("native", linear_cross_entropy, _refuse_linear))
