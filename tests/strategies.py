"""Hypothesis strategies for random ONNX models: `models()` gives (ModelProto, feeds).

Models are convolutional or general, with a symbolic batch axis or without, and hold what passes look for:
shape arithmetic, identities, chains of views, normalisations after convolutions, repeated subexpressions.
Values stay moderate, and every function is continuous (or its inputs are integers), so that rounding errors
stay small.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]
OPSET = 21
BATCH = 2  # what the symbol "n" stands for in the feeds
UNARY = (
    "Relu",
    "Sigmoid",
    "Tanh",
    "Abs",
    "Neg",
    "Identity",
    "HardSwish",
    "Softplus",
    "LeakyRelu",
    "Erf",
    "Dropout",
)
BINARY = ("Add", "Sub", "Mul", "Max", "Min")
NEUTRAL = (("Add", -0.0), ("Sub", 0.0), ("Mul", 1.0), ("Div", 1.0), ("Pow", 1.0), ("Div", 4.0), ("Pow", 2.0))


@dataclass
class ModelSketch:
    """A model being grown; `shapes` holds the sizes of its float values, with axis 0 being the batch."""

    draw: Any
    rng: np.random.Generator
    symbolic: bool
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    inputs: dict[str, Array] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def pick(self, options: Any) -> Any:
        return self.draw(st.sampled_from(list(options)))

    def name(self) -> str:
        return f"v{len(self.nodes)}_{len(self.constants)}"

    def constant(self, array: Any, dtype: Any = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array, dtype=dtype), name))
        return name

    def weights(self, *shape: int) -> str:
        scale = 1 / np.sqrt(max(int(np.prod(shape[1:])), 1))
        return self.constant(self.rng.standard_normal(shape) * scale)

    def ints(self, *items: int) -> str:
        return self.constant(items, np.int64)

    def input(self, *shape: int) -> str:
        name = f"x{len(self.inputs)}"
        self.inputs[name] = self.rng.standard_normal(shape).astype(np.float32)
        self.shapes[name] = shape
        return name

    def op(
        self, kind: str, *inputs: str, shape: tuple[int, ...] | None = None, outputs: int = 1, **attrs: Any
    ) -> str:
        out = self.name()
        names = [out, *(f"{out}_{i}" for i in range(1, outputs))]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=f"node{len(self.nodes)}", **attrs))
        if shape is not None:
            self.shapes[out] = shape
        return out

    # -- general nodes; each returns a float value

    def unary(self, x: str) -> str:
        return self.op(self.pick(UNARY), x, shape=self.shapes[x])

    def neutral(self, x: str) -> str:
        kind, number = self.pick(NEUTRAL)
        return self.op(kind, x, self.constant(number), shape=self.shapes[x])

    def binary(self, x: str) -> str:
        shape = self.shapes[x]
        same = [v for v, s in self.shapes.items() if s == shape]
        which = self.pick(("same", "channel", "scalar"))
        if which == "same":
            y = self.pick(same)
        elif which == "scalar":
            y = self.constant(float(self.rng.integers(1, 4)) / 2)
        else:
            y = self.weights(*(d if a == 1 else 1 for a, d in enumerate(shape)))
        return self.op(self.pick(BINARY), *((x, y) if self.pick((True, False)) else (y, x)), shape=shape)

    def repeated(self, x: str) -> str:
        a, b = (self.op("Tanh", x, shape=self.shapes[x]) for _ in range(2))
        return self.op("Sub", a, b, shape=self.shapes[x])

    def views(self, x: str) -> str:
        shape = self.shapes[x]
        if len(shape) < 3:
            return self.op("Unsqueeze", x, self.ints(len(shape)), shape=(*shape, 1))
        merged = self.op("Flatten", x, axis=2, shape=(shape[0] * shape[1], int(np.prod(shape[2:]))))
        again = self.op("Reshape", merged, self.ints(-1, *shape[1:]), shape=shape)
        return self.op("Squeeze", self.op("Unsqueeze", again, self.ints(1)), self.ints(1), shape=shape)

    def transpose(self, x: str) -> str:
        shape = self.shapes[x]
        perm = [0, *(int(a) + 1 for a in self.rng.permutation(len(shape) - 1))]
        return self.op("Transpose", x, perm=perm, shape=tuple(shape[a] for a in perm))

    def shape_arithmetic(self, x: str) -> str:
        """Reshape to a shape computed from the value's own."""
        shape = self.shapes[x]
        whole = self.op("Shape", x)
        first = self.op("Gather", whole, self.ints(0), axis=0)
        target = self.op("Concat", first, self.ints(-1), axis=0)
        return self.op("Reshape", x, target, shape=(shape[0], int(np.prod(shape[1:]))))

    def slice(self, x: str) -> str:
        shape = self.shapes[x]
        axis = self.pick(range(1, len(shape)))
        if shape[axis] < 2:
            return self.unary(x)
        low = int(self.rng.integers(0, shape[axis] - 1))
        out = (*shape[:axis], shape[axis] - low, *shape[axis + 1 :])
        return self.op("Slice", x, self.ints(low), self.ints(2**62), self.ints(axis), shape=out)

    def split_and_join(self, x: str) -> str:
        shape = self.shapes[x]
        axis = self.pick(range(1, len(shape)))
        if shape[axis] < 2:
            return self.unary(x)
        first = self.op("Split", x, self.ints(1, shape[axis] - 1), axis=axis, outputs=2)
        return self.op("Concat", f"{first}_1", first, axis=axis, shape=shape)

    def pad(self, x: str) -> str:
        shape = self.shapes[x]
        amounts = [0, *(int(v) for v in self.rng.integers(0, 2, len(shape) - 1))]
        after = [0, *(int(v) for v in self.rng.integers(0, 2, len(shape) - 1))]
        out = tuple(d + p + q for d, p, q in zip(shape, amounts, after))
        return self.op("Pad", x, self.ints(*amounts, *after), shape=out)

    def reduce(self, x: str) -> str:
        shape = self.shapes[x]
        axis = self.pick(range(1, len(shape)))
        keep = self.pick((0, 1)) if len(shape) > 2 else 1
        out = tuple(1 if a == axis else d for a, d in enumerate(shape) if keep or a != axis)
        kind = self.pick(("ReduceMean", "ReduceSum", "ReduceMax"))
        return self.op(kind, x, self.ints(axis), keepdims=keep, shape=out)

    def softmax(self, x: str) -> str:
        return self.op("Softmax", x, axis=self.pick((1, -1)), shape=self.shapes[x])

    def layer_norm(self, x: str) -> str:
        size = self.shapes[x][-1]
        return self.op("LayerNormalization", x, self.weights(size), self.weights(size), shape=self.shapes[x])

    def matmul(self, x: str) -> str:
        shape = self.shapes[x]
        product = self.op("MatMul", x, self.weights(shape[-1], 5), shape=(*shape[:-1], 5))
        return self.op("Add", product, self.weights(5), shape=self.shapes[product])

    def flattened_product(self, x: str) -> str:
        """A product on rows, as exporters write a linear layer, with bias, activation and residual sum."""
        shape = self.shapes[x]
        rows, depth = int(np.prod(shape[:-1])), shape[-1]
        first = -1 if self.symbolic else rows
        flat = self.op("Reshape", x, self.ints(first, depth), shape=(rows, depth))
        product = self.op("Gemm", flat, self.weights(depth, depth), self.weights(depth), shape=(rows, depth))
        active = self.op("Relu", product, shape=(rows, depth)) if self.pick((True, False)) else product
        back = self.op("Reshape", active, self.ints(-1, *shape[1:]), shape=shape)
        return self.op("Add", back, x, shape=shape)

    def clip(self, x: str) -> str:
        inner = self.op("Clip", x, self.constant(-1.5), self.constant(2.0), shape=self.shapes[x])
        return self.op("Clip", inner, self.constant(-2.0), self.constant(1.0), shape=self.shapes[x])

    def cast(self, x: str) -> str:
        wide = self.op("Cast", x, to=TensorProto.DOUBLE)
        return self.op("Cast", wide, to=TensorProto.FLOAT, shape=self.shapes[x])

    def where(self, x: str) -> str:
        condition = self.op("Greater", self.constant([3.0]), self.constant([float(self.rng.integers(0, 6))]))
        return self.op("Where", condition, x, self.op("Neg", x), shape=self.shapes[x])

    def squeeze_excite(self, x: str) -> str:
        """A gate per channel, as in many convolutional networks."""
        shape = self.shapes[x]
        if len(shape) != 4:
            return self.unary(x)
        mean = self.op("GlobalAveragePool", x, shape=(*shape[:2], 1, 1))
        gate = self.op("Conv", mean, self.weights(shape[1], shape[1], 1, 1), shape=(*shape[:2], 1, 1))
        return self.op("Mul", x, self.op("Sigmoid", gate), shape=shape)

    # -- images

    def conv(self, x: str) -> str:
        shape = self.shapes[x]
        if len(shape) != 4 or min(shape[2:]) < 2:
            return self.unary(x)
        group = shape[1] if self.pick((False, True)) else 1
        channels = shape[1] if group > 1 else self.pick((3, 4))
        stride = self.pick((1, 2))
        weights = self.weights(channels, shape[1] // group, 3, 3)
        bias = [self.weights(channels)] if self.pick((True, False)) else []
        size = tuple((d - 1) // stride + 1 for d in shape[2:])
        return self.op("Conv", x, weights, *bias, group=group, pads=[1, 1, 1, 1], strides=[stride, stride],
                       shape=(shape[0], channels, *size))  # fmt: skip

    def batch_norm(self, x: str) -> str:
        channels = self.shapes[x][1]
        positive = self.constant(self.rng.uniform(0.5, 2, channels))
        vectors = [
            self.constant(self.rng.uniform(0.5, 1.5, channels)),
            self.weights(channels),
            self.weights(channels),
        ]
        return self.op("BatchNormalization", x, *vectors, positive, shape=self.shapes[x])

    def pool(self, x: str) -> str:
        shape = self.shapes[x]
        if len(shape) != 4 or min(shape[2:]) < 2:
            return self.unary(x)
        kind = self.pick(("MaxPool", "AveragePool"))
        out = (*shape[:2], *(d - 1 for d in shape[2:]))
        return self.op(kind, x, kernel_shape=[2, 2], shape=out)

    def residual(self, x: str) -> str:
        return self.op("Add", self.op("Relu", x), x, shape=self.shapes[x])

    def grow(self, count: int) -> onnx.ModelProto:
        image = self.pick((True, False))
        shape = (
            (BATCH, self.pick((1, 3, 4)), 5, 4) if image else (BATCH, *self.pick(((6,), (3, 4), (2, 3, 4))))
        )
        kinds = [
            self.unary, self.neutral, self.binary, self.repeated, self.views, self.transpose,
            self.shape_arithmetic, self.slice, self.split_and_join, self.pad, self.reduce, self.softmax,
            self.layer_norm, self.matmul, self.clip, self.cast, self.where, self.residual,
            self.batch_norm, self.flattened_product,
        ]  # fmt: skip
        if image:
            kinds += [self.conv] * 6 + [
                self.pool,
                self.pool,
                self.squeeze_excite,
                self.batch_norm,
                self.residual,
            ]
        current = self.input(*shape)
        for _ in range(count):
            current = self.pick([v for v in self.shapes if 1 < int(np.prod(self.shapes[v])) < 3000][-3:])
            self.pick(kinds)(current)
        read = {name for node in self.nodes for name in node.input}
        outputs = [v for v in self.shapes if v not in read and v not in self.inputs]
        return self.model(outputs)

    def model(self, outputs: list[str]) -> onnx.ModelProto:
        def info(name: str, shape: tuple[int, ...] | None) -> onnx.ValueInfoProto:
            dims: Any = None if shape is None else [*(["n"] if self.symbolic else [shape[0]]), *shape[1:]]
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)

        inputs = [info(name, array.shape) for name, array in self.inputs.items()]
        results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "random", inputs, results, self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


@st.composite
def models(draw: Any, max_nodes: int = 10) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A model and arrays for its inputs."""
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    sketch = ModelSketch(draw, rng, symbolic=draw(st.booleans()))
    model = sketch.grow(draw(st.integers(1, max_nodes)))
    return model, sketch.inputs
