"""One operator of com.microsoft: by ONNX Runtime, by our numpy, by its expansion, and compiled."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

import minicc
from tests.ops.onnx_cases import assert_same, check_call
from tests.ops.runtime_oracle import onnx_type, run_onnxruntime

MICROSOFT = "com.microsoft"


def node_model(
    op: str, inputs: Sequence[Any], attrs: dict[str, Any], outputs: int, constants: Collection[int], free: Collection[int]
) -> onnx.ModelProto:
    """A model of one node; inputs at `constants` are initializers, the first axes of those at `free` have any size."""
    names = ["" if x is None else f"x{i}" for i, x in enumerate(inputs)]
    given = [(i, np.asarray(x)) for i, x in enumerate(inputs) if x is not None]
    infos = [
        helper.make_tensor_value_info(f"x{i}", onnx_type(x), ["n", *x.shape[1:]] if i in free else x.shape)
        for i, x in given
        if i not in constants
    ]
    found = [onnx.ValueInfoProto(name=f"y{i}") for i in range(outputs)]
    node = helper.make_node(op, names, [o.name for o in found], domain=MICROSOFT, **attrs)
    fixed = [onnx.numpy_helper.from_array(x, f"x{i}") for i, x in given if i in constants]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(helper.make_graph([node], "one", infos, found, fixed), opset_imports=opsets, ir_version=10)


def compiled(
    op: str, inputs: Sequence[Any], attrs: dict[str, Any], outputs: int = 1, *, constants: Collection[int] = (),
    free: Collection[int] = (), host: Collection[str] = (),
) -> list[Any]:  # fmt: skip
    """What minicc gives; exactly the operators of `host` run there."""
    module = minicc.compile(node_model(op, inputs, attrs, outputs, constants, free), threads=1)
    assert {name for name, _, _ in module.stats()["host_nodes"]} == set(host)
    return module.run(
        None, {f"x{i}": np.asarray(x) for i, x in enumerate(inputs) if x is not None and i not in constants}
    )


def check(
    op: str, inputs: Sequence[Any], attrs: dict[str, Any] | None = None, *, outputs: int = 1, constants: Collection[int] = (),
    free: Collection[int] = (), host: Collection[str] = (), runtime: bool = True, rtol: float = 1e-5, atol: float = 1e-5,
) -> None:  # fmt: skip
    """ONNX Runtime (with `runtime`), numpy, inference and expansion agree, and so does the compiled module."""
    attrs = attrs or {}
    expected: list[Any] | None = None
    if runtime:
        expected = run_onnxruntime(op, inputs, attrs, outputs=outputs, domain=MICROSOFT, constants=list(constants))
    arrays = [None if x is None else np.asarray(x) for x in inputs]
    check_call(op, arrays, attrs, expected, domain=MICROSOFT, rtol=rtol, atol=atol)
    if expected is None:
        expected = by_numpy(op, arrays, attrs)
    ours = compiled(op, inputs, attrs, outputs, constants=constants, free=free, host=host)
    for i, (found, wanted) in enumerate(zip(ours, expected)):
        assert_same(found, wanted, rtol=rtol, atol=atol, what=f"compiled, output {i}")


def by_numpy(op: str, arrays: Sequence[Any], attrs: dict[str, Any]) -> list[Any]:
    """The operator's `eval`."""
    definition = minicc.ir.opdef.get_op(op, MICROSOFT)
    found = definition.eval(*arrays, **{**definition.attrs, **attrs})  # type: ignore[misc]
    return list(found) if isinstance(found, tuple) else [found]
