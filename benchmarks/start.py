"""Seconds from a runtime's import to its first result, and the peak memory of the process: a process of its own for each start.

    python benchmarks/start.py RUNTIME MODEL.onnx FEEDS.npz

Nothing but numpy is imported before, so that each runtime pays for what it imports itself. Prints one line of JSON.
"""

import json
import re
import sys
import time
from pathlib import Path

import numpy as np


def main(runtime: str, model: str, inputs: str) -> None:
    with np.load(inputs, allow_pickle=False) as file:
        feeds = {key: file[key] for key in file.files}
    begin = time.perf_counter()
    if runtime == "minicc":
        import minicc

        minicc.compile(model, threads=1).run(None, feeds)
    elif runtime == "ort":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, feeds)
    else:
        raise SystemExit(f"no start of {runtime}")
    took = time.perf_counter() - begin
    # Not getrusage: its peak begins with that of the process that started this one.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(json.dumps({"start_s": took} | ({"peak_mib": int(peak[1]) / 1024} if peak else {})))


if __name__ == "__main__":
    main(*sys.argv[1:])
