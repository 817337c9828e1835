"""CUDA's products and convolutions alone: cubins built where there is no GPU, checked and timed where there is one.

    python -m benchmarks.cuda_kernels --build DIR     needs minicc, numba-cuda, ptxas
    python -m benchmarks.cuda_kernels --run DIR       needs numpy, cuda.bindings and the sources; with PyTorch its time is beside

Every case runs with every tile shape of its element type, products also with some that are cut along their depth. Some rows are
checked against numpy in float64; times are medians over graphs of launches, between CUDA events. Writes DIR/results.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.cuda_cases import CASES, Conv, Gemm
from benchmarks.cuda_device import REPEATS, Device

if TYPE_CHECKING:
    from minicc.kernels.cuda_tiles import Way
    from minicc.targets.cuda import CudaTarget

# Differences allowed, relative to the largest result. Tensor cores cut off what they add; tf32 also rounds operands.
TOLERANCES = {"f32": 2e-6, "tf32": 2e-3, "f16": 3e-5, "bf16": 3e-5, "s8": 0.0}
GRAPH_LAUNCHES = 20
CLUSTER = 4  # blocks of a cluster that share out the depth of a tile, where that is timed


def build(folder: Path, templates: Sequence[str] = ("gemm", "conv"), elements: Sequence[str] = ()) -> None:
    """Writes cubins and kernels.json, of all element types by default."""
    from benchmarks.cuda_build import conv_text, gemm_text
    from minicc.codegen.cuda import compile_cubin
    from minicc.kernels.cuda_tiles import (
        ALL_TILES,
        DOT_ELEMENTS,
        DOT_TILES,
        OTHER_DOT_TILES,
        STREAM,
        TMA_TILES,
        conv_shared_bytes,
        tiles_of,
    )
    from minicc.targets.cuda import parse_cuda_target

    target = parse_cuda_target("cuda:sm_90")
    folder.mkdir(parents=True, exist_ok=True)
    kernels = []
    for template in templates:
        for element in elements or TOLERANCES:
            few_rows = (*DOT_TILES, *OTHER_DOT_TILES) if template == "gemm" and element in DOT_ELEMENTS else ()
            brought = TMA_TILES if element != "f32" else ()
            whole = (*tiles_of(element, target), *few_rows, *brought)
            cut = [tile for tile in tiles_of(element, target) if tile.rows < 128] if template == "gemm" else []
            for tile, splits in [(t, 1) for t in whole] + [(t, s) for t in cut for s in (STREAM, CLUSTER)]:
                name = f"{template}_{element}_{tile.unit}_{tile.rows}x{tile.columns}_{tile.threads}_{tile.stages}"
                name += f"_{tile.cluster}" if tile.cluster > 1 else ""
                name += {STREAM: "_stream", 1: ""}.get(splits, f"_split{splits}")
                text = (conv_text if template == "conv" else gemm_text)(element, tile, splits=splits)
                built = compile_cubin(text, "kernel", target)
                (folder / f"{name}.cubin").write_bytes(built.data)
                shared = conv_shared_bytes(tile) if template == "conv" else tile.shared_bytes
                kernels.append({
                    "name": name, "template": template, "element": element, "unit": tile.unit, "rows": tile.rows,
                    "tile": ALL_TILES.index(tile), "splits": splits,
                    "job": "stream" if splits != 1 else "tma" if tile.unit == "tma" else "tiles",
                    "columns": tile.columns, "threads": tile.threads, "shared": shared,
                    "registers": built.registers, "spills": built.spills,
                    "chosen": [_is_chosen(case, element, (tile, splits), target) for case in CASES],
                })  # fmt: skip
                print(name, f"{built.registers} registers, {built.spills} bytes spilled", flush=True)
    (folder / "kernels.json").write_text(json.dumps(kernels, indent=1))


def _is_chosen(case: Gemm | Conv, element: str, way: Way, target: CudaTarget) -> bool:
    """Whether a case takes this tile, cut like this where it is cut."""
    from minicc.kernels.cuda_tiles import choose_product, choose_tile

    columns = case.result[1] // (case.repeats if case.template == "conv" else 1)
    choose = choose_tile if case.template == "conv" else choose_product
    chosen = choose(element, case.rows, columns, case.depth, case.repeats, target)
    return chosen[0] == way[0] and way[1] in (1, chosen[1])


def run(folder: Path, cases: Sequence[Gemm | Conv] = (), jobs: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Checks and times cases, all by default, with every tile that was built for them; prints a table and writes results.json.

    jobs: kernels of these only: "tma" tiles that the copy engine fills, "stream" tiles that are cut, "tiles" the others.
    """
    kernels = [k for k in json.loads((folder / "kernels.json").read_text()) if not jobs or k["job"] in jobs]
    device = Device()
    functions = {k["name"]: device.load((folder / f"{k['name']}.cubin").read_bytes(), k["shared"]) for k in kernels}
    rows: list[dict[str, Any]] = []
    for case in cases or CASES:
        number = CASES.index(case)
        for element in TOLERANCES:
            channels = case.channels // case.groups if isinstance(case, Conv) else case.k
            if channels * np.dtype({"s8": "i1", "f16": "u2", "bf16": "u2"}.get(element, "f4")).itemsize % 16:
                continue  # needs kernels with smaller pieces than are built here
            mine = [
                k for k in kernels
                if (k["template"], k["element"]) == (case.template, element) and (k["unit"] != "dot" or case.rows <= k["rows"])
                and (k["unit"] != "tma" or fits_windows(case, element))
            ]  # fmt: skip
            if not mine:
                continue
            rows += _time_case(device, functions, mine, case, number, element)
            (folder / "results.json").write_text(json.dumps(rows, indent=1))
    return rows


