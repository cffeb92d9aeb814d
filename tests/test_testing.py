"""The error budget fails on errors: a budget that everything passes would prove nothing."""

from __future__ import annotations

import pytest
import torch

from lora_kernels.testing import FACTOR, assert_call_within_budget, assert_within_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=DTYPES, ids=str)
def product(request):
    """An fp64 oracle and the plain result in the dtype, of a product that rounds."""
    x, w = torch.randn(40, 96).to(request.param), torch.randn(64, 96).to(request.param)
    return x.double() @ w.double().T, x @ w.T


def _scaled(oracle, plain, factor):
    """A result with `factor` times the error of the plain one, in fp64: nothing rounds it away."""
    return oracle + factor * (plain.double() - oracle)


def test_the_factor_is_two():
    assert FACTOR == 2.0


def test_the_plain_result_and_a_better_one_pass(product):
    oracle, plain = product
    assert_within_budget(plain, oracle, plain)
    assert_within_budget(oracle.to(plain.dtype), oracle, plain)


@pytest.mark.parametrize("factor", [2.1, 3.0, -3.0, 10.0])
def test_more_than_twice_the_error_fails(product, factor):
    oracle, plain = product
    wrong = _scaled(oracle, plain, factor)
    with pytest.raises(AssertionError, match=r"y: largest error .* over the budget"):
        assert_within_budget(wrong, oracle, plain.double(), "y")


@pytest.mark.parametrize("factor", [-1.9, 0.0, 1.9])
def test_less_than_twice_the_error_passes(product, factor):
    oracle, plain = product
    assert_within_budget(_scaled(oracle, plain, factor), oracle, plain.double())


def test_a_result_three_times_too_large_fails(product):
    oracle, plain = product
    with pytest.raises(AssertionError, match="over the budget"):
        assert_within_budget(plain * 3, oracle, plain)


def test_one_wrong_element_fails_and_is_located(product):
    oracle, plain = product
    wrong = plain.clone()
    wrong[17, 5] += 0.1 * oracle.abs().max().to(plain.dtype)
    with pytest.raises(AssertionError, match=r"largest error .*worst at \[17, 5\]"):
        assert_within_budget(wrong, oracle, plain)


def test_many_small_errors_fail_in_the_mean_square(product):
    """Every element is off by as much as the worst plain one: no single one is too far."""
    oracle, plain = product
    error = (plain.double() - oracle).abs().max() * 1.5
    with pytest.raises(AssertionError, match="rms error"):
        assert_within_budget(oracle + error, oracle, plain.double())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_result_fails(product, bad):
    oracle, plain = product
    wrong = plain.clone()
    wrong[0, 0] = bad
    with pytest.raises(AssertionError, match="dx: 1 not finite"):
        assert_within_budget(wrong, oracle, plain, "dx")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_plain_result_is_no_unlimited_budget(product, bad):
    oracle, plain = product
    broken = plain.clone()
    broken[3, 3] = bad
    with pytest.raises(AssertionError, match="plain result is not finite"):
        assert_within_budget(plain * 3, oracle, broken)


def test_a_non_finite_oracle_fails(product):
    oracle, plain = product
    with pytest.raises(AssertionError, match="oracle is not finite"):
        assert_within_budget(plain, oracle * float("nan"), plain)


def test_a_wrong_dtype_fails():
    oracle = torch.randn(8, 8, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"dtype torch\.bfloat16, expected torch\.float32"):
        assert_within_budget(oracle.bfloat16(), oracle, oracle.float())
    with pytest.raises(AssertionError, match=r"oracle is torch\.float32, not float64"):
        assert_within_budget(oracle.float(), oracle.float(), oracle.float())


@pytest.mark.parametrize("shape", [(8, 1), (1, 8), (8,), (64,), (0, 8)], ids=str)
def test_a_wrong_shape_fails_instead_of_broadcasting(shape):
    oracle = torch.ones(8, 8, dtype=torch.float64)
    with pytest.raises(AssertionError, match="shapes"):
        assert_within_budget(torch.ones(shape), oracle, oracle.float())


def test_empty_results_pass_by_shape_and_dtype():
    empty = torch.empty(0, 8)
    assert_within_budget(empty, empty.double(), empty)


def test_an_exact_oracle_leaves_one_rounding():
    """Where the plain result is exact, the last bit of the largest element is all there is."""
    oracle = torch.ones(4, 4, dtype=torch.float64)
    plain = oracle.float()
    assert_within_budget(plain * (1 - 2.0**-24), oracle, plain)
    with pytest.raises(AssertionError, match="over the budget"):
        assert_within_budget(plain * (1 + 2.0**-22), oracle, plain)


# --- calls ----------------------------------------------------------------------------------------


def _plain(x, w, scale=1.0):
    return x @ w.T * scale


def test_call_within_budget():
    args = [torch.randn(9, 33).bfloat16(), torch.randn(7, 33).bfloat16()]
    assert_call_within_budget(lambda x, w: (x.float() @ w.float().T).bfloat16(), _plain, args)
    with pytest.raises(AssertionError, match="output 0"):
        assert_call_within_budget(lambda x, w: x @ w.T * 1.02, _plain, args)
    with pytest.raises(AssertionError, match="y: dtype"):
        assert_call_within_budget(lambda x, w: (x @ w.T).float(), _plain, args, names=["y"])


def test_call_checks_every_output_and_keyword():
    args, kwargs = [torch.randn(9, 33)], {"w": torch.randn(7, 33), "scale": 0.5}

    def plain(x, w, scale):
        y = _plain(x, w, scale)
        return y, y.sum(0)

    def wrong(x, w, scale):
        y, total = plain(x, w, scale)
        return y, total * 1.001

    assert_call_within_budget(plain, plain, args, kwargs)
    with pytest.raises(AssertionError, match="total: largest error"):
        assert_call_within_budget(wrong, plain, args, kwargs, names=["y", "total"])
    with pytest.raises(ValueError, match="zip"):
        assert_call_within_budget(lambda **k: plain(**k)[0], plain, [], kwargs | {"x": args[0]})


def test_call_converts_lists_and_leaves_integers():
    seen = []

    def plain(weights, index):
        seen.append((weights[0].dtype, index.dtype))
        return weights[0][index]

    assert_call_within_budget(plain, plain, [[torch.randn(5, 3)], torch.tensor([1, 2])])
    assert seen[-1] == (torch.float64, torch.int64)
