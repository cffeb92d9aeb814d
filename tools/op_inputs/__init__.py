"""The one place where the arguments of an op are made, for tests, proofs and benchmarks.

A call is a small dataclass of sizes, dtype, kind of base and options (`Layer`, `Dora`, `Packed`,
`Glu`, `Codec`, `Gather`); a `Source` draws its tensors from a seed, `Hollow` only makes room.

    arguments("lora_linear_fwd", Layer((5, 24, 40, 3), dropout=0.1), Source(seed=0))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tools.op_inputs import dora, embedding, gather, glu, layer, packed
from tools.op_inputs.source import Source

MAKERS: dict[str, Callable[[Any, Source], tuple[Any, ...]]] = {
    "lora_linear_fwd": layer.lora_forward,
    "lora_linear_bwd": layer.lora_backward,
    "nf4_linear_fwd": layer.linear_forward,
    "nf4_linear_bwd": layer.linear_backward,
    "nf4_dequantize": layer.dequantize,
    "nf4_quantize": layer.quantize,
    "nf4_quantize_scales": layer.quantize_scales,
    "dora_norm": dora.norm,
    "dora_linear_fwd": dora.forward,
    "dora_linear_bwd": dora.backward,
    "lora_packed_fwd": packed.forward,
    "lora_packed_bwd": packed.backward,
    "glu_fwd": glu.forward,
    "glu_bwd": glu.backward,
    "gather_lora_fwd": gather.forward,
    "gather_lora_add": gather.add,
    "gather_lora_bwd": gather.backward,
    "gather_lora_embed_fwd": embedding.forward,
    "gather_lora_embed_add": embedding.add,
    "gather_lora_embed_bwd": embedding.backward,
}


def arguments(op: str, call: Any, source: Source) -> tuple[Any, ...]:
    """The op's positional arguments, as its schema names them."""
    return MAKERS[op](call, source)
