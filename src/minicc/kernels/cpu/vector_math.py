"""Elementary functions for kernels, named `<function>_f32` and `<function>_f64`.

The float32 functions in the first half are straight-line arithmetic: inlined into a loop they become vector
code. They are right to 4 ulp or better, and have numpy's values at infinities, NaN, overflow and subnormal
numbers, but for a sigmoid, which is 0 where it would be one. The others, and all float64 ones, call the C library once
per element: right, but slow. Nothing here raises.

Methods: Cody and Waite range reduction; polynomials of Cephes (S. L. Moshier); erf after N. Juffa.
"""

import math

import numpy as np

from minicc.kernels.cpu.float_bits import (
    choose,
    copysign,
    exponent_of,
    exponent_of_f64,
    has_bit,
    mantissa_of,
    mantissa_of_f64,
    power_of_two,
    power_of_two_f64,
    scale,
)
from minicc.kernels.cpu.intrinsics import helper

f32 = np.float32
f64 = np.float64

# Adding 1.5 * 2**23 to a small float32 rounds it to an integer, which then stands in the low bits.
ROUND_F32 = f32(12582912.0)
ROUND_F64 = f64(6755399441055744.0)

INFINITY = f32(np.inf)
LOG2_E = f32(1.44269504088896341)
# log(2) in two parts; the first has few bits, so that its product with an exponent is exact.
LOG_2_HIGH = f32(0.693359375)
LOG_2_LOW = f32(-2.12194440e-4)


# ------------------------------------------------------------------------- exponential and its relatives


@helper
def _round_exponent(x):
    """k + ROUND_F32 with k the integer nearest to x / log(2)."""
    return x * LOG2_E + ROUND_F32


@helper
def _expm1_reduced(x, k):
    """exp(x - k * log(2)) - 1 in float32, for an argument within half of log(2) of zero."""
    r = (x - k * LOG_2_HIGH) - k * LOG_2_LOW
    p = r * f32(1.9875691500e-4) + f32(1.3981999507e-3)
    p = p * r + f32(8.3334519073e-3)
    p = p * r + f32(4.1665795894e-2)
    p = p * r + f32(1.6666665459e-1)
    p = p * r + f32(5.0000001201e-1)
    return p * (r * r) + r


@helper
def exp_f32(x):
    """e**x."""
    # Beyond these bounds the result is infinity or 0. NaN passes both comparisons.
    x = choose(x > f32(89.0), f32(89.0), x)
    x = choose(x < f32(-104.0), f32(-104.0), x)
    rounded = _round_exponent(x)
    return scale(_expm1_reduced(x, rounded - ROUND_F32) + f32(1.0), rounded)


@helper
def expm1_f32(x):
    """e**x - 1, accurate near 0."""
    y = choose(x > f32(89.0), f32(89.0), x)
    y = choose(y < f32(-20.0), f32(-20.0), y)
    rounded = _round_exponent(y)
    # Half of the power, as 2**128 is no float32.
    half = power_of_two(rounded - f32(1.0))
    result = half * _expm1_reduced(y, rounded - ROUND_F32) + (half - f32(0.5))
    return copysign(result + result, x)


@helper
def sigmoid_f32(x):
    """1 / (1 + e**-x), without overflow on either side; 0 where that is below the normal numbers."""
    y = -abs(x)
    y = choose(y < f32(-88.0), f32(-88.0), y)  # e**y is 0 from there on
    rounded = _round_exponent(y)
    e = power_of_two(rounded) * (_expm1_reduced(y, rounded - ROUND_F32) + f32(1.0))
    return choose(x >= f32(0.0), f32(1.0), e) / (f32(1.0) + e)


@helper
def tanh_f32(x):
    """Hyperbolic tangent: (e**2x - 1) / (e**2x + 1)."""
    y = abs(x) + abs(x)
    y = choose(y > f32(20.0), f32(20.0), y)
    rounded = _round_exponent(y)
    power = power_of_two(rounded)
    e = power * _expm1_reduced(y, rounded - ROUND_F32) + (power - f32(1.0))
    return copysign(e / (e + f32(2.0)), x)


@helper
def _log_parts(x):
    """log(x) of a positive normal number."""
    k = exponent_of(x)
    f = mantissa_of(x) - f32(1.0)
    square = f * f
    p = f * f32(7.0376836292e-2) + f32(-1.1514610310e-1)
    p = p * f + f32(1.1676998740e-1)
    p = p * f + f32(-1.2420140846e-1)
    p = p * f + f32(1.4249322787e-1)
    p = p * f + f32(-1.6668057665e-1)
    p = p * f + f32(2.0000714765e-1)
    p = p * f + f32(-2.4999993993e-1)
    p = p * f + f32(3.3333331174e-1)
    p = p * f * square + k * LOG_2_LOW
    p = p - square * f32(0.5)
    return (f + p) + k * LOG_2_HIGH


