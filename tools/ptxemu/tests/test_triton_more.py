"""More of what Triton writes: attention, int8, descriptors, persistent kernels; sm_90."""

import torch
import triton
import triton.language as tl

from tools import ptxemu
from tools.ptxemu import PtxError, poison_, run_triton
from tools.ptxemu.tests.triton_kernels import mmcase, product, rel, softmaxish, splitk

torch.manual_seed(0)


@triton.jit
def intops(a_ptr, b_ptr, o_ptr, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    m = i < n
    a = tl.load(a_ptr + i, mask=m, other=1)
    b = tl.load(b_ptr + i, mask=m, other=1)
    o = o_ptr + i
    tl.store(o, a // b, mask=m)
    tl.store(o + n, a % b, mask=m)
    tl.store(o + 2 * n, tl.umulhi(a.to(tl.uint32), b.to(tl.uint32)).to(tl.int32), mask=m)
    tl.store(o + 3 * n, (a >> 3) ^ (b << 2), mask=m)
    tl.store(o + 4 * n, tl.minimum(a, b) * tl.maximum(a, -b), mask=m)
    tl.store(o + 5 * n, (a.to(tl.int64) * b.to(tl.int64) >> 7).to(tl.int32), mask=m)
    tl.store(o + 6 * n, (a.to(tl.int8).to(tl.int32) + b.to(tl.uint16).to(tl.int32)), mask=m)
    tl.store(
        o + 7 * n,
        tl.where(a > b, a.to(tl.float32).to(tl.int32), (b.to(tl.float32) * 0.3).to(tl.int32)),
        mask=m,
    )


@triton.jit
def grouped(
    x_ptr, ptrs_ptr, o_ptr, off_ptr, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    g = tl.program_id(0)
    s = tl.load(off_ptr + g)
    e = tl.load(off_ptr + g + 1)
    w_ptr = tl.load(ptrs_ptr + g).to(tl.pointer_type(tl.bfloat16))
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    for m0 in range(s, e, BM):
        rm = m0 + tl.arange(0, BM)
        acc = product(x_ptr, w_ptr, rm, rn, 0, BK, e, N, K, BM, BN, BK)
        tl.store(
            o_ptr + rm[:, None] * N + rn[None, :], acc, mask=(rm[:, None] < e) & (rn[None, :] < N)
        )


@triton.jit
def oob(x_ptr, o_ptr, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(o_ptr + i, tl.load(x_ptr + i) * 2)


@triton.jit
def semaphore(x_ptr, o_ptr, lock_ptr, n, B: tl.constexpr):
    i = tl.arange(0, B)
    p = tl.program_id(0)
    while tl.atomic_cas(lock_ptr, p, p) != p:
        pass
    v = tl.load(o_ptr + i, mask=i < n) + tl.load(x_ptr + p * n + i, mask=i < n)
    tl.store(o_ptr + i, v, mask=i < n)
    tl.debug_barrier()
    tl.atomic_xchg(lock_ptr, p + 1)


def test_int_ops():
    n = 1000
    a = torch.randint(-(2**31), 2**31 - 1, (n,), dtype=torch.int64).int()
    b = torch.randint(1, 5000, (n,), dtype=torch.int32) * (
        torch.randint(0, 2, (n,), dtype=torch.int32) * 2 - 1
    )
    o = torch.zeros(8 * n, dtype=torch.int32)
    run_triton(intops, None, dict(B=256), [a, b, o, n], 4, 4)
    o = o.view(8, n).long()
    A, B = a.long(), b.long()

    def w32(v):
        return (v + 2**31) % 2**32 - 2**31

    assert (o[0] == torch.div(A, B, rounding_mode="trunc")).all()
    assert (o[1] == torch.fmod(A, B)).all()
    ua, ub = A % 2**32, B % 2**32
    assert all(
        w32((int(p) * int(q)) >> 32) == int(z) for p, q, z in zip(ua, ub, o[2], strict=False)
    )
    assert (o[3] == w32((A >> 3) ^ w32(B << 2))).all()
    assert (o[4] == w32(torch.minimum(A, B) * torch.maximum(A, -B))).all()
    assert (o[5] == w32((A * B) >> 7)).all()
    assert (o[6] == ((A + 128) % 256 - 128) + (B % 65536)).all()
    assert (
        o[7]
        == torch.where(
            a > b, a.float().double().clamp(max=2**31 - 1).long(), (b.float() * 0.3).long()
        )
    ).all()


def test_grouped_pointer_table():
    G, N, K = 3, 48, 80
    sizes = [0, 21, 40, 64]
    T = 64
    x = torch.randn(T, K).bfloat16()
    ws = [torch.randn(K, N).bfloat16() for _ in range(G)]
    o = poison_(torch.empty(T, N))
    off = torch.tensor(sizes, dtype=torch.int32)
    mem = ptxemu.Memory()
    ptrs = torch.tensor([mem.ptr(w, name=f"w{i}") for i, w in enumerate(ws)])
    run_triton(
        grouped, None, dict(BM=16, BN=32, BK=32), [x, ptrs, o, off, N, K], (G, 2), 4, 3, mem=mem
    )
    ref = torch.cat([x[sizes[g] : sizes[g + 1]].double() @ ws[g].double() for g in range(G)])
    assert rel(o, ref) < 1e-5


def test_triton_oob_reported():
    x = torch.randn(1000)
    o = torch.empty(1024)
    try:
        run_triton(oob, None, dict(B=256), [x, o, 1000], 4)
        raise SystemExit("OOB not reported")
    except PtxError as e:
        print("   ", str(e)[:330])
        assert "out-of-bounds global read" in str(e) and "x_ptr" in str(e)


def test_view_bounds():  # a slice of a bigger storage: only the slice is valid
    big = torch.randn(4096)
    x = big[1024:2048]
    o = torch.empty(1024)
    run_triton(oob, None, dict(B=256), [x, o, 1024], 4)
    assert (o == x * 2).all()
    try:
        run_triton(oob, None, dict(B=256), [big[1024:2047], o, 1024], 4)
        raise SystemExit("OOB not reported")
    except PtxError:
        pass


def test_interblock_semaphore():
    n = 100
    x = torch.randn(6, n)
    o = torch.zeros(n)
    lk = torch.zeros(1, dtype=torch.int32)
    r = run_triton(semaphore, None, dict(B=128), [x, o, lk, n], 6, 4, coresident=6)
    assert rel(o, x.double().sum(0)) < 1e-6
    print("   ", dict(r.kinds()))


# features beyond plain GEMM
@triton.jit
def attn(q_ptr, k_ptr, v_ptr, o_ptr, S, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    m0 = tl.program_id(0) * BM
    rm = m0 + tl.arange(0, BM)
    rd = tl.arange(0, D)
    q = tl.load(q_ptr + rm[:, None] * D + rd[None, :], mask=rm[:, None] < S, other=0.0)
    acc = tl.zeros((BM, D), tl.float32)
    mi = tl.full((BM,), float("-inf"), tl.float32)
    li = tl.zeros((BM,), tl.float32)
    for n0 in range(0, S, BN):
        rn = n0 + tl.arange(0, BN)
        k = tl.load(k_ptr + rn[None, :] * D + rd[:, None], mask=rn[None, :] < S, other=0.0)
        s = tl.dot(q, k) * 0.125 * 1.44269504
        s = tl.where(rn[None, :] < S, s, float("-inf"))
        mn = tl.maximum(mi, tl.max(s, 1))
        p = tl.exp2(s - mn[:, None])
        al = tl.exp2(mi - mn)
        li = li * al + tl.sum(p, 1)
        acc = acc * al[:, None]
        v = tl.load(v_ptr + rn[:, None] * D + rd[None, :], mask=rn[:, None] < S, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc)
        mi = mn
    tl.store(o_ptr + rm[:, None] * D + rd[None, :], acc / li[:, None], mask=rm[:, None] < S)


def test_x_attn(cc=80):
    S, D = 100, 64
    q, k, v = (torch.randn(S, D).bfloat16() for _ in range(3))
    o = poison_(torch.empty(S, D))
    r = run_triton(attn, None, dict(D=D, BM=32, BN=32), [q, k, v, o, S], 4, 4, 3, cc)
    ref = (q.double() @ k.double().T * 0.125).softmax(1) @ v.double()
    e = rel(o, ref)
    assert e < 1e-2, e
    return r


@triton.jit
def i8mm(x_ptr, y_ptr, o_ptr, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rm = tl.arange(0, BM)
    rn = tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.int32)
    for k0 in range(0, K, BK):
        rk = k0 + tl.arange(0, BK)
        acc = tl.dot(
            tl.load(x_ptr + rm[:, None] * K + rk[None, :]),
            tl.load(y_ptr + rn[None, :] * K + rk[:, None]),
            acc,
        )
    tl.store(o_ptr + rm[:, None] * BN + rn[None, :], acc)


def test_x_i8(cc=80):
    x = torch.randint(-128, 128, (32, 128), dtype=torch.int8)
    y = torch.randint(-128, 128, (64, 128), dtype=torch.int8)
    o = torch.zeros(32, 64, dtype=torch.int32)
    r = run_triton(i8mm, None, dict(BM=32, BN=64, BK=64), [x, y, o, 128], 1, 4, 3, cc)
    assert (o == x.int() @ y.int().T).all()
    return r


@triton.jit
def f16acc(x_ptr, y_ptr, o_ptr, BM: tl.constexpr, BK: tl.constexpr):
    rm = tl.arange(0, BM)
    rk = tl.arange(0, BK)
    a = tl.load(x_ptr + rm[:, None] * BK + rk[None, :])
    b = tl.load(y_ptr + rm[None, :] * BK + rk[:, None])
    tl.store(o_ptr + rm[:, None] * BM + rm[None, :], tl.dot(a, b, out_dtype=tl.float16))


def test_x_f16acc():
    x = torch.randn(32, 64).half()
    y = torch.randn(32, 64).half()
    o = torch.zeros(32, 32).half()
    r = run_triton(f16acc, None, dict(BM=32, BK=64), [x, y, o], 1, 4)
    assert rel(o, x.double() @ y.double().T) < 5e-3
    return r


@triton.jit(noinline=True)
def helper(x, s):
    return x * s + 1.0


@triton.jit
def noinl(x_ptr, o_ptr, s, B: tl.constexpr):
    p = tl.program_id(0)
    x = tl.load(x_ptr + p)
    y = helper(x, s)
    y = helper(y, 2.0)
    tl.store(o_ptr + p, y)


def test_x_noinline():
    x = torch.randn(256)
    o = torch.zeros(256)
    r = run_triton(noinl, None, dict(B=256), [x, o, 3.0], 256, 4)
    assert (o - ((x * 3 + 1) * 2 + 1)).abs().max() < 1e-5
    return r


@triton.jit
def add_(a, b):
    return a + b


@triton.jit
def miscops(x_ptr, o_ptr, seed, B: tl.constexpr):
    i = tl.arange(0, B)
    x = tl.load(x_ptr + i)
    tl.store(o_ptr + i, tl.associative_scan(x, 0, add_))
    tl.store(o_ptr + B + i, tl.rand(seed, i))
    tl.store(o_ptr + 2 * B + i, tl.sort(x))
    tl.store(o_ptr + 3 * B + i, tl.flip(x))
    h = tl.histogram((i % 16).to(tl.int32), 16)
    tl.store(o_ptr + 4 * B + tl.arange(0, 16), h.to(tl.float32))
    tl.store(
        o_ptr + 5 * B + i,
        tl.inline_asm_elementwise(
            "{ .reg .f32 t; mul.f32 t, $1, 0f40000000; add.f32 $0, t, $2; }",
            "=f,f,f",
            [x, x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        ),
    )


def test_x_misc(cc=80):
    B = 512
    x = torch.randn(B)
    o = torch.zeros(6 * B)
    r = run_triton(miscops, None, dict(B=B), [x, o, 7], 1, 4, 3, cc)
    O = o.view(6, B)
    assert (O[0] - x.cumsum(0)).abs().max() < 1e-3
    assert 0 <= O[1].min() < 0.02 and 0.98 < O[1].max() < 1 and abs(O[1].mean() - 0.5) < 0.05
    assert (O[2] == x.sort()[0]).all()
    assert (O[3] == x.flip(0)).all()
    assert (O[4][:16] == B / 16).all()
    assert (O[5] - 3 * x).abs().max() < 1e-5
    return r


@triton.jit
def desc(x_ptr, y_ptr, o_ptr, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    a = tl.make_tensor_descriptor(x_ptr, [M, K], [K, 1], [BM, BK])
    b = tl.make_tensor_descriptor(y_ptr, [K, N], [N, 1], [BK, BN])
    c = tl.make_tensor_descriptor(o_ptr, [M, N], [N, 1], [BM, BN])
    pm = tl.program_id(0)
    pn = tl.program_id(1)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        acc = tl.dot(a.load([pm * BM, k]), b.load([k, pn * BN]), acc)
    c.store([pm * BM, pn * BN], acc.to(tl.float16))


def test_x_desc():
    M, N, K = 100, 72, 80
    x = torch.randn(M, K).half()
    y = torch.randn(K, N).half()
    o = poison_(torch.empty(M, N).half())
    r = run_triton(desc, None, dict(BM=64, BN=64, BK=32), [x, y, o, M, N, K], (2, 2), 4)
    assert rel(o, x.double() @ y.double()) < 3e-3
    return r


@triton.jit
def persist(
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
    FL: tl.constexpr,
):
    nm = tl.cdiv(M, BM)
    nn = tl.cdiv(N, BN)
    for t in tl.range(tl.program_id(0), nm * nn, NP, flatten=FL):
        rm = (t // nn) * BM + tl.arange(0, BM)
        rn = (t % nn) * BN + tl.arange(0, BN)
        acc = product(x_ptr, y_ptr, rm, rn, 0, BK, M, N, K, BM, BN, BK)
        tl.store(
            o_ptr + rm[:, None] * N + rn[None, :], acc, mask=(rm[:, None] < M) & (rn[None, :] < N)
        )


def test_x_persist():
    for fl in (False, True):
        M, N, K = 150, 144, 96
        x = torch.randn(M, K).bfloat16()
        y = torch.randn(K, N).bfloat16()
        o = poison_(torch.empty(M, N))
        r = run_triton(
            persist, None, dict(BM=32, BN=32, BK=32, FL=fl), [x, y, o, M, N, K, 3], 3, 4, 3
        )
        assert rel(o, x.double() @ y.double()) < 1e-5
    return r


def test_x_cc90_mm_small():  # M<64: no wgmma
    for BM, nw in ((16, 4), (32, 4), (16, 1), (32, 8)):
        r, _e = mmcase(torch.bfloat16, 45, 96, 160, BM, 64, 32, nw, 3, cc=90)
    return r


def test_x_cc90_mm_wgmma():
    r, _e = mmcase(torch.bfloat16, 128, 128, 160, 64, 64, 32, 4, 3, cc=90)
    return r


def test_x_cc90_attn():
    return test_x_attn(90)


def test_x_cc90_misc():
    return test_x_misc(90)


def test_x_cc90_i8():
    return test_x_i8(90)


def test_x_cc90_splitk():
    for odt in (torch.float32, torch.float16, torch.bfloat16):
        M, N, K = 50, 72, 300
        x = torch.randn(M, K).bfloat16()
        y = torch.randn(K, N).bfloat16()
        o = torch.zeros(M, N, dtype=odt)
        r = run_triton(
            splitk, None, dict(BM=32, BN=32, BK=32, SK=4), [x, y, o, M, N, K], (2, 3, 4), 4, 2, 90
        )
        assert rel(o, x.double() @ y.double()) < 6e-2
    return r


def test_x_cc90_softmax():
    R, N = 5, 777
    x = torch.randn(R, N).bfloat16()
    o = torch.empty(R, N)
    m = torch.full((128,), -1e30)
    return run_triton(softmaxish, None, dict(B=1024), [x, o, m, N], R, 4, 3, 90)
