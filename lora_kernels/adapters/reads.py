"""Layers whose owner reads their weight instead of calling them: an adapter there has no effect.

They are found in the source code of the owner's forward and of the methods that it calls.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from lora_kernels.adapters.layer_kinds import kind_of
from lora_kernels.adapters.layers import unwrap
from lora_kernels.adapters.source import ANY, UNKNOWN, Path, method_tree, path_of, value_of

Tests = tuple[tuple[ast.expr, bool], ...]

_TENSORS = ("weight", "bias")
# Attributes of a weight that do not depend on its values.
_METADATA = {
    "device",
    "dtype",
    "element_size",
    "is_cuda",
    "is_meta",
    "itemsize",
    "layout",
    "nbytes",
}
_METADATA |= {"nbytes", "dim", "ndim", "numel", "requires_grad", "shape", "size", "stride"}
_ASKING = {"hasattr", "id", "isinstance", "type"}


@dataclass(frozen=True)
class Read:
    """How a layer's owner reads it.

    Attributes:
        reason: what reads it, for a message.
        only: the layer is never called. False if other code of the owner calls it.
    """

    reason: str
    only: bool


@dataclass(frozen=True)
class _Use:
    """One mention of an attribute in a method.

    Attributes:
        path: the attributes from the owner down to the child.
        kind: "weight" or "bias" if that tensor of the child is read, "call" if the child may be
            called.
        tests: (condition, its value when this code runs) of each branch around the mention.
        me: the method's name for the owner (`self`), which the conditions use.
    """

    path: Path
    kind: str
    tests: Tests
    me: str


def read_layers(model: nn.Module) -> dict[int, Read]:
    """The layers, by id, whose weight is read by the code of a module that holds them.

    Branches that the owner's attributes exclude (`if self.config.pretraining_tp > 1`) are ignored.
    """
    found: dict[int, Read] = {}
    for owner in model.modules():
        if isinstance(owner, nn.MultiheadAttention):
            reason = "nn.MultiheadAttention reads its weight without calling it"
            found[id(owner.out_proj)] = Read(reason, only=True)
        elif owner._modules:
            _add_reads(found, owner)
    return found


def read_only(module: nn.Module, reads: Mapping[int, Read]) -> str | None:
    """Why an adapter on this layer would have no effect; None if the layer is called.

    A 4-bit weight cannot be read as a matrix, so its layer always has to be called.
    """
    read = reads.get(id(module))
    if read is None or not (read.only or kind_of(module).four_bit):
        return None
    return read.reason


def _add_reads(found: dict[int, Read], owner: nn.Module) -> None:
    kinds: dict[int, dict[str, str]] = {}
    cls: Any = type(owner)
    seen, todo = {"forward"}, ["forward"]
    while todo:
        method = todo.pop()
        for use in _uses(cls, method):
            if _ruled_out(use, owner):
                continue
            name = use.path[0]
            if len(use.path) == 1 and inspect.isroutine(getattr(cls, name, None)):
                todo += [] if name in seen else [name]
                seen.add(name)
            for child in _children(owner, use.path):
                kinds.setdefault(id(child), {}).setdefault(use.kind, method)
    for child_id, uses in kinds.items():
        called = "call" in uses
        tensor = "weight" if "weight" in uses else "bias"
        if tensor not in uses or (tensor == "bias" and called):
            continue
        place = f"{type(owner).__name__}.{uses[tensor]}"
        if child_id not in found or found[child_id].only > (not called):
            found[child_id] = Read(f"{place} reads its {tensor} without calling it", not called)


def _children(owner: nn.Module, path: Path) -> list[nn.Module]:
    level = [owner]
    for part in path:
        inside = [item for module in level for item in unwrap(module)._modules.items()]
        level = [m for name, m in inside if m is not None and part in (name, ANY)]
    return [unwrap(child) for child in level]


@cache
def _uses(cls: type, method: str) -> tuple[_Use, ...]:
    """The mentions of the owner's attributes in a method; none if it has no source."""
    top = method_tree(cls, method)
    if top is None:
        return ()
    me = top.args.args[0].arg
    parents = {child: node for node in ast.walk(top) for child in ast.iter_child_nodes(node)}
    names = _names(top, me)
    uses = []
    for node in ast.walk(top):
        for begin in _begins(node, names, parents, me) if isinstance(node, ast.Name) else ():
            end, parts = _chain(node, parents)
            use = _use((*begin, *parts))
            if use and not _only_asked(end, parents) and not _names_alias(end, parents):
                uses.append(_Use(*use, tuple(_tests(end, parents)), me))
    return tuple(uses)