@helper
def log_f32(x):
    """Natural logarithm; -infinity at 0, NaN below."""
    tiny = x < f32(1.17549435e-38)
    y = choose(tiny, x * f32(8388608.0), x)
    result = _log_parts(y)
    result = choose(tiny, result - f32(15.942385152878742), result)
    result = choose(x < INFINITY, result, x)
    result = choose(x > f32(0.0), result, f32(np.nan))
    result = choose(x == f32(0.0), -INFINITY, result)
    return choose(x == x, result, x)


@helper
def log1p_f32(x):
    """log(1 + x), accurate near 0."""
    y = f32(1.0) + x
    # What rounding 1 + x lost, relative to it.
    lost = (x - (y - f32(1.0))) / y
    result = log_f32(y) + lost
    return (
        result
        if (y > f32(0.0)) and (y < INFINITY) and (x != f32(0.0))
        else (x if x == f32(0.0) else log_f32(y))
    )


@helper
def softplus_f32(x):
    """log(1 + e**x), without overflow."""
    positive = choose(x < f32(0.0), f32(0.0), x)
    return positive + log1p_f32(exp_f32(-abs(x)))


@helper
def erf_f32(x):
    """Error function."""
    a = abs(x)
    square = x * x
    # Near 0: x + x * p(x**2).
    p = square * f32(-5.96761703e-4) + f32(4.99119423e-3)
    p = p * square + f32(-2.67681349e-2)
    p = p * square + f32(1.12819925e-1)
    p = p * square + f32(-3.76125336e-1)
    p = p * square + f32(1.28379166e-1)
    near = p * x + x
    # Further out: 1 - e**q(|x|).
    b = choose(a > f32(4.0), f32(4.0), a)
    q = b * f32(-1.72853470e-5) + f32(3.83197126e-4)
    q = q * (b * b) + (b * f32(-3.88396438e-3) + f32(2.42546219e-2))
    q = q * b + f32(-1.06777877e-1)
    q = q * b + f32(-6.34846687e-1)
    q = q * b + f32(-1.28717512e-1)
    q = q * b - b
    rounded = _round_exponent(q)
    power = power_of_two(rounded)
    e = power * _expm1_reduced(q, rounded - ROUND_F32) + (power - f32(1.0))
    return choose(a > f32(0.927734375), copysign(-e, x), near)


# ---------------------------------------------------------------------------------------------- trigonometry

TWO_OVER_PI = f64(0.6366197723675814)
# pi / 2 in three parts; products of the first two with an integer below 2**20 are exact even without FMA.
HALF_PI_1 = f64(1.57079632673412561417e00)
HALF_PI_2 = f64(6.07710050630396597660e-11)
HALF_PI_3 = f64(2.02226624879595063154e-21)
# From here on neighbouring float32 numbers lie many periods apart, and 0 is as good an angle as any.
MEANINGLESS = f32(1e12)


@helper
def _quarter_turns(x):
    """k + ROUND_F64 with k the number of quarter turns nearest to the angle; NaN for infinity."""
    y = choose(abs(x) < MEANINGLESS, x, x - x)
    return f64(y) * TWO_OVER_PI + ROUND_F64


@helper
def _remaining_angle(x, k):
    """x - k * pi / 2 in float32, accurate to its last bit."""
    y = f64(choose(abs(x) < MEANINGLESS, x, x - x))
    return f32(((y - k * HALF_PI_1) - k * HALF_PI_2) - k * HALF_PI_3)


@helper
def _sin_reduced(r):
    """sin(r) for r within pi / 4 of zero."""
    square = r * r
    p = square * f32(-1.9515295891e-4) + f32(8.3321608736e-3)
    p = p * square + f32(-1.6666654611e-1)
    return p * square * r + r


@helper
def _cos_reduced(r):
    """cos(r) for r within pi / 4 of zero."""
    square = r * r
    p = square * f32(2.443315711809948e-5) + f32(-1.388731625493765e-3)
    p = p * square + f32(4.166664568298827e-2)
    return p * (square * square) + (square * f32(-0.5) + f32(1.0))


@helper
def sin_f32(x):
    """Sine of an angle in radians; NaN for infinity. Angles from 1e12 on count as 0."""
    turns = _quarter_turns(x)
    r = _remaining_angle(x, turns - ROUND_F64)
    result = choose(has_bit(turns, 0), _cos_reduced(r), _sin_reduced(r))
    return choose(has_bit(turns, 1), -result, result)


@helper
def cos_f32(x):
    """Cosine of an angle in radians; NaN for infinity. Angles from 1e12 on count as 0."""
    turns = _quarter_turns(x)
    r = _remaining_angle(x, turns - ROUND_F64)
    result = choose(has_bit(turns, 0), _sin_reduced(r), _cos_reduced(r))
    return choose(has_bit(turns + f64(1.0), 1), -result, result)


