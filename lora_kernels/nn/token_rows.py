"""Training some rows of an embedding or an output layer while all others stay frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

from lora_kernels.nn.common import check_linear_layer
from lora_kernels.nn.frozen_linear import is_short, restore

DELTA = "trainable_tokens_delta"
_INDICES, _ROW_OF = "token_indices", "_row_of_token"


class TokenRows(nn.Module):
    """An embedding or an output layer with a parameter for some of its rows.

    The weight does not change. `trainable_tokens_delta` [n, D] holds the values of the rows
    `token_indices` [n] (the values themselves, whatever PEFT's name for it says). `train_rows`
    makes a module one of these in place, so hooks, ties and state-dict keys stay.

    Attributes:
        adapter_enabled: False computes with the weight alone.
    """

    weight: Tensor
    trainable_tokens_delta: Parameter
    token_indices: Tensor
    adapter_enabled: bool
    _plain: type[nn.Module]
    _tokens: tuple[int, ...]

    @property
    def trained_tokens(self) -> tuple[int, ...]:
        """The tokens whose rows train, known on the host."""
        return self._tokens

    def rows(self) -> Tensor:
        """The rows in the weight's dtype."""
        return self.trainable_tokens_delta.to(self.weight.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> TokenRows:
        before = self.token_indices.device
        super()._apply(fn, recurse)
        if before != self.token_indices.device:  # to_empty does not keep their values
            _index(self, self._tokens)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, trainable_tokens={self.token_indices.numel()}"

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state, prefix, *args)
        if prefix + DELTA not in state:  # a checkpoint of the plain layer
            missing: list[str] = args[2]
            missing[:] = [key for key in missing if key != prefix + DELTA]


class TokenEmbedding(TokenRows, nn.Embedding):
    """`nn.Embedding` some of whose rows train."""

    def forward(self, input: Tensor) -> Tensor:
        y = nn.Embedding.forward(self, input)
        if not self.adapter_enabled:
            return y
        row = self._row_of_each()[input]
        return torch.where((row >= 0)[..., None], F.embedding(row.clamp_min(0), self._rows()), y)

    def _row_of_each(self) -> Tensor:
        """[V], for each token its row in `trainable_tokens_delta`, −1 for none."""
        row_of: Tensor = getattr(self, _ROW_OF)
        if len(row_of) != len(self.weight):  # the vocabulary was resized
            row_of = _row_of(self.token_indices, len(self.weight))
            setattr(self, _ROW_OF, row_of)
        return row_of

    def _rows(self) -> Tensor:
        """The rows. The padding token's gets no gradient, as in nn.Embedding."""
        rows = self.rows()
        if self.padding_idx is None:
            return rows
        padding = (self.token_indices == self.padding_idx)[:, None]
        return torch.where(padding, rows.detach(), rows)


class TokenLinear(TokenRows, nn.Linear):
    """`nn.Linear` some of whose weight's rows train."""

    def forward(self, input: Tensor) -> Tensor:
        y = nn.Linear.forward(self, input)
        if not self.adapter_enabled:
            return y
        bias = None if self.bias is None else self.bias[self.token_indices]
        return y.index_copy(-1, self.token_indices, F.linear(input, self.rows(), bias))


def check_rows(name: str, module: nn.Module, tokens: Sequence[int]) -> None:
    """Raise unless these rows of the module can train by themselves."""
    kind = type(module).__name__
    if isinstance(module, TokenRows):
        raise ValueError(f"trainable_token_indices: {name} has such rows already")
    if isinstance(module, nn.Linear):
        try:
            check_linear_layer(module)
        except (TypeError, ValueError) as error:
            raise type(error)(f"trainable_token_indices: {name}: {error}") from error
        count = module.out_features
    elif isinstance(module, nn.Embedding):
        count = module.num_embeddings
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(module, option):
                raise ValueError(
                    f"trainable_token_indices: {name} has {option}={getattr(module, option)!r}, "
                    "which is not supported"
                )
    else:
        raise TypeError(
            f"trainable_token_indices: {name} is a {kind}, expected torch.nn.Embedding or, for an "
            "output layer, torch.nn.Linear"
        )
    if max(tokens) >= count:
        raise ValueError(
            f"trainable_token_indices: got {max(tokens)}, but {name} has {count} rows; "
            "model.resize_token_embeddings makes more"
        )
    if "forward" in vars(module) and not is_short(module):
        raise TypeError(
            f"trainable_token_indices: {name} has a forward that is set on the instance, expected "
            "the class's own"
        )
    if type(module) not in (nn.Linear, nn.Embedding) and not _calls_embedding(module):
        raise TypeError(
            f"trainable_token_indices: {name} is a {kind}, whose forward does not go through that "
            "of torch.nn.Embedding"
        )


def _calls_embedding(module: nn.Module) -> bool:
    """Whether the module's forward calls nn.Embedding's (most such classes scale its result)."""
    before, reached = module.__class__, list[bool]()

    class Probe(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            reached.append(True)
            return nn.Embedding.forward(self, input)

    try:
        module.__class__ = type(before.__name__, (before, Probe), {})
        with torch.no_grad():
            made: Any = module
            made.forward(torch.zeros(1, dtype=torch.int64, device=made.weight.device))
    finally:
        module.__class__ = before
    return bool(reached)


def _class_of(plain: type[nn.Module]) -> type[nn.Module]:
    """The class with trainable rows for a plain class."""
    if plain is nn.Embedding:
        return TokenEmbedding
    if plain is nn.Linear:
        return TokenLinear
    # A super().forward() in the plain class reaches TokenEmbedding's forward.
    return type(f"Token{plain.__name__}", (plain, TokenEmbedding), {"__module__": plain.__module__})


def train_rows(
    module: nn.Module,
    tokens: Sequence[int],
    *,
    dtype: torch.dtype,
    shared: TokenRows | None = None,
) -> TokenRows:
    """Give a checked module trainable rows: its own, or those of `shared`."""
    restore(module)  # the class's forward is the one that sees the rows
    made: Any = module
    weight: Tensor = made.weight
    made._plain = type(module)
    made.__class__ = _class_of(type(module))
    made.adapter_enabled = True
    if shared is not None:
        delta = shared.trainable_tokens_delta
    else:
        index = torch.tensor(tokens, device=weight.device)
        delta = Parameter(weight.detach()[index].to(dtype, copy=True))
    made.register_parameter(DELTA, delta)
    _index(made, tuple(tokens))
    return made


def _index(module: TokenRows, tokens: tuple[int, ...]) -> None:
    """Register the buffers that say which rows train."""
    module._tokens = tokens
    indices = torch.tensor(tokens, device=module.weight.device)
    module.register_buffer(_INDICES, indices, persistent=False)
    if isinstance(module, nn.Embedding):
        row_of = _row_of(indices, len(module.weight))
        module.register_buffer(_ROW_OF, row_of, persistent=False)


def _row_of(indices: Tensor, count: int) -> Tensor:
    row_of = torch.full((count,), -1, device=indices.device)
    row_of[indices] = torch.arange(len(indices), device=indices.device)
    return row_of


def drop_rows(module: TokenRows) -> None:
    """Make it a plain module again; its weight never changed."""
    plain: Any = module
    del plain._parameters[DELTA]
    for name in (_INDICES, _ROW_OF):
        plain._buffers.pop(name, None)
        plain._non_persistent_buffers_set.discard(name)
    plain.__class__ = plain._plain
    del plain._plain, plain._tokens, plain.adapter_enabled
