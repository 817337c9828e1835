"""Load object files into this process and give out the addresses of their functions.

Needs llvmlite only; Numba is never imported, so a warm start stays cheap. Objects are machine code: the
caller must have authenticated them (kernel store, artifact). The check of undefined symbols here guards
against mistakes, not against an adversary.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from minicc.codegen.symbols import ALLOWED, undefined_symbols
from minicc.errors import ArtifactError

_LLVM_LOCK = threading.Lock()  # llvmlite serialises its calls, but building an engine takes several of them


class LoadedObjects:
    """Machine code in memory. It lives as long as this object does: keep it while anything may be running."""

    def __init__(self, engine: Any, owned: tuple[Any, ...], addresses: Mapping[str, int]) -> None:
        self._engine, self._owned = engine, owned
        self._addresses = dict(addresses)

    def address(self, symbol: str) -> int:
        """Address of the function `symbol`; KeyError when no loaded object defines it."""
        return self._addresses[symbol]


def load_objects(objects: Mapping[str, bytes]) -> LoadedObjects:
    """Load object files given by the symbol each defines.

    Raises ArtifactError naming the symbol when an object is damaged, is for another kind of machine, refers
    to unknown functions or does not define its symbol.
    """
    from llvmlite import binding as llvm

    for symbol, data in objects.items():
        _check(symbol, data)
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
    missing = sorted(symbol for symbol, at in addresses.items() if not at)
    if missing:
        raise ArtifactError("kernel objects do not define their functions", where=", ".join(missing))
    return LoadedObjects(engine, (host, machine, *references), addresses)


# ELF `e_machine` by LLVM architecture name.
_ELF_MACHINES = {"x86_64": 62, "aarch64": 183, "arm64": 183}


def _check(symbol: str, data: bytes) -> None:
    from llvmlite import binding as llvm

    try:
        undefined = undefined_symbols(data)
    except ValueError as error:
        raise ArtifactError("a kernel object is damaged", where=symbol, why=str(error)) from error
    triple = llvm.get_process_triple()
    if undefined is None:
        if "linux" in triple:
            raise ArtifactError("a kernel object is not an ELF file", where=symbol)
        return
    architecture = triple.split("-")[0]
    machine = int.from_bytes(data[18:20], "little")
    if machine != _ELF_MACHINES.get(architecture, machine):
        raise ArtifactError(
            "a kernel object is for another processor architecture",
            where=symbol,
            why=f"ELF machine {machine} on {architecture}",
            hint="compile the model again on this machine",
        )
    refused = sorted(undefined - ALLOWED)
    if refused:
        raise ArtifactError("a kernel object calls unknown functions", where=symbol, why=", ".join(refused))
