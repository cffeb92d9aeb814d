"""`bench resources` of the CUDA kernels: what nvcc and ptxas say, in the report's columns."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton", reason="triton is not installed, and with it nvdisasm")

from tests.native import cuda_nf4_linear as cuda
from tools.gpu_proofs import cuda_resources
from tools.gpu_proofs.compile import GPU_TARGETS


def test_rows() -> None:
    rows = cuda_resources.rows(GPU_TARGETS["sm_80"], "encode|shrink")
    kernels = {row["kernel"] for row in rows}
    assert kernels == {"quantize_kernel", "quantize_scales_kernel", "shrink_kernel"}
    for row in rows:
        assert 0 < row["registers"] <= 128 and row["blocks"] > 0
        assert row["stack"] == row["spills"] == 0
        assert row["tile"].endswith(
            {"quantize_kernel": "w4", "shrink_kernel": "w16"}.get(row["kernel"], "w8")
        )
        if row["kernel"] != "quantize_scales_kernel":
            assert row["wide_loads"] >= 8


@pytest.mark.parametrize("nested", [0, 256])
@pytest.mark.parametrize("k", [256, 99])
def test_dynamic_shared_memory_is_what_the_launcher_asks_for(k: int, nested: int) -> None:
    (one,) = cuda.run(cuda.Problem(2, 64, k, nested=nested)).launches
    kinds = re.search(r"Lb([01])ELb([01])E", one.kernel)
    tile = ", ".join("false" if kind == "0" else "true" for kind in kinds.groups())
    most = cuda_resources.dynamic_shared("linear_kernel", tile)
    assert one.shared == most or (k == 99 and not nested and one.shared < most)


def test_nothing_where_there_is_no_cuda() -> None:
    assert cuda_resources.rows(GPU_TARGETS["gfx942"]) == []
