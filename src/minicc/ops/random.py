"""Random tensors, on the host with numpy's generator.

A given seed gives the same numbers on every run; the numbers are not those of other runtimes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minicc.ir.opdef import REQUIRED, Inference, Kind, OpDef, register
from minicc.ir.types import DType, TensorType, Type
from minicc.ops.helpers import Array, element_type, widen


def generator(seed: float | None) -> np.random.Generator:
    """A generator for a seed attribute (a float, taken by its bits); a random one for None."""
    return np.random.default_rng(None if seed is None else int(np.float32(seed).view(np.uint32)))


def _register(name: str, infer: Callable[[Inference], Sequence[Type]], evaluate: Callable[..., Array],
              **attrs: Any) -> None:  # fmt: skip
    register(
        OpDef(name, Kind.HOST, infer=infer, eval=evaluate, attrs={"seed": None, **attrs}, deterministic=False)
    )


def _shape_infer(n: Inference) -> list[Type]:
    return [TensorType(element_type(n.attr("dtype")), tuple(n.attr("shape")))]


def _like_infer(n: Inference) -> list[Type]:
    given = n.attr("dtype")
    return [n.type(0) if given is None else n.type(0).with_dtype(element_type(given))]


def _numpy_type(dtype: DType | int | None, x: Array) -> np.dtype[Any]:
    return x.dtype if dtype is None else element_type(dtype).numpy


def _normal(
    shape: Sequence[int], dtype: np.dtype[Any], mean: float, scale: float, seed: float | None
) -> Array:
    return np.asarray(generator(seed).normal(mean, scale, tuple(shape))).astype(dtype)


def _uniform(
    shape: Sequence[int], dtype: np.dtype[Any], low: float, high: float, seed: float | None
) -> Array:
    return np.asarray(generator(seed).uniform(low, high, tuple(shape))).astype(dtype)


_register(
    "RandomNormal", _shape_infer,
    lambda *, shape, dtype, mean, scale, seed: _normal(shape, element_type(dtype).numpy, mean, scale, seed),
    shape=REQUIRED, dtype=1, mean=0.0, scale=1.0,
)  # fmt: skip
_register(
    "RandomNormalLike", _like_infer,
    lambda x, *, dtype, mean, scale, seed: _normal(x.shape, _numpy_type(dtype, x), mean, scale, seed),
    dtype=None, mean=0.0, scale=1.0,
)  # fmt: skip
_register(
    "RandomUniform", _shape_infer,
    lambda *, shape, dtype, low, high, seed: _uniform(shape, element_type(dtype).numpy, low, high, seed),
    shape=REQUIRED, dtype=1, low=0.0, high=1.0,
)  # fmt: skip
_register(
    "RandomUniformLike", _like_infer,
    lambda x, *, dtype, low, high, seed: _uniform(x.shape, _numpy_type(dtype, x), low, high, seed),
    dtype=None, low=0.0, high=1.0,
)  # fmt: skip


def _bernoulli(x: Array, *, dtype: DType | int | None, seed: float | None) -> Array:
    return np.asarray(generator(seed).random(x.shape) < widen(x)).astype(_numpy_type(dtype, x))


_register("Bernoulli", _like_infer, _bernoulli, dtype=None)


def _multinomial_infer(n: Inference) -> list[Type]:
    if n.rank(0) != 2:
        raise n.error("the input must have shape [batch, classes]")
    return [TensorType(element_type(n.attr("dtype")), (n.shape(0)[0], n.attr("sample_size")))]


def _multinomial(x: Array, *, dtype: DType | int, sample_size: int, seed: float | None) -> Array:
    """Draws by the largest of log-probability plus Gumbel noise (the input holds log-probabilities)."""
    noise = generator(seed).gumbel(size=(x.shape[0], sample_size, x.shape[1]))
    return np.asarray(np.argmax(widen(x)[:, None, :] + noise, axis=-1), dtype=element_type(dtype).numpy)


_register("Multinomial", _multinomial_infer, _multinomial, dtype=6, sample_size=1)
