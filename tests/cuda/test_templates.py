"""CUDA's forms of the templates that step through their data, on the PTX interpreter, against numpy and ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba.cuda.compiler", reason="numba-cuda is not installed (extra cuda)")

import minicc
from minicc.api import HostNodesWarning
from tests.cuda.loop_kernels import TARGET
from tests.cuda.modules import node_model, reference, run_model, run_module
from tests.kernels.test_suppress import suppress
from tests.ops import classical
from tests.ops.test_trees import MODES, ORDERED, draw_rows, draw_trees

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(11)


def numbers(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("axis", "exclusive", "reverse"), [(1, 0, 0), (2, 1, 1)])
def test_running_sums(axis: int, exclusive: int, reverse: int) -> None:
    feeds = {"x": RNG.integers(-9, 9, (3, 7, 5)).astype(np.float32), "axis": np.array(axis)}
    proto = node_model("CumSum", feeds, ["y"], ("axis",), exclusive=exclusive, reverse=reverse)
    np.testing.assert_array_equal(run_model(proto, feeds)[0], reference(proto, feeds)[0])


@pytest.mark.parametrize(
    ("kind", "reduction"),
    [
        (np.float32, "none"),
        (np.int32, "add"),
        (np.float16, "max"),
        *(pytest.param(k, r, marks=pytest.mark.slow) for k in (np.float32, np.float16) for r in ("add", "mul", "min")),
    ],
)
def test_scatter_of_elements_that_meet(kind: Any, reduction: str) -> None:
    """Rows of updates that meet are done in order; small whole numbers, so that the order of a sum is not seen."""
    feeds = {
        "data": RNG.integers(-3, 4, (6, 4, 5)).astype(kind),
        "indices": RNG.integers(-6, 6, (9, 3, 5)),
        "updates": RNG.integers(-2, 3, (9, 3, 5)).astype(kind),
    }
    proto = node_model("ScatterElements", feeds, ["y"], axis=0, reduction=reduction)
    expected = feeds["data"].copy()
    step = {"none": lambda a, b: b, "add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}[reduction]
    for s, i, j in np.ndindex(9, 3, 5):
        at = feeds["indices"][s, i, j], i, j
        expected[at] = step(expected[at], feeds["updates"][s, i, j])
    np.testing.assert_array_equal(run_model(proto, feeds)[0], expected)


@pytest.mark.parametrize("depth", [1, 3])
def test_scatter_of_slices_that_meet(depth: int) -> None:
    shape = (4, 3, 5)
    places = np.stack([RNG.integers(-n, n, 20) for n in shape[:depth]], 1)
    feeds = {"data": numbers(*shape), "indices": places, "updates": numbers(20, *shape[depth:])}
    proto = node_model("ScatterND", feeds, ["y"])
    expected = feeds["data"].copy()
    for place, update in zip(places, feeds["updates"]):
        expected[tuple(place)] = update
    np.testing.assert_array_equal(run_model(proto, feeds)[0], expected)


@pytest.mark.parametrize("largest", [0, 1])
@pytest.mark.parametrize(("axis", "k"), [(1, 21), (0, 2)])
def test_topk_orders_equal_elements_by_position(axis: int, k: int, largest: int) -> None:
    x = RNG.integers(-3, 4, (3, 21)).astype(np.float32)
    feeds = {"x": x, "k": np.array([k])}
    values, positions = run_model(node_model("TopK", feeds, ["v", "p"], ("k",), axis=axis, largest=largest), feeds)
    order = np.argsort(-x if largest else x, axis, kind="stable").take(range(k), axis)
    np.testing.assert_array_equal(positions, order)
    np.testing.assert_array_equal(values, np.take_along_axis(x, order, axis))


def test_topk_puts_nan_first() -> None:
    x = np.array([[1, np.nan, np.inf, 2, np.nan, -1]], np.float32)
    feeds = {"x": x, "k": np.array([4])}
    positions = run_model(node_model("TopK", feeds, ["v", "p"], ("k",)), feeds)[1]
    assert positions.tolist() == [[1, 4, 2, 3]]


@pytest.mark.parametrize("center", [0, 1])
def test_boxes_are_suppressed(center: int) -> None:
    boxes = RNG.uniform(0, 1, (2, 40, 4)).astype(np.float32)
    scores = RNG.integers(-5, 20, (2, 3, 40)).astype(np.float32) / 20
    feeds = {"boxes": boxes, "scores": scores, "limit": np.array([6]), "overlap": np.array([0.3], np.float32),
             "least": np.array([0.1], np.float32)}  # fmt: skip
    proto = node_model("NonMaxSuppression", feeds, ["y"], center_point_box=center)
    with pytest.warns(HostNodesWarning):  # the boxes of all classes are joined on the host
        module = minicc.compile(proto, target=TARGET.name)
    found = run_module(module, feeds)[0]
    np.testing.assert_array_equal(found, suppress(boxes, scores, center, 6, 0.3, 0.1))


@pytest.mark.parametrize(
    ("op", "direction", "attributes"),
    [
        ("LSTM", "bidirectional", {}),
        ("GRU", "reverse", {"linear_before_reset": 1}),
        ("RNN", "reverse", {"activations": ["Softplus"]}),
        pytest.param("LSTM", "forward", {"clip": 1.0, "input_forget": 1}, marks=pytest.mark.slow),
        pytest.param("GRU", "bidirectional", {}, marks=pytest.mark.slow),
    ],
)
def test_recurrent_layers(op: str, direction: str, attributes: dict[str, Any]) -> None:
    t, b, i, h = 5, 3, 6, 37
    gates, directions = {"LSTM": 4, "GRU": 3, "RNN": 1}[op], 2 if direction == "bidirectional" else 1
    feeds: dict[str, Array | None] = {
        "X": numbers(t, b, i),
        "W": numbers(directions, gates * h, i) / 2,
        "R": numbers(directions, gates * h, h) / 6,
        "B": numbers(directions, 2 * gates * h) / 3,
        "lengths": np.array([5, 2, 1], np.int32),
        "h0": numbers(directions, b, h),
    }
    outputs = ["Y", "Y_h"]
    if op == "LSTM":
        feeds |= {"c0": numbers(directions, b, h), "P": numbers(directions, 3 * h)}
        outputs.append("Y_c")
    proto = node_model(op, feeds, outputs, ("W", "R", "B"), direction=direction, hidden_size=h, **attributes)
    for found, wanted in zip(run_model(proto, feeds), reference(proto, feeds), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("modes", "missing"), [(ORDERED[:1], False), (MODES, True)])
def test_trees(modes: tuple[str, ...], missing: bool) -> None:
    attrs, leaves = draw_trees(RNG, 5, modes, missing)
    weights = [(tree, node, 0, float(RNG.standard_normal())) for tree, node in leaves]
    for name, column in zip(("treeids", "nodeids", "ids", "weights"), zip(*weights)):
        attrs[f"target_{name}"] = list(column)
    x = draw_rows(RNG, missing)
    proto = classical.node_model("TreeEnsembleRegressor", [x], 1, n_targets=1, **attrs)
    found = run_model(proto, {"x0": x})[0]
    np.testing.assert_allclose(found, classical.by_onnxruntime(proto, [x])[0], rtol=1e-5, atol=1e-5)
