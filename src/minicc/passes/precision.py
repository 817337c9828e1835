"""Reduced precision: a float32 model computes on 16-bit tensors where that is safe (`Options(precision="bf16" | "fp16")`).

Regions are decided first, casts are inserted at their borders only:

- matrix products, convolutions and attention read and write 16 bits (their kernels accumulate in float32);
- what lies between two of them follows (views, bounded pointwise functions, pools, normalisations, whose row statistics
  are float32 inside);
- what may overflow or lose its meaning stays float32 and is named in the report: exponentials, powers, long sums, losses,
  recurrences, angles, spectra before their logarithm, constants that do not fit 16 bits and what is computed from them,
  positions and sizes.

Constants are converted here, so weights are stored in 16 bits. The graph's inputs and outputs keep their types. "tf32" changes
no tensor: targets with such units read the option when they lower products. The pass knows nothing of targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from minicc.ir.graph import Builder, Graph, Node, Value
from minicc.ir.types import DType, TensorType, bf16, f16, f32
from minicc.ops.helpers import element_type
from minicc.passes.common import scalar_of, visit_bodies
from minicc.passes.manager import PassContext

NARROW = {"bf16": bf16, "fp16": f16}
MICROSOFT = "com.microsoft"
Key = tuple[str, str]  # domain and name of an operator


def _keys(names: str, domain: str = "") -> frozenset[Key]:
    return frozenset((domain, name) for name in names.split())


PRODUCTS = (
    _keys("Conv ConvTranspose MatMul Gemm Einsum Attention")
    | _keys("Attention", "minicc")
    | _keys("FusedConv FusedGemm FusedMatMul Attention MultiHeadAttention", MICROSOFT)
)
# Results that lie in a fixed range whatever the operands are.
BOUNDED = (
    _keys("Sigmoid Tanh Erf HardSigmoid Softsign Softmax LayerNormalization RMSNormalization SimplifiedLayerNormalization")
    | _keys("GroupNormalization InstanceNormalization")
    | _keys("SkipLayerNormalization SkipSimplifiedLayerNormalization SimplifiedLayerNormalization", MICROSOFT)
)
VIEWS = _keys("Reshape Squeeze Unsqueeze Flatten Identity Transpose Slice Split Expand")
# Safe between products. Normalisations and Softmax compute their row statistics in float32 whatever type they read.
FOLLOWERS = (
    BOUNDED
    | VIEWS
    | _keys("Concat Pad Gather Tile Trilu Where DepthToSpace SpaceToDepth Resize Abs Neg Relu LeakyRelu PRelu ThresholdedRelu")
    | _keys("Elu Celu Selu Clip Max Min Add Sub Mul Div Sum Mean HardSwish Swish Gelu Mish SwiGLU ReduceMax ReduceMin ReduceMean")
    | _keys("BatchNormalization")
    | _keys("MaxPool AveragePool GlobalMaxPool GlobalAveragePool")
    | _keys("BiasGelu FastGelu Gelu QuickGelu", MICROSOFT)
)
RISKS: Mapping[Key, str] = {
    key: reason
    for names, reason in (
        ("Exp Pow Reciprocal Sinh Cosh Tan Softplus", "the result may overflow"),
        ("ReduceSum ReduceSumSquare ReduceProd ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp CumSum CumProd LRN LpPool",
         "a sum or product of many terms"),
        ("Log Sqrt", "small arguments decide about the result"),
        ("Sin Cos", "large angles lose their meaning"),
        ("LogSoftmax NegativeLogLikelihoodLoss SoftmaxCrossEntropyLoss", "a loss"),
        ("LSTM GRU RNN LinearAttention", "a recurrence feeds its rounding back"),
        ("MeanVarianceNormalization LpNormalization", "a sum or product of many terms"),
    )
    for key in _keys(names)
}  # fmt: skip
# Operands that stay float32: additive masks (often the lowest float32), and statistics per channel.
WIDE_INPUTS: Mapping[Key, tuple[int, ...]] = {
    ("minicc", "Attention"): (3,), ("", "Attention"): (3,), ("", "BatchNormalization"): (1, 2, 3, 4),
}  # fmt: skip
# Operands whose every digit counts: positions, sizes and what is rounded to integers.
EXACT_INPUTS: Mapping[Key, tuple[int, ...]] = {
    ("", "Floor"): (0,), ("", "Ceil"): (0,), ("", "Round"): (0,), ("", "Mod"): (0, 1), ("", "Range"): (0, 1, 2),
    ("", "OneHot"): (0, 1), ("", "GridSample"): (1,), ("", "RoiAlign"): (1,), ("", "MaxRoiPool"): (1,),
    ("", "NonMaxSuppression"): (0, 1),
}  # fmt: skip


def reduced_precision(graph: Graph, context: PassContext) -> int:
    """Narrow the safe regions of a graph, also in bodies; returns the number of nodes that compute on 16 bits."""
    narrow = NARROW.get(context.options.precision)
    if narrow is None:
        return 0
    changes = visit_bodies(graph, lambda body: reduced_precision(body, context))
    graph.tidy()
    kept = _kept(graph, narrow)
    chosen = _regions(graph, kept)
    if not chosen:
        return changes
    for node, reason in kept.items():
        context.refusals[f"{node.op} {', '.join(node.origin)}".strip(), reason] += 1
    for node in chosen:
        context.rules[node.op.name] += 1
    _convert(graph, chosen, narrow)
    return changes + len(chosen)


def _key(node: Node) -> Key:
    return node.op.domain, node.op.name


def _is_f32(value: Value | None) -> bool:
    return value is not None and isinstance(value.type, TensorType) and value.type.dtype == f32 and value.type.shape is not None


def _narrowed(node: Node) -> Iterator[int]:
    """Positions of the inputs that are 16-bit tensors when the node is in a region."""
    wide = (*node.op.static_inputs, *WIDE_INPUTS.get(_key(node), ()))
    return (position for position, value in enumerate(node.inputs) if position not in wide and _is_f32(value))


# -- deciding


def _kept(graph: Graph, narrow: DType) -> dict[Node, str]:
    """Nodes that compute float32 values and must go on to, each with its reason."""
    kept: dict[Node, str] = {}
    large: set[Value] = set()  # values that may hold finite numbers beyond the 16-bit range
    for node in graph.nodes:
        if not _is_f32(node.output):
            continue
        operands = [v for position in _narrowed(node) if (v := node.inputs[position]) is not None]
        large.update(v for v in operands if _overflows(v, narrow))
        beyond = any(v in large for v in operands)
        reason = RISKS.get(_key(node), "") or _risk(node)
        if not reason and beyond:
            reason = "a number beyond the 16-bit range"
        if not reason and any(_vanishes(v, narrow) for v in operands):
            reason = "a constant that becomes zero in 16 bits"
        if reason:
            kept[node] = reason
        if beyond and _key(node) not in BOUNDED:
            large.update(node.outputs)
    wanted: dict[Node, str] = {}
    for node in reversed(graph.nodes):
        if _is_f32(node.output) and _key(node) in FOLLOWERS | PRODUCTS:
            reason = _wanted(node, wanted)
            if reason:
                wanted[node] = reason
                kept.setdefault(node, reason)
    return kept


_EXACT = "positions or sizes are computed from it"
_LOGARITHM = "its logarithm is taken: small numbers count as much as large ones"
_SQUARE = "its square is taken: the range of its numbers doubles"
# Which operators hand a reader's wish on to their own operand.
_HANDED_ON = {_EXACT: FOLLOWERS, _LOGARITHM: FOLLOWERS - BOUNDED, _SQUARE: VIEWS}


def _risk(node: Node) -> str:
    """Why this very node may overflow or lose its meaning; empty when its operator and operands are safe."""
    left, right = (*node.inputs, None, None)[:2]
    if node.op.name == "Mul" and left is right:
        return "the square of a value may overflow"
    if node.op.name == "Div" and right is not None and right.data is None:
        return "the result may overflow"
    return ""


def _overflows(value: Value, narrow: DType) -> bool:
    """Whether a constant holds finite numbers that are infinite in the narrow type."""
    if value.data is None or not value.data.size:
        return False
    finite = value.data[np.isfinite(value.data)]
    with np.errstate(over="ignore"):
        return bool(finite.size) and not np.isfinite(np.abs(finite).max().astype(narrow.numpy))


def _vanishes(value: Value, narrow: DType) -> bool:
    """Whether a constant of one element (an epsilon, a factor) is zero in the narrow type although it is not."""
    if value.data is None or value.data.size != 1:
        return False
    return bool(value.data.any()) and not value.data.astype(narrow.numpy).any()


def _wanted(node: Node, wanted: Mapping[Node, str]) -> str:
    """Why readers, also behind followers, want more of the node's result than 16 bits hold; empty when they do not.

    wanted: the answers for the node's readers. Products are kept for logarithms and squares (spectra), not for positions.
    """
    for reader, position in _readers(node):
        reason = _wish(reader, position)
        handed_on = wanted.get(reader, "")
        if not reason and handed_on and _key(reader) in _HANDED_ON[handed_on]:
            reason = handed_on
        needless = PRODUCTS if reason == _EXACT else BOUNDED if reason == _SQUARE else frozenset()
        if reason and _key(node) not in needless:
            return reason
    return ""


def _wish(reader: Node, position: int) -> str:
    """What an operator wants of the operand at a position."""
    key = _key(reader)
    if key == ("", "Cast") and element_type(reader.attrs["to"]).is_integer:
        return _EXACT
    if position in (*reader.op.static_inputs, *EXACT_INPUTS.get(key, ())):
        return _EXACT
    if key == ("", "Log"):
        return _LOGARITHM
    squares = key == ("", "ReduceSumSquare") or (key == ("", "Mul") and reader.inputs[0] is reader.inputs[1])
    return _SQUARE if squares or (key == ("", "Pow") and scalar_of(reader.inputs[1]) == 2) else ""


def _regions(graph: Graph, kept: Mapping[Node, str]) -> dict[Node, None]:
    """The nodes that compute on 16 bits, in order: products, what lies between them, and what only they read."""
    eligible = [node for node in graph.nodes if node not in kept and _is_f32(node.output)]
    products = {node for node in eligible if _key(node) in PRODUCTS and any(True for _ in _narrowed(node))}
    followers = [node for node in eligible if _key(node) in FOLLOWERS]
    behind, ahead = set(products), set(products)
    for node in followers:
        if any(value.producer in behind for value in _operands(node)):
            behind.add(node)
    for node in reversed(followers):
        if any(reader in ahead for reader, _ in _readers(node)):
            ahead.add(node)
    chosen = products | (behind & ahead)
    free = _free(graph, followers)
    for node in reversed(followers):
        crossing = [value for value in _operands(node) if not value.is_constant and value.producer not in free]
        read_here = [reader in chosen and position in _narrowed(reader) for reader, position in _readers(node)]
        returned = any(v in graph.outputs for v in node.outputs)
        if node not in chosen and read_here and all(read_here) and not returned and len(crossing) <= 1:
            chosen.add(node)
    return {node: None for node in graph.nodes if node in chosen}


def _free(graph: Graph, followers: list[Node]) -> set[Node]:
    """Followers computed from constants only (rows of tables) and read once: narrowing them costs no cast."""
    free: set[Node] = set()
    for node in followers:
        constant = all(value.is_constant or value.producer in free for value in _operands(node))
        if constant and len(_readers(node)) == 1 and not any(v in graph.outputs for v in node.outputs):
            free.add(node)
    return free


def _operands(node: Node) -> list[Value]:
    """Distinct inputs that are narrowed with the node."""
    return list(dict.fromkeys(v for position in _narrowed(node) if (v := node.inputs[position]) is not None))


def _readers(node: Node) -> list[tuple[Node, int]]:
    return [use for value in node.outputs for use in value.uses]


# -- converting


def _convert(graph: Graph, chosen: Mapping[Node, None], narrow: DType) -> None:
    """Make the chosen nodes (in order) compute on the narrow type; one cast per value that crosses a border."""
    positions = {node: frozenset(_narrowed(node)) for node in chosen}
    narrowed: dict[Value, Value] = {}
    for node in chosen:
        for position in sorted(positions[node]):
            value = node.inputs[position]
            assert value is not None
            if value.tensor.dtype == f32:
                if value not in narrowed:
                    narrowed[value] = _as_narrow(graph, value, narrow, node.origin)
                graph.set_input(node, position, narrowed[value])
        before = [value.type for value in node.outputs]
        graph.refresh(node)
        for value, old in zip(node.outputs, before):
            if value.type != old:
                outside = [(reader, at) for reader, at in value.uses if at not in positions.get(reader, ())]
                _widen_outside(graph, value, outside, node.origin)
    graph.tidy()


def _as_narrow(graph: Graph, value: Value, narrow: DType, origin: tuple[str, ...]) -> Value:
    if value.data is not None:
        return graph.constant(value.data.astype(narrow.numpy), f"{value.name}_{narrow.name}")
    return Builder(graph, origin).op("Cast", value, to=narrow)


def _widen_outside(graph: Graph, value: Value, outside: list[tuple[Node, int]], origin: tuple[str, ...]) -> None:
    """Give readers outside the region, and the caller, a float32 copy of a value that became narrow."""
    if not outside and value not in graph.outputs:
        return
    wide = Builder(graph, origin).op("Cast", value, to=f32)
    for reader, position in outside:
        graph.set_input(reader, position, wide)
    if value in graph.outputs:
        value.name, wide.name = wide.name, value.name  # an output keeps its name
        graph.outputs = [wide if v is value else v for v in graph.outputs]
