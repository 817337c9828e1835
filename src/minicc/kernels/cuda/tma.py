"""Copies of whole tiles by Hopper's copy engine (TMA), and the barriers in shared memory that tell when they have landed.

A tensor map (kernels/cuda_launch.TensorMap) describes an array in global memory. One thread asks for a box of it, which lands
in shared memory as kernels/cuda/tiles.py describes tiles: rows of 128 bytes, 16-byte chunks of row r at chunk ^ (r & 7), zeros
where the box reaches outside the array.

A barrier is 8 bytes of shared memory. A phase of it ends when as many arrivals as it was made for have come and all bytes
that were announced have landed; then the next phase begins. Phases have parity 0 and 1 in turn, the first one 0. To wait for
parity 1 of a new barrier returns at once.
"""

# ruff: noqa: ARG001  (Numba prescribes the parameters of intrinsics and of their emitters)

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from minicc.kernels.cuda.tiles import I16, I32, SHARED, assembly, known, sums_type
from minicc.kernels.cuda_launch import MAP_BYTES

VOID = ir.VoidType()


@intrinsic
def phase_begin(typing_context, barrier, arrivals):
    """Makes a barrier (an address in shared memory) of so many arrivals a phase; see `phases_ready`."""

    def emit(context, builder, signature, values):
        assembly(builder, "mbarrier.init.shared::cta.b64 [$0], $1;", "r,r", VOID, list(values))
        return context.get_dummy_value()

    return types.void(types.int32, types.int32), emit


@intrinsic
def phases_ready(typing_context):
    """Lets the copy engine see barriers that this thread has made; other threads see them behind the block's next barrier."""

    def emit(context, builder, signature, values):
        assembly(builder, "fence.mbarrier_init.release.cluster;", "", VOID, [])
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def phase_arrive(typing_context, blocks, barrier, rank):
    """One arrival, behind all that this thread has done, at this barrier of block `rank` of so many of a cluster (a literal)."""
    if not known(blocks):
        return None

    def emit(context, builder, signature, values):
        _, barrier, rank = values
        if blocks.literal_value == 1:
            assembly(builder, "mbarrier.arrive.shared::cta.b64 _, [$0];", "r", VOID, [barrier])
        else:
            there = assembly(builder, "mapa.shared::cluster.u32 $0, $1, $2;", "=r,r,r", I32, [barrier, rank], effects=False)
            assembly(builder, "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [$0];", "r", VOID, [there])
        return context.get_dummy_value()

    return types.void(types.literal(blocks.literal_value), types.int32, types.int32), emit


@intrinsic
def phase_announce(typing_context, barrier, bytes_):
    """One arrival, and so many bytes that have to land before the phase ends."""

    def emit(context, builder, signature, values):
        assembly(builder, "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", "r,r", VOID, list(values))
        return context.get_dummy_value()

    return types.void(types.int32, types.int32), emit


@intrinsic
def phase_wait(typing_context, barrier, parity):
    """Waits for the end of the phase of this parity."""

    def emit(context, builder, signature, values):
        text = "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [$1], $2; selp.u32 $0, 1, 0, p;}"
        again = builder.append_basic_block("phase_wait")
        after = builder.append_basic_block("phase_ended")
        builder.branch(again)
        builder.position_at_end(again)
        ended = assembly(builder, text, "=r,r,r", I32, list(values))
        builder.cbranch(builder.icmp_unsigned("!=", ended, I32(0)), after, again)
        builder.position_at_end(after)
        return context.get_dummy_value()

    return types.void(types.int32, types.int32), emit


@intrinsic
def map_ready(typing_context, map_):
    """Lets the copies of this thread see a tensor map that the host has written to global memory."""

    def emit(context, builder, signature, values):
        text = f"fence.proxy.tensormap::generic.acquire.sys [$0], {MAP_BYTES};"
        assembly(builder, text, "l", VOID, list(values))
        return context.get_dummy_value()

    return types.void(types.int64), emit


