"""The words a CPU kernel is written in: arguments, typed pointers, loads and stores, scratch memory.

Each word is a Numba intrinsic that emits a few LLVM instructions. The second half of the module holds
helpers over an llvmlite `IRBuilder`, for modules that write larger intrinsics (micro-kernel tiles).

Loads and stores carry alias scopes. Memory is divided into three kinds which never overlap within one kernel:

* inputs: `ld`;
* outputs: `st`, and `ld_out` for an operand that may share the buffer of an output (in-place kernels);
* scratch: `ld_scratch` and `st_scratch`, for stack buffers and for temporary memory of the kernel itself.

This is what lets LLVM vectorise short loops without run-time overlap checks. Reading through `ld` what `st`
or `st_scratch` wrote in the same kernel is a bug. No word here calls a library function or checks bounds.
"""

# ruff: noqa: ARG001  (Numba prescribes the parameters of intrinsics and of their emitters)

from contextlib import contextmanager

import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.errors import TypingError
from numba.extending import intrinsic

I8 = ir.IntType(8)
I16 = ir.IntType(16)
I32 = ir.IntType(32)
I64 = ir.IntType(64)
F32 = ir.FloatType()
F64 = ir.DoubleType()

# Helper functions called by kernels keep their own error model and fast-math flags, so every one of them is
# declared with these. `contract` allows fused multiply-add, `nsz` ignores the sign of zero; nothing may
# assume that NaN and infinity do not occur.
FASTMATH = frozenset({"contract", "nsz"})


def helper(function):
    """Decorator for scalar functions which kernels call: always inlined, so that calling loops vectorise."""
    return numba.njit(
        error_model="numpy",
        fastmath=set(FASTMATH),
        forceinline=True,
        no_cpython_wrapper=True,
        no_cfunc_wrapper=True,
    )(function)


# ---------------------------------------------------------------------------------------------- arguments


@intrinsic
def arg(typing_context, args, index):
    """Word `index` of the argument block: int64. The load is invariant, so LLVM moves it out of loops."""

    def emit(context, builder, signature, values):
        word = builder.load(builder.gep(values[0], [values[1]]))
        word.set_metadata("invariant.load", builder.module.add_metadata([]))
        return word

    return types.int64(types.CPointer(types.int64), types.int64), emit


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


@intrinsic
def address(typing_context, pointer):
    """The pointer as an int64 address in bytes."""
    if not isinstance(pointer, types.CPointer):
        return None

    def emit(context, builder, signature, values):
        return builder.ptrtoint(values[0], I64)

    return types.int64(pointer), emit


EPILOGUE_SYMBOL = "minicc.epilogue"


@intrinsic
def external_epilogue(typing_context, args, b0, b1, i, j, acc):
    """A call of an epilogue compiled on its own and linked in later (see codegen/objects.py)."""
    if acc not in (types.float32, types.int32):
        return None

    def emit(context, builder, signature, values):
        kind = ir.FunctionType(ir.VoidType(), [I64.as_pointer(), I64, I64, I64, I64, values[5].type])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, EPILOGUE_SYMBOL), values)
        return context.get_dummy_value()

    index = types.int64
    return types.void(types.CPointer(index), index, index, index, index, acc), emit


# --------------------------------------------------------------------------------------- loads and stores

_KINDS = ("input", "output", "scratch")


def set_memory_kind(builder, instruction, kind):
    """Mark a load or store as touching only memory of `kind` ("input", "output" or "scratch")."""
    module = builder.module
    domain = module.add_metadata(["minicc.memory"])
    scopes = {name: module.add_metadata([f"minicc.{name}", domain]) for name in _KINDS}
    instruction.set_metadata("alias.scope", module.add_metadata([scopes[kind]]))
    others = [scopes[name] for name in _KINDS if name != kind]
    instruction.set_metadata("noalias", module.add_metadata(others))
    return instruction