def _names(top: ast.AST, me: str) -> dict[str, list[Path]]:
    """Names that stand for the owner or for a child of it (`p = self.proj`)."""
    names: dict[str, list[Path]] = {me: [()]}
    for node in ast.walk(top):
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        if path := path_of(node.value, me):
            names.setdefault(node.targets[0].id, []).append(path)
    return names


def _begins(
    node: ast.Name, names: dict[str, list[Path]], parents: dict[ast.AST, ast.AST], me: str
) -> list[Path]:
    """The paths that a name may stand for here; inside `for p in self.list`, an entry of it."""
    below: ast.AST = node
    while (above := parents.get(below)) is not None:
        loops = [above] if isinstance(above, ast.For) else getattr(above, "generators", [])
        for loop in loops:
            if below is not loop.iter and getattr(loop.target, "id", None) == node.id:
                path = path_of(loop.iter, me)
                return [(*path, ANY)] if path and node is not loop.target else []
        below = above
    return names.get(node.id, [])


def _chain(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> tuple[ast.AST, Path]:
    """The longest `node.a.b[i]` around a name, and its parts."""
    parts: list[str] = []
    while True:
        above = parents.get(node)
        if isinstance(above, ast.Attribute):
            parts.append(above.attr)
        elif isinstance(above, ast.Subscript) and above.value is node:
            parts.append(ANY)
        else:
            return node, tuple(parts)
        node = above


def _use(parts: Path) -> tuple[Path, str] | None:
    """(path, kind) of a mention; None if it neither reads values nor calls."""
    for i, part in enumerate(parts):
        if i and part in _TENSORS:
            rest = parts[i + 1 :]
            return None if rest and rest[0] in _METADATA else (parts[:i], part)
    if parts and parts[-1] in ("forward", "__call__"):
        parts = parts[:-1]
    return (parts, "call") if parts else None


def _only_asked(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether this only asks about it (`is None`, isinstance), or assigns to it."""
    above = parents.get(node)
    if isinstance(above, ast.Compare):
        return all(isinstance(op, ast.Is | ast.IsNot) for op in above.ops)
    if isinstance(above, ast.Call) and isinstance(above.func, ast.Name) and above.func is not node:
        return above.func.id in _ASKING
    return not isinstance(getattr(node, "ctx", ast.Load()), ast.Load)


def _names_alias(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether this gives a child another name. Mentions of that name count instead."""
    above = parents.get(node)
    if isinstance(above, ast.Assign) and above.value is node:
        named = len(above.targets) == 1 and isinstance(above.targets[0], ast.Name)
        return named and isinstance(node, ast.Attribute) and node.attr not in _TENSORS
    return isinstance(above, ast.For | ast.comprehension) and above.iter is node


def _tests(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> Iterator[tuple[ast.expr, bool]]:
    while (above := parents.get(node)) is not None:
        if isinstance(above, ast.If):
            if node is not above.test:
                yield above.test, node in above.body
        elif isinstance(above, ast.IfExp) and node is not above.test:
            yield above.test, node is above.body
        node = above


def _ruled_out(use: _Use, owner: nn.Module) -> bool:
    # hasattr may change when layers are replaced (as for quantised models): it excludes calls only.
    for test, expected in use.tests:
        value = value_of(test, owner, use.me, asking=use.kind == "call")
        if value is not UNKNOWN and bool(value) != expected:
            return True
    return False
