"""What a warp or a block does together: hand-written PTX against independent Python and numpy references."""

import numpy as np
import torch

from tools.ptxemu import PtxError
from tools.ptxemu.tests.isa import bits16, rng, warp


def test_shfl():
    a = np.arange(32, dtype=np.uint32) * 7 + 1
    for mode in ("up", "down", "bfly", "idx"):
        for cl, seg in ((31, 0), (0, 0), (31, 24), (7, 24), (0, 16), (15, 16)):
            for b in (0, 1, 3, 8, 17, 31):
                c = cl | seg << 8
                o = warp(
                    f"mad.wide.u32 %rd10, %r0, 4, %rd0; ld.global.b32 %r1, [%rd10]; shfl.sync.{mode}.b32 %r2|%p1, %r1, {b}, {c}, -1; selp.b32 %r3, 0x10000, 0, %p1; or.b32 %r2, %r2, %r3; mad.wide.u32 %rd10, %r0, 4, %rd1; st.global.b32 [%rd10], %r2;",
                    a,
                )
                for l in range(32):
                    mx = (l & seg) | (cl & ~seg & 31)
                    mn = l & seg
                    j, p = {
                        "up": (l - b, l - b >= mx),
                        "down": (l + b, l + b <= mx),
                        "bfly": (l ^ b, l ^ b <= mx),
                        "idx": (mn | (b & ~seg & 31), (mn | (b & ~seg & 31)) <= mx),
                    }[mode]
                    assert o[l] == (int(a[j if p else l]) | (0x10000 if p else 0)), (
                        mode,
                        cl,
                        seg,
                        b,
                        l,
                    )


