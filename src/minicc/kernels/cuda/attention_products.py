"""Attention's two products on CUDA: scores of a warp's queries with keys in shared memory, and sums of values by weights.

Tiles in shared memory are those of kernels/cuda/tiles.py: rows of 128 bytes, swizzled; longer heads lie in several such panels,
one behind the other. A warp has 16 rows; who has which score and sum is told in softmax_tiles. So weights never leave
the registers: tensor cores want their left operands nearly as they gave the scores, and on the FMA units the four
threads of a row hand weights to each other. `element` is one of "f16", "bf16", "tf32" (operands are rounded already) and
"f32", which is multiplied exactly.
"""

# ruff: noqa: ARG001  (Numba prescribes the parameters of intrinsics and of their emitters)

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from minicc.kernels.cuda.softmax_tiles import elements, fragments, literals
from minicc.kernels.cuda.tiles import ELEMENTS, F32, I32, I64, ROW, SHARED, assembly, hops, known

_PANEL_STEPS = ROW // 32  # steps of 32 bytes, a product each of tensor cores, in a panel
_MATRICES = ir.LiteralStructType([I32] * 4)
_LOAD = "ldmatrix.sync.aligned.m8n8.x4{}.shared.b16 {{$0,$1,$2,$3}}, [$4];"
_MULTIPLY = "mma.sync.aligned.{} {{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9}}, {{$10,$11,$12,$13}};"


def _load(builder, base, offset, count):
    """`count` float32 of shared memory; the address is base plus a constant."""
    type_ = ir.VectorType(F32, count)
    found = builder.load(builder.inttoptr(builder.add(base, I32(offset)), type_.as_pointer(SHARED)), align=4 * count)
    return [builder.extract_element(found, I32(i)) for i in range(count)]


def _load_matrices(builder, base, row, chunk, transposed=False):
    """Four 8x8 matrices. row, chunk: of this lane, from the base; rows of a lane differ from its first by multiples of 8."""
    swizzled = builder.xor(chunk, builder.and_(row, I32(7)))
    where = builder.add(builder.add(base, builder.shl(row, I32(7))), builder.shl(swizzled, I32(4)))
    text = _LOAD.format(".trans" if transposed else "")
    return elements(builder, assembly(builder, text, "=r,=r,=r,=r,r", _MATRICES, [where]), 4)


def _multiply(builder, name, left, right, sums):
    constraints = ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4)
    text = _MULTIPLY.format(ELEMENTS[name].mma)
    four = ir.LiteralStructType([F32] * 4)
    return elements(builder, assembly(builder, text, constraints, four, [*left, *right, *sums], effects=False), 4)


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

    return tuple_(*literals(count, width), *[types.int64] * 3, *[types.int32] * 4), emit


