"""The tests of this folder need the compiler of the extra `cuda`, but no GPU."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if find_spec("numba_cuda") is None:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="numba-cuda is not installed (extra cuda)"))
