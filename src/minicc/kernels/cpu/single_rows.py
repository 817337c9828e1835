"""Products of one row with a matrix whose rows are read in place: what attention does for a few queries.

With fewer queries than vector lanes, lanes run along the matrix rows instead: nothing is packed, every row is
read once, at the speed of memory.
"""

# ruff: noqa: ARG001  (Numba prescribes the parameters of intrinsics and of their emitters)

from numba.core import types
from numba.extending import intrinsic

from minicc.kernels.cpu.columns import exchange
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
from minicc.kernels.cpu.tiles import are_literals

_FLOATS = types.CPointer(types.float32)
CHAINS = 8  # independent sums that hide the latency of fma


def _scalar(builder, pointer, at, kind):
    return set_memory_kind(builder, builder.load(builder.gep(pointer, [at])), kind)


def _sums_of(builder, vectors):
    """The vector whose lane i is the sum of vector i; as many vectors as lanes."""
    half = len(vectors)
    while half > 1:
        half //= 2
        # Lanes with bit `half` go on with the second vector of each pair, the others with the first.
        vectors = [builder.fadd(*exchange(builder, *pair, half)) for pair in zip(vectors[:half], vectors[half:])]
    return vectors[0]


@intrinsic
def row_dots(typing_context, width, left, matrix, step, count, depth, results):
    """results[t] = sum over k < depth of left[k] * matrix[t * step + k] for t < count.

    width: the literal VW. left, results: float32 scratch; matrix: float32 input.
    """
    if not are_literals(width):
        return None
    vw = width.literal_value

    def body(builder, arguments):
        left, matrix, step, count, depth, results = arguments
        whole = builder.and_(depth, I64(-vw))

        def dots(t, number):
            """The dot products of `number` rows from t on, as scalars or as one vector."""
            starts = [
                builder.gep(matrix, [builder.mul(builder.add(t, I64(r)), step)]) for r in range(number)
            ]
            sums = [stack_array(builder, vector(F32, vw), 1) for _ in starts]
            for total in sums:
                builder.store(constant(vector(F32, vw), 0.0), total)
            with counted_loop(builder, I64(0), whole, vw) as k:
                x = load_vector(builder, builder.gep(left, [k]), vw, "scratch")
                for start, total in zip(starts, sums):
                    y = load_vector(builder, builder.gep(start, [k]), vw, "input")
                    builder.store(fma(builder, x, y, builder.load(total)), total)
            totals = [builder.load(total) for total in sums]
            found = stack_array(builder, vector(F32, vw), 1)
            builder.store(_sums_of(builder, totals + [totals[0]] * (vw - number)), found)
            with counted_loop(builder, whole, depth) as k:
                x = splat(builder, _scalar(builder, left, k, "scratch"), vw)
                y = constant(vector(F32, vw), 0.0)
                for r, start in enumerate(starts):
                    y = builder.insert_element(y, _scalar(builder, start, k, "input"), I32(r))
                builder.store(fma(builder, x, y, builder.load(found)), found)
            return builder.load(found)

        groups = builder.and_(count, I64(-vw))
        with counted_loop(builder, I64(0), groups, vw) as t:
            store_vector(builder, dots(t, vw), builder.gep(results, [t]), "scratch")
        with counted_loop(builder, groups, count) as t:
            first = builder.extract_element(dots(t, 1), I32(0))
            set_memory_kind(builder, builder.store(first, builder.gep(results, [t])), "scratch")

    def emit(context, builder, signature, values):
        outlined(builder, "row_dots", values[1:], body)
        return context.get_dummy_value()

    size = types.int64
    return types.void(types.literal(vw), _FLOATS, _FLOATS, size, size, size, _FLOATS), emit


@intrinsic
def add_weighted_rows(typing_context, width, weights, matrix, step, count, columns, sums):
    """sums[c] += sum over t < count of weights[t] * matrix[t * step + c] for c < columns.

    width: the literal VW. weights, sums: float32 scratch; matrix: float32 input.
    """
    if not are_literals(width):
        return None
    vw = width.literal_value

    def body(builder, arguments):
        weights, matrix, step, count, columns, sums = arguments

        def add(column, number):
            """`number` vectors of columns; fewer than CHAINS are summed in several parts."""
            parts = CHAINS // number
            places = [stack_array(builder, vector(F32, vw), 1) for _ in range(parts * number)]
            targets = [builder.gep(sums, [builder.add(column, I64(v * vw))]) for v in range(number)]
            for v, place in enumerate(places):
                start = load_vector(builder, targets[v], vw, "scratch") if v < number else constant(vector(F32, vw), 0.0)
                builder.store(start, place)

            def rows(t, some):
                for u in range(some):
                    at = builder.add(t, I64(u))
                    x = splat(builder, _scalar(builder, weights, at, "scratch"), vw)
                    start = builder.gep(matrix, [builder.add(builder.mul(at, step), column)])
                    for v in range(number):
                        y = load_vector(builder, builder.gep(start, [I64(v * vw)]), vw, "input")
                        place = places[u * number + v]
                        builder.store(fma(builder, x, y, builder.load(place)), place)

            whole = builder.and_(count, I64(-parts))
            with counted_loop(builder, I64(0), whole, parts) as t:
                rows(t, parts)
            with counted_loop(builder, whole, count) as t:
                rows(t, 1)
            for v, target in enumerate(targets):
                total = builder.load(places[v])
                for part in range(1, parts):
                    total = builder.fadd(total, builder.load(places[part * number + v]))
                store_vector(builder, total, target, "scratch")

        done = I64(0)
        number = CHAINS
        while number:
            end = builder.add(done, builder.and_(builder.sub(columns, done), I64(-number * vw)))
            with counted_loop(builder, done, end, number * vw) as column:
                add(column, number)
            done, number = end, number // 2
        with counted_loop(builder, done, columns) as column:
            place = builder.gep(sums, [column])
            total = stack_array(builder, F32, 1)
            builder.store(set_memory_kind(builder, builder.load(place), "scratch"), total)
            with counted_loop(builder, I64(0), count) as t:
                x = _scalar(builder, weights, t, "scratch")
                y = _scalar(builder, matrix, builder.add(builder.mul(t, step), column), "input")
                builder.store(fma(builder, x, y, builder.load(total)), total)
            set_memory_kind(builder, builder.store(builder.load(total), place), "scratch")

    def emit(context, builder, signature, values):
        outlined(builder, "add_weighted_rows", values[1:], body)
        return context.get_dummy_value()

    size = types.int64
    return types.void(types.literal(vw), _FLOATS, _FLOATS, size, size, size, _FLOATS), emit
