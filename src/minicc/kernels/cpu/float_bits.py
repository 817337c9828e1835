"""The bits of floating-point numbers as arithmetic: signs, exponents, mantissas, powers of two, and choices without branches.

Everything becomes vector code where it stands in a loop. Nothing here approximates.
"""

# ruff: noqa: ARG001  (Numba prescribes the parameters of intrinsics and of their emitters)

from numba.core import types
from numba.extending import intrinsic

from minicc.kernels.cpu.intrinsics import F32, F64, I32, I64, call_vector_intrinsic, type_suffix


@intrinsic
def copysign(typing_context, x, y):
    """The magnitude of x with the sign of y."""
    if not isinstance(x, types.Float) or x != y:
        return None

    def emit(context, builder, signature, values):
        name = f"llvm.copysign.{type_suffix(values[0].type)}"
        return call_vector_intrinsic(builder, name, values, values[0].type)

    return x(x, y), emit


@intrinsic
def choose(typing_context, condition, x, y):
    """`x if condition else y` as a select: Python's form begins as branches, which LLVM may thread into a tree of paths
    that it then does not vectorise."""
    if x != y:
        return None

    def emit(context, builder, signature, values):
        return builder.select(values[0], *values[1:])

    return x(types.boolean, x, x), emit


@intrinsic
def power_of_two(typing_context, rounded):
    """2**k in float32 for rounded = k + ROUND_F32 and k in -126..127; 0 for -127."""

    def emit(context, builder, signature, values):
        exponent = builder.shl(builder.bitcast(values[0], I32), I32(23))
        return builder.bitcast(builder.add(exponent, I32(127 << 23)), F32)

    return types.float32(types.float32), emit


@intrinsic
def scale(typing_context, x, rounded):
    """x * 2**k in float32 for rounded = k + ROUND_F32 and k in -252..254; over- and underflows rightly."""

    def emit(context, builder, signature, values):
        k = builder.sub(builder.bitcast(values[1], I32), I32(0x4B400000))
        half = builder.ashr(k, I32(1))
        result = values[0]
        for part in (half, builder.sub(k, half)):
            power = builder.bitcast(builder.shl(builder.add(part, I32(127)), I32(23)), F32)
            result = builder.fmul(result, power)
        return result

    return types.float32(types.float32, types.float32), emit


@intrinsic
def power_of_two_f64(typing_context, rounded):
    """2**k in float64 for rounded = k + ROUND_F64 and k in -1022..1023."""

    def emit(context, builder, signature, values):
        exponent = builder.shl(builder.bitcast(values[0], I64), I64(52))
        return builder.bitcast(builder.add(exponent, I64(1023 << 52)), F64)

    return types.float64(types.float64), emit


def _split_f32(builder, x):
    """(exponent k as i32, bits of m) with x = m * 2**k and m in [sqrt(1/2), sqrt(2)), for normal x."""
    bits = builder.bitcast(x, I32)
    k = builder.ashr(builder.sub(bits, I32(0x3F3504F3)), I32(23))
    return k, builder.sub(bits, builder.shl(k, I32(23)))


@intrinsic
def exponent_of(typing_context, x):
    """k of x = m * 2**k, m in [sqrt(1/2), sqrt(2)), as a float32; x positive and normal."""

    def emit(context, builder, signature, values):
        return builder.sitofp(_split_f32(builder, values[0])[0], F32)

    return types.float32(types.float32), emit


@intrinsic
def mantissa_of(typing_context, x):
    """m of x = m * 2**k, m in [sqrt(1/2), sqrt(2)); x positive and normal."""

    def emit(context, builder, signature, values):
        return builder.bitcast(_split_f32(builder, values[0])[1], F32)

    return types.float32(types.float32), emit


# The upper bits of 2**52; an unsigned number below 2**52 joined to them is the float64 2**52 + number.
_JOIN_F64 = 0x4330000000000000


@intrinsic
def exponent_of_f64(typing_context, x):
    """k of x = m * 2**k, m in [sqrt(1/2), sqrt(2)), as a float64; x positive and normal."""

    def emit(context, builder, signature, values):
        # Unsigned shift and join: vector units below AVX-512 can neither shift i64 by sign nor convert it.
        bits = builder.sub(builder.bitcast(values[0], I64), I64(0x3FE6A09E667F3BCD - (1023 << 52)))
        joined = builder.bitcast(builder.or_(builder.lshr(bits, I64(52)), I64(_JOIN_F64)), F64)
        return builder.fsub(joined, F64(2.0**52 + 1023.0))

    return types.float64(types.float64), emit


@intrinsic
def mantissa_of_f64(typing_context, x):
    """m of x = m * 2**k, m in [sqrt(1/2), sqrt(2)); x positive and normal."""

    def emit(context, builder, signature, values):
        bits = builder.sub(builder.bitcast(values[0], I64), I64(0x3FE6A09E667F3BCD))
        fraction = builder.and_(bits, I64((1 << 52) - 1))
        return builder.bitcast(builder.add(fraction, I64(0x3FE6A09E667F3BCD)), F64)

    return types.float64(types.float64), emit


@intrinsic
def has_bit(typing_context, rounded, bit):
    """Whether this bit (a literal) of k is set, for rounded = k + ROUND_F64."""
    if not isinstance(bit, types.IntegerLiteral):
        return None

    def emit(context, builder, signature, values):
        chosen = builder.and_(builder.bitcast(values[0], I64), I64(1 << bit.literal_value))
        return builder.icmp_unsigned("!=", chosen, I64(0))

    return types.boolean(types.float64, bit), emit
