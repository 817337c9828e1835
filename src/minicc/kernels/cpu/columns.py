"""Words over rows of NR columns in scratch memory, one value per vector lane: what attention does between its products.

Written as vector IR: of loops over rows with one running value per column LLVM makes scalar code.
"""

# ruff: noqa: ARG001  (Numba prescribes the parameters of intrinsics and of their emitters)

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from minicc.kernels.cpu.intrinsics import (
    F32,
    I32,
    I64,
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
from minicc.kernels.cpu.tiles import UNROLL, are_literals

_FLOATS = types.CPointer(types.float32)
_WORDS = types.CPointer(types.int64)


def _larger(builder, x, y):
    """The larger of two; y where one is NaN."""
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


def _reduction(combine):
    @intrinsic
    def reduce_rows(typing_context, columns, width, rows, count, results):
        """results[j] = combine(rows[:count, j], results[j]); columns, width: literals NR and VW."""
        if not are_literals(columns, width):
            return None
        nr, vw = columns.literal_value, width.literal_value

        def emit(context, builder, signature, values):
            rows, count, results = values[2:]
            places = [builder.gep(results, [I64(at)]) for at in range(0, nr, vw)]
            totals = [stack_array(builder, vector(F32, vw), 1) for _ in places]
            for place, total in zip(places, totals):
                builder.store(load_vector(builder, place, vw, "scratch"), total)

            def step(t, unroll):
                row = builder.gep(rows, [builder.mul(t, I64(nr))])
                for v, total in enumerate(totals):
                    parts = [
                        load_vector(builder, builder.gep(row, [I64(u * nr + v * vw)]), vw, "scratch")
                        for u in range(unroll)
                    ]
                    while len(parts) > 1:  # pairwise: short chains
                        parts = [combine(builder, *pair) for pair in zip(parts[::2], parts[1::2])]
                    builder.store(combine(builder, parts[0], builder.load(total)), total)

            whole = builder.and_(count, I64(-UNROLL))
            with counted_loop(builder, I64(0), whole, UNROLL) as t:
                step(t, UNROLL)
            with counted_loop(builder, whole, count) as t:
                step(t, 1)
            for place, total in zip(places, totals):
                store_vector(builder, builder.load(total), place, "scratch")
            return context.get_dummy_value()

        literals = [types.literal(nr), types.literal(vw)]
        return types.void(*literals, _FLOATS, types.int64, _FLOATS), emit

    return reduce_rows


def _change_rows(builder, shape, rows, count, change):
    """Every vector of rows[:count] becomes change(t)(v, itself), v being its first column; shape: NR and VW."""
    nr, vw = shape
    with counted_loop(builder, I64(0), count) as t:
        row = builder.gep(rows, [builder.mul(t, I64(nr))])
        changed = change(t)
        for v in range(0, nr, vw):
            place = builder.gep(row, [I64(v)])
            store_vector(builder, changed(v, load_vector(builder, place, vw, "scratch")), place, "scratch")


def _mapping(combine):
    @intrinsic
    def map_rows(typing_context, columns, width, rows, count, operand):
        """rows[t, j] = combine(rows[t, j], operand[j]) for t < count; columns, width: literals NR and VW."""
        if not are_literals(columns, width):
            return None
        nr, vw = columns.literal_value, width.literal_value

        def emit(context, builder, signature, values):
            rows, count, operand = values[2:]
            right = {v: load_vector(builder, builder.gep(operand, [I64(v)]), vw, "scratch") for v in range(0, nr, vw)}
            _change_rows(builder, (nr, vw), rows, count, lambda _: lambda v, left: combine(builder, left, right[v]))
            return context.get_dummy_value()

        literals = [types.literal(nr), types.literal(vw)]
        return types.void(*literals, _FLOATS, types.int64, _FLOATS), emit

    return map_rows


column_maxima = _reduction(_larger)
column_sums = _reduction(lambda builder, x, y: builder.fadd(x, y))
subtract_row = _mapping(lambda builder, x, y: builder.fsub(x, y))
multiply_row = _mapping(lambda builder, x, y: builder.fmul(x, y))


@intrinsic
def add_to_rows(typing_context, columns, width, rows, count, source, step):
    """rows[t, j] += source[t * step] for t < count: one number per row, from an input."""
    if not are_literals(columns, width):
        return None
    nr, vw = columns.literal_value, width.literal_value

    def emit(context, builder, signature, values):
        rows, count, source, step = values[2:]

        def change(t):
            number = builder.load(builder.gep(source, [builder.mul(t, step)]))
            right = splat(builder, set_memory_kind(builder, number, "input"), vw)
            return lambda _, left: builder.fadd(left, right)

        _change_rows(builder, (nr, vw), rows, count, change)
        return context.get_dummy_value()

    literals = [types.literal(nr), types.literal(vw)]
    return types.void(*literals, _FLOATS, types.int64, _FLOATS, types.int64), emit


@intrinsic
def forbid_beyond(typing_context, columns, width, rows, count, limits):
    """rows[t, j] = -inf for limits[j] <= t < count; limits: int32 scratch."""
    if not are_literals(columns, width):
        return None
    nr, vw = columns.literal_value, width.literal_value

    def emit(context, builder, signature, values):
        rows, count, limits = values[2:]
        bounds = {v: load_vector(builder, builder.gep(limits, [I64(v)]), vw, "scratch") for v in range(0, nr, vw)}
        lowest = constant(vector(F32, vw), float("-inf"))

        def change(t):
            place = splat(builder, builder.trunc(t, I32), vw)
            return lambda v, score: builder.select(builder.icmp_signed("<", place, bounds[v]), score, lowest)

        _change_rows(builder, (nr, vw), rows, count, change)
        return context.get_dummy_value()

    literals = [types.literal(nr), types.literal(vw)]
    return types.void(*literals, _FLOATS, types.int64, types.CPointer(types.int32)), emit


def exchange(builder, a, b, half):
    """Two vectors after an exchange: lanes with bit `half` of the first for those without of the second."""
    width = a.type.count
    low = [width + c - half if c & half else c for c in range(width)]
    high = [width + c if c & half else c + half for c in range(width)]
    masks = [ir.Constant(vector(I32, width), [I32(lane) for lane in lanes]) for lanes in (low, high)]
    return [builder.shuffle_vector(a, b, mask) for mask in masks]


def _transposed(builder, vectors):
    """Vectors whose lane i of vector k is lane k of vector i: exchange of ever smaller blocks."""
    width = len(vectors)
    half = width // 2
    while half:
        out = list(vectors)
        for i in range(width):
            if not i & half:
                out[i], out[i + half] = exchange(builder, vectors[i], vectors[i + half], half)
        vectors, half = out, half // 2
    return vectors


def _pointers(builder, table, count, at):
    """Float pointers at element `at` of `count` rows whose byte addresses are in a table."""
    found = []
    for j in range(count):
        start = set_memory_kind(builder, builder.load(builder.gep(table, [I64(j)])), "scratch")
        found.append(builder.gep(builder.inttoptr(start, F32.as_pointer()), [at]))
    return found


@intrinsic
def find_lines(typing_context, columns, table, base, row, rows, length, head_step, row_step):
    """table[j] = byte address of row `row + j`, of the last of `rows` where there is none, for j < NR (a literal).

    Rows are those of heads one after the other, `length` each; base: address of row 0; steps count float32 elements.
    A function of its own: kernels call it for several arrays.
    """
    if not are_literals(columns):
        return None
    nr = columns.literal_value

    def body(builder, arguments):
        table, base, row, rows, length, head_step, row_step = arguments
        head_bytes, row_bytes = (builder.mul(step, I64(4)) for step in (head_step, row_step))
        head, at, i = (stack_array(builder, I64, 1) for _ in range(3))
        first = builder.sdiv(row, length)
        builder.store(builder.srem(row, length), i)
        builder.store(builder.add(base, builder.mul(first, head_bytes)), head)
        start = builder.mul(builder.load(i), row_bytes)
        builder.store(builder.add(builder.load(head), start), at)
        with counted_loop(builder, I64(0), I64(nr)) as j:
            here = builder.load(at)
            set_memory_kind(builder, builder.store(here, builder.gep(table, [j])), "scratch")
            following = builder.add(builder.load(i), I64(1))
            ends = builder.icmp_signed("==", following, length)
            builder.store(builder.select(ends, I64(0), following), i)
            next_head = builder.add(builder.load(head), head_bytes)
            builder.store(builder.select(ends, next_head, builder.load(head)), head)
            moved = builder.select(ends, next_head, builder.add(here, row_bytes))
            more = builder.icmp_signed("<", builder.add(builder.add(row, j), I64(1)), rows)
            builder.store(builder.select(more, moved, here), at)

    def emit(context, builder, signature, values):
        outlined(builder, f"find_lines_{nr}", values[1:], body)
        return context.get_dummy_value()

    return types.void(types.literal(nr), _WORDS, *[types.int64] * 6), emit


@intrinsic
def columns_from_lines(typing_context, columns, width, table, start, factor, rows, add):
    """rows[k, j] = line(j)[start + k] * factor (+ rows[k, j] when the literal `add` is 1) for j, k < VW.

    table: byte addresses of VW lines in an input. columns, width: literals NR and VW.
    """
    if not are_literals(columns, width, add):
        return None
    nr, vw = columns.literal_value, width.literal_value

    def body(builder, arguments):
        table, start, factor, rows = arguments
        scale = splat(builder, factor, vw)
        lines = [load_vector(builder, p, vw, "input") for p in _pointers(builder, table, vw, start)]
        for k, column in enumerate(_transposed(builder, lines)):
            place = builder.gep(rows, [I64(k * nr)])
            if add.literal_value:
                column = fma(builder, column, scale, load_vector(builder, place, vw, "scratch"))
            else:
                column = builder.fmul(column, scale)
            store_vector(builder, column, place, "scratch")

    def emit(context, builder, signature, values):
        outlined(builder, f"columns_from_lines_{nr}_{add.literal_value}", values[2:6], body)
        return context.get_dummy_value()

    literals = [types.literal(nr), types.literal(vw)]
    size = types.int64
    return types.void(*literals, _WORDS, size, types.float32, _FLOATS, types.literal(add.literal_value)), emit


@intrinsic
def lines_from_columns(typing_context, columns, width, rows, factors, table, start):
    """line(j)[start + k] = rows[k, j] * factors[j] for j, k < VW; the lines are in an output."""
    if not are_literals(columns, width):
        return None
    nr, vw = columns.literal_value, width.literal_value

    def body(builder, arguments):
        rows, factors, table, start = arguments
        scale = load_vector(builder, factors, vw, "scratch")
        found = [
            builder.fmul(load_vector(builder, builder.gep(rows, [I64(k * nr)]), vw, "scratch"), scale)
            for k in range(vw)
        ]
        for line, pointer in zip(_transposed(builder, found), _pointers(builder, table, vw, start)):
            store_vector(builder, line, pointer, "output")

    def emit(context, builder, signature, values):
        outlined(builder, f"lines_from_columns_{nr}", values[2:], body)
        return context.get_dummy_value()

    literals = [types.literal(nr), types.literal(vw)]
    return types.void(*literals, _FLOATS, _FLOATS, _WORDS, types.int64), emit
