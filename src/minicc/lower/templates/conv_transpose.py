"""ConvTranspose onto its template: output phases are ordinary convolutions over subsets of the taps."""

from __future__ import annotations

import numpy as np

from minicc.ir.dims import product
from minicc.ir.graph import Node
from minicc.kernels import packing
from minicc.kernels.domain import panel_columns
from minicc.lower.affine import row_major
from minicc.lower.context import Lowering
from minicc.lower.program import Word
from minicc.lower.templates import common
from minicc.lower.templates.conv import bias_adder, channels_last, image_index, spatial_words
from minicc.ops.spatial import channel_axis, spatial_axes, transposed_window
from minicc.targets.cpu import CpuTarget


def lower_conv_transpose(low: Lowering, node: Node, lead: Node | None) -> str:
    """Transposed convolution over one to three spatial axes with constant weights."""
    anchor, inputs = common.anchor_of(node, lead)
    x, w = inputs[0], inputs[1]
    bias = inputs[2] if len(inputs) > 2 else None
    assert x is not None and w is not None
    rank = len(x.shape) - 2
    if not common.float_dtypes(x.tensor.dtype, w.tensor.dtype):
        return f"no convolution kernel for {x.tensor.dtype}"
    if not 1 <= rank <= 3:
        return f"{rank} spatial axes"
    if w.data is None:
        return "the weights are computed at run time"
    groups, layout = anchor.attrs["group"], anchor.attrs["layout"]
    channels, per_group, *kernel = w.data.shape
    spatial = [x.shape[a] for a in spatial_axes(layout, len(x.shape))]
    geometry = transposed_window(anchor.attrs, kernel, spatial)
    if not all(isinstance(p, int) and p >= 0 for p in geometry.begin):
        return "the padding is not known at compile time"
    out = anchor.output.shape
    pixels = [out[a] for a in spatial_axes(layout, len(out))]
    index = image_index(layout, rank, per_group)
    pixel = {2 + a: s for a, s in enumerate(row_major(pixels))}
    finish = bias_adder(low, bias, channel_axis(layout, len(out)))
    space = common.epilogue(low, node, lead, [pixel], (out[0], groups, *pixels, per_group), index, finish)
    if isinstance(space, str):
        return space
    buffer, offset, strides = channels_last(low, x, layout)
    nr = panel_columns(low.target, per_group)
    # On CUDA taps keep their order, as if all were of one phase.
    phases = geometry.strides if isinstance(low.target, CpuTarget) else (1,) * rank
    key = ("pack_conv_transpose", id(w.data), nr, groups, phases, geometry.dilations, geometry.begin)
    if key not in low.constants:
        data = w.data.astype(np.float32, copy=False)
        begin = [int(p) for p in geometry.begin]  # type: ignore[arg-type]
        packed = packing.pack_conv_transpose(data, groups, phases, geometry.dilations, begin, nr)
        low.constant(packed, f"{w.name}_packed", key)
    weights = low.constants[key]
    common.emit(
        low, node, "conv_transpose", {"NR": nr},
        {"X": Word(offset, buffer), "W": Word(0, weights), "IMAGES": out[0], "GROUPS": groups, "M": product(pixels),
         "N": per_group, "C": channels // groups, "X_IMAGE": strides[0],
         **spatial_words(spatial, pixels, geometry, 3 - rank, strides[1:-1])},
        space, (buffer, weights), product(x.shape) * per_group * product(kernel) * 2,
        results=(node.outputs if lead is not None else (anchor.output,)),
    )  # fmt: skip
    return ""
