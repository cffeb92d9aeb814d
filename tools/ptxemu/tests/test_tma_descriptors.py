"""Tensor descriptors in more dimensions, padding, reductions; faults that must be found."""

import re

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor as TD

from tools import ptxemu
from tools.ptxemu import PtxError, poison_, run_triton
from tools.ptxemu.tests.tma import device, host, rel

torch.manual_seed(0)


@triton.jit
def copy3(a, o, BX: tl.constexpr, BY: tl.constexpr, BZ: tl.constexpr, x0, y0, z0):
    o.store([0, 0, 0], a.load([x0, y0, z0]))


@triton.jit
def copy2(a, o_ptr, c0, c1, BM: tl.constexpr, BN: tl.constexpr):
    v = a.load([c0, c1])
    tl.store(o_ptr + tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :], v)


def test_3d_negative_coordinates():
    x = torch.randn(5, 21, 40).bfloat16()
    B = (2, 16, 32)
    for c in ((0, 0, 0), (3, 8, 16), (4, -3, 24), (-1, 20, -8), (7, 0, 0)):
        o = poison_(torch.empty(B, dtype=torch.bfloat16))
        run_triton(
            copy3,
            None,
            dict(BX=2, BY=16, BZ=32),
            [TD.from_tensor(x, list(B)), TD.from_tensor(o, list(B)), *c],
            1,
            4,
            3,
            90,
        )
        p = torch.zeros(5 + 20, 21 + 40, 40 + 80).bfloat16()
        p[10:15, 20:41, 40:80] = x
        assert (
            o == p[10 + c[0] : 12 + c[0], 20 + c[1] : 36 + c[1], 40 + c[2] : 72 + c[2]]
        ).all(), c


def test_nan_padding_and_tf32():
    for cc in (80, 90):
        x = torch.randn(20, 24).half()
        o = poison_(torch.empty(32, 32).half())
        run_triton(
            copy2,
            None,
            dict(BM=32, BN=32),
            [TD.from_tensor(x, [32, 32], padding="nan"), o, 3, 8],
            1,
            4,
            3,
            cc,
        )
        assert (
            (o[:17, :16] == x[3:, 8:]).all()
            and torch.isnan(o[17:]).all()
            and torch.isnan(o[:, 16:]).all()
        )
        x = torch.randn(20, 24)
        x[0, 0] = float("inf")
        o = torch.zeros(32, 32)
        run_triton(
            copy2,
            None,
            dict(BM=32, BN=32),
            [TD.from_tensor(x, [32, 32], round_f32_to_tf32=True), o, 0, 0],
            1,
            4,
            3,
            cc,
        )
        b = x.view(torch.int32).long()
        ref = ((b + 0xFFF + (b >> 13 & 1)) & ~0x1FFF).int().view(torch.float32)
        ref[0, 0] = float("inf")
        assert (o[:20, :24] == ref).all() and (o[20:] == 0).all()


@triton.jit
def addred(x, o_ptr, M, N, BM: tl.constexpr, BN: tl.constexpr):
    o = tl.make_tensor_descriptor(o_ptr, [M, N], [N, 1], [BM, BN])
    o.atomic_add([tl.program_id(0) * BM - 8, 0], x.load([tl.program_id(0) * BM, 0]))


def test_atomic_add():
    for dt in (torch.float32, torch.bfloat16, torch.int32):
        M, N = 100, 64
        x = torch.randint(-8, 8, (M, N)).to(dt)
        o = torch.ones(M, N).to(dt)
        run_triton(
            addred, None, dict(BM=32, BN=64), [TD.from_tensor(x, [32, 64]), o, M, N], 4, 4, 3, 90
        )
        ref = torch.ones(M, N).to(dt)
        ref[: M - 8] += x[8:]
        assert (o == ref).all(), dt


@triton.jit
def attn(q, k, v, o, S, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WS: tl.constexpr):
    m0 = tl.program_id(0) * BM
    qq = q.load([m0, 0])
    acc = tl.zeros((BM, D), tl.float32)
    mi = tl.full((BM,), float("-inf"), tl.float32)
    li = tl.zeros((BM,), tl.float32)
    for n0 in tl.range(0, S, BN, warp_specialize=WS):
        s = tl.dot(qq, k.load([n0, 0]).T) * (0.125 * 1.44269504)
        s = tl.where((n0 + tl.arange(0, BN))[None, :] < S, s, float("-inf"))
        mn = tl.maximum(mi, tl.max(s, 1))
        p = tl.exp2(s - mn[:, None])
        al = tl.exp2(mi - mn)
        li = li * al + tl.sum(p, 1)
        acc = acc * al[:, None]
        acc = tl.dot(p.to(tl.bfloat16), v.load([n0, 0]), acc)
        mi = mn
    o.store([m0, 0], (acc / li[:, None]).to(o.dtype))


