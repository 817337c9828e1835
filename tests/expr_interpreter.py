"""An interpreter of scalar expressions in plain numpy: what an `Expr` means, shared by no code generator.

Every expression is computed at all points of an iteration space at once. Loads are checked to be in bounds,
also in the untaken side of a `select`, because kernels evaluate both sides. Half types compute in float32
and are rounded by `cast` and by the final store only.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from minicc.ir import expr as ex
from minicc.ir.dims import evaluate
from minicc.ir.graph import Graph
from minicc.ir.opdef import Kind
from minicc.ir.types import bf16, boolean, f16


def compute_type(dtype):
    """The numpy type in which values of a type are computed."""
    return np.dtype(np.float32) if dtype in (f16, bf16) else dtype.numpy


_UNARY = {
    "neg": np.negative, "abs": np.abs, "floor": np.floor, "ceil": np.ceil, "round": np.rint,
    "trunc": np.trunc,
    "sqrt": np.sqrt, "exp": np.exp, "log": np.log, "sin": np.sin, "cos": np.cos, "tan": np.tan,
    "asin": np.arcsin,
    "acos": np.arccos, "atan": np.arctan, "sinh": np.sinh, "cosh": np.cosh, "tanh": np.tanh,
    "asinh": np.arcsinh,
    "acosh": np.arccosh, "atanh": np.arctanh, "erf": np.vectorize(math.erf, otypes=[np.float64]),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)), "sign": np.sign, "not": np.logical_not, "bitnot": np.invert,
}  # fmt: skip


def _divide(a, b):
    if a.dtype.kind == "f":
        return a / b
    pairs = list(zip(a.ravel().tolist(), b.ravel().tolist()))
    quotients = [0 if y == 0 else abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1) for x, y in pairs]
    return _wrap(quotients, a)


def _wrap(numbers, like):
    """Python integers cut to the type and shape of an array."""
    low_bits = np.array([v & (2**64 - 1) for v in numbers], dtype=np.uint64)
    return low_bits.astype(like.dtype).reshape(like.shape)


def _power(a, b):
    if a.dtype.kind == "f":
        return np.power(a, b)
    pairs = zip(a.ravel().tolist(), b.ravel().tolist())
    return _wrap([x**y if y >= 0 else int(float(x) ** y) if x else 0 for x, y in pairs], a)


_BINARY = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": _divide, "floordiv": np.floor_divide,
    "mod": np.mod,
    "fmod": np.fmod, "pow": _power, "min": np.minimum, "max": np.maximum, "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor, "bitand": np.bitwise_and, "bitor": np.bitwise_or, "bitxor": np.bitwise_xor,
    "shl": np.left_shift, "shr": np.right_shift, "atan2": np.arctan2, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
}  # fmt: skip
_REDUCE = {"sum": np.add, "prod": np.multiply, "max": np.maximum, "min": np.minimum}


class Interpreter:
    """Evaluates expressions for given arrays (by load key) and symbol sizes."""

    def __init__(self, arrays, sizes=None):
        self.arrays, self.sizes = arrays, sizes or {}

    def run(self, root, extents):
        """The values of `root` at every point of a grid of the loop variables 0, 1, ..."""
        grid = (
            dict(enumerate(np.meshgrid(*(np.arange(e) for e in extents), indexing="ij"))) if extents else {}
        )
        with np.errstate(all="ignore"):
            return self.value(root, grid, tuple(extents), {})

    def value(self, e, grid, shape, memo):
        if e not in memo:
            result = np.asarray(self.compute(e, grid, shape, memo))
            memo[e] = np.broadcast_to(result, shape).astype(compute_type(e.dtype), copy=False)
        return memo[e]

    def compute(self, e, grid, shape, memo):
        if e.op == "const":
            return np.asarray(e.arg).astype(compute_type(e.dtype))
        if e.op == "iter":
            return grid[e.arg]
        if e.op == "dim":
            return np.int64(evaluate(e.arg, self.sizes))
        if e.op == "reduce":
            return self.reduce(e, grid, shape)
        args = [self.value(a, grid, shape, memo) for a in e.args]
        if e.op == "load":
            return self.load(e, args)
        if e.op == "select":
            return np.where(*args)
        if e.op == "cast":
            if e.dtype == boolean:
                return args[0] != 0
            return args[0].astype(e.dtype.numpy).astype(compute_type(e.dtype))
        return _UNARY[e.op](args[0]) if len(args) == 1 else _BINARY[e.op](*args)

    def load(self, e, index):
        array = self.arrays[e.arg]
        assert len(index) == array.ndim, f"{len(index)} indices for {array.ndim} axes"
        if (
            array.size == 0
        ):  # no position is in bounds; the value is never used, only its address must be readable
            return np.zeros((), compute_type(e.dtype))
        for axis, position in enumerate(index):
            inside = (position >= 0) & (position < array.shape[axis])
            assert inside.all(), (
                f"load of {e.arg}, axis {axis}: {position[~inside][:5]} is out of {array.shape[axis]}"
            )
        return array[tuple(index)].astype(compute_type(e.dtype))

    def reduce(self, e, grid, shape):
        kind, axes, extents = e.arg
        sizes = tuple(evaluate(x, self.sizes) for x in extents)
        inner = {axis: values.reshape(values.shape + (1,) * len(sizes)) for axis, values in grid.items()}
        for position, (axis, size) in enumerate(zip(axes, sizes)):
            inner[axis] = np.arange(size).reshape((size,) + (1,) * (len(sizes) - 1 - position))
        body = self.value(e.args[0], inner, shape + sizes, {})
        reduced = tuple(range(len(shape), len(shape) + len(sizes)))
        if kind.startswith("arg"):
            (axis,) = reduced
            ordered = np.flip(body, axis) if kind.endswith("_last") else body
            found = (np.argmax if "max" in kind else np.argmin)(ordered, axis=axis)
            return sizes[0] - 1 - found if kind.endswith("_last") else found
        if body.dtype == bool:
            return (np.logical_or if kind in ("max", "sum") else np.logical_and).reduce(body, axis=reduced)
        dtype = np.float64 if body.dtype.kind == "f" else body.dtype
        return _REDUCE[kind].reduce(body, axis=reduced, initial=_identity(kind, body.dtype),
        dtype=None if kind in (
            "max", "min") else dtype)  # fmt: skip


def _identity(kind, dtype):
    if kind in ("sum", "prod"):
        return dtype.type(0 if kind == "sum" else 1)
    if dtype.kind == "f":
        return dtype.type(-np.inf if kind == "max" else np.inf)
    return np.iinfo(dtype).min if kind == "max" else np.iinfo(dtype).max


class Composer:
    """An `Indexing` whose operands are arrays in memory; loop variables of reductions count from 100."""

    def __init__(self, node, output):
        self.node, self.output, self.counter = node, output, itertools.count(100)

    def load(self, operand, index):
        return ex.load(operand, self.type(operand).dtype, index)

    def has(self, operand):
        return operand < len(self.node.inputs) and self.node.inputs[operand] is not None

    def type(self, operand):
        return self.node.inputs[operand].tensor

    def out_type(self, output=0):
        return self.node.outputs[output].tensor

    def content(self, operand):
        content = self.node.inputs[operand].content
        assert content is not None, "asked for the content of an input that is not known"
        return content

    def reduce(self, kind, extents, body):
        axes = [next(self.counter) for _ in extents]
        return ex.reduce(kind, axes, extents, body(*(ex.iteration(a) for a in axes)))


def expression(node, output=0):
    """The expression of one element of an output, over loop variables 0, 1, ... of the output's axes."""
    rank = node.outputs[output].tensor.rank
    index = tuple(ex.iteration(axis) for axis in range(rank))
    if node.op.kind is not Kind.POINTWISE:
        return node.op.compute(Composer(node, output), index, **node.attrs)
    scalars = []
    for position, value in enumerate(node.inputs):
        if value is None:
            scalars.append(None)
            continue
        dims = value.tensor.dims
        own = index[rank - len(dims) :]
        scalars.append(ex.load(position, value.tensor.dtype, [0 if d == 1 else i for d, i in zip(dims, own)]))
    return node.op.compute(*scalars, **node.attrs)


