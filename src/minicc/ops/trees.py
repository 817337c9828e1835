"""Tree ensembles of ai.onnx.ml: TreeEnsemble, TreeEnsembleRegressor and TreeEnsembleClassifier.

All become one `Forest`: a table of nodes, the root of each tree and the weights of the leaves. `minicc.TreeLeaves` finds the
leaf that each row reaches in each tree, by a kernel; weights are then gathered and added up by generated ones. Where the
standard is silent (two classes with the weights of one, transforms of a single score) results are those of ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from minicc.errors import InvalidModelError
from minicc.ir.graph import Builder, Node, Value
from minicc.ir.opdef import REQUIRED, Inference, Kind, OpDef, register
from minicc.ir.types import TensorType, Type, f32, f64, i32
from minicc.ops.helpers import Array
from minicc.ops.norm import as_type, axes_of, required
from minicc.ops.scores import (
    DOMAIN,
    TRANSFORMS,
    as_rows,
    class_labels,
    is_above,
    label_array,
    label_type,
    labelled,
    paired,
    refuse_rows,
    row_array,
    rows_of,
    transformed,
    transformed_scores,
)

MODES = ("BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT", "BRANCH_EQ", "BRANCH_NEQ", "BRANCH_MEMBER")
AGGREGATES = ("AVERAGE", "SUM", "MIN", "MAX")
LEAF = -1  # as the mode of a node
MEMBER = MODES.index("BRANCH_MEMBER")
MAX_WEIGHTS = 1 << 26  # elements of a table of leaf weights

# In a row of the table of nodes: the feature with two marks, the bits of the float32 it is compared with, and where to go next.
FEATURE, SPLIT, BELOW, ABOVE = range(4)
FEATURE_MASK = (1 << 28) - 1
NAN_BELOW, IS_EQUAL = 1 << 28, 1 << 29  # a NaN goes to BELOW; BELOW is for equal numbers, not for smaller or equal ones


class Forest(NamedTuple):
    """Trees as their attributes say it.

    features, splits, modes (LEAF for leaves), missing (whether a NaN takes the true branch), true, false: by node; the last two
    are numbers of nodes. roots: numbers of nodes. weights: (node, target, weight) of the leaves. base: added to every score.
    """

    features: Array
    splits: Array
    modes: Array
    missing: Array
    true: Array
    false: Array
    roots: Array
    weights: tuple[Array, Array, Array]
    base: Array
    targets: int
    aggregate: str
    transform: str
    members: Array  # the sets that BRANCH_MEMBER nodes ask for, in the order of these nodes, a NaN behind each


# -- attributes


def _floats(attrs: Mapping[str, Any], name: str) -> Array:
    given = attrs.get(f"{name}_as_tensor")
    given = attrs.get(name) if given is None else given
    return np.asarray(() if given is None else given).reshape(-1).astype(np.float64)


def _integers(attrs: Mapping[str, Any], name: str) -> Array:
    return np.asarray(attrs.get(name) or (), np.int64)


def _modes(names: Sequence[str]) -> Array:
    """Modes as numbers, `LEAF` for leaves. ValueError for an unknown one."""
    known, where = np.unique(np.array(names, object).astype(str), return_inverse=True)
    return np.array([LEAF if name == "LEAF" else MODES.index(name) for name in known.tolist()], np.int64)[where]


def _numbering(trees: Array, nodes: Array) -> Callable[[Array, Array], Array]:
    """What gives the positions of nodes by their tree's and their own number. ValueError for nodes that are none, or two."""
    tree_names, tree_places = np.unique(trees, return_inverse=True)
    node_names, node_places = np.unique(nodes, return_inverse=True)
    keys = tree_places * max(1, len(node_names)) + node_places
    order = np.argsort(keys)
    keys = keys[order]
    if len(trees) != len(nodes) or np.any(keys[1:] == keys[:-1]):
        raise ValueError("a node is named twice, or has no tree")

    def find(of_trees: Array, of_nodes: Array) -> Array:
        if len(of_trees) != len(of_nodes):
            raise ValueError("a node without a tree")
        if not len(of_trees):
            return np.zeros(0, np.int64)
        places = [np.searchsorted(names, values) for names, values in ((tree_names, of_trees), (node_names, of_nodes))]
        key = places[0] * max(1, len(node_names)) + places[1]
        at = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
        found = order[at]
        if not len(keys) or np.any((trees[found] != of_trees) | (nodes[found] != of_nodes)):
            raise ValueError("a node is spoken of that there is not")
        return np.asarray(found)

    return find


