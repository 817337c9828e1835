"""Digests of large data on all cores: SHA-256 of the SHA-256s of its pieces.

Data of one piece has its plain SHA-256. Reads files and memory; decides nothing.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from minicc.targets.cpu import available_threads

PIECE = 8 << 20  # bytes
_READ = 1 << 18


def digest(data: bytes | memoryview) -> str:
    """The digest of memory, hexadecimal."""
    return _of_pieces(len(data), lambda start, end: hashlib.sha256(data[start:end]).digest())


def digest_stream(parts: Iterable[bytes | memoryview]) -> str:
    """The digest of what the parts are when joined: as `digest`, on one core and without joining them."""
    finished: list[bytes] = []
    current, room = hashlib.sha256(), PIECE
    for part in parts:
        at = 0
        while at < len(part):
            if not room:
                finished.append(current.digest())
                current, room = hashlib.sha256(), PIECE
            taken = part[at : at + room]
            current.update(taken)
            at, room = at + len(taken), room - len(taken)
    return _joined([*finished, current.digest()])


def digest_file(path: Path) -> str:
    """The digest of a file. Raises OSError, also when the file shrinks meanwhile."""

    def piece(start: int, end: int) -> bytes:
        current, room = hashlib.sha256(), memoryview(bytearray(min(_READ, end - start)))
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            while start < end:
                count = file.readinto(room[: end - start])
                if not count:
                    raise OSError(f"{path} became shorter while it was read")
                current.update(room[:count])
                start += count
        return current.digest()

    return _of_pieces(path.stat().st_size, piece)


def _of_pieces(size: int, piece: Callable[[int, int], bytes]) -> str:
    starts = range(0, max(size, 1), PIECE)
    bounds = [(start, min(start + PIECE, size)) for start in starts]
    threads = min(available_threads(), len(bounds)) if len(bounds) > 1 else 1
    if threads == 1:
        return _joined([piece(*bound) for bound in bounds])
    # Plain threads: those of concurrent.futures take longer to import than many a model to digest.
    digests, failures = [b""] * len(bounds), list[BaseException]()

    def work(first: int) -> None:
        try:
            for number in range(first, len(bounds), threads):
                digests[number] = piece(*bounds[number])
        except BaseException as error:  # for the caller, below
            failures.append(error)

    helpers = [threading.Thread(target=work, args=(number,), name="digest") for number in range(1, threads)]
    for helper in helpers:
        helper.start()
    work(0)
    for helper in helpers:
        helper.join()
    if failures:
        raise failures[0]
    return _joined(digests)


def _joined(digests: list[bytes]) -> str:
    return digests[0].hex() if len(digests) == 1 else hashlib.sha256(b"".join(digests)).hexdigest()
