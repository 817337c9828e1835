"""Recognising attention: softmax(q k^T * scale + mask) v between two products becomes minicc's Attention.

Exporters differ in where they scale (scores, q, k or both by a root), in how they transpose k, and in how they mask; a
group of heads that shares k and v is written as a repeated k and v. `Attention` gives zeros for a query that may attend
no key, where a softmax of -inf gives NaN. So a bare softmax is taken only when its mask has no -inf, and
Where(IsNaN(p), 0, p), which some exporters put after it, is part of the operator. Masks that replace scores by a number
that could still be told apart from -inf are left alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minicc.ir.dims import Dim
from minicc.ir.graph import Builder, Graph, Node, Value
from minicc.ir.rewrite import Refusal, Result, op, refuse, rule, var
from minicc.ir.types import TensorType, broadcast_shapes
from minicc.passes.common import is_uniform, scalar_of

DROWNING = 1e30  # x - DROWNING is -DROWNING in float32 for every score x
VIEWS = frozenset(("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Expand", "Slice", "Gather", "Identity", "Concat"))


@dataclass
class Chain:
    """Nodes passed on the way up from the root; each must have no reader but the one below."""

    graph: Graph
    nodes: list[Node]

    def producer(self, value: Value | None, *names: str) -> Node | None:
        """The producer of a value when it is one of these ops and its output is read by nodes of the chain only."""
        node = None if value is None else value.producer
        if value is None or node is None or node.op.domain or node.op.name not in names:
            return None
        if value in self.graph.outputs or any(reader not in self.nodes for reader, _ in value.uses):
            return None
        return node

    def take(self, node: Node) -> None:
        self.nodes.append(node)


@dataclass(frozen=True)
class Scores:
    """product * scale + mask, with the product's operands q and k^T."""

    query: Value
    keys: Value
    scale: float
    mask: Value | None


@rule("attention", op("MatMul", var("weights"), var("v"), name="root"))
def attention(b: Builder, weights: Value, v: Value, root: Node) -> Result:
    """MatMul(Softmax(MatMul(q, k^T) * scale + mask), v) for heads [B, H, S, D]."""
    chain = Chain(b.graph, [root])
    probabilities, guarded = _guarded(chain, weights)
    softmax = chain.producer(probabilities, "Softmax")
    if softmax is None or softmax.inputs[0] is None or _rank(softmax.output) != 4 or softmax.attrs["axis"] not in (-1, 3):
        return None
    chain.take(softmax)
    scores = _scores(b, chain, softmax.inputs[0])
    if scores is None:
        return None
    if isinstance(scores, Refusal):
        return scores
    if scores.mask is not None and not guarded and not _finite(scores.mask):
        return refuse("a query that may attend no key gives NaN")
    if not _rank(scores.query) == _rank(scores.keys) == _rank(v) == 4:
        return refuse("not heads of [batch, heads, length, size]")
    origin = tuple(dict.fromkeys(name for node in reversed(chain.nodes) for name in node.origin))
    made = Builder(b.graph, origin)
    q, k = scores.query, _transposed(made, scores.keys)
    k, v = _ungrouped(k, v)
    if not _fits(q, k, v, softmax.output):
        return refuse("sizes of q, k and v do not fit without broadcasting")
    number = scalar_of(scores.mask)
    mask = None if number is not None and np.isfinite(number) else scores.mask  # one number added to all changes nothing
    return made.op("Attention", q, k, v, mask, domain="minicc", scale=scores.scale)


def _guarded(chain: Chain, weights: Value) -> tuple[Value, bool]:
    """p for Where(IsNaN(p), 0, p), and whether that was there."""
    where = chain.producer(weights, "Where")
    if where is None:
        return weights, False
    condition, zero, p = where.inputs
    test = Chain(chain.graph, [where]).producer(condition, "IsNaN")
    if test is None or p is None or test.inputs[0] is not p or not is_uniform(zero, 0):
        return weights, False
    chain.nodes += [where, test]
    return p, True


