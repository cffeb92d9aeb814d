"""The run itself: load, fine-tune, fill the pool, answer, check, measure, draw."""

from __future__ import annotations

import argparse
import importlib.util
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from torch import Tensor

from lora_kernels.adapters import adapter_layers
from lora_kernels.cli.errors import UsageError
from lora_kernels.cli.finetune.causal import (
    check_reads_backwards,
    check_tokens,
    length_limit,
    load_config,
    vocabulary,
)
from lora_kernels.cli.finetune.data import segments
from lora_kernels.cli.finetune.generate import spread
from lora_kernels.cli.finetune.models import (
    load_model,
    load_tokenizer,
    pick_dtype,
    quiet_transformers,
)
from lora_kernels.cli.finetune.progress import plain_console, stderr_console
from lora_kernels.cli.finetune.records import pair
from lora_kernels.cli.finetune.source import Source
from lora_kernels.cli.serve_demo import plot, report
from lora_kernels.cli.serve_demo.adapters import Adapters, one_adapter, twin, voices
from lora_kernels.cli.serve_demo.check import Checked, check_rows
from lora_kernels.cli.serve_demo.measure import (
    BASE,
    PEFT,
    POOL,
    Case,
    Rates,
    counts,
    decoding,
    generate,
    load_peft,
    measure,
)
from lora_kernels.cli.serve_demo.memory import Arithmetic
from lora_kernels.cli.serve_demo.progress import stage
from lora_kernels.serving import AdapterPool, Generated, attach_pool, generate_batch


def serve(args: argparse.Namespace) -> int:
    """Run the command with parsed options. Returns 0, or 1 if a row is wrong."""
    place = plot.check_place(args.plot)
    if args.batch > args.adapters:
        raise UsageError(
            f"--batch: got {args.batch}, expected at most --adapters {args.adapters}: each row has "
            "its own"
        )
    if not args.question.strip():
        raise UsageError("--question: got nothing, expected a text")
    try:
        args.question.encode()
    except UnicodeEncodeError:
        raise UsageError(f"--question: got {args.question!r}, which is not UTF-8") from None
    quiet_transformers()
    if args.threads:
        torch.set_num_threads(args.threads)
    with _terminated_cleanly(), tempfile.TemporaryDirectory(prefix="serve-demo-") as folder:
        return ServeDemo(args, Path(folder), place).run()