def _by_trees(attrs: Mapping[str, Any], prefix: str, targets: int, aggregate: str) -> Forest:
    """The forest of the operators with a tree and a node number for each node; `prefix` is that of the weights' attributes."""
    trees, nodes = _integers(attrs, "nodes_treeids"), _integers(attrs, "nodes_nodeids")
    count = len(nodes)
    number = _numbering(trees, nodes)
    modes = _modes(attrs["nodes_modes"] or ())
    features, splits = _integers(attrs, "nodes_featureids"), _floats(attrs, "nodes_values")
    missing = _integers(attrs, "nodes_missing_value_tracks_true")
    missing = missing if missing.size else np.zeros(count, np.int64)
    sides = [_integers(attrs, f"nodes_{side}nodeids") for side in ("true", "false")]
    if any(len(a) != count for a in (trees, modes, features, splits, missing, *sides)):
        raise ValueError("nodes lack an attribute")
    inner = modes != LEAF
    children = [np.arange(count), np.arange(count)]
    for child, ids in zip(children, sides):
        child[inner] = number(trees[inner], ids[inner])
    roots = np.sort(np.unique(trees, return_index=True)[1])  # the first node of a tree is its root
    ids = _integers(attrs, f"{prefix}_ids")
    at = number(_integers(attrs, f"{prefix}_treeids"), _integers(attrs, f"{prefix}_nodeids"))
    weights = (at, ids, _floats(attrs, f"{prefix}_weights"))
    transform = attrs.get("post_transform") or "NONE"
    return Forest(features, splits, modes, missing, children[0], children[1], roots, weights,
                  _floats(attrs, "base_values"), targets, aggregate, transform, np.zeros(0))  # fmt: skip


def _of_leaves(attrs: Mapping[str, Any]) -> Forest:
    """The forest of `TreeEnsemble`, whose leaves are numbered by themselves; here they come behind the other nodes."""
    features, splits = _integers(attrs, "nodes_featureids"), _floats(attrs, "nodes_splits")
    targets, leaf_weights = _integers(attrs, "leaf_targetids"), _floats(attrs, "leaf_weights")
    count, leaves = len(features), len(leaf_weights)
    modes = np.asarray(attrs["nodes_modes"]).reshape(-1).astype(np.int64)
    missing = _integers(attrs, "nodes_missing_value_tracks_true")
    missing = missing if missing.size else np.zeros(count, np.int64)
    children = []
    for side in ("true", "false"):
        ids, is_leaf = _integers(attrs, f"nodes_{side}nodeids"), _integers(attrs, f"nodes_{side}leafs")
        if np.any((ids < 0) | (ids >= np.where(is_leaf != 0, leaves, count))):
            raise ValueError(f"nodes_{side}nodeids names a node or leaf that there is not")
        children.append(np.concatenate([np.where(is_leaf != 0, ids + count, ids), np.arange(leaves) + count]))
    if any(len(a) != count for a in (splits, modes, missing)) or len(targets) != leaves:
        raise ValueError("nodes or leaves lack an attribute")
    padded = [np.concatenate([a, np.zeros(leaves, a.dtype)]) for a in (features, splits, missing)]
    modes = np.concatenate([modes, np.full(leaves, LEAF)])
    roots = _integers(attrs, "tree_roots")
    if np.any((roots < 0) | (roots >= count)):
        raise ValueError("tree_roots names a node that there is not")
    weights = (np.arange(leaves) + count, targets, leaf_weights)
    return Forest(padded[0], padded[1], modes, padded[2], children[0], children[1], roots, weights, np.zeros(0),
                  int(attrs["n_targets"]), AGGREGATES[int(attrs["aggregate_function"])],
                  TRANSFORMS[int(attrs["post_transform"])], _floats(attrs, "membership_values"))  # fmt: skip


