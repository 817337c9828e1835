"""Digests in pieces: one value for memory, streams and files; the plain SHA-256 for what is one piece."""

from __future__ import annotations

import hashlib
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st

from minicc.runtime.digest import digest, digest_file, digest_stream

PIECE = 16


@given(st.lists(st.binary(max_size=40), max_size=5))
def test_memory_streams_and_files_agree(parts: list[bytes]) -> None:
    data = b"".join(parts)
    pieces = [hashlib.sha256(data[i : i + PIECE]).digest() for i in range(0, len(data), PIECE)]
    wanted = hashlib.sha256(b"".join(pieces) if len(pieces) > 1 else data).hexdigest()
    with patch("minicc.runtime.digest.PIECE", PIECE), TemporaryDirectory() as folder:
        path = Path(folder, "data")
        path.write_bytes(data)
        assert digest(data) == digest(memoryview(data)) == digest_stream(parts) == digest_file(path) == wanted


@given(st.binary(max_size=100))
def test_small_data_has_its_sha256(data: bytes) -> None:
    assert digest(data) == hashlib.sha256(data).hexdigest()
