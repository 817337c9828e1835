"""LSTM, GRU and RNN cells against ONNX Runtime, through one-node models."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from minicc.kernels import recurrent
from minicc.kernels.packing import pack_gates
from tests.kernels.template_harness import TARGETS, Array, aligned, call

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
DEFAULTS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}
NAMES = {
    "Sigmoid": "sigmoid", "Tanh": "tanh", "Relu": "relu", "HardSigmoid": "hard_sigmoid", "Elu": "elu",
    "LeakyRelu": "leaky_relu", "Affine": "affine", "Softsign": "softsign", "ScaledTanh": "scaled_tanh",
    "Softplus": "softplus", "ThresholdedRelu": "thresholded_relu",
}  # fmt: skip


def data(op: str, t: int, b: int, i: int, h: int, directions: int, lengths, states: bool, peepholes: bool):
    rng = np.random.default_rng(t * 100 + b)
    gates = GATES[op]

    def random(*shape: int, scale: float = 1.0) -> Array:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    feeds: dict[str, Array | None] = {
        "X": random(t, b, i),
        "W": random(directions, gates * h, i, scale=0.4),
        "R": random(directions, gates * h, h, scale=0.8 / np.sqrt(h)),
        "B": random(directions, 2 * gates * h, scale=0.3),
        "sequence_lens": None if lengths is None else np.array(lengths, np.int32),
        "initial_h": random(directions, b, h) if states else None,
    }
    if op == "LSTM":
        feeds["initial_c"] = random(directions, b, h) if states else None
        feeds["P"] = random(directions, 3 * h) if peepholes else None
    return feeds


def runtime(op: str, feeds: dict[str, Array | None], h: int, **attributes: Any) -> list[Array]:
    """What ONNX Runtime answers."""
    outputs = ["Y", "Y_h"] + (["Y_c"] if op == "LSTM" else [])
    names = [name if array is not None else "" for name, array in feeds.items()]
    node = helper.make_node(op, names, outputs, hidden_size=h, **attributes)
    given = {name: array for name, array in feeds.items() if array is not None}
    types = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int32): TensorProto.INT32}
    inputs = [helper.make_tensor_value_info(n, types[a.dtype], a.shape) for n, a in given.items()]
    results = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs]
    graph = helper.make_graph([node], "g", inputs, results)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    answers: list[Array] = session.run(None, given)
    return answers


def ours(
    op: str, feeds: dict[str, Array | None], h: int, target: str = "cpu", threads: int = 1, **attributes: Any
):
    """The same by the template; the input's share is computed here."""
    x, w, r, bias = (feeds[name] for name in "XWRB")
    assert x is not None and w is not None and r is not None and bias is not None
    (t, b, _), directions, gates = x.shape, w.shape[0], GATES[op]
    linear = int(attributes.get("linear_before_reset", 0))
    wb, rb = bias[:, : gates * h].copy(), bias[:, gates * h :].copy()
    recurrent_bias = aligned(rb[:, 2 * h :]) if op == "GRU" and linear else None
    if recurrent_bias is not None:
        rb[:, 2 * h :] = 0
    shares = np.einsum("tbi,dgi->dtbg", x.astype(np.float64), w.astype(np.float64)) + (wb + rb)[:, None, None]
    shares = shares.astype(np.float32)
    nr = recurrent.panel_units(TARGETS[target], h)
    split = 2 if op == "GRU" and not linear else gates
    packed = [aligned(pack_gates(part, count, nr)) if count else np.zeros((1, 1), np.float32)
              for part, count in ((r[:, : split * h], split), (r[:, split * h :], gates - split))]  # fmt: skip
    y = np.full((t, directions, b, h), np.nan, np.float32)
    y_h, y_c = (np.full((directions, b, h), np.nan, np.float32) for _ in range(2))
    words = {
        "GATES": shares, "R": packed[0], "R2": packed[1], "RB": recurrent_bias, "P": feeds.get("P"),
        "H0": feeds["initial_h"], "C0": feeds.get("initial_c"), "LENGTHS": feeds["sequence_lens"],
        "Y": y, "Y_H": y_h, "Y_C": y_c if op == "LSTM" else None,
        "SCRATCH": np.full(directions * 2 * (b + 8) * 5 * h, np.nan, np.float32),
        "T": t, "B": b, "H": h, "DIRECTIONS": directions,
        "REVERSE": int(attributes.get("direction") == "reverse"),
        "G_D": t * b * gates * h, "G_T": b * gates * h, "G_B": gates * h,
        "R_D": packed[0][0].size, "R2_D": packed[1][0].size,
        "Y_T": directions * b * h, "Y_D": b * h, "Y_B": h, "S_D": b * h, "S_B": h,
    }  # fmt: skip
    words = {name: 0 if value is None else value for name, value in words.items()}
    functions = [*attributes.get("activations", DEFAULTS[op]), "Tanh", "Tanh"][:3]
    parameters = {
        f"{name}_{letter}": value
        for name in ("ALPHA", "BETA")
        for letter, value in zip("FGH", [*attributes.get(f"activation_{name.lower()}", []), 0.0, 0.0, 0.0])
    }
    constants = {
        "NR": nr, "CELL": op.lower(), "COUNT": gates, **parameters,
        **{f"ACT_{letter}": NAMES[name] for letter, name in zip("FGH", functions)},
        "CLIP": float(attributes.get("clip", 0)), "INPUT_FORGET": int(attributes.get("input_forget", 0)),
        "LINEAR_BEFORE_RESET": linear,
    }  # fmt: skip
    call("recurrent", constants, words, target=target, threads=threads)
    return [y, y_h] + ([y_c] if op == "LSTM" else [])