@contextmanager
def _terminated_cleanly() -> Iterator[None]:
    """Make SIGTERM end the command as Ctrl-C does, so that its files are removed."""

    def stop(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class ServeDemo:
    """One run. Its methods are its stages, in order."""

    def __init__(self, args: argparse.Namespace, folder: Path, place: Path) -> None:
        self.args, self.folder, self.place = args, folder, place
        self.console: Console = stderr_console()
        self.out = plain_console()
        self.source = Source.of(args.model)
        self.dtype = pick_dtype(args.dtype)

    def run(self) -> int:
        """Run all stages; returns the exit status."""
        self.load()
        self.train()
        self.fill_pool()
        generated = self.answer()
        checked = self.check(generated)
        report.answers(self.out, self.answers(generated), generated, checked)
        rates, loaded = self.measure()
        report.rates(self.out, rates, loaded, self.args)
        title = (
            f"{self.source}, {str(self.dtype)[6:]}, rank {self.args.rank}, "
            f"{self.args.adapters} adapters in the pool"
        )
        plot.draw(rates, self.args.batch, self.place, title)
        self.out.print(f"plot: {self.place}")
        return 1 if checked.wrong else 0

    def load(self) -> None:
        """Load tokenizer and model, and check that the adapters will fit in memory."""
        args = self.args
        self.source = self.source.located()
        config = load_config(self.source)
        self.limit = length_limit(config)
        self.tokenizer = load_tokenizer(self.source, vocabulary(config))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.base = load_model(self.source, self.dtype).to(device)
        check_reads_backwards(self.base, self.source)
        self.console.print(f"model: {self.source}, {str(self.dtype)[6:]} on {device.type}")
        try:
            self.single = one_adapter(self.base, args.rank)
        except ValueError as error:
            raise UsageError(f"--model: {error}") from error
        layers: list[Any] = [layer for _, layer in adapter_layers(self.single)]
        shapes = tuple((layer.in_features, layer.out_features) for layer in layers)
        self.arithmetic = Arithmetic(shapes, args.adapters, args.rank, self.dtype.itemsize)
        self.arithmetic.check_room(device)
        try:
            self.prompt: str = segments(self.tokenizer, pair(args.question, "."))[0][0]
        except UsageError as error:
            raise UsageError(f"--model: {error}") from error
        self.ids = torch.tensor(self.tokenizer([self.prompt])["input_ids"][0])
        check_tokens(self.tokenizer, self.ids.tolist(), vocabulary(config))
        room = self.limit
        if room is not None and len(self.ids) + args.tokens > room:
            raise UsageError(
                f"--tokens: got {args.tokens} after a prompt of {len(self.ids)}, expected at most "
                f"{room} together as the model takes"
            )

    def train(self) -> None:
        """Train the adapters from which the others are derived."""
        args = self.args
        steps = args.train_steps * len(voices(args.adapters))
        with stage(self.console, "fine-tuning", steps) as tick:
            self.adapters = Adapters.train(
                self.single,
                self.tokenizer,
                self.folder,
                args.adapters,
                args.seed,
                args.train_steps,
                self.limit,
                tick,
            )
        trained = len(self.adapters.folders)
        derived = spread(list(range(trained, args.adapters)), args.batch - trained)
        self.numbers = [*range(trained), *derived][: args.batch]  # the adapter of each row
        self.names = [self.adapters.name(i) for i in self.numbers]

    def fill_pool(self) -> None:
        """Load every adapter into the pool."""
        args, adapters = self.args, self.adapters
        self.served = twin(self.base)
        self.pool = AdapterPool(
            self.served,
            slots=args.adapters,
            pages=args.adapters * self.arithmetic.pages_each,
            max_rank=args.rank,
            host_bytes=0,  # all of them are in the pool
        )
        with stage(self.console, "loading", args.adapters) as tick:
            for i in range(args.adapters):
                name = adapters.name(i)
                if name in adapters.folders:
                    self.pool.load(name, adapters.folders[name])
                else:
                    self.pool.load(name, adapters.state(i), adapters.config)
                tick("")
        attach_pool(self.served, self.pool)
        report.memory(self.out, self.arithmetic, self.pool, self.base)

    def answer(self) -> Generated:
        """Answer the mixed batch: each row with its own adapter, up to its own end."""
        return self._answer(self.args.batch, 1)

    def _answer(self, distinct: int, least: int) -> Generated:
        rows = [self.names[i % distinct] for i in range(self.args.batch)]
        prompts = [self.prompt] * len(rows)
        options = decoding(least, self.args.tokens)
        return generate_batch(self.served, self.tokenizer, prompts, rows, **options)

    def check(self, generated: Generated) -> Checked:
        """Compare every row with the model with its adapter alone."""
        with stage(self.console, "checking", self.args.batch) as tick:
            return check_rows(
                self.served,
                self.pool,
                self.single,
                self.adapters,
                self.numbers,
                self.ids,
                generated.tokens,
                tick,
            )

    def answers(self, generated: Generated) -> dict[str, str]:
        """The answers of the base and of the first rows, by name."""
        pad = self.tokenizer.pad_token_id
        base = generate(self.base, self.ids[None], 1, self.args.tokens, pad)
        shown = {BASE: self.tokenizer.decode(base[0], skip_special_tokens=True)}
        return shown | dict(zip(self.names, generated.texts[: report.SHOWN], strict=False))

    def measure(self) -> tuple[Rates, report.Loaded]:
        """Time the batch with few and with many adapters, in the pool and in PEFT."""
        args = self.args
        rows, pad = self.ids.expand(args.batch, -1), self.tokenizer.pad_token_id
        many = args.tokens, args.tokens, pad  # no row ends early
        cases = [Case(BASE, 0, lambda: generate(self.base, rows, *many))]
        peft, loaded = self.load_peft()
        for distinct in counts(args.batch):
            cases.append(Case(POOL, distinct, lambda d=distinct: self._tokens(d)))  # type: ignore[misc]
            if distinct <= loaded.adapters:
                names = [self.names[i % distinct] for i in range(args.batch)]
                cases.append(
                    Case(
                        PEFT,
                        distinct,
                        lambda n=names: generate(peft, rows, *many, adapter_names=n),  # type: ignore[misc]
                    )
                )
        with stage(self.console, "measuring", len(cases) * (args.rounds + 1)) as tick:
            return measure(cases, args.rounds, tick), loaded

    def _tokens(self, distinct: int) -> Tensor:
        return torch.stack(self._answer(distinct, self.args.tokens).tokens)

    def load_peft(self) -> tuple[Any, report.Loaded]:
        """PEFT's model with the batch's adapters, if PEFT is installed and asked for."""
        args = self.args
        if not args.peft_seconds:
            return None, report.Loaded(0, "left out: --peft-seconds 0")
        if importlib.util.find_spec("peft") is None:
            return None, report.Loaded(0, "not installed, so not measured")
        with stage(self.console, "loading into PEFT", args.batch) as tick:
            peft, loaded, took = load_peft(
                twin(self.base), self.adapters, self.numbers, self.dtype, args.peft_seconds, tick
            )
        what = f"took {took:.1f} s to load {loaded} adapters"
        if loaded < args.batch:
            what += f" of {args.batch}, then its --peft-seconds were over"
        return peft, report.Loaded(loaded, what)
