"""The source code of a model's modules, read for what it does with their children."""

from __future__ import annotations

import ast
import inspect
import operator
import textwrap
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

Path = tuple[str, ...]

ANY = "*"  # a subscript, such as layers[i]
UNKNOWN = object()
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


@cache
def method_tree(cls: type, method: str) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """The syntax tree of a method; None if it has no source, or no `self`."""
    function = inspect.unwrap(getattr(cls, method))
    # torch's own classes are known, and most have no child.
    if not inspect.isfunction(function) or (function.__module__ or "").split(".")[0] == "torch":
        return None
    try:
        top = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    if not isinstance(top, ast.FunctionDef | ast.AsyncFunctionDef) or not top.args.args:
        return None
    return top


def path_of(node: ast.expr, me: str) -> Path | None:
    """The parts of an expression such as `self.a.b[i]`; None for any other kind."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute | ast.Subscript):
        parts.insert(0, node.attr if isinstance(node, ast.Attribute) else ANY)
        node = node.value
    return tuple(parts) if isinstance(node, ast.Name) and node.id == me else None


def value_of(node: ast.expr, owner: nn.Module, me: str, *, asking: bool) -> Any:
    """The value of a condition on the owner's plain attributes; `UNKNOWN` if it may change."""

    def inner(part: ast.expr) -> Any:
        return value_of(part, owner, me, asking=asking)

    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Attribute):
        found = _attribute(owner, path_of(node, me))
        plain = found is None or isinstance(found, bool | int | float | str)
        return found if plain else UNKNOWN
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        value = inner(node.operand)
        return value if value is UNKNOWN else not value
    if isinstance(node, ast.BoolOp):
        values = [inner(part) for part in node.values]
        decides = isinstance(node.op, ast.Or)
        if any(v is not UNKNOWN and bool(v) == decides for v in values):
            return decides
        return UNKNOWN if UNKNOWN in values else not decides
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARE:
        values = [inner(node.left), inner(node.comparators[0])]
        if UNKNOWN in values:
            return UNKNOWN
        try:
            return bool(_COMPARE[type(node.ops[0])](*values))
        except TypeError:
            return UNKNOWN
    if asking and isinstance(node, ast.Call) and getattr(node.func, "id", None) == "hasattr":
        found, name = _attribute(owner, path_of(node.args[0], me)), inner(node.args[1])
        return UNKNOWN if UNKNOWN in (found, name) else hasattr(found, name)
    return UNKNOWN


def _attribute(owner: nn.Module, path: Path | None) -> Any:
    if not path or ANY in path or "training" in path:
        return UNKNOWN
    try:
        return operator.attrgetter(".".join(path))(owner)
    except Exception:  # a property of the model may raise anything
        return UNKNOWN
