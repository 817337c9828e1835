"""Operators that minicc does not define itself, run by ONNX's own reference implementation on the host.

`host_op` makes an `OpDef` of kind HOST for any operator of the standard that `onnx.reference` implements,
sequences, optionals, strings and maps included. The node's attributes stay plain data, so that a graph
holding such a node can be written and read again. Nothing here is compiled, and nothing is registered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from minicc.errors import InvalidModelError, UnsupportedOpError
from minicc.ir.dims import Dim
from minicc.ir.opdef import REQUIRED, Inference, Kind, OpDef
from minicc.ir.types import BY_ONNX, DType, OpaqueType, TensorType, Type

if TYPE_CHECKING:
    import onnx

# Constants up to this many elements are shown to ONNX's shape inference.
_SHOWN = 1024


def host_op(domain: str, op_type: str, attrs: Mapping[str, Any]) -> OpDef:
    """The op for one node of an operator minicc has no definition of.

    attrs: the node's attributes as plain data (numbers, strings, tuples, arrays) and two of ours: `opset`,
    the version of the domain, and `outputs`, the number of outputs. Raises UnsupportedOpError when ONNX has
    no implementation.
    """
    schema = _schema(domain, op_type, int(attrs["opset"]))
    if schema is None or not _has_reference(domain, op_type, int(attrs["opset"])):
        raise UnsupportedOpError(f"no implementation of {domain or 'ai.onnx'}.{op_type}")
    deterministic = op_type not in _RANDOM

    def evaluate(*arrays: Any, **attributes: Any) -> tuple[Any, ...]:
        return _run_reference(domain, op_type, arrays, attributes)

    return OpDef(
        name=op_type,
        domain=domain,
        kind=Kind.HOST,
        infer=_infer,
        eval=evaluate,
        deterministic=deterministic,
        attrs={**dict.fromkeys(attrs), "opset": REQUIRED, "outputs": REQUIRED},
    )


_RANDOM = frozenset(
    ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli")
)


def newest_opset() -> int:
    """The opset whose operators the IR speaks."""
    import onnx

    return min(28, int(onnx.defs.onnx_opset_version()))


@lru_cache(maxsize=1024)
def _schema(domain: str, op_type: str, opset: int) -> Any:
    import onnx

    try:
        return onnx.defs.get_schema(op_type, opset, domain)
    except onnx.defs.SchemaError:
        return None


@lru_cache(maxsize=1024)
def _has_reference(domain: str, op_type: str, opset: int) -> bool:
    from onnx.reference.ops import load_op as load_standard
    from onnx.reference.ops.aionnx_preview_training import load_op as load_training
    from onnx.reference.ops.aionnxml import load_op as load_ml

    loader = {"": load_standard, "ai.onnx.ml": load_ml, "ai.onnx.preview.training": load_training}.get(domain)
    if loader is None:
        return False
    try:
        loader(domain, op_type, opset)
    except Exception:  # whatever onnx raises for "none": the answer is no
        return False
    return True


def node_proto(
    op: OpDef | tuple[str, str], attrs: Mapping[str, Any], inputs: Sequence[str]
) -> onnx.NodeProto:
    from onnx import AttributeProto, helper, numpy_helper

    domain, name = (op.domain, op.name) if isinstance(op, OpDef) else op
    schema = _schema(domain, name, int(attrs["opset"]))
    node = helper.make_node(name, inputs, [f"y{i}" for i in range(attrs["outputs"])], domain=domain)
    for key, value in attrs.items():
        if key in ("opset", "outputs") or value is None:
            continue
        kind = schema.attributes[key].type.value if schema is not None and key in schema.attributes else None
        if isinstance(value, np.ndarray):
            value = numpy_helper.from_array(value)
        elif isinstance(value, tuple):
            value = [numpy_helper.from_array(v) if isinstance(v, np.ndarray) else v for v in value]
        elif kind == AttributeProto.TYPE_PROTO:
            value = opaque_type_proto(value)
        node.attribute.append(helper.make_attribute(key, value, attr_type=kind))
    return node


def _model(
    node: onnx.NodeProto, opset: int, inputs: Sequence[Any], initializers: Sequence[Any] = ()
) -> onnx.ModelProto:
    from onnx import helper

    outputs = [helper.make_empty_tensor_value_info(name) for name in node.output]
    graph = helper.make_graph([node], "host", inputs, outputs, initializer=list(initializers))
    opsets = [helper.make_opsetid(node.domain, opset)]
    if node.domain:
        opsets.append(helper.make_opsetid("", newest_opset()))
    return helper.make_model(graph, opset_imports=opsets)


@lru_cache(maxsize=256)
def _evaluator(node_bytes: bytes, opset: int) -> Any:
    from onnx import NodeProto, helper
    from onnx.reference import ReferenceEvaluator

    node = NodeProto.FromString(node_bytes)
    inputs = [helper.make_empty_tensor_value_info(name) for name in node.input if name]
    return ReferenceEvaluator(_model(node, opset, inputs))


def _run_reference(
    domain: str, op_type: str, arrays: Sequence[Any], attrs: Mapping[str, Any]
) -> tuple[Any, ...]:
    names = ["" if a is None and not _takes_empty(op_type) else f"x{i}" for i, a in enumerate(arrays)]
    node = node_proto((domain, op_type), attrs, names)
    evaluator = _evaluator(node.SerializeToString(deterministic=True), int(attrs["opset"]))
    return tuple(evaluator.run(None, {n: a for n, a in zip(names, arrays) if n}))


def _takes_empty(op_type: str) -> bool:
    """Operators for which None is an empty optional rather than a left-out input."""
    return op_type.startswith("Optional")


def _infer(n: Inference) -> list[Type]:
    """Types by onnx.shape_inference on a one-node model; sizes it cannot tell become fresh symbols."""
    import onnx
    from onnx import numpy_helper

    symbols: dict[str, Dim] = {}
    names, infos, constants = [], [], []
    for i, value in enumerate(n.inputs):
        names.append("" if value is None else f"x{i}")
        if value is None:
            continue
        info = onnx.ValueInfoProto(name=f"x{i}")
        info.type.CopyFrom(type_proto(value.type, symbols))
        infos.append(info)
        data = value.data
        if data is None and n.integers(i) is not None and isinstance(value.type, TensorType):
            data = np.array(n.integers(i), dtype=value.type.dtype.numpy).reshape(value.type.dims)
        if data is not None and data.size <= _SHOWN and data.dtype != object:
            constants.append(numpy_helper.from_array(np.asarray(data, order="C"), f"x{i}"))
    opset = int(n.attr("opset"))
    node = node_proto(n.op, n.attrs, names)
    model = _model(node, opset, infos, constants)
    try:
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        found = {output.name: output.type for output in inferred.graph.output}
    except Exception as error:  # onnx raises many kinds; its text says what does not fit
        raise n.error(str(error).strip().splitlines()[0] if str(error) else type(error).__name__) from error
    return [_found_type(n, i, found.get(f"y{i}"), symbols) for i in range(n.n_outputs)]


def _found_type(n: Inference, index: int, proto: Any, symbols: Mapping[str, Dim]) -> Type:
    kind = proto.WhichOneof("value") if proto is not None else None
    if kind in ("sequence_type", "optional_type", "map_type", "sparse_tensor_type"):
        return OpaqueType(type_text(proto))
    if kind != "tensor_type" or not proto.tensor_type.elem_type:
        return _declared_type(n, index)
    dtype = dtype_of_number(proto.tensor_type.elem_type)
    if not proto.tensor_type.HasField("shape"):
        return TensorType(dtype, None)
    dims: list[Dim] = []
    for dim in proto.tensor_type.shape.dim:
        if dim.HasField("dim_value"):
            dims.append(dim.dim_value)
        else:
            dims.append(symbols[dim.dim_param] if dim.dim_param in symbols else n.fresh("d"))
    return TensorType(dtype, tuple(dims))


def _declared_type(n: Inference, index: int) -> Type:
    """The output type the operator's schema implies, of unknown rank."""
    schema = _schema(n.op.domain, n.op.name, int(n.attr("opset")))
    declared = schema.outputs[min(index, len(schema.outputs) - 1)].type_str
    for i, formal in enumerate(schema.inputs):
        if formal.type_str == declared and n.has(i):
            found = n.value(i).type
            return TensorType(found.dtype, None) if isinstance(found, TensorType) else found
    allowed = [c.allowed_type_strs for c in schema.type_constraints if c.type_param_str == declared]
    texts = allowed[0] if allowed else [declared]
    if len(texts) != 1:
        raise n.error(f"the type of output {index} cannot be told")
    return parse_type_text(texts[0])


