"""Tokens per second of the pool, of PEFT's mixed batch and of the base alone, interleaved."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_kernels.cli.serve_demo.adapters import Adapters
from lora_kernels.cli.serve_demo.progress import Tick

BASE = "base"
POOL = "pool"
PEFT = "PEFT"


@dataclass(frozen=True)
class Case:
    """One way to answer the batch.

    Attributes:
        who: `BASE`, `POOL` or `PEFT`.
        distinct: the number of different adapters in the batch.
        call: answers the batch; returns the new tokens, int64 [B, T].
    """

    who: str
    distinct: int
    call: Callable[[], Tensor]


Rates = dict[tuple[str, int], float]  # tokens/s of (who, distinct)


def counts(batch: int) -> list[int]:
    """Powers of two up to the batch size, and the batch size."""
    return [*(1 << i for i in range(batch.bit_length()) if 1 << i < batch), batch]


def measure(cases: Sequence[Case], rounds: int, tick: Tick) -> Rates:
    """Run every case once to warm up, and then once in each round, in rotating order.

    Returns:
        Tokens per second: the new tokens of all rows over the median of the rounds' times.
    """
    seconds: dict[tuple[str, int], list[float]] = {(c.who, c.distinct): [] for c in cases}
    tokens: dict[tuple[str, int], int] = {}
    for case in cases:
        tokens[case.who, case.distinct] = case.call().numel()
        tick(f"{case.who}, warming up")
    for i in range(rounds):
        at = i % len(cases)
        for case in (*cases[at:], *cases[:at]):
            start = time.perf_counter()
            case.call()
            seconds[case.who, case.distinct].append(time.perf_counter() - start)
            tick(f"{case.who}, {case.distinct} adapters")
    return {key: tokens[key] / statistics.median(times) for key, times in seconds.items()}


@torch.no_grad()
def generate(model: Any, ids: Tensor, least: int, tokens: int, pad: int, **options: Any) -> Tensor:
    """Greedy answers to rows of one length; int64 [B, T] on the host."""
    out = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=torch.ones_like(ids).to(model.device),
        pad_token_id=pad,
        **decoding(least, tokens),
        **options,
    )
    return out[:, ids.shape[1] :].cpu()


def decoding(least: int, most: int) -> dict[str, Any]:
    """The configuration for greedy decoding of exactly so many tokens."""
    return {"min_new_tokens": least, "max_new_tokens": most, "do_sample": False}


def load_peft(
    model: Any,
    adapters: Adapters,
    numbers: Sequence[int],
    dtype: torch.dtype,
    seconds: float,
    tick: Tick,
) -> tuple[Any, int, float]:
    """A PEFT model with a batch's adapters, as many as load in the given time, at least one.

    Args:
        model: is wrapped by PEFT.
        numbers: the adapter of each row; they are loaded in this order.
        dtype: of the factors, the same as in the pool.

    Returns:
        The model, how many adapters it holds, and the seconds that loading took.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    start = time.perf_counter()
    options = {"low_cpu_mem_usage": True, "autocast_adapter_dtype": False}
    peft: Any = None
    loaded = 0
    for i in numbers:
        config = LoraConfig(
            r=adapters.config["r"],
            lora_alpha=adapters.config["lora_alpha"],
            target_modules=adapters.config["target_modules"],
            task_type="CAUSAL_LM",
        )
        name = adapters.name(i)
        with warnings.catch_warnings():  # of what PEFT calls in transformers
            warnings.simplefilter("ignore", FutureWarning)
            if peft is None:
                peft = get_peft_model(model, config, name, **options)
            else:
                peft.add_adapter(name, config, **options)
        state = {key: t.to(dtype) for key, t in adapters.state(i).items()}
        set_peft_model_state_dict(peft, state, name, low_cpu_mem_usage=True)
        loaded += 1
        tick(name)
        took = time.perf_counter() - start
        if took > seconds:
            break
    return peft.eval(), loaded, took
