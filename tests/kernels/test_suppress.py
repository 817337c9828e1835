"""Non-maximum suppression against a plain Python loop, and against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info

import minicc
from minicc.api import HostNodesWarning
from tests.compiling import Array

LIMITS = st.one_of(st.none(), st.integers(-1, 12))
THRESHOLDS = st.one_of(st.none(), st.sampled_from([0.0, 0.1, 0.5, 0.9]))


def model(center: int, present: list[bool], batches: int, classes: int, count: int) -> bytes:
    names = ["limit", "overlap", "least"]
    inputs = [n if there else "" for n, there in zip(names, present)]
    node = make_node("NonMaxSuppression", ["boxes", "scores", *inputs], ["y"], center_point_box=center)
    infos = [
        make_tensor_value_info("boxes", 1, [batches, count, 4]),
        make_tensor_value_info("scores", 1, [batches, classes, count]),
        *(make_tensor_value_info(n, 7 if n == "limit" else 1, [1]) for n in inputs if n),
    ]
    graph = make_graph([node], "g", infos, [make_tensor_value_info("y", 7, [None, 3])])
    return make_model(graph, opset_imports=[make_opsetid("", 21)], ir_version=10).SerializeToString()


def overlap(a: Array, b: Array) -> np.float32:
    """Intersection over union of two boxes (low y, low x, high y, high x), float32 at every step."""
    sides = [max(np.float32(0), min(a[2 + k], b[2 + k]) - max(a[k], b[k])) for k in (0, 1)]
    common = sides[0] * sides[1]
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common
    return common / union if union > 0 else np.float32(0)


def suppress(boxes: Array, scores: Array, center: int, limit: int | None, iou: float | None, least: float | None) -> Array:
    rows = []
    for batch, class_ in np.ndindex(*scores.shape[:2]):
        corners = []
        for p, q, r, s in boxes[batch]:
            half = np.float32(0.5)
            corners.append(np.array([q - s * half, p - r * half, q + s * half, p + r * half] if center
                                    else [min(p, r), min(q, s), max(p, r), max(q, s)]))  # fmt: skip
        row = scores[batch, class_]
        kept: list[int] = []
        for i in sorted(range(len(row)), key=lambda i: (-row[i], i)):
            above = not np.isnan(row[i]) if least is None else row[i] > np.float32(least)
            apart = all(overlap(corners[k], corners[i]) <= np.float32(iou or 0) for k in kept)
            if above and apart and len(kept) < (limit or 0):
                kept.append(i)
        rows += [(batch, class_, i) for i in kept]
    return np.array(rows, np.int64).reshape(-1, 3)


@settings(max_examples=40, deadline=None)
@given(
    center=st.integers(0, 1), limit=LIMITS, iou=THRESHOLDS, least=THRESHOLDS, batches=st.integers(1, 2),
    classes=st.integers(1, 3), count=st.integers(0, 20), seed=st.integers(0, 1 << 20), ties=st.booleans(),
)  # fmt: skip
def test_as_a_plain_loop(center, limit, iou, least, batches, classes, count, seed, ties):
    rng = np.random.default_rng(seed)
    boxes = rng.integers(0, 6, (batches, count, 4)).astype(np.float32)  # small integers: areas are exact, many are empty
    scores = rng.uniform(-0.5, 1, (batches, classes, count)).astype(np.float32)
    scores = np.round(scores, 1) if ties else scores
    scalars = {"limit": limit, "overlap": iou, "least": least}
    source = model(center, [v is not None for v in scalars.values()], batches, classes, count)
    feeds = {"boxes": boxes, "scores": scores}
    feeds |= {n: np.array([v], np.int64 if n == "limit" else np.float32) for n, v in scalars.items() if v is not None}
    with pytest.warns(HostNodesWarning, match="JoinBoxes.*data-dependent"):
        module = minicc.compile(source, threads=1)
    np.testing.assert_array_equal(module.run(None, feeds)[0], suppress(boxes, scores, center, limit, iou, least))


@pytest.mark.parametrize("center", [0, 1])
@pytest.mark.filterwarnings("ignore::minicc.api.HostNodesWarning")
def test_many_boxes_as_onnx_runtime(center):
    rng = np.random.default_rng(center)
    source = model(center, [True, True, True], 2, 3, 800)
    feeds = {
        "boxes": rng.uniform(0, 1, (2, 800, 4)).astype(np.float32), "scores": rng.random((2, 3, 800), dtype=np.float32),
        "limit": np.array([100]), "overlap": np.array([0.4], np.float32), "least": np.array([0.3], np.float32),
    }  # fmt: skip
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    want = session.run(None, feeds)[0]
    assert len(want) > 60
    np.testing.assert_array_equal(minicc.compile(source, threads=2).run(None, feeds)[0], want)
