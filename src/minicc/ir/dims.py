"""Dimensions: integers, or integer polynomials over the model's symbols.

A `Dim` is an `int` or a `SymbolicDim`, kept in a canonical form so that equal dimensions compare equal: a sum of integer
multiples of products of *atoms*, where an atom is a symbol or a function (floor division, modulo, minimum, maximum,
broadcast) of dimensions. Symbols stand for non-negative sizes. This is not a computer algebra system: what it
cannot decide stays symbolic and is evaluated when a shape is bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from minicc.errors import ShapeError


@dataclass(frozen=True, slots=True)
class Atom:
    """A symbol (`op == "symbol"`, one string argument) or a function of dimensions."""

    op: str
    args: tuple[object, ...]

    def __str__(self) -> str:
        if self.op == "symbol":
            return str(self.args[0])
        if self.op in ("//", "%"):
            a, b = (f"({text})" if " " in (text := str(arg)) and not text.startswith("(") else text for arg in self.args)
            return f"({a} {self.op} {b})"
        return f"{self.op}({', '.join(map(str, self.args))})"


Monomial = tuple[Atom, ...]  # sorted, repeated for powers


def _atom_key(atom: Atom) -> str:
    return str(atom)


@dataclass(frozen=True, slots=True)
class SymbolicDim:
    """A canonical polynomial; build it with `symbol` and arithmetic, never by hand."""

    terms: tuple[tuple[Monomial, int], ...]
    _hash: int = field(default=0, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash(self.terms))

    def __hash__(self) -> int:
        return self._hash

    def __add__(self, other: Dim) -> Dim:
        if not isinstance(other, DIM):
            return NotImplemented
        return _sum(_terms(self) + _terms(other))

    __radd__ = __add__

    def __neg__(self) -> Dim:
        return _sum([(m, -c) for m, c in self.terms])

    def __sub__(self, other: Dim) -> Dim:
        if not isinstance(other, DIM):
            return NotImplemented
        return self + (-other)

    def __rsub__(self, other: Dim) -> Dim:
        if not isinstance(other, DIM):
            return NotImplemented
        return (-self) + other

    def __mul__(self, other: Dim) -> Dim:
        if not isinstance(other, DIM):
            return NotImplemented
        return _sum([(_merge(a, b), c * d) for a, c in _terms(self) for b, d in _terms(other)])

    __rmul__ = __mul__

    def __floordiv__(self, other: Dim) -> Dim:
        if not isinstance(other, DIM):
            return NotImplemented
        return floor_divide(self, other)

    def __rfloordiv__(self, other: Dim) -> Dim:
        if not isinstance(other, DIM):
            return NotImplemented
        return floor_divide(other, self)

    def __mod__(self, other: Dim) -> Dim:
        if not isinstance(other, DIM):
            return NotImplemented
        return modulo(self, other)

    def __rmod__(self, other: Dim) -> Dim:
        if not isinstance(other, DIM):
            return NotImplemented
        return modulo(other, self)

    def __str__(self) -> str:
        parts: list[str] = []
        for monomial, coefficient in self.terms:
            body = "*".join(map(str, monomial))
            text = str(abs(coefficient)) if not monomial else body if abs(coefficient) == 1 else f"{abs(coefficient)}*{body}"
            sign = "-" if coefficient < 0 else "+"
            parts.append(f" {sign} {text}" if parts else (f"-{text}" if coefficient < 0 else text))
        return "".join(parts)

    __repr__ = __str__


Dim = int | SymbolicDim
DIM = (int, SymbolicDim)  # operators leave other operands (expressions) to those


def symbol(name: str) -> SymbolicDim:
    """The dimension called `name`, a non-negative size known at run time."""
    return SymbolicDim((((Atom("symbol", (name,)),), 1),))


def _terms(dim: Dim) -> list[tuple[Monomial, int]]:
    if isinstance(dim, SymbolicDim):
        return list(dim.terms)
    return [((), int(dim))] if dim else []


def _merge(a: Monomial, b: Monomial) -> Monomial:
    return tuple(sorted(a + b, key=_atom_key)) if a and b else a or b


def _sum(terms: Iterable[tuple[Monomial, int]]) -> Dim:
    total: dict[Monomial, int] = {}
    for monomial, coefficient in terms:
        total[monomial] = total.get(monomial, 0) + coefficient
    kept = [(m, c) for m, c in total.items() if c]
    if not kept:
        return 0
    if len(kept) == 1 and not kept[0][0]:
        return kept[0][1]
    # Constant term last, the rest by their text, so that printing is stable.
    if len(kept) > 1:
        kept.sort(key=lambda term: (not term[0], [str(a) for a in term[0]]))
    return SymbolicDim(tuple(kept))


def weighted_sum(parts: Iterable[tuple[Dim, int]]) -> Dim:
    """The sum of the dimensions, each multiplied by its number."""
    return _sum((monomial, weight * own) for dim, weight in parts for monomial, own in _terms(dim))


def _call(op: str, *args: Dim) -> Dim:
    return SymbolicDim((((Atom(op, args),), 1),))


def exact_quotient(a: Dim, b: Dim) -> Dim | None:
    """a / b when every term of `a` is a multiple of the single term `b` (taken as non-zero), else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    if a == 0:
        return 0
    if a == b:
        return 1
    divisor = _terms(b)
    if len(divisor) != 1:
        return _factor_quotient(a, b)
    monomial, coefficient = divisor[0]
    out: list[tuple[Monomial, int]] = []
    for term, value in _terms(a):
        rest = list(term)
        for atom in monomial:
            if atom not in rest:
                return None
            rest.remove(atom)
        if value % coefficient:
            return None
        out.append((tuple(rest), value // coefficient))
    return _sum(out)


def _factor_quotient(a: Dim, b: Dim) -> Dim | None:
    """Polynomial division of `a` by a sum `b`, by its leading term; None when a remainder is left."""
    lead_monomial, lead_coefficient = _terms(b)[0]
    lead = _sum([(lead_monomial, lead_coefficient)])
    rest, quotient = a, 0
    for _ in range(8):
        if rest == 0:
            return quotient
        step = None
        for term in _terms(rest):
            step = exact_quotient(_sum([term]), lead)
            if step is not None:
                break
        if step is None:
            return None
        quotient = quotient + step  # type: ignore[assignment, operator]
        rest = rest - step * b
    return None


def floor_divide(a: Dim, b: Dim) -> Dim:
    """a // b, rounding towards minus infinity; `b` is taken as non-zero when symbolic."""
    if isinstance(a, int) and isinstance(b, int):
        if b == 0:
            raise ShapeError("division of a dimension by zero")
        return a // b
    exact = exact_quotient(a, b)
    if exact is not None:
        return exact
    if isinstance(b, int) and b > 1:
        # (b*q + r) // b = q + r // b for the terms that divide.
        whole = [(m, c // b) for m, c in _terms(a) if c % b == 0]
        rest = [(m, c) for m, c in _terms(a) if c % b]
        if whole and rest:
            return _sum(whole) + floor_divide(_sum(rest), b)
        if len(rest) == 1 and len(rest[0][0]) == 1 and rest[0][1] == 1:
            atom = rest[0][0][0]
            if atom.op == "//" and isinstance(atom.args[1], int):  # (x // c) // b = x // (c*b)
                return floor_divide(atom.args[0], atom.args[1] * b)  # type: ignore[arg-type]
    return _call("//", a, b)


def modulo(a: Dim, b: Dim) -> Dim:
    """a % b with the sign of `b`, as Python."""
    if isinstance(a, int) and isinstance(b, int):
        if b == 0:
            raise ShapeError("modulo of a dimension by zero")
        return a % b
    if exact_quotient(a, b) is not None:
        return 0
    return _call("%", a, b)


def ceil_divide(a: Dim, b: Dim) -> Dim:
    """The smallest integer not below a / b."""
    return -floor_divide(-a, b)


def minimum(a: Dim, b: Dim) -> Dim:
    """The smaller of two dimensions."""
    order = compare(a, b)
    if order is not None:
        return a if order <= 0 else b
    return _call("min", *sorted((a, b), key=str))


def maximum(a: Dim, b: Dim) -> Dim:
    """The larger of two dimensions."""
    order = compare(a, b)
    if order is not None:
        return a if order >= 0 else b
    return _call("max", *sorted((a, b), key=str))


def broadcast(a: Dim, b: Dim) -> Dim:
    """The broadcast of two sizes: equal, or one of them 1. Raises ShapeError when both are known and clash."""
    if a == b or b == 1:
        return a
    if a == 1:
        return b
    if isinstance(a, int) and isinstance(b, int):
        raise ShapeError(f"sizes {a} and {b} cannot be broadcast together")
    if isinstance(a, int):
        return a
    if isinstance(b, int):
        return b
    for one, other in ((a, b), (b, a)):
        if other in _broadcast_operands(one):
            return one
        if _is_capped(one, other):
            return other
    return _call("broadcast", *sorted((a, b), key=str))


def _is_capped(dim: SymbolicDim, size: Dim) -> bool:
    """Whether a dimension is min(size, c) for a constant c above 1: it broadcasts with `size` only where they are equal.

    So a table of 512 positions, sliced to a sequence and added to it. Lowering has `fits` evaluated for the operands.
    """
    operands = _operands(dim, "min")
    return size in operands and any(isinstance(c, int) and c > 1 for c in operands)


def equal(a: Dim, b: Dim) -> Dim:
    """`a`, required to equal `b`: evaluating it raises ShapeError otherwise."""
    return a if a == b else _call("equal", a, b)


def fits(a: Dim, b: Dim) -> Dim:
    """`a`, required to be 1 or to equal `b`, so that it broadcasts to it: evaluating it raises ShapeError otherwise."""
    return a if a in (1, b) else _call("fits", a, b)


def _broadcast_operands(dim: SymbolicDim) -> tuple[object, ...]:
    """What a dimension is a broadcast of, broadcasts within broadcasts opened; () for any other dimension."""
    found: list[object] = []
    stack: list[object] = [dim]
    while stack:
        one = stack.pop()
        operands = _operands(one, "broadcast") if isinstance(one, SymbolicDim) else ()
        found.extend(operands)
        stack.extend(operands)
    return tuple(found)


def compare(a: Dim, b: Dim) -> int | None:
    """-1, 0 or 1 when the order of `a` and `b` is certain for all non-negative symbols, else None.

    -1 may also mean "not above" and 1 "not below": enough for minimum and maximum.
    """
    difference = a - b
    if isinstance(difference, int):
        return (difference > 0) - (difference < 0)
    low = lower_bound(difference)
    if low is not None and low >= 0:
        return 1
    low = lower_bound(-difference)
    if low is not None and low >= 0:
        return -1
    if b in _operands(a, "max") or a in _operands(b, "min"):
        return 1
    if a in _operands(b, "max") or b in _operands(a, "min"):
        return -1
    return None


def _operands(dim: Dim, op: str) -> tuple[object, ...]:
    """What a dimension is the maximum or minimum of; () for any other dimension."""
    if isinstance(dim, int) or len(dim.terms) != 1 or dim.terms[0][1] != 1 or len(dim.terms[0][0]) != 1:
        return ()
    atom = dim.terms[0][0][0]
    return atom.args if atom.op == op else ()


def lower_bound(dim: Dim) -> int | None:
    """A certain lower bound when all symbols are at least 0, or None when there is none."""
    if isinstance(dim, int):
        return dim
    total = 0
    for monomial, coefficient in dim.terms:
        if not monomial:
            total += coefficient
        elif coefficient < 0 or not all(_non_negative(atom) for atom in monomial):
            return None
    return total


def _non_negative(atom: Atom) -> bool:
    if atom.op == "symbol":
        return True
    bounds = [lower_bound(arg) for arg in atom.args]  # type: ignore[arg-type]
    if atom.op in ("//", "%"):
        divisor = bounds[1]
        return bounds[0] is not None and bounds[0] >= 0 and divisor is not None and divisor >= 0
    if atom.op == "max":
        return any(b is not None and b >= 0 for b in bounds)
    return all(b is not None and b >= 0 for b in bounds)


def symbols_of(dim: Dim) -> frozenset[str]:
    """Names of all symbols in a dimension."""
    if isinstance(dim, int):
        return frozenset()
    names: set[str] = set()
    for monomial, _ in dim.terms:
        for atom in monomial:
            if atom.op == "symbol":
                names.add(str(atom.args[0]))
            else:
                for arg in atom.args:
                    names |= symbols_of(arg)  # type: ignore[arg-type]
    return frozenset(names)


def bare_symbol(dim: Dim) -> str | None:
    """The symbol's name when the dimension is nothing but one symbol."""
    if not isinstance(dim, int) and len(dim.terms) == 1:
        monomial, coefficient = dim.terms[0]
        if coefficient == 1 and len(monomial) == 1 and monomial[0].op == "symbol":
            return str(monomial[0].args[0])
    return None


def evaluate(dim: Dim, sizes: Mapping[str, int]) -> int:
    """The dimension's value for given symbol sizes. Raises ShapeError on a clash of broadcast sizes, KeyError on a gap."""
    if isinstance(dim, int):
        return dim
    total = 0
    for monomial, coefficient in dim.terms:
        product = coefficient
        for atom in monomial:
            product *= _evaluate_atom(atom, sizes)
        total += product
    return total


def _evaluate_atom(atom: Atom, sizes: Mapping[str, int]) -> int:
    if atom.op == "symbol":
        return sizes[str(atom.args[0])]
    values = [evaluate(arg, sizes) for arg in atom.args]  # type: ignore[arg-type]
    if atom.op == "//":
        return values[0] // values[1] if values[1] else 0
    if atom.op == "%":
        return values[0] % values[1] if values[1] else 0
    if atom.op == "min":
        return min(values)
    if atom.op == "max":
        return max(values)
    if atom.op == "broadcast":
        first, second = values
        if first != second and 1 not in values:
            raise ShapeError(f"sizes {first} and {second} cannot be broadcast together", why=f"from {atom}")
        return second if first == 1 else first
    if atom.op == "equal":
        if values[0] != values[1]:
            raise ShapeError(f"sizes {values[0]} and {values[1]} must be equal", why=f"from {atom}")
        return values[0]
    if atom.op == "fits":
        if values[0] not in (1, values[1]):
            raise ShapeError(f"sizes {values[0]} and {values[1]} cannot be broadcast together", why=f"from {atom}")
        return values[0]
    raise AssertionError(atom.op)


def substitute(dim: Dim, replacements: Mapping[str, Dim]) -> Dim:
    """The dimension with some symbols replaced by dimensions."""
    if isinstance(dim, int) or not (symbols_of(dim) & replacements.keys()):
        return dim
    total: Dim = 0
    for monomial, coefficient in dim.terms:
        product: Dim = coefficient
        for atom in monomial:
            product = product * _substitute_atom(atom, replacements)
        total = total + product
    return total


def _substitute_atom(atom: Atom, replacements: Mapping[str, Dim]) -> Dim:
    if atom.op == "symbol":
        name = str(atom.args[0])
        return replacements.get(name, symbol(name))
    first, second = (substitute(arg, replacements) for arg in atom.args)  # type: ignore[arg-type]
    return FUNCTIONS[atom.op](first, second)


FUNCTIONS = {
    "//": floor_divide, "%": modulo, "min": minimum, "max": maximum, "broadcast": broadcast, "equal": equal, "fits": fits,
}  # fmt: skip


def product(dims: Iterable[Dim]) -> Dim:
    """The product of dimensions; 1 for none."""
    total: Dim = 1
    for dim in dims:
        total = dim if total == 1 else total * dim
    return total
