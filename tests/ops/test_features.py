"""Features of ai.onnx.ml against ONNX Runtime: scaling, encoding, choosing columns, maps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minicc
from minicc.errors import MiniccError
from tests.ops.classical import by_numpy, by_onnxruntime, check, compiled, node_model

TYPES = st.sampled_from([np.float32, np.float64, np.int64, np.int32])


def draw(rng: np.random.Generator, dtype: Any, shape: tuple[int, ...] = (5, 4)) -> Any:
    return (rng.integers(-4, 5, shape) if np.dtype(dtype).kind == "i" else rng.standard_normal(shape)).astype(dtype)


@given(st.integers(0, 1 << 32), TYPES, st.booleans())
@settings(max_examples=25, deadline=None)
def test_scaler(seed: int, dtype: Any, by_column: bool) -> None:
    rng = np.random.default_rng(seed)
    offset, scale = (rng.standard_normal(4 if by_column else 1).astype(np.float32).tolist() for _ in range(2))
    check("Scaler", [draw(rng, dtype)], offset=offset, scale=scale)


@given(st.integers(0, 1 << 32), TYPES, st.sampled_from(["MAX", "L1", "L2"]), st.booleans())
@settings(max_examples=25, deadline=None)
def test_normalizer(seed: int, dtype: Any, norm: str, vector: bool) -> None:
    rng = np.random.default_rng(seed)
    x = draw(rng, dtype, (4,) if vector else (5, 4))
    x[0] = 0
    check("Normalizer", [x], norm=norm)


@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_binarizer(dtype: Any) -> None:
    check("Binarizer", [draw(np.random.default_rng(0), dtype)], threshold=0.5, runtime=dtype == np.float32)


@given(st.integers(0, 1 << 32), st.booleans(), st.booleans())
@settings(max_examples=25, deadline=None)
def test_imputer(seed: int, by_column: bool, nan: bool) -> None:
    rng = np.random.default_rng(seed)
    count = 4 if by_column else 1
    x = draw(rng, np.float32)
    x[rng.random(x.shape) < 0.3] = np.nan if nan else 2
    values = rng.standard_normal(count).astype(np.float32).tolist()
    check("Imputer", [x], imputed_value_floats=values, replaced_value_float=float("nan") if nan else 2.0)
    whole = rng.integers(5, 9, count).tolist()
    check("Imputer", [draw(rng, np.int64)], imputed_value_int64s=whole, replaced_value_int64=2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.int32])
def test_one_hot(dtype: Any) -> None:
    x = draw(np.random.default_rng(0), dtype)
    check("OneHotEncoder", [x], cats_int64s=[-1, 2, 3, 0], runtime=dtype != np.int32)


def test_one_hot_of_texts_and_of_unknown_values() -> None:
    words = np.array([["a", "c"], ["b", "a"]], object)
    check("OneHotEncoder", [words], cats_strings=["a", "b"], host=("OneHotEncoder",))
    model = node_model("OneHotEncoder", [np.array([[1, 2]])], 1, cats_int64s=[1, 3], zeros=0)
    with pytest.raises(MiniccError, match="no category"):
        minicc.compile(model)(np.array([[1, 2]]))


def test_columns() -> None:
    rng = np.random.default_rng(0)
    check("ArrayFeatureExtractor", [draw(rng, np.float32), np.array([3, 0, 0])])
    check("ArrayFeatureExtractor", [draw(rng, np.int64, (4,)), np.array([[3, 0]])])
    given = [draw(rng, np.float32), draw(rng, np.float32, (5, 2))]
    model = node_model("FeatureVectorizer", given, 1, inputdimensions=[4, 2])
    for info in model.graph.input:
        info.type.tensor_type.shape.dim[0].dim_param = "rows"
    np.testing.assert_array_equal(compiled(model, given)[0], np.concatenate(given, 1))
    np.testing.assert_array_equal(by_numpy("FeatureVectorizer", given, inputdimensions=[3, 4])[0][:, 3:5], given[1])


@given(st.integers(0, 1 << 32), st.sampled_from(["int64s", "floats"]), st.sampled_from(["int64s", "floats", "strings"]))
@settings(max_examples=40, deadline=None)
def test_labels(seed: int, keys: str, values: str) -> None:
    rng = np.random.default_rng(seed)
    dtypes = {"int64s": np.int64, "floats": np.float32}
    known = rng.choice(np.arange(-6, 7), int(rng.integers(1, 8)), replace=False).astype(dtypes[keys])
    found = [f"v{i}" for i in known] if values == "strings" else draw(rng, dtypes[values], known.shape).tolist()
    x = rng.integers(-8, 9, (6, 3)).astype(dtypes[keys])
    if keys == "floats":
        x[0] = 2.5, np.nan, np.inf
    check("LabelEncoder", [x], host=("LabelEncoder",) if values == "strings" else (),
          **{f"keys_{keys}": known.tolist(), f"values_{values}": found})  # fmt: skip


def test_labels_of_texts_and_of_broken_numbers() -> None:
    check("LabelEncoder", [np.array(["b", "z"], object)], keys_strings=["a", "b"], values_int64s=[4, 7], host=("LabelEncoder",))
    x = np.array([0.5, 2.0, np.nan], np.float32)
    check("LabelEncoder", [x], keys_floats=[0.5, float("nan")], values_floats=[3.0, 4.0], opset=4, host=("LabelEncoder",))


@pytest.mark.parametrize("labels", [{"classlabels_int64s": [4, 9, 2]}, {"classlabels_strings": ["a", "b", "c"]}])
def test_maps_of_scores(labels: dict[str, Any]) -> None:
    """A list with a mapping for each row, as ONNX Runtime gives it."""
    x = draw(np.random.default_rng(0), np.float32, (3, 3))
    model = node_model("ZipMap", [x], 1, **labels)
    ours, theirs = compiled(model, [x], ("ZipMap",))[0], by_onnxruntime(model, [x])[0]
    assert ours == theirs
    with pytest.raises(MiniccError, match="ZipMap"):
        minicc.compile(node_model("ZipMap", [x[:, :2]], 1, **labels))


def test_categories() -> None:
    attrs: dict[str, Any] = {"cats_strings": ["a", "b"], "cats_int64s": [4, 7]}
    check("CategoryMapper", [np.array(["b", "z"], object)], host=("CategoryMapper",), opset=1, **attrs)
    check("CategoryMapper", [np.array([4, 5])], host=("CategoryMapper",), opset=1, **attrs)