@intrinsic
def query_fragments(typing_context, held, steps, panel, shared, row, lane):
    """The 16 queries from `row` on for `scores`: if `held` left operands, 4 int32 for each of `steps` of 32 bytes.

    Else it is where they begin in the panel of each step, and they are read for every tile. held, steps, panel: literals; panel:
    bytes of one.
    """
    if not known(held, steps, panel):
        return None
    kept, count, apart = (v.literal_value for v in (held, steps, panel))
    tuple_ = types.UniTuple(types.int32, (4 if kept else 1) * count)

    def emit(context, builder, signature, values):
        base, row, lane = values[3:]
        starts = [builder.add(base, builder.mul(row, I32(ROW)))] * count
        starts = [builder.add(start, I32(step // _PANEL_STEPS * apart)) for step, start in enumerate(starts)]
        found = [x for step, start in enumerate(starts) for x in _left_operand(builder, start, step, lane)] if kept else starts
        return context.make_tuple(builder, tuple_, found)

    return tuple_(*literals(kept, count, apart), *[types.int32] * 3), emit


def _left_operand(builder, start, step, lane):
    """16 rows of a panel, of a step the 32 bytes."""
    chunk = builder.add(builder.lshr(lane, I32(4)), I32(2 * (step % _PANEL_STEPS)))
    return _load_matrices(builder, start, builder.and_(lane, I32(15)), chunk)


@intrinsic
def scores(typing_context, element, held, keys, panel, scale, queries, tile, lane):
    """Products of a warp's queries with `keys` keys in shared memory, times `scale`.

    element, held, keys, panel: literals; panel: bytes of one of the tile's. queries: `query_fragments`, not held for "f32".
    """
    if not known(element, held, keys, panel):
        return None
    name, kept, count, apart = (v.literal_value for v in (element, held, keys, panel))
    tuple_ = fragments(count)

    def emit(context, builder, signature, values):
        scale, given, tile, lane = values[4:]
        lefts = elements(builder, given, queries.count)
        if kept:
            lefts = [lefts[i : i + 4] for i in range(0, len(lefts), 4)]
        make = _tensor_scores if ELEMENTS[name].mma else _exact_scores
        sums = make(builder, name, count, apart, lefts, tile, lane)
        return context.make_tuple(builder, tuple_, [builder.fmul(x, scale) for x in sums])

    return tuple_(*literals(name, kept, count, apart), types.float32, queries, types.int32, types.int32), emit


def _tensor_scores(builder, name, keys, apart, lefts, tile, lane):
    """lefts: of each step the left operand, or where it begins."""
    sums = [ir.Constant(F32, 0.0)] * (keys // 2)
    row = builder.add(builder.and_(lane, I32(7)), builder.shl(builder.lshr(lane, I32(4)), I32(3)))
    chunk = builder.and_(builder.lshr(lane, I32(3)), I32(1))
    for step, left in enumerate(lefts):
        fragment = left if isinstance(left, list) else _left_operand(builder, left, step, lane)
        start = builder.add(tile, I32(step // _PANEL_STEPS * apart))
        place = builder.add(chunk, I32(2 * (step % _PANEL_STEPS)))
        for pair in range(keys // 16):
            base = builder.add(start, I32(16 * pair * ROW))
            right = _load_matrices(builder, base, row, place)
            for half in range(2):
                first = 8 * pair + 4 * half
                operand = right[2 * half : 2 * half + 2]
                sums[first : first + 4] = _multiply(builder, name, fragment, operand, sums[first : first + 4])
    return sums


def _exact_scores(builder, name, keys, apart, lefts, tile, lane):
    sums = [ir.Constant(F32, 0.0)] * (keys // 2)
    group, member = builder.lshr(lane, I32(2)), builder.shl(builder.and_(lane, I32(3)), I32(1))
    for step, start in enumerate(lefts):
        row = builder.add(start, builder.mul(group, I32(ROW)))
        for chunk in range(2 * (step % _PANEL_STEPS), 2 * (step % _PANEL_STEPS) + 2):
            place = builder.add(row, builder.shl(builder.xor(group, I32(chunk)), I32(4)))
            queries = [_load(builder, place, 8 * half * ROW, 4) for half in range(2)]
            for q in range(2):
                own = builder.add(member, I32(q))  # of the keys of a tile of 8
                where = builder.add(builder.mul(own, I32(ROW)), builder.shl(builder.xor(own, I32(chunk)), I32(4)))
                base = builder.add(tile, where)
                for eight in range(keys // 8):
                    key = _load(builder, base, step // _PANEL_STEPS * apart + 8 * eight * ROW, 4)
                    for half, query in enumerate(queries):
                        number = 4 * eight + 2 * half + q
                        for a, b in zip(query, key):
                            sums[number] = builder.fma(a, b, sums[number])
    return sums


@intrinsic
def weighted_sums(typing_context, element, keys, width, panel, sums, weights, tile, lane):
    """sums + weights, rounded to the element type, times `keys` rows of values in shared memory.

    The first four are literals; panel: bytes of one of the tile's.
    """
    if not known(element, keys, width, panel):
        return None
    name, count, columns, apart = (v.literal_value for v in (element, keys, width, panel))
    tuple_ = fragments(columns)
    add = {"f32": _add_exactly, "tf32": _add_in_tf32}.get(name, _add_in_16_bits)

    def emit(context, builder, signature, values):
        sums, weights, tile, lane = values[4:]
        sums, weights = elements(builder, sums, columns // 2), elements(builder, weights, count // 2)
        add(builder, name, apart, sums, weights, tile, lane)
        return context.make_tuple(builder, tuple_, sums)

    return tuple_(*literals(name, count, columns, apart), tuple_, fragments(count), types.int32, types.int32), emit


def _add_in_16_bits(builder, name, apart, sums, weights, tile, lane):
    """A step is 16 keys: two tiles of scores side by side are a left operand as they lie."""
    row, chunk = builder.and_(lane, I32(15)), builder.lshr(lane, I32(4))
    pack = f"cvt.rn.{name}x2.f32 $0, $1, $2;"
    for step in range(len(weights) // 8):
        own = weights[8 * step : 8 * step + 8]
        left = [assembly(builder, pack, "=r,f,f", I32, [own[2 * n + 1], own[2 * n]], effects=False) for n in range(4)]
        for pair in range(len(sums) // 8):
            number, place = divmod(pair, _PANEL_STEPS)
            base = builder.add(tile, I32(number * apart + 16 * step * ROW))
            right = _load_matrices(builder, base, row, builder.add(chunk, I32(2 * place)), transposed=True)
            for half in range(2):
                first = 8 * pair + 4 * half
                operand = right[2 * half : 2 * half + 2]
                sums[first : first + 4] = _multiply(builder, name, left, operand, sums[first : first + 4])


def _add_in_tf32(builder, name, apart, sums, weights, tile, lane):
    """A step is 8 keys, counted in another order: k and k + 4 of the product are the keys 2k and 2k + 1, which a thread has."""
    group, member = builder.lshr(lane, I32(2)), builder.shl(builder.and_(lane, I32(3)), I32(1))
    for step in range(len(weights) // 4):
        own = [weights[4 * step + n] for n in (0, 2, 1, 3)]
        left = [assembly(builder, "cvt.rna.tf32.f32 $0, $1;", "=r,f", I32, [x], effects=False) for x in own]
        for eight in range(len(sums) // 4):
            panel, place = divmod(eight, _PANEL_STEPS)
            right = []
            for q in range(2):
                row = builder.add(member, I32(q))
                chunk = builder.xor(builder.add(builder.lshr(group, I32(2)), I32(2 * place)), row)
                where = builder.add(builder.mul(row, I32(ROW)), builder.shl(chunk, I32(4)))
                where = builder.add(where, builder.shl(builder.and_(group, I32(3)), I32(2)))
                (value,) = _load(builder, builder.add(tile, where), panel * apart + 8 * step * ROW, 1)
                right.append(builder.bitcast(value, I32))
            first = 4 * eight
            sums[first : first + 4] = _multiply(builder, name, left, right, sums[first : first + 4])


def _add_exactly(builder, name, apart, sums, weights, tile, lane):
    """Key by key: the thread of a row that has its weight gives it to the other three."""
    member = builder.and_(lane, I32(3))
    for number in range(2 * len(weights)):
        owner, q = divmod(number % 8, 2)
        hand = f"shfl.sync.idx.b32 $0, $1, {owner}, {_OF_FOUR}, -1;"
        own = [weights[number // 8 * 4 + 2 * half + q] for half in range(2)]
        first, second = (assembly(builder, hand, "=f,f", F32, [weight]) for weight in own)
        low = builder.xor(builder.lshr(member, I32(1)), I32(q))
        within = builder.add(builder.shl(low, I32(4)), builder.shl(builder.and_(member, I32(1)), I32(3)))
        base = builder.add(tile, within)
        for eight in range(len(sums) // 4):
            panel, place = divmod(eight, _PANEL_STEPS)
            pair = _load(builder, base, panel * apart + number * ROW + 32 * (place ^ owner), 2)
            for half, weight in enumerate((first, second)):
                for r, value in enumerate(pair):
                    at = 4 * eight + 2 * half + r
                    sums[at] = builder.fma(weight, value, sums[at])


_OF_FOUR = 0x1C1F  # lanes are counted in groups of four
