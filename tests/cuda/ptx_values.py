"""Numbers of the PTX interpreter: raw register bits as numbers of PTX types, and back."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class PtxError(Exception):
    """A kernel did what it must not, or something the interpreter does not know."""


DTYPES: dict[str, Any] = {
    "pred": np.bool_, "f16": np.float16, "f32": np.float32, "f64": np.float64,
    **{f"{letter}{bits}": np.dtype(f"u{bits // 8}") for letter in "ub" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    "bf16": np.uint16, "f16x2": np.uint32, "bf16x2": np.uint32, "tf32": np.uint32,
}  # fmt: skip
WIDTH = {name: np.dtype(dtype).itemsize for name, dtype in DTYPES.items()}


def unpack(raw: Array, type_: str) -> Array:
    """The low bits of uint64 as numbers of a PTX type; bf16 as float32."""
    if type_ not in DTYPES:
        raise PtxError(f"unknown type .{type_}")
    if type_ == "pred":
        return raw.astype(bool)
    if type_ == "bf16":
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    dtype = np.dtype(DTYPES[type_])
    return raw.astype(f"u{dtype.itemsize}").view(dtype)


def pack(numbers: Array) -> Array:
    """Numbers as raw uint64; signed ones are not extended."""
    numbers = np.ascontiguousarray(numbers)
    if numbers.dtype.kind in "if":
        numbers = numbers.view(f"u{numbers.dtype.itemsize}")
    return numbers.astype(np.uint64)


def to_bf16(numbers: Array) -> Array:
    """float32 rounded to the nearest bf16, as uint16."""
    bits = numbers.astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(numbers), np.uint32(0x7FFF), rounded).astype(np.uint16)
