"""lora_packed_fwd by the Triton kernels: x is read once for every three projections."""

from __future__ import annotations

from torch import Tensor

from lora_kernels.ops.common.rank import rank_dtype
from lora_kernels.ops.common.triton.shrink import Projection, shrink
from lora_kernels.ops.common.triton_host import Dropout
from lora_kernels.ops.lora.triton.forward import lora_linear_fwd
from lora_kernels.ops.packed.schema import LoRAPackedForward, rank_slices
from lora_kernels.ops.packed.triton.groups import groups, split_weights
from lora_kernels.ops.packed.triton.linear import project
from lora_kernels.ops.packed.triton.plan import plan_config


def lora_packed_fwd(c: LoRAPackedForward) -> tuple[list[Tensor], Tensor]:
    """y_i [M, N_i] and s [M, Σ R_i]."""
    x, a, m = c.x, c.a, c.x.shape[0]
    weights = split_weights(c.base, c.meta)
    columns = list(rank_slices(a))
    s = x.new_empty((m, columns[-1].stop), dtype=rank_dtype(x.dtype))
    y = [x.new_empty(0)] * len(weights)
    for group in groups(weights):
        first = group.start
        dropout = Dropout(c.dropout_p, c.seed, first)
        part = slice(group.start, group.stop)
        own = s[:, columns[first].start : columns[group[-1]].stop]
        r = max(t.shape[0] for t in a[part])
        planned = plan_config("lora_linear_fwd", [x], weights[part], r, dropout.on)
        if planned is None:
            for i in group:
                one = c.one(i, weights[i].base, weights[i].meta)
                y[i], s[:, columns[i]] = lora_linear_fwd(one)
            continue
        strategy, config = planned
        y[part] = [x.new_empty((m, w.meta.n)) for w in weights[part]]
        single_pass = strategy == "single_pass" and all(t.numel() > 0 for t in y[part])
        if not single_pass:
            made = [Projection(a[i].T, s[:, columns[i]], dropout.keep_scale) for i in group]
            shrink(x, made, dropout=dropout)
        project(
            x, weights[part], y[part], own, a[part], c.b[part], c.bias[part], c.scales[part],
            dropout, config, single_pass,
        )  # fmt: skip
    return y, s
