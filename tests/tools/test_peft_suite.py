"""The run of PEFT's own tests tells a difference from none."""

from __future__ import annotations

import pytest

from tools.peft_suite import compare, run

CASES = """
import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

def test_same(): pass
def test_fails_in_both(): assert False
def test_differs(): assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA].__module__.startswith("peft.")
"""


@pytest.mark.slow
def test_only_a_difference_is_told(tmp_path):
    pytest.importorskip("peft", reason="PEFT is not installed")
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_some.py").write_text(CASES)
    before, after = (run(tests, ["test_some.py"], "", accelerated=a) for a in (False, True))
    assert sorted(v.split(":")[0] for v in before.values()) == ["failure", "passed", "passed"]
    [line] = compare(before, after)
    assert line.splitlines()[0].endswith("test_some::test_differs")
    with pytest.raises(RuntimeError, match=r"no report for nothing\.py"):
        run(tests / "none", ["nothing.py"], "--bad(", accelerated=False)
