"""AttributeProto to plain data, and the check of a node against the operator's ONNX schema.

Numbers stay numbers, strings are decoded, lists become tuples, tensors arrays, types their ONNX text;
graphs stay GraphProto for the importer. Defaults are not filled in: that is the op definitions' business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import onnx
from onnx import AttributeProto
from onnx.defs import OpSchema

from minicc.errors import InvalidModelError
from minicc.frontend.tensors import TensorReader
from minicc.ops.host import type_text


def resolve_references(
    attributes: Iterable[AttributeProto],
    values: Mapping[str, AttributeProto],
    where: str,
) -> dict[str, AttributeProto]:
    """A node's attributes by name, references to the enclosing function's attributes replaced by their
    values.

    A reference to an attribute that the call left out is left out too. Raises InvalidModelError for a
    repeated name.
    """
    found: dict[str, AttributeProto] = {}
    for attribute in attributes:
        if not isinstance(attribute.name, str):
            raise InvalidModelError("the name of an attribute is no UTF-8 text", where=where)
        if attribute.name in found:
            raise InvalidModelError(f"attribute {attribute.name!r} is given twice", where=where)
        if attribute.ref_attr_name:
            source = values.get(attribute.ref_attr_name)
            if source is None:
                continue
            if source.name != attribute.name:
                renamed = AttributeProto()
                renamed.CopyFrom(source)
                renamed.name = attribute.name
                source = renamed
            attribute = source
        found[attribute.name] = attribute
    return found


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def plain(attribute: AttributeProto, tensors: TensorReader, where: str) -> Any:
    """The value of an attribute. Raises InvalidModelError for one without a type or with the wrong field
    set.
    """
    kind = attribute.type
    name = attribute.name
    single: dict[int, tuple[str, Callable[[Any], Any]]] = {
        AttributeProto.FLOAT: ("f", float),
        AttributeProto.INT: ("i", int),
        AttributeProto.STRING: ("s", _text),
        AttributeProto.TENSOR: ("t", lambda t: tensors.read(t, name)),
        AttributeProto.GRAPH: ("g", lambda g: g),
        AttributeProto.SPARSE_TENSOR: ("sparse_tensor", lambda t: tensors.read_sparse(t, name)),
        AttributeProto.TYPE_PROTO: ("tp", type_text),
    }
    many: dict[int, tuple[str, Callable[[Any], Any]]] = {
        AttributeProto.FLOATS: ("floats", float),
        AttributeProto.INTS: ("ints", int),
        AttributeProto.STRINGS: ("strings", _text),
        AttributeProto.TENSORS: ("tensors", lambda t: tensors.read(t, name)),
        AttributeProto.GRAPHS: ("graphs", lambda g: g),
        AttributeProto.SPARSE_TENSORS: ("sparse_tensors", lambda t: tensors.read_sparse(t, name)),
        AttributeProto.TYPE_PROTOS: ("type_protos", type_text),
    }
    if kind in single:
        field, convert = single[kind]
        if field in ("t", "g", "sparse_tensor", "tp") and not attribute.HasField(field):
            raise InvalidModelError(f"attribute {name!r} has no value", where=where)
        return convert(getattr(attribute, field))
    if kind in many:
        field, convert = many[kind]
        return tuple(convert(item) for item in getattr(attribute, field))
    raise InvalidModelError(f"attribute {name!r} has no known type", where=where)


@lru_cache(maxsize=4096)
def find_schema(op: str, domain: str, opset: int) -> OpSchema | None:
    """ONNX's schema of an operator in an opset, or None."""
    try:
        return onnx.defs.get_schema(op, opset, domain)
    except onnx.defs.SchemaError:
        return None


def check_node(
    schema: OpSchema, node: onnx.NodeProto, attributes: Mapping[str, AttributeProto], where: str
) -> None:
    """Arity, attribute names and attribute types. Raises InvalidModelError."""
    present = len(node.input)
    if not schema.min_input <= present <= schema.max_input:
        raise InvalidModelError(
            f"{node.op_type} takes {_range(schema.min_input, schema.max_input)} inputs, has {present}",
            where=where,
        )
    if not schema.min_output <= len(node.output) <= schema.max_output:
        raise InvalidModelError(
            f"{node.op_type} has {_range(schema.min_output, schema.max_output)} outputs, "
            f"{len(node.output)} are named",
            where=where,
        )
    for name, attribute in attributes.items():
        expected = schema.attributes.get(name)
        if expected is None:
            known = ", ".join(sorted(schema.attributes)) or "none"
            raise InvalidModelError(
                f"{node.op_type} has no attribute {name!r} in opset {schema.since_version}",
                where=where,
                hint=f"known: {known}",
            )
        if attribute.type != expected.type.value:
            given = (
                AttributeProto.AttributeType.Name(attribute.type)
                if attribute.type <= 14
                else str(attribute.type)
            )
            raise InvalidModelError(
                f"attribute {name!r} of {node.op_type} must be of type {expected.type.name}, it is {given}",
                where=where,
            )
    for name, expected in schema.attributes.items():
        if expected.required and name not in attributes:
            raise InvalidModelError(f"{node.op_type} needs attribute {name!r}", where=where)


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"at least {low}" if high >= 1 << 30 else f"{low} to {high}"


def default_of(schema: OpSchema | None, name: str) -> Any:
    """The default of an attribute as plain data, or None."""
    if schema is None or name not in schema.attributes:
        return None
    value = schema.attributes[name].default_value
    if value.type in (AttributeProto.FLOAT, AttributeProto.INT, AttributeProto.STRING):
        found = onnx.helper.get_attribute_value(value)
        return _text(found) if isinstance(found, bytes) else found
    if value.type in (AttributeProto.FLOATS, AttributeProto.INTS):
        return tuple(onnx.helper.get_attribute_value(value))
    return None
