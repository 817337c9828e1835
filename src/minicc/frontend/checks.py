"""Checks of an upgraded node before it enters the graph.

Element types are held against ONNX's schema. Constants are refused that would be wrong in every run: indices
out of range, useless quantisation scales.

Shapes are checked by the ops' own inference.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import onnx
from onnx.defs import OpSchema

from minicc.errors import InvalidModelError
from minicc.frontend.attributes import find_schema
from minicc.frontend.upgrade import OnnxNode
from minicc.ir.types import DType, TensorType, Type
from minicc.ops.host import newest_opset


def check(node: OnnxNode) -> None:
    """Raises InvalidModelError."""
    schema = find_schema(node.op, node.domain, newest_opset() if node.domain == "" else max(node.opset, 1))
    if schema is not None and not schema.deprecated:
        _check_types(node, schema)
    constant_check = _CONSTANT_CHECKS.get(node.op)
    if constant_check is not None and node.domain == "":
        constant_check(node)


@lru_cache(maxsize=1024)
def _allowed(name: str, domain: str, version: int) -> tuple[tuple[str, frozenset[str], bool], ...]:
    """For each formal input: its type variable, the texts it may be, and whether it is one type for all."""
    schema = onnx.defs.get_schema(name, version, domain)
    sets = {c.type_param_str: frozenset(c.allowed_type_strs) for c in schema.type_constraints}
    return tuple(
        (f.type_str, sets.get(f.type_str, frozenset((f.type_str,))), f.is_homogeneous) for f in schema.inputs
    )


def _check_types(node: OnnxNode, schema: OpSchema) -> None:
    formals = _allowed(node.op, node.domain, schema.since_version)
    bound: dict[str, Type] = {}
    for i, value in enumerate(node.inputs):
        if value is None or not formals:
            continue
        variable, texts, homogeneous = formals[min(i, len(formals) - 1)]
        text = _text(value.type.dtype) if isinstance(value.type, TensorType) else value.type.text
        if text not in texts:
            some = ", ".join(sorted(texts)[:12])
            raise InvalidModelError(
                f"{node.op}: input {i} is {text}, which the operator does not take",
                where=node.where,
                why=f"it takes {some}",
            )
        first = bound.setdefault(variable, value.type) if homogeneous else value.type
        if (
            isinstance(first, TensorType)
            and isinstance(value.type, TensorType)
            and first.dtype != value.type.dtype
        ):
            raise InvalidModelError(
                f"{node.op}: input {i} is {value.type.dtype}, an input before it {first.dtype}",
                where=node.where,
                why="the operator takes one element type",
                hint="insert a Cast",
            )


@lru_cache(maxsize=64)
def _text(dtype: DType) -> str:
    return f"tensor({dtype.onnx.lower()})"


def _check_indices(node: OnnxNode) -> None:
    """Constant indices lie within the axis they index."""
    data, indices = node.input(0), node.input(1)
    if indices.data is None or indices.data.dtype.kind != "i" or not isinstance(data.type, TensorType):
        return
    shape, axis = data.type.shape, int(node.attrs.get("axis", 0))
    if shape is None or not -len(shape) <= axis < len(shape) or not indices.data.size:
        return
    size = shape[axis]
    low, high = int(indices.data.min()), int(indices.data.max())
    if isinstance(size, int) and not (-size <= low and high < size):
        raise InvalidModelError(
            f"{node.op}: an index is out of range",
            where=node.where,
            why=f"indices from {low} to {high}, axis {axis} has {size} elements",
        )


def _check_scale(position: int, zero: bool) -> Callable[[OnnxNode], None]:
    """A constant scale is finite and not negative; 0 only where it is not divided by."""

    def apply(node: OnnxNode) -> None:
        scale = node.inputs[position] if position < len(node.inputs) else None
        if scale is None or scale.data is None:
            return
        numbers = scale.data.astype(np.float32)
        if not np.isfinite(numbers).all() or (numbers < 0).any() or (not zero and (numbers == 0).any()):
            raise InvalidModelError(
                f"{node.op}: a scale is zero, negative or not finite",
                where=node.where,
                hint="quantise the model again",
            )

    return apply


_CONSTANT_CHECKS: dict[str, Callable[[OnnxNode], None]] = {
    **dict.fromkeys(("Gather", "GatherElements", "ScatterElements"), _check_indices),
    "QuantizeLinear": _check_scale(1, zero=False),
    "DequantizeLinear": _check_scale(1, zero=True),
}
