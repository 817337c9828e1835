"""Elementary functions for CUDA kernels, under the names of kernels/cpu/vector_math.

They are those of CUDA's device library, which NVVM links in: a few ulp, never the fast approximations.
"""

import math

import numpy as np

from minicc.kernels.cuda.intrinsics import helper


def _of_math(function):
    @helper
    def call(x):
        return function(x)

    return call


exp_f32 = _of_math(math.exp)
exp_f64 = _of_math(math.exp)
log_f32 = _of_math(math.log)
log_f64 = _of_math(math.log)
sin_f32 = _of_math(math.sin)
sin_f64 = _of_math(math.sin)
cos_f32 = _of_math(math.cos)
cos_f64 = _of_math(math.cos)
tan_f32 = _of_math(math.tan)
tan_f64 = _of_math(math.tan)
asin_f32 = _of_math(math.asin)
asin_f64 = _of_math(math.asin)
acos_f32 = _of_math(math.acos)
acos_f64 = _of_math(math.acos)
atan_f32 = _of_math(math.atan)
atan_f64 = _of_math(math.atan)
sinh_f32 = _of_math(math.sinh)
sinh_f64 = _of_math(math.sinh)
cosh_f32 = _of_math(math.cosh)
cosh_f64 = _of_math(math.cosh)
tanh_f32 = _of_math(math.tanh)
tanh_f64 = _of_math(math.tanh)
asinh_f32 = _of_math(math.asinh)
asinh_f64 = _of_math(math.asinh)
acosh_f32 = _of_math(math.acosh)
acosh_f64 = _of_math(math.acosh)
atanh_f32 = _of_math(math.atanh)
atanh_f64 = _of_math(math.atanh)
erf_f32 = _of_math(math.erf)
erf_f64 = _of_math(math.erf)


@helper
def sigmoid_f32(x):
    """1 / (1 + exp(-x))."""
    return np.float32(1) / (np.float32(1) + math.exp(-x))


@helper
def sigmoid_f64(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + math.exp(-x))


@helper
def softplus_f32(x):
    """log(1 + exp(x))."""
    return max(x, np.float32(0)) + math.log1p(math.exp(-abs(x)))


@helper
def pow_f32(x, y):
    """x ** y."""
    return math.pow(x, y)


@helper
def atan2_f32(y, x):
    """The angle of the point (x, y)."""
    return math.atan2(y, x)


pow_f64 = pow_f32
atan2_f64 = atan2_f32