def _loader(kind):
    @intrinsic
    def load(typing_context, pointer, index):
        if not isinstance(pointer, types.CPointer) or not isinstance(index, types.Integer):
            return None

        def emit(context, builder, signature, values):
            return set_memory_kind(builder, builder.load(builder.gep(values[0], [values[1]])), kind)

        return pointer.dtype(pointer, types.int64), emit

    return load


def _check_stored(pointer, value):
    """Refuse silent conversions to and between floats: an untyped literal makes a float64."""
    element = pointer.dtype
    if isinstance(value, types.Literal):
        value = value.literal_type
    if (isinstance(element, types.Float) or isinstance(value, types.Float)) and element != value:
        raise TypingError(f"a value of type {value} is stored to {element} memory; convert it explicitly")


def _storer(kind):
    @intrinsic
    def store(typing_context, pointer, index, value):
        if not isinstance(pointer, types.CPointer) or not isinstance(index, types.Integer):
            return None
        _check_stored(pointer, value)

        def emit(context, builder, signature, values):
            set_memory_kind(builder, builder.store(values[2], builder.gep(values[0], [values[1]])), kind)
            return context.get_dummy_value()

        return types.void(pointer, types.int64, pointer.dtype), emit

    return store


ld = _loader("input")
ld_out = _loader("output")
ld_scratch = _loader("scratch")
st = _storer("output")
st_scratch = _storer("scratch")

# ------------------------------------------------------------------- half precision: float32 in registers


def half_to_float(builder, half):
    """IEEE binary16 bits (i16, scalar or vector) -> float32, exact, by integer arithmetic and one product."""
    wide, real = _like(half, I32), _like(half, F32)
    bits = builder.zext(half, wide)
    sign = builder.shl(builder.and_(bits, constant(wide, 0x8000)), constant(wide, 16))
    magnitude = builder.shl(builder.and_(bits, constant(wide, 0x7FFF)), constant(wide, 13))
    # The product by 2**112 corrects the exponent bias and normalises subnormal numbers.
    scaled = builder.fmul(builder.bitcast(magnitude, real), constant(real, 2.0**112))
    finite = builder.bitcast(scaled, wide)
    special = builder.or_(magnitude, constant(wide, 0x7F800000))
    is_special = builder.icmp_unsigned(">=", magnitude, constant(wide, 0x7C00 << 13))
    return builder.bitcast(builder.or_(builder.select(is_special, special, finite), sign), real)


def float_to_half(builder, value):
    """float32 (scalar or vector) -> IEEE binary16 bits (i16), rounded to nearest even."""
    wide, real, narrow = _like(value, I32), _like(value, F32), _like(value, I16)
    bits = builder.bitcast(value, wide)
    magnitude = builder.and_(bits, constant(wide, 0x7FFFFFFF))
    sign = builder.lshr(builder.xor(bits, magnitude), constant(wide, 16))
    # Normal: rebias the exponent and round half to even with one integer addition.
    odd = builder.and_(builder.lshr(magnitude, constant(wide, 13)), constant(wide, 1))
    rebias = constant(wide, (((15 - 127) << 23) + 0xFFF) & 0xFFFFFFFF)
    normal = builder.lshr(builder.add(builder.add(magnitude, rebias), odd), constant(wide, 13))
    # Subnormal: adding 0.5 aligns the significand so that the float addition itself rounds it.
    half = builder.bitcast(builder.fadd(builder.bitcast(magnitude, real), constant(real, 0.5)), wide)
    subnormal = builder.sub(half, constant(wide, 126 << 23))
    is_nan = builder.icmp_unsigned(">", magnitude, constant(wide, 0x7F800000))
    special = builder.select(is_nan, constant(wide, 0x7E00), constant(wide, 0x7C00))
    is_subnormal = builder.icmp_unsigned("<", magnitude, constant(wide, 113 << 23))
    is_special = builder.icmp_unsigned(">=", magnitude, constant(wide, (127 + 16) << 23))
    result = builder.select(is_special, special, builder.select(is_subnormal, subnormal, normal))
    return builder.trunc(builder.or_(result, sign), narrow)