def test_ldmatrix():
    m = rng.integers(0, 65536, (4, 8, 8)).astype(np.uint16)
    perm = rng.permutation(32)  # rows scattered
    mem = np.zeros(32 * 8, np.uint16)
    for i in range(4):
        for r in range(8):
            mem[perm[8 * i + r] * 8 :][:8] = m[i, r]
    addr = (perm * 16).astype(np.uint32)
    for x in (1, 2, 4):
        for tr in ("", ".trans"):
            regs = "{" + ",".join(f"%r{10 + k}" for k in range(x)) + "}"
            o = warp(
                f"mad.wide.u32 %rd10, %r0, 16, %rd0; ld.global.v4.b32 {{%r1,%r2,%r3,%r4}}, [%rd10]; mov.u32 %r5, sm; mad.lo.u32 %r6, %r0, 16, %r5; st.shared.v4.b32 [%r6], {{%r1,%r2,%r3,%r4}}; bar.warp.sync -1; mad.wide.u32 %rd11, %r0, 4, %rd1; ld.global.b32 %r7, [%rd11]; add.u32 %r7, %r7, %r5; ldmatrix.sync.aligned.m8n8.x{x}{tr}.shared.b16 {regs}, [%r7]; mad.wide.u32 %rd12, %r0, {4 * x}, %rd2;"
                + "".join(f"st.global.b32 [%rd12+{4 * k}], %r{10 + k};" for k in range(x)),
                mem,
                addr,
                out=32 * x,
                sh=512,
            )
            for l in range(32):
                for k in range(x):
                    M = m[k].T if tr else m[k]
                    assert (
                        o[l * x + k]
                        == int(M[l // 4, 2 * (l % 4)]) | int(M[l // 4, 2 * (l % 4) + 1]) << 16
                    ), (x, tr, l, k)


def frag(shape, a, b, c, ab, cd, opn, abdt, cdt):
    """generic mma: fragment index functions written from the PTX ISA's formulas"""
    m, n, k = shape
    per = 32 // ab
    na, nb = m * k * ab // 32 // 32, n * k * ab // 32 // 32
    nc = m * n * cd // 32 // 32

    def G(l):
        return l >> 2

    def T(l):
        return l & 3

    def arow(l, i):
        return G(l) + (8 if (i // per) % 2 else 0)  # i: element index in the thread's fragment

    def acol(l, i):
        return T(l) * per + (i % per) + (4 * per if i // per >= 2 else 0)

    A = np.zeros((32, na), np.uint32)
    Bf = np.zeros((32, nb), np.uint32)
    Cf = np.zeros((32, nc), np.uint32)
    mask = (1 << ab) - 1
    cb = 32 // cd
    for l in range(32):
        for i in range(na * per):
            A[l, i // per] |= np.uint32((int(a[arow(l, i), acol(l, i)]) & mask) << ab * (i % per))
        for i in range(nb * per):
            Bf[l, i // per] |= np.uint32(
                (int(b[T(l) * per + i % per + 4 * per * (i // per), G(l)]) & mask) << ab * (i % per)
            )
        for i in range(nc * cb):
            Cf[l, i // cb] |= np.uint32(
                (int(c[G(l) + (8 if i >= 2 else 0), 2 * T(l) + (i & 1)])) << cd * (i % cb)
            )

    def R(b0, k):
        return "{" + ",".join(f"%r{b0 + j}" for j in range(k)) + "}"

    def ld(p, b0, k):
        return f"mad.wide.u32 %rd10, %r0, {4 * k}, %rd{p};" + "".join(
            f"ld.global.b32 %r{b0 + j}, [%rd10+{4 * j}];" for j in range(k)
        )

    o = warp(
        ld(0, 10, na)
        + ld(1, 20, nb)
        + ld(2, 30, nc)
        + f"mma.sync.aligned.{opn} {R(40, nc)}, {R(10, na)}, {R(20, nb)}, {R(30, nc)}; mad.wide.u32 %rd10, %r0, {4 * nc}, %rd3;"
        + "".join(f"st.global.b32 [%rd10+{4 * j}], %r{40 + j};" for j in range(nc)),
        A,
        Bf,
        Cf,
        out=32 * nc,
    ).reshape(32, nc)
    D = np.zeros((m, n), np.uint32)
    for l in range(32):
        for i in range(nc * cb):
            D[G(l) + (8 if i >= 2 else 0), 2 * T(l) + (i & 1)] = int(o[l, i // cb]) >> cd * (
                i % cb
            ) & ((1 << cd) - 1)
    return D


def test_mma():
    def fl(dt, m, k):
        x = torch.randn(m, k)
        return x.to(dt)

    for k in (8, 16):
        for dt, nm in ((torch.float16, "f16"), (torch.bfloat16, "bf16")):
            a, b, c = fl(dt, 16, k), fl(dt, k, 8), torch.randn(16, 8)
            D = frag(
                (16, 8, k),
                bits16(a),
                bits16(b.contiguous()),
                c.numpy().view(np.uint32),
                16,
                32,
                f"m16n8k{k}.row.col.f32.{nm}.{nm}.f32",
                0,
                0,
            )
            assert (
                np.abs(D.view(np.float32) - (a.double() @ b.double() + c.double()).numpy()).max()
                < 1e-5
            )
        a, b, c = fl(torch.float16, 16, k), fl(torch.float16, k, 8), fl(torch.float16, 16, 8)
        D = frag(
            (16, 8, k),
            bits16(a),
            bits16(b),
            bits16(c),
            16,
            16,
            f"m16n8k{k}.row.col.f16.f16.f16.f16",
            0,
            0,
        )
        assert (
            np.abs(
                D.astype(np.uint16).view(np.float16).astype(np.float64)
                - (a.double() @ b.double() + c.double()).numpy()
            ).max()
            < 1e-2
        )
    for k in (4, 8):
        a, b, c = torch.randn(16, k), torch.randn(k, 8), torch.randn(16, 8)
        D = frag(
            (16, 8, k),
            a.numpy().view(np.uint32),
            b.numpy().view(np.uint32),
            c.numpy().view(np.uint32),
            32,
            32,
            f"m16n8k{k}.row.col.f32.tf32.tf32.f32",
            0,
            0,
        )

        def tr(t):
            return torch.from_numpy(
                (t.numpy().view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
            ).double()

        assert np.abs(D.view(np.float32) - (tr(a) @ tr(b) + c.double()).numpy()).max() < 1e-5
    for k in (16, 32):
        for x in "su":
            for y in "su":
                a = rng.integers(-128, 128, (16, k)) if x == "s" else rng.integers(0, 256, (16, k))
                b = rng.integers(-128, 128, (k, 8)) if y == "s" else rng.integers(0, 256, (k, 8))
                c = rng.integers(-1000, 1000, (16, 8))
                D = frag(
                    (16, 8, k),
                    a,
                    b,
                    c.astype(np.int32).view(np.uint32),
                    8,
                    32,
                    f"m16n8k{k}.row.col.s32.{x}8.{y}8.s32",
                    0,
                    0,
                )
                assert (D.view(np.int32) == a @ b + c).all()
    for k in (32, 64):
        a, b, c = (
            rng.integers(-8, 8, (16, k)),
            rng.integers(-8, 8, (k, 8)),
            rng.integers(-99, 99, (16, 8)),
        )
        D = frag(
            (16, 8, k),
            a,
            b,
            c.astype(np.int32).view(np.uint32),
            4,
            32,
            f"m16n8k{k}.row.col.s32.s4.s4.s32",
            0,
            0,
        )
        assert (D.view(np.int32) == a @ b + c).all()
    for dt, nm in ((torch.float8_e4m3fn, "e4m3"), (torch.float8_e5m2, "e5m2")):
        a, b, c = torch.randn(16, 32).to(dt), torch.randn(32, 8).to(dt), torch.randn(16, 8)
        D = frag(
            (16, 8, 32),
            a.view(torch.uint8).numpy(),
            b.view(torch.uint8).numpy(),
            c.numpy().view(np.uint32),
            8,
            32,
            f"m16n8k32.row.col.f32.{nm}.{nm}.f32",
            0,
            0,
        )
        assert (
            np.abs(D.view(np.float32) - (a.double() @ b.double() + c.double()).numpy()).max() < 1e-4
        )


def test_named_barriers():  # warps 0,1 produce and only arrive; warps 2,3 consume; then the other way with bar.sync on 2 warps
    body = "mov.u32 %r5, sm; mad.lo.u32 %r6, %r0, 4, %r5; setp.lt.u32 %p1, %r0, 64; @!%p1 bra $C; add.u32 %r1, %r0, 7; st.shared.b32 [%r6], %r1; {arrive} bra $E;\n$C: {sync} ld.shared.b32 %r1, [%r6+-256]; mad.wide.u32 %rd10, %r0, 4, %rd0; st.global.b32 [%rd10+-256], %r1; bar.sync 5, 64;\n$E: bar.sync 0;"
    o = warp(
        body.format(arrive="bar.arrive 3, 128;", sync="bar.sync 3, 128;"),
        out=64,
        threads=128,
        sh=512,
    )
    assert o.tolist() == [i + 7 for i in range(64)]
    for a, b in (("bar.arrive 3, 128;", "bar.sync 4, 64;"), ("", "")):
        try:
            warp(body.format(arrive=a, sync=b), out=64, threads=128, sh=512)
            raise SystemExit("race not seen")
        except PtxError as e:
            assert "race" in str(e), e
    try:
        warp(
            "setp.lt.u32 %p1, %r0, 7; @%p1 bra $X; bar.sync 0; bra $Y;\n$X: bar.sync 0;\n$Y: ;",
            out=64,
            threads=64,
        )
        raise SystemExit("divergent barrier not seen")
    except PtxError as e:
        assert "warp-level deadlock" in str(e), e


def test_stmatrix_elect_pred():
    fr = rng.integers(0, 1 << 32, (32, 4), dtype=np.uint64).astype(np.uint32)
    for tr in ("", ".trans"):
        o = (
            warp(
                f"mad.wide.u32 %rd10, %r0, 16, %rd0; ld.global.v4.b32 {{%r1,%r2,%r3,%r4}}, [%rd10]; mov.u32 %r5, sm; mad.lo.u32 %r6, %r0, 16, %r5; stmatrix.sync.aligned.m8n8.x4{tr}.shared.b16 [%r6], {{%r1,%r2,%r3,%r4}}; bar.warp.sync -1; ld.shared.v4.b32 {{%r1,%r2,%r3,%r4}}, [%r6]; mad.wide.u32 %rd10, %r0, 16, %rd1; st.global.v4.b32 [%rd10], {{%r1,%r2,%r3,%r4}};",
                fr,
                out=128,
                sh=512,
            )
            .view(np.uint16)
            .reshape(4, 8, 8)
        )
        for k in range(4):
            M = o[k].T if tr else o[k]
            for l in range(32):
                assert (
                    int(M[l // 4, 2 * (l % 4)]) | int(M[l // 4, 2 * (l % 4) + 1]) << 16 == fr[l, k]
                )
    o = warp(
        "mov.u32 %r2, 0; setp.gt.u32 %p2, %r0, 4; @!%p2 bra $Z; elect.sync %r1|%p1, 0xffffffe0; selp.b32 %r2, 1, 0, %p1; mad.lo.u32 %r2, %r1, 16, %r2;\n$Z: mad.wide.u32 %rd10, %r0, 4, %rd0; st.global.b32 [%rd10], %r2;"
    )
    assert o.tolist() == [0] * 5 + [81] + [80] * 26
    a = np.arange(128, dtype=np.uint32)
    o = warp(
        "mov.u32 %r5, sm; mad.lo.u32 %r6, %r0, 16, %r5; mad.wide.u32 %rd10, %r0, 16, %rd0; setp.gt.u32 %p1, %r0, 20; cp.async.ca.shared.global [%r6], [%rd10], 16, %p1; cp.async.wait_all; ld.shared.v4.b32 {%r1,%r2,%r3,%r4}, [%r6]; mad.wide.u32 %rd10, %r0, 16, %rd1; st.global.v4.b32 [%rd10], {%r1,%r2,%r3,%r4};",
        a,
        out=128,
        sh=512,
    )
    assert o.tolist() == [i if i // 4 <= 20 else 0 for i in range(128)]


def wg(K, N, sw, trans_b, acc, areg=False):
    """one wgmma m64nNk16, operands laid out in shared memory by the canonical layouts (CUTLASS mma_sm90_desc notation), written independently of the emulator's address function"""
    A = torch.randn(64, 16).half()
    B = torch.randn(16, N).half()
    mem = np.zeros(32768, np.uint8)
    E = 2

    def place(base, val, r, c, kmajor):  # r: M/N index, c: K index ; returns (lbo, sbo)
        W = {0: 16, 32: 32, 64: 64, 128: 128}[sw]  # bytes of contiguous major dimension
        mj, mn = (c, r) if kmajor else (r, c)
        rows8 = (64 if base == 0 else N) // 8 if kmajor else 2
        atom = 8 * W  # 8 rows of W bytes
        blk_col = mj * E // W
        off = base + (mn % 8) * W + (mn // 8) * atom + blk_col * rows8 * atom + mj * E % W
        off ^= ((off >> 7) & {0: 0, 32: 1, 64: 3, 128: 7}[sw]) << 4
        mem[off : off + 2] = np.frombuffer(val.numpy().tobytes(), np.uint8)
        return (rows8 * atom, atom)

    for r in range(64):
        for c in range(16):
            la = place(0, A[r, c], r, c, True)
    for n in range(N):
        for c in range(16):
            lb = place(8192, B[c, n], n, c, not trans_b)
    code = {0: 0, 128: 1, 64: 2, 32: 3}[sw]

    def desc(addr, l, kmajor):  # no-swizzle MN-major: LBO and SBO swap roles
        lbo, sbo = l if (sw or kmajor) else (l[1], l[0])
        return addr >> 4 | (lbo >> 4) << 16 | (sbo >> 4) << 32 | code << 62

    da, db = desc(1024, la, True), desc(1024 + 8192, lb, not trans_b)
    nr = N // 2 if acc == "f32" else N // 4
    regs = ",".join(f"%q{i}" for i in range(nr))
    body = (
        f".reg .b32 %q<{nr}>; .reg .b32 %a<4>; mov.u32 %r5, sm; mov.u32 %r7, 0;\n$L: mad.lo.u32 %r6, %r7, 2048, 0; mad.lo.u32 %r6, %r0, 16, %r6; cvt.u64.u32 %rd11, %r6; add.u64 %rd12, %rd0, %rd11; ld.global.v4.b32 {{%r1,%r2,%r3,%r4}}, [%rd12]; add.u32 %r6, %r6, %r5; st.shared.v4.b32 [%r6], {{%r1,%r2,%r3,%r4}}; add.u32 %r7, %r7, 1; setp.lt.u32 %p1, %r7, 16; @%p1 bra $L; fence.proxy.async.shared::cta; bar.sync 0; "
        + "".join(f"mov.b32 %q{i}, 0;" for i in range(nr))
        + f"mov.u64 %rd20, {da}; mov.u64 %rd21, {db}; setp.eq.u32 %p2, %r5, 0; wgmma.fence.sync.aligned; wgmma.mma_async.sync.aligned.m64n{N}k16.{acc}.f16.f16 {{{regs}}}, %rd20, %rd21, %p2, 1, 1, 0, {int(trans_b)}; wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; mad.wide.u32 %rd10, %r0, {4 * nr}, %rd1;"
        + "".join(f"st.global.b32 [%rd10+{4 * i}], %q{i};" for i in range(nr))
    )
    o = warp(body, mem, out=128 * nr, threads=128, sh=32768).reshape(128, nr)
    D = np.zeros((64, N))
    for t in range(128):
        v = o[t].view(np.float32 if acc == "f32" else np.float16)
        for i in range(N // 2):
            D[
                16 * (t // 32) + t % 32 // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (t % 4) + i % 2
            ] = v[i]
    e = np.abs(D - (A.double() @ B.double()).numpy()).max()
    assert e < (1e-4 if acc == "f32" else 3e-2), (sw, trans_b, acc, N, e)


def test_wgmma_layouts():
    for sw in (0, 32, 64, 128):
        for tb in (False, True):
            for acc in ("f32", "f16"):
                for N in (64, 128):
                    wg(
                        16, N, sw, tb, acc
                    )  # (K-major rows longer than 32 bytes: only the first k16 step is used)


def test_unsupported_named():
    for ins in (
        "cp.async.bulk.tensor.3d.shared::cta.global.im2col.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r1, %r2, %r3}], [%r1], {%r4}",
        "tcgen05.fence::after_thread_sync",
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r1], %r2, [%r1]",
        "frobnicate.b32 %r1, %r2",
        "setp.foo.s32 %p1, %r1, %r2",
        "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%r1}, {%r1}, {%r1}, {%r1}",
        "wmma.load.a.sync.aligned.row.m16n16k16.shared.f16 {%r1}, [%r1], 16",
    ):
        try:
            warp(ins + ";")
            raise SystemExit("accepted " + ins)
        except PtxError as e:
            assert ins.split()[0].split(".")[0] in str(e), e
    try:
        warp("add.s32 %r1, %rd1, 1;")
        raise SystemExit("size mismatch accepted")
    except PtxError as e:
        assert "bytes" in str(e)
