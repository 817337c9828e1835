"""Where function bodies come from: the model's own functions, and ONNX's definitions of operators by
operators.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx

from minicc.errors import InvalidModelError
from minicc.frontend.attributes import find_schema
from minicc.frontend.upgrade import OnnxNode
from minicc.ops.host import newest_opset, node_proto, type_proto

FunctionKey = tuple[str, str, str]  # domain, name, overload


class FunctionTable:
    """The functions of a model by domain, name and overload."""

    def __init__(self, functions: Iterable[onnx.FunctionProto]) -> None:
        self._functions: dict[FunctionKey, onnx.FunctionProto] = {}
        for function in functions:
            key = ("" if function.domain == "ai.onnx" else function.domain, function.name, function.overload)
            if key in self._functions:
                raise InvalidModelError(
                    f"function {function.name!r} of domain {function.domain!r} is defined twice"
                )
            self._functions[key] = function

    def find(self, domain: str, name: str, overload: str) -> onnx.FunctionProto | None:
        return self._functions.get((domain, name, overload))


def schema_function(
    node: OnnxNode,
    original: onnx.NodeProto,
    attributes: Mapping[str, onnx.AttributeProto],
) -> onnx.FunctionProto | None:
    """ONNX's own definition of an operator for this node, or None; its attribute references are replaced."""
    opset = newest_opset() if node.domain == "" else node.opset
    schema = find_schema(node.op, node.domain, max(opset, 1))
    if schema is None or schema.deprecated:
        return None
    if node.op == original.op_type and len(node.inputs) <= len(original.input):
        call = onnx.NodeProto()
        call.CopyFrom(original)
        del call.attribute[:]
        call.attribute.extend(attributes.values())
    else:
        names = ["" if v is None else f"x{i}" for i, v in enumerate(node.inputs)]
        attrs = {**node.attrs, "opset": opset, "outputs": node.n_outputs}
        call = node_proto((node.domain, node.op), attrs, names)
    data: bytes = b""
    if schema.has_function:
        versions = [v for v in schema.function_opset_versions if v <= opset]
        data = schema.get_function_with_opset_version(max(versions)) if versions else b""
    elif schema.has_context_dependent_function:
        versions = [v for v in schema.context_dependent_function_opset_versions if v <= opset]
        types = [onnx.TypeProto() if v is None else type_proto(v.type, {}) for v in node.inputs]
        if versions:
            data = schema.get_context_dependent_function_with_opset_version(
                max(versions), call.SerializeToString(), [t.SerializeToString() for t in types]
            )
    body = onnx.FunctionProto.FromString(data)
    return _with_attributes(body, schema, call) if body.node else None


def _with_attributes(
    body: onnx.FunctionProto,
    schema: onnx.defs.OpSchema,
    call: onnx.NodeProto,
) -> onnx.FunctionProto:
    """The body with the call's attributes, and the schema's defaults, as its attribute defaults."""
    given = {a.name for a in call.attribute}
    made = onnx.FunctionProto()
    made.CopyFrom(body)
    del made.attribute_proto[:]
    made.attribute_proto.extend(call.attribute)
    made.attribute_proto.extend(
        a.default_value for name, a in schema.attributes.items() if name not in given and a.default_value.name
    )
    if not made.input:
        made.input.extend(formal.name for formal in schema.inputs)
    if not made.output:
        made.output.extend(formal.name for formal in schema.outputs)
    return made
