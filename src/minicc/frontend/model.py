"""`load_model`: a path, bytes or a ModelProto becomes an `ImportedModel`, a graph and what the file says
about itself.

Whatever the input, the outcome is a graph or a MiniccError.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import onnx

import minicc.ops  # noqa: F401  registers the operators
from minicc.errors import InputError, InvalidModelError, MiniccError, ResourceLimitError
from minicc.frontend.functions import FunctionTable
from minicc.frontend.importer import Frame, Importer, Scope
from minicc.frontend.reader import check_opsets, open_model, opset_versions
from minicc.frontend.tensors import TensorReader
from minicc.ir.dims import Dim, bare_symbol, substitute, symbol
from minicc.ir.graph import Graph, Value
from minicc.ir.types import OpaqueType, TensorType, Type
from minicc.ops.host import dtype_of_number, newest_opset, type_text
from minicc.options import Options

_MAX_RANK = 64
_MAX_WARNINGS = 20


@dataclass(frozen=True)
class Argument:
    """An input or output of a model: its name and type."""

    name: str
    type: Type

    def __str__(self) -> str:
        return f"{self.name}: {self.type}"


@dataclass(frozen=True)
class ImportedModel:
    """A model's graph and what its file says.

    inputs, outputs: in the model's order; output types are the inferred ones. `graph.inputs` has the same
    order. opset, opsets:   version of ai.onnx, and of every domain. warnings:        annotations of the
    file that its own nodes contradict, in words. external: locations of external data, relative to the model's folder.
    """

    graph: Graph
    name: str
    inputs: tuple[Argument, ...]
    outputs: tuple[Argument, ...]
    opset: int
    opsets: Mapping[str, int]
    ir_version: int
    producer: str
    metadata: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    external: tuple[str, ...] = ()


def load_model(
    source: str | os.PathLike[str] | bytes | onnx.ModelProto,
    options: Options | None = None,
    *,
    base_dir: str | os.PathLike[str] | None = None,
) -> ImportedModel:
    """Import an ONNX model of opset 6 to 28, or older where its operators did not change until 6.

    base_dir: folder of external data for bytes and ModelProto (a path has its own). Raises InvalidModelError,
    UnsupportedOpError (all unknown operators at once), ShapeError, ResourceLimitError, InputError for options.dims
    that are not the model's; nothing else.
    """
    options = options or Options()
    try:
        with open_model(source, base_dir) as file:
            tensors = TensorReader(file.base_dir, options.max_bytes, file.own)
            return _import(file.proto, tensors, file.name, options)
    except MiniccError:
        raise
    except MemoryError as error:
        raise ResourceLimitError("not enough memory to import the model") from error
    except RecursionError as error:
        raise ResourceLimitError("the model is nested too deeply") from error
    except Exception as error:  # the promise above; the cause is kept for whoever looks into it
        raise InvalidModelError(f"the model cannot be imported ({type(error).__name__}: {error})") from error


def _import(proto: onnx.ModelProto, tensors: TensorReader, name: str, options: Options) -> ImportedModel:
    opsets = opset_versions(proto.opset_import, name)
    functions = FunctionTable(proto.functions)
    for function in proto.functions:
        check_opsets(
            opset_versions(function.opset_import, f"function {function.name}") or opsets, function.name
        )
    importer = Importer(tensors, functions, options.max_bytes)
    graph = Graph(proto.graph.name or "main", count(_first_free(proto.graph)))
    scope = Scope(graph)
    importer.constants(proto.graph, scope, "the graph")
    arguments = _inputs(proto.graph, scope, options.dims)
    try:
        importer.nodes(proto.graph, scope, Frame(opsets), "the graph")
    except MiniccError:
        if importer.unsupported:
            raise importer.unsupported.error(name) from None
        raise
    if importer.unsupported:
        raise importer.unsupported.error(name)
    graph.tidy()
    outputs = tuple(Argument(o.name, v.type) for o, v in zip(proto.graph.output, graph.outputs))
    return ImportedModel(
        graph=graph,
        name=name,
        inputs=arguments,
        outputs=outputs,
        opset=opsets.get("", newest_opset()),
        opsets=opsets,
        ir_version=proto.ir_version,
        producer=f"{proto.producer_name} {proto.producer_version}".strip(),
        metadata={p.key: p.value for p in proto.metadata_props},
        warnings=tuple(_disagreements(proto.graph, scope.names)),
        external=tuple(tensors.files),
    )


def _first_free(graph: onnx.GraphProto) -> int:
    """A number from which fresh names cannot meet the model's own symbols, which may end in numbers."""
    numbers = [0]
    for info in graph.input:
        for dim in info.type.tensor_type.shape.dim:
            match = re.search(r"(\d{1,12})$", dim.dim_param)
            if match:
                numbers.append(int(match.group(1)) + 1)
    return max(numbers)


