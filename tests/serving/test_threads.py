"""Many threads at one pool: nobody ever computes with another's pages."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_kernels.integrations.peft import key_of
from lora_kernels.serving import AdapterInUse, AdapterPool, AdapterPoolFull, MultiLoRALinear
from lora_kernels.testing import assert_within_budget
from tests.serving.adapters import SHAPES, adapter, contribution, make_pool, save

WORKERS, STEPS, NAMES = 3, 200, 12
RANKS = ({}, {"up": 17}, {"mid.down": 20}, {"up": 1, "mid.down": 32})
STATES = {str(i): adapter(i, ranks=RANKS[i % 4]) for i in range(NAMES)}
VERSIONS = [adapter(100 + i, r=(3, 20)[i % 2]) for i in range(4)]


class Layers:
    """The pool's layers, and what they give for two rows of x where nobody else is at work."""

    def __init__(self, pool: AdapterPool) -> None:
        torch.manual_seed(0)
        self.pool = pool
        self.x = {m: torch.randn(2, k) for m, (k, _) in SHAPES.items()}
        self.layers = {
            m: MultiLoRALinear(nn.Linear(k, n).requires_grad_(False), pool, m)
            for m, (k, n) in SHAPES.items()
        }

    def __call__(self, rows: Sequence[str | None]) -> list[torch.Tensor]:
        with self.pool.route(rows):
            return [layer(self.x[m]) for m, layer in self.layers.items()]

    def expression(self, module: str, state: Mapping[str, torch.Tensor], dtype: torch.dtype):
        base, x = self.layers[module].base, self.x[module].to(dtype)
        rank = state[key_of(module, "A")].shape[0]
        plain = nn.functional.linear(x, base.weight.to(dtype), base.bias.to(dtype))
        return plain + contribution(x, module, state, 6 / rank, dtype)


def quiet_results(adapters, batches) -> dict[tuple[str | None, ...], list[torch.Tensor]]:
    """What the layers give for each batch, in a pool where all adapters stay; all of it right."""
    pool = make_pool(slots=len(adapters), pages=3 * len(adapters))
    for name, (state, config) in adapters.items():
        pool.load(name, state, config)
    layers = Layers(pool)
    results = {tuple(rows): layers(rows) for rows in batches}
    for i, module in enumerate(SHAPES):
        found, exact, plain = [], [], []
        for rows, ys in results.items():
            for row, name in enumerate(rows):
                if name is not None:
                    found.append(ys[i][row])
                    exact.append(layers.expression(module, adapters[name][0], torch.float64)[row])
                    plain.append(layers.expression(module, adapters[name][0], torch.float32)[row])
        assert_within_budget(torch.stack(found), torch.stack(exact), torch.stack(plain), module)
    return results


def together(*jobs: Callable[[], int]) -> list[int]:
    with ThreadPoolExecutor(len(jobs)) as executor:
        return [future.result() for future in [executor.submit(job) for job in jobs]]


@pytest.mark.parametrize("tight", [False, True])
def test_every_thread_gets_its_own_adapters(tight: bool, tmp_path: Path):
    """The pool has room for all that is held at a time, or not; either way for few adapters."""
    room = 3 if tight else 2 * WORKERS + 1
    pool = make_pool(slots=room, pages=2 * room, host_bytes=6000)
    for name, (state, config) in STATES.items():
        pool.register(name, save(tmp_path / name, state, config))
    layers = Layers(pool)
    right = quiet_results(STATES, [(a, b) for a in STATES for b in (*STATES, None)])

    def serve(seed: int) -> int:
        rng, served = random.Random(seed), 0
        for _ in range(STEPS):
            names = [rng.choice(list(STATES)), rng.choice([*STATES, None])]
            try:
                assert all(map(torch.equal, layers(names), right[tuple(names)])), names
                served += 1
            except AdapterPoolFull:
                assert tight
        return served

    def disturb() -> int:
        rng, done = random.Random(99), 0
        for i in range(STEPS):
            try:
                pool.load("extra", *VERSIONS[i % 4])
                pool.evict(rng.choice(list(STATES)))
                pool.prefetch([rng.choice(list(STATES))])
                done += 1
            except AdapterPoolFull:
                assert tight
            except AdapterInUse:
                pass
            if "extra" in pool.names() or pool.stats().known > NAMES:
                pool.unload("extra")
        return done

    *served, disturbed = together(*(lambda s=s: serve(s) for s in range(WORKERS)), disturb)
    assert all(served) and disturbed
    stats = pool.stats()
    assert stats.in_use == 0 and stats.evictions > 0 and stats.known == NAMES
    if not tight:
        assert served == [STEPS] * WORKERS
    for name in pool.names():
        pool.unload(name)
    assert pool.stats().pages_used == 0


def test_a_replacement_is_never_seen_half_done():
    """Layers inside one route agree on the version, which is one of those given."""
    versions = {str(i): version for i, version in enumerate(VERSIONS)}
    right = quiet_results(versions, [(v, v) for v in versions])
    pool = make_pool(slots=2, pages=4)
    pool.load("live", *VERSIONS[0])
    layers = Layers(pool)
    replaced, over = [], threading.Event()

    def watch() -> int:
        seen = set()
        while not over.is_set():
            found = layers(["live", "live"])
            version = [v for v in right if all(map(torch.equal, found, right[v]))]
            assert len(version) == 1
            seen |= set(version)
            time.sleep(0.001)
        return len(seen)

    def renew() -> int:
        refused, end = 0, time.monotonic() + 60
        try:
            while len(replaced) < 40:
                assert time.monotonic() < end, "nobody let go of the adapter for a minute"
                try:
                    pool.replace("live", *VERSIONS[len(replaced) % 4])
                    replaced.append(True)
                except AdapterInUse:
                    refused += 1
                time.sleep(0.0005)
        finally:
            over.set()
        return refused

    *seen, _ = together(watch, watch, renew)
    assert max(seen) > 1
    assert pool.slot_of("live") == 0 and pool.stats().in_use == 0
