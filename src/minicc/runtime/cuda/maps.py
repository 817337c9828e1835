"""Tensor maps in the form that Hopper's copy engine reads, 128 bytes each, which only the driver knows.

The driver's function is called by its address: the class that NVIDIA's Python bindings return maps in lies at addresses that
are no multiples of 64, which the function asks for. Nothing here talks to a device.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from minicc.errors import TargetError
from minicc.kernels.cuda_launch import MAP_BYTES, TensorMap

FUNCTION, VERSION = b"cuTensorMapEncodeTiled", 12000  # its name in the driver, and the CUDA version whose form is meant
_ALIGNMENT = 64
# CU_TENSOR_MAP_*: DATA_TYPE by element (of floats of 16 bits as integers, which nothing can change; TFLOAT32 rounds float32
# while it is copied), SWIZZLE_128B, L2_PROMOTION_L2_256B. Interleaving and filling with NaN are off.
_TYPES = {"s8": 0, "u8": 0, "f16": 1, "bf16": 1, "tf32": 11}
_SWIZZLE, _PROMOTION = 3, 3
_U32, _U64, _INT = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int
_PROTOTYPE = ctypes.CFUNCTYPE(
    _INT, ctypes.c_void_p, _INT, _U32, _U64, ctypes.POINTER(_U64), ctypes.POINTER(_U64), ctypes.POINTER(_U32),
    ctypes.POINTER(_U32), _INT, _INT, _INT, _INT,
)  # fmt: skip


def encoder(address: int) -> Callable[[TensorMap], bytes]:
    """What encodes maps with the driver's function at this address. It raises TargetError for a map that the driver refuses."""
    function = _PROTOTYPE(address)

    def encode(map_: TensorMap) -> bytes:
        rank = len(map_.extents)
        memory = ctypes.create_string_buffer(MAP_BYTES + _ALIGNMENT)
        target = -(-ctypes.addressof(memory) // _ALIGNMENT) * _ALIGNMENT
        status = function(
            target, _TYPES[map_.element], rank, map_.address, (_U64 * rank)(*map_.extents), (_U64 * (rank - 1))(*map_.strides),
            (_U32 * rank)(*map_.box), (_U32 * rank)(*[1] * rank), 0, _SWIZZLE, _PROMOTION, 0,
        )  # fmt: skip
        if status:
            raise TargetError(f"{FUNCTION.decode()} failed with code {status}", why=str(map_))
        return ctypes.string_at(target, MAP_BYTES)

    return encode
