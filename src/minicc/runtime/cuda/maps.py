"""Tensor maps in the form that Hopper's copy engine reads, 128 bytes each, which only the driver knows.

The driver's functions are called by their addresses: the class that NVIDIA's Python bindings return maps in lies at addresses
that are no multiples of 64, which the functions ask for. Nothing here talks to a device.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from minicc.errors import TargetError
from minicc.kernels.cuda_launch import MAP_BYTES, TensorMap

TILED, WINDOWS = "cuTensorMapEncodeTiled", "cuTensorMapEncodeIm2col"
VERSION = 12000  # the CUDA version whose forms of these functions are meant
_ALIGNMENT = 64
# CU_TENSOR_MAP_*: DATA_TYPE by element (of floats of 16 bits as integers, which nothing can change; TFLOAT32 rounds float32
# while it is copied), SWIZZLE_128B, L2_PROMOTION_L2_256B. Interleaving and filling with NaN are off.
_TYPES = {"s8": 0, "u8": 0, "f16": 1, "bf16": 1, "tf32": 11}
_SWITCHES = (0, 3, 3, 0)  # interleaving, swizzle, promotion, filling
_U32, _U64, _INT = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int
_ARRAY = ctypes.c_void_p
# Of both: the map, type, rank, address, extents, strides; of one: box, steps; of the other: lower and upper corner, channels,
# positions, steps.
_COMMON = (_INT, ctypes.c_void_p, _INT, _U32, _U64, _ARRAY, _ARRAY)
_PROTOTYPES = {
    TILED: ctypes.CFUNCTYPE(*_COMMON, _ARRAY, _ARRAY, _INT, _INT, _INT, _INT),
    WINDOWS: ctypes.CFUNCTYPE(*_COMMON, _ARRAY, _ARRAY, _U32, _U32, _ARRAY, _INT, _INT, _INT, _INT),
}


def encode(map_: TensorMap, find: Callable[[str, int], int]) -> bytes:
    """A map, encoded by the driver. find(name, version): address of one of its functions. TargetError when it refuses the map."""
    rank, positions = len(map_.extents), map_.positions
    name = TILED if positions is None else WINDOWS
    memory = ctypes.create_string_buffer(MAP_BYTES + _ALIGNMENT)
    target = -(-ctypes.addressof(memory) // _ALIGNMENT) * _ALIGNMENT
    common = (target, _TYPES[map_.element], rank, map_.address, (_U64 * rank)(*map_.extents), (_U64 * (rank - 1))(*map_.strides))
    own: tuple[object, ...]
    if positions is None:
        own = ((_U32 * rank)(*map_.box), (_U32 * rank)(*[1] * rank))
    else:
        steps = (_U32 * rank)(1, *positions.steps, 1)
        own = ((_INT * 2)(*positions.lower), (_INT * 2)(*positions.upper), *map_.box, steps)
    status = _PROTOTYPES[name](find(name, VERSION))(*common, *own, *_SWITCHES)
    if status:
        raise TargetError(f"{name} failed with code {status}", why=str(map_))
    return ctypes.string_at(target, MAP_BYTES)
