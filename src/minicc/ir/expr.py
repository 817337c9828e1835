"""Scalar expressions: one element of an op's output as a frozen tree.

`compute` functions of ops build these; lowering composes them (that is fusion) and codegen prints them. The same
expressions serve generated loops and the epilogues of templates, on every target. Leaves are constants, loop
variables (`iter`), sizes known at run time (`dim`), elements of operands (`load`), and a template's accumulator
(`acc`). Index arithmetic is ordinary i64 arithmetic. There are no statements and no side effects here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from minicc.ir.dims import Dim, SymbolicDim
from minicc.ir.types import DType, boolean, f32, i64

Number = int | float | bool

# Scalar functions of one argument whose result has the argument's type.
UNARY = frozenset(
    (
        "neg", "abs", "floor", "ceil", "round", "trunc", "sqrt", "exp", "log", "sin", "cos", "tan", "asin", "acos",
        "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "sigmoid", "sign", "not", "bitnot",
    )
)
# Scalar functions of two arguments of one type; `div` of integers truncates towards zero, `floordiv` and `mod` follow
# the sign of the divisor, `fmod` that of the dividend.
BINARY = frozenset([
    "add", "sub", "mul", "div", "floordiv", "mod", "fmod", "pow", "min", "max", "and", "or", "xor", "bitand",
    "bitor", "bitxor", "shl", "shr", "atan2",
])  # fmt: skip
COMPARE = frozenset([
    "lt", "le", "gt", "ge", "eq", "ne",
])  # fmt: skip
# Functions worth computing once rather than twice.
EXPENSIVE = frozenset(
    (
        "exp", "log", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh",
        "erf", "sigmoid", "pow", "div", "sqrt", "fmod", "mod", "floordiv",
    )
)
REDUCTIONS = frozenset([
    "sum", "prod", "max", "min", "argmax", "argmin", "argmax_last", "argmin_last",
])  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Expr:
    """One scalar: an operation, its result type, its arguments, and an operation-specific constant.

    arg: const: the value; iter: the axis number; dim: the Dim; load: the operand's key (any hashable);
    reduce: (kind, axes, extents) where `axes` are iter numbers bound inside `args[0]`.
    """

    op: str
    dtype: DType
    args: tuple[Expr, ...] = ()
    arg: object = None
    key: int = field(default=0)

    def __post_init__(self) -> None:
        literal = (type(self.arg).__name__, repr(self.arg)) if self.op == "const" else self.arg
        object.__setattr__(self, "key", hash((self.op, self.dtype, tuple(a.key for a in self.args), literal)))

    def __hash__(self) -> int:
        return self.key

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Expr) or self.key != other.key or self.op != other.op or self.dtype != other.dtype:
            return False
        if self.op == "const":  # NaN equals NaN, and 0.0 differs from -0.0
            return repr(self.arg) == repr(other.arg)
        return self.arg == other.arg and self.args == other.args

    def __add__(self, other: Expr | Number | SymbolicDim) -> Expr:
        return binary("add", self, other)

    def __radd__(self, other: Expr | Number | SymbolicDim) -> Expr:
        return binary("add", other, self)

    def __sub__(self, other: Expr | Number | SymbolicDim) -> Expr:
        return binary("sub", self, other)

    def __rsub__(self, other: Expr | Number | SymbolicDim) -> Expr:
        return binary("sub", other, self)

    def __mul__(self, other: Expr | Number | SymbolicDim) -> Expr:
        return binary("mul", self, other)

    def __rmul__(self, other: Expr | Number | SymbolicDim) -> Expr:
        return binary("mul", other, self)

    def __truediv__(self, other: Expr | Number | SymbolicDim) -> Expr:
        return binary("div", self, other)

    def __rtruediv__(self, other: Expr | Number | SymbolicDim) -> Expr:
        return binary("div", other, self)

    def __floordiv__(self, other: Expr | Number | SymbolicDim) -> Expr:
        return binary("floordiv", self, other)

    def __mod__(self, other: Expr | Number | SymbolicDim) -> Expr:
        return binary("mod", self, other)

    def __neg__(self) -> Expr:
        return unary("neg", self)

    def __lt__(self, other: Expr | Number | SymbolicDim) -> Expr:
        return compare("lt", self, other)

    def __le__(self, other: Expr | Number | SymbolicDim) -> Expr:
        return compare("le", self, other)

    def __gt__(self, other: Expr | Number | SymbolicDim) -> Expr:
        return compare("gt", self, other)

    def __ge__(self, other: Expr | Number | SymbolicDim) -> Expr:
        return compare("ge", self, other)

    def __and__(self, other: Expr) -> Expr:
        return binary("and" if self.dtype == boolean else "bitand", self, other)

    def __or__(self, other: Expr) -> Expr:
        return binary("or" if self.dtype == boolean else "bitor", self, other)

    def __invert__(self) -> Expr:
        return unary("not" if self.dtype == boolean else "bitnot", self)


Index = Expr | int | SymbolicDim  # what an index may be written as


def const(value: Number, dtype: DType) -> Expr:
    """A literal of a given type."""
    typed: Number = bool(value) if dtype == boolean else float(value) if dtype.is_float else int(value)
    return Expr("const", dtype, arg=typed)


def iteration(axis: int) -> Expr:
    """The loop variable of an axis (i64)."""
    return Expr("iter", i64, arg=axis)


def dim(size: Dim) -> Expr:
    """A size known at run time (i64); an integer becomes a literal."""
    return const(size, i64) if isinstance(size, int) else Expr("dim", i64, arg=size)


def load(key: object, dtype: DType, index: Sequence[Index]) -> Expr:
    """The element of operand `key` at `index`, one i64 expression per axis."""
    return Expr("load", dtype, tuple(as_index(i) for i in index), key)


def reduce(kind: str, axes: Sequence[int], extents: Sequence[Dim], body: Expr) -> Expr:
    """Reduction of `body` over the loop variables `axes`; arg reductions give the i64 position on their single axis."""
    assert kind in REDUCTIONS, kind
    return Expr("reduce", i64 if kind.startswith("arg") else body.dtype, (body,), (kind, tuple(axes), tuple(extents)))


def reduction(expr: Expr) -> tuple[str, tuple[int, ...], tuple[Any, ...]]:
    """(kind, axes, extents) of a reduction; extents are Dims, or what lowering puts in their place."""
    assert expr.op == "reduce"
    found: tuple[str, tuple[int, ...], tuple[Any, ...]] = expr.arg  # type: ignore[assignment]
    return found


def as_index(value: Index) -> Expr:
    """An index as an i64 expression."""
    if isinstance(value, Expr):
        return value if value.dtype == i64 else cast(value, i64)
    return dim(value)


def _operand(value: Expr | Number | SymbolicDim, dtype: DType) -> Expr:
    if isinstance(value, Expr):
        return value
    if isinstance(value, SymbolicDim):
        return cast(dim(value), dtype)
    return const(value, dtype)


def unary(op: str, x: Expr) -> Expr:
    """A function of one scalar."""
    assert op in UNARY, op
    return Expr(op, x.dtype, (x,))


def _pair(a: Expr | Number | SymbolicDim, b: Expr | Number | SymbolicDim) -> tuple[Expr, Expr]:
    dtype = a.dtype if isinstance(a, Expr) else b.dtype if isinstance(b, Expr) else f32
    x, y = _operand(a, dtype), _operand(b, dtype)
    assert x.dtype == y.dtype, f"operand types differ: {x.dtype} and {y.dtype}"
    return x, y


def binary(op: str, a: Expr | Number | SymbolicDim, b: Expr | Number | SymbolicDim) -> Expr:
    """A function of two scalars of one type; integer additions and multiplications by constants are simplified."""
    assert op in BINARY, op
    x, y = _pair(a, b)
    if x.dtype.is_integer:
        simplified = _simplify_integer(op, x, y)
        if simplified is not None:
            return simplified
    return Expr(op, x.dtype, (x, y))


def _simplify_integer(op: str, x: Expr, y: Expr) -> Expr | None:
    """Identities of index arithmetic, and folding of literals."""
    if x.op == "const" and y.op == "const" and x.dtype == i64:
        a, b = int(x.arg), int(y.arg)  # type: ignore[call-overload]
        if op == "add":
            return const(a + b, i64)
        if op == "sub":
            return const(a - b, i64)
        if op == "mul":
            return const(a * b, i64)
        if op in ("floordiv", "mod") and b:
            return const(a // b if op == "floordiv" else a % b, i64)
    x_value, y_value = (e.arg if e.op == "const" else None for e in (x, y))
    if op == "add" and x_value == 0:
        return y
    if op in ("add", "sub") and y_value == 0:
        return x
    if op == "mul" and x_value == 1:
        return y
    if op in ("mul", "floordiv", "div") and y_value == 1:
        return x
    if op == "mul" and 0 in (x_value, y_value):
        return const(0, x.dtype)
    if op == "mod" and y_value == 1:
        return const(0, x.dtype)
    return None


def compare(op: str, a: Expr | Number | SymbolicDim, b: Expr | Number | SymbolicDim) -> Expr:
    """A comparison of two scalars of one type, giving bool."""
    assert op in COMPARE, op
    return Expr(op, boolean, _pair(a, b))


def equal(a: Expr | Number, b: Expr | Number) -> Expr:
    """a == b (the operator itself compares trees)."""
    return compare("eq", a, b)


def select(condition: Expr, a: Expr | Number, b: Expr | Number) -> Expr:
    """`a` where `condition`, else `b`; both sides may be evaluated, so loads must be in bounds on both."""
    x, y = _pair(a, b)
    return x if x == y else Expr("select", x.dtype, (condition, x, y))


def minimum(a: Expr | Number | SymbolicDim, b: Expr | Number | SymbolicDim) -> Expr:
    return binary("min", a, b)


def maximum(a: Expr | Number | SymbolicDim, b: Expr | Number | SymbolicDim) -> Expr:
    return binary("max", a, b)


def cast(x: Expr, dtype: DType) -> Expr:
    """Conversion with C semantics: float to integer truncates, anything to bool tests for non-zero."""
    if x.dtype == dtype:
        return x
    if x.op == "const" and dtype != boolean and not (dtype.is_integer and x.dtype.is_float):
        return const(x.arg, dtype)  # type: ignore[arg-type]
    return Expr("cast", dtype, (x,))


def isnan(x: Expr) -> Expr:
    return Expr("ne", boolean, (x, x))


def accumulator(dtype: DType) -> Expr:
    """The value a template hands to its epilogue."""
    return Expr("acc", dtype)


def walk(root: Expr) -> list[Expr]:
    """Every distinct sub-expression, arguments first; iterative, so depth is not limited."""
    done: dict[Expr, None] = {}
    stack: list[tuple[Expr, bool]] = [(root, False)]
    while stack:
        expr, ready = stack.pop()
        if ready:
            done.setdefault(expr)
        elif expr not in done:
            stack.append((expr, True))
            stack.extend((a, False) for a in reversed(expr.args) if a not in done)
    return list(done)


def rewrite(root: Expr, change: Callable[[Expr], Expr | None]) -> Expr:
    """Rebuild bottom-up; `change` gets each rebuilt node and may return another in its place."""
    new: dict[Expr, Expr] = {}
    for expr in walk(root):
        args = tuple(new[a] for a in expr.args)
        same = all(x is y for x, y in zip(args, expr.args))
        rebuilt = expr if same else Expr(expr.op, expr.dtype, args, expr.arg)
        new[expr] = change(rebuilt) or rebuilt
    return new[root]
