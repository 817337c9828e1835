"""The calibration: what it measures, what it keeps, what it does with what it finds in the store."""

from __future__ import annotations

import json
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import minicc
from minicc import walk
from minicc.lower.kernel import TemplateKernel
from minicc.runtime import rates
from minicc.runtime.probes import CHAINS, SIDE, compile_probes
from minicc.runtime.rates import measure_rates, rates_of
from minicc.runtime.store import Store
from minicc.targets.cpu import host_target
from minicc.targets.cuda import parse_cuda_target
from minicc.targets.parse import target_of
from minicc.targets.rates import Rates


def test_what_is_measured_is_within_what_machines_have() -> None:
    found, usual = measure_rates(1), Rates()
    assert found.are_valid()
    for rate, typical in zip(astuple(found), astuple(usual)):
        assert 1 / rates.FURTHEST <= rate / typical <= rates.FURTHEST


def test_the_loops_compute_what_they_are_named_for() -> None:
    """So that none of them was optimised away."""
    probes, rng = compile_probes(), np.random.default_rng(1)
    sums = np.zeros((CHAINS, probes.lanes), np.float32)
    sums[0] = 0.5
    probes.multiply(sums.ctypes.data, 3)  # every chain x becomes x * 0.5 + 0.5, three times
    chains = np.full((CHAINS, probes.lanes), 0.875, np.float32)
    chains[0] += np.float32(0.5**4)
    np.testing.assert_allclose(sums[0], chains.sum(0) + 1.0, rtol=1e-6)

    data = rng.integers(-8, 8, (5, CHAINS, probes.lanes)).astype(np.float32)
    sums = np.zeros((CHAINS, probes.lanes), np.float32)
    probes.read(data.ctypes.data, sums.ctypes.data, 5)
    np.testing.assert_array_equal(sums[0], data.sum((0, 1)))

    pixel, tiles = 2 * probes.lanes, 3
    image = rng.integers(-8, 8, (SIDE, 2 * tiles + 2, pixel)).astype(np.float32)
    forms = np.zeros((SIDE, SIDE, tiles, pixel), np.float32)
    probes.transform(image.ctypes.data, forms.ctypes.data, pixel, image[0].size, forms[0, 0].size, tiles, 2)
    form = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], np.float32)  # F(2, 3), of four values
    squares = np.stack([image[:, 2 * t : 2 * t + SIDE] for t in range(tiles)])
    np.testing.assert_array_equal(forms, np.einsum("ki,tijc,mj->kmtc", form, squares, form))


def test_rates_are_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def measure(threads: int) -> Rates:
        measured.append(threads)
        return Rates(memory=7.0)

    monkeypatch.setattr(rates, "measure_rates", measure)
    rates._measured.cache_clear()
    try:
        for _ in range(2):
            assert rates_of(host_target(), Store(tmp_path)) == Rates(memory=7.0)
        rates._measured.cache_clear()  # as in another process
        assert rates_of(host_target(), Store(tmp_path)) == Rates(memory=7.0)
        assert len(measured) == 1
    finally:
        rates._measured.cache_clear()


DAMAGED = (b"", b"{}x", b"[]", b'{"memory": 1}', b'{"memory": NaN}', b'{"speed": 1.0}', b'{"value": -1.0}')


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_entry_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    class Damaged(Store):
        def get(self, key: str) -> bytes | None:
            return content

    monkeypatch.setattr(rates, "_measured", lambda: Rates(cache=3.0))
    assert rates_of(host_target(), Damaged(tmp_path)) == Rates(cache=3.0)


OTHERS = (target_of("cpu:avx2"), parse_cuda_target("cuda:sm_90"), replace(host_target(), features="+imaginary"))


@pytest.mark.parametrize("target", OTHERS, ids=["fixed", "cuda", "foreign"])
def test_other_machines_keep_typical_rates(monkeypatch: pytest.MonkeyPatch, target: object) -> None:
    monkeypatch.setattr(rates, "_measured", lambda: pytest.fail("measured"))
    assert rates_of(target, Store(None)) == Rates()  # type: ignore[arg-type]


def test_what_is_kept_is_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {}

    class Watched(Store):
        def put(self, key: str, data: bytes) -> None:
            kept[key] = json.loads(data)

    monkeypatch.setattr(rates, "_measured", lambda: Rates(5.0, 3.0, 11.0))
    rates_of(host_target(), Watched(tmp_path))
    assert list(kept.values()) == [{"memory": 5.0, "cache": 3.0, "value": 11.0}]


@pytest.mark.parametrize(("memory", "template"), [(90.0, "conv"), (0.9, "winograd")])
def test_a_compilation_chooses_with_them(monkeypatch: pytest.MonkeyPatch, memory: float, template: str) -> None:
    """A small map of many channels: Winograd's form has fewer products and more weights than the direct sum."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 256, 4, 4]) for name in "xy")
    weights = numpy_helper.from_array(np.ones((256, 256, 3, 3), np.float32), "w")
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])
    graph = helper.make_graph([node], "small", [x], [y], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    asked = []

    def found(target: object, store: Store) -> Rates:
        asked.append(target)
        return Rates(memory=memory)

    monkeypatch.setattr(walk, "rates_of", found)
    kernels = minicc.compile(model, keep_bytes=0).program.kernels
    assert [k.template for k in kernels if isinstance(k, TemplateKernel)] == [template] and asked == [host_target()]


def test_a_model_whose_kernels_do_not_depend_on_them_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 8]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "small", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    monkeypatch.setattr(walk, "rates_of", lambda target, store: pytest.fail("measured"))
    minicc.compile(model, keep_bytes=0)
