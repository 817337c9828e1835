"""Ways that are left open for CUDA: each is right, timing on a pretended device takes the faster ones, files keep them."""

from __future__ import annotations

import ctypes
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

pytest.importorskip("numba.cuda.extending", reason="numba-cuda is not installed")
pytest.importorskip("cuda.bindings.nvvm", reason="cuda-bindings is not installed")

import minicc
from minicc import tune as tuning
from minicc.frontend.model import load_model
from minicc.kernels.cuda_launch import Launch
from minicc.kernels.cuda_tiles import (
    ALL_TILES,
    DOT_ELEMENTS,
    MOST_STREAMS,
    MOST_WAYS,
    SIZES,
    STREAM,
    Way,
    choose_product,
    choose_tile,
    product_ways,
    tile_ways,
    way_name,
)
from minicc.lower.context import Choices
from minicc.lower.kernel import TemplateKernel
from minicc.module import Stages
from minicc.options import Options
from minicc.runtime.cuda import calls
from minicc.runtime.cuda.driver import Replay, Stream
from minicc.targets.cuda import CudaTarget
from minicc.walk import build
from tests.cuda.fake_device import FakeDevice
from tests.cuda.modules import reference, run_module
from tests.cuda.test_gemm import AMPERE, HOPPER

Array = np.ndarray[Any, Any]
Layers = tuple[str, ...]
Launches = Sequence[tuple[Any, Launch, Sequence[int]]]
RNG = np.random.default_rng(4)
X = RNG.standard_normal((1, 8, 6, 6), np.float32)


def network() -> ModelProto:
    """A 5x5 convolution, which has no ways but tiles, a product of its rows, and one of a single row."""
    shapes = {"k": (12, 8, 5, 5), "w": (6, 20), "v": (12 * 6 * 20, 9)}
    weights = [numpy_helper.from_array((RNG.standard_normal(s) / np.sqrt(s[0])).astype(np.float32), n) for n, s in shapes.items()]
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["c"], "conv", pads=[2, 2, 2, 2]),
        helper.make_node("MatMul", ["c", "w"], ["p"], "product"),
        helper.make_node("Flatten", ["p"], ["f"], "flat"),
        helper.make_node("MatMul", ["f", "v"], ["y"], "row"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, X.shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 9])
    graph = helper.make_graph(nodes, "network", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


NETWORK = network()


def ways_of(target: CudaTarget = HOPPER, **options: Any) -> dict[Layers, tuple[str, ...]]:
    choices = Choices()
    build(load_model(NETWORK), target, Options.from_env().override(**options), Stages(None), choices)
    return choices.open


def taken(module: minicc.Module) -> dict[Layers, str]:
    """The way of each layer that is a product or a convolution."""
    found = {}
    for step in module.program.steps:
        kernel = module.program.kernels[step.kernel]  # type: ignore[union-attr]
        if isinstance(kernel, TemplateKernel) and kernel.template in ("gemm", "conv"):
            constants = dict(kernel.constants)
            found[step.origin] = way_name((ALL_TILES[int(constants["TILE"])], int(constants["SPLITS"])))
    return found


@pytest.mark.parametrize("target", [AMPERE, HOPPER], ids=lambda target: target.arch)
@given(
    element=st.sampled_from(sorted(SIZES)), batches=st.integers(1, 3),
    sizes=st.tuples(*[st.one_of(st.integers(1, 64), st.integers(1, 5000))] * 3),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_ways_are_few_different_and_led_by_the_usual_one(
    target: CudaTarget, element: str, batches: int, sizes: tuple[int, int, int]
) -> None:
    for ways, usual in ((tile_ways, choose_tile), (product_ways, choose_product)):
        found: tuple[Way, ...] = ways(element, *sizes, batches, target)
        assert found[0] == usual(element, *sizes, batches, target)
        assert len({way_name(way) for way in found}) == len(set(found)) == len(found) <= MOST_WAYS + MOST_STREAMS + 2
        units = {tile.unit for tile, _ in found}
        floats = {"dot"} if ways is product_ways and sizes[0] <= 8 and element in DOT_ELEMENTS else set()
        tensor = {"mma", "wgmma"} if target is HOPPER else {"mma"}
        assert units >= floats and units - floats <= (tensor if element != "f32" else {"fma"})
        assert floats or units == (tensor if element != "f32" else {"fma"})
        assert target is HOPPER or {splits for _, splits in found} <= {1, STREAM}
        assert found[0][1] != STREAM
        assert floats or sum(splits == STREAM for _, splits in found) == MOST_STREAMS
        assert all(tile.shared_bytes <= target.shared_bytes for tile, _ in found)


def test_lowering_names_the_ways() -> None:
    for precision, units in (("fp32", {"fma"}), ("tf32", {"mma", "wgmma"})):
        conv, product, row = ways_of(precision=precision).values()
        for names in (conv, product):
            assert {name.split()[0] for name in names} == units
        assert any("depth in" in name for name in conv)
        columns = {name.partition(",")[0] for name in row if name.startswith("dot")}
        assert row[0].startswith("dot") and len(columns) == 3 and row[-1].split()[0] in units
    assert {name.split()[0] for names in ways_of(AMPERE, precision="tf32").values() for name in names} == {"mma", "dot"}


SLOW = [pytest.param(number, marks=pytest.mark.slow) for number in (0, *range(2, MOST_WAYS + MOST_STREAMS + 2))]


@pytest.mark.parametrize("number", [1, *SLOW])
def test_every_way_is_right(number: int) -> None:
    (want,) = reference(NETWORK, {"x": X})
    picked = {layers: names[min(number, len(names) - 1)] for layers, names in ways_of(precision="tf32").items()}
    options = Options.from_env().override(precision="tf32")
    module = build(load_model(NETWORK), HOPPER, options, Stages(None), Choices(picked))
    assert taken(module) == picked
    (got,) = run_module(module, {"x": X})
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-3 * np.abs(want).max())


class TimedDevice(FakeDevice):
    """One on which a launch takes a nanosecond for each byte of shared memory and a microsecond more; it computes nothing."""

    now = 0.0  # seconds, of all devices

    def load(self, symbol: str, cubin: bytes) -> str:
        return symbol

    def seconds(self, launch: Launch) -> float:
        return 1e-6 + 1e-9 * launch.shared_bytes

    def record(self, launches: Launches, stream: Stream, overlap: bool = False) -> Replay:
        recorded = [launch for _, launch, _ in launches]

        def replay(_where: Stream = stream) -> None:
            TimedDevice.now += sum(map(self.seconds, recorded))

        return replay

    def times(self, launches: Launches, stream: Stream) -> list[float]:
        self.record(launches, stream)()
        return [self.seconds(launch) for _, launch, _ in launches]

    def to_host(self, target: int, address: int, size: int, stream: Stream) -> None:
        TimedDevice.now += 1.0  # who measures with copies sees nothing else
        ctypes.memset(target, 0, size)


class Contrary(TimedDevice):
    """One whose whole runs say the opposite of its single launches."""

    def record(self, launches: Launches, stream: Stream, overlap: bool = False) -> Replay:
        recorded = [launch for _, launch, _ in launches]

        def replay(_where: Stream = stream) -> None:
            TimedDevice.now += 1 / sum(map(self.seconds, recorded))

        return replay


@pytest.fixture
def present(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[TimedDevice]], None]:
    """Puts a pretended GPU, with a clock that only its work moves, into this machine."""

    def put(kind: type[TimedDevice]) -> None:
        monkeypatch.setattr(calls, "Gpu", lambda number: kind({}, 1 << 25, number))
        monkeypatch.setattr(CudaTarget, "missing_features", lambda _self: ())
        monkeypatch.setattr(tuning, "SECONDS", 0.0)
        monkeypatch.setattr(time, "perf_counter", lambda: TimedDevice.now)

    return put


