"""Which warnings end a test: this package's own; not torch's, which C++ raises in our name."""

from __future__ import annotations

import warnings

import pytest
import torch

# A warning belongs to the nearest Python frame: for C++, the one that called it.
OURS = {"__name__": "lora_kernels.ops.imaginary", "torch": torch, "warnings": warnings}


def in_our_name(source: str) -> None:
    exec(source, dict(OURS))


def test_our_own_warning_is_an_error():
    with pytest.raises(UserWarning, match="ours"):
        in_our_name("warnings.warn('ours')")


def test_torchs_is_none():
    """Such as that of an operator that has no deterministic form; the tests ask for those."""
    assert torch.are_deterministic_algorithms_enabled()
    with warnings.catch_warnings(record=True) as caught:
        # Always, as if for the first time.
        in_our_name(
            "torch.set_warn_always(True)\n"
            "try: torch.zeros(3).put_(torch.tensor([1]), torch.ones(1))\n"
            "finally: torch.set_warn_always(False)"
        )
    assert any("deterministic" in str(w.message) for w in caught)