def test_attention():
    for S, BM, BN, nw, ns in ((200, 64, 64, 4, 3), (300, 128, 64, 8, 2), (130, 64, 128, 4, 3)):
        q, k, v = (torch.randn(S, 64).bfloat16() for _ in range(3))
        o = poison_(torch.empty(S, 64))
        r = run_triton(
            attn,
            None,
            dict(D=64, BM=BM, BN=BN, WS=False),
            [
                TD.from_tensor(q, [BM, 64]),
                TD.from_tensor(k, [BN, 64]),
                TD.from_tensor(v, [BN, 64]),
                TD.from_tensor(o, [BM, 64]),
                S,
            ],
            -(-S // BM),
            nw,
            ns,
            90,
        )
        assert (
            rel(o, (q.double() @ k.double().T * 0.125).softmax(1) @ v.double()) < 1e-2
            and not r.reports
        ), r.reports


@triton.jit
def pdl(a, o_ptr, BM: tl.constexpr, BN: tl.constexpr):
    tl.extra.cuda.gdc_wait()
    v = a.load([tl.program_id(0) * BM, 0])
    tl.extra.cuda.gdc_launch_dependents()
    tl.store(
        o_ptr
        + (tl.program_id(0) * BM + tl.arange(0, BM))[:, None] * BN
        + tl.arange(0, BN)[None, :],
        v,
    )


def test_griddepcontrol():
    x = torch.randn(64, 32).half()
    o = poison_(torch.empty(64, 32).half())
    r = run_triton(
        pdl,
        None,
        dict(BM=32, BN=32),
        [TD.from_tensor(x, [32, 32]), o],
        2,
        4,
        3,
        90,
        options={"launch_pdl": True},
    )
    assert (o == x).all() and r.counters["griddepcontrol"] == {"wait": 8, "launch_dependents": 8}, (
        r.counters["griddepcontrol"]
    )


def test_clusters_named():
    x = torch.randn(64, 64).half()
    o = torch.empty(64, 64).half()
    try:
        run_triton(
            copy2,
            None,
            dict(BM=64, BN=64),
            [TD.from_tensor(x, [64, 64]), o, 0, 0],
            1,
            4,
            3,
            90,
            options={"num_ctas": 2},
        )
        raise SystemExit("num_ctas 2 accepted")
    except PtxError as e:
        assert "cluster" in str(e), e


# one fault put into Triton's PTX: what is reported?
def faulty(kind, WS, edit, **kw):
    M, N, K = 200, 136, 328
    x = torch.randn(M, K).bfloat16()
    y = torch.randn(K, N).bfloat16()
    o = poison_(torch.empty(M, N))
    ce = dict(BM=64, BN=64, BK=64, BT=False, WS=WS, FL=False)
    args = (
        [TD.from_tensor(x, [64, 64]), TD.from_tensor(y, [64, 64]), TD.from_tensor(o, [64, 64])]
        if kind is host
        else [x, y, o]
    )
    ld = ptxemu.load
    r = run_triton(kind, None, ce, [*args, M, N, K, 2], 2, 4, 3, 90)
    assert not r.reports and rel(o, x.double() @ y.double()) < 1e-5
    p = edit(r.compiled.asm["ptx"])
    assert p != r.compiled.asm["ptx"]
    poison_(o)
    ptxemu.load = lambda _: ptxemu.Module(p)
    try:
        r = run_triton(
            kind, None, ce, [*args, M, N, K, 2], 2, 4, 3, 90, check=False, max_instr=500000, **kw
        )
    finally:
        ptxemu.load = ld
    d = (o.double() - x.double() @ y.double()).abs().max()
    return r, not bool(d < 1e-3)


def test_faults():
    def nowait(p):
        return re.sub(r"mbarrier\.try_wait[^;]*;", "setp.eq.u32 complete, 0, 0;", p, count=1)

    for kind, WS in ((host, False), (device, False), (device, True)):
        if WS:

            def nowait(p):
                return re.sub(r"mbarrier\.try_wait[^;]*;", "setp.eq.u32 complete, 0, 0;", p)

        r, wrong = faulty(kind, WS, nowait)
        assert (r.races and wrong) or r.error, (r.kinds(), r.error, wrong)
        print("    no mbarrier wait:", (r.error or r.races[0]["msg"])[:230])
        r, wrong = faulty(kind, WS, lambda p: p.replace("fence.proxy.async.shared::cta;", ""))
        assert r.kinds().get("proxy") and not r.error, (r.kinds(), r.error)
        r, wrong = faulty(
            kind, WS, lambda p: re.sub(r"(mbarrier\.arrive\.expect_tx[^;]*), (\d+);", r"\1, 16;", p)
        )
        assert r.error or r.races, r
        r, wrong = faulty(
            kind, WS, lambda p: re.sub(r"@%p\d+ mbarrier\.arrive\.expect_tx[^;]*;", "", p)
        )
        assert r.error and "deadlock" in r.error and "mbarrier" in r.error, r.error
    print("    no arrive:", r.error[:300])
    r, wrong = faulty(host, False, lambda p: re.sub(r"cp\.async\.bulk\.wait_group\S*\s+0;", "", p))
    assert r.races and r.kinds().get("tma_exit"), r.kinds()
    r, wrong = faulty(
        device, True, lambda p: re.sub(r"@%p\d+ mbarrier\.arrive\.shared[^;]*;", "", p)
    )
    assert "deadlock" in r.error, r.error
    r, wrong = faulty(
        device, False, lambda p: re.sub(r"@%p\d+ tensormap\.cp_fenceproxy[^;]*;", "", p)
    )
    assert "tensor map" in r.error, r.error
    print("    no cp_fenceproxy:", r.error[:160])


def test_errors():
    def fails(f, text):
        try:
            f()
        except PtxError as e:
            assert text in str(e), e
            print("   ", str(e)[:200])
            return
        raise SystemExit("nothing reported: " + text)

    x = torch.randn(64, 64).half()
    o = torch.empty(32, 32).half()
    d = TD(x, [80, 64], [64, 1], [32, 32])
    fails(
        lambda: run_triton(copy2, None, dict(BM=32, BN=32), [d, o, 50, 0], 1, 4, 3, 90),
        "out-of-bounds global read",
    )  # the descriptor says more rows than there are
