"""Programs on a pretended device: binding, slots, replays, host steps, saving and loading, and who cannot run them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import minicc
from minicc.errors import TargetError
from minicc.runtime import module as runtime_module
from minicc.targets.cuda import CudaTarget, parse_cuda_target
from tests.cuda.fake_device import FakeDevice

pytest.importorskip("numba.cuda.compiler", reason="numba-cuda is not installed (extra cuda)")
RNG = np.random.default_rng(3)


def model(nodes: list[Any], inputs: dict[str, list[Any]], output: list[Any], weights: dict[str, Any]) -> Any:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    made = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    results = [helper.make_tensor_value_info("y", TensorProto.FLOAT, output)]
    graph = helper.make_graph(nodes, "g", values, results, made)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def layer() -> tuple[Any, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    w, b = RNG.standard_normal((12, 9)).astype(np.float32), RNG.standard_normal(9).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("Add", ["m", "b"], ["a"]),
        helper.make_node("Softmax", ["a"], ["y"], axis=-1),
    ]
    return model(nodes, {"x": ["n", 12]}, ["n", 9], {"w": w, "b": b}), w, b


def expected(x: Any, w: Any, b: Any) -> Any:
    a = x.astype(np.float64) @ w + b
    e = np.exp(a - a.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Modules run on pretended devices, which are listed here."""
    made: list[FakeDevice] = []
    sources: dict[str, str] = {}

    def gpu(_number: int) -> FakeDevice:
        made.append(FakeDevice(sources))
        return made[-1]

    monkeypatch.setattr(runtime_module, "Gpu", gpu)
    monkeypatch.setattr(CudaTarget, "missing_features", lambda _self: ("a GPU",) if not sources else ())
    return made, sources


def test_a_program_runs_for_several_shapes(device: Any) -> None:
    made, sources = device
    proto, w, b = layer()
    module = minicc.compile(proto, target="cuda:sm_90", strict=True)
    sources.update(module.code.sources)
    for n in (5, 2, 5):
        x = RNG.standard_normal((n, 12)).astype(np.float32)
        np.testing.assert_allclose(module(x), expected(x, w, b), rtol=1e-5, atol=1e-6)
    assert [word for word in made[0].log if word != "in"] == ["replay", "out"] * 3
    assert module.stats()["binds"] == 2


def test_a_saved_program_runs_with_the_cubins_of_its_file(device: Any, tmp_path: Path, monkeypatch: Any) -> None:
    _, sources = device
    proto, w, b = layer()
    module = minicc.compile(proto, target="cuda:sm_90")
    module.save(tmp_path / "m.minicc")
    monkeypatch.setattr("minicc.runtime.artifact.build_code", lambda *_: pytest.fail("compiled again"))
    loaded = minicc.load(tmp_path / "m.minicc")
    assert loaded.code.objects == module.code.objects and loaded.target == module.target
    sources.update(module.code.sources)
    x = RNG.standard_normal((3, 12)).astype(np.float32)
    np.testing.assert_allclose(loaded(x), expected(x, w, b), rtol=1e-5, atol=1e-6)


def test_without_a_gpu_a_module_can_be_looked_at_but_not_run() -> None:
    if not parse_cuda_target("cuda:sm_90").missing_features():
        pytest.skip("there is a GPU")
    module = minicc.compile(layer()[0], target="cuda:sm_90")
    assert "softmax" in str(module.explain()).lower()
    with pytest.raises(TargetError):
        module(np.zeros((1, 12), np.float32))
    with pytest.raises(TargetError, match="sm_90"):
        parse_cuda_target("cuda:sm_20")
    with pytest.raises(TargetError, match="no GPU"):
        parse_cuda_target("cuda")
