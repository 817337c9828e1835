"""Shared by all tests: the --slow option, hypothesis profiles, a private kernel cache, fetched models."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from benchmarks.fetch import ModelUnavailable, fetch
from minicc.targets.cpu import available_threads
from minicc.targets.rates import Rates

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


@pytest.hookimpl(tryfirst=True)  # before xdist's own
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Runs of whole folders use two processes, unless told otherwise (`-n 0`, `--pdb`): half of the time is compiling kernels."""
    options = config.option
    can = config.pluginmanager.hasplugin("xdist") and not hasattr(config, "workerinput") and not options.usepdb
    if can and options.numprocesses is None and all(Path(argument).is_dir() for argument in config.args):
        options.numprocesses = min(2, available_threads())
        options.dist = "loadfile"


def pytest_configure(config: pytest.Config) -> None:
    """Kernels of a test run go to a folder of its own: it neither uses nor spoils the user's cache."""
    if "MINICC_CACHE" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="minicc-tests-")
        config.add_cleanup(folder.cleanup)
        os.environ["MINICC_CACHE"] = folder.name


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow; run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def typical_rates() -> Iterator[None]:
    """What tests compile does not depend on how busy the machine is; what it measures is for tests/runtime/test_rates.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minicc.walk.rates_of", lambda target, store: Rates())
        yield


@pytest.fixture(scope="session")
def fetched() -> Callable[[str], Path]:
    """Name of a model of benchmarks.fetch to its file; skips where the file is not in the cache folder.

    Nothing is downloaded here: `python -m benchmarks.fetch` does that once.
    """

    def path(name: str) -> Path:
        try:
            return fetch(name, download=False)
        except ModelUnavailable as error:
            pytest.skip(error.reason)

    return path


@pytest.fixture(scope="session")
def generated() -> Callable[[str], Path]:
    """Name of a model of benchmarks.export to its file in folder MINICC_GENERATED; skips where it is not."""

    def path(name: str) -> Path:
        folder = os.environ.get("MINICC_GENERATED")
        if not folder or not (Path(folder) / f"{name}.onnx").is_file():
            pytest.skip(f"{name}.onnx is not in MINICC_GENERATED; python -m benchmarks.export makes it")
        return Path(folder) / f"{name}.onnx"

    return path
