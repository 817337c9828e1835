"""Types of values: element types and tensor shapes.

A `DType` names one ONNX element type and the numpy type that carries it (ml_dtypes for bf16, fp8, int4). A
`TensorType` is an element type and a shape of dimensions; nothing about layout or quantisation hides in it.
Sequences, optionals and maps are `OpaqueType`: only the host tier touches them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np

from minicc.errors import InvalidModelError
from minicc.ir.dims import Dim, bare_symbol, broadcast, product


@dataclass(frozen=True, slots=True)
class DType:
    """One element type: its short name, its ONNX name, kind (f i u b c s) and size in bits as stored by minicc."""

    name: str
    onnx: str
    kind: str
    bits: int

    def __str__(self) -> str:
        return self.name

    @property
    def numpy(self) -> np.dtype:  # type: ignore[type-arg]
        """The numpy type that carries it."""
        return _numpy_dtype(self)

    @property
    def bytes(self) -> int:
        """Bytes per element in memory (sub-byte types take one byte each)."""
        return max(self.bits, 8) // 8

    @property
    def is_float(self) -> bool:
        return self.kind == "f"

    @property
    def is_integer(self) -> bool:
        return self.kind in "iu"


f32 = DType("f32", "FLOAT", "f", 32)
f64 = DType("f64", "DOUBLE", "f", 64)
f16 = DType("f16", "FLOAT16", "f", 16)
bf16 = DType("bf16", "BFLOAT16", "f", 16)
i8 = DType("i8", "INT8", "i", 8)
i16 = DType("i16", "INT16", "i", 16)
i32 = DType("i32", "INT32", "i", 32)
i64 = DType("i64", "INT64", "i", 64)
u8 = DType("u8", "UINT8", "u", 8)
u16 = DType("u16", "UINT16", "u", 16)
u32 = DType("u32", "UINT32", "u", 32)
u64 = DType("u64", "UINT64", "u", 64)
boolean = DType("bool", "BOOL", "b", 8)
string = DType("string", "STRING", "s", 64)

# Types that are carried but have no arithmetic of their own in kernels.
_MINOR = (
    DType("c64", "COMPLEX64", "c", 64),
    DType("c128", "COMPLEX128", "c", 128),
    DType("f8e4m3fn", "FLOAT8E4M3FN", "f", 8),
    DType("f8e4m3fnuz", "FLOAT8E4M3FNUZ", "f", 8),
    DType("f8e5m2", "FLOAT8E5M2", "f", 8),
    DType("f8e5m2fnuz", "FLOAT8E5M2FNUZ", "f", 8),
    DType("f8e8m0", "FLOAT8E8M0", "f", 8),
    DType("f6e2m3", "FLOAT6E2M3", "f", 6),
    DType("f6e3m2", "FLOAT6E3M2", "f", 6),
    DType("f4e2m1", "FLOAT4E2M1", "f", 4),
    DType("i4", "INT4", "i", 4),
    DType("u4", "UINT4", "u", 4),
    DType("i2", "INT2", "i", 2),
    DType("u2", "UINT2", "u", 2),
)
_NATIVE = (f32, f64, f16, bf16, i8, i16, i32, i64, u8, u16, u32, u64, boolean, string)
DTYPES = _NATIVE + _MINOR
BY_NAME = {d.name: d for d in DTYPES}
BY_ONNX = {d.onnx: d for d in DTYPES}
# Types a generated kernel can load and store.
KERNEL_DTYPES = frozenset((f32, f64, f16, bf16, i8, i16, i32, i64, u8, u16, u32, u64, boolean))

_NUMPY = {
    "f32": "float32", "f64": "float64", "f16": "float16", "i8": "int8", "i16": "int16", "i32": "int32",
    "i64": "int64", "u8": "uint8", "u16": "uint16", "u32": "uint32", "u64": "uint64", "bool": "bool",
    "string": "object", "c64": "complex64", "c128": "complex128",
}  # fmt: skip
_ML_DTYPES = {
    "bf16": "bfloat16", "f8e4m3fn": "float8_e4m3fn", "f8e4m3fnuz": "float8_e4m3fnuz", "f8e5m2": "float8_e5m2",
    "f8e5m2fnuz": "float8_e5m2fnuz", "f8e8m0": "float8_e8m0fnu", "f6e2m3": "float6_e2m3fn", "f6e3m2": "float6_e3m2fn",
    "f4e2m1": "float4_e2m1fn", "i4": "int4", "u4": "uint4", "i2": "int2", "u2": "uint2",
}  # fmt: skip


@cache
def _numpy_dtype(dtype: DType) -> np.dtype:  # type: ignore[type-arg]
    if dtype.name in _NUMPY:
        return np.dtype(_NUMPY[dtype.name])
    import ml_dtypes  # only models with these types pay for it

    found: np.dtype = np.dtype(getattr(ml_dtypes, _ML_DTYPES[dtype.name]))  # type: ignore[type-arg]
    return found


@cache
def dtype_of(numpy_dtype: np.dtype) -> DType:  # type: ignore[type-arg]
    """The DType carried by a numpy dtype. Raises InvalidModelError for one that ONNX does not have."""
    if numpy_dtype.kind in "OUST":
        return string
    for name, numpy_name in _NUMPY.items():
        if numpy_dtype == np.dtype(numpy_name):
            return BY_NAME[name]
    for name, ml_name in _ML_DTYPES.items():
        if numpy_dtype.name == ml_name:
            return BY_NAME[name]
    raise InvalidModelError(f"numpy type {numpy_dtype} has no ONNX element type")


def compute_dtype_name(dtype: DType) -> str:
    """Name of the type in which kernels compute values of `dtype`: half types compute in f32."""
    return "f32" if dtype in (f16, bf16) else dtype.name


@dataclass(frozen=True, slots=True)
class TensorType:
    """Element type and shape; `shape` is None when even the rank is unknown (host tier only)."""

    dtype: DType
    shape: tuple[Dim, ...] | None

    def __str__(self) -> str:
        if self.shape is None:
            return f"{self.dtype}[?]"
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"

    @property
    def dims(self) -> tuple[Dim, ...]:
        """The shape of a tensor whose rank is known."""
        if self.shape is None:
            raise AssertionError("rank is unknown")
        return self.shape

    @property
    def rank(self) -> int:
        return len(self.dims)

    @property
    def size(self) -> Dim:
        """Number of elements."""
        return product(self.dims)

    @property
    def is_static(self) -> bool:
        """True when the shape holds only integers."""
        return self.shape is not None and all(isinstance(d, int) for d in self.shape)

    def with_shape(self, shape: Iterable[Dim] | None) -> TensorType:
        return TensorType(self.dtype, None if shape is None else tuple(shape))

    def with_dtype(self, dtype: DType) -> TensorType:
        return TensorType(dtype, self.shape)


@dataclass(frozen=True, slots=True)
class OpaqueType:
    """A sequence, optional or map, by its ONNX text; handled by the host tier only."""

    text: str

    def __str__(self) -> str:
        return self.text


Type = TensorType | OpaqueType


def broadcast_shapes(*shapes: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """Numpy broadcasting over symbolic shapes. Raises ShapeError when known sizes clash."""
    rank = max((len(s) for s in shapes), default=0)
    out: list[Dim] = [1] * rank
    for shape in shapes:
        for axis, dim in enumerate(shape, start=rank - len(shape)):
            out[axis] = broadcast(out[axis], dim)
    return tuple(out)


def leads_with(type_: Type, symbol: str) -> bool:
    """Whether the first size of a tensor type is the symbol alone."""
    shape = type_.shape if isinstance(type_, TensorType) else None
    return bool(shape) and not isinstance(shape[0], int) and bare_symbol(shape[0]) == symbol  # type: ignore[index]
