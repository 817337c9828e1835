"""`minicc.compile` and `minicc.load` as a user meets them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import minicc
from minicc.debug.inputs import random_inputs
from minicc.demo import model_path

F = TensorProto.FLOAT


def model(
    nodes: list[Any],
    inputs: dict[str, Any],
    outputs: list[str],
    weights: dict[str, np.ndarray] | None = None,
    opset: int = 18,
) -> onnx.ModelProto:
    infos = [helper.make_tensor_value_info(name, *type_) for name, type_ in inputs.items()]
    tensors = [onnx.numpy_helper.from_array(a, name) for name, a in (weights or {}).items()]
    outs = [helper.make_empty_tensor_value_info(name) for name in outputs]
    graph = helper.make_graph(nodes, "test", infos, outs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def mlp() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((4, 8), np.float32), "b": rng.standard_normal(8, np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "dense"),
        helper.make_node("Add", ["h", "b"], ["a"], "bias"),
        helper.make_node("Relu", ["a"], ["y"], "relu"),
    ]
    return model(nodes, {"x": (F, ["n", 4])}, ["y"], weights)


def expected(x: np.ndarray) -> np.ndarray:
    w, b = (onnx.numpy_helper.to_array(t) for t in mlp().graph.initializer)
    return np.maximum(x @ w + b, 0)


@pytest.fixture(scope="module")
def module() -> minicc.Module:
    return minicc.compile(mlp())


@pytest.mark.parametrize("size", [1, 3, 0, 50])
def test_compile_and_call(module: minicc.Module, size: int) -> None:
    x = np.random.default_rng(1).standard_normal((size, 4), np.float32)
    np.testing.assert_allclose(module(x), expected(x), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(module.run(["y"], {"x": x})[0], module(x=x))


def test_forms_of_a_model(tmp_path: Path, module: minicc.Module) -> None:
    x = np.ones((2, 4), np.float32)
    path = tmp_path / "mlp.onnx"
    onnx.save(mlp(), path)
    for form in (path, str(path), path.read_bytes(), mlp()):
        np.testing.assert_array_equal(minicc.compile(form)(x), module(x))
    assert minicc.compile(path).program.name == "mlp"


def test_second_compilation_comes_from_the_store() -> None:
    minicc.compile(mlp())
    stats = minicc.compile(mlp()).stats()
    assert stats["compiles"] == 0 and stats["cache_hits"] == stats["kernels"] > 0
    assert stats["pass_runs"] > 0 and stats["weights_bytes"] >= 4 * 40


def test_new_sizes_compile_nothing(module: minicc.Module) -> None:
    before = module.stats()
    module(np.ones((77, 4), np.float32))
    after = module.stats()
    assert after["binds"] == before["binds"] + 1
    assert (after["compiles"], after["pass_runs"]) == (before["compiles"], before["pass_runs"])


def test_save_and_load(module: minicc.Module, tmp_path: Path) -> None:
    module.save(tmp_path / "m.minicc")
    loaded = minicc.load(tmp_path / "m.minicc")
    x = np.ones((5, 4), np.float32)
    np.testing.assert_array_equal(loaded(x), module(x))
    assert [str(p) for p in loaded.inputs + loaded.outputs] == ["x: f32[n,4]", "y: f32[n,8]"]
    assert loaded.stats()["compiles"] == 0
    assert "Relu" in loaded.notes["graph"]
    assert "def kernel" in loaded.source("dense")
    loaded.save(tmp_path / "again.minicc")
    np.testing.assert_array_equal(minicc.load(tmp_path / "again.minicc")(x), module(x))


def test_unsigned_artifact_is_compiled_again(module: minicc.Module, tmp_path: Path) -> None:
    """Another user's file: the kernels come from the checked program, not from the file."""
    module.save(tmp_path / "m.minicc")
    loaded = minicc.load(tmp_path / "m.minicc", cache_dir=tmp_path / "other")
    assert loaded.stats()["compiles"] == loaded.stats()["kernels"]
    x = np.ones((5, 4), np.float32)
    np.testing.assert_array_equal(loaded(x), module(x))


