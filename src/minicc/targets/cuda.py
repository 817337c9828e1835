"""Facts about NVIDIA GPUs: what decides about machine code and about launches.

A `CudaTarget` is plain data, usable without the device it describes. Nothing here compiles or runs code.
"""

from __future__ import annotations

import ctypes
import hashlib
from dataclasses import dataclass

from minicc.errors import TargetError


@dataclass(frozen=True)
class CudaTarget:
    """One GPU model as the compiler sees it.

    name:            as the user writes it, such as "cuda:sm_90".
    capability:      compute capability, such as (9, 0).
    arch:            what ptxas calls it, such as "sm_80"; "sm_90a" brings Hopper's own instructions. "compute_80" is no machine
                     code but PTX, which the driver of any later device assembles when it loads it.
    multiprocessors: their number; only the shape of launches depends on it.
    shared_bytes:    shared memory that one block may use.
    registers:       32-bit registers of a multiprocessor.
    l2_bytes:        the cache that all multiprocessors share.
    """

    name: str
    capability: tuple[int, int]
    arch: str
    multiprocessors: int
    shared_bytes: int
    registers: int = 65536
    l2_bytes: int = 0

    def fingerprint(self) -> str:
        """A stable key of everything that decides about machine code; equal facts give equal keys."""
        return hashlib.sha256(f"cuda\0{self.arch}".encode()).hexdigest()[:16]

    @property
    def is_text(self) -> bool:
        """Whether its kernels are PTX, for the driver to assemble."""
        return self.arch.startswith("compute_")

    @property
    def preference(self) -> tuple[int, ...]:
        """Of several variants that a machine can run, the one with the largest is the best."""
        return (*self.capability, not self.is_text)

    def missing_features(self) -> tuple[str, ...]:
        """What this machine lacks to run code for the target; empty when it can."""
        number = self.name.partition(":")[2]
        try:
            present = _device_target("cuda", int(number) if number.isdigit() else 0)
        except TargetError as error:
            return (f"a GPU: {error.why or error.what}",)
        same = self.is_text or present.capability[0] == self.capability[0]
        if not same or present.capability < self.capability:
            return (f"a GPU of capability {self.capability[0]}.{self.capability[1]}",)
        return ()


_KNOWN = {
    "sm_80": CudaTarget("cuda:sm_80", (8, 0), "sm_80", 108, 163 << 10, l2_bytes=40 << 20),
    "sm_90": CudaTarget("cuda:sm_90", (9, 0), "sm_90a", 132, 227 << 10, l2_bytes=50 << 20),
    # Shared memory that every later device has, too: 99 KiB on 8.6, 8.9 and 12.0.
    "compute_80": CudaTarget("cuda:compute_80", (8, 0), "compute_80", 108, 99 << 10, l2_bytes=40 << 20),
}
_COMPILE_ELSEWHERE = "to compile for a GPU that is not here, name its model: cuda:sm_80 or cuda:sm_90"


def parse_cuda_target(text: str) -> CudaTarget:
    """The CUDA target with this name: "cuda" or "cuda:0" (a device here), "cuda:sm_80", "cuda:sm_90", "cuda:compute_80".

    Raises TargetError for another name, and for a device that is not here.
    """
    _, _, model = text.strip().lower().partition(":")
    if model in _KNOWN:
        return _KNOWN[model]
    if model and not model.isdigit():
        known = ", ".join(["cuda", "cuda:0", *(f"cuda:{name}" for name in _KNOWN)])
        raise TargetError(f"unknown CUDA target {text!r}", hint=f"one of {known}")
    return _device_target(text.strip().lower(), int(model or 0))


def _device_target(name: str, number: int) -> CudaTarget:
    """A device of this machine, as its driver describes it."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise TargetError(
            f"no GPU for target {name!r}", why="there is no NVIDIA driver (libcuda.so.1)", hint=_COMPILE_ELSEWHERE
        ) from None
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or number >= count.value:
        why = f"the driver reports {count.value} device(s)"
        raise TargetError(f"no GPU for target {name!r}", why=why, hint=_COMPILE_ELSEWHERE)
    device = ctypes.c_int()
    driver.cuDeviceGet(ctypes.byref(device), number)

    def attribute(code: int) -> int:
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), code, device)
        return value.value

    # CU_DEVICE_ATTRIBUTE_*: compute capability, multiprocessors, shared memory per block, registers, L2.
    major, minor, multiprocessors, shared, registers, l2 = (attribute(code) for code in (75, 76, 16, 97, 82, 38))
    if (major, minor) < (8, 0):
        why = f"its compute capability is {major}.{minor}"
        raise TargetError(f"the GPU of target {name!r} is too old", why=why, hint="8.0 or later is needed")
    arch = "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"
    return CudaTarget(name, (major, minor), arch, multiprocessors, shared, registers, l2)
