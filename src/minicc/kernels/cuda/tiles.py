"""Tiles of matrix products on CUDA: copies into shared memory, products from there, and results back to it.

Each word is one intrinsic that unrolls itself while it emits LLVM, because unrolled Python would take Numba
ten times as long to compile.

A tile in shared memory is rows of 128 bytes of contiguous k (ROW bytes: 32 float32, 64 16-bit or 128 8-bit
elements). The 16-byte chunks of row r lie at chunk ^ (r & 7), so that copies and reads of eight rows at one
k, which the hardware does at once, hit different banks.

`element` says what a product multiplies: "f32" float32 on the FMA units, exact; "tf32" float32 rounded to 10
bits; "f16", "bf16" 16-bit floats; "s8", "u8" left operands of 8 bits times int8. Sums are float32, or int32
for 8 bits. All but "f32" use the tensor cores (mma.sync, sm_80).

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
_SHARED = 3


@dataclass(frozen=True)
class Element:
    """How products of an element type are made.

    size:     bytes of an element in memory.
    mma:      shape and types of the tensor-core instruction; "" for the FMA units.
    rounded:  whether left fragments must be rounded to the instruction's precision first.
    integer:  whether sums are int32.
    """

    size: int
    mma: str
    rounded: bool = False
    integer: bool = False


ELEMENTS = {
    "f32": Element(4, ""),
    "tf32": Element(4, "m16n8k8.row.col.f32.tf32.tf32.f32", rounded=True),
    "f16": Element(2, "m16n8k16.row.col.f32.f16.f16.f32"),
    "bf16": Element(2, "m16n8k16.row.col.f32.bf16.bf16.f32"),
    "s8": Element(1, "m16n8k32.row.col.s32.s8.s8.s32", integer=True),
    "u8": Element(1, "m16n8k32.row.col.s32.u8.s8.s32", integer=True),
}


def _known(*values):
    return all(isinstance(value, types.Literal) for value in values)


def _asm(builder, text, constraints, result, operands, effects=True):
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
            return _asm(builder, f"mov.u32 $0, %{name};", "=r", I32, [], effects=False)

        return types.int32(), emit

    return read


thread = _special("tid.x")
block = _special("ctaid.x")


@intrinsic
def barrier(typing_context):
    """Waits for all threads of the block."""

    def emit(context, builder, signature, values):
        _asm(builder, "bar.sync 0;", "", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def shared_memory(typing_context):
    """The 32-bit address of the block's dynamic shared memory, a multiple of 1024."""

    def emit(context, builder, signature, values):
        name = "minicc_shared"
        array = builder.module.globals.get(name)
        if array is None:
            array = ir.GlobalVariable(builder.module, ir.ArrayType(I8, 0), name, addrspace=_SHARED)
            array.linkage = "external"
            array.align = 1024
        return builder.ptrtoint(array, I32)

    return types.int32(), emit


