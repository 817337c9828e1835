"""Dot products of a few rows on CUDA, straight from global memory: the words of kernels/cuda/gemv.py.

A warp multiplies a few rows of A by a few columns of B, its lanes along k: a lane takes chunks of 16 bytes, 32 chunks
apart, of every row and column, and sums float32 in registers. Each word unrolls itself while it emits LLVM, see
kernels/cuda/tiles.py. `element` is one of "f32", "tf32" (here float32 as well), "f16" and "bf16".
"""

# ruff: noqa: ARG001  (Numba prescribes the parameters of intrinsics and of their emitters)

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from minicc.kernels.cuda.intrinsics import FULL_WARP, bfloat_to_float, half_to_float
from minicc.kernels.cuda.tiles import CHUNK, ELEMENTS, F32, I16, I32, I64, SHARED, known

GLOBAL = 1
WARP = 32


@intrinsic
def line_addresses(typing_context, count, address, stride, first, lines):
    """Addresses of `count` (a literal) rows of k from number `first` on, a tuple of int64; the last of `lines` for those behind.

    address: of row 0; stride: bytes from row to row.
    """
    if not known(count):
        return None
    tuple_ = types.UniTuple(types.int64, count.literal_value)

    def emit(context, builder, signature, values):
        _, address, stride, first, lines = values
        last = builder.sub(lines, I32(1))
        found = []
        for number in range(count.literal_value):
            line = builder.add(first, I32(number))
            line = builder.select(builder.icmp_signed("<", line, last), line, last)
            found.append(builder.add(address, builder.mul(builder.sext(line, I64), stride)))
        return context.make_tuple(builder, tuple_, found)

    return tuple_(types.literal(count.literal_value), types.int64, types.int64, types.int32, types.int32), emit


@intrinsic
def no_sums(typing_context, rows, columns):
    """Sums of rows x columns (literals), all 0."""
    if not known(rows, columns):
        return None
    tuple_ = types.UniTuple(types.float32, rows.literal_value * columns.literal_value)

    def emit(context, builder, signature, values):
        return context.make_tuple(builder, tuple_, [F32(0)] * tuple_.count)

    return tuple_(types.literal(rows.literal_value), types.literal(columns.literal_value)), emit


@intrinsic
def add_products(typing_context, element, deep, piece, b_piece, sums, lefts, rights, chunk):
    """sums + the products of this lane's next `deep` chunks of every row by those of every column.

    element, deep, piece, b_piece: literals; the last two are the bytes of one load of A and of B, powers of two up to 16 that
    divide the addresses. lefts, rights: `line_addresses`. chunk: the first one. All loads come before all products.
    """
    if not known(element, deep, piece, b_piece):
        return None
    name, depth, left_piece, right_piece = (v.literal_value for v in (element, deep, piece, b_piece))

    def emit(context, builder, signature, values):
        start = builder.shl(builder.sext(values[7], I64), I64(4))
        places = [builder.add(start, I64(CHUNK * WARP * step)) for step in range(depth)]

        def words(lines, count, bytes_):
            bases = [builder.extract_value(lines, number) for number in range(count)]
            return [[_load_chunk(builder, builder.add(base, place), bytes_) for base in bases] for place in places]

        columns, rows = words(values[6], rights.count, right_piece), words(values[5], lefts.count, left_piece)
        found = [builder.extract_value(values[4], number) for number in range(sums.count)]
        for step in range(depth):
            # Word by word, so that few elements are in registers as float32.
            for left, right in zip(zip(*rows[step]), zip(*columns[step])):
                _multiply(builder, name, left, right, found)
        return context.make_tuple(builder, sums, found)

    literals = [types.literal(v) for v in (name, depth, left_piece, right_piece)]
    return sums(*literals, sums, lefts, rights, types.int32), emit


