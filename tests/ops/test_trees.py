"""Tree ensembles against ONNX Runtime: modes, missing values, aggregates, two classes, transforms; broken ones are told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

import minicc
from minicc.errors import InvalidModelError, ShapeError
from minicc.ops.scores import TRANSFORMS
from tests.ops.classical import by_numpy, by_onnxruntime, check, compiled, node_model

FEATURES = 4
ORDERED = ("BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT")
MODES = (*ORDERED, "BRANCH_EQ", "BRANCH_NEQ")
NUMBERS = (-1.5, -1.0, -0.0, 0.0, 0.25, float(np.float32(0.1)), 1.0, 2.5, float("inf"))


def draw_trees(rng: np.random.Generator, trees: int, modes: tuple[str, ...], missing: bool) -> tuple[dict[str, Any], list[Any]]:
    """Attributes of random trees, and the (tree, node) of every leaf."""
    nodes: list[list[Any]] = []
    leaves = []
    for tree in range(trees):
        depth, count = int(rng.integers(0, 5)), 1
        todo = [(0, 0)]
        while todo:
            node, level = todo.pop()
            if level >= depth or rng.random() < 0.2:
                nodes.append([tree, node, 0, "LEAF", 0.0, 0, 0, 0])
                leaves.append((tree, node))
                continue
            track = int(missing and rng.random() < 0.5)
            feature, mode, split = int(rng.integers(FEATURES)), str(rng.choice(modes)), float(rng.choice(NUMBERS))
            nodes.append([tree, node, feature, mode, split, count, count + 1, track])
            todo += [(count, level + 1), (count + 1, level + 1)]
            count += 2
    order = rng.permutation(len(nodes)) if rng.random() < 0.3 else range(len(nodes))  # the root of a tree comes first
    names = ("treeids", "nodeids", "featureids", "modes", "values", "truenodeids", "falsenodeids", "missing_value_tracks_true")
    columns = zip(*sorted((nodes[i] for i in order), key=lambda node: (node[0], node[1] != 0)))
    attrs = {f"nodes_{name}": list(column) for name, column in zip(names, columns)}
    return attrs, leaves


def draw_rows(rng: np.random.Generator, missing: bool, dtype: Any = np.float32) -> Any:
    x = np.where(rng.random((9, FEATURES)) < 0.6, rng.choice(NUMBERS, (9, FEATURES)), rng.standard_normal((9, FEATURES)))
    if missing:
        x[rng.random(x.shape) < 0.2] = np.nan
    return x.astype(dtype)


@given(st.integers(0, 1 << 32), st.integers(1, 40), st.sampled_from([ORDERED[:1], ORDERED, MODES]), st.booleans(),
       st.sampled_from(["SUM", "AVERAGE", "MIN", "MAX"]), st.integers(1, 3), st.booleans())  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_regressors(
    seed: int, trees: int, modes: tuple[str, ...], missing: bool, aggregate: str, targets: int, base: bool
) -> None:
    rng = np.random.default_rng(seed)
    attrs, leaves = draw_trees(rng, trees, modes, missing)
    weights = [(tree, node, k, float(rng.standard_normal())) for tree, node in leaves for k in range(targets)]
    for name, column in zip(("treeids", "nodeids", "ids", "weights"), zip(*weights)):
        attrs[f"target_{name}"] = list(column)
    if base:
        attrs["base_values"] = rng.standard_normal(targets).tolist()
    check("TreeEnsembleRegressor", [draw_rows(rng, missing)], n_targets=targets, aggregate_function=aggregate, **attrs)


@given(st.integers(0, 1 << 32), st.sampled_from(["dense", "one each", "only 0", "only 1"]), st.integers(2, 5), st.booleans(),
       st.booleans(), st.booleans(), st.sampled_from(TRANSFORMS[:4]))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_classifiers(
    seed: int, kind: str, classes: int, positive: bool, base: bool, texts: bool, transform: str
) -> None:
    """Not for two classes that both have weights: ONNX Runtime answers 0 or 1 by the second one alone there."""
    rng = np.random.default_rng(seed)
    classes = 2 if kind.startswith("only") else max(3, classes)
    attrs, leaves = draw_trees(rng, 3 * classes, ORDERED, True)
    owners = {"dense": range(classes), "only 0": (0,), "only 1": (1,)}
    weights = []
    for tree, node in leaves:
        for k in owners.get(kind, (tree % classes,)):
            weight = float(rng.standard_normal())
            weights.append((tree, node, k, abs(weight) / 10 if positive else weight))
    for name, column in zip(("treeids", "nodeids", "ids", "weights"), zip(*weights)):
        attrs[f"class_{name}"] = list(column)
    if base and kind != "only 1":
        attrs["base_values"] = rng.standard_normal(1 if kind == "only 0" else classes).tolist()
    labels: dict[str, Any] = {"classlabels_int64s": list(range(7, 7 + classes))}
    if texts:
        labels = {"classlabels_strings": [f"c{i}" for i in range(classes)]}
    check("TreeEnsembleClassifier", [draw_rows(rng, True)], 2, post_transform=transform, host=("Gather",), **labels, **attrs)


def test_two_classes_with_weights_of_their_own() -> None:
    """The class of the larger score."""
    attrs = stump()
    attrs |= {f"class_{name}": attrs.pop(f"target_{name}") for name in ("treeids", "nodeids", "ids", "weights")}
    attrs |= {"class_treeids": [0] * 4, "class_nodeids": [1, 1, 2, 2], "class_ids": [0, 1, 0, 1]}
    attrs["class_weights"] = [0.6, 0.4, 0.3, 0.7]
    x = np.array([[-1], [1]], np.float32)
    check("TreeEnsembleClassifier", [x], 2, runtime=False, classlabels_int64s=[10, 20], **attrs)
    model = node_model("TreeEnsembleClassifier", [x], 2, classlabels_int64s=[10, 20], **attrs)
    label, score = compiled(model, [x])
    assert label.tolist() == [10, 20]
    np.testing.assert_allclose(score, [[0.6, 0.4], [0.3, 0.7]], rtol=1e-6)


def test_weights_of_inner_nodes_count_for_nothing() -> None:
    attrs = stump(target_treeids=[0, 0, 0], target_nodeids=[0, 1, 2], target_ids=[0, 0, 0], target_weights=[9.0, 1.0, 2.0])
    check("TreeEnsembleRegressor", [np.array([[-1], [1]], np.float32)], n_targets=1, runtime=False, **attrs)


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.int32])
def test_element_types_of_features(dtype: Any) -> None:
    rng = np.random.default_rng(3)
    attrs, leaves = draw_trees(rng, 6, ORDERED, False)
    for name, column in zip(("treeids", "nodeids", "ids", "weights"), zip(*((t, n, 0, float(rng.random())) for t, n in leaves))):
        attrs[f"target_{name}"] = list(column)
    x = np.nan_to_num(draw_rows(rng, False, np.float64), posinf=3).astype(dtype)
    check("TreeEnsembleRegressor", [x], n_targets=1, runtime=np.dtype(dtype).kind == "f", **attrs)


def stump(**changes: Any) -> dict[str, Any]:
    attrs = {
        "nodes_treeids": [0, 0, 0], "nodes_nodeids": [0, 1, 2], "nodes_featureids": [0, 0, 0],
        "nodes_modes": ["BRANCH_LEQ", "LEAF", "LEAF"], "nodes_values": [0.0, 0.0, 0.0], "nodes_truenodeids": [1, 0, 0],
        "nodes_falsenodeids": [2, 0, 0], "target_treeids": [0, 0], "target_nodeids": [1, 2], "target_ids": [0, 0],
        "target_weights": [1.0, 2.0],
    }  # fmt: skip
    return attrs | changes


@pytest.mark.parametrize(
    "changes",
    [
        {"nodes_modes": ["BRANCH_LEQ", "BRANCH_LEQ", "LEAF"], "nodes_truenodeids": [1, 1, 0], "nodes_falsenodeids": [2, 2, 0]},
        {"nodes_truenodeids": [7, 0, 0]},
        {"nodes_nodeids": [0, 1, 1]},
        {"nodes_values": [0.0]},
        {"target_ids": [0, 5]},
        {"nodes_featureids": [-3, 0, 0]},
        {"nodes_modes": ["BRANCH_UP", "LEAF", "LEAF"]},
    ],
)
def test_broken_trees_are_told(changes: dict[str, Any]) -> None:
    x = np.zeros((2, 1), np.float32)
    with pytest.raises(InvalidModelError, match="TreeEnsembleRegressor"):
        minicc.compile(node_model("TreeEnsembleRegressor", [x], 1, n_targets=1, **stump(**changes)))


def test_rows_with_too_few_features_are_told() -> None:
    attrs = stump(nodes_featureids=[5, 0, 0])
    model = node_model("TreeEnsembleRegressor", [np.zeros((2, 3), np.float32)], 1, n_targets=1, **attrs)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "width"
    module = minicc.compile(model)
    assert module(np.ones((1, 6), np.float32)).tolist() == [[2.0]]
    with pytest.raises(ShapeError, match="6 features"):
        module(np.ones((1, 3), np.float32))


@given(st.integers(0, 1 << 32), st.booleans(), st.booleans())
@settings(max_examples=25, deadline=None)
def test_ensembles_of_numbered_leaves(seed: int, sets: bool, double: bool) -> None:
    """`TreeEnsemble` (version 5), with splits by sets, which numpy computes."""
    rng = np.random.default_rng(seed)
    nodes: list[list[Any]] = []
    leaves: list[tuple[int, float]] = []
    members: list[float] = []
    def grow(level: int) -> tuple[int, int]:
        if level and (level > 3 or rng.random() < 0.3):
            leaves.append((int(rng.integers(2)), float(rng.standard_normal())))
            return len(leaves) - 1, 1
        place = len(nodes)
        mode = 6 if sets and rng.random() < 0.3 else int(rng.integers(6))
        nodes.append([int(rng.integers(FEATURES)), float(rng.choice(NUMBERS[:-1])), mode, int(rng.random() < 0.3)])
        nodes[place] += [*grow(level + 1), *grow(level + 1)]
        return place, 0

    roots = [grow(0)[0] for _ in range(4)]
    for node in nodes:
        if node[2] == 6:
            members += [*rng.choice([1.0, 2.0, 3.0], 2, replace=False).tolist(), float("nan")]
    dtype = np.float64 if double else np.float32
    names = ("featureids", "splits", "modes", "missing_value_tracks_true", "truenodeids", "trueleafs", "falsenodeids",
             "falseleafs")  # fmt: skip
    attrs: dict[str, Any] = {f"nodes_{name}": list(column) for name, column in zip(names, zip(*nodes))}
    attrs["nodes_splits"] = np.array(attrs["nodes_splits"], dtype)
    attrs["nodes_modes"] = np.array(attrs["nodes_modes"], np.uint8)
    attrs["leaf_targetids"] = [target for target, _ in leaves]
    attrs["leaf_weights"] = np.array([weight for _, weight in leaves], dtype)
    if any(node[2] == 6 for node in nodes):
        attrs["membership_values"] = np.array(members, dtype)
    x = draw_rows(rng, False, dtype)
    x[:, ::2] = rng.integers(0, 4, x[:, ::2].shape)
    host = ("TreeEnsemble",) if double or "membership_values" in attrs else ()
    model_attrs = {k: tensor(k, v) if isinstance(v, np.ndarray) else v for k, v in attrs.items()}
    model = node_model("TreeEnsemble", [x], 1, 5, n_targets=2, tree_roots=roots, **model_attrs)
    ours = compiled(model, [x], host)[0]
    mine = by_numpy("TreeEnsemble", [x], n_targets=2, tree_roots=roots, **attrs)[0]
    np.testing.assert_allclose(ours, mine, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours, by_onnxruntime(model, [x])[0], rtol=1e-5, atol=1e-5)


def tensor(name: str, array: Any) -> Any:
    return numpy_helper.from_array(array, name)
