"""Fusion: which ops become one kernel.

Two questions are kept apart: is it *legal* (`refuse_to_absorb`) and is it *worth it* (`not_worth`). Both answer with a
sentence, so that `explain` can say why not. Regions grow in two ways: forward from an anchor (an op with a template
whose epilogue takes pointwise ops of its own shape), and backward from the last op of a group of generated
loops. An epilogue also takes in the ops that make an operand from one of fewer bits. A region whose result only another
anchor reads is joined with that one's where the target computes both at once. Each region becomes a `Fused` node with a
body; nothing is computed differently yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from minicc.ir.expr import EXPENSIVE, Expr, const, walk
from minicc.ir.graph import Graph, Node, Value
from minicc.ir.opdef import Kind
from minicc.ir.types import KERNEL_DTYPES, TensorType
from minicc.passes.common import RESHAPES, estimate
from minicc.passes.manager import no_pair

RefusePair = Callable[[Sequence[Node], Node], str]
MAX_NODES = 40  # in one group: bounds the size of an expression and its compile time
MAX_INPUTS = 16
MANY_ROWS = 256  # of results, from which on another kernel costs little
LOOPS = (Kind.POINTWISE, Kind.INDEX, Kind.REDUCE)
# INDEX ops that read each input element at most once per output element, at one place.
SINGLE_READ = frozenset((
    "Transpose", "Slice", "Split", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Expand", "Pad", "Gather",
    "DepthToSpace", "SpaceToDepth", "Trilu",
))  # fmt: skip
# Views cost nothing by themselves: their readers take strides.
VIEWS = frozenset(("Transpose", "Slice", "Split", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Expand"))
# Modes of ops that read several neighbours of a position that is computed.
INTERPOLATING = frozenset(("linear", "cubic"))
# Ops whose lowering is several kernels writing parts of one array.
ALONE = frozenset(("Concat",))


def fuse(graph: Graph, is_anchor: Callable[[Node], bool], refuse_pair: RefusePair = no_pair, row: int = 0) -> int:
    """Group ops into `Fused` nodes, also in bodies of control flow; returns the number of nodes that disappeared.

    is_anchor: whether a node has a template that takes an epilogue (known to the target).
    refuse_pair: why the target does not compute a region together with the anchor that reads its result; "" when it does.
    row: elements of the last axis below which an epilogue is computed one by one, and takes in nothing expensive.
    """
    absorbed = 0
    for node in graph.nodes:
        if node.op.name != "Fused":
            absorbed += sum(fuse(a, is_anchor, refuse_pair, row) for a in node.attrs.values() if isinstance(a, Graph))
    graph.tidy()
    position = {node: i for i, node in enumerate(graph.nodes)}
    taken: set[Node] = set()
    anchored: dict[Node, tuple[Node, list[Node]]] = {}  # anchors and their regions, by the last node
    for node in graph.nodes:
        if node not in taken and is_anchor(node):
            region = _grow_epilogue(graph, node, position, taken, row)
            taken.update(region)
            before = _only_read_by(graph, node, anchored)
            if before and not refuse_pair(before, node):
                del anchored[before[-1]]
                region = before + region
            anchored[region[-1]] = (node, region)
    regions: list[tuple[list[Node], Node | None]] = [(r, node) for node, r in anchored.values() if len(r) > 1]
    for node in reversed(graph.nodes):
        if node in taken or not has_loops(node) or node.op.name in VIEWS | ALONE:
            continue
        region = _grow_group(graph, node, taken, is_anchor)
        taken.update(region)
        if len(region) > 1:
            regions.append((sorted(region, key=position.__getitem__), None))
    for region, anchor in regions:
        absorbed += len(region) - 1
        _outline(graph, region, anchor)
    graph.tidy()
    return absorbed


def has_loops(node: Node) -> bool:
    """Whether the node can be computed by generated loops."""
    if node.op.kind not in LOOPS or (node.op.refuse is not None and node.op.refuse(node) is not None):
        return False
    values = [v for i, v in enumerate(node.inputs) if v is not None and i not in node.op.static_inputs]
    return all(
        isinstance(v.type, TensorType) and v.type.shape is not None and v.type.dtype in KERNEL_DTYPES
        for v in (*values, *node.outputs)
    )


# -- forward: epilogues of templates


def _grow_epilogue(graph: Graph, anchor: Node, position: dict[Node, int], taken: set[Node], row: int) -> list[Node]:
    """The anchor and the pointwise ops after it, as many as leave a single value escaping."""
    shape = anchor.output.tensor.shape
    narrow = _is_narrow(anchor.output, row)
    if any(v.uses for v in anchor.outputs[1:]) or anchor.output in graph.outputs:
        return [anchor]
    region = [anchor]
    best = [anchor]
    outputs = set(graph.outputs)
    while len(region) < MAX_NODES:
        inside = set(region)
        candidates = [
            node for member in region for node in member.output.consumers()
            if node not in inside and node not in taken and _fits_epilogue(node, shape) and not (narrow and is_expensive(node))
        ]  # fmt: skip
        candidates = [node for node in dict.fromkeys(candidates) if not _depends_on(node, inside, anchor, position)]
        if not candidates:
            break
        region.append(min(candidates, key=position.__getitem__))
        inside = set(region)
        escaping = [n for n in region if n.output in outputs or any(c not in inside for c in n.output.consumers())]
        externals = {v for n in region[1:] for v in n.inputs if v is not None and v.producer not in inside}
        if len(externals) > MAX_INPUTS:
            break
        if len(escaping) <= 1:
            best = list(region)
    inside = set(best)
    wide = [v for node in best[1:] for v in node.inputs if v is not None and v.producer not in inside]
    behind = inside - {anchor}  # what the anchor reads has to be in memory
    before = {node for v in dict.fromkeys(wide) for node in _widening(v, behind, taken, outputs, shape)}
    return [anchor, *sorted(before, key=position.__getitem__), *best[1:]]


def _is_narrow(value: Value, row: int) -> bool:
    """Whether a template's output has many rows that do not fill a vector: functions of its elements are computed behind it."""
    shape = value.tensor.shape
    if not shape or not isinstance(shape[-1], int) or shape[-1] >= row:
        return False
    return estimate(shape[:-1], MANY_ROWS) >= MANY_ROWS


