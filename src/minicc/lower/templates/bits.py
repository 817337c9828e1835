"""MatMulNBits onto `gemm_bits` and `gemm_rounded`: weights stay packed, at 2, 4 or 8 bits a number, everything after is fused.

A decoder's step takes the time of reading its weights, so that fewer bits are time as well as memory. Where the model allows
it (accuracy level 4), rows are rounded to 8 bits first, once for all products that read them, and products are integers.
Elsewhere (on CUDA, for weights that are computed) the product is expanded with weights of float32.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np

from minicc.ir.dims import Dim, ceil_divide, product
from minicc.ir.graph import Node, Value
from minicc.ir.types import TensorType, f32, i32
from minicc.kernels import packing
from minicc.lower.context import Lowering
from minicc.lower.program import Word
from minicc.lower.templates import common
from minicc.lower.templates.conv import bias_adder
from minicc.ops.matmul import unpack_bits
from minicc.targets.cpu import CpuTarget
from minicc.targets.parse import Target

Array = np.ndarray[Any, Any]
BITS = (2, 4, 8)
WORD = 32  # bits


def takes_bits(node: Node, target: Target) -> bool:
    """Whether a target's template computes a MatMulNBits node."""
    x, words, scales, zeros, groups, bias = (*node.inputs, None, None, None)[:6]
    if not isinstance(target, CpuTarget) or groups is not None or x is None or words is None or scales is None:
        return False
    if any(v is not None and v.data is None for v in (words, scales, zeros)):
        return False
    if not isinstance(x.type, TensorType) or x.type.shape is None or len(x.type.shape) < 2:
        return False
    if not common.float_dtypes(*(v.tensor.dtype for v in (x, scales, bias) if v is not None)):
        return False
    bits, size = node.attrs["bits"], node.attrs["block_size"]
    whole = bits in BITS and size > 0 and size % (WORD // bits) == 0
    return whole and node.attrs["K"] > 0 and node.attrs["N"] > 0


def lower_matmul_bits(low: Lowering, node: Node, lead: Node | None) -> str:
    """Rows of any number of batch axes with one matrix of packed numbers."""
    anchor, inputs = common.anchor_of(node, lead)
    x, words, scales, zeros, _, bias = (*inputs, None, None, None)[:6]
    assert x is not None and words is not None and scales is not None
    if not takes_bits(anchor, low.target):
        return "the weights are not constant numbers of 2, 4 or 8 bits in whole words"
    k, n, bits, size = (anchor.attrs[name] for name in ("K", "N", "bits", "block_size"))
    shape = anchor.output.shape
    rank = len(shape)
    buffer, offset, strides = common.float_view(low, x, (*shape[:-1], k), rank - 1)
    walk: dict[int, Dim] = {axis: s for axis, s in enumerate(strides[:-1]) if s != 0}
    space = common.epilogue(low, node, lead, [walk], finish=bias_adder(low, bias, rank - 1))
    if isinstance(space, str):
        return space
    nr = low.choose(node, common.columns(low, n))
    blocks = ceil_divide(k, size)
    assert isinstance(blocks, int)
    rounds = _rounds(low, anchor)
    depth = blocks * size if rounds else k
    packed = _packed(low, words, (words, nr, depth), nr, lambda data: _words(data, depth, bits))
    factors = _packed(low, scales, (scales, nr), nr, lambda data: data.reshape(n, blocks).astype(np.float32))
    points = None if zeros is None else _packed(low, zeros, (zeros, nr), nr, lambda data: _zero_points(data, n, blocks, bits))
    ((a0, a1, a_row),), (e0, e1, em, en) = space.strides, space.extents
    rows: dict[str, Word | Dim] = {
        "A": Word(offset, buffer), "M": em, "K": k, "A_ROW": a_row, "A_B0": a0, "A_B1": a1, "B0": e0, "B1": e1, "SIZE": size,
    }  # fmt: skip
    values: dict[str, Word | Dim] = {
        "W": Word(0, packed), "S": Word(0, factors), "Z": 0 if points is None else Word(0, points), "N": en,
    }  # fmt: skip
    constants: dict[str, int] = {"NR": nr, "BITS": bits, "CENTRED": int(points is None)}
    read = [packed, factors, *([] if points is None else [points])]
    if rounds:
        places = _rounded(low, node, x, rows, bits, buffer)
        values |= {name: rows[name] for name in ("M", "K", "B0", "B1", "SIZE")}
        values |= {name: Word(0, place) for name, place in zip(("X", "X_SCALES", "X_SUMS"), places)}
        constants["VNNI"] = int(low.cpu.multiplies_bytes)
        read += places
    else:
        values |= rows
        read.append(buffer)
    results = node.outputs if lead is not None else (anchor.output,)
    template = "gemm_rounded" if rounds else "gemm_bits"
    common.emit(low, node, template, constants, values, space, read, product(shape) * k * 2, results=results)
    return ""


def _rounds(low: Lowering, node: Node) -> bool:
    """Whether rows are rounded to 8 bits: the model and the options allow it, and the target multiplies bytes."""
    few = node.attrs["bits"] <= 4 and node.attrs["accuracy_level"] == 4
    return low.rounding and few and ("+avx2" in low.cpu.features.split(",") or low.cpu.vector_width == 16)


def _rounded(low: Lowering, node: Node, x: Value, rows: Mapping[str, Word | Dim], bits: int, source: int) -> tuple[int, ...]:
    """The buffers of rounded rows, their scales and their sums; made once for products that read a value in the same way."""
    key = ("rounded", x, bits, *(word if isinstance(word, int) else str(word) for word in rows.values()))
    if key not in low.derived:
        each = (rows["B0"], rows["B1"], rows["M"])
        blocks = ceil_divide(rows["K"], rows["SIZE"])  # type: ignore[arg-type]
        made = low.temporary(f"{x.name}_rounded", i32, (*each, blocks * rows["SIZE"] // 4))  # type: ignore[operator, arg-type]
        parts = [low.temporary(f"{x.name}_{name}", f32, (*each, blocks)) for name in ("scales", "sums")]  # type: ignore[arg-type]
        values = {**rows, "TARGET": Word(0, made), "SCALES": Word(0, parts[0]), "SUMS": Word(0, parts[1])}
        common.emit(low, node, "round_rows", {"BITS": bits}, values, None, (source,), 0, writes=(made, *parts),
                    cost=product(each) * rows["K"] // 8)  # type: ignore[arg-type, operator]  # fmt: skip
        low.derived[key] = (made, *parts)
    return low.derived[key]


def _packed(low: Lowering, value: Value, what: tuple[Hashable, ...], columns: int, rows: Any) -> int:
    """The buffer of panels of a constant whose rows, one for each column of the product, `rows` takes out of it."""
    key = ("pack_bits", *(id(w.data) if isinstance(w, Value) else w for w in what))
    if key not in low.constants:
        low.constant(packing.pack_b(np.ascontiguousarray(rows(value.data).T), columns), f"{value.name}_packed", key)
    return low.constants[key]


def _words(data: Array, k: int, bits: int) -> Array:
    """Packed bytes [N, blocks, bytes of a block] as words [N, ceil(K * bits / 32)] of consecutive numbers, lowest bits first."""
    flat = np.ascontiguousarray(data.reshape(data.shape[0], -1)).astype(np.uint8, copy=False)
    return flat.view("<i4")[:, : -(-k * bits // WORD)].astype(np.int32, copy=False)


def _zero_points(data: Array, n: int, blocks: int, bits: int) -> Array:
    """Zero points [N, blocks] as float32, from packed bytes or numbers."""
    if data.dtype == np.uint8:
        return unpack_bits(data.reshape(n, -1), bits)[:, :blocks].astype(np.float32)
    return data.reshape(n, blocks).astype(np.float32)
