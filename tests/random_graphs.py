"""Random graphs for comparing ways to compute them.

"exact" graphs hold small integers in every element type, so that any order of arithmetic gives the same bits
and comparisons and positions of maxima may appear anywhere. "smooth" ones hold real numbers and continuous
functions only, so that rounding errors stay rounding errors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import minicc.ops  # noqa: F401  registers the ops
from minicc.ir.dims import Dim, evaluate, product, symbol
from minicc.ir.graph import Graph, Value
from minicc.ir.types import DType, TensorType, f16, f32, f64, i32, i64

SIZES = (1, 2, 3, 4, 6, 7)
_UNARY = {
    True: ("Neg", "Abs", "Relu", "Sign", "Identity"),
    False: ("Neg", "Abs", "Relu", "Sigmoid", "Tanh", "Erf", "HardSwish", "Gelu", "Softplus", "Sin"),
}
_REDUCE = {
    True: ("ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1"),
    False: ("ReduceSum", "ReduceMax", "ReduceMean", "ReduceL2", "ReduceLogSumExp"),
}


class Sketch:
    """A graph being grown node by node; every method returns the new value."""

    def __init__(self, seed: int, *, exact: bool, symbolic: bool, dtype: DType = f32) -> None:
        self.rng = np.random.default_rng(seed)
        self.exact, self.dtype = exact, dtype
        self.graph = Graph(f"random{seed}")
        self.sizes: dict[str, int] = {}
        self.symbolic = {int(s) for s in self.rng.choice(SIZES[1:], 2, replace=False)} if symbolic else set()
        self.values: list[Value] = []

    def pick(self, options: Any) -> Any:
        options = list(options)
        return options[int(self.rng.integers(len(options)))]

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def dim(self, size: int) -> Dim:
        if size not in self.symbolic:
            return size
        self.sizes[f"n{size}"] = size
        return symbol(f"n{size}")

    def input(self, shape: tuple[Dim, ...], dtype: DType | None = None) -> Value:
        value = self.graph.input(f"x{len(self.graph.inputs)}", TensorType(dtype or self.dtype, shape))
        self.values.append(value)
        return value

    def numbers(self, shape: tuple[int, ...]) -> np.ndarray:  # type: ignore[type-arg]
        found = self.rng.integers(-4, 5, shape) if self.exact else self.rng.standard_normal(shape)
        return np.asarray(found).astype(self.dtype.numpy)

    def op(self, name: str, *inputs: Value | None, outputs: int = 1, **attrs: Any) -> Value:
        made = self.graph.add(name, inputs, attrs, outputs=outputs).outputs
        return self.pick(made)

    def ints(self, *items: Dim) -> Value:
        return self.graph.symbolic_constant(list(items))

    def bounded(self, value: Value) -> Value:
        """Keeps numbers small enough for every element type."""
        limits = [self.graph.constant(np.array(v, value.tensor.dtype.numpy)) for v in (-9, 9)]
        return self.op("Clip", value, *limits)

    # -- kinds of nodes

    def unary(self, x: Value) -> Value:
        return self.op(self.pick(_UNARY[self.exact]), x)

    def partner(self, x: Value) -> Value:
        """Something to combine x with: another value, a new input or a constant, perhaps to be broadcast."""
        same = [v for v in self.values if v.shape == x.shape and v.tensor.dtype == x.tensor.dtype]
        if self.chance(0.5):
            return self.pick(same)
        keep = self.chance(0.3)
        shape = [d if keep or self.chance(0.6) else 1 for d in x.shape]
        shape = shape[int(self.rng.integers(len(shape) + 1)) :] if self.chance(0.3) else shape
        if all(isinstance(d, int) for d in shape) and self.chance(0.5):
            return self.graph.constant(self.numbers(tuple(int(d) for d in shape)))  # type: ignore[arg-type]
        return self.input(tuple(shape))

    def binary(self, x: Value) -> Value:
        y = self.partner(x)
        if self.chance(0.2):
            condition = self.op(self.pick(("Greater", "LessOrEqual")), x, y) if self.exact else None
            if condition is not None:
                return self.op("Where", condition, y, x)
        name = self.pick(("Add", "Sub", "Mul", "Max", "Min"))
        out = self.op(name, *((x, y) if self.chance(0.5) else (y, x)))
        return self.bounded(out)

    def transpose(self, x: Value) -> Value:
        return self.op("Transpose", x, perm=tuple(int(a) for a in self.rng.permutation(len(x.shape))))

    def reshape(self, x: Value) -> Value:
        """Splits, merges, adds or removes axes."""
        shape = list(x.shape)
        way = self.rng.integers(4)
        if way == 0 and len(shape) > 1:
            a = int(self.rng.integers(len(shape) - 1))
            shape[a : a + 2] = [shape[a] * shape[a + 1]]
        elif way == 1:
            a = int(self.rng.integers(len(shape)))
            if isinstance(shape[a], int) and shape[a] in (4, 6, 12):
                shape[a : a + 1] = [2, shape[a] // 2]
        elif way == 2:
            shape.insert(int(self.rng.integers(len(shape) + 1)), 1)
        elif any(d == 1 for d in shape):
            shape.remove(1)
        return self.op("Reshape", x, self.ints(*shape)) if shape else x

    def slice(self, x: Value) -> Value:
        a = int(self.rng.integers(len(x.shape)))
        start, end, step = self.pick(((1, 1 << 40, 1), (0, -1, 1), (-1, -(1 << 40), -1), (0, 1 << 40, 2)))
        known = isinstance(x.shape[a], int)
        if not known or x.shape[a] < 2:  # type: ignore[operator]
            start, end, step = -1, -(1 << 40), -1
        return self.op("Slice", x, self.ints(start), self.ints(end), self.ints(a), self.ints(step))

    def expand(self, x: Value) -> Value:
        sizes = [size if f"n{size}" not in self.sizes else symbol(f"n{size}") for size in SIZES]
        shape = [self.pick(sizes) if d == 1 else d for d in x.shape]
        return self.op("Expand", x, self.ints(*shape))

    def split(self, x: Value) -> Value:
        axes = [a for a, d in enumerate(x.shape) if isinstance(d, int) and d > 1]
        if not axes:
            return x
        a = self.pick(axes)
        first = int(self.rng.integers(1, x.shape[a]))  # type: ignore[arg-type]
        return self.op("Split", x, self.ints(first, x.shape[a] - first), outputs=2, axis=a)

    def concat(self, x: Value) -> Value:
        a = int(self.rng.integers(len(x.shape)))
        return self.op(
            "Concat",
            x,
            self.pick([v for v in self.values if v.shape == x.shape and v.type == x.type]),
            axis=a,
        )

    def pad(self, x: Value) -> Value:
        amounts = [int(v) for v in self.rng.integers(0, 2, 2 * len(x.shape))]
        return self.op("Pad", x, self.ints(*amounts), mode=self.pick(("constant", "edge")))

    def gather(self, x: Value) -> Value:
        a = int(self.rng.integers(len(x.shape)))
        size = x.shape[a]
        indices = self.rng.integers(-size, size, self.pick(((2,), (2, 2), ()))) if isinstance(size, int) else np.array([0, -1])
        return self.op("Gather", x, self.graph.constant(np.asarray(indices, np.int64)), axis=a)

    def reduction(self, x: Value) -> Value:
        count = int(self.rng.integers(1, len(x.shape) + 1))
        axes = sorted(int(a) for a in self.rng.choice(len(x.shape), count, replace=False))
        name, keep = self.pick(_REDUCE[self.exact]), int(self.chance(0.6))
        if self.exact and self.chance(0.2):
            position = self.op(
                self.pick(("ArgMax", "ArgMin")),
                x,
                axis=axes[0],
                keepdims=keep,
                select_last_index=int(self.chance(0.5)),
            )
            return self.op("Cast", position, to=self.dtype)
        return self.bounded(self.op(name, x, self.ints(*axes), keepdims=keep))

    def normalise(self, x: Value) -> Value:
        """Rows computed from their own reductions, as softmax and layer normalisation do."""
        axes = self.ints(len(x.shape) - 1)
        if self.exact:
            return self.bounded(self.op("Sub", x, self.op("ReduceMax", x, axes)))
        if self.chance(0.5):
            return self.op("Softmax", x, axis=self.pick((-1, 0)))
        centred = self.op("Sub", x, self.op("ReduceMean", x, axes))
        square = self.op("ReduceMean", self.op("Mul", centred, centred), axes)
        one = self.graph.constant(np.array(1, self.dtype.numpy))
        return self.op("Div", centred, self.op("Sqrt", self.op("Add", square, one)))

    def matmul(self, x: Value) -> Value:
        depth = x.shape[-1]
        if len(x.shape) < 2:
            return x
        columns = self.pick((1, 3, 17))
        if isinstance(depth, int) and self.chance(0.7):
            right = self.graph.constant(self.numbers((depth, columns)))
        else:
            right = self.input((depth, columns))
        return self.bounded(self.op("MatMul", x, right))

    def sequential(self, x: Value) -> Value:
        if self.chance(0.5):
            axis = self.graph.constant(np.array(int(self.rng.integers(len(x.shape)))))
            return self.bounded(self.op("CumSum", x, axis, reverse=int(self.chance(0.5))))
        slice_ = self.input(x.shape[1:]) if len(x.shape) > 1 else self.graph.constant(self.numbers(()))
        update = self.op("Unsqueeze", slice_, self.ints(0))
        return self.op("ScatterND", x, self.graph.constant(np.array([[0]])), update)

    def grow(self, nodes: int, products: float = 0.5) -> None:
        """Nodes of every kind and the graph's outputs; `products` is the weight of matrix products."""
        rank = int(self.rng.integers(1, 5))
        self.input(tuple(self.dim(self.pick(SIZES)) for _ in range(rank)))
        kinds: list[tuple[Callable[[Value], Value], float]] = [
            (self.unary, 4),
            (self.binary, 5),
            (self.transpose, 2),
            (self.reshape, 2),
            (self.slice, 1),
            (self.expand, 1),
            (self.split, 1),
            (self.concat, 0.7),
            (self.pad, 0.7),
            (self.gather, 1),
            (self.reduction, 1.5),
            (self.normalise, 0.7),
            (self.matmul, products),
            (self.sequential, 0.3),
        ]
        weights = np.array([w for _, w in kinds])
        while len(self.graph.nodes) < nodes:
            x = self.pick(self.values[-4:] if self.chance(0.8) else self.values)
            if not x.shape or x.tensor.dtype != self.dtype:
                x = self.values[0]
            kind = kinds[int(self.rng.choice(len(kinds), p=weights / weights.sum()))][0]
            value = kind(x)
            elements = evaluate(product(value.shape), self.sizes)
            if value not in self.values and value.tensor.dtype == self.dtype and 0 < elements < 4000 and value.shape:
                self.values.append(value)
        used = {v for node in self.graph.nodes for v in node.inputs}
        ends = [v for node in self.graph.nodes for v in node.outputs if v not in used]
        middle = [v for v in self.values if v.producer is not None and v not in ends]
        self.graph.outputs = ends + ([self.pick(middle)] if middle else [])
        self.graph.tidy()

    def feeds(self, sizes: dict[str, int]) -> list[np.ndarray]:  # type: ignore[type-arg]
        return [self.numbers(tuple(evaluate(d, sizes) for d in v.shape)) for v in self.graph.inputs]


def random_graph(seed: int, nodes: int = 12) -> tuple[Graph, list[list[np.ndarray]]]:  # type: ignore[type-arg]
    """A graph and several inputs for it, of different sizes if it has symbols; the seed decides everything."""
    kind = np.random.default_rng(seed)
    exact = bool(kind.random() < 0.5)
    dtype = (f32, f32, f32, i32, i64, f64, f16)[int(kind.integers(7))] if exact else f32
    sketch = Sketch(seed, exact=exact, symbolic=bool(kind.random() < 0.5), dtype=dtype)
    sketch.grow(nodes)
    sizes = [sketch.sizes]
    if sketch.sizes:
        sizes += [{name: size + change for name, size in sketch.sizes.items()} for change in (3, -1)]
    return sketch.graph, [sketch.feeds(s) for s in sizes]
