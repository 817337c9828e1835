"""How templates are tiled and cut into units: tile shapes of a target, blocking words of a call.

Pure integer arithmetic over the words of one call; the caches and vector registers come from the target.
"""

# ruff: noqa: ARG001  (all domain functions have the same parameters)

from __future__ import annotations

from collections.abc import Mapping

from minicc.kernels.cpu.fft_sizes import INPUTS as FFT_INPUTS
from minicc.kernels.cpu.fft_sizes import frequencies, most_tiles
from minicc.kernels.winograd_axes import side
from minicc.targets.cpu import CpuTarget
from minicc.targets.cuda import CudaTarget

Words = dict[str, int]

# A unit of work below this many multiply-adds is not worth a chunk of its own (about 10 us on one core).
MIN_UNIT = 400_000
UNITS_PER_THREAD = 6


def ceil_divide(a: int, b: int) -> int:
    """a / b rounded up, for b > 0."""
    return -(-a // b)


def tile_rows(target: CpuTarget) -> int:
    """MR: rows of a product tile. Of NR = two vectors: 8 x 32 (AVX-512), 6 x 16 (AVX2), 6 x 8, 8 x 8 (NEON).

    Not taller where registers would allow it: 12 rows whose stride is a multiple of 4 KB evict each other
    from an 8-way L1 cache (measured: 12 x 32 loses 11 % at K = 3072).
    """
    return 8 if target.vector_registers >= 32 else 6


def panel_columns(target: CpuTarget | CudaTarget, columns: int | None) -> int:
    """NR: columns of a packed panel for a right operand of so many columns (None: not known at compile time).

    Two vectors, or one when the second would be padding in a narrow operand. On CUDA the lanes of a warp.
    """
    if isinstance(target, CudaTarget):
        return 32
    width = target.vector_width
    narrow = columns is not None and columns <= 7 * width and ceil_divide(columns, width) % 2 == 1
    return width if narrow else 2 * width


def tile_constants(target: CpuTarget, columns: int) -> dict[str, int]:
    """The constants MR, NR, VW and TILE of kernels made of product tiles; `columns` is NR."""
    rows = tile_rows(target)
    return {"MR": rows, "NR": columns, "VW": target.vector_width, "TILE": rows * columns}


def _blocks(extent: int, most: int) -> tuple[int, int]:
    """(units per block, blocks): equal blocks of at most `most`."""
    blocks = max(1, ceil_divide(extent, max(1, most)))
    size = max(1, ceil_divide(extent, blocks))
    return size, ceil_divide(extent, size)


def _split(rows: int, panels: int, others: int, wanted: int) -> tuple[int, int]:
    """Cut blocks of (rows, panels) into `wanted` units or more: rows down to 8 tiles, then panels, then single tiles."""
    needed = ceil_divide(wanted, others)
    row_blocks = max(1, min(needed, ceil_divide(rows, 8)))
    panel_blocks = min(panels, ceil_divide(needed, row_blocks))
    row_blocks = max(row_blocks, min(rows, ceil_divide(needed, panel_blocks)))
    return ceil_divide(rows, row_blocks), ceil_divide(panels, panel_blocks)


def _share_out(
    tiles: int, panels: int, batches: int, block: tuple[int, int], wanted: int, threads: int
) -> tuple[int, int]:
    """Cut blocks of (rows, panels) into about `wanted` units, or down to half of them where threads then get equal shares.

    Many small units rather than few large ones: a thread that is late or loses its core holds up one of them only.
    """
    rows, columns = best = block
    others = batches * ceil_divide(tiles, rows) * ceil_divide(panels, columns)
    most = ceil_divide(wanted, threads) if wanted > 1 else 0
    least = 0
    for count in range(most, max(0, (most - 1) // 2), -1):
        height, breadth = _split(rows, columns, others, count * threads)
        units = batches * ceil_divide(tiles, height) * ceil_divide(panels, breadth)
        share = ceil_divide(units, threads) * height * breadth
        if not least or share < least - least // 32:
            best, least = (height, breadth), share
    return best


def product_blocks(
    m: int,
    n: int,
    k: int,
    batches: int,
    columns: int,
    target: CpuTarget,
    threads: int,
    *,
    row_bytes: int | None = None,
    most_tiles: int = 1 << 30,
) -> tuple[int, int, int]:
    """(row tiles per unit, panels per unit, units) of `batches` products of (m, k) by (k, n).

    row_bytes: memory that one more row of the left operand touches, when that is less than k floats.
    most_tiles: bound of row tiles per unit.

    A unit's rows of the left operand take at most a quarter of L2, its panels at most half; units are small
    enough to occupy all threads and large enough to be worth handing out.
    """
    if m == 0 or n == 0 or batches == 0:
        return 1, 1, 0
    mr = tile_rows(target)
    tiles, panels = ceil_divide(m, mr), ceil_divide(n, columns)
    depth_bytes = 4 * max(1, k)
    touched = mr * (depth_bytes if row_bytes is None else row_bytes)
    row_tiles, row_blocks = _blocks(tiles, min(most_tiles, target.l2_bytes // 4 // touched))
    block_panels, panel_blocks = _blocks(panels, target.l2_bytes // 2 // (columns * depth_bytes))
    if threads > 1:
        work = batches * m * n * max(1, k)
        wanted = min(threads * UNITS_PER_THREAD, work // MIN_UNIT)
        row_tiles, block_panels = _share_out(tiles, panels, batches, (row_tiles, block_panels), wanted, threads)
        row_blocks, panel_blocks = ceil_divide(tiles, row_tiles), ceil_divide(panels, block_panels)
    return row_tiles, block_panels, batches * row_blocks * panel_blocks


def gemm_domain(w: Words, constants: Mapping[str, int], target: CpuTarget, threads: int) -> int:
    """Fill ROW_TILES and PANELS of a gemm call; the number of units."""
    w["ROW_TILES"], w["PANELS"], units = product_blocks(
        w["M"], w["N"], w["K"], w["B0"] * w["B1"], constants["NR"], target, threads
    )
    return units


# As in kernels/cpu/gemm_bits.py and gemm_rounded.py: rows of a unit at most.
BITS_ROWS = 64


def bits_domain(w: Words, constants: Mapping[str, int], target: CpuTarget, threads: int) -> int:
    """Fill HEIGHT and PANELS of a product with weights of few bits; the number of units.

    Rows are cut evenly; panels, which nothing else reads, as finely as pays for the threads.
    """
    m, panels, batches = w["M"], ceil_divide(w["N"], constants["NR"]), w["B0"] * w["B1"]
    if m == 0 or panels == 0 or batches == 0:
        w["HEIGHT"] = w["PANELS"] = 1
        return 0
    mr = tile_rows(target)
    blocks = ceil_divide(m, BITS_ROWS)
    height = min(BITS_ROWS, ceil_divide(ceil_divide(m, blocks), mr) * mr)
    row_blocks = ceil_divide(m, height)
    worth = MIN_UNIT // max(1, min(m, height) * constants["NR"] * w["K"])
    share = ceil_divide(panels * row_blocks * batches, threads * UNITS_PER_THREAD)
    w["HEIGHT"], w["PANELS"] = height, panels if threads == 1 else max(1, min(worth, share))
    return batches * row_blocks * ceil_divide(panels, w["PANELS"])


def round_domain(w: Words, constants: Mapping[str, int], target: CpuTarget, threads: int) -> int:
    """One unit is one row."""
    return w["M"] * w["B0"] * w["B1"]


def pack_domain(w: Words, constants: Mapping[str, int], target: CpuTarget, threads: int) -> int:
    """One unit is one panel of one batch."""
    return w["B0"] * w["B1"] * ceil_divide(w["N"], constants["NR"])


# As in kernels/cpu/conv.py: entries of a kernel's address table and floats of its scratch (both on the
# stack), and how many taps are in the table at once.
TABLE = 4096
SCRATCH = 8192
TAPS = 512
# With more input channels than this, single taps are long enough.
MERGED_CHANNELS = 32


def conv_domain(w: Words, constants: Mapping[str, int], target: CpuTarget, threads: int) -> int:
    """Fill MERGED, ROW_TILES and PANELS of a convolution; the number of units."""
    mr, c = tile_rows(target), w["C"]
    all_taps = w["KD"] * w["KH"] * w["KW"]
    contiguous = w["X_W"] == c and w["DW"] == 1 and w["KW"] > 1
    merged = contiguous and c <= MERGED_CHANNELS and mr * all_taps * c <= SCRATCH
    taps = w["KD"] * w["KH"] if merged else all_taps
    w["MERGED"] = int(merged)
    most_tiles = TABLE // (mr * taps) if taps <= TAPS else 1
    if merged:
        most_tiles = min(most_tiles, SCRATCH // (mr * all_taps * c))
    step = min(w["SD"] * w["SH"] * w["SW"], all_taps)
    w["ROW_TILES"], w["PANELS"], units = product_blocks(
        w["M"],
        w["N"],
        all_taps * c,
        w["IMAGES"] * w["GROUPS"],
        constants["NR"],
        target,
        threads,
        row_bytes=4 * max(1, c * step),
        most_tiles=most_tiles,
    )
    if taps > TAPS and units:  # sums over parts of the taps stay in one tile
        w["PANELS"] = 1
        units = w["IMAGES"] * w["GROUPS"] * ceil_divide(w["M"], mr) * ceil_divide(w["N"], constants["NR"])
    return units


def _longest_share(units: int, threads: int) -> int:
    """How many units one thread gets when equal chunks, several for each thread, are handed out in turn."""
    chunk = ceil_divide(units, threads * UNITS_PER_THREAD)
    before_last = ceil_divide(units, chunk) - 1
    rounds, waiting = divmod(before_last, threads)
    return rounds * chunk + (chunk if waiting else units - before_last * chunk)


def _product_rows(rows: int, mr: int, streamed: bool) -> int:
    """In the time of how many rows of whole product tiles so many are done; the last tiles may be low.

    streamed: the weights of a panel do not stay in L1, and reading them takes as long as three quarters of a tile.
    """
    rest = rows % mr
    low_tiles = 0 if rest == 0 else 1 if rest <= 4 or rest == mr - 1 else 2
    return rows - rest + (max(rest, low_tiles * 3 * mr // 4) if streamed else rest)


# As in kernels/cpu/winograd.py: tiles in a block, and floats of their inputs in Winograd's form (both on the stack).
WINOGRAD_BLOCK = 32
WINOGRAD_INPUTS = 294912
# In the time a value goes into Winograd's form or comes out, a core does so many multiply-adds of a product; in the
# time a weight comes from memory, or from a cache that holds 10 times as much as L2, so many.
WINOGRAD_VALUE = 8
WEIGHT_FROM_MEMORY, WEIGHT_FROM_CACHE = 28, 4


def winograd_domain(w: Words, constants: Mapping[str, int], target: CpuTarget, threads: int) -> int:
    """Fill TILES and PANELS of a Winograd convolution; the number of units."""
    height, width, stride, taps = (constants[name] for name in ("OUT_H", "OUT_W", "STRIDE", "TAPS"))
    tiles = w["IMAGES"] * ceil_divide(w["OH"], height) * ceil_divide(w["OW"], width)
    depth = side(height, stride, taps) * side(width, stride, taps) * w["C"]
    # Inputs take at most 5/8 of L2, but two product tiles share a weight even so.
    wide = max(2 * tile_rows(target), target.l2_bytes * 5 // 32 // depth)
    most = max(1, min(WINOGRAD_BLOCK, WINOGRAD_INPUTS // depth, wide))
    return _transformed_domain(w, constants, target, threads, (tiles, most, depth, w["C"], 1, WINOGRAD_VALUE))


# In the time a value goes into Fourier's form or comes out, a core does so many multiply-adds.
FFT_VALUE = 10


def fft_block(height: int, width: int, channels: int, target: CpuTarget) -> int:
    """The most tiles of height x width inputs in a block: inputs and products take at most 7/8 of L2."""
    columns = target.vector_width
    row, count = max(channels, columns), 2 * frequencies(height, width)
    wide = target.l2_bytes * 7 // 32 // (count * (row + columns))
    return max(1, min(most_tiles(height, width, columns), FFT_INPUTS // (count * row), wide))


def fft_domain(w: Words, constants: Mapping[str, int], target: CpuTarget, threads: int) -> int:
    """Fill TILES and PANELS of a convolution by Fourier transforms; the number of units. As `winograd_domain`."""
    height, width, columns = constants["SIDE_H"], constants["SIDE_W"], constants["NR"]
    tiles = w["IMAGES"] * ceil_divide(w["OH"], constants["OUT_H"]) * ceil_divide(w["OW"], constants["OUT_W"])
    row, most = max(w["C"], columns), fft_block(height, width, w["C"], target)
    depth = 2 * frequencies(height, width) * row
    return _transformed_domain(w, constants, target, threads, (tiles, most, depth, row, 2, FFT_VALUE))


def _transformed_domain(w: Words, constants: Mapping[str, int], target: CpuTarget, threads: int,
                        sizes: tuple[int, int, int, int, int, int]) -> int:  # fmt: skip
    """Fill TILES and PANELS of a convolution in a transformed space; the number of units.

    sizes: tiles; the most of them in a block; floats of one; those of its channels; multiply-adds per float and column;
        those in the time of a value's transform.

    Taken is what occupies the threads for the shortest time: blocks of panels share the weights out but each
    transforms its inputs again, blocks of tiles read the weights again.
    """
    tiles, most, depth, c, products, value = sizes
    columns = constants["NR"]
    panels, mr = ceil_divide(w["N"], columns), tile_rows(target)
    if tiles == 0 or panels == 0:
        w["TILES"] = w["PANELS"] = 1
        return 0
    most = min(most, tiles)
    shares = [threads * k for k in range(1, UNITS_PER_THREAD + 1)] if threads > 1 else []
    blocks = {most, max(1, most // mr * mr), *(ceil_divide(tiles, share) for share in shares)}
    best = (0, 0, 0, 0)
    for block in sorted((size for size in blocks if size <= most), reverse=True):
        rows = _product_rows(block, mr, 4 * c * columns > target.l1_bytes)
        for parts in sorted({1, 2, 4, 8, threads, 2 * threads}):
            breadth = ceil_divide(panels, parts)
            units = ceil_divide(tiles, block) * ceil_divide(panels, breadth)
            cached = block == tiles or depth * breadth * columns * 4 <= 10 * target.l2_bytes
            again = WEIGHT_FROM_CACHE if cached else WEIGHT_FROM_MEMORY
            unit = (products * rows + again) * c * breadth * columns + block * (c + breadth * columns) * value
            time = unit * _longest_share(units, threads)
            if not best[3] or time < best[3]:
                best = block, breadth, units, time
    w["TILES"], w["PANELS"], units, _ = best
    return units


def conv_transpose_domain(w: Words, constants: Mapping[str, int], target: CpuTarget, threads: int) -> int:
    """Fill ROW_TILES and PANELS of a transposed convolution; the number of units."""
    mr, c, strides = tile_rows(target), w["C"], w["SD"] * w["SH"] * w["SW"]
    taps = 1
    rows = int(w["M"] > 0)
    for axis in "DHW":
        taps *= ceil_divide(w[f"K{axis}"], w[f"S{axis}"])
        rows *= ceil_divide(w[f"O{axis}"], w[f"S{axis}"])
    if any(w[f"D{axis}"] > 1 for axis in "DHW"):  # dilated taps may all be of one phase
        taps = w["KD"] * w["KH"] * w["KW"]
    batches = w["IMAGES"] * w["GROUPS"] * strides
    most_tiles = TABLE // (mr * max(1, taps)) if taps <= TAPS else 1
    w["ROW_TILES"], w["PANELS"], units = product_blocks(
        rows,
        w["N"],
        taps * c,
        batches,
        constants["NR"],
        target,
        threads,
        row_bytes=4 * max(1, c),
        most_tiles=min(most_tiles, TABLE // mr),
    )
    if taps > TAPS and units:  # sums over parts of the taps stay in one tile
        w["PANELS"] = 1
        units = batches * ceil_divide(rows, mr) * ceil_divide(w["N"], constants["NR"])
    return units


# As in kernels/cpu/conv_integer.py: words of a gathered row. Then the most numbers of a line that is one tap, in any form.
INTEGER_WORDS = 2048
INTEGER_RUN = 2 * INTEGER_WORDS


def conv_integer_domain(w: Words, constants: Mapping[str, int], target: CpuTarget, threads: int) -> int:
    """Fill ROW_TILES and PANELS of an integer convolution; the number of units."""
    columns = 1 if constants["MERGED"] else w["KW"]
    run = w["C"] * w["KW"] // columns
    taps = w["KD"] * w["KH"] * columns
    words = taps * ceil_divide(run, constants["NUMBERS"])
    batches = w["IMAGES"] * w["GROUPS"]
    w["ROW_TILES"], w["PANELS"], units = product_blocks(
        w["M"], w["N"], words, batches, constants["NR"], target, threads, row_bytes=max(1, w["C"])
    )
    if units and (words > INTEGER_WORDS or taps > TAPS):  # sums over parts of the row stay in one tile
        w["PANELS"] = 1
        rows = ceil_divide(ceil_divide(w["M"], tile_rows(target)), w["ROW_TILES"])
        units = batches * rows * ceil_divide(w["N"], constants["NR"])
    return units


# To read and write what is around the sum of a window takes as long as so many taps.
OUTPUT_TAPS = 3


def window_domain(w: Words, constants: Mapping[str, int], target: CpuTarget, threads: int) -> int:
    """Fill ROW_TILES and PANELS of a depthwise convolution or a pooling; the number of units."""
    mr, m, n = tile_rows(target), w["M"], w["N"]
    taps = w["KD"] * w["KH"] * w["KW"]
    if m == 0 or n == 0 or w["IMAGES"] == 0:
        w["ROW_TILES"] = w["PANELS"] = 1
        return 0
    tiles, panels = ceil_divide(m, mr), ceil_divide(n, constants["NR"])
    # Addresses are shared by all panels, so channels are not cut before pixels.
    most = TABLE // (mr * taps) if taps <= TAPS else 1
    units = w["IMAGES"]
    work = units * m * n * (taps + OUTPUT_TAPS)
    wanted = min(threads * UNITS_PER_THREAD, work // (MIN_UNIT // 8)) if threads > 1 else 1
    row_tiles, row_blocks = _blocks(tiles, min(most, max(1, tiles * units // max(1, wanted))))
    block_panels, panel_blocks = _blocks(panels, panels * units * row_blocks // max(1, wanted))
    if taps > TAPS:  # reductions over parts of the taps stay in one tile
        block_panels, panel_blocks = 1, panels
    w["ROW_TILES"], w["PANELS"] = row_tiles, block_panels
    return units * row_blocks * panel_blocks


def line_domain(w: Words, constants: Mapping[str, int], target: CpuTarget, threads: int) -> int:
    """Fill LINES and PANELS of a convolution of narrow groups, or of few channels, along lines; the number of units.

    Lines are cut before panels. No blocks for the caches: runs of memory as long as all channels were as fast as any
    block of channels and pixels, whose lines of input would have stayed in L1.
    """
    w["LINES"] = w["PANELS"] = 1
    if w["M"] == 0 or w["N"] == 0 or w["IMAGES"] == 0:
        return 0
    few = "CHANNELS" in constants
    taps = w["KH"] * constants["LINE_TAPS"] * constants["CHANNELS" if few else "GROUP"]
    work = w["IMAGES"] * w["M"] * w["N"] * (taps + (0 if few else OUTPUT_TAPS))
    wanted = min(threads * UNITS_PER_THREAD, work // (MIN_UNIT if few else MIN_UNIT // 8)) if threads > 1 else 1
    lines, panels = w["OH"], ceil_divide(w["N"], constants["NR"])
    w["LINES"], line_blocks = _blocks(lines, lines * w["IMAGES"] // max(1, wanted))
    w["PANELS"], panel_blocks = _blocks(panels, panels * w["IMAGES"] * line_blocks // max(1, wanted))
    return w["IMAGES"] * line_blocks * panel_blocks


# As in kernels/cpu/conv_expand.py and tiles.py: floats of expanded lines in scratch memory, and a bound that is none.
EXPANDED = 65536
ACTIVATIONS = ("none", "hard_swish", "silu")  # by their numbers in kernels/cpu/conv_expand.py
UNBOUNDED = 1 << 30


def band_lines(span: int, stride: int, line: int, target: CpuTarget) -> int:
    """Lines of output in a band of which the expanded lines take at most half of L2; 0 where no band fits.

    span: lines of input under one line of output; stride: lines of input from one to the next; line: floats of one.
    """
    room = min(EXPANDED, target.l2_bytes // 8) // max(1, line)
    most = (room - span) // stride + 1
    return most if room >= span and most * stride >= span - stride else 0


def expand_domain(w: Words, constants: Mapping[str, int], target: CpuTarget, threads: int) -> int:
    """Fill LINES and BAND_LINES of a depthwise convolution of an expansion; the number of units.

    A unit has one panel. Lines are cut to occupy the threads, and so that the inputs of a block stay in L2 for all its
    panels; every block computes the lines at its edge again.
    """
    w["LINES"] = w["BAND_LINES"] = 1
    if w["M"] == 0 or w["N"] == 0 or w["IMAGES"] == 0:
        return 0
    span = (w["KH"] - 1) * w["DH"] + 1
    most = max(1, band_lines(span, w["SH"], w["IW"] * constants["NR"], target))
    panels = ceil_divide(w["N"], constants["NR"])
    work = w["IMAGES"] * w["N"] * (w["IH"] * w["IW"] * w["C"] + w["M"] * w["KH"] * constants["LINE_TAPS"])
    wanted = min(threads * UNITS_PER_THREAD, work // MIN_UNIT) if threads > 1 else 1
    blocks = ceil_divide(max(1, wanted), w["IMAGES"] * panels)
    blocks = max(blocks, ceil_divide(4 * w["IH"] * w["IW"] * w["C"], target.l2_bytes // 2))
    blocks = min(blocks, max(1, w["OH"] * w["SH"] // (4 * span)))
    w["LINES"], line_blocks = _blocks(w["OH"], ceil_divide(w["OH"], blocks))
    w["BAND_LINES"], _ = _blocks(w["LINES"], most)
    return w["IMAGES"] * line_blocks * panels


# As in kernels/cpu/attention.py: panels of a unit, floats of its packed queries (and of its sums), keys of a block.
ATTENTION_PANELS = 8
ATTENTION_QUERIES = 8192
ATTENTION_BLOCK = 256


def attention_size(target: CpuTarget) -> int:
    """The largest heads that the template "attention" takes: one panel of queries must fit."""
    return ATTENTION_QUERIES // (2 * target.vector_width)


def attention_domain(w: Words, constants: Mapping[str, int], target: CpuTarget, threads: int) -> int:
    """Fill PANELS and KEYS of an attention; the number of units, each a block of panels of one head of keys.

    The more panels, the more often a block of keys is used while it is in cache.
    """
    nr, rows, heads = constants["NR"], w["GROUP"] * w["S"], w["B"] * w["GROUPS"]
    w["KEYS"], _ = _blocks(w["T"], ATTENTION_BLOCK)
    w["PANELS"] = 1
    if rows == 0 or heads == 0 or w["DV"] == 0:
        return 0
    panels = ceil_divide(rows, nr)
    most = min(ATTENTION_PANELS, ATTENTION_QUERIES // (nr * max(1, w["D"], w["DV"])))
    if threads > 1:
        work = heads * rows * w["T"] * (w["D"] + w["DV"])
        wanted = min(threads * UNITS_PER_THREAD, work // MIN_UNIT)
        most = min(most, panels * heads // max(1, wanted))
    w["PANELS"], blocks = _blocks(panels, most)
    return heads * blocks
