"""Tiles of attention on CUDA: scores of a warp's queries, their softmax step by step, and weighted sums of values.

A warp has 16 queries. Tiles in shared memory are those of kernels/cuda/tiles.py: rows of 128 bytes, swizzled; longer heads
lie in several such panels, one behind the other. Fragments are those of tiles.py with WM = 16: a thread has elements of
the rows lane / 4 and lane / 4 + 8, called the first and the second half. As two neighbouring tiles of 8 keys they are,
once rounded to 16 bits, the left operand of the next product, so weights never leave the registers.
"""

# ruff: noqa: ARG001  (Numba prescribes the parameters of intrinsics and of their emitters)

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from minicc.kernels.cuda.intrinsics import bfloat_to_float, float_to_bfloat, float_to_half, half_to_float
from minicc.kernels.cuda.tiles import (
    ELEMENTS,
    F32,
    I16,
    I32,
    I64,
    ROW,
    SHARED,
    assembly,
    each_row,
    hops,
    known,
    own_place,
    sums_type,
)

_LOG2_E = 1.4426950408889634
_PANEL_STEPS = ROW // 32  # steps of 32 bytes, a product each, in a panel
_MATRICES = ir.LiteralStructType([I32] * 4)
_LOAD = "ldmatrix.sync.aligned.m8n8.x4{}.shared.b16 {{$0,$1,$2,$3}}, [$4];"
_MULTIPLY = "mma.sync.aligned.{} {{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9}}, {{$10,$11,$12,$13}};"


def _literals(*values):
    return [types.literal(v) for v in values]


def _fragments(keys):
    return sums_type("f16", 16, keys)[0]


def _elements(builder, value, count):
    return [builder.extract_value(value, i) for i in range(count)]


def _load_matrices(builder, base, row, chunk, transposed=False):
    """Four 8x8 matrices. row, chunk: of this lane, from the base; rows of a lane differ from its first by multiples of 8."""
    swizzled = builder.xor(chunk, builder.and_(row, I32(7)))
    where = builder.add(builder.add(base, builder.shl(row, I32(7))), builder.shl(swizzled, I32(4)))
    text = _LOAD.format(".trans" if transposed else "")
    return _elements(builder, assembly(builder, text, "=r,=r,=r,=r,r", _MATRICES, [where]), 4)


def _multiply(builder, name, left, right, sums):
    constraints = ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4)
    text = _MULTIPLY.format(ELEMENTS[name].mma)
    four = ir.LiteralStructType([F32] * 4)
    return _elements(builder, assembly(builder, text, constraints, four, [*left, *right, *sums], effects=False), 4)


def _exp2(builder, value):
    return assembly(builder, "ex2.approx.ftz.f32 $0, $1;", "=f,f", F32, [value], effects=False)


def _larger(builder, a, b):
    return assembly(builder, "max.f32 $0, $1, $2;", "=f,f,f", F32, [a, b], effects=False)


