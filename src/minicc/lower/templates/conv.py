"""Conv onto the templates `gemm`, `conv`, `conv_few`, `conv_line`, `conv_expand`, `depthwise`, `winograd` and `conv_fft`:
channels last, weights packed, bias and what follows in the epilogue.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from minicc.ir.dims import Dim, ceil_divide, product
from minicc.ir.expr import Expr, cast, const, iteration
from minicc.ir.graph import Node, Value
from minicc.ir.types import f32, i64
from minicc.kernels import packing
from minicc.kernels.domain import panel_columns, tile_rows
from minicc.lower.affine import linearise, row_major
from minicc.lower.body import Space, Write
from minicc.lower.context import Lowering
from minicc.lower.program import Word
from minicc.lower.templates import common
from minicc.lower.templates.expand import (
    expanding_nodes,
    expansion_constants,
    expansion_flops,
    filled_bias,
)
from minicc.lower.templates.fft import Sides, emit_fft, fft_work, takes_fft
from minicc.lower.templates.winograd import Tile, convolution_work, emit_winograd, takes_winograd
from minicc.ops.spatial import Window, activation_shape, channel_axis, spatial_axes, window
from minicc.targets.cpu import CpuTarget

Array = np.ndarray[Any, Any]
Finish = Callable[[Expr, tuple[Expr, ...]], Expr] | None
Way = int | Tile | Sides  # columns of a panel of the direct sum; tile of outputs of Winograd's; tile of inputs of Fourier's
Place = tuple[int, Dim, tuple[Dim, ...]]  # buffer, offset, strides over [N, *spatial, C]

# Input channels, products of a pixel with a line of taps, and stride along a line up to which `conv_few` is: its code grows.
MOST_FEW, MOST_FEW_PRODUCTS, MOST_FEW_STEP = 4, 28, 4
# The same for lines that its tiles fill but for a tenth, at stride 1.
MOST_IN_FULL_LINES = 8
# Fourier transforms that are estimated to take so many times as long as another way are none.
MOST_WORSE = 2


def lower_conv(low: Lowering, node: Node, lead: Node | None) -> str:
    """Convolution of any stride, dilation, padding and group over one to three spatial axes."""
    anchor, inputs = common.anchor_of(node, lead)
    before = expanding_nodes(node, lead)
    if before:
        return _lower_expanded(low, node, anchor, before)
    x, w = inputs[0], inputs[1]
    bias = inputs[2] if len(inputs) > 2 else None
    assert x is not None and w is not None
    if not common.float_dtypes(x.tensor.dtype, w.tensor.dtype):
        return f"no convolution kernel for {x.tensor.dtype}"
    rank = len(x.shape) - 2
    if not 1 <= rank <= 3:
        return f"{rank} spatial axes"
    groups = anchor.attrs["group"]
    filters, channels, *kernel = w.shape
    if not all(isinstance(d, int) for d in (filters, channels)):
        return "the number of channels is not known at compile time"
    if w.data is None and groups > 1:
        return "grouped weights are computed at run time"
    layout = anchor.attrs["layout"]
    spatial = [x.shape[a] for a in spatial_axes(layout, len(x.shape))]
    geometry = window(anchor.attrs, kernel, spatial)
    out = anchor.output.shape
    pixels = [out[a] for a in spatial_axes(layout, len(out))]
    finish = bias_adder(low, bias, channel_axis(layout, len(out)))
    flops = product(out) * channels * product(kernel) * 2
    results = node.outputs if lead is not None else (anchor.output,)
    matrix = groups == 1 and all(k == 1 for k in kernel) and set(geometry.strides) == {1} and not any(
        geometry.padded(a) for a in range(rank))  # fmt: skip
    few = False
    ways: dict[str, Way] = {}
    if groups == 1 and not matrix and w.data is not None:
        few = _takes_few(geometry, channels, kernel, MOST_FEW)
        ways = _ways(low, w.data.shape, geometry, out[0], few)
        if isinstance(next(iter(ways.values())), int) and _fills_lines(low, geometry, filters):
            few = few or _takes_few(geometry, channels, kernel, MOST_IN_FULL_LINES)
    if few:
        way = low.choose(node, ways)
        image = _few_image(low, x, layout) if isinstance(way, int) else None
        if isinstance(way, int) and image is not None:
            return _lower_few(low, node, lead, image, w, way, geometry, spatial, finish, flops)
    buffer, offset, strides = channels_last(low, x, layout)
    if matrix and layout == "NHWC":
        walk = {axis: s for axis, s in enumerate(strides[:-1]) if s != 0}
        space = common.epilogue(low, node, lead, [walk, {}], finish=finish)
        if isinstance(space, str):
            return space
        weights, nr = _packed_matrix(low, node, w)
        (a0, a1, a_row), _ = space.strides
        e0, e1, em, en = space.extents
        common.emit(
            low, node, "gemm", {"NR": nr},
            {"A": Word(offset, buffer), "B": Word(0, weights), "M": em, "N": en, "K": channels, "A_ROW": a_row, "A_B0": a0,
             "A_B1": a1, "B_B0": 0, "B_B1": 0, "B0": e0, "B1": e1},
            space, (buffer, weights), flops, results=results, name="gemm",
        )  # fmt: skip
        return ""
    data = w.data
    if groups > 1 and data is not None and 0 < channels * groups == filters and (
            channels == 1 or (low.cpu.vector_width % channels == 0 and common.along_lines(geometry, kernel))):  # fmt: skip
        return _lower_narrow(low, node, lead, (buffer, offset, strides), w, geometry, spatial, finish, flops)
    if groups > 1 and data is not None:
        # Narrow groups are merged into wider ones with block-diagonal weights: fuller columns for the same time.
        data, groups = packing.merge_groups(data, groups, low.cpu.vector_width)
        channels = data.shape[1]
    batch, per_group = out[0], filters // groups
    axes = (batch, groups, *pixels, per_group)
    index = image_index(layout, rank, per_group)
    pixel = {2 + a: s for a, s in enumerate(row_major(pixels))}
    space = common.epilogue(low, node, lead, [pixel], axes, index, finish)
    if isinstance(space, str):
        return space
    way = low.choose(node, ways or dict(common.columns(low, per_group, "direct, ")))
    if isinstance(way, tuple):
        emit_winograd(low, node, space, (buffer, offset, strides), w, way, batch, spatial, geometry, results)
        return ""
    if isinstance(way, Sides):
        emit_fft(low, node, space, (buffer, offset, strides), w, way, batch, spatial, geometry, results)
        return ""
    weights = _packed_filters(low, node, w, data, groups, nr := way)
    pad = 3 - rank
    values: dict[str, Word | Dim] = {
        "X": Word(offset, buffer), "W": Word(0, weights), "IMAGES": batch, "GROUPS": groups, "M": product(pixels),
        "N": per_group, "C": channels, "X_IMAGE": strides[0],
        **spatial_words(spatial, pixels, geometry, pad, strides[1:-1]),
    }  # fmt: skip
    common.emit(low, node, "conv", {"NR": nr}, values, space, (buffer, weights), flops, results=results, name="conv")
    return ""


def _ways(low: Lowering, shape: Sequence[int], geometry: Window, batch: Dim, few: bool) -> dict[str, Way]:
    """The ways of a convolution of one group with constant weights of this shape, the one of least estimated work first."""
    work: list[tuple[int, Tile | Sides | None]] = []
    tiles = low.winograd and not few and takes_winograd(geometry, 1)
    frequencies = low.fft and takes_fft(geometry, 1)
    if tiles or frequencies:
        found = convolution_work(low.cpu, low.choices.rates(), shape, geometry.strides[0], batch, geometry.output, tiles)
        work += [(estimate, tile) for tile, estimate in found.items()]
    if frequencies:
        most = MOST_WORSE * min(estimate for estimate, _ in work)
        transforms = fft_work(low.cpu, low.choices.rates(), shape, geometry, batch)
        work += [(estimate, sides) for sides, estimate in transforms.items() if estimate <= most]
    ways: dict[str, Way] = {}
    for _, way in sorted(work or [(0, None)], key=lambda pair: pair[0]):
        if way is None:
            ways |= common.columns(low, shape[0], "" if few else "direct, ")
        elif isinstance(way, Sides):
            ways[f"fft {way.height}x{way.width}"] = way
        else:
            ways[f"winograd {way[0]}x{way[1]}"] = way
    return ways


def lower_depthwise(low: Lowering, node: Node, lead: Node | None) -> str:
    """A convolution with one input and one output channel per group; others are refused."""
    anchor, (x, w, *rest) = common.anchor_of(node, lead)
    assert x is not None and w is not None
    rank, layout = len(x.shape) - 2, anchor.attrs["layout"]
    if not common.float_dtypes(x.tensor.dtype, w.tensor.dtype) or not 1 <= rank <= 3:
        return f"no depthwise kernel for {x.tensor.dtype} with {rank} spatial axes"
    if w.data is None or w.data.shape[1] != 1 or anchor.attrs["group"] != w.data.shape[0]:
        return "not a depthwise convolution with constant weights"
    spatial = [x.shape[a] for a in spatial_axes(layout, len(x.shape))]
    geometry = window(anchor.attrs, w.data.shape[2:], spatial)
    finish = bias_adder(low, rest[0] if rest else None, channel_axis(layout, len(anchor.output.shape)))
    flops = product(anchor.output.shape) * product(w.data.shape[2:]) * 2
    return _lower_narrow(low, node, lead, channels_last(low, x, layout), w, geometry, spatial, finish, flops)


def _takes_few(geometry: Window, channels: Dim, kernel: Sequence[Dim], most: int) -> bool:
    """Whether `conv_few` takes these windows over so many channels, at most `most`."""
    if not isinstance(channels, int) or not isinstance(kernel[-1], int) or geometry.rank > 2:
        return False
    short = 0 < channels <= most and channels * kernel[-1] <= MOST_FEW_PRODUCTS
    return short and geometry.dilations[-1] == 1 and geometry.strides[-1] <= MOST_FEW_STEP


def _fills_lines(low: Lowering, geometry: Window, filters: Dim) -> bool:
    """Whether the pixels of a tile of `conv_few` fill a line but for a tenth, at stride 1."""
    line = geometry.output[-1]
    if not isinstance(line, int) or not isinstance(filters, int) or geometry.strides[-1] > 1:
        return False
    pixels = tile_rows(low.cpu) * (2 if panel_columns(low.cpu, filters) == low.cpu.vector_width else 1)
    return 10 * (-line % pixels) <= line


def _few_image(low: Lowering, x: Value, layout: str) -> Place | None:
    """Where the image of a convolution of few channels is, in planes or channels last; None when lines have gaps."""
    found = low.view(x, x.shape) if x.tensor.dtype == f32 else None
    if found is not None:
        batch, *others = found[2]
        channel, lines = (others[-1], others[:-1]) if layout == "NHWC" else (others[0], others[1:])
        if lines[-1] == 1:
            return found[0], found[1], (batch, *lines, channel)
    place = channels_last(low, x, layout)
    return place if place[2][-2] == x.shape[channel_axis(layout, len(x.shape))] else None


def _lower_few(low: Lowering, node: Node, lead: Node | None, x: Place, w: Value, nr: int, geometry: Window,
               spatial: Sequence[Dim], finish: Finish, flops: Dim) -> str:  # fmt: skip
    """A convolution of few input channels, whose image is read as it lies."""
    assert w.data is not None
    filters, channels, *kernel = w.data.shape
    weights = _packed_filters(low, node, w, w.data, 1, nr)
    constants = {"NR": nr, "LINE_TAPS": kernel[-1], "STEP": geometry.strides[-1], "CHANNELS": channels,
                 "PLANES": int(x[2][-2] == 1)}  # fmt: skip
    words = {"C": channels, "X_C": x[2][-1]}
    return _emit_lines(low, node, lead, "conv_few", constants, x, weights, filters, words, geometry, spatial, finish, flops)


def _lower_narrow(low: Lowering, node: Node, lead: Node | None, x: Place, w: Value,
                  geometry: Window, spatial: Sequence[Dim], finish: Finish, flops: Dim) -> str:  # fmt: skip
    """Groups of as many output as input channels, a part of a vector (in `depthwise` one): vectors over channels."""
    assert w.data is not None
    channels, group, *kernel = w.data.shape
    nr = panel_columns(low.target, channels) if group == 1 else low.cpu.vector_width
    weights = _packed_narrow(low, w, nr)
    name, constants = "depthwise", {"NR": nr}
    if isinstance(low.target, CpuTarget) and common.along_lines(geometry, kernel):
        name = "conv_line"
        constants |= {"LINE_TAPS": kernel[-1], "STEP": geometry.strides[-1], "APART": geometry.dilations[-1], "GROUP": group}
    return _emit_lines(low, node, lead, name, constants, x, weights, channels, {"C": 1}, geometry, spatial, finish, flops)


def _lower_expanded(low: Lowering, node: Node, lead: Node, before: Sequence[Node]) -> str:
    """A depthwise convolution of what the nodes before it in a fused body make of their input (see expand.py)."""
    first = before[0]
    _, (x, point, *_) = common.anchor_of(node, first)
    _, (expanded, w, *rest) = common.anchor_of(node, lead)
    assert x is not None and point is not None and expanded is not None and w is not None and w.data is not None
    channels, _, *kernel = w.data.shape
    spatial = expanded.shape[1:-1]
    geometry = window(lead.attrs, kernel, spatial)
    finish = bias_adder(low, rest[0] if rest else None, 3)
    nr = panel_columns(low.target, channels)
    panels, weights = _packed_point(low, point, nr), _packed_narrow(low, w, nr)
    constants = {"NR": nr, "LINE_TAPS": kernel[-1], "STEP": geometry.strides[-1], "APART": geometry.dilations[-1],
                 **expansion_constants(before)}  # fmt: skip
    words: dict[str, Word | Dim] = {
        "C": point.shape[1], "E": Word(0, panels), "BIAS": Word(0, filled_bias(low, first, nr)),
    }  # fmt: skip
    flops = product(lead.output.shape) * product(kernel) * 2 + expansion_flops(first)
    place = channels_last(low, x, "NHWC")
    return _emit_lines(low, node, lead, "conv_expand", constants, place, weights, channels, words, geometry, spatial, finish,
                       flops)  # fmt: skip


def _emit_lines(low: Lowering, node: Node, lead: Node | None, name: str, constants: common.Constants, x: Place, weights: int,
                channels: int, words: Mapping[str, Word | Dim], geometry: Window, spatial: Sequence[Dim], finish: Finish,
                flops: Dim) -> str:  # fmt: skip
    """A template over windows of one group. channels: of the output; words: what the templates do not share."""
    anchor, _ = common.anchor_of(node, lead)
    buffer, offset, strides = x
    out, layout = anchor.output.shape, anchor.attrs["layout"]
    pixels = [out[a] for a in spatial_axes(layout, len(out))]
    space = window_space(low, node, lead, pixels, channels, finish)
    if isinstance(space, str):
        return space
    values: dict[str, Word | Dim] = {
        "X": Word(offset, buffer), "W": Word(0, weights), "IMAGES": out[0], "GROUPS": 1, "M": product(pixels),
        "N": channels, "X_IMAGE": strides[0], **words,
        **spatial_words(spatial, pixels, geometry, 3 - len(spatial), strides[1:-1]),
    }  # fmt: skip
    results = node.outputs if lead is not None else (anchor.output,)
    common.emit(low, node, name, constants, values, space, (buffer, weights), flops, results=results)
    return ""


def window_space(low: Lowering, node: Node, lead: Node | None, pixels: Sequence[Dim], channels: Dim,
                 finish: Finish = None) -> Space | str:  # fmt: skip
    """The epilogue space (image, 1, pixel, channel) of a depthwise convolution or a pool."""
    anchor, _ = common.anchor_of(node, lead)
    index = image_index(anchor.attrs["layout"], len(pixels), channels)
    pixel = {2 + a: s for a, s in enumerate(row_major(pixels))}
    return common.epilogue(low, node, lead, [pixel], (anchor.output.shape[0], 1, *pixels, channels), index, finish)


def spatial_words(spatial: Sequence[Dim], pixels: Sequence[Dim], geometry: Window, pad: int,
                  strides: Sequence[Dim]) -> dict[str, Word | Dim]:  # fmt: skip
    """Words of the three spatial axes; the `pad` leading ones are unused."""
    one, zero = (1,) * pad, (0,) * pad
    table: dict[str, Sequence[Dim]] = {
        "X_": (*zero, *strides), "I": (*one, *spatial), "O": (*one, *pixels), "K": (*one, *geometry.kernel),
        "S": (*one, *geometry.strides), "D": (*one, *geometry.dilations), "P": (*zero, *geometry.begin),
    }  # fmt: skip
    return {f"{key}{axis}": value for key, row in table.items() for axis, value in zip("DHW", row)}


def image_index(layout: str, rank: int, per_group: Dim) -> tuple[Expr, ...]:
    """The output index at logical axes (image, group, pixel axes..., channel in the group)."""
    pixels = [iteration(2 + a) for a in range(rank)]
    channel = iteration(1) * per_group + iteration(2 + rank)
    return tuple(activation_shape(layout, iteration(0), channel, pixels))


def bias_adder(low: Lowering, bias: Value | None, axis: int) -> Finish:
    """Adds the bias of an element's channel to the accumulator."""
    if bias is None:
        return None

    def add(total: Expr, index: tuple[Expr, ...]) -> Expr:
        return total + cast(low.composer().element(bias, [index[axis]]), f32)

    return add


