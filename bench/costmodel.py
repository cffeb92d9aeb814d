"""What a case cannot avoid: floating-point operations and bytes, and the time they take at best.

Bytes are compulsory traffic: every input read once, every output written once, nothing kept in a
cache from the call before. Forward and backward are two passes, because the optimiser stands
between them: x, W, A and B are read in each. What the forward must keep (s) is written once and
read once. A dropout mask costs nothing: it can be recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.cases import DTYPES, EMBED, PROMPT, WHOLE, WHOLE_MODELS, Case
from lora_kernels.ops.common.rank import rank_dtype

NESTED_BLOCK = 256
STEP_BATCH = 4  # sequences of a training step
SEED_BYTES = ID_BYTES = 8
SLOT_BYTES = 4
NORM_BYTES = 4
_NESTED_TABLE_BYTES = 4 * 256 + 4  # code map and offset, fp32


@dataclass(frozen=True)
class Cost:
    """Floors of one call: operations (a multiply-add is 2) and bytes read and written."""

    flops: int
    bytes_read: int
    bytes_written: int

    @property
    def bytes(self) -> int:
        return self.bytes_read + self.bytes_written

    @property
    def intensity(self) -> float:
        """FLOP per byte, the x axis of a roofline."""
        return self.flops / max(self.bytes, 1)

    def seconds(self, flops_per_s: float, read_per_s: float, copy_per_s: float) -> float:
        """The larger of the arithmetic's time and the traffic's on a machine with these limits.

        Reads alone run at the read bandwidth; a written byte and a read byte beside it run at the
        copy bandwidth, which counts both.
        """
        paired = 2 * min(self.bytes_read, self.bytes_written)
        alone = self.bytes - paired
        return max(self.flops / flops_per_s, paired / copy_per_s + alone / read_per_s)

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.bytes_read + other.bytes_read,
            self.bytes_written + other.bytes_written,
        )


def quantised_bytes(n: int, k: int, block_size: int, nested: bool) -> int:
    """Stored size of a 4-bit weight: codes, and scales of 4 bytes or nested ones of 1."""
    blocks = -(-n * k // block_size)
    codes = (n * k + 1) // 2
    if not nested:
        return codes + 4 * blocks
    return codes + blocks + 4 * -(-blocks // NESTED_BLOCK) + _NESTED_TABLE_BYTES


def weight_bytes(case: Case) -> int:
    """Stored size of the case's base weights."""
    if not case.has_weight:
        return 0
    if case.is_quantised:
        return sum(
            quantised_bytes(layer.n, layer.k, case.block_size, case.nested) for layer in case.layers
        )
    return sum(layer.n * layer.k for layer in case.layers) * DTYPES[case.dtype].itemsize


def saved_bytes(case: Case) -> int:
    """What a backward cannot do without, weights and adapters left out: x and the s of each layer
    (fp32 under fp16), and with dropout the seed (int64) that makes the mask again. An MLP keeps
    gate's and up's outputs too; DoRA the norms (fp32), and for its magnitude what y was made of; a
    gated activation keeps its two inputs; an embedding ids (int64) and slots (int32), as s is read
    from its adapters.
    """
    size = DTYPES[case.dtype].itemsize
    if case.op == "glu":
        return 2 * case.m * case.n * size
    if case.op == EMBED:
        return (ID_BYTES + SLOT_BYTES) * case.m
    kept = case.m * case.k * size + _made_for_backward(case, size)
    return kept + (SEED_BYTES if case.dropout else 0)


def _made_for_backward(case: Case, size: int) -> int:
    """Bytes of what the forward makes beside its outputs for the backward of an adapter."""
    made = case.m * case.r * len(case.layers) * rank_dtype(DTYPES[case.dtype]).itemsize
    if case.op == "lora_mlp":
        made += 2 * case.m * case.layers[0].n * size
    if case.op == "dora_linear":
        made += NORM_BYTES * case.n + case.m * case.n * size
    return made


def cost(case: Case) -> Cost:
    """The floor of one call of the case.

    Raises:
        ValueError: a fine-tuning step has no closed formula here.
    """
    if case.op in WHOLE:
        raise ValueError("case: a whole model has no cost model here; see model_cost")
    size = DTYPES[case.dtype].itemsize
    dense = case.n * case.k * size
    # One comparison-free pass over the elements: a multiplication each.
    if case.op == "nf4_dequantize":
        return Cost(case.n * case.k, weight_bytes(case), dense)
    if case.op == "nf4_quantize":
        return Cost(case.n * case.k, dense, weight_bytes(case))
    if case.op == "linear_cross_entropy":
        # One pass: dx is known as soon as the loss is, nothing stands between them.
        x, labels = case.m * case.k * size, 8 * case.m
        passes = 2 if case.backward else 1
        return Cost(2 * passes * case.m * case.n * case.k, dense + x + labels, (passes - 1) * x + 4)
    if case.op == "glu":
        return _glu(case, size)
    if case.op == EMBED:
        return _embed(case, size)
    total = _linear_fwd(case, size)
    return total + _linear_bwd(case, size) if case.backward else total


