"""What other ways of computing the same LoRA call move: modelled, or counted and noted by hand."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """A call's sizes; `size` and `adapter` are bytes of an element."""

    m: int
    n: int
    k: int
    r: int
    size: int = 2
    adapter: int = 2

    @property
    def floor(self) -> dict[str, int]:
        """Bytes of each input once and each output once; s counts as neither."""
        m, n, k, r = self.m, self.n, self.k, self.r
        adapters = r * (n + k) * self.adapter
        forward = (m * k + n * k + m * n) * self.size + adapters
        return {"forward": forward, "backward": forward + m * k * self.size + adapters}

    @property
    def flops(self) -> dict[str, int]:
        product, branch = 2 * self.m * self.n * self.k, 2 * self.m * self.r * (self.n + self.k)
        return {"forward": product + branch, "backward": product + 2 * branch}


@dataclass(frozen=True)
class Baseline:
    """Another way, with its bytes over the floor, and where the figures come from."""

    name: str
    op: str
    dropout: bool
    launches: int
    unique: float
    requested: float | None
    error: float | None
    atomics: str
    source: str


# Counted once from their compiled PTX (`tools/ptxemu`), with their own settings for an A100.
_COUNTED = "counted by tools/ptxemu: c48d7fd with Triton 3.9.0, sm_80, M=N=K=1024 r=16"
LORAFUSION = (
    Baseline("LoRAFusion", "forward", False, 2, 1.34, 5.7, 1.3, "none", _COUNTED),
    Baseline("LoRAFusion", "forward", True, 3, 2.16, 6.5, 1.8, "none", _COUNTED),
    Baseline("LoRAFusion", "backward", False, 7, 1.31, 3.7, None, "1 MB", _COUNTED),
    Baseline("LoRAFusion", "backward", True, 7, 1.43, 3.8, None, "1 MB", _COUNTED),
)
LORAFUSION_SIZES = Sizes(1024, 1024, 1024, 16)

_SIZES = "sm_80, N=K=1024"
_VLLM = f"counted by tools/ptxemu: 0.33.0 with Triton 3.9.0, {_SIZES}"
_SGLANG = f"counted by tools/ptxemu: 0.5.23 with Triton 3.9.0, {_SIZES}"
_PUNICA = f"counted by tools/ptxemu: 591b598 with nvcc 13.0, {_SIZES}"
# Serving engines' kernels, by the call's name (`gather_workloads.py`).
SERVING = (
    Baseline("vLLM", "gather decode", False, 3, 1.00, 10.1, None, "", _VLLM),
    Baseline("SGLang", "gather decode", False, 2, 1.00, 1.7, None, "", _SGLANG),
    Baseline("Punica", "gather decode", False, 3, 1.00, 2.3, None, "", _PUNICA),
    Baseline("vLLM", "gather decode r=64", False, 3, 1.00, 11.1, None, "", _VLLM),
    Baseline("SGLang", "gather decode r=64", False, 2, 1.00, 1.2, None, "", _SGLANG),
    Baseline("Punica", "gather decode r=64", False, 3, 1.00, 2.5, None, "", _PUNICA),
    Baseline("vLLM", "gather decode r=8-64", False, 3, 2.09, 21.0, None, "", _VLLM),
    Baseline("SGLang", "gather decode r=8-64", False, 2, 1.03, 1.5, None, "", _SGLANG),
    Baseline("Punica", "gather decode r=8-64", False, 3, 2.08, 5.1, None, "", _PUNICA),
    Baseline("vLLM", "gather prefill", False, 3, 1.03, 1.8, None, "", _VLLM),
    Baseline("SGLang, chunks of 16", "gather prefill", False, 2, 1.01, 2.7, None, "", _SGLANG),
    Baseline("SGLang, chunks of 128", "gather prefill", False, 2, 1.01, 1.1, None, "", _SGLANG),
)


def baselines(sizes: Sizes, op: str, dropout: bool) -> list[Baseline]:
    """What was counted on this shape; for a LoRA layer's "forward" and "backward" also plain
    PyTorch and the order of `addmm_`, modelled."""
    if op not in ("forward", "backward"):
        same = (sizes.n, sizes.k) == (1024, 1024)
        return [r for r in SERVING if same and (r.op, r.dropout) == (op, dropout)]
    found = [
        _modelled("plain PyTorch", sizes, op, dropout, _plain(sizes, dropout)[op]),
        _modelled("addmm_ order", sizes, op, dropout, _addmm(sizes, dropout)[op]),
    ]
    if sizes == LORAFUSION_SIZES:
        found += [r for r in LORAFUSION if (r.op, r.dropout) == (op, dropout)]
    return found


def _modelled(name: str, sizes: Sizes, op: str, dropout: bool, steps: list[int]) -> Baseline:
    ratio = sum(steps) / sizes.floor[op]
    source = "modelled: each operator reads and writes its operands once"
    return Baseline(name, op, dropout, len(steps), ratio, None, None, "none", source)


def _parts(z: Sizes) -> dict[str, int]:
    """Bytes of each operand; a mask takes a byte an element."""
    return {
        "x": z.m * z.k * z.size,
        "w": z.n * z.k * z.size,
        "y": z.m * z.n * z.size,
        "s": z.m * z.r * z.size,
        "a": z.r * z.k * z.adapter,
        "b": z.n * z.r * z.adapter,
        "mask": z.m * z.k,
    }


def _sum(parts: dict[str, int], *operators: str) -> list[int]:
    """Bytes of operators written as the operands that they read and write."""
    return [sum(parts[name] for name in operator.split()) for operator in operators]


def _plain(z: Sizes, dropout: bool) -> dict[str, list[int]]:
    """y = x·Wᵀ + scale·(drop(x)·Aᵀ)·Bᵀ and autograd's backward, an operator at a time."""
    drop = ("x x mask",) if dropout else ()
    # Product, [dropout], s, branch, scaling, addition.
    forward = ("x w y", *drop, "x a s", "s b y", "y y", "y y y")
    # Scaling, ds, dB, dA, the branch's dx, [its mask], dx, addition.
    back = ("x mask x",) if dropout else ()
    backward = ("y y", "y b s", "y s b", "s x a", "s a x", *back, "y w x", "x x x")
    parts = _parts(z)
    return {"forward": _sum(parts, *forward), "backward": _sum(parts, *backward)}


def _addmm(z: Sizes, dropout: bool) -> dict[str, list[int]]:
    """The scale and the addition inside the products; dropout as torch has it."""
    drop = ("x x mask",) if dropout else ()
    forward = ("x w y", *drop, "x a s", "s b y y")
    back = ("s a x", "x mask x", "x x x") if dropout else ("s a x x",)
    backward = ("y w x", "y b s", *back, "s x a", "y s b")
    parts = _parts(z)
    return {"forward": _sum(parts, *forward), "backward": _sum(parts, *backward)}
