"""Products with weights of few bits (MatMulNBits) beside ONNX Runtime and beside float32 weights.

    python -m benchmarks.bits [--threads 1,2] [--rows 1,4,16,128] [--bits 4] [--block 32]

A decoder's step is one row, a prompt is many. Both compute in float32 (accuracy level 0) or, where a model allows it (level 4),
with the left operand rounded to 8 bits. Least times of calls in turns; differences between both runtimes relative to the largest
output of each level.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

import minicc

SHAPES = ((2048, 2048), (4096, 4096), (4096, 11008))  # K, N: of decoders of about 1 and 7 billion weights
LEVELS = (0, 4)
# Of both benchmarks' tables, behind their own first columns.
COLUMNS = ("threads", "minicc 0, ms", "ort 0", "ratio", "difference", "minicc 4, ms", "ort 4", "ratio", "difference")
Array = np.ndarray[Any, Any]


def model(k: int, n: int, bits: int, block: int, level: int) -> Any:
    """One MatMulNBits node with random numbers and a run-time number of rows."""
    rng, blocks = np.random.default_rng(0), -(-k // block)
    weights = {
        "packed": rng.integers(0, 256, (n, blocks, block * bits // 8), np.uint8),
        "scales": rng.uniform(0.01, 0.1, n * blocks).astype(np.float32),
    }
    attributes = {"K": k, "N": n, "bits": bits, "block_size": block, "accuracy_level": level}
    node = helper.make_node("MatMulNBits", ["x", *weights], ["y"], domain="com.microsoft", **attributes)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["m", size]) for name, size in (("x", k), ("y", n)))
    graph = helper.make_graph([node], "bits", [x], [y], [numpy_helper.from_array(a, name) for name, a in weights.items()])
    sets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=sets, ir_version=9)


def runners(k: int, n: int, bits: int, block: int, threads: int) -> dict[str, Callable[[Array], Array]]:
    """Calls by name."""
    import onnxruntime

    found: dict[str, Callable[[Array], Array]] = {}
    for level in LEVELS:
        found[f"minicc {level}"] = minicc.compile(model(k, n, bits, block, level), threads=threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(model(k, n, bits, block, level).SerializeToString(), options)
        found[f"ort {level}"] = lambda x, session=session: session.run(None, {"x": x})[0]  # type: ignore[misc]
    return found


def measure(calls: dict[str, Callable[[Any], Any]], x: Any, seconds: float) -> dict[str, float]:
    """The least seconds of a call by name, all in turns for about so long."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or min(map(len, times.values())) < 3:
        for name, call in calls.items():
            start = time.perf_counter()
            call(x)
            times[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in times.items()}


def header(*own: str) -> str:
    """The first lines of a table."""
    return "| " + " | ".join((*own, *COLUMNS)) + " |\n|" + "---|" * (len(own) + len(COLUMNS))


def row(calls: dict[str, Callable[[Any], Any]], given: Any, seconds: float, *own: object) -> str:
    """A line of it. Ratios: ONNX Runtime's time over minicc's."""
    cells, times = list(own), measure(calls, given, seconds)
    for level in LEVELS:
        ours, theirs = (np.asarray(calls[f"{name} {level}"](given)) for name in ("minicc", "ort"))
        taken = [times[f"{name} {level}"] for name in ("minicc", "ort")]
        cells += [*(f"{t * 1e3:.3f}" for t in taken), f"{taken[1] / taken[0]:.2f}"]
        cells.append(f"{np.abs(ours - theirs).max() / np.abs(theirs).max():.1e}")
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description="products with weights of few bits beside ONNX Runtime")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rows", default="1,4,16,128")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each line of the table")
    options = parser.parse_args()
    print(header("K x N", "rows"))
    for threads in map(int, options.threads.split(",")):
        for k, n in SHAPES:
            calls = runners(k, n, options.bits, options.block, threads)
            for rows in map(int, options.rows.split(",")):
                x = np.random.default_rng(1).standard_normal((rows, k)).astype(np.float32)
                print(row(calls, x, options.seconds, f"{k} x {n}", rows, threads), flush=True)


if __name__ == "__main__":
    main()
