"""Other packages, each through its public layers and with its own storage.

Every layer holds the same 4-bit bytes as ours, handed over in bitsandbytes' own state_dict form.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
from collections.abc import Callable, Sequence
from importlib.metadata import version
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import Case
from bench.data import CaseData, Projection
from bench.providers.base import BASE, FULL, Outputs, Prepared, Result, linear_call
from bench.providers.plain import plain_glu, torch_masks
from lora_kernels import NF4Weight
from lora_kernels.ops.gather import pages_of


def installed(module: str) -> Callable[[Case, torch.device], str | None]:
    """A refusal for when the package is not there."""

    def refuses(case: Case, device: torch.device) -> str | None:
        return None if importlib.util.find_spec(module) else f"{module} is not installed"

    return refuses


def frozen(w: Tensor) -> nn.Parameter:
    return nn.Parameter(w, requires_grad=False)


# ---------------------------------------------------------------------------- bitsandbytes


def bnb_layer(q: NF4Weight, bias: Tensor | None, dtype: torch.dtype) -> Any:
    """A Linear4bit over the tensors of `q` that computes in `dtype`."""
    import bitsandbytes as bnb

    n, k = q.shape
    layer = bnb.nn.Linear4bit(
        k,
        n,
        bias=bias is not None,
        compute_dtype=dtype,
        compress_statistics=q.is_nested,
        quant_type=q.quant_type,
        device="meta",
    )
    entries = q.state_dict_entries()
    layer.weight = bnb.nn.Params4bit.from_prequantized(
        entries.pop("weight"),
        {key.removeprefix("weight."): t for key, t in entries.items()},
        device=str(q.device),
        module=layer,
    )
    if bias is not None:
        layer.bias = frozen(bias)
    return layer


def bnb_layers(data: CaseData, *, evaluation: bool = False) -> list[list[Any]]:
    """Copies of the case's Linear4bit layers, each over its own copy of the bytes.

    In evaluation mode on a CPU the first call repacks a layer's weight in place, which must not be
    timed: the first copy is called here, and the others get copies of what it became.
    """
    biases = [p.bias for p in data.projections]
    copies = [
        [bnb_layer(q, bias, data.dtype) for q, bias in zip(weights, biases, strict=True)]
        for weights in data.quantised_layer_copies()
    ]
    if not evaluation:
        return copies
    with torch.no_grad():
        for first in copies[0]:
            first.eval()(data.x[0][:1])
    for layers in copies[1:]:
        for first, layer in zip(copies[0], layers, strict=True):
            layer.eval()
            layer.weight.data = first.weight.data.clone()
            layer.weight.quant_state = copy.deepcopy(first.weight.quant_state)
    return copies


def _each(layers: Sequence[nn.Module], x: Tensor) -> Result:
    y = tuple(layer(x) for layer in layers)
    return y if len(y) > 1 else y[0]


def bnb_eval_refuses(case: Case, device: torch.device) -> str | None:
    if case.backward:
        return "loses gradients after an evaluation on a CPU: forward only"
    return _bnb_refuses_width(case, device) or installed("bitsandbytes")(case, device)


def _bnb_refuses_width(case: Case, device: torch.device) -> str | None:
    odd = [layer.n for layer in case.layers if layer.n % 32]
    return f"needs N % 32 == 0 on a CPU, N = {odd[0]}" if odd and device.type == "cpu" else None


def bnb_eval(data: CaseData) -> Prepared:
    """The inference path, on weights that it has already repacked for itself."""
    copies = bnb_layers(data, evaluation=True)
    computes = BASE if data.case.has_adapter else FULL
    return linear_call(data, lambda i, x: _each(copies[i], x), len(copies), computes=computes)


def bnb_train(data: CaseData) -> Prepared:
    """The training path: gradients on, also where only the forward is timed."""
    copies = bnb_layers(data)  # in training mode
    if data.case.backward:
        return linear_call(
            data,
            lambda i, x: _each(copies[i], x),
            len(copies),
            parameters=[t for layers in copies for layer in layers for t in _bnb_tensors(layer)],
            computes=BASE if data.case.has_adapter else FULL,
        )
    leaves = [x.detach().requires_grad_() for x in data.x]
    by_input = {id(x): leaf for x, leaf in zip(data.x, leaves, strict=True)}
    return linear_call(data, lambda i, x: _each(copies[i], by_input[id(x)]), len(copies), grad=True)


def bnb_base(data: CaseData) -> Prepared:
    """The layer without its adapter: the inference path, or with gradients the training path."""
    return bnb_train(data) if data.case.backward else bnb_eval(data)


def bnb_base_refuses(case: Case, device: torch.device) -> str | None:
    width = None if case.backward else _bnb_refuses_width(case, device)
    return width or installed("bitsandbytes")(case, device)


def _bnb_tensors(layer: Any) -> list[Tensor]:
    state = layer.weight.quant_state
    tensors = [layer.weight.data, state.absmax, state.code]
    if state.nested:
        tensors += [state.state2.absmax, state.state2.code, state.offset]
    return tensors


def bnb_dequantize(data: CaseData) -> Prepared:
    import bitsandbytes.functional as bnbf

    layers = [layers[0] for layers in bnb_layers(data)]
    pairs = [(layer.weight.data, layer.weight.quant_state) for layer in layers]
    for _, state in pairs:
        state.dtype = data.dtype

    def call(i: int) -> Outputs:
        packed, state = pairs[i % len(pairs)]
        return {"w": bnbf.dequantize_4bit(packed, state)}

    return Prepared(call, len(pairs))


def bnb_quantize(data: CaseData) -> Prepared:
    import bitsandbytes.functional as bnbf

    case = data.case
    sources = data.source_copies

    def call(i: int) -> Outputs:
        packed, state = bnbf.quantize_4bit(
            sources[i % len(sources)],
            blocksize=case.block_size,
            compress_statistics=case.nested,
            quant_type=case.quant_type,
        )
        return {"packed": packed.view(-1), "absmax": state.absmax}

    return Prepared(call, len(sources))


# ------------------------------------------------------------------------------------ PEFT


def _peft_layer(data: CaseData, base: nn.Module, of: Projection) -> Any:
    """PEFT's layer over `base` with the values of the case's adapter. Each copy trains the same
    values; PEFT keeps them in fp32 unless told otherwise."""
    from peft import LoraConfig, inject_adapter_in_model

    case = data.case
    config = LoraConfig(
        r=case.r,
        lora_alpha=case.scale * case.r,  # type: ignore[arg-type]
        lora_dropout=case.dropout,
        target_modules=["proj"],
        use_dora=case.op == "dora_linear",
    )
    layer: Any = inject_adapter_in_model(config, nn.ModuleDict({"proj": base}))["proj"]

    def own(values: Tensor) -> nn.Parameter:
        return nn.Parameter(values.detach().clone(), requires_grad=case.backward)

    layer.lora_A["default"].weight, layer.lora_B["default"].weight = own(of.a), own(of.b)
    if case.op == "dora_linear":
        layer.lora_magnitude_vector["default"].weight = own(data.magnitude)
    return layer.train(case.backward)


def _peft(data: CaseData, bases: Sequence[Sequence[nn.Module]]) -> Prepared:
    """The case's op by PEFT's layers, one for each projection."""
    case = data.case
    copies = [
        [_peft_layer(data, base, p) for base, p in zip(layers, data.projections, strict=True)]
        for layers in bases
    ]

    def trained(i: int) -> dict[str, Tensor]:
        adapters = [(f.lora_A["default"].weight, f.lora_B["default"].weight) for f in copies[i]]
        tensors = [t for pair in adapters for t in pair]
        if case.op == "dora_linear":
            tensors.append(copies[i][0].lora_magnitude_vector["default"].weight)
        return dict(zip(data.trained, tensors, strict=True))

    def forward(i: int, x: Tensor) -> Result:
        if case.op == "lora_mlp":
            gate, up, down = copies[i]
            return down(plain_glu(gate(x), up(x)))
        y = tuple(layer(x) for layer in copies[i])
        return y if len(y) > 1 else y[0]

    parameters = [p for layers in copies for layer in layers for p in layer.parameters()]
    return linear_call(
        data,
        forward,
        len(copies),
        trained,
        parameters=parameters,
        masks=lambda: torch_masks(data, data.adapter_dtype),
    )


def linear_layer(w: Tensor, bias: Tensor | None) -> nn.Linear:
    n, k = w.shape
    layer = nn.Linear(k, n, bias=bias is not None, device="meta")
    layer.weight = frozen(w)
    if bias is not None:
        layer.bias = frozen(bias)
    return layer


def peft_dense(data: CaseData) -> Prepared:
    """PEFT over nn.Linear, the weights shared with the other dense providers."""
    biases = [p.bias for p in data.projections]
    return _peft(data, [list(map(linear_layer, copy, biases)) for copy in data.layer_copies])


def peft_mixed(data: CaseData) -> Prepared:
    """PEFT's batch of many adapters: a name for each row, the rows of an adapter one after the
    other."""
    from peft import LoraConfig, inject_adapter_in_model

    case, pages, weights = data.case, data.pages, data.dense_copies
    names = [f"s{slot}" if slot >= 0 else "__base__" for slot in data.slots.tolist()]
    layers = []
    for w in weights:
        layer: Any = linear_layer(w, data.bias)
        model = nn.ModuleDict({"proj": layer})
        for slot in sorted({int(name[1:]) for name in names if name != "__base__"} or {0}):
            rank = int(pages.ranks[slot])
            rows = pages.table[slot, : pages_of(rank)].long()
            config = LoraConfig(
                r=rank,
                lora_alpha=case.scale * rank,  # type: ignore[arg-type]
                target_modules=["proj"],
            )
            layer = inject_adapter_in_model(config, model, adapter_name=f"s{slot}")["proj"]
            a, b = (t[rows].flatten(0, 1)[:rank].clone() for t in (pages.a, pages.b))
            layer.lora_A[f"s{slot}"].weight = frozen(a)
            layer.lora_B[f"s{slot}"].weight = frozen(b.T.contiguous())
        layers.append(layer.eval())
    return linear_call(data, lambda i, x: layers[i](x, adapter_names=names), len(layers))


def peft_mixed_refuses(case: Case, device: torch.device) -> str | None:
    if case.backward:
        return "mixes adapters in inference alone"
    return installed("peft")(case, device)


def peft_bnb(data: CaseData) -> Prepared:
    """PEFT over bitsandbytes' Linear4bit: what QLoRA is today."""
    copies = bnb_layers(data, evaluation=not data.case.backward)
    state_tensors = [t for layers in copies for layer in layers for t in _bnb_tensors(layer)]
    prepared = _peft(data, copies)
    prepared.parameters = [*prepared.parameters, *state_tensors]
    return prepared


