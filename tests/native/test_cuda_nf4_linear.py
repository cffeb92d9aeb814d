"""The CUDA NF4 linear kernels: the launcher's own launches, executed from their PTX by ptxemu."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lora_kernels.testing import assert_within_budget
from tests.native import cuda_nf4_linear as cuda
from tests.native.cuda_nf4_linear import DTYPES, Problem

BF16 = torch.bfloat16
P = Problem

SHAPES = {
    "one step": P(1, 64, 512),
    "rows and tokens ragged": P(3, 70, 256, nested=256, bias=True, rank=5),
    "several steps, split": P(5, 65, 4096, bias=True),
    "blocks straddle rows": P(2, 33, 96, bias=True, rank=16),
    "K even, not 32 x": P(8, 65, 100, nested=3, bias=True, rank=20, pad=3),
    "K odd": P(7, 33, 33, quant_type=1, bias=True, shift=1),
    "K tiny": P(4, 3, 1, block=32),
    "no K": P(3, 5, 0, bias=True),
    "fp4, small blocks": P(6, 40, 160, block=32, quant_type=1, nested=4, rank=8),
    "large blocks": P(4, 10, 4096, block=4096),
    "a nested scale for each large block": P(2, 20, 8192, block=2048, nested=1, cores=1),
    "K past one step": P(1, 65, 576, rank=3, pad=8),
    "unaligned": P(2, 9, 1024, shift=1, bias=True, rank=8),
    "16 tokens": P(16, 66, 1024, bias=True, rank=16),
    "9 tokens, ragged": P(9, 65, 99, bias=True),
    "32 tokens": P(32, 65, 384, nested=256, bias=True, rank=24, pad=8),
    "17 tokens, ragged": P(17, 64, 96, rank=7),
    "64 tokens": P(64, 70, 320, bias=True, rank=16),
    "one block, many steps": P(3, 20, 3136, bias=True, rank=4, cores=1),
    "one block, many steps, nested": P(8, 64, 2112, nested=4, cores=1),
    "one block, many steps, straddling": P(4, 33, 1800, nested=3, cores=1),
    "one block, many steps, 16 tokens": P(13, 64, 2624, cores=1),
    "one block, many steps, 32 tokens": P(29, 63, 1088, bias=True, cores=1),
    "one block, many steps, 64 tokens": P(57, 64, 704, nested=16, cores=1),
    "50 tokens, ragged": P(50, 35, 133, nested=256, bias=True, rank=9, shift=3),
}


@pytest.mark.grid
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("compute", cuda.COMPUTE)
def test_within_budget(compute: int, shape: str, dtype: torch.dtype) -> None:
    p = SHAPES[shape].of(dtype)
    assert_within_budget(cuda.run(p, compute).y, cuda.oracle(p), cuda.plain(p))


@pytest.mark.grid("tokens")
@pytest.mark.parametrize(
    "m", [pytest.param(m, marks=pytest.mark.slow if m > 16 else ()) for m in range(1, 65)]
)
def test_every_number_of_tokens(m: int) -> None:
    p = P(m, 71, 192, bias=True, rank=4)
    assert_within_budget(cuda.run(p).y, cuda.oracle(p), cuda.plain(p))


@pytest.mark.grid
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [3, 12, 40])
@pytest.mark.parametrize(("k", "nested"), [(192, 0), (192, 4), (99, 0), (99, 3)])
def test_weights_are_the_dequantised_ones(m, k, nested, dtype) -> None:
    """The rounding rule, to the bit: a token that is a unit vector reads a column of W."""
    p = P(m, 37, k, nested=nested, dtype=dtype)
    columns = torch.arange(m) * 7 % k
    p.tensors["x"].copy_(torch.nn.functional.one_hot(columns, k))
    assert torch.equal(cuda.run(p).y, cuda.weight(p, dtype)[:, columns].T)


@pytest.mark.parametrize("m", [2, 30])
@pytest.mark.parametrize("k", [192, 99])
def test_non_finite_tokens_stay_alone(m: int, k: int) -> None:
    p, clean = P(m, 40, k), P(m, 40, k)
    p.tensors["x"][m - 1] = torch.nan
    y = cuda.run(p).y
    assert torch.equal(y[:-1], cuda.run(clean).y[:-1])
    assert y[-1].isnan().all()


@pytest.mark.parametrize(
    "p", [P(4, 64, 4608, cores=2), P(40, 64, 1024, dtype=torch.float16, cores=3)], ids=str
)
def test_same_bits_in_any_order_of_warps(p: Problem) -> None:
    first = cuda.run(p)
    steps = p.k // (512 if p.m <= 16 else 128)
    assert len(first.launches) == 2 and 1 < first.launches[0].grid[1] < steps
    for seed in (1, 2):
        assert torch.equal(cuda.run(p, seed=seed).y, first.y)


def test_launches() -> None:
    assert cuda.run(P(0, 8, 64)).launches == []
    (one,) = cuda.run(P(2, 8, 64)).launches
    assert not one.follows
    for compute in cuda.COMPUTE:
        _, second = cuda.run(P(2, 8, 2048), compute).launches
        assert second.follows == (compute >= 90)
    with pytest.raises(ValueError, match="error 1"):
        cuda.run(P(65, 8, 64))


def floor(p: Problem) -> int:
    """Each input once and each output once."""
    inputs = sum(t.nbytes for t in [*p.base, *p.tensors.values()])
    return inputs + p.m * p.n * p.tensors["x"].element_size()


def conflicts(r: cuda.Run) -> float:
    """Extra wavefronts per access of shared memory."""
    kinds = ("shared_load", "shared_store")
    extra = r.total(*kinds, "cp_async_shared", of="conflicts")
    return extra / (r.total(*kinds, of="requests") + r.total("cp_async", of="requests"))


def look_ups(r: cuda.Run) -> int:
    """Of bytes of codes in the table, by all threads."""
    return sum(i["threads"] for i in r.profiles[0].instr if "ld.shared.v2.f32" in i["text"])


@pytest.mark.parametrize(("m", "requested"), [(1, 1.3), (4, 1.6), (8, 2.2)])
def test_traffic_of_few_tokens(m: int, requested: float) -> None:
    p = P(m, 1024, 4096)
    r = cuda.run(p)
    assert r.requested <= requested * floor(p)
    assert r.sector_bytes <= 2 * floor(p)
    assert conflicts(r) == 0
    assert look_ups(r) == p.n * p.k // 2
    assert r.profiles[0].blocks >= 100
    # Of weights that nobody rounded: theirs and the output's rounding are all that is lost.
    exact = cuda.oracle(p, rounded=False)
    rms = (r.y - exact).square().mean().sqrt()
    assert rms <= 1.5 * (exact.to(BF16) - exact).square().mean().sqrt()
    assert_within_budget(r.y, cuda.oracle(p), cuda.plain(p))


@pytest.mark.slow
def test_traffic_of_a_large_nested_layer() -> None:
    p = P(1, 4096, 14336, nested=256)
    r = cuda.run(p)
    assert sum(profile.dram_min_bytes for profile in r.profiles) <= 1.03 * floor(p)
    assert r.requested <= 1.3 * floor(p)
    assert look_ups(r) == p.n * p.k // 2


def test_traffic_of_64_tokens() -> None:
    p = P(64, 1024, 1024)
    r = cuda.run(p)
    assert r.profiles[0].blocks >= 100
    assert conflicts(r) == 0
    assert look_ups(r) == p.n * p.k // 2
    # x once for every 64 rows, codes, scales (twice: by two lanes) and y once, 8 parts of y in fp32
    # written and read. Fewer bytes mean fewer blocks: at 16 blocks it is 3.3 times the floor.
    parts = 8 * 2 * 4 * p.m * p.n
    x = 16 * p.tensors["x"].nbytes
    assert r.requested <= parts + x + 1.1 * floor(p)
    assert_within_budget(r.y, cuda.oracle(p), cuda.plain(p))


# What ptxas makes of it.

TOOLS = (
    Path(find_spec("triton").origin).parent / "backends/nvidia/bin" if find_spec("triton") else None
)
ARCHS = {"sm_80": 80, "sm_86": 80, "sm_89": 80, "sm_90a": 90, "sm_100": 100}


@cache
def cubins(arch: str, folder: Path) -> tuple[str, list[Path]]:
    """What ptxas says, and the files."""
    said, files = "", []
    for i, text in enumerate(cuda.ptx(ARCHS[arch])):
        ptx, out = folder / f"{arch}.{i}.ptx", folder / f"{arch}.{i}.cubin"
        ptx.write_text(text)
        command = ["ptxas", "-v", f"-arch={arch}", str(ptx), "-o", str(out)]
        said += subprocess.run(command, capture_output=True, text=True, check=True).stderr
        files.append(out)
    return said, files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("ptxas") is None:
        pytest.skip("ptxas is not on PATH")
    return tmp_path_factory.mktemp("cubin")


@pytest.mark.grid("architectures")
@pytest.mark.parametrize("arch", ARCHS)
def test_no_local_memory(arch: str, folder: Path) -> None:
    said, _ = cubins(arch, folder)
    usage = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", said)
    assert len(usage) == said.count("Compiling entry function") > 20
    assert set(usage) == {("0", "0", "0")}


@cache
def disassembled(arch: str, folder: Path) -> dict[str, list[str]]:
    tool = TOOLS / "nvdisasm" if TOOLS else None
    if tool is None or not tool.exists():
        pytest.skip("triton's nvdisasm is not there")
    text = "".join(
        subprocess.run([tool, str(file)], capture_output=True, text=True, check=True).stdout
        for file in cubins(arch, folder)[1]
    )
    sections = re.split(r"^\s*\.section\s+\.text\.([^\s,]+).*$", text, flags=re.M)
    return dict(zip(sections[1::2], map(str.splitlines, sections[2::2]), strict=True))


def main_loop(lines: list[str]) -> list[str]:
    """The instructions of the loop that rounds most weights."""
    labels, code, loops = {}, [], [[]]
    for line in lines:
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?(.*?) ?;", line):
            code.append(instruction[1].strip())
            target = re.match(r"BRA.*`\((\.L_x_\d+)\)", code[-1])
            if target and target[1] in labels:
                loops.append(code[labels[target[1]] :])
    return max(loops, key=lambda loop: (sum(i.startswith("F2FP") for i in loop), len(loop)))


@pytest.mark.grid("loops")
@pytest.mark.parametrize(
    ("arch", "tiles", "bound"),
    [("sm_80", 1, 3.0), ("sm_90a", 1, 3.0), ("sm_100", 1, 2.5), ("sm_80", 8, 4.9)],
)
@pytest.mark.parametrize("dtype", ["__half", "__nv_bfloat16"])
def test_main_loop(arch: str, tiles: int, bound: float, dtype: str, folder: Path) -> None:
    """An exact weight costs 2.5 instructions, 2 on sm_100 where products are packed: half a byte
    extract, half a look-up, a product and half a rounding. Of the rest an eighth is mma, a tenth
    loads and their addresses; then x and the loop itself."""
    code = disassembled(arch, folder)
    (name,) = (k for k in code if re.search(rf"{dtype}Li{tiles}EEELb0ELb1E", k))
    loop = main_loop(code[name])
    kinds = Counter(i.split()[0].split(".")[0] for i in loop)
    assert len(loop) / (2 * kinds["F2FP"]) <= bound
    width = "128" if tiles <= 2 else "64"  # 16 bytes of codes at a time, or 8
    assert any(i.startswith(f"LDG.E.{width}") for i in loop)
    assert kinds["HMMA"] == tiles * kinds["F2FP"] // 4
    assert not {"F2F", "LDL", "STL"} & kinds.keys()
