"""Agreement and speed beside ONNX Runtime: the rule for "equal", sessions, interleaved medians.

The rule, per output, with `largest` the largest finite magnitude of ONNX Runtime's output:

- integers, booleans and strings are equal;
- float outputs of float32 and float64 models differ by at most 1e-4 * largest;
- float outputs of models with half-precision weights differ by at most 1e-2 * largest;
- float outputs of quantised models differ by at most two steps of the output's own quantisation where the
  model ends in a DequantizeLinear of known scale, else by at most 2e-2 * largest; 8-bit outputs by two steps;
- NaN and infinities are at the same places.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper

TOLERANCE = {"float": 1e-4, "half": 1e-2, "quantised": 2e-2}
QUANTISED_STEPS = 2
_QUANTISED = re.compile("Quantize|^QLinear|Integer$|NBits$")


@dataclass(frozen=True)
class Rule:
    """How equal is equal for one model: its kind, and the quantisation step of outputs that have one."""

    kind: str
    steps: dict[str, float]


def rule(model: onnx.ModelProto) -> Rule:
    """Kind "quantised", "half" or "float", seen from the operators (nested ones too) and the weights."""
    operators = {node.op_type for node in _all_nodes(model)}
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    if any(_QUANTISED.search(op) for op in operators):
        steps = {}
        for node in model.graph.node:
            if node.op_type == "DequantizeLinear" and node.input[1] in weights:
                steps[node.output[0]] = float(numpy_helper.to_array(weights[node.input[1]]).max())
        return Rule("quantised", {o.name: steps[o.name] for o in model.graph.output if o.name in steps})
    halves = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    half = any(tensor.data_type in halves for tensor in weights.values())
    return Rule("half" if half else "float", {})


def _all_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Every node of a model, nested graphs and functions included."""
    pending = [list(model.graph.node)] + [list(function.node) for function in model.functions]
    nodes: list[onnx.NodeProto] = []
    while pending:
        block = pending.pop()
        nodes += block
        for node in block:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    pending.append(list(attribute.g.node))
                pending += [list(graph.node) for graph in attribute.graphs]
    return nodes


def difference(rule: Rule, name: str, expected: np.ndarray, actual: np.ndarray) -> tuple[float, str]:
    """Largest difference relative to the largest magnitude, and a problem text when it is too large."""
    expected, actual = np.asarray(expected), np.asarray(actual)
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        found = f"{actual.dtype}{list(actual.shape)}"
        return float("inf"), f"{name}: {found}, expected {expected.dtype}{list(expected.shape)}"
    if expected.size == 0:
        return 0.0, ""
    if expected.dtype.kind not in "fiu" and expected.dtype.name != "bfloat16":
        wrong = int(np.count_nonzero(expected != actual))
        return (float("inf"), f"{name}: {wrong} elements differ") if wrong else (0.0, "")
    a, b = expected.astype(np.float64), actual.astype(np.float64)
    finite = np.isfinite(a)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(b[finite]).all():
        return float("inf"), f"{name}: NaN or infinity at different places"
    absolute = float(np.abs(a[finite] - b[finite]).max(initial=0.0))
    largest = float(np.abs(a[finite]).max(initial=0.0))
    allowed = _allowed(rule, name, expected.dtype, largest)
    relative = absolute / largest if largest else absolute
    problem = f"{name}: differs by {absolute:.3g}, allowed {allowed:.3g}" if absolute > allowed else ""
    return relative, problem


def _allowed(rule: Rule, name: str, dtype: np.dtype, largest: float) -> float:
    """Largest allowed absolute difference of one output."""
    if dtype.kind in "iu":
        return QUANTISED_STEPS if rule.kind == "quantised" and dtype.itemsize == 1 else 0
    if name in rule.steps:
        return QUANTISED_STEPS * rule.steps[name] * (1 + 1e-6)
    return TOLERANCE[rule.kind] * largest


def session(source: Path | bytes, threads: int | None, *, plain: bool = False,
            exact: bool = False) -> ort.InferenceSession:  # fmt: skip
    """An ONNX Runtime CPU session; `plain` switches its graph rewrites off, `exact` rewrites u8 by s8 products to u8 by u8.

    Without VNNI instructions its products of u8 and s8 saturate.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    options.add_session_config_entry("session.x64quantprecision", str(int(exact)))
    if plain:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = source if isinstance(source, bytes) else str(source)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def interleaved(
    functions: list[Callable[[], object]], seconds: float, *, block: int = 1, pause: float = 0.0
) -> list[list[float]]:
    """Times of each function in seconds, in alternating blocks, so that a busy machine hurts all alike.

    block: calls in a row. pause: idle seconds before a block, in which the other's spinning threads go to
    sleep; one uncounted call follows it.
    """
    times: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 3:
        for function, measured in zip(functions, times):
            if pause:
                time.sleep(pause)
                function()
            for _ in range(block):
                start = time.perf_counter()
                function()
                measured.append(time.perf_counter() - start)
    return times


def milliseconds(times: list[float]) -> float:
    """Median in milliseconds."""
    return median(times) * 1e3
