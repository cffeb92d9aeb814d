"""Single instructions: hand-written PTX against independent Python and numpy references."""

import numpy as np
import torch

from tools.ptxemu import launch

rng = np.random.default_rng(0)


NP = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def run(ins, dst, srcs, n=None, pre="", kinds=None):
    """ins uses {d} {a} {b} {c} {e}; srcs: list of numpy arrays of unsigned integers; dst: byte size. One thread per element."""
    n = n or len(srcs[0])
    names = "abce"
    R = {1: "%rs", 2: "%rs", 4: "%r", 8: "%rd"}
    p = [
        ".version 8.8\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 pd, "
        + ", ".join(f".param .u64 p{c}" for c in names[: len(srcs)])
        + ", .param .u32 n)\n{\n.reg .pred %p<8>; .reg .b16 %rs<20>; .reg .b32 %r<40>; .reg .b64 %rd<40>;",
        "mov.u32 %r30, %ctaid.x; mov.u32 %r31, %ntid.x; mov.u32 %r32, %tid.x; mad.lo.s32 %r33, %r30, %r31, %r32; ld.param.u32 %r34, [n]; setp.ge.s32 %p7, %r33, %r34; @%p7 ret;",
    ]
    m = {}
    for i, s in enumerate(srcs):
        z = s.dtype.itemsize
        m[names[i]] = f"{R[z]}{i + 1}"
        p.append(
            f"ld.param.u64 %rd30, [p{names[i]}]; mad.wide.s32 %rd31, %r33, {z}, %rd30; ld.global.b{8 * z} {m[names[i]]}, [%rd31];"
        )
    m["d"] = f"{R[dst]}10"
    p.append(pre + ins.format(**m) + ";")
    p.append(
        f"ld.param.u64 %rd30, [pd]; mad.wide.s32 %rd31, %r33, {dst}, %rd30; st.global.b{8 * dst} [%rd31], {m['d']};\nret;\n}}"
    )
    o = np.zeros(n, NP[dst])
    launch("\n".join(p), "k", -(-n // 96), 96, [o, *[np.ascontiguousarray(s) for s in srcs], n])
    return o


def ints(z, n=2000, special=True):
    v = rng.integers(0, 1 << (8 * z) - 1, n, dtype=np.uint64) * 2 + rng.integers(
        0, 2, n, dtype=np.uint64
    )
    v = v >> rng.integers(0, 8 * z, n).astype(np.uint64)
    v[::3] = ~v[::3]
    sp = [0, 1, 2, (1 << 8 * z) - 1, 1 << 8 * z - 1, (1 << 8 * z - 1) - 1]
    v[:6] = sp
    return v.astype(NP[z])


def sg(v, bits):
    v = int(v) & ((1 << bits) - 1)
    return v - (1 << bits) if v >> bits - 1 else v


def eq(o, r, what=""):
    o = [int(x) for x in o]
    bad = [(i, a, b) for i, (a, b) in enumerate(zip(o, r, strict=False)) if a != b]
    assert not bad, (what, len(bad), [(i, hex(a), hex(b)) for i, a, b in bad[:4]])


def bits16(t):
    return t.view(torch.int16).numpy().view(np.uint16)


def warp(body, *arrs, out=32, odt=np.uint32, threads=32, sh=0):
    p = (
        ".version 8.8\n.target sm_80\n.address_size 64\n.extern .shared .align 16 .b8 sm[];\n.visible .entry k("
        + ", ".join(f".param .u64 p{i}" for i in range(len(arrs) + 1))
        + ")\n{\n.reg .pred %p<8>; .reg .b16 %rs<20>; .reg .b32 %r<80>; .reg .b64 %rd<40>;\nmov.u32 %r0, %tid.x;\n"
        + "".join(f"ld.param.u64 %rd{i}, [p{i}];\n" for i in range(len(arrs) + 1))
        + body
        + "\nret;\n}"
    )
    o = np.zeros(out, odt)
    launch(p, "k", 1, threads, [*arrs, o], sh)
    return o
