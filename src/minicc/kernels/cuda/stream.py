"""Stream-K on CUDA: blocks take equal shares of the steps of all tiles, and the last one at a tile adds its parts.

The steps of k of all tiles are numbered, tile by tile, and block b makes `share` of them from step b * share on. So a tile may be
cut between neighbouring blocks. Each of them leaves its sums in memory, a part of the tile, and counts itself in; whoever
comes last adds the parts in the order of the blocks, so that a result has the same bits whoever that is, and goes on with
the sums of the whole tile. No block waits for another one, so that they may run in any order and need not all fit the device.
Osama et al., "Stream-K: Work-centric Parallel Decomposition for Dense Matrix-Matrix Multiplication on the GPU" (2023), where the
block that began a tile waits for the others.

Memory that the launches of a plan have in common (`Launch.workspace`): COUNTER_BYTES of int32 counters, zero between launches,
that of a tile with the number of the first block that makes it; then two parts of each block: of the tile that it goes on with
and of the one that it begins. A part holds each thread's sums, four by four, those of neighbouring threads side by side.
"""

# ruff: noqa: ARG001  (Numba prescribes the parameters of intrinsics and of their emitters)

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from minicc.kernels.cuda.intrinsics import helper
from minicc.kernels.cuda.tiles import ELEMENTS, I32, I64, assembly, blocks, int32, known, sums_type
from minicc.kernels.cuda.windows import divide


@helper
def share_of(total):
    """Steps of a block, of so many in all; the last blocks may have fewer, or none."""
    return divide(int32(total + blocks() - int32(1)), blocks())


@helper
def next_piece(at, last, steps, share):
    """Of the steps from `at` to `last`: (tile, first and last step in it, first block that makes the tile, number of blocks).

    steps: of a tile. share: of a block.
    """
    tile = divide(at, steps)
    start = int32(tile * steps)
    begin = int32(at - start)
    end = int32(min(steps, begin + last - at))
    first = divide(start, share)
    return tile, begin, end, first, int32(divide(int32(start + steps - int32(1)), share) - first + int32(1))


@helper
def part_of(number, first):
    """The number of the part that block `number` leaves of a tile which block `first` begins."""
    return int32(2 * number + (number == first))


def _carrier(element, wm, wn):
    """The tuple type of a thread's sums, their number, and LLVM's vector of four of them."""
    tuple_, count, type_ = sums_type(element, wm, wn)
    return tuple_, count, ir.VectorType(type_, 4)


def _places(builder, address, tid, threads, count, vector):
    """Pointers to a thread's vectors in a part."""
    start = builder.add(address, builder.shl(builder.zext(tid, I64), I64(4)))
    pointer = vector.as_pointer(1)
    return [builder.inttoptr(builder.add(start, I64(16 * threads * q)), pointer) for q in range(count // 4)]


@intrinsic
def put_part(typing_context, element, wm, wn, threads, address, tid, sums):
    """Stores a thread's sums of a warp tile into a part.

    element, wm, wn, threads: literals: of the sums, of the block. address: of the part, a multiple of 16.
    """
    if not known(element, wm, wn, threads):
        return None
    name, height, width, own = (v.literal_value for v in (element, wm, wn, threads))
    tuple_, count, vector = _carrier(name, height, width)

    def emit(context, builder, signature, values):
        address, tid, sums = values[4:]
        for q, place in enumerate(_places(builder, address, tid, own, count, vector)):
            four = ir.Constant(vector, ir.Undefined)
            for lane in range(4):
                four = builder.insert_element(four, builder.extract_value(sums, 4 * q + lane), I32(lane))
            builder.store(four, place, align=16)
        return context.get_dummy_value()

    literals = [types.literal(v) for v in (name, height, width, own)]
    return types.void(*literals, types.int64, types.int32, tuple_), emit


@intrinsic
def add_part(typing_context, element, wm, wn, threads, address, tid, sums):
    """sums + those that `put_part` stored."""
    if not known(element, wm, wn, threads):
        return None
    name, height, width, own = (v.literal_value for v in (element, wm, wn, threads))
    tuple_, count, vector = _carrier(name, height, width)

    def emit(context, builder, signature, values):
        address, tid, sums = values[4:]
        add = builder.add if ELEMENTS[name].integer else builder.fadd
        totals = []
        for q, place in enumerate(_places(builder, address, tid, own, count, vector)):
            four = builder.load(place, align=16)
            totals += [
                add(builder.extract_value(sums, 4 * q + lane), builder.extract_element(four, I32(lane))) for lane in range(4)
            ]
        return context.make_tuple(builder, tuple_, totals)

    literals = [types.literal(v) for v in (name, height, width, own)]
    return tuple_(*literals, types.int64, types.int32, tuple_), emit


@intrinsic
def last_to_arrive(typing_context, counter, others, tid):
    """Counts the block in at a tile: whether `others` blocks did so before (1 or 0), whose parts it sees then.

    counter: address of an int32, which the last one sets back to 0 as it counts. All threads of the block come here, with parts
    that they have stored. What they stored happens before the barrier, the barrier before the counting of thread 0,
    which releases it for the last block and acquires what the others have released, and that before the second barrier.
    """
    text = (
        "{.reg .pred p, q; .reg .u32 before; mov.u32 before, 0xFFFFFFFF; setp.eq.u32 p, $3, 0; bar.sync 0; "
        "@p atom.acq_rel.gpu.global.inc.u32 before, [$1], $2; "
        "setp.eq.u32 p, before, $2; bar.red.or.pred q, 0, p; selp.u32 $0, 1, 0, q;}"
    )

    def emit(context, builder, signature, values):
        counter, others, tid = values
        return assembly(builder, text, "=r,l,r,r", I32, [counter, others, tid])

    return types.int32(types.int64, types.int32, types.int32), emit
