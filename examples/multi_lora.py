"""Train several adapters at once over one 4-bit model, then serve them all in one batch.

Each adapter learns the docstrings of its own modules of the standard library:

    python examples/multi_lora.py --steps 30
    python examples/multi_lora.py --model DIR_OR_GGUF --output runs/many
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import lora_kernels as lk
from lora_kernels.cli.finetune.collate import Collator
from lora_kernels.cli.finetune.data import encode_all, render
from lora_kernels.cli.finetune.docstrings import module_examples
from lora_kernels.cli.finetune.models import (
    load_model,
    load_tokenizer,
    pick_dtype,
    quiet_transformers,
)
from lora_kernels.cli.finetune.source import Source

# module: (rank, dropout, learning rate)
ADAPTERS = {
    "statistics": (4, 0.0, 1e-3),
    "pathlib": (8, 0.05, 5e-4),
    "collections": (16, 0.05, 5e-4),
    "threading": (32, 0.1, 2e-4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a folder, a hub name or a GGUF file (the demo's model)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=2, help="rows of each adapter")
    parser.add_argument("--output", type=Path, default=Path("runs/multi_lora"))
    args = parser.parse_args()

    quiet_transformers()
    source = Source.of(args.model)
    model = load_model(source, pick_dtype("auto"))
    tokenizer = load_tokenizer(source, model.config.vocab_size)
    collate = Collator(tokenizer.pad_token_id, trim_logits=False)

    jobs, questions = {}, []
    for seed, (module, (rank, dropout, lr)) in enumerate(ADAPTERS.items()):
        pairs = module_examples(module)
        chats = [
            [{"role": "user", "content": p.prompt}, {"role": "assistant", "content": p.response}]
            for p in pairs
        ]
        examples = encode_all(tokenizer, chats, max_length=96)[0]
        batches = [
            collate(examples[i : i + args.batch_size])
            for i in range(0, len(examples), args.batch_size)
        ]
        config = lk.LoRAConfig(r=rank, alpha=2 * rank, dropout=dropout)
        jobs[module] = lk.training.AdapterJob(
            config, batches, steps=args.steps, lr=lr, schedule="linear", seed=seed
        )
        questions.append(render(tokenizer, chats[0][:1], prompt=True))

    trainer = lk.training.MultiLoRATrainer(model, jobs, quantize="nf4")
    losses = trainer.train()
    for name, values in losses.items():
        print(f"{name}: loss {values[0]:.3f} -> {values[-1]:.3f} in {len(values)} steps")
    folders = trainer.save(args.output)
    print(f"saved to {args.output}: {', '.join(folders)}")

    trainer.detach()
    pool = lk.serving.AdapterPool(model, slots=len(jobs), pages=8, dtype=torch.float32)
    lk.serving.attach_pool(model, pool)
    for name, folder in folders.items():
        pool.register(name, folder)
    answers = lk.serving.generate_batch(
        model, tokenizer, questions, list(jobs), max_new_tokens=24, do_sample=False
    )
    for name, text in zip(jobs, answers.texts, strict=True):
        print(f"{name}: {text!r}")


if __name__ == "__main__":
    main()
