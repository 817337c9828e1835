"""If, Loop and Scan nodes: their bodies are imported, and what they capture becomes inputs of the node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx

from minicc.errors import InvalidModelError
from minicc.ir.graph import Graph, Value
from minicc.ir.types import TensorType, Type
from minicc.ops.control import CONDITION, ITERATION

if TYPE_CHECKING:
    from minicc.frontend.importer import Frame, Importer, Scope


def import_control(
    importer: Importer,
    node: onnx.NodeProto,
    opset: int,
    inputs: list[Value | None],
    attrs: Mapping[str, Any],
    scope: Scope,
    frame: Frame,
    origin: str,
    where: str,
) -> Sequence[Value]:
    """The output values of an If, Loop or Scan node."""
    add = {"If": _if, "Loop": _loop, "Scan": _scan if opset >= 9 else _scan_8}[node.op_type]
    arguments, attributes = add(importer, inputs, attrs, scope, frame, where)
    names = [frame.prefix + name if name else "" for name in node.output]
    added = scope.graph.add(
        node.op_type, arguments, attributes, origin=(origin,), outputs=len(node.output), names=names
    )
    return added.outputs


Prepared = tuple[list[Value | None], dict[str, Any]]  # inputs with captures, attributes


def _if(
    importer: Importer,
    inputs: list[Value | None],
    attrs: Mapping[str, Any],
    scope: Scope,
    frame: Frame,
    where: str,
) -> Prepared:
    """Both branches get the captures of either, in the same order."""
    names = ("then_branch", "else_branch")
    branches = [importer.body(attrs[name], [], scope, frame, where) for name in names]
    captured = list(dict.fromkeys(v for branch in branches for v in branch.captures))
    for branch in branches:
        branch.graph.inputs = [branch.captures.get(v) or Value(v.name, v.type) for v in captured]
    return [*inputs[:1], *captured], {name: branch.graph for name, branch in zip(names, branches)}


def _head_type(proto: onnx.GraphProto, position: int, default: TensorType) -> TensorType:
    """Rank 1 where the body declares its iteration number or condition so, as some exporters do."""
    if position < len(proto.input) and len(proto.input[position].type.tensor_type.shape.dim) == 1:
        return default.with_shape((1,))
    return default


def _types(values: Sequence[Value | None], where: str) -> list[Type]:
    if any(v is None for v in values):
        raise InvalidModelError("a carried or scanned input is missing", where=where)
    return [v.type for v in values if v is not None]


def _loop(
    importer: Importer,
    inputs: list[Value | None],
    attrs: Mapping[str, Any],
    scope: Scope,
    frame: Frame,
    where: str,
) -> Prepared:
    proto: onnx.GraphProto = attrs["body"]
    head: list[Value | None] = [*inputs[:2], None, None][:2]
    carried = inputs[2:]
    types = [_head_type(proto, 0, ITERATION), _head_type(proto, 1, CONDITION), *_types(carried, where)]
    body = importer.body(proto, types, scope, frame, where)
    return [*head, *carried, *body.captures], {"body": body.graph, "n_carried": len(carried)}


_SCAN_LISTS = ("scan_input_axes", "scan_input_directions", "scan_output_axes", "scan_output_directions")


def _without_axis(type_: Type, axis: int, where: str) -> Type:
    if not isinstance(type_, TensorType):
        raise InvalidModelError(f"a scanned input must be a tensor, it is {type_}", where=where)
    if type_.shape is None:
        return type_
    if not -len(type_.shape) <= axis < len(type_.shape):
        raise InvalidModelError(f"scan axis {axis} is out of range for {type_}", where=where)
    place = axis % len(type_.shape)
    return type_.with_shape(d for a, d in enumerate(type_.shape) if a != place)


def _scan(
    importer: Importer,
    inputs: list[Value | None],
    attrs: Mapping[str, Any],
    scope: Scope,
    frame: Frame,
    where: str,
) -> Prepared:
    scanned = int(attrs["num_scan_inputs"])
    states = len(inputs) - scanned
    if scanned < 1 or states < 0:
        raise InvalidModelError(f"Scan has {len(inputs)} inputs, {scanned} of them scanned", where=where)
    body_proto: onnx.GraphProto = attrs["body"]
    counts = (scanned, scanned, len(body_proto.output) - states, len(body_proto.output) - states)
    for name, count in zip(_SCAN_LISTS, counts):
        if attrs.get(name) and len(attrs[name]) != count:
            raise InvalidModelError(f"{name} has {len(attrs[name])} elements, expected {count}", where=where)
    axes = attrs.get("scan_input_axes") or (0,) * scanned
    types = _types(inputs, where)
    elements = [_without_axis(t, axis, where) for t, axis in zip(types[states:], axes)]
    body = importer.body(body_proto, [*types[:states], *elements], scope, frame, where)
    lists = {name: attrs[name] for name in _SCAN_LISTS if attrs.get(name)}
    return [*inputs, *body.captures], {
        "body": body.graph,
        "n_state": states,
        "num_scan_inputs": scanned,
        **lists,
    }


def _scan_8(
    importer: Importer,
    inputs: list[Value | None],
    attrs: Mapping[str, Any],
    scope: Scope,
    frame: Frame,
    where: str,
) -> Prepared:
    """Opset 8 scanned axis 1 of batches on axis 0: a Scan over the batch of today's Scan."""
    if inputs and inputs[0] is not None:
        raise InvalidModelError(
            "Scan of opset 8 with sequence lengths is not supported",
            where=where,
            hint="export with opset 9 or later",
        )
    arguments = inputs[1:]
    scanned = int(attrs["num_scan_inputs"])
    states = len(arguments) - scanned
    if scanned < 1 or states < 0:
        raise InvalidModelError(f"Scan has {len(arguments)} inputs, {scanned} of them scanned", where=where)
    proto: onnx.GraphProto = attrs["body"]
    types = [_without_axis(t, 0, where) for t in _types(arguments, where)]
    elements = [_without_axis(t, 0, where) for t in types[states:]]
    inner = importer.body(proto, [*types[:states], *elements], scope, frame, where)
    batch: Graph = scope.graph.subgraph("batch")
    one = [batch.input(f"item{i}", t) for i, t in enumerate(types)]
    captured = [batch.input(v.name, v.type) for v in inner.captures]
    inner_attrs: dict[str, Any] = {"body": inner.graph, "n_state": states, "num_scan_inputs": scanned}
    if attrs.get("directions"):
        inner_attrs["scan_input_directions"] = attrs["directions"]
    outputs = len(proto.output)
    batch.outputs = list(batch.add("Scan", [*one, *captured], inner_attrs, outputs=outputs).outputs)
    return [*arguments, *inner.captures], {"body": batch, "n_state": 0, "num_scan_inputs": len(arguments)}
