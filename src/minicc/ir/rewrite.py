"""Rewriting: patterns as data, rules as plain functions, one worklist.

A rule is a pattern and a function. The function gets a `Builder` and the captures by name and returns the
replacement (a value, or a tuple for a root with several outputs), or a `Refusal` with its reason. Matching
starts at the root's output and walks to its producers; commutative ops are tried both ways; an inner node
must have no reader outside the match unless it is `shared`. What needs a global view (layout, fusion) is not
a rule but a pass.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from minicc.errors import VerifyError
from minicc.ir.graph import Builder, Graph, Node, Value
from minicc.ir.types import TensorType

COMMUTATIVE = frozenset(("Add", "Mul", "Max", "Min", "And", "Or", "Xor", "Equal", "BitwiseAnd", "BitwiseOr", "BitwiseXor"))
MAX_APPLICATIONS_PER_NODE = 50  # beyond this, rules undo each other


@dataclass(frozen=True)
class Leaf:
    """Any value (`var`), or any numeric constant (`const`), captured by name; the same name must match the
    same value.
    """

    name: str
    constant: bool = False


@dataclass(frozen=True)
class Scalar:
    """A constant of one element (any rank) close to `value`; captured when it has a name."""

    value: float
    name: str = ""
    tolerance: float = 1e-6


@dataclass(frozen=True)
class Op:
    """An application of one of `names`; `inputs` None matches any inputs; `name` captures the node."""

    names: tuple[str, ...]
    inputs: tuple[Pattern, ...] | None = None
    name: str = ""
    shared: bool = False
    domain: str = ""
    attrs: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class AnyOf:
    """The first alternative that matches."""

    alternatives: tuple[Pattern, ...]


Pattern = Leaf | Scalar | Op | AnyOf


@dataclass(frozen=True)
class Refusal:
    """Why a rule whose pattern matched does not apply."""

    reason: str


Result = Value | tuple[Value, ...] | Refusal | None
Captures = dict[str, Any]
Members = dict[Node, bool]  # matched nodes, root first, and whether they may have readers outside
Matches = Iterator[tuple[Captures, Members]]


@dataclass(frozen=True)
class Rule:
    """`apply(b, **captures)` for every match of `pattern`; returning None is a silent refusal."""

    name: str
    pattern: Op
    apply: Callable[..., Result]


def var(name: str) -> Leaf:
    """Any value."""
    return Leaf(name)


def const(name: str) -> Leaf:
    """Any constant with known numbers."""
    return Leaf(name, constant=True)


def scalar(value: float, name: str = "") -> Scalar:
    """A one-element constant with this value."""
    return Scalar(value, name)


def op(names: str, *inputs: Pattern, name: str = "", shared: bool = False, domain: str = "", **attrs: Any) -> Op:
    """An op (or one of several, separated by spaces) on these inputs; no inputs given matches any."""
    return Op(tuple(names.split()), tuple(inputs) or None, name, shared, domain, tuple(attrs.items()))


def any_of(*alternatives: Pattern) -> AnyOf:
    """One of several patterns."""
    return AnyOf(alternatives)


def rule(name: str, pattern: Op) -> Callable[[Callable[..., Result]], Rule]:
    """Decorator: the function becomes a `Rule`."""
    return lambda function: Rule(name, pattern, function)


def refuse(reason: str) -> Refusal:
    """The rule does not apply, and why."""
    return Refusal(reason)


@dataclass
class Rewrites:
    """What a run did: applications per rule, and refusals per (rule, reason)."""

    applied: Counter[str] = field(default_factory=Counter)
    refused: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def changes(self) -> int:
        return self.applied.total()


def rewrite(graph: Graph, rules: Sequence[Rule], found: Rewrites | None = None) -> Rewrites:
    """Apply rules until none applies, also in bodies. Raises VerifyError when rules do not come to an end."""
    found = found if found is not None else Rewrites()
    by_op: dict[tuple[str, str], list[Rule]] = {}
    for one in rules:
        for name in one.pattern.names:
            by_op.setdefault((one.pattern.domain, name), []).append(one)
    graph.tidy()
    worklist = Worklist(graph.nodes)
    limit = MAX_APPLICATIONS_PER_NODE * (len(graph.nodes) + 20)
    applied: Counter[str] = Counter()
    for node in worklist.drain():
        for body in node.attrs.values():
            if isinstance(body, Graph) and node not in worklist.entered:
                rewrite(body, rules, found)
        worklist.entered.add(node)
        for one in by_op.get((node.op.domain, node.op.name), ()):
            if _try(graph, one, node, worklist, found):
                applied[one.name] += 1
                break
        if applied.total() > limit:
            names = ", ".join(name for name, _ in applied.most_common(3))
            raise VerifyError("rewriting does not come to an end", where=node.describe(), why=f"rules {names} keep firing")
    graph.tidy()
    return found


class Worklist:
    """Nodes to look at, first in first out, each at most once at a time; dead nodes are passed over."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.queue: deque[Node] = deque(nodes)
        self.queued: set[Node] = set(nodes)
        self.dead: set[Node] = set()
        self.entered: set[Node] = set()

    def push(self, node: Node | None) -> None:
        if node is not None and node not in self.queued and node not in self.dead:
            self.queued.add(node)
            self.queue.append(node)

    def drain(self) -> Iterator[Node]:
        while self.queue:
            node = self.queue.popleft()
            self.queued.discard(node)
            if node not in self.dead:
                yield node


def _ranked(value: Value) -> bool:
    return not isinstance(value.type, TensorType) or value.type.shape is not None