def _widening(value: Value, readers: set[Node], taken: set[Node], outputs: set[Value], shape: object) -> list[Node]:
    """The cheap ops that make an operand of an epilogue from one of fewer bits, which is then read instead; or none."""
    chain: list[Node] = []
    source = value
    while source is value or source.tensor.dtype.bits >= value.tensor.dtype.bits:
        node = source.producer
        if node is None or node in taken or source in outputs or not _fits_epilogue(node, shape) or is_expensive(node):
            return []
        arrays = [v for v in node.inputs if v is not None and not _is_scalar(v)]
        if len(arrays) != 1 or arrays[0].shape != shape or any(c not in readers and c not in chain for c in source.consumers()):
            return []
        chain.append(node)
        source = arrays[0]
    return chain


def _only_read_by(graph: Graph, node: Node, anchored: Mapping[Node, tuple[Node, list[Node]]]) -> list[Node]:
    """The region that begins with its anchor, and whose only result is the first input of `node`, which alone reads it."""
    value = node.inputs[0]
    if value is None or value.producer is None or value.producer not in anchored:
        return []
    anchor, region = anchored[value.producer]
    alone = value not in graph.outputs and value not in node.inputs[1:] and all(reader is node for reader in value.consumers())
    return region if alone and region[0] is anchor else []


def _fits_epilogue(node: Node, shape: object) -> bool:
    return (
        node.op.kind is Kind.POINTWISE
        and len(node.outputs) == 1
        and has_loops(node)
        and node.output.tensor.shape == shape
    )


def _depends_on(node: Node, region: set[Node], anchor: Node, position: dict[Node, int]) -> bool:
    """Whether some input of `node` from outside the region is computed from the region (which would make a cycle)."""
    first = position[anchor]
    seen: set[Node] = set()
    stack = [v.producer for v in node.inputs if v is not None and v.producer is not None and v.producer not in region]
    while stack:
        current = stack.pop()
        if current in seen or position[current] < first:
            continue
        seen.add(current)
        for v in current.inputs:
            if v is None or v.producer is None:
                continue
            if v.producer in region:
                return True
            stack.append(v.producer)
    return False


# -- backward: groups of generated loops