def peft_bnb_refuses(case: Case, device: torch.device) -> str | None:
    return installed("peft")(case, device) or bnb_base_refuses(case, device)


# --------------------------------------------------------------------------------- torchao


_TORCHAO_NF4 = (
    "torchao.quantization.quantize_.workflows.nf4.nf4_tensor",  # 0.18
    "torchao.dtypes.nf4tensor",
)


@functools.cache
def _torchao() -> ModuleType | None:
    """The module with torchao's NF4 tensor, which has moved; None where there is none."""
    for name in _TORCHAO_NF4:
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    return None


def torchao_refuses(case: Case, device: torch.device) -> str | None:
    if case.quant_type != "nf4" or not case.nested or case.block_size != 64:
        return "has one NF4 layout only: block size 64, nested"
    if (case.n * case.k // 64) % 256:
        return f"needs N·K to be a multiple of 16384, N·K = {case.n * case.k}"
    reason = installed("torchao")(case, device)
    if reason is None and _torchao() is None:
        reason = f"torchao {version('torchao')} has no NF4 tensor where it is known to have been"
    return reason


def torchao_nf4(data: CaseData) -> Prepared:
    """Its own format, quantised from the decoded weight, which it reproduces up to its scales."""
    nf4: Any = _torchao()
    copies = data.copies(data.quantised.nbytes)
    weights = [nf4.to_nf4(data.weight.clone(), 64, 256) for _ in range(copies)]
    bias = data.bias

    def forward(i: int, x: Tensor) -> Tensor:
        y = nf4.linear_nf4(x, weights[i])
        return y if bias is None else y + bias

    return linear_call(data, forward, copies, parameters=weights)