def _time_case(
    device: Device, functions: dict[str, Any], kernels: list[Any], case: Gemm | Conv, number: int, element: str
) -> list[dict[str, Any]]:
    a, b = case.operands(element)
    picked, expected = case.expected(element, a, b)
    dtype = np.int32 if element == "s8" else np.float32
    addresses = [device.upload(x) for x in (a, b, np.zeros(case.result, dtype))]
    launches = max(1, min(GRAPH_LAUNCHES, int(1e12 / case.operations)))
    theirs = torch_milliseconds(case, element, launches)
    columns = case.result[1] // (case.repeats if case.template == "conv" else 1)
    rows = []
    for kernel in kernels:
        tiles = (-(-case.rows // kernel["rows"]), -(-columns // kernel["columns"]))
        words = case.words(addresses[0], addresses[1], addresses[2], tiles)
        grid = complete(device, kernel, words, addresses)
        launch = partial(device.launch, functions[kernel["name"]], grid, kernel["threads"], kernel["shared"], words)
        device.clear(addresses[2], int(np.prod(case.result)) * 4)
        launch()
        found = device.download(addresses[2], case.result, dtype)[picked]
        error = float(np.abs(found - expected).max() / np.abs(expected).max())
        time = device.milliseconds(launch, launches)
        row = {
            "case": str(case), "kernel": kernel["name"], "ms": time, "torch_ms": theirs, "tflops": case.operations / time / 1e9,
            "error": error, "right": error <= TOLERANCES[element], "chosen": kernel["chosen"][number],
        }  # fmt: skip
        rows.append(row)
        beside = "-" if theirs is None else f"{theirs * 1e3:9.1f} us"
        print(
            f"{case} {kernel['name']:24}{'*' if row['chosen'] else ' '} {time * 1e3:9.1f} us {row['tflops']:7.1f} TFLOP/s"
            f"  torch {beside}  error {error:.1e}{'' if row['right'] else ' WRONG'}",
            flush=True,
        )
    device.free(*addresses)
    return rows


def fits_windows(case: Gemm | Conv, element: str) -> bool:
    """Whether the copy engine can bring the operands of a case whose rows are aligned."""
    from minicc.kernels.cuda_tiles import ROW, SIZES

    return isinstance(case, Gemm) or (case.groups == 1 and case.channels * SIZES[element] % ROW == 0)


def complete(device: Device, kernel: dict[str, Any], words: list[int], addresses: list[int]) -> int:
    """Adds to a kernel's words where its tensor maps and its workspace are, notes these among `addresses`; returns the number of
    blocks."""
    from minicc.kernels.cuda_template import CUDA_TEMPLATES
    from minicc.kernels.template import TEMPLATES
    from minicc.targets.cuda import parse_cuda_target

    given = {"ELEMENT": kernel["element"], "TILE": kernel["tile"], "SPLITS": kernel["splits"], "PIECE": 16,
             "B_PIECE": 16}  # fmt: skip
    named = dict(zip(TEMPLATES[kernel["template"]].words, words))
    launch = CUDA_TEMPLATES[kernel["template"]].launch(named, given, parse_cuda_target("cuda:sm_90"))
    words[: len(named)] = named.values()
    for map_ in launch.maps:
        addresses.append(device.upload(np.frombuffer(device.encode(map_), np.uint8)))
        words[map_.word] = addresses[-1]
    if launch.workspace:
        addresses.append(device.upload(np.zeros(launch.workspace, np.uint8)))
        words.append(addresses[-1])
    return launch.grid[0]


def torch_milliseconds(case: Gemm | Conv, element: str, launches: int) -> float | None:
    """The same in PyTorch; None without PyTorch or where it has no such operation."""
    try:
        import torch
    except ImportError:
        return None
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = element == "tf32"
    torch.backends.cudnn.benchmark = True
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16, "s8": torch.int8}.get(element, torch.float32)
    try:
        call = case.torch(element, dtype)
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(launches):
                call()
    except RuntimeError as error:
        print(f"torch: {error}"[:100])
        return None
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, metavar="DIR")
    parser.add_argument("--run", type=Path, metavar="DIR")
    arguments = parser.parse_args()
    if arguments.build:
        build(arguments.build)
    if arguments.run:
        wrong = [row for row in run(arguments.run) if not row["right"]]
        if wrong:
            raise SystemExit(f"{len(wrong)} results are wrong")


if __name__ == "__main__":
    main()
