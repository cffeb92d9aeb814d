"""Every public function as a call on any device: its tensors, and what it makes of them in the type
under test, on the reference, and in fp64."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_kernels import NF4Weight, use_backend
from lora_kernels import functional as F
from lora_kernels.testing import assert_within_budget
from tests.ops.variants import interpreting
from tools.op_inputs.source import Source

Tensors = Mapping[str, Tensor]
SCALE = 0.75


@dataclass(frozen=True)
class Sizes:
    """M rows, N outputs, K inputs, rank r."""

    m: int
    n: int
    k: int
    r: int

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}r{self.r}"


TINY, RAGGED = Sizes(5, 24, 40, 3), Sizes(65, 130, 264, 17)
ROUND = Sizes(256, 512, 1024, 16)


@dataclass
class Call:
    """A function on its tensors.

    Attributes:
        tensors: the floating ones, by name.
        run: the function; told whether its tensors are in fp64, where a 4-bit weight is the decoded
            one: what it decodes to is a matter of the format.
        wanted: the tensors whose gradients are asked for.
    """

    tensors: dict[str, Tensor]
    run: Callable[[Tensors, bool], Tensor | Sequence[Tensor]]
    wanted: tuple[str, ...]
    _dy: list[Tensor] = field(default_factory=list)

    def results(self, backend: str | None, *, exact: bool = False) -> dict[str, Tensor]:
        """Outputs and gradients by name, on a backend (None: the one that is chosen)."""
        leaves = {
            name: (t.detach().double() if exact else t.detach()).requires_grad_(name in self.wanted)
            for name, t in self.tensors.items()
        }
        with use_backend(backend):
            made = self.run(leaves, exact)
            outputs = [made] if isinstance(made, Tensor) else list(made)
            found = {f"y{i}": y.detach() for i, y in enumerate(outputs)}
            if self.wanted:
                given = [dy.to(y.dtype) for dy, y in zip(self._gradients(outputs), outputs)]  # noqa: B905
                leaf = [leaves[name] for name in self.wanted]
                grads = torch.autograd.grad(outputs, leaf, given)
                found |= {f"d{name}": g for name, g in zip(self.wanted, grads, strict=True)}
        return found

    def _gradients(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Of the outputs; the same in every run."""
        if not self._dy:
            generator = torch.Generator(outputs[0].device).manual_seed(7)
            dtype = next(iter(self.tensors.values())).dtype
            for y in outputs:
                drawn = torch.randn(y.shape, generator=generator, device=y.device)
                self._dy.append(drawn.to(dtype))
        return self._dy

    def check(self, backend: str | None) -> dict[str, Tensor]:
        """The results, held to the error budget."""
        found = self.results(backend)
        hold(found, self.results("reference", exact=True), self.results("reference"))
        return found


def low(device: str) -> torch.dtype:
    """bf16; in the interpreter of Triton 3.6, which knows no constant of it, fp16."""
    if device == "cpu" and interpreting():
        from triton.runtime.interpreter import InterpreterBuilder

        return torch.bfloat16 if hasattr(InterpreterBuilder, "get_bf16") else torch.float16
    return torch.bfloat16


def capture(call: Callable[[], dict[str, Tensor]], device: str) -> Callable[[], dict[str, Tensor]]:
    """The call as a CUDA graph: what is returned runs it again, on the tensors as they then are.
    On the CPU it is the call itself."""
    if device == "cpu":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()

    def replay() -> dict[str, Tensor]:
        graph.replay()
        return found

    return replay


def hold(found: Tensors, oracle: Tensors, plain: Tensors) -> None:
    """Each result through the budget."""
    assert list(found) == list(oracle) == list(plain)
    for name, got in found.items():
        assert_within_budget(got, oracle[name], plain[name], name)


