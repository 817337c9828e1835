"""com.microsoft's DynamicQuantizeLSTM: an LSTM with 8-bit weights and activations quantised while it runs.

Weights are [D, I, 4H] and [D, H, 4H], transposed against ONNX's LSTM. Every step quantises the hidden state
by its own range, as ONNX Runtime does, so it expands into a Scan over integer products and not into an LSTM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from minicc.errors import ShapeError
from minicc.ir.graph import Builder
from minicc.ir.opdef import Inference, Kind, OpDef, register
from minicc.ir.types import TensorType, f32
from minicc.ops.helpers import Array, default_refuse
from minicc.ops.norm import optional, required, reshaped
from minicc.ops.recurrent import (
    RECURRENT_ATTRS,
    Activation,
    activations_of,
    biases,
    directions_of,
    lstm_directions,
    output_types,
    time_major,
)  # fmt: skip

if TYPE_CHECKING:
    from minicc.ir.graph import Graph, Node, Value

_DEFAULTS = ("Sigmoid", "Tanh", "Tanh")


def _quantised_infer(n: Inference) -> list[TensorType]:
    try:
        directions = len(directions_of(n.attrs))
        activations_of(n.attrs, _DEFAULTS)
    except ShapeError as error:
        raise n.error(error.what, error.hint) from error
    if n.rank(0) != 3 or n.rank(1) != 3 or n.rank(2) != 3:
        raise n.error("X, W and R must have rank 3")
    return output_types(n, n.shape(2)[1], directions, 2)


def dequantised_weight(weight: Array, scale: Array, zero: Array) -> Array:
    """Float32 weights [D, K, 4H] from 8-bit ones with a scale for each direction, or for each direction and
    column.
    """
    shape = (weight.shape[0], 1, -1)
    return np.asarray(
        (weight.astype(np.float32) - zero.astype(np.float32).reshape(shape)) * scale.reshape(shape)
    )


def fake_quantised(x: Array) -> Array:
    """x rounded to the 256 steps of its own range, as DynamicQuantizeLinear followed by DequantizeLinear."""
    low, high = min(np.float32(0), x.min(initial=0)), max(np.float32(0), x.max(initial=0))
    scale = np.float32((high - low) / np.float32(255))
    if scale == 0:
        scale = np.float32(1)
    zero = np.clip(np.rint(-low / scale), 0, 255).astype(np.float32)
    numbers = np.clip(np.rint(x / scale) + zero, 0, 255)
    return np.asarray(((numbers - zero) * scale).astype(np.float32))


def _quantised_eval(
    x: Array,
    w: Array,
    r: Array,
    b: Array | None,
    lengths: Array | None,
    initial_h: Array | None,
    initial_c: Array | None,
    p: Array | None,
    w_scale: Array,
    w_zero: Array,
    r_scale: Array,
    r_zero: Array,
    **attrs: Any,
) -> tuple[Array, ...]:
    hidden = r.shape[1]
    directions = len(directions_of(attrs))
    x, states = time_major(x, [initial_h, initial_c], directions, hidden, attrs["layout"])
    w_float, r_float = dequantised_weight(w, w_scale, w_zero), dequantised_weight(r, r_scale, r_zero)
    rounded = fake_quantised(x)
    with np.errstate(all="ignore"):
        projections = [
            rounded @ w_float[d] + np.add(*biases(b, d, 4 * hidden, x.dtype)) for d in range(directions)
        ]
        return lstm_directions(
            x, hidden, lambda d, h: fake_quantised(h) @ r_float[d], projections, states, lengths, p, attrs
        )


# -- expansion

# activation name: (operator, names of its attributes)
_OPERATORS = {
    "relu": ("Relu", ()),
    "tanh": ("Tanh", ()),
    "sigmoid": ("Sigmoid", ()),
    "softsign": ("Softsign", ()),
    "softplus": ("Softplus", ()),
    "leakyrelu": ("LeakyRelu", ("alpha",)),
    "thresholdedrelu": ("ThresholdedRelu", ("alpha",)),
    "hardsigmoid": ("HardSigmoid", ("alpha", "beta")),
    "elu": ("Elu", ("alpha",)),
}


def _refuse(node: Node) -> str | None:
    if optional(node, 4) is not None:
        return "DynamicQuantizeLSTM with sequence lengths"
    if any(a.name not in _OPERATORS for each in activations_of(node.attrs, _DEFAULTS) for a in each):
        return "an activation that is no operator"
    return default_refuse(node)


def _applied(b: Builder, activation: Activation, x: Value, clip: float | None) -> Value:
    if clip:
        x = b.op("Clip", x, b.scalar(-clip, x), b.scalar(clip, x))
    operator, names = _OPERATORS[activation.name]
    parameters: dict[str, Any] = dict(zip(names, activation.parameters))
    return b.op(operator, x, **parameters)


def _integer_product(b: Builder, x: Value, weight: Value, scale: Value, zero: Value) -> Value:
    """x @ weight with x quantised by its range, in float32."""
    numbers, x_scale, x_zero = b.ops("DynamicQuantizeLinear", x, outputs=3)
    total = b.op("Cast", b.op("MatMulInteger", numbers, weight, x_zero, zero), to=f32)
    return b.op("Mul", total, b.op("Mul", scale, x_scale))


def _step(
    outer: Graph, values: list[Value], peephole: bool, functions: tuple[Activation, ...], attrs: Any
) -> Graph:
    """The body of the Scan: (h, c, projected input, R, scale, zero point, peephole) to (h, c, h)."""
    body = outer.subgraph("lstm_step")
    h, c, projected, weight, scale, zero, *peep = (body.input(f"x{i}", v.type) for i, v in enumerate(values))
    projected.type = TensorType(f32, projected.shape[1:])
    b = Builder(body)
    gates = b.op("Add", projected, _integer_product(b, h, weight, scale, zero))
    i, o, forget, new = b.ops("Split", gates, outputs=4, axis=1, num_outputs=4)
    f, g, last = functions
    if peephole:
        weights = b.ops("Split", peep[0], outputs=3, axis=0, num_outputs=3)
        i, forget = (
            b.op("Add", i, b.op("Mul", weights[0], c)),
            b.op("Add", forget, b.op("Mul", weights[2], c)),
        )
    i = _applied(b, f, i, attrs["clip"])
    if attrs["input_forget"]:
        forget = b.op("Sub", b.scalar(1, i), i)
    else:
        forget = _applied(b, f, forget, attrs["clip"])
    c = b.op("Add", b.op("Mul", forget, c), b.op("Mul", i, _applied(b, g, new, attrs["clip"])))
    if peephole:
        o = b.op("Add", o, b.op("Mul", weights[1], c))
    h = b.op("Mul", _applied(b, f, o, attrs["clip"]), _applied(b, last, c, None))
    body.outputs = [h, c, h]
    return body


def _expand(b: Builder, node: Node) -> list[Value]:
    attrs = node.attrs
    x = required(node, 0)
    batch_major = attrs["layout"] == 1
    x = b.op("Transpose", x, perm=[1, 0, 2]) if batch_major else x
    hidden = required(node, 2).shape[1]
    bias, peephole = optional(node, 3), optional(node, 7)
    states = [optional(node, 5), optional(node, 6)]
    sequences, finals = [], ([], [])  # type: tuple[list[Value], tuple[list[Value], list[Value]]]
    for d, (backwards, functions) in enumerate(zip(directions_of(attrs), activations_of(attrs, _DEFAULTS))):
        number = b.constant(np.int64(d))
        w, r, w_scale, w_zero, r_scale, r_zero = (
            b.op("Gather", required(node, i), number, axis=0) for i in (1, 2, 8, 9, 10, 11)
        )
        projected = _integer_product(b, x, w, w_scale, w_zero)
        if bias is not None:
            halves = b.ops("Split", b.op("Gather", bias, number, axis=0), outputs=2, axis=0, num_outputs=2)
            projected = b.op("Add", projected, b.op("Add", *halves))
        initial = []
        for state in states:
            if state is None:
                initial.append(b.op("Expand", b.constant(np.float32(0)), b.shape([x.shape[1], hidden])))
            else:
                initial.append(b.op("Gather", state, number, axis=1 if batch_major else 0))
        captures = [r, r_scale, r_zero]
        if peephole is not None:
            captures.append(b.op("Gather", peephole, number, axis=0))
        values = [*initial, projected, *captures]
        body = _step(b.graph, values, peephole is not None, functions, attrs)
        h, c, sequence = b.ops(
            "Scan", *values, outputs=3, body=body, n_state=2, num_scan_inputs=1,
            scan_input_directions=[int(backwards)], scan_output_directions=[int(backwards)],
        )  # fmt: skip
        sequences.append(reshaped(b, sequence, (sequence.shape[0], 1, *sequence.shape[1:])))
        for final, state in zip(finals, (h, c)):
            final.append(reshaped(b, state, (1, *state.shape)))
    y = b.op("Concat", *sequences, axis=1)
    out = [y, *(b.op("Concat", *final, axis=0) for final in finals)]
    if batch_major:
        out = [b.op("Transpose", v, perm=p) for v, p in zip(out, ([2, 0, 1, 3], [1, 0, 2], [1, 0, 2]))]
    return out[: len(node.outputs)]


register(
    OpDef(
        "DynamicQuantizeLSTM",
        Kind.EXPAND,
        infer=_quantised_infer,
        eval=_quantised_eval,
        expand=_expand,
        refuse=_refuse,
        attrs={**RECURRENT_ATTRS, "input_forget": 0},
        domain="com.microsoft",
    )
)
