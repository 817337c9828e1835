"""GraphProto to Graph: names become values, nodes become ops of the IR, functions are inlined, captures
made explicit.

A name is looked up in a `Scope`; a name found outside a body becomes an input of the body (constants are
copied instead). Calls of functions are expanded on an explicit stack, so their depth never meets Python's
recursion limit. Operators without a definition of ours use ONNX's function body, else ONNX's reference
implementation on the host. Nothing is folded or simplified here.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import onnx

from minicc.errors import InvalidModelError, MiniccError, ResourceLimitError, UnsupportedOpError
from minicc.frontend.attributes import check_node, default_of, find_schema, plain, resolve_references
from minicc.frontend.checks import check
from minicc.frontend.control import import_control
from minicc.frontend.functions import FunctionKey, FunctionTable, schema_function
from minicc.frontend.order import MAX_NESTING, node_name, sorted_nodes
from minicc.frontend.tensors import TensorReader
from minicc.frontend.unsupported import Unsupported
from minicc.frontend.upgrade import OLDEST_FORM, OnnxNode, upgrade
from minicc.ir.dims import product
from minicc.ir.graph import Builder, Graph, Value
from minicc.ir.opdef import OpDef, find_op
from minicc.ir.types import TensorType, Type
from minicc.ops.host import host_op, newest_opset

MAX_NODES = 100_000
MAX_CALL_DEPTH = 512
CONTROL = frozenset(("If", "Loop", "Scan"))


@dataclass(frozen=True)
class Frame:
    """What the nodes of one function (or of the model) share: operator versions, attribute values, name
    prefix.
    """

    opsets: Mapping[str, int]
    attributes: Mapping[str, onnx.AttributeProto] = field(default_factory=dict)
    prefix: str = ""
    active: frozenset[FunctionKey] = frozenset()


@dataclass
class Scope:
    """The names of one graph or function body; `parent` is where a body looks for what it captures.

    captures: outer value to the body input that stands for it, in order.
    """

    graph: Graph
    names: dict[str, Value | None] = field(default_factory=dict)
    parent: Scope | None = None
    captures: dict[Value, Value] = field(default_factory=dict)
    depth: int = 0

    def find(self, name: str) -> Value | None:
        """The value of a name, capturing it through every body in between; None when there is none."""
        passed: list[Scope] = []
        scope: Scope | None = self
        while scope is not None and name not in scope.names:
            passed.append(scope)
            scope = scope.parent
        if scope is None:
            return None
        value = scope.names[name]
        for inner in reversed(passed):
            if value is not None:
                value = inner._capture(value)
            inner.names[name] = value
        return value

    def _capture(self, value: Value) -> Value:
        if self.parent is not None and self.parent.graph is self.graph:
            return value
        if value.producer is None and value.is_constant:
            return Value(value.name, value.type, data=value.data, content=value.content)
        if value not in self.captures:
            self.captures[value] = self.graph.input(value.name, value.type)
        return self.captures[value]

    def has(self, name: str) -> bool:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.names:
                return True
            scope = scope.parent
        return False


@dataclass
class _Work:
    """A node list being imported, and what to do at its end."""

    nodes: Iterator[tuple[int, onnx.NodeProto]]
    scope: Scope
    frame: Frame
    used: frozenset[str]
    finish: Callable[[], None]


@dataclass
class Importer:
    """Imports the graphs of one model."""

    tensors: TensorReader
    functions: FunctionTable
    max_bytes: int
    unsupported: Unsupported = field(default_factory=Unsupported)
    n_nodes: int = 0

    def run(
        self, nodes: Sequence[onnx.NodeProto], results: Sequence[str], scope: Scope, frame: Frame, where: str
    ) -> None:
        """Import a node list into `scope`; calls of functions are expanded in place."""
        stack = [self._work(nodes, results, scope, frame, where, lambda: None)]
        while stack:
            work = stack[-1]
            item = next(work.nodes, None)
            if item is None:
                work.finish()
                stack.pop()
                continue
            position, node = item
            self.n_nodes += 1
            if self.n_nodes > MAX_NODES:
                raise ResourceLimitError(
                    f"the model has more than {MAX_NODES} nodes after inlining its functions"
                )
            call = self._node(node, position, work)
            if call is not None:
                if len(stack) >= MAX_CALL_DEPTH:
                    raise ResourceLimitError(f"functions call each other more than {MAX_CALL_DEPTH} deep")
                stack.append(call)

    def _work(
        self,
        nodes: Sequence[onnx.NodeProto],
        results: Sequence[str],
        scope: Scope,
        frame: Frame,
        where: str,
        finish: Callable[[], None],
    ) -> _Work:
        ordered, reads = sorted_nodes(nodes, where)
        return _Work(iter(ordered), scope, frame, reads.union(results), finish)

    def _node(self, node: onnx.NodeProto, position: int, work: _Work) -> _Work | None:
        """Import one node; a call of a function gives the work of its body instead."""
        scope, frame = work.scope, work.frame
        domain = "" if node.domain == "ai.onnx" else node.domain
        origin = frame.prefix + node_name(node, position)
        where = f"{domain + '.' if domain else ''}{node.op_type} node {origin!r}"
        for name in node.output:
            if name and name in scope.names:
                raise InvalidModelError(f"value {name!r} is defined twice", where=where)
        attributes = resolve_references(node.attribute, frame.attributes, where)
        function = self.functions.find(domain, node.op_type, node.overload)
        if function is not None:
            inputs = self._inputs(node, scope, where)
            return self._call(
                function, (domain, node.op_type, node.overload), node, inputs, attributes, work, origin, where
            )
        opset = frame.opsets.get(domain, 0)
        schema = find_schema(node.op_type, domain, opset) if opset else None
        if schema is not None and not schema.deprecated:
            check_node(schema, node, attributes, where)
        elif domain == "" and not opset:
            raise InvalidModelError(f"{node.op_type} belongs to ai.onnx, which is not imported", where=where)
        if schema is not None and domain == "" and opset < OLDEST_FORM:
            _check_form(node.op_type, schema, opset, where)
        inputs = self._inputs(node, scope, where)
        values = {name: plain(a, self.tensors, where) for name, a in attributes.items()}
        if domain == "" and node.op_type == "Constant":
            self._define(node, [constant_value(scope.graph, values, node.output[0], where)], scope)
            return None
        if domain == "" and node.op_type in CONTROL:
            outputs = import_control(self, node, opset, inputs, values, scope, frame, origin, where)
            self._define(node, outputs, scope)
            return None
        count = self._outputs_used(node, schema, work.used)
        pending = OnnxNode(node.op_type, domain, opset, inputs, values, count, where)
        builder = Builder(scope.graph, (origin,))
        before = len(scope.graph.nodes)
        replaced = upgrade(pending, builder) if domain == "" else None
        if replaced is not None:
            self._check_sizes(scope.graph, before)
            self._define(node, replaced, scope)
            return None
        check(pending)
        op = self._definition(pending, schema, where)
        if op is None:
            body = schema_function(pending, node, attributes)
            if body is not None:
                return self._call(
                    body,
                    ("onnx", domain, node.op_type),
                    node,
                    pending.inputs,
                    {},
                    work,
                    origin,
                    where,
                    inherit=any(a.type == onnx.AttributeProto.GRAPH for a in node.attribute),
                )
            op = self._fallback(pending, where)
        added = scope.graph.add(
            op,
            pending.inputs,
            pending.attrs,
            origin=(origin,),
            outputs=count,
            names=[frame.prefix + name if name else "" for name in node.output],
        )
        self._check_sizes(scope.graph, before)
        self._define(node, added.outputs, scope)
        return None

    def _definition(self, node: OnnxNode, schema: onnx.defs.OpSchema | None, where: str) -> OpDef | None:
        """Our definition, if it knows all the attributes; those that only say the default are dropped.

        Raises UnsupportedOpError for an attribute of another domain that nobody knows, unless it switches something off.
        """
        op = find_op(node.op, node.domain)
        if op is None:
            return None
        for name in [name for name in node.attrs if name not in op.attrs]:
            value = node.attrs[name]
            if schema is not None and value != default_of(schema, name):
                return None
            if schema is None and not (value is None or (isinstance(value, (int, float, str, tuple)) and not value)):
                raise UnsupportedOpError(
                    f"{node.domain}.{node.op} has an attribute that minicc does not know",
                    where=where, why=f"{name}={value!r}"[:200], hint="export the model without it, or add it to the operator",
                )  # fmt: skip
            del node.attrs[name]
        return op

    def _fallback(self, node: OnnxNode, where: str) -> OpDef:
        """ONNX's reference implementation, or a stand-in for an operator that nobody knows."""
        opset = newest_opset() if node.domain == "" else node.opset
        attrs = {**node.attrs, "opset": opset, "outputs": node.n_outputs}
        if find_schema(node.op, node.domain, max(opset, 1)) is not None:
            try:
                op = host_op(node.domain, node.op, attrs)
            except MiniccError:
                pass
            else:
                node.attrs = attrs
                return op
        node.attrs = {}
        return self.unsupported.add(node, where)

    def _inputs(self, node: onnx.NodeProto, scope: Scope, where: str) -> list[Value | None]:
        inputs: list[Value | None] = []
        for name in node.input:
            if name and not scope.has(name):
                close = difflib.get_close_matches(name, list(scope.names)[:2000], n=2)
                raise InvalidModelError(
                    f"input {name!r} of a node is defined nowhere",
                    where=where,
                    hint=f"did you mean {' or '.join(map(repr, close))}?" if close else "",
                )
            inputs.append(scope.find(name) if name else None)
        while inputs and inputs[-1] is None:
            inputs.pop()
        return inputs

    def _outputs_used(
        self, node: onnx.NodeProto, schema: onnx.defs.OpSchema | None, used: frozenset[str]
    ) -> int:
        """Outputs named, without the optional ones at the end that nobody reads."""
        count = len(node.output)
        while count > 1 and node.output[count - 1] not in used:
            formal = schema.outputs[min(count, len(schema.outputs)) - 1] if schema is not None else None
            if formal is not None and formal.option != onnx.defs.OpSchema.FormalParameterOption.Optional:
                break
            count -= 1
        return count

    def _define(self, node: onnx.NodeProto, values: Sequence[Value], scope: Scope) -> None:
        for name, value in zip(node.output, values):
            if name:
                scope.names[name] = value

    def _call(
        self,
        function: onnx.FunctionProto,
        key: FunctionKey,
        node: onnx.NodeProto,
        inputs: Sequence[Value | None],
        attributes: Mapping[str, onnx.AttributeProto],
        work: _Work,
        origin: str,
        where: str,
        *,
        inherit: bool = False,
    ) -> _Work:
        """The work of a function's body. `inherit`: the body holds graphs of the caller and may read its
        names.
        """
        caller, frame = work.scope, work.frame
        if key in frame.active and not inherit:
            raise InvalidModelError(f"function {node.op_type} calls itself", where=where)
        if len(inputs) > len(function.input) or len(node.output) > len(function.output):
            raise InvalidModelError(
                f"function {node.op_type} has {len(function.input)} inputs and {len(function.output)} "
                f"outputs, the call {len(inputs)} and {len(node.output)}",
                where=where,
            )
        values = {a.name: a for a in function.attribute_proto}
        values.update(attributes)
        opsets = dict(frame.opsets)
        opsets.update((("" if o.domain == "ai.onnx" else o.domain), o.version) for o in function.opset_import)
        inner = Scope(caller.graph, parent=caller if inherit else None, depth=caller.depth)
        for i, name in enumerate(function.input):
            inner.names[name] = inputs[i] if i < len(inputs) else None
        callee = Frame(opsets, values, f"{origin}/", frame.active | {key})

        def finish() -> None:
            for name, result in zip(node.output, function.output):
                if not name:
                    continue
                if not inner.has(result):
                    raise InvalidModelError(
                        f"output {result!r} of function {node.op_type} is computed nowhere", where=where
                    )
                caller.names[name] = inner.find(result)

        return self._work(
            function.node, list(function.output), inner, callee, f"function {node.op_type}", finish
        )

    def _check_sizes(self, graph: Graph, first: int) -> None:
        """Refuse outputs that are certainly too large, or negative."""
        for node in graph.nodes[first:]:
            for value in node.outputs:
                if not isinstance(value.type, TensorType) or value.type.shape is None:
                    continue
                known = [d for d in value.type.shape if isinstance(d, int)]
                if any(d < 0 for d in known):
                    raise InvalidModelError(
                        f"an output has the negative shape {value.type}", where=node.describe()
                    )
                size = product(known) if value.type.is_static else 0
                if isinstance(size, int) and size * value.type.dtype.bytes > self.max_bytes:
                    raise ResourceLimitError(
                        f"an output of type {value.type} is larger than max_bytes={self.max_bytes}",
                        where=node.describe(),
                        hint="raise max_bytes",
                    )

    def body(
        self, proto: onnx.GraphProto, types: Sequence[Type], parent: Scope, frame: Frame, where: str
    ) -> Scope:
        """Import a nested graph whose inputs have the given types."""
        if parent.depth >= MAX_NESTING:
            raise ResourceLimitError(f"graphs are nested more than {MAX_NESTING} deep", where=where)
        if len(proto.input) != len(types):
            raise InvalidModelError(
                f"the body has {len(proto.input)} inputs, {len(types)} are given", where=where
            )
        graph = parent.graph.subgraph(proto.name or "body")
        scope = Scope(graph, parent=parent, depth=parent.depth + 1)
        for info, type_ in zip(proto.input, types):
            if info.name in scope.names:
                raise InvalidModelError(f"two inputs of a body are called {info.name!r}", where=where)
            scope.names[info.name] = graph.input(info.name, type_)
        self.constants(proto, scope, where)
        self.nodes(proto, scope, frame, where)
        return scope

    def constants(self, proto: onnx.GraphProto, scope: Scope, where: str) -> None:
        """Define the initializers of a graph."""
        named = chain(
            ((t.name, False, t) for t in proto.initializer),
            ((t.values.name, True, t) for t in proto.sparse_initializer),
        )
        for name, sparse, tensor in named:
            if not name or name in scope.names:
                raise InvalidModelError(
                    f"initializer {name!r} has no name, or one that is taken", where=where
                )
            array = self.tensors.read_sparse(tensor, name) if sparse else self.tensors.read(tensor, name)
            scope.names[name] = scope.graph.constant(array, name)

    def nodes(self, proto: onnx.GraphProto, scope: Scope, frame: Frame, where: str) -> None:
        """Import the nodes of a graph and set its outputs."""
        self.run(proto.node, [v.name for v in proto.output], scope, frame, where)
        for info in proto.output:
            value = scope.find(info.name) if info.name and scope.has(info.name) else None
            if value is None:
                raise InvalidModelError(
                    f"output {info.name!r} of graph {proto.name!r} is computed nowhere", where=where
                )
            scope.graph.outputs.append(value)


def _check_form(op: str, schema: onnx.defs.OpSchema, opset: int, where: str) -> None:
    """Below the oldest opset that is upgraded, operators are accepted whose form it still has."""
    oldest = find_schema(op, "", OLDEST_FORM)
    if oldest is None or oldest.since_version != schema.since_version:
        raise InvalidModelError(
            f"{op} of opset {opset} is not supported, opset {OLDEST_FORM} is",
            where=where,
            hint="convert the model with onnx.version_converter",
        )


def constant_value(graph: Graph, attrs: Mapping[str, Any], name: str, where: str) -> Value:
    """The value of a Constant node, in any of its forms. Raises InvalidModelError unless one form is used."""
    if len(attrs) != 1:
        raise InvalidModelError(f"Constant needs one value, has {len(attrs)}", where=where)
    form, given = next(iter(attrs.items()))
    dtypes = {
        "value_int": np.int64,
        "value_ints": np.int64,
        "value_float": np.float32,
        "value_floats": np.float32,
        "value_string": object,
        "value_strings": object,
    }
    array = np.array(given, dtype=dtypes[form]) if form in dtypes else given
    return graph.constant(array, name)