@intrinsic
def add_last(typing_context, element, sums, lefts, rights, k):
    """sums + the products of element k of every row by that of every column; as `add_products`."""
    if not known(element):
        return None
    name = element.literal_value
    size = ELEMENTS[name].size

    def emit(context, builder, signature, values):
        place = builder.mul(builder.sext(values[4], I64), I64(size))

        def numbers(lines, count):
            bases = [builder.extract_value(lines, number) for number in range(count)]
            return [_load(builder, builder.add(base, place), size) for base in bases]

        found = [builder.extract_value(values[1], number) for number in range(sums.count)]
        _multiply(builder, name, numbers(values[2], lefts.count), numbers(values[3], rights.count), found)
        return context.make_tuple(builder, sums, found)

    return sums(types.literal(name), sums, lefts, rights, types.int32), emit


def _load(builder, address, size):
    """`size` bytes of global memory that no thread writes: an integer up to 4, then a vector of words."""
    kind = ir.IntType(8 * size) if size <= 4 else ir.VectorType(I32, size // 4)
    found = builder.load(builder.inttoptr(address, kind.as_pointer(GLOBAL)), align=size)
    found.set_metadata("invariant.load", builder.module.add_metadata([]))
    return found


def _load_chunk(builder, address, piece):
    """The four words of a chunk."""
    found = []
    for at in range(0, CHUNK, piece):
        loaded = _load(builder, builder.add(address, I64(at)), piece)
        found += [builder.extract_element(loaded, I32(i)) for i in range(piece // 4)] if piece > 4 else [loaded]
    if piece < 4:
        pairs = [[builder.zext(half, I32) for half in found[i : i + 2]] for i in range(0, len(found), 2)]
        found = [builder.or_(low, builder.shl(high, I32(16))) for low, high in pairs]
    return found


def _floats(builder, name, integer):
    """The elements that an integer of one element, or a word, holds, as float32."""
    if ELEMENTS[name].size == 4:
        return [builder.bitcast(integer, F32)]
    convert = half_to_float if name == "f16" else bfloat_to_float
    if integer.type == I16:
        return [convert(builder, integer)]
    return [convert(builder, builder.trunc(builder.lshr(integer, I32(shift)), I16)) for shift in (0, 16)]


def _multiply(builder, name, left, right, sums):
    """Adds to sums[row * columns + column] the products of the elements in an integer of every row by those of every column."""
    columns = [_floats(builder, name, integer) for integer in right]
    for i, row in enumerate(left):
        for a, *others in zip(_floats(builder, name, row), *columns):
            for j, b in enumerate(others, i * len(right)):
                sums[j] = builder.fma(a, b, sums[j])


@intrinsic
def store_dots(typing_context, columns, pitch, shared, column, lane, sums):
    """Adds the sums of a warp's lanes and stores them to a matrix of float32 in shared memory, rows `pitch` apart.

    columns, pitch: literals; column: where the warp's first one lies. All threads of the warp must call it.
    """
    if not known(columns, pitch):
        return None
    width, apart = columns.literal_value, pitch.literal_value

    def emit(context, builder, signature, values):
        _, _, shared, column, lane, given = values
        kind = ir.FunctionType(F32, [I32, F32, I32, I32])
        shuffle = builder.module.globals.get(_SHUFFLE) or ir.Function(builder.module, kind, _SHUFFLE)
        found = [builder.extract_value(given, number) for number in range(sums.count)]
        for distance in (16, 8, 4, 2, 1):
            others = [builder.call(shuffle, [I32(FULL_WARP), value, I32(distance), I32(31)]) for value in found]
            found = [builder.fadd(value, other) for value, other in zip(found, others)]
        with builder.if_then(builder.icmp_signed("==", lane, I32(0))):
            base = builder.add(shared, builder.shl(column, I32(2)))
            for number, value in enumerate(found):
                where = builder.add(base, I32(4 * (number // width * apart + number % width)))
                builder.store(value, builder.inttoptr(where, F32.as_pointer(SHARED)))
        return context.get_dummy_value()

    return types.void(types.literal(width), types.literal(apart), types.int32, types.int32, types.int32, sums), emit


_SHUFFLE = "llvm.nvvm.shfl.sync.bfly.f32"
