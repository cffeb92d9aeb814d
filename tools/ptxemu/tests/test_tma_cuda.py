"""Bulk copies (TMA) in CUDA C++."""

import itertools

import torch

from tools import ptxemu
from tools.ptxemu import PtxError, compile_cuda, launch, poison_, tensor_map
from tools.ptxemu.tests.tma import ALL
from tools.ptxemu.tests.tma_cuda_kernels import COPIES, LIBCU, LOAD_STORE

torch.manual_seed(0)


def NV(src, **d):
    return compile_cuda("".join(f"#define {k} {v}\n" for k, v in d.items()) + src, "sm_90a")


def raw(t, coords, box, fill=0.0):  # what a load puts into shared memory, before swizzling
    o = (
        torch.full(box, fill, dtype=torch.float64).to(t.dtype)
        if t.dtype.is_floating_point
        else torch.zeros(box, dtype=t.dtype)
    )
    idx = [torch.arange(b) + c for b, c in zip(box, coords, strict=False)]
    ok = [(i >= 0) & (i < n) for i, n in zip(idx, t.shape, strict=False)]
    m = ok[0]
    for z in ok[1:]:
        m = m.unsqueeze(-1) & z
    g = t[
        torch.meshgrid(
            *[i.clamp(0, n - 1) for i, n in zip(idx, t.shape, strict=False)], indexing="ij"
        )
    ]
    o[m] = g[m]
    return o


def swizzled(b, mode):  # 16-byte chunk j of 128-byte line i goes to chunk j ^ (i mod 2^mode)
    n = (b.numel() + 127) // 128 * 128
    x = torch.cat([b, torch.zeros(n - b.numel(), dtype=b.dtype)]).view(-1, 8, 16)
    o = torch.empty_like(x)
    for i in range(x.shape[0]):
        for j in range(8):
            o[i, j ^ (i % (1 << mode))] = x[i, j]
    return o.reshape(-1)[: b.numel()]


def unswizzled(b, mode):
    o = torch.empty_like(b)
    o[swizzled(torch.arange(b.numel()), mode)] = b
    return o


