"""The training loss of a transformers model without its logits."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn

from lora_kernels.functional import linear_cross_entropy
from lora_kernels.integrations.transformers import output_layer
from lora_kernels.nn.frozen_linear import is_short

# Causal language models whose forward is only: body, output layer, loss. Others also change the
# logits (soft caps, scales) or the loss (routers).
FUSED_LOSS_MODELS = frozenset(
    f"{family}ForCausalLM"
    for family in (
        *("Gemma", "Llama", "Ministral", "Mistral", "Olmo", "Olmo2", "Olmo3", "Phi3", "Qwen2"),
        *("Qwen3", "SmolLM3", "Starcoder2"),
    )
)


def fuse_loss(model: nn.Module) -> bool:
    """Compute a causal language model's training loss without its logits.

    When the model trains on labels, its output layer and its loss are computed by one
    `functional.linear_cross_entropy`. The loss is the same, and the output's `logits` are None.
    Nothing changes in evaluation mode, without labels, or while the output layer is not a plain
    `nn.Linear` (one with an adapter, a 4-bit one, one with hooks). The model's class and state are
    not changed; `del model.forward` undoes it.

    Args:
        model: a transformers model (of a PEFT model: `model.get_base_model()`).

    Returns:
        True if the loss is fused now. False, and nothing was changed, if the model's class is none
        of `FUSED_LOSS_MODELS`, its output layer is no plain `nn.Linear` without bias and hooks, or
        its `forward` or its loss is not transformers' own.

    Raises:
        TypeError: `model` is no module.

    Examples:
        >>> lk.fuse_loss(model)
        True
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> output = model.train()(input_ids=ids, labels=ids)
        >>> output.logits is None, output.loss.shape
        (True, torch.Size([]))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    own = vars(model).get("forward")
    if hasattr(own, "fuses_loss"):
        return True
    if type(model).__name__ not in FUSED_LOSS_MODELS or own is not None or not _fits(model):
        return False
    # A bound method is copied with the model by deepcopy; a closure over the model would not be.
    model.forward = MethodType(_fused(type(model).forward), model)  # type: ignore[method-assign]
    return True


def _fits(model: nn.Module) -> bool:
    """Whether `linear_cross_entropy` computes what the model now computes."""
    head, loss = output_layer(model), getattr(model, "loss_function", None)
    return (
        type(head) is nn.Linear
        and head.bias is None
        and not any(getattr(head, hooks) for hooks in _HOOKS)
        and ("forward" not in vars(head) or is_short(head))
        and getattr(loss, "__name__", None) == "ForCausalLMLoss"
    )


# Hooks that would see the output layer's input or output.
_HOOKS = (
    *("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"),
    "_forward_hooks_with_kwargs",
)


def _fused(unfused: Callable[..., Any]) -> Callable[..., Any]:
    """The class's forward, with the fused loss when it trains on labels."""

    names = list(inspect.signature(unfused).parameters)[1:]

    @functools.wraps(unfused)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False))
        twice = len(args) > len(given) or given.keys() & kwargs
        given |= kwargs
        labels = given.get("labels") is not None or given.get("shift_labels") is not None
        as_tuple = given.get("return_dict", self.config.return_dict) is False
        if twice or as_tuple or not labels or not self.training or not _fits(self):
            return unfused(self, *args, **kwargs)
        return _forward_with_loss(self, **given)

    forward.fuses_loss = True  # type: ignore[attr-defined]
    return forward


def _forward_with_loss(
    model: Any,
    *,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    logits_to_keep: int | Tensor = 0,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    **kwargs: Any,
) -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    outputs = getattr(model, model.base_model_prefix)(**kwargs)
    hidden = outputs.last_hidden_state
    if isinstance(logits_to_keep, Tensor):
        hidden = hidden[:, logits_to_keep]
    elif logits_to_keep > 0:
        hidden = hidden[:, -logits_to_keep:]
    if shift_labels is None:
        assert labels is not None
        shift_labels = nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
    loss = linear_cross_entropy(
        hidden,
        model.get_output_embeddings().weight,
        shift_labels.to(hidden.device).view(hidden.shape[:-1]),
        ignore_index=ignore_index,
        num_items=num_items_in_batch,
    )
    return CausalLMOutputWithPast(
        loss=loss,
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )
