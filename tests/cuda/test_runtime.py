"""Programs on a pretended device: binding, slots, replays, host steps, saving and loading, and who cannot run them."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import minicc
from minicc.errors import InputError, ResourceLimitError, TargetError
from minicc.runtime.cuda import calls, engine
from minicc.runtime.cuda.array import CPU, CUDA, DeviceArray, capsule
from minicc.targets.cuda import CudaTarget, parse_cuda_target
from tests.cuda.fake_device import FakeDevice

pytest.importorskip("numba.cuda.compiler", reason="numba-cuda is not installed (extra cuda)")
RNG = np.random.default_rng(3)
LIMIT = 1 << 20  # bytes of a pretended device


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

    def gpu(number: int) -> FakeDevice:
        made.append(FakeDevice(sources, 1 << 25, number, LIMIT))
        return made[-1]

    monkeypatch.setattr(calls, "Gpu", gpu)
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
    assert [word for word in made[0].log if word not in ("in", "wait")] == ["replay", "out"] * 3
    assert module.stats()["binds"] == 2


def test_a_profile_names_the_kernels_and_their_times(device: Any) -> None:
    made, sources = device
    proto, _, _ = layer()
    module = compiled(sources, proto)
    x = RNG.standard_normal((4, 12)).astype(np.float32)
    found = module.profile(Elsewhere(made[0], x) if made else x, repeats=2)
    rows = {row.name: row for row in found.rows}
    assert set(rows) == set(module.code.symbols) and all(row.calls == 1 for row in found.rows)
    assert sorted(row.seconds for row in found.rows) == pytest.approx([1e-6 * (i + 1) for i in range(len(rows))])
    assert [e.start for e in found.events] == sorted(e.start for e in found.events)
    assert sum(row.share for row in found.rows) == pytest.approx(1)
    assert found.rows[0].layers and found.whole > 0


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
    with pytest.raises(TargetError, match="lacks a GPU: "):
        module(np.zeros((1, 12), np.float32))
    with pytest.raises(TargetError, match="sm_90"):
        parse_cuda_target("cuda:sm_20")
    with pytest.raises(TargetError, match="no GPU") as told:
        minicc.compile(layer()[0], target="cuda")
    assert re.search("libcuda|driver reports 0", str(told.value)) and "cuda:sm_80 or cuda:sm_90" in str(told.value)


LOAD = """
import sys
for name in ("numba", "numba_cuda", "llvmlite", "onnx", "onnxruntime"):
    sys.modules[name] = None  # an import of it fails
import minicc
import minicc.runtime.cuda.driver, minicc.runtime.cuda.engine
print(len(minicc.load(sys.argv[1], trust=True).explain().rows))
"""


def test_the_machine_with_the_gpu_needs_neither_a_compiler_nor_onnx(tmp_path: Path) -> None:
    module = minicc.compile(layer()[0], target="cuda:sm_90")
    module.save(tmp_path / "m.minicc")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "m.minicc")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and int(done.stdout) == len(module.explain().rows), done.stderr


def compiled(sources: dict[str, str], proto: Any) -> Any:
    sources.clear()  # without a device nothing is loaded before its text is known
    module = minicc.compile(proto, target="cuda:sm_90", strict=True)
    sources.update(module.code.sources)
    return module


class Elsewhere:
    """Another library's array on the pretended device."""

    def __init__(self, device: FakeDevice, array: np.ndarray[Any, Any]) -> None:
        self.shape, self.dtype, self.address = array.shape, array.dtype, device.memory.place(array)

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, 0

    def __dlpack__(self, *, stream: Any = None, **_: Any) -> Any:
        return capsule(self, self.address, self.shape, self.dtype, (CUDA, 0))


def test_arrays_that_are_on_the_device_stay_there(device: Any) -> None:
    made, sources = device
    proto, w, b = layer()
    module = compiled(sources, proto)
    module.prepare()
    x = RNG.standard_normal((4, 12)).astype(np.float32)
    result = module(Elsewhere(made[0], x))
    assert isinstance(result, DeviceArray) and result.shape == (4, 9) and "cuda:0" in repr(result)
    assert "out" not in made[0].log and made[0].log.count("move") == 2
    np.testing.assert_allclose(result.numpy(), expected(x, w, b), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(result), result.numpy())
    chained = compiled(sources, model([helper.make_node("Neg", ["x"], ["y"])], {"x": ["n", 9]}, ["n", 9], {}))
    assert chained.runner.stays
    interface = result.__cuda_array_interface__
    assert interface["shape"] == (4, 9) and interface["typestr"] == "<f4" and interface["version"] == 3


