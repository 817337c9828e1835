"""A module's inputs and outputs, and the check of what a caller gives.

Checks are strict: names, element types (exact), ranks, known sizes, and one value per symbol. Everything
that does not fit is an InputError naming the input, what it should be, and what to do. Nothing is cast
silently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np

from minicc.errors import InputError
from minicc.ir.dims import Dim, bare_symbol, evaluate
from minicc.ir.types import DType, OpaqueType, TensorType, Type, dtype_of, string
from minicc.runtime.sizes import ShapePattern


class Port(NamedTuple):
    """One input or output. dtype: "f32", ..., "" for sequences and maps. shape: None for any rank."""

    name: str
    dtype: str
    shape: tuple[int | str, ...] | None
    type: Type

    def __str__(self) -> str:
        return f"{self.name}: {self.type}"

    def __repr__(self) -> str:
        return str(self)


def ports(names: Sequence[str], types: Sequence[Type]) -> tuple[Port, ...]:
    """Ports for names and types of one length."""
    return tuple(
        Port(
            name,
            str(t.dtype),
            None if t.shape is None else tuple(d if isinstance(d, int) else str(d) for d in t.shape),
            t,
        )
        if isinstance(t, TensorType)
        else Port(name, "", None, t)
        for name, t in zip(names, types)
    )


class Signature:
    """The inputs of a module called `name`."""

    def __init__(self, name: str, inputs: Sequence[Port]) -> None:
        self.name, self.inputs = name, tuple(inputs)
        self._position = {port.name: i for i, port in enumerate(inputs)}
        self._pattern = ShapePattern([p.type.shape if isinstance(p.type, TensorType) else None for p in inputs])
        self.dtypes = tuple(p.type.dtype.numpy if isinstance(p.type, TensorType) else None for p in inputs)

    def has(self, name: str) -> bool:
        """Whether there is an input of this name."""
        return name in self._position

    def order(self, args: Sequence[Any], named: Mapping[str, Any]) -> list[Any]:
        """Arguments in input order. Raises InputError for a missing, unknown or repeated input."""
        if not named and len(args) == len(self.inputs):
            return list(args)
        if not args and named.keys() == self._position.keys():
            return [named[name] for name in self._position]
        if len(args) > len(self.inputs):
            raise InputError(
                f"{self.name!r} takes {len(self.inputs)} inputs, got {len(args)}", hint=self._list()
            )
        taken = dict(zip((p.name for p in self.inputs), args))
        for name, item in named.items():
            if name not in self._position:
                import difflib

                close = difflib.get_close_matches(name, self._position, n=1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                raise InputError(f"{self.name!r} has no input {name!r}", hint=hint + self._list())
            if name in taken:
                raise InputError(f"input {name!r} of {self.name!r} is given twice")
            taken[name] = item
        missing = [p.name for p in self.inputs if p.name not in taken]
        if missing:
            raise InputError(f"{self.name!r} lacks input {', '.join(map(repr, missing))}", hint=self._list())
        return [taken[p.name] for p in self.inputs]

    def arrays(self, items: Sequence[Any]) -> list[Any]:
        """Items as C-contiguous arrays of the declared element types; no copy where none is needed."""
        return [self._array(item, port) for item, port in zip(items, self.inputs)]

    def array(self, item: Any, position: int) -> Any:
        """As `arrays`, one of them."""
        return self._array(item, self.inputs[position])

    def sizes(self, arrays: Sequence[Any]) -> dict[str, int]:
        """The same as `check`, quickly where all fit."""
        found = self._pattern.sizes([array.shape for array in arrays])
        return self.check(arrays) if found is None else found

    def check(self, arrays: Sequence[Any]) -> dict[str, int]:
        """The size of every symbol. Raises InputError unless all fit the declared shapes, with one value per symbol."""
        sizes: dict[str, tuple[int, str]] = {}
        for array, port in zip(arrays, self.inputs):
            if isinstance(port.type, TensorType) and port.type.shape is not None:
                self._check_shape(array, port, port.type.shape, sizes)
        values = {name: size for name, (size, _) in sizes.items()}
        for array, port in zip(arrays, self.inputs):
            if isinstance(port.type, TensorType) and port.type.shape is not None:
                for axis, dim in enumerate(port.type.shape):
                    self._check_expression(array, port, axis, dim, values)
        return values

    def _array(self, item: Any, port: Port) -> Any:
        type_ = port.type
        if isinstance(type_, OpaqueType):
            return item
        if type_.dtype == string:
            return _strings(item, port, self.name)
        array = _as_numpy(item, type_.dtype, port, self.name)
        if array.dtype != type_.dtype.numpy:
            raise InputError(
                f"input {port.name!r} of {self.name!r} has type {_dtype_text(array.dtype)}, expected {type_}",
                hint=f"convert it: {port.name}.astype(np.{type_.dtype.numpy.name})",
            )
        if not array.flags.c_contiguous or not array.flags.aligned:
            array = np.array(array, order="C", ndmin=array.ndim)
        return array

    def _check_shape(
        self, array: Any, port: Port, shape: Sequence[Dim], sizes: dict[str, tuple[int, str]]
    ) -> None:
        if array.ndim != len(shape):
            raise self._misfit(array, port, self._rank_hint(array, port, shape))
        if any(isinstance(dim, int) and dim != size for dim, size in zip(shape, array.shape)):
            raise self._misfit(array, port, _layout_hint(array.shape, shape))
        for axis, (dim, size) in enumerate(zip(shape, array.shape)):
            name = None if isinstance(dim, int) else bare_symbol(dim)
            if name is None:
                continue
            seen, source = sizes.setdefault(name, (size, port.name))
            if seen != size:
                raise self._misfit(
                    array,
                    port,
                    f"{name!r} is {seen} in input {source!r}, but axis {axis} of {port.name!r} has {size}",
                )

    def _check_expression(
        self, array: Any, port: Port, axis: int, dim: Dim, sizes: Mapping[str, int]
    ) -> None:
        if isinstance(dim, int) or bare_symbol(dim) is not None:
            return
        try:
            expected = evaluate(dim, sizes)
        except KeyError as error:
            raise InputError(
                f"the size {error.args[0]!r} cannot be told from the inputs", where=str(port)
            ) from None
        if expected != array.shape[axis]:
            raise self._misfit(array, port, f"axis {axis} must have {dim} = {expected} elements")

    def _misfit(self, array: Any, port: Port, hint: str) -> InputError:
        return InputError(
            f"input {port.name!r} of {self.name!r} has shape {list(array.shape)}, expected {port.type}",
            hint=hint,
        )

    def _rank_hint(self, array: Any, port: Port, shape: Sequence[Dim]) -> str:
        if array.ndim + 1 == len(shape):
            return f"a leading axis may be missing: {port.name}[np.newaxis]"
        if array.ndim == len(shape) + 1 and 1 in array.shape:
            return f"an axis of size 1 may be too many: {port.name}.squeeze({array.shape.index(1)})"
        return f"it must have {len(shape)} axes"

    def _list(self) -> str:
        return "the inputs are " + (", ".join(map(str, self.inputs)) or "none")


def _as_numpy(item: Any, dtype: DType, port: Port, module: str) -> np.ndarray[Any, Any]:
    """An array of what was given: numpy, anything with DLPack or the array protocols, or Python numbers."""
    if isinstance(item, np.ndarray):
        return np.asarray(item)
    try:
        if isinstance(item, (int, float, bool, list, tuple)):
            return _from_python(item, dtype)
        if hasattr(item, "__dlpack__"):
            return np.from_dlpack(item)
        return np.asarray(item)
    except Exception as error:  # other libraries raise what they like
        raise InputError(
            f"input {port.name!r} of {module!r} cannot be read as an array: {type(item).__name__}",
            why=f"{type(error).__name__}: {error}",
            hint=f"give a numpy array of type {port.type}",
        ) from error


def _from_python(item: Any, dtype: DType) -> np.ndarray[Any, Any]:
    """Python numbers carry no element type: they take the expected one where only precision is lost."""
    array = np.asarray(item)
    if array.size == 0:
        return array.astype(dtype.numpy)
    if dtype.is_float and array.dtype.kind in "iuf":
        return array.astype(dtype.numpy)
    if dtype.is_integer and array.dtype.kind in "iu" and (array.astype(dtype.numpy) == array).all():
        return array.astype(dtype.numpy)
    return array


def _strings(item: Any, port: Port, module: str) -> np.ndarray[Any, Any]:
    array = np.asarray(item)
    if array.dtype.kind not in "OUST":
        raise InputError(f"input {port.name!r} of {module!r} has type {array.dtype}, expected {port.type}")
    return array.astype(object)


def _dtype_text(dtype: np.dtype[Any]) -> str:
    if not dtype.isnative:
        return f"{dtype.newbyteorder('=')} in the other byte order"
    try:
        return str(dtype_of(dtype))
    except Exception:  # a type ONNX does not have
        return str(dtype)


def _layout_hint(shape: Sequence[int], expected: Sequence[Dim]) -> str:
    """Which transposition would make the shape fit, if one does."""
    rank = len(shape)
    if rank > 5:
        return ""
    first_last = ((0, rank - 1, *range(1, rank - 1)), (0, *range(2, rank), 1)) if rank > 2 else ()
    for order in (*first_last, *permutations(range(rank))):
        if order != tuple(range(rank)) and all(
            not isinstance(d, int) or shape[o] == d for o, d in zip(order, expected)
        ):
            return f"the axes look transposed; try .transpose{tuple(order)}"
    return ""
