"""Takes the weights out of a serialized model before protobuf parses it, which would hold each of them twice.

Of the protobuf encoding only what leads to `TensorProto.raw_data` is followed. Nothing is checked: whatever is not as
expected stays where it is, and the parser says what is wrong.
"""

from __future__ import annotations

import mmap
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import BinaryIO

# Shorter weights stay in the message.
SMALL = 1 << 10
# Shorter weights are read, longer ones mapped, each on its own, so that they leave memory with their array. A file has at
# most 2 GiB, so this bounds the number of mappings (each takes a file descriptor) to 512.
MAPPED = 1 << 22
# A message of more fields is left to the parser, which is faster.
MAX_FIELDS = 1 << 18

# Messages on the way to tensors: field number -> kind of message, by kind of message.
_INSIDE = {
    "model": {7: "graph"},
    "graph": {1: "node", 5: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor"},
}
_RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION = 9, 13, 14
_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
Field = tuple[int, int, int, int]  # its number; where it starts, its content starts, and it ends


@dataclass(frozen=True)
class OwnFile:
    """A model's own file, open or as its bytes, from which tensors are sliced as from a file of external data.

    location: the name by which tensors refer to it; nobody can guess it.
    """

    content: BinaryIO | bytes
    size: int
    location: str = field(default_factory=lambda: secrets.token_hex(16))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, wanted: slice) -> memoryview:
        """The bytes from `wanted.start` to `wanted.stop`, which lie inside. Raises OSError, ValueError."""
        offset, length = wanted.start, wanted.stop - wanted.start
        if isinstance(self.content, bytes):
            return memoryview(self.content[wanted])
        if length < MAPPED:
            self.content.seek(offset)
            return memoryview(self.content.read(length))
        skip = offset % mmap.ALLOCATIONGRANULARITY
        whole = mmap.mmap(self.content.fileno(), length + skip, offset=offset - skip, access=mmap.ACCESS_READ)
        return memoryview(whole)[skip:]

    @contextmanager
    def whole(self) -> Iterator[bytes | mmap.mmap]:
        """All of it, without reading it where it is a file. Raises OSError, ValueError."""
        if isinstance(self.content, bytes):
            yield self.content
        else:
            with mmap.mmap(self.content.fileno(), self.size, access=mmap.ACCESS_READ) as mapped:
                yield mapped

    def close(self) -> None:
        """Close the file; slices taken from it stay."""
        if not isinstance(self.content, bytes):
            self.content.close()


def without_weights(message: bytes | mmap.mmap, location: str) -> bytes:
    """A serialized ModelProto whose longer `raw_data` are replaced by references to where they are in `message`.

    location: stands for `message` in these references.
    """
    try:
        return b"".join(_rest(message, 0, len(message), "model", location))
    except (IndexError, ValueError):  # damaged, or not worth it
        return bytes(message)


def _rest(message: bytes | mmap.mmap, start: int, end: int, kind: str, location: str) -> Iterator[bytes]:
    """What remains of the message of some kind between two offsets."""
    fields = list(islice(_fields(message, start, end), MAX_FIELDS + 1))
    if len(fields) > MAX_FIELDS:
        raise ValueError("too many fields")
    if kind == "tensor":
        yield from _tensor(message, start, end, fields, location)
        return
    kept = start
    for number, at, content, stop in fields:
        inner = _INSIDE[kind].get(number)
        if inner is None or stop - content < SMALL:
            continue
        rest = b"".join(_rest(message, content, stop, inner, location))
        if len(rest) < stop - content:
            yield message[kept:at]
            yield _length_delimited(number, rest)
            kept = stop
    yield message[kept:end]


def _tensor(message: bytes | mmap.mmap, start: int, end: int, fields: Sequence[Field], location: str) -> Iterator[bytes]:
    raw = [f for f in fields if f[0] == _RAW_DATA]
    size = sum(stop - content for _, _, content, stop in raw)
    if len(raw) != 1 or size < SMALL or any(f[0] in (_EXTERNAL_DATA, _DATA_LOCATION) for f in fields):
        yield message[start:end]
        return
    _, at, content, stop = raw[0]
    yield message[start:at]
    yield message[stop:end]
    for key, value in (("location", location), ("offset", str(content)), ("length", str(size))):
        entry = _length_delimited(1, key.encode()) + _length_delimited(2, value.encode())
        yield _length_delimited(_EXTERNAL_DATA, entry)
    yield bytes([_DATA_LOCATION << 3 | _VARINT, 1])


def _fields(message: bytes | mmap.mmap, start: int, end: int) -> Iterator[Field]:
    """The length-delimited fields of a message. Raises IndexError, ValueError for what is no message."""
    at = start
    while at < end:
        tag, content = _varint(message, at)
        kind, stop = tag & 7, content
        if kind == _LENGTH:
            length, content = _varint(message, content)
            stop = content + length
        elif kind == _VARINT:
            _, stop = _varint(message, content)
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            stop = content + (8 if kind == _EIGHT_BYTES else 4)
        else:
            raise ValueError(f"wire type {kind}")
        if stop > end:
            raise ValueError("cut short")
        yield tag >> 3, at, content, stop
        at = stop


def _varint(message: bytes | mmap.mmap, at: int) -> tuple[int, int]:
    """(value, where the next thing starts) of seven bits per byte, lowest first."""
    value = shift = 0
    while shift < 64:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("a number of more than 64 bits")


def _length_delimited(number: int, content: bytes) -> bytes:
    out = bytearray()
    for value in (number << 3 | _LENGTH, len(content)):
        while value > 127:
            out.append(value & 127 | 128)
            value >>= 7
        out.append(value)
    return bytes(out) + content
