"""What each of the processes of `test_distributed.py` does, and the models that both sides make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lora_kernels import explain
from lora_kernels.adapters import (
    apply_lora,
    disable_adapters,
    fuse_projections,
    load_adapter,
    merge_adapters,
    merge_and_unload,
    save_adapter,
    unload,
    unmerge_adapters,
)
from lora_kernels.nn import LoRALinear, QLoRALinear
from lora_kernels.nn.common import whole
from tests.adapters.heads import learn
from tests.adapters.models import Attention, Mlp, wake

RANKS, BATCH, K, HIDDEN, N = 2, 16, 64, 96, 48
ADAPTERS = ("0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B")


def build(seed: int = 0, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    dense = LoRALinear(K, HIDDEN, r=4, dropout=dropout, dtype=dtype)
    quantised = QLoRALinear(HIDDEN, N, r=8, dropout=dropout, dtype=dtype)
    for layer in (dense, quantised):
        nn.init.normal_(layer.lora_B, std=0.1)
    return nn.Sequential(dense, nn.Tanh(), quantised)


def batch(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(BATCH, K, generator=torch.Generator().manual_seed(1)).to(dtype)


def share(rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return batch(dtype).chunk(RANKS)[rank]


def loss(y: Tensor) -> Tensor:
    return y.float().square().mean()


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def train(model: nn.Module, x: Tensor, steps: int = 1) -> None:
    optimizer = torch.optim.AdamW(adapters(model).values(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(x)).backward()
        optimizer.step()


KINDS = {
    "lora": {},
    "qlora": {"quantize": "nf4"},
    "dora": {"use_dora": True},
    "qdora": {"quantize": "nf4", "use_dora": True},
    "whole": {"target_modules": ["up", "down"], "modules_to_save": ["head"]},
    "whole over 4 bits": {"modules_to_save": ["head"], "quantize": "nf4"},
    "tokens": {"trainable_token_indices": [1, 3]},
}


class Embedded(Mlp):
    """The same over an embedding, which takes token 3 and others from what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(8, 64)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.embed_tokens(x.argsort(-1)[:, 0] % 4))


def base(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return Embedded() if "trainable_token_indices" in options else Mlp()


def adapted(**options: Any) -> nn.Module:
    model = base(**options)
    apply_lora(model, 4, 8, **options)
    return learn(wake(model)).eval()


def projected() -> Tensor:
    return torch.randn(4, 5, 40, generator=torch.Generator().manual_seed(4))


def inputs() -> Tensor:
    return torch.randn(16, 64, generator=torch.Generator().manual_seed(4))


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    found = {"ddp": _ddp(rank), "dropout": _dropout(rank), "fsdp": _fsdp(rank)}
    found["saved"] = _saved(rank, Path(folder))
    found["fused"] = _fused(rank)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _ddp(rank: int) -> dict[str, Any]:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    # Each process draws another model: the first one's is sent to all, 4-bit codes included.
    model = DistributedDataParallel(build(seed=rank))
    names = {id(p): n for n, p in model.module.named_parameters()}
    sent: list[str] = []

    def average(group, bucket):  # DDP reads annotations, and would refuse strings
        sent.extend(names[id(p)] for p in bucket.parameters())
        return allreduce_hook(group, bucket)

    model.register_comm_hook(None, average)
    loss(model(share(rank))).backward()
    found = {
        "gradients": {n: p.grad for n, p in model.module.named_parameters()},
        "sent": list(sent),
    }
    train(model, share(rank), steps=2)
    return found | {"trained": model.module.state_dict()}


def _dropout(rank: int) -> dict[str, Tensor]:
    alone = build(dropout=0.5)
    model = DistributedDataParallel(alone)
    outputs = {}
    for name, run, seed in (
        ("same seed", model, 7),
        ("own seed", model, 8 + rank),
        ("alone", alone, 8 + rank),
    ):
        torch.manual_seed(seed)
        outputs[name] = run(batch()).detach()
    return outputs


def _fsdp(rank: int) -> dict[str, Any]:
    return {str(dtype): _fsdp_of(rank, dtype) for dtype in (torch.float32, torch.bfloat16)}


def _fsdp_of(rank: int, dtype: torch.dtype) -> dict[str, Any]:
    from torch.distributed.checkpoint import state_dict as dcp
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (RANKS,))
    model = build(dtype=dtype)
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss(model(share(rank, dtype))).backward()
    gradients = {n: p.grad.full_tensor() for n, p in adapters(model).items()}
    rows = model[0].lora_B.to_local().shape[0]
    train(model, share(rank, dtype), steps=3)

    full = dcp.StateDictOptions(full_state_dict=True)
    y = model(batch(dtype)).detach()
    trained, pieces = (
        {name: t.clone() for name, t in dcp.get_model_state_dict(model, options=options).items()}
        for options in (full, None)
    )
    restored = {}
    for name, state, options in (("full", trained, full), ("sharded", pieces, None)):
        with torch.no_grad():  # forget what is to come back
            for p in adapters(model).values():
                p.zero_()
            model[2].packed.zero_()
        dcp.set_model_state_dict(model, dict(state), options=options)
        restored[name] = model(batch(dtype)).detach()
    alone = build(seed=1, dtype=dtype)
    alone.load_state_dict(trained)
    restored["alone"] = alone(batch(dtype)).detach()
    return {
        "gradients": gradients,
        "rows": rows,
        "trained": trained,
        "y": y,
        "restored": restored,
    }


