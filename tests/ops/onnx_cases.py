"""ONNX's own node cases as calls of our ops, and the checks every such call goes through.

Only cases with one node on tensors that use the newest version of their operator are collected: older forms
are the frontend's business, sequences the host tier's.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx

import minicc.ops  # noqa: F401  registers the ops
from minicc.ir.dims import evaluate as evaluate_dim
from minicc.ir.evaluate import evaluate
from minicc.ir.graph import Builder, Graph
from minicc.ir.opdef import Kind, get_op
from minicc.ir.types import TensorType
from tests.expr_interpreter import make_node, run_compute


@dataclass(frozen=True)
class Case:
    """One call: arrays in (None for a missing input) and expected arrays out (None for an unused output)."""

    name: str
    op: str
    domain: str
    attrs: dict[str, Any]
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    rtol: float
    atol: float


@cache
def all_cases() -> tuple[Case, ...]:
    """Every usable case, in ONNX's order."""
    import onnx.backend.test.case.node as node_cases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collected = node_cases.collect_testcases(None)
    return tuple(case for c in collected if (case := _usable(c)) is not None)


def cases_of(*ops: str) -> list[Case]:
    """The cases of some operators; every operator named must have at least one."""
    found = [c for c in all_cases() if c.op in ops]
    missing = set(ops) - {c.op for c in found}
    assert not missing, f"ONNX has no case for {missing}"
    return found


def _usable(test: Any) -> Case | None:
    graph = test.model.graph
    if len(graph.node) != 1 or graph.initializer:
        return None
    node = graph.node[0]
    version = next((o.version for o in test.model.opset_import if o.domain == node.domain), None)
    newest = onnx.defs.get_schema(node.op_type, node.domain)
    if (
        version is None
        or onnx.defs.get_schema(node.op_type, version, node.domain).since_version < newest.since_version
    ):
        return None
    inputs, outputs = test.data_sets[0]
    if any(isinstance(item, list) for item in (*inputs, *outputs)):
        return None
    given = dict(zip((v.name for v in graph.input), inputs))
    expected = dict(zip((v.name for v in graph.output), outputs))
    return Case(
        test.name, node.op_type, node.domain, {a.name: _attribute(a) for a in node.attribute},
        tuple(_array(given.get(name)) for name in node.input),
        tuple(_array(expected.get(name)) for name in node.output),
        test.rtol, test.atol,
    )  # fmt: skip


def _array(item: Any) -> Any:
    if item is None:
        return None
    array = onnx.numpy_helper.to_array(item) if isinstance(item, onnx.TensorProto) else np.asarray(item)
    return array.astype(object) if array.dtype.kind in "US" else array


def _attribute(proto: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(proto)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value)
    if isinstance(value, list):
        return tuple(v.decode() if isinstance(v, bytes) else v for v in value)
    return value


