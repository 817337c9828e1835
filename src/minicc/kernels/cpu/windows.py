"""Windows that slide over channels-last memory, as tables of addresses.

Per output pixel and tap the table holds the address of the input pixel under the tap, or of a row that
stands for padding. Up to three spatial axes (D, H, W; unused ones have extent 1).
"""

# ruff: noqa: ARG001  (Numba prescribes the parameters of intrinsics and of their emitters)

import numpy as np
from numba.core import cgutils, types
from numba.extending import intrinsic

from minicc.kernels.cpu.intrinsics import I64, address, arg, helper, ld_scratch, off, ptr_f32, st_scratch

# The first words of the templates that use windows. X_* are strides in elements; I*, O*, K*, S*, D*, P* are
# input and output extents, kernel extents, strides, dilations and leading pads of the axes.
X = 0
W = 1
IMAGES = 2
GROUPS = 3
M = 4  # output pixels of an image
N = 5  # output channels of a group
C = 6  # input channels of a group
X_IMAGE = 7
X_D = 8
X_H = 9
X_W = 10
ID = 11
IH = 12
IW = 13
OD = 14
OH = 15
OW = 16
KD = 17
KH = 18
KW = 19
SD = 20
SH = 21
SW = 22
DD = 23
DH = 24
DW = 25
PD = 26
PH = 27
PW = 28

# A bound that no position reaches.
FAR = 1 << 40


@intrinsic
def copy_floats(typing_context, target, source, count):
    """Copy `count` float32 (memcpy: a loop here would be unrolled and vectorised out of proportion)."""

    def emit(context, builder, signature, values):
        cgutils.raw_memcpy(builder, values[0], values[1], values[2], 4, align=4)
        return context.get_dummy_value()

    return types.void(types.CPointer(types.float32), types.CPointer(types.float32), types.int64), emit


@intrinsic
def set_zero(typing_context, target, count):
    """Set `count` float32 to zero."""

    def emit(context, builder, signature, values):
        cgutils.memset(builder, values[0], builder.mul(values[1], I64(4)), 0)
        return context.get_dummy_value()

    return types.void(types.CPointer(types.float32), types.int64), emit


@helper
def fill_table(args, x, size, padding, rows, i_begin, i_end, columns, first, count, table):
    """The addresses of `count` taps from `first` on for pixels i_begin .. i_end: table [row tile][tap][rows].

    x, padding: byte addresses of the image and of the row that stands for padding. A last row tile repeats
    its last pixel.
    size:    bytes of an element.
    columns: taps along W: KW, or 1 when whole runs of KW pixels are one tap; then W is not checked here.
    """
    kh = arg(args, KH)
    area = kh * columns
    first_d = first // area
    first_h = (first - first_d * area) // columns
    first_w = first - first_d * area - first_h * columns
    dd = arg(args, DD)
    dh = arg(args, DH)
    dw = arg(args, DW)
    id_ = arg(args, ID)
    ih = arg(args, IH)
    oh = arg(args, OH)
    ow = arg(args, OW)
    x_d = arg(args, X_D)
    x_h = arg(args, X_H)
    x_w = arg(args, X_W)
    runs = columns < arg(args, KW)
    w_bound = FAR if runs else arg(args, IW)
    w_shift = FAR // 2 if runs else 0
    column = i_begin % ow
    line = i_begin // ow % oh
    plane = i_begin // ow // oh
    last = i_end - i_begin - 1
    entries = table
    before = table  # the addresses of the pixel before
    is_free = False  # whether its taps were all inside, and the next pixel is on the same line
    step = size * arg(args, SW) * x_w
    reach_d = (arg(args, KD) - 1) * dd
    reach_h = (kh - 1) * dh
    reach_w = 0 if runs else (columns - 1) * dw
    r = 0
    for inner in range((last + rows) // rows * rows):
        d = plane * arg(args, SD) - arg(args, PD)
        h = line * arg(args, SH) - arg(args, PH)
        w = column * arg(args, SW) - arg(args, PW)
        inside_d = (d >= 0) & (d + reach_d < id_)
        inside_h = (h >= 0) & (h + reach_h < ih)
        inside_w = runs | ((w >= 0) & (w + reach_w < arg(args, IW)))
        all_inside = inside_d & inside_h & inside_w
        if inner > last or (is_free and all_inside):
            # The same addresses, moved by a pixel: most of an image.
            moved = step if inner <= last else 0
            for t in range(count):
                st_scratch(entries, t * rows + r, ld_scratch(before, t * rows) + moved)
        else:
            d += first_d * dd
            h += first_h * dh
            w += first_w * dw
            h_end = line * arg(args, SH) - arg(args, PH) + kh * dh
            w_end = column * arg(args, SW) - arg(args, PW) + columns * dw
            for t in range(count):
                # Unsigned, so that negative positions are too large.
                inside = (
                    (np.uint64(d) < np.uint64(id_))
                    & (np.uint64(h) < np.uint64(ih))
                    & (np.uint64(w + w_shift) < np.uint64(w_bound))
                )
                at = x + size * (d * x_d + h * x_h + w * x_w)
                st_scratch(entries, t * rows + r, at if inside else padding)
                w += dw
                if w == w_end:
                    w -= columns * dw
                    h += dh
                    if h == h_end:
                        h -= kh * dh
                        d += dd
        before = off(entries, r)
        is_free = all_inside and column + 1 < ow
        r += 1
        if r == rows:
            r = 0
            entries = off(entries, rows * count)
        if inner < last:
            column += 1
            if column == ow:
                column = 0
                line += 1
                if line == oh:
                    line = 0
                    plane += 1


@helper
def assemble_runs(args, padding, rows, i_begin, i_end, count, table, scratch):
    """Replace runs of KW pixels that leave their line by copies with zeros.

    scratch: [row tile][tap][rows][KW * C].
    """
    ow = arg(args, OW)
    kw = arg(args, KW)
    iw = arg(args, IW)
    c = arg(args, C)
    column = i_begin % ow
    last = i_end - i_begin - 1
    for inner in range((last + rows) // rows * rows):
        w0 = column * arg(args, SW) - arg(args, PW)
        if w0 < 0 or w0 + kw > iw:
            first = inner // rows * rows * count + inner % rows
            start = min(max(-w0, 0), kw) * c
            stop = max(min(iw - w0, kw), 0) * c
            for t in range(count):
                at = ld_scratch(table, first + t * rows)
                if at != padding:
                    run = ptr_f32(at)
                    copy = off(scratch, (first + t * rows) * kw * c)
                    set_zero(copy, kw * c)
                    copy_floats(off(copy, start), off(run, start), stop - start)
                    st_scratch(table, first + t * rows, address(copy))
        if inner < last:
            column += 1
            if column == ow:
                column = 0


@helper
def drop_padding(padding, rows, tiles, count, table, kept):
    """Move the addresses of taps that lie in the image for some row of their tile together: nothing is added by the others.

    kept: int64 [row tile][1 + count], how many these are and their numbers.
    """
    for tile in range(tiles):
        entries = off(table, tile * count * rows)
        numbers = off(kept, tile * (1 + count))
        found = 0
        for t in range(count):
            inside = False
            for r in range(rows):
                inside = inside | (ld_scratch(entries, t * rows + r) != padding)
            if inside:
                found += 1
                st_scratch(numbers, found, t)
                if found <= t:
                    for r in range(rows):
                        st_scratch(entries, (found - 1) * rows + r, ld_scratch(entries, t * rows + r))
        st_scratch(numbers, 0, found)