def dtype_of_number(number: int) -> DType:
    """The element type of an ONNX TensorProto.DataType number. Raises InvalidModelError."""
    from onnx import TensorProto

    try:
        return BY_ONNX[TensorProto.DataType.Name(number)]
    except (KeyError, ValueError):
        raise InvalidModelError(f"{number} is not a tensor element type") from None


def number_of_dtype(dtype: DType) -> int:
    """The ONNX TensorProto.DataType number of an element type."""
    from onnx import TensorProto

    return int(TensorProto.DataType.Value(dtype.onnx))


def type_proto(type_: Type, symbols: dict[str, Dim]) -> onnx.TypeProto:
    """An ONNX type; symbolic dimensions become parameters, remembered in `symbols`."""
    from onnx import TypeProto

    if isinstance(type_, OpaqueType):
        return opaque_type_proto(type_.text)
    proto = TypeProto()
    proto.tensor_type.elem_type = number_of_dtype(type_.dtype)
    if type_.shape is not None:
        proto.tensor_type.shape.SetInParent()
        for dim in type_.shape:
            field = proto.tensor_type.shape.dim.add()
            if isinstance(dim, int):
                field.dim_value = dim
            else:
                field.dim_param = f"s_{dim}"
                symbols[f"s_{dim}"] = dim
    return proto


