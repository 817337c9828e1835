"""Resize: nearest, linear and cubic interpolation in every coordinate mode.

Source positions are computed in float32, as ONNX Runtime does, so ties of nearest fall the same way.
Antialiased downscaling and contents that are not known at compile time run on the host. The retired Upsample
arrives here rewritten by the frontend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from minicc.errors import ShapeError
from minicc.ir.dims import Dim, SymbolicDim, exact_quotient
from minicc.ir.expr import Expr, cast, const, dim, select, unary
from minicc.ir.expr import maximum as expr_maximum
from minicc.ir.expr import minimum as expr_minimum
from minicc.ir.opdef import Content, Indexing, Inference, Kind, OpDef, register
from minicc.ir.types import TensorType, bf16, f16, f32, i64
from minicc.ops.helpers import Array, default_refuse, unknown_dims, widen

if TYPE_CHECKING:
    from minicc.ir.graph import Node

MODES = ("nearest", "linear", "cubic")
COORDINATES = (
    "half_pixel",
    "half_pixel_symmetric",
    "pytorch_half_pixel",
    "align_corners",
    "asymmetric",
    "tf_crop_and_resize",
)
NEAREST = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")


@dataclass(frozen=True)
class AxisPlan:
    """How one axis is resized; `scale` is None for a size known only at run time (then it is target /
    source).
    """

    axis: int
    source: Dim
    target: Dim
    scale: float | None
    start: float = 0.0
    end: float = 1.0

    @property
    def unchanged(self) -> bool:
        return (
            self.source == self.target and self.scale in (None, 1.0) and (self.start, self.end) == (0.0, 1.0)
        )

    @property
    def target_width(self) -> float:
        """The target size before it was rounded down; only for static sizes."""
        assert isinstance(self.source, int) and self.scale is not None
        return self.scale * self.source


def _scaled_size(size: Dim, scale: Any, extent: float) -> Dim:
    """floor(size * extent * scale), in float32 for numbers and with a simple fraction for symbols."""
    if isinstance(scale, SymbolicDim):
        return size * scale
    if isinstance(size, int):
        return int(np.floor(np.float32(scale) * np.float32(size) * np.float32(extent)))
    fraction = Fraction(float(scale) * extent).limit_denominator(4096)
    return size * fraction.numerator // fraction.denominator


def plan(attrs: Mapping[str, Any], shape: Sequence[Dim], roi: Content | None, scales: Content | None,
         sizes: Content | None) -> list[AxisPlan] | None:  # fmt: skip
    """The plan of every axis that is resized; None when neither scales nor sizes are known.

    Raises ShapeError when lengths, policies or modes do not fit.
    """
    axes = [a % len(shape) for a in attrs["axes"]] if attrs["axes"] is not None else list(range(len(shape)))
    given = sizes if sizes is not None and sizes.size else scales
    if given is None:
        return None
    numbers = list(given.reshape(-1))
    if not numbers and all(isinstance(d, int) for d in shape):
        raise ShapeError("Resize needs scales or sizes")
    if len(numbers) != len(axes):
        raise ShapeError(f"Resize has {len(numbers)} scales or sizes for {len(axes)} axes")
    box = [0.0] * len(axes) + [1.0] * len(axes)
    if attrs["coordinate_transformation_mode"] == "tf_crop_and_resize":
        if roi is None or roi.size != 2 * len(axes):
            return None
        box = [float(v) for v in roi.reshape(-1)]
    out = []
    by_size = sizes is not None and sizes.size > 0
    policy = attrs["keep_aspect_ratio_policy"]
    common = None
    if by_size and policy != "stretch":
        if not all(isinstance(v, int) for v in (*numbers, *(shape[a] for a in axes))):
            return None
        ratios = [np.float32(v) / np.float32(shape[a]) for v, a in zip(numbers, axes)]  # type: ignore[arg-type]
        common = min(ratios) if policy == "not_larger" else max(ratios)
    for position, (axis, number) in enumerate(zip(axes, numbers)):
        start, end, size = box[position], box[position + len(axes)], shape[axis]
        target: Dim
        scale: float | None
        if common is not None:
            scale, target = float(common), int(np.floor(common * np.float32(size) + np.float32(0.5)))  # type: ignore[arg-type]
        elif by_size:
            target = number
            known = isinstance(size, int) and isinstance(target, int) and size > 0
            scale = float(np.float32(target) / np.float32(size)) if known else None  # type: ignore[arg-type]
        else:
            target = _scaled_size(size, number, end - start)
            scale = None if isinstance(number, SymbolicDim) else float(number)
        if target == size and scale is None:
            scale = 1.0
        out.append(AxisPlan(axis, size, target, scale, start, end))
    return out


def _check(n: Inference) -> None:
    for name, allowed in (
        ("mode", MODES),
        ("coordinate_transformation_mode", COORDINATES),
        ("nearest_mode", NEAREST),
        ("keep_aspect_ratio_policy", ("stretch", "not_larger", "not_smaller")),
    ):
        if n.attr(name) not in allowed:
            raise n.error(f"{name} {n.attr(name)!r} is unknown", hint=f"one of {', '.join(allowed)}")


def _infer(n: Inference) -> list[TensorType]:
    _check(n)
    shape = n.shape(0)
    for axis in n.attr("axes") or ():
        n.axis(axis, len(shape))
    if not (n.has(2) or n.has(3)):
        raise n.error("needs scales or sizes")
    try:
        plans = plan(n.attrs, shape, n.content(1), n.content(2), n.content(3))
    except ShapeError as error:
        raise n.error(error.what) from error
    if plans is None:
        return [TensorType(n.dtype(0), unknown_dims(n, len(shape)))]
    out = list(shape)
    for p in plans:
        out[p.axis] = p.target
    return [TensorType(n.dtype(0), tuple(out))]


def _refuse(node: Node) -> str | None:
    x = node.inputs[0]
    assert x is not None
    reason = default_refuse(node)
    # ROI counts only where it is used; empty scales stand for "sizes are given".
    if reason is not None and "data-dependent: input 1" not in reason:
        return reason
    contents = [v.content if v is not None else None for v in (*node.inputs[1:], None, None, None)[:3]]
    plans = plan(node.attrs, x.shape, *contents)
    if plans is None:
        return "data-dependent: sizes are not known at compile time"
    shrinks = any(not p.unchanged and (p.scale is None or p.scale < 1) for p in plans)
    if node.attrs["antialias"] and node.attrs["mode"] != "nearest" and shrinks:
        return "antialiased downscaling"
    needs_width = node.attrs["coordinate_transformation_mode"] in (
        "half_pixel_symmetric",
        "tf_crop_and_resize",
    )
    if needs_width and any(p.scale is None or not isinstance(p.source, int) for p in plans):
        return "coordinate mode with sizes known only at run time"
    return None


# -- computation


def _number(size: Dim) -> Expr:
    return const(size, f32) if isinstance(size, int) else cast(dim(size), f32)


def _scale(p: AxisPlan) -> Expr:
    return const(p.scale, f32) if p.scale is not None else _number(p.target) / _number(p.source)


def _source_position(p: AxisPlan, attrs: Mapping[str, Any], index: Expr) -> Expr:
    """Where output position `index` lies in the input, in float32."""
    mode = attrs["coordinate_transformation_mode"]
    position = cast(index, f32)
    if mode == "align_corners":
        if p.target == 1:
            return const(0, f32)
        if isinstance(p.source, int) and p.scale is not None:
            width = p.target_width
            return (
                const(0, f32)
                if width == 1
                else position * (np.float32(p.source - 1) / np.float32(width - 1)).item()
            )
        span = _number(p.target) if p.scale is None else _number(p.source) * float(np.float32(p.scale))
        return position * (_number(p.source - 1) / expr_maximum(span - 1.0, 1e-6))
    if mode == "asymmetric":
        return position / _scale(p)
    if mode == "tf_crop_and_resize":
        assert isinstance(p.source, int)
        if p.target == 1:
            return const(0.5 * (p.start + p.end) * (p.source - 1), f32)
        step = (p.end - p.start) * (p.source - 1) / (p.target - 1)  # type: ignore[operator]
        return position * step + p.start * (p.source - 1)
    centre = (position + 0.5) / _scale(p)
    if mode == "half_pixel_symmetric":
        centre = centre + _symmetric_offset(p)
    x = centre - 0.5
    if mode == "pytorch_half_pixel":
        if isinstance(p.target, int):
            return const(0, f32) if p.target == 1 else x
        return select(dim(p.target) > 1, x, const(0, f32))
    return x


def _symmetric_offset(p: AxisPlan) -> float:
    """How far half_pixel_symmetric moves positions because the size was rounded down; in float32."""
    assert isinstance(p.source, int) and isinstance(p.target, int)
    width = np.float32(p.scale) * np.float32(p.source)
    return float(np.float32(p.source) / np.float32(2) * (np.float32(1) - np.float32(p.target) / width))


def _whole_factor(p: AxisPlan, attrs: Mapping[str, Any]) -> int | None:
    """The factor f when nearest means position // f, the common case of upsampling by whole numbers."""
    mode, nearest = attrs["coordinate_transformation_mode"], attrs["nearest_mode"]
    if (mode, nearest) not in (
        ("asymmetric", "floor"),
        ("half_pixel", "round_prefer_floor"),
        ("half_pixel", "round_prefer_ceil"),
        ("pytorch_half_pixel", "round_prefer_floor"),
    ):
        return None
    factor = exact_quotient(p.target, p.source)
    exact = isinstance(factor, int) and factor >= 1 and p.scale in (None, float(factor))
    return factor if exact and (p.scale is not None or not isinstance(p.source, int)) else None  # type: ignore[return-value]