def _saved(rank: int, folder: Path) -> dict[str, Any]:
    """Adapters that are split: saved, loaded again, merged, and unloaded."""
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (RANKS,))
    found = {}
    for name, options in KINDS.items():
        model = adapted(**options)
        before = {n: t.clone() for n, t in model.state_dict().items()}
        for layer in model.children():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        outputs = {"split": model(inputs()).detach()}
        with disable_adapters(model):
            outputs["without"] = model(inputs()).detach()
        outputs["with again"] = model(inputs()).detach()
        save_adapter(model, folder / name)
        with torch.no_grad():
            for parameter in adapters(model).values():
                parameter.zero_()
        load_adapter(model, folder / name)
        outputs["loaded"] = model(inputs()).detach()
        merge_adapters(model)
        outputs["merged"] = model(inputs()).detach()
        unmerge_adapters(model)
        outputs["unmerged"] = model(inputs()).detach()
        try:
            save_adapter(model, folder / name / "adapter_config.json" / "below a file")
        except OSError as error:
            outputs["error"] = type(error).__name__
        merge_and_unload(model)
        outputs["unloaded"] = model(inputs()).detach()
        again = adapted(**options)
        for layer in again.children():
            fully_shard(layer, mesh=mesh)
        fully_shard(again, mesh=mesh)
        again(inputs())  # which gathers its weights once before layers go
        unload(again)
        outputs["off"] = again(inputs()).detach()
        found[name] = {"before": before, "outputs": outputs}
    return found


def attention(*, fuse: bool) -> Attention:
    torch.manual_seed(0)
    model = Attention()
    apply_lora(model, 4, 8, dropout=0.0)
    wake(model)
    if fuse:
        fuse_projections(model)
    return model


def _fused(rank: int) -> dict[str, dict[str, Any]]:
    """Gradients after the second step of a model whose projections run as one."""
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (RANKS,))
    x = projected()[rank::RANKS]
    ways = {
        "ddp": DistributedDataParallel(attention(fuse=True)),
        "fsdp": fully_shard(attention(fuse=True), mesh=mesh),
    }
    found = {}
    for name, model in ways.items():
        for _ in range(2):  # the second step finds DDP's buckets rebuilt
            model.zero_grad()
            loss(model(x)).backward()
        gradients = {n.removeprefix("module."): whole(p.grad) for n, p in adapters(model).items()}
        ran = [e.op for e in explain(model, x)]
        found[name] = {"gradients": gradients, "ran": ran}
    return found
