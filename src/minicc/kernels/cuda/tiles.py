"""Tiles of matrix products on CUDA: copies into shared memory, products from there, and results back to it.

Each word is one intrinsic that unrolls itself while it emits LLVM, because unrolled Python would take Numba
ten times as long to compile.

A tile in shared memory is rows of 128 bytes of contiguous k (ROW bytes: 32 float32, 64 16-bit or 128 8-bit
elements). The 16-byte chunks of row r lie at chunk ^ (r & 7), so that copies and reads of eight rows at one
k, which the hardware does at once, hit different banks.

`element` says what a product multiplies: "f32" float32 on the FMA units, exact; "tf32" float32 rounded to 10
bits; "f16", "bf16" 16-bit floats; "s8", "u8" left operands of 8 bits times int8. Sums are float32, or int32
for 8 bits. `unit` says what multiplies: "fma" the FMA units ("f32" only), "mma" a warp's tensor-core instruction
(mma.sync, sm_80), "wgmma" that of four warps, which reads both operands from shared memory while the threads go
on (sm_90a; warp tiles of 16 rows, those of four consecutive warps one below the other).

Fragments are one tuple of sums per thread. Tensor cores give a thread of a warp tile of WM x WN, with g =
lane / 4 and t = lane % 4, the elements (16 i + g + 8 (q / 2), 8 j + 2 t + q % 2) at ((i * WN / 8) + j) * 4 + q;
the FMA units those at (8 i + lane / 4, 4 j + lane % 4) at i * WN / 4 + j.
"""

# ruff: noqa: ARG001  (Numba prescribes the parameters of intrinsics and of their emitters)

from dataclasses import dataclass

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

I8 = ir.IntType(8)
I16 = ir.IntType(16)
I32 = ir.IntType(32)
I64 = ir.IntType(64)
F32 = ir.FloatType()

ROW = 128
CHUNK = 16
_CHUNKS = ROW // CHUNK
SHARED = 3


@dataclass(frozen=True)
class Element:
    """How products of an element type are made.

    size:     bytes of an element in memory.
    mma:      shape and types of a warp's tensor-core instruction; "" for the FMA units.
    wgmma:    depth and types of that of four warps.
    rounded:  whether elements in memory have more bits than are multiplied, see `round_tile`.
    integer:  whether sums are int32.
    """

    size: int
    mma: str
    wgmma: str = ""
    rounded: bool = False
    integer: bool = False


ELEMENTS = {
    "f32": Element(4, ""),
    "tf32": Element(4, "m16n8k8.row.col.f32.tf32.tf32.f32", "k8.f32.tf32.tf32", rounded=True),
    "f16": Element(2, "m16n8k16.row.col.f32.f16.f16.f32", "k16.f32.f16.f16"),
    "bf16": Element(2, "m16n8k16.row.col.f32.bf16.bf16.f32", "k16.f32.bf16.bf16"),
    "s8": Element(1, "m16n8k32.row.col.s32.s8.s8.s32", "k32.s32.s8.s8", integer=True),
    "u8": Element(1, "m16n8k32.row.col.s32.u8.s8.s32", "k32.s32.u8.s8", integer=True),
}


def known(*values):
    return all(isinstance(value, types.Literal) for value in values)


def assembly(builder, text, constraints, result, operands, effects=True):
    """One inline PTX instruction."""
    type_ = ir.FunctionType(result, [o.type for o in operands])
    all_constraints = ",".join(filter(None, (constraints, "~{memory}" if effects else "")))
    return builder.call(ir.InlineAsm(type_, text, all_constraints, side_effect=effects), operands)


def _registers(first, count):
    return "{" + ",".join(f"${i}" for i in range(first, first + count)) + "}"


# ------------------------------------------------------------------------------------- threads and barriers


def _special(name):
    @intrinsic
    def read(typing_context):
        def emit(context, builder, signature, values):
            return assembly(builder, f"mov.u32 $0, %{name};", "=r", I32, [], effects=False)

        return types.int32(), emit

    return read


thread = _special("tid.x")
block = _special("ctaid.x")
blocks = _special("nctaid.x")


