"""llama.cpp beside whole models: the same weights and adapters as GGUF, and its own decoding loop.

The 4-bit file is made by llama.cpp's own quantiser, so that it is what its users have.
"""

from __future__ import annotations

import ctypes
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench import memory
from bench.model_providers import B_STD, MODEL_PROVIDERS, ModelSpec, load_model

CHECKED = 8
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a parameter of transformers' Llama, `.weight` left on."""
    own = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }
    if name in own:
        return own[name]
    _, _, block, rest = name.split(".", 3)
    return f"blk.{block}.{NAMES[rest.removesuffix('.weight')]}.weight"


def heads_of(name: str, config: Any) -> int:
    """How many heads of rotated rows a tensor has; 0 where rows are in one order everywhere."""
    if ".q_proj." in name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if ".k_proj." in name else 0


def interleaved(t: Tensor, heads: int) -> Tensor:
    """Rows in llama.cpp's order, where the two halves of a rotation are neighbours."""
    if not heads:
        return t
    return t.view(heads, 2, -1, t.shape[1]).transpose(1, 2).reshape(t.shape)


def halves(t: Tensor, heads: int) -> Tensor:
    """The inverse of `interleaved`."""
    return t.view(heads, -1, 2, t.shape[1]).transpose(1, 2).reshape(t.shape) if heads else t


def write_model(model: Any, path: str) -> None:
    """The dense model in bf16, norms in fp32, without a tokenizer."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    bf16 = gguf.GGMLQuantizationType.BF16
    for name, t in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        values = t.float() if t.dim() == 1 else interleaved(t, heads_of(name, config)).float()
        if t.dim() == 1:
            writer.add_tensor(gguf_name(name), values.numpy())
        else:
            data = gguf.quants.quantize(values.numpy(), bf16)
            writer.add_tensor(gguf_name(name), data, raw_dtype=bf16)
    _write(writer)


def write_adapter(model: Any, spec: ModelSpec, path: str) -> None:
    """The values that `same_start` gives every provider's adapters."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(spec.alpha))
    generator = torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or name.endswith("lm_head"):
            continue
        n, k = module.weight.shape
        a = torch.randn(spec.r, k, generator=generator) * k**-0.5
        b = torch.randn(n, spec.r, generator=generator) * B_STD
        b = interleaved(b, heads_of(f"{name}.weight", model.config))
        for suffix, t in (("lora_a", a), ("lora_b", b)):
            writer.add_tensor(f"{gguf_name(f'{name}.weight')}.{suffix}", t.contiguous().numpy())
    _write(writer)


def _write(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantise(source: str, target: str) -> None:
    """llama.cpp's Q4_0."""
    import llama_cpp  # type: ignore[import-not-found]

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    status = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    if status:
        raise RuntimeError(f"llama_model_quantize ended with {status}")


def read_weights(path: str, config: Any) -> dict[str, Callable[[], Tensor]]:
    """By llama.cpp's names, functions that decode a matrix to fp32 in transformers' order."""
    import gguf

    def decoder(tensor: Any) -> Callable[[], Tensor]:
        def decode() -> Tensor:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
            of = heads.get(tensor.name.split(".")[-2], 0)
            return halves(torch.from_numpy(np.array(values)), of)

        return decode

    tensors = gguf.GGUFReader(path).tensors
    return {str(t.name): decoder(t) for t in tensors if len(t.shape) == 2}


class LlamaCpp:
    """The worker: see `bench.step_worker.Generate`, which does the same."""

    trainable = 0

    def __init__(self, provider: str, spec: ModelSpec) -> None:
        import llama_cpp  # type: ignore[import-not-found]

        self.spec, self.provider = spec, MODEL_PROVIDERS[provider]
        self._folder = tempfile.TemporaryDirectory()  # for as long as the worker lives
        dense, small, adapter = (
            str(Path(self._folder.name) / name) for name in ("bf16.gguf", "q4_0.gguf", "lora.gguf")
        )
        model = load_model(spec, torch.device("cpu"))
        vocabulary = model.config.vocab_size
        write_model(model, dense)
        if self.provider.adapted:
            write_adapter(model, spec, adapter)
        del model
        if self.provider.quantised:
            quantise(dense, small)
        self.file = small if self.provider.quantised else dense
        self.llama = llama_cpp.Llama(
            self.file,
            n_ctx=max(512, spec.prompt + spec.tokens + 1),
            n_threads=torch.get_num_threads(),
            n_threads_batch=torch.get_num_threads(),
            lora_path=adapter if self.provider.adapted else None,
            verbose=False,
        )
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(vocabulary, (1, spec.prompt), generator=generator)[0].tolist()

    def step(self) -> dict[str, Any]:
        start = time.perf_counter()
        self.llama.reset()
        made = list(itertools.islice(self._greedy(), self.spec.tokens))
        return {"seconds": time.perf_counter() - start, "made": len(made)}

    def _greedy(self) -> Iterator[int]:
        found = self.llama.generate(self.tokens, top_k=1, temp=0.0, repeat_penalty=1.0)
        return found  # type: ignore[no-any-return]

    def check(self, path: str) -> dict[str, Any]:
        """The 4-bit file is not the other providers' 4 bits: the oracle reads it."""
        tokens, rows = list(self.tokens), []
        self.llama.reset()
        self.llama.eval(tokens)
        for _ in range(min(CHECKED, self.spec.tokens)):
            rows.append(torch.from_numpy(self._logits().copy()))
            tokens.append(int(rows[-1].argmax()))
            self.llama.eval(tokens[-1:])
        torch.save(torch.stack(rows).to(torch.bfloat16), path)
        weights = self.file if self.provider.quantised else None
        return {"tokens": tokens[:-1], "first": self.spec.prompt - 1, "weights": weights}

    def _logits(self) -> Any:
        import llama_cpp  # type: ignore[import-not-found]

        size = self.llama.n_vocab()
        pointer = llama_cpp.llama_get_logits_ith(self.llama.ctx, -1)
        return np.ctypeslib.as_array(pointer, shape=(size,))

    def memory(self) -> dict[str, Any]:
        return memory.of_process(self.step)