def _grow_group(graph: Graph, root: Node, taken: set[Node], is_anchor: Callable[[Node], bool]) -> list[Node]:
    """The root and every producer that is legal and worth computing inside its loops."""
    region = {root}
    outputs = set(graph.outputs)
    frontier = [v.producer for v in root.inputs if v is not None]
    refused: set[Node] = set()
    while frontier and len(region) < MAX_NODES:
        node = frontier.pop(0)
        if node is None or node in region or node in refused:
            continue
        if node in taken or is_anchor(node) or node.op.name in ALONE:
            refused.add(node)
            continue
        if any(v in outputs or any(c not in region for c in v.consumers()) for v in node.outputs):
            if all(c in region or c in refused or c in taken for v in node.outputs for c in v.consumers()):
                refused.add(node)
            continue  # another consumer may still join the region and bring it back
        if refuse_to_absorb(node, root, region) or not_worth(node) or _too_wide(node, region):
            refused.add(node)
            continue
        region.add(node)
        frontier += [v.producer for v in node.inputs if v is not None]
    return list(region)


def _too_wide(node: Node, region: set[Node]) -> bool:
    members = region | {node}
    inputs = {v for n in members for v in n.inputs if v is not None and v.producer not in members and not v.is_constant}
    return len(inputs) > MAX_INPUTS


def refuse_to_absorb(node: Node, root: Node, region: set[Node]) -> str:
    """Why `node` cannot be computed inside the loops of `root`; empty when it can."""
    if not has_loops(node):
        return "it has no generated loops"
    consumers = [c for v in node.outputs for c in v.consumers()]
    if node.op.kind is Kind.REDUCE:
        if any(c.op.kind is Kind.INDEX for c in consumers):
            return "a reduction is read at computed positions"
        if _is_reduced_again(node, region):
            return "another reduction would compute it again for each of its terms"
        return _refuse_reduction(node, root, region)
    if root.op.kind is Kind.CONTRACT:
        return "a contraction reads its operands many times"
    for consumer in consumers:
        if consumer.op.name in RESHAPES and not _splits_only(consumer) and node.op.name not in VIEWS:
            return "its reader merges axes"
    return ""


def _is_reduced_again(node: Node, region: set[Node]) -> bool:
    """Whether results of a reduction are terms of another one in the region."""
    seen: set[Node] = set()
    stack = [c for v in node.outputs for c in v.consumers() if c in region]
    while stack:
        reader = stack.pop()
        if reader in seen:
            continue
        seen.add(reader)
        source = reader.inputs[0]
        if reader.op.kind is Kind.REDUCE and source is not None:
            before, after = source.shape, reader.output.shape
            if len(after) != len(before) or len(node.output.shape) != len(before):
                return True
            if any(a != b and mine != 1 for a, b, mine in zip(after, before, node.output.shape)):
                return True
            continue
        stack += [c for v in reader.outputs for c in v.consumers() if c in region]
    return False


def _refuse_reduction(node: Node, root: Node, region: set[Node]) -> str:
    """A reduction may be computed once per row of the root: its shape ends in ones where the root's rows run."""
    mine, full = node.output.shape, root.output.shape
    if len(mine) != len(full):
        return "the reduction has another rank than the loops"
    axis = 0
    while axis < len(full) and mine[axis] == full[axis]:
        axis += 1
    if any(d != 1 for d in mine[axis:]):
        return "the reduced axes are not the innermost"
    if sum(d != 1 for d in full[axis:]) > 1:
        # The row spans several axes, which become one loop only if everything walks them together.
        for member in region | {node}:
            for v in member.inputs:
                if v is None or (v.is_constant and v.data is not None and v.data.size == 1):
                    continue
                if not isinstance(v.type, TensorType) or v.type.shape is None or len(v.type.shape) != len(full):
                    return "an operand does not span the reduced axes together"
                tail = v.type.shape[axis:]
                if tail != full[axis:] and any(d != 1 for d in tail):
                    return "an operand does not span the reduced axes together"
            if member.op.kind is Kind.INDEX:
                return "positions inside the row are computed"
    return ""


def _splits_only(node: Node) -> bool:
    """Whether a reshape's result, read element by element, reads its source without division."""
    source = node.inputs[0]
    assert source is not None
    old = [d for d in source.shape if d != 1]
    new = [d for d in node.output.shape if d != 1]
    if old == new:
        return True
    # Each old axis must be a product of consecutive new ones.
    at = 0
    for size in old:
        total = new[at] if at < len(new) else None
        at += 1
        while total is not None and total != size and at < len(new):
            total = total * new[at]
            at += 1
        if total != size:
            return False
    return at == len(new)