@helper
def tan_f32(x):
    """Tangent of an angle in radians; NaN for infinity. Angles from 1e12 on count as 0."""
    turns = _quarter_turns(x)
    r = _remaining_angle(x, turns - ROUND_F64)
    sine, cosine = _sin_reduced(r), _cos_reduced(r)
    odd = has_bit(turns, 0)
    return (-cosine if odd else sine) / (sine if odd else cosine)


# ---------------------------------------------------------------------------------------------------- power


@helper
def _log2_f64(x):
    """Binary logarithm of a positive number to 1e-13."""
    m = mantissa_of_f64(x)
    s = (m - f64(1.0)) / (m + f64(1.0))
    square = s * s
    p = square * f64(2.0 / 17.0) + f64(2.0 / 15.0)
    p = p * square + f64(2.0 / 13.0)
    p = p * square + f64(2.0 / 11.0)
    p = p * square + f64(2.0 / 9.0)
    p = p * square + f64(2.0 / 7.0)
    p = p * square + f64(2.0 / 5.0)
    p = p * square + f64(2.0 / 3.0)
    p = p * square + f64(2.0)
    return p * s * f64(1.4426950408889634) + exponent_of_f64(x)


@helper
def _exp2_f64(x):
    """2**x to 1e-12, for x in -1000..1000."""
    rounded = x + ROUND_F64
    r = (x - (rounded - ROUND_F64)) * f64(0.6931471805599453)
    p = r * f64(1.0 / 3628800.0) + f64(1.0 / 362880.0)
    p = p * r + f64(1.0 / 40320.0)
    p = p * r + f64(1.0 / 5040.0)
    p = p * r + f64(1.0 / 720.0)
    p = p * r + f64(1.0 / 120.0)
    p = p * r + f64(1.0 / 24.0)
    p = p * r + f64(1.0 / 6.0)
    p = p * r + f64(0.5)
    p = p * r + f64(1.0)
    return (p * r + f64(1.0)) * power_of_two_f64(rounded)


@helper
def pow_f32(x, y):
    """x**y with the special cases of C's pow, computed in float64."""
    a = abs(x)
    logarithm = _log2_f64(f64(a))
    logarithm = choose(a < INFINITY, logarithm, f64(a))
    logarithm = choose(a == f32(0.0), f64(-np.inf), logarithm)
    exponent = choose(a == f32(1.0), f64(0.0), logarithm * f64(y))
    exponent = choose(exponent > f64(200.0), f64(200.0), exponent)
    exponent = choose(exponent < f64(-200.0), f64(-200.0), exponent)
    result = f32(_exp2_f64(exponent))
    half = y * f32(0.5)
    is_whole = np.rint(y) == y
    is_odd = is_whole and np.rint(half) != half
    result = choose(is_odd, copysign(result, x), result)
    result = choose((x < f32(0.0)) and (a < INFINITY) and not is_whole, f32(np.nan), result)
    return choose((y == f32(0.0)) or (x == f32(1.0)), f32(1.0), result)


# ---------------------------------------------------------------------------------- inverses of the circle's

PI = f32(math.pi)
HALF_PI = f32(math.pi / 2)
QUARTER_PI = f32(math.pi / 4)


@helper
def atan_f32(x):
    """Arc tangent: of a third of the range by its addition theorem."""
    a = abs(x)
    far = a > f32(2.414213562373095)
    middle = a > f32(0.4142135623730950)
    above = choose(far, f32(-1.0), choose(middle, a - f32(1.0), a))
    r = above / choose(far, a, choose(middle, a + f32(1.0), f32(1.0)))
    z = r * r
    p = z * f32(8.05374449538e-2) + f32(-1.38776856032e-1)
    p = p * z + f32(1.99777106478e-1)
    p = p * z + f32(-3.33329491539e-1)
    p = p * z * r + r
    return copysign(choose(far, HALF_PI, choose(middle, QUARTER_PI, f32(0.0))) + p, x)


@helper
def _asin_reduced(z, w):
    """asin(w) with z = w**2, up to a half."""
    p = z * f32(4.2163199048e-2) + f32(2.4181311049e-2)
    p = p * z + f32(4.5470025998e-2)
    p = p * z + f32(7.4953002686e-2)
    p = p * z + f32(1.6666752422e-1)
    return p * z * w + w


@helper
def asin_f32(x):
    """Arc sine; NaN outside -1 .. 1."""
    a = abs(x)
    far = a > f32(0.5)
    z = choose(far, (f32(1.0) - a) * f32(0.5), a * a)
    p = _asin_reduced(z, choose(far, f32(math.sqrt(z)), a))
    return copysign(choose(far, HALF_PI - (p + p), p), x)


