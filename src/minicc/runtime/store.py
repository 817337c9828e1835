"""The store: a private folder of object files, each authenticated before it is ever used; beside it that of kept modules.

An entry is a small file: a format mark, an HMAC-SHA256 over its key and content, the content. The HMAC key
is made on first use and readable by its owner only. A file that fails authentication counts as absent and is
replaced. Nothing is pickled; nothing here compiles or loads code. Without a usable folder everything works,
uncached.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import shutil
import stat
import warnings
from collections.abc import Callable
from pathlib import Path

_MARK = b"minicc1\n"
_MAC_BYTES = 32
_KEY_BYTES = 32


class Store:
    """Objects by content key, kept in `folder`/kernels. Safe to share between threads and processes.

    folder: None switches the store off: `get` finds nothing and `put` keeps nothing; `sign` and `verify` then
    use a key that lasts as long as this Store.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder / "kernels" if folder is not None else None
        self._secret: bytes | None = None
        self._warned = False

    def get(self, key: str) -> bytes | None:
        """The content under a key (hexadecimal), or None when it is absent or not authentic."""
        secret = self._key()
        if self._folder is None:
            return None
        try:
            text = self._path(key).read_bytes()
        except OSError:
            return None
        head = len(_MARK) + _MAC_BYTES
        content = text[head:]
        authentic = hmac.compare_digest(text[len(_MARK) : head], _mac(secret, key.encode(), content))
        return content if text.startswith(_MARK) and authentic else None

    def put(self, key: str, data: bytes) -> None:
        """Keep content under a key, replacing what is there. A disk that refuses is a warning, once."""
        secret = self._key()
        if self._folder is None:
            return
        path = self._path(key)
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            _write_atomically(path, _MARK + _mac(secret, key.encode(), data) + data)
        except OSError as error:
            self._warn(f"kernels cannot be stored in {self._folder}: {error}")

    def sign(self, data: bytes) -> bytes:
        """The authentication code (32 bytes) of data made on this account."""
        return _mac(self._key(), b"sign", data)

    def verify(self, data: bytes, mac: bytes) -> bool:
        """Whether `mac` is the code `sign` gives to data, now or in an earlier process."""
        return hmac.compare_digest(self.sign(data), mac)

    def modules(self) -> Path | None:
        """The private folder of kept modules (runtime/kept), made on first use; None when the store is off."""
        self._key()
        if self._folder is None:
            return None
        folder = self._folder.parent / "modules"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            _check_private(folder.lstat(), folder, stat.S_ISDIR)
        except OSError as error:
            self._warn(f"modules cannot be kept in {folder}: {error}")
            return None
        return folder

    def clear(self) -> None:
        """Delete every entry and kept module; the key stays, so that signed artifacts stay valid."""
        for folder in self._entry_folders():
            shutil.rmtree(folder, ignore_errors=True)

    def size(self) -> int:
        """Bytes of all entries and kept modules."""
        files = (path for folder in self._entry_folders() for path in folder.iterdir())
        return sum(path.stat().st_size for path in files)

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        if not key.isalnum():
            raise ValueError(f"not a store key: {key!r}")
        return self._folder / key[:2] / key

    def _entry_folders(self) -> list[Path]:
        self._key()
        if self._folder is None:
            return []
        kept = self._folder.parent / "modules"
        folders = [path for path in self._folder.iterdir() if path.is_dir() and not path.is_symlink()]
        return [*folders, *([kept] if kept.is_dir() and not kept.is_symlink() else [])]

    def _key(self) -> bytes:
        """The HMAC key; on first use opens the folder, or switches the store off with a warning."""
        if self._secret is None:
            try:
                self._secret = _open_folder(self._folder) if self._folder is not None else None
            except OSError as error:
                self._warn(f"no kernel store in {self._folder}: {error}; kernels are compiled each time")
                self._folder = None
            if self._secret is None:
                self._secret = secrets.token_bytes(_KEY_BYTES)
        return self._secret

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(text, RuntimeWarning, stacklevel=3)


def _mac(secret: bytes, label: bytes, data: bytes) -> bytes:
    return hmac.digest(secret, len(label).to_bytes(4, "little") + label + data, hashlib.sha256)


def _open_folder(folder: Path) -> bytes:
    """Make or check the private folder and its key file; gives the key. OSError when they are not private."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_private(folder.lstat(), folder, stat.S_ISDIR)
    path = folder / "key"
    if not path.exists():
        # Complete before it has its name, and the first of several processes wins.
        temporary = _write_temporary(path, secrets.token_bytes(_KEY_BYTES))
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    _check_private(path.lstat(), path, stat.S_ISREG)
    secret = path.read_bytes()
    if len(secret) != _KEY_BYTES:
        raise OSError(f"{path} is damaged; delete it")
    return secret


def _check_private(status: os.stat_result, path: Path, is_kind: Callable[[int], bool]) -> None:
    """OSError unless the path is of the right kind, ours, and closed to everybody else."""
    if not is_kind(status.st_mode):
        raise OSError(f"{path} is not a plain file or folder")
    if os.name != "posix":
        return
    if status.st_uid != os.geteuid():
        raise OSError(f"{path} belongs to another user")
    if status.st_mode & 0o077:
        raise OSError(f"{path} is open to other users (mode {stat.S_IMODE(status.st_mode):o})")


def _write_temporary(path: Path, data: bytes) -> Path:
    """A new private file beside `path` with the data in it."""
    temporary = path.with_name(f".{path.name[:16]}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = _write_temporary(path, data)
    try:
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
