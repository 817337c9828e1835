"""Attention on CUDA between its products and behind them: a warp's softmax step by step, and where its sums go.

A warp has 16 rows of queries. Fragments, of scores as of sums, are those of kernels/cuda/tiles.py for tensor cores with WM = 16,
whatever multiplies: a thread has, of every 8 columns, those at 2 (lane % 4) and behind it, of the rows lane / 4 and
lane / 4 + 8, called the first and the second half. The products are in attention_products.
"""

# ruff: noqa: ARG001  (Numba prescribes the parameters of intrinsics and of their emitters)

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from minicc.kernels.cuda.intrinsics import bfloat_to_float, float_to_bfloat, float_to_half, half_to_float
from minicc.kernels.cuda.tiles import (
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


def literals(*values):
    return [types.literal(v) for v in values]


def fragments(keys):
    return sums_type("f16", 16, keys)[0]


def elements(builder, value, count):
    return [builder.extract_value(value, i) for i in range(count)]


def _exp2(builder, value):
    return assembly(builder, "ex2.approx.ftz.f32 $0, $1;", "=f,f", F32, [value], effects=False)


def _larger(builder, a, b):
    return assembly(builder, "max.f32 $0, $1, $2;", "=f,f,f", F32, [a, b], effects=False)


def from_lane(builder, value, distance):
    """The value of the lane whose number differs in the bits of `distance`."""
    return assembly(builder, f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, -1;", "=f,f", F32, [value])


@intrinsic
def float_of_bits(typing_context, bits):
    """The float32 whose bits an int64 holds."""

    def emit(context, builder, signature, values):
        return builder.bitcast(builder.trunc(values[0], I32), F32)

    return types.float32(types.int64), emit


@intrinsic
def quotient(typing_context, number, divisor):
    """Of two int32 that are not negative: of int64, as Numba's own would be, it takes several times as long."""

    def emit(context, builder, signature, values):
        return builder.udiv(values[0], values[1])

    return types.int32(types.int32, types.int32), emit


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

    return types.void(*literals(count, width), types.int32, tuple_, types.int32), emit


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
    tuple_ = fragments(count)
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
    return tuple_(*literals(name, count), tuple_, *rest), emit


@intrinsic
def forbid(typing_context, keys, found, start, first, second, lane):
    """-inf for keys that a row may not attend: those from `first` on for the first half, from `second` on for the second."""
    if not known(keys):
        return None
    count = keys.literal_value
    tuple_ = fragments(count)

    def emit(context, builder, signature, values):
        found, start, first, second, lane = values[1:]
        limits = [builder.sub(limit, start) for limit in (first, second)]
        result = []
        for number, half, place in _each_key(builder, count, lane):
            allowed = builder.icmp_signed("<", place, limits[half])
            lowest = ir.Constant(F32, float("-inf"))
            result.append(builder.select(allowed, builder.extract_value(found, number), lowest))
        return context.make_tuple(builder, tuple_, result)

    return tuple_(*literals(count), tuple_, *[types.int32] * 4), emit


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
            top = _larger(builder, top, from_lane(builder, top, distance))
        return top

    return types.float32(*literals(count, which), fragments(count), types.float32), emit


@intrinsic
def warp_top(typing_context, value):
    """The largest of the values of a warp's threads."""

    def emit(context, builder, signature, values):
        top = values[0]
        for distance in (1, 2, 4, 8, 16):
            top = _larger(builder, top, from_lane(builder, top, distance))
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
    tuple_ = fragments(count)

    def emit(context, builder, signature, values):
        result = []
        for number in range(count // 2):
            lower = builder.fsub(builder.extract_value(values[1], number), values[2 + number % 4 // 2])
            result.append(_exp2(builder, builder.fmul(lower, ir.Constant(F32, _LOG2_E))))
        return context.make_tuple(builder, tuple_, result)

    return tuple_(*literals(count), tuple_, types.float32, types.float32), emit


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

    return types.float32(*literals(count, which), fragments(count)), emit


@intrinsic
def sum_of_four(typing_context, value):
    """The sum of the values of the four threads that share a row."""

    def emit(context, builder, signature, values):
        total = values[0]
        for distance in (1, 2):
            total = builder.fadd(total, from_lane(builder, total, distance))
        return total

    return types.float32(types.float32), emit


@intrinsic
def rescale(typing_context, width, sums, first, second):
    """Sums of `width` columns (a literal) times a factor for each half."""
    if not known(width):
        return None
    columns = width.literal_value
    tuple_ = fragments(columns)

    def emit(context, builder, signature, values):
        result = [
            builder.fmul(builder.extract_value(values[1], n), values[2 + n % 4 // 2]) for n in range(columns // 2)
        ]
        return context.make_tuple(builder, tuple_, result)

    return tuple_(*literals(columns), tuple_, types.float32, types.float32), emit


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
        for number, value in enumerate(elements(builder, values[2], numbers.count)):
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

    return tuple_(*literals(tuple_.count), types.int32, types.int32), emit


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

    rest = [fragments(columns), types.int64, types.int64, types.int32, types.int32]
    return types.void(*literals(name, columns, whole), *rest), emit


def _store_pair(builder, address, pair, size):
    """Two neighbouring elements of `size` bytes, by one access."""
    type_ = ir.IntType(8 * size)
    vector = ir.VectorType(type_, 2)
    both = ir.Constant(vector, ir.Undefined)
    for q, value in enumerate(pair):
        both = builder.insert_element(both, builder.bitcast(value, type_), I32(q))
    builder.store(both, builder.inttoptr(address, vector.as_pointer(1)), align=2 * size)
