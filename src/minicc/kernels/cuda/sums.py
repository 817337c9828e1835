"""Sums of matrix products on CUDA: through shared memory to the epilogue, those of several blocks added.

How threads hold sums is in kernels/cuda/tiles.py.
"""

# ruff: noqa: ARG001  (Numba prescribes the parameters of intrinsics and of their emitters)

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from minicc.kernels.cuda.tiles import ELEMENTS, F32, I32, SHARED, assembly, known, sums_type


@intrinsic
def store_sums(typing_context, element, wm, wn, pitch, shared, row, column, lane, sums):
    """Sums of a warp tile into a matrix of 4-byte elements in shared memory, rows `pitch` (a literal) apart."""
    if not known(element, wm, wn, pitch):
        return None
    name, height, width, rows_apart = (v.literal_value for v in (element, wm, wn, pitch))
    tuple_, count, type_ = sums_type(name, height, width)

    def emit(context, builder, signature, values):
        shared, row, column, lane, sums = values[4:]
        group, member = builder.lshr(lane, I32(2)), builder.and_(lane, I32(3))
        tensor = bool(ELEMENTS[name].mma)
        across = builder.shl(member, I32(1)) if tensor else member
        start = builder.add(builder.mul(builder.add(row, group), I32(rows_apart)), builder.add(column, across))
        base = builder.add(shared, builder.shl(start, I32(2)))
        for number in range(count):
            r, c = _place(tensor, width, number)
            where = builder.add(base, I32(4 * (r * rows_apart + c)))
            builder.store(
                builder.extract_value(sums, number), builder.inttoptr(where, type_.as_pointer(SHARED))
            )
        return context.get_dummy_value()

    literals = [types.literal(v) for v in (name, height, width, rows_apart)]
    return types.void(*literals, *[types.int32] * 4, tuple_), emit


def _place(tensor, width, number):
    """Row and column of a sum, relative to the first of its thread."""
    if tensor:
        tile, q = divmod(number, 4)
        return 16 * (tile // (width // 8)) + 8 * (q // 2), 8 * (tile % (width // 8)) + q % 2
    return 8 * (number // (width // 4)), 4 * (number % (width // 4))


@intrinsic
def cluster_barrier(typing_context, blocks):
    """Waits for all threads of the cluster of so many blocks (a literal), which then see each other's shared memory."""
    if not known(blocks):
        return None

    def emit(context, builder, signature, values):
        if blocks.literal_value == 1:
            assembly(builder, "bar.sync 0;", "", ir.VoidType(), [])
        else:
            assembly(builder, "barrier.cluster.arrive.release.aligned;", "", ir.VoidType(), [])
            assembly(builder, "barrier.cluster.wait.acquire.aligned;", "", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(types.literal(blocks.literal_value)), emit


@intrinsic
def cluster_memory(typing_context, blocks, shared):
    """The addresses of this place in the shared memory of each block of the cluster; of one block (a literal) its own."""
    if not known(blocks):
        return None
    count = blocks.literal_value
    tuple_ = types.UniTuple(types.int32, count)

    def emit(context, builder, signature, values):
        found = [values[1]]
        if count > 1:
            text = "mapa.shared::cluster.u32 $0, $1, $2;"
            found = [assembly(builder, text, "=r,r,r", I32, [values[1], I32(rank)], effects=False) for rank in range(count)]
        return context.make_tuple(builder, tuple_, found)

    return tuple_(types.literal(count), types.int32), emit


@intrinsic
def load_sum(typing_context, element, blocks, parts, index):
    """One element of a matrix that `store_sums` stored, those of all blocks of a cluster added.

    element, blocks: literals. parts: `cluster_memory`.
    """
    if not known(element, blocks):
        return None
    name, count = element.literal_value, blocks.literal_value
    integer = ELEMENTS[name].integer
    type_, llvm = (types.int32, I32) if integer else (types.float32, F32)

    def emit(context, builder, signature, values):
        _, _, parts, index = values
        offset = builder.shl(index, I32(2))
        if count == 1:
            where = builder.add(builder.extract_value(parts, 0), offset)
            return builder.load(builder.inttoptr(where, llvm.as_pointer(SHARED)))
        kind, letter = ("u32", "=r") if integer else ("f32", "=f")
        text = f"ld.shared::cluster.{kind} $0, [$1];"
        found = [
            assembly(builder, text, f"{letter},r", llvm, [builder.add(builder.extract_value(parts, i), offset)])
            for i in range(count)
        ]
        total = found[0]
        for other in found[1:]:
            total = builder.add(total, other) if integer else builder.fadd(total, other)
        return total

    literals = (types.literal(name), types.literal(count))
    return type_(*literals, types.UniTuple(types.int32, count), types.int32), emit
