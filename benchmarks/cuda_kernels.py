"""CUDA's matrix products alone: cubins built where there is no GPU, checked and timed where there is one.

    python benchmarks/cuda_kernels.py --build DIR     needs minicc, numba-cuda, ptxas
    python benchmarks/cuda_kernels.py --run DIR       needs numpy and cuda.bindings; with torch, cuBLAS is timed too

Every case runs with every tile shape of its element type. Results are checked against numpy in float64 on
some rows; times are medians over graphs of launches, between CUDA events. Writes DIR/results.json.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# (M, N, K, batches): large, a transformer's layers, convolutions of 1x1, thin and ragged ones.
SHAPES = (
    (4096, 4096, 4096, 1), (2048, 2048, 2048, 1), (512, 3072, 768, 1), (512, 768, 3072, 1), (2048, 768, 768, 1),
    (25088, 64, 256, 1), (6272, 512, 128, 1), (392, 2048, 512, 1), (384, 384, 64, 48),
    (16, 4096, 4096, 1), (1, 4096, 4096, 1), (127, 129, 136, 1),
)  # fmt: skip
# Differences allowed, relative to the largest result. Tensor cores cut off what they add; tf32 also rounds operands.
TOLERANCES = {"f32": 2e-6, "tf32": 2e-3, "f16": 3e-5, "bf16": 3e-5, "s8": 0.0}
REPEATS, GRAPH_LAUNCHES, CHECKED_ROWS = 9, 20, 48


# ---------------------------------------------------------------------------------------------------- build


def build(folder: Path) -> None:
    """Writes cubins and cases.json."""
    from benchmarks.cuda_build import assemble, ptx_of, render, words_of
    from minicc.kernels.cuda_tiles import choose_tile, constants, tiles_of

    folder.mkdir(parents=True, exist_ok=True)
    kernels, cases = {}, []
    for element in TOLERANCES:
        for number, tile in enumerate(tiles_of(element)):
            name = f"{element}_{tile.rows}x{tile.columns}_{tile.threads}"
            text = render("gemm", constants(element, tile), {"ptr_f32": "ptr_i32"} if element == "s8" else {})
            built = assemble(ptx_of(text, words_of(text), tile.threads))
            (folder / f"{name}.cubin").write_bytes(built.cubin)
            kernels[name] = {
                "element": element, "rows": tile.rows, "columns": tile.columns, "threads": tile.threads, "number": number,
                "shared": tile.shared_bytes, "registers": built.registers, "spills": built.spills,
            }  # fmt: skip
            print(name, f"{built.registers} registers, {built.spills} bytes spilled", flush=True)
        for m, n, k, batches in SHAPES:
            chosen = tiles_of(element).index(choose_tile(element, m, n, batches, 132))
            cases.append({"element": element, "m": m, "n": n, "k": k, "batches": batches, "chosen": chosen})
    (folder / "cases.json").write_text(json.dumps({"kernels": kernels, "cases": cases}, indent=1))


# ------------------------------------------------------------------------------------------------------ run


class Device:
    """The first GPU through the driver: memory, cubins, launches and their time."""

    def __init__(self) -> None:
        from cuda.bindings import driver

        self.driver = driver
        self.call("cuInit", 0)
        self.device = self.call("cuDeviceGet", 0)
        self.context = self.call("cuDevicePrimaryCtxRetain", self.device)
        self.call("cuCtxSetCurrent", self.context)
        self.stream = self.call("cuStreamCreate", driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value)
        self.events = [self.call("cuEventCreate", 0) for _ in range(2)]

    def call(self, name: str, *arguments: Any) -> Any:
        """A driver function's result. Raises RuntimeError with its error."""
        status, *results = getattr(self.driver, name)(*arguments)
        if int(status):
            raise RuntimeError(f"{name}: {status}")
        return results[0] if results else None

    def upload(self, array: Array) -> int:
        address = self.call("cuMemAlloc", max(array.nbytes, 256))
        self.call("cuMemcpyHtoD", address, array.ctypes.data, array.nbytes)
        return int(address)

    def download(self, address: int, shape: tuple[int, ...], dtype: Any) -> Array:
        array = np.empty(shape, dtype)
        self.call("cuStreamSynchronize", self.stream)
        self.call("cuMemcpyDtoH", array.ctypes.data, address, array.nbytes)
        return array

    def free(self, *addresses: int) -> None:
        for address in addresses:
            self.call("cuMemFree", address)

    def load(self, cubin: bytes, shared: int) -> Any:
        """The function "kernel" of a cubin, allowed its shared memory."""
        function = self.call("cuModuleGetFunction", self.call("cuModuleLoadData", cubin), b"kernel")
        attribute = self.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self.call("cuFuncSetAttribute", function, attribute, shared)
        return function

    def launch(self, function: Any, grid: int, threads: int, shared: int, words: list[int]) -> None:
        parameters = (tuple(words), (ctypes.c_int64,) * len(words))
        self.call("cuLaunchKernel", function, grid, 1, 1, threads, 1, 1, shared, self.stream, parameters, 0)

    def milliseconds(self, launch: Callable[[], None], launches: int) -> float:
        """Median time of one launch, from graphs of many."""
        mode = self.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self.call("cuStreamBeginCapture", self.stream, mode)
        for _ in range(launches):
            launch()
        graph = self.call("cuGraphInstantiate", self.call("cuStreamEndCapture", self.stream), 0)
        times = []
        for repeat in range(REPEATS + 1):
            self.call("cuEventRecord", self.events[0], self.stream)
            self.call("cuGraphLaunch", graph, self.stream)
            self.call("cuEventRecord", self.events[1], self.stream)
            self.call("cuEventSynchronize", self.events[1])
            if repeat:
                times.append(self.call("cuEventElapsedTime", *self.events) / launches)
        return median(times)


