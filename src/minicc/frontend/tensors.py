"""TensorProto to numpy: every element type, packed and raw storage, sparse tensors, external files.

Sizes are checked against the stored bytes before anything is allocated. External data must lie in the
model's folder, in a plain file reached without links, and is mapped, not read.
"""

from __future__ import annotations

import mmap
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import onnx

from minicc.errors import InvalidModelError, ResourceLimitError
from minicc.frontend.weights import OwnFile
from minicc.ir.types import DType, boolean, string
from minicc.ops.host import dtype_of_number

Array = np.ndarray[Any, Any]
_MAX_RANK = 64  # numpy's limit

_FIELDS = {
    "f32": "float_data",
    "c64": "float_data",
    "f64": "double_data",
    "c128": "double_data",
    "i64": "int64_data",
    "u32": "uint64_data",
    "u64": "uint64_data",
}  # fmt: skip  everything else is in int32_data


@dataclass
class TensorReader:
    """Reads tensors of one model; `folder` is where its external data may lie (None: nowhere).

    own: the model's own file, where its tensors have been left there.
    """

    folder: Path | None
    max_bytes: int
    own: OwnFile | None = None
    files: dict[str, memoryview] = field(default_factory=dict)

    def read(self, proto: onnx.TensorProto, name: str = "") -> Array:
        """The tensor as an array, one element per item; strings as objects. Raises InvalidModelError."""
        name = name or proto.name or "tensor"
        dtype = dtype_of_number(proto.data_type)
        shape, count = self._extent(list(proto.dims), dtype, name)
        if proto.HasField("segment"):
            raise InvalidModelError(f"tensor {name!r} is stored in segments, which nothing supports")
        if dtype is string:
            return _strings(proto, shape, count, name)
        stored = (count * dtype.bits + 7) // 8
        if proto.data_location == onnx.TensorProto.EXTERNAL:
            return _from_bytes(self._external(proto, stored, name), dtype, shape, count)
        if proto.HasField("raw_data"):
            raw = proto.raw_data
            if len(raw) != stored:
                raise InvalidModelError(
                    f"tensor {name!r} of type {dtype}{list(shape)} needs {stored} bytes, has {len(raw)}"
                )
            return _from_bytes(raw, dtype, shape, count)
        return _from_fields(proto, dtype, shape, count, name)

    def read_sparse(self, proto: onnx.SparseTensorProto, name: str = "") -> Array:
        """A sparse tensor made dense. Raises InvalidModelError, ResourceLimitError."""
        name = name or proto.values.name or "sparse tensor"
        values = self.read(proto.values, name)
        shape, count = self._extent(list(proto.dims), dtype_of_number(proto.values.data_type), name)
        indices = self.read(proto.indices, f"{name} (indices)")
        if values.ndim != 1 or indices.dtype != np.int64:
            raise InvalidModelError(f"sparse tensor {name!r}: values must be a vector and indices int64")
        if indices.ndim == 2:
            if indices.shape != (values.size, len(shape)):
                raise InvalidModelError(f"sparse tensor {name!r}: indices have shape {indices.shape}")
            if (indices < 0).any() or (indices >= np.array(shape, dtype=np.int64)).any():
                raise InvalidModelError(f"sparse tensor {name!r}: an index is out of range")
            places = np.ravel_multi_index(tuple(indices.T), shape) if values.size else np.zeros(0, np.int64)
        else:
            places = indices
            if places.shape != values.shape or (places < 0).any() or (places >= count).any():
                raise InvalidModelError(f"sparse tensor {name!r}: an index is out of range")
        dense = np.full(count, "", object) if values.dtype == object else np.zeros(count, values.dtype)
        dense[places] = values
        return dense.reshape(shape)

    def _extent(self, dims: list[int], dtype: DType, name: str) -> tuple[tuple[int, ...], int]:
        if len(dims) > _MAX_RANK:
            raise InvalidModelError(f"tensor {name!r} has rank {len(dims)}, the limit is {_MAX_RANK}")
        count = 1
        for dim in dims:
            if dim < 0:
                raise InvalidModelError(f"tensor {name!r} has a negative dimension: {dims}")
            count *= dim
        if count * dtype.bytes > self.max_bytes:
            raise ResourceLimitError(
                f"tensor {name!r} of shape {dims} is larger than max_bytes={self.max_bytes}"
            )
        return tuple(dims), count

    def _external(self, proto: onnx.TensorProto, stored: int, name: str) -> memoryview:
        entries = {entry.key: entry.value for entry in proto.external_data}
        location = entries.get("location", "")
        offset = _integer(entries.get("offset", "0"), name)
        length = _integer(entries.get("length", str(stored)), name)
        mine = self.own is not None and location == self.own.location
        if length != stored:
            has = "it has" if mine else "its external data has"
            raise InvalidModelError(f"tensor {name!r} needs {stored} bytes, {has} {length}")
        if self.own is not None and mine:
            return self.own[offset : offset + length]
        if location not in self.files:
            self.files[location] = _map(self.folder, location, name)
        data = self.files[location]
        if offset + length > len(data):
            raise InvalidModelError(
                f"external data of tensor {name!r} ends outside its file",
                why=f"offset {offset} + length {length} > {len(data)} bytes of {location!r}",
            )
        return data[offset : offset + length]