def test_cuda_load_store():
    n = 0
    for D, dt, mode in itertools.product(
        (1, 2, 3, 4, 5), (torch.bfloat16, torch.float32, torch.uint8), (0, 1, 2, 3)
    ):
        if not ALL and (D in (1, 4)) and mode == 1:
            continue
        es = torch.empty(0, dtype=dt).element_size()
        inner = {0: 48, 1: 32, 2: 64, 3: 128}[mode] // es
        box = [2, 3, 2, 4, inner][5 - D :]
        if D == 2:
            box = [24, inner]
        shape = [3, 4, 5, 6, 160 // es][5 - D :] if D != 2 else [50, 160 // es]
        t = (torch.randn(shape) * 50).to(dt)
        by = int(torch.tensor(box).prod()) * es
        for c in (
            [0] * D,
            [1] * (D - 1) + [16 // es],
            [-1] * (D - 1) + [-16 // es],
            [s - 1 for s in shape],
        ):
            for nan in (False, True) if dt.is_floating_point else (False,):
                mem = ptxemu.Memory()
                m = tensor_map(t, box, mem=mem, swizzle=mode, oob_nan=nan)
                out = torch.zeros(by, dtype=torch.uint8)
                cc = list(reversed(c)) + [0] * (5 - D)
                r = launch(NV(LOAD_STORE, D=D), "load_raw", 1, 64, [m, out, *cc, by], by, mem=mem)
                ref = raw(t, c, box, float("nan") if nan else 0.0)
                un = unswizzled(out, mode).view(dt).view(box)
                assert torch.equal(un, ref) or (
                    nan
                    and torch.equal(un.isnan(), ref.isnan())
                    and torch.equal(un.nan_to_num(), ref.nan_to_num())
                ), (D, dt, mode, c, nan)
                assert not r.reports
                n += 1
            s = torch.zeros(shape, dtype=dt)
            mem = ptxemu.Memory()
            m = tensor_map(s, box, mem=mem, swizzle=mode)
            v = (torch.randn(box) * 50).to(dt)
            r = launch(
                NV(LOAD_STORE, D=D),
                "store_raw",
                1,
                64,
                [m, swizzled(v.reshape(-1).view(torch.uint8), mode), *cc, by],
                by,
                mem=mem,
            )
            ref = torch.zeros(shape, dtype=dt)
            [torch.arange(b) + k for b, k in zip(box, c, strict=False)]
            for ix in itertools.product(*[range(b) for b in box[:-1]]):
                g = [i + k for i, k in zip(ix, c, strict=False)]
                if all(0 <= a < b for a, b in zip(g, shape, strict=False)):
                    lo = max(0, -c[-1])
                    hi = min(box[-1], shape[-1] - c[-1])
                    if hi > lo:
                        ref[tuple(g)][c[-1] + lo : c[-1] + hi] = v[ix][lo:hi]
            assert torch.equal(s, ref) and not r.reports, (D, dt, mode, c, r.reports)
            n += 1
    print(f"   {n} boxes")


def test_cuda_reduce():
    t = torch.ones(20, 32)
    v = torch.randn(8, 32)
    mem = ptxemu.Memory()
    m = tensor_map(t, [8, 32], mem=mem)
    launch(
        NV(LOAD_STORE, D=2, RED=1),
        "store_raw",
        3,
        64,
        [m, v.view(-1).view(torch.uint8), 0, 15, 0, 0, 0, 1024],
        1024,
        mem=mem,
        fatal=(),
    )
    ref = torch.ones(20, 32)
    ref[15:] += v[:5]
    ref[15:] += v[:5]
    ref[15:] += v[:5]
    assert (t - ref).abs().max() < 1e-5


def test_cuda_faults():
    t = torch.randn(50, 64)
    mem = ptxemu.Memory()
    m = tensor_map(t, [16, 32], mem=mem)

    def a(o):
        return [m, o, 0, 0, 0, 0, 0, 2048]

    k = dict(mem=mem, check=False)
    o = torch.zeros(2048, dtype=torch.uint8)
    r = launch(NV(LOAD_STORE, D=2, NOWAIT=1), "load_raw", 1, 64, a(o), 2048, **k)
    assert r.races and r.kinds().get("tma_exit"), r.kinds()
    assert not (o.view(torch.float32).view(16, 32) == t[:16, :32]).any()
    r = launch(NV(LOAD_STORE, D=2, NOFENCE=1), "store_raw", 1, 64, a(o), 2048, **k)
    assert set(r.kinds()) == {"proxy"}, r.kinds()
    print("   ", r.reports[0]["msg"][:200])
    r = launch(NV(LOAD_STORE, D=2, NOWAIT=1), "store_raw", 1, 64, a(o), 2048, **k)
    assert set(r.kinds()) == {"tma_exit"}, r.kinds()
    r = launch(NV(LOAD_STORE, D=2, CLOBBER=1), "store_raw", 1, 64, a(o), 2048, **k)
    assert r.races, r.kinds()
    print("   ", r.races[0]["msg"][:200])
    r = launch(NV(LOAD_STORE, D=2), "load_raw", 1, 64, [*a(o)[:-1], 2064], 4096, **k)
    assert "deadlock" in r.error and "transaction bytes 16" in r.error, r.error
    print("   ", r.error[:220])
    r = launch(NV(LOAD_STORE, D=2), "load_raw", 1, 64, [bytes(128), *a(o)[1:]], 2048, **k)
    assert "not a tensor map" in r.error
    r = launch(NV(LOAD_STORE, D=3), "load_raw", 1, 64, a(o), 2048, **k)
    assert "rank 2" in r.error, r.error


def test_cuda_linear_griddepcontrol():
    x = torch.randn(3, 256)
    o = poison_(torch.empty(3, 256))
    o2 = torch.ones(256)
    r = launch(NV(COPIES), "linear", 3, 64, [x, o, o2, 256], 1024)
    assert (o == 2 * x).all() and (o2 - 1 - 2 * x.sum(0)).abs().max() < 1e-5 and not r.reports
    c = r.counters
    assert (
        c["griddepcontrol"] == {"wait": 6, "launch_dependents": 6}
        and c["tma_load"]["bytes"] == 3072
        and c["tma_store"]["bytes"] == 6144
    ), c
    r = launch(NV(COPIES, NOSYNC=1), "linear", 1, 64, [x, o, o2, 256], 1024, check=False)
    assert (r.races and "init" in r.races[0]["msg"]) or "mbarrier" in (r.error or ""), r.kinds()


def test_cuda_ring():
    for steps in (1, 2, 3, 4, 7, 20):
        for n in (32, 64, 128):
            x = torch.randn(steps, 32)
            o = torch.zeros(n)
            for kw in ({}, dict(seed=3, slice=5)):
                r = launch(NV(COPIES), "ring", 1, n, [x, o, steps], **kw)
                assert (
                    o - x.sum(0).repeat(n // 32) * (torch.arange(n) + 1)
                ).abs().max() < 1e-3 and not r.reports, r.reports
    x = torch.randn(9, 32)
    r = launch(NV(COPIES, NOEMPTY=1), "ring", 1, 128, [x, torch.zeros(128), 9], check=False)
    assert r.races or r.error
    r = launch(NV(COPIES, NOFULL=1), "ring", 1, 128, [x, torch.zeros(128), 9], check=False)
    assert r.races, r.kinds()
    print("   ", r.races[0]["msg"][:200])


def test_cuda_forms():
    g = torch.arange(64, dtype=torch.int32) + 1000
    o = torch.zeros(136, dtype=torch.int32)
    r = launch(NV(COPIES), "forms", 1, 64, [o, g])
    assert (
        o[:64].tolist() == [3 * (63 - t) for t in range(64)]
        and o[64:69].tolist() == [2, 0, 1, 1, 1]
        and o[72:].tolist() == list(range(1063, 999, -1))
        and not r.races
    ), (o, r.reports)
    r = launch(NV(COPIES, NOCPWAIT=1), "forms", 1, 64, [o, g], check=False)
    assert r.races
    try:
        launch(NV(COPIES, CL2=1), "two", 2, 32, [o])
        raise SystemExit("cluster of 2 accepted")
    except PtxError as e:
        assert "clusters of 2" in str(e)


def test_cuda_libcu():
    for M, N in ((64, 128), (50, 100)):
        x = torch.randn(M, N)
        o = poison_(torch.empty(M, N))
        mem = ptxemu.Memory()
        a, b = (tensor_map(t, [32, 64], mem=mem, name=n) for t, n in ((x, "in"), (o, "out")))
        r = launch(NV(LIBCU), "scale", (2, 2), 128, [a, b], mem=mem)
        assert (o - x - torch.arange(M)[:, None] % 32).abs().max() < 1e-5 and not r.reports, (
            r.reports
        )
    assert r.counters["tma_load"]["bytes"] == M * N * 4
