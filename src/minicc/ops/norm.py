"""Normalisations: batch, layer, RMS, instance, group, Lp, mean-variance and local response normalisation.

All but local response normalisation expand into reductions and pointwise ops; lowering recognises several
reductions over the same trailing axes as one row kernel. Half types are normalised in float32. Softmax is in
`softmax`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from minicc.ir.dims import Dim, exact_quotient
from minicc.ir.expr import Expr, binary, cast, const, select, unary
from minicc.ir.expr import maximum as expr_maximum
from minicc.ir.expr import minimum as expr_minimum
from minicc.ir.opdef import REQUIRED, Indexing, Inference, Kind, OpDef, register
from minicc.ir.types import DType, TensorType, bf16, f16, f32
from minicc.ops.helpers import (
    Array,
    computed_in_f32,
    default_refuse,
    element_type,
    same_as_float_input,
    widen,
)

if TYPE_CHECKING:
    from minicc.ir.graph import Builder, Node, Value


# -- building blocks of expansions


def as_type(b: Builder, x: Value, dtype: DType) -> Value:
    """The value cast to an element type, or itself."""
    return x if x.tensor.dtype == dtype else b.op("Cast", x, to=dtype)


def widened(b: Builder, x: Value) -> Value:
    """The value, half types as float32."""
    return as_type(b, x, f32) if x.tensor.dtype in (f16, bf16) else x


def axes_of(b: Builder, axes: Sequence[int]) -> Value:
    """Axes as the constant input of a reduction."""
    return b.constant(np.array(list(axes), dtype=np.int64))


def reshaped(b: Builder, x: Value, shape: Sequence[Dim]) -> Value:
    """The value in another shape, or itself."""
    return x if x.shape == tuple(shape) else b.op("Reshape", x, b.shape(shape))


def normalised(b: Builder, x: Value, axes: Sequence[int], epsilon: float,
               spread: Callable[[Value], Value] = lambda mean: mean) -> tuple[Value, Value, Value]:  # fmt: skip
    """((x - mean) / sqrt(variance + epsilon), mean, 1 / sqrt(variance + epsilon)) over some axes.

    spread: what becomes of the means over these axes before they are used.
    """
    mean = spread(b.op("ReduceMean", x, axes_of(b, axes), keepdims=1))
    centred = b.op("Sub", x, mean)
    variance = spread(b.op("ReduceMean", b.op("Mul", centred, centred), axes_of(b, axes), keepdims=1))
    inverse = b.op("Reciprocal", b.op("Sqrt", b.op("Add", variance, b.scalar(epsilon, x))))
    return b.op("Mul", centred, inverse), mean, inverse


def scaled_and_shifted(b: Builder, x: Value, scale: Value | None, bias: Value | None) -> Value:
    """x * scale + bias in the type of x, either left out when None."""
    if scale is not None:
        x = b.op("Mul", x, as_type(b, scale, x.tensor.dtype))
    return x if bias is None else b.op("Add", x, as_type(b, bias, x.tensor.dtype))


def optional(node: Node, position: int) -> Value | None:
    """An input that may be left out."""
    return node.inputs[position] if position < len(node.inputs) else None


def required(node: Node, position: int) -> Value:
    """An input that inference has seen."""
    value = node.inputs[position]
    assert value is not None
    return value


def _per_channel(b: Builder, x: Value, rank: int) -> Value:
    """A vector over channels, made to broadcast against [N, C, *spatial]."""
    return reshaped(b, x, (*x.shape, *(1,) * (rank - 2)))


def _moments(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    mean = x.mean(axis=axes, keepdims=True, dtype=x.dtype)
    return mean, np.square(x - mean).mean(axis=axes, keepdims=True, dtype=x.dtype)


# -- LayerNormalization (Ba et al., 2016)


def _stash_type(n: Inference) -> DType:
    stash = element_type(n.attr("stash_type"))
    return n.dtype(0) if n.dtype(0) not in (f16, bf16) else stash


def _row_statistics_shape(n: Inference, shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
    axis = n.axis(n.attr("axis"), len(shape))
    return (*shape[:axis], *(1,) * (len(shape) - axis))


def _layer_infer(n: Inference) -> list[TensorType]:
    x = n.shape(0)
    if not n.dtype(0).is_float:
        raise n.error("needs a float element type")
    statistics = TensorType(f32 if n.attr("stash_type") == 1 else element_type(n.attr("stash_type")),
                            _row_statistics_shape(n, x))  # fmt: skip
    return [n.type(0), statistics, statistics]


def _layer_expand(b: Builder, node: Node) -> list[Value]:
    x = required(node, 0)
    axis = node.attrs["axis"] % x.tensor.rank
    y, mean, inverse = normalised(b, widened(b, x), range(axis, x.tensor.rank), node.attrs["epsilon"])
    y = scaled_and_shifted(b, y, required(node, 1), optional(node, 2))
    statistics = element_type(node.attrs["stash_type"])
    out = [as_type(b, y, x.tensor.dtype), as_type(b, mean, statistics), as_type(b, inverse, statistics)]
    return out[: len(node.outputs)]


def layer_normalised(
    x: Array, scale: Array, bias: Array | None = None, *, axis: int, epsilon: float, stash_type: int
) -> Any:
    wide = widen(x)
    mean, variance = _moments(wide, tuple(range(axis % x.ndim, x.ndim)))
    inverse = 1 / np.sqrt(variance + wide.dtype.type(epsilon))
    y = (wide - mean) * inverse * widen(scale)
    if bias is not None:
        y = y + widen(bias)
    statistics = element_type(stash_type).numpy
    return y.astype(x.dtype), mean.astype(statistics), inverse.astype(statistics)


register(
    OpDef(
        "LayerNormalization",
        Kind.EXPAND,
        infer=_layer_infer,
        eval=layer_normalised,
        expand=_layer_expand,
        refuse=default_refuse,
        attrs={"axis": -1, "epsilon": 1e-5, "stash_type": 1},
    )
)


# -- RMSNormalization (Zhang and Sennrich, 2019), and com.microsoft's form of it with a second output


def inverse_rms(b: Builder, x: Value, axes: Sequence[int], epsilon: float) -> Value:
    """1 / sqrt(mean(x * x) + epsilon) over some axes."""
    squares = b.op("ReduceMean", b.op("Mul", x, x), axes_of(b, axes), keepdims=1)
    return b.op("Reciprocal", b.op("Sqrt", b.op("Add", squares, b.scalar(epsilon, x))))


def _rms_infer(n: Inference) -> list[TensorType]:
    _row_statistics_shape(n, n.shape(0))
    return same_as_float_input(n)  # type: ignore[return-value]


def _simplified_infer(n: Inference) -> list[TensorType]:
    return [
        *_rms_infer(n),
        TensorType(element_type(n.attr("stash_type")), _row_statistics_shape(n, n.shape(0))),
    ]


def _rms_expand(b: Builder, node: Node) -> list[Value]:
    x = required(node, 0)
    wide = widened(b, x)
    inverse = inverse_rms(
        b, wide, range(node.attrs["axis"] % x.tensor.rank, x.tensor.rank), node.attrs["epsilon"]
    )
    y = scaled_and_shifted(b, b.op("Mul", wide, inverse), required(node, 1), None)
    out = [as_type(b, y, x.tensor.dtype), as_type(b, inverse, element_type(node.attrs["stash_type"]))]
    return out[: len(node.outputs)]


def rms_normalised(
    x: Array, scale: Array, *, axis: int, epsilon: float, stash_type: int
) -> tuple[Array, Array]:
    wide = widen(x)
    axes = tuple(range(axis % x.ndim, x.ndim))
    inverse = 1 / np.sqrt(np.square(wide).mean(axis=axes, keepdims=True) + wide.dtype.type(epsilon))
    return (wide * inverse * widen(scale)).astype(x.dtype), inverse.astype(element_type(stash_type).numpy)


_RMS_ATTRS = {"axis": -1, "epsilon": 1e-5, "stash_type": 1}
register(
    OpDef(
        "RMSNormalization",
        Kind.EXPAND,
        infer=_rms_infer,
        eval=rms_normalised,
        expand=_rms_expand,
        refuse=default_refuse,
        attrs=_RMS_ATTRS,
    )
)
for _domain in ("", "com.microsoft"):  # exporters and ONNX Runtime disagree on the domain
    register(
        OpDef(
            "SimplifiedLayerNormalization",
            Kind.EXPAND,
            infer=_simplified_infer,
            eval=rms_normalised,
            expand=_rms_expand,
            refuse=default_refuse,
            attrs=_RMS_ATTRS,
            domain=_domain,
        )
    )


# -- BatchNormalization (Ioffe and Szegedy, 2015)


def _batch_infer(n: Inference) -> list[TensorType]:
    x = n.shape(0)
    if not x:
        raise n.error("the input must not be a scalar")
    for i in range(1, 5):
        if n.rank(i) != 1:
            raise n.error(f"input {i} must be a vector over channels")
    return [n.type(0), n.type(3), n.type(4)]


def _batch_expand(b: Builder, node: Node) -> list[Value]:
    x, scale, bias, mean, variance = (required(node, i) for i in range(5))
    rank, dtype = x.tensor.rank, x.tensor.dtype
    wide = widened(b, x)
    extra: list[Value] = []
    if node.attrs["training_mode"]:
        axes = [a for a in range(rank) if a != 1]
        now = b.op("ReduceMean", wide, axes_of(b, axes), keepdims=1)
        centred = b.op("Sub", wide, now)
        spread = b.op("ReduceMean", b.op("Mul", centred, centred), axes_of(b, axes), keepdims=1)
        kept = node.attrs["momentum"]
        currents = [reshaped(b, v, mean.shape) for v in (now, spread)]
        for old, new in zip((mean, variance), currents):
            mixed = b.op("Mul", old, b.scalar(kept, old))
            extra.append(
                b.op("Add", mixed, b.op("Mul", as_type(b, new, old.tensor.dtype), b.scalar(1 - kept, old)))
            )
        mean, variance = currents
    scale, bias, mean, variance = (as_type(b, v, wide.tensor.dtype) for v in (scale, bias, mean, variance))
    # Everything that depends on channels only becomes one factor and one term, constants in most models.
    factor = b.op(
        "Div", scale, b.op("Sqrt", b.op("Add", variance, b.scalar(node.attrs["epsilon"], variance)))
    )
    term = b.op("Sub", bias, b.op("Mul", mean, factor))
    if rank > 1:
        factor, term = _per_channel(b, factor, rank), _per_channel(b, term, rank)
    y = b.op("Add", b.op("Mul", wide, factor), term)
    return [as_type(b, y, dtype), *extra][: len(node.outputs)]


def _batch_refuse(node: Node) -> str | None:
    if required(node, 0).tensor.shape is not None and required(node, 0).tensor.rank < 2:
        return "BatchNormalization of a vector"
    return default_refuse(node)


def _batch_eval(
    x: Array,
    scale: Array,
    bias: Array,
    mean: Array,
    variance: Array,
    *,
    epsilon: float,
    momentum: float,
    training_mode: int,
) -> tuple[Array, ...]:
    wide = widen(x)
    shape = (1, -1, *(1,) * (x.ndim - 2)) if x.ndim > 1 else (-1,)
    used_mean, used_variance = widen(mean).reshape(shape), widen(variance).reshape(shape)
    new_mean, new_variance = mean, variance
    if training_mode:
        used_mean, used_variance = _moments(wide, tuple(a for a in range(x.ndim) if a != 1))
        new_mean = (widen(mean) * momentum + used_mean.reshape(-1) * (1 - momentum)).astype(mean.dtype)
        new_variance = (widen(variance) * momentum + used_variance.reshape(-1) * (1 - momentum)).astype(
            variance.dtype
        )
    y = (wide - used_mean) / np.sqrt(used_variance + epsilon) * widen(scale).reshape(shape) + widen(
        bias
    ).reshape(shape)
    return y.astype(x.dtype), new_mean, new_variance


register(
    OpDef(
        "BatchNormalization",
        Kind.EXPAND,
        infer=_batch_infer,
        eval=_batch_eval,
        expand=_batch_expand,
        refuse=_batch_refuse,
        attrs={"epsilon": 1e-5, "momentum": 0.9, "training_mode": 0},
    )
)


# -- InstanceNormalization (Ulyanov et al., 2016) and GroupNormalization (Wu and He, 2018)


def _instance_expand(b: Builder, node: Node) -> list[Value]:
    x = required(node, 0)
    rank = x.tensor.rank
    y, _, _ = normalised(b, widened(b, x), range(2, rank), node.attrs["epsilon"])
    y = scaled_and_shifted(
        b, y, _per_channel(b, required(node, 1), rank), _per_channel(b, required(node, 2), rank)
    )
    return [as_type(b, y, x.tensor.dtype)]


@computed_in_f32
def _instance_eval(x: Array, scale: Array, bias: Array, *, epsilon: float) -> Array:
    mean, variance = _moments(x, tuple(range(2, x.ndim)))
    shape = (-1, *(1,) * (x.ndim - 2))
    return ((x - mean) / np.sqrt(variance + epsilon) * scale.reshape(shape) + bias.reshape(shape)).astype(
        x.dtype
    )


def _instance_infer(n: Inference) -> list[TensorType]:
    if n.rank(0) < 3 or n.rank(1) != 1 or n.rank(2) != 1:
        raise n.error("needs [N, C, *spatial] and vectors of scale and bias over channels")
    return same_as_float_input(n)  # type: ignore[return-value]


register(OpDef(
    "InstanceNormalization", Kind.EXPAND, infer=_instance_infer, eval=_instance_eval, expand=_instance_expand,
    refuse=default_refuse, attrs={"epsilon": 1e-5},
))  # fmt: skip


def _group_infer(n: Inference) -> list[TensorType]:
    x, groups = n.shape(0), n.attr("num_groups")
    if len(x) < 3 or groups <= 0 or (isinstance(x[1], int) and x[1] % groups):
        raise n.error(f"{groups} groups do not fit")
    for i in (1, 2):
        size = n.shape(i)
        if len(size) != 1 or (
            isinstance(size[0], int) and isinstance(x[1], int) and size[0] not in (x[1], groups)
        ):
            raise n.error(f"input {i} must be a vector over channels or groups")
    return same_as_float_input(n)  # type: ignore[return-value]


def _group_expand(b: Builder, node: Node) -> list[Value]:
    """Means of channels first and of their groups next, which suits any layout of the channels."""
    x, groups = required(node, 0), node.attrs["num_groups"]
    batch, channels, *_ = shape = x.shape
    wide, epsilon = widened(b, x), node.attrs["epsilon"]
    if isinstance(channels, int):

        def spread(mean: Value) -> Value:
            if channels == groups:
                return mean
            members = (batch, groups, channels // groups)
            of_group = b.op("ReduceMean", reshaped(b, mean, members), axes_of(b, [2]), keepdims=1)
            return reshaped(b, b.op("Expand", of_group, b.shape(members)), mean.shape)

        y, _, _ = normalised(b, wide, range(2, len(shape)), epsilon, spread)
    else:
        inner = exact_quotient(x.tensor.size, batch * groups)
        rows = reshaped(b, wide, (batch, groups, -1 if inner is None else inner))
        y, _, _ = normalised(b, rows, [2], epsilon)
        y = b.op("Reshape", y, b.shape(shape))
    vectors = []
    for vector in (required(node, 1), required(node, 2)):
        if vector.shape[0] == groups and channels != groups:  # opset 18: one number for each group
            each = b.op("Expand", reshaped(b, vector, (groups, 1)), b.shape([groups, channels // groups]))
            vector = reshaped(b, each, (channels,))
        vectors.append(_per_channel(b, vector, len(shape)))
    return [as_type(b, scaled_and_shifted(b, y, *vectors), x.tensor.dtype)]


@computed_in_f32
def _group_eval(
    x: Array, scale: Array, bias: Array, *, num_groups: int, epsilon: float, stash_type: int
) -> Array:
    rows = x.reshape(x.shape[0], num_groups, -1)
    mean, variance = _moments(rows, (2,))
    y = ((rows - mean) / np.sqrt(variance + epsilon)).reshape(x.shape)
    shape = (-1, *(1,) * (x.ndim - 2))
    vectors = [np.repeat(v, x.shape[1] // len(v)).reshape(shape) for v in (scale, bias)]
    return np.asarray(y * vectors[0] + vectors[1]).astype(x.dtype)


register(
    OpDef(
        "GroupNormalization",
        Kind.EXPAND,
        infer=_group_infer,
        eval=_group_eval,
        expand=_group_expand,
        refuse=default_refuse,
        attrs={"num_groups": REQUIRED, "epsilon": 1e-5, "stash_type": 1},
    )
)


# -- LpNormalization, MeanVarianceNormalization


def _lp_infer(n: Inference) -> list[TensorType]:
    n.axis(n.attr("axis"), n.rank(0))
    if n.attr("p") not in (1, 2):
        raise n.error(f"p must be 1 or 2, it is {n.attr('p')}")
    return same_as_float_input(n)  # type: ignore[return-value]


def _lp_expand(b: Builder, node: Node) -> list[Value]:
    x = required(node, 0)
    wide = widened(b, x)
    length = b.op(
        f"ReduceL{node.attrs['p']}", wide, axes_of(b, [node.attrs["axis"] % x.tensor.rank]), keepdims=1
    )
    zero = b.scalar(0, wide)
    y = b.op("Where", b.op("Equal", length, zero), zero, b.op("Div", wide, length))
    return [as_type(b, y, x.tensor.dtype)]


@computed_in_f32
def _lp_eval(x: Array, *, axis: int, p: int) -> Array:
    length = (
        np.abs(x).sum(axis=axis, keepdims=True)
        if p == 1
        else np.sqrt(np.square(x).sum(axis=axis, keepdims=True))
    )
    return np.asarray(np.where(length == 0, 0, x / length)).astype(x.dtype)


register(OpDef(
    "LpNormalization", Kind.EXPAND, infer=_lp_infer, eval=_lp_eval, expand=_lp_expand, refuse=default_refuse,
    attrs={"axis": -1, "p": 2},
))  # fmt: skip


def _mean_variance_expand(b: Builder, node: Node) -> list[Value]:
    x = required(node, 0)
    wide = widened(b, x)
    axes = sorted(a % x.tensor.rank for a in node.attrs["axes"])
    centred = b.op("Sub", wide, b.op("ReduceMean", wide, axes_of(b, axes), keepdims=1))
    variance = b.op("ReduceMean", b.op("Mul", centred, centred), axes_of(b, axes), keepdims=1)
    y = b.op("Div", centred, b.op("Add", b.op("Sqrt", variance), b.scalar(1e-9, wide)))
    return [as_type(b, y, x.tensor.dtype)]


@computed_in_f32
def _mean_variance_eval(x: Array, *, axes: Sequence[int]) -> Array:
    mean, variance = _moments(x, tuple(axes))
    return ((x - mean) / (np.sqrt(variance) + 1e-9)).astype(x.dtype)


register(OpDef(
    "MeanVarianceNormalization", Kind.EXPAND, infer=same_as_float_input, eval=_mean_variance_eval,
    expand=_mean_variance_expand, refuse=default_refuse, attrs={"axes": (0, 2, 3)},
))  # fmt: skip


# -- LRN (Krizhevsky et al., 2012)


def _lrn_compute(
    c: Indexing, index: tuple[Expr, ...], *, alpha: float, beta: float, bias: float, size: int
) -> Expr:
    dtype = c.type(0).dtype
    wide = f32 if dtype in (f16, bf16) else dtype
    channels = c.type(0).dims[1]

    def square(k: Expr) -> Expr:
        channel = index[1] + k - (size - 1) // 2
        clamped = expr_minimum(expr_maximum(channel, 0), channels - 1)
        value = cast(c.load(0, (index[0], clamped, *index[2:])), wide)
        return select((channel >= 0) & (channel < channels), value * value, const(0, wide))

    x = cast(c.load(0, index), wide)
    base = c.reduce("sum", [size], square) * (alpha / size) + bias
    if beta == 0.75:  # the exponent of every published model: two square roots instead of a power
        root = unary("sqrt", base)
        return cast(x / (root * unary("sqrt", root)), dtype)
    return cast(x / binary("pow", base, beta), dtype)


@computed_in_f32
def _lrn_eval(x: Array, *, alpha: float, beta: float, bias: float, size: int) -> Array:
    before = (size - 1) // 2
    padded = np.pad(np.square(x), [(0, 0), (before, size - 1 - before), *((0, 0),) * (x.ndim - 2)])
    total = sum(padded[:, k : k + x.shape[1]] for k in range(size))
    return np.asarray(x / np.power(bias + alpha / size * total, beta)).astype(x.dtype)


register(
    OpDef(
        "LRN",
        Kind.REDUCE,
        infer=same_as_float_input,
        eval=_lrn_eval,
        compute=_lrn_compute,
        refuse=default_refuse,
        attrs={"alpha": 1e-4, "beta": 0.75, "bias": 1.0, "size": REQUIRED},
    )
)