def not_worth(node: Node) -> str:
    """Why computing `node` inside the group would cost more than it saves; empty when it pays."""
    consumers = [c for v in node.outputs for c in v.consumers()]
    multiple = [c for c in consumers if c.op.kind is Kind.INDEX and c.op.name not in SINGLE_READ]
    if multiple and node.op.name not in VIEWS:
        return f"{multiple[0].op.name} reads it several times"
    for consumer in consumers:
        if consumer.inputs[0] is node.output and wants_rows(consumer, node.output):
            return f"{consumer.op.name} reads its rows several times"
    if node.op.kind is Kind.POINTWISE and is_expensive(node):
        for consumer in consumers:
            if consumer.op.kind is Kind.INDEX and consumer.op.name in ("Expand", "Gather"):
                return f"{consumer.op.name} would repeat an expensive function"
            if consumer.op.kind is Kind.POINTWISE and not _rows(node.output, consumer.output):
                return "broadcasting would repeat an expensive function"
    if node.op.kind is Kind.INDEX and node.op.name not in VIEWS | SINGLE_READ:
        for consumer in consumers:
            if consumer.op.kind is Kind.POINTWISE and consumer.output.shape != node.output.shape:
                return "broadcasting would repeat computed positions"
    return ""


def wants_rows(reader: Node, value: Value) -> bool:
    """Whether a node interpolates in its first input, a transposition whose elements lie apart: in memory it reads faster."""
    node = value.producer
    if node is None or node.op.name != "Transpose":
        return False
    perm = node.attrs["perm"]
    several = reader.op.name == "RoiAlign" or reader.attrs.get("mode") in INTERPOLATING
    return several and perm is not None and perm[-1] != len(perm) - 1


def _rows(inner: Value, outer: Value) -> bool:
    """Same shape, or broadcast along trailing axes only, where the loop computes it once per row."""
    a, b = inner.shape, outer.shape
    if len(a) != len(b):
        lead, tail = b[: len(b) - len(a)], b[len(b) - len(a) :]
        return all(d == 1 for d in a) or (len(a) < len(b) and tail == a and all(d == 1 for d in lead))
    axis = 0
    while axis < len(a) and a[axis] == b[axis]:
        axis += 1
    return all(d == 1 for d in a[axis:])


def is_expensive(node: Node) -> bool:
    """Whether the op's own expression holds a function worth computing only once."""
    if node.op.kind is not Kind.POINTWISE or node.op.compute is None:
        return False
    arguments = [None if v is None else Expr("load", v.tensor.dtype, (), i) for i, v in enumerate(node.inputs)]
    literal = [const(1, a.dtype) if a is not None and _is_scalar(v) else a for a, v in zip(arguments, node.inputs)]
    return any(e.op in EXPENSIVE for e in walk(node.op.compute(*literal, **node.attrs)))


def _is_scalar(value: Value | None) -> bool:
    return value is not None and value.data is not None and value.data.size == 1


# -- outlining


def _outline(graph: Graph, region: list[Node], anchor: Node | None) -> Node:
    """Move a region (in order) into the body of a new `Fused` node."""
    inside = set(region)
    body = graph.subgraph("_".join(n.op.name.lower() for n in region[:4]))
    mapping: dict[Value, Value] = {}
    outer: list[Value] = []

    def mapped(value: Value | None) -> Value | None:
        if value is None:
            return None
        if value not in mapping:
            if value.is_constant:
                mapping[value] = Value(value.name, value.type, data=value.data, content=value.content)
            else:
                mapping[value] = body.input(value.name, value.type)
                mapping[value].content = value.content
                outer.append(value)
        return mapping[value]

    for node in region:
        new = Node(node.op, [mapped(v) for v in node.inputs], node.attrs, node.origin)
        new.symbols = node.symbols
        new.outputs = tuple(Value(v.name, v.type, new, v.index, v.data, v.content) for v in node.outputs)
        mapping.update(zip(node.outputs, new.outputs))
        for position, value in enumerate(new.inputs):
            if value is not None:
                value.uses.append((new, position))
        body.nodes.append(new)
    escaping = [
        v for node in region for v in node.outputs
        if v in graph.outputs or any(c not in inside for c in v.consumers())
    ]  # fmt: skip
    body.outputs = [mapping[v] for v in escaping]
    origin = tuple(dict.fromkeys(name for node in region for name in node.origin))
    lead = region.index(anchor) if anchor else 0
    fused = graph.add("Fused", outer, {"body": body, "anchor": anchor.op.name if anchor else "", "lead": lead}, origin=origin,
                      outputs=len(escaping), names=[v.name for v in escaping], domain="minicc")  # fmt: skip
    for old, new_value in zip(escaping, fused.outputs):
        graph.replace(old, new_value)
    return fused