def _nearest_index(p: AxisPlan, attrs: Mapping[str, Any], index: Expr) -> Expr:
    factor = _whole_factor(p, attrs)
    if factor is not None:
        return index // factor
    x = _source_position(p, attrs, index)
    rounded = {
        "round_prefer_floor": lambda: unary("ceil", x - 0.5),
        "round_prefer_ceil": lambda: unary("floor", x + 0.5),
        "floor": lambda: unary("floor", x),
        "ceil": lambda: unary("ceil", x),
    }[attrs["nearest_mode"]]()
    return _clamped(cast(rounded, i64), p)


def _clamped(index: Expr, p: AxisPlan) -> Expr:
    return expr_minimum(expr_maximum(index, 0), p.source - 1)


def cubic_weights(t: Any, a: float) -> list[Any]:
    """Weights of the four taps around a position with fraction t (Keys, 1981)."""
    near = [((a + 2) * v - (a + 3)) * v * v + 1 for v in (t, 1 - t)]
    far = [((v * a - 5 * a) * v + 8 * a) * v - 4 * a for v in (t + 1, 2 - t)]
    return [far[0], near[0], near[1], far[1]]


def _taps(p: AxisPlan, attrs: Mapping[str, Any], index: Expr) -> list[tuple[Expr, Expr | None]]:
    """(input position, weight in float32) of every tap of an axis; weight None for 1."""
    if p.unchanged:
        return [(index, None)]
    if attrs["mode"] == "nearest":
        return [(_nearest_index(p, attrs, index), None)]
    x = _source_position(p, attrs, index)
    if attrs["mode"] == "linear":
        x = expr_minimum(expr_maximum(x, 0.0), _number(p.source - 1))
        low = cast(unary("floor", x), i64)
        t = x - unary("floor", x)
        return [(_clamped(low, p), 1 - t), (_clamped(low + 1, p), t)]
    base = unary("floor", x)
    first = cast(base, i64) - 1
    weights: list[Expr] = cubic_weights(x - base, attrs["cubic_coeff_a"])
    if attrs["exclude_outside"]:
        inside = [(first + k >= 0) & (first + k < p.source) for k in range(4)]
        weights = [select(i, w, const(0, f32)) for i, w in zip(inside, weights)]
        total = weights[0] + weights[1] + weights[2] + weights[3]
        weights = [w / total for w in weights]
    return [(_clamped(first + k, p), weights[k]) for k in range(4)]