def channels_last(low: Lowering, x: Value, layout: str) -> Place:
    """(buffer, offset, strides over [N, *spatial, C]) of an activation with contiguous channels; a copy if need be.

    Half types become float32, 8-bit integers stay.
    """
    own = x.tensor.dtype
    dtype = f32 if own in common.FLOATS else own
    if layout == "NHWC":
        view = common.float_view if dtype == f32 else common.operand_view
        return view(low, x, x.shape, len(x.shape) - 1)
    order = (0, *range(2, len(x.shape)), 1)
    shape = [x.shape[a] for a in order]
    found = low.view(x, x.shape) if own == dtype else None
    if found is not None and (found[2][1] == 1 or x.shape[1] == 1):
        return found[0], found[1], tuple(found[2][a] if a != 1 or x.shape[1] != 1 else 1 for a in order)
    number = low.temporary(f"{x.name}_nhwc", dtype, shape)
    index = [iteration(a) for a in range(len(shape))]
    source: list[Expr] = [const(0, i64)] * len(shape)
    for position, axis in zip(index, order):
        source[axis] = position
    element = cast(low.composer().element(x, source), dtype)
    low.emit_writes([Write(number, dtype, linearise(index, shape), element)], shape, (), "to_channels_last")
    return number, 0, row_major(shape)


