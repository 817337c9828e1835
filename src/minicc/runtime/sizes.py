"""Sizes from shapes, and dimensions from sizes: what a call with new sizes evaluates, prepared so that it is quick.

`ShapePattern` reads the sizes that given shapes show. `DimTable` evaluates the distinct dimensions of a segment at once: a
dimension is a polynomial over atoms, which are symbols or functions of other dimensions; atoms are evaluated one by one, the
polynomials of all dimensions are then summed by a few array operations. Nothing here knows what the dimensions are used for,
and what does not fit is only told from what does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, chain
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from minicc.errors import ResourceLimitError, ShapeError
from minicc.ir.dims import Atom, Dim, SymbolicDim, bare_symbol, evaluate, symbols_of

Values = NDArray[np.int64]
Sizes = Mapping[str, int]

# Sums whose parts stay below this are right in 64 bits, whatever the rounding of the float64 they are compared in.
SAFE = float(1 << 61)


class ShapePattern:
    """Declared shapes of several arrays in order, prepared for reading sizes from the shapes of arrays that are given.

    declared: a shape for each array, None for one of any shape.
    """

    def __init__(self, declared: Sequence[Sequence[Dim] | None]) -> None:
        dims = [dim for shape in declared for dim in shape or ()]
        self._ranks = [None if shape is None else len(shape) for shape in declared]
        first: dict[str, int] = {}
        again: list[tuple[int, int]] = []  # places that hold the size at an earlier place
        fixed: list[tuple[int, int]] = []
        self._expressions: list[tuple[int, Dim]] = []
        for place, dim in enumerate(dims):
            name = None if isinstance(dim, int) else bare_symbol(dim)
            if isinstance(dim, int):
                fixed.append((place, dim))
            elif name is None:
                self._expressions.append((place, dim))
            elif first.setdefault(name, place) != place:
                again.append((place, first[name]))
        self._names, self._sizes = tuple(first), _places(first.values())
        self._fixed, self._fixed_values = _places(p for p, _ in fixed), tuple(value for _, value in fixed)
        self._again, self._earlier = _places(p for p, _ in again), _places(p for _, p in again)

    def sizes(self, shapes: Sequence[tuple[int, ...]]) -> dict[str, int] | None:
        """The value of every bare symbol; None where some shape does not fit or a size cannot be told."""
        known = [shape for shape, rank in zip(shapes, self._ranks) if rank is not None]
        if [len(shape) for shape in known] != [rank for rank in self._ranks if rank is not None]:
            return None
        flat = tuple(chain.from_iterable(known))
        if self._fixed(flat) != self._fixed_values or self._again(flat) != self._earlier(flat):
            return None
        sizes = dict(zip(self._names, self._sizes(flat)))
        try:
            fits = all(evaluate(dim, sizes) == flat[place] for place, dim in self._expressions)
        except (KeyError, ShapeError):
            return None
        return sizes if fits else None


def _places(numbers: Iterable[int]) -> Callable[[Sequence[int]], tuple[int, ...]]:
    """What takes the numbers at these places out of a sequence."""
    places = tuple(numbers)
    if len(places) < 2:  # an itemgetter of one gives no tuple
        return lambda flat: tuple([flat[place] for place in places])
    return itemgetter(*places)


class Polynomials(NamedTuple):
    """The symbolic dimensions as arrays.

    atoms:      distinct atoms, each as a dimension; the number behind the last one is that of the constant 1.
    factors:    atom numbers of the products, one product after the other; product_starts: where each begins.
    coefficients: of the products; dim_starts: the first product of each dimension.
    is_exact:   whether float64 holds the coefficients.
    """

    atoms: tuple[SymbolicDim, ...]
    factors: NDArray[np.intp]
    product_starts: NDArray[np.intp]
    coefficients: NDArray[np.float64]
    dim_starts: NDArray[np.intp]
    is_exact: bool

    def evaluate(self, sizes: Sizes) -> Values | None:
        """The value of every dimension; None where 64 bits may not hold them or what they are computed from."""
        numbers = [*(evaluate(atom, sizes) for atom in self.atoms), 1]
        values = np.array(numbers, np.float64)
        products = np.multiply.reduceat(np.abs(values)[self.factors], self.product_starts) * np.abs(self.coefficients)
        if not self.is_exact or np.add.reduceat(products, self.dim_starts).max() >= SAFE:
            return None
        whole = np.multiply.reduceat(np.array(numbers, np.int64)[self.factors], self.product_starts)
        return np.add.reduceat(whole * self.coefficients.astype(np.int64), self.dim_starts)


def polynomials(dims: Iterable[SymbolicDim]) -> Polynomials:
    """The arrays of some dimensions, at least one."""
    atoms: dict[Atom, int] = {}
    products: list[tuple[Atom, ...]] = []
    coefficients: list[int] = []
    terms: list[int] = []
    for dim in dims:
        for monomial, coefficient in dim.terms:
            products.append(monomial)
            coefficients.append(coefficient)
            for atom in monomial:
                atoms.setdefault(atom, len(atoms))
        terms.append(len(dim.terms))
    one = len(atoms)
    lengths = [max(1, len(monomial)) for monomial in products]
    return Polynomials(
        tuple(SymbolicDim((((atom,), 1),)) for atom in atoms),
        np.array([n for monomial in products for n in ([atoms[a] for a in monomial] or [one])], np.intp),
        np.array([0, *accumulate(lengths)][:-1], np.intp),
        np.array(coefficients, np.float64),
        np.array([0, *accumulate(terms)][:-1], np.intp),
        all(abs(coefficient) < 1 << 53 for coefficient in coefficients),
    )


class DimTable:
    """Distinct dimensions, numbered; integers are known beforehand, the rest is evaluated at each bind."""

    def __init__(self) -> None:
        self._numbers: dict[Dim, int] = {}
        self._known: list[int] = []
        self._symbolic: list[tuple[int, SymbolicDim]] = []
        self._prepared: tuple[Polynomials, Values, NDArray[np.intp]] | None = None

    def number(self, dim: Dim) -> int:
        """The number of a dimension, new or known."""
        found = self._numbers.get(dim)
        if found is None:
            found = self._numbers[dim] = len(self._known)
            self._known.append(dim if isinstance(dim, int) else 0)
            if isinstance(dim, SymbolicDim):
                self._symbolic.append((found, dim))
            self._prepared = None
        return found

    def symbols(self, more: Iterable[object]) -> tuple[str, ...]:
        """Names of all symbols in the table and in `more` dimensions."""
        dims = [d for _, d in self._symbolic] + [d for d in more if isinstance(d, SymbolicDim)]
        return tuple(sorted(set().union(*map(symbols_of, dims))))

    def evaluate(self, sizes: Sizes) -> Values:
        """The value of every dimension, by number. Raises ResourceLimitError for one beyond 64 bits."""
        try:
            if not self._symbolic:
                return np.array(self._known, np.int64)
            if self._prepared is None:
                places = np.array([at for at, _ in self._symbolic], np.intp)
                self._prepared = polynomials(d for _, d in self._symbolic), np.array(self._known, np.int64), places
            prepared, known, places = self._prepared
            found = prepared.evaluate(sizes)
            values = known.copy()
            values[places] = [evaluate(d, sizes) for _, d in self._symbolic] if found is None else found
        except OverflowError:
            raise ResourceLimitError(
                "a size of the program does not fit 64 bits", why=f"sizes {dict(sizes)}"
            ) from None
        return values
