"""Single operators beside the measured peak of the machine.

    python -m benchmarks.kernels [NAME ...] [--threads 1,2] [--repeats 20] [--out FILE.json]

Every case is a model of one operator on random operands; NAME keeps those whose name contains it. Its time is the sum of
the medians of its kernels (`debug/profile.py`) without the copies at the model's edges, into and out of the blocked layout,
which have a column of their own. Operations and bytes are those of the definition: every operand read and every result written
once. The share is that of the tighter of the two peaks; above 100 % the operands stay in the caches, or
Winograd's form needs fewer operations than the definition.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

import minicc
from minicc.debug.peaks import Peaks, measure_peaks


@dataclass(frozen=True)
class Case:
    """One operator. x, y: shapes of input and result; weights: shapes of constant operands; flops: of the definition."""

    name: str
    op: str
    x: tuple[int, ...]
    y: tuple[int, ...]
    flops: float
    weights: tuple[tuple[int, ...], ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> float:
        return 4.0 * sum(float(np.prod(shape)) for shape in (self.x, self.y, *self.weights))

    def model(self) -> Any:
        """The ONNX model; a list of axes is a constant operand, as the newest opset has it."""
        rng = np.random.default_rng(0)
        constants = [rng.standard_normal(shape).astype(np.float32) for shape in self.weights]
        attributes = dict(self.attributes)
        if self.op.startswith("Reduce"):
            constants.append(np.array(attributes.pop("axes"), np.int64))
        names = [f"w{i}" for i in range(len(constants))]
        node = helper.make_node(self.op, ["x", *names], ["y"], name=self.name, **attributes)
        graph = helper.make_graph(
            [node], "case",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.x)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, self.y)],
            [numpy_helper.from_array(c, n) for c, n in zip(constants, names, strict=True)],
        )  # fmt: skip
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def product(m: int, n: int, k: int) -> Case:
    """A product with constant right operand."""
    return Case(f"product {m}x{n}x{k}", "MatMul", (m, k), (m, n), 2.0 * m * n * k, ((k, n),))


def conv(name: str, channels: int, out: int, side: int, kernel: int, stride: int = 1, group: int = 1) -> Case:
    """A square convolution, padded to keep the side where the stride is 1."""
    pad, result = kernel // 2, (side + kernel // 2 * 2 - kernel) // stride + 1
    weights = (out, channels // group, kernel, kernel)
    return Case(
        f"{name} {channels}->{out} {side}x{side}", "Conv", (1, channels, side, side), (1, out, result, result),
        2.0 * float(np.prod(weights)) * result * result, (weights,),
        {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [pad] * 4, "group": group},
    )  # fmt: skip


def row_op(op: str, rows: int, columns: int, flops: int, kept: bool = True, **attributes: Any) -> Case:
    """An operator over rows; flops per element, with transcendentals as one."""
    parameters = ((columns,), (columns,)) if op == "LayerNormalization" else ()
    y = (rows, columns) if kept else (rows, 1)
    return Case(f"{op} {rows}x{columns}", op, (rows, columns), y, float(flops * rows * columns), parameters, attributes)


CASES = (
    product(512, 512, 512), product(1024, 1024, 1024), product(128, 768, 768), product(128, 3072, 768),
    product(1, 4096, 4096), product(1, 768, 3072),
    conv("3x3", 64, 64, 56, 3), conv("3x3", 256, 256, 14, 3), conv("3x3 stride 2", 128, 128, 56, 3, 2),
    conv("1x1", 64, 256, 56, 1), conv("1x1", 1024, 256, 14, 1), conv("stem 7x7", 3, 64, 224, 7, 2),
    conv("depthwise 3x3", 144, 144, 56, 3, 1, 144), conv("depthwise 5x5", 240, 240, 28, 5, 1, 240),
    row_op("Softmax", 1536, 128, 4, axis=-1), row_op("LayerNormalization", 512, 768, 7, axis=-1),
    row_op("Sigmoid", 2048, 2048, 3), row_op("Gelu", 512, 3072, 5), row_op("Relu", 4096, 4096, 1),
    row_op("ReduceSum", 2048, 2048, 1, kept=False, axes=[-1]), row_op("ReduceMax", 2048, 2048, 1, kept=False, axes=[-1]),
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """A measured case; share: the least time the peaks allow over the time it took. copies: seconds, not in `seconds`."""

    name: str
    threads: int
    seconds: float
    copies: float
    gflops: float
    gbytes: float
    share: float


def measure(case: Case, peaks: Peaks, repeats: int) -> Result:
    """Compile and time one case."""
    module = minicc.compile(case.model(), threads=peaks.threads)
    rows = module.profile(repeats=repeats).rows
    copies = sum(row.seconds for row in rows if row.name.startswith("copy_"))
    return result_of(case, peaks, sum(row.seconds for row in rows) - copies, copies)


def result_of(case: Case, peaks: Peaks, seconds: float, copies: float = 0.0) -> Result:
    """The rates and the share that a time means."""
    share = peaks.bound(case.flops, case.bytes) / seconds
    rates = case.flops / seconds * 1e-9, case.bytes / seconds * 1e-9
    return Result(case.name, peaks.threads, seconds, copies, *rates, share)


def table(results: Sequence[Result]) -> str:
    """Markdown."""
    lines = ["| kernel | threads | us | GFLOP/s | GB/s | of peak | copies us |", "|---|---:|---:|---:|---:|---:|---:|"]
    for r in results:
        rates = f"{r.seconds * 1e6:.1f} | {r.gflops:.1f} | {r.gbytes:.1f} | {r.share:.0%} | {r.copies * 1e6:.1f}"
        lines.append(f"| {r.name} | {r.threads} | {rates} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="single operators beside the measured peak of the machine")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--threads", default="1")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    chosen = [c for c in CASES if not options.names or any(name in c.name for name in options.names)]
    results = []
    for threads in map(int, options.threads.split(",")):
        peaks = measure_peaks(threads)
        print(f"{threads} thread(s): {peaks.gflops:.0f} GFLOP/s f32, {peaks.gbytes:.1f} GB/s copied")
        results += [measure(case, peaks, options.repeats) for case in chosen]
    print(table(results))
    if options.out:
        options.out.write_text(json.dumps([asdict(r) for r in results], indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
