"""From a graph to something callable, without the frontend and the passes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import minicc.ops  # noqa: F401  registers the ops
from minicc.ir.dims import Dim, symbol
from minicc.ir.graph import Graph, Node
from minicc.ir.opdef import get_op
from minicc.ir.types import TensorType, dtype_of
from minicc.lower.context import Choices
from minicc.lower.lower import lower
from minicc.lower.program import HostStep, Program
from minicc.lower.serialize import from_data, to_data
from minicc.options import Options
from minicc.runtime.code import build_code
from minicc.runtime.module import CompiledModule
from minicc.runtime.store import Store
from minicc.targets.cpu import host_target

Array = np.ndarray[Any, Any]


def compile_graph(graph: Graph, choices: Choices | None = None, **options: Any) -> CompiledModule:
    """The module of a graph as it is. choices: which ways to go where lowering has several."""
    chosen = Options.from_env().override(**options)
    target = host_target()
    program = saved_and_loaded(lower(graph, target, chosen, choices=choices))
    code = build_code(program.kernels, target, Store(chosen.store_dir))
    return CompiledModule(program, code, target, chosen)


def saved_and_loaded(program: Program) -> Program:
    """The program as a file would give it back: whatever lowering makes can be saved."""
    data, arrays = to_data(program)
    return from_data(json.loads(json.dumps(data)), lambda number, *_: arrays[number])


def host_ops(module: CompiledModule) -> list[tuple[str, str]]:
    """(op, reason) of the nodes that numpy runs."""
    return [(step.op, step.reason) for step in module.program.steps if isinstance(step, HostStep)]


def add_call(
    graph: Graph,
    op: str,
    arrays: Sequence[Array | None],
    attrs: Mapping[str, Any] | None = None,
    *,
    outputs: int = 1,
    domain: str = "",
    symbolic: bool = False,
) -> tuple[Node, list[Array]]:
    """Add a node on new graph inputs (static inputs become constants); (node, arrays of the new inputs).

    symbolic: sizes above 1 become symbols, equal sizes of this call the same one.
    """
    definition = get_op(op, domain)
    values, fed = [], []
    for position, array in enumerate(arrays):
        if array is None:
            values.append(None)
        elif position in definition.static_inputs:
            values.append(graph.constant(array))
        else:
            type_ = TensorType(dtype_of(array.dtype), _dims(graph, array.shape, symbolic))
            values.append(graph.input(f"x{len(graph.inputs)}", type_))
            fed.append(array)
    node = graph.add(definition, values, attrs or {}, outputs=outputs)
    graph.outputs += node.outputs
    return node, fed


def _dims(graph: Graph, shape: tuple[int, ...], symbolic: bool) -> tuple[Dim, ...]:
    return tuple(symbol(f"s{len(graph.nodes)}_{size}") if symbolic and size > 1 else size for size in shape)


def run_call(
    op: str,
    arrays: Sequence[Array | None],
    attrs: Mapping[str, Any] | None = None,
    *,
    outputs: int = 1,
    domain: str = "",
    symbolic: bool = False,
    **options: Any,
) -> list[Array]:
    """The results of one node, which must not be left to the host."""
    graph = Graph()
    _, fed = add_call(graph, op, arrays, attrs, outputs=outputs, domain=domain, symbolic=symbolic)
    module = compile_graph(graph, **options)
    assert not host_ops(module), host_ops(module)
    return list(module.run_items(fed))


def expected(
    op: str, arrays: Sequence[Array | None], attrs: Mapping[str, Any] | None = None, domain: str = ""
) -> tuple[Array, ...]:
    """The results of the op's `eval`."""
    definition = get_op(op, domain)
    result = definition.eval(*arrays, **{**definition.attrs, **(attrs or {})})
    return result if isinstance(result, tuple) else (result,)
