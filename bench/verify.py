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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from bench.cases import EMBED
from bench.data import CaseData
from bench.providers.base import BASE, Outputs, Prepared, Provider, Result, named
from bench.providers.plain import loss_of_logits, plain_gather, plain_gather_embed
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
        if case.dropout and prepared.masks is None and prepared.computes != BASE:
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
        masks = None
        if self.data.case.dropout and prepared.masks is not None and prepared.computes != BASE:
            torch.manual_seed(_SEED)
            masks = prepared.masks()
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
                oracle = self._expression(torch.float64, copy, masks, prepared.computes)
                plain = self._expression(self.data.dtype, copy, masks, prepared.computes)
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
        self, dtype: torch.dtype, copy: int, masks: Sequence[Tensor] | None, computes: str
    ) -> Outputs:
        """The case's results from plain PyTorch in `dtype`, on the values of a copy's inputs."""
        data, case = self.data, self.data.case
        wide = dtype == torch.float64

        def leaf(t: Tensor) -> Tensor:
            if not t.is_floating_point():
                return t
            return t.detach().to(dtype if wide else t.dtype).requires_grad_(case.backward)

        inputs = {"x": leaf(data.x[copy % len(data.x)])}
        if case.op == "glu":
            inputs["up"] = leaf(data.up[copy % len(data.up)])
        if computes != BASE:
            inputs |= {name: leaf(t) for name, t in data.trained.items()}
        with use_backend("reference"), torch.set_grad_enabled(case.backward):
            y = named(self._forward(dtype, inputs, masks))
            if not case.backward:
                return y
            dy = [t.to(dtype) for t in data.dy[copy % len(data.dy)]]
            wanted = {name: t for name, t in inputs.items() if t.requires_grad}
            grads = torch.autograd.grad(list(y.values()), list(wanted.values()), dy)
        found = {name: t.detach() for name, t in y.items()}
        return {**found, **{f"d{name}": t for name, t in zip(wanted, grads, strict=True)}}

    def _forward(
        self, dtype: torch.dtype, inputs: Mapping[str, Tensor], masks: Sequence[Tensor] | None
    ) -> Result:
        """What the op is: of the leaves, without those of the adapter the frozen base alone."""
        data, case = self.data, self.data.case
        many = len(data.projections) > 1

        def weight(i: int) -> Tensor:
            if case.is_quantised and dtype == torch.float64:
                return data.quantised_layers[i].dequantize(torch.float64)
            return data.dense_layers[i].to(dtype)

        def bias(i: int) -> Tensor | None:
            given = data.projections[i].bias
            return None if given is None else given.to(dtype)

        def dropped(i: int, x: Tensor) -> Tensor:
            return x if masks is None else x * masks[i].to(dtype)

        def adapter(i: int) -> tuple[Tensor, Tensor] | None:
            names = (f"a{i}", f"b{i}") if many else ("a", "b")
            if names[0] not in inputs:
                return None
            a, b = (inputs[name].to(dtype) for name in names)
            return a, b

        def project(i: int, x: Tensor) -> Tensor:
            y, ab = linear(x, weight(i), bias(i)), adapter(i)
            if ab is None:
                return y
            return y + case.scale * linear(linear(dropped(i, x), ab[0]), ab[1])

        x = inputs["x"]
        if case.op == "glu":
            return silu(x) * inputs["up"]
        if case.op == EMBED:
            p, a, b = data.pages, inputs["a"], inputs["b"]
            w = weight(0).T
            return plain_gather_embed(x, w, a, b, p.table, p.ranks, data.slots, case.scale)
        if case.is_gather:
            parts = [linear(x, weight(0), bias(0))] if case.has_weight else []
            if "a" in inputs:
                p, a, b = data.pages, inputs["a"], inputs["b"]
                parts.append(plain_gather(x, a, b, p.table, p.ranks, data.slots, case.scale))
            return functools.reduce(torch.add, parts)
        if case.op in ("lora_packed", "nf4_lora_packed"):
            return tuple(project(i, x) for i in range(len(data.projections)))
        if case.op == "lora_mlp":
            return project(2, silu(project(0, x)) * project(1, x))
        ab = adapter(0)
        if case.op != "dora_linear" or ab is None:
            return project(0, x)
        # m̂ ∘ (xd·Wᵀ + scale·xd·Aᵀ·Bᵀ) + (x - xd)·Wᵀ + bias, xd the dropped x; see ops/dora/api.py
        w, xd = weight(0), dropped(0, x)
        wide = torch.promote_types(dtype, torch.float32)
        merged = w.to(wide) + case.scale * (inputs["b"].to(wide) @ inputs["a"].to(wide))
        norm = torch.linalg.vector_norm(merged.detach(), dim=1)
        m = (inputs["magnitude"].to(norm.dtype) / norm).to(dtype)
        y = m * (linear(xd, w) + case.scale * linear(linear(xd, ab[0]), ab[1]))
        y = y if masks is None else y + linear(x - xd, w)
        given = bias(0)
        return y if given is None else y + given

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
            peer_gate("w", got, self.data.quantised.dequantize(torch.float64), want)


def _compare(got: Outputs, oracle: Outputs, plain: Outputs, ours: bool) -> None:
    missing = set(oracle) - set(got)
    assert not missing, f"gives no {', '.join(sorted(missing))}"
    for name, exact in oracle.items():
        if ours:
            assert got[name].dtype == plain[name].dtype, f"{name}: dtype {got[name].dtype}"
            assert_within_budget(got[name], exact, plain[name], name)
        else:
            peer_gate(name, got[name], exact, plain[name])


def peer_gate(name: str, got: Tensor, exact: Tensor, plain: Tensor) -> None:
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
