"""Kept modules: the second compilation of a file is a load, and nothing but the very same file, options and account is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import minicc
from minicc.options import Options

Array = np.ndarray[Any, Any]
X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)


def dense(scale: float = 1.0) -> onnx.ModelProto:
    weights = scale * np.arange(20, dtype=np.float32).reshape(4, 5)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["p"], "product"), helper.make_node("Relu", ["p"], ["y"], "relu")]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])
    graph = helper.make_graph(nodes, "dense", [x], [y], [numpy_helper.from_array(weights, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def expected(scale: float = 1.0) -> Array:
    return np.maximum(X @ (np.float32(scale) * np.arange(20, dtype=np.float32).reshape(4, 5)), 0)


def chosen_nodes() -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 4])
    y = helper.make_tensor_value_info("y", TensorProto.INT64, [2, "k"])
    graph = helper.make_graph([helper.make_node("NonZero", ["x"], ["y"], "choose")], "chosen", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with the kernels of `dense` in it and no module, as models given as ModelProto are not kept."""
    folder = tmp_path_factory.mktemp("compiled") / "cache"
    minicc.compile(dense(), options=Options(cache_dir=str(folder)))
    return folder


@pytest.fixture
def options(tmp_path: Path, compiled: Path) -> Options:
    shutil.copytree(compiled, tmp_path / "cache")
    return Options(cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    onnx.save(dense(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def kept(options: Options) -> list[Path]:
    assert options.cache_dir is not None
    return sorted(Path(options.cache_dir, "modules").glob("*"))


def was_loaded(module: minicc.Module) -> bool:
    return set(module.report.seconds) == {"load"}


def test_the_second_compilation_is_a_load(path: Path, options: Options) -> None:
    first, second = minicc.compile(path, options=options), minicc.compile(str(path), options=options)
    assert not was_loaded(first) and was_loaded(second) and len(kept(options)) == 1
    np.testing.assert_array_equal(second(X), first(X))
    np.testing.assert_allclose(second(X), expected(), rtol=1e-6)
    same = ("compiles", "pass_runs", "kernels", "kernel_calls", "weights_bytes")
    assert [second.stats()[name] for name in same[1:]] == [first.stats()[name] for name in same[1:]]
    assert second.stats()["compiles"] == 0
    assert second.report.passes == first.report.passes and second.program.name == "model"
    assert second.notes == first.notes and second.source("product") == first.source("product")


def test_a_saved_copy_of_a_kept_module_is_that_of_the_first(path: Path, options: Options, tmp_path: Path) -> None:
    loaded = [minicc.compile(path, options=options) for _ in range(2)][1]
    loaded.save(tmp_path / "copy.minicc")
    np.testing.assert_array_equal(minicc.load(tmp_path / "copy.minicc", options=options)(X), loaded(X))


def test_it_needs_neither_the_frontend_nor_a_compiler(path: Path, options: Options) -> None:
    minicc.compile(path, options=options)
    script = (
        "import sys, minicc\n"
        "from minicc.runtime.link import can_link\n"
        f"module = minicc.compile({str(path)!r})\n"
        "late = {'onnx', 'networkx', 'numba', 'minicc.walk', 'minicc.codegen.build'} | ({'llvmlite'} if can_link() else set())\n"
        "print(set(module.report.seconds), late & set(sys.modules))"
    )
    env = {**os.environ, "MINICC_CACHE": str(options.cache_dir)}
    shown = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert shown.stdout == "{'load'} set()\n"


CHANGES: tuple[dict[str, Any], ...] = (
    {"dims": {"n": 3}}, {"precision": "fp16"}, {"opt_level": 1}, {"skip": ("fuse",)}, {"max_bytes": 1 << 20}, {"winograd": False},
    {"fft": False},
    {"rounding": False},
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_other_options_are_another_module(path: Path, options: Options, change: dict[str, Any]) -> None:
    minicc.compile(path, options=options)
    assert not was_loaded(minicc.compile(path, options=options, **change))
    assert was_loaded(minicc.compile(path, options=options))


def test_options_of_a_call_are_the_callers(path: Path, options: Options) -> None:
    minicc.compile(path, options=options, threads=1)
    module = minicc.compile(path, options=options, threads=2)
    assert was_loaded(module) and module.options == replace(options, threads=2) and module.stats()["threads"] == 2


def test_other_content_is_another_module(path: Path, options: Options) -> None:
    minicc.compile(path, options=options)
    status = path.stat()
    onnx.save(dense(2.0), path)  # of the same size, and with the same date
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    module = minicc.compile(path, options=options)
    assert path.stat().st_size == status.st_size and not was_loaded(module)
    np.testing.assert_allclose(module(X), expected(2.0), rtol=1e-6)


def test_other_external_data_is_another_module(tmp_path: Path, options: Options) -> None:
    path = tmp_path / "model.onnx"

    def save(scale: float) -> None:
        onnx.save(dense(scale), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
        os.utime(tmp_path / "weights.bin", (1e9, 1e9))

    save(1.0)
    text = path.read_bytes()
    assert [was_loaded(minicc.compile(path, options=options)) for _ in range(2)] == [False, True]
    (tmp_path / "weights.bin").unlink()
    save(2.0)
    assert path.read_bytes() == text
    module = minicc.compile(path, options=options)
    assert not was_loaded(module)
    np.testing.assert_allclose(module(X), expected(2.0), rtol=1e-6)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(minicc.InvalidModelError):
        minicc.compile(path, options=options)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_damage_is_noticed(tmp_path_factory: pytest.TempPathFactory, where: float, bit: int) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    options, path = Options(cache_dir=str(folder / "cache")), folder / "model.onnx"
    if not path.exists():
        folder.mkdir()
        onnx.save(dense(), path)
    minicc.compile(path, options=options)
    (file,) = kept(options)
    data = bytearray(file.read_bytes())
    data[int(where * len(data))] ^= 1 << bit
    file.write_bytes(data)
    np.testing.assert_allclose(minicc.compile(path, options=options)(X), expected(), rtol=1e-6)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"PK\x05\x06" + bytes(18)])
def test_a_file_that_is_no_module_is_replaced(path: Path, options: Options, content: bytes) -> None:
    minicc.compile(path, options=options)
    (file,) = kept(options)
    file.write_bytes(content)
    assert not was_loaded(minicc.compile(path, options=options))
    assert was_loaded(minicc.compile(path, options=options))


def test_modules_of_other_keys_and_accounts_are_not_used(path: Path, options: Options, tmp_path: Path) -> None:
    other = tmp_path / "model2.onnx"
    onnx.save(dense(2.0), other)
    minicc.compile(path, options=options)
    (first,) = kept(options)
    minicc.compile(other, options=options)
    (second,) = set(kept(options)) - {first}
    first.write_bytes(second.read_bytes())  # signed by this user, but for another model
    module = minicc.compile(path, options=options)
    assert not was_loaded(module)
    np.testing.assert_allclose(module(X), expected(), rtol=1e-6)
    (Path(str(options.cache_dir)) / "kernels" / "key").write_bytes(bytes(32))  # another account's key
    assert not was_loaded(minicc.compile(path, options=options))


def test_only_so_many_bytes_are_kept(tmp_path: Path, options: Options) -> None:
    paths = [tmp_path / f"{i}.onnx" for i in range(4)]
    for i, path in enumerate(paths):
        onnx.save(dense(i), path)
    minicc.compile(paths[0], options=options)
    size = kept(options)[0].stat().st_size
    few = replace(options, keep_bytes=int(2.5 * size))
    for path in (paths[1], paths[0], paths[2], paths[0], paths[3]):
        minicc.compile(path, options=few)
    assert sum(file.stat().st_size for file in kept(options)) <= few.keep_bytes
    assert [was_loaded(minicc.compile(path, options=few)) for path in (paths[0], paths[3], paths[1])] == [True, True, False]


@pytest.mark.parametrize("change", [{"keep_bytes": 0}, {"keep_bytes": 10}, {"cache_dir": ""}, {"check": 2}], ids=str)
def test_nothing_is_kept(path: Path, options: Options, change: dict[str, Any]) -> None:
    for _ in range(2):
        assert not was_loaded(minicc.compile(path, options=options, **change))
    assert kept(options) == []


def test_a_dump_is_complete(path: Path, options: Options, tmp_path: Path) -> None:
    minicc.compile(path, options=options)
    minicc.compile(path, options=options, dump=tmp_path / "dump")
    assert (tmp_path / "dump" / "00-import.txt").exists()


def test_another_minicc_compiles_again(path: Path, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minicc.runtime.installed._OWN", tmp_path)
    (tmp_path / "source.py").write_text("1")
    assert [was_loaded(minicc.compile(path, options=options)) for _ in range(2)] == [False, True]
    (tmp_path / "source.py").write_text("22")
    assert not was_loaded(minicc.compile(path, options=options))


def test_models_in_memory_are_not_kept(path: Path, options: Options) -> None:
    for model in (path.read_bytes(), dense()):
        minicc.compile(model, options=options)
    assert kept(options) == []


def test_what_the_user_is_told_is_told_again(tmp_path: Path, options: Options) -> None:
    path = tmp_path / "chosen.onnx"
    onnx.save(chosen_nodes(), path)
    for _ in range(2):
        with pytest.warns(minicc.HostNodesWarning, match="NonZero choose") as caught:
            minicc.compile(path, options=options)
        assert caught[0].filename == __file__
    with pytest.raises(minicc.PlacementError, match="NonZero choose"):
        minicc.compile(path, options=options, strict=True)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_paths_that_are_no_files(tmp_path: Path, options: Options) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "absent", "\0"):
        with pytest.raises(minicc.InvalidModelError):
            minicc.compile(path, options=options)


def test_a_folder_that_cannot_be_written_costs_a_warning(path: Path, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise minicc.ArtifactError("the disk is full")

    monkeypatch.setattr("minicc.runtime.artifact.save", refuse)
    with pytest.warns(RuntimeWarning, match="cannot be kept"):
        module = minicc.compile(path, options=options)
    np.testing.assert_allclose(module(X), expected(), rtol=1e-6)


def test_compilation_during_a_change_keeps_nothing(path: Path, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    from minicc import walk

    build: Callable[..., minicc.Module] = walk.build

    def changing(*arguments: Any) -> minicc.Module:
        onnx.save(dense(3.0), path)
        return build(*arguments)

    monkeypatch.setattr(walk, "build", changing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        minicc.compile(path, options=options)
    assert kept(options) == []