def draw(element: str, shape: tuple[int, ...]) -> Array:
    """Random numbers of an element type; bf16 as uint16."""
    rng = np.random.default_rng(7)
    if element == "s8":
        return rng.integers(-128, 128, shape).astype(np.int8)
    numbers = rng.standard_normal(shape, np.float32)
    if element == "bf16":
        return (numbers.view(np.uint32) >> 16).astype(np.uint16)
    return numbers.astype(np.float16) if element == "f16" else numbers


def exact(element: str, array: Array) -> Array:
    """The numbers as float64."""
    if element == "bf16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


def pack(b: Array) -> Array:
    """As `minicc.kernels.cuda_tiles.pack_right`, which is not installed where this runs."""
    depth = -(-b.shape[-2] * b.itemsize // 16) * 16 // b.itemsize
    packed = np.zeros((*b.shape[:-2], b.shape[-1], depth), b.dtype)
    packed[..., : b.shape[-2]] = np.swapaxes(b, -1, -2)
    return packed


def run(folder: Path) -> list[dict[str, Any]]:
    """Checks and times every case with every tile; prints a table and writes results.json."""
    facts = json.loads((folder / "cases.json").read_text())
    device = Device()
    functions = {
        name: device.load((folder / f"{name}.cubin").read_bytes(), kernel["shared"]) for name, kernel in facts["kernels"].items()
    }
    rows = []
    for case in facts["cases"]:
        element, m, n, k, batches = (case[key] for key in ("element", "m", "n", "k", "batches"))
        a, b = draw(element, (batches, m, k)), draw(element, (batches, k, n))
        packed = pack(b)
        checked = np.unique(np.linspace(0, m - 1, min(m, CHECKED_ROWS)).astype(int))
        expected = exact(element, a[:, checked]) @ exact(element, b)
        addresses = [device.upload(x) for x in (a, packed, np.zeros((batches, m, n), np.float32))]
        launches = max(1, min(GRAPH_LAUNCHES, int(2e12 / (2 * m * n * k * batches))))
        theirs = torch_milliseconds(case, launches)
        operations = 2e-9 * m * n * k * batches
        row = {**case, "torch_ms": theirs, "tiles": {}}
        for name, kernel in facts["kernels"].items():
            if kernel["element"] != element:
                continue
            row_tiles, panels = -(-m // kernel["rows"]), -(-n // kernel["columns"])
            sizes = [m, n, k, k, m * k, 0, packed[0].size, 0, batches, 1, row_tiles, panels]
            words = [*addresses[:2], *sizes, addresses[2]]
            launch = partial(
                device.launch, functions[name], row_tiles * panels * batches, kernel["threads"], kernel["shared"], words
            )

            launch()
            found = device.download(addresses[2], (batches, m, n), np.int32 if element == "s8" else np.float32)[:, checked]
            error = float(np.abs(found - expected).max() / np.abs(expected).max())
            time = device.milliseconds(launch, launches)
            right = bool(error <= TOLERANCES[element])
            row["tiles"][name] = {"ms": time, "tflops": operations / time, "error": error, "right": right}
            mark = "*" if kernel["number"] == case["chosen"] else " "
            print(
                f"{m:6}x{n:<5}x{k:<5}x{batches:<3} {name:18}{mark} {time * 1e3:9.1f} us {operations / time:7.1f} TFLOP/s"
                f"  torch {'-' if theirs is None else f'{theirs * 1e3:9.1f} us'}  error {error:.1e} {'' if right else 'WRONG'}",
                flush=True,
            )
        device.free(*addresses)
        rows.append(row)
        (folder / "results.json").write_text(json.dumps(rows, indent=1))
    return rows


def torch_milliseconds(case: dict[str, Any], launches: int) -> float | None:
    """The same product in PyTorch; None without PyTorch or where it has no such product."""
    try:
        import torch
    except ImportError:
        return None
    element, m, n, k, batches = (case[key] for key in ("element", "m", "n", "k", "batches"))
    torch.backends.cuda.matmul.allow_tf32 = element == "tf32"
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16, "s8": torch.int8}.get(element, torch.float32)
    shapes = ((m, k), (k, n)) if batches == 1 else ((batches, m, k), (batches, k, n))
    try:
        a, b = (torch.randn(s, device="cuda").to(dtype) for s in shapes)
        multiply = torch._int_mm if element == "s8" else torch.matmul
        for _ in range(3):
            multiply(a, b)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(launches):
                multiply(a, b)
        times = []
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        for repeat in range(REPEATS + 1):
            events[0].record()
            graph.replay()
            events[1].record()
            torch.cuda.synchronize()
            if repeat:
                times.append(events[0].elapsed_time(events[1]) / launches)
        return median(times)
    except RuntimeError as error:
        print(f"torch: {error}"[:100])
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, metavar="DIR")
    parser.add_argument("--run", type=Path, metavar="DIR")
    arguments = parser.parse_args()
    if arguments.build:
        build(arguments.build)
    if arguments.run:
        wrong = [case for case in run(arguments.run) for tile in case["tiles"].values() if not tile["right"]]
        if wrong:
            raise SystemExit(f"{len(wrong)} results are wrong")


if __name__ == "__main__":
    main()
