"""Children of a module that its code calls with one and the same variable.

They are found in the source code of the module's forward and of the methods that it calls. Run time
would tell as well, but differently in a forward and in its repetition by checkpointing.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from lora_kernels.adapters.source import UNKNOWN, method_tree, value_of
from lora_kernels.nn.fused import Group

# Around a call: the condition (None of a loop or the like), what tells the branch apart from others
# in the method, and the condition's value when the call runs.
Branch = tuple[ast.expr | None, tuple[int, str], bool]

_BRANCHES = (
    *(ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.ExceptHandler),
    *(ast.match_case, ast.BoolOp, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp),
    *(ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda),
)


@dataclass(frozen=True)
class _Call:
    """`self.child(variable)`.

    Attributes:
        value: tells the variable's values in the method apart: one, until it is assigned to, or
            until something is written in place, which may be a part of it.
        branches: the branches around the call, the outermost first.
        me: the method's name for the owner (`self`).
    """

    child: str
    variable: str
    value: tuple[int, int]
    branches: tuple[Branch, ...]
    me: str


def sibling_groups(owner: nn.Module) -> tuple[Group, ...]:
    """Names of children that are called with one variable, nothing written to it in between, in the
    order of their calls; a child is in one group at most.

    Branches that the owner's attributes decide (`if self.is_shared:`) are taken as decided.
    """
    cls: Any = type(owner)
    groups: dict[Any, list[str]] = {}
    for method in _methods(cls):
        for call in _calls(cls, method) or ():
            branches = _undecided(call, owner)
            if branches is not None and call.child in owner._modules:
                key = (method, call.variable, call.value, branches)
                groups.setdefault(key, []).append(call.child)
    found: list[Group] = []
    taken: set[str] = set()
    for names in sorted(groups.values(), key=len, reverse=True):
        group = tuple(dict.fromkeys(name for name in names if name not in taken))
        if len(group) > 1:
            found.append(group)
            taken |= {*group}
    return tuple(found)


def can_be_read(owner: nn.Module) -> bool:
    """Whether the source code of the owner's forward is there."""
    cls: Any = type(owner)
    return method_tree(cls, "forward") is not None


def _undecided(call: _Call, owner: nn.Module) -> tuple[Any, ...] | None:
    """The branches around a call that may be taken or not; None if one of them is not taken."""
    left = []
    for test, where, expected in call.branches:
        value = UNKNOWN if test is None else value_of(test, owner, call.me, asking=True)
        if value is UNKNOWN:
            left.append(where)
        elif bool(value) != expected:
            return None
    return tuple(left)


def _methods(cls: Any) -> list[str]:
    """forward, and the methods that it calls, directly or not."""
    todo, seen = ["forward"], ["forward"]
    while todo:
        method = todo.pop()
        tree = method_tree(cls, method)
        for node in ast.walk(tree) if tree is not None else ():
            name = _attribute_of(node, _me(tree)) if isinstance(node, ast.Attribute) else None
            if name and name not in seen and inspect.isroutine(getattr(cls, name, None)):
                todo.append(name)
                seen.append(name)
    return seen


def _me(tree: Any) -> str:
    return tree.args.args[0].arg


def _attribute_of(node: ast.expr, me: str) -> str | None:
    """`name` of the expression `self.name`; None of any other."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == me:
        return node.attr
    return None


@cache
def _calls(cls: type, method: str) -> tuple[_Call, ...] | None:
    """The calls of children in a method, in the order in which they run; None without a source."""
    top = method_tree(cls, method)
    if top is None:
        return None
    me = _me(top)
    parents = {child: node for node in ast.walk(top) for child in ast.iter_child_nodes(node)}
    # (where it happens, what): a name that is assigned to, a write in place (""), or a call.
    events: list[tuple[tuple[int, int], str | ast.Call]] = []
    for node in ast.walk(top):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
            events.append((_stored_at(node, parents), node.id))
        elif _writes_in_place(node):
            events.append((_end(node), ""))
        elif isinstance(node, ast.Call) and _is_call(node, me):
            events.append((_end(node), node))
    calls: list[_Call] = []
    bound: dict[str, int] = {}
    writes = 0
    for at, (_, event) in enumerate(sorted(events, key=_order)):
        if event == "":
            writes += 1
        elif isinstance(event, str):
            bound[event] = at
        else:
            child, variable = event.func.attr, event.args[0].id  # type: ignore[attr-defined]
            value = (bound.get(variable, -1), writes)
            branches = tuple(_branches(event, parents))[::-1]
            calls.append(_Call(child, variable, value, branches, me))
    return tuple(calls)


def _order(event: tuple[tuple[int, int], str | ast.Call]) -> Any:
    """By place; a call before the assignment of its result, which ends where it ends."""
    return event[0], isinstance(event[1], str)


def _is_call(node: ast.Call, me: str) -> bool:
    one = len(node.args) == 1 and not node.keywords and isinstance(node.args[0], ast.Name)
    return one and _attribute_of(node.func, me) is not None


def _end(node: Any) -> tuple[int, int]:
    return node.end_lineno, node.end_col_offset


def _stored_at(node: ast.Name, parents: dict[ast.AST, ast.AST]) -> tuple[int, int]:
    """Where a name gets its value: after the statement that assigns to it."""
    above: Any = node
    while above is not None and not isinstance(above, ast.Assign | ast.AnnAssign | ast.AugAssign):
        above = parents.get(above)
    return _end(node if above is None else above)


def _writes_in_place(node: ast.AST) -> bool:
    """Whether this may write to a tensor in place: `x += y`, `x[i] = y`, `x.add_(y)`, `out=x`."""
    if isinstance(node, ast.AugAssign):
        return True
    if isinstance(node, ast.Subscript | ast.Attribute) and not isinstance(node.ctx, ast.Load):
        return isinstance(node, ast.Subscript) or node.attr == "data"
    if isinstance(node, ast.Call):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        return (name.endswith("_") and not name.endswith("__")) or any(
            keyword.arg in ("out", "inplace") for keyword in node.keywords
        )
    return False


def _branches(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> Iterator[Branch]:
    """The branches around a node, the innermost first."""
    while (above := parents.get(node)) is not None and above in parents:
        part = _part(above, node)
        if isinstance(above, ast.If | ast.IfExp):
            if part != "test":
                yield above.test, (id(above), part), part == "body"
        elif isinstance(above, _BRANCHES):
            yield None, (id(above), part), True
        node = above


def _part(above: ast.AST, node: ast.AST) -> str:
    """The field of `above` that holds `node`."""
    fields = ast.iter_fields(above)
    return next(name for name, of in fields if of is node or (isinstance(of, list) and node in of))