def _from_lane(builder, value, distance):
    """The value of the lane whose number differs in the bits of `distance`."""
    return assembly(builder, f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, -1;", "=f,f", F32, [value])


@intrinsic
def float_of_bits(typing_context, bits):
    """The float32 whose bits an int64 holds."""

    def emit(context, builder, signature, values):
        return builder.bitcast(builder.trunc(values[0], I32), F32)

    return types.float32(types.int64), emit


@intrinsic
def clear_rows(typing_context, rows, threads, shared, sources, tid):
    """Zeros in the rows of a tile that `copy_tile` leaves out because memory has no more; parameters as there."""
    if not known(rows, threads):
        return None
    count, width = rows.literal_value, threads.literal_value
    tuple_ = types.UniTuple(types.int64, len(hops(count, width)))

    def emit(context, builder, signature, values):
        _, row, target = own_place(builder, values[2], values[4])

        def clear(number, hop):
            with builder.if_then(builder.icmp_unsigned("==", builder.extract_value(values[3], number), I64(0))):
                text = "st.shared.v4.u32 [$0], {$1,$1,$1,$1};"
                assembly(builder, text, "r,r", ir.VoidType(), [builder.add(target, I32(hop * ROW)), I32(0)])

        each_row(builder, count, width, row, clear)
        return context.get_dummy_value()

    return types.void(*_literals(count, width), types.int32, tuple_, types.int32), emit


@intrinsic
def query_rows(typing_context, rows, threads, address, by_query, by_head, group, first, left, tid):
    """As `tile_rows`, for queries of `group` heads that share keys: row i is query i / group of head i % group.

    by_query, by_head: bytes from a query, and from a head, to the next.
    """
    if not known(rows, threads):
        return None
    count, width = rows.literal_value, threads.literal_value
    tuple_ = types.UniTuple(types.int64, len(hops(count, width)))

    def emit(context, builder, signature, values):
        address, by_query, by_head, group, first, left, tid = values[2:]
        row = builder.add(first, builder.lshr(tid, I32(3)))
        found = []
        for hop in hops(count, width):
            here = builder.add(row, I32(hop))
            query = builder.udiv(here, group)
            head = builder.sub(here, builder.mul(query, group))
            place = builder.add(address, builder.mul(builder.sext(query, I64), by_query))
            place = builder.add(place, builder.mul(builder.sext(head, I64), by_head))
            found.append(builder.select(builder.icmp_signed("<", here, left), place, I64(0)))
        return context.make_tuple(builder, tuple_, found)

    return tuple_(*_literals(count, width), *[types.int64] * 3, *[types.int32] * 4), emit


@intrinsic
def query_fragments(typing_context, steps, panel, shared, row, lane):
    """The 16 queries from `row` on, as left operands: 4 int32 for each of `steps` of 32 bytes.

    steps, panel: literals; panel: bytes of one.
    """
    if not known(steps, panel):
        return None
    count, apart = steps.literal_value, panel.literal_value
    tuple_ = types.UniTuple(types.int32, 4 * count)

    def emit(context, builder, signature, values):
        base, row, lane = values[2:]
        row = builder.add(row, builder.and_(lane, I32(15)))
        found = []
        for step in range(count):
            chunk = builder.add(builder.lshr(lane, I32(4)), I32(2 * (step % _PANEL_STEPS)))
            start = builder.add(base, I32(step // _PANEL_STEPS * apart))
            found += _load_matrices(builder, start, row, chunk)
        return context.make_tuple(builder, tuple_, found)

    return tuple_(*_literals(count, apart), *[types.int32] * 3), emit


@intrinsic
def scores(typing_context, element, keys, panel, scale, queries, tile, lane):
    """Products of a warp's queries with `keys` keys in shared memory, times `scale`.

    element, keys, panel: literals; panel: bytes of one of the tile's. queries: `query_fragments`.
    """
    if not known(element, keys, panel):
        return None
    name, count, apart = (v.literal_value for v in (element, keys, panel))
    tuple_ = _fragments(count)

    def emit(context, builder, signature, values):
        scale, given, tile, lane = values[3:]
        left = _elements(builder, given, queries.count)
        sums = [ir.Constant(F32, 0.0)] * (count // 2)
        row = builder.add(builder.and_(lane, I32(7)), builder.shl(builder.lshr(lane, I32(4)), I32(3)))
        chunk = builder.and_(builder.lshr(lane, I32(3)), I32(1))
        for step in range(queries.count // 4):
            start = builder.add(tile, I32(step // _PANEL_STEPS * apart))
            place = builder.add(chunk, I32(2 * (step % _PANEL_STEPS)))
            for pair in range(count // 16):
                base = builder.add(start, I32(16 * pair * ROW))
                right = _load_matrices(builder, base, row, place)
                for half in range(2):
                    first = 8 * pair + 4 * half
                    operand = right[2 * half : 2 * half + 2]
                    fragment = left[4 * step : 4 * step + 4]
                    sums[first : first + 4] = _multiply(builder, name, fragment, operand, sums[first : first + 4])
        return context.make_tuple(builder, tuple_, [builder.fmul(x, scale) for x in sums])

    return tuple_(*_literals(name, count, apart), types.float32, queries, types.int32, types.int32), emit


def _each_key(builder, keys, lane):
    """(number in the fragment, half, key in the tile) of a thread's scores."""
    own = builder.shl(builder.and_(lane, I32(3)), I32(1))
    for number in range(keys // 2):
        tile, q = divmod(number, 4)
        yield number, q // 2, builder.add(own, I32(8 * tile + q % 2))


@intrinsic
def add_mask(typing_context, element, keys, found, first, second, step, start, last, lane):
    """Scores plus a mask of type `element` ("f32", "f16", "bf16"; a literal, as keys).

    first, second: addresses of the mask's rows for both halves; step: bytes from key to key. start: the first key of the
    tile; last: the last one that the mask has, read in place of those behind it.
    """
    if not known(element, keys):
        return None
    name, count = element.literal_value, keys.literal_value
    tuple_ = _fragments(count)
    convert = {"f16": half_to_float, "bf16": bfloat_to_float}.get(name)
    type_ = I16 if convert else F32

    def emit(context, builder, signature, values):
        found, first, second, step, start, last, lane = values[2:]
        result = []
        for number, half, place in _each_key(builder, count, lane):
            key = builder.add(start, place)
            key = builder.select(builder.icmp_signed("<", key, last), key, last)
            address = builder.add((first, second)[half], builder.mul(builder.sext(key, I64), step))
            loaded = builder.load(builder.inttoptr(address, type_.as_pointer(1)))
            loaded.set_metadata("invariant.load", builder.module.add_metadata([]))
            value = convert(builder, loaded) if convert else loaded
            result.append(builder.fadd(builder.extract_value(found, number), value))
        return context.make_tuple(builder, tuple_, result)

    rest = [types.int64, types.int64, types.int64, types.int32, types.int32, types.int32]
    return tuple_(*_literals(name, count), tuple_, *rest), emit


@intrinsic
def forbid(typing_context, keys, found, start, first, second, lane):
    """-inf for keys that a row may not attend: those from `first` on for the first half, from `second` on for the second."""
    if not known(keys):
        return None
    count = keys.literal_value
    tuple_ = _fragments(count)

    def emit(context, builder, signature, values):
        found, start, first, second, lane = values[1:]
        limits = [builder.sub(limit, start) for limit in (first, second)]
        result = []
        for number, half, place in _each_key(builder, count, lane):
            allowed = builder.icmp_signed("<", place, limits[half])
            lowest = ir.Constant(F32, float("-inf"))
            result.append(builder.select(allowed, builder.extract_value(found, number), lowest))
        return context.make_tuple(builder, tuple_, result)

    return tuple_(*_literals(count), tuple_, *[types.int32] * 4), emit


@intrinsic
def row_top(typing_context, keys, half, found, top):
    """The largest of `top` and a row's scores, of all four threads that share it; keys, half (0, 1): literals."""
    if not known(keys, half):
        return None
    count, which = keys.literal_value, half.literal_value

    def emit(context, builder, signature, values):
        top = values[3]
        for number in range(count // 2):
            if number % 4 // 2 == which:
                top = _larger(builder, top, builder.extract_value(values[2], number))
        for distance in (1, 2):
            top = _larger(builder, top, _from_lane(builder, top, distance))
        return top

    return types.float32(*_literals(count, which), _fragments(count), types.float32), emit


@intrinsic
def warp_top(typing_context, value):
    """The largest of the values of a warp's threads."""

    def emit(context, builder, signature, values):
        top = values[0]
        for distance in (1, 2, 4, 8, 16):
            top = _larger(builder, top, _from_lane(builder, top, distance))
        return top

    return types.float32(types.float32), emit


@intrinsic
def power(typing_context, value):
    """e to the power of a float32 that is not positive."""

    def emit(context, builder, signature, values):
        return _exp2(builder, builder.fmul(values[0], ir.Constant(F32, _LOG2_E)))

    return types.float32(types.float32), emit


@intrinsic
def powers(typing_context, keys, found, first, second):
    """e to the power of scores less a shift for each half."""
    if not known(keys):
        return None
    count = keys.literal_value
    tuple_ = _fragments(count)

    def emit(context, builder, signature, values):
        result = []
        for number in range(count // 2):
            lower = builder.fsub(builder.extract_value(values[1], number), values[2 + number % 4 // 2])
            result.append(_exp2(builder, builder.fmul(lower, ir.Constant(F32, _LOG2_E))))
        return context.make_tuple(builder, tuple_, result)

    return tuple_(*_literals(count), tuple_, types.float32, types.float32), emit


@intrinsic
def row_sum(typing_context, keys, half, found):
    """The sum of this thread's elements of a row; keys, half: literals."""
    if not known(keys, half):
        return None
    count, which = keys.literal_value, half.literal_value

    def emit(context, builder, signature, values):
        own = [builder.extract_value(values[2], n) for n in range(count // 2) if n % 4 // 2 == which]
        while len(own) > 1:
            own = [builder.fadd(a, b) for a, b in zip(own[::2], own[1::2], strict=True)]
        return own[0]

    return types.float32(*_literals(count, which), _fragments(count)), emit


@intrinsic
def sum_of_four(typing_context, value):
    """The sum of the values of the four threads that share a row."""

    def emit(context, builder, signature, values):
        total = values[0]
        for distance in (1, 2):
            total = builder.fadd(total, _from_lane(builder, total, distance))
        return total

    return types.float32(types.float32), emit


@intrinsic
def rescale(typing_context, width, sums, first, second):
    """Sums of `width` columns (a literal) times a factor for each half."""
    if not known(width):
        return None
    columns = width.literal_value
    tuple_ = _fragments(columns)

    def emit(context, builder, signature, values):
        result = [
            builder.fmul(builder.extract_value(values[1], n), values[2 + n % 4 // 2]) for n in range(columns // 2)
        ]
        return context.make_tuple(builder, tuple_, result)

    return tuple_(*_literals(columns), tuple_, types.float32, types.float32), emit


@intrinsic
def merge(typing_context, sums, first, second, others, other_first, other_second):
    """Two tuples of sums, each times a factor for each half, added."""
    if not isinstance(sums, types.UniTuple) or sums != others:
        return None

    def emit(context, builder, signature, values):
        result = []
        for number in range(sums.count):
            half = number % 4 // 2
            own = builder.fmul(builder.extract_value(values[0], number), values[1 + half])
            other = builder.fmul(builder.extract_value(values[3], number), values[4 + half])
            result.append(builder.fadd(own, other))
        return context.make_tuple(builder, sums, result)

    return sums(sums, types.float32, types.float32, sums, types.float32, types.float32), emit


@intrinsic
def put_numbers(typing_context, shared, lane, numbers):
    """Stores a tuple of float32 to shared memory, those of a warp's lanes side by side."""
    if not isinstance(numbers, types.UniTuple):
        return None

    def emit(context, builder, signature, values):
        base = builder.add(values[0], builder.shl(values[1], I32(2)))
        for number, value in enumerate(_elements(builder, values[2], numbers.count)):
            where = builder.add(base, I32(ROW * number))
            builder.store(value, builder.inttoptr(where, F32.as_pointer(SHARED)))
        return context.get_dummy_value()

    return types.void(types.int32, types.int32, numbers), emit


@intrinsic
def get_numbers(typing_context, count, shared, lane):
    """`count` (a literal) numbers that `put_numbers` of this lane has stored there, in whichever warp."""
    if not known(count):
        return None
    tuple_ = types.UniTuple(types.float32, count.literal_value)

    def emit(context, builder, signature, values):
        base = builder.add(values[1], builder.shl(values[2], I32(2)))
        places = [builder.add(base, I32(ROW * number)) for number in range(tuple_.count)]
        found = [builder.load(builder.inttoptr(where, F32.as_pointer(SHARED))) for where in places]
        return context.make_tuple(builder, tuple_, found)

    return tuple_(*_literals(tuple_.count), types.int32, types.int32), emit


@intrinsic
def weighted_sums(typing_context, element, keys, width, panel, sums, weights, tile, lane):
    """sums + weights, rounded to the element type, times `keys` rows of values in shared memory.

    The first four are literals; panel: bytes of one of the tile's.
    """
    if not known(element, keys, width, panel):
        return None
    name, count, columns, apart = (v.literal_value for v in (element, keys, width, panel))
    tuple_ = _fragments(columns)

    def emit(context, builder, signature, values):
        sums, weights, tile, lane = values[4:]
        sums = _elements(builder, sums, columns // 2)
        row, chunk = builder.and_(lane, I32(15)), builder.lshr(lane, I32(4))
        pack = f"cvt.rn.{name}x2.f32 $0, $1, $2;"
        for step in range(count // 16):
            own = [builder.extract_value(weights, 8 * step + n) for n in range(8)]
            left = [
                assembly(builder, pack, "=r,f,f", I32, [own[2 * n + 1], own[2 * n]], effects=False) for n in range(4)
            ]
            for pair in range(columns // 16):
                number, place = divmod(pair, _PANEL_STEPS)
                base = builder.add(tile, I32(number * apart + 16 * step * ROW))
                right = _load_matrices(builder, base, row, builder.add(chunk, I32(2 * place)), transposed=True)
                for half in range(2):
                    first = 8 * pair + 4 * half
                    operand = right[2 * half : 2 * half + 2]
                    sums[first : first + 4] = _multiply(builder, name, left, operand, sums[first : first + 4])
        return context.make_tuple(builder, tuple_, sums)

    literals = _literals(name, count, columns, apart)
    return tuple_(*literals, tuple_, _fragments(count), types.int32, types.int32), emit


@intrinsic
def store_rows(typing_context, element, width, pairs, sums, first, second, end, lane):
    """Sums as rows of elements in global memory.

    element ("f32", "f16", "bf16"), width, pairs: literals; pairs: whether two neighbours may be stored at once. first, second:
    addresses of the rows of both halves, 0 for one that there is not; end: columns that there are.
    """
    if not known(element, width, pairs):
        return None
    name, columns, whole = (v.literal_value for v in (element, width, pairs))
    round_ = {"f16": float_to_half, "bf16": float_to_bfloat}.get(name, lambda _, value: value)
    size = 4 if name == "f32" else 2

    def emit(context, builder, signature, values):
        sums, first, second, end, lane = values[3:]
        own = builder.shl(builder.and_(lane, I32(3)), I32(1))
        for half, address in enumerate((first, second)):
            with builder.if_then(builder.icmp_unsigned("!=", address, I64(0))):
                for tile in range(columns // 8):
                    column = builder.add(own, I32(8 * tile))
                    where = builder.add(address, builder.mul(builder.sext(column, I64), I64(size)))
                    found = [round_(builder, builder.extract_value(sums, 4 * tile + 2 * half + q)) for q in range(2)]
                    if whole:
                        with builder.if_then(builder.icmp_signed("<", column, end)):
                            _store_pair(builder, where, found, size)
                        continue
                    for q in range(2):
                        with builder.if_then(builder.icmp_signed("<", builder.add(column, I32(q)), end)):
                            place = builder.add(where, I64(size * q))
                            builder.store(found[q], builder.inttoptr(place, found[q].type.as_pointer(1)))
        return context.get_dummy_value()

    rest = [_fragments(columns), types.int64, types.int64, types.int32, types.int32]
    return types.void(*_literals(name, columns, whole), *rest), emit


def _store_pair(builder, address, pair, size):
    """Two neighbouring elements of `size` bytes, by one access."""
    type_ = ir.IntType(8 * size)
    vector = ir.VectorType(type_, 2)
    both = ir.Constant(vector, ir.Undefined)
    for q, value in enumerate(pair):
        both = builder.insert_element(both, builder.bitcast(value, type_), I32(q))
    builder.store(both, builder.inttoptr(address, vector.as_pointer(1)), align=2 * size)
