"""One provider's whole model in a process of its own: `python -m bench.step_worker`.

Reads one JSON command a line, answers one JSON line each:
    {"do": "load", "provider": ..., "device": ..., "threads": ..., <fields of ModelSpec>}
    {"do": "step"}      one piece of work, timed: {"seconds", and of a training step "loss"}
    {"do": "check", "path"}     what it answers, for `bench.model_check`: {"tokens", "first"}
    {"do": "memory"}    one more piece under a fresh peak: {"peak_bytes", "resident_bytes"}
    {"do": "exact", "path", "tokens", "first", "quantised", "adapted", "weights"}   of the oracle
An error is answered by {"error": ...} and ends the process.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TextIO

import torch
from torch import Tensor

from bench import memory
from bench.model_check import CHECKED, Oracle
from bench.model_providers import (
    MODEL_PROVIDERS,
    ModelSpec,
    adapt,
    load_model,
    use_cpu_mode_of_unsloth,
)

ORACLE = "oracle"


class Worker:
    """A model and its work.

    Attributes:
        trainable: how many parameters train, for the answer to `load`.
    """

    trainable = 0

    def __init__(self, provider: str, device: torch.device, spec: ModelSpec) -> None:
        self.device, self.spec, self.provider = device, spec, MODEL_PROVIDERS[provider]
        if provider == "unsloth":
            use_cpu_mode_of_unsloth()
        self.model: Any = adapt(load_model(spec, device), self.provider, spec)
        self.vocabulary: int = self.model.config.vocab_size

    def run(self) -> dict[str, Any]:
        """The timed work."""
        raise NotImplementedError

    def check(self, path: str) -> dict[str, Any]:
        """Write logits [T, V] to a file; {"tokens": of the whole sequence, "first": the position
        whose next token the first row is of}."""
        raise NotImplementedError

    def step(self) -> dict[str, Any]:
        self._synchronize()
        start = time.perf_counter()
        found = self.run()
        self._synchronize()
        return {"seconds": time.perf_counter() - start, **found}

    def memory(self) -> dict[str, Any]:
        """The whole process on a CPU, torch's allocations on CUDA; loading is over by then."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            resident = torch.cuda.memory_allocated(self.device)
            self.step()
            peak = torch.cuda.max_memory_allocated(self.device)
            return {"peak_bytes": peak, "resident_bytes": resident}
        return memory.of_process(self.step)

    def draw(self, rows: int, tokens: int) -> Tensor:
        """The same random tokens for every provider."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(self.vocabulary, (rows, tokens), generator=generator).to(self.device)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Step(Worker):
    """A training step on one fixed batch. Without adapters nothing learns: it is the forward and
    the gradient of the embeddings' output."""

    def __init__(self, provider: str, device: torch.device, spec: ModelSpec) -> None:
        super().__init__(provider, device, spec)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.trainable = sum(p.numel() for p in parameters)
        self.optimiser: Any = None
        if parameters:
            self.optimiser = torch.optim.AdamW(parameters, lr=spec.learning_rate)
        else:
            embedding = self.model.get_input_embeddings()
            embedding.register_forward_hook(lambda module, args, y: y.requires_grad_())
        self.tokens = self.draw(spec.batch, spec.tokens)
        torch.manual_seed(2)

    def run(self) -> dict[str, Any]:
        loss = self.model(input_ids=self.tokens, labels=self.tokens).loss
        loss.backward()
        if self.optimiser is not None:
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
        return {"loss": loss.item()}


class Prefill(Worker):
    """One prompt, and the logits of its last token."""

    def __init__(self, provider: str, device: torch.device, spec: ModelSpec) -> None:
        super().__init__(provider, device, spec)
        self.tokens = self.draw(1, spec.tokens)

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        self.model(input_ids=self.tokens, use_cache=True, logits_to_keep=1)
        return {}

    @torch.no_grad()
    def check(self, path: str) -> dict[str, Any]:
        y = self.model(input_ids=self.tokens, use_cache=True, logits_to_keep=CHECKED)
        torch.save(y.logits[0], path)
        tokens = self.tokens[0].tolist()
        return {"tokens": tokens, "first": max(0, len(tokens) - CHECKED)}


class Generate(Worker):
    """New tokens of one sequence, each the likeliest."""

    def __init__(self, provider: str, device: torch.device, spec: ModelSpec) -> None:
        super().__init__(provider, device, spec)
        self.tokens = self.draw(1, spec.prompt)

    def generate(self, **options: Any) -> Any:
        return self.model.generate(
            input_ids=self.tokens,
            attention_mask=torch.ones_like(self.tokens),
            max_new_tokens=self.spec.tokens,
            do_sample=False,
            pad_token_id=0,
            **options,
        )

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        made = self.generate()
        return {"made": made.shape[1] - self.spec.prompt}

    @torch.no_grad()
    def check(self, path: str) -> dict[str, Any]:
        found = self.generate(output_logits=True, return_dict_in_generate=True)
        rows = torch.cat(found.logits[:CHECKED])
        torch.save(rows.to(self.model.dtype), path)
        tokens = found.sequences[0, : self.spec.prompt + len(rows) - 1].tolist()
        return {"tokens": tokens, "first": self.spec.prompt - 1}


WORK = {"step": Step, "prefill": Prefill, "generate": Generate}


def worker(provider: str, device: torch.device, spec: ModelSpec) -> Any:
    """The worker of a provider and an op."""
    if provider == ORACLE:
        return Oracle(device, spec)
    if provider not in MODEL_PROVIDERS:
        known = ", ".join(MODEL_PROVIDERS)
        raise ValueError(f"provider: got {provider!r}, expected one of {known}")
    if provider.startswith("llama.cpp"):
        from bench.llama_cpp import LlamaCpp

        return LlamaCpp(provider, spec)
    return WORK[spec.op](provider, device, spec)


class Server:
    """Answers commands, one after the other."""

    def __init__(self) -> None:
        self.live: Any = None

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        command = dict(command)
        do = command.pop("do")
        if do == "load":
            torch.set_num_threads(command["threads"])
            spec = ModelSpec(**{f.name: command[f.name] for f in fields(ModelSpec)})
            self.live = worker(command["provider"], torch.device(command["device"]), spec)
            return {"trainable": self.live.trainable}
        if self.live is None:
            raise ValueError("do: got a command before load")
        found: dict[str, Any] = getattr(self.live, do)(**command)
        return found


def serve(commands: TextIO, answer: Callable[[dict[str, Any]], None]) -> int:
    """Answer commands until there are no more; 1 after an error."""
    server = Server()
    for line in commands:
        try:
            answer(server.answer(json.loads(line)))
        except Exception as error:  # whatever a peer raises goes to the parent
            answer({"error": f"{type(error).__name__}: {error}"})
            return 1
    return 0


def main() -> int:
    # Whatever libraries print must not get between the answers.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return serve(sys.stdin, lambda value: print(json.dumps(value), file=channel, flush=True))


if __name__ == "__main__":
    sys.exit(main())
