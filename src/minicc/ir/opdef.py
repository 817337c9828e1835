"""What is known about one op, and the registry of all ops.

An op is one block in `minicc.ops`: its attributes, `infer` (types out of types in), `propagate` (symbolic contents, for
shape arithmetic), `eval` (numpy, the oracle and the host tier) and `compute` (one output element as an `Expr`) or
`expand` (smaller ops). Ops speak the newest ONNX opset's form; the frontend upgrades older ones. Registration
happens when `minicc.ops` is imported; the registry never changes afterwards.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from minicc.errors import ShapeError, UnsupportedOpError
from minicc.ir.dims import Dim
from minicc.ir.expr import Expr, Index
from minicc.ir.types import DType, TensorType, Type

if TYPE_CHECKING:
    from minicc.ir.graph import Builder, Node, Value


class Kind(Enum):
    """How an op may be computed and fused.

    POINTWISE: `compute(*scalars, **attrs)`, output shape is the broadcast of the inputs.
    INDEX:     `compute(c, index, **attrs)`: one output element from computed input positions (views, gathers, pads).
    REDUCE:    as INDEX, with `c.reduce`, few elements out of many.
    CONTRACT:  as REDUCE; matrix products and convolutions, for which templates exist.
    EXPAND:    `expand(b, node)`: always rewritten into smaller ops before lowering, unless a template takes it whole.
    TEMPLATE:  only a hand-written kernel computes it (sequential work: scans, sorts, recurrences).
    CONTROL:   runs sub-graphs.
    HOST:      numpy at run time.
    """

    POINTWISE = "pointwise"
    INDEX = "index"
    REDUCE = "reduce"
    CONTRACT = "contract"
    EXPAND = "expand"
    TEMPLATE = "template"
    CONTROL = "control"
    HOST = "host"


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Any = _Required()
Content = np.ndarray[Any, np.dtype[np.object_]]  # elements are Dims (or Python floats, bools)


class Indexing(Protocol):
    """What `compute` of INDEX, REDUCE and CONTRACT ops may ask for while it builds one output element."""

    output: int  # which output of the node is computed

    def load(self, operand: int, index: Sequence[Index]) -> Expr:
        """The element of input `operand` at `index` (may compose the producer instead of reading memory)."""

    def has(self, operand: int) -> bool:
        """True when the optional input is present."""

    def type(self, operand: int) -> TensorType:
        """Type of an input."""

    def out_type(self, output: int = 0) -> TensorType:
        """Type of an output."""

    def content(self, operand: int) -> Content:
        """Known symbolic content of a static input."""

    def reduce(self, kind: str, extents: Sequence[Dim], body: Callable[..., Expr]) -> Expr:
        """Reduction of `body(*r)` over fresh loop variables with the given extents."""


@dataclass(frozen=True)
class OpDef:
    """One op; `name` is the ONNX operator's, or our own in domain "minicc".

    attrs: attribute name to default value (`REQUIRED` for none, None for optional).
    infer: `infer(n: Inference) -> sequence of Type`, one per output.
    propagate: `propagate(n: Inference) -> sequence of Content | None`, one per output; None when nothing is known.
    eval: `eval(*arrays, **attrs) -> array or tuple of arrays`; left-out optional inputs are None.
    static_inputs: inputs used only through their content (shapes, axes, pads), never read by a kernel.
    refuse: why this very node has no compiled form (dtype, unknown content), or None.
    deterministic: False for random ops, which are never folded or merged.
    """

    name: str
    kind: Kind
    infer: Callable[[Inference], Sequence[Type]]
    eval: Callable[..., Any] | None = None
    compute: Callable[..., Expr] | None = None
    expand: Callable[[Builder, Node], Sequence[Value]] | None = None
    propagate: Callable[[Inference], Sequence[Content | None]] | None = None
    attrs: Mapping[str, Any] = field(default_factory=dict)
    static_inputs: tuple[int, ...] = ()
    refuse: Callable[[Node], str | None] | None = None
    deterministic: bool = True
    domain: str = ""

    def __str__(self) -> str:
        return f"{self.domain}.{self.name}" if self.domain else self.name

    __repr__ = __str__


@dataclass
class Inference:
    """A node as its `infer` and `propagate` see it.

    `recorded` holds the fresh symbols of an earlier inference of this node, to be used again in the same order.
    """

    op: OpDef
    inputs: tuple[Value | None, ...]
    attrs: Mapping[str, Any]
    n_outputs: int
    new_symbol: Callable[[str], Dim]
    where: str = ""

    def has(self, i: int) -> bool:
        return i < len(self.inputs) and self.inputs[i] is not None

    def value(self, i: int) -> Value:
        value = self.inputs[i] if i < len(self.inputs) else None
        if value is None:
            raise self.error(f"input {i} is missing")
        return value

    def type(self, i: int) -> TensorType:
        """Type of a tensor input. Raises ShapeError for a missing, sequence, optional or map input."""
        found = self.value(i).type
        if not isinstance(found, TensorType):
            raise self.error(f"input {i} must be a tensor, got {found}")
        return found

    def shape(self, i: int) -> tuple[Dim, ...]:
        """Shape of an input of known rank. Raises UnknownRank, which makes all outputs of unknown rank."""
        shape = self.type(i).shape
        if shape is None:
            raise UnknownRank
        return shape

    def dtype(self, i: int) -> DType:
        return self.type(i).dtype

    def rank(self, i: int) -> int:
        return len(self.shape(i))

    def content(self, i: int) -> Content | None:
        """Symbolic content of an input, or None when it is not known at compile time (or the input is missing)."""
        return self.value(i).content if self.has(i) else None

    def integers(self, i: int) -> list[int] | None:
        """The content as plain integers, flattened; None when unknown or symbolic."""
        content = self.content(i)
        if content is None or not all(isinstance(v, int) for v in content.flat):
            return None
        return [int(v) for v in content.flat]

    def attr(self, name: str) -> Any:
        return self.attrs[name]

    def axis(self, axis: int, rank: int) -> int:
        """A possibly negative axis made non-negative. Raises ShapeError when out of range."""
        if not -rank <= axis < rank:
            raise self.error(f"axis {axis} is out of range for rank {rank}")
        return axis + rank if axis < 0 else axis

    def fresh(self, hint: str = "d") -> Dim:
        """A new symbol for a size known only when the node has run."""
        return self.new_symbol(hint)

    def error(self, what: str, hint: str = "") -> ShapeError:
        """A ShapeError naming this node and its input types, to be raised by the caller."""
        types = ", ".join("-" if v is None else str(v.type) for v in self.inputs)
        return ShapeError(f"{self.op.name}: {what}", where=self.where, why=f"inputs ({types})", hint=hint)


class UnknownRank(Exception):
    """Raised by `Inference.shape` when even the rank of an input is unknown."""


_REGISTRY: dict[tuple[str, str], OpDef] = {}


def register(op: OpDef) -> OpDef:
    """Add an op to the registry. Raises ValueError for a duplicate or an incomplete definition."""
    if (op.domain, op.name) in _REGISTRY:
        raise ValueError(f"op {op} is registered twice")
    if op.kind in (Kind.POINTWISE, Kind.INDEX, Kind.REDUCE, Kind.CONTRACT) and op.compute is None:
        raise ValueError(f"op {op} has kind {op.kind.value} but no compute")
    if op.kind is Kind.EXPAND and op.expand is None:
        raise ValueError(f"op {op} has kind expand but no expand")
    if op.kind is not Kind.CONTROL and op.eval is None:
        raise ValueError(f"op {op} has no eval")
    _REGISTRY[op.domain, op.name] = op
    return op


def find_op(name: str, domain: str = "") -> OpDef | None:
    """The op of that name, or None."""
    return _REGISTRY.get((domain, name))


def get_op(name: str, domain: str = "") -> OpDef:
    """The op of that name. Raises UnsupportedOpError with suggestions."""
    op = find_op(name, domain)
    if op is None:
        close = difflib.get_close_matches(name, [n for _, n in _REGISTRY], n=3)
        raise UnsupportedOpError(f"unknown op {name!r}", hint=f"did you mean {', '.join(close)}?" if close else "")
    return op


def all_ops() -> list[OpDef]:
    """Every registered op, sorted by domain and name."""
    return [_REGISTRY[key] for key in sorted(_REGISTRY)]
