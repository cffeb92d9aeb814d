"""Calls of the gated linear units: each activation, over whole blocks and a ragged end."""

from __future__ import annotations

from tests.compiled.problems import Problem
from tools.op_inputs.glu import Glu
from tools.op_inputs.source import FP16, FP32

PROBLEMS = (
    Problem("silu", Glu((33, 70), "silu", need_h=True)),
    Problem("gelu", Glu((33, 70), "gelu")),
    Problem("gelu-tanh", Glu((33, 70), "gelu_tanh", need_h=True)),
    Problem("silu-wide-fp32", Glu((3, 683), "silu", dtype=FP32, width=20.0)),
    Problem("gelu-whole-fp32", Glu((4, 512), "gelu", dtype=FP32, width=20.0, need_h=True)),
    Problem("gelu-tanh-fp32", Glu((3, 683), "gelu_tanh", dtype=FP32)),
    Problem(
        "silu-strided-fp16",
        Glu((40, 31), "silu", dtype=FP16, strides="transposed", need_h=True),
    ),
)