@helper
def acos_f32(x):
    """Arc cosine; NaN outside -1 .. 1."""
    a = abs(x)
    far = a > f32(0.5)
    z = choose(far, (f32(1.0) - a) * f32(0.5), a * a)
    p = _asin_reduced(z, choose(far, f32(math.sqrt(z)), x))
    twice = p + p
    return choose(far, choose(x < f32(0.0), PI - twice, twice), HALF_PI - p)


# ------------------------------------------------------------------------------------------------ hyperbolic


@helper
def _half_exp(a):
    """e**a / 2 for a >= 0, infinity only where that is."""
    y = choose(a > f32(90.0), f32(90.0), a)
    rounded = _round_exponent(y)
    return scale(_expm1_reduced(y, rounded - ROUND_F32) + f32(1.0), rounded - f32(1.0))


@helper
def sinh_f32(x):
    """Hyperbolic sine."""
    a = abs(x)
    z = x * x
    p = z * f32(2.03721912945e-4) + f32(8.33028376239e-3)
    p = p * z + f32(1.66667160211e-1)
    half = _half_exp(a)
    return choose(a < f32(1.0), p * z * x + x, copysign(half - f32(0.25) / half, x))


@helper
def cosh_f32(x):
    """Hyperbolic cosine."""
    half = _half_exp(abs(x))
    return half + f32(0.25) / half


LOG_2 = f32(math.log(2))


@helper
def asinh_f32(x):
    """Inverse of the hyperbolic sine."""
    a = abs(x)
    z = a * a
    p = z * f32(2.0122003309e-2) + f32(-4.2699340972e-2)
    p = p * z + f32(7.4847586088e-2)
    p = p * z + f32(-1.6666288134e-1)
    far = a > f32(1500.0)
    outer = log_f32(choose(far, a, a + f32(math.sqrt(z + f32(1.0))))) + choose(far, LOG_2, f32(0.0))
    return copysign(choose(a < f32(0.5), p * z * a + a, outer), x)


@helper
def acosh_f32(x):
    """Inverse of the hyperbolic cosine; NaN below 1."""
    z = x - f32(1.0)
    p = z * f32(1.7596881071e-3) + f32(-7.5272886713e-3)
    p = p * z + f32(2.6454905019e-2)
    p = p * z + f32(-1.1784741703e-1)
    p = p * z + f32(1.4142135263)
    far = x > f32(1500.0)
    outer = log_f32(choose(far, x, x + f32(math.sqrt(z * (x + f32(1.0)))))) + choose(far, LOG_2, f32(0.0))
    return choose(z < f32(0.5), p * f32(math.sqrt(z)), outer)


@helper
def atanh_f32(x):
    """Inverse of the hyperbolic tangent; NaN outside -1 .. 1."""
    z = x * x
    p = z * f32(1.81740078349e-1) + f32(8.24370301058e-2)
    p = p * z + f32(1.46691431730e-1)
    p = p * z + f32(1.99782164500e-1)
    p = p * z + f32(3.33337300303e-1)
    outer = f32(0.5) * log_f32((f32(1.0) + x) / (f32(1.0) - x))
    return choose(z < f32(0.25), p * z * x + x, outer)


# ---------------------------------------------------------------------- by the C library, once per element


def _library(function):
    """The function of `math` as a helper: float32 in and out for float32 arguments."""

    @helper
    def call(x):
        return function(x)

    return call


asin_f64 = _library(math.asin)
acos_f64 = _library(math.acos)
atan_f64 = _library(math.atan)
sinh_f64 = _library(math.sinh)
cosh_f64 = _library(math.cosh)
asinh_f64 = _library(math.asinh)
acosh_f64 = _library(math.acosh)
atanh_f64 = _library(math.atanh)
exp_f64 = _library(math.exp)
expm1_f64 = _library(math.expm1)
log_f64 = _library(math.log)
log1p_f64 = _library(math.log1p)
sin_f64 = _library(math.sin)
cos_f64 = _library(math.cos)
tan_f64 = _library(math.tan)
tanh_f64 = _library(math.tanh)
erf_f64 = _library(math.erf)


@helper
def atan2_f32(y, x):
    """The angle of the point (x, y), from -pi to pi."""
    return math.atan2(y, x)


@helper
def pow_f64(x, y):
    """x**y with the special cases of C's pow."""
    return math.pow(x, y)


@helper
def sigmoid_f64(x):
    """1 / (1 + e**-x), without overflow on either side."""
    e = math.exp(-abs(x))
    return (f64(1.0) if x >= f64(0.0) else e) / (f64(1.0) + e)


@helper
def softplus_f64(x):
    """log(1 + e**x), without overflow."""
    return max(x, f64(0.0)) + math.log1p(math.exp(-abs(x)))


atan2_f64 = atan2_f32
