"""The verifier: invariants of a graph, checked after every pass.

It trusts nothing that a pass could have left wrong: order, use lists, names, attributes, constants, and
types, which are compared with a fresh run of each op's `infer`. It does not compare numbers (see
passes/manager.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from enum import IntEnum
from itertools import count

import numpy as np

from minicc.errors import MiniccError, VerifyError
from minicc.ir.graph import Graph, Node, Value, infer
from minicc.ir.opdef import Kind
from minicc.ir.text import print_graph
from minicc.ir.types import TensorType, dtype_of

CONTEXT_LINES = 5


class Stage(IntEnum):
    """What holds from some point of the pipeline on; each stage includes the earlier ones.

    IMPORTED: structure and types are right.
    EXPANDED: no op of Kind.EXPAND is left, except those a target keeps whole or the op itself refuses (host).
    FUSED:    every group of `Fused` nodes is convex, which holds when the graph has an order (checked by
    IMPORTED).
    """

    IMPORTED = 0
    EXPANDED = 1
    FUSED = 2


def verify(graph: Graph, stage: Stage = Stage.IMPORTED, *, pass_name: str = "",
           keep: Callable[[Node], bool] = lambda _: False) -> None:  # fmt: skip
    """Raise VerifyError (rule, node, neighbouring lines, pass) where a graph or a body breaks an invariant.

    keep: whether a node of an EXPAND op may stay after Stage.EXPANDED.
    """
    Verifier(graph, graph, stage, pass_name, keep).run()


class Verifier:
    """One check of one graph; `root` is the outermost graph, for messages."""

    def __init__(
        self, root: Graph, graph: Graph, stage: Stage, pass_name: str, keep: Callable[[Node], bool]
    ) -> None:
        self.root, self.graph, self.stage, self.pass_name, self.keep = root, graph, stage, pass_name, keep

    def fail(self, rule: str, node: Node | None = None, why: str = "") -> VerifyError:
        after = f"pass {self.pass_name!r} left a graph where " if self.pass_name else ""
        return VerifyError(
            f"{after}{rule}", where=node.describe() if node is not None else f"graph {self.graph.name!r}",
            why="\n".join(part for part in (why, self._excerpt(node)) if part),
            hint="this is a minicc bug; MINICC_DUMP=<folder> records the graph after each pass",
        )  # fmt: skip

    def run(self) -> None:
        defined: set[Value] = set(self.graph.inputs)
        for value in self.graph.inputs:
            if value.producer is not None or value.data is not None:
                raise self.fail(f"the graph input {value.name!r} has a producer or data")
        uses: Counter[tuple[Value, Node, int]] = Counter()
        for node in self.graph.nodes:
            self._inputs(node, defined, uses)
            self._outputs(node, defined)
            self._attributes(node)
            self._types(node)
            if self.stage >= Stage.EXPANDED and self._must_expand(node):
                raise self.fail(f"{node.op} should have been expanded", node)
            for body in node.attrs.values():
                if isinstance(body, Graph):
                    Verifier(self.root, body, self.stage, self.pass_name, self.keep).run()
        for value in self.graph.outputs:
            if value not in defined and not value.is_constant:
                raise self.fail(f"the output {value.name!r} is not computed")
        self._use_lists(defined, uses)
        names = Counter(v.name for v in defined)
        for name, times in names.items():
            if times > 1:
                raise self.fail(f"the name {name!r} belongs to {times} values")

    def _must_expand(self, node: Node) -> bool:
        if node.op.kind is not Kind.EXPAND or self.keep(node):
            return False
        return node.op.refuse is None or node.op.refuse(node) is None

    def _inputs(self, node: Node, defined: set[Value], uses: Counter[tuple[Value, Node, int]]) -> None:
        for position, value in enumerate(node.inputs):
            if value is None:
                continue
            uses[value, node, position] += 1
            if value in defined:
                continue
            if not value.is_constant:
                raise self.fail(f"input {position} ({value.name!r}) is not computed before it is read", node)
            defined_type = value.type
            if not isinstance(defined_type, TensorType) or defined_type.shape is None:
                raise self.fail(f"the constant {value.name!r} has type {defined_type}", node)
            if value.data is not None:
                if not isinstance(value.data, np.ndarray):
                    raise self.fail(f"the data of {value.name!r} is not an array", node)
                if value.data.shape != defined_type.shape or dtype_of(value.data.dtype) != defined_type.dtype:
                    raise self.fail(f"the constant {value.name!r} of type {defined_type} holds "
                                    f"{value.data.dtype}{list(value.data.shape)}", node)  # fmt: skip
            if value.content is not None and value.content.shape != defined_type.shape:
                raise self.fail(f"the content of {value.name!r} has shape {value.content.shape}", node)

    def _outputs(self, node: Node, defined: set[Value]) -> None:
        for index, value in enumerate(node.outputs):
            if value.producer is not node or value.index != index:
                raise self.fail(f"output {index} ({value.name!r}) names another producer", node)
            if value in defined:
                raise self.fail(f"output {value.name!r} is computed twice", node)
            defined.add(value)

    def _attributes(self, node: Node) -> None:
        unknown = sorted(set(node.attrs) - set(node.op.attrs))
        missing = sorted(set(node.op.attrs) - set(node.attrs))
        if unknown or missing:
            raise self.fail(
                f"attributes differ from those of {node.op}", node, f"unknown {unknown}, missing {missing}"
            )

    def _types(self, node: Node) -> None:
        symbols = node.symbols
        # A throw-away counter: checking must not change the names later passes will make.
        scratch = Graph("scratch", count(1 << 40))
        try:
            types, contents = infer(node, scratch, len(node.outputs))
        except MiniccError as error:
            raise self.fail("types cannot be inferred again", node, str(error)) from error
        finally:
            node.symbols = symbols
        for value, type_, content in zip(node.outputs, types, contents):
            if value.type != type_:
                raise self.fail(f"a type does not follow from the inputs of {value.name!r}", node,
                                f"recorded {value.type}, inferred {type_}")  # fmt: skip
            if (
                value.content is not None
                and content is not None
                and not _same_content(value.content, content)
            ):
                why = f"recorded {list(value.content.flat)}, inferred {list(content.flat)}"
                raise self.fail(
                    f"the known content of {value.name!r} does not follow from its inputs", node, why
                )

    def _use_lists(self, defined: set[Value], uses: Counter[tuple[Value, Node, int]]) -> None:
        values = defined | {value for value, _, _ in uses}
        for value in values:
            recorded = Counter((node, position) for node, position in value.uses)
            actual = {(node, position) for node, position in recorded if uses[value, node, position]}
            if len(actual) != len(recorded) or any(times != 1 for times in recorded.values()):
                stale = next((node for node, position in recorded if (node, position) not in actual), None)
                raise self.fail(f"the use list of {value.name!r} names a use that does not exist", stale)
        for value, node, position in uses:
            if (node, position) not in value.uses:
                raise self.fail(f"the use list of {value.name!r} lacks input {position} of this node", node)

    def _excerpt(self, node: Node | None) -> str:
        """The printed lines around the node, the node's own marked."""
        try:
            lines = print_graph(self.graph).splitlines()
        except Exception:  # a graph broken enough that it cannot be printed still gets its message
            return ""
        if node is None or not node.outputs:
            return "\n".join(lines[: 2 * CONTEXT_LINES])
        start = f"{node.outputs[0].name}: "
        at = next((i for i, line in enumerate(lines) if line.strip().startswith(start)), 0)
        first = max(at - CONTEXT_LINES, 0)
        return "\n".join(
            f"{'>' if i == at else ' '} {line}"
            for i, line in enumerate(lines[first : at + CONTEXT_LINES + 1], start=first)
        )


def _same_content(a: object, b: object) -> bool:
    """Equal element by element; NaN equals NaN."""
    first, second = np.asarray(a, dtype=object), np.asarray(b, dtype=object)
    if first.shape != second.shape:
        return False
    return all(x == y or (x != x and y != y) for x, y in zip(first.flat, second.flat))
