"""Compiles Triton's kernels, and runs the PTX."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tools.ptxemu.launching import Grid, is_tensor, launch, load
from tools.ptxemu.library import PtxError
from tools.ptxemu.memory import Memory
from tools.ptxemu.result import Result
from tools.ptxemu.tensor_maps import Arguments, descriptor_arguments, is_descriptor

_NAMES = {
    **{"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"},
    **{f"{u}int{n}": f"{u or 'i'}{n}" for u in ("", "u") for n in (8, 16, 32, 64)},
    **{"bool": "i1", "float8_e4m3fn": "fp8e4nv", "float8_e5m2": "fp8e5"},
}
_SCALARS = {"fp32": np.float32, "fp64": np.float64, "fp16": np.float16}
_KEPT = 64
_compiled: OrderedDict[Any, Any] = OrderedDict()  # the last few: each holds its code in every form


def _dtype(t: Any) -> str:
    return _NAMES[str(t.dtype).removeprefix("torch.")]


def _type(a: Any) -> str:
    """An argument's type as Triton names it."""
    if is_descriptor(a):
        return f"tensordesc<{_dtype(a.base)}{[int(x) for x in a.block_shape]}>"
    if is_tensor(a):
        return "*" + _dtype(a)
    if isinstance(a, bool):
        return "i1"
    if isinstance(a, int):
        return "i32" if -(2**31) <= a < 2**31 else "i64"
    if isinstance(a, float):
        return "fp32"
    raise TypeError(f"no Triton type for {type(a)}")


