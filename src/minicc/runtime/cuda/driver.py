"""The device layer: memory, code, copies, launches and graphs of one GPU, through NVIDIA's Python bindings of its driver.

The only module that talks to a GPU. It knows nothing of programs. Failures are TargetError with the driver's words, lack
of memory is ResourceLimitError. cuda-core's own launches and graphs are not used: they cost more per call and cannot raise
the shared memory of a kernel.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise, zip_longest
from typing import Any, Protocol

import numpy as np

from minicc.errors import ResourceLimitError, TargetError
from minicc.kernels.cuda_launch import Launch

Array = np.ndarray[Any, Any]

_STATIC_SHARED = 48 << 10  # what a kernel may use without asking
_KEPT = 1 << 62  # bytes of freed results that a device keeps for later ones: all of them
Launches = Sequence[tuple[Any, Launch, Sequence[int]]]
Replay = Callable[..., None]  # replay(stream), by default the stream it was recorded on
LEGACY = 1  # the handle of the stream that other libraries use unless told otherwise
INSTALL = "pip install 'minicc[cuda]'"


class Memory:
    """Bytes of a device, or of the host where a device reads them fast, until nobody holds this object."""

    def __init__(self, address: int, size: int, free: Callable[[], object]) -> None:
        self.address, self.size = address, size
        weakref.finalize(self, free)


class Stream:
    """An order of work on a device, until nobody holds this object."""

    def __init__(self, handle: Any, destroy: Callable[[], object]) -> None:
        self.handle = handle
        weakref.finalize(self, destroy)

    def __int__(self) -> int:
        return int(self.handle)


class Device(Protocol):
    """What the runtime needs of a GPU."""

    def load(self, symbol: str, cubin: bytes) -> Any:
        """The kernel of a cubin."""
        ...

    def stream(self) -> Stream:
        """A new stream."""
        ...

    def existing(self, handle: int) -> Stream:
        """A stream that somebody else made and keeps."""
        ...

    def allocate(self, size: int, stream: Stream | None = None) -> Memory:
        """Memory aligned to 256 bytes; with a stream from what the stream has freed before."""
        ...

    def staging(self, size: int) -> Memory:
        """Memory of the host that is never swapped out."""
        ...

    def to_device(self, address: int, source: int, size: int, stream: Stream) -> None:
        """Start a copy from the host."""
        ...

    def to_host(self, target: int, address: int, size: int, stream: Stream) -> None:
        """Start a copy to the host."""
        ...

    def on_device(self, target: int, source: int, size: int, stream: Stream) -> None:
        """Start a copy within the device."""
        ...

    def wait(self, stream: Stream) -> None:
        """Return when all work of a stream is done."""
        ...

    def follow(self, stream: Stream | int, leader: Stream) -> None:
        """Later work of `stream` (ours, or another library's by its handle) waits for what `leader` has been given."""
        ...

    def record(self, launches: Launches, stream: Stream, overlap: bool = False) -> Replay:
        """What starts these launches (kernel, shape, words) on the stream or on another one, all at once.

        overlap: each but the first may start while the one before it ends, for which its kernel waits by itself.
        """
        ...

    def times(self, launches: Launches, stream: Stream) -> list[float]:
        """Seconds that each of these launches takes when they run once, all at once; returns when they are done."""
        ...


class Gpu:
    """A device of this machine. Raises TargetError when it is not there."""

    def __init__(self, number: int = 0) -> None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise TargetError("cuda-bindings is not installed", why=str(error), hint=INSTALL) from None
        self.number, self._driver = number, driver
        self._call("cuInit", 0)
        self._device = self._call("cuDeviceGet", number)
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        self._enter()
        pool = self._call("cuDeviceGetDefaultMemPool", self._device)
        threshold = driver.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
        self._call("cuMemPoolSetAttribute", pool, threshold, driver.cuuint64_t(_KEPT))

    def _call(self, name: str, *arguments: Any) -> Any:
        """The result of a driver function. Raises TargetError, ResourceLimitError when memory is short."""
        status, *results = getattr(self._driver, name)(*arguments)
        if status == self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise ResourceLimitError("the GPU has no memory left", where=name)
        if int(status):
            _, text = self._driver.cuGetErrorString(status)
            why = text.decode() if isinstance(text, bytes) else str(status)
            raise TargetError(f"{name} failed with code {int(status)}", why=why)
        return results[0] if results else None

    def _enter(self) -> None:
        """Make the device current for the calling thread."""
        self._call("cuCtxSetCurrent", self._context)

    def load(self, symbol: str, cubin: bytes) -> Any:
        self._enter()
        return self._call("cuModuleGetFunction", self._call("cuModuleLoadData", cubin), symbol.encode())

    def stream(self) -> Stream:
        self._enter()
        handle = self._call("cuStreamCreate", self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value)
        return Stream(handle, lambda: self._driver.cuStreamDestroy(handle))

    def existing(self, handle: int) -> Stream:
        return Stream(self._driver.CUstream(handle), lambda: None)

    def allocate(self, size: int, stream: Stream | None = None) -> Memory:
        self._enter()
        size = max(1, size)
        try:
            if stream is None:
                address = int(self._call("cuMemAlloc", size))
            else:
                address = int(self._call("cuMemAllocAsync", size, stream.handle))
        except ResourceLimitError:
            free, total = self._driver.cuMemGetInfo()[1:]
            raise ResourceLimitError(
                f"the GPU has no {size} bytes left",
                why=f"{int(free)} of its {int(total)} bytes are free",
                hint="give smaller inputs, free other modules or set max_bytes",
            ) from None
        return Memory(address, size, lambda: self._free(address, stream))

    def _free(self, address: int, stream: Stream | None) -> None:
        # Called when objects vanish, perhaps while the process ends: there is nobody to tell of a failure.
        self._driver.cuCtxSetCurrent(self._context)
        if stream is None:
            self._driver.cuMemFree(address)
        else:
            self._driver.cuMemFreeAsync(address, stream.handle)

    def staging(self, size: int) -> Memory:
        self._enter()
        address = int(self._call("cuMemAllocHost", max(1, size)))
        return Memory(address, size, lambda: self._driver.cuMemFreeHost(address))

    def to_device(self, address: int, source: int, size: int, stream: Stream) -> None:
        if size:
            self._enter()
            self._call("cuMemcpyHtoDAsync", address, source, size, stream.handle)

    def to_host(self, target: int, address: int, size: int, stream: Stream) -> None:
        if size:
            self._enter()
            self._call("cuMemcpyDtoHAsync", target, address, size, stream.handle)

    def on_device(self, target: int, source: int, size: int, stream: Stream) -> None:
        if size:
            self._enter()
            self._call("cuMemcpyDtoDAsync", target, source, size, stream.handle)

    def wait(self, stream: Stream) -> None:
        self._enter()
        self._call("cuStreamSynchronize", stream.handle)

    def follow(self, stream: Stream | int, leader: Stream) -> None:
        self._enter()
        handle = stream.handle if isinstance(stream, Stream) else self._driver.CUstream(stream)
        event = self._call("cuEventCreate", self._driver.CUevent_flags.CU_EVENT_DISABLE_TIMING.value)
        self._call("cuEventRecord", event, leader.handle)
        self._call("cuStreamWaitEvent", handle, event, 0)
        self._call("cuEventDestroy", event)

    def record(self, launches: Launches, stream: Stream, overlap: bool = False) -> Replay:
        if not launches:
            return lambda _stream=None: None
        return self._graph(launches, stream, [], overlap)

    def times(self, launches: Launches, stream: Stream) -> list[float]:
        self._enter()
        events = [self._call("cuEventCreate", 0) for _ in range(len(launches) + 1)]
        try:
            # Marks inside the graph, so that the device never waits for the host between two kernels.
            self._graph(launches, stream, events)()
            self.wait(stream)
            return [1e-3 * self._call("cuEventElapsedTime", *pair) for pair in pairwise(events)]
        finally:
            for event in events:
                self._call("cuEventDestroy", event)

    def _graph(self, launches: Launches, stream: Stream, events: Sequence[Any], overlap: bool = False) -> Replay:
        """What starts the launches; with one event before each and one behind the last, if there are any."""
        self._enter()
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL  # others may use the driver meanwhile
        outside = self._driver.CUevent_record_flags.CU_EVENT_RECORD_EXTERNAL.value
        self._call("cuStreamBeginCapture", stream.handle, mode)
        try:
            for number, (started, event) in enumerate(zip_longest(launches, events)):
                if event is not None:
                    self._call("cuEventRecordWithFlags", event, stream.handle, outside)
                if started is not None:
                    kernel, launch, words = started
                    self._launch(kernel, launch, words, stream, overlap and number > 0)
        finally:
            graph = self._call("cuStreamEndCapture", stream.handle)
        ready = self._call("cuGraphInstantiate", graph, 0)
        self._call("cuGraphDestroy", graph)

        def replay(where: Stream = stream) -> None:
            self._enter()
            self._call("cuGraphLaunch", ready, where.handle)

        weakref.finalize(replay, self._driver.cuGraphExecDestroy, ready)
        return replay

    def _launch(self, kernel: Any, launch: Launch, words: Sequence[int], stream: Stream, early: bool) -> None:
        """early: it may start while the launch before it ends."""
        driver = self._driver
        if launch.shared_bytes > _STATIC_SHARED:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._call("cuFuncSetAttribute", kernel, attribute, launch.shared_bytes)
        parameters = (tuple(words), (ctypes.c_int64,) * len(words))
        x, y, z = launch.grid
        if not early:
            self._call("cuLaunchKernel", kernel, x, y, z, launch.block, 1, 1, launch.shared_bytes, stream.handle, parameters, 0)
            return
        serial, config = driver.CUlaunchAttribute(), driver.CUlaunchConfig()
        serial.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        serial.value.programmaticStreamSerializationAllowed = 1
        config.gridDimX, config.gridDimY, config.gridDimZ = x, y, z
        config.blockDimX, config.blockDimY, config.blockDimZ = launch.block, 1, 1
        config.sharedMemBytes, config.hStream = launch.shared_bytes, stream.handle
        config.attrs, config.numAttrs = [serial], 1
        self._call("cuLaunchKernelEx", config, kernel, parameters, 0)