def _try(graph: Graph, one: Rule, node: Node, worklist: Worklist, found: Rewrites) -> bool:
    matched = match(graph, one.pattern, node)
    if matched is None:
        return False
    captures, nodes = matched
    if not all(_ranked(v) for n in nodes for v in (*n.inputs, *n.outputs) if v is not None):
        return False  # rules may ask for shapes
    origin = tuple(dict.fromkeys(name for member in reversed(nodes) for name in member.origin))
    before = len(graph.nodes)
    result = one.apply(Builder(graph, origin), **captures)
    made = graph.nodes[before:]
    values = () if isinstance(result, Refusal) or result is None else result if isinstance(result, tuple) else (result,)
    refusal = result if isinstance(result, Refusal) else _unfit(graph, node, values)
    if result is None or refusal is not None:
        if result is not None and refusal is not None:
            found.refused[one.name, refusal.reason] += 1
        for extra in reversed(made):
            remove_if_dead(graph, extra, worklist)
        return False
    readers = [reader for value in node.outputs for reader in value.consumers()]
    for old, new in zip(node.outputs, values):
        graph.replace(old, new)
    for fresh in made:
        worklist.push(fresh)
    for reader in readers:
        worklist.push(reader)
        for value in reader.outputs:  # patterns reach a little further than one level
            for further in value.consumers():
                worklist.push(further)
    for value in (*values, *(v for n in nodes for v in n.inputs if v is not None)):
        worklist.push(value.producer)
    remove_if_dead(graph, node, worklist)
    found.applied[one.name] += 1
    return True


def _unfit(graph: Graph, node: Node, values: Sequence[Value]) -> Refusal | None:
    """A replacement must have exactly the old types, so that every reader's type still holds."""
    if any(v.uses or v in graph.outputs for v in node.outputs[len(values) :]):
        return Refusal("an output without replacement is in use")
    for old, new in zip(node.outputs, values):
        if old.type != new.type:
            return Refusal(f"the type would change from {old.type} to {new.type}")
        if old in graph.outputs and (new.producer is None or new in graph.outputs):
            return Refusal("a graph output must be computed by a node of its own")
    return None


def remove_if_dead(graph: Graph, node: Node, worklist: Worklist | None = None) -> None:
    """Drop a node nobody reads from the use lists, and then its producers; `tidy` drops it from the node list."""
    stack = [node]
    while stack:
        current = stack.pop()
        if not current.inputs or any(v.uses or v in graph.outputs for v in current.outputs):
            continue
        producers = [v.producer for v in current.inputs if v is not None and v.producer is not None]
        for position, value in enumerate(current.inputs):
            if value is not None:
                value.uses.remove((current, position))
        current.inputs = ()
        if worklist is not None:
            worklist.dead.add(current)
            for producer in producers:
                worklist.push(producer)
        stack.extend(producers)


def match(graph: Graph, pattern: Op, node: Node) -> tuple[Captures, list[Node]] | None:
    """Captures and matched nodes (root first) of a pattern at a node, or None."""
    for captures, nodes in _match_node(pattern, node, {}, {}):
        if all(shared or member is node or _closed(graph, member, nodes) for member, shared in nodes.items()):
            return captures, list(nodes)
    return None


def _closed(graph: Graph, node: Node, inside: Members) -> bool:
    return not any(v in graph.outputs or any(n not in inside for n, _ in v.uses) for v in node.outputs)


def _match_node(pattern: Op, node: Node, captures: Captures, nodes: Members) -> Matches:
    if node.op.name not in pattern.names or node.op.domain != pattern.domain:
        return
    if any(node.attrs.get(name) != value for name, value in pattern.attrs):
        return
    if pattern.name:
        if captures.get(pattern.name, node) is not node:
            return
        captures = {**captures, pattern.name: node}
    nodes = {**nodes, node: pattern.shared or nodes.get(node, False)}
    if pattern.inputs is None:
        yield captures, nodes
        return
    given = list(node.inputs)
    while given and given[-1] is None:
        given.pop()
    if len(given) != len(pattern.inputs):
        return
    yield from _match_inputs(pattern.inputs, given, captures, nodes)
    if node.op.name in COMMUTATIVE and len(given) == 2:
        yield from _match_inputs(pattern.inputs, given[::-1], captures, nodes)


def _match_inputs(patterns: Sequence[Pattern], values: Sequence[Value | None], captures: Captures, nodes: Members) -> Matches:
    if not patterns:
        yield captures, nodes
        return
    for found, members in _match_value(patterns[0], values[0], captures, nodes):
        yield from _match_inputs(patterns[1:], values[1:], found, members)


def _match_value(pattern: Pattern, value: Value | None, captures: Captures, nodes: Members) -> Matches:
    if value is None:
        return
    if isinstance(pattern, AnyOf):
        for alternative in pattern.alternatives:
            yield from _match_value(alternative, value, captures, nodes)
    elif isinstance(pattern, Op):
        if value.producer is not None and value.index == 0:
            yield from _match_node(pattern, value.producer, captures, nodes)
    elif isinstance(pattern, Scalar):
        if value.data is not None and value.data.size == 1 and value.data.dtype.kind in "fiu":
            found = float(value.data.reshape(()))
            if abs(found - pattern.value) <= pattern.tolerance * max(1.0, abs(pattern.value)):
                yield ({**captures, pattern.name: value} if pattern.name else captures), nodes
    elif (not pattern.constant or value.data is not None) and captures.get(pattern.name, value) is value:
        yield {**captures, pattern.name: value}, nodes