def _compute(c: Indexing, index: tuple[Expr, ...], **attrs: Any) -> Expr:
    shape, dtype = c.type(0).dims, c.type(0).dtype
    contents = [c.content(k) if c.has(k) else None for k in (1, 2, 3)]
    plans = plan(attrs, shape, *contents)
    assert plans is not None
    wide = f32 if dtype in (f16, bf16) or dtype.is_integer else dtype
    by_axis = {p.axis: _taps(p, attrs, index[p.axis]) for p in plans}
    per_axis = [by_axis.get(a, [(i, None)]) for a, i in enumerate(index)]
    if all(len(taps) == 1 for taps in per_axis):
        out = c.load(0, [taps[0][0] for taps in per_axis])
    else:
        out = cast(_weighted(per_axis, lambda where: cast(c.load(0, where), wide), wide), dtype)
    if attrs["coordinate_transformation_mode"] == "tf_crop_and_resize":
        for p in plans:
            if not p.unchanged:
                x = _source_position(p, attrs, index[p.axis])
                outside = (x < 0.0) | (x > _number(p.source - 1))
                out = select(outside, const(attrs["extrapolation_value"], dtype), out)
    return out


def _weighted(
    per_axis: Sequence[Sequence[tuple[Expr, Expr | None]]], load: Callable[[list[Expr]], Expr], dtype: Any
) -> Expr:
    """The sum over all combinations of taps, innermost axes first so that products are shared."""

    def along(axis: int, where: list[Expr]) -> Expr:
        if axis == len(per_axis):
            return load(where)
        total: Expr | None = None
        for position, weight in per_axis[axis]:
            part = along(axis + 1, [*where, position])
            part = part if weight is None else part * cast(weight, dtype)
            total = part if total is None else total + part
        assert total is not None
        return total

    return along(0, [])