def _inputs(graph: onnx.GraphProto, scope: Scope, sizes: Mapping[str, int]) -> tuple[Argument, ...]:
    """Declare the graph's inputs, some of their dimensions given sizes; those with an initializer are constants and no inputs."""
    infos = [info for info in graph.input if info.name not in scope.names]
    params = {d.dim_param for info in infos for d in info.type.tensor_type.shape.dim}
    names = _identifiers(p for p in params if re.search(r"\w", p))  # "?" stands for unknown, not for a name
    taken = set(names.values())
    types = [declared_type(info, names, taken) for info in infos]
    if sizes:
        types = _with_sizes(types, sizes, names)
    found = []
    for info, type_ in zip(infos, types):
        if not info.name or info.name in scope.names:
            raise InvalidModelError(f"the graph's input {info.name!r} has no name, or one that is taken")
        scope.names[info.name] = scope.graph.input(info.name, type_)
        found.append(Argument(info.name, type_))
    return tuple(found)


def _with_sizes(types: Sequence[Type], sizes: Mapping[str, int], names: Mapping[str, str]) -> list[Type]:
    """Input types whose dimensions of these names have these sizes. names: of dimensions in the model, and what we call them.

    Raises InputError for other names, and for two sizes of one dimension.
    """
    own = {name: None for type_ in types if isinstance(type_, TensorType) for d in type_.shape or () if (name := bare_symbol(d))}
    fixed: dict[str, int] = {}
    for name, size in sizes.items():
        ours = names.get(name, name)
        if ours not in own:
            close = difflib.get_close_matches(ours, own, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            known = f"they have {', '.join(own)}" if own else "all their sizes are known"
            raise InputError(f"the model's inputs have no dimension {name!r}", hint=hint + known)
        if fixed.setdefault(ours, size) != size:
            raise InputError(f"dimension {ours!r} is given two sizes, {fixed[ours]} and {size}")
    return [
        TensorType(t.dtype, tuple(substitute(d, fixed) for d in t.shape)) if isinstance(t, TensorType) and t.shape else t
        for t in types
    ]


def _identifiers(params: Iterable[str]) -> dict[str, str]:
    """Dimension parameters as identifiers, different ones for different parameters."""
    names: dict[str, str] = {}
    used: set[str] = set()
    for param in sorted(params, key=lambda p: (not p.isidentifier(), p)):
        name = re.sub(r"\W+", "_", param).strip("_") if not param.isidentifier() else param
        name = name if name.isidentifier() else f"dim_{name}"
        while name in used:
            name += "_"
        used.add(name)
        names[param] = name
    return names


def declared_type(info: onnx.ValueInfoProto, names: Mapping[str, str], taken: set[str]) -> Type:
    """A declared type; an unnamed unknown size is `<value>_d<axis>`. Raises InvalidModelError."""
    kind = info.type.WhichOneof("value")
    if kind is None:
        raise InvalidModelError(f"input {info.name!r} has no type")
    if kind != "tensor_type":
        return OpaqueType(type_text(info.type))
    tensor = info.type.tensor_type
    dtype = dtype_of_number(tensor.elem_type)
    if not tensor.HasField("shape"):
        return TensorType(dtype, None)
    if len(tensor.shape.dim) > _MAX_RANK:
        raise InvalidModelError(
            f"input {info.name!r} has rank {len(tensor.shape.dim)}, the limit is {_MAX_RANK}"
        )
    dims: list[Dim] = []
    for axis, dim in enumerate(tensor.shape.dim):
        if dim.HasField("dim_value") and dim.dim_value != -1:  # some exporters write -1 for unknown
            if dim.dim_value < 0:
                raise InvalidModelError(
                    f"input {info.name!r} has a negative size on axis {axis}: {dim.dim_value}"
                )
            dims.append(dim.dim_value)
        elif dim.dim_param in names:
            dims.append(symbol(names[dim.dim_param]))
        else:
            name = re.sub(r"\W+", "_", f"{info.name}_d{axis}")
            while name in taken:
                name += "_"
            taken.add(name)
            dims.append(symbol(name))
    return TensorType(dtype, tuple(dims))


def _disagreements(graph: onnx.GraphProto, names: Mapping[str, Value | None]) -> Iterable[str]:
    """Annotations of values and outputs that contradict the inferred types."""
    told = 0
    for info in [*graph.value_info, *graph.output]:
        value = names.get(info.name)
        if value is None or value.producer is None or not isinstance(value.type, TensorType):
            continue
        tensor = info.type.tensor_type
        if info.type.WhichOneof("value") != "tensor_type" or not tensor.elem_type:
            continue
        inferred = value.type.shape
        declared = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
        wrong = dtype_of_number(tensor.elem_type) != value.type.dtype
        if inferred is not None and tensor.HasField("shape"):
            wrong = (
                wrong
                or len(inferred) != len(declared)
                or any(
                    isinstance(a, int) and b is not None and b >= 0 and a != b
                    for a, b in zip(inferred, declared)
                )
            )
        if wrong:
            told += 1
            if told <= _MAX_WARNINGS:
                sizes = ",".join("?" if d is None else str(d) for d in declared)
                yield f"value {info.name!r} is declared [{sizes}] and is {value.type}: declaration ignored"
