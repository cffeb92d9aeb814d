"""Which cases of a grid a sampled run takes."""

from __future__ import annotations

import pytest

from tests.sampling import ROOT, Described, choose, families, part_of, touched_families
from tools.sanitized_tiers import tiers

CASES = [
    Described(
        f"case{i}", frozenset({f"dtype{i % 3}", f"edge{i % 7}"}), family=("lora", "nf4")[i % 2]
    )
    for i in range(2000)
]


def test_it_takes_about_the_fraction_and_every_feature():
    taken = choose(CASES, 0.1, "commit", ())
    assert 140 < len(taken) < 260  # 200, within four and more standard deviations
    found = {f for c in CASES if c.name in taken for f in c.features}
    assert found == {f for c in CASES for f in c.features}


def test_a_fraction_of_nothing_still_takes_every_feature():
    taken = choose(CASES, 0.0, "commit", ())
    assert {f for c in CASES if c.name in taken for f in c.features} == {
        f for c in CASES for f in c.features
    }
    assert len(taken) <= 10


def test_it_changes_with_the_commit_and_with_nothing_else():
    first = choose(CASES, 0.1, "commit", ())
    assert choose(CASES[::-1], 0.1, "commit", ()) == first
    other = choose(CASES, 0.1, "another commit", ())
    assert len(first & other) < len(first) / 2


def test_a_larger_sample_holds_the_smaller_one():
    plain = [Described(c.name, frozenset()) for c in CASES]
    assert choose(plain, 0.1, "commit", ()) < choose(plain, 0.3, "commit", ())


def test_many_commits_take_every_case():
    taken: set[str] = set()
    for commit in range(100):
        taken |= choose(CASES, 0.1, str(commit), ())
    assert taken == {c.name for c in CASES}


@pytest.mark.parametrize("part", [0.0, 0.1])
def test_what_is_always_taken(part: float):
    cases = [*CASES, Described("known fault", frozenset(), always=True)]
    for commit in range(20):
        assert "known fault" in choose(cases, part, str(commit), ())


def test_more_of_what_the_change_touches():
    few = [Described(f"dora{i}", frozenset(), family="dora") for i in range(200)]
    files = {"lora_kernels/ops/dora/triton/linear.py"}
    taken = choose([*CASES, *few], 0.1, "commit", files)
    assert sum(n.startswith("dora") for n in taken) > 50  # 80, where an untouched family has 20
    everywhere = choose(
        CASES, 0.1, "commit", {f"lora_kernels/ops/{f}/api.py" for f in ("lora", "nf4")}
    )
    assert len(everywhere) < 3 * len(choose(CASES, 0.1, "commit", ()))


def test_the_part_of_what_a_test_walks_by_itself():
    numbers = list(range(1000))
    part = part_of(numbers, 0.1, "commit", lambda n: (n % 7, f"tens {n % 10}"))
    assert part == sorted(part) and 60 < len(part) < 160
    assert {n % 7 for n in part} == set(range(7)) and {n % 10 for n in part} == set(range(10))
    assert part_of(numbers, 1, "commit", lambda n: ()) == numbers
    assert part_of(numbers, 0.1, "other", lambda n: ()) != part


@pytest.mark.parametrize(
    ("file", "found"),
    [
        ("lora_kernels/ops/dora/triton/linear.py", {"dora"}),
        ("lora_kernels/ops/common/triton/tiles.py", set()),
        ("csrc/cpu/tiles/gather_shrink.h", {"gather"}),
        ("csrc/cpu/lora_gemv_f16.cpp", {"nf4", "lora", "dora", "packed"}),
        ("csrc/cpu/tiles/blocked_gemm.h", {"nf4", "lora", "dora", "packed"}),
        ("csrc/bindings/lora.cpp", {"nf4", "lora", "dora", "packed"}),
        ("csrc/bindings/nf4.cpp", {"nf4"}),
        ("csrc/cuda/nf4_linear.cu", {"nf4", "lora", "dora", "packed"}),
        ("csrc/cuda/lora_shrink.cu", {"lora"}),
        ("tests/ops/packed_inputs.py", {"packed"}),
        ("README.md", set()),
    ],
)
def test_the_families_of_a_file(file: str, found: set[str]):
    assert touched_families([file]) == found
    assert found <= set(families())


@pytest.fixture
def elsewhere(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A test run of its own that finds tests/sampling.py."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("LORA_KERNELS_SAMPLE_SEED", "some commit")
    return pytester


@pytest.mark.parametrize("value", ["2", "-0.1", "half", "nan"])
def test_a_wrong_fraction_is_named(elsewhere: pytest.Pytester, value: str):
    elsewhere.makeconftest(
        "from tests.sampling import header as pytest_report_header\n"
        "from tests.sampling import pytest_addoption\n"
    )
    result = elsewhere.runpytest_subprocess("--sample", value)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*--sample: got '{value}', expected a number from 0 to 1*"])


def test_it_deselects_and_says_so(elsewhere: pytest.Pytester):
    elsewhere.makeconftest(
        """
        import pytest
        from tests import sampling
        from tests.sampling import pytest_addoption

        def pytest_configure(config):
            config.addinivalue_line("markers", "grid: of a grid")

        def pytest_report_header(config):
            return sampling.header(config)

        def pytest_collection_modifyitems(config, items):
            sampling.select(config, items)
        """
    )
    elsewhere.makepyfile(
        """
        import pytest

        @pytest.mark.grid
        @pytest.mark.parametrize("dtype", ["a", "b", "c"])
        @pytest.mark.parametrize("i", range(3))
        def test_grid(dtype, i):
            assert True

        def test_alone():
            assert True
        """
    )
    result = elsewhere.runpytest_subprocess("--sample", "0", "-v")
    result.stdout.fnmatch_lines(["grids: 0 of the cases, chosen by some commit*", "*test_alone*"])
    passed = result.parseoutcomes()["passed"]
    # A Latin square's diagonal at best: each value of each parameter is there.
    assert 4 <= passed <= 6
    assert result.parseoutcomes()["deselected"] == 10 - passed
    bare = elsewhere.runpytest_subprocess("--sample", "0", "--sample-bare")
    assert bare.parseoutcomes() == {"passed": 1, "deselected": 9}


def test_the_sanitizers_take_the_best_tier_scalar_and_another() -> None:
    usable = ("amx", "avx512", "avx2", "scalar")
    drawn = {tuple(tiers(usable, 0.05, f"commit {i}")) for i in range(40)}
    assert drawn == {("amx", "avx512", "scalar"), ("amx", "avx2", "scalar")}
    assert tiers(usable, 1.0, "any") == list(usable)
    assert tiers(("neon", "scalar"), 0.05, "any") == ["neon", "scalar"]
    assert tiers((), 0.05, "any") == []
