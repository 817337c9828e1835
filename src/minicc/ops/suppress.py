"""Non-maximum suppression: boxes are chosen per batch and class by a kernel, and joined on the host.

Only the joining depends on the data, since it makes an array as long as the choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minicc.ir.dims import Dim, maximum, minimum
from minicc.ir.graph import Builder, Node, Value
from minicc.ir.opdef import Inference, Kind, OpDef, register
from minicc.ir.types import TensorType, Type, f32, i64
from minicc.ops.helpers import Array, as_dim

# -- minicc.SelectBoxes(boxes [B, N, 4], scores [B, C, N], max_boxes, iou_threshold, score_threshold)


def _select_infer(n: Inference) -> list[Type]:
    """Positions of the chosen boxes [B, C, most], and how many there are [B, C]; further positions hold anything."""
    scores = n.shape(1)
    limit = n.content(2) if n.has(2) else None
    count = None if limit is None else as_dim(limit.reshape(-1)[0])
    most: Dim = scores[2] if count is None else minimum(maximum(count, 0), scores[2])
    return [TensorType(i64, (*scores[:2], most)), TensorType(i64, scores[:2])]


def _corners(boxes: Array, center_point_box: int) -> Array:
    """Boxes as smaller and larger coordinate of each of the two axes."""
    if center_point_box:
        x, y, width, height = boxes.T
        return np.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], axis=1)
    first, second = boxes[:, :2], boxes[:, 2:]
    return np.concatenate([np.minimum(first, second), np.maximum(first, second)], axis=1)


def _overlap(box: Array, others: Array) -> Array:
    """Intersection over union of one box with others; 0 where the union is empty."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    common = np.prod(np.maximum(sides, 0), axis=1)
    union = np.prod(box[2:] - box[:2]) + np.prod(others[:, 2:] - others[:, :2], axis=1) - common
    return np.asarray(np.divide(common, union, out=np.zeros_like(common), where=union > 0))


def _chosen(boxes: Array, score: Array, limit: int, overlap_limit: float, least: float | None, center: int) -> list[int]:
    """Positions of the boxes of one batch and class, the best first, without those that overlap a chosen one too much."""
    corners = _corners(boxes, center)
    order = np.argsort(-score, kind="stable")
    order = order[~np.isnan(score[order]) if least is None else score[order] > least]
    found: list[int] = []
    while order.size and len(found) < limit:
        best, order = order[0], order[1:]
        found.append(int(best))
        order = order[_overlap(corners[best], corners[order]) <= overlap_limit]
    return found


def _scalars(max_boxes: Array | None, iou: Array | None, score: Array | None) -> tuple[int, float, float | None]:
    limit = 0 if max_boxes is None else int(max_boxes.item())
    return limit, 0.0 if iou is None else iou.item(), None if score is None else score.item()


def _select_eval(boxes: Array, scores: Array, max_boxes: Array | None = None, iou_threshold: Array | None = None,
                 score_threshold: Array | None = None, *, center_point_box: int) -> tuple[Array, Array]:  # fmt: skip
    scalars = _scalars(max_boxes, iou_threshold, score_threshold)
    batches, classes, count = scores.shape
    chosen = np.zeros((batches, classes, min(max(scalars[0], 0), count)), np.int64)
    counts = np.zeros((batches, classes), np.int64)
    for b, c in np.ndindex(batches, classes):
        found = _chosen(boxes[b], scores[b, c], *scalars, center_point_box)
        chosen[b, c, : len(found)] = found
        counts[b, c] = len(found)
    return chosen, counts


def _select_refuse(node: Node) -> str | None:
    for value in node.inputs[:2]:
        if value is not None and (not isinstance(value.type, TensorType) or value.type.dtype != f32 or value.type.shape is None):
            return f"boxes of type {value.type}"
    return None


register(OpDef(
    "SelectBoxes", Kind.TEMPLATE, infer=_select_infer, eval=_select_eval, refuse=_select_refuse,
    attrs={"center_point_box": 0}, domain="minicc",
))  # fmt: skip


# -- minicc.JoinBoxes(chosen [B, C, most], counts [B, C])


def _join_infer(n: Inference) -> list[Type]:
    return [TensorType(i64, (n.fresh("boxes"), 3))]


def _join_eval(chosen: Array, counts: Array) -> Array:
    """Rows (batch, class, box)."""
    taken = np.arange(chosen.shape[2]) < counts[..., None]
    rows = np.stack([*np.nonzero(taken)[:2], chosen[taken]], axis=1)
    return np.ascontiguousarray(rows, dtype=np.int64)


register(OpDef("JoinBoxes", Kind.HOST, infer=_join_infer, eval=_join_eval, domain="minicc"))


# -- NonMaxSuppression


def _suppress_infer(n: Inference) -> list[Type]:
    return [TensorType(i64, (n.fresh("boxes"), 3))]


def _suppress_eval(boxes: Array, scores: Array, max_boxes: Array | None = None, iou_threshold: Array | None = None,
                   score_threshold: Array | None = None, *, center_point_box: int) -> Array:  # fmt: skip
    """Per batch and class, the best box first, dropping those that overlap a chosen one too much."""
    scalars = _scalars(max_boxes, iou_threshold, score_threshold)
    rows = [
        (b, c, box)
        for b, c in np.ndindex(*scores.shape[:2])
        for box in _chosen(boxes[b], scores[b, c], *scalars, center_point_box)
    ]
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def _suppress_expand(b: Builder, node: Node) -> Sequence[Value]:
    chosen, counts = b.ops("SelectBoxes", *node.inputs, domain="minicc", outputs=2, **node.attrs)
    return [b.op("JoinBoxes", chosen, counts, domain="minicc")]


register(OpDef(
    "NonMaxSuppression", Kind.EXPAND, infer=_suppress_infer, eval=_suppress_eval, expand=_suppress_expand,
    refuse=_select_refuse, attrs={"center_point_box": 0},
))  # fmt: skip