def model_cost(case: Case, quantised: bool, adapted: bool) -> Cost:
    """Floors of a whole model's work: the products of its linear layers, its head and attention,
    and its weights and adapters, read once in each pass. Activations and the cache of keys are left
    out: at these lengths they are a hundredth of the weights, or stay in caches.

    A step is two passes, the gradients of x and of A and B in the second, and all logits. A token
    of `generate` is a pass; its prompt is one too, of more tokens. `prefill` wants the last logits.
    """
    model, layers, size = WHOLE_MODELS[case.layer], case.layers, DTYPES[case.dtype].itemsize
    base = sum(layer.n * layer.k for layer in layers)
    stored = (
        sum(quantised_bytes(w.n, w.k, case.block_size, case.nested) for w in layers)
        if quantised
        else base * size
    )
    ranks = _adapter_elements(case) if adapted else 0
    adapters = ranks * DTYPES[case.adapter_dtype].itemsize
    head = model.vocabulary * case.k
    weights = model.blocks * (stored + adapters) + head * size
    if case.op == "step":
        rows = case.m // STEP_BATCH
        attention = 2 * case.m * (rows + 1) * case.k  # of a causal half: q·kᵀ and p·v
        flops = model.blocks * (2 * case.m * (2 * base + 3 * ranks) + 3 * attention)
        return Cost(flops + 4 * case.m * head, 2 * weights, model.blocks * adapters)
    if case.op == "prefill":
        passes, tokens = 1, case.m
        seen = case.m * (case.m + 1) // 2
    else:
        passes, tokens = case.m, PROMPT + case.m - 1
        seen = tokens * (tokens + 1) // 2
    flops = model.blocks * (2 * tokens * (base + ranks) + 4 * seen * case.k)
    return Cost(flops + 2 * passes * head, passes * weights, 0)


def _glu(case: Case, size: int) -> Cost:
    """h = g·σ(g)·u: 2 multiplications. dg = dh·u·(σ + act·(1 - σ)) and du = dh·act with act = g·σ:
    5, and 2 additions. σ itself is not counted."""
    elements, tensor = case.m * case.n, case.m * case.n * size
    forward = Cost(2 * elements, 2 * tensor, tensor)
    return forward + Cost(7 * elements, 3 * tensor, 2 * tensor) if case.backward else forward


def _embed(case: Case, size: int) -> Cost:
    """Of each token its id, its row, the ranks of A at it; B of every adapter in use. The backward
    reads rows of dy instead of W's (u = dy·B, dB = sᵀ·dy) and writes every adapter in use."""
    rows, ranks = case.m * case.n * size, case.m * case.r if case.adapters else 0
    adapters = ranks + case.adapters * case.r * case.n
    read = ID_BYTES * case.m + rows + adapters * DTYPES[case.adapter_dtype].itemsize
    forward = Cost(2 * ranks * case.n, read, rows)
    backward = Cost(4 * ranks * case.n, read, _adapter_bytes(case))
    return forward + backward if case.backward else forward


def _adapter_elements(case: Case) -> int:
    return sum(case.r * (layer.k + layer.n) for layer in case.layers)


def _adapter_bytes(case: Case) -> int:
    elements = _adapter_elements(case)
    if case.is_gather:
        elements *= case.adapters
    if case.op == "dora_linear":
        elements += case.n  # the magnitude
    return elements * DTYPES[case.adapter_dtype].itemsize


def _base_products(case: Case) -> int:
    """FLOPs of x·Wᵀ. DoRA with dropout scales the product of the dropped x alone, so that there
    are two."""
    if not case.has_weight:
        return 0
    products = 2 if case.op == "dora_linear" and case.dropout else 1
    return products * sum(2 * case.m * layer.n * layer.k for layer in case.layers)


def _rank_products(case: Case) -> int:
    """FLOPs of s = x·Aᵀ and s·Bᵀ."""
    if case.is_gather and not case.adapters:
        return 0
    return sum(2 * case.m * case.r * (layer.k + layer.n) for layer in case.layers)


def _linear_fwd(case: Case, size: int) -> Cost:
    """x is read once whatever number of layers takes it; what stands between the layers of an MLP
    need not leave the chip but for the backward."""
    m, n, k, r = case.m, case.n, case.k, case.r
    biases = sum(layer.n for layer in case.layers if layer.bias)
    flops = _base_products(case) + _rank_products(case)
    read = m * k * size + weight_bytes(case) + biases * size + _adapter_bytes(case)
    if case.op == "lora_mlp":
        flops += 2 * m * case.layers[0].n
    if case.op == "dora_linear":
        # W·Aᵀ, for the norms of W + scale·B·A; those of W are known, and read.
        flops += 2 * n * k * r
        read += NORM_BYTES * n
    made = _made_for_backward(case, size) if case.backward and r else 0
    return Cost(flops, read, m * n * size + made)


def _linear_bwd(case: Case, size: int) -> Cost:
    """dx = dy·W (+ ds·A); with an adapter ds = dy·B, dA = dsᵀ·x, dB = dyᵀ·s."""
    m, n, k = case.m, case.n, case.k
    flops = _base_products(case) + 2 * _rank_products(case)
    read = m * n * size + weight_bytes(case)
    written = m * k * size
    if case.r:
        seed = SEED_BYTES if case.dropout else 0
        read += _adapter_bytes(case) + saved_bytes(case) - seed
        written += _adapter_bytes(case)
    if case.op == "lora_mlp":
        flops += 8 * m * case.layers[0].n  # the gate's backward, and h = act(g)·u again
    if case.op == "dora_linear":
        flops += 2 * m * n  # of the magnitude
    return Cost(flops, read, written)