def type_text(proto: onnx.TypeProto) -> str:
    """ONNX's text of a type, as `seq(tensor(float))`.

    Raises InvalidModelError for an unset type or absurd nesting.
    """
    closing = ""
    text = ""
    for _ in range(16):
        kind = proto.WhichOneof("value")
        if kind in ("tensor_type", "sparse_tensor_type"):
            name = "tensor" if kind == "tensor_type" else "sparse_tensor"
            return f"{text}{name}({_dtype_text(dtype_of_number(getattr(proto, kind).elem_type))}){closing}"
        if kind == "sequence_type":
            text, proto = text + "seq(", proto.sequence_type.elem_type
        elif kind == "optional_type":
            text, proto = text + "optional(", proto.optional_type.elem_type
        elif kind == "map_type":
            key = _dtype_text(dtype_of_number(proto.map_type.key_type))
            text, proto = f"{text}map({key},", proto.map_type.value_type
        else:
            break
        closing += ")"
    raise InvalidModelError("a value has no type, or one nested too deeply", why=f"so far: {text}")


def opaque_type_proto(text: str) -> onnx.TypeProto:
    """The ONNX type of a text made by `type_text`."""
    from onnx import TypeProto

    root = TypeProto()
    proto, rest = root, text.replace(" ", "")
    while not rest.startswith(("tensor(", "sparse_tensor(")):
        head, _, rest = rest.partition("(")
        if head == "seq":
            proto = proto.sequence_type.elem_type
        elif head == "optional":
            proto = proto.optional_type.elem_type
        elif head == "map":
            key, _, rest = rest.partition(",")
            proto.map_type.key_type = number_of_dtype(_dtype_of_text(key))
            proto = proto.map_type.value_type
        else:
            raise InvalidModelError(f"{text!r} is not a type")
    head, _, rest = rest.partition("(")
    field = proto.tensor_type if head == "tensor" else proto.sparse_tensor_type
    field.elem_type = number_of_dtype(_dtype_of_text(rest.partition(")")[0]))
    return root


def parse_type_text(text: str) -> Type:
    """The type of an ONNX type text; tensors have unknown rank."""
    if text.startswith("tensor("):
        return TensorType(_dtype_of_text(text[len("tensor(") : -1]), None)
    return OpaqueType(text)


def _dtype_text(dtype: DType) -> str:
    return dtype.onnx.lower()


def _dtype_of_text(text: str) -> DType:
    try:
        return BY_ONNX[text.upper()]
    except KeyError:
        raise InvalidModelError(f"{text!r} is not an element type") from None
