"""Is a result right? Every provider is asked before its time is taken, and again afterwards.

The oracle is this package's reference expression in fp64 on the same values; the yardstick is the
same expression in the case's dtype. Ours must stay within the package's error budget
(`lora_kernels.testing`), and codecs must be bit-exact.

Peers have arithmetic of their own, which is theirs to choose: other storage for scales, 16-bit
intermediate results, 16-bit adapters. Their gate only tells a right result from a wrong one: a
root-mean-square error of at most `PEER_FACTOR` times the yardstick's plus `PEER_ROUNDINGS`
roundings of the output; a quantiser may choose another code for one value in `PEER_CODES`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.data import CaseData
from bench.providers.base import BASE, Outputs, Prepared, Provider
from bench.providers.plain import loss_of_logits
from lora_kernels import use_backend
from lora_kernels.testing import assert_within_budget

PEER_FACTOR = 8.0
PEER_ROUNDINGS = 4.0
PEER_CODES = 10_000
_SEED = 1234


@dataclass(frozen=True)
class Verdict:
    """Whether a provider's result is right, and what was said about it."""

    ok: bool
    note: str = ""


class Verifier:
    """Checks the providers of one case; oracles are computed once and kept."""

    def __init__(self, data: CaseData) -> None:
        self.data = data

    def check(self, provider: Provider, prepared: Prepared) -> Verdict:
        """Run copy 0 and compare every result."""
        case = self.data.case
        if case.dropout and prepared.mask is None and prepared.computes != BASE:
            twin = self._without_dropout
            inner = Verifier(twin).check(provider, provider.build(twin))
            return replace(inner, note=_join(inner.note, "checked at p = 0: its mask is its own"))
        # Copy 1 stands for the others: a copy that shares memory with one in use would show.
        for copy in (0, 1) if prepared.copies > 1 else (0,):
            verdict = self._check_copy(provider, prepared, copy)
            if not verdict.ok:
                return verdict
        return Verdict(True)

    def _check_copy(self, provider: Provider, prepared: Prepared, copy: int) -> Verdict:
        torch.manual_seed(_SEED)
        with prepared.context(), torch.set_grad_enabled(prepared.grad):
            got = {name: t.detach() for name, t in prepared.call(copy).items()}
        mask = None
        if self.data.case.dropout and prepared.mask is not None and prepared.computes != BASE:
            torch.manual_seed(_SEED)
            mask = prepared.mask()
        try:
            if self.data.case.op == "nf4_quantize":
                self._quantised_right(got, provider.ours)
            elif self.data.case.op == "nf4_dequantize":
                self._decoded_right(got["w"], provider.ours)
            elif self.data.case.op == "linear_cross_entropy":
                x = self.data.x[copy % len(self.data.x)]
                _compare(
                    got, self._loss(torch.float64, x), self._loss(self.data.dtype, x), provider.ours
                )
            else:
                x, dy = self.data.x[copy % len(self.data.x)], self.data.dy[copy % len(self.data.dy)]
                oracle = self._expression(torch.float64, x, dy, mask, prepared.computes)
                plain = self._expression(self.data.dtype, x, dy, mask, prepared.computes)
                _compare(got, oracle, plain, provider.ours)
        except AssertionError as error:
            return Verdict(False, str(error).splitlines()[0])
        return Verdict(True)

    @functools.cached_property
    def _without_dropout(self) -> CaseData:
        return CaseData(
            replace(self.data.case, dropout=0.0), self.data.device, rotate_bytes=1, seed=0
        )

    def _expression(
        self, dtype: torch.dtype, x: Tensor, dy: Tensor, mask: Tensor | None, computes: str
    ) -> Outputs:
        """The case's results from plain PyTorch in `dtype`, on the values of x and dy."""
        data, case = self.data, self.data.case
        wide = dtype == torch.float64

        def leaf(t: Tensor) -> Tensor:
            return t.detach().to(dtype if wide else t.dtype).requires_grad_(case.backward)

        x = leaf(x)
        adapters = (leaf(data.a), leaf(data.b)) if case.has_adapter and computes != BASE else ()
        bias = None if data.bias is None else data.bias.to(dtype)
        with use_backend("reference"), torch.set_grad_enabled(case.backward):
            if case.is_quantised and wide:
                w = data.quantised.dequantize(torch.float64)
            else:
                w = data.weight.to(dtype)
            y = linear(x, w, bias)
            if adapters:
                a, b = (t.to(dtype) for t in adapters)
                dropped = x if mask is None else x * mask.to(dtype)
                y = y + case.scale * linear(linear(dropped, a), b)
            if not case.backward:
                return {"y": y}
            grads = torch.autograd.grad(y, (x, *adapters), dy.to(dtype))
        return {"y": y.detach(), **dict(zip(("dx", "da", "db"), grads, strict=False))}

    def _loss(self, dtype: torch.dtype, x: Tensor) -> Outputs:
        """The same of a cross-entropy."""
        x = x.detach().to(dtype).requires_grad_(self.data.case.backward)
        loss = loss_of_logits(x, self.data.weight.to(dtype), self.data.labels)
        if not self.data.case.backward:
            return {"loss": loss.detach()}
        return {"loss": loss.detach(), "dx": torch.autograd.grad(loss, x)[0]}

    def _quantised_right(self, got: Outputs, ours: bool) -> None:
        case = self.data.case
        want = self.data.quantised.tensors()
        if ours:
            for name, t in want.items():
                assert torch.equal(got[name], t), f"{name}: differs from the format's definition"
            return
        other = got["packed"] ^ want["packed"]
        wrong = int(((other >> 4) != 0).sum() + ((other & 15) != 0).sum())
        assert wrong * PEER_CODES <= case.n * case.k, f"packed: {wrong} codes differ"

    def _decoded_right(self, got: Tensor, ours: bool) -> None:
        want = self.data.weight
        if ours:
            assert torch.equal(got, want), "w: not bit-exact"
        else:
            _peer_gate("w", got, self.data.quantised.dequantize(torch.float64), want)


def _compare(got: Outputs, oracle: Outputs, plain: Outputs, ours: bool) -> None:
    missing = set(oracle) - set(got)
    assert not missing, f"gives no {', '.join(sorted(missing))}"
    for name, exact in oracle.items():
        if ours:
            assert got[name].dtype == plain[name].dtype, f"{name}: dtype {got[name].dtype}"
            assert_within_budget(got[name], exact, plain[name], name)
        else:
            _peer_gate(name, got[name], exact, plain[name])


def _peer_gate(name: str, got: Tensor, exact: Tensor, plain: Tensor) -> None:
    assert got.shape == exact.shape, f"{name}: shape {list(got.shape)}, not {list(exact.shape)}"
    assert torch.isfinite(got).all(), f"{name}: not finite"
    if exact.numel() == 0:
        return

    def rms(t: Tensor) -> float:
        return t.double().square().mean().sqrt().item()

    error, allowed = rms(got.double() - exact), PEER_FACTOR * rms(plain.double() - exact)
    allowed += PEER_ROUNDINGS * torch.finfo(got.dtype).eps / 2 * rms(exact)
    assert error <= allowed, f"{name}: rms error {error:.2e} is over {allowed:.2e}"


def _join(*notes: str) -> str:
    return "; ".join(n for n in notes if n)