@intrinsic
def barrier(typing_context):
    """Waits for all threads of the block."""

    def emit(context, builder, signature, values):
        assembly(builder, "bar.sync 0;", "", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def shared_memory(typing_context):
    """The 32-bit address of the block's dynamic shared memory, a multiple of 1024."""

    def emit(context, builder, signature, values):
        name = "minicc_shared"
        array = builder.module.globals.get(name)
        if array is None:
            array = ir.GlobalVariable(builder.module, ir.ArrayType(I8, 0), name, addrspace=SHARED)
            array.linkage = "external"
            array.align = 1024
        return builder.ptrtoint(array, I32)

    return types.int32(), emit


@intrinsic
def copies_commit(typing_context):
    """Ends a group of asynchronous copies of this thread."""

    def emit(context, builder, signature, values):
        assembly(builder, "cp.async.commit_group;", "", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def copies_wait(typing_context, groups):
    """Waits until at most `groups` (a literal) of this thread's groups are still on their way."""
    if not known(groups):
        return None

    def emit(context, builder, signature, values):
        assembly(builder, f"cp.async.wait_group {groups.literal_value};", "", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(types.literal(groups.literal_value)), emit


@intrinsic
def tiles_ready(typing_context, unit):
    """As `barrier`, after which products of `unit` (a literal) may read what this thread's finished copies wrote."""
    if not known(unit):
        return None

    def emit(context, builder, signature, values):
        if unit.literal_value == "wgmma":
            assembly(builder, "fence.proxy.async.shared::cta;", "", ir.VoidType(), [])
        assembly(builder, "bar.sync 0;", "", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(types.literal(unit.literal_value)), emit


# ------------------------------------------------------------------------------------------------- copies
#
# A thread copies the same 16-byte chunk of every (threads / 8)th row of a tile, so what depends on the row alone is
# found once and carried along, and a step of k costs few instructions.


def hops(rows, threads):
    """The distances of a thread's rows from its first one; the last may lie behind the tile (see `each_row`)."""
    return [i * threads // _CHUNKS for i in range(-(-rows * _CHUNKS // threads))]


def each_row(builder, rows, threads, row, copy):
    """Emits copy(number, hop) for each row of a thread that begins at `row`."""
    for number, hop in enumerate(hops(rows, threads)):
        if (number + 1) * threads <= rows * _CHUNKS:
            copy(number, hop)
        else:
            with builder.if_then(builder.icmp_unsigned("<", row, I32(rows - hop))):
                copy(number, hop)


def own_place(builder, shared, tid):
    """A thread's chunk, its first row, and where that chunk of that row lies in a tile."""
    chunk = builder.and_(tid, I32(_CHUNKS - 1))
    row = builder.lshr(tid, I32(3))
    swizzled = builder.xor(chunk, builder.and_(row, I32(7)))
    return chunk, row, builder.add(shared, builder.add(builder.shl(row, I32(7)), builder.shl(swizzled, I32(4))))


@intrinsic
def tile_rows(typing_context, rows, threads, address, stride, first, left, tid):
    """Addresses of a thread's rows in global memory, a tuple of int64.

    rows, threads: literals: rows of a tile, threads of the block.
    address: address of element (row 0, k 0); stride: bytes from row to row.
    first:   row of memory that is row 0 of the tile; left: rows that memory has. Rows behind the last one are 0:
             they are not copied, for what they would give nobody stores.
    """
    if not known(rows, threads):
        return None
    count, width = rows.literal_value, threads.literal_value
    tuple_ = types.UniTuple(types.int64, len(hops(count, width)))

    def emit(context, builder, signature, values):
        address, stride, first, left, tid = values[2:]
        row = builder.add(first, builder.lshr(tid, I32(3)))
        found = []
        for hop in hops(count, width):
            here = builder.add(row, I32(hop))
            place = builder.add(address, builder.mul(builder.sext(here, I64), stride))
            found.append(builder.select(builder.icmp_signed("<", here, left), place, I64(0)))
        return context.make_tuple(builder, tuple_, found)

    literals = [types.literal(count), types.literal(width)]
    return tuple_(*literals, types.int64, types.int64, types.int32, types.int32, types.int32), emit


@intrinsic
def copy_tile(typing_context, rows, threads, size, piece, shared, sources, k, depth, tid):
    """Starts the copy of a tile [rows][ROW bytes] from rows of global memory; what lies behind their ends becomes 0.

    rows, threads, size, piece: literals: rows of the tile, threads of the block, bytes of an element, and the
             largest power of two up to 16 that divides the sources in bytes.
    shared:  address of the tile in shared memory. sources: `tile_rows`.
    k:       element that begins the tile's rows; depth: elements that rows of memory have.
    Pieces of less than 4 bytes are copied at once by ordinary instructions, others by cp.async, which end at
    `copies_wait`; both must be followed by `tiles_ready` before they are read.
    """
    if not known(rows, threads, size, piece):
        return None
    count, width, bytes_, step = (v.literal_value for v in (rows, threads, size, piece))

    def emit(context, builder, signature, values):
        shared, sources, k, depth, tid = values[4:]
        sources = [builder.extract_value(sources, i) for i in range(len(hops(count, width)))]
        chunk, row, target = own_place(builder, shared, tid)
        begin = builder.add(builder.mul(k, I32(bytes_)), builder.shl(chunk, I32(4)))
        there = builder.sub(builder.mul(depth, I32(bytes_)), begin)

        def whole(number, hop):
            source = builder.add(sources[number], offset)
            text = "{.reg .pred p; setp.ne.s64 p, $2, 0; @p cp.async.cg.shared.global [$0], [$1], 16;}"
            place = builder.add(target, I32(hop * ROW))
            assembly(builder, text, "r,l,l", ir.VoidType(), [place, source, sources[number]])

        def cut(number, hop):
            exists = builder.icmp_unsigned("!=", sources[number], I64(0))
            with builder.if_then(exists):
                cut_row(number, hop)

        def cut_row(number, hop):
            for at in range(0, CHUNK, step):
                left = builder.sub(there, I32(at))
                place = builder.add(target, I32(hop * ROW + at))
                # Nothing is read behind the end, not even by an instruction that would ignore it.
                behind = builder.select(builder.icmp_signed(">", left, I32(0)), builder.add(begin, I32(at)), I32(0))
                copy_piece(builder, step, place, builder.add(sources[number], builder.sext(behind, I64)), left)

        if step < CHUNK:
            each_row(builder, count, width, row, cut)
            return context.get_dummy_value()
        full = builder.icmp_signed("<=", builder.add(k, I32(ROW // bytes_)), depth)
        with builder.if_else(full) as (then, otherwise):
            with then:
                offset = builder.sext(begin, I64)
                each_row(builder, count, width, row, whole)
            with otherwise:
                each_row(builder, count, width, row, cut)
        return context.get_dummy_value()

    literals = [types.literal(v) for v in (count, width, bytes_, step)]
    tuple_ = types.UniTuple(types.int64, len(hops(count, width)))
    return types.void(*literals, types.int32, tuple_, *[types.int32] * 3), emit


def copy_piece(builder, step, target, source, left):
    """`step` bytes of global to shared memory, of which `left` (any number) exist."""
    if step >= 4:
        cache = "cg" if step == CHUNK else "ca"
        some = builder.icmp_signed(">", left, I32(0))
        few = builder.icmp_signed("<", left, I32(step))
        part = builder.select(some, builder.select(few, left, I32(step)), I32(0))
        text = f"cp.async.{cache}.shared.global [$0], [$1], {step}, $2;"
        assembly(builder, text, "r,l,r", ir.VoidType(), [target, source, part])
        return
    type_ = ir.IntType(8 * step)
    with builder.if_else(builder.icmp_signed(">", left, I32(0))) as (then, otherwise):
        with then:
            found = builder.load(builder.inttoptr(source, type_.as_pointer(1)))
            last = builder.block
        with otherwise:
            other = builder.block
    value = builder.phi(type_)
    value.add_incoming(found, last)
    value.add_incoming(type_(0), other)
    builder.store(value, builder.inttoptr(target, type_.as_pointer(SHARED)))


@intrinsic
def round_tile(typing_context, element, rows, threads, shared, tid):
    """Rounds what this thread has copied of a tile to the precision of products, which would cut it off.

    element, rows, threads: literals; nothing is done for elements that are multiplied whole. To be called when the
    thread's own copies have ended, before `tiles_ready`.
    """
    if not known(element, rows, threads):
        return None
    name, count, width = (v.literal_value for v in (element, rows, threads))

    def emit(context, builder, signature, values):
        if ELEMENTS[name].rounded:
            _, row, target = own_place(builder, values[3], values[4])
            four = ir.LiteralStructType([F32] * 4)

            def round_chunk(number, hop):
                place = builder.add(target, I32(hop * ROW))
                found = assembly(builder, f"ld.shared.v4.f32 {_registers(0, 4)}, [$4];", "=f,=f,=f,=f,r", four, [place])
                parts = [
                    assembly(builder, "cvt.rna.tf32.f32 $0, $1;", "=r,f", I32, [builder.extract_value(found, q)], effects=False)
                    for q in range(4)
                ]
                assembly(builder, f"st.shared.v4.u32 [$0], {_registers(1, 4)};", "r,r,r,r,r", ir.VoidType(), [place, *parts])

            each_row(builder, count, width, row, round_chunk)
        return context.get_dummy_value()

    literals = [types.literal(v) for v in (name, count, width)]
    return types.void(*literals, types.int32, types.int32), emit


@intrinsic
def next_tile(typing_context, at, bytes_, stages):
    """The offset of the tile after the one at `at` in a ring of `stages` tiles of `bytes_` (literals)."""
    if not known(bytes_, stages):
        return None
    size, count = bytes_.literal_value, stages.literal_value

    def emit(context, builder, signature, values):
        last = builder.icmp_signed("==", values[0], I32(size * (count - 1)))
        return builder.select(last, I32(0), builder.add(values[0], I32(size)))

    return types.int32(types.int32, types.literal(size), types.literal(count)), emit


# ----------------------------------------------------------------------------------------------- products


def sums_type(element, wm, wn):
    """The tuple type of a thread's sums, their number and LLVM type."""
    kind = ELEMENTS[element]
    count = wm * wn // 32
    type_ = types.int32 if kind.integer else types.float32
    return types.UniTuple(type_, count), count, I32 if kind.integer else F32


@intrinsic
def zeros(typing_context, element, wm, wn):
    """Sums of a warp tile of WM x WN, all 0 (literals)."""
    if not known(element, wm, wn):
        return None
    name, height, width = (v.literal_value for v in (element, wm, wn))
    tuple_, count, type_ = sums_type(name, height, width)

    def emit(context, builder, signature, values):
        return context.make_tuple(builder, tuple_, [ir.Constant(type_, 0)] * count)

    return tuple_(types.literal(name), types.literal(height), types.literal(width)), emit


@intrinsic
def product(typing_context, unit, element, wm, wn, sums, a, b, row, column, lane):
    """sums + the warp tile's product over the whole ROW of two tiles in shared memory.

    unit, element, wm, wn: literals. a, b: addresses of tiles [.][ROW bytes]. row, column: where the warp tile begins
    in a and in b, multiples of 8. lane: of the warp. With "wgmma" the product is on its way when this returns; see
    `products_wait`.
    """
    if not known(unit, element, wm, wn):
        return None
    unit_name, name, height, width = (v.literal_value for v in (unit, element, wm, wn))
    tuple_, count, _ = sums_type(name, height, width)

    def emit(context, builder, signature, values):
        sums = [builder.extract_value(values[4], i) for i in range(count)]
        make = {"fma": _emit_fma, "mma": _emit_mma, "wgmma": _emit_wgmma}[unit_name]
        make(builder, name, (height, width), sums, *values[5:])
        return context.make_tuple(builder, tuple_, sums)

    literals = [types.literal(v) for v in (unit_name, name, height, width)]
    return tuple_(*literals, tuple_, *[types.int32] * 5), emit


@intrinsic
def products_wait(typing_context, unit, pending):
    """Waits until at most `pending` of this thread's products of `unit` are still on their way (literals)."""
    if not known(unit, pending):
        return None

    def emit(context, builder, signature, values):
        if unit.literal_value == "wgmma":
            assembly(builder, f"wgmma.wait_group.sync.aligned {pending.literal_value};", "", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(types.literal(unit.literal_value), types.literal(pending.literal_value)), emit


def _emit_wgmma(builder, name, shape, sums, a, b, row, column, lane):
    kind = ELEMENTS[name]
    _, width = shape
    letter, type_ = ("r", I32) if kind.integer else ("f", F32)
    count = len(sums)
    # Factors 1 of both operands and, for 16 bits, no transposition.
    rest = {"k8": ", 1, 1", "k16": ", 1, 1, 0, 0", "k32": ""}[kind.wgmma.partition(".")[0]]
    text = (
        f"wgmma.mma_async.sync.aligned.m64n{width}{kind.wgmma} {_registers(0, count)}, ${2 * count}, ${2 * count + 1}, 1{rest};"
    )
    constraints = ",".join([f"={letter}"] * count + [str(i) for i in range(count)] + ["l", "l"])

    def descriptor(base, first):
        """Of rows of 128 bytes, swizzled, eight of them 1024 bytes apart; see the PTX manual's matrix descriptor."""
        where = builder.add(base, builder.shl(first, I32(7)))
        low = builder.and_(builder.lshr(builder.zext(where, I64), I64(4)), I64(0x3FFF))
        return builder.or_(low, I64(1 << 62 | 64 << 32 | 1 << 16))

    left = descriptor(a, builder.and_(row, I32(~63)))
    right = descriptor(b, column)
    assembly(builder, "wgmma.fence.sync.aligned;", "", ir.VoidType(), [])
    for step in range(ROW // 32):
        operands = [*sums, builder.add(left, I64(2 * step)), builder.add(right, I64(2 * step))]
        made = assembly(builder, text, constraints, ir.LiteralStructType([type_] * count), operands)
        sums[:] = [builder.extract_value(made, i) for i in range(count)]
    assembly(builder, "wgmma.commit_group.sync.aligned;", "", ir.VoidType(), [])


def _emit_mma(builder, name, shape, sums, a, b, row, column, lane):
    kind = ELEMENTS[name]
    height, width = shape
    letter, type_ = ("r", I32) if kind.integer else ("f", F32)
    matrices = ir.LiteralStructType([I32] * 4)
    load = f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {_registers(0, 4)}, [$4];"
    parts = ", ".join((_registers(0, 4), _registers(4, 4), _registers(8, 2), _registers(10, 4)))
    multiply = f"mma.sync.aligned.{kind.mma} {parts};"
    constraints = ",".join([f"={letter}"] * 4 + ["r"] * 6 + [letter] * 4)

    low = builder.and_(lane, I32(7))
    # Rows of the four 8x8 matrices that ldmatrix reads: of a, two blocks of rows at two chunks of k; of b, two
    # chunks of k of two blocks of rows.
    a_base = builder.add(a, builder.shl(builder.add(row, builder.and_(lane, I32(15))), I32(7)))
    a_chunk = builder.lshr(lane, I32(4))
    upper = builder.shl(builder.lshr(lane, I32(4)), I32(3))
    b_base = builder.add(b, builder.shl(builder.add(column, builder.add(low, upper)), I32(7)))
    b_chunk = builder.and_(builder.lshr(lane, I32(3)), I32(1))

    def fragments(base, chunk, step, block):
        swizzled = builder.xor(builder.add(chunk, I32(2 * step)), low)
        where = builder.add(builder.add(base, builder.shl(swizzled, I32(4))), I32(16 * block * ROW))
        found = assembly(builder, load, "=r,=r,=r,=r,r", matrices, [where])
        return [builder.extract_value(found, q) for q in range(4)]

    for step in range(_CHUNKS // 2):
        lefts = [fragments(a_base, a_chunk, step, i) for i in range(height // 16)]
        rights = [fragments(b_base, b_chunk, step, j) for j in range(width // 16)]
        for i, left in enumerate(lefts):
            for j in range(width // 8):
                first = (i * (width // 8) + j) * 4
                right = rights[j // 2][j % 2 * 2 : j % 2 * 2 + 2]
                operands = [*left, *right, *sums[first : first + 4]]
                made = assembly(
                    builder, multiply, constraints, ir.LiteralStructType([type_] * 4), operands, effects=False
                )
                sums[first : first + 4] = [builder.extract_value(made, q) for q in range(4)]


def _emit_fma(builder, name, shape, sums, a, b, row, column, lane):
    height, width = shape
    down, across = builder.lshr(lane, I32(2)), builder.and_(lane, I32(3))
    a_base = builder.add(a, builder.shl(builder.add(row, down), I32(7)))
    b_row = builder.add(column, across)
    b_base = builder.add(b, builder.shl(b_row, I32(7)))
    four = ir.LiteralStructType([F32] * 4)
    load = f"ld.shared.v4.f32 {_registers(0, 4)}, [$4];"

    def quad(base, low, chunk, at):
        swizzled = builder.xor(I32(chunk), low)
        where = builder.add(builder.add(base, builder.shl(swizzled, I32(4))), I32(at * ROW))
        found = assembly(builder, load, "=f,=f,=f,=f,r", four, [where])
        return [builder.extract_value(found, q) for q in range(4)]

    a_low = builder.and_(down, I32(7))
    for chunk in range(_CHUNKS):
        lefts = [quad(a_base, a_low, chunk, 8 * i) for i in range(height // 8)]
        for j in range(width // 4):
            # Rows of b that a thread reads are 4 apart, so that they differ in bit 2 of the swizzle.
            right = quad(b_base, builder.xor(across, I32(4 * (j % 2))), chunk, 4 * j)
            for i, left in enumerate(lefts):
                place = i * (width // 4) + j
                for q in range(4):
                    sums[place] = builder.fma(left[q], right[q], sums[place])


@intrinsic
def int32(typing_context, value):
    """An int64 as an int32."""

    def emit(context, builder, signature, values):
        return builder.trunc(values[0], I32) if values[0].type != I32 else values[0]

    return types.int32(value), emit