def test_warm_load_needs_neither_onnx_nor_numba(module: minicc.Module, tmp_path: Path) -> None:
    module.save(tmp_path / "m.minicc")
    script = f"""
        import platform
        import sys
        import numpy as np
        import minicc
        print(minicc.load({str(tmp_path / "m.minicc")!r})(np.ones((2, 4), np.float32)).shape)
        late = {{"onnx", "numba", "rich", "typer", "networkx", "ml_dtypes", "subprocess"}}
        late |= {{"llvmlite"}} if sys.platform == "linux" and platform.machine() == "x86_64" else set()
        assert not late & set(sys.modules), sorted(sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(2, 8)"


def test_cross_compilation(tmp_path: Path) -> None:
    """A target this machine may not have: compiling and saving work, running says what is missing."""
    found = minicc.compile(mlp(), target="cpu:neon")
    found.save(tmp_path / "m.minicc")
    if found.target.missing_features():
        with pytest.raises(minicc.TargetError, match="aarch64"):
            found(np.ones((2, 4), np.float32))
    x = np.ones((2, 4), np.float32)
    np.testing.assert_allclose(minicc.load(tmp_path / "m.minicc")(x), expected(x), rtol=1e-5)


def test_wrong_arguments() -> None:
    with pytest.raises(minicc.TargetError, match="cpu:avx2"):
        minicc.compile(mlp(), target="tpu")
    with pytest.raises(minicc.InputError, match="unknown option"):
        minicc.compile(mlp(), fast=True)
    with pytest.raises(minicc.InvalidModelError):
        minicc.compile(b"not a model")
    with pytest.raises(minicc.InvalidModelError):
        minicc.compile("no such file.onnx")
    with pytest.raises(minicc.InputError, match="there is no pass 'nothing'"):
        minicc.compile(mlp(), skip="nothing")


def nonzero() -> onnx.ModelProto:
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("NonZero", ["a"], ["y"], "find")]
    return model(nodes, {"x": (F, ["n"])}, ["y"])


def test_host_nodes_are_said_aloud() -> None:
    with pytest.warns(minicc.HostNodesWarning, match="NonZero find"):
        found = minicc.compile(nonzero())
    np.testing.assert_array_equal(found(np.array([0, 2, -1, 3], np.float32)), [[1, 3]])
    with pytest.raises(minicc.PlacementError, match="NonZero find"):
        minicc.compile(nonzero(), strict=True)


def test_no_warning_without_host_nodes() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        minicc.compile(mlp())


def test_explain_and_source(module: minicc.Module) -> None:
    found = module.explain()
    assert "dense" in str(found) and "gemm" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["steps"][0]["layers"]
    assert "def kernel" in module.source("dense")
    with pytest.raises(minicc.InputError, match="dense"):
        module.source("dens")


def test_profile(module: minicc.Module, tmp_path: Path) -> None:
    found = module.profile(np.ones((64, 4), np.float32), repeats=3)
    assert found.rows and abs(sum(r.share for r in found.rows) - 1) < 1e-6
    assert any(r.gflops > 0 for r in found.rows)
    found.to_chrome_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert len(events) == sum(r.calls for r in found.rows) and all(e["dur"] >= 0 for e in events)
    assert module.profile(repeats=1).rows  # on random inputs


def test_profile_sees_bodies_and_host_steps() -> None:
    with pytest.warns(minicc.HostNodesWarning):
        found = minicc.compile(nonzero()).profile(np.ones(9, np.float32), repeats=2)
    assert {"host"} < {r.tier for r in found.rows}


def test_dump_and_debug(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    compiled = minicc.compile(mlp(), dump=tmp_path / "dump", debug=5)
    compiled(np.ones((2, 4), np.float32))
    names = {p.name for p in (tmp_path / "dump").iterdir()}
    assert {"00-import.txt", "program.txt", "memory.txt", "report.json", "kernels"} <= names
    assert any(name.endswith("-fuse.txt") for name in names)
    shown = capfd.readouterr().err
    assert "kernels" in shown and "def kernel" in shown and "after fuse" in shown and "ms per run" in shown
    kernel = next((tmp_path / "dump" / "kernels").glob("*.py"))
    done = subprocess.run([sys.executable, str(kernel)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "us" in done.stdout, done.stderr


def test_environment_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MINICC_THREADS", "1")
    assert minicc.compile(mlp()).stats()["threads"] == 1
    monkeypatch.setenv("MINICC_STOP_AFTER", "fold-constants")
    with pytest.raises(minicc.MiniccError, match="stopped after pass 'fold-constants'"):
        minicc.compile(mlp())


def test_backend() -> None:
    x = np.ones((2, 4), np.float32)
    assert minicc.backend.supports_device("CPU") and not minicc.backend.supports_device("CUDA")
    assert minicc.backend.is_compatible(mlp())
    (y,) = minicc.backend.prepare(mlp()).run([x])
    np.testing.assert_allclose(y, expected(x), rtol=1e-5)
    (z,) = minicc.backend.run_node(helper.make_node("Neg", ["x"], ["y"]), [x])
    np.testing.assert_array_equal(z, -x)


def test_names_are_lazy_and_complete() -> None:
    for name in minicc.__all__:
        assert getattr(minicc, name) is not None
    assert set(minicc.__all__) <= set(dir(minicc))
    with pytest.raises(AttributeError):
        _ = minicc.nothing


def test_demo_model_against_onnxruntime() -> None:
    import onnxruntime

    found = minicc.compile(model_path())
    (x,) = random_inputs(found.inputs, {"batch": 7})
    (theirs,) = onnxruntime.InferenceSession(str(model_path())).run(None, {found.inputs[0].name: x})
    np.testing.assert_allclose(found(x), theirs, rtol=1e-4, atol=1e-5)
    assert os.environ.get("MINICC_CACHE") is not None  # the tests' own store