def _checked(forest: Forest, where: str) -> Forest:
    """The forest, all of whose walks end. Raises InvalidModelError for nodes that lead back, and for targets out of range."""
    at, targets, weights = forest.weights
    if not (len(at) == len(targets) == len(weights)) or np.any((targets < 0) | (targets >= forest.targets)):
        raise InvalidModelError("the weights of a tree ensemble do not fit its targets", where=where)
    if len(forest.base) not in (0, 1, forest.targets):
        raise InvalidModelError(f"{len(forest.base)} base values for {forest.targets} targets", where=where)
    if np.any((forest.features < 0) | (forest.features > FEATURE_MASK)):
        raise InvalidModelError("a tree ensemble names a feature below 0", where=where)
    if _depth(forest) > len(forest.modes):
        raise InvalidModelError("a tree ensemble has nodes that lead back to themselves", where=where)
    return forest


def _depth(forest: Forest) -> int:
    """Steps from a root to a leaf at most; more than there are nodes where some walk never ends."""
    level, inner = np.unique(forest.roots), forest.modes != LEAF
    for depth in range(len(forest.modes) + 1):
        level = level[inner[level]]
        if not level.size:
            return depth
        level = np.unique(np.concatenate([forest.true[level], forest.false[level]]))
    return len(forest.modes) + 1


def forest_of(op: str, attrs: Mapping[str, Any], where: str) -> Forest:
    """The trees of a node. Raises InvalidModelError where its attributes do not fit each other."""
    try:
        if op == "TreeEnsemble":
            forest = _of_leaves(attrs)
        elif op == "TreeEnsembleRegressor":
            targets = int(attrs["n_targets"] or 1)
            forest = _by_trees(attrs, "target", targets, attrs["aggregate_function"] or "SUM")
        else:
            forest = _by_trees(attrs, "class", len(class_labels(attrs, "classlabels_int64s")), "SUM")
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise InvalidModelError("the attributes of a tree ensemble do not fit each other", where=where, why=str(error)) from error
    if forest.aggregate not in AGGREGATES or forest.transform not in TRANSFORMS:
        raise InvalidModelError(f"no aggregate {forest.aggregate} or transform {forest.transform}", where=where)
    return _checked(forest, where)


# -- minicc.TreeLeaves(x [N, F], nodes [M, 4], roots [T], leaves [M]) -> [N, T]; features that nodes ask for, steps at most


def _leaves_infer(n: Inference) -> list[Type]:
    return [TensorType(i32, (n.shape(0)[0], n.shape(2)[0]))]


def _leaves_eval(x: Array, nodes: Array, roots: Array, leaves: Array, *, features: int, depth: int) -> Array:
    splits = nodes[:, SPLIT].copy().view(np.float32)
    at = np.broadcast_to(roots, (len(x), len(roots)))
    while True:
        row = nodes[at]
        feature = row[..., FEATURE]
        value = np.take_along_axis(x, np.asarray(feature & FEATURE_MASK, np.int64), 1) if x.size else np.zeros(at.shape, x.dtype)
        below = np.where(feature & IS_EQUAL, value == splits[at], value <= splits[at])
        below |= np.isnan(value) & ((feature & NAN_BELOW) != 0)
        following = np.where(below, row[..., BELOW], row[..., ABOVE])
        if np.array_equal(following, at):
            return np.asarray(leaves[at], np.int32)
        at = following


def _leaves_refuse(node: Node) -> str | None:
    x = node.inputs[0]
    assert x is not None
    return None if x.tensor.dtype in (f32, f64) else f"features of type {x.type}"


register(OpDef(
    "TreeLeaves", Kind.TEMPLATE, infer=_leaves_infer, eval=_leaves_eval, refuse=_leaves_refuse,
    attrs={"features": REQUIRED, "depth": REQUIRED}, domain="minicc",
))  # fmt: skip


