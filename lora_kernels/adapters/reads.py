"""Layers whose owner reads their weight instead of calling them: an adapter there has no effect.

They are found in the source code of the owner's forward and of the methods that it calls.
"""

from __future__ import annotations

import ast
import inspect
import operator
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from lora_kernels.adapters.layer_kinds import kind_of
from lora_kernels.adapters.layers import unwrap

Path = tuple[str, ...]
Tests = tuple[tuple[ast.expr, bool], ...]

_TENSORS = ("weight", "bias")
_ANY = "*"  # a subscript, such as layers[i]
_UNKNOWN = object()
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
_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}


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
        level = [m for name, m in inside if m is not None and part in (name, _ANY)]
    return [unwrap(child) for child in level]


@cache
def _uses(cls: type, method: str) -> tuple[_Use, ...]:
    """The mentions of the owner's attributes in a method; none if it has no source."""
    function = inspect.unwrap(getattr(cls, method))
    # torch's own classes are known, and most have no child.
    if not inspect.isfunction(function) or function.__module__.split(".")[0] == "torch":
        return ()
    try:
        top = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return ()
    if not isinstance(top, ast.FunctionDef | ast.AsyncFunctionDef) or not top.args.args:
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
        if path := _path_of(node.value, me):
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
                path = _path_of(loop.iter, me)
                return [(*path, _ANY)] if path and node is not loop.target else []
        below = above
    return names.get(node.id, [])


def _path_of(node: ast.expr, me: str) -> Path | None:
    """The parts of an expression such as `self.a.b[i]`; None for any other kind."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute | ast.Subscript):
        parts.insert(0, node.attr if isinstance(node, ast.Attribute) else _ANY)
        node = node.value
    return tuple(parts) if isinstance(node, ast.Name) and node.id == me else None


def _chain(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> tuple[ast.AST, Path]:
    """The longest `node.a.b[i]` around a name, and its parts."""
    parts: list[str] = []
    while True:
        above = parents.get(node)
        if isinstance(above, ast.Attribute):
            parts.append(above.attr)
        elif isinstance(above, ast.Subscript) and above.value is node:
            parts.append(_ANY)
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
        value = _value(test, owner, use.me, asking=use.kind == "call")
        if value is not _UNKNOWN and bool(value) != expected:
            return True
    return False


def _value(node: ast.expr, owner: nn.Module, me: str, *, asking: bool) -> Any:
    """The value of a condition on the owner's plain attributes; `_UNKNOWN` if it may change."""

    def value_of(part: ast.expr) -> Any:
        return _value(part, owner, me, asking=asking)

    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Attribute):
        found = _attribute(owner, _path_of(node, me))
        plain = found is None or isinstance(found, bool | int | float | str)
        return found if plain else _UNKNOWN
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        value = value_of(node.operand)
        return value if value is _UNKNOWN else not value
    if isinstance(node, ast.BoolOp):
        values = [value_of(part) for part in node.values]
        decides = isinstance(node.op, ast.Or)
        if any(v is not _UNKNOWN and bool(v) == decides for v in values):
            return decides
        return _UNKNOWN if _UNKNOWN in values else not decides
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARE:
        values = [value_of(node.left), value_of(node.comparators[0])]
        if _UNKNOWN in values:
            return _UNKNOWN
        try:
            return bool(_COMPARE[type(node.ops[0])](*values))
        except TypeError:
            return _UNKNOWN
    if asking and isinstance(node, ast.Call) and getattr(node.func, "id", None) == "hasattr":
        found, name = _attribute(owner, _path_of(node.args[0], me)), value_of(node.args[1])
        return _UNKNOWN if _UNKNOWN in (found, name) else hasattr(found, name)
    return _UNKNOWN


def _attribute(owner: nn.Module, path: Path | None) -> Any:
    if not path or _ANY in path or "training" in path:
        return _UNKNOWN
    try:
        return operator.attrgetter(".".join(path))(owner)
    except Exception:  # a property of the model may raise anything
        return _UNKNOWN
