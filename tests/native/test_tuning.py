"""Block sizes: they change no bit of a result, and what does not fit is refused."""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_kernels.dispatch import native
from lora_kernels.dispatch.tuning import VARIABLE
from tests.native import lora_cases
from tests.native.lora_cases import DTYPES, Base, Branch, Case, check
from tests.ops.variants import as_tuple, bits

needs_extension = pytest.mark.skipif(
    not native.available(), reason=f"needs the extension: {native.why_unavailable()}"
)

# A tile or a row at a time, and the whole matrix.
LIMITS = {
    "nf4_k_tiles": (4, 512),
    "nf4_sum_bytes": (4096, 1 << 30),
    "dense_k_tiles": (4, 512),
    "dense_sum_bytes": (4096, 1 << 30),
    "block_panels": (8, 128),
    "activation_bytes": (4096, 1 << 34),
    "packed_bytes": (4096, 1 << 34),
    "packed_fewest_rows": (1, 1 << 16),
    "packed_most_rows": (1, 1 << 16),
}
SMALLEST, LARGEST = ({name: limits[i] for name, limits in LIMITS.items()} for i in (0, 1))
EXTREMES = (SMALLEST, LARGEST, *({name: v} for name, limits in LIMITS.items() for v in limits))

BRANCH = Branch(17, 0.1, rank_diag=True, out_diag=True, bias=True)
# Several blocks and parts of every base, none of them whole; 545 rows are two pieces of
# activations.
SHAPES = (
    (40, Base(1100, 1030)),
    (300, Base(530, 2368, block=64, nested=256)),
    (97, Base(390, 2370, block=64)),  # blocks that straddle rows
    (545, Base(66, 320, block=64)),
    (545, Base(70, 131)),
)


# Kept for a while: every tier is compared with the same expectation, which may take 200 MiB.
expected = functools.lru_cache(maxsize=2)(lora_cases.expected)


def cases(dtype: torch.dtype) -> list[Case]:
    return [
        Case(op, m, base, BRANCH, dtype, needs=(True,) * 6 + (False,))
        for m, base in SHAPES
        for op in ("lora_linear_fwd", "lora_linear_bwd")
    ]


@pytest.fixture(autouse=True)
def _sizes_restored():
    if not native.available():
        yield
        return
    with native.use_tuning({}):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_size_changes_a_bit_and_all_are_within_the_budget(
    isa: str, dtype: torch.dtype, sample
) -> None:
    every = itertools.product(cases(dtype), EXTREMES)
    chosen = sample(every, lambda pair: (pair[0], pair[1], f"{pair[0].op} {len(pair[1])}"))
    for case, pairs in itertools.groupby(chosen, lambda pair: pair[0]):
        op, args = getattr(torch.ops.lora_kernels_native, case.op), case.args()
        usual = [bits(t) for t in as_tuple(op(*args))]
        for _, sizes in pairs:
            with native.use_tuning(sizes):
                got = [bits(t) for t in as_tuple(op(*args))]
            assert all(map(torch.equal, got, usual)), (case, sizes)
    for case in sample(cases(dtype), lambda case: (case.op, f"{case.m} rows")):
        with native.use_tuning(SMALLEST):
            check(case, *expected(case))


@needs_extension
def test_every_size_has_its_limits() -> None:
    assert set(LIMITS) == set(native.tuning()) == set(native.default_tuning())
    for name, (least, most) in LIMITS.items():
        before = native.tuning()
        for v in (least - 1, most + 1, -1, 0, 1 << 80, float(least), str(least), None, True):
            expectation = f"{name}: got .*, expected .* from {least} to {most}"
            with pytest.raises(ValueError, match=expectation), native.use_tuning({name: v}):
                pass
            assert native.tuning() == before
        for v in (least, most):
            with native.use_tuning({name: v}):
                assert native.tuning() == {**before, name: v}
            assert native.tuning() == before


