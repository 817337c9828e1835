"""Tile intrinsics: the register-blocked inner loops of matrix products.

A tile is `height` rows by NR columns of a product, kept in vector registers while the sum over k runs. The
left operand is read in place, one address per row and tap, so that a matrix product (one tap) and a
convolution (one tap per kernel element) share the loop. The right operand is packed in panels of NR columns
(see packing). Window tiles reduce over taps only, each column by itself. Results go to a scratch buffer of
shape (MR, NR), where the epilogue picks them up element by element.

Nothing here knows shapes, threads or caches; the kernels that call these words do.
"""

# ruff: noqa: ARG001  (Numba prescribes the parameters of intrinsics and of their emitters)

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from minicc.kernels.cpu.intrinsics import (
    F32,
    I32,
    I64,
    call_vector_intrinsic,
    constant,
    counted_loop,
    fma,
    load_vector,
    outlined,
    set_memory_kind,
    splat,
    stack_array,
    store_vector,
    vector,
)

UNROLL = 4
UNBOUNDED = 1 << 30

_WORDS = types.CPointer(types.int64)
_FLOATS = types.CPointer(types.float32)


def heights(rows):
    """The heights compiled for tiles of at most `rows` rows, tallest first: few, to keep kernels small."""
    return [rows] + [height for height in (8, 4, 2, 1) if height < rows]


def _shortest(height):
    """From how many remaining rows on a tile is used; one repeated row is cheaper than two tiles."""
    return height if height < 3 else height - 1


def are_literals(*values):
    """Whether Numba knows all these arguments of an intrinsic as integer literals."""
    return all(isinstance(value, types.IntegerLiteral) for value in values)


@intrinsic
def tile_height(typing_context, rows, left):
    """Height of the tile to compute next when `left` >= 1 rows remain; `rows` is the literal MR."""
    if not are_literals(rows):
        return None

    def emit(context, builder, signature, values):
        chosen = I64(1)
        for height in reversed(heights(rows.literal_value)):
            enough = builder.icmp_signed(">=", values[1], I64(_shortest(height)))
            chosen = builder.select(enough, I64(height), chosen)
        return chosen

    return types.int64(types.literal(rows.literal_value), types.int64), emit


@intrinsic
def product_tile(typing_context, rows, columns, width, height, addresses, panel, tile, depth, taps, first):
    """tile[r, j] (+)= sum over t < taps, k < depth of row(t, r)[k] * panel[(t * depth + k) * NR + j].

    rows, columns, width: literals MR, NR and the vector width VW; NR is a multiple of VW.
    height:    one of `heights(MR)`; only rows r < height are computed.
    addresses: int64 table [taps][MR] of the byte addresses of float32 rows.
    panel:     float32 [taps * depth][NR].
    tile:      float32 scratch [MR][NR]; overwritten when `first`, else added to.
    """
    if not are_literals(rows, columns, width):
        return None
    shape = rows.literal_value, columns.literal_value, width.literal_value

    def emit(context, builder, signature, values):
        chosen, table, b, buffer, depth, taps, first = values[3:]
        _emit_tiles(builder, shape, chosen, (table, None, b, buffer, depth, taps, first))
        return context.get_dummy_value()

    literals = [types.literal(value) for value in shape]
    size = types.int64
    return types.void(*literals, size, _WORDS, _FLOATS, _FLOATS, size, size, types.boolean), emit


@intrinsic
def sparse_product_tile(typing_context, rows, columns, width, height, addresses, places, panel, tile, depth, taps, first):
    """As `product_tile`, of the taps with the numbers places[t], t < taps, in the panel.

    places: int64. addresses: of the rows of these taps only.
    """
    if not are_literals(rows, columns, width):
        return None
    shape = rows.literal_value, columns.literal_value, width.literal_value

    def emit(context, builder, signature, values):
        chosen, *operands = values[3:]
        _emit_tiles(builder, shape, chosen, operands)
        return context.get_dummy_value()

    literals = [types.literal(value) for value in shape]
    size = types.int64
    return types.void(*literals, size, _WORDS, _WORDS, _FLOATS, _FLOATS, size, size, types.boolean), emit


