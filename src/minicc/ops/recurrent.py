"""Recurrent layers: RNN, GRU and LSTM.

Only templates compute them, `eval` is the reference. Gates are in ONNX's order: LSTM i, o, f, c; GRU z, r, h.
Sequences shorter than the longest end with zeros in Y.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from minicc.errors import ShapeError
from minicc.ir.dims import Dim
from minicc.ir.opdef import Inference, Kind, OpDef, register
from minicc.ir.types import TensorType
from minicc.ops.helpers import Array, computed_in_f32, default_refuse

if TYPE_CHECKING:
    pass

Function = Callable[[Array], Array]

# Activation functions by name; each takes alpha and beta, whose defaults are those of the ONNX operators.
_FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[float, ...]]] = {
    "relu": (lambda x: np.maximum(x, 0), ()),
    "tanh": (np.tanh, ()),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), ()),
    "softsign": (lambda x: x / (1 + np.abs(x)), ()),
    "softplus": (lambda x: np.logaddexp(x, 0), ()),
    "affine": (lambda x, alpha, beta: alpha * x + beta, (1.0, 0.0)),
    "leakyrelu": (lambda x, alpha: np.where(x >= 0, x, alpha * x), (0.01,)),
    "thresholdedrelu": (lambda x, alpha: np.where(x > alpha, x, 0), (1.0,)),
    "scaledtanh": (lambda x, alpha, beta: alpha * np.tanh(beta * x), (1.0, 1.0)),
    "hardsigmoid": (lambda x, alpha, beta: np.clip(alpha * x + beta, 0, 1), (0.2, 0.5)),
    "elu": (lambda x, alpha: np.where(x >= 0, x, alpha * np.expm1(x)), (1.0,)),
}


@dataclass(frozen=True)
class Activation:
    """An activation function of a recurrent layer: lower-case name and its parameters (alpha, beta)."""

    name: str
    parameters: tuple[float, ...]

    def __call__(self, x: Array) -> Array:
        return np.asarray(_FUNCTIONS[self.name][0](x, *self.parameters)).astype(x.dtype)


def directions_of(attrs: Any) -> tuple[bool, ...]:
    """For each direction, whether it runs backwards. Raises ShapeError for an unknown direction."""
    found = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}.get(
        attrs["direction"].lower()
    )
    if found is None:
        raise ShapeError(
            f"direction {attrs['direction']!r} is unknown", hint="forward, reverse or bidirectional"
        )
    return found


def activations_of(attrs: Any, defaults: Sequence[str]) -> tuple[tuple[Activation, ...], ...]:
    """The activations of every direction; `defaults` are those of one. Raises ShapeError for an unknown name.

    activation_alpha and activation_beta are handed out in order to the activations that take them.
    """
    directions = len(directions_of(attrs))
    names = [name.lower() for name in attrs["activations"] or list(defaults) * directions]
    if len(names) == len(defaults) and directions == 2:
        names = names * 2
    if len(names) != len(defaults) * directions:
        raise ShapeError(f"needs {len(defaults) * directions} activations, got {len(names)}")
    alphas, betas = list(attrs["activation_alpha"] or ()), list(attrs["activation_beta"] or ())
    out = []
    for name in names:
        if name not in _FUNCTIONS:
            raise ShapeError(f"activation {name!r} is unknown", hint=f"known: {', '.join(_FUNCTIONS)}")
        parameters = list(_FUNCTIONS[name][1])
        for position, given in enumerate((alphas, betas)):
            if position < len(parameters) and given:
                parameters[position] = given.pop(0)
        out.append(Activation(name, tuple(parameters)))
    each = len(defaults)
    return tuple(tuple(out[d * each : (d + 1) * each]) for d in range(directions))


# -- inference


def _infer(n: Inference, states: int, gates: int, defaults: Sequence[str]) -> list[TensorType]:
    x, w, r = n.shape(0), n.shape(1), n.shape(2)
    if len(x) != 3 or len(w) != 3 or len(r) != 3:
        raise n.error("X, W and R must have rank 3")
    try:
        directions = len(directions_of(n.attrs))
        activations_of(n.attrs, defaults)
    except ShapeError as error:
        raise n.error(error.what, error.hint) from error
    hidden: Dim = r[2]
    if any(isinstance(v, int) and v != directions for v in (w[0], r[0])):
        raise n.error(f"weights must have {directions} directions")
    if isinstance(r[1], int) and isinstance(hidden, int) and r[1] != gates * hidden:
        raise n.error(f"R must be [{directions}, {gates} * hidden, hidden]")
    if isinstance(x[2], int) and isinstance(w[2], int) and x[2] != w[2]:
        raise n.error(f"input size {x[2]} does not fit W")
    return output_types(n, hidden, directions, states)


def output_types(n: Inference, hidden: Dim, directions: int, states: int) -> list[TensorType]:
    first, second, _ = n.shape(0)
    batch_major = n.attr("layout") == 1
    length, batch = (second, first) if batch_major else (first, second)
    sequence = (batch, length, directions, hidden) if batch_major else (length, directions, batch, hidden)
    state = (batch, directions, hidden) if batch_major else (directions, batch, hidden)
    dtype = n.dtype(0)
    return [TensorType(dtype, sequence), *[TensorType(dtype, state)] * states]


# -- evaluation


def _run(x: Array, lengths: Array | None, states: list[Array], backwards: bool,
         step: Callable[[int | Array, list[Array]], list[Array]]) -> tuple[Array, list[Array]]:  # fmt: skip
    """All hidden states [T, B, H] and the last states of one direction.

    step(t, states) gives the new states, the first of which is the hidden state, for the positions `t` of
    each batch row.
    """
    steps, batch = x.shape[:2]
    out = np.zeros((steps, batch, states[0].shape[-1]), dtype=x.dtype)
    ends = np.full(batch, steps) if lengths is None else lengths.astype(np.int64)
    for number in range(steps):
        active = number < ends
        where = np.where(active, ends - 1 - number if backwards else number, 0)
        new = step(where, states)
        states = [np.where(active[:, None], fresh, old) for fresh, old in zip(new, states)]
        rows = np.flatnonzero(active)
        out[where[rows], rows] = states[0][rows]
    return out, states


def _clipped(clip: float | None) -> Function:
    return (lambda x: x) if not clip else (lambda x: np.clip(x, -clip, clip))


def time_major(
    x: Array, initial: Sequence[Array | None], directions: int, hidden: int, layout: int
) -> tuple[Array, list[Array]]:
    """X as [T, B, I] and initial states as [D, B, H]."""
    x = x.transpose(1, 0, 2) if layout == 1 else x
    states = []
    for state in initial:
        if state is None:
            states.append(np.zeros((directions, x.shape[1], hidden), dtype=x.dtype))
        else:
            states.append(state.transpose(1, 0, 2) if layout == 1 else state)
    return x, states


def _assemble(parts: list[tuple[Array, list[Array]]], layout: int) -> tuple[Array, ...]:
    """Y and the last states in the layout's order, from the directions' results."""
    y = np.stack([sequence for sequence, _ in parts], axis=1)  # [T, D, B, H]
    finals = [np.stack(states) for states in zip(*(states for _, states in parts))]  # [D, B, H]
    if layout == 1:
        return (y.transpose(2, 0, 1, 3), *(f.transpose(1, 0, 2) for f in finals))
    return (y, *finals)


def biases(b: Array | None, direction: int, size: int, dtype: Any) -> tuple[Array, Array]:
    """Input and recurrent biases of one direction."""
    if b is None:
        return np.zeros(size, dtype), np.zeros(size, dtype)
    return b[direction, :size], b[direction, size:]


@computed_in_f32
def _rnn_eval(x: Array, w: Array, r: Array, b: Array | None = None, lengths: Array | None = None,
              initial_h: Array | None = None, **attrs: Any) -> tuple[Array, ...]:  # fmt: skip
    hidden, clip = r.shape[2], _clipped(attrs["clip"])
    activations = activations_of(attrs, ("Tanh",))
    x, (h0,) = time_major(x, [initial_h], len(activations), hidden, attrs["layout"])
    parts = []
    for d, backwards in enumerate(directions_of(attrs)):
        wb, rb = biases(b, d, hidden, x.dtype)
        projected = x @ w[d].T + (wb + rb)
        (f,) = activations[d]

        def step(
            t: Any, states: list[Array], projected: Array = projected, f: Function = f, d: int = d
        ) -> list[Array]:
            return [f(clip(projected[t, np.arange(x.shape[1])] + states[0] @ r[d].T))]

        parts.append(_run(x, lengths, [h0[d]], backwards, step))
    return _assemble(parts, attrs["layout"])


@computed_in_f32
def _gru_eval(x: Array, w: Array, r: Array, b: Array | None = None, lengths: Array | None = None,
              initial_h: Array | None = None, **attrs: Any) -> tuple[Array, ...]:  # fmt: skip
    hidden, clip = r.shape[2], _clipped(attrs["clip"])
    activations = activations_of(attrs, ("Sigmoid", "Tanh"))
    x, (h0,) = time_major(x, [initial_h], len(activations), hidden, attrs["layout"])
    gates = slice(0, 2 * hidden)
    new = slice(2 * hidden, 3 * hidden)
    parts = []
    for d, backwards in enumerate(directions_of(attrs)):
        wb, rb = biases(b, d, 3 * hidden, x.dtype)
        projected = x @ w[d].T + wb
        f, g = activations[d]

        def step(t: Any, states: list[Array], projected: Array = projected, f: Function = f, g: Function = g,
                 rb: Array = rb, d: int = d) -> list[Array]:  # fmt: skip
            (h,) = states
            now = projected[t, np.arange(x.shape[1])]
            z, reset = np.split(f(clip(now[:, gates] + h @ r[d, gates].T + rb[gates])), 2, axis=1)
            if attrs["linear_before_reset"]:
                inner = reset * (h @ r[d, new].T + rb[new])
            else:
                inner = (reset * h) @ r[d, new].T + rb[new]
            return [(1 - z) * g(clip(now[:, new] + inner)) + z * h]

        parts.append(_run(x, lengths, [h0[d]], backwards, step))
    return _assemble(parts, attrs["layout"])


def lstm_directions(
    x: Array,
    hidden: int,
    product: Callable[[int, Array], Array],
    projections: Sequence[Array],
    states: Sequence[Array],
    lengths: Array | None,
    p: Array | None,
    attrs: Any,
) -> tuple[Array, ...]:
    """Y, Y_h, Y_c given X·W + biases of every direction and `product(direction, h)` = h·R."""
    clip = _clipped(attrs["clip"])
    activations = activations_of(attrs, ("Sigmoid", "Tanh", "Tanh"))
    parts = []
    for d, backwards in enumerate(directions_of(attrs)):
        peep = np.zeros((3, hidden), dtype=x.dtype) if p is None else p[d].reshape(3, hidden)
        functions = activations[d]

        def step(t: Any, states: list[Array], d: int = d, peep: Array = peep,
                 functions: Any = functions) -> list[Array]:  # fmt: skip
            h, c = states
            f, g, last = functions
            gates = projections[d][t, np.arange(x.shape[1])] + product(d, h)
            i, o, forget, new = np.split(gates, 4, axis=1)
            i = f(clip(i + peep[0] * c))
            forget = 1 - i if attrs["input_forget"] else f(clip(forget + peep[2] * c))
            c = forget * c + i * g(clip(new))
            o = f(clip(o + peep[1] * c))
            return [o * last(c), c]

        parts.append(_run(x, lengths, [states[0][d], states[1][d]], backwards, step))
    return _assemble(parts, attrs["layout"])


@computed_in_f32
def _lstm_eval(x: Array, w: Array, r: Array, b: Array | None = None, lengths: Array | None = None,
               initial_h: Array | None = None, initial_c: Array | None = None, p: Array | None = None,
               **attrs: Any) -> tuple[Array, ...]:  # fmt: skip
    hidden = r.shape[2]
    directions = len(directions_of(attrs))
    x, states = time_major(x, [initial_h, initial_c], directions, hidden, attrs["layout"])
    projections = [x @ w[d].T + np.add(*biases(b, d, 4 * hidden, x.dtype)) for d in range(directions)]
    return lstm_directions(x, hidden, lambda d, h: h @ r[d].T, projections, states, lengths, p, attrs)


RECURRENT_ATTRS: dict[str, Any] = {
    "activation_alpha": None,
    "activation_beta": None,
    "activations": None,
    "clip": None,
    "direction": "forward",
    "hidden_size": None,
    "layout": 0,
}
register(
    OpDef(
        "RNN",
        Kind.TEMPLATE,
        infer=lambda n: _infer(n, 1, 1, ("Tanh",)),
        eval=_rnn_eval,
        refuse=default_refuse,
        attrs=RECURRENT_ATTRS,
    )
)
register(
    OpDef(
        "GRU",
        Kind.TEMPLATE,
        infer=lambda n: _infer(n, 1, 3, ("Sigmoid", "Tanh")),
        eval=_gru_eval,
        refuse=default_refuse,
        attrs={**RECURRENT_ATTRS, "linear_before_reset": 0},
    )
)
register(OpDef(
    "LSTM", Kind.TEMPLATE, infer=lambda n: _infer(n, 2, 4, ("Sigmoid", "Tanh", "Tanh")), eval=_lstm_eval,
    refuse=default_refuse, attrs={**RECURRENT_ATTRS, "input_forget": 0},
))  # fmt: skip