def node_table(forest: Forest) -> Array:
    """The nodes as the kernel reads them: every comparison is "x <= split" or "x == split", its outcome BELOW or ABOVE.

    x < s is x <= the float before s, x >= s and x > s are the opposites of x < s and x <= s, for which a NaN must be told apart.
    """
    splits = forest.splits.astype(np.float32)
    below, above = forest.true.copy(), forest.false.copy()
    marks = np.where(forest.missing != 0, NAN_BELOW, 0)
    mode = forest.modes
    opposite = (mode == MODES.index("BRANCH_GTE")) | (mode == MODES.index("BRANCH_GT")) | (mode == MODES.index("BRANCH_NEQ"))
    below[opposite], above[opposite] = forest.false[opposite], forest.true[opposite]
    # x >= NaN and x > NaN are false, x != NaN is true: where branches are swapped a NaN goes below unless it counts as true.
    unordered = opposite & (mode != MODES.index("BRANCH_NEQ"))
    marks[unordered] = np.where(forest.missing[unordered] != 0, 0, NAN_BELOW)
    marks[opposite & ~unordered] = 0
    strict = (mode == MODES.index("BRANCH_LT")) | (mode == MODES.index("BRANCH_GTE"))
    splits[strict] = np.nextafter(splits[strict], np.float32(-np.inf))
    marks[(mode == MODES.index("BRANCH_EQ")) | (mode == MODES.index("BRANCH_NEQ"))] |= IS_EQUAL
    leaf = mode == LEAF
    splits[leaf], marks[leaf] = np.inf, 0
    features = np.where(leaf, 0, forest.features) | marks
    return np.stack([features, splits.view(np.int32), below, above], axis=1).astype(np.int32)


# -- the operators


def _eval_scores(forest: Forest, x: Array) -> tuple[Array, Array]:
    """Scores [N, targets] without transform, and which of them some leaf has given, row by row and node by node."""
    compare = (np.less_equal, np.less, np.greater_equal, np.greater, np.equal, np.not_equal)
    weights: dict[int, list[tuple[int, float]]] = {}
    for at, target, weight in zip(*forest.weights):
        weights.setdefault(int(at), []).append((int(target), float(weight)))
    ends = np.flatnonzero(np.isnan(forest.members))
    sets = dict(zip(np.flatnonzero(forest.modes == MEMBER).tolist(), np.split(forest.members, ends)))
    scores, given = np.zeros((len(x), forest.targets)), np.zeros((len(x), forest.targets), bool)
    kind = x.dtype if x.dtype.kind == "f" else np.float32
    for i, row in enumerate(x.astype(kind)):
        for root in forest.roots:
            at = int(root)
            while forest.modes[at] != LEAF:
                value = row[forest.features[at]]
                if forest.modes[at] == MEMBER:
                    taken = value in sets.get(at, ())
                else:
                    taken = compare[forest.modes[at]](value, np.dtype(kind).type(forest.splits[at]))
                taken = taken or (np.isnan(value) and forest.missing[at] != 0)
                at = int(forest.true[at] if taken else forest.false[at])
            for target, weight in weights.get(at, ()):
                if not given[i, target] or forest.aggregate in ("SUM", "AVERAGE"):
                    scores[i, target] += weight
                else:
                    scores[i, target] = (min if forest.aggregate == "MIN" else max)(scores[i, target], weight)
                given[i, target] = True
    if forest.aggregate == "AVERAGE":
        scores /= max(1, len(forest.roots))
    return scores, given


def _regressor_eval(op: str) -> Any:
    def evaluate(x: Array, **attrs: Any) -> Array:
        forest = forest_of(op, attrs, op)
        scores = _eval_scores(forest, row_array(x))[0] + (forest.base if forest.base.size else 0)
        if forest.targets > 1 or forest.transform == "PROBIT":
            scores = transformed_scores(scores, forest.transform)
        return scores.astype(np.float64 if op == "TreeEnsemble" and x.dtype == np.float64 else np.float32)

    return evaluate


def _regressor_infer(n: Inference) -> list[Type]:
    forest = forest_of(n.op.name, n.attrs, n.where)
    n.shape(0)  # of known rank
    dtype = f64 if n.op.name == "TreeEnsemble" and n.dtype(0) == f64 else f32
    return [TensorType(dtype, (rows_of(n.type(0)), forest.targets))]


