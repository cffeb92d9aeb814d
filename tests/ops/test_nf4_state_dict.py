"""NF4Weight's state dict: bitsandbytes reads ours, we read bitsandbytes', and damage is named."""

from __future__ import annotations

import json

import pytest
import torch

from lora_kernels import NF4Weight
from tests.ops.variants import bits

bnb = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")

PREFIX = "model.layers.0.mlp.up_proj."
KEY = f"{PREFIX}weight"
STATE = f"{KEY}.quant_state.bitsandbytes__nf4"
STORAGES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
VARIANTS = [(t, n) for t in ("nf4", "fp4") for n in (False, True)]


def _bnb_entries(w, nested, quant_type, storage=torch.uint8, block_size=64):
    packed, state = bnb.quantize_4bit(
        w,
        blocksize=block_size,
        compress_statistics=nested,
        quant_type=quant_type,
        quant_storage=storage,
    )
    entries = {f"{KEY}.{k}": v for k, v in state.as_dict(packed=True).items()}
    return {KEY: packed, **entries}, packed, state


def _assert_equal(a: NF4Weight, b: NF4Weight):
    assert a.tensors().keys() == b.tensors().keys()
    for name, t in a.tensors().items():
        assert t.dtype == b.tensors()[name].dtype, name
        assert torch.equal(bits(t), bits(b.tensors()[name])), name
    assert a.meta == b.meta and a.dtype == b.dtype and a.quant_type == b.quant_type


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("quant_type", "nested"), VARIANTS)
def test_reads_bitsandbytes(quant_type, nested, dtype, storage):
    w = torch.randn(24, 128).to(dtype)
    entries, packed, state = _bnb_entries(w, nested, quant_type, storage)
    assert entries[KEY].dtype == storage
    q = NF4Weight.from_state_dict({"other": torch.zeros(1), **entries}, PREFIX)
    _assert_equal(q, NF4Weight.quantize(w, 64, nested, quant_type))
    assert torch.equal(bits(q.dequantize()), bits(bnb.dequantize_4bit(packed, state)))


