"""Generated CUDA loops on the CPU: compiled to PTX, run by the PTX interpreter on numpy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from minicc.codegen.cuda import compile_ptx
from minicc.codegen.cuda_loops import launch_loops
from minicc.codegen.source import kernel_source
from minicc.ir import expr as ex
from minicc.ir.expr import Expr, iteration
from minicc.ir.types import DType
from minicc.lower.affine import linearise
from minicc.lower.body import Write, normalise
from minicc.lower.kernel import LoopKernel
from minicc.targets.cuda import parse_cuda_target
from tests.cuda.ptx_interpreter import Memory
from tests.cuda.ptx_interpreter import run as run_ptx

Array = np.ndarray[Any, Any]
TARGET = parse_cuda_target("cuda:sm_90")


def element(name: str, dtype: DType, index: Sequence[Expr], shape: Sequence[int]) -> Expr:
    """A load as the composer makes it: of a flat array, at one offset."""
    return ex.load(name, dtype, (linearise(index, shape),))


def loop_kernel(value: Expr, extents: tuple[int, ...]) -> tuple[LoopKernel, Any]:
    """The kernel that stores a value at every point of "out", and its words."""
    index = [iteration(a) for a in range(len(extents))]
    normal = normalise([Write("out", value.dtype, linearise(index, extents), value)], extents)
    return LoopKernel(len(normal.extents), normal.body), normal


def run(value: Expr, extents: tuple[int, ...], arrays: dict[str, Array], schedule: str = "together") -> Array:
    """The value at every point."""
    pytest.importorskip("numba.cuda.compiler", reason="numba-cuda is not installed (extra cuda)")
    kernel, normal = loop_kernel(value, extents)
    memory = Memory(1 << 21)
    result = np.zeros(extents, value.dtype.numpy)
    places = {name: memory.place(array) for name, array in {**arrays, "out": result}.items()}
    words = list(normal.extents)
    for word in normal.words:
        size = 1 if word.array is None else (result if word.array == "out" else arrays[word.array]).itemsize
        words.append(word.value * size + (0 if word.array is None else places[word.array]))
    launch = launch_loops(kernel, words, TARGET)
    ptx = compile_ptx(kernel_source(kernel, TARGET), "k", TARGET)
    run_ptx(ptx, "k", launch.grid, launch.block, launch.shared_bytes, words, memory, schedule)
    return memory.read(places["out"], result.shape, result.dtype)