@needs_extension
@pytest.mark.parametrize("key", ["ahead", "", 3, None])
def test_an_unknown_size_is_refused_and_none_is_set(key) -> None:
    before = native.tuning()
    message = rf"tuning: got key {key!r}, expected one of .*block_panels"
    with pytest.raises(ValueError, match=message), native.use_tuning({"nf4_k_tiles": 32, key: 1}):
        pass
    assert native.tuning() == before


@needs_extension
def test_the_default_goes_by_the_cache() -> None:
    from lora_kernels import _C

    big, middle, small = (_C.default_tuning(kib << 10) for kib in (2048, 1280, 512))
    assert _C.default_tuning(0) == _C.default_tuning(1 << 30) == big
    assert big["nf4_sum_bytes"] == 2 * middle["nf4_sum_bytes"] == 4 * small["nf4_sum_bytes"]
    assert native.default_tuning() == _C.default_tuning(native.l2_bytes())


@needs_extension
def test_the_doctor_names_what_differs_from_the_defaults() -> None:
    from lora_kernels.cli.doctor import extension

    with native.use_tuning(native.default_tuning()):
        assert any(row.split(None, 2)[-1] == "the defaults" for row in extension())
        with native.use_tuning({"nf4_k_tiles": 32, "packed_most_rows": 5}):
            assert any("nf4_k_tiles 32, packed_most_rows 5" in row for row in extension())


def document(**changes) -> dict:
    return {**native.tuned_for(), "values": {"nf4_k_tiles": 32}, **changes}


def load_again() -> None:
    assert native._load.__wrapped__().reason is None


@needs_extension
def test_a_file_of_this_machine_is_taken(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "tuning.json"
    path.write_text(json.dumps(document()))
    monkeypatch.setenv(VARIABLE, str(path))
    load_again()
    assert native.tuning() == {**native.default_tuning(), "nf4_k_tiles": 32}


@needs_extension
def test_former_names_are_still_read() -> None:
    former = {
        **{"cheap_depth": 32, "cheap_sum_bytes": 8192, "dear_depth": 36, "dear_sum_bytes": 4096},
        "block_strips": 24,
    }
    now = ("nf4_k_tiles", "nf4_sum_bytes", "dense_k_tiles", "dense_sum_bytes", "block_panels")
    with native.use_tuning(former):
        assert {name: native.tuning()[name] for name in now} == dict(
            zip(now, former.values(), strict=True)
        )
    assert not set(former) & set(native.tuning())


@needs_extension
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        ("", "Expecting value"),
        (b"\xff\xfe{", "decode"),
        ("[]", "holds no block sizes"),
        ({"values": [1]}, "holds no block sizes"),
        ({"format": 2}, "format: got 2, expected 1"),
        ({"isa": "mmx"}, "isa: got 'mmx', expected "),
        ({"cpu": "Z80"}, "cpu: got 'Z80', expected "),
        ({"values": {"nf4_k_tiles": 32, "ahead": 1}}, "tuning: got key 'ahead', expected one of"),
        ({"values": {"nf4_k_tiles": 3}}, "nf4_k_tiles: got 3, expected a multiple of 4"),
    ],
)
def test_a_file_that_does_not_fit_is_warned_about(
    content, says: str, tmp_path: Path, monkeypatch
) -> None:
    path = tmp_path / "tuning.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(document(**content)))
    monkeypatch.setenv(VARIABLE, str(path))
    before = native.tuning()
    with pytest.warns(UserWarning) as caught:
        load_again()
    (text,) = (str(w.message) for w in caught)
    assert text.startswith(f"{VARIABLE}={path}: ") and says in text
    assert native.tuning() == before


@needs_extension
def test_the_variable_counts_when_the_extension_loads(tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    path.write_text(json.dumps(document()))
    program = "from lora_kernels.dispatch import native; print(native.tuning()['nf4_k_tiles'])"
    for name, sizes, warns in ((path, "32", False), (tmp_path / "missing.json", "", True)):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={
                **os.environ,
                VARIABLE: str(name),
                "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            },
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == (sizes or str(native.default_tuning()["nf4_k_tiles"]))
        assert (str(name) in done.stderr) == warns