@pytest.mark.parametrize("block_size", [32, 64, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("quant_type", "nested"), VARIANTS)
def test_bitsandbytes_reads_ours(quant_type, nested, dtype, block_size):
    w = torch.randn(24, 512).to(dtype)
    q = NF4Weight.quantize(w, block_size, nested, quant_type)
    entries = q.state_dict_entries(PREFIX)
    packed = entries.pop(KEY)
    stripped = {k.removeprefix(f"{KEY}."): v for k, v in entries.items()}
    state = bnb.QuantState.from_dict(stripped, torch.device("cpu"))
    _, expected = bnb.quantize_4bit(
        w, blocksize=block_size, compress_statistics=nested, quant_type=quant_type
    )
    assert state == expected
    assert torch.equal(bits(bnb.dequantize_4bit(packed, state)), bits(q.dequantize()))


@pytest.mark.parametrize(("quant_type", "nested"), VARIANTS)
def test_same_entries_as_bitsandbytes(quant_type, nested):
    """Keys, dtypes, shapes and JSON, so that a checkpoint differs in no byte that matters."""
    w = torch.randn(24, 128)
    ours = NF4Weight.quantize(w, 64, nested, quant_type).state_dict_entries(PREFIX)
    theirs, *_ = _bnb_entries(w, nested, quant_type)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if "quant_state" in key:
            assert json.loads(bytes(ours[key].tolist())) == json.loads(bytes(value.tolist()))
            continue
        assert (ours[key].dtype, ours[key].shape) == (value.dtype, value.shape), key
        assert torch.equal(ours[key], value), key


@pytest.mark.parametrize("shape", [(7, 31), (5, 96), (1, 1), (300, 257)], ids=str)
@pytest.mark.parametrize(("quant_type", "nested"), VARIANTS)
def test_round_trip(quant_type, nested, shape):
    q = NF4Weight.quantize(torch.randn(shape).bfloat16(), 32, nested, quant_type)
    _assert_equal(NF4Weight.from_state_dict(q.state_dict_entries("a."), "a."), q)


def test_round_trip_without_rows():
    q = NF4Weight.quantize(torch.empty(0, 64))
    _assert_equal(NF4Weight.from_state_dict(q.state_dict_entries()), q)


@pytest.mark.parametrize("storage", STORAGES[1:], ids=str)
def test_storage_types_wider_than_the_codes(storage):
    """11 bytes of codes, rounded up to whole elements."""
    q = NF4Weight.quantize(torch.randn(3, 7), 32)
    entries = q.state_dict_entries()
    padded = torch.zeros(12, dtype=torch.uint8)
    padded[:11] = q.packed
    entries["weight"] = padded.view(storage).view(-1, 1)
    _assert_equal(NF4Weight.from_state_dict(entries), q)


def test_saved_tensors_share_no_memory_and_survive_safetensors(tmp_path):
    from safetensors.torch import load_file, save_file

    q = [NF4Weight.quantize(torch.randn(8, 64)) for _ in range(2)]
    entries = q[0].state_dict_entries("a.") | q[1].state_dict_entries("b.")
    save_file(entries, tmp_path / "x.safetensors")  # refuses shared memory
    loaded = load_file(tmp_path / "x.safetensors")
    _assert_equal(NF4Weight.from_state_dict(loaded, "b."), q[1])


def test_loads_under_a_meta_device_context():
    """As a model is built before its weights are there."""
    entries = NF4Weight.quantize(torch.randn(8, 64)).state_dict_entries()
    with torch.device("meta"):
        q = NF4Weight.from_state_dict(entries)
        again = q.state_dict_entries()
    assert {t.device.type for t in q.tensors().values()} == {"cpu"}
    assert torch.equal(again["weight.absmax"], entries["weight.absmax"])
    _assert_equal(NF4Weight.from_state_dict(again), q)


def test_quantises_under_a_meta_device_context():
    w = torch.randn(8, 64)
    with torch.device("meta"):
        q = NF4Weight.quantize(w)
    _assert_equal(q, NF4Weight.quantize(w))


# --- damage ---------------------------------------------------------------------------------------


@pytest.fixture
def entries():
    return NF4Weight.quantize(torch.randn(24, 128)).state_dict_entries(PREFIX)


def _edit(entries, **changes):
    info = json.loads(bytes(entries[STATE].tolist())) | changes
    info = {k: v for k, v in info.items() if v is not ...}
    return torch.tensor(list(json.dumps(info).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    "suffix",
    ["", ".absmax", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4"],
)
def test_missing_entry(entries, suffix):
    del entries[KEY + suffix]
    with pytest.raises(KeyError, match=KEY + suffix):
        NF4Weight.from_state_dict(entries, PREFIX)


def test_two_quant_states(entries):
    entries[f"{KEY}.quant_state.bitsandbytes__fp4"] = entries[STATE]
    with pytest.raises(KeyError, match=r"bitsandbytes__nf4 \(or fp4\): found 2"):
        NF4Weight.from_state_dict(entries, PREFIX)


TRUNCATED = ("", ".absmax", ".nested_absmax", ".nested_quant_map", ".quant_map")


@pytest.mark.parametrize("suffix", TRUNCATED)
@pytest.mark.parametrize("how", ["shorter", "longer", "other-shape"])
def test_wrong_size(entries, suffix, how):
    t = entries[KEY + suffix]
    changed = {"shorter": t[:-1], "longer": torch.cat([t, t[:1]]), "other-shape": t.new_empty(0)}
    entries[KEY + suffix] = changed[how]
    with pytest.raises(ValueError, match=f"^{KEY}{suffix}: "):
        NF4Weight.from_state_dict(entries, PREFIX)


@pytest.mark.parametrize("suffix", [".absmax", ".nested_absmax", ".nested_quant_map"])
def test_wrong_dtype(entries, suffix):
    entries[KEY + suffix] = entries[KEY + suffix].to(torch.int32)
    with pytest.raises(TypeError, match=f"^{KEY}{suffix}: got dtype int32"):
        NF4Weight.from_state_dict(entries, PREFIX)


def test_plain_scales_where_the_state_says_nested_and_the_reverse(entries):
    plain = NF4Weight.quantize(torch.randn(24, 128), double_quant=False).state_dict_entries(PREFIX)
    mixed = entries | {f"{KEY}.absmax": plain[f"{KEY}.absmax"]}
    with pytest.raises(TypeError, match=rf"^{KEY}\.absmax: got dtype float32, expected uint8"):
        NF4Weight.from_state_dict(mixed, PREFIX)
    mixed = plain | {f"{KEY}.absmax": entries[f"{KEY}.absmax"]}
    with pytest.raises(TypeError, match=rf"^{KEY}\.absmax: got dtype uint8, expected float32"):
        NF4Weight.from_state_dict(mixed, PREFIX)


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [24, 129]},
        {"shape": [24]},
        {"shape": [-24, -128]},
        {"shape": "24x128"},
        {"shape": None},
        {"shape": ...},
        {"blocksize": 48},
        {"blocksize": "64"},
        {"blocksize": ...},
        {"dtype": "int8"},
        {"dtype": 7},
        {"quant_type": "fp4"},
        {"quant_type": "int4"},
        {"quant_type": ...},
        {"nested_blocksize": 0},
        {"nested_blocksize": "256"},
        {"nested_offset": ...},
        {"nested_offset": float("nan")},
    ],
    ids=str,
)
def test_wrong_values_in_the_json(entries, changes):
    entries[STATE] = _edit(entries, **changes)
    with pytest.raises(ValueError, match=f"^{KEY}") as caught:
        NF4Weight.from_state_dict(entries, PREFIX)
    (field,) = changes
    assert field in str(caught.value)


def test_another_block_size_does_not_fit_the_scales(entries):
    entries[STATE] = _edit(entries, blocksize=128)
    with pytest.raises(ValueError, match=rf"^{KEY}\.absmax: got shape \[48\], expected \[24\]"):
        NF4Weight.from_state_dict(entries, PREFIX)


@pytest.mark.parametrize(
    "damaged",
    [
        lambda t: t[:-5],
        lambda t: t[:0],
        lambda t: t.flip(0),
        lambda t: t.float() + 0.5,
        lambda t: t.view(1, -1),
        lambda t: torch.tensor(list(b"[1, 2]"), dtype=torch.uint8),
        lambda t: torch.tensor(list(b"12"), dtype=torch.uint8),
        lambda t: torch.tensor([0xFF, 0xFE], dtype=torch.uint8),
    ],
    ids=["truncated", "empty", "reversed", "floats", "2d", "list", "number", "not-text"],
)
def test_broken_json(entries, damaged):
    entries[STATE] = damaged(entries[STATE])
    with pytest.raises(ValueError, match=f"^{STATE}: "):
        NF4Weight.from_state_dict(entries, PREFIX)


def test_another_code_table(entries):
    key = f"{KEY}.quant_map"
    entries[key] = bnb.get_4bit_type("fp4", device="cpu")
    with pytest.raises(ValueError, match=rf"^{key}: is not the table of nf4"):
        NF4Weight.from_state_dict(entries, PREFIX)
