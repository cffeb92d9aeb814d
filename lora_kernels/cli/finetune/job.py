"""The run itself: load, adapt, measure, train, measure again, save, check, report."""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerCallback, TrainerState, set_seed

from lora_kernels.adapters import (
    apply_lora,
    fuse_projections,
    load_adapter,
    merge_and_unload,
    save_adapter,
)
from lora_kernels.cli.errors import Failed, UsageError
from lora_kernels.cli.finetune import docstrings, finite, generate, plot, summary, verify
from lora_kernels.cli.finetune.args import max_length, quantization, settings, target_modules
from lora_kernels.cli.finetune.causal import (
    check_reads_backwards,
    check_tokens,
    length_limit,
    load_config,
    vocabulary,
)
from lora_kernels.cli.finetune.collate import Collator, can_trim_logits
from lora_kernels.cli.finetune.data import Dataset, load_chat, load_file
from lora_kernels.cli.finetune.finite import NonFinite
from lora_kernels.cli.finetune.meter import peak_bytes, reset_peak
from lora_kernels.cli.finetune.models import (
    load_model,
    load_tokenizer,
    pick_dtype,
    quiet_transformers,
)
from lora_kernels.cli.finetune.progress import (
    Interrupted,
    Reporter,
    StopOnSignal,
    Stopped,
    plain_console,
    stderr_console,
)
from lora_kernels.cli.finetune.records import check_file, pair
from lora_kernels.cli.finetune.rundir import RunDir, Start
from lora_kernels.cli.finetune.source import Source
from lora_kernels.cli.finetune.trainer import (
    FinetuneTrainer,
    mean_token_loss,
    readable,
    token_losses,
    training_arguments,
)
from lora_kernels.integrations.fused_loss import fuse_loss

DEMO_HELD_OUT = 96  # held-out examples that are measured; more would only take time


def finetune(args: argparse.Namespace, callbacks: list[TrainerCallback] | None = None) -> int:
    """Run the command with parsed options.

    Args:
        args: from `args.parse`.
        callbacks: more Trainer callbacks, called after the command's own.

    Returns:
        0; 1 when `--verify` finds that the saved adapter is not the trained one; 128 plus the
        signal's number after an interruption.
    """
    quiet_transformers()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        return Finetune(args, callbacks or []).run()
    except Interrupted as stop:
        console = stderr_console()
        if stop.checkpoint is None:
            console.print("Interrupted before the first checkpoint.")
        else:
            console.print(f"Interrupted. Checkpoint: {stop.checkpoint}")
            console.print(
                f"Continue with: lora-kernels finetune --output {args.output} --resume",
            )
        return 128 + stop.signal_number