@intrinsic
def copy_box(typing_context, blocks, tile, map_, barrier, k, row, b1, b0):
    """Starts the copy of the box at (b0, b1, row, k) of a tensor map to a tile, whose bytes land at the barrier.

    blocks: a literal; where it is more than 1, the box goes to these places of all blocks of the cluster.
    """
    if not known(blocks):
        return None
    count = blocks.literal_value

    def emit(context, builder, signature, values):
        copy = "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        place = "[$0], [$1, {$3, $4, $5, $6}], [$2]"
        if count == 1:
            assembly(builder, f"{copy} {place};", "r,l,r,r,r,r,r", VOID, values[1:])
        else:
            whom = I16((1 << count) - 1)
            assembly(builder, f"{copy}.multicast::cluster {place}, $7;", "r,l,r,r,r,r,r,h", VOID, [*values[1:], whom])
        return context.get_dummy_value()

    return types.void(types.literal(count), types.int32, types.int64, *[types.int32] * 5), emit


@intrinsic
def copy_windows(typing_context, tile, map_, barrier, channel, x, y, image, right, down):
    """As `copy_box`, of a map with positions: from windows on that begin at (image, y, x), the tap `right` and `down` of that."""

    def emit(context, builder, signature, values):
        text = (
            "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes"
            " [$0], [$1, {$3, $4, $5, $6}], [$2], {$7, $8};"
        )
        offsets = [builder.trunc(value, I16) for value in values[7:]]
        assembly(builder, text, "r,l,r,r,r,r,r,h,h", VOID, [*values[:7], *offsets])
        return context.get_dummy_value()

    return types.void(types.int32, types.int64, *[types.int32] * 7), emit


@intrinsic
def registers(typing_context, count, more):
    """Changes the registers of the threads of four warps to `count`, more or fewer than before (literals); 0 leaves them."""
    if not known(count, more):
        return None

    def emit(context, builder, signature, values):
        if count.literal_value:
            change = "inc" if more.literal_value else "dec"
            assembly(builder, f"setmaxnreg.{change}.sync.aligned.u32 {count.literal_value};", "", VOID, [])
        return context.get_dummy_value()

    return types.void(types.literal(count.literal_value), types.literal(more.literal_value)), emit


@intrinsic
def warp_barrier(typing_context):
    """Waits for the threads of the warp, and for what they have stored."""

    def emit(context, builder, signature, values):
        assembly(builder, "bar.warp.sync 0xffffffff;", "", VOID, [])
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def store_columns(typing_context, element, wn, width, pitch, shared, part, lane, sums):
    """Columns `part` * width and following of a warp's sums, 16 rows of wn, into a matrix in shared memory.

    element, wn, width, pitch: literals; width: columns of a part, a multiple of 8 that divides wn; pitch: elements of 4 bytes
    from row to row of the matrix.
    """
    if not known(element, wn, width, pitch):
        return None
    name, columns, some, rows_apart = (v.literal_value for v in (element, wn, width, pitch))
    tuple_, count, type_ = sums_type(name, 16, columns)

    def emit(context, builder, signature, values):
        shared, part, lane, sums = values[4:]
        row, column = builder.lshr(lane, I32(2)), builder.shl(builder.and_(lane, I32(3)), I32(1))
        start = builder.add(builder.mul(row, I32(rows_apart)), column)
        base = builder.add(shared, builder.shl(start, I32(2)))
        after = builder.append_basic_block("stored")
        cases = [builder.append_basic_block(f"part{number}") for number in range(columns // some)]
        chosen = builder.switch(part, cases[-1])
        each = count * some // columns
        for number, case in enumerate(cases):
            chosen.add_case(I32(number), case)
            builder.position_at_end(case)
            for place in range(each):
                tile, q = divmod(place, 4)
                where = builder.add(base, I32(4 * (8 * (q // 2) * rows_apart + 8 * tile + q % 2)))
                value = builder.extract_value(sums, number * each + place)
                builder.store(value, builder.inttoptr(where, type_.as_pointer(SHARED)))
            builder.branch(after)
        builder.position_at_end(after)
        return context.get_dummy_value()

    literals = [types.literal(v) for v in (name, columns, some, rows_apart)]
    return types.void(*literals, *[types.int32] * 3, tuple_), emit
