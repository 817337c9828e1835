"""Real trained models, compiled and compared with ONNX Runtime at every shape of benchmarks.inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.export import NAMES as GENERATED
from benchmarks.fetch import BY_NAME, QUICK
from benchmarks.models import Result, check, problems

SLOW = tuple(name for name in BY_NAME if name not in QUICK)


def agrees(result: Result) -> None:
    assert result.agrees, "\n".join(problems(result))


@pytest.mark.parametrize("name", QUICK)
def test_quick_model(name: str, fetched: Callable[[str], Path]) -> None:
    agrees(check(name, fetched(name), threads=2, seconds=0))


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_slow_model(name: str, fetched: Callable[[str], Path]) -> None:
    agrees(check(name, fetched(name), threads=2, seconds=0))


@pytest.mark.slow
@pytest.mark.parametrize("name", GENERATED)
def test_generated_model(name: str, generated: Callable[[str], Path]) -> None:
    agrees(check(name, generated(name), threads=2, seconds=0))
