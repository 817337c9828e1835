"""Scalar helpers of generated kernels: what Python operators on typed numbers do not give.

Integer division without traps, NaN-propagating extrema, rounding to half types, and reductions that LLVM may
reassociate. All are inlined into the loops that call them. Vector polynomials of transcendental functions are
in vector_math.
"""

# ruff: noqa: ARG001  (Numba prescribes the parameters of intrinsics and of their emitters)

from numba.core import types
from numba.extending import intrinsic

from minicc.kernels.cpu.intrinsics import (
    bfloat_to_float,
    call_vector_intrinsic,
    float_to_bfloat,
    float_to_half,
    half_to_float,
    helper,
    type_suffix,
)


def _reduction_step(emit_step):
    """A binary float intrinsic whose instruction may be reassociated, so that reductions vectorise."""

    @intrinsic
    def step(typing_context, a, b):
        if not (isinstance(a, types.Float) and a == b):
            return None

        def emit(context, builder, signature, values):
            return emit_step(builder, values[0], values[1])

        return a(a, b), emit

    return step


_REASSOCIATE = ("reassoc", "nsz", "contract")


def _extremum(name):
    def emit(builder, a, b):
        call = call_vector_intrinsic(builder, f"llvm.{name}.{type_suffix(a.type)}", [a, b], a.type)
        call.fastmath.update(("nsz",))
        return call

    return emit


add_reassoc = _reduction_step(lambda builder, a, b: builder.fadd(a, b, flags=_REASSOCIATE))
mul_reassoc = _reduction_step(lambda builder, a, b: builder.fmul(a, b, flags=_REASSOCIATE))
# IEEE 754-2019 maximum and minimum: a NaN on either side comes out.
reduce_max = _reduction_step(_extremum("maximum"))
reduce_min = _reduction_step(_extremum("minimum"))


def _rounding(encode, decode):
    @intrinsic
    def rounded(typing_context, x):
        if x != types.float32:
            return None

        def emit(context, builder, signature, values):
            return decode(builder, encode(builder, values[0]))

        return types.float32(types.float32), emit

    return rounded


# The nearest value of the half type, ties to even, still in float32.
round_f16 = _rounding(float_to_half, half_to_float)
round_bf16 = _rounding(float_to_bfloat, bfloat_to_float)


@helper
def maximum(a, b):
    """The larger of two floats; NaN when either is."""
    return a if (a > b) or (a != a) else b


@helper
def minimum(a, b):
    """The smaller of two floats; NaN when either is."""
    return a if (a < b) or (a != a) else b


@helper
def sign(x):
    """-1, 0 or 1 of the type of x; NaN for NaN."""
    zero = type_one(x) - type_one(x)  # x - x is NaN for infinities
    if x > zero:
        return type_one(x)
    if x < zero:
        return zero - type_one(x)
    return x


@intrinsic
def type_one(typing_context, x):
    """The number 1 in the type of x."""

    def emit(context, builder, signature, values):
        return context.get_constant(signature.return_type, 1)

    return x(x), emit


@intrinsic
def truncate_divide(typing_context, a, b):
    """Integer quotient rounded towards zero; 0 for a zero divisor, wrap-around for the one overflow."""
    if not (isinstance(a, types.Integer) and a == b):
        return None

    def emit(context, builder, signature, values):
        x, y = values
        zero, one = context.get_constant(a, 0), context.get_constant(a, 1)
        is_zero = builder.icmp_unsigned("==", y, zero)
        if not a.signed:
            return builder.select(is_zero, zero, builder.udiv(x, builder.select(is_zero, one, y)))
        is_minus_one = builder.icmp_unsigned("==", y, context.get_constant(a, -1))
        safe = builder.select(builder.or_(is_zero, is_minus_one), one, y)
        quotient = builder.select(is_minus_one, builder.neg(x), builder.sdiv(x, safe))
        return builder.select(is_zero, zero, quotient)

    return a(a, b), emit


@helper
def floor_divide(a, b):
    """Quotient rounded towards minus infinity; 0 for a zero integer divisor."""
    return a // b


@helper
def floor_mod(a, b):
    """Remainder with the sign of the divisor; for integers 0 when the divisor is 0 or -1."""
    return a % b


@intrinsic
def fmod(typing_context, a, b):
    """Remainder with the sign of the dividend, as C's fmod and %; 0 for integer divisors 0 and -1."""
    if a != b:
        return None

    def emit(context, builder, signature, values):
        x, y = values
        if isinstance(a, types.Float):
            return builder.frem(x, y)
        zero, one = context.get_constant(a, 0), context.get_constant(a, 1)
        trap = builder.icmp_unsigned("==", y, zero)
        if a.signed:
            trap = builder.or_(trap, builder.icmp_unsigned("==", y, context.get_constant(a, -1)))
        safe = builder.select(trap, one, y)
        return builder.srem(x, safe) if a.signed else builder.urem(x, safe)

    return a(a, b), emit


@helper
def integer_power(base, exponent):
    """base ** exponent for integers by squaring, wrapping around; 0 for negative exponents (1 and -1 aside)."""
    result = type_one(base)
    factor = base
    count = exponent
    if count < 0:
        if base == result:
            return result
        if base + result == 0:
            return result if (count & 1) == 0 else base
        return base - base
    while count > 0:
        if count & 1:
            result = result * factor
        factor = factor * factor
        count = count >> 1
    return result


@intrinsic
def float_to_u64(typing_context, x):
    """Truncation of a float to an unsigned 64-bit integer; Numba's own cast loses values from 2**63 up."""
    if not isinstance(x, types.Float):
        return None

    def emit(context, builder, signature, values):
        return builder.fptoui(values[0], context.get_value_type(types.uint64))

    return types.uint64(x), emit
