"""Compiles templates once per set of constants and calls them on numpy arrays, with own epilogues."""

from __future__ import annotations

import ctypes
import itertools
from functools import cache
from typing import Any

import numpy as np

from minicc.codegen.objects import compile_object
from minicc.kernels import template
from minicc.runtime.objects import LoadedObjects, load_objects
from minicc.targets.cpu import CpuTarget, host_target, parse_target

Array = np.ndarray[Any, Any]
Entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
EPS = float(np.finfo(np.float32).eps)

_HEAD = """
import numpy as np
from minicc.kernels.cpu.intrinsics import arg, f32_of_bits, ptr_f32, ld, st
f32 = np.float32

def epilogue(args, b0, b1, i, j, acc):
    at = b0 * arg(args, {base} + 1) + b1 * arg(args, {base} + 2) + i * arg(args, {base} + 3) + j
    bias = ld(ptr_f32(arg(args, {base} + 4)), j)
    rest = ld(ptr_f32(arg(args, {base} + 5)), at)
    st(ptr_f32(arg(args, {base})), at, {value})
"""
# Name -> (expression on acc, bias and rest; the same in numpy).
EPILOGUES = {
    "none": "acc",
    "bias": "acc + bias",
    "residual": "max(acc + bias + rest, f32(0))",
    "bits": "f32_of_bits(acc)",
    "scaled": "(acc * f32(0.125) + bias) / (abs(acc) + f32(1))",
}


# Those for sums in float32; "bits" stores the bits of an int32.
FLOAT_EPILOGUES = sorted(set(EPILOGUES) - {"bits"})


def expected_epilogue(kind: str, acc: Array, bias: Array, rest: Array) -> Array:
    """The same expressions in float64."""
    if kind == "none":
        return acc
    if kind == "bias":
        return acc + bias
    if kind == "residual":
        return np.maximum(acc + bias + rest, 0)
    return (acc * 0.125 + bias) / (np.abs(acc) + 1)


def usable_targets() -> list[CpuTarget]:
    """This machine, and the smaller CPU models it can run."""
    fixed = [parse_target(f"cpu:{name}") for name in ("avx2", "sse")]
    return [host_target(), *(t for t in fixed if not t.missing_features())]


TARGETS = {target.name: target for target in usable_targets()}


@cache
def _function(
    name: str, constants: tuple[tuple[str, Any], ...], kind: str, target: str
) -> tuple[Any, LoadedObjects]:
    fused = template.TEMPLATES[name].fused
    base = template.epilogue_base(name)
    epilogue = _HEAD.replace("{base}", str(base)).replace("{value}", EPILOGUES[kind]) if fused else ""
    for offset in range(1, 6):  # `arg` needs a literal
        epilogue = epilogue.replace(f"{base} + {offset}", str(base + offset))
    source = template.render(name, dict(constants), epilogue, TARGETS[target])
    loaded = load_objects({"k": compile_object(source, "k", TARGETS[target])})
    return Entry(loaded.address("k")), loaded


def call(
    name: str,
    constants: dict[str, Any],
    words: dict[str, Any],
    *,
    kind: str = "none",
    tail: tuple[Any, ...] = (),
    target: str = "cpu",
    threads: int = 1,
    cuts: tuple[float, ...] = (0.4,),
) -> None:
    """Bind and run a template; arrays stand for their addresses, `cuts` are where the domain is split.

    Where it has stages, these run in order and the units of each in any order.
    """
    function, _ = _function(name, tuple(sorted(constants.items())), kind, target)
    values = [words.get(word, 0) for word in template.TEMPLATES[name].words]
    numbers = [w.ctypes.data if isinstance(w, np.ndarray) else int(w) for w in (*values, *tail)]
    units = template.bind(name, constants, numbers, TARGETS[target], threads)
    block = np.array(numbers, np.int64)
    for first, count, _ in template.stages(name, constants, numbers):
        for unit in np.random.default_rng(first).permutation(count).tolist():
            function(block.ctypes.data, first + unit, first + unit + 1)
        units = 0
    marks = sorted({0, units, *(int(cut * units) for cut in cuts)})
    for begin, end in itertools.pairwise(marks):
        function(block.ctypes.data, begin, end)


def run_fused(
    name: str,
    constants: dict[str, Any],
    words: dict[str, Any],
    shape: tuple[int, int, int, int],
    kind: str,
    seed: int,
    **options: Any,
) -> tuple[Array, Array, Array]:
    """Run a template whose result has extents (b0, b1, i, j), into rows that are longer than j.

    Returns (result, bias, residual); fails when anything outside the result was written.
    """
    b0, b1, rows, columns = shape
    rng = np.random.default_rng(seed)
    gap = 3
    result = np.full((b0, b1, rows, columns + gap), np.nan, np.float32)
    rest = rng.standard_normal(result.shape).astype(np.float32)
    bias = rng.standard_normal(columns).astype(np.float32)
    strides = [s // 4 for s in result.strides[:3]]
    call(name, constants, words, kind=kind, tail=(result, *strides, bias, rest), **options)
    assert np.isnan(result[..., columns:]).all(), "wrote outside the result"
    return result[..., :columns], bias, rest[..., :columns]


def aligned(array: Array) -> Array:
    """A copy at a 64-byte boundary, as constants and arena buffers are."""
    memory = np.zeros(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def check(result: Array, exact: Array, magnitude: Array, terms: int) -> None:
    """|result - exact| within the worst-case rounding of a float32 sum of `terms` products.

    magnitude: the sum of absolute values that went into each element.
    """
    bound = EPS * (terms + 8) * (np.abs(magnitude) + 1)
    wrong = ~(np.abs(result - exact) <= bound)
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} wrong, first at {np.argwhere(wrong)[0]}"