# -- evaluation: one axis at a time, taps and weights as tables


def _positions(p: AxisPlan, attrs: Mapping[str, Any]) -> Array:
    """Source positions of all output positions; computed in float32."""
    mode, source, target = attrs["coordinate_transformation_mode"], np.float32(p.source), int(p.target)  # type: ignore[arg-type]
    o = np.arange(target, dtype=np.float32)
    scale = np.float32(p.scale)
    width = scale * source
    if mode == "align_corners":
        return np.zeros(target, np.float32) if 1 in (target, width) else o * ((source - 1) / (width - 1))
    if mode == "asymmetric":
        return o / scale
    if mode == "tf_crop_and_resize":
        if target == 1:
            return np.full(1, 0.5 * (p.start + p.end) * (source - 1), dtype=np.float32)
        step = np.float32((p.end - p.start) * (p.source - 1) / (target - 1))  # type: ignore[operator]
        return np.asarray(o * step + np.float32(p.start * (p.source - 1)))  # type: ignore[operator]
    if mode == "pytorch_half_pixel" and target == 1:
        return np.zeros(1, np.float32)
    offset = (
        source / np.float32(2) * (1 - np.float32(target) / width) if mode == "half_pixel_symmetric" else 0
    )
    return np.asarray((np.float32(offset) + (o + np.float32(0.5)) / scale) - np.float32(0.5))


