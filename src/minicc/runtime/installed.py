"""A key of what is installed: this minicc and the packages that decide about programs and code.

Places and dates of files, not their versions: reading those takes longer than loading a small module.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

_OWN = Path(__file__).parent.parent
_PACKAGES = ("numpy", "onnx", "ml_dtypes", "networkx", "numba", "llvmlite", "numba_cuda")


def state_of(path: Path | os.DirEntry[str]) -> tuple[int, ...]:
    """What changes when a file does: device, number, size, date. Raises OSError."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def installation() -> str:
    """The key, hexadecimal."""
    specs = [find_spec(package) for package in _PACKAGES]
    files = [(spec.origin, state_of(Path(spec.origin))) for spec in specs if spec is not None and spec.origin]
    return hashlib.sha256(repr([*files, *sorted(_texts(str(_OWN)))]).encode()).hexdigest()


def _texts(folder: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Path and state of each Python file in a folder, in a third of the time that pathlib takes."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".py"):
                yield entry.path, state_of(entry)
            elif entry.is_dir(follow_symlinks=False):
                yield from _texts(entry.path)
