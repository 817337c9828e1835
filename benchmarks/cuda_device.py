"""The first GPU through CUDA's driver: memory, cubins, launches and their time.

Needs numpy and cuda.bindings only, and minicc for tensor maps.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from minicc.kernels.cuda_launch import TensorMap

Array = np.ndarray[Any, Any]
REPEATS = 9


class Device:
    """The first GPU through the driver: memory, cubins, launches and their time."""

    def __init__(self) -> None:
        from cuda.bindings import driver

        self.driver = driver
        self.call("cuInit", 0)
        self.device = self.call("cuDeviceGet", 0)
        self.context = self.call("cuDevicePrimaryCtxRetain", self.device)
        self.call("cuCtxSetCurrent", self.context)
        self.stream = self.call("cuStreamCreate", driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value)
        self.events = [self.call("cuEventCreate", 0) for _ in range(2)]

    def call(self, name: str, *arguments: Any) -> Any:
        """A driver function's result. Raises RuntimeError with its error."""
        status, *results = getattr(self.driver, name)(*arguments)
        if int(status):
            raise RuntimeError(f"{name}: {status}")
        return results[0] if results else None

    def upload(self, array: Array) -> int:
        address = self.call("cuMemAlloc", max(array.nbytes, 256))
        self.call("cuMemcpyHtoD", address, array.ctypes.data, array.nbytes)
        return int(address)

    def encode(self, map_: TensorMap) -> bytes:
        """A tensor map as kernels read it."""
        from minicc.runtime.cuda import maps

        return maps.encode(map_, lambda name, version: int(self.call("cuGetProcAddress", name.encode(), version, 0)))

    def download(self, address: int, shape: tuple[int, ...], dtype: Any) -> Array:
        array = np.empty(shape, dtype)
        self.call("cuStreamSynchronize", self.stream)
        self.call("cuMemcpyDtoH", array.ctypes.data, address, array.nbytes)
        return array

    def clear(self, address: int, size: int) -> None:
        """Bytes of ones, NaN as floats, before anything launched later."""
        self.call("cuMemsetD8Async", address, 0xFF, size, self.stream)

    def free(self, *addresses: int) -> None:
        for address in addresses:
            self.call("cuMemFree", address)

    def load(self, cubin: bytes, shared: int) -> Any:
        """The function "kernel" of a cubin, allowed its shared memory."""
        function = self.call("cuModuleGetFunction", self.call("cuModuleLoadData", cubin), b"kernel")
        attribute = self.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self.call("cuFuncSetAttribute", function, attribute, shared)
        return function

    def launch(self, function: Any, grid: int, threads: int, shared: int, words: list[int]) -> None:
        parameters = (tuple(words), (ctypes.c_int64,) * len(words))
        self.call("cuLaunchKernel", function, grid, 1, 1, threads, 1, 1, shared, self.stream, parameters, 0)

    def milliseconds(self, launch: Callable[[], None], launches: int) -> float:
        """Median time of one launch, from graphs of many."""
        mode = self.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self.call("cuStreamBeginCapture", self.stream, mode)
        for _ in range(launches):
            launch()
        graph = self.call("cuGraphInstantiate", self.call("cuStreamEndCapture", self.stream), 0)
        times = []
        for repeat in range(REPEATS + 1):
            self.call("cuEventRecord", self.events[0], self.stream)
            self.call("cuGraphLaunch", graph, self.stream)
            self.call("cuEventRecord", self.events[1], self.stream)
            self.call("cuEventSynchronize", self.events[1])
            if repeat:
                times.append(self.call("cuEventElapsedTime", *self.events) / launches)
        return median(times)
