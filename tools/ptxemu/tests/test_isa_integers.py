"""Integers, bits and predicates: hand-written PTX against independent Python and numpy references."""

import numpy as np

from tools.ptxemu.tests.isa import eq, ints, rng, run, sg, warp

SZ = {
    "b16": 2,
    "u16": 2,
    "s16": 2,
    "f16": 2,
    "bf16": 2,
    "b32": 4,
    "u32": 4,
    "s32": 4,
    "f32": 4,
    "b64": 8,
    "u64": 8,
    "s64": 8,
    "f64": 8,
}


def test_int_binary():
    for t in ("u16", "s16", "u32", "s32", "u64", "s64"):
        z = SZ[t]
        B = 8 * z
        a, b = ints(z), rng.permutation(ints(z))
        M = (1 << B) - 1
        g = (lambda v: sg(v, B)) if t[0] == "s" else int

        def td(p, q):
            return abs(p) // abs(q) * (1 if (p < 0) == (q < 0) else -1)

        F = {
            "add": lambda x, y: x + y,
            "sub": lambda x, y: x - y,
            "mul.lo": lambda x, y: x * y,
            "mul.hi": lambda x, y: x * y >> B,
            "min": min,
            "max": max,
        }
        for k, f in F.items():
            eq(
                run(f"{k}.{t} {{d}}, {{a}}, {{b}}", z, [a, b]),
                [f(g(x), g(y)) & M for x, y in zip(a, b, strict=False)],
                k + t,
            )
        b1 = np.where(b == 0, 3, b).astype(b.dtype)
        eq(
            run(f"div.{t} {{d}}, {{a}}, {{b}}", z, [a, b1]),
            [td(g(x), g(y)) & M for x, y in zip(a, b1, strict=False)],
            "div" + t,
        )
        eq(
            run(f"rem.{t} {{d}}, {{a}}, {{b}}", z, [a, b1]),
            [(g(x) - td(g(x), g(y)) * g(y)) & M for x, y in zip(a, b1, strict=False)],
            "rem" + t,
        )
        c = rng.permutation(ints(z))
        eq(
            run(f"mad.lo.{t} {{d}}, {{a}}, {{b}}, {{c}}", z, [a, b, c]),
            [(g(x) * g(y) + g(w)) & M for x, y, w in zip(a, b, c, strict=False)],
            "mad",
        )
        eq(
            run(f"mad.hi.{t} {{d}}, {{a}}, {{b}}, {{c}}", z, [a, b, c]),
            [((g(x) * g(y) >> B) + g(w)) & M for x, y, w in zip(a, b, c, strict=False)],
            "madhi",
        )
        eq(
            run(f"sad.{t} {{d}}, {{a}}, {{b}}, {{c}}", z, [a, b, c]),
            [(abs(g(x) - g(y)) + g(w)) & M for x, y, w in zip(a, b, c, strict=False)],
            "sad",
        )
        if z < 8:
            M2 = (1 << 2 * B) - 1
            eq(
                run(f"mul.wide.{t} {{d}}, {{a}}, {{b}}", 2 * z, [a, b]),
                [g(x) * g(y) & M2 for x, y in zip(a, b, strict=False)],
                "wide",
            )
            c = ints(2 * z)
            eq(
                run(f"mad.wide.{t} {{d}}, {{a}}, {{b}}, {{c}}", 2 * z, [a, b, c]),
                [g(x) * g(y) + int(w) & M2 for x, y, w in zip(a, b, c, strict=False)],
                "madwide",
            )
        sh = rng.integers(0, 80, len(a)).astype(np.uint32)
        eq(
            run(f"shl.b{B} {{d}}, {{a}}, {{b}}", z, [a, sh]),
            [int(x) << min(int(s), B) & M for x, s in zip(a, sh, strict=False)],
            "shl",
        )
        eq(
            run(f"shr.{t} {{d}}, {{a}}, {{b}}", z, [a, sh]),
            [g(x) >> min(int(s), B) & M for x, s in zip(a, sh, strict=False)],
            "shr" + t,
        )


