"""Attention in one CUDA kernel: results in the PTX interpreter against numpy, planted faults, whole modules."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

pytest.importorskip("numba.cuda.extending", reason="numba-cuda is not installed")
pytest.importorskip("cuda.bindings.nvvm", reason="cuda-bindings is not installed")

import minicc
from benchmarks.cuda_build import machine_text
from minicc.codegen.cuda import compile_cubin, compile_ptx, find_tool
from minicc.kernels import cuda_attention
from minicc.kernels.cuda_attention import CONSTANTS, join_constants, partial_size, shared_bytes
from minicc.kernels.cuda_template import bind, render
from minicc.kernels.cuda_tiles import SIZES, piece_of, round_tf32
from minicc.kernels.template import TEMPLATES
from minicc.targets.cuda import CudaTarget, parse_cuda_target
from tests.cuda.modules import node_model, reference, run_module
from tests.cuda.ptx_interpreter import Memory, PtxError, run
from tests.cuda.ptx_values import to_bf16
from tests.kernels.test_attention import exact

Array = np.ndarray[Any, Any]
HOPPER, AMPERE = parse_cuda_target("cuda:sm_90"), parse_cuda_target("cuda:sm_80")
LAYOUT = TEMPLATES["attention"].words
# Weights are rounded to 8 or 11 bits, and so are results of 16; relative to the largest value, of operands as multiplied.
LIMITS = {"f16": 2e-3, "bf16": 1.5e-2, "tf32": 5e-4, "f32": 1e-6}


UNWRITTEN = 0x7E7F


def constants(
    element: str, depth: int, width: int, warps: int = 4, piece: int = 16, mask: str = "none", pairs: int = 1, sharers: int = 1,
    cut: int = 0,
) -> dict[str, Any]:  # fmt: skip
    return dict(zip(CONSTANTS, (element, warps, sharers, depth, width, piece, piece, piece, mask, pairs, cut, 0, 0), strict=True))


@lru_cache(maxsize=64)
def _ptx(items: tuple[tuple[str, Any], ...]) -> str:
    return compile_ptx(render("attention", dict(items), "", len(LAYOUT)), "kernel", HOPPER)


def ptx(given_: dict[str, Any]) -> str:
    return _ptx(tuple(given_.items()))


def stored(element: str, numbers: Array) -> Array:
    """float32 numbers as the bits of elements."""
    if element.endswith("32"):
        return numbers.astype(np.float32).view(np.uint32)
    return to_bf16(numbers) if element == "bf16" else numbers.astype(np.float16).view(np.uint16)


def meant(element: str, bits: Array) -> Array:
    """What bits stand for, in float32."""
    if element == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(np.float32 if element.endswith("32") else np.float16).astype(np.float32)


def attend(
    sizes: tuple[int, int, int, int, int, int, int], element: str = "f16", *, rows_first: bool = False, gap: int = 0,
    mask_axes: str = "", mask_type: str = "f32", causal: bool = False, warps: int = 4, sharers: int = 1, cut: int = 0,
    seed: int = 0, spread: float = 1.0, grain: float = 0, change: Any = None, change_join: Any = None, schedule: str = "together",
) -> float:  # fmt: skip
    """Largest difference from the definition, relative to the largest value. sizes: (batch, groups, group, s, t, d, dv).

    rows_first: heads lie [B, S, H, D]; gap: elements behind each row. mask_axes: those of "bhsk" along which a mask varies.
    grain: what all values are, and up to their signs all elements of queries and keys. cut: the most blocks where these may
    share out keys. change, change_join: of the texts that are run.
    """
    batch, groups, group, s, t, d, dv = sizes
    heads, rng, memory = groups * group, np.random.default_rng(seed), Memory()
    words = dict.fromkeys(LAYOUT, 0)
    words |= {"B": batch, "GROUPS": groups, "GROUP": group, "S": s, "T": t, "D": d, "DV": dv, "CAUSAL": int(causal)}
    scale = np.float32(1 / np.sqrt(d))
    words["SCALE"] = int(scale.view(np.int32))
    operands, row = {}, {}
    for name, count, length, size in (("Q", heads, s, d), ("K", groups, t, d), ("V", groups, t, dv), ("Y", heads, s, dv)):
        shape = (batch, length, count, size + gap) if rows_first else (batch, count, length, size + gap)
        numbers = rng.standard_normal(shape) * (spread if name == "Q" else 1.0)
        if grain:
            numbers = grain * (1 if name == "V" else np.sign(numbers))
            numbers = np.broadcast_to(numbers, shape)
        bits = stored(element, numbers.astype(np.float32))
        if name == "Y":
            bits[...] = UNWRITTEN
        words[name] = memory.place(bits)
        view = bits.transpose(0, 2, 1, 3) if rows_first else bits
        steps = [step // bits.itemsize for step in view.strides]
        words |= {f"{name}_{axis}": step for axis, step in zip(("B", "H", "ROW", "D"), steps) if f"{name}_{axis}" in words}
        operands[name], row[name] = meant(element, view[..., :size]), steps[:3]
        if element == "tf32":
            operands[name] = round_tf32(operands[name])
        if name == "Y":
            result = (words[name], shape, bits.dtype)
    mask = None
    if mask_axes:
        shape = tuple(n if axis in mask_axes else 1 for axis, n in zip("bhsk", (batch, heads, s, t)))
        numbers = rng.standard_normal(shape).astype(np.float32) * 3
        # Added to all scores of a query, -10000 would leave them three decimals in float32: exactly what is not tested here.
        low = [-np.inf] + [-10000] * ("k" in mask_axes) + [np.finfo(np.float32).min] * (mask_type == "f32")
        numbers[rng.random(shape) < 0.4] = rng.choice(low)
        bits = stored(mask_type, numbers)
        mask = meant(mask_type, bits)
        words["MASK"] = memory.place(bits)
        strides = np.broadcast_to(bits, (batch, heads, s, t)).strides
        words |= {f"M_{a}": step // bits.itemsize for a, step in zip(("B", "H", "ROW", "KEY"), strides)}
    size = SIZES[element]
    piece = piece_of(size * (d + gap), size * (dv + gap))
    chosen = constants(element, d, dv, warps, piece, mask_type if mask_axes else "none", int((dv + gap) % 2 == 0 and dv % 2 == 0),
                       sharers, cut)  # fmt: skip
    if cut:
        words["PARTIALS"] = memory.place(np.full(partial_size(cut, chosen), np.nan, np.float32))
    for given_, changed in ((chosen, change), (join_constants(chosen), change_join)):
        filled = [words[name] for name in LAYOUT]
        launch = bind("attention", given_, filled, HOPPER)
        if launch.grid[0]:
            text = ptx(given_)
            if changed is not None:
                assert changed(text) != text
                text = changed(text)
            run(text, "kernel", launch.grid, launch.block, launch.shared_bytes, filled, memory, schedule, threads=4096)
    found = memory.read(*result)
    found = found.transpose(0, 2, 1, 3) if rows_first else found
    assert (found[..., dv:] == UNWRITTEN).all(), "wrote outside the result"
    want = exact(operands["Q"], operands["K"], operands["V"], mask, float(scale), causal) if t else np.zeros_like(operands["Y"])
    found = meant(element, np.ascontiguousarray(found[..., :dv]))
    return float(np.abs(found - want).max() / max(1.0, np.abs(operands["V"]).max(initial=0)))


def close(sizes: tuple[int, int, int, int, int, int, int], element: str = "f16", **options: Any) -> None:
    assert attend(sizes, element, **options) <= LIMITS[element]


# Few head sizes, whose kernels are compiled once: odd, below and above a panel, the largest.
HEADS = st.sampled_from([(64, 64, 0), (40, 24, 8), (37, 41, 3), (128, 80, 0)])


@pytest.mark.parametrize("element", LIMITS)
@given(
    groups=st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]), s=st.integers(1, 100), t=st.integers(1, 150), heads=HEADS,
    rows_first=st.booleans(), mask=st.sampled_from(["", "", "bhsk", "k", "bk", "sk", "hs"]), causal=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=3, deadline=None)
def test_ragged_shapes(element, groups, s, t, heads, rows_first, mask, causal, seed):
    d, dv, gap = heads
    close((2, *groups, s, t, d, dv), element, rows_first=rows_first, gap=gap, mask_axes=mask, causal=causal, seed=seed)


@pytest.fixture
def short_parts() -> Iterator[None]:
    """Parts of one tile of keys, so that few keys make several."""
    with patch.object(cuda_attention, "LEAST", 64):
        yield


@pytest.mark.parametrize("element", ["f16", "tf32", "f32"])
@given(
    groups=st.sampled_from([(1, 1, 1), (2, 1, 16), (1, 3, 5), (2, 2, 7), (1, 16, 1)]), t=st.integers(1, 300), heads=HEADS,
    rows_first=st.booleans(), mask=st.sampled_from(["", "", "bhsk", "k", "sk"]), causal=st.booleans(),
    cut=st.sampled_from([0, 3, 20]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=3, deadline=None)
def test_few_queries(element, groups, t, heads, rows_first, mask, causal, cut, seed):
    """All warps of a block make the same rows, of queries and of heads, and blocks share out the keys."""
    d, dv, gap = heads
    with patch.object(cuda_attention, "LEAST", 64):
        close((2, *groups, t, d, dv), element, rows_first=rows_first, gap=gap, mask_axes=mask, causal=causal, sharers=4, cut=cut,
              seed=seed)  # fmt: skip


@pytest.mark.parametrize("sizes", [(1, 1, 3, 30, 170, 64, 64), (1, 1, 1, 100, 140, 40, 24), (1, 1, 1, 130, 70, 64, 64)])
def test_blocks_share_out_keys(sizes: tuple[int, int, int, int, int, int, int], short_parts: None) -> None:
    """Causal: of some rows whole parts may not be attended, and of some nothing."""
    close(sizes, causal=True, cut=12)


def test_blocks_share_out_masked_keys(short_parts: None) -> None:
    close((1, 2, 3, 10, 170, 64, 64), cut=12, mask_axes="hk", schedule="warps")


@pytest.mark.parametrize("t", [600, 1024])
def test_parts_have_a_least_length(t: int) -> None:
    close((1, 1, 4, 1, t, 64, 64), sharers=4, cut=264)


@given(tiles=st.integers(1, 500), keys=st.integers(0, 100_000), most=st.integers(0, 300))
def test_parts_fit_the_grid(tiles: int, keys: int, most: int) -> None:
    each = cuda_attention.part_keys(tiles, keys, most)
    parts = -(-keys // each)
    assert each % cuda_attention.KEYS == 0
    assert parts <= 1 or (tiles * parts <= most and each >= cuda_attention.LEAST)


@given(group=st.integers(1, 20), s=st.integers(1, 40), t=st.integers(0, 5000), b=st.integers(1, 9))
def test_one_of_two_forms_is_launched(group: int, s: int, t: int, b: int) -> None:
    """Where the number of queries is known only now, and the joining kernel where there are parts to join."""
    words = dict.fromkeys(LAYOUT, 0) | {"B": b, "GROUPS": 2, "GROUP": group, "S": s, "T": t}
    rows = constants("f16", 64, 64, cut=264) | {"FEW": 1}
    few = {**rows, "SHARERS": 4, "FEW": 0}
    filled = [[words[name] for name in LAYOUT] for _ in range(3)]
    grids = [bind("attention", c, w, HOPPER).grid[0] for c, w in zip((rows, few, join_constants(rows)), filled)]
    keys = [w[LAYOUT.index("KEYS")] for w in filled]
    taken = int(group * s <= 16)
    assert grids[taken] and not grids[1 - taken] and keys[taken] == keys[2]
    assert grids[2] == (2 * b * group * s if t > keys[2] else 0)


@pytest.mark.parametrize("mask_type", ["f16", "bf16"])
def test_blocks_of_eight_warps_and_masks_of_16_bits(mask_type: str) -> None:
    close((1, 1, 2, 150, 70, 64, 64), mask_type, warps=8, mask_axes="bk", mask_type=mask_type, causal=True)


@pytest.mark.parametrize(("spread", "element"), [(30.0, "f16"), (1000.0, "f16"), (30.0, "f32")])
def test_large_scores(spread: float, element: str) -> None:
    """Maxima that grow from tile to tile scale the earlier sums down, by factors that become 0."""
    # Scores that are larger by so much round by so much more.
    assert attend((1, 1, 1, 20, 300, 64, 64), element, spread=spread) <= LIMITS[element] * (10 if element == "f32" else 1)


def test_float32_rows_that_are_not_aligned() -> None:
    for element in ("tf32", "f32"):
        close((1, 2, 1, 9, 40, 37, 41), element, gap=2)


# A little less than what rounds to the next number of 10 bits: cut off, it would lose nearly a unit.
GRAIN = 1 + 0.9 * 2**-10
ROUNDING_FAULTS = {
    "operands": lambda text: re.sub(r"st\.shared\.v4\.u32 \[%r\d+\], \{(%r\d+),(?!\1)[^;]*;", "", text),
    "weights": lambda text: _cut_off(text, set(re.findall(r"%r\d+", " ".join(re.findall(r"st\.shared\.v4\.u32[^;]*;", text))))),
}


def _cut_off(text: str, kept: set[str]) -> str:
    """The text without roundings into other registers than these."""
    def change(found: re.Match[str]) -> str:
        return found[0] if found[1] in kept else f"mov.b32 {found[1]}, {found[2]};"

    return re.sub(r"cvt\.rna\.tf32\.f32 (%r\d+), (%f\d+);", change, text)


@pytest.mark.parametrize("sharers", [1, 4])
def test_operands_and_weights_are_rounded_to_tf32(sharers: int) -> None:
    sizes = (1, 1, 1, 12, 200, 64, 64)
    assert attend(sizes, "tf32", grain=GRAIN, sharers=sharers) < 1e-4
    for change in ROUNDING_FAULTS.values():
        assert attend(sizes, "tf32", grain=GRAIN, sharers=sharers, change=change) > 2e-4


def test_queries_that_may_attend_no_key_give_zeros() -> None:
    """Causal, with more queries than keys: the first ones see nothing, whole tiles of them too. And without any keys."""
    close((1, 1, 1, 200, 30, 64, 64), causal=True)
    close((1, 1, 1, 5, 0, 64, 64))


def _without(start: str, which: int) -> Any:
    def change(text: str) -> str:
        place = list(re.finditer(rf"(?m)^\s*{re.escape(start)}[^;]*;", text))[which]
        return text[: place.start()] + "\n" + text[place.end() :]

    return change


def _behind(text: str, start: str, pattern: str, instead: str) -> str:
    """The text with a pattern replaced behind the last `start`."""
    before, found, after = text.rpartition(start)
    return before + found + re.sub(pattern, instead, after)


FAULTS = {
    "no wait for the first tile": _without("cp.async.wait_group", 0),
    "no wait for the next tile": _without("cp.async.wait_group", 1),
    "no barrier before the first tile": _without("bar.sync", 0),
    "no barrier between tiles": _without("bar.sync", 1),
    "a copy is not committed": _without("cp.async.commit_group", 1),
    "rows behind the last key are not cleared": lambda text: re.sub(r"st\.shared\.v4\.u32[^;]*;", "", text),
    "values are not transposed": lambda text: text.replace(".x4.trans", ".x4"),
    "maxima of a thread's own scores": lambda text: re.sub(
        r"shfl\.sync\.bfly\.b32 (%f\d+), (%f\d+)[^;]*;", r"mov.f32 \1, \2;", text
    ),
}


FAULTY = (1, 1, 1, 60, 200, 64, 64)  # more tiles than stages
POWER, ONES = r"ex2\.approx\.ftz\.f32 (%f\d+), [^;]*;", "mov.f32 \\1, 0f3F800000;"
# Of blocks whose warps make the same rows and which share out the keys, and of the kernel that joins them.
PART_FAULTS = {
    "no barrier between the warps' results": _without("bar.sync", -1),
    "totals are not stored": lambda text: re.sub(r"st\.global\.f32[^;]*;", "", text),
    "warps' results are added as they are": lambda text: _behind(text, "bar.sync", POWER, ONES),
}
JOIN_FAULTS = {
    "no barrier": _without("bar.sync", 0),
    "parts are added as they are": lambda text: re.sub(POWER, ONES, text),
    "largest scores of a lane's own parts": lambda text: re.sub(
        r"shfl\.sync\.bfly\.b32 (%f\d+), (%f\d+)[^;]*;", r"mov.f32 \1, \2;", text
    ),
}


def test_warps_one_after_another() -> None:
    close(FAULTY, schedule="warps")
    close((*FAULTY[:4], 30, 64, 64), schedule="warps")


EXACT_FAULTS = ("no wait for the next tile", "no barrier between tiles", "rows behind the last key are not cleared")


CASES = [*((fault, "f16") for fault in FAULTS), *((fault, "f32") for fault in EXACT_FAULTS)]


@pytest.mark.parametrize(("fault", "element"), CASES)
def test_faults_are_noticed(fault: str, element: str) -> None:
    # With one tile, rows behind the last key hold what memory held before.
    sizes = (*FAULTY[:4], 30, 64, 64) if "cleared" in fault else FAULTY
    try:
        found = attend(sizes, element, change=FAULTS[fault], schedule="warps")
    except PtxError:
        return
    assert not found <= LIMITS[element]


@pytest.mark.parametrize("fault", [*PART_FAULTS, *JOIN_FAULTS])
def test_faults_of_parts_are_noticed(fault: str, short_parts: None) -> None:
    options: dict[str, Any] = {"sharers": 4, "cut": 9, "schedule": "warps", "spread": 3.0}
    sizes = (1, 1, 4, 2, 500, 64, 64)
    close(sizes, **options)
    try:
        found = attend(sizes, change=PART_FAULTS.get(fault), change_join=JOIN_FAULTS.get(fault), **options)
    except PtxError:
        return
    assert not found <= LIMITS["f16"]


FAST = [
    ("f16", 64, 4, "none", 1), ("f16", 128, 8, "f32", 1), ("f16", 128, 4, "f32", 4), ("tf32", 128, 8, "f32", 1),
    ("tf32", 128, 4, "f32", 4), ("f32", 64, 4, "none", 1),
]  # fmt: skip
SLOW = [
    (element, d, w, "f16", sharers)
    for element in ("f16", "tf32", "f32") for d in (32, 80, 128) for w, sharers in ((4, 1), (4, 4), (8, 1))
]  # fmt: skip
PRODUCTS = {
    "f16": ("HMMA.16816.F32 ", "LDSM.16.M88.4", "LDSM.16.MT88.4"),
    "tf32": ("HMMA.1688.F32.TF32", "LDSM.16.M88.4"),
    "f32": ("FFMA", "LDS.128", "LDS.64"),
}


@pytest.mark.parametrize("target", [AMPERE, HOPPER], ids=lambda target: target.arch)
@pytest.mark.parametrize(
    ("element", "size", "warps", "mask", "sharers"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_machine_code(target: CudaTarget, element: str, size: int, warps: int, mask: str, sharers: int) -> None:
    if find_tool("ptxas") is None or find_tool("cuobjdump") is None:
        pytest.skip("ptxas or cuobjdump is not installed")
    chosen = constants(element, size, size, warps, mask=mask, sharers=sharers, cut=264)
    assert shared_bytes(chosen) <= target.shared_bytes
    built = compile_cubin(render("attention", chosen, "", len(LAYOUT)), "kernel", target)
    assert built.spills == 0
    assert compile_cubin(render("attention", join_constants(chosen), "", len(LAYOUT)), "kernel", target).registers <= 64
    code = machine_text(built.data)
    for instruction in (*PRODUCTS[element], "LDGSTS", "MUFU.EX2"):
        assert instruction in code, instruction


def transformer_block(rng: np.random.Generator, heads: int = 2, size: int = 32) -> onnx.ModelProto:
    """Layer norm, attention written out as exporters do, residual, layer norm, two products with Gelu, residual."""
    wide = heads * size

    def weights(name: str, *shape: int) -> onnx.NodeProto:
        numbers = (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
        return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(numbers))

    def whole(name: str, *numbers: int) -> onnx.NodeProto:
        return helper.make_node("Constant", [], [name], value_ints=numbers)

    nodes = [
        *(weights(f"w{n}", wide, wide) for n in "qkvo"), weights("up", wide, 2 * wide), weights("down", 2 * wide, wide),
        helper.make_node("Constant", [], ["ones"], value=numpy_helper.from_array(np.ones(wide, np.float32))),
        helper.make_node("Constant", [], ["factor"], value_float=float(size**-0.5)),
        helper.make_node("Constant", [], ["zero"], value_float=0.0),
        helper.make_node("Constant", [], ["low"], value_float=float(np.finfo(np.float32).min)),
        helper.make_node("Where", ["keep", "zero", "low"], ["mask"]),
        whole("apart", 0, 0, heads, size), whole("joined", 0, 0, wide),
        helper.make_node("LayerNormalization", ["x", "ones"], ["n"], axis=-1),
    ]  # fmt: skip
    for name, perm in (("q", (0, 2, 1, 3)), ("k", (0, 2, 3, 1)), ("v", (0, 2, 1, 3))):
        nodes += [
            helper.make_node("MatMul", ["n", f"w{name}"], [f"{name}1"]),
            helper.make_node("Reshape", [f"{name}1", "apart"], [f"{name}2"]),
            helper.make_node("Transpose", [f"{name}2"], [name], perm=perm),
        ]
    steps = [
        ("MatMul", "q k", "s1"), ("Mul", "s1 factor", "s2"), ("Add", "s2 mask", "s3"), ("Softmax", "s3", "p"),
        ("MatMul", "p v", "a1"), ("Transpose", "a1", "a2"), ("Reshape", "a2 joined", "a3"), ("MatMul", "a3 wo", "a4"),
        ("Add", "x a4", "r"), ("LayerNormalization", "r ones", "m"), ("MatMul", "m up", "u1"), ("Gelu", "u1", "u2"),
        ("MatMul", "u2 down", "d"), ("Add", "r d", "y"),
    ]  # fmt: skip
    attributes = {"Softmax": {"axis": -1}, "Transpose": {"perm": (0, 2, 1, 3)}, "LayerNormalization": {"axis": -1}}
    nodes += [helper.make_node(op, given_.split(), [to], **attributes.get(op, {})) for op, given_, to in steps]
    kind = onnx.TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info("x", kind, ["b", "s", wide]),
              helper.make_tensor_value_info("keep", onnx.TensorProto.BOOL, ["b", 1, 1, "s"])]  # fmt: skip
    graph = helper.make_graph(nodes, "block", inputs, [helper.make_tensor_value_info("y", kind, ["b", "s", wide])])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.mark.parametrize(
    ("precision", "limit"), [("fp16", 4e-3), pytest.param("tf32", 1e-3, marks=pytest.mark.slow), ("fp32", 2e-6)]
)
def test_a_transformer_block(precision: str, limit: float) -> None:
    """The mask stays float32; no step copies heads, neither of operands nor of the result."""
    rng = np.random.default_rng(5)
    proto = transformer_block(rng)
    module = minicc.compile(proto, target="cuda:sm_90", precision=precision, strict=True)
    kernels = [module.program.kernels[step.kernel] for step in module.program.steps]
    (element,) = [dict(kernel.constants)["ELEMENT"] for kernel in kernels if kernel.name == "attention"]
    assert element == {"fp16": "f16", "tf32": "tf32", "fp32": "f32"}[precision]
    assert not [kernel.name for kernel in kernels if "transpose" in kernel.name or "softmax" in kernel.name]
    feeds = {"x": rng.standard_normal((2, 37, 64)).astype(np.float32), "keep": np.ones((2, 1, 1, 37), bool)}
    feeds["keep"][1, ..., 20:] = False
    (want,) = reference(proto, feeds)
    (found,) = run_module(module, feeds)
    assert np.abs(found - want).max() <= limit * np.abs(want).max()


@pytest.mark.parametrize("queries", [1, "s"])
@pytest.mark.parametrize("keys", [530, "t"])
def test_one_query_beside_a_long_cache(queries: Any, keys: Any) -> None:
    """Sizes known or not: a second kernel joins what the blocks found, but not for few keys."""
    rng = np.random.default_rng(6)

    def feeds(s: int, t: int) -> dict[str, Array]:
        shapes = {"q": (1, 4, s, 64), "k": (1, 2, t, 64), "v": (1, 2, t, 64)}
        return {name: rng.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()}

    proto = node_model("Attention", feeds(1, 530), ["y"], opset=23, scale=0.125)
    for number, size in ((0, queries), (1, keys), (2, keys)):
        if isinstance(size, str):
            proto.graph.input[number].type.tensor_type.shape.dim[2].dim_param = size
    module = minicc.compile(proto, target="cuda:sm_90", strict=True)
    *kernels, join = [module.program.kernels[step.kernel] for step in module.program.steps]
    assert join.name == "attention_join"
    assert [dict(kernel.constants)["SHARERS"] for kernel in kernels] == ([4] if queries == 1 else [1, 4])
    for s, t in ((1, 530), *([(9, 530)] if queries == "s" else []), *([(1, 100)] if keys == "t" else [])):
        given_ = feeds(s, t)
        (found,) = run_module(module, given_)
        want = exact(*(given_[name].astype(np.float32) for name in "qkv"), None, 0.125, False)
        assert np.abs(found - want).max() <= LIMITS["f16"] * 3


def test_a_saved_module(tmp_path: Path) -> None:
    """Without a mask, of sizes not known: kernels of both forms, and the one that joins."""
    rng = np.random.default_rng(7)
    feeds = {name: rng.standard_normal((1, heads, length, 24)).astype(np.float32)
             for name, heads, length in (("q", 4, 3), ("k", 2, 520), ("v", 2, 520))}  # fmt: skip
    proto = node_model("Attention", feeds, ["y"], opset=23, scale=0.2)
    for number, size in enumerate("stt"):
        proto.graph.input[number].type.tensor_type.shape.dim[2].dim_param = size
    module = minicc.compile(proto, target="cuda:sm_90", strict=True)
    module.save(tmp_path / "m.minicc")
    loaded = minicc.load(tmp_path / "m.minicc")
    assert len(loaded.program.steps) == 3 and loaded.code.objects == module.code.objects
    (found,) = run_module(loaded, feeds)
    assert np.abs(found - exact(*feeds.values(), None, 0.2, False)).max() <= LIMITS["f32"] * 4


def test_keys_are_not_shared_out_where_blocks_suffice() -> None:
    shapes = {"q": (64, 8, 1, 64), "k": (64, 8, 4096, 64), "v": (64, 8, 4096, 64)}
    proto = node_model("Attention", {name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, ["y"], opset=23)
    module = minicc.compile(proto, target="cuda:sm_90", strict=True)
    (only,) = [module.program.kernels[step.kernel] for step in module.program.steps]
    assert dict(only.constants)["CUT"] == 0
