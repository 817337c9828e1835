"""Single operators beside ONNX Runtime, each a model of one node on random operands.

    python -m benchmarks.operators [PATTERN] [--threads 1] [--seconds 0.25]

PATTERN keeps the cases whose name it is found in (a regular expression). Calls alternate in one process; times are lower
quartiles in us. Images come channels first, as ONNX has them: where kernels want them last, both transpositions count, which a
network pays once for many layers. Rows below 0.95 are marked; nodes that numpy runs are named.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

import minicc
from benchmarks.compare import interleaved, session

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(0)


@dataclass(frozen=True)
class Case:
    """One node: inputs in order (None where left out), positions of those that are constants, the number of outputs."""

    name: str
    op: str
    inputs: Sequence[Array | None]
    constants: tuple[int, ...] = ()
    outputs: int = 1
    opset: int = 20
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def model(self) -> tuple[onnx.ModelProto, dict[str, Array]]:
        """The model, and what it is called with."""
        given = {f"x{i}": x for i, x in enumerate(self.inputs) if x is not None}
        names = [f"x{i}" if x is not None else "" for i, x in enumerate(self.inputs)]
        constants = {f"x{i}" for i in self.constants}
        node = helper.make_node(self.op, names, [f"y{i}" for i in range(self.outputs)], **self.attributes)
        types = helper.np_dtype_to_tensor_dtype
        infos = [helper.make_tensor_value_info(n, types(x.dtype), x.shape) for n, x in given.items() if n not in constants]
        results = [onnx.ValueInfoProto(name=name) for name in node.output]
        weights = [numpy_helper.from_array(given[name], name) for name in sorted(constants)]
        graph = helper.make_graph([node], "operator", infos, results, weights)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
        return proto, {n: x for n, x in given.items() if n not in constants}


def numbers(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def whole(*values: int) -> Array:
    return np.array(values, np.int64)


def cases() -> Iterator[Case]:
    """Every case, by families."""
    yield from _elementwise()
    yield from _reductions()
    yield from _moves()
    yield from _images()
    yield from _products()
    yield from _others()


def _elementwise() -> Iterator[Case]:
    x = numbers(256, 1024)
    inner = dict.fromkeys(("Log", "Sqrt"), np.abs(x)) | dict.fromkeys(("Asin", "Acos", "Atanh"), np.tanh(x))
    inner["Acosh"] = np.abs(x) + 1
    for op in (
        "Erf", "Tanh", "Sigmoid", "Exp", "Log", "Sqrt", "Sin", "Cos", "Tan", "Asin", "Acos", "Atan", "Sinh", "Cosh", "Asinh",
        "Acosh", "Atanh", "Relu", "HardSwish", "Gelu", "Mish", "Softplus", "Elu", "Selu", "Abs", "Floor", "Round", "Sign",
        "Reciprocal", "Neg", "IsNaN",
    ):  # fmt: skip
        yield Case(op, op, [inner.get(op, x)])
    for op in ("Add", "Mul", "Div", "Max", "Greater", "Equal"):
        for name, other in (("", numbers(256, 1024)), (" row", numbers(1024)), (" column", numbers(256, 1))):
            yield Case(op + name, op, [x, other])
    yield Case("Pow 2", "Pow", [x, np.float32(2).reshape(())], (1,))
    yield Case("Pow", "Pow", [np.abs(x), x])
    yield Case("Clip", "Clip", [x, np.array(-1, np.float32), np.array(1, np.float32)], (1, 2))
    yield Case("Where", "Where", [x > 0, x, numbers(256, 1024)])
    for name, kind in (("int64", 7), ("float16", 10), ("uint8", 2)):
        yield Case(f"Cast {name}", "Cast", [np.abs(x)], attributes={"to": kind})
    a, b = RNG.integers(-99, 99, (256, 1024)), RNG.integers(1, 9, (256, 1024))
    yield Case("Mod int64", "Mod", [a, b])
    yield Case("Div int64", "Div", [a, b])
    scale, zero = np.array(0.02, np.float32), np.array(128, np.uint8)
    yield Case("QuantizeLinear", "QuantizeLinear", [x, scale, zero], (1, 2))
    yield Case("DequantizeLinear", "DequantizeLinear", [RNG.integers(0, 255, (256, 1024)).astype(np.uint8), scale, zero], (1, 2))
    yield Case("DynamicQuantizeLinear", "DynamicQuantizeLinear", [x], outputs=3)


def _reductions() -> Iterator[Case]:
    x = numbers(8, 128, 256)
    for op in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceL2", "ReduceLogSumExp", "ReduceProd"):
        yield Case(f"{op} last", op, [x, whole(-1)], (1,))
        yield Case(f"{op} middle", op, [x, whole(1)], (1,))
        yield Case(f"{op} all", op, [x])
    for op in ("Softmax", "LogSoftmax", "ArgMax"):
        yield Case(f"{op} last", op, [x], attributes={"axis": -1})
        yield Case(f"{op} middle", op, [x], attributes={"axis": 1})
    rows = numbers(256, 1024)
    yield Case("LayerNormalization", "LayerNormalization", [rows, numbers(1024), numbers(1024)], (1, 2))
    yield Case("TopK 5", "TopK", [rows, whole(5)], (1,), outputs=2)
    yield Case("TopK 100", "TopK", [rows, whole(100)], (1,), outputs=2)
    yield Case("CumSum rows", "CumSum", [rows, np.array(1)], (1,))
    yield Case("CumSum columns", "CumSum", [rows, np.array(0)], (1,))


def _moves() -> Iterator[Case]:
    rows, image = numbers(256, 1024), numbers(1, 64, 56, 56)
    yield Case("Transpose heads", "Transpose", [numbers(8, 128, 8, 64)], attributes={"perm": [0, 2, 1, 3]})
    yield Case("Transpose last two", "Transpose", [numbers(8, 128, 256)], attributes={"perm": [0, 2, 1]})
    yield Case("Transpose channels last", "Transpose", [image], attributes={"perm": [0, 2, 3, 1]})
    yield Case("Concat", "Concat", [rows, numbers(256, 512)], attributes={"axis": 1})
    yield Case("Split", "Split", [rows], outputs=4, attributes={"axis": 1, "num_outputs": 4})
    yield Case("Slice", "Slice", [rows, whole(0, 8), whole(256, 1000), whole(0, 1), whole(1, 2)], (1, 2, 3, 4))
    yield Case("Pad", "Pad", [image, whole(0, 0, 1, 1, 0, 0, 1, 1)], (1,))
    yield Case("Pad reflect", "Pad", [image, whole(0, 0, 3, 3, 0, 0, 3, 3)], (1,), attributes={"mode": "reflect"})
    yield Case("Tile", "Tile", [rows, whole(2, 3)], (1,))
    yield Case("Expand", "Expand", [numbers(256, 1), whole(256, 1024)], (1,))
    yield Case("Gather rows", "Gather", [numbers(30000, 256), RNG.integers(0, 30000, 256)])
    yield Case("Gather columns", "Gather", [rows, RNG.integers(0, 1024, 512)], attributes={"axis": 1})
    yield Case("GatherElements", "GatherElements", [rows, RNG.integers(0, 1024, (256, 512))], attributes={"axis": 1})
    yield Case("ScatterND", "ScatterND", [numbers(1000, 256), RNG.integers(0, 1000, (200, 1)), numbers(200, 256)])
    yield Case("ScatterElements", "ScatterElements", [rows, RNG.integers(0, 1024, (256, 100)), numbers(256, 100)],
               attributes={"axis": 1})  # fmt: skip
    yield Case("OneHot", "OneHot", [RNG.integers(0, 1000, 256), np.array(1000), np.array([0, 1], np.float32)], (1, 2))
    yield Case("DepthToSpace", "DepthToSpace", [image], attributes={"blocksize": 2})
    yield Case("SpaceToDepth", "SpaceToDepth", [image], attributes={"blocksize": 2})
    yield Case("NonZero", "NonZero", [rows])


def _images() -> Iterator[Case]:
    image = numbers(1, 64, 56, 56)
    for mode in ("linear", "nearest", "cubic"):
        for name, factor in (("x2", 2.0), ("half", 0.5)):
            scales = np.array([1, 1, factor, factor], np.float32)
            yield Case(f"Resize {name} {mode}", "Resize", [image, None, scales], (2,), attributes={"mode": mode})
    half = np.array([1, 1, 0.5, 0.5], np.float32)
    yield Case("Resize antialias", "Resize", [image, None, half], (2,), attributes={"mode": "linear", "antialias": 1})
    yield Case("GridSample", "GridSample", [image, np.tanh(numbers(1, 56, 56, 2))])
    boxes = (np.abs(numbers(20, 4)).cumsum(1) * 10).astype(np.float32)
    yield Case("RoiAlign", "RoiAlign", [image, boxes, np.zeros(20, np.int64)],
               attributes={"output_height": 7, "output_width": 7, "sampling_ratio": 2})  # fmt: skip
    for kernel, stride in ((3, 2), (3, 1), (2, 2), (5, 1)):
        attributes = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [kernel // 2 if kernel % 2 else 0] * 4}
        yield Case(f"MaxPool {kernel}/{stride}", "MaxPool", [image], attributes=attributes)
        yield Case(f"AveragePool {kernel}/{stride}", "AveragePool", [image], attributes=attributes)
    yield Case("GlobalAveragePool", "GlobalAveragePool", [image])
    yield Case("BatchNormalization", "BatchNormalization", [image, *(np.abs(numbers(64)) for _ in range(4))], (1, 2, 3, 4))
    yield Case("InstanceNormalization", "InstanceNormalization", [image, numbers(64), numbers(64)], (1, 2))
    for name, x, w, attributes in (
        ("1x1", image, (128, 64, 1, 1), {}), ("1x1/2", image, (128, 64, 1, 1), {"strides": [2, 2]}),
        ("depthwise 3x3", image, (64, 1, 3, 3), {"group": 64, "pads": [1] * 4}),
        ("depthwise 7x7", image, (64, 1, 7, 7), {"group": 64, "pads": [3] * 4}),
        ("groups 3x3", image, (64, 16, 3, 3), {"group": 4, "pads": [1] * 4}),
        ("stem 11x11", numbers(1, 3, 224, 224), (64, 3, 11, 11), {"strides": [4, 4], "pads": [2] * 4}),
        ("patches 16x16", numbers(1, 3, 224, 224), (384, 3, 16, 16), {"strides": [16, 16]}),
        ("few channels 3x3", numbers(1, 8, 64, 64), (16, 8, 3, 3), {"pads": [1] * 4}),
        ("dilated 3x3", numbers(1, 8, 64, 64), (16, 8, 3, 3), {"pads": [4] * 4, "dilations": [4, 4]}),
        ("1-D", numbers(1, 64, 1000), (128, 64, 5), {"pads": [2, 2]}),
        ("3-D", numbers(1, 16, 16, 28, 28), (32, 16, 3, 3, 3), {"pads": [1] * 6}),
    ):  # fmt: skip
        yield Case(f"Conv {name}", "Conv", [x, numbers(*w)], (1,), attributes=attributes)
    for name, w, attributes in (
        ("4x4/2", (64, 32, 4, 4), {"strides": [2, 2], "pads": [1] * 4}), ("2x2/2", (64, 32, 2, 2), {"strides": [2, 2]}),
        ("3x3", (64, 32, 3, 3), {"pads": [1] * 4}),
    ):  # fmt: skip
        yield Case(f"ConvTranspose {name}", "ConvTranspose", [numbers(1, 64, 28, 28), numbers(*w)], (1,), attributes=attributes)


def _products() -> Iterator[Case]:
    yield Case("MatMul constant", "MatMul", [numbers(256, 256), numbers(256, 256)], (1,))
    yield Case("MatMul", "MatMul", [numbers(256, 256), numbers(256, 256)])
    for rows in (1, 2):
        yield Case(f"MatMul {rows} row(s)", "MatMul", [numbers(rows, 1024), numbers(1024, 1024)])
        yield Case(f"Gemm transposed, {rows} row(s)", "Gemm", [numbers(rows, 1024), numbers(1024, 1024)],
                   attributes={"transB": 1})  # fmt: skip
    yield Case("MatMul batch", "MatMul", [numbers(16, 64, 64), numbers(16, 64, 64)])
    yield Case("Gemm transposed", "Gemm", [numbers(128, 512), numbers(256, 512), numbers(256)], attributes={"transB": 1})
    yield Case("Einsum", "Einsum", [numbers(1, 8, 128, 64), numbers(1, 8, 128, 64)], attributes={"equation": "bhid,bhjd->bhij"})
    for op, gates in (("LSTM", 4), ("GRU", 3)):
        for steps, batch, width, hidden in ((100, 1, 40, 128), (50, 1, 64, 256), (100, 1, 128, 512), (30, 32, 128, 256)):
            weights = [numbers(1, gates * hidden, n) * 0.1 for n in (width, hidden)] + [numbers(1, 2 * gates * hidden) * 0.1]
            attributes = {"hidden_size": hidden} | ({"linear_before_reset": 1} if op == "GRU" else {})
            name = f"{op} {steps} steps, {batch} of {hidden}"
            yield Case(name, op, [numbers(steps, batch, width), *weights], (1, 2, 3), attributes=attributes)


def _others() -> Iterator[Case]:
    yield Case("DFT", "DFT", [numbers(8, 1024, 1), None, np.array(1)], (2,))
    yield Case("STFT", "STFT", [numbers(1, 16000, 1), np.array(160), np.hanning(400).astype(np.float32)], (1, 2))
    yield Case("Det", "Det", [numbers(64, 8, 8)])
    yield Case("Unique", "Unique", [RNG.integers(0, 100, 10000)])


def compare(case: Case, threads: int, seconds: float) -> str:
    """A line of the table."""
    proto, feeds = case.model()
    runtime = session(proto.SerializeToString(), threads)
    module = minicc.compile(proto, threads=threads)
    calls = [lambda: module.run(None, feeds), lambda: runtime.run(None, feeds)]
    ours, theirs = (call() for call in calls)
    error = max(_error(a, b) for a, b in zip(ours, theirs))
    a, b = (float(np.percentile(taken, 25)) * 1e6 for taken in interleaved(calls, seconds))
    host = ", ".join(sorted({op for op, _, _ in module.stats()["host_nodes"]}))
    return f"{case.name:32} {a:10.1f} {b:10.1f} {b / a:6.2f}{' <' if b / a < 0.95 else '  '} {error:.0e} {host}"


def _error(a: Any, b: Any) -> float:
    """The largest difference, relative to the largest number."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(x - y).max() / max(np.abs(y).max(), 1e-9)) if y.size else 0.0


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.operators", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pattern", nargs="?", default="")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.25)
    given = parser.parse_args()
    warnings.simplefilter("ignore", minicc.HostNodesWarning)
    print(f"{'operator':32} {'minicc us':>10} {'ORT us':>10} {'ratio':>6}   error host")
    for case in cases():
        if re.search(given.pattern, case.name):
            print(compare(case, given.threads, given.seconds), flush=True)


if __name__ == "__main__":
    main()
