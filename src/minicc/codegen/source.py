"""The source file of a kernel: header, imports, constants, functions, and its symbol.

A kernel's text depends on nothing but its description and the target, so equal kernels of different layers, models and
processes are one file and one object. The files are for reading and running (`python FILE` times the kernel);
compilation happens from the same text.
"""

from __future__ import annotations

import hashlib

from minicc.codegen.printer import BodyPrinter, print_epilogue, print_loops
from minicc.kernels import template as templates
from minicc.lower.kernel import Kernel, LoopKernel
from minicc.targets.cpu import CpuTarget

_TYPES = ("f32", "f64", "i8", "i16", "i32", "i64", "u8", "u16", "u32", "u64")
_NUMPY = {"f32": "float32", "f64": "float64", "u8": "uint8", "u16": "uint16", "u32": "uint32", "u64": "uint64",
          "i8": "int8", "i16": "int16", "i32": "int32", "i64": "int64"}  # fmt: skip


def kernel_source(kernel: Kernel, target: CpuTarget) -> str:
    """The text of a kernel's module for a target; its function `kernel` follows the kernel contract."""
    if isinstance(kernel, LoopKernel):
        printer, lines = print_loops(kernel)
        return "\n".join([*_header(kernel.name, printer), "", "", *lines, ""])
    epilogue = ""
    if kernel.epilogue is not None:
        printer, lines = print_epilogue(kernel.epilogue, templates.epilogue_base(kernel.template))
        epilogue = "\n".join([*_imports(printer), "", "", *lines, ""])
    text = templates.render(kernel.template, dict(kernel.constants), epilogue, target)
    return text


def kernel_symbol(kernel: Kernel, source: str) -> str:
    """A readable, unique symbol: the kernel's name and a hash of its text."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    name = "".join(c if c.isalnum() else "_" for c in kernel.name)[:48]
    return f"{name}_{digest}"


def _header(name: str, printer: BodyPrinter) -> list[str]:
    return [f'"""{name}: generated loops."""', "", *_imports(printer)]


def _imports(printer: BodyPrinter) -> list[str]:
    lines = ["import numpy as np", ""]
    lines.append(_import("minicc.kernels.cpu.intrinsics", printer.imports))
    if printer.scalar:
        lines.append(_import("minicc.kernels.cpu.scalar", printer.scalar))
    if printer.math:
        lines.append(_import("minicc.kernels.cpu.vector_math", printer.math))
    lines.append("")
    lines += [f"{name} = np.{_NUMPY[name]}" for name in _TYPES]
    return lines


def _import(module: str, names: set[str]) -> str:
    return f"from {module} import {', '.join(sorted(names))}"