def _scores(b: Builder, chain: Chain, value: Value) -> Scores | Refusal | None:
    """Masks first, then factors, then the product; a mask of windows (Liu et al., 2021) before any other."""
    mark = len(chain.nodes)
    windows = _masked_windows(b, chain, value)
    if windows is None:
        del chain.nodes[mark:]
        return _masked_scores(b, chain, value)
    found = _masked_scores(b, chain, windows[0])
    if not isinstance(found, Scores):
        return found
    own = windows[1]
    return Scores(found.query, found.keys, found.scale, own if found.mask is None else b.op("Add", found.mask, own))


def _masked_windows(b: Builder, chain: Chain, value: Value) -> tuple[Value, Value] | None:
    """(scores, mask [windows, H, S, T]) of scores [images * windows, H, S, T] that are [images, windows, ...] for their mask."""
    joined = chain.producer(value, "Reshape")
    if joined is None:
        return None
    chain.take(joined)
    add = chain.producer(joined.inputs[0], "Add")
    if add is None:
        return None
    chain.take(add)
    for masked, mask in (add.inputs, add.inputs[::-1]):
        split = chain.producer(masked, "Reshape")
        source = split.inputs[0] if split is not None else None
        whole, of_mask = _shape(masked), _shape(mask)
        if split is None or source is None or mask is None or whole is None or of_mask is None or _shape(source) != value.shape:
            continue
        if len(whole) != 5 or len(of_mask) > 5 or whole[2:] != value.shape[1:] or broadcast_shapes(whole, of_mask) != whole:
            continue
        chain.take(split)
        sizes = (*(1,) * (5 - len(of_mask)), *of_mask)
        if whole[0] != 1:
            mask = b.op("Expand", mask, b.shape([*whole[:2], *sizes[2:]]))
            sizes = (*whole[:2], *sizes[2:])
        return source, b.op("Reshape", mask, b.shape([sizes[0] * sizes[1], *sizes[2:]]), allowzero=1)
    return None


def _masked_scores(b: Builder, chain: Chain, value: Value) -> Scores | Refusal | None:
    """Scores with one mask, added or in their place."""
    where = chain.producer(value, "Where")
    if where is not None:
        found = _replaced(b, where)
        if found is None or isinstance(found, Refusal):
            return found
        chain.take(where)
        plain = _scaled_product(b, chain, found[0])
        return None if plain is None else Scores(*plain, found[1])
    add = chain.producer(value, "Add")
    if add is None:
        plain = _scaled_product(b, chain, value)
        return None if plain is None else Scores(*plain, None)
    chain.take(add)
    for masked, mask in (add.inputs, add.inputs[::-1]):
        plain = _scaled_product(b, chain, masked)
        if plain is not None and mask is not None and masked is not None:
            shape, of_mask = _shape(masked), _shape(mask)
            if shape is None or of_mask is None or len(of_mask) > 4 or broadcast_shapes(shape, of_mask) != shape:
                return refuse("the mask has more elements than the scores")
            return Scores(*plain, mask)
    return None


def _replaced(b: Builder, where: Node) -> tuple[Value, Value] | Refusal | None:
    """Where(keep, scores, low) or Where(drop, low, scores) as scores and a mask that is added."""
    condition, first, second = where.inputs
    if condition is None or first is None or second is None:
        return None
    scores, low = (first, second) if scalar_of(first) is None else (second, first)
    number = scalar_of(low)
    if number is None or number > 0 or scalar_of(scores) is not None or scores.type != where.output.type:
        return None
    if number > -DROWNING:
        return refuse("masked scores are replaced by a number that a score could still change")
    zero, least = b.scalar(0, scores), b.scalar(number, scores)
    return scores, b.op("Where", condition, *((zero, least) if scores is first else (least, zero)))


