"""Every old operator form against ONNX Runtime, which runs the model as it is."""

import warnings

import numpy as np
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from minicc.frontend.model import load_model
from minicc.frontend.upgrade import UPGRADES
from minicc.ir.evaluate import evaluate

RNG = np.random.default_rng(7)


def floats(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def positive(*shape):
    return RNG.random(shape).astype(np.float32) + 0.5


def case(op, opset, inputs, attrs=None, constants=None, outputs=1):
    """inputs are fed, constants (by position) become initializers; None leaves an input out."""
    return op, opset, inputs, attrs or {}, constants or {}, outputs


I64 = np.int64
X = floats(2, 3, 4)
IMAGE = floats(1, 2, 4, 6)
STATISTICS = [floats(2), floats(2), floats(2), positive(2)]
RESIZE_10 = {1: np.array([1, 1, 2, 1.5], np.float32)}

CASES = [
    *(
        case(op, opset, [X], {"axis": axis})
        for op in ("Softmax", "LogSoftmax", "Hardmax")
        for opset in (8, 12)
        for axis in (0, 1, 2)
    ),
    *(case(op, 11, [X]) for op in ("Softmax", "LogSoftmax", "Hardmax")),
    case("Softmax", 11, [X], {"axis": -1}),
    case("Softmax", 11, [X], {"axis": -2}),
    case("Softmax", 13, [X], {"axis": 1}),
    case("Clip", 7, [X], {"min": -0.5, "max": 0.5}),
    case("Clip", 10, [X], {"min": -0.5}),
    case("Clip", 10, [X]),
    case("Clip", 11, [X], constants={1: np.array(-0.1, np.float32)}),
    case("Dropout", 7, [X], {"ratio": 0.3}),
    case("Dropout", 10, [X], {"ratio": 0.3}),
    case("Dropout", 12, [X], {"seed": 3}),
    case("BatchNormalization", 7, [IMAGE, *STATISTICS], {"epsilon": 1e-3, "momentum": 0.8}),
    case(
        "BatchNormalization", 7, [X, floats(3, 4), floats(3, 4), floats(3, 4), positive(3, 4)], {"spatial": 0}
    ),
    case("BatchNormalization", 9, [IMAGE, *STATISTICS]),
    case("BatchNormalization", 14, [IMAGE, *STATISTICS], {"training_mode": 0}),
    case("Upsample", 7, [IMAGE], {"scales": [1.0, 1.0, 2.0, 3.0], "mode": "nearest"}),
    case("Upsample", 7, [IMAGE], {"scales": [1.0, 1.0, 2.0, 2.0], "mode": "linear"}),
    case("Upsample", 9, [IMAGE], {"mode": "nearest"}, {1: np.array([1, 1, 2, 2], np.float32)}),
    case("Resize", 10, [IMAGE], {"mode": "nearest"}, RESIZE_10),
    case("Resize", 10, [IMAGE], {"mode": "linear"}, RESIZE_10),
    case("Resize", 10, [IMAGE], {"mode": "nearest"}, {1: np.array([1, 1, 0.5, 0.5], np.float32)}),
    *(
        case(
            "Resize",
            11,
            [IMAGE],
            {"mode": mode, "coordinate_transformation_mode": coordinates},
            {1: np.zeros(0, np.float32), 2: np.array([1, 1, 2, 2], np.float32)},
        )
        for mode in ("nearest", "linear")
        for coordinates in ("half_pixel", "asymmetric", "align_corners")
    ),
    case(
        "Resize",
        11,
        [IMAGE],
        {"coordinate_transformation_mode": "tf_half_pixel_for_nn", "nearest_mode": "floor"},
        {1: np.zeros(0, np.float32), 2: np.array([1, 1, 0.5, 0.5], np.float32)},
    ),
    case("Resize", 13, [IMAGE, None, None], {"mode": "linear"}, {3: np.array([1, 2, 8, 9], I64)}),
    case("Resize", 19, [IMAGE, None], {"mode": "cubic"}, {2: np.array([1, 1, 2, 2], np.float32)}),
    case("Slice", 7, [X], {"starts": [1, 0], "ends": [3, 9], "axes": [1, 2]}),
    case("Slice", 9, [X], {"starts": [0, -2], "ends": [1, 3]}),
    case(
        "Slice",
        10,
        [X],
        constants={
            1: np.array([3], I64),
            2: np.array([-9], I64),
            3: np.array([2], I64),
            4: np.array([-2], I64),
        },
    ),
    case("Pad", 7, [X], {"pads": [0, 1, 2, 0, 0, 1]}),
    case("Pad", 10, [X], {"pads": [0, 1, 2, 0, 0, 1], "value": 1.5}),
    case("Pad", 10, [X], {"pads": [0, 1, 2, 0, 0, 1], "mode": "reflect"}),
    case("Pad", 11, [X], {"mode": "edge"}, {1: np.array([0, 1, 2, 0, 0, 1], I64)}),
    case("Split", 7, [X], {"axis": 2}, outputs=2),
    case("Split", 11, [X], {"axis": 2, "split": [1, 3]}, outputs=2),
    case("Split", 13, [X], {"axis": 2}, {1: np.array([1, 3], I64)}, outputs=2),
    case("Split", 13, [X], {"axis": 1}, outputs=3),
    case("Split", 18, [X], {"axis": 1, "num_outputs": 2}, outputs=2),
    case("Squeeze", 7, [floats(1, 3, 1)], {"axes": [2]}),
    case("Squeeze", 11, [floats(1, 3, 1)], {"axes": [-1, 0]}),
    case("Squeeze", 11, [floats(1, 3, 1)]),
    case("Unsqueeze", 7, [X], {"axes": [0, 4]}),
    case("Unsqueeze", 11, [X], {"axes": [-1]}),
    *(
        case(op, opset, [positive(2, 3, 4)], {"axes": [0, 2], "keepdims": 0})
        for op in (
            "ReduceL1",
            "ReduceL2",
            "ReduceLogSum",
            "ReduceLogSumExp",
            "ReduceMax",
            "ReduceMean",
            "ReduceMin",
            "ReduceProd",
            "ReduceSum",
            "ReduceSumSquare",
        )
        for opset in (8, 11, 12)
    ),
    *(case(op, 17, [X], {"axes": [-1]}) for op in ("ReduceMean", "ReduceMax")),
    case("ReduceMean", 11, [X]),
    case("Scatter", 9, [X], {"axis": 1}, {1: np.array([[[0, 1, 2, 0]]], I64), 2: floats(1, 1, 4)}),
    case("ScatterElements", 11, [X], {"axis": 1}, {1: np.array([[[0, 1, 2, 0]]], I64), 2: floats(1, 1, 4)}),
    case("TopK", 7, [X], {"k": 2, "axis": 1}, outputs=2),
    case("TopK", 10, [X], {"axis": 1}, {1: np.array([2], I64)}, outputs=2),
    case("TopK", 11, [X], {"axis": 1, "largest": 0}, {1: np.array([2], I64)}, outputs=2),
    case("GroupNormalization", 18, [floats(2, 6, 4), floats(3), floats(3)], {"num_groups": 3}),
    case("GroupNormalization", 21, [floats(2, 6, 4), floats(6), floats(6)], {"num_groups": 3}),
    case(
        "RoiAlign",
        10,
        [IMAGE],
        {"output_height": 2, "output_width": 2, "sampling_ratio": 2},
        {1: np.array([[0, 0, 3, 3]], np.float32), 2: np.array([0], I64)},
    ),
    case(
        "RoiAlign",
        16,
        [IMAGE],
        {"output_height": 2, "output_width": 2, "sampling_ratio": 2},
        {1: np.array([[0, 0, 3, 3]], np.float32), 2: np.array([0], I64)},
    ),
    *(
        case("GridSample", opset, [IMAGE, floats(1, 3, 3, 2)], {"mode": mode})
        for opset, mode in ((16, "bilinear"), (16, "bicubic"), (16, "nearest"), (20, "linear"), (20, "cubic"))
    ),
    case("GridSample", 16, [IMAGE, floats(1, 3, 3, 2)]),
    case("DFT", 17, [floats(1, 5, 4, 2)], {"axis": 1}),
    case("DFT", 17, [floats(1, 5, 4, 2)]),
    case("DFT", 20, [floats(1, 5, 4, 2)], constants={2: np.array(1, I64)}),
    case("MeanVarianceNormalization", 9, [IMAGE]),
    *(
        case(op, 7, [positive(2, 3), positive(2, 3)])
        for op in ("Add", "Sub", "Mul", "Div", "Pow", "Equal", "Greater", "Less")
        if op != "Equal"
    ),
    *(case(op, 7, [X > 0, X > 0.5]) for op in ("And", "Or", "Xor")),
    case("Equal", 7, [np.array([1, 2], I64), np.array([1, 3], I64)]),
    case("PRelu", 7, [X, floats(3, 1)]),
    case("Gemm", 7, [floats(2, 3), floats(3, 4), floats(4)], {"alpha": 0.5}),
    case("GRU", 7, [floats(3, 2, 4), floats(1, 15, 4), floats(1, 15, 5)], {"hidden_size": 5}),
    case("LSTM", 7, [floats(3, 2, 4), floats(1, 20, 4), floats(1, 20, 5)], {"hidden_size": 5}),
    case("RNN", 7, [floats(3, 2, 4), floats(1, 5, 4), floats(1, 5, 5)], {"hidden_size": 5}),
]
# Forms of opset 6, which ONNX Runtime runs with a warning only
CASES_6 = [
    case("Add", 6, [floats(2, 3, 4), floats(3)], {"broadcast": 1, "axis": 1}),
    case("Add", 6, [floats(2, 3, 4), floats(3, 4)], {"broadcast": 1}),
    case("Gemm", 6, [floats(2, 3), floats(3, 4), floats(4)], {"broadcast": 1}),
]


def build(op, opset, inputs, attrs, constants, outputs):
    names, infos, initializers, feeds = [], [], [], {}
    for i in range(max([len(inputs) - 1, *constants]) + 1):
        array = constants.get(i, inputs[i] if i < len(inputs) else None)
        names.append("" if array is None else f"x{i}")
        if i in constants:
            initializers.append(numpy_helper.from_array(array, f"x{i}"))
        elif array is not None:
            dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
            infos.append(helper.make_tensor_value_info(f"x{i}", dtype, array.shape))
            feeds[f"x{i}"] = array
    results = [f"y{i}" for i in range(outputs)]
    graph = helper.make_graph(
        [helper.make_node(op, names, results, **attrs)],
        "g",
        infos,
        [helper.make_empty_tensor_value_info(r) for r in results],
        initializers,
    )
    made = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=3 if opset < 9 else 6
    )
    if made.ir_version == 3:  # initializers had to be inputs
        for tensor in initializers:
            made.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return made, feeds