def _packed_narrow(low: Lowering, w: Value, nr: int) -> int:
    """Panels of the constant weights of narrow groups."""
    assert w.data is not None
    key = ("pack_narrow", id(w.data), nr)
    if key not in low.constants:
        low.constant(packing.pack_narrow(w.data.astype(np.float32, copy=False), nr), f"{w.name}_packed", key)
    return low.constants[key]


def _packed_matrix(low: Lowering, node: Node, w: Value) -> tuple[int, int]:
    """(panels of a 1x1 kernel as a right operand, NR)."""
    nr = low.choose(node, common.columns(low, w.shape[0]))
    return _packed_point(low, w, nr) if w.data is not None else _packed_at_run_time(low, node, w, nr, 0), nr


def _packed_point(low: Lowering, w: Value, nr: int) -> int:
    """Panels of the constant weights of a 1x1 kernel as a right operand."""
    assert w.data is not None
    key = ("pack_1x1", id(w.data), nr)
    if key not in low.constants:
        matrix = w.data.reshape(w.data.shape[:2]).T.astype(np.float32, copy=False)
        low.constant(packing.pack_b(matrix, nr), f"{w.name}_packed", key)
    return low.constants[key]


def _packed_filters(low: Lowering, node: Node, w: Value, data: Array | None, groups: int, nr: int) -> int:
    """Panels per tap, with the zero row behind them, of constant weights `data`, or of weights the model computes."""
    if data is not None:
        key = ("pack_conv", id(w.data), nr, groups)
        if key not in low.constants:
            low.constant(packing.pack_conv(data.astype(np.float32, copy=False), groups, nr), f"{w.name}_packed", key)
        return low.constants[key]
    return _packed_at_run_time(low, node, w, nr, w.shape[-1] * w.shape[1])


def _packed_at_run_time(low: Lowering, node: Node, w: Value, nr: int, tail: Dim) -> int:
    """Panels of weights that the model computes (one group), followed by `tail` zeros."""
    filters, channels, *kernel = w.shape
    taps = product(kernel)
    source, offset = (low.buffer(w) if w.tensor.dtype == f32 else common.as_float(low, w)), 0
    size = ceil_divide(filters, nr) * taps * channels * nr + tail
    target = low.temporary(f"{w.name}_packed", f32, (size,))
    common.emit(
        low, node, "pack", {"NR": nr},
        {"SOURCE": Word(offset, source), "TARGET": Word(0, target), "N": filters, "C": channels, "TAPS": taps,
         "S_N": channels * taps, "S_C": taps, "S_TAP": 1, "B0": 1, "B1": 1, "TAIL": tail},
        None, (source,), 0, writes=(target,), cost=size // 4,
    )  # fmt: skip
    return target