def _scaled_product(b: Builder, chain: Chain, value: Value | None) -> tuple[Value, Value, float] | None:
    """(q, k^T, scale) of a product whose result or operands are multiplied by numbers."""
    mark = len(chain.nodes)
    value, scale = _unscaled(chain, value)
    value, of_heads = _unscaled_heads(chain, value)
    product = chain.producer(value, "MatMul")
    if product is None:
        del chain.nodes[mark:]
        return None
    chain.take(product)
    query, keys = product.inputs
    if of_heads is not None and query is not None and keys is not None:
        return b.op("Mul", query, of_heads), keys, scale
    query, of_query = _unscaled_below_views(b, chain, query)
    keys, of_keys = _unscaled_below_views(b, chain, keys)
    if query is None or keys is None:
        return None
    return query, keys, scale * of_query * of_keys


def _unscaled(chain: Chain, value: Value | None) -> tuple[Value | None, float]:
    """A value without the numbers it is multiplied or divided by, and their product."""
    scale = 1.0
    while value is not None:
        node = chain.producer(value, "Mul", "Div")
        if node is None:
            break
        x, y = node.inputs
        if node.op.name == "Mul" and scalar_of(x) is not None:
            x, y = y, x
        number = scalar_of(y)
        if number is None or number == 0 or not np.isfinite(number) or x is None or x.type != value.type:
            break
        chain.take(node)
        scale = scale / number if node.op.name == "Div" else scale * number
        value = x
    return value, scale


def _unscaled_heads(chain: Chain, value: Value | None) -> tuple[Value | None, Value | None]:
    """Scores and the constants, one for each head, that they are multiplied by: rows of queries may be instead."""
    node = chain.producer(value, "Mul")
    if node is None or value is None:
        return value, None
    for scores, factor in (node.inputs, node.inputs[::-1]):
        shape = _shape(factor)
        if shape is None or factor is None or factor.data is None or scores is None or scores.type != value.type:
            continue
        if len(shape) in (3, 4) and shape[-2:] == (1, 1) and shape[:-3] in ((), (1,)):
            chain.take(node)
            return scores, factor
    return value, None


def _unscaled_below_views(b: Builder, chain: Chain, value: Value | None) -> tuple[Value | None, float]:
    """As `_unscaled`, also when the factor stands before reshapes and transposes, which are then made anew."""
    value, scale = _unscaled(chain, value)
    view = chain.producer(value, "Reshape", "Transpose")
    if view is None:
        return value, scale
    mark = len(chain.nodes)
    chain.take(view)
    source, inner = _unscaled_below_views(b, chain, view.inputs[0])
    if inner == 1:
        del chain.nodes[mark:]
        return value, scale
    return b.op(view.op.name, source, *view.inputs[1:], **view.attrs), scale * inner


def _finite(mask: Value, depth: int = 8) -> bool:
    """Whether a mask surely holds no infinity."""
    if mask.data is not None:
        return bool(np.all(np.isfinite(mask.data.astype(np.float64))))
    node = mask.producer
    if node is None or depth == 0 or node.op.domain:
        return False
    name, inputs = node.op.name, node.inputs
    if name == "Cast":
        return inputs[0] is not None and (inputs[0].tensor.dtype.kind in "iub" or _finite(inputs[0], depth - 1))
    if name == "Where":
        return all(v is not None and _finite(v, depth - 1) for v in inputs[1:])
    if name in VIEWS:
        return all(v is not None and _finite(v, depth - 1) for v in (inputs if name == "Concat" else inputs[:1]))
    if name in ("Mul", "Add", "Sub"):  # (1 - mask) * -10000: small numbers stay small, -3.4e38 twice does not
        numbers = [_largest(v, depth - 1) for v in inputs]
        if any(n is None for n in numbers):
            return False
        a, c = (float(n) for n in numbers if n is not None)
        return (a * c if name == "Mul" else a + c) <= float(np.finfo(mask.tensor.dtype.numpy).max)
    return False


