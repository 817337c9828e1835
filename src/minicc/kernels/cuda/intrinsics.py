"""The words a CUDA kernel is written in: arguments, typed pointers, loads and stores, threads and blocks.

The names are those of kernels/cpu/intrinsics, so that expressions and epilogues print alike. All memory is global:
`ld` reads what no thread of the kernel writes (and may use the read-only path), `ld_out` what the kernel may
write. No word here calls a library function or checks bounds.
"""

# ruff: noqa: ARG001  (Numba prescribes the parameters of intrinsics and of their emitters)

from llvmlite import ir
from numba import cuda
from numba.cuda import types
from numba.cuda.extending import intrinsic

I16 = ir.IntType(16)
I32 = ir.IntType(32)
I64 = ir.IntType(64)
F32 = ir.FloatType()
F64 = ir.DoubleType()

_GLOBAL = 1  # the address space
FULL_WARP = 0xFFFFFFFF


def helper(function):
    """Decorator for functions which kernels call: always inlined."""
    return cuda.jit(device=True, forceinline=True)(function)


# ---------------------------------------------------------------------------------------------- arguments


@intrinsic
def arg(typing_context, args, index):
    """Word `index` (a literal) of the kernel's parameters: int64."""
    if not isinstance(index, types.IntegerLiteral):
        return None
    place = index.literal_value

    def emit(context, builder, signature, values):
        return builder.extract_value(values[0], place)

    return types.int64(args, types.literal(place)), emit


@intrinsic
def arg_of(typing_context, args, first, axis):
    """Word first + axis of the kernel's parameters, `first` a literal and `axis` one of 0 to 7: int64."""
    if not isinstance(first, types.IntegerLiteral) or not isinstance(axis, types.Integer):
        return None
    place = first.literal_value

    def emit(context, builder, signature, values):
        chosen = builder.extract_value(values[0], place)
        for number in range(1, 8):
            is_it = builder.icmp_unsigned("==", values[2], I64(number))
            chosen = builder.select(is_it, builder.extract_value(values[0], place + number), chosen)
        return chosen

    return types.int64(args, types.literal(place), types.int64), emit


def _pointer_to(element):
    pointer = types.CPointer(element)

    @intrinsic
    def pointer_of(typing_context, address):
        def emit(context, builder, signature, values):
            return builder.inttoptr(values[0], context.get_value_type(pointer))

        return pointer(types.int64), emit

    return pointer_of


# An int64 address as a typed pointer. bool is stored as u8; f16 and bf16 as their 16 bits.
ptr_f32 = _pointer_to(types.float32)
ptr_f64 = _pointer_to(types.float64)
ptr_i8 = _pointer_to(types.int8)
ptr_i16 = _pointer_to(types.int16)
ptr_i32 = _pointer_to(types.int32)
ptr_i64 = _pointer_to(types.int64)
ptr_u8 = _pointer_to(types.uint8)
ptr_u16 = _pointer_to(types.uint16)
ptr_u32 = _pointer_to(types.uint32)
ptr_u64 = _pointer_to(types.uint64)
ptr_bool = ptr_u8
ptr_f16 = ptr_u16
ptr_bf16 = ptr_u16


@intrinsic
def off(typing_context, pointer, elements):
    """The pointer moved by a signed number of elements."""
    if not isinstance(pointer, types.CPointer):
        return None

    def emit(context, builder, signature, values):
        return builder.gep(values[0], [values[1]])

    return pointer(pointer, types.int64), emit


# --------------------------------------------------------------------------------------- loads and stores


def _global(context, builder, pointer, index, element):
    """The global-memory pointer of an element."""
    at = builder.gep(pointer, [index])
    return builder.addrspacecast(at, context.get_data_type(element).as_pointer(_GLOBAL))


def _load(context, builder, pointer, index, element, read_only):
    value = builder.load(_global(context, builder, pointer, index, element))
    if read_only:
        value.set_metadata("invariant.load", builder.module.add_metadata([]))
    return value


