"""Resize, GridSample, AffineGrid and RoiAlign: ONNX's cases, and ONNX Runtime over all modes."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from minicc.ir.dims import evaluate, symbol
from minicc.ir.graph import Graph
from minicc.ir.types import TensorType, f32
from tests.ops.onnx_cases import Case, cases_of, check_call, check_case
from tests.ops.runtime_oracle import check_against_onnxruntime
from tests.ops.test_matmul import normal

COORDINATES = ["half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric"]


@pytest.mark.parametrize(
    "case", cases_of("Resize", "GridSample", "AffineGrid", "RoiAlign"), ids=lambda c: c.name
)
def test_onnx_case(case: Case) -> None:
    check_case(case)


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize(
    "attrs",
    [
        {"mode": "nearest", "nearest_mode": n}
        for n in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
    ]
    + [{"mode": "linear"}, {"mode": "cubic"}, {"mode": "cubic", "exclude_outside": 1, "cubic_coeff_a": -0.5}],
    ids=lambda a: "-".join(map(str, a.values())),
)
def test_resize_as_onnxruntime(coordinates: str, attrs: dict[str, object]) -> None:
    attrs = {**attrs, "coordinate_transformation_mode": coordinates}
    for scales in ([1, 1, 2, 2], [1, 1, 0.5, 0.6], [1, 1, 3, 1], [1, 1, 1.3, 2.6]):
        # With align_corners ONNX uses the size before rounding, ONNX Runtime the rounded one.
        if coordinates == "align_corners" and any(s * n % 1 for s, n in zip(scales[2:], (5, 6))):
            continue
        inputs = [normal(1, 2, 5, 6), None, np.array(scales, np.float32)]
        check_against_onnxruntime("Resize", inputs, attrs, constants=(2,), rtol=1e-4, atol=1e-4)
    # 5 -> 3 would put positions of half_pixel_symmetric exactly on pixels, where the last bit decides.
    for sizes in ([1, 2, 10, 12], [1, 2, 4, 9], [1, 2, 1, 7]):
        inputs = [normal(1, 2, 5, 6), None, None, np.array(sizes, np.int64)]
        check_against_onnxruntime("Resize", inputs, attrs, constants=(3,), rtol=1e-4, atol=1e-4)


def test_resize_of_three_axes_and_of_integers() -> None:
    inputs = [normal(1, 2, 3, 4, 5), None, np.array([1, 1, 2, 2, 2], np.float32)]
    check_against_onnxruntime("Resize", inputs, {"mode": "linear"}, constants=(2,), rtol=1e-4)
    check_call("Resize", [(normal(2, 3) * 50).astype(np.int32), None, np.array([2, 3], np.float32)], {}, None)


@pytest.mark.parametrize("scale", [0.5, 2.0, 1.5, 0.25, 1 / 3])
def test_symbolic_sizes_give_the_static_ones(scale: float) -> None:
    graph = Graph()
    scales = graph.constant(np.array([scale, 1], np.float32))
    symbolic = graph.add("Resize", [graph.input("x", TensorType(f32, (symbol("h"), 4))), None, scales]).output
    for size in (3, 7, 12, 100):
        static = graph.add("Resize", [graph.input("y", TensorType(f32, (size, 4))), None, scales]).output
        assert evaluate(symbolic.shape[0], {"h": size}) == static.shape[0]


GRID_MODES = list(product(("linear", "nearest", "cubic"), ("zeros", "border", "reflection"), (0, 1)))


@pytest.mark.parametrize(("mode", "padding", "align"), GRID_MODES)
def test_grid_sample_as_onnxruntime(mode: str, padding: str, align: int) -> None:
    attrs = {"mode": mode, "padding_mode": padding, "align_corners": align}
    check_against_onnxruntime(
        "GridSample", [normal(2, 3, 5, 6), normal(2, 4, 3, 2)], attrs, rtol=1e-4, atol=1e-4
    )
    if mode != "cubic":
        inputs = [normal(2, 3, 3, 5, 6), normal(2, 2, 4, 3, 3)]
        check_against_onnxruntime("GridSample", inputs, attrs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("align", [0, 1])
@pytest.mark.parametrize("size", [(2, 3, 4, 5), (2, 3, 3, 4, 5)])
def test_affine_grid_as_onnxruntime(align: int, size: tuple[int, ...]) -> None:
    theta = normal(2, len(size) - 2, len(size) - 1)
    inputs = [theta, np.array(size, np.int64)]
    check_against_onnxruntime("AffineGrid", inputs, {"align_corners": align}, constants=(1,), rtol=1e-4)


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("coordinates", ["half_pixel", "output_half_pixel"])
@pytest.mark.parametrize("samples", [0, 1, 2])
def test_roi_align_as_onnxruntime(mode: str, coordinates: str, samples: int) -> None:
    rois = np.sort(np.random.default_rng(1).random((5, 2, 2)) * 8, axis=1).reshape(5, 4).astype(np.float32)
    attrs = {
        "mode": mode,
        "coordinate_transformation_mode": coordinates,
        "sampling_ratio": samples,
        "output_height": 3,
        "output_width": 2,
        "spatial_scale": 0.7,
    }
    check_against_onnxruntime(
        "RoiAlign", [normal(2, 3, 8, 9), rois, np.array([0, 1, 1, 0, 1])], attrs, rtol=1e-4
    )