def _refuse(node: Node) -> str | None:
    reason = refuse_rows(node)
    if reason is not None:
        return reason
    forest = forest_of(node.op.name, node.attrs, node.describe())
    if np.any(forest.modes == MEMBER):
        return "splits by sets"
    if node.op.name == "TreeEnsemble" and required(node, 0).tensor.dtype == f64:
        return "results in double precision"
    if not np.array_equal(forest.splits.astype(np.float32), forest.splits, equal_nan=True):
        return "splits in double precision"
    leaves = int(np.sum(forest.modes == LEAF))
    if leaves * forest.targets > MAX_WEIGHTS:
        return f"{leaves} leaves of {forest.targets} targets"
    if forest.aggregate in ("MIN", "MAX") and not _weight_table(forest)[1].all():
        return "leaves without a weight for every target"
    return None


def _leaves(b: Builder, x: Value, forest: Forest) -> Value:
    """Numbers [N, T] of the leaves that rows reach, counted among the leaves."""
    x = as_rows(b, x)
    x = x if x.tensor.dtype == f64 else as_type(b, x, f32)
    inner = forest.modes != LEAF
    numbers = (np.cumsum(~inner) - 1).astype(np.int32)
    features = int(forest.features[inner].max(initial=-1)) + 1
    return b.op("TreeLeaves", x, b.constant(node_table(forest)), b.constant(forest.roots.astype(np.int32)), b.constant(numbers),
                domain="minicc", features=features, depth=_depth(forest))  # fmt: skip


def _weight_table(forest: Forest) -> tuple[Array, Array]:
    """Weights [leaves, targets], 0 where a leaf has none, and whether it has one. Those of other nodes are never reached."""
    of_leaves = forest.modes[forest.weights[0]] == LEAF
    at, targets, weights = (a[of_leaves] for a in forest.weights)
    numbers = np.cumsum(forest.modes == LEAF) - 1
    table = np.zeros((int(numbers[-1]) + 1 if len(numbers) else 0, forest.targets))
    given = np.zeros(table.shape, bool)
    np.add.at(table, (numbers[at], targets), weights)
    given[numbers[at], targets] = True
    return table, given


def _by_tree(forest: Forest, given: Array) -> tuple[Array, Array]:
    """Whether some leaf of a tree has a weight for a target, and whether all have [T, targets]."""
    inner = forest.modes != LEAF
    numbers = np.cumsum(~inner) - 1
    some, each = (np.zeros((len(forest.roots), forest.targets), bool) for _ in range(2))
    for tree, root in enumerate(forest.roots.tolist()):
        level, leaves = np.array([root]), np.zeros(0, np.int64)
        while level.size:
            leaves = np.concatenate([leaves, level[~inner[level]]])
            level = level[inner[level]]
            level = np.concatenate([forest.true[level], forest.false[level]])
        own = given[numbers[leaves]]
        some[tree], each[tree] = own.any(axis=0), own.all(axis=0)
    return some, each


def _by_target(forest: Forest, some: Array) -> Forest | None:
    """The same forest with trees in order of their targets, where each tree has one and each target as many trees.

    some: whether a tree has a weight for a target.
    """
    owners = np.argmax(some, axis=1)
    if some.sum(axis=1).max(initial=0) > 1 or len(np.unique(np.bincount(owners, minlength=forest.targets))) > 1:
        return None
    return forest._replace(roots=forest.roots[np.argsort(owners, kind="stable")])


def _sums(b: Builder, x: Value, forest: Forest, table: Array, some: Array) -> Value:
    """The sums [N, targets] of the weights that trees lead to. some: as for `_by_target`."""
    ordered = _by_target(forest, some) if forest.targets > 1 else None
    if ordered is None:
        return _aggregate(b, _leaves(b, x, forest), table, "ReduceSum")
    each = b.op("Gather", b.constant(table.sum(axis=1).astype(np.float32)), _leaves(b, x, ordered), axis=0)
    by_target = b.op("Reshape", each, b.constant(np.array([0, forest.targets, -1], np.int64)))
    return b.op("ReduceSum", by_target, axes_of(b, [2]), keepdims=0)


