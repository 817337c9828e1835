"""Arrays on a GPU: results that stay there, and what other libraries' arrays look like to the runtime.

A result can be handed to any library by DLPack or by the CUDA array interface without a copy. Nothing here computes.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

from minicc.errors import InputError
from minicc.runtime.cuda.driver import Device, Memory, Stream

Array = np.ndarray[Any, Any]

# DLPack's names: device types, and kinds of element types by numpy's letter.
CPU, CUDA = 1, 2
_KINDS = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}
_BFLOAT = 4


class DeviceArray:
    """A contiguous array on a GPU.

    numpy() copies it to the host; `__dlpack__` and `__cuda_array_interface__` give it to other libraries, which may keep it.
    """

    def __init__(self, memory: Memory, shape: tuple[int, ...], dtype: np.dtype[Any], device: Device, stream: Stream,
                 number: int) -> None:  # fmt: skip
        self.memory, self.shape, self.dtype = memory, shape, dtype
        self._device, self._stream, self._number = device, stream, number

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def numpy(self) -> Array:
        """A copy on the host."""
        result = np.empty(self.shape, self.dtype)
        self._device.to_host(result.ctypes.data, self.memory.address, self.nbytes, self._stream)
        self._device.wait(self._stream)
        return result

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("an array on a GPU cannot be had on the host without a copy")
        found = self.numpy()
        return found if dtype is None else found.astype(dtype)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        # Many readers do not look at the stream that the interface may name, so the work is done when they read.
        self._device.wait(self._stream)
        place = (self.memory.address, False)
        return {"shape": self.shape, "typestr": self.dtype.str, "data": place, "version": 3, "strides": None}

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self._number

    def __dlpack__(self, *, stream: Any = None, **_: Any) -> Any:
        """A capsule for `from_dlpack`; work given to `stream` later waits for this array, without one it is waited for here."""
        if stream is None or stream == -1:
            self._device.wait(self._stream)
        else:
            self.give_to(stream)
        return capsule(self, self.memory.address, self.shape, self.dtype, self.__dlpack_device__())

    def give_to(self, stream: Stream | int) -> None:
        """Later work of a stream waits for this array."""
        self._device.follow(stream, self._stream)

    def __repr__(self) -> str:
        return f"<array on cuda:{self._number}: {self.dtype}{list(self.shape)}>"


@dataclass(frozen=True)
class Foreign:
    """Another library's array on the GPU: contiguous, kept alive by `owner`."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: Any


def on_gpu(item: Any) -> bool:
    """Whether an object is an array in a GPU's memory."""
    if isinstance(item, np.ndarray):
        return False
    if isinstance(item, DeviceArray) or (hasattr(type(item), "__cuda_array_interface__") and _has_interface(item)):
        return True
    tell = getattr(item, "__dlpack_device__", None)
    return tell is not None and tell()[0] == CUDA


def to_host(item: Any) -> Array:
    """A copy on the host of an array on the GPU. Raises InputError where its library offers none."""
    if isinstance(item, DeviceArray):
        return item.numpy()
    host = getattr(item, "cpu", None) or getattr(item, "get", None)
    try:
        return np.asarray(host() if host is not None else item)
    except (TypeError, RuntimeError, ValueError) as error:
        raise InputError("an array on the GPU cannot be copied to the host", why=str(error), hint="copy it first") from None


def _has_interface(item: Any) -> bool:
    # A library may have the attribute on all its arrays and refuse it for those on the host.
    try:
        return item.__cuda_array_interface__ is not None
    except (AttributeError, TypeError, RuntimeError):
        return False


def foreign(item: Any, wanted: np.dtype[Any], name: str, stream: Stream) -> Foreign:
    """An input on the GPU, in order for the stream. Raises InputError for another element type or strides."""
    if isinstance(item, DeviceArray):
        item.give_to(stream)
        return _checked(Foreign(item.memory.address, item.shape, item.dtype, item), wanted, name)
    from cuda.core.utils import StridedMemoryView

    view = StridedMemoryView.from_any_interface(item, stream_ptr=int(stream))
    strides, shape = view.strides, tuple(view.shape)
    if strides is not None and not _is_contiguous(shape, tuple(strides)):
        why = f"its strides are {tuple(strides)}"
        raise InputError(f"input {name!r} is not contiguous", why=why, hint="copy it: x.contiguous()")
    dtype = wanted if str(view.dtype) == str(wanted) or "bfloat16" in str(view.dtype) == str(wanted) else view.dtype
    return _checked(Foreign(int(view.ptr), shape, np.dtype(dtype), (item, view)), wanted, name)


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides)):
        if size > 1 and stride != step:
            return False
        step *= size
    return True


def _checked(found: Foreign, wanted: np.dtype[Any], name: str) -> Foreign:
    if found.dtype != wanted:
        raise InputError(f"input {name!r} has type {found.dtype}, expected {wanted}", hint="convert it")
    return found


# ------------------------------------------------------------------------------------------------- DLPack


class _Tensor(ctypes.Structure):
    """DLManagedTensor of DLPack 0.x, which every library reads."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_number", ctypes.c_int32),
        ("rank", ctypes.c_int32), ("kind", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.c_void_p), ("offset", ctypes.c_uint64),
        ("owner", ctypes.c_void_p), ("delete", ctypes.c_void_p),
    )  # fmt: skip


def _python(name: str, result: Any, *arguments: Any) -> Any:
    """A function of Python itself with a prototype of our own: other libraries change those of `ctypes.pythonapi`."""
    return ctypes.PYFUNCTYPE(result, *arguments)((name, ctypes.pythonapi))


_Callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_NAME = b"dltensor"
_keep = _python("Py_IncRef", None, ctypes.py_object)
_let_go = _python("Py_DecRef", None, ctypes.c_void_p)
_is_capsule = _python("PyCapsule_IsValid", ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)
_content = _python("PyCapsule_GetPointer", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)
_new_capsule = _python("PyCapsule_New", ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, _Callback)


class _Export:
    """What a consumer holds: the structure, its shape, and the array behind it."""

    def __init__(self, owner: Any, tensor: _Tensor, shape: Any) -> None:
        self.owner, self.tensor, self.shape = owner, tensor, shape


def _delete(address: int) -> None:
    """Called by the consumer when it is done: gives back the reference that `capsule` took."""
    _let_go(_Tensor.from_address(address).owner)


def _forget(pointer: int) -> None:
    """Called when a capsule goes that nobody has consumed."""
    if _is_capsule(pointer, _NAME):
        _delete(_content(pointer, _NAME))


_DELETE, _FORGET = _Callback(_delete), _Callback(_forget)


def capsule(owner: Any, address: int, shape: tuple[int, ...], dtype: np.dtype[Any], device: tuple[int, int]) -> Any:
    """A DLPack capsule of contiguous memory that keeps `owner` alive."""
    kind = _BFLOAT if dtype.name == "bfloat16" else _KINDS.get(dtype.kind)
    if kind is None:
        raise BufferError(f"DLPack knows no {dtype}")
    sizes = (ctypes.c_int64 * max(1, len(shape)))(*shape)
    tensor = _Tensor(address, *device, len(shape), kind, 8 * dtype.itemsize, 1, sizes, None, 0)
    export = _Export(owner, tensor, sizes)
    tensor.owner = id(export)
    tensor.delete = ctypes.cast(_DELETE, ctypes.c_void_p)
    _keep(export)
    return _new_capsule(ctypes.addressof(tensor), _NAME, _FORGET)
