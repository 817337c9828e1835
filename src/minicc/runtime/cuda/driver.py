"""The device layer: memory, code, launches and graphs, through the driver's C interface.

The only module that talks to a GPU. It knows nothing of programs. Every failure is a TargetError with the driver's words.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from minicc.errors import TargetError
from minicc.kernels.cuda_launch import Launch

Array = np.ndarray[Any, Any]

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_STATIC_SHARED = 48 << 10  # what a kernel may use without asking
_NON_BLOCKING = 1  # of streams
_THREAD_LOCAL = 1  # of captures: other threads may call the driver meanwhile


class Device(Protocol):
    """What the runtime needs of a GPU. Addresses are integers; everything goes through one stream, in order."""

    def load(self, symbol: str, cubin: bytes) -> Any:
        """The kernel of a cubin."""
        ...

    def allocate(self, size: int) -> int:
        """Memory of so many bytes, aligned to 256, kept until the device goes."""
        ...

    def to_device(self, address: int, array: Array) -> None:
        """Copy a contiguous array in; it may be changed as soon as this returns."""
        ...

    def to_host(self, array: Array, address: int) -> None:
        """Copy out into a contiguous array; returns when it is there."""
        ...

    def launch(self, kernel: Any, launch: Launch, words: Sequence[int]) -> None:
        """Start a kernel."""
        ...

    def record(self, launches: Callable[[], None]) -> Callable[[], None]:
        """What the function launches, to be started again at once by calling the result."""
        ...


class Gpu:
    """A device of this machine. Raises TargetError when it is not there."""

    def __init__(self, number: int = 0) -> None:
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise TargetError("there is no NVIDIA driver", why=str(error)) from None
        device, self._context, self._stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), number)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self._enter()
        self._call("cuStreamCreate", ctypes.byref(self._stream), _NON_BLOCKING)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(code, ctypes.byref(text))
            why = (text.value or b"unknown").decode()
            raise TargetError(f"{name} failed with code {code}", why=why)

    def _enter(self) -> None:
        """Make the device current for the calling thread."""
        self._call("cuCtxSetCurrent", self._context)

    def load(self, symbol: str, cubin: bytes) -> Any:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._enter()
        self._call("cuModuleLoadData", ctypes.byref(module), cubin)
        self._call("cuModuleGetFunction", ctypes.byref(function), module, symbol.encode())
        return function

    def allocate(self, size: int) -> int:
        address = ctypes.c_uint64()
        self._enter()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(1, size)))
        return address.value

    def to_device(self, address: int, array: Array) -> None:
        if array.nbytes:
            self._enter()
            host = ctypes.c_void_p(array.ctypes.data)
            self._call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), host, ctypes.c_size_t(array.nbytes), self._stream)
            self._call("cuStreamSynchronize", self._stream)

    def to_host(self, array: Array, address: int) -> None:
        self._enter()
        if array.nbytes:
            host = ctypes.c_void_p(array.ctypes.data)
            self._call("cuMemcpyDtoHAsync_v2", host, ctypes.c_uint64(address), ctypes.c_size_t(array.nbytes), self._stream)
        self._call("cuStreamSynchronize", self._stream)

    def launch(self, kernel: Any, launch: Launch, words: Sequence[int]) -> None:
        self._enter()
        if launch.shared_bytes > _STATIC_SHARED:
            self._call("cuFuncSetAttribute", kernel, _MAX_DYNAMIC_SHARED, launch.shared_bytes)
        values = (ctypes.c_int64 * len(words))(*words)
        first = ctypes.addressof(values)
        pointers = (ctypes.c_void_p * len(words))(*(first + 8 * i for i in range(len(words))))
        x, y, z = launch.grid
        self._call("cuLaunchKernel", kernel, x, y, z, launch.block, 1, 1, launch.shared_bytes, self._stream, pointers, None)

    def record(self, launches: Callable[[], None]) -> Callable[[], None]:
        graph, ready = ctypes.c_void_p(), ctypes.c_void_p()
        self._enter()
        self._call("cuStreamBeginCapture_v2", self._stream, _THREAD_LOCAL)
        try:
            launches()
        finally:
            self._call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        self._call("cuGraphInstantiateWithFlags", ctypes.byref(ready), graph, ctypes.c_uint64(0))
        self._call("cuGraphDestroy", graph)

        def replay() -> None:
            self._enter()
            self._call("cuGraphLaunch", ready, self._stream)

        return replay