def _aggregate(b: Builder, leaves: Value, table: Array, reduce: str) -> Value:
    """Of the rows of a table [leaves, K] that the trees lead to: their sum, least or largest."""
    each = b.op("Gather", b.constant(table.astype(np.float32)), leaves, axis=0)
    return b.op(reduce, each, axes_of(b, [1]), keepdims=0)


def _with_base(b: Builder, scores: Value, base: Array) -> Value:
    return b.op("Add", scores, b.constant(base.astype(np.float32))) if base.size else scores


def _regressor_expand(b: Builder, node: Node) -> Sequence[Value]:
    forest = forest_of(node.op.name, node.attrs, node.describe())
    x, (table, given) = required(node, 0), _weight_table(forest)
    reduce = {"MIN": "ReduceMin", "MAX": "ReduceMax"}.get(forest.aggregate)
    if reduce:
        scores = _aggregate(b, _leaves(b, x, forest), table, reduce)
    else:
        scores = _sums(b, x, forest, table, _by_tree(forest, given)[0])
    if forest.aggregate == "AVERAGE":
        scores = b.op("Div", scores, b.scalar(max(1, len(forest.roots)), scores))
    scores = _with_base(b, scores, forest.base)
    # ONNX Runtime leaves a single score as it is, but for PROBIT.
    return [transformed(b, scores, forest.transform) if forest.targets > 1 or forest.transform == "PROBIT" else scores]


# Of a classifier: one score for each label, but where there are two labels and all weights are those of one. Its score then
# decides, above a half where no weight is negative and else above 0.


def _single(forest: Forest, labels: Sequence[Any]) -> int | None:
    """The only one of two classes that has weights."""
    classes = np.unique(forest.weights[1])
    return int(classes[0]) if len(labels) == 2 and len(classes) == 1 and len(forest.base) < 2 else None


def _classifier_infer(n: Inference) -> list[Type]:
    forest_of(n.op.name, n.attrs, n.where)
    n.shape(0)  # of known rank
    labels, rows = class_labels(n.attrs, "classlabels_int64s"), rows_of(n.type(0))
    return [label_type(labels, rows), TensorType(f32, (rows, len(labels)))]


def _classifier_eval(x: Array, **attrs: Any) -> tuple[Array, Array]:
    forest = forest_of("TreeEnsembleClassifier", attrs, "TreeEnsembleClassifier")
    labels = class_labels(attrs, "classlabels_int64s")
    scores, given = _eval_scores(forest, row_array(x))
    only = _single(forest, labels)
    if len(labels) == 1:
        scores = scores + (forest.base if forest.base.size else 0)
        places = (scores[:, 0] > 0).astype(np.int64)
        found = places if attrs["classlabels_int64s"] else label_array(labels)[0 * places]
        return found, (transformed_scores(scores, "PROBIT") if forest.transform == "PROBIT" else scores).astype(np.float32)
    if only is None:
        scores = scores + (forest.base if forest.base.size else 0)
        places = np.argmax(np.where(given, scores, -np.inf), axis=1)
        return label_array(labels)[places], transformed_scores(scores, forest.transform).astype(np.float32)
    score = scores[:, only] + (forest.base if forest.base.size and only == 0 else 0)
    is_positive = bool(np.all(forest.weights[2] >= 0))
    places = (score > (0.5 if is_positive else 0)).astype(np.int64)
    if only == 1:
        pair = transformed_scores(np.stack([np.zeros_like(score), score], 1), forest.transform)
    elif forest.transform == "LOGISTIC":
        pair = transformed_scores(np.stack([-score, score], 1), "LOGISTIC")
    else:
        pair = np.stack([1 - score if is_positive else -score, score], 1)
        pair = transformed_scores(pair, "PROBIT") if forest.transform == "PROBIT" else pair
    return label_array(labels)[places], pair.astype(np.float32)


