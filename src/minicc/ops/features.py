"""Features of ai.onnx.ml: scaling, encoding and choosing columns, and the maps that classifiers may answer with.

Numbers are computed by kernels; texts and maps stay on the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minicc.errors import ShapeError
from minicc.ir.dims import Dim, product
from minicc.ir.graph import Builder, Node, Value
from minicc.ir.opdef import REQUIRED, Inference, Kind, OpDef, register
from minicc.ir.types import KERNEL_DTYPES, DType, OpaqueType, TensorType, Type, dtype_of, f32, i64, string
from minicc.ops.helpers import Array, same_as_input
from minicc.ops.norm import as_type, axes_of, required
from minicc.ops.scores import DOMAIN, class_labels, floats_of, row_array

MAX_TABLE = 1 << 20  # numbers between the least and the largest key of a LabelEncoder whose results are looked up in a table


def _refuse(node: Node) -> str | None:
    x = node.inputs[0]
    if x is None or not isinstance(x.type, TensorType) or x.type.shape is None:
        return "features of unknown rank"
    return None if x.type.dtype in KERNEL_DTYPES else f"no kernel for element type {x.type.dtype}"


def _float_infer(n: Inference) -> list[Type]:
    return [TensorType(f32, n.type(0).shape)]


# -- Scaler: (x - offset) * scale, per column or with one number


def _scaler_eval(x: Array, *, offset: Any, scale: Any) -> Array:
    offsets, scales = (np.asarray(v or default, np.float32) for v, default in ((offset, [0]), (scale, [1])))
    return (x.astype(np.float32) - offsets) * scales


def _scaler_expand(b: Builder, node: Node) -> Sequence[Value]:
    x = required(node, 0)
    y = as_type(b, x, f32)
    if node.attrs["offset"]:
        y = b.op("Sub", y, b.constant(floats_of(node.attrs, "offset")))
    if node.attrs["scale"]:
        y = b.op("Mul", y, b.constant(floats_of(node.attrs, "scale")))
    return [y if y is not x else b.op("Identity", x)]


register(OpDef(
    "Scaler", Kind.EXPAND, infer=_float_infer, eval=_scaler_eval, expand=_scaler_expand, refuse=_refuse,
    attrs={"offset": None, "scale": None}, domain=DOMAIN,
))  # fmt: skip


# -- Normalizer: rows divided by their largest number, the sum of magnitudes, or their length; a row whose norm is 0 stays


def _normalizer_infer(n: Inference) -> list[Type]:
    if n.attr("norm") not in ("MAX", "L1", "L2"):
        raise n.error(f"no norm {n.attr('norm')!r}")
    return _float_infer(n)


def _normalizer_eval(x: Array, *, norm: str) -> Array:
    rows = x.astype(np.float32)
    axis = min(1, x.ndim - 1)
    if norm == "MAX":
        size = rows.max(axis=axis, keepdims=True)
    elif norm == "L1":
        size = np.abs(rows).sum(axis=axis, keepdims=True)
    else:
        size = np.sqrt((rows * rows).sum(axis=axis, keepdims=True))
    return np.asarray(rows / np.where(size == 0, np.float32(1), size))


def _normalizer_expand(b: Builder, node: Node) -> Sequence[Value]:
    x = required(node, 0)
    y = as_type(b, x, f32)
    axes = axes_of(b, [min(1, len(x.shape) - 1)])
    reduce = {"MAX": "ReduceMax", "L1": "ReduceL1", "L2": "ReduceL2"}[node.attrs["norm"]]
    size = b.op(reduce, y, axes, keepdims=1)
    return [b.op("Div", y, b.op("Where", b.op("Equal", size, b.scalar(0, size)), b.scalar(1, size), size))]


register(OpDef(
    "Normalizer", Kind.EXPAND, infer=_normalizer_infer, eval=_normalizer_eval, expand=_normalizer_expand, refuse=_refuse,
    attrs={"norm": "MAX"}, domain=DOMAIN,
))  # fmt: skip


# -- Binarizer, Imputer


def _binarizer_expand(b: Builder, node: Node) -> Sequence[Value]:
    x = required(node, 0)
    above = b.op("Greater", as_type(b, x, f32), b.constant(np.float32(node.attrs["threshold"])))
    return [b.op("CastLike", above, x)]


register(OpDef(
    "Binarizer", Kind.EXPAND, infer=same_as_input, expand=_binarizer_expand, refuse=_refuse,
    eval=lambda x, *, threshold: (x.astype(np.float32) > np.float32(threshold)).astype(x.dtype),
    attrs={"threshold": 0.0}, domain=DOMAIN,
))  # fmt: skip


def _replacement(dtype: np.dtype[Any], attrs: Mapping[str, Any]) -> tuple[Any, Array]:
    """What is replaced, and the number or the numbers by column that take its place."""
    if dtype.kind == "f":
        return dtype.type(attrs["replaced_value_float"]), np.asarray(attrs["imputed_value_floats"] or (), dtype)
    return dtype.type(attrs["replaced_value_int64"]), np.asarray(attrs["imputed_value_int64s"] or (), dtype)


def _imputer_infer(n: Inference) -> list[Type]:
    if not _replacement(n.dtype(0).numpy, n.attrs)[1].size:
        raise n.error("there is nothing to impute: an attribute for this element type is missing")
    return [n.type(0)]


def _imputer_eval(x: Array, **attrs: Any) -> Array:
    old, new = _replacement(x.dtype, attrs)
    missing = np.isnan(x) if x.dtype.kind == "f" and np.isnan(old) else x == old
    return np.asarray(np.where(missing, new, x), x.dtype)


def _imputer_expand(b: Builder, node: Node) -> Sequence[Value]:
    x = required(node, 0)
    old, new = _replacement(x.tensor.dtype.numpy, node.attrs)
    is_nan = x.tensor.dtype.is_float and bool(np.isnan(old))
    missing = b.op("IsNaN", x) if is_nan else b.op("Equal", x, b.constant(np.asarray(old)))
    return [b.op("Where", missing, b.constant(new if new.size > 1 else new.reshape(())), x)]


register(OpDef(
    "Imputer", Kind.EXPAND, infer=_imputer_infer, eval=_imputer_eval, expand=_imputer_expand, refuse=_refuse,
    attrs={"imputed_value_floats": None, "imputed_value_int64s": None, "replaced_value_float": 0.0, "replaced_value_int64": 0},
    domain=DOMAIN,
))  # fmt: skip


# -- OneHotEncoder: for each element, which of the categories it is


def _one_hot_infer(n: Inference) -> list[Type]:
    texts, numbers = n.attr("cats_strings"), n.attr("cats_int64s")
    if bool(texts) == bool(numbers) or bool(texts) != (n.dtype(0) == string):
        raise n.error("the categories need the element type of the input")
    return [TensorType(f32, (*n.shape(0), len(texts or numbers)))]


def _one_hot_eval(x: Array, *, cats_strings: Any, cats_int64s: Any, zeros: int) -> Array:
    values = x if cats_strings else np.trunc(x).astype(np.int64)
    found = values[..., None] == np.array(cats_strings or cats_int64s, object if cats_strings else np.int64)
    if not zeros and not found.any(axis=-1).all():
        raise ShapeError("OneHotEncoder: a value is in no category", hint="set its attribute zeros to 1 to let it be all zeros")
    return np.asarray(found, np.float32)


def _one_hot_expand(b: Builder, node: Node) -> Sequence[Value]:
    x = required(node, 0)
    values = b.op("Unsqueeze", b.op("Cast", x, to=7), axes_of(b, [-1]))
    return [as_type(b, b.op("Equal", values, b.constant(np.array(node.attrs["cats_int64s"], np.int64))), f32)]


def _one_hot_refuse(node: Node) -> str | None:
    return _refuse(node) or (None if node.attrs["zeros"] else "a value in no category is an error")


register(OpDef(
    "OneHotEncoder", Kind.EXPAND, infer=_one_hot_infer, eval=_one_hot_eval, expand=_one_hot_expand, refuse=_one_hot_refuse,
    attrs={"cats_strings": None, "cats_int64s": None, "zeros": 1}, domain=DOMAIN,
))  # fmt: skip


# -- ArrayFeatureExtractor, FeatureVectorizer


def _extract_infer(n: Inference) -> list[Type]:
    shape, count = n.shape(0), product(n.shape(1))
    if not shape:
        raise n.error("the input needs an axis")
    return [n.type(0).with_shape((*(shape[:-1] or (1,)), count))]


def _extract_eval(x: Array, places: Array) -> Array:
    if np.any((places < 0) | (places >= x.shape[-1])):
        raise ShapeError(f"ArrayFeatureExtractor: places {places.min()} to {places.max()} of {x.shape[-1]} columns")
    return np.ascontiguousarray(row_array(x)[..., places.reshape(-1)])


def _extract_expand(b: Builder, node: Node) -> Sequence[Value]:
    x, places = node.inputs
    assert x is not None and places is not None
    if len(places.shape) != 1:
        places = b.op("Reshape", places, axes_of(b, [-1]))
    y = b.op("Gather", x, places, axis=len(x.shape) - 1)
    return [y if len(x.shape) > 1 else b.op("Unsqueeze", y, axes_of(b, [0]))]


def _extract_refuse(node: Node) -> str | None:
    places = node.inputs[1]
    if places is None or places.tensor.shape is None or places.tensor.dtype != i64:
        return "places of unknown rank"
    x = node.inputs[0]
    return None if x is not None and isinstance(x.type, TensorType) and x.type.shape is not None else "features of unknown rank"


register(OpDef(
    "ArrayFeatureExtractor", Kind.EXPAND, infer=_extract_infer, eval=_extract_eval, expand=_extract_expand,
    refuse=_extract_refuse, domain=DOMAIN,
))  # fmt: skip


def _columns(n: Inference, i: int) -> tuple[Dim, Dim]:
    shape = n.shape(i)
    return (1, shape[0]) if len(shape) == 1 else (shape[0], product(shape[1:]))


def _vectorizer_infer(n: Inference) -> list[Type]:
    sizes = n.attr("inputdimensions")
    if not sizes or len(sizes) != len(n.inputs):
        raise n.error("inputdimensions needs a number for each input")
    return [TensorType(f32, (_columns(n, 0)[0], sum(sizes)))]


def _vectorizer_eval(*inputs: Array, inputdimensions: Sequence[int]) -> Array:
    rows = [x.reshape(1, -1) if x.ndim == 1 else x.reshape(len(x), -1) for x in inputs]
    out = np.zeros((len(rows[0]), sum(inputdimensions)), np.float32)
    start = 0
    for x, size in zip(rows, inputdimensions):
        count = min(size, x.shape[1])
        out[:, start : start + count] = x[:, :count]
        start += size
    return out


def _vectorizer_expand(b: Builder, node: Node) -> Sequence[Value]:
    return [b.op("Concat", *(as_type(b, v, f32) for v in node.inputs if v is not None), axis=1)]


def _vectorizer_refuse(node: Node) -> str | None:
    for value, size in zip(node.inputs, node.attrs["inputdimensions"]):
        if value is None or value.tensor.dtype not in KERNEL_DTYPES or value.tensor.shape is None:
            return "features without numbers or of unknown rank"
        if len(value.shape) != 2 or value.shape[1] != size:
            return "columns are cut or filled up"
    return None


register(OpDef(
    "FeatureVectorizer", Kind.EXPAND, infer=_vectorizer_infer, eval=_vectorizer_eval, expand=_vectorizer_expand,
    refuse=_vectorizer_refuse, attrs={"inputdimensions": None}, domain=DOMAIN,
))  # fmt: skip


# -- LabelEncoder: keys to values


def _listed(attrs: Mapping[str, Any], name: str) -> Array:
    """The array of one of the attributes for keys or values, by element type."""
    for kind, dtype in (("tensor", None), ("strings", object), ("int64s", np.int64), ("floats", np.float32)):
        if (given := attrs[f"{name}_{kind}"]) is not None:
            return np.asarray(given, dtype).reshape(-1)
    return np.zeros(0, np.int64)


def _encoder_table(attrs: Mapping[str, Any]) -> tuple[Array, Array, Any]:
    """Keys, values, and the value of what is no key."""
    keys, values = (_listed(attrs, name) for name in ("keys", "values"))
    if len(keys) != len(values):
        raise ValueError(f"{len(keys)} keys for {len(values)} values")
    if attrs["default_tensor"] is not None:
        return keys, values, np.asarray(attrs["default_tensor"]).reshape(-1)[0]
    kind = "string" if values.dtype == object else "float" if values.dtype.kind == "f" else "int64"
    return keys, values, attrs[f"default_{kind}"]


def _encoder_dtype(values: Array) -> DType:
    return string if values.dtype.kind in "OUS" else dtype_of(values.dtype)


def _encoder_infer(n: Inference) -> list[Type]:
    return [TensorType(_encoder_dtype(_encoder_table(n.attrs)[1]), n.type(0).shape)]


def _encoder_eval(x: Array, **attrs: Any) -> Array:
    keys, values, default = _encoder_table(attrs)
    known = dict(zip(keys.tolist(), values.tolist()))
    nan = next((v for k, v in known.items() if isinstance(k, float) and np.isnan(k)), default)
    found = [nan if isinstance(k, float) and np.isnan(k) else known.get(k, default) for k in x.reshape(-1).tolist()]
    return np.array(found, object if values.dtype == object else values.dtype).reshape(x.shape)


def _encoder_expand(b: Builder, node: Node) -> Sequence[Value]:
    """A table from the least key to the largest, with the default between them and at both ends."""
    keys, values, default = _encoder_table(node.attrs)
    x = required(node, 0)
    least, most = int(keys.min()), int(keys.max())
    table = np.full(most - least + 3, default, values.dtype)
    table[keys.astype(np.int64) - least + 1] = values
    whole = b.op("Cast", x, to=7) if x.tensor.dtype != i64 else x
    ends = [b.constant(np.int64(v)) for v in (least - 1, most + 1)]
    places = b.op("Sub", b.op("Max", b.op("Min", whole, ends[1]), ends[0]), ends[0])
    if x.tensor.dtype.is_float:  # 2.5 is no key
        same = b.op("Equal", b.op("CastLike", whole, x), x)
        places = b.op("Where", same, places, b.constant(np.int64(0)))
    return [b.op("Gather", b.constant(table), places, axis=0)]


def _encoder_refuse(node: Node) -> str | None:
    keys, values, _ = _encoder_table(node.attrs)
    if values.dtype.kind in "OUS" or keys.dtype.kind not in "iuf" or not keys.size:
        return "texts, or no keys"
    if not np.all(np.isfinite(keys)) or np.any(keys != np.trunc(keys)) or float(keys.max()) - float(keys.min()) > MAX_TABLE:
        return "keys that are no whole numbers, or far apart"
    if len(np.unique(keys)) != len(keys) or np.abs(keys).max() > 1 << 30:
        return "keys that are named twice, or very large ones"
    return _refuse(node)


register(OpDef(
    "LabelEncoder", Kind.EXPAND, infer=_encoder_infer, eval=_encoder_eval, expand=_encoder_expand, refuse=_encoder_refuse,
    attrs={**{f"{name}_{kind}": None for name in ("keys", "values") for kind in ("tensor", "strings", "int64s", "floats")},
           "default_tensor": None, "default_string": "_Unused", "default_int64": -1, "default_float": -0.0}, domain=DOMAIN,
))  # fmt: skip


# -- maps: ZipMap, CategoryMapper


def _zip_infer(n: Inference) -> list[Type]:
    labels, shape = class_labels(n.attrs, "classlabels_int64s"), n.type(0).shape
    if not labels or (shape is not None and isinstance(shape[-1], int) and shape[-1] != len(labels)):
        raise n.error(f"{len(labels)} labels for scores of shape {shape}")
    return [OpaqueType(f"seq(map({'string' if isinstance(labels[0], str) else 'int64'},tensor(float)))")]


def _zip_eval(x: Array, **attrs: Any) -> list[dict[Any, float]]:
    labels = class_labels(attrs, "classlabels_int64s")
    rows = row_array(x)
    if rows.shape[1] != len(labels):
        raise ShapeError(f"ZipMap: {rows.shape[1]} scores for {len(labels)} labels")
    return [dict(zip(labels, row)) for row in rows.tolist()]


register(OpDef(
    "ZipMap", Kind.HOST, infer=_zip_infer, eval=_zip_eval, refuse=lambda _: "its result is a list of mappings",
    attrs={"classlabels_strings": None, "classlabels_int64s": None}, domain=DOMAIN,
))  # fmt: skip


def _category_infer(n: Inference) -> list[Type]:
    if len(n.attr("cats_strings") or ()) != len(n.attr("cats_int64s") or ()):
        raise n.error("each category needs a text and a number")
    return [TensorType(i64 if n.dtype(0) == string else string, n.type(0).shape)]


def _category_eval(x: Array, *, cats_strings: Any, cats_int64s: Any, default_int64: int, default_string: str) -> Array:
    if x.dtype.kind in "iu":
        texts = dict(zip(cats_int64s, cats_strings))
        return np.array([texts.get(v, default_string) for v in x.reshape(-1).tolist()], object).reshape(x.shape)
    numbers = dict(zip(cats_strings, cats_int64s))
    return np.array([numbers.get(v, default_int64) for v in x.reshape(-1).tolist()], np.int64).reshape(x.shape)


register(OpDef(
    "CategoryMapper", Kind.HOST, infer=_category_infer, eval=_category_eval, refuse=lambda _: "it maps from or to texts",
    attrs={"cats_strings": REQUIRED, "cats_int64s": REQUIRED, "default_int64": -1, "default_string": "_Unused"}, domain=DOMAIN,
))  # fmt: skip