def bfloat_to_float(builder, bfloat):
    """bfloat16 bits (i16, scalar or vector) -> float32, exact."""
    wide = _like(bfloat, I32)
    return builder.bitcast(builder.shl(builder.zext(bfloat, wide), constant(wide, 16)), _like(bfloat, F32))


def float_to_bfloat(builder, value):
    """float32 (scalar or vector) -> bfloat16 bits (i16), rounded to nearest even; NaN becomes a quiet NaN."""
    wide = _like(value, I32)
    bits = builder.bitcast(value, wide)
    odd = builder.and_(builder.lshr(bits, constant(wide, 16)), constant(wide, 1))
    rounded = builder.add(builder.add(bits, constant(wide, 0x7FFF)), odd)
    quiet = builder.or_(bits, constant(wide, 0x00400000))
    chosen = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
    return builder.trunc(builder.lshr(chosen, constant(wide, 16)), _like(value, I16))


def _converting_loader(kind, convert):
    @intrinsic
    def load(typing_context, pointer, index):
        if pointer != types.CPointer(types.uint16):
            return None

        def emit(context, builder, signature, values):
            bits = set_memory_kind(builder, builder.load(builder.gep(values[0], [values[1]])), kind)
            return convert(builder, bits)

        return types.float32(pointer, types.int64), emit

    return load


def _converting_storer(kind, convert):
    @intrinsic
    def store(typing_context, pointer, index, value):
        if pointer != types.CPointer(types.uint16) or value != types.float32:
            return None

        def emit(context, builder, signature, values):
            bits = convert(builder, values[2])
            set_memory_kind(builder, builder.store(bits, builder.gep(values[0], [values[1]])), kind)
            return context.get_dummy_value()

        return types.void(pointer, types.int64, types.float32), emit

    return store


ld_f16 = _converting_loader("input", half_to_float)
ld_out_f16 = _converting_loader("output", half_to_float)
st_f16 = _converting_storer("output", float_to_half)
ld_bf16 = _converting_loader("input", bfloat_to_float)
ld_out_bf16 = _converting_loader("output", bfloat_to_float)
st_bf16 = _converting_storer("output", float_to_bfloat)

# ---------------------------------------------------------------------------------------- bits of floats


def _bitcast(source, destination):
    @intrinsic
    def cast(typing_context, value):
        if value != source:
            return None

        def emit(context, builder, signature, values):
            return builder.bitcast(values[0], context.get_value_type(destination))

        return destination(source), emit

    return cast


bits_of_f32 = _bitcast(types.float32, types.int32)
f32_of_bits = _bitcast(types.int32, types.float32)
bits_of_f64 = _bitcast(types.float64, types.int64)
f64_of_bits = _bitcast(types.int64, types.float64)

# ------------------------------------------------------------------------------------------ scratch memory


def _stack_of(element):
    @intrinsic
    def stack(typing_context, count):
        if not isinstance(count, types.IntegerLiteral):
            return None
        number = count.literal_value

        def emit(context, builder, signature, values):
            return stack_array(builder, context.get_data_type(element), number)

        return types.CPointer(element)(types.literal(number)), emit

    return stack


# n elements (a literal) on the stack, 64-byte aligned, reserved once per kernel call, not initialised.
stack_f32 = _stack_of(types.float32)
stack_f64 = _stack_of(types.float64)
stack_i32 = _stack_of(types.int32)
stack_i64 = _stack_of(types.int64)
stack_u8 = _stack_of(types.uint8)

# --------------------------------------------------------- helpers over IRBuilder, for larger intrinsics


def stack_array(builder, element, count, align=64):
    """Reserve `count` elements in the function's entry block; inside a loop the stack would grow."""
    with builder.goto_entry_block():
        memory = builder.alloca(element, size=count)
    memory.align = align
    return memory


def vector(element, width):
    """The LLVM vector type of `width` elements."""
    return ir.VectorType(element, width)


