"""Ways that lowering leaves open: each is right, timing takes the faster ones, and never a module that is slower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import minicc
from minicc import tune as tuning
from minicc.ir.evaluate import evaluate
from minicc.ir.graph import Graph
from minicc.ir.types import TensorType, f32
from minicc.lower.context import Choices
from minicc.lower.kernel import TemplateKernel
from minicc.options import Options
from minicc.targets.cpu import host_target
from tests.compiling import compile_graph

Array = np.ndarray[Any, Any]
Layers = tuple[str, ...]
X = np.random.default_rng(0).standard_normal((1, 40, 12, 12), np.float32)


def network() -> onnx.ModelProto:
    """A 3x3 convolution with a product behind it."""
    rng = np.random.default_rng(1)
    weights = {"k": (48, 40, 3, 3), "w": (12, 70)}
    initializers = [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32) / 20, n) for n, s in weights.items()]
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["c"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("MatMul", ["r", "w"], ["y"], "product"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 40, 12, 12])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 48, 12, 70])
    graph = helper.make_graph(nodes, "network", [x], [y], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    onnx.save(network(), tmp_path / "network.onnx")
    return tmp_path / "network.onnx"


def templates(module: minicc.Module) -> list[tuple[str, int]]:
    return [(k.template, int(dict(k.constants)["NR"])) for k in module.program.kernels if isinstance(k, TemplateKernel)]


def with_times(monkeypatch: pytest.MonkeyPatch, share: Mapping[str, float], whole: bool = True) -> None:
    """Let every way take this share of the usual time, and whole runs be faster or not."""

    def times(_usual: object, _other: object, _inputs: object, wanted: Mapping[Layers, str]) -> dict[Layers, tuple[float, float]]:
        return {layers: (1e-3, 1e-3 * share.get(way, 1.0)) for layers, way in wanted.items()}

    monkeypatch.setattr(tuning, "_times", times)
    monkeypatch.setattr(tuning, "_faster", lambda *_: whole)


def ways_of(path: Path) -> dict[Layers, tuple[str, ...]]:
    from minicc.frontend.model import load_model
    from minicc.module import Stages
    from minicc.walk import build

    choices = Choices()
    build(load_model(path), host_target(), Options.from_env(), Stages(None), choices)
    return choices.open


def test_lowering_names_the_ways(path: Path) -> None:
    (conv, product) = ways_of(path).values()
    assert len(set(conv)) == len(conv) and {"winograd 2x2", "winograd 4x4"} < set(conv)
    assert len(product) == 2 and all(name.endswith(" columns") for name in product)


def test_large_kernels_may_go_by_fourier_transforms() -> None:
    graph = Graph()
    x = graph.input("x", TensorType(f32, (1, 40, 40, 32)))
    weights = graph.constant(np.ones((32, 32, 9, 9), np.float32))
    graph.outputs = [graph.add("Conv", [x, weights], {"layout": "NHWC", "pads": [4] * 4}).output]
    choices = Choices()
    compile_graph(graph, choices)
    ((*names,),) = choices.open.values()
    assert sum(name.startswith("fft ") for name in names) == 2 and sum(name.startswith("direct, ") for name in names) == 2


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    channels=st.sampled_from([3, 16, 40]), filters=st.sampled_from([5, 24, 70]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)), kernel=st.sampled_from([(1, 1), (3, 3)]),
)  # fmt: skip
def test_every_way_is_right(channels: int, filters: int, size: tuple[int, int], kernel: tuple[int, int]) -> None:
    rng = np.random.default_rng(2)
    graph = Graph()
    x = graph.input("x", TensorType(f32, (2, *size, channels)))
    weights = graph.constant((rng.standard_normal((filters, channels, *kernel)) / np.sqrt(channels)).astype(np.float32))
    pads = [kernel[0] // 2, kernel[1] // 2] * 2
    graph.outputs = [graph.add("Conv", [x, weights], {"layout": "NHWC", "pads": pads}).output]
    given_x = rng.standard_normal((2, *size, channels)).astype(np.float32)
    (want,) = evaluate(graph, [given_x])
    choices = Choices()
    compile_graph(graph, choices)
    for ways in choices.open.values():
        seen = set()
        for way in ways:
            module = compile_graph(graph, Choices({(): way}))
            (got,) = module.run_items([given_x])
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
            seen.add(module.program.kernels)
        assert len(seen) == len(ways)


def test_faster_ways_are_taken_and_kept(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = minicc.compile(path, keep_bytes=0)
    conv, product = ways_of(path).values()
    with_times(monkeypatch, {conv[-1]: 0.5, conv[1]: 0.7, product[1]: 0.9})
    options = Options(cache_dir=str(tmp_path / "cache"), tune=True)
    tuned = minicc.compile(path, options=options)
    assert templates(tuned) != templates(usual) and len(tuned.report.tuned) == 2
    assert "conv" in tuned.report.tuned[0] and f"{conv[-1]}, 500 us, is faster by 500 us than {conv[0]}" in tuned.report.tuned[0]
    np.testing.assert_allclose(tuned(X), usual(X), rtol=0, atol=1e-5 * np.abs(usual(X)).max())
    assert str(tuned.report).count("tuned: ") == 2 and "tune" in tuned.report.seconds
    kept = minicc.compile(path, options=options)
    assert set(kept.report.seconds) == {"load"} and kept.report.tuned == tuned.report.tuned
    assert templates(kept) == templates(tuned) and templates(minicc.compile(path, keep_bytes=0)) == templates(usual)
    tuned.save(tmp_path / "tuned.minicc")
    np.testing.assert_array_equal(minicc.load(tmp_path / "tuned.minicc")(X), tuned(X))


@pytest.mark.parametrize(
    ("share", "whole", "seconds"), [(0.99, True, 60), (0.5, False, 60), (0.5, True, 0)], ids=["noise", "slower", "no time"]
)
def test_the_usual_module_stays(path: Path, monkeypatch: pytest.MonkeyPatch, share: float, whole: bool, seconds: int) -> None:
    shares = {way: share for ways in ways_of(path).values() for way in ways}
    with_times(monkeypatch, shares, whole)
    tuned = minicc.compile(path, keep_bytes=0, tune=True, tune_seconds=seconds)
    assert tuned.report.tuned == () and templates(tuned) == templates(minicc.compile(path, keep_bytes=0))


def test_real_times(path: Path) -> None:
    stages: list[tuple[str, int, int]] = []
    tuned = minicc.compile(path, keep_bytes=0, tune=True, progress=lambda *stage: stages.append(stage))
    want = minicc.compile(path, keep_bytes=0)(X)
    np.testing.assert_allclose(tuned(X), want, rtol=0, atol=1e-5 * np.abs(want).max())
    assert ("tune", 0, 3) in stages


@pytest.mark.parametrize("which", ["sequence", "no choice", "other machine"])
def test_models_that_cannot_be_timed(which: str) -> None:
    target = "cpu"
    if which == "other machine":
        model, target = network(), "cpu:neon"
    else:
        kind = helper.make_tensor_type_proto(TensorProto.FLOAT, [2])
        inputs: Sequence[Any] = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])]
        node = helper.make_node("Relu", ["x"], ["y"])
        if which == "sequence":
            inputs = [helper.make_value_info("x", helper.make_sequence_type_proto(kind))]
            node = helper.make_node("SequenceAt", ["x", "i"], ["y"])
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
        zero = numpy_helper.from_array(np.array(0, np.int64), "i")
        graph = helper.make_graph([node], "g", inputs, [y], [zero])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)  # of host nodes
        assert minicc.compile(model, target, tune=True).report.tuned == ()