def _loader(read_only):
    @intrinsic
    def load(typing_context, pointer, index):
        if not isinstance(pointer, types.CPointer) or not isinstance(index, types.Integer):
            return None

        def emit(context, builder, signature, values):
            return _load(context, builder, values[0], values[1], pointer.dtype, read_only)

        return pointer.dtype(pointer, types.int64), emit

    return load


ld = _loader(read_only=True)
ld_out = _loader(read_only=False)


@intrinsic
def st(typing_context, pointer, index, value):
    """Stores an element; the value is converted to the pointer's type."""
    if not isinstance(pointer, types.CPointer):
        return None

    def emit(context, builder, signature, values):
        builder.store(values[2], _global(context, builder, values[0], values[1], pointer.dtype))
        return context.get_dummy_value()

    return types.void(pointer, types.int64, pointer.dtype), emit


# ------------------------------------------------------------------- half precision: float32 in registers


def half_to_float(builder, bits):
    """IEEE binary16 bits (i16) -> float32, exact."""
    return builder.call(ir.InlineAsm(ir.FunctionType(F32, [I16]), "cvt.f32.f16 $0, $1;", "=f,h"), [bits])


def float_to_half(builder, value):
    """float32 -> IEEE binary16 bits (i16), rounded to nearest even."""
    return builder.call(ir.InlineAsm(ir.FunctionType(I16, [F32]), "cvt.rn.f16.f32 $0, $1;", "=h,f"), [value])


def bfloat_to_float(builder, bits):
    """bfloat16 bits (i16) -> float32, exact."""
    return builder.bitcast(builder.shl(builder.zext(bits, I32), I32(16)), F32)


def float_to_bfloat(builder, value):
    """float32 -> bfloat16 bits (i16), rounded to nearest even."""
    return builder.call(ir.InlineAsm(ir.FunctionType(I16, [F32]), "cvt.rn.bf16.f32 $0, $1;", "=h,f"), [value])


def _converting_loader(read_only, convert):
    @intrinsic
    def load(typing_context, pointer, index):
        if pointer != types.CPointer(types.uint16):
            return None

        def emit(context, builder, signature, values):
            return convert(builder, _load(context, builder, values[0], values[1], types.uint16, read_only))

        return types.float32(pointer, types.int64), emit

    return load


def _converting_storer(convert):
    @intrinsic
    def store(typing_context, pointer, index, value):
        if pointer != types.CPointer(types.uint16) or value != types.float32:
            return None

        def emit(context, builder, signature, values):
            at = _global(context, builder, values[0], values[1], types.uint16)
            builder.store(convert(builder, values[2]), at)
            return context.get_dummy_value()

        return types.void(pointer, types.int64, types.float32), emit

    return store


ld_f16 = _converting_loader(True, half_to_float)
ld_out_f16 = _converting_loader(False, half_to_float)
st_f16 = _converting_storer(float_to_half)
ld_bf16 = _converting_loader(True, bfloat_to_float)
ld_out_bf16 = _converting_loader(False, bfloat_to_float)
st_bf16 = _converting_storer(float_to_bfloat)

# ---------------------------------------------------------------------------------------- threads and blocks


def _special(*registers):
    """The product of special registers, as int64."""

    @intrinsic
    def read(typing_context):
        def emit(context, builder, signature, values):
            total = I64(1)
            for name in registers:
                kind = ir.FunctionType(I32, [])
                value = builder.call(ir.InlineAsm(kind, f"mov.u32 $0, %{name};", "=r"), [])
                total = builder.mul(total, builder.zext(value, I64))
            return total

        return types.int64(), emit

    return read


thread = _special("tid.x")  # number of this thread in its block
threads = _special("ntid.x")  # threads of a block
block = _special("ctaid.x")  # number of this block
blocks = _special("nctaid.x")
all_threads = _special("nctaid.x", "ntid.x")


@helper
def first_element():
    """The first element of a thread that walks a space together with all others of the grid."""
    return block() * threads() + thread()


@helper
def barrier():
    """Waits for all threads of the block, and for what they have stored."""
    cuda.syncthreads()
