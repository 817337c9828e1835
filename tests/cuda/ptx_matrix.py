"""The PTX interpreter's matrix instructions: ldmatrix and mma.sync, after the fragment layouts of the PTX manual."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from tests.cuda.ptx_values import Array, PtxError

if TYPE_CHECKING:
    from tests.cuda.ptx_interpreter import Block

Parts = tuple[str, ...]
_LANES = np.arange(32)


def _list(operand: str) -> list[str]:
    return [o.strip() for o in operand.strip("{}").split(",")]


def _warps(block: Block, mask: Array) -> Array:
    """Indices [warps][32] of the active threads, which must be whole warps."""
    whole = mask.reshape(-1, 32)
    if (whole.any(1) != whole.all(1)).any():
        raise PtxError("a warp instruction is reached by some of its threads only")
    return np.flatnonzero(mask).reshape(-1, 32)


def _ldmatrix(block: Block, parts: Parts, operands: Parts, mask: Array) -> None:
    """Each 8 lanes give the addresses of a matrix's rows of 16 bytes; lane l gets 4 bytes of row l / 4."""
    threads, targets = _warps(block, mask), _list(operands[0])
    rows = np.ascontiguousarray(block.gather("shared", block.address(operands[1]), 16, mask)[threads])
    for matrix, target in enumerate(targets):
        halves = rows[:, 8 * matrix : 8 * matrix + 8].copy().view(np.uint16).reshape(-1, 8, 8)
        if "trans" in parts:
            halves = halves.transpose(0, 2, 1)
        pairs = np.ascontiguousarray(halves).view(np.uint32).reshape(-1, 32)
        result = np.zeros(block.threads, np.uint64)
        result[threads] = pairs
        block.write(target, result, mask)


def _elements(raw: Array, type_: str) -> Array:
    """Registers uint32 [...] as their elements [..., count]."""
    if type_ == "tf32":
        return (raw & np.uint32(0xFFFFE000)).view(np.float32)[..., None]
    small = raw[..., None]
    if type_ == "bf16":
        halves = np.ascontiguousarray(small).view(np.uint16)
        return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if type_ == "f16":
        return np.ascontiguousarray(small).view(np.float16).astype(np.float32)
    return np.ascontiguousarray(small).view(np.int8 if type_ == "s8" else np.uint8).astype(np.int32)


def _mma(block: Block, parts: Parts, operands: Parts, mask: Array) -> None:
    """mma.sync.aligned.mMnNkK.row.col.d.a.b.c with M = 16, N = 8."""
    shape = re.fullmatch(r"m16n8k(\d+)", parts[3])
    if shape is None or parts[4:6] != ("row", "col"):
        raise PtxError("unknown shape of mma")
    depth, (_, a_type, b_type, c_type) = int(shape[1]), parts[6:10]
    threads = _warps(block, mask)
    registers = [[block.value(o).astype(np.uint32)[threads] for o in _list(operand)] for operand in operands[1:]]
    dtype = np.int32 if c_type == "s32" else np.float32
    group, member = _LANES >> 2, _LANES & 3
    width = {"tf32": 1, "f16": 2, "bf16": 2}.get(a_type, 4)
    a = np.zeros((len(threads), 16, depth), dtype)
    b = np.zeros((len(threads), depth, 8), dtype)
    c = np.zeros((len(threads), 16, 8), dtype)
    for i, register in enumerate(registers[0]):
        for e, column in enumerate(np.moveaxis(_elements(register, a_type), -1, 0)):
            a[:, group + 8 * (i & 1), width * member + e + 4 * width * (i >> 1)] = column
    for i, register in enumerate(registers[1]):
        for e, column in enumerate(np.moveaxis(_elements(register, b_type), -1, 0)):
            b[:, width * member + e + 4 * width * i, group] = column
    for i, register in enumerate(registers[2]):
        c[:, group + 8 * (i >> 1), 2 * member + (i & 1)] = register.view(dtype)
    d = (a @ b + c).astype(dtype)
    for i, target in enumerate(_list(operands[0])):
        result = np.zeros(block.threads, np.uint64)
        result[threads] = np.ascontiguousarray(d[:, group + 8 * (i >> 1), 2 * member + (i & 1)]).view(np.uint32)
        block.write(target, result, mask)


HANDLERS = {"ldmatrix": _ldmatrix, "mma": _mma}
