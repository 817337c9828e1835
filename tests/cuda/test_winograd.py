"""Winograd's convolutions for CUDA in the PTX interpreter, against shifted products in float64; how far they may be off."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba.cuda.extending", reason="numba-cuda is not installed")
pytest.importorskip("cuda.bindings.nvvm", reason="cuda-bindings is not installed")

from benchmarks.cuda_build import machine_text
from minicc.codegen.cuda import compile_cubin, compile_ptx, find_tool
from minicc.ir.dims import symbol
from minicc.ir.graph import Graph
from minicc.ir.types import bf16, f16, f32
from minicc.kernels.cuda_template import bind, render
from minicc.kernels.cuda_tiles import SIZES, piece_of
from minicc.kernels.cuda_winograd import MOST_LANES, pack_winograd_filters, positions_of
from minicc.kernels.template import TEMPLATES
from minicc.lower.context import Choices
from minicc.lower.lower import lower
from minicc.options import Options
from minicc.runtime.code import build_code
from minicc.runtime.module import CompiledModule
from minicc.runtime.store import Store
from minicc.targets.cuda import CudaTarget, parse_cuda_target
from tests.compiling import saved_and_loaded
from tests.cuda.modules import run_module
from tests.cuda.ptx_interpreter import Memory, PtxError, run
from tests.cuda.test_conv import convolve
from tests.lower.test_winograd import convolution

Array = np.ndarray[Any, Any]
HOPPER, AMPERE = parse_cuda_target("cuda:sm_90"), parse_cuda_target("cuda:sm_80")
TYPES = {"f32": f32, "tf32": f32, "f16": f16, "bf16": bf16}
# Largest error by element and outputs of a tile, in units of the largest input times the largest sum of a filter's magnitudes:
# some times what one rounding errs. It is met by single channels, the errors of many even out.
ROUNDOFF = {"f32": 2.0**-24, "tf32": 2.0**-11, "f16": 2.0**-11, "bf16": 2.0**-8}
BOUND = {(element, out): times * ROUNDOFF[element] for element in ROUNDOFF for out, times in ((2, 3), (4, 16))}
# Largest error of a layer of 64 channels, relative to the largest output.
RELATIVE = {
    ("f32", 2): 1e-6, ("f32", 4): 3e-6, ("tf32", 2): 8e-4, ("tf32", 4): 3e-3, ("f16", 2): 8e-4, ("f16", 4): 3e-3,
    ("bf16", 2): 6e-3, ("bf16", 4): 2.4e-2,
}  # fmt: skip


@lru_cache(maxsize=64)
def ptx(name: str, items: tuple[tuple[str, Any], ...]) -> str:
    return compile_ptx(text_of(name, dict(items)), "kernel", HOPPER)


def text_of(name: str, constants: dict[str, Any]) -> str:
    own = len(TEMPLATES[name].words)
    return render(name, constants, "", own + (1 if TEMPLATES[name].fused else 0))


def launch(name: str, constants: dict[str, Any], words: dict[str, int], memory: Memory, change: Any, result: int = 0) -> None:
    """Runs a step; change: (what to replace in its text, by what), where it is there."""
    text = ptx(name, tuple(constants.items()))
    if change and change[0] in (source := text_of(name, constants)):
        text = compile_ptx(source.replace(*change), "kernel", HOPPER)
    filled = [words[word] for word in TEMPLATES[name].words]
    shape = bind(name, constants, filled, HOPPER)
    filled += [result] if TEMPLATES[name].fused else []
    run(text, "kernel", shape.grid, shape.block, shape.shared_bytes, filled, memory, threads=4096)


def steps(
    element: str, out: int, shape: tuple[int, int, int], channels: int, filters: int, pads: tuple[int, int, int, int],
    gap: int = 0, seed: int = 0, change: Any = None,
) -> tuple[float, float]:  # fmt: skip
    """Largest error of the first and the last step, with a product by numpy between them: in the units of BOUND and of RELATIVE.

    shape: images, height, width. gap: elements behind the channels of a pixel. pads: as ONNX's.
    """
    rng, memory, dtype = np.random.default_rng(seed), Memory(), TYPES[element].numpy
    images, height, width = shape
    x = rng.standard_normal((*shape, channels + gap)).astype(dtype)
    w = (rng.standard_normal((filters, channels, 3, 3)) / 3).astype(dtype)
    padded = np.pad(x[..., :channels].astype(np.float64), [(0, 0), pads[::2], pads[1::2], (0, 0)])
    want = convolve(padded[:, None], w[:, :, None], 1, [1] * 3, [1] * 3, [0] * 3)[:, 0]
    oh, ow = want.shape[1:3]
    size, positions = SIZES[element], positions_of(out)
    tiles = images * -(-oh // out) * -(-ow // out)
    form = np.full((positions, tiles, channels), 77).astype(dtype)
    strides = [step // size for step in x.strides[:3]]
    # The smallest offset that the array may have: less would be refused as not aligned.
    piece = piece_of(*(size * step for step in (*strides, channels)))
    lanes = min(MOST_LANES[out], piece // size)
    words = {
        "X": memory.place(x, lanes * size % 16), "V": memory.place(form), "IMAGES": images, "C": channels,
        **dict(zip(("X_IMAGE", "X_H", "X_W"), strides)), "IH": height, "IW": width, "OH": oh, "OW": ow, "PH": pads[0],
        "PW": pads[1],
    }  # fmt: skip
    kind = "f32" if element == "tf32" else element
    launch("winograd_input", {"ELEMENT": kind, "OUT": out, "LANES": lanes}, words, memory, change)
    found = memory.read(words["V"], form.shape, dtype).astype(np.float32)
    if element == "tf32":
        found = ((found.view(np.uint32) + np.uint32(0x1000)) >> np.uint32(13) << np.uint32(13)).view(np.float32)
    weights = pack_winograd_filters(w, out, element)[..., :channels].astype(np.float32)
    products = np.matmul(found, weights.swapaxes(1, 2))
    words |= {"P": memory.place(products), "N": filters}
    result = memory.place(np.full(want.shape, 77, np.float32))
    launch("winograd_output", {"OUT": out}, words, memory, change, result)
    got = memory.read(result, want.shape, np.float32)
    largest = np.abs(padded).max(initial=1e-3) * np.abs(w.astype(np.float64)).sum((1, 2, 3)).max()
    error = np.abs(got - want).max()
    return float(error / largest), float(error / np.abs(want).max())


@pytest.mark.parametrize(("element", "out"), BOUND)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 11), st.integers(1, 11)), channels=st.sampled_from([1, 2, 4, 6, 12, 32]),
    filters=st.integers(1, 40), pads=st.tuples(*[st.integers(0, 3)] * 4), gap=st.sampled_from([0, 0, 1, 2, 4]),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=8, deadline=None)
def test_both_transforms(element, out, shape, channels, filters, pads, gap, seed):
    """Ragged sizes, padding of its own on every side, and pixels that are not aligned, among them."""
    images, height, width = shape
    shape = images, max(height, 3 - pads[0] - pads[2]), max(width, 3 - pads[1] - pads[3])
    assert steps(element, out, shape, channels, filters, pads, gap, seed)[0] <= BOUND[element, out]


@pytest.mark.parametrize(("element", "out"), BOUND)
def test_the_error_of_a_layer(element, out):
    found, relative = steps(element, out, (1, 14, 14), 64, 64, (1, 1, 1, 1))
    print(f"{element} F({out}x{out},3x3): {found:.1e} of all magnitudes, {relative:.1e} of the largest output")
    assert found <= BOUND[element, out] and relative <= RELATIVE[element, out]


# Outputs are 5 x 7 of 2 images: no multiples of a tile.
RAGGED = ((2, 5, 7), 8, 6, (1, 1, 1, 1))
FAULTS = {
    "padding above": ("- arg(args, PH)", "+ arg(args, PH)"),
    "padding left": ("- arg(args, PW)", "- 0"),
    "the image is a line higher": ("(arg(args, IH), arg(args, IW))", "(arg(args, IH) + 1, arg(args, IW))"),
    "the image is a pixel wider": ("(arg(args, IH), arg(args, IW))", "(arg(args, IH), arg(args, IW) + 1)"),
    "tiles rounded down": ("across = (arg(args, OW) + OUT - 1) // OUT", "across = arg(args, OW) // OUT"),
    "lines of tiles rounded down": ("down = (arg(args, OH) + OUT - 1) // OUT", "down = arg(args, OH) // OUT"),
    "positions too close": ("apart = SIZE * tiles * arg(args, C)", "apart = SIZE * (tiles - 1) * arg(args, C)"),
    "a column too many": ("if columns > 1:", "if columns > 0:"),
    "lines behind the last": ("rows = min(arg(args, OH) - y, OUT)", "rows = OUT"),
    "lines of the result too close": ("i += arg(args, OW)", "i += arg(args, OW) - 1"),
    "threads share their places": ("shared_memory() + int32(4) * tid", "shared_memory() + int32(4) * (tid & int32(~1))"),
}


@pytest.mark.parametrize("out", MOST_LANES)
def test_without_a_fault(out):
    assert steps("f32", out, *RAGGED)[0] <= BOUND["f32", out]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_noticed(fault):
    """Whatever becomes of a fault, one of the tiles notices it."""
    noticed = []
    for out in MOST_LANES:
        texts = [text_of("winograd_input", {"ELEMENT": "f32", "OUT": out, "LANES": 1}), text_of("winograd_output", {"OUT": out})]
        assert any(FAULTS[fault][0] in text for text in texts)
        try:
            noticed.append(not steps("f32", out, *RAGGED, change=FAULTS[fault])[0] <= BOUND["f32", out])
        except PtxError:
            noticed.append(True)
    assert any(noticed)


@pytest.mark.parametrize("target", [AMPERE, HOPPER], ids=lambda target: target.arch)
@pytest.mark.parametrize(("element", "out"), [("f32", 2), ("f32", 4), ("f16", 2), ("bf16", 2)])
def test_machine_code(target: CudaTarget, element: str, out: int) -> None:
    if find_tool("ptxas") is None or find_tool("cuobjdump") is None:
        pytest.skip("ptxas or cuobjdump is not installed")
    lanes = MOST_LANES[out]
    built = compile_cubin(text_of("winograd_input", {"ELEMENT": element, "OUT": out, "LANES": lanes}), "kernel", target)
    assert built.spills == 0
    code = machine_text(built.data)
    width = {16: ".128", 8: ".64", 4: ""}[lanes * SIZES[element]]
    assert code.count(f"LDG.E{width}.CONSTANT") == code.count(f"STG.E{width} ") == positions_of(out)
    assert "LDL" not in code and "STL" not in code
    assert compile_cubin(text_of("winograd_output", {"OUT": out}), "kernel", target).spills == 0


# ------------------------------------------------------------------------------------------------ whole convolutions


@lru_cache(maxsize=16)
def compiled(element: str, out: int, channels: int, filters: int, layout: str) -> tuple[CompiledModule, Graph]:
    """A convolution with bias, Relu and a shift, of any size, by one of the ways that lowering leaves open."""
    dtype = TYPES[element]
    graph = convolution(channels, filters, (symbol("n"), symbol("h"), symbol("w")), layout, dtype)
    options = Options.from_env().override(precision="tf32" if element == "tf32" else "fp32")
    program = saved_and_loaded(lower(graph, HOPPER, options, choices=Choices({(): f"winograd {out}x{out}"})))
    names = [kernel.name for kernel in program.kernels]
    assert f"winograd_output_{out}x{out}" in names, names
    return CompiledModule(program, build_code(program.kernels, HOPPER, Store(options.store_dir)), HOPPER, options), graph


@pytest.mark.parametrize(
    ("element", "out", "channels", "layout"),
    [("f32", 4, 21, "NCHW"), ("tf32", 2, 13, "NHWC"), ("f16", 2, 20, "NHWC"),
     *(pytest.param(*rest, marks=pytest.mark.slow)
       for rest in (("f32", 2, 20, "NHWC"), ("tf32", 4, 20, "NHWC"), ("bf16", 2, 3, "NCHW"), ("f16", 2, 65, "NCHW")))],
)  # fmt: skip
@given(sizes=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)), seed=st.integers(0, 99))
@settings(max_examples=3, deadline=None)
def test_convolutions(element, out, channels, layout, sizes, seed):
    """Three steps and an epilogue, of a size that is known when it runs."""
    module, graph = compiled(element, out, channels, 24, layout)
    weights, bias = (v.data.astype(np.float64) for v in graph.nodes[0].attrs["body"].nodes[0].inputs[1:])
    dtype = TYPES[element].numpy
    x = np.random.default_rng(seed).standard_normal((*sizes, channels)).astype(dtype)
    sums = convolve(x[:, None], weights[:, :, None], 1, [1] * 3, [1] * 3, [0, 1, 1])[:, 0]
    want = np.maximum(sums + bias, 0) + 0.25
    given_x = x if layout == "NHWC" else np.ascontiguousarray(np.moveaxis(x, -1, 1))
    (got,) = run_module(module, {"x": given_x})
    got = got if layout == "NHWC" else np.moveaxis(got, 1, -1)
    largest = np.abs(x.astype(np.float64)).max() * np.abs(weights).sum((1, 2, 3)).max()
    rounded = {"f16": 2.0**-11, "bf16": 2.0**-8}.get(element, 0.0) * np.abs(want).max() * 3  # by the steps of the epilogue
    assert np.abs(got.astype(np.float64) - want).max() <= BOUND[element, out] * largest + rounded