class Draw:
    """Tensors of a call, drawn where they live."""

    def __init__(
        self, name: str, sizes: Sizes, device: str, dtype: torch.dtype, dropout: float = 0.0
    ) -> None:
        self.sizes, self.dtype, self.dropout = sizes, dtype, dropout
        self.source = Source(zlib.crc32(name.encode()), device)
        self.integers = self.source.integers
        self.seed = self.source.seed() if dropout else None

    def normal(self, *shape: int, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return self.source.normal(*shape, std=std, dtype=dtype or self.dtype)

    def layer(self, n: int, k: int, suffix: str = "") -> dict[str, Tensor]:
        """W, A, B and a bias of a layer."""
        r = self.sizes.r
        return {
            f"weight{suffix}": self.normal(n, k, std=k**-0.5),
            f"a{suffix}": self.normal(r, k, std=k**-0.5, dtype=torch.float32),
            f"b{suffix}": self.normal(n, r, std=r**-0.5, dtype=torch.float32),
            f"bias{suffix}": self.normal(n),
        }

    def quantise(self, t: dict[str, Tensor], name: str = "weight") -> NF4Weight:
        """Puts what W decodes to in its place."""
        with use_backend("reference"):
            q = NF4Weight.quantize(t[name])
            t[name] = q.dequantize(self.dtype)
        return q

    @property
    def dropped(self) -> dict[str, object]:
        return {"dropout_p": self.dropout, "seed": self.seed}


def _lora_linear(d: Draw) -> Call:
    t = {"x": d.normal(d.sizes.m, d.sizes.k), **d.layer(d.sizes.n, d.sizes.k)}

    def run(t: Tensors, exact: bool) -> Tensor:
        x, w, a, b, bias = t.values()
        return F.lora_linear(x, w, a, b, scale=SCALE, bias=bias, **d.dropped)

    return Call(t, run, tuple(t))


def _nf4_lora_linear(d: Draw) -> Call:
    t = {"x": d.normal(d.sizes.m, d.sizes.k), **d.layer(d.sizes.n, d.sizes.k)}
    q = d.quantise(t)

    def run(t: Tensors, exact: bool) -> Tensor:
        x, w, a, b, bias = t.values()
        if exact:
            return F.lora_linear(x, w, a, b, scale=SCALE, bias=bias, **d.dropped)
        return F.nf4_lora_linear(x, q, a, b, scale=SCALE, bias=bias, **d.dropped)

    return Call(t, run, ("x", "a", "b", "bias"))


def _nf4_linear(d: Draw) -> Call:
    n, k = d.sizes.n, d.sizes.k
    t = {"x": d.normal(d.sizes.m, k), "weight": d.normal(n, k, std=k**-0.5), "bias": d.normal(n)}
    q = d.quantise(t)

    def run(t: Tensors, exact: bool) -> Tensor:
        if exact:
            return torch.nn.functional.linear(t["x"], t["weight"], t["bias"])
        return F.nf4_linear(t["x"], q, bias=t["bias"])

    return Call(t, run, ("x", "bias"))


def _projections(d: Draw, shapes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    t = {"x": d.normal(d.sizes.m, shapes[0][1])}
    for i, (n, k) in enumerate(shapes):
        t |= d.layer(n, k, str(i))
    return t


def _of(t: Tensors, name: str) -> list[Tensor]:
    return [value for key, value in t.items() if key.rstrip("012") == name]


def _adapters(t: Tensors) -> tuple[str, ...]:
    """x, and what trains."""
    return tuple(name for name in t if not name.startswith("weight"))


def _lora_packed_linear(d: Draw) -> Call:
    n, k = d.sizes.n, d.sizes.k
    t = _projections(d, [(n, k), (n // 2, k), (n // 2, k)])
    q = d.quantise(t, "weight1")  # kinds may be mixed

    def run(t: Tensors, exact: bool) -> Sequence[Tensor]:
        w: list[Tensor | NF4Weight] = [*_of(t, "weight")]
        if not exact:
            w[1] = q
        return F.lora_packed_linear(
            t["x"], w, _of(t, "a"), _of(t, "b"), scales=[SCALE, 1.0, 0.5],
            biases=_of(t, "bias"), **d.dropped,
        )  # fmt: skip

    return Call(t, run, _adapters(t))


def _lora_mlp(d: Draw) -> Call:
    n, k = d.sizes.n, d.sizes.k
    t = _projections(d, [(n, k), (n, k), (k, n)])

    def run(t: Tensors, exact: bool) -> Tensor:
        return F.lora_mlp(
            t["x"], _of(t, "weight"), _of(t, "a"), _of(t, "b"), scales=[SCALE] * 3,
            biases=_of(t, "bias"), **d.dropped,
        )  # fmt: skip

    return Call(t, run, _adapters(t))


def _gated_activation(d: Draw) -> Call:
    m, n = d.sizes.m, d.sizes.n
    t = {"gate": d.normal(m, n), "up": d.normal(m, n)}
    return Call(t, lambda t, exact: F.gated_activation(t["gate"], t["up"]), tuple(t))


def _dora_linear(d: Draw) -> Call:
    t = {"x": d.normal(d.sizes.m, d.sizes.k), **d.layer(d.sizes.n, d.sizes.k)}
    t["magnitude"] = t["weight"].float().norm(dim=1) * 1.25

    def run(t: Tensors, exact: bool) -> Tensor:
        x, w, a, b, bias, magnitude = t.values()
        return F.dora_linear(x, w, a, b, magnitude, scale=SCALE, bias=bias, **d.dropped)

    return Call(t, run, _adapters(t))


def _pages(d: Draw, n: int, k: int, page: Callable[..., F.RankPages]) -> F.RankPages:
    """Three adapters of different ranks. Made before the call: a graph copies nothing from the
    host."""
    ranks = [d.sizes.r + 7 * i for i in range(3)]
    a = [d.normal(rank, k, std=k**-0.5) for rank in ranks]
    b = [d.normal(n, rank, std=rank**-0.5) for rank in ranks]
    return page(a, b, [1.0, 0.5, 2.0])


def _gather_lora(d: Draw) -> Call:
    m, n, k = d.sizes.m, d.sizes.n, d.sizes.k
    pages = _pages(d, n, k, F.page_adapters)
    t = {"x": d.normal(m, k), "weight": d.normal(n, k, std=k**-0.5), "a": pages.a, "b": pages.b}
    slots = d.integers(-1, 3, m, torch.int32)

    def run(t: Tensors, exact: bool) -> Tensor:
        own = pages._replace(a=t["a"], b=t["b"])
        return F.gather_lora(t["x"], own, slots, base=t["weight"])

    return Call(t, run, _adapters(t))


def _gather_lora_embedding(d: Draw) -> Call:
    m, words, width = d.sizes.m, d.sizes.k, d.sizes.n
    pages = _pages(d, width, words, F.page_embedding_adapters)
    t = {"weight": d.normal(words, width), "a": pages.a, "b": pages.b}
    ids = d.integers(0, words, m, torch.int64)
    slots = d.integers(-1, 3, m, torch.int32)

    def run(t: Tensors, exact: bool) -> Tensor:
        own = pages._replace(a=t["a"], b=t["b"])
        return F.gather_lora_embedding(ids, own, slots, weight=t["weight"])

    return Call(t, run, _adapters(t))


def _linear_cross_entropy(d: Draw) -> Call:
    m, n, k = d.sizes.m, d.sizes.n, d.sizes.k
    t = {"x": d.normal(m, k), "weight": d.normal(n, k, std=k**-0.5)}
    labels = d.integers(0, n, m, torch.int64)

    def run(t: Tensors, exact: bool) -> Tensor:
        return F.linear_cross_entropy(t["x"], t["weight"], labels)

    return Call(t, run, tuple(t))


CALLS: dict[str, Callable[[Draw], Call]] = {
    "lora_linear": _lora_linear,
    "nf4_lora_linear": _nf4_lora_linear,
    "nf4_linear": _nf4_linear,
    "lora_packed_linear": _lora_packed_linear,
    "lora_mlp": _lora_mlp,
    "gated_activation": _gated_activation,
    "dora_linear": _dora_linear,
    "gather_lora": _gather_lora,
    "gather_lora_embedding": _gather_lora_embedding,
    "linear_cross_entropy": _linear_cross_entropy,
}
NO_TRITON = ("linear_cross_entropy",)  # has no kernels of Triton's yet
WITH_DROPOUT = ("lora_linear", "nf4_lora_linear", "lora_packed_linear", "lora_mlp", "dora_linear")


def make(
    name: str,
    sizes: Sizes = TINY,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
) -> Call:
    """A call of a public function; dropout only where the function has any."""
    return CALLS[name](Draw(name, sizes, device, dtype, dropout if name in WITH_DROPOUT else 0.0))
