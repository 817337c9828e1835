"""Load object files into this process and give out the addresses of their functions.

Our own linker (runtime/link) takes what kernels usually are; LLVM's takes the rest, and other systems. Numba is never
imported. Objects are machine code: the caller must have authenticated them (kernel store, artifact). The check of undefined
symbols here guards against mistakes, not against an adversary.
"""

from __future__ import annotations

import platform
import sys
import threading
from collections.abc import Mapping
from typing import Any

from minicc.codegen import elf
from minicc.codegen.symbols import ALLOWED, undefined_in
from minicc.errors import ArtifactError
from minicc.runtime.link import can_link, link

_LLVM_LOCK = threading.Lock()  # llvmlite serialises its calls, but building an engine takes several of them


class LoadedObjects:
    """Machine code in memory. It lives as long as this object does: keep it while anything may be running."""

    def __init__(self, owned: tuple[Any, ...], addresses: Mapping[str, int]) -> None:
        self._owned = owned
        self._addresses = dict(addresses)

    def address(self, symbol: str) -> int:
        """Address of the function `symbol`; KeyError when no loaded object defines it."""
        return self._addresses[symbol]


def load_objects(objects: Mapping[str, bytes], *, general: bool = False) -> LoadedObjects:
    """Load object files given by the symbol each defines.

    general: leave them to LLVM's linker. Raises ArtifactError naming the symbol when an object is damaged, is for another kind
    of machine, refers to unknown functions or does not define its symbol.
    """
    read = {symbol: _read(symbol, data) for symbol, data in objects.items()}
    owned: tuple[Any, ...]
    found = None
    if can_link() and not general:
        whole = {symbol: one for symbol, one in read.items() if one is not None}
        assert len(whole) == len(read), "objects of this system are ELF files"
        try:
            found = link(whole)
        except ValueError as error:
            raise ArtifactError("kernel objects are damaged", where=", ".join(objects), why=str(error)) from error
    if found is not None:
        owned, addresses = (found[0],), found[1]
    else:
        owned, addresses = _load_with_llvm(objects)
    missing = sorted(symbol for symbol in objects if not addresses.get(symbol))
    if missing:
        raise ArtifactError("kernel objects do not define their functions", where=", ".join(missing))
    return LoadedObjects(owned, addresses)


def _load_with_llvm(objects: Mapping[str, bytes]) -> tuple[tuple[Any, ...], dict[str, int]]:
    """(what keeps the code alive, addresses) by LLVM's own linker, which knows every system."""
    from llvmlite import binding as llvm

    with _LLVM_LOCK:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        host = llvm.parse_assembly("")
        machine = llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine()
        engine = llvm.create_mcjit_compiler(host, machine)
        references = []
        for symbol, data in objects.items():
            try:
                reference = llvm.ObjectFileRef.from_data(data)
            except Exception as error:
                raise ArtifactError("a kernel object cannot be read", where=symbol, why=str(error)) from error
            references.append(reference)
            engine.add_object_file(reference)
        engine.finalize_object()
        addresses = {symbol: engine.get_function_address(symbol) for symbol in objects}
    return (engine, host, machine, *references), addresses


# ELF `e_machine` by the system's name of the architecture.
_ELF_MACHINES = {"x86_64": elf.X86_64, "aarch64": elf.AARCH64, "arm64": elf.AARCH64}


def _read(symbol: str, data: bytes) -> elf.Elf | None:
    """An object's parts, checked; None where objects are not ELF files."""
    if not elf.is_elf(data):
        if sys.platform == "linux":
            raise ArtifactError("a kernel object is not an ELF file", where=symbol)
        return None
    try:
        found = elf.read_elf(data)
    except ValueError as error:
        raise ArtifactError("a kernel object is damaged", where=symbol, why=str(error)) from error
    architecture = platform.machine().lower()
    if found.machine != _ELF_MACHINES.get(architecture, found.machine):
        raise ArtifactError(
            "a kernel object is for another processor architecture",
            where=symbol,
            why=f"ELF machine {found.machine} on {architecture}",
            hint="compile the model again on this machine",
        )
    refused = sorted(undefined_in(found) - ALLOWED)
    if refused:
        raise ArtifactError("a kernel object calls unknown functions", where=symbol, why=", ".join(refused))
    return found
