"""The adapters: a few fine-tuned ones, and any number derived from them by seeds."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lora_kernels.adapters import adapter_layers, apply_lora, save_adapter
from lora_kernels.cli.errors import Failed, UsageError
from lora_kernels.cli.finetune.collate import Collator, can_trim_logits
from lora_kernels.cli.finetune.data import encode_all
from lora_kernels.cli.finetune.records import Message, pair
from lora_kernels.cli.serve_demo.progress import Tick
from lora_kernels.cli.serve_demo.voices import QUESTIONS, VOICES
from lora_kernels.integrations.peft import CONFIG_FILE, WEIGHTS_FILE, key_of

MAX_LENGTH = 256
# Tried on SmolLM2-135M: after eight steps each voice shows in the answers, and adapters derived
# with the noise keep it.
LEARNING_RATE = 2e-3
NOISE = 1.5  # relative to the root mean square of each of the parent's tensors


def twin(model: Any) -> Any:
    """A copy of a model with its own modules and shared weights."""
    shared = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(t): t for t in shared})


def one_adapter(model: Any, rank: int) -> Any:
    """A `twin` with an adapter on every linear layer, for training and comparing."""
    single = twin(model)
    apply_lora(single, r=rank, alpha=2 * rank, dropout=0.0, progress=False)
    return single


def train_voice(
    single: Any, tokenizer: Any, voice: str, steps: int, limit: int | None, tick: Tick
) -> None:
    """Reset the model's adapter and fine-tune it on a voice's answers.

    Args:
        limit: the longest input of the model in tokens; None without a limit.
    """
    length = min(MAX_LENGTH, limit or MAX_LENGTH)
    factors = []
    for _, layer in adapter_layers(single):
        layer.reset_adapter()
        factors += [layer.lora_A, layer.lora_B]
    examples, _, _ = encode_all(tokenizer, _conversations(voice), length)
    if not examples:
        raise UsageError(f"--model: its prompts leave no room for an answer in {length} tokens")
    batch = Collator(tokenizer.pad_token_id, can_trim_logits(single))(examples)
    batch = {name: t.to(single.device) for name, t in batch.items()}
    optimizer = torch.optim.AdamW(factors, lr=LEARNING_RATE, weight_decay=0.0)
    for _ in range(steps):
        loss = single(**batch).loss
        if not bool(torch.isfinite(loss)):
            raise Failed(
                f"fine-tuning {voice!r} gave a loss of {loss.item()}: the model's weights are "
                "damaged, or overflow in this --dtype (try --dtype float32)"
            )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tick(f"{voice}, loss {loss.item():.3f}")


def _conversations(voice: str) -> list[list[Message]]:
    return [
        pair(question, answer) for question, answer in zip(QUESTIONS, VOICES[voice], strict=True)
    ]


@dataclass(frozen=True)
class Adapters:
    """Adapters by number: first those of `folders`, then copies of them with noise.

    A derived adapter is made when it is needed. It depends only on its number and the seed.

    Attributes:
        folders: the fine-tuned adapters in PEFT's format, by name.
        parents: their tensors.
        config: PEFT's configuration, the same for all.
    """

    count: int
    seed: int
    folders: Mapping[str, Path]
    parents: tuple[dict[str, Tensor], ...]
    config: dict[str, Any]

    @staticmethod
    def train(
        single: Any,
        tokenizer: Any,
        folder: Path,
        count: int,
        seed: int,
        steps: int,
        limit: int | None,
        tick: Tick,
    ) -> Adapters:
        """Fine-tune the first ones and save them in the folder."""
        folders = {}
        torch.manual_seed(seed)
        for voice in voices(count):
            train_voice(single, tokenizer, voice, steps, limit, tick)
            folders[voice] = save_adapter(single, folder / voice)
        first = next(iter(folders.values()))
        config = json.loads((first / CONFIG_FILE).read_text(encoding="utf-8"))
        parents = tuple(load_file(path / WEIGHTS_FILE) for path in folders.values())
        return Adapters(count, seed, folders, parents, config)

    def name(self, i: int) -> str:
        voices = list(self.folders)
        return voices[i] if i < len(voices) else f"{voices[i % len(voices)]}-{i}"

    def state(self, i: int) -> dict[str, Tensor]:
        """The tensors of an adapter by PEFT's keys, fp32."""
        parent = self.parents[i % len(self.parents)]
        if i < len(self.parents):
            return parent
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + i)
        noise = torch.randn(sum(t.numel() for t in parent.values()), generator=generator)
        parts = noise.split([t.numel() for t in parent.values()])
        return {
            key: t + NOISE * t.square().mean().sqrt() * part.view(t.shape)
            for (key, t), part in zip(parent.items(), parts, strict=True)
        }


def voices(count: int) -> list[str]:
    """The voices of the first adapters, if there are `count` adapters in all."""
    return list(VOICES)[:count]


@torch.no_grad()
def fill(single: Any, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Set the values of the model's adapter, rounded to the pool's dtype."""
    for name, layer in adapter_layers(single):
        layer.lora_A.copy_(state[key_of(name, "A")].to(dtype))
        layer.lora_B.copy_(state[key_of(name, "B")].to(dtype))
