"""Geometry shared by convolutions and pooling: kernel, strides, dilations and padding resolved to dimensions.

One place turns ONNX's attributes (auto_pad, pads, ceil_mode) and an input size into padding and output sizes,
for inference, computation, numpy evaluation and templates alike. Nothing here registers an op.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minicc.errors import ShapeError
from minicc.ir.dims import Dim, ceil_divide, maximum, minimum
from minicc.ir.expr import Expr
from minicc.ir.expr import maximum as expr_maximum
from minicc.ir.expr import minimum as expr_minimum

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Window:
    """A sliding window over the spatial axes; `begin` and `end` are paddings, `output` the number of
    positions.
    """

    # Dims, plain integers when made from arrays; untyped because numpy takes only the latter.
    kernel: tuple[Any, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begin: tuple[Any, ...]
    end: tuple[Any, ...]
    output: tuple[Any, ...]

    @property
    def rank(self) -> int:
        return len(self.strides)

    def padded(self, axis: int) -> bool:
        """False when every tap of every position certainly lies inside the input."""
        return not (self.begin[axis] == 0 and self.end[axis] == 0)

    def span(self, axis: int) -> Any:
        """Input positions from the first to the last tap."""
        return (self.kernel[axis] - 1) * self.dilations[axis] + 1


def channel_axis(layout: str, rank: int) -> int:
    """Position of the channel axis of an activation of `rank` dimensions."""
    return rank - 1 if layout == "NHWC" else 1


def spatial_axes(layout: str, rank: int) -> range:
    """Positions of the spatial axes of an activation of `rank` dimensions."""
    return range(1, rank - 1) if layout == "NHWC" else range(2, rank)


def activation_shape(layout: str, batch: Any, channels: Any, spatial: Sequence[Any]) -> tuple[Any, ...]:
    """Batch, channels and spatial entries in the order of the layout; also for indices."""
    return (batch, *spatial, channels) if layout == "NHWC" else (batch, channels, *spatial)


def window(attrs: Mapping[str, Any], kernel: Sequence[Dim], spatial: Sequence[Dim]) -> Window:
    """The window of a convolution or pooling op with the given attributes over an input of `spatial` sizes.

    Raises ShapeError when the lengths of the attributes do not fit or an output size is negative.
    """
    rank = len(spatial)
    strides = tuple(attrs.get("strides") or (1,) * rank)
    dilations = tuple(attrs.get("dilations") or (1,) * rank)
    if len(kernel) != rank or len(strides) != rank or len(dilations) != rank:
        raise ShapeError(f"kernel {list(kernel)}, strides {list(strides)} and dilations {list(dilations)} "
                         f"must have one entry for each of the {rank} spatial axes")  # fmt: skip
    if any(s <= 0 for s in strides) or any(d <= 0 for d in dilations):
        raise ShapeError(f"strides {list(strides)} and dilations {list(dilations)} must be positive")
    if any(isinstance(k, int) and k <= 0 for k in kernel):
        raise ShapeError(f"kernel sizes {list(kernel)} must be positive")
    begin, end, output = [], [], []
    pads = _explicit_pads(attrs, rank)
    auto_pad = attrs.get("auto_pad") or "NOTSET"
    for axis in range(rank):
        size, stride = spatial[axis], strides[axis]
        span = (kernel[axis] - 1) * dilations[axis] + 1
        if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            positions = ceil_divide(size, stride)
            total = maximum((positions - 1) * stride + span - size, 0)
            small = total // 2
            low, high = (small, total - small) if auto_pad == "SAME_UPPER" else (total - small, small)
        else:
            low, high = (0, 0) if auto_pad == "VALID" else (pads[axis], pads[rank + axis])
            room = size + low + high - span
            if isinstance(room, int) and room < 0:
                raise ShapeError(f"a window of {span} does not fit into {size} with padding {low} and {high}")
            if attrs.get("ceil_mode"):
                # A last window that would start in the end padding does not exist.
                positions = minimum(ceil_divide(room, stride) + 1, ceil_divide(size + low, stride))
            else:
                positions = room // stride + 1
        begin.append(low)
        end.append(high)
        output.append(positions)
    return Window(tuple(kernel), strides, dilations, tuple(begin), tuple(end), tuple(output))


def transposed_window(attrs: Mapping[str, Any], kernel: Sequence[Dim], spatial: Sequence[Dim]) -> Window:
    """The window of a transposed convolution; `begin` and `end` are what is cut from its full output.

    Raises ShapeError when the lengths of the attributes do not fit.
    """
    rank = len(spatial)
    strides = tuple(attrs.get("strides") or (1,) * rank)
    dilations = tuple(attrs.get("dilations") or (1,) * rank)
    extra = tuple(attrs.get("output_padding") or (0,) * rank)
    wanted = tuple(attrs.get("output_shape") or ())[-rank:] if attrs.get("output_shape") else None
    if not len(kernel) == len(strides) == len(dilations) == len(extra) == rank or (
        wanted and len(wanted) != rank
    ):
        raise ShapeError(
            f"kernel, strides, dilations, output_padding and output_shape must have {rank} entries"
        )
    pads = _explicit_pads(attrs, rank)
    auto_pad = attrs.get("auto_pad") or "NOTSET"
    begin, end, output = [], [], []
    for axis in range(rank):
        full = (spatial[axis] - 1) * strides[axis] + extra[axis] + (kernel[axis] - 1) * dilations[axis] + 1
        low: Dim
        high: Dim
        if wanted is None and auto_pad in ("NOTSET", "VALID"):
            low, high = (0, 0) if auto_pad == "VALID" else (pads[axis], pads[rank + axis])
            size = full - low - high
        else:
            size = spatial[axis] * strides[axis] if wanted is None else wanted[axis]
            total = maximum(full - size, 0)
            small = total // 2
            low, high = (small, total - small) if auto_pad == "SAME_UPPER" else (total - small, small)
        begin.append(low)
        end.append(high)
        output.append(size)
    return Window(tuple(kernel), strides, dilations, tuple(begin), tuple(end), tuple(output))


def _explicit_pads(attrs: Mapping[str, Any], rank: int) -> tuple[int, ...]:
    pads = tuple(attrs.get("pads") or (0,) * (2 * rank))
    if len(pads) != 2 * rank:
        raise ShapeError(f"pads {list(pads)} must have {2 * rank} entries")
    return pads


def tap_position(w: Window, axis: int, position: Expr, tap: Expr, size: Dim) -> tuple[Expr, Expr | None]:
    """(input position clamped into the input, condition that it was inside; None when it always is)."""
    where = position * w.strides[axis] + tap * w.dilations[axis]
    if not w.padded(axis):
        return where, None
    where = where - w.begin[axis]
    inside = (where >= 0) & (where < size)
    return expr_minimum(expr_maximum(where, 0), size - 1), inside


def all_of(conditions: Sequence[Expr | None]) -> Expr | None:
    """The conjunction of the conditions that are not None; None when all are."""
    out: Expr | None = None
    for condition in conditions:
        if condition is not None:
            out = condition if out is None else out & condition
    return out


def to_channels_first(array: Array, layout: str) -> Array:
    """A view of an activation as [N, C, *spatial]."""
    return np.moveaxis(array, -1, 1) if layout == "NHWC" else array


def from_channels_first(array: Array, layout: str) -> Array:
    """An activation [N, C, *spatial] in the given layout."""
    return np.ascontiguousarray(np.moveaxis(array, 1, -1)) if layout == "NHWC" else array


def windows_view(array: Array, w: Window, fill: Any) -> Array:
    """Windows over [N, C, *spatial] as a view [N, C, *output, *kernel]; outside elements are `fill`."""
    spatial = array.shape[2:]
    pads = [(0, 0), (0, 0)]
    for axis, size in enumerate(spatial):
        reach = max((w.output[axis] - 1) * w.strides[axis] + w.span(axis), 0)
        pads.append((w.begin[axis], max(reach - size - w.begin[axis], 0)))
    padded = np.pad(array, pads, constant_values=fill) if any(p != (0, 0) for p in pads) else array
    steps = padded.strides
    strides = (
        *steps[:2],
        *(s * n for s, n in zip(steps[2:], w.strides)),
        *(s * d for s, d in zip(steps[2:], w.dilations)),
    )
    return np.lib.stride_tricks.as_strided(
        padded, (*array.shape[:2], *w.output, *w.kernel), strides, writeable=False
    )
