"""LSTM, GRU and RNN: one product for the input's share of all steps, then the `recurrent` template."""

from __future__ import annotations

from typing import Any

import numpy as np

from minicc.ir.dims import Dim, ceil_divide, product
from minicc.ir.expr import accumulator, iteration, load, reduce
from minicc.ir.graph import Node, Value
from minicc.ir.types import f32
from minicc.kernels import packing
from minicc.kernels.domain import panel_columns
from minicc.kernels.recurrent import panel_units
from minicc.lower.affine import linearise
from minicc.lower.body import Write, normalise_epilogue
from minicc.lower.context import Lowering
from minicc.lower.program import Word
from minicc.lower.templates import common
from minicc.ops.recurrent import Activation, activations_of, directions_of
from minicc.targets.cpu import CpuTarget
from minicc.targets.cuda import CudaTarget

Array = np.ndarray[Any, Any]
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
DEFAULTS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}
# Names of the template's functions, where they are not ONNX's in lower case.
FUNCTIONS = {
    "leakyrelu": "leaky_relu", "thresholdedrelu": "thresholded_relu", "scaledtanh": "scaled_tanh",
    "hardsigmoid": "hard_sigmoid",
}  # fmt: skip


def lower_recurrent(low: Lowering, node: Node, lead: Node | None) -> str:
    """A recurrent layer with constant weights in float32."""
    assert lead is None
    inputs = [*node.inputs, *[None] * (8 - len(node.inputs))]
    x, w, r, b, lengths, h0, c0, peepholes = inputs[:8]
    assert x is not None and w is not None and r is not None
    cell = node.op.name
    if x.tensor.dtype != f32:
        return f"no recurrent kernel for {x.tensor.dtype}"
    if w.data is None or r.data is None or (b is not None and b.data is None):
        return "the weights are computed at run time"
    directions = activations_of(node.attrs, DEFAULTS[cell])
    if len(set(directions)) > 1:
        return "the two directions have different activations"
    count, hidden, backwards = GATES[cell], r.data.shape[2], directions_of(node.attrs)
    batch_major = node.attrs["layout"] == 1
    batch, steps = (x.shape[0], x.shape[1]) if batch_major else (x.shape[1], x.shape[0])
    number, width = len(backwards), count * hidden
    linear_before_reset = int(node.attrs.get("linear_before_reset", 0))
    bias, recurrent_bias = _biases(b, cell, number, hidden, linear_before_reset)
    gates, gate_strides = _input_share(low, node, x, w, bias, (number, steps, batch, width), batch_major)
    whole = isinstance(low.target, CpuTarget) and (cell != "GRU" or linear_before_reset == 1)  # gates of a step are one product
    first = width if whole or cell != "GRU" else 2 * hidden
    nr = panel_units(low.target, hidden) if isinstance(low.target, CpuTarget) else panel_columns(low.target, width)
    packed, size = _packed(low, r, nr, 0, first // hidden)
    second, second_size = _packed(low, r, nr, first // hidden, count) if first < width else (None, 0)
    state_d, state_b = (hidden, number * hidden) if batch_major else (batch * hidden, hidden)
    y_d, y_t, y_b = ((hidden, number * hidden, steps * number * hidden) if batch_major
                     else (batch * hidden, number * batch * hidden, hidden))  # fmt: skip
    results = [low.allocate(v) if v.uses or _is_output(v) else None for v in node.outputs]
    results += [None] * (3 - len(results))
    scratch = low.temporary("recurrent_scratch", f32, (number * 2 * (batch + 8) * 5 * hidden,))

    def address(buffer: int | None) -> Word:
        return Word(0) if buffer is None else Word(0, buffer)

    def operand(value: Value | None) -> Word:
        return Word(0) if value is None else Word(0, low.buffer(value))

    rb = None if recurrent_bias is None else low.constant(recurrent_bias, "recurrent_bias")
    values: dict[str, Word | Dim] = {
        "GATES": Word(0, gates), "R": Word(0, packed), "R2": address(second), "RB": address(rb), "P": operand(peepholes),
        "H0": operand(h0), "C0": operand(c0), "LENGTHS": operand(lengths), "Y": address(results[0]),
        "Y_H": address(results[1]), "Y_C": address(results[2]), "SCRATCH": Word(0, scratch), "T": steps, "B": batch,
        "H": hidden, "DIRECTIONS": number, "REVERSE": int(backwards[0]), "G_D": gate_strides[0], "G_T": gate_strides[1],
        "G_B": gate_strides[2], "R_D": size, "R2_D": second_size,
        "Y_D": y_d, "Y_T": y_t, "Y_B": y_b, "S_D": state_d, "S_B": state_b,
    }  # fmt: skip
    constants: dict[str, int | float | str] = {
        "NR": nr, "CELL": cell.lower(), "COUNT": count, "CLIP": float(node.attrs["clip"] or 0.0),
        "INPUT_FORGET": int(node.attrs.get("input_forget", 0)), "LINEAR_BEFORE_RESET": linear_before_reset,
        **_functions(cell, directions[0]),
    }  # fmt: skip
    flops = steps * batch * (2 * number * hidden * width)
    written = [n for n in results if n is not None]
    common.emit(low, node, "recurrent", constants, values, None, (gates, packed), flops, writes=(*written, scratch))
    return ""


def _is_output(value: Value) -> bool:
    """The sequence of states is always kept: a graph output has no uses."""
    return value.index == 0 or not value.uses


def _functions(cell: str, activations: tuple[Activation, ...]) -> dict[str, int | float | str]:
    """ACT_F, ACT_G, ACT_H with their parameters: of an RNN only one, of a GRU two."""
    slots = {"LSTM": "FGH", "GRU": "FG", "RNN": "F"}[cell]
    out: dict[str, int | float | str] = {}
    for slot in "FGH":
        activation = activations[slots.index(slot)] if slot in slots else activations[0]
        out[f"ACT_{slot}"] = FUNCTIONS.get(activation.name, activation.name)
        parameters = (*activation.parameters, 0.0, 0.0)
        out[f"ALPHA_{slot}"], out[f"BETA_{slot}"] = float(parameters[0]), float(parameters[1])
    return out


def _biases(b: Value | None, cell: str, directions: int, hidden: int, linear_before_reset: int) -> tuple[Array, Array | None]:
    """(what is added to the input's share, the recurrent bias that must stay apart)."""
    width = GATES[cell] * hidden
    if b is None or b.data is None:
        apart = np.zeros((directions, hidden), np.float32) if cell == "GRU" and linear_before_reset else None
        return np.zeros((directions, width), np.float32), apart
    input_bias, recurrent = b.data[:, :width], b.data[:, width:]
    total = input_bias + recurrent
    if cell == "GRU" and linear_before_reset:
        total[:, 2 * hidden :] = input_bias[:, 2 * hidden :]
        return total, np.ascontiguousarray(recurrent[:, 2 * hidden :])
    return total, None


def _packed(low: Lowering, r: Value, nr: int, first: int, last: int) -> tuple[int, int]:
    """(buffer of R^T of gates `first` to `last`, packed per direction; its elements per direction)."""
    assert r.data is not None
    key = ("recurrent", id(r.data), nr, f"{first}:{last}")
    if key not in low.constants:
        hidden = r.data.shape[2]
        rows = r.data[:, first * hidden : last * hidden].astype(np.float32, copy=False)
        if isinstance(low.target, CpuTarget):
            panels = packing.pack_gates(rows, last - first, nr)
        else:
            panels = packing.pack_b(np.ascontiguousarray(rows.transpose(0, 2, 1)), nr)
        low.constant(panels, f"{r.name}_packed", key)
    number = low.constants[key]
    data = low.buffers[number].data
    assert data is not None
    return number, data[0].size


def _input_share(low: Lowering, node: Node, x: Value, w: Value, bias: Array, shape: tuple[Dim, Dim, Dim, Dim],
                 batch_major: bool) -> tuple[int, tuple[Dim, Dim, Dim]]:  # fmt: skip
    """(array [direction, T, B, gates * H] of x * W^T + bias, its strides)."""
    _, steps, batch, width = shape
    assert w.data is not None and isinstance(width, int)
    buffer, offset, strides = common.float_view(low, x, x.shape, 2)
    step, row = (strides[1], strides[0]) if batch_major else (strides[0], strides[1])
    loops = isinstance(low.target, CudaTarget)
    nr = width if loops else panel_columns(low.target, width)
    key = ("recurrent_input", id(w.data), nr)
    if key not in low.constants:
        matrix = np.ascontiguousarray(w.data.transpose(0, 2, 1).astype(np.float32, copy=False))
        low.constant(packing.pack_b(matrix, nr), f"{w.name}_packed", key)  # of one panel: the matrix itself
    weights, shared = low.constants[key], low.constant(bias.astype(np.float32), "gate_bias")
    depth = x.shape[2]
    gates = low.temporary("gates", f32, shape)
    own_strides = (steps * batch * width, batch * width, width)
    if loops:
        d, t, b, j, k = (iteration(a) for a in range(5))
        products = load(buffer, f32, (t * step + b * row + k + offset,)) * load(weights, f32, ((d * depth + k) * width + j,))
        total = reduce("sum", (4,), (depth,), products) + load(shared, f32, (d * width + j,))
        low.emit_writes([Write(gates, f32, linearise((d, t, b, j), shape), total)], shape, node.origin, "gates")
        return gates, own_strides
    # The rows of the product are all T * B where these lie evenly spaced, else the steps of one sequence.
    by_sequence = batch == 1 or step != batch * row
    d, first, second, j = (iteration(a) for a in range(4))
    t, b = (second, first) if by_sequence else (first, second)
    value = accumulator(f32) + load(shared, f32, (d * width + j,))
    extents = (shape[0], batch, steps, width) if by_sequence else shape
    strides_of_x = {1: row, 2: step} if by_sequence else {1: step, 2: row}
    whole = ceil_divide(width, nr) * depth * nr
    write = Write(gates, f32, linearise((d, t, b, j), shape), value)
    space = normalise_epilogue([write], extents, [strides_of_x, {0: whole}])
    assert not isinstance(space, str), space
    (a0, a1, a_row), (b0, b1, _) = space.strides
    e0, e1, em, en = space.extents
    common.emit(
        low, node, "gemm", {"NR": nr},
        {"A": Word(offset, buffer), "B": Word(0, weights), "M": em, "N": en, "K": depth, "A_ROW": a_row, "A_B0": a0,
         "A_B1": a1, "B_B0": b0, "B_B1": b1, "B0": e0, "B1": e1},
        space, (buffer, weights, shared), product(shape) * depth * 2, writes=(gates,), name="gemm_gates",
    )  # fmt: skip
    return gates, own_strides
