"""What fine-tuning holds over many batches of other lengths: libraries keep code for each shape."""

from __future__ import annotations

import subprocess
import sys

import pytest

STEPS, SETTLED = 80, 20
SCRIPT = """
import os, random, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from lora_kernels import apply_lora, fuse_loss
from lora_kernels.cli.finetune import collate

quantize, adapter, steps = sys.argv[1:]
quantize, use_dora, steps = None if quantize == "none" else quantize, adapter == "dora", int(steps)
torch.set_num_threads(1)
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=512, hidden_size=96, intermediate_size=256, num_hidden_layers=2,
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
    for _ in range(2):
        n = draw.randrange(24, 193)
        ids = [draw.randrange(512) for _ in range(n)]
        answer = draw.randrange(8, n)
        rows.append({"input_ids": ids, "labels": [-100] * (n - answer) + ids[n - answer :]})
    loss = model(**collator(rows)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(int(open("/proc/self/statm").read().split()[1]) * page, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("quantize", "adapter"), [("nf4", "lora"), ("none", "dora")])
def test_memory_stays_where_it_was_after_a_few_steps(quantize: str, adapter: str) -> None:
    """With batches as long as their longest row it had grown by a third at the end."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, quantize, adapter, str(STEPS)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    resident = [int(line) for line in run.stdout.split()]
    settled = resident[SETTLED]
    assert len(resident) == STEPS
    assert all(abs(now - settled) <= 0.05 * settled for now in resident[SETTLED:]), resident
