"""Runs one generated kernel file by itself: compiles it and times a call.

A kernel knows neither shapes nor strides, they are words; the dump records one real call of every kernel
(`calls.json` beside the files). Memory is zero, so that positions read from it are in range.
"""

from __future__ import annotations

import ctypes
import json
import time
from pathlib import Path

import numpy as np

from minicc.codegen.build import build_objects
from minicc.runtime.objects import load_objects
from minicc.targets.cpu import host_target


def bench_file(path: str, symbol: str, repeats: int = 20) -> None:
    """Compile the kernel in a file and time the call recorded for it, printing microseconds."""
    from minicc.codegen.objects import assembly

    text = Path(path).read_text(encoding="utf-8")
    target = host_target()
    start = time.perf_counter()
    objects = build_objects({symbol: text}, target, None)
    print(
        f"{symbol}: compiled in {time.perf_counter() - start:.2f} s, {len(objects[symbol])} bytes of object"
    )
    lines = assembly(text, symbol, target).splitlines()
    vectors = sum("ymm" in line or "zmm" in line for line in lines)
    print(f"{len(lines)} lines of assembly, {vectors} of them with wide vectors")
    recorded = Path(path).with_name("calls.json")
    call = json.loads(recorded.read_text(encoding="utf-8")).get(symbol) if recorded.exists() else None
    if call is None:
        print("no call is recorded for it")
        return
    loaded = load_objects(objects)
    memory = [np.zeros(max(size, 64), np.uint8) for size in call["buffers"]]
    words = np.array(call["words"], np.int64)
    for at, which in call["addresses"]:
        words[at] += memory[which].ctypes.data
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)(loaded.address(symbol))
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        function(words.ctypes.data, 0, call["units"])
        best = min(best, time.perf_counter() - start)
    print(f"{call['units']} units on one thread: {best * 1e6:.1f} us")
