"""Choosing a layout: which values are kept channels-last.

Convolutions want [N, *spatial, C]; other ops take either order, or insist on the model's own. Every boundary
between the two orders costs one transposition of a value. With two labels per node the cheapest assignment is
a minimum cut, computed exactly by networkx: nodes on the side of the source are channels-last. Then the graph
is rebuilt in order with explicit `Transpose` nodes at the boundaries. Weights are not touched, and no value
has a hidden layout.

The network: a value's transposition is paid once when its producer and any of its readers are on different
sides (two auxiliary nodes for values with several readers). A model's own transpositions to and from
channels-last are free when they meet a value of the right order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minicc.ir.dims import Dim
from minicc.ir.graph import Builder, Graph, Node, Value, object_array
from minicc.ir.opdef import Kind
from minicc.ir.types import TensorType
from minicc.passes.common import estimate, visit_bodies
from minicc.passes.manager import PassContext

FORCED = frozenset(("Conv", "ConvTranspose", "ConvInteger"))
WINDOWED = frozenset(("MaxPool", "AveragePool", "LpPool", "GridSample", "RoiAlign"))
# Ops that compute positions once for all channels then; from so many on they are worth transpositions.
SAMPLING = frozenset(("GridSample", "RoiAlign"))
SAMPLED_CHANNELS = 8
AXIS_ATTRIBUTE = frozenset(("Concat", "Split", "ArgMax", "ArgMin", "Softmax", "LogSoftmax", "Hardmax"))
REDUCTIONS = frozenset((
    "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2",
    "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp",
))  # fmt: skip
SOURCE, SINK = "channels-last", "as it is"


def to_last(rank: int) -> tuple[int, ...]:
    """The permutation from [N, C, *spatial] to [N, *spatial, C]."""
    return (0, *range(2, rank), 1)


def to_first(rank: int) -> tuple[int, ...]:
    """The permutation from [N, *spatial, C] to [N, C, *spatial]."""
    return (0, rank - 1, *range(1, rank - 1))


@dataclass(frozen=True)
class Role:
    """How a node can be computed channels-last: input positions that are permuted with it, and whether
    outputs are.
    """

    inputs: tuple[int, ...]
    outputs: bool = True


def choose_layout(graph: Graph, context: PassContext) -> int:
    """Make convolutions and what surrounds them channels-last, with as few transposed elements as possible.

    Returns the number of nodes whose order of axes changed.
    """
    if not context.channels_last:
        return 0
    changes = visit_bodies(graph, lambda body: choose_layout(body, context))
    graph.tidy()
    shuffles = {node: shuffle for node in graph.nodes if (shuffle := find_shuffle(graph, node)) is not None}
    roles = {node: role for node in graph.nodes if (role := find_role(node)) is not None}
    roles.update(
        dict.fromkeys((member for shuffle in shuffles.values() for member in shuffle.nodes), Role((0,)))
    )
    forced = {n for n in roles if _wants_channels_last(n)}
    if not forced:
        return changes
    chosen = _minimum_cut(graph, roles, forced, shuffles)
    changes += _Rebuild(graph, roles, chosen, shuffles).run()
    context.rules["channels-last"] += len(chosen)
    return changes


def _wants_channels_last(node: Node) -> bool:
    if node.op.domain or node.attrs.get("layout") != "NCHW":
        return False
    if node.op.name in SAMPLING:
        channels = node.output.shape[1]
        return isinstance(channels, int) and channels >= SAMPLED_CHANNELS
    return node.op.name in FORCED


@dataclass(frozen=True)
class Shuffle:
    """A channel shuffle (Zhang et al., 2017): Reshape to `groups` of channels, Transpose, Reshape back."""

    nodes: tuple[Node, Node, Node]
    source: Value
    groups: Dim
    per_group: Dim


def find_shuffle(graph: Graph, node: Node) -> Shuffle | None:
    """The channel shuffle that ends in `node`, whose inner values nobody else reads."""
    nodes = [node]
    for wanted in ("Transpose", "Reshape"):
        value = nodes[-1].inputs[0] if nodes[-1].inputs else None
        if value is None or value.producer is None or len(value.uses) != 1 or value in graph.outputs:
            return None
        if value.producer.op.name != wanted or value.producer.op.domain:
            return None
        nodes.append(value.producer)
    last, transpose, first = nodes
    source = first.inputs[0]
    if (
        node.op.name != "Reshape"
        or node.op.domain
        or source is None
        or _rank(source) is None
        or _rank(first.output) is None
    ):
        return None
    rank = source.tensor.rank
    if (
        rank < 3
        or last.output.type != source.type
        or list(transpose.attrs["perm"] or ()) != [0, 2, 1, *range(3, rank + 1)]
    ):
        return None
    split = first.output.shape
    if (split[0], *split[3:]) != (source.shape[0], *source.shape[2:]):
        return None
    return Shuffle((first, transpose, last), source, split[1], split[2])


def _rank(value: Value | None) -> int | None:
    if value is None or not isinstance(value.type, TensorType) or value.type.shape is None:
        return None
    return value.type.rank


def find_role(node: Node) -> Role | None:
    """How the node works channels-last, or None when it cannot (or need not)."""
    name, rank = node.op.name, _rank(node.inputs[0]) if node.inputs else None
    if node.op.kind is Kind.POINTWISE:
        return _pointwise_role(node)
    if node.op.domain or rank is None or rank < 3:
        return None
    if name in FORCED or name in WINDOWED:
        return Role((0,)) if node.attrs["layout"] == "NCHW" else None
    if name == "Transpose":
        return Role(())
    if name in AXIS_ATTRIBUTE:
        if name.startswith("Arg") and not node.attrs["keepdims"]:
            return None
        return Role(tuple(range(len(node.inputs))) if name == "Concat" else (0,))
    if name in REDUCTIONS:
        return _reduction_role(node, rank)
    if name in ("Pad", "Slice", "Expand", "Resize"):
        return _static_role(node, rank)
    return None


def _pointwise_role(node: Node) -> Role | None:
    rank = _rank(node.output)
    if (
        rank is None
        or rank < 3
        or "axis" in node.attrs
        or any(_rank(v) is None for v in node.inputs if v is not None)
    ):
        return None
    return Role(tuple(i for i, v in enumerate(node.inputs) if _rank(v) == rank))


def _reduction_role(node: Node, rank: int) -> Role | None:
    axes = _axes(node, 1, rank)
    if axes is None:
        return None
    if node.attrs["keepdims"]:
        return Role((0,))
    kept = [a for a in to_last(rank) if a not in axes]
    return Role((0,), outputs=False) if kept == sorted(kept) else None


def _static_role(node: Node, rank: int) -> Role | None:
    name = node.op.name
    positions = {"Pad": (1, 3), "Slice": (1, 2, 3, 4), "Expand": (1,), "Resize": (2, 3)}[name]
    statics = [node.inputs[i] for i in positions if i < len(node.inputs)]
    if any(v is not None and v.content is None and 0 not in v.shape for v in statics):
        return None
    if name == "Expand" and _rank(node.output) != rank:
        return None
    roi = node.inputs[1]
    if name == "Resize" and (node.attrs.get("axes") is not None or (roi is not None and 0 not in roi.shape)):
        return None
    return Role((0,))


def _present(node: Node, position: int) -> bool:
    return position < len(node.inputs) and node.inputs[position] is not None


def _axes(node: Node, position: int, rank: int) -> list[int] | None:
    """Non-negative axes of an axes input; all axes when it is left out, None when unknown."""
    if not _present(node, position):
        return list(range(rank))
    content = node.inputs[position].content  # type: ignore[union-attr]
    if content is None or not all(isinstance(a, int) for a in content.flat) or content.size == 0:
        return None
    return [int(a) % rank for a in content.flat]


# -- the minimum cut


def _cost(value: Value) -> int:
    """Elements moved by transposing a value; nothing for constants, and next to nothing where only axes of
    size 1 move.
    """
    rank = _rank(value)
    if rank is None or rank < 3 or value.is_constant:
        return 0
    if moves_nothing(value.shape, to_last(rank)):
        return 1
    return max(estimate(value.shape), 1)


def moves_nothing(shape: Sequence[Any], perm: Sequence[int]) -> bool:
    """Whether a permutation keeps the order of all axes that are not of size 1."""
    kept = [a for a in perm if shape[a] != 1]
    return kept == sorted(kept)


def _minimum_cut(graph: Graph, roles: Mapping[Node, Role], forced: set[Node],
                 shuffles: Mapping[Node, Shuffle]) -> set[Node]:  # fmt: skip
    """The nodes to compute channels-last; a channel shuffle is one node, its last."""
    import networkx  # loaded only for graphs with convolutions

    network = networkx.DiGraph()
    network.add_nodes_from((SOURCE, SINK))

    last_of = {member: last for last, shuffle in shuffles.items() for member in shuffle.nodes}

    def side(node: Node | None) -> Any:
        node = last_of.get(node, node) if node is not None else None
        return SINK if node is None or node not in roles else SOURCE if node in forced else node

    def edge(a: Any, b: Any, capacity: int | None) -> None:
        if a in (b, SINK) or b == SOURCE:
            return
        if network.has_edge(a, b):
            if capacity is not None and "capacity" in network[a][b]:
                network[a][b]["capacity"] += capacity
            elif capacity is None:
                network[a][b].pop("capacity", None)
        elif capacity is None:
            network.add_edge(a, b)  # no capacity: infinite
        else:
            network.add_edge(a, b, capacity=capacity)

    values = [*graph.inputs, *(v for node in graph.nodes for v in node.outputs)]
    for value in values:
        cost = _cost(value)
        if not cost:
            continue
        producer = value.producer
        made = side(
            producer if producer is not None and producer in roles and roles[producer].outputs else None
        )
        readers = {
            reader
            for node, position in value.uses
            if (reader := _reader(node, position, roles, side, node in last_of)) is not None
        }
        if value in graph.outputs:
            readers.add(SINK)
        readers.discard(made)
        if len(readers) == 1:
            reader = readers.pop()
            edge(reader, made, cost)
            edge(made, reader, cost)
        elif readers:
            wants_last, wants_first = ("last", id(value)), ("first", id(value))
            edge(wants_last, made, cost)
            edge(made, wants_first, cost)
            for reader in readers:
                edge(reader, wants_last, None)
                edge(wants_first, reader, None)
    for node in graph.nodes:
        if node in roles and node.op.name == "Transpose" and node not in last_of:
            rank = len(node.attrs["perm"])
            if tuple(node.attrs["perm"]) == to_first(rank):
                edge(SOURCE, node, _cost(node.output))
            elif tuple(node.attrs["perm"]) == to_last(rank):
                edge(node, SINK, None)
    _, (last, _) = networkx.minimum_cut(network, SOURCE, SINK)
    # A part of the graph that no convolution touches costs the same either way and stays as it is.
    near: set[Any] = {SOURCE}
    stack: list[Any] = [SOURCE]
    while stack:
        current = stack.pop()
        for neighbour in (*network.successors(current), *network.predecessors(current)):
            if neighbour in last and neighbour not in near:
                near.add(neighbour)
                stack.append(neighbour)
    return forced | {n for n in near if isinstance(n, Node)}


def _reader(node: Node, position: int, roles: Mapping[Node, Role], side: Any, shuffled: bool) -> Any:
    """The side a reader takes a value on, or None when it takes both for nothing."""
    role = roles.get(node)
    if role is None:
        return SINK
    if node.op.name == "Transpose" and not shuffled:
        perm = tuple(node.attrs["perm"])
        return SOURCE if perm == to_last(len(perm)) else SINK if perm == to_first(len(perm)) else None
    return side(node) if position in role.inputs else SINK


# -- building the graph again


class _Rebuild:
    """One pass over the nodes in order; `last` maps values to their channels-last form."""

    def __init__(self, graph: Graph, roles: Mapping[Node, Role], chosen: set[Node],
                 shuffles: Mapping[Node, Shuffle]) -> None:  # fmt: skip
        self.graph, self.roles, self.chosen, self.shuffles = graph, roles, chosen, shuffles
        self.skipped = {n for last, shuffle in shuffles.items() if last in chosen for n in shuffle.nodes[:2]}
        self.last: dict[Value, Value] = {}  # the channels-last form of a value
        self.lazy: dict[Value, Node] = {}  # values computed channels-last only, so far

    def run(self) -> int:
        graph = self.graph
        changes = 0
        for node in list(graph.nodes):
            if node in self.skipped:
                continue
            if node in self.chosen:
                changes += 1
                self._rebuild(node)
                continue
            if self._is_to_last(node) and node.inputs[0] in self.last and node.output not in graph.outputs:
                assert node.inputs[0] is not None
                graph.replace(node.output, self.last[node.inputs[0]])
                changes += 1
                continue
            for position, value in enumerate(node.inputs):
                if value in self.lazy:
                    graph.set_input(node, position, self._as_first(value))
        for value in list(graph.outputs):
            if value in self.lazy:
                graph.replace(value, self._as_first(value))
        graph.tidy()
        return changes

    def _is_to_last(self, node: Node) -> bool:
        return node.op.name == "Transpose" and tuple(node.attrs["perm"]) == to_last(len(node.attrs["perm"]))

    def _as_first(self, value: Value) -> Value:
        """A value of the old graph in its own order."""
        if value not in self.lazy:
            return value
        node = self.lazy.pop(value)
        last = self.last[value]
        first = permuted(Builder(self.graph, node.origin), last, to_first(last.tensor.rank))
        # Later readers of the old value read the new one.
        self.last[first] = last
        self.graph.replace(value, first)
        return first

    def _as_last(self, value: Value, rank: int, origin: tuple[str, ...]) -> Value:
        """Any value, of full or lower rank, channels-last."""
        if value in self.last:
            return self.last[value]
        b = Builder(self.graph, origin)
        full = value
        if value.tensor.rank < rank:
            full = b.op("Reshape", value, b.shape([*(1,) * (rank - value.tensor.rank), *value.shape]))
            return permuted(b, full, to_last(rank))
        self.last[value] = permuted(b, full, to_last(rank))
        return self.last[value]

    def _rebuild(self, node: Node) -> None:
        role, graph = self.roles[node], self.graph
        rank = _rank(node.output if node.op.kind is Kind.POINTWISE else node.inputs[0])
        assert rank is not None
        if node.op.name == "Transpose":
            self._rebuild_transpose(node)
            return
        if node in self.shuffles:
            self._rebuild_shuffle(node, self.shuffles[node])
            return
        inputs: list[Value | None] = []
        for position, value in enumerate(node.inputs):
            follows = position in role.inputs or (
                node.op.kind is Kind.POINTWISE
                and value is not None
                and value.tensor.rank > 0
                and not _one_element(value)
            )
            inputs.append(value if value is None or not follows else self._as_last(value, rank, node.origin))
        b = Builder(graph, node.origin)
        inputs, attrs = remap(b, node, inputs, rank)
        new = graph.add(node.op, inputs, attrs, origin=node.origin, outputs=len(node.outputs))
        for old, made in zip(node.outputs, new.outputs):
            if role.outputs:
                self.last[old] = made
                self.lazy[old] = node
            else:
                graph.replace(old, made)

    def _rebuild_shuffle(self, node: Node, shuffle: Shuffle) -> None:
        b = Builder(self.graph, node.origin)
        x = self._as_last(shuffle.source, shuffle.source.tensor.rank, node.origin)
        rank = x.tensor.rank
        split = b.op("Reshape", x, b.shape([*x.shape[:-1], shuffle.groups, shuffle.per_group]), allowzero=1)
        swapped = b.op("Transpose", split, perm=[*range(rank - 1), rank, rank - 1])
        self.last[node.output] = b.op("Reshape", swapped, b.shape(list(x.shape)), allowzero=1)
        self.lazy[node.output] = node

    def _rebuild_transpose(self, node: Node) -> None:
        """A transposition of the model whose result is wanted channels-last."""
        source = node.inputs[0]
        assert source is not None
        perm = tuple(node.attrs["perm"])
        wanted = tuple(perm[a] for a in to_last(len(perm)))
        if source in self.lazy:  # compose with the way back to the source's own order
            back = to_first(len(perm))
            source, wanted = self.last[source], tuple(back[a] for a in wanted)
        self.last[node.output] = permuted(Builder(self.graph, node.origin), source, wanted)
        self.lazy[node.output] = node


def _one_element(value: Value) -> bool:
    return all(d == 1 for d in value.shape)


def permuted(b: Builder, value: Value, perm: Sequence[int]) -> Value:
    """A value with its axes permuted: itself, a Reshape when only axes of size 1 move, or a Transpose."""
    if list(perm) == sorted(perm):
        return value
    if moves_nothing(value.shape, perm):
        return b.op("Reshape", value, b.shape([value.shape[a] for a in perm]))
    return b.op("Transpose", value, perm=list(perm))


def remap(
    b: Builder, node: Node, inputs: Sequence[Value | None], rank: int
) -> tuple[list[Value | None], dict[str, Any]]:
    """Inputs and attributes of a node for channels-last operands: axes and vectors over axes are permuted."""
    name, attrs, out = node.op.name, dict(node.attrs), list(inputs)
    perm = to_last(rank)
    where = {old: new for new, old in enumerate(perm)}
    if name in FORCED or name in WINDOWED:
        attrs["layout"] = "NHWC"
    elif name in AXIS_ATTRIBUTE and node.op.kind is not Kind.POINTWISE:
        attrs["axis"] = where[attrs["axis"] % rank]
    elif name in REDUCTIONS and _present(node, 1):
        out[1] = b.shape([where[a] for a in _axes(node, 1, rank) or []])
    elif name == "Expand":
        out[1] = _permute_vector(b, out[1], perm)
    elif name == "Resize":
        for position in (2, 3):
            if _present(node, position) and 0 not in out[position].shape:  # type: ignore[union-attr]
                out[position] = _permute_vector(b, out[position], perm)
    elif name in ("Pad", "Slice"):
        position = 3
        axes = _axes(node, position, rank) if _present(node, position) else None
        if axes is None:
            count = out[1].content.size // (2 if name == "Pad" else 1)  # type: ignore[union-attr]
            axes = list(range(count))
        out += [None] * (position + 1 - len(out))
        out[position] = b.shape([where[a] for a in axes])
    return out, attrs


def _permute_vector(b: Builder, value: Value | None, perm: Sequence[int]) -> Value:
    assert value is not None and value.content is not None
    items = list(value.content.flat)
    if value.data is not None:
        return b.constant(value.data[list(perm)])
    return b.graph.symbolic_constant(object_array([items[a] for a in perm]), value.tensor)
