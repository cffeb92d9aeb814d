"""The CPU kernel of the dropout mask on every instruction set."""

from __future__ import annotations

import functools

import pytest
import torch

from lora_kernels.ops.common.philox import keep_mask

native_ops = torch.ops.lora_kernels_native
# Cached: every tier is compared with the same expectation.
expected_mask = functools.cache(
    lambda seed, *shape_p_stream: keep_mask(torch.tensor([seed]), *shape_p_stream)
)


@pytest.mark.parametrize("p", [0.0, 0.25 / 65536, 1.5 / 65536, 0.05, 0.5, 1 - 2**-16])
@pytest.mark.parametrize("seed", [0, -1, 2**62 + 12345])
def test_the_same_bits_as_the_definition(isa: str, seed: int, p: float) -> None:
    s = torch.tensor([seed])
    for rows, cols in ((0, 9), (9, 0), (1, 1), (7, 31), (3, 64), (5, 129), (70, 100), (9, 4096)):
        for stream in (0, 3):
            mask = native_ops.dropout_mask(s, rows, cols, p, stream)
            assert mask.dtype == torch.bool
            assert torch.equal(mask, expected_mask(seed, rows, cols, p, stream))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_mask_does_not_depend_on_threads(isa: str, threads: int) -> None:
    torch.set_num_threads(threads)
    s = torch.tensor([5])
    mask = native_ops.dropout_mask(s, 301, 1003, 0.1, 0)
    assert torch.equal(mask, expected_mask(5, 301, 1003, 0.1, 0))


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"seed: got 2 elements", (torch.tensor([1, 2]), 1, 1, 0.5, 0)),
        (r"seed: got dtype int32", (torch.tensor([1], dtype=torch.int32), 1, 1, 0.5, 0)),
        (r"rows: got -1", (torch.tensor([1]), -1, 1, 0.5, 0)),
        (r"cols: got -1", (torch.tensor([1]), 1, -1, 0.5, 0)),
        (r"p: got 1.5", (torch.tensor([1]), 1, 1, 1.5, 0)),
        (r"p: got nan", (torch.tensor([1]), 1, 1, float("nan"), 0)),
        (r"stream: got -1", (torch.tensor([1]), 1, 1, 0.5, -1)),
    ],
)
def test_bad_arguments(isa: str, message: str, arguments: tuple) -> None:
    with pytest.raises(ValueError, match=message):
        native_ops.dropout_mask(*arguments)
