"""Tensor descriptors of host and device, warp specialisation, tiles and stages."""

import itertools
import os
import sys

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor as TD

from tools.ptxemu import poison_, run_triton
from tools.ptxemu.tests.tma import ALL, case, device, host, rel

torch.manual_seed(0)


SHAPES = ((200, 264, 328), (128, 128, 256), (65, 72, 40), (1, 8, 8), (257, 520, 96))


TILES = ((64, 64, 64), (128, 128, 64), (64, 256, 32), (128, 64, 128), (64, 32, 64), (16, 64, 32))


def sweep(kind, **kw):
    n = bad = wg = 0
    what = {}
    for i, ((M, N, K), (BM, BN, BK), ns, dt, odt, BT) in enumerate(
        itertools.product(
            SHAPES,
            TILES,
            (1, 2, 3, 4),
            (torch.bfloat16, torch.float16),
            (torch.float32, None),
            (False, True),
        )
    ):
        if not ALL and i % 31:
            continue
        if (BM * BK + BN * BK) * 2 * ns + BM * BN * (4 if odt else 2) > 225000:
            continue
        try:
            r, _e = case(
                kind,
                M,
                N,
                K,
                BM,
                BN,
                BK,
                kw.get("nw", 4 if BM < 128 else 8),
                ns,
                BT,
                dt=dt,
                odt=odt or dt,
                WS=kw.get("WS", False),
                FL=kw.get("FL", False),
            )
        except RuntimeError as ex:
            if "PassManager" in str(ex):
                what["triton compile error"] = what.get("triton compile error", 0) + 1
                continue
            bad += 1
            print("   FAIL", (M, N, K), (BM, BN, BK), ns, dt, odt, BT, str(ex)[:400])
            continue
        n += 1
        c = r.counters
        wg += any("wgmma" in k for k in c["mma"])
        if r.reports or not c["tma_load"]["requests"] or not c["tma_store"]["requests"]:
            bad += 1
            print(
                "   BAD",
                (M, N, K),
                (BM, BN, BK),
                ns,
                dt,
                odt,
                BT,
                dict(r.kinds()),
                c["tma_load"],
                c["tma_store"],
            )
        k = f"{r.warps_per_block} warps"
        what[k] = what.get(k, 0) + 1
    print(f"   {n} configurations, {wg} with wgmma, {bad} bad, {what}")
    assert not bad and n


def test_host():
    sweep(host)


def test_host_flatten():
    sweep(host, FL=True)


def test_device():
    sweep(device)


def test_device_flatten():
    sweep(device, FL=True)


def quiet(f):  # Triton prints the MLIR of a failed pass
    sys.stderr.flush()
    s = os.dup(2)
    n = os.open(os.devnull, os.O_WRONLY)
    os.dup2(n, 2)
    try:
        f()
    finally:
        os.dup2(s, 2)
        os.close(s)
        os.close(n)


def test_device_warp_specialized():
    quiet(lambda: sweep(device, WS=True, nw=4))


def test_host_warp_specialized():
    quiet(lambda: sweep(host, WS=True, nw=4))


def test_warp_specialized_is():  # really specialised: more warps than asked for, register reallocation, several named barriers
    for kind in (host, device):
        r, _e = case(kind, 200, 264, 328, 64, 128, 64, 4, 3, WS=True)
        p = r.compiled.asm["ptx"]
        assert (
            r.warps_per_block == 12
            and "setmaxnreg" in p
            and ".reqntid 384" in p
            and r.compiled.metadata.num_warps == 12
        ), r.warps_per_block
        for seed in (1, 2, 3):
            case(kind, 200, 264, 328, 64, 128, 64, 4, 3, WS=True, seed=seed, slice=7)
    case(device, 200, 264, 328, 64, 128, 64, 4, 3, WS=True, threads=2)
    case(device, 200, 264, 328, 64, 128, 64, 4, 3, WS=True, coresident=3)


@triton.jit
def subtiles(
    a, b, c, M, N, K, NP, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WS: tl.constexpr
):  # as triton's tutorial 09, EPILOGUE_SUBTILE
    nm = tl.cdiv(M, BM)
    nn = tl.cdiv(N, BN)
    tc = tl.program_id(0) - NP
    for t in tl.range(tl.program_id(0), nm * nn, NP, flatten=True, warp_specialize=WS):
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(tl.cdiv(K, BK)):
            acc = tl.dot(a.load([t // nn * BM, k * BK]), b.load([t % nn * BN, k * BK]).T, acc)
        tc += NP
        pm = tc // nn
        pn = tc % nn
        lo, hi = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
        c.store([pm * BM, pn * BN], lo.to(c.dtype))
        c.store([pm * BM, pn * BN + BN // 2], hi.to(c.dtype))


def test_epilogue_subtile():
    for M, N, K, BM, BN, nw, ws in (
        (300, 264, 136, 128, 128, 8, False),
        (200, 136, 200, 64, 128, 4, False),
        (200, 136, 200, 64, 128, 4, True),
    ):
        x = torch.randn(M, K).half()
        y = torch.randn(N, K).half()
        o = poison_(torch.empty(M, N).half())
        r = run_triton(
            subtiles,
            None,
            dict(BM=BM, BN=BN, BK=64, WS=ws),
            [
                TD.from_tensor(x, [BM, 64]),
                TD.from_tensor(y, [BN, 64]),
                TD.from_tensor(o, [BM, BN // 2]),
                M,
                N,
                K,
                2,
            ],
            2,
            nw,
            3,
            90,
        )
        assert rel(o, x.double() @ y.double().T) < 1e-3 and not r.reports, r.reports


def test_f32():
    for kind in (host, device):
        case(kind, 100, 72, 84, 64, 64, 32, dt=torch.float32)


def test_cc80():  # no TMA: descriptors become pointers
    for kind in (host, device):
        r, _e = case(kind, 100, 72, 88, 64, 64, 32, cc=80)
        assert (
            r.counters["tma_load"]["requests"] == 0
            and r.counters["global_store"]["bytes"] == 100 * 72 * 4
            and not r.reports
        )


def test_counters():
    M, N, K, BM, BN, BK = 256, 384, 192, 128, 128, 64
    for kind in (host, device):
        r, _e = case(kind, M, N, K, BM, BN, BK, 8, 3, odt=torch.bfloat16)
        c = r.counters
        assert (
            c["tma_load"]["bytes"]
            == (N // BN) * M * K * 2 + (M // BM) * K * N * 2
            == c["tma_load"]["shared_bytes"]
            and c["tma_load"]["sectors"] * 32 == c["tma_load"]["bytes"]
        ), c["tma_load"]
        assert (
            c["tma_store"]["bytes"] == M * N * 2 and c["tma_store"]["sectors"] * 32 == M * N * 2
        ), c["tma_store"]
        b = {x["name"]: x for x in c["buffers"]}
        nm = ("a", "b", "c") if kind is host else ("x_ptr", "y_ptr", "o_ptr")
        assert (
            b[nm[0]]["ld_unique_sectors"] * 32 == M * K * 2
            and b[nm[1]]["ld_unique_sectors"] * 32 == K * N * 2
            and b[nm[2]]["st_unique_sectors"] * 32 == M * N * 2
        ), b
        assert (
            r.global_load_sector_bytes == c["tma_load"]["bytes"]
            and sum(i["bytes"] for i in r.instr if "bulk.tensor" in i["text"])
            == c["tma_load"]["bytes"] + c["tma_store"]["bytes"]
        )
