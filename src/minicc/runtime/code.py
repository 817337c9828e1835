"""The machine code of a program: texts, symbols and objects of its kernels.

Kernel descriptions become texts (codegen), texts become objects (from the store, else compiled), objects
become addresses. Numba is imported only when something has to be compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from minicc.lower.kernel import Kernel
from minicc.runtime.context import Words
from minicc.runtime.executor import executor_sources
from minicc.runtime.objects import LoadedObjects, load_objects
from minicc.targets.cpu import CpuTarget, host_target
from minicc.targets.parse import Target

if TYPE_CHECKING:
    from minicc.codegen.build import ObjectStore


class Code(NamedTuple):
    """Everything needed to run the kernels of one program.

    symbols:  of each kernel, by kernel number; equal texts share one.
    sources:  symbol -> text, empty for code that came without.
    objects:  symbol -> object file; for a CPU those of the executor, too.
    compiled: how many kernels were compiled for it, the others came from the store or a file.
    """

    symbols: tuple[str, ...]
    sources: Mapping[str, str]
    objects: Mapping[str, bytes]
    compiled: int = 0

    @property
    def from_cache(self) -> int:
        """Distinct kernels that did not have to be compiled."""
        return len(set(self.symbols)) - self.compiled

    def load(self) -> tuple[Words, LoadedObjects | None]:
        """Addresses by kernel number, and what owns the code (None for a program without kernels)."""
        if not self.symbols:
            return np.zeros(0, np.int64), None
        loaded = load_objects({symbol: self.objects[symbol] for symbol in dict.fromkeys(self.symbols)})
        return np.array([loaded.address(symbol) for symbol in self.symbols], np.int64), loaded


def generate(kernels: tuple[Kernel, ...], target: Target) -> tuple[tuple[str, ...], dict[str, str]]:
    """(symbol of each kernel, symbol -> text)."""
    from minicc.codegen.source import kernel_source, kernel_symbol

    texts = [kernel_source(kernel, target) for kernel in kernels]
    symbols = tuple(kernel_symbol(kernel, text) for kernel, text in zip(kernels, texts))
    return symbols, dict(zip(symbols, texts))


def build_code(
    kernels: tuple[Kernel, ...],
    target: Target,
    store: ObjectStore | None,
    progress: Callable[[int, int], None] | None = None,
) -> Code:
    """Code of all kernels of a program; progress(done, at most) is called after each compilation."""
    from minicc.codegen.build import build_objects

    symbols, sources = generate(kernels, target)
    done: list[str] = []

    def compiled(symbol: str) -> None:
        if symbol not in sources:
            return
        done.append(symbol)
        if progress is not None:
            progress(len(done), len(sources))

    # The executor is compiled beside them, not when they are done.
    wanted = sources | executor_sources() if sources and _runs_here(target) else sources
    objects = build_objects(wanted, target, store, compiled)
    return Code(symbols, sources, objects, len(done))


def _runs_here(target: Target) -> bool:
    """Whether the executor can be made for the target: its system calls are those of this architecture."""
    return isinstance(target, CpuTarget) and target.triple.split("-")[0] == host_target().triple.split("-")[0]
