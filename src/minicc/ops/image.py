"""Col2Im: overlapping blocks summed back into an image.

ImageDecoder is not supported: decoding a file format is no tensor computation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product as cartesian
from typing import Any

import numpy as np

from minicc.errors import ShapeError
from minicc.ir.dims import Dim, SymbolicDim
from minicc.ir.expr import Expr, cast, const, equal, select
from minicc.ir.expr import maximum as expr_maximum
from minicc.ir.expr import minimum as expr_minimum
from minicc.ir.opdef import Indexing, Inference, Kind, OpDef, register
from minicc.ir.types import TensorType
from minicc.ops.conv import wide_dtype
from minicc.ops.helpers import Array, computed_in_f32, default_refuse, unknown_dims
from minicc.ops.spatial import Window, all_of, window


def _numbers(content: Any) -> list[Dim]:
    return [v if isinstance(v, SymbolicDim) else int(v) for v in np.asarray(content).reshape(-1)]


def _blocks(attrs: Mapping[str, Any], image: Sequence[Dim], block: Sequence[Dim]) -> Window:
    return window({**attrs, "auto_pad": "NOTSET"}, block, image)


def _infer(n: Inference) -> list[TensorType]:
    x, image, block = n.shape(0), n.content(1), n.content(2)
    if len(x) != 3:
        raise n.error("the input must be [batch, channels * block size, blocks]")
    if image is None or block is None:
        rank = n.shape(1)[0]
        if not isinstance(rank, int):
            return [TensorType(n.dtype(0), None)]
        return [TensorType(n.dtype(0), (x[0], *unknown_dims(n, rank + 1)))]
    channels = x[1]
    for size in _numbers(block):
        channels = channels // size
    try:
        geometry = _blocks(n.attrs, _numbers(image), _numbers(block))
    except ShapeError as error:
        raise n.error(error.what) from error
    count = np.prod(np.array(geometry.output, dtype=object))
    if isinstance(count, int) and isinstance(x[2], int) and count != x[2]:
        raise n.error(f"{x[2]} blocks are given, the image has {count}")
    return [TensorType(n.dtype(0), (x[0], channels, *_numbers(image)))]


def _compute(c: Indexing, index: tuple[Expr, ...], **attrs: Any) -> Expr:
    image, block = _numbers(c.content(1)), _numbers(c.content(2))
    geometry = _blocks(attrs, image, block)
    dtype = c.type(0).dtype
    wide = wide_dtype(dtype)
    batch, channel, *positions = index

    def term(*taps: Expr) -> Expr:
        row, column = channel, const(0, dtype=positions[0].dtype)
        conditions: list[Expr] = []
        for axis, (position, tap) in enumerate(zip(positions, taps)):
            scaled = position + geometry.begin[axis] - tap * geometry.dilations[axis]
            place = scaled // geometry.strides[axis]
            conditions += [
                (place >= 0) & (place < geometry.output[axis]),
                equal(place * geometry.strides[axis], scaled),
            ]
            row = row * block[axis] + tap
            clamped = expr_minimum(expr_maximum(place, 0), geometry.output[axis] - 1)
            column = column * geometry.output[axis] + clamped
        inside = all_of(conditions)
        assert inside is not None
        return select(inside, cast(c.load(0, (batch, row, column)), wide), const(0, wide))

    return cast(c.reduce("sum", block, term), dtype)


@computed_in_f32
def _eval(x: Array, image_shape: Array, block_shape: Array, **attrs: Any) -> Array:
    image, block = [int(v) for v in image_shape], [int(v) for v in block_shape]
    geometry = _blocks(attrs, image, block)
    channels = x.shape[1] // int(np.prod(block))
    columns = x.reshape(x.shape[0], channels, *block, *geometry.output)
    sizes = [int(size + low + high) for size, low, high in zip(image, geometry.begin, geometry.end)]
    padded = np.zeros((x.shape[0], channels, *sizes), dtype=x.dtype)
    for tap in cartesian(*map(range, block)):
        place: tuple[Any, ...] = tuple(
            slice(t * d, t * d + (count - 1) * s + 1, s)
            for t, d, count, s in zip(tap, geometry.dilations, geometry.output, geometry.strides)
        )
        target: tuple[Any, ...] = (..., *place)
        source: tuple[Any, ...] = (slice(None), slice(None), *tap)
        padded[target] += columns[source]
    cut = tuple(slice(low, low + size) for low, size in zip(geometry.begin, image))
    kept: tuple[Any, ...] = (..., *cut)
    return np.ascontiguousarray(padded[kept])


register(
    OpDef(
        "Col2Im",
        Kind.REDUCE,
        infer=_infer,
        eval=_eval,
        compute=_compute,
        refuse=default_refuse,
        static_inputs=(1, 2),
        attrs={"dilations": None, "pads": None, "strides": None},
    )
)