def test_sizes_may_be_fixed(device: Any) -> None:
    proto, w, b = layer()
    module = minicc.compile(proto, target="cuda:sm_90", strict=True, dims={"n": 3})
    device[1].update(module.code.sources)
    assert module.inputs[0].shape == (3, 12)
    x = RNG.standard_normal((3, 12)).astype(np.float32)
    np.testing.assert_allclose(module(x), expected(x, w, b), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("on_device", [True, False])
def test_a_replay_starts_the_recorded_launches_and_nothing_else(device: Any, on_device: bool) -> None:
    made, sources = device
    proto, w, b = layer()
    module = compiled(sources, proto)
    module.prepare()
    x = RNG.standard_normal((4, 12)).astype(np.float32)
    replay = module.replay({"x": Elsewhere(made[0], x) if on_device else x}, 7)
    (result,) = replay.outputs
    for numbers in (x, x[::-1].copy()):
        given = replay.inputs["x"]
        assert given.shape == (4, 12) and given.dtype == np.float32
        at = given.memory.address
        made[0].memory.bytes[at : at + x.nbytes] = np.frombuffer(numbers.tobytes(), np.uint8)
        made[0].log.clear()
        replay()
        assert made[0].log == ["replay"] and made[0].replayed_on == 7
        np.testing.assert_allclose(result.numpy(), expected(numbers, w, b), rtol=1e-5, atol=1e-6)
    # Other calls, also of these sizes, have memory of their own.
    np.testing.assert_allclose(module(-x), expected(-x, w, b), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result.numpy(), expected(x[::-1], w, b), rtol=1e-5, atol=1e-6)
    del module, replay, result, given
    gc.collect()
    assert made[0].held == 0


def test_what_cannot_be_replayed_says_why(device: Any) -> None:
    module = minicc.compile(layer()[0])
    with pytest.raises(TargetError, match="cpu"):
        module.replay({"x": np.zeros((1, 12), np.float32)})
    with pytest.raises(InputError):
        compiled(device[1], layer()[0]).replay({"x": np.zeros((4, 11), np.float32)})


def test_what_is_wrong_with_arrays_on_the_device_is_told(device: Any) -> None:
    made, sources = device
    module = compiled(sources, layer()[0])
    module.prepare()
    with pytest.raises(InputError, match="float64"):
        module(Elsewhere(made[0], np.zeros((4, 12))))
    with pytest.raises(InputError):
        module(Elsewhere(made[0], np.zeros((4, 11), np.float32)))


@given(shape=st.lists(st.integers(0, 4), max_size=3), dtype=st.sampled_from(["f4", "f8", "i8", "u1", "f2", "?"]))
@settings(max_examples=20, deadline=None)
def test_capsules_show_the_memory_they_name_and_let_go_of_it(shape: list[int], dtype: str) -> None:
    class Array:
        def __init__(self, array: Any) -> None:
            self.array = array

        def __dlpack_device__(self) -> tuple[int, int]:
            return CPU, 0

        def __dlpack__(self, **_: Any) -> Any:
            return capsule(self, self.array.ctypes.data, self.array.shape, self.array.dtype, (CPU, 0))

    content = np.asarray(RNG.random(shape) * 9).astype(dtype)
    owner = Array(content)
    gone = weakref.ref(owner)
    seen = np.from_dlpack(owner)
    unused = owner.__dlpack__()
    del owner
    np.testing.assert_array_equal(seen, content)
    alive = gone() is not None  # an assertion would keep what it looks at
    del seen, unused
    gc.collect()
    assert alive and gone() is None


def test_memory_of_shapes_that_are_not_used_goes(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, sources = device
    monkeypatch.setattr(engine, "KEPT_SHAPES", 2)
    module = compiled(sources, model([helper.make_node("Neg", ["x"], ["y"])], {"x": ["n", 9]}, ["n", 9], {}))
    seen = []
    for n in (5, 6, 7, 8, 9, 7):
        x = RNG.standard_normal((n, 9)).astype(np.float32)
        np.testing.assert_array_equal(module(x), -x)
        gc.collect()
        seen.append(made[0].held)
    assert max(seen) <= 2 * 2 * 4 * 9 * 9 + 64 and made[0].streams <= 2
    del module
    gc.collect()
    assert made[0].held == 0 and made[0].streams == 0


def test_full_memory_is_a_limit_with_a_remedy(device: Any) -> None:
    _, sources = device
    module = compiled(sources, model([helper.make_node("Neg", ["x"], ["y"])], {"x": ["n"]}, ["n"], {}))
    np.testing.assert_array_equal(module(np.ones(100_000, np.float32)), -np.ones(100_000, np.float32))
    with pytest.raises(ResourceLimitError, match=r"no .* bytes left"):
        module(np.ones(1 << 18, np.float32))
    # What other shapes kept is given up first.
    np.testing.assert_array_equal(module(np.ones(120_000, np.float32)), -np.ones(120_000, np.float32))


def test_several_threads_run_one_module(device: Any) -> None:
    made, sources = device
    proto, w, b = layer()
    module = compiled(sources, proto)
    xs = [RNG.standard_normal((n, 12)).astype(np.float32) for n in (1, 2, 3, 2, 1, 3)]
    with ThreadPoolExecutor(3) as pool:
        for x, y in zip(xs, pool.map(module, xs)):
            np.testing.assert_allclose(y, expected(x, w, b), rtol=1e-5, atol=1e-6)
    assert made[0].log.count("replay") == len(xs)


def test_control_flow_runs_its_bodies_on_the_device(device: Any) -> None:
    """A loop whose body is compiled, with an array that is made before it and one that its results go on from."""
    _, sources = device
    step = helper.make_graph(
        [
            helper.make_node("Mul", ["v", "v"], ["square"]),
            helper.make_node("Add", ["square", "seed"], ["w"]),
            helper.make_node("Identity", ["c"], ["d"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, [3]),
        ],
        [
            helper.make_tensor_value_info("d", TensorProto.BOOL, []),
            helper.make_tensor_value_info("w", TensorProto.FLOAT, [3]),
        ],
    )
    nodes = [
        helper.make_node("Neg", ["x"], ["seed"]),
        helper.make_node("Loop", ["count", "", "seed"], ["last"], body=step),
        helper.make_node("Exp", ["last"], ["y"]),
    ]
    proto = model(nodes, {"x": [3]}, [3], {"count": np.array(3)})
    module = compiled(sources, proto)
    x = np.array([0.1, -0.2, 0.3], np.float32)
    v = -x.astype(np.float64)
    for _ in range(3):
        v = v * v - x
    np.testing.assert_allclose(module(x), np.exp(v), rtol=1e-5)
