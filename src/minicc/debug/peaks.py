"""What this machine can do at most: fused multiply-adds and copies per second, measured.

The roofs of a roofline picture. Host CPU only; nothing of minicc's own kernels takes part.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

ACCUMULATORS = 16  # independent chains, more than latency times units of any core
ROUNDS = 2_000_000
COPIED = 1 << 26  # bytes per thread, far beyond a core's share of the caches
REPEATS = 5


@dataclass(frozen=True)
class Peaks:
    """Peaks of some threads together: 1e9 f32 operations (a fused multiply-add is two), 1e9 bytes read and written."""

    threads: int
    gflops: float
    gbytes: float

    def bound(self, flops: float, size: float) -> float:
        """The least seconds for this many operations and bytes to and from memory."""
        return max(flops / self.gflops, size / self.gbytes) * 1e-9


def measure_peaks(threads: int = 1) -> Peaks:
    """Measure for a second or so; best of some repeats."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    lanes = 16 if features.get("avx512f") else 8 if features.get("avx2") else 4
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features.flatten(), opt=3
    )
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(_multiply_adds(lanes)), machine)
    engine.finalize_object()
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(engine.get_function_address("peak"))
    results = [np.ones(lanes * ACCUMULATORS, np.float32) for _ in range(threads)]
    sources = [np.ones(COPIED // 8, np.float32) for _ in range(threads)]
    copies = [np.empty_like(source) for source in sources]
    with ThreadPoolExecutor(threads) as pool:
        adding = _best(pool, threads, lambda i: function(results[i].ctypes.data, ROUNDS))
        copying = _best(pool, threads, lambda i: np.copyto(copies[i], sources[i]))
    flops = 2 * lanes * ACCUMULATORS * ROUNDS * threads
    return Peaks(threads, flops / adding * 1e-9, COPIED * threads / copying * 1e-9)


def _best(pool: ThreadPoolExecutor, threads: int, work: Callable[[int], object]) -> float:
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        list(pool.map(work, range(threads)))
        best = min(best, time.perf_counter() - start)
    return best


def _multiply_adds(lanes: int) -> str:
    """LLVM text of `void peak(float *x, int64 rounds)`: chains of x = x * s + s in registers, whose sum is stored."""
    vector, each = f"<{lanes} x float>", range(ACCUMULATORS)
    chains = "\n".join(f"%a{i} = phi {vector} [%c{i}, %entry], [%b{i}, %loop]" for i in each)
    steps = "\n".join(
        f"%b{i} = call {vector} @llvm.fma.v{lanes}f32({vector} %a{i}, {vector} %s, {vector} %s)" for i in each
    )
    starts = "\n".join(
        f"%p{i} = getelementptr {vector}, ptr %x, i64 {i}\n%c{i} = load {vector}, ptr %p{i}, align 4" for i in each
    )
    sums = "\n".join(f"%t{i + 1} = fadd {vector} %t{i}, %b{i}" for i in each)
    return f"""
declare {vector} @llvm.fma.v{lanes}f32({vector}, {vector}, {vector})
define void @peak(ptr %x, i64 %rounds) "min-legal-vector-width"="{lanes * 32}" {{
entry:
%s = load {vector}, ptr %x, align 4
{starts}
br label %loop
loop:
%n = phi i64 [0, %entry], [%next, %loop]
{chains}
{steps}
%next = add i64 %n, 1
%more = icmp slt i64 %next, %rounds
br i1 %more, label %loop, label %done
done:
%t0 = fadd {vector} %s, %s
{sums}
store {vector} %t{ACCUMULATORS}, ptr %x, align 4
ret void
}}
"""