def _emit_tiles(builder, shape, chosen, operands):
    """A tile of the height that is chosen at run time."""
    done = builder.append_basic_block("tile.done")
    switch = builder.switch(chosen, done)
    for height in heights(shape[0]):
        block = builder.append_basic_block(f"tile.{height}")
        switch.add_case(I64(height), block)
        builder.position_at_end(block)
        _emit_tile(builder, (*shape, height), *operands)
        builder.branch(done)
    builder.position_at_end(done)


def _emit_tile(builder, shape, table, places, b, buffer, depth, taps, is_first):
    mr, nr, _, height = shape
    sums = _Sums(builder, shape, buffer, is_first)
    panel_step = builder.mul(depth, I64(nr))
    with counted_loop(builder, I64(0), taps) as t:
        entry = builder.gep(table, [builder.mul(t, I64(mr))])
        row = []
        for r in range(height):
            address = set_memory_kind(builder, builder.load(builder.gep(entry, [I64(r)])), "scratch")
            row.append(builder.inttoptr(address, F32.as_pointer()))
        number = t if places is None else set_memory_kind(builder, builder.load(builder.gep(places, [t])), "scratch")
        sums.add_products(row, None, builder.gep(b, [builder.mul(number, panel_step)]), "input", depth)
    sums.store()


class _Sums:
    """The sums of one tile in vector registers, [height][NR]; they begin with those in `buffer` unless `is_first`."""

    def __init__(self, builder, shape, buffer, is_first):
        _, self.nr, self.vw, self.height = shape
        self.builder, self.buffer = builder, buffer
        self.vectors = self.nr // self.vw
        type_ = vector(F32, self.vw)
        zero = constant(type_, 0.0)
        # A single row has too few independent sums to hide the latency of fma, so it keeps one per unrolled step.
        self.copies = UNROLL if self.height * self.vectors < 4 else 1
        self.places = [(r, v) for r in range(self.height) for v in range(self.vectors)]
        self.parts = [
            {place: stack_array(builder, type_, 1) for place in self.places} for _ in range(self.copies)
        ]
        with builder.if_else(is_first) as (then, otherwise):
            with then:
                for place in self.places:
                    builder.store(zero, self.parts[0][place])
            with otherwise:
                for place in self.places:
                    earlier = load_vector(builder, self._at(place), self.vw, "scratch", 64)
                    builder.store(earlier, self.parts[0][place])
        for part in self.parts[1:]:
            for place in self.places:
                builder.store(zero, part[place])

    def _at(self, place):
        return self.builder.gep(self.buffer, [I64(place[0] * self.nr + place[1] * self.vw)])

    def add_products(self, rows, step, panel, kind, depth):
        """sums[r, j] += sum over k < depth of rows[r][k * step] * panel[k, j]; a step of None is 1.

        kind: of the panel's memory.
        """
        builder, nr, vw = self.builder, self.nr, self.vw

        def products(k, steps):
            at = builder.gep(panel, [builder.mul(k, I64(nr))])
            left_at = k if step is None else builder.mul(k, step)
            for u in range(steps):
                pointers = [builder.gep(at, [I64(u * nr + v * vw)]) for v in range(self.vectors)]
                right = [load_vector(builder, p, vw, kind) for p in pointers]
                if step is None:
                    left_at = builder.add(k, I64(u))
                elif u:
                    left_at = builder.add(left_at, step)
                for r in range(self.height):
                    # No alias scope: rows may lie in an input or in scratch memory.
                    left = splat(builder, builder.load(builder.gep(rows[r], [left_at])), vw)
                    for v in range(self.vectors):
                        place = self.parts[u % self.copies][r, v]
                        builder.store(fma(builder, left, right[v], builder.load(place)), place)

        whole = builder.and_(depth, I64(-UNROLL))
        with counted_loop(builder, I64(0), whole, UNROLL) as k:
            products(k, UNROLL)
        with counted_loop(builder, whole, depth) as k:
            products(k, 1)

    def totals(self):
        """The sums, each with its place."""
        for place in self.places:
            total = self.builder.load(self.parts[0][place])
            for part in self.parts[1:]:
                total = self.builder.fadd(total, self.builder.load(part[place]))
            yield place, total

    def write(self, place, total):
        """A sum to its place in the buffer."""
        store_vector(self.builder, total, self._at(place), "scratch", 4 * self.vw)

    def store(self):
        """Write the sums back."""
        for place, total in self.totals():
            self.write(place, total)


