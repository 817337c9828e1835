"""One operator of ai.onnx.ml: by ONNX Runtime, by our numpy, and compiled."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper

import minicc
from minicc.ir.opdef import get_op

Array = np.ndarray[Any, Any]


def node_model(op: str, inputs: list[Array], outputs: int, opset: int = 3, **attrs: Any) -> onnx.ModelProto:
    """A model of one node whose inputs have any number of rows."""
    shapes = [[f"n{i}", *x.shape[1:]] if x.ndim else [] for i, x in enumerate(inputs)]
    infos = [
        helper.make_tensor_value_info(f"x{i}", helper.np_dtype_to_tensor_dtype(x.dtype), shape)
        for i, (x, shape) in enumerate(zip(inputs, shapes))
    ]
    found = [onnx.ValueInfoProto(name=f"y{i}") for i in range(outputs)]
    node = helper.make_node(op, [i.name for i in infos], [o.name for o in found], domain="ai.onnx.ml", **attrs)
    graph = helper.make_graph([node], "classical", infos, found)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx.ml", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def by_onnxruntime(model: onnx.ModelProto, inputs: list[Array]) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {f"x{i}": x for i, x in enumerate(inputs)}))


def by_numpy(op: str, inputs: list[Array], **attrs: Any) -> list[Any]:
    """The operator's `eval`."""
    definition = get_op(op, "ai.onnx.ml")
    found = definition.eval(*inputs, **{**definition.attrs, **attrs})  # type: ignore[misc]
    return list(found) if isinstance(found, tuple) else [found]


def compiled(model: onnx.ModelProto, inputs: list[Array], host: tuple[str, ...] = ()) -> list[Any]:
    """What minicc gives; only operators of `host` may run there."""
    module = minicc.compile(model, threads=1)
    assert {name for name, _, _ in module.stats()["host_nodes"]} <= set(host)
    return module.run(None, {f"x{i}": x for i, x in enumerate(inputs)})


def check(op: str, inputs: list[Array], outputs: int = 1, *, opset: int = 3, host: tuple[str, ...] = (),
          runtime: bool = True, tolerance: float = 2e-5, **attrs: Any) -> None:  # fmt: skip
    """Compiled and numpy's results against ONNX Runtime's (runtime), else against each other."""
    model = node_model(op, inputs, outputs, opset, **attrs)
    mine = by_numpy(op, inputs, **attrs)[:outputs]
    ours = compiled(model, inputs, host)
    for expected in ([by_onnxruntime(model, inputs)] if runtime else []) + [mine]:
        for a, b in zip(ours, expected):
            assert a.shape == b.shape
            if a.dtype.kind in "OUS" or a.dtype.kind in "iu":
                assert a.tolist() == b.tolist()
            else:
                np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
