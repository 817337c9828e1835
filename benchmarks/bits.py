"""Products with weights of few bits (MatMulNBits) beside ONNX Runtime and beside float32 weights.

    python -m benchmarks.bits [--threads 1,2] [--rows 1,4,16,128] [--bits 4] [--block 32]

A decoder's step is one row, a prompt is many. ONNX Runtime computes in float32 (accuracy level 0) or, where a model allows it
(level 4), with its left operand rounded to 8 bits, which minicc never does. Least times of calls in turns; differences relative
to the largest output of level 0.
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

    found: dict[str, Callable[[Array], Array]] = {"minicc": minicc.compile(model(k, n, bits, block, 0), threads=threads)}
    for level in (0, 4):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(model(k, n, bits, block, level).SerializeToString(), options)
        found[f"level {level}"] = lambda x, session=session: session.run(None, {"x": x})[0]  # type: ignore[misc]
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


def main() -> None:
    parser = argparse.ArgumentParser(description="products with weights of few bits beside ONNX Runtime")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rows", default="1,4,16,128")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each line of the table")
    options = parser.parse_args()
    print("| K x N | rows | threads | minicc ms | ORT level 0 | ORT level 4 | level 0 / minicc | level 4 / minicc | difference |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for threads in map(int, options.threads.split(",")):
        for k, n in SHAPES:
            calls = runners(k, n, options.bits, options.block, threads)
            for rows in map(int, options.rows.split(",")):
                x = np.random.default_rng(1).standard_normal((rows, k)).astype(np.float32)
                exact = calls["level 0"](x)
                difference = np.abs(calls["minicc"](x) - exact).max() / np.abs(exact).max()
                t = measure(calls, x, options.seconds)
                own, zero, four = t["minicc"], t["level 0"], t["level 4"]
                cells = [f"{k} x {n}", rows, threads, *(f"{seconds * 1e3:.3f}" for seconds in (own, zero, four))]
                cells += [f"{zero / own:.2f}", f"{four / own:.2f}", f"{difference:.1e}"]
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