def cover_rows(builder, most, count, tile):
    """Emit `tile(height, first row)` for `count` rows: `most` at a time while they fit, then each lower height that fits."""
    done = builder.mul(builder.sdiv(count, I64(most)), I64(most))
    with counted_loop(builder, I64(0), done, most) as row:
        tile(most, row)
    for height in heights(most)[1:]:  # each at most once
        fits = builder.icmp_signed(">=", builder.sub(count, done), I64(height))
        with builder.if_then(fits):
            tile(height, done)
        done = builder.select(fits, builder.add(done, I64(height)), done)


@intrinsic
def strided_product(typing_context, rows, columns, width, left, row_step, step, panel, sums, count, depth, first):
    """sums[r, j] (+)= sum over k < depth of left[r * row_step + k * step] * panel[k * NR + j] for r < count.

    rows, columns, width: literals MR, NR and the vector width VW; NR is a multiple of VW.
    left:  float32 of any strides, read in place; no element but those named is touched.
    panel: float32 scratch [depth][NR]; sums: float32 scratch [count][NR], overwritten when `first`, else added to.
    A function of its own: kernels call it for more than one product.
    """
    if not are_literals(rows, columns, width):
        return None
    mr, nr, vw = rows.literal_value, columns.literal_value, width.literal_value

    def body(builder, arguments):
        left, row_step, step, panel, sums, count, depth, first = arguments

        def tile(height, row):
            start = builder.gep(left, [builder.mul(row, row_step)])
            pointers = [builder.gep(start, [builder.mul(row_step, I64(r))]) for r in range(height)]
            buffer = builder.gep(sums, [builder.mul(row, I64(nr))])
            found = _Sums(builder, (mr, nr, vw, height), buffer, first)
            found.add_products(pointers, step, panel, "scratch", depth)
            found.store()

        cover_rows(builder, mr, count, tile)

    def emit(context, builder, signature, values):
        outlined(builder, f"strided_product_{mr}_{nr}", values[3:], body)
        return context.get_dummy_value()

    literals = [types.literal(value) for value in (mr, nr, vw)]
    size = types.int64
    operands = [_FLOATS, size, size, _FLOATS, _FLOATS, size, size, types.boolean]
    return types.void(*literals, *operands), emit


