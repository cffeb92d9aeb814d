"""Compiles recorded launches ahead of time, specialised as Triton's JIT would, and reads what the
compiler made of them: registers, shared memory, stack, tensor-core instructions, widths of loads.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from lora_kernels.ops.common.configs import DEVICES, Device
from lora_kernels.ops.common.launch import Launch
from tools.gpu_proofs.hazards import overwritten


@dataclass(frozen=True)
class GpuTarget:
    """An architecture to compile for, with the device the cost model plans for.

    Attributes:
        arch: a compute capability, or AMD's name.
        shared_per_core: shared memory of a multiprocessor; a block reserves `shared_reserved`.
        warps_per_core: at most resident.
    """

    name: str
    backend: str
    arch: int | str
    warp: int
    device: Device
    shared_per_core: int
    shared_reserved: int
    warps_per_core: int


def _device(name: str) -> Device:
    return next(d for d in DEVICES if d.name == name)


# Occupancy limits: tables of the CUDA C++ programming guide, AMD's CDNA3 ISA guide.
GPU_TARGETS = {
    t.name: t
    for t in (
        GpuTarget("sm_80", "cuda", 80, 32, _device("A100"), 167936, 1024, 64),
        GpuTarget("sm_90", "cuda", 90, 32, _device("H100"), 233472, 1024, 64),
        GpuTarget("sm_100", "cuda", 100, 32, _device("B200"), 233472, 1024, 64),
        GpuTarget("gfx942", "hip", "gfx942", 64, _device("MI300"), 65536, 0, 32),
    )
}
_REGISTERS = 65536  # of a multiprocessor, handed out to a warp 256 at a time
_MAX_BLOCKS = 32
_VECTOR_REGISTERS = 512  # of a lane of a SIMD of CDNA3
_SIMDS = 4
_TENSOR_CORES = r"HGMMA|HMMA|IMMA|UTC\w*MMA|v_mfma"


@dataclass(frozen=True)
class Facts:
    """What one compiled launch takes and holds.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread's local memory; `spills`: instructions that use it.
        shared: bytes of a block.
        blocks: resident on a multiprocessor at once; `occupancy`: their warps over the most.
        tensor: the tensor-core instructions in the code, by name.
        loads: global loads in the code by bytes a lane; 0 is a tensor descriptor's copy.
        overwritten: registers that change while one of Hopper's products reads them.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    blocks: int
    occupancy: float
    tensor: dict[str, int]
    loads: dict[int, int]
    overwritten: tuple[str, ...] = ()

    @property
    def wide_loads(self) -> int:
        """Loads of 16 bytes a lane, or by descriptor."""
        return sum(n for width, n in self.loads.items() if width in (0, 16))


@dataclass(frozen=True)
class Compiled:
    """The facts of a compiled launch; its code, which is large, and its tensors are not kept."""

    name: str
    target: GpuTarget
    facts: Facts


_compiled: dict[str, Compiled] = {}


def compile_launch(launch: Launch, target: GpuTarget) -> Compiled:
    """Compile a launch for a target; one that was compiled in this process is not again."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel = launch.kernel
    if not hasattr(kernel, "create_binder"):
        raise ValueError("TRITON_INTERPRET: is set, and kernels cannot be compiled then")
    gpu = GPUTarget(target.backend, target.arch, target.warp)
    backend = make_backend(gpu)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    chosen = launch.options(nvidia=target.backend == "cuda")
    bound, special, options = bind(**launch.args, **chosen, debug=False)
    key = f"{target.name} {kernel.fn.__module__}.{kernel.fn.__name__} {special} {options}"
    if key not in _compiled:
        parsed, signature, constexprs, attrs = kernel._pack_args(
            backend, options, bound, special, options
        )
        source = ASTSource(kernel, signature, constexprs, attrs)
        made = triton.compile(source, target=gpu, options=parsed.__dict__)
        _compiled[key] = Compiled(kernel.fn.__name__, target, _facts(made, target))
    return _compiled[key]


def _facts(made: Any, target: GpuTarget) -> Facts:
    warps, shared = made.metadata.num_warps, made.metadata.shared
    if target.backend == "cuda":
        sass, registers, stack = _disassemble(made.asm["cubin"])
        loads = _nvidia_loads(sass)
        spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
        per_warp = -(-registers * 32 // 256) * 256
        by_registers = _REGISTERS // per_warp // warps
    else:
        sass = made.asm["amdgcn"]
        registers = _number(sass, "vgpr_count") + _number(sass, "agpr_count")
        stack = _number(sass, "private_segment_fixed_size")
        # Without scratch memory a spill is a move into an accumulator register.
        spills = _number(sass, "vgpr_spill_count") if stack else 0
        loads = _amd_loads(sass)
        per_simd = min(target.warps_per_core // _SIMDS, _VECTOR_REGISTERS // max(8, registers))
        by_registers = per_simd * _SIMDS // warps
    by_shared = target.shared_per_core // max(1, shared + target.shared_reserved)
    blocks = min(by_registers, by_shared, target.warps_per_core // warps, _MAX_BLOCKS)
    tensor = Counter(re.findall(rf"\b({_TENSOR_CORES})", sass))
    return Facts(
        registers=registers,
        stack=stack,
        spills=spills,
        shared=shared,
        blocks=blocks,
        occupancy=blocks * warps / target.warps_per_core,
        tensor=dict(tensor),
        loads=loads,
        overwritten=tuple(overwritten(sass)) if target.backend == "cuda" else (),
    )


@cache
def _tool(name: str) -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _disassemble(cubin: bytes) -> tuple[str, int, int]:
    """SASS, registers of a thread and its bytes of stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([*tool, file.name], capture_output=True, text=True, check=True).stdout
            for tool in ((_tool("cuobjdump"), "-res-usage"), (_tool("nvdisasm"),))
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage: no registers in {usage!r}")
    registers, stack, local = map(int, found.groups())
    return sass, registers, stack + local


@lru_cache(maxsize=128)
def overwritten_in(cubin: bytes) -> tuple[str, ...]:
    """What `hazards.overwritten` finds in a compiled kernel."""
    return tuple(overwritten(_disassemble(cubin)[0]))


def _nvidia_loads(sass: str) -> dict[int, int]:
    counts: Counter[int] = Counter()
    for kind in re.findall(r"\b((?:LDG|LDGSTS)\.E[.\w]*)", sass):
        width = re.search(r"\.(128|64|U?S?16|U?S?8)\b", kind)
        bits = int(re.sub(r"\D", "", width[1])) if width else 32
        counts[bits // 8] += 1
    counts[0] += len(re.findall(r"\bUTMALDG", sass))
    return {w: n for w, n in sorted(counts.items()) if n}


def _amd_loads(text: str) -> dict[int, int]:
    counts: Counter[int] = Counter()
    for kind in re.findall(r"\b(?:global|buffer)_load_(\w+)", text):
        words = re.match(r"dwordx?(\d*)", kind)
        counts[4 * int(words[1] or 1) if words else 1 if "byte" in kind else 2] += 1
    return dict(sorted(counts.items()))


def _number(text: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s*(\d+)", text)
    return int(found[1]) if found else 0
