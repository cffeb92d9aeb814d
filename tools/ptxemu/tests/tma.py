"""Triton's sm_90 products by tensor descriptors, and what they should give."""

import sys

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor as TD

from tools.ptxemu import poison_, run_triton
from tools.ptxemu.tests.triton_kernels import rel

torch.manual_seed(0)


ALL = "--all" in sys.argv


# ------------------------------------------------------------------ Triton
@triton.jit
def tiles(
    a,
    b,
    c,
    M,
    N,
    K,
    NP,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
    WS: tl.constexpr,
    FL: tl.constexpr,
):
    nm = tl.cdiv(M, BM)
    nn = tl.cdiv(N, BN)
    for t in tl.range(tl.program_id(0), nm * nn, NP, flatten=FL, warp_specialize=WS):
        pm = t // nn
        pn = t % nn
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            x = a.load([pm * BM, k])
            if BT:
                acc = tl.dot(x, b.load([pn * BN, k]).T, acc)
            else:
                acc = tl.dot(x, b.load([k, pn * BN]), acc)
        c.store([pm * BM, pn * BN], acc.to(c.dtype))


@triton.jit
def host(
    a,
    b,
    c,
    M,
    N,
    K,
    NP,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
    WS: tl.constexpr,
    FL: tl.constexpr,
):
    tiles(a, b, c, M, N, K, NP, BM, BN, BK, BT, WS, FL)


@triton.jit
def device(
    x_ptr,
    y_ptr,
    o_ptr,
    M,
    N,
    K,
    NP,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
    WS: tl.constexpr,
    FL: tl.constexpr,
):
    a = tl.make_tensor_descriptor(x_ptr, [M, K], [K, 1], [BM, BK])
    if BT:
        b = tl.make_tensor_descriptor(y_ptr, [N, K], [K, 1], [BN, BK])
    else:
        b = tl.make_tensor_descriptor(y_ptr, [K, N], [N, 1], [BK, BN])
    c = tl.make_tensor_descriptor(o_ptr, [M, N], [N, 1], [BM, BN])
    tiles(a, b, c, M, N, K, NP, BM, BN, BK, BT, WS, FL)


def case(
    kind,
    M,
    N,
    K,
    BM,
    BN,
    BK,
    nw=4,
    ns=3,
    BT=False,
    WS=False,
    FL=False,
    dt=torch.bfloat16,
    odt=torch.float32,
    NP=3,
    cc=90,
    tol=None,
    **kw,
):
    x = torch.randn(M, K).to(dt)
    y = torch.randn(K, N).to(dt)
    ya = y.T.contiguous() if BT else y
    big = poison_(torch.empty(M + 9, N, dtype=odt))
    big[M:] = 7
    o = big[:M]
    ce = dict(BM=BM, BN=BN, BK=BK, BT=BT, WS=WS, FL=FL)
    args = (
        [
            TD.from_tensor(x, [BM, BK]),
            TD.from_tensor(ya, [BN, BK] if BT else [BK, BN]),
            TD.from_tensor(o, [BM, BN]),
        ]
        if kind is host
        else [x, ya, o]
    )
    r = run_triton(kind, None, ce, [*args, M, N, K, NP], NP, nw, ns, cc, **kw)
    e = rel(o, x.double() @ y.double())
    assert (big[M:] == 7).all(), "rows outside the descriptor were written"
    tol = tol or (2e-3 if dt == torch.float32 else 1e-5 if odt == torch.float32 else 6e-3)
    assert e < tol, f"error {e}"
    return r, e
