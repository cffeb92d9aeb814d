"""The process behind `pool.Worker`: reads jobs from its standard input, a line each."""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

# What a process's later calls would fail of as well. A capture that broke off leaves the generator
# and the allocator in its midst.
LOST = (
    *("CUDA error", "device-side assert", "illegal memory access", "unspecified launch failure"),
    *("stream is capturing", "graph capture", "cudaErrorStreamCapture"),
)


def lost(text: str) -> bool:
    """Whether an error's words are those of a device that this process has lost."""
    return any(word in text for word in LOST)


def main() -> None:
    # Whatever prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    answer({"ready": True})
    for line in sys.stdin:
        message = json.loads(line)
        module, _, function = message["function"].partition(":")
        try:
            value = getattr(importlib.import_module(module), function)(**message["arguments"])
            if torch.cuda.is_available() and torch.cuda.is_initialized():
                torch.cuda.synchronize()  # what went wrong in this job must not be the next one's
            answer({"value": value})
        except Exception as error:  # whatever it raises is the job's result
            text = f"{type(error).__name__}: {error}".strip()
            answer({"error": text, "lost": lost(text)})


if __name__ == "__main__":
    main()
