"""The source file of a kernel: header, imports, constants, functions, and its symbol.

A kernel's text depends on nothing but its description and the target, so equal kernels of different layers, models and
processes are one file and one object. The files are for reading and running (`python FILE` times the kernel);
compilation happens from the same text.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from minicc.codegen.cuda_loops import CudaPrinter, print_cuda_loops
from minicc.codegen.printer import BodyPrinter, print_epilogue, print_loops, rounds_each
from minicc.codegen.tiles import print_blocks, staged_loads
from minicc.errors import CodegenError
from minicc.kernels import cuda_template
from minicc.kernels import template as templates
from minicc.lower.kernel import Body, Kernel, LoopKernel, TemplateKernel
from minicc.targets.cuda import CudaTarget
from minicc.targets.parse import Target

_NUMPY = {"f32": "float32", "f64": "float64", "u8": "uint8", "u16": "uint16", "u32": "uint32", "u64": "uint64",
          "i8": "int8", "i16": "int16", "i32": "int32", "i64": "int64"}  # fmt: skip


def kernel_source(kernel: Kernel, target: Target) -> str:
    """The text of a kernel's module for a target; its function `kernel` follows the kernel contract."""
    if isinstance(target, CudaTarget):
        return _cuda_source(kernel)
    if isinstance(kernel, LoopKernel):
        blocks = kernel.short or staged_loads(kernel)
        printer, lines = print_blocks(kernel, target.vector_width) if blocks else print_loops(kernel)
        head = [*_imports(printer, lines), *_rounding(kernel.body)]
        return "\n".join([f'"""{kernel.name}: generated loops."""', "", *head, "", "", *lines, ""])
    epilogue = ""
    if kernel.epilogue is not None:
        printer, lines = print_epilogue(kernel.epilogue, templates.epilogue_base(kernel.template))
        epilogue = "\n".join([*_imports(printer, lines), *_rounding(kernel.epilogue), "", "", *lines, ""])
    return templates.render(kernel.template, dict(kernel.constants), epilogue, target)


def _cuda_source(kernel: Kernel) -> str:
    if not isinstance(kernel, LoopKernel):
        return _cuda_template_source(kernel)
    printer, lines = print_cuda_loops(kernel)
    head = [*_imports(printer, lines, "cuda"), *_rounding(kernel.body)]
    return "\n".join([f'"""{kernel.name}: generated loops for CUDA."""', "", *head, "", *lines, ""])


def _cuda_template_source(kernel: TemplateKernel) -> str:
    if kernel.template not in cuda_template.CUDA_TEMPLATES:
        raise CodegenError(f"template {kernel.template} has no CUDA form", where=kernel.name)
    words, epilogue = templates.epilogue_base(kernel.template), ""
    if kernel.epilogue is not None:
        printer, lines = print_epilogue(kernel.epilogue, words, CudaPrinter)
        epilogue = "\n".join([*_imports(printer, lines, "cuda"), *_rounding(kernel.epilogue), "", "", *lines, ""])
        words += kernel.epilogue.n_words
    return cuda_template.render(kernel.template, dict(kernel.constants), epilogue, words)


def kernel_symbol(kernel: Kernel, source: str) -> str:
    """A readable, unique symbol: the kernel's name and a hash of its text."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    name = "".join(c if c.isalnum() else "_" for c in kernel.name)[:48]
    return f"{name}_{digest}"


def _rounding(body: Body) -> list[str]:
    """The line that forbids fused multiply-adds where every operation is rounded by itself."""
    if rounds_each(body):
        return ["", "CONTRACT = False  # round every operation: a quantised value depends on the last bit"]
    return []


def _imports(printer: BodyPrinter, lines: Sequence[str], words_of: str = "cpu") -> list[str]:
    """Import lines and type names for exactly what the text uses."""
    words = set(re.findall(r"\w+", "\n".join(lines)))
    types = [f"{name} = np.{_NUMPY[name]}" for name in _NUMPY if name in words]
    out = ["import numpy as np", ""] if types or "np" in words else []
    out.append(_import(f"minicc.kernels.{words_of}.intrinsics", printer.imports))
    if printer.scalar:
        out.append(_import(f"minicc.kernels.{words_of}.scalar", printer.scalar))
    if printer.tiles:
        out.append(_import(f"minicc.kernels.{words_of}.transposed", printer.tiles))
    if printer.math:
        out.append(_import(f"minicc.kernels.{words_of}.vector_math", printer.math))
    return [*out, "", *types] if types else out


def _import(module: str, names: set[str]) -> str:
    return f"from {module} import {', '.join(sorted(names))}"