@intrinsic
def copies_commit(typing_context):
    """Ends a group of asynchronous copies of this thread."""

    def emit(context, builder, signature, values):
        _asm(builder, "cp.async.commit_group;", "", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def copies_wait(typing_context, groups):
    """Waits until at most `groups` (a literal) of this thread's groups are still on their way."""
    if not _known(groups):
        return None

    def emit(context, builder, signature, values):
        _asm(builder, f"cp.async.wait_group {groups.literal_value};", "", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(types.literal(groups.literal_value)), emit


# ------------------------------------------------------------------------------------------------- copies


@intrinsic
def copy_tile(typing_context, rows, threads, size, piece, shared, address, stride, first, left, k, depth, tid):
    """Starts the copy of a tile [rows][ROW bytes] from rows of global memory; what lies outside becomes 0.

    rows, threads, size, piece: literals: rows of the tile, threads of the block, bytes of an element, and the
             largest power of two up to 16 that divides address, stride and k in bytes.
    shared:  address of the tile in shared memory.
    address: address of element (row 0, k 0) in global memory; stride: bytes from row to row.
    first:   row of memory that is row 0 of the tile; left: rows that memory has.
    k:       element that begins the tile's rows; depth: elements that rows of memory have.
    Pieces of less than 4 bytes are copied at once by ordinary instructions, others by cp.async, which end at
    `copies_wait`; both must be followed by `barrier` before they are read.
    """
    if not _known(rows, threads, size, piece):
        return None
    count, width, bytes_, step = (v.literal_value for v in (rows, threads, size, piece))

    def emit(context, builder, signature, values):
        shared, address, stride, first, left, k, depth, tid = values[4:]
        chunk = builder.and_(tid, I32(_CHUNKS - 1))
        row = builder.lshr(tid, I32(3))
        swizzled = builder.xor(chunk, builder.and_(row, I32(7)))
        target = builder.add(shared, builder.add(builder.shl(row, I32(7)), builder.shl(swizzled, I32(4))))
        # Bytes of this thread's chunk that exist, before and after clamping to [0, 16].
        begin = builder.add(builder.mul(k, I32(bytes_)), builder.shl(chunk, I32(4)))
        there = builder.sub(builder.mul(depth, I32(bytes_)), begin)
        source_row = builder.add(first, row)
        source = builder.add(address, builder.mul(builder.sext(source_row, I64), stride))
        source = builder.add(source, builder.sext(begin, I64))
        hop = builder.mul(stride, I64(width // _CHUNKS))
        for i in range((count * _CHUNKS + width - 1) // width):
            inside = builder.icmp_signed("<", builder.add(source_row, I32(i * width // _CHUNKS)), left)
            size_here = builder.select(inside, there, I32(0))
            place = builder.add(target, I32(i * width // _CHUNKS * ROW))
            if (i + 1) * width <= count * _CHUNKS:
                _copy_chunk(builder, step, place, source, address, size_here)
            else:
                with builder.if_then(builder.icmp_signed("<", row, I32(count - i * width // _CHUNKS))):
                    _copy_chunk(builder, step, place, source, address, size_here)
            source = builder.add(source, hop)
        return context.get_dummy_value()

    literals = [types.literal(v) for v in (count, width, bytes_, step)]
    long, short = types.int64, types.int32
    return types.void(*literals, short, long, long, short, short, short, short, short), emit


def _copy_chunk(builder, step, place, source, safe, there):
    """16 bytes of global to shared memory in pieces of `step` bytes, of which `there` (any number) exist."""
    for at in range(0, CHUNK, step):
        left = builder.sub(there, I32(at)) if at else there
        some = builder.icmp_signed(">", left, I32(0))
        start = builder.select(some, builder.add(source, I64(at)), safe)
        target = builder.add(place, I32(at))
        if step >= 4:
            few = builder.icmp_signed("<", left, I32(step))
            part = builder.select(some, builder.select(few, left, I32(step)), I32(0))
            cache = "cg" if step == CHUNK else "ca"
            text = f"cp.async.{cache}.shared.global [$0], [$1], {step}, $2;"
            _asm(builder, text, "r,l,r", ir.VoidType(), [target, start, part])
        else:
            type_ = ir.IntType(8 * step)
            with builder.if_else(some) as (then, otherwise):
                with then:
                    found = builder.load(builder.inttoptr(start, type_.as_pointer(1)))
                    last = builder.block
                with otherwise:
                    other = builder.block
            value = builder.phi(type_)
            value.add_incoming(found, last)
            value.add_incoming(type_(0), other)
            builder.store(value, builder.inttoptr(target, type_.as_pointer(_SHARED)))


# ----------------------------------------------------------------------------------------------- products


def _sums(element, wm, wn):
    """The tuple type of a thread's sums, their number and LLVM type."""
    kind = ELEMENTS[element]
    count = wm * wn // 32
    type_ = types.int32 if kind.integer else types.float32
    return types.UniTuple(type_, count), count, I32 if kind.integer else F32


@intrinsic
def zeros(typing_context, element, wm, wn):
    """Sums of a warp tile of WM x WN, all 0 (literals)."""
    if not _known(element, wm, wn):
        return None
    name, height, width = (v.literal_value for v in (element, wm, wn))
    tuple_, count, type_ = _sums(name, height, width)

    def emit(context, builder, signature, values):
        return context.make_tuple(builder, tuple_, [ir.Constant(type_, 0)] * count)

    return tuple_(types.literal(name), types.literal(height), types.literal(width)), emit


@intrinsic
def product(typing_context, element, wm, wn, sums, a, b, row, column, lane):
    """sums + the warp tile's product over the whole ROW of two tiles in shared memory.

    element, wm, wn: literals. a, b: addresses of tiles [.][ROW bytes]. row, column: where the warp tile begins
    in a and in b, multiples of 8. lane: of the warp.
    """
    if not _known(element, wm, wn):
        return None
    name, height, width = (v.literal_value for v in (element, wm, wn))
    tuple_, count, _ = _sums(name, height, width)

    def emit(context, builder, signature, values):
        sums = [builder.extract_value(values[3], i) for i in range(count)]
        make = _emit_mma if ELEMENTS[name].mma else _emit_fma
        make(builder, name, (height, width), sums, *values[4:])
        return context.make_tuple(builder, tuple_, sums)

    literals = [types.literal(v) for v in (name, height, width)]
    return tuple_(*literals, tuple_, *[types.int32] * 5), emit


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
        found = _asm(builder, load, "=r,=r,=r,=r,r", matrices, [where])
        return [builder.extract_value(found, q) for q in range(4)]

    for step in range(_CHUNKS // 2):
        lefts = [fragments(a_base, a_chunk, step, i) for i in range(height // 16)]
        if kind.rounded:
            lefts = [[_round(builder, register) for register in left] for left in lefts]
        rights = [fragments(b_base, b_chunk, step, j) for j in range(width // 16)]
        for i, left in enumerate(lefts):
            for j in range(width // 8):
                first = (i * (width // 8) + j) * 4
                right = rights[j // 2][j % 2 * 2 : j % 2 * 2 + 2]
                operands = [*left, *right, *sums[first : first + 4]]
                made = _asm(
                    builder, multiply, constraints, ir.LiteralStructType([type_] * 4), operands, effects=False
                )
                sums[first : first + 4] = [builder.extract_value(made, q) for q in range(4)]


def _round(builder, register):
    value = builder.bitcast(register, F32)
    return _asm(builder, "cvt.rna.tf32.f32 $0, $1;", "=r,f", I32, [value], effects=False)


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
        found = _asm(builder, load, "=f,=f,=f,=f,r", four, [where])
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


# ------------------------------------------------------------------------------------------------ results


@intrinsic
def store_sums(typing_context, element, wm, wn, pitch, shared, row, column, lane, sums):
    """Sums of a warp tile into a matrix of 4-byte elements in shared memory, rows `pitch` (a literal) apart."""
    if not _known(element, wm, wn, pitch):
        return None
    name, height, width, rows_apart = (v.literal_value for v in (element, wm, wn, pitch))
    tuple_, count, type_ = _sums(name, height, width)

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
                builder.extract_value(sums, number), builder.inttoptr(where, type_.as_pointer(_SHARED))
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
def load_sum(typing_context, element, shared, index):
    """One element of a matrix that `store_sums` stored."""
    if not _known(element):
        return None
    name = element.literal_value
    type_, llvm = (types.int32, I32) if ELEMENTS[name].integer else (types.float32, F32)

    def emit(context, builder, signature, values):
        where = builder.add(values[1], builder.shl(values[2], I32(2)))
        return builder.load(builder.inttoptr(where, llvm.as_pointer(_SHARED)))

    return type_(types.literal(name), types.int32, types.int32), emit


@intrinsic
def int32(typing_context, value):
    """An int64 as an int32."""

    def emit(context, builder, signature, values):
        return builder.trunc(values[0], I32) if values[0].type != I32 else values[0]

    return types.int32(value), emit