def _table(p: AxisPlan, attrs: Mapping[str, Any]) -> tuple[Array, Array]:
    """(input positions, weights), both [target, taps]."""
    x = _positions(p, attrs)
    assert isinstance(p.source, int)
    if attrs["mode"] == "nearest":
        rounded = {
            "round_prefer_floor": lambda: np.ceil(x - 0.5), "round_prefer_ceil": lambda: np.floor(x + 0.5),
            "floor": lambda: np.floor(x), "ceil": lambda: np.ceil(x),
        }[attrs["nearest_mode"]]()  # fmt: skip
        where = np.clip(rounded, 0, p.source - 1).astype(np.int64)
        return where[:, None], np.ones((len(where), 1))
    base = np.floor(x).astype(np.int64)
    t = (x - base).astype(np.float64)
    stretch = min(float(p.scale), 1.0) if attrs["antialias"] and p.scale is not None else 1.0
    radius = 1 if attrs["mode"] == "linear" else 2
    first = int(np.floor(-radius / stretch)) + 1
    offsets = np.arange(first, 2 - first if stretch < 1 or radius == 1 else 3)
    distance = np.abs((offsets[None, :] - t[:, None]) * stretch)
    if radius == 1:
        weights = np.clip(1 - distance, 0, None)
    else:
        a = attrs["cubic_coeff_a"]
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        weights = np.where(distance <= 1, near, np.where(distance < 2, far, 0))
    if stretch < 1:
        weights = weights / weights.sum(axis=1, keepdims=True)
    where = base[:, None] + offsets[None, :]
    if attrs["exclude_outside"]:
        weights = np.where((where < 0) | (where >= p.source), 0, weights)
        weights = weights / weights.sum(axis=1, keepdims=True)
    return np.clip(where, 0, p.source - 1), weights


def _eval(
    x: Array, roi: Array | None = None, scales: Array | None = None, sizes: Array | None = None, **attrs: Any
) -> Array:
    contents = [None if v is None else v.astype(object) for v in (roi, scales, sizes)]
    if contents[2] is not None:
        contents[2] = np.array([int(v) for v in contents[2].reshape(-1)], dtype=object)
    plans = plan(attrs, x.shape, *contents)
    if plans is None:
        raise ShapeError("Resize needs scales or sizes, and for tf_crop_and_resize a roi")
    out: Array = x
    outside: dict[int, Array] = {}
    for p in plans:
        if p.unchanged:
            continue
        where, weights = _table(p, attrs)
        if attrs["mode"] == "nearest":
            out = np.take(out, where[:, 0], axis=p.axis)
        else:
            out = out if out.dtype == np.float64 else widen(out).astype(np.float64)
            shape = (-1, *(1,) * (x.ndim - p.axis - 1))
            parts = (
                np.take(out, where[:, k], axis=p.axis) * weights[:, k].reshape(shape)
                for k in range(weights.shape[1])
            )
            out = np.asarray(sum(parts))
        if attrs["coordinate_transformation_mode"] == "tf_crop_and_resize":
            position = _positions(p, attrs)
            outside[p.axis] = (position < 0) | (position > p.source - 1)
    for axis, mask in outside.items():
        out = np.where(mask.reshape(-1, *(1,) * (x.ndim - axis - 1)), attrs["extrapolation_value"], out)
    return np.ascontiguousarray(out.astype(x.dtype))


RESIZE = register(
    OpDef(
        "Resize",
        Kind.INDEX,
        infer=_infer,
        eval=_eval,
        compute=_compute,
        refuse=_refuse,
        static_inputs=(1, 2, 3),
        attrs={
            "antialias": 0,
            "axes": None,
            "coordinate_transformation_mode": "half_pixel",
            "cubic_coeff_a": -0.75,
            "exclude_outside": 0,
            "extrapolation_value": 0.0,
            "keep_aspect_ratio_policy": "stretch",
            "mode": "nearest",
            "nearest_mode": "round_prefer_floor",
        },
    )
)