def constant(type_, value):
    """A constant of a scalar type, or of a vector type with the value in every lane."""
    if isinstance(type_, ir.VectorType):
        return ir.Constant(type_, [ir.Constant(type_.element, value)] * type_.count)
    return ir.Constant(type_, value)


def _like(value, element):
    """`element`, or the vector of it with as many lanes as `value` has."""
    return ir.VectorType(element, value.type.count) if isinstance(value.type, ir.VectorType) else element


def splat(builder, scalar, width):
    """A vector with the scalar in every lane (one broadcast instruction)."""
    type_ = ir.VectorType(scalar.type, width)
    first = builder.insert_element(ir.Constant(type_, ir.Undefined), scalar, I32(0))
    lanes = ir.Constant(ir.VectorType(I32, width), [I32(0)] * width)
    return builder.shuffle_vector(first, ir.Constant(type_, ir.Undefined), lanes)


def call_vector_intrinsic(builder, name, operands, result):
    """Call the LLVM intrinsic with this full name, such as `llvm.fmuladd.v8f32`; declares it when needed."""
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(result, [operand.type for operand in operands]), name
    )
    return builder.call(function, operands)


def type_suffix(type_):
    """The suffix of overloaded LLVM intrinsics for a type: `f32`, `v8f32`, `v16i32`."""
    if isinstance(type_, ir.VectorType):
        return f"v{type_.count}{type_suffix(type_.element)}"
    if isinstance(type_, ir.IntType):
        return f"i{type_.width}"
    return "f32" if isinstance(type_, ir.FloatType) else "f64"


def fma(builder, x, y, z):
    """x * y + z for scalars or vectors of floats: fused where the target has the instruction, no call."""
    return call_vector_intrinsic(builder, f"llvm.fmuladd.{type_suffix(x.type)}", [x, y, z], x.type)


def load_vector(builder, pointer, width, kind=None, align=None):
    """Load `width` consecutive elements at a scalar pointer; `align` in bytes (default: of one element)."""
    element = pointer.type.pointee
    memory = builder.bitcast(pointer, ir.VectorType(element, width).as_pointer())
    value = builder.load(memory, align=align or _size(element))
    return value if kind is None else set_memory_kind(builder, value, kind)


def store_vector(builder, value, pointer, kind=None, align=None):
    """Store a vector at a scalar pointer; `align` in bytes (default: that of one element)."""
    element = pointer.type.pointee
    memory = builder.bitcast(pointer, value.type.as_pointer())
    instruction = builder.store(value, memory, align=align or _size(element))
    return instruction if kind is None else set_memory_kind(builder, instruction, kind)


def _size(element):
    if isinstance(element, ir.IntType):
        return element.width // 8
    return 4 if isinstance(element, ir.FloatType) else 8


def outlined(builder, name, arguments, body):
    """Call a function of its own that is never inlined, made by `body(builder, arguments)`.

    For a large piece inside many loops: inlined, LLVM would copy it for every condition of theirs (unswitching).
    """
    types_ = [argument.type for argument in arguments]
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), types_), name)
        function.linkage = "internal"
        function.attributes.add("noinline")
        inner = ir.IRBuilder(function.append_basic_block("entry"))
        body(inner, function.args)
        inner.ret_void()
    builder.call(function, arguments)


@contextmanager
def counted_loop(builder, start, stop, step=1):
    """`for index in range(start, stop, step)` with a positive literal step; yields the i64 index.

    The body is emitted inside the `with`; loop-carried values live in `stack_array` memory, which LLVM turns
    into registers.
    """
    before = builder.block
    test = builder.append_basic_block("loop.test")
    body = builder.append_basic_block("loop.body")
    end = builder.append_basic_block("loop.end")
    builder.branch(test)
    builder.position_at_end(test)
    index = builder.phi(I64, "index")
    index.add_incoming(start, before)
    builder.cbranch(builder.icmp_signed("<", index, stop), body, end)
    builder.position_at_end(body)
    yield index
    index.add_incoming(builder.add(index, I64(step), flags=["nsw"]), builder.block)
    builder.branch(test)
    builder.position_at_end(end)
