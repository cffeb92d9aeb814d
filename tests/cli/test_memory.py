"""What fine-tuning holds over many batches of other lengths: libraries keep code for each shape."""

from __future__ import annotations

import subprocess
import sys

import pytest

STEPS, SETTLED = 120, 20
SCRIPT = """
import os, random, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from lora_kernels import apply_lora, fuse_loss
from lora_kernels.cli.finetune import collate

quantize, use_dora, step_of_lengths, steps = (
    sys.argv[1] if sys.argv[1] != "none" else None, sys.argv[2] == "dora", *map(int, sys.argv[3:])
)
collate.LENGTH_STEP = step_of_lengths
torch.set_num_threads(2)
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=4096, hidden_size=192, intermediate_size=512, num_hidden_layers=4,
    num_attention_heads=3, num_key_value_heads=3, max_position_embeddings=512,
)
model = LlamaForCausalLM(config).bfloat16()
apply_lora(model, r=8, quantize=quantize, use_dora=use_dora, dropout=0.05)
fuse_loss(model)
collator = collate.Collator(0, collate.can_trim_logits(model), 192)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
draw = random.Random(0)
page = os.sysconf("SC_PAGE_SIZE")
for step in range(steps):
    rows = []
    for _ in range(4):
        n = draw.randrange(24, 193)
        ids = [draw.randrange(4096) for _ in range(n)]
        answer = draw.randrange(8, n)
        rows.append({"input_ids": ids, "labels": [-100] * (n - answer) + ids[n - answer :]})
    loss = model(**collator(rows)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(int(open("/proc/self/statm").read().split()[1]) * page, flush=True)
"""


def _resident(quantize: str, adapter: str, step: int, steps: int) -> list[int]:
    """Bytes in memory after each step, of a process of its own."""
    arguments = [quantize, adapter, str(step), str(steps)]
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=True
    )
    return [int(line) for line in run.stdout.split()]
