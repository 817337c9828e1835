"""Winograd's form of a tile of outputs: its points, how large it is, and the sums that lead into it and out of it.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016), with other interpolation points. A transform along one
axis is a function from a list of values to a list of values, and is applied to the columns of a tile and then to its rows. What a
value is, and how it is added, is up to the `Arithmetic`: vectors on a CPU, numbers of a thread on a GPU. Machine code depends on
what is here (see `codegen.build.toolchain`), which needs no Numba.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

# Interpolation points of 4 and 6 positions along an axis, besides infinity. With 5/8 and 3/2 in
# the place of the usual 1 and 2 the errors of float32 sums are a third; their powers are exact. Barabasz et al., "Error
# Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural Networks" (2020), show how much it matters.
POINTS: dict[int, tuple[float, ...]] = {4: (0.0, 1.0, -1.0), 6: (0.0, 5 / 8, -5 / 8, 3 / 2, -3 / 2)}

Values = list[Any]
Transform = Callable[[Any, Values], Values]
Shape = Sequence[int]  # outputs of a tile down and across, stride, taps


class Arithmetic(Protocol):
    """Sums and multiples of values."""

    def add(self, x: Any, y: Any) -> Any: ...

    def sub(self, x: Any, y: Any) -> Any: ...

    def scale(self, factor: float, x: Any) -> Any: ...

    def scale_add(self, factor: float, x: Any, y: Any) -> Any:
        """factor * x + y"""
        ...


def side(out: int, stride: int = 1, taps: int = 3) -> int:
    """Inputs, and positions in Winograd's form, of `out` outputs along an axis; of 1 output without taps, 1."""
    return (out - 1) * stride + taps if out > 1 else 1


def positions(shape: Shape) -> int:
    """Positions of a tile in Winograd's form."""
    down, across, stride, taps = shape
    return side(down, stride, taps) * side(across, stride, taps)


def into_form(on: Arithmetic, shape: Shape, values: Values) -> Values:
    """The positions of a tile from its inputs, both row after row."""
    return _along_both(_INPUT, on, shape, values)


def out_of_form(on: Arithmetic, shape: Shape, values: Values) -> Values:
    """The outputs of a tile from its positions, both row after row."""
    return _along_both(_OUTPUT, on, shape, values)


def _along_both(
    transforms: Mapping[tuple[int, int, int], Transform], on: Arithmetic, shape: Shape, values: Sequence[Any]
) -> Values:
    """The transforms of the columns of a tile, given row after row, and then of its rows; row after row."""
    down, across, stride, taps = shape
    height, width = side(down, stride, taps), side(across, stride, taps)
    columns = [transforms[down, stride, height](on, list(values[at::width])) for at in range(width)]
    return [value for row in zip(*columns) for value in transforms[across, stride, width](on, list(row))]


def _input_4(on: Arithmetic, d: Values) -> Values:
    """Of 4 inputs, as F(2,3) with the points 0, 1, -1 and infinity: row p is the product of (x - q) over the others q."""
    return [on.sub(d[2], d[0]), on.add(d[2], d[1]), on.sub(d[2], d[1]), on.sub(d[3], d[1])]


def _output_2_of_4(on: Arithmetic, m: Values) -> Values:
    """To 2 outputs: row k is the power k of the points; infinity counts for the last."""
    return [on.add(m[0], on.add(m[1], m[2])), on.add(m[3], on.sub(m[1], m[2]))]


def _input_6(on: Arithmetic, d: Values) -> Values:
    """Of 6 inputs, as F(4,3) and F(2,5) with the points 0, a, -a, b, -b and infinity."""
    _, a, _, b, _ = POINTS[6]
    even_a, odd_a = on.scale_add(-b * b, d[2], d[4]), on.scale_add(-b * b, d[1], d[3])
    even_b, odd_b = on.scale_add(-a * a, d[2], d[4]), on.scale_add(-a * a, d[1], d[3])
    return [
        on.scale_add(a * a * b * b, d[0], on.scale_add(-a * a - b * b, d[2], d[4])),
        on.scale_add(a, odd_a, even_a),
        on.scale_add(-a, odd_a, even_a),
        on.scale_add(b, odd_b, even_b),
        on.scale_add(-b, odd_b, even_b),
        on.scale_add(a * a * b * b, d[1], on.scale_add(-a * a - b * b, d[3], d[5])),
    ]


def _output_2_of_6(on: Arithmetic, m: Values) -> Values:
    """To 2 outputs."""
    _, a, _, b, _ = POINTS[6]
    even_a, odd_a = on.add(m[1], m[2]), on.sub(m[1], m[2])
    even_b, odd_b = on.add(m[3], m[4]), on.sub(m[3], m[4])
    return [on.add(m[0], on.add(even_a, even_b)), on.scale_add(a, odd_a, on.scale_add(b, odd_b, m[5]))]


def _output_4_of_6(on: Arithmetic, m: Values) -> Values:
    """To 4 outputs."""
    _, a, _, b, _ = POINTS[6]
    even_a, odd_a = on.add(m[1], m[2]), on.sub(m[1], m[2])
    even_b, odd_b = on.add(m[3], m[4]), on.sub(m[3], m[4])
    return [
        on.add(m[0], on.add(even_a, even_b)),
        on.scale_add(a, odd_a, on.scale(b, odd_b)),
        on.scale_add(a * a, even_a, on.scale(b * b, even_b)),
        on.scale_add(a**3, odd_a, on.scale_add(b**3, odd_b, m[5])),
    ]


def _input_2_apart(on: Arithmetic, d: Values) -> Values:
    """Of 5 inputs, for outputs two inputs apart: F(2,2) with 0, 1 and infinity of every other one, and the rest."""
    return [on.sub(d[0], d[2]), d[2], on.sub(d[4], d[2]), d[1], d[3]]


def _output_2_apart(on: Arithmetic, m: Values) -> Values:
    """To 2 outputs that are two inputs apart."""
    return [on.add(on.add(m[0], m[1]), m[3]), on.add(on.add(m[1], m[2]), m[4])]


def _same(on: Arithmetic, values: Values) -> Values:  # noqa: ARG001  (as all transforms)
    """Along an axis without taps."""
    return values


# By outputs, stride and positions.
_INPUT = {(1, 1, 1): _same, (2, 1, 4): _input_4, (4, 1, 6): _input_6, (2, 1, 6): _input_6, (2, 2, 5): _input_2_apart}
_OUTPUT = {(1, 1, 1): _same, (2, 1, 4): _output_2_of_4, (4, 1, 6): _output_4_of_6, (2, 1, 6): _output_2_of_6,
           (2, 2, 5): _output_2_apart}  # fmt: skip
