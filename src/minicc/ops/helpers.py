"""Shared parts of op definitions: type inference, contents of shape arithmetic, refusals, numpy evaluation.

Only what several op families need lives here; an op's own rules stay in its block. Nothing here registers
an op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any

import numpy as np

from minicc.errors import MiniccError, ShapeError
from minicc.ir.dims import Dim, SymbolicDim, lower_bound, minimum
from minicc.ir.expr import Expr
from minicc.ir.graph import MAX_CONTENT, content_of
from minicc.ir.opdef import Content, Inference
from minicc.ir.types import BY_ONNX, KERNEL_DTYPES, DType, TensorType, Type, broadcast_shapes

if TYPE_CHECKING:
    from minicc.ir.graph import Node

Array = np.ndarray[Any, Any]
Contents = Sequence[Content | None]
Shape = tuple[Dim, ...]

# Element types in the order of ONNX's TensorProto.DataType codes, from 1.
_ONNX_ORDER = (
    "FLOAT", "UINT8", "INT8", "UINT16", "INT16", "INT32", "INT64", "STRING", "BOOL", "FLOAT16", "DOUBLE",
    "UINT32", "UINT64", "COMPLEX64", "COMPLEX128", "BFLOAT16", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2",
    "FLOAT8E5M2FNUZ", "UINT4", "INT4", "FLOAT4E2M1", "FLOAT8E8M0", "UINT2", "INT2",
)  # fmt: skip


def element_type(code: DType | int) -> DType:
    """The element type of an attribute such as Cast's `to`: a DType, or ONNX's number for one."""
    if isinstance(code, DType):
        return code
    if not 1 <= code <= len(_ONNX_ORDER):
        raise ShapeError(f"element type number {code} is not one of ONNX's 1..{len(_ONNX_ORDER)}")
    return BY_ONNX[_ONNX_ORDER[code - 1]]


# -- refusals: why a node has no compiled form


def kernel_dtypes(node: Node) -> str | None:
    """Refusal of element types that kernels cannot load or store, and of values that are not tensors."""
    for value in (*node.inputs, *node.outputs):
        if value is None:
            continue
        if not isinstance(value.type, TensorType):
            return f"no kernel for values of type {value.type}"
        if value.type.dtype not in KERNEL_DTYPES:
            return f"no kernel for element type {value.type.dtype}"
    return None


def default_refuse(node: Node) -> str | None:
    """Refusal for element types, unknown ranks, and shapes that depend on data."""
    reason = kernel_dtypes(node)
    if reason is not None:
        return reason
    if node.symbols:
        return f"data-dependent: the output size {node.symbols[0]} is known only when the node has run"
    for value in (*node.inputs, *node.outputs):
        if value is not None and value.tensor.shape is None:
            return f"the rank of '{value.name}' is not known"
    for position in node.op.static_inputs:
        value = node.inputs[position] if position < len(node.inputs) else None
        if value is not None and value.content is None:
            return f"data-dependent: input {position} is not known at compile time"
    return None


# -- inference


def same_as_input(n: Inference) -> list[Type]:
    """One output of the type of input 0."""
    return [n.value(0).type]


def same_as_float_input(n: Inference) -> list[Type]:
    """One output of the type of input 0, which must have a float element type."""
    if not n.dtype(0).is_float:
        raise n.error(f"needs a float element type, got {n.dtype(0)}")
    return [n.type(0)]


def broadcast_shape(n: Inference, positions: Sequence[int] | None = None) -> Shape | None:
    """The broadcast shape of the present inputs (or of those at `positions`); None for unknown rank."""
    chosen = range(len(n.inputs)) if positions is None else positions
    shapes = [n.type(i).shape for i in chosen if n.has(i)]
    known = [s for s in shapes if s is not None]
    if len(known) < len(shapes):
        return None
    try:
        return broadcast_shapes(*known)
    except ShapeError as error:
        raise n.error(error.what) from error


def require_same_dtype(n: Inference, positions: Sequence[int] | None = None) -> DType:
    """The one element type of the inputs that are present. Raises ShapeError when they differ."""
    chosen = range(len(n.inputs)) if positions is None else positions
    dtypes = dict.fromkeys(n.dtype(i) for i in chosen if n.has(i))
    if len(dtypes) != 1:
        raise n.error(f"element types differ: {', '.join(map(str, dtypes)) or 'no input'}",
                      hint="insert a Cast, the operator does not convert")  # fmt: skip
    return next(iter(dtypes))


def broadcast_infer(n: Inference) -> list[Type]:
    """One output: inputs of one element type, broadcast."""
    return [TensorType(require_same_dtype(n), broadcast_shape(n))]


def described_shape(n: Inference, position: int) -> Shape | None:
    """The shape that an input describes by its elements; fresh symbols for elements that are not known.

    None when even their number is unknown. Raises ShapeError for a negative size.
    """
    content = n.content(position)
    if content is not None:
        dims = tuple(as_dim(v) for v in content.flat)
        if any(d is None or (isinstance(d, int) and d < 0) for d in dims):
            raise n.error(f"input {position} is no shape: {list(content.flat)}")
        return tuple(d for d in dims if d is not None)
    shape = n.type(position).shape
    if shape is None or not isinstance(shape[0], int):
        return None
    return unknown_dims(n, shape[0])


def unknown_dims(n: Inference, rank: int, hint: str = "d") -> Shape:
    """A shape of fresh symbols."""
    return tuple(n.fresh(hint) for _ in range(rank))


def axis_list(n: Inference, axes: Sequence[int], rank: int) -> list[int]:
    """Axes made non-negative, in order. Raises ShapeError when one is out of range or repeated."""
    out = [n.axis(axis, rank) for axis in axes]
    if len(set(out)) < len(out):
        raise n.error(f"axes {list(axes)} name one axis twice")
    return out


def broadcast_index(index: Sequence[Expr], source: Shape, target: Shape) -> list[Expr | int]:
    """Where the element `index` of a tensor of shape `target` lies in one of shape `source` broadcast to it.

    A size that is 1 or the target's only at run time gives a stride of 0 or 1, so the index stays affine.
    """
    offset = len(target) - len(source)
    out: list[Expr | int] = []
    for axis, size in enumerate(source):
        position = index[offset + axis]
        if size == 1:
            out.append(0)
        elif size == target[offset + axis]:
            out.append(position)
        else:
            out.append(position * minimum(size - 1, 1))
    return out


# -- contents


def is_plain(content: Content) -> bool:
    """True when no element is symbolic."""
    return not any(isinstance(v, SymbolicDim) for v in content.flat)


def elements(content: Content) -> list[Any]:
    """The elements of a content in order: dimensions, floats or bools."""
    return content.reshape(-1).tolist()


def plain_array(content: Content, dtype: DType) -> Array:
    """A content without symbols as an array of the element type."""
    return np.array(content.reshape(-1).tolist(), dtype=dtype.numpy).reshape(content.shape)


def _evaluate(n: Inference, moved: Sequence[int] | None) -> list[Any] | None:
    """Results of `eval` on the contents; inputs at `moved` (all when None) are passed as object arrays."""
    arrays: list[Array | None] = []
    for position, value in enumerate(n.inputs):
        if value is None:
            arrays.append(None)
            continue
        content = value.content
        if content is None:
            return None
        if moved is None or position in moved:
            arrays.append(content)
        elif is_plain(content):
            arrays.append(plain_array(content, n.dtype(position)))
        else:
            return None
    assert n.op.eval is not None
    for type_ in n.op.infer(n):
        # Checked before evaluating: a small shape vector can describe a huge tensor.
        size = type_.size if isinstance(type_, TensorType) and type_.shape is not None else None
        if not isinstance(size, int) or size > MAX_CONTENT:
            return None
    try:
        results = n.op.eval(*arrays, **n.attrs)
    except (MiniccError, IndexError, ValueError, OverflowError):
        return None  # it fails at run time, if it is ever run
    return list(results) if isinstance(results, tuple | list) else [results]


def propagate_by_eval(n: Inference) -> Contents:
    """Contents by evaluating the op, when all inputs are known numbers and the outputs are small."""
    results = _evaluate(n, moved=())
    if results is None:
        return [None] * n.n_outputs
    return [content_of(np.asarray(r)) for r in results]


def propagate_moves(*moved: int) -> Callable[[Inference], Contents]:
    """`propagate` of ops that only move elements.

    `eval` runs on the (possibly symbolic) elements of the inputs at `moved`, all inputs when none is named;
    the other inputs must be known numbers.
    """

    def propagate(n: Inference) -> Contents:
        results = _evaluate(n, moved or None)
        if results is None:
            return [None] * n.n_outputs
        # numpy unwraps single elements: numbers are made plain again
        return [r if r.dtype == object else content_of(r) for r in map(np.asarray, results)]

    return propagate


def as_dim(value: Any) -> Dim | None:
    """An element of a content as a dimension: integers, whole floats and symbols; None for anything else."""
    if isinstance(value, bool | np.bool_):
        return None
    if isinstance(value, int | SymbolicDim):
        return value
    return int(value) if isinstance(value, float) and value.is_integer() else None


def propagate_elementwise(rule: Callable[..., Any]) -> Callable[[Inference], Contents]:
    """`propagate` of pointwise ops: `eval` on numbers, else `rule(*elements)`, None for "cannot say"."""

    def propagate(n: Inference) -> Contents:
        known = propagate_by_eval(n)
        if known[0] is not None:
            return known
        contents = [n.content(i) for i in range(len(n.inputs)) if n.has(i)]
        if not contents or any(c is None for c in contents):
            return known
        arrays = np.broadcast_arrays(*(c for c in contents if c is not None))
        out = np.empty(arrays[0].shape, dtype=object)
        if out.size > MAX_CONTENT:
            return known
        flat = out.reshape(-1)
        for position, elements in enumerate(zip(*(a.reshape(-1) for a in arrays))):
            result = rule(*elements)
            if result is None:
                return known
            flat[position] = result
        return [out]

    return propagate


def propagate_dims(rule: Callable[..., Any]) -> Callable[[Inference], Contents]:
    """As propagate_elementwise, for rules on dimensions: any other element makes it unknown."""

    def on_dims(*elements: Any) -> Any:
        dims = [as_dim(e) for e in elements]
        return None if any(d is None for d in dims) else rule(*dims)

    return propagate_elementwise(on_dims)


def certainly_positive(dim: Dim) -> bool:
    """True when a dimension is above 0 for all sizes."""
    low = lower_bound(dim)
    return low is not None and low > 0


def certainly_non_negative(dim: Dim) -> bool:
    """True when a dimension is at least 0 for all sizes."""
    low = lower_bound(dim)
    return low is not None and low >= 0


# -- evaluation


def is_half(dtype: np.dtype[Any]) -> bool:
    """True for float16 and bfloat16."""
    return dtype.name in ("float16", "bfloat16")


def widen(array: Array) -> Array:
    """The array, half types as float32."""
    return array.astype(np.float32) if is_half(array.dtype) else array


def computed_in_f32(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make an `eval` compute half types in float32 and round its float32 results to the half type.

    Floating-point warnings are off, and results are arrays, also of rank 0.
    """

    @wraps(function)
    def evaluate(*arrays: Array | None, **attrs: Any) -> Any:
        half = next((a.dtype for a in arrays if a is not None and is_half(a.dtype)), None)

        def narrow(result: Any) -> Array:
            array = np.asarray(result)
            return array.astype(half) if half is not None and array.dtype == np.float32 else array

        with np.errstate(all="ignore"):
            results = function(*(a if a is None else widen(a) for a in arrays), **attrs)
            return tuple(map(narrow, results)) if isinstance(results, tuple) else narrow(results)

    return evaluate


def attributes_ignored(function: Callable[..., Any]) -> Callable[..., Any]:
    """An `eval` or `compute` that does not look at the attributes."""

    @wraps(function)
    def call(*arguments: Any, **_: Any) -> Any:
        return function(*arguments)

    return call