def test_bits():
    for t in ("u32", "s32", "u64", "s64"):
        z = SZ[t]
        B = 8 * z
        a = ints(z)
        p = rng.integers(0, 70, len(a)).astype(np.uint32)
        l = rng.integers(0, 70, len(a)).astype(np.uint32)
        M = (1 << B) - 1

        def bfe(x, p, l):
            x, p, l = int(x), int(p), int(l)
            s = 0 if t[0] == "u" or l == 0 else (x >> min(p + l - 1, B - 1)) & 1
            d = 0
            for i in range(B):
                d |= ((x >> p + i & 1) if i < l and p + i < B else s) << i
            return d

        eq(
            run(f"bfe.{t} {{d}}, {{a}}, {{b}}, {{c}}", z, [a, p, l]),
            [bfe(*q) for q in zip(a, p, l, strict=False)],
            "bfe" + t,
        )
        if t[0] == "u":
            b = rng.permutation(a)

            def bfi(x, y, p, l):
                f = int(y)
                for i in range(int(l)):
                    if p + i < B:
                        f = f & ~(1 << int(p) + i) | (int(x) >> i & 1) << int(p) + i
                return f

            eq(
                run(f"bfi.b{B} {{d}}, {{a}}, {{b}}, {{c}}, {{e}}", z, [a, b, p, l]),
                [bfi(*q) for q in zip(a, b, p, l, strict=False)],
                "bfi",
            )
            eq(run(f"popc.b{B} {{d}}, {{a}}", 4, [a]), [bin(int(x)).count("1") for x in a])
            eq(run(f"clz.b{B} {{d}}, {{a}}", 4, [a]), [B - int(x).bit_length() for x in a])
            eq(run(f"brev.b{B} {{d}}, {{a}}", z, [a]), [int(f"{int(x):0{B}b}"[::-1], 2) for x in a])

        def bfind(x):
            x = int(x)
            x = ~x & M if t[0] == "s" and x >> B - 1 else x
            return x.bit_length() - 1 & 0xFFFFFFFF

        eq(run(f"bfind.{t} {{d}}, {{a}}", 4, [a]), [bfind(x) for x in a], "bfind")
        eq(
            run(f"bfind.shiftamt.{t} {{d}}, {{a}}", 4, [a]),
            [(B - 1 - bfind(x)) if bfind(x) != 0xFFFFFFFF else 0xFFFFFFFF for x in a],
        )
    a, b, c = ints(4), rng.permutation(ints(4)), rng.permutation(ints(4))
    for lut in (0x00, 0x1A, 0x96, 0xE8, 0xCA, 0xFE, 0x55):
        eq(
            run(f"lop3.b32 {{d}}, {{a}}, {{b}}, {{c}}, {lut}", 4, [a, b, c]),
            [
                sum(
                    (lut >> ((int(x) >> i & 1) * 4 + (int(y) >> i & 1) * 2 + (int(w) >> i & 1)) & 1)
                    << i
                    for i in range(32)
                )
                for x, y, w in zip(a[:300], b, c, strict=False)
            ]
            + [
                int(v)
                for v in run(f"lop3.b32 {{d}}, {{a}}, {{b}}, {{c}}, {lut}", 4, [a, b, c])[300:]
            ],
            "lop3",
        )

    def by(x, y):
        return [(int(x) | int(y) << 32) >> 8 * i & 255 for i in range(8)]

    def prmt(x, y, s, mode=""):
        B = by(x, y)
        s = int(s)
        q = s & 3
        sel = {
            "": [s >> 4 * i & 15 for i in range(4)],
            "f4e": [q + i for i in range(4)],
            "b4e": [(q - i) % 8 for i in range(4)],
            "rc8": [q] * 4,
            "ecl": [max(i, q) for i in range(4)],
            "ecr": [min(i, q) for i in range(4)],
            "rc16": [(q & 1) * 2, (q & 1) * 2 + 1] * 2,
        }[mode]
        return sum(
            (B[k & 7] if not k & 8 else (255 if B[k & 7] & 128 else 0)) << 8 * i
            for i, k in enumerate(sel)
        )

    for mode in ("", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16"):
        eq(
            run(f"prmt.b32{'.' + mode if mode else ''} {{d}}, {{a}}, {{b}}, {{c}}", 4, [a, b, c]),
            [prmt(x, y, s, mode) for x, y, s in zip(a, b, c, strict=False)],
            "prmt" + mode,
        )
    for d in "lr":
        for w in ("wrap", "clamp"):
            sh = rng.integers(0, 70, len(a)).astype(np.uint32)

            def n(s):
                return int(s) & 31 if w == "wrap" else min(int(s), 32)

            f = (
                (lambda x, y, s: ((int(x) | int(y) << 32) << n(s)) >> 32 & 0xFFFFFFFF)
                if d == "l"
                else (lambda x, y, s: (int(x) | int(y) << 32) >> n(s) & 0xFFFFFFFF)
            )
            eq(
                run(f"shf.{d}.{w}.b32 {{d}}, {{a}}, {{b}}, {{c}}", 4, [a, b, sh]),
                [f(*q) for q in zip(a, b, sh, strict=False)],
                "shf" + d + w,
            )


def test_carry():
    a, b = ints(8), rng.permutation(ints(8))
    o = run(
        "{{ .reg .b32 x0,x1,y0,y1; mov.b64 {{x0,x1}}, {a}; mov.b64 {{y0,y1}}, {b}; add.cc.u32 x0, x0, y0; addc.u32 x1, x1, y1; mov.b64 {d}, {{x0,x1}}; }}",
        8,
        [a, b],
    )
    eq(o, [int(x) + int(y) & (1 << 64) - 1 for x, y in zip(a, b, strict=False)])
    o = run(
        "{{ .reg .b32 x0,x1,y0,y1; mov.b64 {{x0,x1}}, {a}; mov.b64 {{y0,y1}}, {b}; sub.cc.u32 x0, x0, y0; subc.u32 x1, x1, y1; mov.b64 {d}, {{x0,x1}}; }}",
        8,
        [a, b],
    )
    eq(o, [int(x) - int(y) & (1 << 64) - 1 for x, y in zip(a, b, strict=False)])


def test_setp_int_and_preds():
    for t in ("u16", "s16", "u32", "s32", "u64", "s64"):
        z = SZ[t]
        a, b = ints(z), rng.permutation(ints(z))
        b[::4] = a[::4]
        g = (lambda v: sg(v, 8 * z)) if t[0] == "s" else int
        for k, f in {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}.items():
            eq(
                run(
                    f"{{{{ .reg .pred q; setp.{k}.{t} q, {{a}}, {{b}}; selp.b32 {{d}}, 1, 0, q; }}}}",
                    4,
                    [a, b],
                ),
                [int(eval(f"x{f}y", {"x": g(x), "y": g(y)})) for x, y in zip(a, b, strict=False)],
                k + t,
            )
    a, b = ints(4), rng.permutation(ints(4))
    eq(
        run(
            "{{ .reg .pred p,q,r; setp.lt.u32 p|q, {a}, {b}; setp.gt.and.s32 r, {a}, 0, !p; selp.b32 {d}, 1, 2, r; @q add.s32 {d}, {d}, 16; @!r bra $X; add.s32 {d}, {d}, 32; $X: xor.b32 {d}, {d}, 64; }}",
            4,
            [a, b],
        ),
        [
            ((33 if sg(x, 32) > 0 and not x < y else 2) + (16 if not x < y else 0)) ^ 64
            for x, y in zip(a, b, strict=False)
        ],
    )


def test_brx():
    o = warp(
        "and.b32 %r1, %r0, 3; $LT: .branchtargets $A, $B, $C, $A;\nbrx.idx %r1, $LT;\n$A: mov.u32 %r2, 10; bra $E;\n$B: mov.u32 %r2, 20; bra $E;\n$C: mov.u32 %r2, 30;\n$E: shfl.sync.idx.b32 %r3, %r2, 1, 31, -1; add.u32 %r2, %r2, %r3; mad.wide.u32 %rd10, %r0, 4, %rd0; st.global.b32 [%rd10], %r2;"
    )
    assert o.tolist() == [[10, 20, 30, 10][i & 3] + 20 for i in range(32)]
