"""compile_decoding: one graph for a token of transformers' `generate`.

Of a small model a token takes the kernels less time than Python and torch's dispatcher take around
them, which `torch.compile` saves. Three things stand between that and its use in `generate`:

* The prompt has another length at every call, and each would be compiled anew. So it runs as
  before, and only what follows, one token a sequence, runs in the graph.
* The key-value cache must keep its size: transformers' static cache.
* Before each token torch checks all that it read of the modules while it traced them, thousands of
  values that do not change. Here it checks what can change a result: the tensors that come in, the
  switches of adapters, the kind of each layer of this package (whose ops check their weights), and
  shape and dtype of all other weights.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

from lora_kernels.nn.lora import LoRAMixin
from lora_kernels.nn.nf4_linear import NF4Linear

# What a layer of this package decides by, as torch names its sources.
_SWITCHES = (".training", ".adapter_enabled", "._scale", ".in_group", "._buffers['_merged_weight']")
_MODULE = re.compile(r"((?:\._modules\['[^']*'\])+)(.*)")


class CompiledDecoding:
    """The forward of one model, set on the instance: compiled for one token a sequence over a
    static cache, the model's own for everything else. It does not keep the model alive, is copied
    with it, and pickled."""

    def __init__(self, model: nn.Module, backend: str, before: Any = None) -> None:
        self._model, self._own, self._backend = weakref.ref(model), type(model).forward, backend
        self.before = before  # the forward that was on the instance: `fuse_loss`'s
        parameters = list(inspect.signature(self._own).parameters.values())[1:]
        self.__signature__ = inspect.Signature(parameters)  # `generate` reads it
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self._model()
        if torch.compiler.is_compiling() or not _is_decoding(args, kwargs):
            if self.before is not None:
                return self.before(*args, **kwargs)
            return self._own(model, *args, **kwargs)
        if self._compiled is None:
            keep = functools.partial(_guards, frozenset(_chains(model)))
            options: dict[str, Any] = {"guard_filter_fn": keep}
            if self._backend == "inductor":
                # The graph's own checks of sizes, which the guards and our ops make already.
                options |= {"size_asserts": False, "alignment_asserts": False}
            self._compiled = torch.compile(
                self._own, dynamic=False, backend=self._backend, options=options
            )
        return self._compiled(model, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledDecoding:
        model: Any = self._model()
        of = memo.get(id(model), model)
        return CompiledDecoding(of, self._backend, copy.deepcopy(self.before, memo))

    def __reduce__(self) -> Any:
        return CompiledDecoding, (self._model(), self._backend, self.before)


def _is_decoding(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call is for one token a sequence, outside autograd, over a cache of fixed size."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    cache = kwargs.get("past_key_values")
    return (
        isinstance(ids, torch.Tensor)
        and ids.dim() == 2
        and ids.shape[1] == 1
        and not torch.is_grad_enabled()
        and bool(getattr(cache, "is_compileable", False))
        and cache.get_seq_length() > 0  # type: ignore[union-attr]
    )


def _chains(model: nn.Module) -> list[str]:
    """The layers of this package, as torch names the way to them from the model."""
    return [
        "".join(f"._modules['{part}']" for part in name.split("."))
        for name, module in model.named_modules()
        if isinstance(module, LoRAMixin | NF4Linear)
    ]


def _guards(layers: Collection[str], entries: Sequence[Any]) -> list[bool]:
    """Which guards of a graph torch keeps (its `guard_filter_fn`)."""
    return [_is_kept(layers, e) for e in entries]


def _is_kept(layers: Collection[str], entry: Any) -> bool:
    if not entry.orig_guard.source.is_unspecialized_nn_module():
        return True
    found = _MODULE.search(entry.name)
    ours = found is not None and found[1] in layers
    if not ours:
        return bool(entry.guard_type == "TENSOR_MATCH") or entry.name.endswith(".training")
    assert found is not None
    return found[2] in _SWITCHES or (found[2] == "" and entry.guard_type == "TYPE_MATCH")


def compile_decoding(model: Any, *, backend: str = "inductor") -> None:
    """Compile what `model.generate` does for each token after the prompt.

    Sets `cache_implementation="static"` in the model's generation configuration, and a forward on
    the model that runs such tokens in a graph of `torch.compile`. The first of them takes the time
    to make it, a minute or two for a small model on two cores; it is made again for another batch
    size and for a longer cache (set `model.generation_config.max_cache_len` to the longest that you
    need). Prompts of any length, training and calls without a static cache run as before.
    Parameters, state dict and results stay as they are, results but for torch.compile's rounding.

    A graph sees new values of weights, adapters that are switched off, merged or scaled otherwise,
    and layers of this package that were replaced. Call it again after other changes of the model,
    such as new hooks. `uncompile_decoding` undoes it.

    Args:
        model: a language model of transformers, adapted or not, or PEFT's model around one.
        backend: of `torch.compile`.

    Raises:
        TypeError: the model has no `generate`, or a forward of its own on the instance.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128,
        ...     num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
        >>> llama = LlamaForCausalLM(config).eval()
        >>> _ = lk.apply_lora(llama, r=8)
        >>> lk.compile_decoding(llama, backend="eager")
        >>> llama.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, eos_token_id=None).shape
        torch.Size([1, 7])
    """
    model = _generating(model)
    uncompile_decoding(model)
    before = vars(model).get("forward")
    if before is not None and not getattr(before, "fuses_loss", False):
        raise TypeError(
            f"model: its forward was replaced on the instance by {before!r}, expected the class's "
            "own, or fuse_loss's"
        )
    model.generation_config.cache_implementation = "static"
    model.forward = CompiledDecoding(model, backend, before)


def uncompile_decoding(model: Any) -> None:
    """Undo `compile_decoding`; nothing happens to a model without it.

    Examples:
        >>> lk.uncompile_decoding(model)
    """
    model = _generating(model)
    if isinstance(vars(model).get("forward"), CompiledDecoding):
        before = model.forward.before
        del model.forward
        if before is not None:
            model.forward = before
        model.generation_config.cache_implementation = None


def _generating(model: Any) -> Any:
    """The model itself, out of PEFT's around it."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not (isinstance(inner, nn.Module) and hasattr(inner, "generate")):
        raise TypeError(
            f"model: got {type(model).__name__}, expected a model of transformers with `generate`"
        )
    return inner
