"""Other runtimes: what is missing or ends badly is a typed error, and results are theirs."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, save

from minicc import peers
from minicc.errors import InputError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    shape = [1, 3, 8, 8]
    given, made = (helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", [given], [made])
    file = tmp_path / "model.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), file)
    return file


FEEDS = {"x": np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)}


def test_an_unknown_runtime_is_named_with_those_that_are_known(model: Path) -> None:
    with pytest.raises(InputError, match="unknown runtime 'tvm'") as caught:
        peers.peer("tvm", model, FEEDS, 1)
    assert "ort, openvino, mnn, ncnn" in str(caught.value)


def test_inputs_that_a_runtime_refuses_are_a_typed_error(tmp_path: Path) -> None:
    sizes = {"x": (TensorProto.FLOAT, [4]), "i": (TensorProto.INT64, [1])}
    given = [helper.make_tensor_value_info(name, *kind) for name, kind in sizes.items()]
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Gather", ["x", "i"], ["y"])], "gather", given, [made])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "m.onnx")
    feeds = {"x": np.zeros(4, np.float32), "i": np.array([9], np.int64)}
    with pytest.raises(InputError, match="on these inputs"):
        peers.peer("ort", tmp_path / "m.onnx", feeds, 1)()


@pytest.mark.parametrize("name", list(peers.PEERS))
def test_a_missing_package_says_how_to_get_it(name: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda package: None)
    with pytest.raises(InputError, match="not installed") as caught:
        peers.peer(name, model, FEEDS, 1)
    assert "pip install" in str(caught.value)


@pytest.mark.parametrize("name", list(peers.PEERS))
def test_results_are_those_of_the_model(name: str, model: Path) -> None:
    if any(importlib.util.find_spec(package) is None for package in peers.PEERS[name][0]):
        pytest.skip(f"{name} is not installed")
    (result,) = peers.peer(name, model, FEEDS, 1)()
    np.testing.assert_array_equal(np.asarray(result), np.maximum(FEEDS["x"], 0))


def test_a_converter_that_ends_its_process_is_an_error_here(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = subprocess.run

    def crashing(command: list[str], **options: object) -> object:
        assert command[:3] == [sys.executable, "-m", "minicc.peers"]
        return ran([sys.executable, "-c", "import os; os.abort()"], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(peers, "find_spec", lambda package: object())
    monkeypatch.setattr(peers.subprocess, "run", crashing)
    with pytest.raises(InputError, match="mnn cannot run") as caught:
        peers.peer("mnn", model, FEEDS, 1)
    assert "ended with -6" in str(caught.value)


def test_what_a_library_prints_goes_to_the_other_stream(capfd: pytest.CaptureFixture[str]) -> None:
    import os

    with peers._on_stderr():
        os.write(1, b"banner\n")
    os.write(1, b"result\n")
    out, err = capfd.readouterr()
    assert out == "result\n" and err == "banner\n"