def _largest(value: Value | None, depth: int) -> float | None:
    """A bound of the absolute value of a mask's elements, or None."""
    if value is None or depth == 0:
        return None
    if value.data is not None:
        wide = np.abs(value.data.astype(np.float64))
        return float(wide.max(initial=0)) if np.all(np.isfinite(wide)) else None
    node = value.producer
    if node is None or node.op.domain:
        return None
    if node.op.name == "Cast" and node.inputs[0] is not None and node.inputs[0].tensor.dtype.kind in "iub":
        bits = node.inputs[0].tensor.dtype.bits
        return 1.0 if node.inputs[0].tensor.dtype.kind == "b" else 2.0**bits
    if node.op.name in VIEWS and node.op.name != "Concat":
        return _largest(node.inputs[0], depth - 1)
    if node.op.name in ("Mul", "Add", "Sub"):
        found = [_largest(v, depth - 1) for v in node.inputs]
        if found[0] is None or found[1] is None:
            return None
        return found[0] * found[1] if node.op.name == "Mul" else found[0] + found[1]
    return None


def _shape(value: Value | None) -> tuple[Dim, ...] | None:
    """The shape of a tensor of known rank, else None."""
    return value.type.shape if value is not None and isinstance(value.type, TensorType) else None


def _rank(value: Value) -> int | None:
    shape = _shape(value)
    return None if shape is None else len(shape)


def _transposed(b: Builder, keys: Value) -> Value:
    """k [B, H, T, D] for k^T [B, H, D, T]: what k^T was made of, when it was made by exchanging the last two axes."""
    node = keys.producer
    if node is not None and node.op.name == "Reshape" and not node.op.domain:  # heads and batch put together in between
        inner = node.inputs[0].producer if node.inputs[0] is not None else None
        source = inner.inputs[0] if inner is not None and inner.op.name == "Transpose" and not inner.op.domain else None
        if inner is not None and source is not None and tuple(inner.attrs["perm"] or ()) == (0, 2, 1):
            batch, heads, size, length = keys.shape
            if _shape(source) == (batch * heads, length, size):
                before = source.producer
                joined = before.inputs[0] if before is not None and before.op.name == "Reshape" and not before.op.domain else None
                if joined is not None and _shape(joined) == (batch, heads, length, size):
                    return joined
                return b.op("Reshape", source, b.shape((batch, heads, length, size)))
    if node is not None and node.op.name == "Transpose" and not node.op.domain and node.inputs[0] is not None:
        perm = tuple(node.attrs["perm"] or (3, 2, 1, 0))
        exchanged = (*perm[:2], perm[3], perm[2])
        return node.inputs[0] if exchanged == (0, 1, 2, 3) else b.op("Transpose", node.inputs[0], perm=exchanged)
    return b.op("Transpose", keys, perm=(0, 1, 3, 2))


def _ungrouped(k: Value, v: Value) -> tuple[Value, Value]:
    """k and v before each head was repeated for a group of queries, when both were."""
    sources = [_unrepeated(x) for x in (k, v)]
    if sources[0] is None or sources[1] is None or sources[0].shape[:3] != sources[1].shape[:3]:
        return k, v
    return sources[0], sources[1]


def _unrepeated(x: Value) -> Value | None:
    """[B, G, T, D] for its repetition [B, G * r, T, D] = Reshape(Expand(Reshape(x, [B, G, 1, T, D]), [B, G, r, T, D]))."""
    repeat = x.producer
    while repeat is not None and repeat.op.name == "Reshape" and repeat.inputs[0] is not None:
        repeat = repeat.inputs[0].producer
    if repeat is None or repeat.op.name != "Expand" or repeat.inputs[0] is None or _rank(x) != 4:
        return None
    split, wide = repeat.inputs[0], _shape(repeat.output)
    if wide is None or len(wide) != 5 or _shape(split) != (*wide[:2], 1, *wide[3:]):
        return None
    if x.shape != (wide[0], wide[1] * wide[2], *wide[3:]):
        return None
    source = split.producer
    before = source.inputs[0] if source is not None and source.op.name in ("Reshape", "Unsqueeze") else None
    return before if _shape(before) == (*wide[:2], *wide[3:]) else None


def _fits(q: Value, k: Value, v: Value, scores: Value) -> bool:
    """Whether these are heads as `Attention` wants them, without broadcasting."""
    heads, groups = q.shape[1], k.shape[1]
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        return False
    if heads != groups and not (isinstance(heads, int) and isinstance(groups, int) and groups and heads % groups == 0):
        return False
    return (*q.shape[:3], k.shape[2]) == scores.shape
