"""`python -m tools.gpu.direct_calls SET --device cuda`: small calls in plain Python, for
compute-sanitizer and Nsight Compute, which slow down whatever they watch.

SET is memcheck (public functions, forward and backward, and the codec), racecheck (the CUDA C++
kernels) or profile (four calls of a real layer's size, between the profiler's start and stop).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch

from lora_kernels import NF4Weight, use_backend
from lora_kernels import functional as F
from lora_kernels.dispatch.op import BackendError
from tests.device.calls import CALLS, SCALE, TINY, Draw, Sizes, low, make

DONE = "direct calls done:"
Calls = Iterator[tuple[str, Callable[[], object]]]
SMALL = Sizes(33, 72, 136, 5)  # nothing divides a tile
BF16 = torch.bfloat16


def memcheck(device: str, tiny: bool) -> Calls:
    """A dozen, on the backend that is chosen."""
    sizes = TINY if tiny else SMALL
    for name in CALLS:
        yield name, partial(_both, name, sizes, device)
    yield "NF4Weight.quantize and dequantize", partial(_codec, device, None)
    yield "gather_lora into an output", partial(_gather_add, device)


def racecheck(device: str, tiny: bool) -> Calls:
    """Every kernel of the native backend: on CUDA, csrc/cuda."""
    yield "codec", partial(_codec, device, "native")
    for m in (1, 5, 16, 33, 64):
        yield f"nf4_linear M={m}", partial(_native, device, m, rank=0)
        yield f"nf4_lora_linear M={m}", partial(_native, device, m, rank=9)


def profile(device: str, tiny: bool) -> Calls:
    """What most of a training step is, and a token's decoding."""
    sizes = TINY if tiny else Sizes(8192, 4096, 4096, 16)
    for name, dropout in (("lora_linear", 0.0), ("lora_linear", 0.1), ("dora_linear", 0.1)):
        call = make(name, sizes, device, low(device), dropout)
        yield f"{name} p={dropout:g}", partial(call.results, None)
    one = make("nf4_linear", Sizes(1, sizes.n, sizes.k, 0), device, low(device))
    one.wanted = ()
    yield "nf4_linear M=1", partial(one.results, None)


SETS = {"memcheck": memcheck, "racecheck": racecheck, "profile": profile}


def _both(name: str, sizes: Sizes, device: str) -> None:
    make(name, sizes, device, low(device), 0.25).results(None)


def _codec(device: str, backend: str | None) -> None:
    for shape in ((7, 31), (64, 128), (33, 100)):
        draw = Draw("codec", TINY, device, BF16)
        w = draw.normal(*shape)
        for nested in (False, True):
            with use_backend(backend):
                NF4Weight.quantize(w, 64, nested).dequantize(BF16)


def _native(device: str, m: int, rank: int) -> None:
    d = Draw("native", Sizes(m, 72, 136, max(rank, 1)), device, BF16)
    t = {"x": d.normal(m, 136), **d.layer(72, 136)}
    q = d.quantise(t)
    with use_backend("native"):
        if rank:
            F.nf4_lora_linear(t["x"], q, t["a"], t["b"], scale=SCALE, bias=t["bias"])
        else:
            F.nf4_linear(t["x"], q, bias=t["bias"])


def _gather_add(device: str) -> None:
    d = Draw("gather", SMALL, device, low(device))
    pages = F.page_adapters(
        [d.normal(r, 136) for r in (3, 17)], [d.normal(72, r) for r in (3, 17)], [1.0, 0.5]
    )
    out = d.normal(33, 72)
    F.gather_lora(d.normal(33, 136), pages, d.integers(-1, 2, 33, torch.int32), out=out)


def main(argv: list[str] | None = None) -> int:
    """0; 1 where a call raised; 5 where a backend refuses one: then nothing was checked of it."""
    parser = argparse.ArgumentParser("python -m tools.gpu.direct_calls", description=__doc__)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--device", required=True)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    profiled = cuda and args.set == "profile"
    status, count = 0, 0
    with torch.cuda.device(device) if cuda else nullcontext():
        for name, call in SETS[args.set](args.device, not cuda):
            print(f"direct call: {name}", flush=True)
            try:
                if profiled:
                    call()  # compiled, and warm
                    torch.cuda.synchronize()
                    torch.cuda.profiler.start()
                call()
                if cuda:
                    torch.cuda.synchronize()
                if profiled:
                    torch.cuda.profiler.stop()
                count += 1
            except BackendError as error:
                print(f"refused: {error}", flush=True)
                status = status or 5
            except Exception as error:
                print(f"failed: {type(error).__name__}: {error}", flush=True)
                status = 1
    print(DONE, count, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
