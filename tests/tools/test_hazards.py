"""The reader of Hopper's machine code: it finds what it should, and nothing in sound code."""

from __future__ import annotations

import pytest

from tools.gpu_proofs.hazards import overwritten

LEFT, SUMS = "R104", "R24"


def sass(*lines: str) -> str:
    """As nvdisasm prints it; a line that ends in a colon is a label."""
    text = [".text.kernel:"]
    for i, line in enumerate(lines):
        text.append(line if line.endswith(":") else f"        /*{16 * i:04x}*/  {line} ;")
    return "\n".join(text)


PRODUCT = f"HGMMA.64x128x16.F32.BF16 {SUMS}, {LEFT}, gdesc[UR12], {SUMS}, gsb0"
FROM_SHARED = f"HGMMA.64x128x16.F32.BF16 {SUMS}, gdesc[UR8], {SUMS}, gsb0"
WAIT_ALL = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
WAIT_ONE = "WARPGROUP.DEPBAR.LE gsb0, 0x1"


def loop(write: str, wait: str) -> str:
    """A step that writes, multiplies and waits."""
    start, back = ".L_x_0:", "@!P1 BRA `(.L_x_0)"
    return sass(start, write, "WARPGROUP.ARRIVE", PRODUCT, wait, back, "EXIT")


@pytest.mark.parametrize(
    "write",
    [
        "LOP3.LUT R104, R3, R5, RZ, 0xc0, !PT",
        "LDSM.16.M88.4 R104, [R8+UR4]",
        "LDS.128 R100, [R8]",
        "@P2 IMAD.WIDE.U32 R103, R5, R6, RZ",
        "SHFL.BFLY PT, R107, R4, 0x1, 0x1f",
        "PRMT R106, R1, 0x5410, R2",
    ],
)
def test_a_register_that_changes_while_it_is_read_is_found(write: str):
    if "R100" in write:  # four registers, of which none is the left side's
        assert not overwritten(loop(write, WAIT_ONE))
        write = write.replace("R100", "R101")
    assert overwritten(loop(write, WAIT_ONE)), "the product of the step before still reads it"
    assert not overwritten(loop(write, WAIT_ALL))


@pytest.mark.parametrize(
    "harmless",
    [
        "STS.128 [R104], R8",
        "ISETP.GE.AND P1, PT, R104, R5, PT",
        "MOV R108, R104",
        "R2UR UR4, R104",
        "LOP3.LUT P0, RZ, R104, 0x3, RZ, 0xc0, !PT",
    ],
)
def test_what_only_reads_the_left_side_is_not(harmless: str):
    assert not overwritten(loop(harmless, WAIT_ONE))


def test_the_same_constant_may_be_written_again():
    ones = [f"MOV R{r}, 0x3f803f80" for r in range(104, 108)]
    again = "IMAD.MOV.U32 R105, RZ, RZ, 0x3f803f80"
    assert not overwritten(sass(*ones, PRODUCT, again, WAIT_ALL, "EXIT"))
    assert overwritten(sass(*ones, PRODUCT, again.replace("3f80", "4000"), WAIT_ALL, "EXIT"))
    assert overwritten(sass(*ones, "MOV R105, R3", PRODUCT, again, WAIT_ALL, "EXIT"))


def test_sums_are_not_touched_before_they_are_there():
    assert "takes R30" in overwritten(sass(PRODUCT, "FADD R2, R30, R31", WAIT_ALL, "EXIT"))[0]
    assert not overwritten(sass(PRODUCT, WAIT_ALL, "FADD R2, R30, R31", "EXIT"))
    assert not overwritten(sass(PRODUCT, PRODUCT, WAIT_ALL, "EXIT"))  # in their own order


def test_a_left_side_in_shared_memory_has_no_registers():
    assert not overwritten(sass(FROM_SHARED, "MOV R104, R5", WAIT_ALL, "EXIT"))


def test_a_wait_leaves_the_last_groups():
    other = PRODUCT.replace("R104", "R112")
    assert not overwritten(sass(PRODUCT, other, WAIT_ONE, "MOV R104, R5", WAIT_ALL, "EXIT"))
    assert overwritten(sass(PRODUCT, other, WAIT_ONE, "MOV R112, R5", WAIT_ALL, "EXIT"))
    uncommitted = PRODUCT.replace(", gsb0", "")
    assert overwritten(sass(uncommitted, WAIT_ALL, "MOV R104, R5", "EXIT"))


def test_both_ways_of_a_branch_are_followed():
    code = (
        PRODUCT,
        "@P0 BRA `(.L_x_1)",
        WAIT_ALL,
        "EXIT",
        ".L_x_1:",
        "MOV R105, R5",
        WAIT_ALL,
        "EXIT",
    )
    assert overwritten(sass(*code))
    assert not overwritten(sass(*code[:1], "EXIT", *code[4:]))