class Finetune:
    """One run. Its methods are its stages, in order."""

    def __init__(self, args: argparse.Namespace, callbacks: list[TrainerCallback]) -> None:
        self.args = args
        self.callbacks = callbacks
        self.console: Console = stderr_console()
        self.folder = RunDir(Path(args.output))
        self.started = time.perf_counter()
        self.checkpoint = self.folder.checkpoint(args.resume) if args.resume else None
        if self.checkpoint is None:
            self.folder.check(args.overwrite)
        else:
            self.folder.try_writing()
        self.source = Source.of(args.model)
        self.dtype = pick_dtype(args.dtype)

    def run(self) -> int:
        """Run all stages; returns the exit status."""
        self.load()
        self.adapt()
        if self.checkpoint is None:  # after all checks, for it removes an older run
            self.folder.prepare(self.args.overwrite)
        trainer = self.make_trainer()
        if self.checkpoint is None:
            self.measure_start(trainer)
        else:
            self.read_start()
        try:
            self.train(trainer)
            return self.finish(trainer)
        except NonFinite as error:
            checkpoints = self.folder.checkpoints()
            raise finite.explain(error, checkpoints, self.folder.adapter) from None

    def load(self) -> None:
        """Tokenizer, data, model."""
        args = self.args
        if args.data:
            check_file(Path(args.data))
        self.source = self.source.located()
        config = load_config(self.source)
        self.limit = length_limit(config)
        args.max_length = max_length(args, self.limit)
        self.tokenizer = load_tokenizer(self.source, vocabulary(config))
        self.data = self.load_data()
        examples = self.data.train + self.data.held_out
        check_tokens(self.tokenizer, (max(e["input_ids"]) for e in examples), vocabulary(config))
        tokens = sum(len(e["input_ids"]) for e in self.data.train)
        self.console.print(
            f"data: {len(self.data.train)} examples ({tokens} tokens) to train on, "
            f"{len(self.data.held_out)} held out"
        )
        for count, what in (
            (self.data.truncated, f"cut to --max-length {args.max_length} tokens"),
            (self.data.dropped, "left out: no answer within --max-length"),
        ):
            if count:
                self.console.print(f"data: {count} examples {what}", style="yellow")
        self.model = load_model(self.source, self.dtype)
        check_reads_backwards(self.model, self.source)
        self.console.print(f"model: {self.source}, compute in {str(self.dtype)[6:]}")

    def load_data(self) -> Dataset:
        """The demo's questions, or the file of `--data`."""
        args = self.args
        if args.demo:
            train, held_out = docstrings.build()
            held_out = generate.spread(held_out, DEMO_HELD_OUT)
            pairs = [[pair(e.prompt, e.response) for e in part] for part in (train, held_out)]
            return load_chat(self.tokenizer, pairs[0], pairs[1], args.max_length)
        return load_file(
            self.tokenizer,
            Path(args.data),
            fraction=args.eval_fraction,
            max_length=args.max_length,
            seed=args.seed,
        )

    def adapt(self) -> None:
        """Put adapters into the model and, if asked, its base weights in 4 bits."""
        args = self.args
        set_seed(args.seed)
        try:
            self.report = apply_lora(
                self.model,
                r=args.rank,
                alpha=args.alpha,
                dropout=args.dropout,
                target_modules=target_modules(args),
                use_rslora=args.rslora,
                use_dora=args.dora,
                **quantization(args),
            )
        except ValueError as error:
            raise UsageError(str(error)) from error
        if self.fuses():
            self.console.print(str(fuse_projections(self.model)).splitlines()[0])

    def fuses(self) -> bool:
        """Whether projections of one input run as one."""
        chosen: bool | None = self.args.fuse
        return torch.cuda.is_available() if chosen is None else chosen

    def make_trainer(self) -> FinetuneTrainer:
        """The Trainer with the command's callbacks."""
        args = self.args
        self.reporter = Reporter(self.folder, self.console)
        self.stopper = StopOnSignal(self.console)
        held_out = self.data.held_out or None
        fuse_loss(self.model)
        self.collator = Collator(
            self.tokenizer.pad_token_id, can_trim_logits(self.model), args.max_length
        )
        return FinetuneTrainer(
            run=self.folder,
            loraplus_ratio=args.loraplus_ratio,
            keep=args.keep,
            model=self.model,
            args=training_arguments(args, self.folder, evaluate=held_out is not None),
            train_dataset=self.data.train,
            eval_dataset=held_out,
            data_collator=self.collator,
            compute_metrics=mean_token_loss,
            preprocess_logits_for_metrics=token_losses,
            callbacks=[self.reporter, self.stopper, *self.callbacks],
        )

    def measure_start(self, trainer: FinetuneTrainer) -> None:
        """Measure held-out loss and answers of the untrained model, and write them to a file."""
        self.start = Start(settings(self.args), self.data.fingerprint())
        self.folder.write_json(self.folder.run, asdict(self.start))
        try:
            self.start.held_out_before = self.held_out_loss(trainer)
        except NonFinite as error:
            raise Failed(
                f"{error.what}, before any training: the weights of {self.source} are damaged, or "
                f"overflow in {str(self.dtype)[6:]} (try --dtype float32)"
            ) from None
        prompts = generate.spread(self.data.prompts, self.args.generate)
        self.start.answers_before = self.answers(prompts)
        self.folder.write_json(self.folder.run, asdict(self.start))

    def read_start(self) -> None:
        """Read these measurements from the run that is resumed.

        Raises:
            UsageError: the data has changed since.
        """
        assert self.checkpoint is not None
        saved = self.folder.read_run()
        if saved is None:
            raise UsageError(f"--resume: {str(self.folder.root)!r} holds no run to continue")
        try:
            self.start = Start(**saved)
        except TypeError:
            raise UsageError(f"{self.folder.run}: not the run.json of a run") from None
        if self.start.data != self.data.fingerprint():
            raise UsageError("--resume: the data is not what the run was started with")
        self.folder.cut_log(int(self.checkpoint.name.rpartition("-")[2]))
        self.console.print(f"continuing from {self.checkpoint}")

    def held_out_loss(self, trainer: FinetuneTrainer) -> float | None:
        """Mean loss per token of the held-out examples; None if there are none."""
        if not self.data.held_out:
            return None
        return trainer.evaluate()["eval_token_loss"]

    def train(self, trainer: FinetuneTrainer) -> None:
        """Train to the end.

        Raises:
            Interrupted: a signal came; a checkpoint was saved if a step had been made.
        """
        resume = None if self.checkpoint is None else str(self.checkpoint)
        if self.checkpoint is not None:
            with readable(str(self.checkpoint)):
                state = TrainerState.load_from_json(str(self.checkpoint / "trainer_state.json"))
            if (
                state.global_step >= state.max_steps
            ):  # training is done; only the last stages are left
                with readable(str(self.checkpoint)):
                    load_adapter(self.model, str(self.checkpoint))
                trainer.state = state
                return
        set_seed(self.args.seed)
        reset_peak()
        try:
            with self.stopper:
                trainer.train(resume_from_checkpoint=resume)
        except Stopped:
            trainer.save_now()
        except KeyboardInterrupt:
            raise self.interruption() from None
        finally:
            self.reporter.close()
        if (
            self.stopper.received is not None
            and trainer.state.global_step < trainer.state.max_steps
        ):
            raise self.interruption()

    def interruption(self) -> Interrupted:
        """The interruption, with the checkpoint from which the run can continue."""
        checkpoints = self.folder.checkpoints()
        return Interrupted(checkpoints[-1] if checkpoints else None, self.stopper.received or 2)

    def finish(self, trainer: FinetuneTrainer) -> int:
        """Measure, save, check and report; the exit status."""
        args, peak = self.args, peak_bytes()
        log = self.folder.read_log()
        steps = [r for r in log if "loss" in r]
        last = log[-1] if log else {}
        after = last.get("held_out_loss")
        trainer.check_finite()
        if last.get("step") != trainer.state.global_step or after is None:
            after = self.held_out_loss(trainer)
        generations = self.show_generations()
        save_adapter(self.model, str(self.folder.adapter))
        result: dict[str, Any] = {
            "model": str(self.source),
            "title": f"{args.quantize} base, rank {args.rank}, {trainer.state.max_steps} steps",
            "trainable_parameters": self.report.trainable_parameters,
            "total_parameters": self.report.total_parameters,
            "bytes_before": self.report.bytes_before,
            "bytes_after": self.report.bytes_after,
            "base": args.quantize if args.quantize != "none" else str(self.dtype)[6:],
            "dtype": str(self.dtype)[6:],
            "threads": torch.get_num_threads(),
            "steps": trainer.state.global_step,
            "tokens": trainer.state.num_input_tokens_seen,
            "tokens_per_second": self.reporter.tokens_per_second,
            "train_seconds": self.reporter.step_seconds,
            "peak_bytes": peak,
            "train_losses": [r["loss"] for r in steps],
            "held_out_before": self.start.held_out_before,
            "held_out_after": after,
        }
        if args.verify:
            result |= self.verify(trainer)
        if args.merge:
            self.save_merged()
        result["total_seconds"] = time.perf_counter() - self.started
        plot.loss_curves(
            self.folder.read_log(), self.folder.plot, f"{self.source}, {result['title']}"
        )
        self.folder.write_json(self.folder.summary, result)
        out = plain_console()
        summary.show_generations(out, generations)
        out.print()
        out.print(summary.table(result))
        out.print(f"adapter: {self.folder.adapter}\ncurves:  {self.folder.plot}")
        if "reload" in result and not result["reload"]["equal"]:
            self.console.print("The reloaded adapter does not give the same logits.", style="red")
            return 1
        return 0

    def show_generations(self) -> list[dict[str, str]]:
        """Show the answers before and after training, and write them to generations.json."""
        count = self.args.generate
        prompts = generate.spread(self.data.prompts, count)
        references = generate.spread(self.data.references, count)
        after = self.answers(prompts)
        generations = [
            {"prompt": p, "reference": r, "before": b, "after": a}
            for p, r, b, a in zip(
                prompts, references, self.start.answers_before, after, strict=True
            )
        ]
        self.folder.write_json(self.folder.generations, generations)
        return generations

    def answers(self, prompts: list[str]) -> list[str]:
        """The model's present answers."""
        return generate.answers(self.model, self.tokenizer, prompts, self.limit)

    def verify(self, trainer: FinetuneTrainer) -> dict[str, Any]:
        """Load the adapter into a fresh model and compare logits; merge it and compare the loss."""
        batch = self.collator((self.data.held_out or self.data.train)[: self.args.batch_size])
        trained = verify.logits_of(self.model, batch)
        device = self.model.device
        fresh = load_model(self.source, self.dtype)
        load_adapter(fresh, str(self.folder.adapter), **quantization(self.args))
        if self.fuses():  # it computes as the trained one does
            fuse_projections(fresh)
        fresh.to(device)
        result: dict[str, Any] = {"reload": verify.compare(trained, verify.logits_of(fresh, batch))}
        if self.data.held_out:
            trainer.model = trainer.model_wrapped = merge_and_unload(fresh)
            trainer.accelerator.free_memory()
            result["held_out_merged"] = self.held_out_loss(trainer)
        return result

    def save_merged(self) -> None:
        """Write the merged model and its tokenizer to a folder for transformers."""
        fresh = load_model(self.source, self.dtype)
        load_adapter(fresh, str(self.folder.adapter), **quantization(self.args))
        merged: Any = merge_and_unload(fresh)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=self.folder.root) as staging:
            whole = Path(staging) / "merged"
            merged.save_pretrained(str(whole))
            self.tokenizer.save_pretrained(str(whole))
            self.folder.take_merged(whole)
