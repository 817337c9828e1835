"""The kernel store: what it gives back is what was put there by this account, or nothing."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from pathlib import Path

import pytest

from minicc.runtime.store import Store

KEY = "ab" * 32
OTHER = "cd" * 32


def entry(folder: Path) -> Path:
    return folder / "kernels" / KEY[:2] / KEY


def test_round_trip_over_processes(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.get(KEY) is None
    store.put(KEY, b"code")
    assert store.get(KEY) == b"code"
    again = Store(tmp_path)
    assert again.get(KEY) == b"code"
    assert again.get(OTHER) is None
    assert again.verify(b"artifact", store.sign(b"artifact"))
    assert not again.verify(b"artefact", store.sign(b"artifact"))


def test_nothing_is_made_before_use(tmp_path: Path) -> None:
    Store(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.skipif(os.name != "posix", reason="POSIX file modes")
def test_files_are_private(tmp_path: Path) -> None:
    Store(tmp_path).put(KEY, b"code")
    folder = tmp_path / "kernels"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "key").stat().st_mode & 0o777 == 0o600
    assert entry(tmp_path).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("position", [0, 8, 39, 40, -1])
def test_a_changed_byte_makes_an_entry_absent(tmp_path: Path, position: int) -> None:
    store = Store(tmp_path)
    store.put(KEY, b"the object's code")
    text = bytearray(entry(tmp_path).read_bytes())
    text[position] ^= 1
    entry(tmp_path).write_bytes(bytes(text))
    assert store.get(KEY) is None
    store.put(KEY, b"new")
    assert store.get(KEY) == b"new"


@pytest.mark.parametrize("size", [0, 7, 8, 30, 40])
def test_a_short_entry_is_absent(tmp_path: Path, size: int) -> None:
    store = Store(tmp_path)
    store.put(KEY, b"code")
    entry(tmp_path).write_bytes(entry(tmp_path).read_bytes()[:size])
    assert store.get(KEY) is None


def test_an_entry_under_another_key_is_absent(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put(KEY, b"code")
    store.put(OTHER, b"other")
    (tmp_path / "kernels" / OTHER[:2] / OTHER).write_bytes(entry(tmp_path).read_bytes())
    assert store.get(OTHER) is None


def test_an_entry_of_another_secret_is_absent(tmp_path: Path) -> None:
    Store(tmp_path).put(KEY, b"code")
    (tmp_path / "kernels" / "key").unlink()
    assert Store(tmp_path).get(KEY) is None


@pytest.mark.skipif(os.name != "posix", reason="POSIX file modes")
@pytest.mark.parametrize("path", ["kernels", "kernels/key"])
def test_open_to_others_is_not_used(tmp_path: Path, path: str) -> None:
    Store(tmp_path).put(KEY, b"code")
    (tmp_path / path).chmod(0o770)
    store = Store(tmp_path)
    with pytest.warns(RuntimeWarning, match="open to other users"):
        assert store.get(KEY) is None
    store.put(OTHER, b"other")
    assert not (tmp_path / "kernels" / OTHER[:2]).exists()
    assert store.verify(b"x", store.sign(b"x"))


@pytest.mark.skipif(os.name != "posix", reason="POSIX file owners")
def test_foreign_owner_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store(tmp_path).put(KEY, b"code")
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    with pytest.warns(RuntimeWarning, match="another user"):
        assert Store(tmp_path).get(KEY) is None


@pytest.mark.skipif(os.name != "posix", reason="symbolic links")
def test_a_linked_folder_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "kernels").symlink_to(tmp_path / "real")
    with pytest.warns(RuntimeWarning, match="plain"):
        Store(tmp_path).put(KEY, b"code")
    assert list((tmp_path / "real").iterdir()) == []


def test_refusing_disk_warns_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.put(KEY, b"code")

    def refuse(*args: object, **options: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.warns(RuntimeWarning, match="No space left"):
        store.put(OTHER, b"other")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.put(OTHER, b"other")
    assert store.get(KEY) == b"code"
    assert store.get(OTHER) is None


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    store = Store(tmp_path / "file")
    with pytest.warns(RuntimeWarning, match="no kernel store"):
        store.put(KEY, b"code")
    assert store.get(KEY) is None


def test_without_folder() -> None:
    store = Store(None)
    store.put(KEY, b"code")
    assert store.get(KEY) is None
    assert store.size() == 0
    assert store.verify(b"x", store.sign(b"x"))
    store.clear()


def test_clear_and_size(tmp_path: Path) -> None:
    store = Store(tmp_path)
    mac = store.sign(b"artifact")
    store.put(KEY, b"x" * 1000)
    store.put(OTHER, b"x" * 1000)
    assert 2000 < store.size() < 2200
    store.clear()
    assert store.size() == 0 and store.get(KEY) is None
    assert Store(tmp_path).verify(b"artifact", mac)


@pytest.mark.parametrize("key", ["", "../../etc", "a/b", "."])
def test_a_key_cannot_leave_the_folder(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError):
        Store(tmp_path).put(key, b"code")


def _write_and_read(folder: Path, number: int) -> bool:
    store = Store(folder)
    for _ in range(100):
        store.put(KEY, bytes([number]) * 10_000)
        data = store.get(KEY)
        if data is None or len(data) != 10_000 or len(set(data)) != 1:
            return False
    return True


def test_concurrent_processes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")
    with context.Pool(4) as pool:
        assert all(pool.starmap(_write_and_read, [(tmp_path, number) for number in range(4)]))
    assert [path.name for path in entry(tmp_path).parent.iterdir()] == [KEY]