def _classifier_expand(b: Builder, node: Node) -> Sequence[Value]:
    forest, labels = forest_of(node.op.name, node.attrs, node.describe()), class_labels(node.attrs, "classlabels_int64s")
    x, (table, given) = required(node, 0), _weight_table(forest)
    only = _single(forest, labels)
    if only is not None:
        score = _aggregate(b, _leaves(b, x, forest), table[:, [only]], "ReduceSum")
        score = _with_base(b, score, forest.base if only == 0 else np.zeros(0))
        return _two_labels(b, score, forest, labels, only)[: len(node.outputs)]
    some, each = _by_tree(forest, given)
    scores = _with_base(b, _sums(b, x, forest, table, some), forest.base)
    if len(labels) == 1:
        return _one_label(b, scores, forest, node)
    candidates = scores
    if not each.any(axis=0).all():  # a class that no leaf has spoken of is not chosen
        spoken = b.op("Greater", _aggregate(b, _leaves(b, x, forest), given, "ReduceMax"), b.scalar(0, scores))
        candidates = b.op("Where", spoken, scores, b.scalar(-np.inf, scores))
    places = b.op("ArgMax", candidates, axis=1, keepdims=0)
    return [labelled(b, places, labels), transformed(b, scores, forest.transform)][: len(node.outputs)]


def _one_label(b: Builder, score: Value, forest: Forest, node: Node) -> Sequence[Value]:
    """Whether the only score [N, 1] is above 0, as 1 and 0 (the label itself where it is a text), and the score."""
    label, above = class_labels(node.attrs, "classlabels_int64s"), is_above(b, score, 0)
    found = above if node.attrs["classlabels_int64s"] else labelled(b, b.op("Mul", above, b.scalar(0, above)), label)
    return [found, transformed(b, score, "PROBIT") if forest.transform == "PROBIT" else score][: len(node.outputs)]


def _two_labels(b: Builder, score: Value, forest: Forest, labels: Sequence[Any], only: int) -> Sequence[Value]:
    """Label and scores of two classes from the score [N, 1] of one of them."""
    is_positive = bool(np.all(forest.weights[2] >= 0))
    places = is_above(b, score, 0.5 if is_positive else 0)
    if only == 1:
        pair = transformed(b, b.op("Concat", b.op("Mul", score, b.scalar(0, score)), score, axis=1), forest.transform)
    else:
        pair = paired(b, score, forest.transform, one_minus=is_positive)
    return [labelled(b, places, labels), pair]


_NODES = {f"nodes_{name}": None for name in ("falsenodeids", "featureids", "hitrates", "hitrates_as_tensor", "modes", "nodeids",
          "missing_value_tracks_true", "treeids", "truenodeids", "values", "values_as_tensor")}  # fmt: skip
_BASE = {"base_values": None, "base_values_as_tensor": None, "post_transform": "NONE"}

register(OpDef(
    "TreeEnsembleRegressor", Kind.EXPAND, infer=_regressor_infer, eval=_regressor_eval("TreeEnsembleRegressor"),
    expand=_regressor_expand, refuse=_refuse, domain=DOMAIN,
    attrs={**_NODES, **_BASE, "aggregate_function": "SUM", "n_targets": None,
           **{f"target_{name}": None for name in ("ids", "nodeids", "treeids", "weights", "weights_as_tensor")}},
))  # fmt: skip

register(OpDef(
    "TreeEnsemble", Kind.EXPAND, infer=_regressor_infer, eval=_regressor_eval("TreeEnsemble"), expand=_regressor_expand,
    refuse=_refuse, domain=DOMAIN,
    attrs={"aggregate_function": 1, "post_transform": 0, "n_targets": REQUIRED, "membership_values": None, "tree_roots": REQUIRED,
           "leaf_targetids": REQUIRED, "leaf_weights": REQUIRED, "nodes_modes": REQUIRED, "nodes_splits": REQUIRED,
           "nodes_featureids": REQUIRED, "nodes_hitrates": None, "nodes_missing_value_tracks_true": None,
           **{f"nodes_{side}{kind}": REQUIRED for side in ("true", "false") for kind in ("nodeids", "leafs")}},
))  # fmt: skip

register(OpDef(
    "TreeEnsembleClassifier", Kind.EXPAND, infer=_classifier_infer, eval=_classifier_eval, expand=_classifier_expand,
    refuse=_refuse, domain=DOMAIN,
    attrs={**_NODES, **_BASE, "classlabels_int64s": None, "classlabels_strings": None,
           **{f"class_{name}": None for name in ("ids", "nodeids", "treeids", "weights", "weights_as_tensor")}},
))  # fmt: skip
