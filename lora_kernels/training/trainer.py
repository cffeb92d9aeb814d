"""MultiLoRATrainer: many adapters, each with its own data, trained in one batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_kernels.adapters.layers import unwrap
from lora_kernels.nn.multi_lora_training import BatchRoute
from lora_kernels.ops.common.kinds import check_kinds
from lora_kernels.training.attach import attach_adapters, detach_adapters, device_of
from lora_kernels.training.batch import Batch, check_micro_batch, is_packed
from lora_kernels.training.checkpoint import check_name, load_run, save_run
from lora_kernels.training.job import AdapterJob
from lora_kernels.training.loss import Loss, causal_loss, losses_of
from lora_kernels.training.run import AdapterRun, NonFinite

OnStep = Callable[[int, Mapping[str, float]], None]


class MultiLoRATrainer:
    """Train adapters of any ranks, scales, dropouts, layers and data over one frozen base.

    A step takes one micro-batch of each adapter that is not finished and runs the model once over
    all of them (packed documents, which have no mask, get a second run). It sums the losses, each
    the mean over an adapter's own tokens, so that adapters do not affect each other's gradients.
    Each adapter has its own clipping, optimiser, schedule, initial values and dropout. With the
    same seed it learns what it would if trained alone, apart from the rounding of sums. (Random
    numbers that the model itself draws, such as for its own dropout, are shared.)

    Args:
        model: dense, or with NF4Linear or bitsandbytes layers. It is changed in place and frozen.
        jobs: by adapter's name. `save` uses the name for a directory.
        quantize, block_size, double_quant, adapter_dtype: as in `apply_lora`.
        pad_id: the token that pads shorter micro-batches. It is masked, so any will do.
        loss: a function of logits [B, L, V] and labels [B, L] of one adapter.

    Raises:
        TypeError, ValueError: as `apply_lora`, and for a bad job or name.

    Examples:
        >>> ids = torch.tensor([[1, 2, 3, 4]])
        >>> batches = [{"input_ids": ids, "labels": ids}] * 2
        >>> jobs = {
        ...     "french": lk.training.AdapterJob(lk.LoRAConfig(r=4), batches),
        ...     "german": lk.training.AdapterJob(lk.LoRAConfig(r=8), batches, lr=5e-4),
        ... }
        >>> trainer = lk.training.MultiLoRATrainer(model, jobs)
        >>> losses = trainer.train()
        >>> {name: len(each) for name, each in losses.items()}
        {'french': 2, 'german': 2}
        >>> folders = trainer.save("adapters")  # adapters/french, adapters/german
    """

    def __init__(
        self,
        model: nn.Module,
        jobs: Mapping[str, AdapterJob],
        *,
        quantize: str | None = None,
        block_size: int = 64,
        double_quant: bool = True,
        adapter_dtype: torch.dtype | None = None,
        pad_id: int = 0,
        loss: Loss = causal_loss,
    ) -> None:
        if not isinstance(jobs, Mapping) or not jobs:
            raise ValueError(f"jobs: got {jobs!r}, expected one or more by name")
        unwrap(model)
        check_kinds(MultiLoRATrainer.__init__, {**locals(), "jobs": {}})
        for name, job in jobs.items():
            check_name(name)
            if not isinstance(job, AdapterJob):
                raise TypeError(f"jobs[{name!r}]: got {type(job).__name__}, expected AdapterJob")
        self.model, self.pad_id, self.loss = unwrap(model), pad_id, loss
        self.device = device_of(self.model)
        generators = [torch.Generator(self.device).manual_seed(j.seed) for j in jobs.values()]
        layers, self._holder = attach_adapters(
            self.model,
            [job.config for job in jobs.values()],
            generators,
            quantize=quantize,
            block_size=block_size,
            double_quant=double_quant,
            adapter_dtype=adapter_dtype,
        )
        self.runs: dict[str, AdapterRun] = {}
        for slot, (name, job) in enumerate(jobs.items()):
            found = [(n, a) for n, layer in layers.items() if (a := layer.adapter(slot))]
            self.runs[name] = AdapterRun(name, slot, job, generators[slot], found)

    @property
    def losses(self) -> dict[str, list[float]]:
        """The loss of each step, by adapter."""
        return {name: list(run.losses) for name, run in self.runs.items()}

    @property
    def finished(self) -> bool:
        """Whether all adapters are finished."""
        return all(run.finished for run in self.runs.values())

    def step(self) -> dict[str, float]:
        """Take one step of every adapter that is not finished. Returns their losses by name.

        Raises:
            ValueError, TypeError: `Batch.join` refuses a micro-batch; no adapter took a step.
            NonFinite: an adapter's loss or gradient is not finite. That adapter took no step and
                is finished. The others did, and the next step continues with them.
        """
        found = [(run, run.next_batch()) for run in self.runs.values()]
        parts = {run.slot: (run.name, part) for run, part in found if part is not None}
        if not parts:
            return {}
        taken = [run for run, part in found if part is not None]
        batches = self._join(parts)
        losses: dict[int, torch.Tensor] = {}
        with self._training():
            for batch in batches:
                generators = {r.slot: r.generator for r in taken if r.slot in batch.rows}
                self._holder.route = BatchRoute(batch.slots, generators)
                found_losses = losses_of(self.model(**batch.inputs), batch, self.loss)
                # Inside the route, because activation checkpointing runs layers again.
                torch.stack(list(found_losses.values())).sum().backward()
                losses |= {slot: loss.detach() for slot, loss in found_losses.items()}
        values = torch.stack([losses[run.slot] for run in taken]).tolist()
        for run, value in zip(taken, values, strict=True):
            run.update(value)
        failed = {run.name: run.failed for run in taken if run.failed is not None}
        stepped = {r.name: v for r, v in zip(taken, values, strict=True) if r.failed is None}
        if failed:
            raise NonFinite(failed, stepped)
        return stepped

    def _join(self, parts: Mapping[int, tuple[str, Mapping[str, torch.Tensor]]]) -> list[Batch]:
        """One batch, or two if only some micro-batches are packed documents."""
        for name, part in parts.values():
            check_micro_batch(name, part)
        kinds = {slot: is_packed(part) for slot, (_, part) in parts.items()}
        return [
            Batch.join(
                {s: parts[s] for s, k in kinds.items() if k is kind}, self.device, self.pad_id
            )
            for kind in sorted(set(kinds.values()))
        ]

    @contextmanager
    def _training(self) -> Iterator[None]:
        """Training mode without a cache of keys and values inside the block. With a cache,
        transformers' models do not tell packed documents apart."""
        was_training, config = self.model.training, getattr(self.model, "config", None)
        use_cache = getattr(config, "use_cache", None)
        self.model.train()
        if use_cache:
            config.use_cache = False  # type: ignore[union-attr]
        try:
            yield
        finally:
            self._holder.route = None
            self.model.train(was_training)
            if use_cache:
                config.use_cache = use_cache  # type: ignore[union-attr]

    def train(
        self,
        steps: int | None = None,
        *,
        on_step: OnStep | None = None,
        progress: bool | None = None,
    ) -> dict[str, list[float]]:
        """Take steps until every adapter is finished, or `steps` of them.

        Args:
            on_step: is called after each step with the number of steps and the losses by name.
            progress: True for a bar (needs tqdm), False for none. With None it shows if standard
                error is a terminal and tqdm is installed.

        Returns:
            `losses`.

        Raises:
            NonFinite: at the end, if adapters were stopped; the others are trained.
        """
        bar = _bar(self._left(steps), progress)
        failed: dict[str, str] = {}
        losses: Mapping[str, float] = {}
        try:
            done = 0
            while steps is None or done < steps:
                try:
                    losses = self.step()
                except NonFinite as error:
                    failed |= error.adapters
                    losses = error.losses
                if not losses:
                    break
                done += 1
                if bar is not None:
                    mean = sum(losses.values()) / len(losses)
                    bar.set_postfix_str(f"loss {mean:.3f}, {len(losses)} adapters", refresh=False)
                    bar.update()
                if on_step is not None:
                    on_step(done, losses)
        finally:
            if bar is not None:
                bar.close()
        if failed:
            raise NonFinite(failed, losses)
        return self.losses

    def _left(self, steps: int | None) -> int | None:
        """The length of the bar; None if only the data tells."""
        totals = [run.job.total for run in self.runs.values()]
        left = [
            t - r.step for t, r in zip(totals, self.runs.values(), strict=True) if t is not None
        ]
        if len(left) < len(totals):
            return steps
        return max(left) if steps is None else min(steps, max(left))

    def save(self, folder: str | os.PathLike[str]) -> dict[str, Path]:
        """Write each adapter into a directory of its name, as PEFT does, with what `resume` needs.

        Each directory is written under a temporary name and renamed when it is complete. An
        adapter that has failed (`NonFinite`) is not written; an older directory of it stays.

        Returns:
            The directories that were written, by name.
        """
        good = {name: run for name, run in self.runs.items() if run.failed is None}
        return {name: save_run(self.model, run, Path(folder)) for name, run in good.items()}

    def resume(self, folder: str | os.PathLike[str]) -> None:
        """Resume from what `save` wrote, with the same jobs. The losses are those of a run that was
        never stopped. Batches that were used are read again and skipped.

        Raises:
            FileNotFoundError: an adapter's file is not there.
            ValueError: an adapter has other layers or ranks, or fewer batches than it has used.
        """
        for run in self.runs.values():
            load_run(self.model, run, Path(folder))

    def detach(self) -> tuple[str, ...]:
        """Put the base layers back, for serving. Returns the names of the layers."""
        return detach_adapters(self.model)


def _bar(total: int | None, progress: bool | None) -> Any:
    if progress is False:
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        if progress:
            raise
        return None
    return tqdm(
        total=total, desc="training", unit="step", disable=None if progress is None else False
    )