def run_compute(node, arrays, sizes=None):
    """The outputs of a node with a `compute`, from the arrays of its inputs (None for a missing one)."""
    interpreter = Interpreter({i: a for i, a in enumerate(arrays) if a is not None}, sizes)
    results = []
    for output, value in enumerate(node.outputs):
        extents = tuple(evaluate(d, sizes or {}) for d in value.tensor.dims)
        root = expression(node, output)
        assert root.dtype == value.tensor.dtype, (
            f"compute gives {root.dtype}, infer says {value.tensor.dtype}"
        )
        with np.errstate(all="ignore"):
            results.append(interpreter.run(root, extents).astype(value.tensor.dtype.numpy))
    return results


def make_node(op, arrays, attrs=None, *, outputs=1, domain="", constants=(), names=()):
    """A graph with one node; inputs at `constants` (and static ones) are constants, others graph inputs."""
    from minicc.ir.opdef import get_op
    from minicc.ir.types import TensorType, dtype_of

    op = get_op(op, domain)
    graph = Graph()
    values = []
    for position, array in enumerate(arrays):
        if array is None:
            values.append(None)
        elif position in constants or position in op.static_inputs:
            values.append(graph.constant(np.asarray(array)))
        else:
            values.append(graph.input(f"x{position}", TensorType(dtype_of(array.dtype), array.shape)))
    node = graph.add(op, values, attrs or {}, outputs=outputs)
    graph.outputs = list(node.outputs)
    return node, graph