def runtime(model, feeds):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options).run(None, feeds)


@pytest.mark.parametrize("given", CASES + CASES_6, ids=lambda c: f"{c[0]}-{c[1]}")
def test_old_form_against_onnxruntime(given):
    model, feeds = build(*given)
    imported = load_model(model)
    assert [a.name for a in imported.inputs] == list(feeds)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = evaluate(imported.graph, feeds)
    if given[0] in ("Add", "Gemm") and given[1] == 6:
        expected = _opset_6(given)
    else:
        expected = runtime(model, feeds)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6)


def _opset_6(given):
    """ONNX Runtime does not run these: numpy."""
    op, _, inputs, attrs, _, _ = given
    if op == "Gemm":
        return [inputs[0] @ inputs[1] + inputs[2]]
    return [inputs[0] + (inputs[1][:, None] if "axis" in attrs else inputs[1])]


def test_every_entry_of_the_table_is_tried():
    tried = {c[0] for c in CASES + CASES_6}
    assert set(UPGRADES) <= tried


@pytest.mark.parametrize("name", ["test_scan_sum"])
def test_scan_of_opset_8(name):
    import onnx.backend.test.case.node as node_cases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (found,) = [c for c in node_cases.collect_testcases("Scan") if c.name == name]
    (inputs, outputs), *_ = found.data_sets
    ours = evaluate(
        load_model(found.model).graph, dict(zip([i.name for i in found.model.graph.input if i.name], inputs))
    )
    for a, b in zip(ours, outputs, strict=True):
        np.testing.assert_allclose(a, b)