def shared(names: Sequence[str]) -> dict[str, int]:
    """Bytes of shared memory of ways."""
    known = {way_name((tile, splits)): tile.shared_bytes for tile in ALL_TILES for splits in (STREAM, 1, 2, 4, 8)}
    return {name: known[name] for name in names}


def test_faster_ways_are_taken_and_kept(present: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = ways_of(precision="tf32")
    present(TimedDevice)
    usual = minicc.compile(NETWORK, target="cuda:sm_90", precision="tf32")
    tuned = minicc.compile(NETWORK, target="cuda:sm_90", precision="tf32", tune=True)
    before, after = taken(usual), taken(tuned)
    assert before == {layers: names[0] for layers, names in ways.items()}
    changed = 0
    for layers, names in ways.items():
        bytes_of = shared(names)
        best = min(names, key=lambda name: bytes_of[name])
        worth = 1e-6 + 1e-9 * bytes_of[best] < tuning.CLEARLY * (1e-6 + 1e-9 * bytes_of[names[0]])
        assert bytes_of[after[layers]] == bytes_of[best if worth else names[0]]
        changed += worth
    assert 0 < changed == len(tuned.report.tuned) and "us, is faster by" in tuned.report.tuned[0]
    (want,) = reference(NETWORK, {"x": X})
    tuned.save(tmp_path / "tuned.minicc")
    monkeypatch.undo()
    loaded = minicc.load(tmp_path / "tuned.minicc")
    assert taken(loaded) == after and loaded.code.objects == tuned.code.objects
    (got,) = run_module(loaded, {"x": X})
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-3 * np.abs(want).max())


def test_the_usual_module_stays_where_whole_runs_are_slower(present: Any) -> None:
    present(Contrary)
    tuned = minicc.compile(NETWORK, target="cuda:sm_90", precision="tf32", tune=True)
    usual = minicc.compile(NETWORK, target="cuda:sm_90", precision="tf32")
    assert tuned.report.tuned == () and taken(tuned) == taken(usual)


def test_without_a_gpu_nothing_is_timed_and_that_is_said() -> None:
    if not HOPPER.missing_features():
        pytest.skip("there is a GPU")
    with pytest.warns(RuntimeWarning, match="timed nothing for 'cuda:sm_90': this machine lacks a GPU"):
        module = minicc.compile(NETWORK, target="cuda:sm_90", tune=True)
    assert module.report.tuned == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        minicc.compile(NETWORK, target="cuda:sm_90")
