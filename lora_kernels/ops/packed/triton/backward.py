"""lora_packed_bwd by the Triton kernels: dx is summed once, x read once for every dA."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.ops.common.launch import executor
from lora_kernels.ops.common.rank import rank_dtype
from lora_kernels.ops.common.triton.shrink_and_wgrad import Projection, grad_pass
from lora_kernels.ops.common.triton.wgrad import Gradient, wgrad
from lora_kernels.ops.common.triton_host import Dropout
from lora_kernels.ops.lora.triton.backward import lora_linear_bwd
from lora_kernels.ops.packed.schema import LoRAPackedBackward, rank_slices
from lora_kernels.ops.packed.triton.dgrad import grad_x
from lora_kernels.ops.packed.triton.groups import groups, split_weights
from lora_kernels.ops.packed.triton.plan import plan_config


def lora_packed_bwd(
    c: LoRAPackedBackward,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """The derivation stands in `api.py`."""
    dy, x, s, a, b, scales = c.dy, c.x, c.s, c.a, c.b, c.scales
    m, k = x.shape
    weights = split_weights(c.base, c.meta)
    want_x, wants = c.want
    columns = list(rank_slices(a))
    s = s if s.stride(1) == 1 else s.contiguous()
    dx = x.new_empty(0)
    da = [_empty(t, want[0]) for t, want in zip(a, wants, strict=True)]
    db = [_empty(t, want[1]) for t, want in zip(b, wants, strict=True)]
    dbias = [x.new_empty(t.shape[0] if want[2] else 0) for t, want in zip(b, wants, strict=True)]
    for group in groups(weights):
        part = slice(group.start, group.stop)
        dropout = Dropout(c.dropout_p, c.seed, group.start)
        r = max(t.shape[0] for t in a[part])
        planned = plan_config("lora_linear_bwd", dy[part], weights[part], r, dropout.on)
        if planned is None:
            for i in group:
                one = c.one(i, weights[i].base, weights[i].meta, s[:, columns[i]])
                asked = [*one.needs[:-1], False]  # dW is made below
                more, da[i], db[i], dbias[i], *_ = lora_linear_bwd(one._replace(needs=asked))
                dx = dx.add_(more) if i else more
            continue
        strategy, config = planned
        single_pass = want_x and strategy == "single_pass" and k > 0
        want_a = any(want[0] for want in wants[part])
        # One after the other, the rows of each whole.
        flat = x.new_empty(m * sum(t.shape[0] for t in a[part]), dtype=rank_dtype(x.dtype))
        ranks = [t.shape[0] for t in a[part]]
        rows = flat.split([m * rank for rank in ranks])
        ds = [t.view(m, rank) for t, rank in zip(rows, ranks, strict=True)]
        made = single_pass or not (want_x or want_a)
        for asked_b in (True, False):
            some = [i for i in group if wants[i][1] == asked_b]
            if not some or (made and not asked_b):
                continue
            # A bias's gradient without dB's is a sum of torch.
            asked_bias = asked_b and any(wants[i][2] for i in some)
            reads = []
            for i in some:
                bias = dbias[i] if wants[i][2] else x.new_empty(dy[i].shape[1])
                reads.append(
                    Projection(
                        dy[i],
                        s[:, columns[i]],
                        b[i],
                        None if made else ds[i - group.start],
                        db[i] if asked_b else None,
                        bias if asked_bias else None,
                        scales[i],
                        scales[i],
                    )
                )
            grad_pass(reads)
        if want_x:
            more = x.new_empty((m, k))
            grad_x(
                dy[part], weights[part], more, flat, a[part], b[part], scales[part], dropout,
                config, single_pass,
            )  # fmt: skip
            dx = dx.add_(more) if group.start else more
        if want_a:
            made_ds = zip(group, ds, strict=True)
            wgrad(x, [Gradient(t, da[i], i) for i, t in made_ds if wants[i][0]], dropout)
        for i in group:
            if wants[i][2] and not wants[i][1]:
                torch.sum(dy[i], 0, out=dbias[i])

    dw = [
        executor().product(g.T, x) if want[3] else x.new_empty(0)
        for g, want in zip(dy, wants, strict=True)
    ]
    return dx, da, db, dbias, dw


def _empty(t: Tensor, wanted: bool) -> Tensor:
    return t.new_empty(t.shape if wanted else 0)
