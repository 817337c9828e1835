"""Scalar helpers of generated CUDA kernels, under the names of kernels/cpu/scalar, and reductions of a team.

Elementary functions are in vector_math.
"""

# ruff: noqa: ARG001  (Numba prescribes the parameters of intrinsics and of their emitters)

from llvmlite import ir
from numba import cuda
from numba.cuda import cgutils, types
from numba.cuda.extending import intrinsic

from minicc.kernels.cuda.intrinsics import (
    F32,
    FULL_WARP,
    bfloat_to_float,
    block,
    blocks,
    float_to_bfloat,
    float_to_half,
    half_to_float,
    helper,
    thread,
    threads,
)


def _rounder(name):
    """A function of the device library, for either float type."""

    @intrinsic
    def rounded(typing_context, x):
        if not isinstance(x, types.Float):
            return None

        def emit(context, builder, signature, values):
            kind = ir.FunctionType(values[0].type, [values[0].type])
            full = f"__nv_{name}{'f' if values[0].type == F32 else ''}"
            return builder.call(cgutils.get_or_insert_function(builder.module, kind, full), values)

        return x(x), emit

    return rounded


floor = _rounder("floor")
ceil = _rounder("ceil")
trunc = _rounder("trunc")
rint = _rounder("rint")  # ties to even
sqrt = _rounder("sqrt")


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
def add_reassoc(a, b):
    """One step of a sum."""
    return a + b


@helper
def mul_reassoc(a, b):
    """One step of a product."""
    return a * b


def _extreme(name, relation):
    """The larger or smaller of two numbers of one type; NaN when either is. One instruction for float32."""

    @intrinsic
    def extreme(typing_context, a, b):
        if a != b or not isinstance(a, types.Float | types.Integer):
            return None

        def emit(context, builder, signature, values):
            x, y = values
            if a == types.float32:
                assembly = ir.InlineAsm(ir.FunctionType(F32, [F32, F32]), f"{name}.NaN.f32 $0, $1, $2;", "=f,f,f")
                return builder.call(assembly, values)
            if isinstance(a, types.Float):
                first = builder.or_(builder.fcmp_ordered(relation, x, y), builder.fcmp_unordered("uno", x, x))
            else:
                compare = builder.icmp_signed if a.signed else builder.icmp_unsigned
                first = compare(relation, x, y)
            return builder.select(first, x, y)

        return a(a, b), emit

    return extreme


maximum = _extreme("max", ">")
minimum = _extreme("min", "<")
reduce_max = maximum
reduce_min = minimum


@helper
def sign(x):
    """-1, 0 or 1 of the type of x; NaN for NaN."""
    zero = type_one(x) - type_one(x)
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


def _divisor(context, builder, kind, y):
    """(the divisor where division is defined, else 1; whether it is 0; whether it is -1)."""
    zero, one = context.get_constant(kind, 0), context.get_constant(kind, 1)
    is_zero = builder.icmp_unsigned("==", y, zero)
    is_minus_one = builder.icmp_unsigned("==", y, context.get_constant(kind, -1) if kind.signed else zero)
    return builder.select(builder.or_(is_zero, is_minus_one), one, y), is_zero, is_minus_one


@intrinsic
def truncate_divide(typing_context, a, b):
    """Integer quotient rounded towards zero; 0 for a zero divisor, wrap-around for the one overflow."""
    if not (isinstance(a, types.Integer) and a == b):
        return None

    def emit(context, builder, signature, values):
        x, y = values
        zero = context.get_constant(a, 0)
        safe, is_zero, is_minus_one = _divisor(context, builder, a, y)
        quotient = builder.sdiv(x, safe) if a.signed else builder.udiv(x, safe)
        if a.signed:
            quotient = builder.select(is_minus_one, builder.neg(x), quotient)
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
            name = "__nv_fmodf" if x.type == F32 else "__nv_fmod"
            kind = ir.FunctionType(x.type, [x.type, x.type])
            return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values)
        safe, is_zero, is_minus_one = _divisor(context, builder, a, y)
        rest = builder.srem(x, safe) if a.signed else builder.urem(x, safe)
        return builder.select(builder.or_(is_zero, is_minus_one), context.get_constant(a, 0), rest)

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
    """Truncation of a float to an unsigned 64-bit integer."""
    if not isinstance(x, types.Float):
        return None

    def emit(context, builder, signature, values):
        return builder.fptoui(values[0], context.get_value_type(types.uint64))

    return types.uint64(x), emit


# -------------------------------------------------------------------------------------- reductions of a team

# A block of so many threads is teams of one warp; any other block is one team. Launches rely on it.
WARP_TEAMS = 128
_WARP = 32


@helper
def team_size():
    """Threads of a team of this launch."""
    return _WARP if threads() == WARP_TEAMS else threads()


@helper
def team_lane(team):
    """The number of this thread in its team."""
    return thread() & (_WARP - 1) if team == _WARP else thread()


@helper
def first_team(team):
    """The number of this thread's team among those of the grid."""
    return block() * (WARP_TEAMS // _WARP) + (thread() >> 5) if team == _WARP else block()


@helper
def all_teams(team):
    """Teams of the grid."""
    return blocks() * (WARP_TEAMS // _WARP) if team == _WARP else blocks()


def _team_reduction(step, dtype):
    """A function of one value per thread, and the size of the team, that gives each of its threads the reduced value.

    All threads of the team must call it; their number is a multiple of 32.
    """

    @helper
    def reduced(value, team):
        for distance in (16, 8, 4, 2, 1):
            value = step(value, cuda.shfl_xor_sync(FULL_WARP, value, distance))
        if team > _WARP:
            kept = cuda.shared.array(32, dtype)
            lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
            if lane == 0:
                kept[warp] = value
            cuda.syncthreads()
            value = kept[0]
            for other in range(1, cuda.blockDim.x >> 5):
                value = step(value, kept[other])
            cuda.syncthreads()  # before the next reduction reuses the memory
        return value

    return reduced


team_sum_f32 = _team_reduction(add_reassoc, types.float32)
team_sum_f64 = _team_reduction(add_reassoc, types.float64)
team_sum_i32 = _team_reduction(add_reassoc, types.int32)
team_sum_i64 = _team_reduction(add_reassoc, types.int64)
team_prod_f32 = _team_reduction(mul_reassoc, types.float32)
team_prod_f64 = _team_reduction(mul_reassoc, types.float64)
team_prod_i32 = _team_reduction(mul_reassoc, types.int32)
team_prod_i64 = _team_reduction(mul_reassoc, types.int64)
team_max_f32 = _team_reduction(maximum, types.float32)
team_max_f64 = _team_reduction(maximum, types.float64)
team_max_i32 = _team_reduction(maximum, types.int32)
team_max_i64 = _team_reduction(maximum, types.int64)
team_min_f32 = _team_reduction(minimum, types.float32)
team_min_f64 = _team_reduction(minimum, types.float64)
team_min_i32 = _team_reduction(minimum, types.int32)
team_min_i64 = _team_reduction(minimum, types.int64)