@intrinsic
def expanded_rows(typing_context, rows, columns, width, low, high, left, step, panel, bias, sums, count, depth):
    """sums[r, j] = min(max(bias[j] + sum over k < depth of left[r * step + k] * panel[k * NR + j], low), high), r < count.

    rows, columns, width: literals MR, NR and the vector width VW; NR is a multiple of VW.
    low, high: literals, hundredths; those of the magnitude UNBOUNDED bound nothing. NaN stays.
    left:  float32 rows `step` apart. panel: float32 [depth][NR]. bias: float32 [NR]. sums: float32 scratch [count][NR].
    """
    if not are_literals(rows, columns, width, low, high):
        return None
    mr, nr, vw, low, high = (value.literal_value for value in (rows, columns, width, low, high))
    bounds = [(word, bound / 100) for word, bound in (("<", low), (">", high)) if abs(bound) < UNBOUNDED]

    def emit(context, builder, signature, values):
        left, step, panel, bias, sums, count, depth = values[5:]
        type_ = vector(F32, vw)
        starts = [load_vector(builder, builder.gep(bias, [I64(v * vw)]), vw, "input") for v in range(nr // vw)]

        def tile(height, row):
            start = builder.gep(left, [builder.mul(row, step)])
            pointers = [builder.gep(start, [builder.mul(step, I64(r))]) for r in range(height)]
            found = _Sums(builder, (mr, nr, vw, height), builder.gep(sums, [builder.mul(row, I64(nr))]), ir.IntType(1)(1))
            for r, v in found.places:
                builder.store(starts[v], found.parts[0][r, v])
            found.add_products(pointers, None, panel, "input", depth)
            for place, total in found.totals():
                for word, bound in bounds:
                    edge = constant(type_, bound)
                    total = builder.select(builder.fcmp_ordered(word, total, edge), edge, total)
                found.write(place, total)

        cover_rows(builder, mr, count, tile)
        return context.get_dummy_value()

    literals = [types.literal(value) for value in (mr, nr, vw, low, high)]
    size = types.int64
    return types.void(*literals, _FLOATS, size, _FLOATS, _FLOATS, _FLOATS, size, size), emit


_STARTS = {"sum": 0.0, "max": float("-inf"), "weighted": 0.0}


def masked_load(builder, pointer, width, mask):
    """Lanes whose mask is set, else 0; memory of the others is not touched."""
    type_ = vector(F32, width)
    memory = builder.bitcast(pointer, type_.as_pointer())
    operands = [memory, I32(4), mask, constant(type_, 0.0)]
    kinds = [operand.type for operand in operands]
    name = f"llvm.masked.load.v{width}f32.p0"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(type_, kinds), name)
    return builder.call(function, operands)


def _pool_tile(kind):
    @intrinsic
    def tile(typing_context, rows, columns, width, addresses, column, valid, tile, taps, first):
        """tile[r, j] = sum or maximum over t < taps of row(t, r)[column + j].

        rows, columns, width: literals MR, NR and VW. All MR rows are computed; of the columns the first
        `valid` are read, the others are undefined.
        addresses: int64 table [taps][MR] of the byte addresses of float32 rows.
        tile:      float32 scratch [MR][NR]; continued from when not `first`.
        """
        if not are_literals(rows, columns, width):
            return None
        shape = rows.literal_value, columns.literal_value, width.literal_value

        def emit(context, builder, signature, values):
            table, column, valid, buffer, taps, first = values[3:]
            rows = _TableRows(builder, table, column, shape[0])
            operands = None, buffer, taps, first
            whole = builder.icmp_signed(">=", valid, I64(shape[1]))
            with builder.if_else(whole) as (then, otherwise):
                with then:
                    _emit_window(builder, kind, shape, rows, operands, None)
                with otherwise:
                    _emit_window(builder, kind, shape, rows, operands, channel_masks(builder, *shape[1:], valid))
            return context.get_dummy_value()

        literals = [types.literal(value) for value in shape]
        size = types.int64
        return types.void(*literals, _WORDS, size, size, _FLOATS, size, types.boolean), emit

    return tile


@intrinsic
def depthwise_tile(typing_context, rows, columns, width, line, taps_at, valid, weights, tile, taps, first):
    """tile[r, j] = sum over t < taps of (pixel r under tap t)[j] * weights[t][j], for pixels of one line.

    rows, columns, width: literals MR, NR and VW; all MR rows are computed, of the columns `valid` are read.
    line:     tuple (address of pixel 0 at tap offset 0, bytes between pixels; position of pixel 0 along the
              line, positions between pixels; extent of the line; address of zeros; all pixels inside).
    taps_at:  int64 [taps][2]: offset in bytes and position along the line of each tap. Taps outside the line
              read the zeros.
    weights:  float32 [taps][NR].
    tile:     float32 scratch [MR][NR]; continued from when not `first`.
    """
    if not are_literals(rows, columns, width) or not isinstance(line, types.BaseTuple):
        return None
    shape = rows.literal_value, columns.literal_value, width.literal_value

    def emit(context, builder, signature, values):
        line, taps_at, valid, weights, buffer, taps, first = values[3:]
        *facts, inside = [builder.extract_value(line, i) for i in range(7)]
        operands = weights, buffer, taps, first
        whole = builder.icmp_signed(">=", valid, I64(shape[1]))
        with builder.if_else(whole) as (then, otherwise):
            with then, builder.if_else(builder.icmp_signed("!=", inside, I64(0))) as (free, checked):
                with free:
                    rows = _LineRows(builder, facts, taps_at, shape[0], check=False)
                    _emit_window(builder, "weighted", shape, rows, operands, None)
                with checked:
                    rows = _LineRows(builder, facts, taps_at, shape[0], check=True)
                    _emit_window(builder, "weighted", shape, rows, operands, None)
            with otherwise:
                rows = _LineRows(builder, facts, taps_at, shape[0], check=True)
                _emit_window(builder, "weighted", shape, rows, operands, channel_masks(builder, *shape[1:], valid))
        return context.get_dummy_value()

    literals = [types.literal(value) for value in shape]
    size = types.int64
    facts = types.UniTuple(size, 7)
    return types.void(*literals, facts, _WORDS, size, _FLOATS, _FLOATS, size, types.boolean), emit


class _TableRows:
    """Rows whose addresses are in a table [taps][MR]."""

    def __init__(self, builder, table, column, mr):
        self.builder, self.table, self.column, self.mr = builder, table, column, mr

    def at_tap(self, t):
        """Pointers to the MR rows under tap t."""
        builder, pointers = self.builder, []
        entry = builder.gep(self.table, [builder.mul(t, I64(self.mr))])
        for r in range(self.mr):
            address = set_memory_kind(builder, builder.load(builder.gep(entry, [I64(r)])), "scratch")
            pointers.append(builder.gep(builder.inttoptr(address, F32.as_pointer()), [self.column]))
        return pointers


class _LineRows:
    """Rows at even distances on one line, moved by an offset per tap; zeros outside the line when checked."""

    def __init__(self, builder, facts, taps_at, mr, check):
        x, step, position, stride, self.extent, self.zeros = facts
        self.builder, self.taps_at, self.check = builder, taps_at, check
        self.rows = [builder.add(x, builder.mul(step, I64(r))) for r in range(mr)]
        self.positions = [builder.add(position, builder.mul(stride, I64(r))) for r in range(mr)]

    def at_tap(self, t):
        """Pointers to the MR rows under tap t."""
        builder, pointers = self.builder, []
        entry = builder.gep(self.taps_at, [builder.mul(t, I64(2))])
        offset = set_memory_kind(builder, builder.load(entry), "scratch")
        moved = set_memory_kind(builder, builder.load(builder.gep(entry, [I64(1)])), "scratch")
        for row, position in zip(self.rows, self.positions):
            address = builder.add(row, offset)
            if self.check:
                # Unsigned, so that negative positions are too large.
                inside = builder.icmp_unsigned("<", builder.add(position, moved), self.extent)
                address = builder.select(inside, address, self.zeros)
            pointers.append(builder.inttoptr(address, F32.as_pointer()))
        return pointers


def channel_masks(builder, columns, width, valid):
    """Per vector of a panel, which lanes are among its first `valid` columns."""
    lanes = ir.Constant(vector(I64, width), [I64(lane) for lane in range(width)])
    limits = [builder.sub(valid, I64(at)) for at in range(0, columns, width)]
    return [builder.icmp_signed("<", lanes, splat(builder, limit, width)) for limit in limits]


def _emit_window(builder, kind, shape, rows, operands, masks):
    weights, buffer, taps, first = operands
    mr, nr, vw = shape
    vectors = range(nr // vw)
    type_ = vector(F32, vw)
    start = constant(type_, _STARTS[kind])
    sums = [[stack_array(builder, type_, 1) for _ in vectors] for _ in range(mr)]
    places = [(r, v, builder.gep(buffer, [I64(r * nr + v * vw)])) for r in range(mr) for v in vectors]
    for r, v, place in places:
        earlier = load_vector(builder, place, vw, "scratch", 64)
        builder.store(builder.select(first, start, earlier), sums[r][v])
    with counted_loop(builder, I64(0), taps) as t:
        if kind == "weighted":
            at = builder.gep(weights, [builder.mul(t, I64(nr))])
            factors = [load_vector(builder, builder.gep(at, [I64(v * vw)]), vw, "input") for v in vectors]
        for r, row in enumerate(rows.at_tap(t)):
            for v in vectors:
                at = builder.gep(row, [I64(v * vw)])
                x = load_vector(builder, at, vw) if masks is None else masked_load(builder, at, vw, masks[v])
                total = builder.load(sums[r][v])
                if kind == "weighted":
                    total = fma(builder, x, factors[v], total)
                elif kind == "sum":
                    total = builder.fadd(total, x)
                else:
                    name = f"llvm.maximum.v{vw}f32"
                    total = call_vector_intrinsic(builder, name, [total, x], type_)
                builder.store(total, sums[r][v])
    for r, v, place in places:
        store_vector(builder, builder.load(sums[r][v]), place, "scratch", 64)


sum_tile = _pool_tile("sum")
max_tile = _pool_tile("max")
