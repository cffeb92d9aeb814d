"""Floats and conversions: hand-written PTX against independent Python and numpy references."""

import numpy as np
import torch

from tools.ptxemu.tests.isa import bits16, eq, ints, rng, run, sg


def f32s(n=2000):
    v = (rng.standard_normal(n) * 10.0 ** rng.integers(-8, 9, n)).astype(np.float32)
    v[:14] = [0, -0.0, np.inf, -np.inf, np.nan, 1, -1, 0.5, 1.5, 2.5, -2.5, 65504, 65520, 1e-45]
    v[14:40] = np.ldexp(1.0, -np.arange(130, 156)).astype(np.float32)[:26]
    return v


def t2(dt, f32):
    return torch.from_numpy(f32).to(dt)


def test_cvt_float():
    v = f32s()
    a = v.view(np.uint32)
    nan = np.isnan(v)

    def cmp16(o, ref):
        o = o.copy()
        assert ((o[nan] & 0x7FFF) > 0x7C00).all()
        assert (o[~nan] == ref[~nan]).all(), [
            (v[i], hex(o[i]), hex(ref[i])) for i in np.where((o != ref) & ~nan)[0][:5]
        ]

    cmp16(run("cvt.rn.f16.f32 {d}, {a}", 2, [a]), bits16(t2(torch.float16, v)))
    cmp16(run("cvt.rn.bf16.f32 {d}, {a}", 2, [a]), bits16(t2(torch.bfloat16, v)))
    with np.errstate(all="ignore"):
        h = v.astype(np.float16)
        hz = np.where(
            np.abs(h.astype(np.float64)) > np.abs(v.astype(np.float64)),
            np.nextafter(h, np.float16(0)),
            h,
        )
        cmp16(run("cvt.rz.f16.f32 {d}, {a}", 2, [a]), np.where(np.isinf(v), h, hz).view(np.uint16))
    cmp16(run("cvt.rz.bf16.f32 {d}, {a}", 2, [a]), (a >> 16).astype(np.uint16))
    b = rng.permutation(a)
    o = run("cvt.rn.bf16x2.f32 {d}, {a}, {b}", 4, [a, b])
    hi, lo = bits16(t2(torch.bfloat16, v)), bits16(t2(torch.bfloat16, b.view(np.float32)))
    ok = ~nan & ~np.isnan(b.view(np.float32))
    assert (o[ok] == (lo.astype(np.uint32) | hi.astype(np.uint32) << 16)[ok]).all()
    o = run("cvt.rn.f16x2.f32 {d}, {a}, {b}", 4, [a, b])
    hi, lo = bits16(t2(torch.float16, v)), bits16(t2(torch.float16, b.view(np.float32)))
    assert (o[ok] == (lo.astype(np.uint32) | hi.astype(np.uint32) << 16)[ok]).all()
    h = np.arange(65536, dtype=np.uint16)
    o = run("cvt.f32.f16 {d}, {a}", 4, [h]).view(np.float32)
    r = h.view(np.float16).astype(np.float32)
    assert ((o == r) | np.isnan(r) & np.isnan(o)).all()
    o = run("cvt.f32.bf16 {d}, {a}", 4, [h])
    assert (o == h.astype(np.uint32) << 16)[
        ~np.isnan((h.astype(np.uint32) << 16).view(np.float32))
    ].all()
    fin = np.isfinite(v)
    o = run("cvt.rna.tf32.f32 {d}, {a}", 4, [a])
    r = (a + 0x1000) & np.uint32(0xFFFFE000)
    assert (o[fin] == r[fin]).all()
    d = rng.standard_normal(2000) * 10.0 ** rng.integers(-10, 10, 2000)
    o = run("cvt.rn.f32.f64 {d}, {a}", 4, [d.view(np.uint64)])
    assert (o == d.astype(np.float32).view(np.uint32)).all()
    for m in ("rz", "rm", "rp"):
        o = (
            run(f"cvt.{m}.f32.f64 {{d}}, {{a}}", 4, [d.view(np.uint64)])
            .view(np.float32)
            .astype(np.float64)
        )
        assert (
            (np.abs(o) <= np.abs(d)) if m == "rz" else (o <= d) if m == "rm" else (o >= d)
        ).all() and (
            np.abs(o - d) <= np.abs(np.spacing(d.astype(np.float32))).astype(np.float64) * 1.0001
        ).all()
    for m, f in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        o = run(f"cvt.{m}.f32.f32 {{d}}, {{a}}", 4, [a]).view(np.float32)
        assert ((o == f(v)) | nan).all()
        for t in ("s32", "u32", "s16", "u8", "s64", "u64"):
            B = int(t[1:])
            lo, hi = (-(1 << B - 1), (1 << B - 1) - 1) if t[0] == "s" else (0, (1 << B) - 1)
            z = max(2, B // 8)
            ref = []
            for x in v:
                if np.isnan(x):
                    ref.append(None)
                else:
                    y = (
                        lo
                        if x == -np.inf
                        else hi
                        if x == np.inf
                        else max(lo, min(hi, int(f(np.float64(x)))))
                    )
                    ref.append(y & ((1 << 8 * z) - 1))
            o = run(f"cvt.{m}.{t}.f32 {{d}}, {{a}}", z, [a])
            eq(
                [x for x, r in zip(o, ref, strict=False) if r is not None],
                [r for r in ref if r is not None],
                "cvt." + m + t,
            )


def test_cvt_int():
    for s in ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"):
        sb = int(s[1:])
        sz = max(2, sb // 8)
        a = ints(sz)
        g = (lambda v: sg(v, sb)) if s[0] == "s" else (lambda v: int(v) & ((1 << sb) - 1))
        for d in ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"):
            db = int(d[1:])
            dz = max(2, db // 8)
            gd = (lambda v: sg(v, db)) if d[0] == "s" else (lambda v: v & ((1 << db) - 1))
            M = (1 << 8 * dz) - 1
            eq(run(f"cvt.{d}.{s} {{d}}, {{a}}", dz, [a]), [gd(g(x)) & M for x in a], f"cvt.{d}.{s}")
            lo, hi = (-(1 << db - 1), (1 << db - 1) - 1) if d[0] == "s" else (0, (1 << db) - 1)
            if d != s:
                eq(
                    run(f"cvt.sat.{d}.{s} {{d}}, {{a}}", dz, [a]),
                    [max(lo, min(hi, g(x))) & M for x in a],
                    f"cvt.sat.{d}.{s}",
                )
        o = run(f"cvt.rn.f32.{s} {{d}}, {{a}}", 4, [a])
        r = np.array(
            [np.float32(np.int64(g(x))) if s[0] == "s" else np.float32(np.uint64(g(x))) for x in a]
        )
        assert (o == r.view(np.uint32)).all(), s
        if sb <= 32:
            o = run(f"cvt.rn.f64.{s} {{d}}, {{a}}", 8, [a])
            assert (o == np.array([float(g(x)) for x in a]).view(np.uint64)).all()
        if sb <= 32:
            o = run(f"cvt.rn.f16.{s} {{d}}, {{a}}", 2, [a])
            r = np.array([float(g(x)) for x in a])
        if sb <= 32:
            with np.errstate(all="ignore"):
                assert (o == r.astype(np.float16).view(np.uint16)).all(), s


def test_float_ops():
    a, b, c = f32s(), rng.permutation(f32s()), rng.permutation(f32s())
    A, B, C = (x.view(np.uint32) for x in (a, b, c))

    def same(o, r):
        return ((o == r) & (np.signbit(o) == np.signbit(r)) | np.isnan(o) & np.isnan(r)).all()

    with np.errstate(all="ignore"):
        for k, f in (
            ("add", np.add),
            ("sub", np.subtract),
            ("mul", np.multiply),
            ("div.rn", np.divide),
        ):
            assert same(run(f"{k}.f32 {{d}}, {{a}}, {{b}}", 4, [A, B]).view(np.float32), f(a, b)), k

        def fl(x):
            return np.where(
                np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x
            ).astype(np.float32)

        assert same(run("mul.ftz.f32 {d}, {a}, {b}", 4, [A, B]).view(np.float32), fl(fl(a) * fl(b)))
        r = (
            torch.addcmul(
                torch.from_numpy(c).double(),
                torch.from_numpy(a).double(),
                torch.from_numpy(b).double(),
            )
            .float()
            .numpy()
        )
        o = run("fma.rn.f32 {d}, {a}, {b}, {c}", 4, [A, B, C]).view(np.float32)
        ok = np.isfinite(r)
        assert (np.abs(o[ok].astype(np.float64) - r[ok]) <= np.abs(np.spacing(r[ok]))).all()
        assert same(
            run("min.f32 {d}, {a}, {b}", 4, [A, B]).view(np.float32),
            np.where((a == 0) & (b == 0), np.where(np.signbit(a), a, b), np.fmin(a, b)),
        )
        assert same(
            run("max.NaN.f32 {d}, {a}, {b}", 4, [A, B]).view(np.float32),
            np.where((a == 0) & (b == 0), np.where(np.signbit(a), b, a), np.maximum(a, b)),
        )
        assert same(run("neg.f32 {d}, {a}", 4, [A]).view(np.float32), -a)
        assert same(run("abs.f32 {d}, {a}", 4, [A]).view(np.float32), np.abs(a))
        assert same(run("sqrt.rn.f32 {d}, {a}", 4, [A]).view(np.float32), np.sqrt(a))
        assert same(run("rcp.rn.f32 {d}, {a}", 4, [A]).view(np.float32), np.float32(1) / a)
        o = run("add.sat.f32 {d}, {a}, {b}", 4, [A, B]).view(np.float32)
        s = a + b
        assert (o == np.where(np.isnan(s), 0, np.clip(s, 0, 1))).all()
        U = {
            "eq": a == b,
            "ne": (a != b) & ~np.isnan(a) & ~np.isnan(b),
            "lt": a < b,
            "le": a <= b,
            "gt": a > b,
            "ge": a >= b,
        }
        un = np.isnan(a) | np.isnan(b)
        U.update({k + "u": v | un for k, v in list(U.items())})
        U["num"] = ~un
        U["nan"] = un
        for k, r in U.items():
            assert (
                run(
                    f"{{{{ .reg .pred q; setp.{k}.f32 q, {{a}}, {{b}}; selp.b32 {{d}}, 1, 0, q; }}}}",
                    4,
                    [A, B],
                )
                == r
            ).all(), k
        for dt, nm in ((torch.float16, "f16"), (torch.bfloat16, "bf16")):
            x, y, w = (torch.from_numpy(v).to(dt) for v in (a, b, c))
            X, Y, W = map(bits16, (x, y, w))
            r = x.double() * y.double() + w.double()
            o = torch.from_numpy(
                run(f"fma.rn.{nm} {{d}}, {{a}}, {{b}}, {{c}}", 2, [X, Y, W]).view(np.int16)
            ).view(dt)
            ob = bits16(o)

            def near(k):
                return (
                    torch.from_numpy((ob + np.uint16(k & 65535)).view(np.int16)).view(dt).double()
                )

            ok = (
                torch.isfinite(r) & torch.isfinite(o) & (r.abs() > 1e-35)
            )  # nearest, judged against both neighbours (torch's own double->bf16 rounds twice)
            assert ((o.double() - r).abs() <= (near(1) - r).abs())[
                ok & torch.isfinite(near(1))
            ].all() and ((o.double() - r).abs() <= (near(-1) - r).abs())[
                ok & torch.isfinite(near(-1))
            ].all()
            if nm == "f16":
                o = torch.from_numpy(run("add.f16 {d}, {a}, {b}", 2, [X, Y]).view(np.int16)).view(
                    dt
                )
                r = x + y
                ok = torch.isfinite(r)
                assert (o[ok] == r[ok]).all()
            P = X.astype(np.uint32) | Y.astype(np.uint32) << 16
            Q = Y.astype(np.uint32) | W.astype(np.uint32) << 16
            o = run(f"fma.rn.{nm}x2 {{d}}, {{a}}, {{b}}, {{a}}", 4, [P, Q])
            lo = run(f"fma.rn.{nm} {{d}}, {{a}}, {{b}}, {{a}}", 2, [X, Y])
            hi = run(f"fma.rn.{nm} {{d}}, {{a}}, {{b}}, {{a}}", 2, [Y, W])
            assert (o == (lo.astype(np.uint32) | hi.astype(np.uint32) << 16)).all()


def test_approx():
    v = rng.uniform(-20, 20, 1000).astype(np.float32)
    a = v.view(np.uint32)
    p = np.abs(v)
    P = p.view(np.uint32)

    def r(o, x):
        return (np.abs(o.view(np.float32).astype(np.float64) - x) <= 2e-7 * np.abs(x) + 1e-7).all()

    d = v.astype(np.float64)
    assert r(run("ex2.approx.f32 {d}, {a}", 4, [a]), 2**d)
    assert r(run("lg2.approx.f32 {d}, {a}", 4, [P]), np.log2(np.abs(d)))
    assert r(run("rsqrt.approx.f32 {d}, {a}", 4, [P]), 1 / np.sqrt(np.abs(d)))
    assert r(run("sin.approx.f32 {d}, {a}", 4, [a]), np.sin(d))
    assert r(run("tanh.approx.f32 {d}, {a}", 4, [a]), np.tanh(d))


def test_fp8_cvt():
    v = np.concatenate([f32s(), rng.standard_normal(2000).astype(np.float32) * 50]).astype(
        np.float32
    )
    v = v[np.isfinite(v)]
    v = v[: len(v) // 2 * 2]
    b = v[::-1].copy()
    for dt, nm, mx in ((torch.float8_e4m3fn, "e4m3", 448.0), (torch.float8_e5m2, "e5m2", 57344.0)):

        def q(x):
            return (
                torch.from_numpy(np.clip(x, -mx, mx))
                .to(dt)
                .view(torch.uint8)
                .numpy()
                .astype(np.uint16)
            )

        o = run(
            f"cvt.rn.satfinite.{nm}x2.f32 {{d}}, {{a}}, {{b}}",
            2,
            [v.view(np.uint32), b.view(np.uint32)],
        )
        assert (o == (q(b) | q(v) << 8)).all()
        u = np.arange(65536, dtype=np.uint16)
        o = run(f"cvt.rn.f16x2.{nm}x2 {{d}}, {{a}}", 4, [u])
        r = (
            torch.from_numpy(u.view(np.uint8).copy())
            .view(dt)
            .half()
            .view(torch.int16)
            .numpy()
            .view(np.uint32)
        )
        g = o.view(np.float16)
        w = r.view(np.float16)
        assert ((g == w) | np.isnan(g) & np.isnan(w)).all()
