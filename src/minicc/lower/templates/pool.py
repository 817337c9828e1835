"""MaxPool and AveragePool onto the `pool` template."""

from __future__ import annotations

import numpy as np

from minicc.ir.dims import product
from minicc.ir.graph import Node
from minicc.kernels.domain import panel_columns
from minicc.lower.context import Lowering
from minicc.lower.program import Word
from minicc.lower.templates import common
from minicc.lower.templates.conv import channels_last, spatial_words, window_space
from minicc.ops.spatial import channel_axis, spatial_axes, window


def lower_pool(low: Lowering, node: Node, lead: Node | None) -> str:
    """Pools over one to three spatial axes with a known number of channels and without an output of indices."""
    anchor, inputs = common.anchor_of(node, lead)
    x = inputs[0]
    assert x is not None
    rank = len(x.shape) - 2
    if not common.float_dtypes(x.tensor.dtype):
        return f"no pooling kernel for {x.tensor.dtype}"
    if not 1 <= rank <= 3:
        return f"{rank} spatial axes"
    if len(anchor.outputs) > 1:
        return "the positions of the maxima are asked for"
    layout = anchor.attrs["layout"]
    channels = x.shape[channel_axis(layout, len(x.shape))]
    if not isinstance(channels, int):
        return "the number of channels is not known at compile time"
    spatial = [x.shape[a] for a in spatial_axes(layout, len(x.shape))]
    geometry = window(anchor.attrs, list(anchor.attrs["kernel_shape"]), spatial)
    buffer, offset, strides = channels_last(low, x, layout)
    out = anchor.output.shape
    pixels = [out[a] for a in spatial_axes(layout, len(out))]
    space = window_space(low, node, lead, pixels, channels)
    if isinstance(space, str):
        return space
    average = anchor.op.name == "AveragePool"
    padding = 0.0 if average else -np.inf
    row = low.constant(np.full(channels, padding, np.float32), "padding", ("padding", padding, channels))
    ends = (0,) * (3 - rank) + geometry.end
    common.emit(
        low, node, "pool", {"NR": panel_columns(low.target, channels), "AVERAGE": int(average)},
        {"X": Word(offset, buffer), "W": Word(0, row), "IMAGES": out[0], "GROUPS": 1, "M": product(pixels), "N": channels,
         "C": 1, "X_IMAGE": strides[0], **spatial_words(spatial, pixels, geometry, 3 - rank, strides[1:-1]),
         **{f"E_{axis}": end for axis, end in zip("DHW", ends)}, "COUNT_PAD": int(average and anchor.attrs["count_include_pad"])},
        space, (buffer, row), product(out) * product(geometry.kernel),
        results=(node.outputs if lead is not None else (anchor.output,)), name=anchor.op.name.lower(),
    )  # fmt: skip
    return ""
