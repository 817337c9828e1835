"""The benchmarks' own judgement: the rule of agreement, the inputs they make, the files they accept."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks import export, fetch
from benchmarks.compare import Rule, difference, rule
from benchmarks.inputs import cases, declare, signature

FLOAT = Rule("float", {})


def model_of(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], **inputs: list) -> onnx.ModelProto:
    integer = {"input_ids", "attention_mask", "lengths"}
    values = [
        helper.make_tensor_value_info(name, TensorProto.INT64 if name in integer else TensorProto.FLOAT, dims)
        for name, dims in inputs.items()
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    return helper.make_model(helper.make_graph(nodes, "g", values, outputs, initializers))


def test_float_outputs_agree_within_the_tolerance_only() -> None:
    want = np.array([1.0, -100.0], np.float32)
    assert difference(FLOAT, "y", want, want + np.float32(0.009))[1] == ""
    assert "differs" in difference(FLOAT, "y", want, want + np.float32(0.011))[1]


@pytest.mark.parametrize(
    "got", [np.zeros(2, np.float32), np.zeros(3, np.float64), np.array([0, 0, np.nan], np.float32)]
)
def test_shape_dtype_and_nan_must_agree(got: np.ndarray) -> None:
    assert difference(FLOAT, "y", np.zeros(3, np.float32), got)[1]


def test_nan_and_infinity_at_the_same_place_agree() -> None:
    want = np.array([np.nan, np.inf, -np.inf, 1], np.float32)
    assert difference(FLOAT, "y", want, want.copy()) == (0.0, "")
    assert difference(FLOAT, "y", want, -want)[1]


def test_integers_and_booleans_must_be_equal() -> None:
    assert difference(FLOAT, "y", np.array([5]), np.array([6]))[1]
    assert difference(FLOAT, "y", np.array([True]), np.array([False]))[1]
    assert difference(FLOAT, "y", np.array([5]), np.array([5])) == (0.0, "")


def test_quantised_models_get_two_steps_of_their_own_output() -> None:
    nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
             helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"])]
    model = model_of(nodes, {"s": np.float32(0.5), "z": np.uint8(0)}, x=["n"])
    quantised = rule(model)
    assert quantised == Rule("quantised", {"y": 0.5})
    want = np.array([10.0], np.float32)
    assert difference(quantised, "y", want, want + 1)[1] == ""
    assert difference(quantised, "y", want, want + 1.5)[1]


def test_ids_stay_inside_the_table_and_shapes_differ() -> None:
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["y"])]
    table = {"table": np.zeros((17, 4), np.float32)}
    model = model_of(nodes, table, input_ids=["batch", "seq"], attention_mask=["batch", "seq"])
    assert signature(model)[0].vocabulary == 17
    made = cases("some model", model)
    assert len({case.feeds["input_ids"].shape for case in made}) == 3
    for case in made:
        ids, mask = case.feeds["input_ids"], case.feeds["attention_mask"]
        assert ids.shape == mask.shape and ids.min() >= 0 and ids.max() < 17
        assert set(np.unique(mask)) <= {0, 1}
    again = cases("some model", model)
    assert all(np.array_equal(a.feeds["input_ids"], b.feeds["input_ids"]) for a, b in zip(made, again))


def test_lengths_fit_the_waveform() -> None:
    model = model_of([], {}, waveforms=["batch", "samples"], lengths=["batch"])
    for case in cases("some model", model):
        rows, longest = case.feeds["waveforms"].shape
        assert case.feeds["lengths"].shape == (rows,) and case.feeds["lengths"].max() == longest
        assert np.abs(case.feeds["waveforms"]).max() <= 1


def test_nominal_dimensions_are_replaced() -> None:
    model = model_of([], {}, **{"input.1": [10, 3, 32, 32]})
    assert declare("centerface", model)
    assert signature(model)[0].dims == ("batch", 3, "height", "width")
    assert not declare("some model", model)


def test_unknown_and_absent_models_say_so(tmp_path: Path) -> None:
    with pytest.raises(fetch.ModelUnavailable, match="unknown model"):
        fetch.fetch("no such model", tmp_path)
    with pytest.raises(fetch.ModelUnavailable, match=r"benchmarks\.fetch"):
        fetch.fetch("nmp", tmp_path, download=False)


def test_a_file_with_another_digest_is_refused(tmp_path: Path) -> None:
    (tmp_path / "nmp.onnx").write_bytes(b"something else")
    with pytest.raises(fetch.ModelUnavailable, match="SHA-256"):
        fetch.fetch("nmp", tmp_path)


def test_a_wheel_with_another_content_writes_nothing(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr(fetch.BY_NAME["nmp"].member, b"something else")
    with zipfile.ZipFile(tmp_path / "a.whl") as wheel, pytest.raises(fetch.ModelUnavailable, match="SHA-256"):
        fetch._extract(wheel, fetch.BY_NAME["nmp"], tmp_path)
    assert not (tmp_path / "nmp.onnx").exists()


def test_the_lists_are_complete_and_without_doubles() -> None:
    assert len(fetch.MODELS) == len(fetch.BY_NAME) == 32 and set(fetch.QUICK) <= set(fetch.BY_NAME)
    assert len(set(export.NAMES)) == 26 and not set(export.NAMES) & set(fetch.BY_NAME)


def test_a_sheet_has_a_panel_for_each_measured_model(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    from benchmarks.rooflines import draw

    roofline = {"gflops": 90.0, "gbytes": 20.0, "kernels": [["conv", 0.7, 60.0, 2.0], ["gemm", 0.2, 5.0, 15.0]]}
    measured = {"roofline": roofline}
    rows = {"a 1 1": measured, "a 1 2": measured, "b 1 1": {"failed": "no"}, "c 8 1": measured}
    assert draw(rows, tmp_path / "sheet.png", 1) == 1
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
