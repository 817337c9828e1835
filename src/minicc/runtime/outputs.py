"""Arrays of the caller's that results are to be written to: `out=` of a call.

All is checked before anything runs, but for shapes that only running tells. Nothing is cast, and no memory is shared with inputs
or between outputs, as kernels read and write in an order of their own; except that of an input which the program updates
(lower/updates), such as a decoder's cache: given as the output too, it is updated in place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minicc.errors import InputError
from minicc.ir.types import TensorType
from minicc.lower.program import Update
from minicc.runtime.context import Array
from minicc.runtime.signature import Port

Given = Sequence[Array | None]  # by output; None where the module makes the array


def given_outputs(out: Any, ports: Sequence[Port], module: str) -> Given:
    """The arrays of `out` by output: one array for the only output, a sequence with None for those not given, or a mapping.

    Raises InputError for whatever results cannot be written to.
    """
    if isinstance(out, np.ndarray):
        found: Sequence[Any] = (out,)
    elif isinstance(out, Mapping):
        names = [port.name for port in ports]
        unknown = [name for name in out if name not in names]
        if unknown:
            raise InputError(f"{module!r} has no output {unknown[0]!r}", hint=_list(ports))
        found = [out.get(name) for name in names]
    else:
        found = list(out) if isinstance(out, tuple | list) else [out]
    if len(found) != len(ports):
        raise InputError(f"out holds {len(found)} arrays, but {module!r} has {len(ports)} outputs",
                         hint=f"{_list(ports)}; give None for those not wanted, or a mapping by name")  # fmt: skip
    for array, port in zip(found, ports):
        if array is not None:
            _check_kind(array, port, module)
    return found


def _list(ports: Sequence[Port]) -> str:
    return "the outputs are " + ", ".join(map(str, ports))


def _what(port: Port, module: str) -> str:
    return f"out for output {port.name!r} of {module!r}"


def _check_kind(array: Any, port: Port, module: str) -> None:
    if not isinstance(port.type, TensorType):
        raise InputError(f"{_what(port, module)} is given, but the output is no tensor", hint="give None for it")
    if not isinstance(array, np.ndarray):
        raise InputError(f"{_what(port, module)} is a {type(array).__name__}", hint=f"give a numpy array of type {port.type}")
    if array.dtype != port.type.dtype.numpy:
        raise InputError(f"{_what(port, module)} has type {array.dtype}, expected {port.type}", hint="results are not cast")
    if array.flags.carray:  # writeable, aligned and in C order
        return
    if not array.flags.writeable:
        raise InputError(f"{_what(port, module)} is read-only")
    raise InputError(f"{_what(port, module)} is not contiguous", why=f"strides {array.strides} of shape {list(array.shape)}",
                     hint="give an array in C order, such as numpy.empty makes")  # fmt: skip


def check_memory(given: Given, ports: Sequence[Port], inputs: Sequence[Any], names: Sequence[str], module: str,
                 updates: Sequence[Update] = ()) -> list[Update]:  # fmt: skip
    """The updates that happen in place, as a given array is that input.

    Raises InputError where one shares memory with another input or another given array.
    """
    read = [(name, i, item) for i, (name, item) in enumerate(zip(names, inputs)) if isinstance(item, np.ndarray)]
    wanted: list[Update] = []
    for number, (port, array) in enumerate(zip(ports, given)):
        if array is None:
            continue
        for source, i, other in read:
            if not np.may_share_memory(array, other):  # exact, as both are contiguous
                continue
            update = next((u for u in updates if (u.input, u.output) == (i, number)), None)
            if update is None or update.reason or not _is_same(array, other):
                what = f"{'input' if i >= 0 else 'out for output'} {source!r}"
                raise _shares(f"{_what(port, module)} shares memory with {what}", update, i)
            wanted.append(update)
        read.append((port.name, -1, array))
    return wanted


def _shares(what: str, update: Update | None, number: int) -> InputError:
    if update is not None:
        return InputError(what, why=update.reason or "it is a part of it, or the same memory under another shape",
                          hint="give another array" if update.reason else "give the very array, or another one")  # fmt: skip
    why = "this output is not that input with some rows written over it in kernels of a CPU" if number >= 0 else ""
    return InputError(what, why=why, hint="kernels may write results before all is read; give another array")


def _is_same(array: Array, other: Array) -> bool:
    """Whether two contiguous arrays are the same elements in the same memory."""
    return array.shape == other.shape and array.dtype == other.dtype and array.ctypes.data == other.ctypes.data


def check_shape(array: Array, shape: tuple[int, ...], port: Port, module: str) -> None:
    """Raise InputError unless a given array has the shape of the result."""
    if array.shape != shape:
        raise InputError(f"{_what(port, module)} has shape {list(array.shape)}",
                         why=f"the result has shape {list(shape)}", hint=f"give an array of type {port.type}")  # fmt: skip


def copied(outputs: Sequence[Any], given: Given, ports: Sequence[Port], module: str) -> list[Any]:
    """Results as the given arrays, copied there once all are known to fit."""
    for array, result, port in zip(given, outputs, ports):
        if array is not None:
            if not isinstance(result, np.ndarray):
                raise InputError(f"output {port.name!r} of {module!r} stays on the device", hint="give no out for it")
            check_shape(array, result.shape, port, module)
    for array, result in zip(given, outputs):
        if array is not None:
            np.copyto(array, result)
    return [result if array is None else array for array, result in zip(given, outputs)]
