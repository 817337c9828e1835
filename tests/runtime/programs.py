"""Small programs written by hand, with kernels given as text: the runtime is tested without lowering."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from minicc.codegen.build import build_objects
from minicc.ir.dims import Dim, symbol
from minicc.ir.types import BY_NAME, TensorType, boolean, dtype_of, f32, i64
from minicc.lower.kernel import Body, LoopKernel, Operand
from minicc.lower.program import Buffer, KernelStep, Program, Word
from minicc.options import Options
from minicc.runtime.code import Code
from minicc.runtime.module import CompiledModule
from minicc.runtime.store import Store
from minicc.targets.cpu import host_target

_HEAD = (
    "from minicc.kernels.cpu.intrinsics import arg, ld, ld_out, ptr_f32, ptr_i64, st\nimport numpy as np\n"
)

# Words of all of them: addresses of operands, then of the result.
SOURCES = {
    "add": """
def kernel(args, begin, end):
    x = ptr_f32(arg(args, 0)); y = ptr_f32(arg(args, 1)); z = ptr_f32(arg(args, 2))
    for i in range(begin, end):
        st(z, i, ld(x, i) + ld(y, i))
""",
    "double": """
def kernel(args, begin, end):
    x = ptr_f32(arg(args, 0)); z = ptr_f32(arg(args, 1))
    for i in range(begin, end):
        v = ld_out(x, i)
        st(z, i, v + v)
""",
    # Adds the i64 number at word 1.
    "offset": """
def kernel(args, begin, end):
    x = ptr_i64(arg(args, 0)); n = ptr_i64(arg(args, 1)); z = ptr_i64(arg(args, 2))
    for i in range(begin, end):
        st(z, i, ld(x, i) + ld(n, 0))
""",
    "less": """
def kernel(args, begin, end):
    x = ptr_f32(arg(args, 0)); y = ptr_f32(arg(args, 1)); z = ptr_u8(arg(args, 2))
    for i in range(begin, end):
        st(z, i, np.uint8(ld(x, i) < ld(y, i)))
""".replace("def kernel", "from minicc.kernels.cpu.intrinsics import ptr_u8\ndef kernel"),
}
NAMES = tuple(SOURCES)


@lru_cache(maxsize=1)
def code() -> Code:
    """Code of all the kernels above; kernel numbers are positions in `NAMES`."""
    sources = {name: _HEAD + text for name, text in SOURCES.items()}
    objects = build_objects(sources, host_target(), Store(Options.from_env().store_dir))
    return Code(NAMES, sources, objects)


_TYPES = {
    "add": (f32, f32, f32),
    "double": (f32, f32),
    "offset": (i64, i64, i64),
    "less": (f32, f32, boolean),
}


def _kernel(name: str) -> LoopKernel:
    """A description with the right words; it could not be printed, as the text above stands for it."""
    *ins, out = (Operand(dtype, ()) for dtype in _TYPES[name])
    return LoopKernel(0, Body((*ins, replace(out, output=True)), (), 0), name)


KERNELS = tuple(map(_kernel, NAMES))


class Sketch:
    """Builds a program step by step."""

    def __init__(self, name: str = "sketch") -> None:
        self.name = name
        self.buffers: list[Buffer] = []
        self.steps: list[Any] = []

    def buffer(self, kind: str, shape: tuple[Dim, ...] | None, dtype: Any = f32, **more: Any) -> int:
        dtype = BY_NAME[dtype] if isinstance(dtype, str) else dtype
        self.buffers.append(Buffer(f"{kind}{len(self.buffers)}", dtype, shape, kind, **more))
        return len(self.buffers) - 1

    def constant(self, data: np.ndarray) -> int:
        return self.buffer("constant", data.shape, dtype_of(data.dtype), data=data)

    def call(self, name: str, operands: tuple[int, ...], result: int) -> None:
        words = tuple(Word(0, b) for b in (*operands, result))
        units = self.buffers[result].elements
        self.steps.append(
            KernelStep(
                NAMES.index(name), words, units, operands, (result,), (f"{name}{len(self.steps)}",), units
            )
        )

    def program(self, inputs: tuple[int, ...], outputs: tuple[int, ...], kernels: bool = True) -> Program:
        def types(which: tuple[int, ...]) -> tuple[TensorType, ...]:
            return tuple(TensorType(self.buffers[b].dtype, self.buffers[b].shape) for b in which)

        names_in = tuple("xyzuvwabcdefgh"[i] for i in range(len(inputs)))
        return Program(
            self.name,
            tuple(self.buffers),
            tuple(self.steps),
            inputs,
            outputs,
            types(inputs),
            types(outputs),
            KERNELS if kernels else (),
            names_in,
            tuple(f"out{i}" for i in range(len(outputs))),
        )


def module(program: Program, **options: Any) -> CompiledModule:
    return CompiledModule(program, code(), host_target(), Options.from_env().override(**options))


def chain(length: int = 3) -> Program:
    """out = 2^length * (x + y) over [n, 4] through temporaries."""
    n = symbol("n")
    s = Sketch("chain")
    x, y = s.buffer("input", (n, 4)), s.buffer("input", (n, 4))
    last = s.buffer("temporary", (n, 4))
    s.call("add", (x, y), last)
    for i in range(length - 1):
        following = last if i % 3 == 0 else s.buffer("temporary", (n, 4))  # some of them in place
        s.call("double", (last,), following)
        last = following
    out = s.buffer("output", (n, 4))
    s.call("double", (last,), out)
    return s.program((x, y), (out,))
