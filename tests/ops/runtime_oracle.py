"""One operator run by ONNX Runtime, as an oracle for calls that ONNX has no cases for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

from tests.ops.onnx_cases import check_call


def onnx_type(array: np.ndarray) -> int:
    return helper.np_dtype_to_tensor_dtype(array.dtype)


def run_onnxruntime(
    op: str,
    inputs: Sequence[Any],
    attrs: dict[str, Any],
    *,
    outputs: int = 1,
    domain: str = "",
    constants: Sequence[int] = (),
    opset: int = 21,
) -> list[np.ndarray]:
    """The outputs of one node; inputs at `constants` are initializers, None is a missing input."""
    names = ["" if x is None else f"x{i}" for i, x in enumerate(inputs)]
    node = helper.make_node(op, names, [f"y{i}" for i in range(outputs)], domain=domain, **attrs)
    fed = [(i, np.asarray(x)) for i, x in enumerate(inputs) if x is not None]
    graph = helper.make_graph(
        [node],
        "g",
        [
            helper.make_tensor_value_info(names[i], onnx_type(x), x.shape)
            for i, x in fed
            if i not in constants
        ],
        [helper.make_empty_tensor_value_info(f"y{i}") for i in range(outputs)],
        [onnx.numpy_helper.from_array(x, names[i]) for i, x in fed if i in constants],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {names[i]: x for i, x in fed if i not in constants})


def check_against_onnxruntime(
    op: str,
    inputs: Sequence[Any],
    attrs: dict[str, Any] | None = None,
    *,
    outputs: int = 1,
    domain: str = "",
    constants: Sequence[int] = (),
    opset: int = 21,
    compared: Sequence[int] | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> None:
    """eval, infer, compute and expand agree with ONNX Runtime; `compared` are the outputs looked at."""
    attrs = attrs or {}
    found: list[Any] = run_onnxruntime(
        op, inputs, attrs, outputs=outputs, domain=domain, constants=constants, opset=opset
    )
    if compared is not None:
        found = [x if i in compared else None for i, x in enumerate(found)]
    arrays = [None if x is None else np.asarray(x) for x in inputs]
    check_call(op, arrays, attrs, found, domain=domain, rtol=rtol, atol=atol)