def compare(
    op: str, t=5, b=3, i=4, h=19, lengths=None, states=True, peepholes=False, **attributes: Any
) -> None:
    options = {name: attributes.pop(name) for name in ("target", "threads") if name in attributes}
    directions = 2 if attributes.get("direction") == "bidirectional" else 1
    feeds = data(op, t, b, i, h, directions, lengths, states, peepholes)
    twice = dict(attributes)
    if directions == 2 and "activations" in attributes:
        twice["activations"] = attributes["activations"] * 2
    expected = runtime(op, feeds, h, **twice)
    for name, got, want in zip(("Y", "Y_h", "Y_c"), ours(op, feeds, h, **options, **attributes), expected):
        # Rounding errors of about 30 units in the last place, carried through t steps.
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=4e-6 * t, err_msg=name)


@pytest.mark.parametrize("op", sorted(GATES))
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_directions_and_lengths(op, direction):
    compare(op, t=6, b=5, lengths=[6, 1, 3, 6, 2], direction=direction)


@pytest.mark.parametrize("op", sorted(GATES))
@pytest.mark.parametrize(("t", "b", "h"), [(1, 1, 1), (4, 1, 33), (3, 8, 64), (2, 23, 7), (9, 2, 130)])
def test_sizes(op, t, b, h):
    compare(op, t=t, b=b, h=h, states=False)
    compare(op, t=t, b=b, h=h, direction="bidirectional", threads=2)


@pytest.mark.parametrize("op", sorted(GATES))
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_stages(op: str, data: st.DataObject) -> None:
    """Few sequences on many threads: each step's product is shared out, whatever the sizes."""
    t, b, h = (data.draw(st.integers(1, most)) for most in (6, 9, 70))
    attributes: dict[str, Any] = {"direction": data.draw(st.sampled_from(["forward", "reverse", "bidirectional"]))}
    if op == "GRU":
        attributes["linear_before_reset"] = data.draw(st.integers(0, 1))
    if op == "LSTM":
        attributes["peepholes"] = data.draw(st.booleans())
    lengths = data.draw(st.none() | st.lists(st.integers(1, t), min_size=b, max_size=b))
    target = data.draw(st.sampled_from(sorted(TARGETS)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recurrent, "STEP_WORK", 0)
        patch.setattr(recurrent, "WHOLE_WORK", 0)
        compare(op, t, b, 4, h, lengths, data.draw(st.booleans()), target=target, threads=5, **attributes)


def test_when_there_are_stages() -> None:
    target = TARGETS["cpu"]
    constants = {"COUNT": 3, "NR": 2 * target.vector_width, "LINEAR_BEFORE_RESET": 0}
    words = {"B": 1, "DIRECTIONS": 1, "H": 400, "T": 20, "ROWS": 0, "STAGE": 0}
    units = recurrent.recurrent_domain(words, constants, target, 2)
    found = recurrent.recurrent_stages(words, constants)
    assert len(found) == 2 + 2 * 20 and units == len(found) * words["STAGE"]
    assert [first for first, _, _ in found] == list(range(0, units, words["STAGE"]))
    for changed, threads in (({}, 1), ({"H": 40}, 2), ({"T": 1}, 2), ({"DIRECTIONS": 2}, 2), ({"T": 10**6}, 2)):
        other = words | changed
        recurrent.recurrent_domain(other, constants, target, threads)
        assert recurrent.recurrent_stages(other, constants) == ()


@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("LSTM", {"peepholes": True}),
        ("LSTM", {"input_forget": 1}),
        ("LSTM", {"clip": 0.5}),
        ("LSTM", {"activations": ["HardSigmoid", "Relu", "Softsign"],
         "activation_alpha": [0.3], "activation_beta": [0.4]}),
        ("GRU", {"linear_before_reset": 1}),
        ("GRU", {"linear_before_reset": 1, "lengths": [4, 2, 3], "t": 4, "direction": "reverse"}),
        ("GRU", {"activations": ["HardSigmoid", "ScaledTanh"],
         "activation_alpha": [0.2, 0.7], "activation_beta": [0.5, 0.9]}),
        ("GRU", {"clip": 0.4}),
        ("RNN", {"activations": ["Relu"]}),
        ("RNN", {"activations": ["LeakyRelu"], "activation_alpha": [0.2]}),
        ("RNN", {"activations": ["ThresholdedRelu"], "activation_alpha": [0.3]}),
        ("RNN", {"activations": ["Affine"], "activation_alpha": [0.2], "activation_beta": [0.1]}),
        ("RNN", {"activations": ["Elu"], "activation_alpha": [0.6]}),
        ("RNN", {"activations": ["Softplus"]}),
    ],
)  # fmt: skip
def test_variants(op, attributes):
    compare(op, **attributes)


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "cpu"])
def test_smaller_targets(target):
    compare("GRU", b=7, h=21, target=target)
