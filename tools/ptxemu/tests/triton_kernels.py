"""Triton kernels that several tests run."""

import torch
import triton
import triton.language as tl

from tools.ptxemu import poison_, run_triton

torch.manual_seed(0)


@triton.jit
def product(
    x_ptr,
    y_ptr,
    rm,
    rn,
    first,
    step,
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PREC: tl.constexpr = None,
):
    """The rows rm of x [M, K] by the columns rn of y [K, N]: one block of K every `step`."""
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(first, K, step):
        rk = k0 + tl.arange(0, BK)
        a = tl.load(
            x_ptr + rm[:, None] * K + rk[None, :],
            mask=(rm[:, None] < M) & (rk[None, :] < K),
            other=0.0,
        )
        b = tl.load(
            y_ptr + rk[:, None] * N + rn[None, :],
            mask=(rk[:, None] < K) & (rn[None, :] < N),
            other=0.0,
        )
        acc = tl.dot(a, b, acc, input_precision=PREC)
    return acc


@triton.jit
def mm(
    x_ptr,
    y_ptr,
    o_ptr,
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PREC: tl.constexpr = None,
):
    pm = tl.program_id(0)
    pn = tl.program_id(1)
    rm = pm * BM + tl.arange(0, BM)
    rn = pn * BN + tl.arange(0, BN)
    acc = product(x_ptr, y_ptr, rm, rn, 0, BK, M, N, K, BM, BN, BK, PREC)
    tl.store(
        o_ptr + rm[:, None] * N + rn[None, :],
        acc.to(o_ptr.dtype.element_ty),
        mask=(rm[:, None] < M) & (rn[None, :] < N),
    )


@triton.jit
def nf4mm(
    x_ptr,
    q_ptr,
    am_ptr,
    lut_ptr,
    o_ptr,
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GATHER: tl.constexpr,
):
    pm = tl.program_id(0)
    pn = tl.program_id(1)
    rm = pm * BM + tl.arange(0, BM)
    rn = pn * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        rk = k0 + tl.arange(0, BK)
        a = tl.load(
            x_ptr + rm[:, None] * K + rk[None, :],
            mask=(rm[:, None] < M) & (rk[None, :] < K),
            other=0.0,
        )
        rb = k0 // 2 + tl.arange(0, BK // 2)
        q = tl.load(
            q_ptr + rn[:, None] * (K // 2) + rb[None, :],
            mask=(rn[:, None] < N) & (rb[None, :] < K // 2),
            other=0,
        )
        qi = tl.interleave((q >> 4).to(tl.int32), (q & 15).to(tl.int32))
        if GATHER:
            lut = tl.load(lut_ptr + tl.arange(0, 16))
            w = tl.gather(lut, qi.reshape(BN * BK), 0).reshape(BN, BK)
        else:
            w = tl.load(lut_ptr + qi)
        am = tl.load(
            am_ptr + (rn[:, None] * K + rk[None, :]) // 64,
            mask=(rn[:, None] < N) & (rk[None, :] < K),
            other=0.0,
        )
        acc = tl.dot(a, (w * am).to(a.dtype).T, acc)
    tl.store(o_ptr + rm[:, None] * N + rn[None, :], acc, mask=(rm[:, None] < M) & (rn[None, :] < N))


@triton.jit
def splitk(
    x_ptr,
    y_ptr,
    o_ptr,
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SK: tl.constexpr,
):
    pm = tl.program_id(0)
    pn = tl.program_id(1)
    ps = tl.program_id(2)
    rm = pm * BM + tl.arange(0, BM)
    rn = pn * BN + tl.arange(0, BN)
    acc = product(x_ptr, y_ptr, rm, rn, ps * BK, BK * SK, M, N, K, BM, BN, BK)
    tl.atomic_add(
        o_ptr + rm[:, None] * N + rn[None, :],
        acc.to(o_ptr.dtype.element_ty),
        mask=(rm[:, None] < M) & (rn[None, :] < N),
    )


@triton.jit
def softmaxish(x_ptr, o_ptr, m_ptr, N, B: tl.constexpr):
    r = tl.program_id(0)
    c = tl.arange(0, B)
    x = tl.load(
        x_ptr + r * N + c, mask=c < N, other=float("-inf"), eviction_policy="evict_first"
    ).to(tl.float32)
    m = tl.max(x, 0)
    e = tl.exp(x - m)
    s = tl.sum(e, 0)
    am = tl.argmax(x, 0)
    cs = tl.cumsum(e, 0)
    tl.store(
        o_ptr + r * N + c,
        e / s + cs * 0.5 + tl.sigmoid(x) + tl.sqrt(s) + tl.log(s) + tl.math.rsqrt(s) + tl.erf(x),
        mask=c < N,
    )
    tl.atomic_max(m_ptr + r, m)
    tl.store(m_ptr + 64 + r, am.to(tl.float32))


def rel(o, ref):
    o = o.double()
    assert not torch.isnan(o).any(), f"{int(torch.isnan(o).sum())} NaN"
    return ((o - ref).abs().max() / ref.abs().max().clamp_min(1e-30)).item()


def mmcase(dt, M, N, K, BM, BN, BK, nw, ns, cc=80, prec=None, odt=torch.float32, tol=None, **kw):
    x = torch.randn(M, K).to(dt)
    y = torch.randn(K, N).to(dt)
    o = poison_(torch.empty(M, N, dtype=odt))
    r = run_triton(
        mm,
        None,
        dict(BM=BM, BN=BN, BK=BK, PREC=prec),
        [x, y, o, M, N, K],
        (-(-M // BM), -(-N // BN)),
        nw,
        ns,
        cc,
        **kw,
    )
    e = rel(o, x.double() @ y.double())
    tol = tol or (
        2e-3 if dt == torch.float32 and prec != "ieee" else 1e-5 if odt == torch.float32 else 8e-3
    )
    assert e < tol, f"error {e}"
    return r, e


def nf4_data(N, K):
    q = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
    lut = torch.linspace(-1, 1, 16).float()
    am = torch.rand(N * K // 64).float() + 0.5
    idx = torch.stack([q >> 4, q & 15], -1).reshape(N, K).long()
    return q, lut, am, lut[idx].double() * am.double().reshape(N, K // 64).repeat_interleave(64, 1)