def compile_triton(
    jit_fn: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    num_warps: int = 4,
    num_stages: int = 3,
    cc: int = 80,
    attrs: Mapping[Any, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """A @triton.jit function compiled for sm_<cc>; the last few are kept."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {**dict.fromkeys(constexprs, "constexpr"), **signature}
    types = {k: types[k] for k in jit_fn.arg_names}
    chosen = {"num_warps": num_warps, "num_stages": num_stages, **(options or {})}
    given = sorted(constexprs.items(), key=str), sorted((attrs or {}).items())
    key = (jit_fn.cache_key, repr(types), repr(given), cc, repr(sorted(chosen.items())))
    if key not in _compiled:
        source = ASTSource(
            fn=jit_fn, signature=types, constexprs=dict(constexprs), attrs=dict(attrs or {})
        )
        target = GPUTarget("cuda", cc, 32)
        _compiled[key] = triton.compile(source, target=target, options=chosen)
        if len(_compiled) > _KEPT:
            _compiled.popitem(last=False)
    return _compiled[key]


def _given(
    jit_fn: Any, constexprs: dict[str, Any], args: Mapping[str, Any] | Sequence[Any]
) -> dict[str, Any]:
    """The arguments by name, defaults among them; those of constexprs are put there."""
    if isinstance(args, Mapping):
        found = dict(args)
    else:
        names = [n for n in jit_fn.arg_names if n not in constexprs]
        if len(args) != len(names):
            raise ValueError(f"{len(names)} arguments needed ({names}), {len(args)} given")
        found = dict(zip(names, args, strict=True))
    for p in jit_fn.params:
        if p.name not in found and p.name not in constexprs and p.has_default:
            (constexprs if p.is_constexpr else found)[p.name] = p.default
    missing = [n for n in jit_fn.arg_names if n not in found and n not in constexprs]
    if missing:
        raise ValueError(f"missing arguments {missing}")
    return found


def _specialise(
    jit_fn: Any,
    signature: Mapping[str, str],
    constexprs: dict[Any, Any],
    args: Mapping[str, Any],
    memory: Memory,
    auto: bool,
) -> tuple[dict[str, Any], dict[Any, Any], list[tuple[str, Any, str]]]:
    """Types and attributes, where `auto` as Triton's JIT has them: pointers and ints that are
    multiples of 16; an int of 1, and None, are constexprs. Then what is left to be passed, with its
    type, in the order of the PTX's parameters, a tuple's members one by one."""
    types: dict[str, Any] = {}
    attrs: dict[Any, Any] = {}
    passed: list[tuple[str, Any, str]] = []

    def visit(path: tuple[int, ...], name: str, a: Any, specialised: bool) -> Any:
        if isinstance(a, tuple):
            labels = getattr(a, "_fields", range(len(a)))
            kinds = [
                visit((*path, j), f"{name}.{label}", member, specialised)
                for j, (label, member) in enumerate(zip(labels, a, strict=True))
            ]
            return type(a)(*kinds) if hasattr(a, "_fields") else tuple(kinds)
        # The constants of arguments go by name, those of a tuple's members by their place.
        key = name if len(path) == 1 else path
        if a is None or _is_constant(a):
            constexprs[key] = a
            return "constexpr"
        kind = signature[name] if name in signature else _type(a)
        whole = isinstance(a, int) and not isinstance(a, bool)
        value = 1
        if specialised and not is_descriptor(a):
            if kind[0] == "*":
                value = a if isinstance(a, int) else memory.ptr(a, name=name)
            elif whole and kind[0] in "iu" and kind != "i1":
                if a == 1:
                    constexprs[key] = 1
                    return "constexpr"
                value = a
        if value % 16 == 0:
            attrs[path] = [["tt.divisibility", 16]]
        passed.append((name, a, kind))
        return kind

    for i, (name, p) in enumerate(zip(jit_fn.arg_names, jit_fn.params, strict=True)):
        if name not in constexprs:
            kind = visit((i,), name, args[name], auto and not p.do_not_specialize)
            if kind != "constexpr":
                types[name] = kind
    return types, attrs, passed


def _is_constant(a: Any) -> bool:
    import triton.language as tl

    return isinstance(a, tl.constexpr)


def _scalar(value: Any, kind: str, size: int) -> Any:
    """A number that Triton passes as its own floating type."""
    if size == 2 and kind == "bf16":
        return np.uint16(np.float32(value).view(np.uint32) >> 16)
    return _SCALARS.get(kind, np.float32)(value)


def run_triton(
    jit_fn: Any,
    signature: Mapping[str, str] | None,
    constexprs: Mapping[str, Any] | None,
    args: Mapping[str, Any] | Sequence[Any],
    grid: Grid | Callable[[dict[str, Any]], Grid],
    num_warps: int = 4,
    num_stages: int = 3,
    cc: int = 80,
    *,
    attrs: Mapping[Any, Any] | str | None = "auto",
    options: Mapping[str, Any] | None = None,
    mem: Memory | None = None,
    **launching: Any,
) -> Result:
    """Compile a @triton.jit function for sm_<cc> and run the PTX.

    Args:
        signature: {name: "*bf16" | "i32" | ...}; what is not named is inferred.
        args: by name, or a list of those that are no constexprs, in order.
        attrs: "auto" specialises as Triton's JIT does.
        launching: options of `launch`.
    """
    if not hasattr(jit_fn, "cache_key"):
        raise TypeError("not a compiled JITFunction (is TRITON_INTERPRET set?)")
    memory, chosen = mem or Memory(), dict(constexprs or {})
    given = _given(jit_fn, chosen, args)
    auto = isinstance(attrs, str)
    types, found, passed = _specialise(jit_fn, signature or {}, chosen, given, memory, auto)
    kept = found if isinstance(attrs, str) else attrs
    made = compile_triton(jit_fn, types, chosen, num_warps, num_stages, cc, kept, options)
    if getattr(made.metadata, "num_ctas", 1) != 1:
        raise PtxError("num_ctas > 1: only clusters of one CTA are supported")
    described = getattr(made.metadata, "tensordesc_meta", None)
    metas = iter(described or ())
    flat: Arguments = []  # in the order of the PTX's parameters
    for n, a, _ in passed:
        if is_descriptor(a):
            meta = next(metas, None) if described else None
            flat += descriptor_arguments(a, meta, memory, n)
        else:
            flat.append((n, a))
    module, kernel = load(made.asm["ptx"]), made.metadata.name
    parameters = module.info(kernel)["params"]
    extra = len(parameters) - len(flat)
    if extra < 0:
        raise PtxError(
            f"the PTX takes {len(parameters)} parameters, the signature has {len(flat)}: "
            f"{[n for n, _ in flat]}"
        )
    kinds = {n: kind for n, _, kind in passed}
    values = [
        _scalar(v, kinds[n], p["size"])
        if n in kinds and kinds[n] in (*_SCALARS, "bf16") and not isinstance(v, np.generic)
        else v
        for (n, v), p in zip(flat, parameters, strict=False)
    ]
    blocks = grid({**chosen, **given}) if callable(grid) else grid
    return launch(
        module,
        kernel,
        blocks,
        32 * made.metadata.num_warps,  # the total, warp-specialised partitions included
        values + _scratch(made.metadata, extra, blocks, memory),
        made.metadata.shared,
        mem=memory,
        _names=[n for n, _ in flat],
        _compiled=made,
        **launching,
    )


def _scratch(metadata: Any, count: int, grid: Grid, memory: Memory) -> list[Any]:
    """The pointers after the arguments: scratch memory, of the size that the metadata says."""
    found: list[Any] = [None] * count
    size = getattr(metadata, "global_scratch_size", 0) or 0
    if size and count:
        # Device addresses of buffers are aligned, whatever the host's.
        blocks = grid if isinstance(grid, int) else math.prod(grid)
        found[0] = torch.zeros(size * blocks + 128, dtype=torch.uint8)
        memory.ptr(found[0], name="global_scratch")
    return found
