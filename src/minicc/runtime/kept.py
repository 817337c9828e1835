"""Kept modules: what was compiled from a model file, saved in the store for the next process that asks for the same.

The same is: the content of the file and of its external data, its name, the target, the options that decide about a
program, and the files of minicc and of the packages it compiles with. A kept module is a saved module
(runtime/artifact), used only when this user signed it under this very key; anything else counts as absent and is replaced.
Nothing here compiles.
"""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from minicc.errors import MiniccError
from minicc.options import Options
from minicc.runtime import artifact
from minicc.runtime.artifact import Saved
from minicc.runtime.digest import digest_file
from minicc.runtime.installed import installation, state_of
from minicc.runtime.module import programs_of
from minicc.runtime.store import Store

# Options that do not decide about a program: where and how it is kept, watched and run.
_FREE = frozenset({"threads", "overlap", "strict", "cache_dir", "keep_bytes", "debug", "dump", "check", "stop_after"})
_MAX_FILE = (1 << 31) - 1  # the largest ONNX file


class Place(NamedTuple):
    """Where the module of a model file is kept: its key, and the state of the file when the key was made."""

    folder: Path
    key: str
    model: Path
    state: tuple[int, ...]
    made: int  # nanoseconds of the clock that dates files

    @property
    def path(self) -> Path:
        return self.folder / self.key


def place_of(model: Path, target: str, store: Store, options: Options) -> Place | None:
    """The place of a model's module; None where nothing is kept, or where somebody watches what compilation does.

    target: the identity of the target (targets/parse).
    """
    watched = options.debug or options.dump or options.stop_after or options.check > 1
    folder = None if watched or not options.keep_bytes else store.modules()
    if folder is None:
        return None
    try:
        if not model.is_file() or model.stat().st_size > _MAX_FILE:
            return None
        state, made = state_of(model), time.time_ns()
        content = digest_file(model)
    except (OSError, ValueError):
        return None  # the frontend says what is wrong with it
    decisive = {name: value for name, value in asdict(options).items() if name not in _FREE}
    facts = (installation(), target, repr(decisive), model.stem, content)
    return Place(folder, hashlib.sha256("\0".join(facts).encode()).hexdigest(), model, state, made)


def find(place: Place, store: Store, options: Options) -> Saved | None:
    """The module kept in a place, under the caller's options; None when there is none, or none that may be used."""
    if not place.path.exists():
        return None
    try:
        saved = artifact.read(place.path, store, options, own=True)
        if saved.notes.get("key") != place.key or saved.notes["external"] != _digests(place.model, saved.notes["external"]):
            return None
        os.utime(place.path)  # the most recently used
    except (MiniccError, OSError, ValueError):
        place.path.unlink(missing_ok=True)
        return None
    return saved._replace(options=options)


def keep(place: Place, saved: Saved, external: tuple[str, ...], store: Store) -> None:
    """Keep a module for the next process, unless it is too large or its files have changed. A disk that refuses is a warning."""
    limit = saved.options.keep_bytes
    size = sum({id(b.data): b.data.nbytes for p in programs_of(saved.program) for b in p.buffers if b.data is not None}.values())
    try:
        unchanged = state_of(place.model) == place.state
        old = all(_location(place.model, name).stat().st_mtime_ns < place.made for name in external)
        if size > limit // 2 or not (unchanged and old):
            return
        notes = {**saved.notes, "key": place.key, "external": _digests(place.model, dict.fromkeys(external, ""))}
        artifact.save(place.path, saved._replace(notes=notes), store, durable=False)
        _shrink(place.folder, limit)
    except (MiniccError, OSError) as error:
        warnings.warn(f"the module cannot be kept: {error}", RuntimeWarning, stacklevel=3)


def _shrink(folder: Path, limit: int) -> None:
    """Delete the least recently used modules until the rest fits."""
    files = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another process deletes as well
            status = path.stat()
            files.append((status.st_mtime_ns, status.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total > limit:
            path.unlink(missing_ok=True)
            total -= size


def _digests(model: Path, external: Mapping[str, str]) -> dict[str, str]:
    return {name: digest_file(_location(model, name)) for name in external}


def _location(model: Path, name: str) -> Path:
    return model.absolute().parent / name