def _integer(text: str, name: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 19:
        raise InvalidModelError(f"external data of tensor {name!r} has offset or length {text[:40]!r}")
    return int(text)


def _map(folder: Path | None, location: str, name: str) -> memoryview:
    """Map a file below `folder`, refusing everything but a plain file reached without links."""
    where = f"external data {location!r} of tensor {name!r}"
    if folder is None:
        raise InvalidModelError(
            f"{where}: the model was given without a folder",
            hint="compile the path of the file, or give base_dir",
        )
    posix, windows = PurePosixPath(location), PureWindowsPath(location)
    parts = posix.parts
    if (
        not parts
        or posix.is_absolute()
        or windows.is_absolute()
        or windows.drive
        or ".." in windows.parts
        or "\0" in location
    ):
        raise InvalidModelError(f"{where} is not inside the model's folder")
    try:
        path = folder
        for part in parts:
            path = path / part
            status = path.lstat()
            if stat.S_ISLNK(status.st_mode):
                raise InvalidModelError(f"{where} is reached through a symbolic link")
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:
        raise InvalidModelError(f"{where} cannot be opened", why=str(error)) from error
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidModelError(f"{where} is not a plain file")
        if status.st_nlink > 1:
            raise InvalidModelError(
                f"{where} has hard links",
                why=f"{status.st_nlink} names",
                hint="copy the file so that it is the model's own",
            )
        if status.st_size == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(handle, 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise InvalidModelError(f"{where} cannot be mapped", why=str(error)) from error
    finally:
        os.close(handle)


def _strings(proto: onnx.TensorProto, shape: tuple[int, ...], count: int, name: str) -> Array:
    if len(proto.string_data) != count or proto.HasField("raw_data") or proto.external_data:
        raise InvalidModelError(
            f"string tensor {name!r} of shape {list(shape)} has {len(proto.string_data)} elements"
        )
    out = np.empty(count, dtype=object)
    out[:] = [s.decode("utf-8", "surrogateescape") for s in proto.string_data]
    return out.reshape(shape)


def _from_bytes(raw: bytes | memoryview, dtype: DType, shape: tuple[int, ...], count: int) -> Array:
    if dtype.bits < 8:
        return _unpack(np.frombuffer(raw, np.uint8), dtype, count).reshape(shape)
    if dtype is boolean:
        return np.not_equal(np.frombuffer(raw, np.uint8), 0).reshape(shape)
    if count == 0:
        return np.zeros(shape, dtype.numpy)
    return np.frombuffer(raw, dtype.numpy, count).reshape(shape)  # at any address: a copy would hold mapped weights twice


def _unpack(packed: Array, dtype: DType, count: int) -> Array:
    """Elements of 2, 4 or 6 bits, lowest bits first, one per byte of the carrying type."""
    if dtype.bits == 6:  # elements cross bytes
        bits = np.unpackbits(packed, bitorder="little")[: 6 * count].reshape(count, 6)
        codes: Array = np.packbits(bits, axis=1, bitorder="little").reshape(-1)
    else:
        shifts = np.arange(0, 8, dtype.bits, dtype=np.uint8)
        codes = ((packed[:, None] >> shifts) & ((1 << dtype.bits) - 1)).reshape(-1)[:count]
    if dtype.kind == "i":  # sign extension
        half = 1 << (dtype.bits - 1)
        return ((codes.astype(np.int8) ^ half) - half).astype(np.int8).astype(dtype.numpy)
    if dtype.kind == "u":
        return codes.astype(dtype.numpy)
    return codes.astype(np.uint8).view(dtype.numpy)


def _from_fields(
    proto: onnx.TensorProto, dtype: DType, shape: tuple[int, ...], count: int, name: str
) -> Array:
    """Elements stored in the typed repeated fields."""
    items = getattr(proto, _FIELDS.get(dtype.name, "int32_data"))
    needed = (count * dtype.bits + 7) // 8 if dtype.bits < 6 else 2 * count if dtype.kind == "c" else count
    if len(items) != needed:
        raise InvalidModelError(
            f"tensor {name!r} of type {dtype}{list(shape)} needs {needed} elements, has {len(items)}"
        )
    if dtype.kind == "c":
        pairs = np.array(items, np.float32 if dtype.name == "c64" else np.float64)
        return pairs.view(dtype.numpy).reshape(shape)
    if dtype.name in ("f32", "f64", "i64", "i32"):
        return np.array(items, dtype.numpy).reshape(shape)
    if dtype.name in ("u32", "u64"):
        return np.array(items, np.uint64).astype(dtype.numpy).reshape(shape)
    words = np.array(items, np.int64)
    if dtype.bits < 6:
        return _unpack(words.astype(np.uint8), dtype, count).reshape(shape)
    if dtype is boolean:
        return np.not_equal(words, 0).reshape(shape)
    if dtype.is_integer:
        return words.astype(dtype.numpy).reshape(shape)
    return words.astype(np.uint8 if dtype.bits <= 8 else np.uint16).view(dtype.numpy).reshape(shape)