def assert_same(
    actual: Any, expected: Any, *, rtol: float = 1e-5, atol: float = 1e-6, what: str = ""
) -> None:
    """Equal type and shape, values close (exact unless float), NaN equal to NaN."""
    actual = np.asarray(actual)
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} instead of {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {actual.shape} instead of {expected.shape}"
    if expected.dtype.kind in "biuOSU":
        np.testing.assert_array_equal(actual, expected, err_msg=what)
    elif expected.dtype.itemsize == 1:  # 8-bit floats, compared by their bits except for the kind of NaN
        np.testing.assert_array_equal(actual.astype(np.float32), expected.astype(np.float32), err_msg=what)
    else:
        wide = np.complex128 if expected.dtype.kind == "c" else np.float64
        half = expected.dtype.itemsize == 2
        rtol, atol = (max(rtol, 1e-2), max(atol, 1e-3)) if half else (rtol, atol)
        np.testing.assert_allclose(
            actual.astype(wide), expected.astype(wide), rtol=rtol, atol=atol, err_msg=what
        )


def check_case(case: Case) -> None:
    """Everything an op says about a case agrees with ONNX: eval, infer, propagate, compute or expand."""
    check_call(
        case.op, case.inputs, case.attrs, case.outputs, domain=case.domain, rtol=case.rtol, atol=case.atol
    )


def check_call(op: str, inputs: Any, attrs: dict[str, Any], expected: Any, *, domain: str = "",
rtol: float = 1e-5,
               atol: float = 1e-6) -> None:  # fmt: skip
    """As check_case, for a call of our own; `expected` None means whatever eval gives."""
    tolerances = {"rtol": rtol, "atol": atol}
    definition = get_op(op, domain)
    full = {**definition.attrs, **attrs}
    result = definition.eval(*inputs, **full)
    results = result if isinstance(result, tuple) else (result,)
    if expected is None:
        expected = results
    for i, array in enumerate(expected):
        if array is not None:
            assert_same(results[i], array, what=f"eval, output {i}", **tolerances)
    node, _ = make_node(op, inputs, attrs, outputs=len(expected), domain=domain)
    sizes = check_inferred(node, expected)
    check_content(op, inputs, attrs, expected, domain)
    if definition.refuse is not None and definition.refuse(node) is not None:
        return
    if definition.kind in (Kind.POINTWISE, Kind.INDEX, Kind.REDUCE, Kind.CONTRACT):
        for i, array in enumerate(run_compute(node, inputs, sizes)):
            if expected[i] is not None:
                assert_same(array, expected[i], what=f"compute, output {i}", **tolerances)
    elif definition.kind is Kind.EXPAND:
        check_expansion(op, inputs, attrs, expected, domain, **tolerances)


def check_inferred(node: Any, expected: Any) -> dict[str, int]:
    """Inferred types fit the expected arrays; returns the sizes of fresh symbols."""
    sizes: dict[str, int] = {}
    for value, array in zip(node.outputs, expected):
        if array is None:
            continue
        assert isinstance(value.type, TensorType), value.type
        assert value.type.dtype.numpy == array.dtype, f"infer: {value.type} for {array.dtype}"
        assert value.type.shape is not None and len(value.type.shape) == array.ndim, (
            f"infer: {value.type} for {array.shape}"
        )
        for dim, size in zip(value.type.shape, array.shape):
            if isinstance(dim, int):
                assert dim == size, f"infer: {value.type} for {array.shape}"
            elif str(dim) in node.symbols:
                assert sizes.setdefault(str(dim), size) == size
        for dim, size in zip(value.type.shape, array.shape):
            assert evaluate_dim(dim, sizes) == size
    return sizes


def check_content(op: str, inputs: Any, attrs: dict[str, Any], expected: Any, domain: str) -> None:
    """With all inputs constant, what propagate claims to know is true."""
    node, _ = make_node(op, inputs, attrs, outputs=len(expected), domain=domain, constants=range(len(inputs)))
    for value, array in zip(node.outputs, expected):
        if value.content is not None and array is not None:
            assert value.content.shape == array.shape
            np.testing.assert_allclose(
                value.content.astype(np.float64), array.astype(np.float64), rtol=1e-5, atol=1e-6
            )


def check_expansion(op: str, inputs: Any, attrs: dict[str, Any], expected: Any, domain: str, *, rtol: float,
                    atol: float) -> None:  # fmt: skip
    """The smaller ops an op expands to compute the same, one level deep."""
    node, graph = make_node(op, inputs, attrs, outputs=len(expected), domain=domain)
    assert isinstance(graph, Graph)
    feeds = [array for i, array in enumerate(inputs) if array is not None and not node.inputs[i].is_constant]
    values = list(node.op.expand(Builder(graph), node))
    graph.outputs = [v for v, array in zip(values, expected) if array is not None]
    graph.tidy()
    wanted = [array for array in expected if array is not None]
    for i, (array, want) in enumerate(zip(evaluate(graph, feeds), wanted)):
        assert_same(array, want, rtol=rtol, atol=atol, what=f"expand, output {i}")
    for value, want in zip(graph.outputs, wanted):
        assert value.tensor.rank == want.ndim
