"""Which children a module's code calls with one variable."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_kernels.adapters.siblings import can_be_read, sibling_groups


class Base(nn.Module):
    def __init__(self, shared=False):
        super().__init__()
        self.shared = shared
        for name in "abcd":
            self.add_module(name, nn.Linear(4, 4))


class OneExpression(Base):
    def forward(self, x):
        return self.d(torch.relu(self.a(x)) * self.b(x)) + self.c(x + 1)


class Assigned(Base):
    def forward(self, x):
        y = self.a(x)
        x = self.b(x)
        return y, self.c(x), self.d(x)


class Written(Base):
    def forward(self, x, i):
        y = self.a(x), self.b(x)
        x[i] = 0
        return y, self.c(x), self.d(x)


class WrittenByMethod(Base):
    def forward(self, x):
        y = self.a(x)
        y.view(-1).add_(1)
        return y, self.b(x), self.c(x)


class WrittenOut(Base):
    def forward(self, x):
        y = self.a(x)
        torch.mul(x, 2, out=x)
        return y, self.b(x)


class AddedTo(Base):
    def forward(self, x):
        y = self.a(x)
        x += 1
        return y, self.b(x)


class Branch(Base):
    def forward(self, x, other=None):
        if other is None:
            other = x
        a = self.a(x)
        if a.sum() > 0:
            return a, self.b(x), self.c(x)
        return a, self.d(x)


class Decided(Base):
    def forward(self, x):
        a = self.a(x)
        if self.shared:
            return a
        b = None if self.shared else self.b(x)
        return a, b, self.c(x)


class Loops(Base):
    def forward(self, x):
        for x in list(x):  # noqa: B020
            y = self.a(x), self.b(x)
        return y, [self.c(x) for x in y], (lambda x: self.d(x))(x), y and self.d(x)


class Helper(Base):
    def forward(self, x):
        return self.project(x)

    def project(self, x):
        return self.b(x), self.a(x)

    def never(self, x):
        return self.c(x), self.d(x)


class BothWays(Base):
    def forward(self, x, cached=False):
        if cached:
            return self.a(x), self.b(x)
        return self.a(x), self.b(x), self.c(x)


class OtherCalls(Base):
    def forward(self, x):
        return self.a(x, 1), self.b(input=x), self.c(*x), self.d(x), self.missing(x)


@pytest.mark.parametrize(
    "kind, groups",
    [
        (OneExpression, (("a", "b"),)),
        (Assigned, (("a", "b"), ("c", "d"))),
        (Written, (("a", "b"), ("c", "d"))),
        (WrittenByMethod, (("b", "c"),)),
        (WrittenOut, ()),
        (AddedTo, ()),
        (Branch, (("a", "d"), ("b", "c"))),
        (Loops, (("a", "b"),)),
        (Helper, (("b", "a"),)),
        (BothWays, (("a", "b", "c"),)),
        (OtherCalls, ()),
    ],
)
def test_groups(kind, groups):
    assert sibling_groups(kind()) == groups


def test_branches_that_the_owner_decides():
    assert sibling_groups(Decided()) == (("a", "b", "c"),)
    assert sibling_groups(Decided(shared=True)) == (("a", "c"),)


def test_code_that_cannot_be_read():
    scope = {"Base": Base}
    exec("class Made(Base):\n    def forward(self, x):\n        return self.a(x), self.b(x)", scope)
    made = scope["Made"]()
    assert sibling_groups(made) == () and not can_be_read(made)
    assert can_be_read(Helper()) and sibling_groups(nn.Sequential(nn.Linear(4, 4))) == ()
