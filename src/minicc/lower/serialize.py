"""Programs as plain JSON data, and back.

`to_data` writes what `from_data` reads. Constant arrays are left out: they are numbered, and the caller
keeps them. Data may come from anywhere, so reading checks every type, range and reference, and whatever is
wrong is an ArtifactError; names and literals that end up in generated text are limited to harmless
characters. Nothing here touches files.

Dimensions: an integer is itself; anything else is `[number]`, an entry of the table "dims". Expressions of
a body are a table whose entries refer to earlier ones.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from minicc.errors import ArtifactError, MiniccError
from minicc.ir.dims import FUNCTIONS, Dim, SymbolicDim, product, symbol, weighted_sum
from minicc.ir.expr import BINARY, COMPARE, REDUCTIONS, UNARY, Expr, walk
from minicc.ir.types import BY_NAME, DType, OpaqueType, TensorType, Type
from minicc.lower.kernel import MOST_KNOWN, Body, Kernel, LoopKernel, Operand, Store, TemplateKernel
from minicc.lower.program import Buffer, ControlStep, HostStep, KernelStep, Program, Step, Update, Word

FORMAT = 2
KINDS = ("input", "output", "constant", "content", "temporary", "host")
MAX_DEPTH = 32
MAX_ITEMS = 1 << 24
_NAME = re.compile(r"[A-Za-z0-9_.+-]{1,128}")
_MEMORY_OPS = ("load", "keep", "kept")
_SYMBOL_OPS = {**dict.fromkeys(UNARY, 1), **dict.fromkeys(BINARY | COMPARE, 2), "cast": 1, "select": 3}
Array = np.ndarray[Any, Any]


def to_data(program: Program) -> tuple[dict[str, Any], list[Array]]:
    """(JSON data, constant arrays by their number in it). Raises ArtifactError for what cannot be written."""
    writer = _Writer()
    kernels = [writer.kernel(k) for k in program.kernels]
    data = writer.program(program)
    return {"format": FORMAT, "dims": writer.dims, "kernels": kernels, "program": data}, writer.arrays


class _Writer:
    def __init__(self) -> None:
        self.dims: list[Any] = []
        self.arrays: list[Array] = []
        self._dim_numbers: dict[SymbolicDim, int] = {}
        self._array_numbers: dict[int, int] = {}

    def program(self, p: Program) -> dict[str, Any]:
        return {
            "name": p.name,
            "buffers": [self.buffer(b) for b in p.buffers],
            "steps": [self.step(s) for s in p.steps],
            "inputs": list(p.inputs),
            "outputs": list(p.outputs),
            "input_types": [self.type(t) for t in p.input_types],
            "output_types": [self.type(t) for t in p.output_types],
            "input_names": list(p.input_names),
            "output_names": list(p.output_names),
            "sliced": p.sliced,
            "updates": [list(update) for update in p.updates],
        }

    def buffer(self, b: Buffer) -> dict[str, Any]:
        out: dict[str, Any] = {"name": b.name, "kind": b.kind, "dtype": b.dtype.name if b.dtype else None}
        out["shape"] = None if b.shape is None else [self.dim(d) for d in b.shape]
        if b.kind == "content":
            out["content"] = [v if isinstance(v, (bool, float)) else self.dim(v) for v in b.content]
        elif b.data is not None and b.data.dtype == object:
            out["strings"] = [_text(s) for s in b.data.reshape(-1)]
        elif b.data is not None:
            number = self._array_numbers.setdefault(id(b.data), len(self.arrays))
            if number == len(self.arrays):
                self.arrays.append(b.data)
            out["data"] = number
        return out

    def step(self, s: Step) -> dict[str, Any]:
        if isinstance(s, KernelStep):
            return {
                "kernel": s.kernel,
                "values": [self.dim(w.value) for w in s.words],
                "buffers": [-1 if w.buffer is None else w.buffer for w in s.words],
                "units": self.dim(s.units),
                "reads": list(s.reads),
                "writes": list(s.writes),
                "origin": list(s.origin),
                "note": s.note,
                "cost": self.dim(s.cost),
                "flops": self.dim(s.flops),
                "bytes": self.dim(s.bytes),
                "requires": [self.dim(d) for d in s.requires],
                "guards": [list(guard) for guard in s.guards],
            }
        out = {
            "op": s.op,
            "attrs": self.value(dict(s.attrs), s.op),
            "inputs": list(s.inputs),
            "outputs": list(s.outputs),
            "types": [self.type(t) for t in s.types],
            "origin": list(s.origin),
        }
        if isinstance(s, HostStep):
            return {**out, "domain": s.domain, "reason": s.reason}
        return {**out, "bodies": [self.program(b) for b in s.bodies]}

    def dim(self, d: Dim) -> Any:
        if not isinstance(d, SymbolicDim):
            return int(d)
        if d not in self._dim_numbers:
            terms = [[c, [self._atom(a) for a in monomial]] for monomial, c in d.terms]
            self._dim_numbers[d] = len(self.dims)
            self.dims.append(terms)
        return [self._dim_numbers[d]]

    def _atom(self, atom: Any) -> Any:
        return atom.args[0] if atom.op == "symbol" else [atom.op, *(self.dim(a) for a in atom.args)]

    def type(self, t: Type) -> Any:
        if isinstance(t, OpaqueType):
            return t.text
        return [t.dtype.name, None if t.shape is None else [self.dim(d) for d in t.shape]]

    def kernel(self, k: Kernel) -> dict[str, Any]:
        if isinstance(k, LoopKernel):
            return {"rank": k.rank, "body": self.body(k.body), "name": k.name, "short": k.short}
        epilogue = None if k.epilogue is None else self.body(k.epilogue)
        return {
            "template": k.template,
            "constants": [list(c) for c in k.constants],
            "epilogue": epilogue,
            "name": k.name,
        }

    def body(self, b: Body) -> dict[str, Any]:
        numbers: dict[Expr, int] = {}
        table: list[Any] = []
        for store in b.stores:
            for e in walk(store.value):
                if e not in numbers:
                    numbers[e] = len(table)
                    table.append([e.op, e.dtype.name, [numbers[a] for a in e.args], _listed(e.arg)])
        return {
            "operands": [[o.dtype.name, list(o.strides), o.output, o.shared] for o in b.operands],
            "stores": [[s.operand, numbers[s.value]] for s in b.stores],
            "sizes": b.sizes,
            "exprs": table,
        }

    def value(self, v: Any, where: str) -> Any:
        """An attribute value; what JSON lacks becomes an object with one key."""
        if v is None or isinstance(v, (bool, str)):
            return v
        if isinstance(v, (int, np.integer)):
            return int(v)
        if isinstance(v, (float, np.floating)):
            return float(v)
        if isinstance(v, (tuple, list)):
            return {"tuple" if isinstance(v, tuple) else "list": [self.value(x, where) for x in v]}
        if isinstance(v, Mapping) and all(isinstance(k, str) for k in v):
            return {"dict": {k: self.value(x, where) for k, x in v.items()}}
        if isinstance(v, bytes):
            return {"bytes": base64.b64encode(v).decode()}
        if isinstance(v, SymbolicDim):
            return {"dim": self.dim(v)}
        if isinstance(v, DType):
            return {"dtype": v.name}
        if isinstance(v, (TensorType, OpaqueType)):
            return {"type": self.type(v)}
        if isinstance(v, np.ndarray) and v.dtype == object:
            return {"strings": [list(v.shape), [_text(s) for s in v.reshape(-1)]]}
        if isinstance(v, np.ndarray) and v.dtype.kind in "biufc":
            return {
                "array": [
                    v.dtype.str,
                    list(v.shape),
                    base64.b64encode(np.ascontiguousarray(v).tobytes()).decode(),
                ]
            }
        raise ArtifactError(
            "a host node has an attribute that cannot be saved", where=where, why=type(v).__name__
        )


def _listed(arg: Any) -> Any:
    return [_listed(a) for a in arg] if isinstance(arg, tuple) else arg


def _text(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    return str(value)


def from_data(data: Any, array: Callable[[int, DType, tuple[int, ...]], Array]) -> Program:
    """The program in JSON data; `array(number, dtype, shape)` gives constants. Raises ArtifactError."""
    try:
        reader = _Reader(_object(data), array)
        return reader.root()
    except MiniccError as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError("the program is not valid", why=str(error)) from error
    except (
        KeyError,
        IndexError,
        TypeError,
        ValueError,
        OverflowError,
        AttributeError,
        RecursionError,
    ) as error:
        raise ArtifactError("the program is not valid", why=f"{type(error).__name__}: {error}") from error


class _Reader:
    def __init__(
        self, data: Mapping[str, Any], array: Callable[[int, DType, tuple[int, ...]], Array]
    ) -> None:
        _need(data.get("format") == FORMAT, f"program format {data.get('format')!r} is not {FORMAT}")
        self.data, self.array = data, array
        self.dims: list[Dim] = []
        for terms in _list(data["dims"]):
            self.dims.append(self._terms(terms))
        self.kernels = tuple(self.kernel(k) for k in _list(data["kernels"]))

    def root(self) -> Program:
        return self.program(self.data["program"], self.kernels, 0)

    def program(self, data: Any, kernels: tuple[Kernel, ...], depth: int) -> Program:
        _need(depth < MAX_DEPTH, "control flow is nested too deeply")
        p = _object(data)
        buffers = tuple(self.buffer(b) for b in _list(p["buffers"]))
        count = len(buffers)
        steps = tuple(self.step(s, count, depth) for s in _list(p["steps"]))
        return Program(
            _string(p["name"]),
            buffers,
            steps,
            _indices(p["inputs"], count),
            _indices(p["outputs"], count),
            tuple(self.type(t) for t in _list(p["input_types"])),
            tuple(self.type(t) for t in _list(p["output_types"])),
            kernels,
            _strings(p["input_names"]),
            _strings(p["output_names"]),
            _string(p.get("sliced", "")),
            tuple(self.update(update) for update in _list(p.get("updates", []))),
        )

    def update(self, data: Any) -> Update:
        fields = _list(data)
        _need(len(fields) == 4, "an update has four fields")
        source, target, copy, reason = fields
        _need(all(type(n) is int for n in (source, target, copy)), "an update in place is not three numbers")
        return Update(source, target, copy, _string(reason))

    def buffer(self, data: Any) -> Buffer:
        b = _object(data)
        name, kind = _string(b["name"]), b["kind"]
        _need(kind in KINDS, f"unknown buffer kind {kind!r}")
        dtype = None if b["dtype"] is None else self.dtype(b["dtype"])
        shape = None if b["shape"] is None else tuple(self.dim(d) for d in _list(b["shape"]))
        if kind == "content":
            content = tuple(v if isinstance(v, (bool, float)) else self.dim(v) for v in _list(b["content"]))
            _need(dtype is not None and shape is not None, f"content {name!r} has no type")
            return Buffer(name, dtype, shape, kind, content=content)
        if kind != "constant":
            return Buffer(name, dtype, shape, kind)
        _need(dtype is not None and shape is not None, f"constant {name!r} has no type")
        assert dtype is not None and shape is not None
        sizes = tuple(_integer(d, 0, 1 << 62) for d in shape)
        if "strings" in b:
            _need(dtype.name == "string", f"constant {name!r} holds strings")
            return Buffer(name, dtype, shape, kind, _string_array(b["strings"], sizes))
        return Buffer(name, dtype, shape, kind, self.array(_integer(b["data"], 0, MAX_ITEMS), dtype, sizes))

    def step(self, data: Any, count: int, depth: int) -> Step:
        s = _object(data)
        if "kernel" in s:
            return self._kernel_step(s, count)
        inputs = tuple(None if i is None else _integer(i, 0, count - 1) for i in _list(s["inputs"]))
        outputs, types = _indices(s["outputs"], count), tuple(self.type(t) for t in _list(s["types"]))
        _need(len(outputs) == len(types), "a step's outputs and types differ in number")
        attrs, origin, op = self.value(s["attrs"], 0), _strings(s["origin"]), _string(s["op"])
        _need(isinstance(attrs, dict), "attributes are not a table")
        if "bodies" in s:
            bodies = tuple(self.program(b, (), depth + 1) for b in _list(s["bodies"]))
            return ControlStep(op, attrs, inputs, outputs, types, bodies, origin)
        return HostStep(_string(s["domain"]), op, attrs, inputs, outputs, types, origin, _string(s["reason"]))

    def _kernel_step(self, s: Mapping[str, Any], count: int) -> KernelStep:
        values = [self.dim(v) for v in _list(s["values"])]
        numbers = [_integer(b, -1, count - 1) for b in _list(s["buffers"])]
        _need(len(values) == len(numbers), "a step's words and buffers differ in number")
        return KernelStep(
            _integer(s["kernel"], 0, len(self.kernels) - 1),
            tuple(Word(v, None if b < 0 else b) for v, b in zip(values, numbers)),
            self.dim(s["units"]),
            _indices(s["reads"], count),
            _indices(s["writes"], count),
            _strings(s["origin"]),
            self.dim(s["cost"]),
            self.dim(s["flops"]),
            self.dim(s["bytes"]),
            _string(s["note"]),
            tuple(self.dim(d) for d in _list(s["requires"])),
            tuple(_guard(g, count) for g in _list(s["guards"])),
        )

    def dim(self, data: Any) -> Dim:
        if isinstance(data, list):
            _need(len(data) == 1, "not a dimension")
            return self.dims[_integer(data[0], 0, len(self.dims) - 1)]
        return _integer(data, -(1 << 63), (1 << 63) - 1)  # an element of a content may be any int64

    def _terms(self, data: Any) -> Dim:
        parts = []
        for coefficient, atoms in _list(data):
            factors = [self._atom(atom) for atom in _list(atoms)]
            parts.append((product(factors), _integer(coefficient, -(1 << 62), 1 << 62)))
        return weighted_sum(parts)

    def _atom(self, data: Any) -> Dim:
        if isinstance(data, str):
            return symbol(data)
        op, a, b = _list(data)
        _need(op in FUNCTIONS, f"unknown function {op!r} in a dimension")
        return FUNCTIONS[op](self.dim(a), self.dim(b))

    def dtype(self, data: Any) -> DType:
        _need(isinstance(data, str) and data in BY_NAME, f"unknown element type {data!r}")
        return BY_NAME[data]

    def type(self, data: Any) -> Type:
        if isinstance(data, str):
            return OpaqueType(data)
        name, shape = _list(data)
        return TensorType(
            self.dtype(name), None if shape is None else tuple(self.dim(d) for d in _list(shape))
        )

    def kernel(self, data: Any) -> Kernel:
        k = _object(data)
        name = _harmless(k["name"])
        if "rank" in k:
            short = _integer(k["short"], 0, MOST_KNOWN)
            return LoopKernel(_integer(k["rank"], 0, 64), self.body(k["body"]), name, short)
        constants = tuple((_harmless(key), _constant(value)) for key, value in _list(k["constants"]))
        epilogue = None if k["epilogue"] is None else self.body(k["epilogue"])
        return TemplateKernel(_harmless(k["template"]), constants, epilogue, name)

    def body(self, data: Any) -> Body:
        b = _object(data)
        operands = []
        for name, strides, output, shared in _list(b["operands"]):
            given = tuple(None if s is None else _integer(s, 0, MOST_KNOWN) for s in _list(strides))
            operands.append(Operand(self.dtype(name), given, _boolean(output), _boolean(shared)))
        sizes = _integer(b["sizes"], 0, MAX_ITEMS)
        exprs: list[Expr] = []
        for entry in _list(b["exprs"]):
            exprs.append(self._expr(entry, exprs, operands, sizes))
        stores = tuple(
            Store(_integer(o, 0, len(operands) - 1), exprs[_integer(e, 0, len(exprs) - 1)])
            for o, e in _list(b["stores"])
        )
        _need(all(operands[s.operand].output for s in stores), "a kernel stores to an input")
        return Body(tuple(operands), stores, sizes)

    def _expr(self, data: Any, earlier: Sequence[Expr], operands: Sequence[Operand], sizes: int) -> Expr:
        op, type_name, references, arg = _list(data)
        dtype = self.dtype(type_name)
        args = tuple(earlier[_integer(r, 0, len(earlier) - 1)] for r in _list(references))
        counts = {"const": 0, "iter": 0, "dim": 0, "acc": 0, "reduce": 1, "keep": 1, "kept": 0, **_SYMBOL_OPS}
        if op in _MEMORY_OPS:
            _need(len(args) == counts[op] if op != "load" else len(args) <= 1, f"a {op} has too many arguments")
            operand = operands[_integer(arg, 0, len(operands) - 1)]
            _need(operand.dtype == dtype, f"a {op} has another type than its operand")
            _need(op == "load" or operand.output, "a term is kept in an input")
        else:
            _need(counts.get(op) == len(args), f"unknown expression {op!r} of {len(args)} arguments")
        if op == "const":
            _need(isinstance(arg, (bool, int, float)), "a literal is not a number")
            arg = (
                bool(arg)
                if dtype.name == "bool"
                else float(arg)
                if dtype.is_float
                else _integer(arg, -(1 << 63), 1 << 64)
            )
        elif op == "iter":
            arg = _integer(arg, 0, 63)
        elif op == "dim":
            arg = _integer(arg, 0, sizes - 1)
        elif op == "reduce":
            arg = _reduction(arg, sizes)
        elif op not in _MEMORY_OPS:
            arg = None
        return Expr(op, dtype, args, arg)

    def value(self, data: Any, depth: int) -> Any:
        """An attribute value; see `_Writer.value`."""
        _need(depth < MAX_DEPTH, "an attribute is nested too deeply")
        if data is None or isinstance(data, (bool, str, int, float)):
            return data
        ((kind, inner),) = _object(data).items()
        if kind in ("tuple", "list"):
            items = [self.value(x, depth + 1) for x in _list(inner)]
            return tuple(items) if kind == "tuple" else items
        if kind == "dict":
            return {_string(k): self.value(x, depth + 1) for k, x in _object(inner).items()}
        if kind == "bytes":
            return base64.b64decode(_string(inner), validate=True)
        if kind == "dim":
            return self.dim(inner)
        if kind == "dtype":
            return self.dtype(inner)
        if kind == "type":
            return self.type(inner)
        if kind == "strings":
            shape, items = _list(inner)
            return _string_array(items, tuple(_integer(d, 0, MAX_ITEMS) for d in _list(shape)))
        _need(kind == "array", f"unknown attribute value {kind!r}")
        dtype, shape, text = _list(inner)
        _need(
            re.fullmatch(r"[<>|][biufc]\d{1,2}", _string(dtype)) is not None,
            f"unknown element type {dtype!r}",
        )
        raw = np.frombuffer(base64.b64decode(_string(text), validate=True), np.dtype(dtype))
        return raw.reshape([_integer(d, 0, 1 << 62) for d in _list(shape)])


def _reduction(data: Any, sizes: int) -> tuple[Any, ...]:
    kind, axes, extents = _list(data)
    _need(kind in REDUCTIONS, f"unknown reduction {kind!r}")
    checked: list[Any] = []
    for extent in _list(extents):
        form, number = _list(extent)
        _need(form in ("literal", "short", "word"), f"unknown extent {form!r}")
        checked.append((form, _integer(number, 0, 1 << 62 if form == "literal" else sizes - 1)))
    numbers = tuple(_integer(a, 0, 63) for a in _list(axes))
    _need(len(numbers) == len(checked), "a reduction's axes and extents differ in number")
    return kind, numbers, tuple(checked)


def _string_array(data: Any, shape: tuple[int, ...]) -> Array:
    items = [
        base64.b64decode(_string(s["bytes"]), validate=True) if isinstance(s, dict) else _string(s)
        for s in _list(data)
    ]
    out = np.empty(len(items), dtype=object)
    out[:] = items
    return out.reshape(shape)


def _need(condition: bool, why: str) -> None:
    if not condition:
        raise ArtifactError("the program is not valid", why=why)


def _not(wanted: str, data: Any) -> ArtifactError:
    """What to raise for data of another kind; checks that run thousands of times must not build it beforehand."""
    found = type(data).__name__ if isinstance(data, (dict, list)) or data is None else repr(data)[:100]
    return ArtifactError("the program is not valid", why=f"{wanted} was expected, found {found}")


def _object(data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise _not("a table", data)
    return data


def _list(data: Any) -> list[Any]:
    if not isinstance(data, list) or len(data) > MAX_ITEMS:
        raise _not("a list", data)
    return data


def _string(data: Any) -> str:
    if not isinstance(data, str):
        raise _not("a text", data)
    return data


def _strings(data: Any) -> tuple[str, ...]:
    return tuple(_string(s) for s in _list(data))


def _boolean(data: Any) -> bool:
    if not isinstance(data, bool):
        raise _not("true or false", data)
    return data


def _guard(data: Any, count: int) -> tuple[int, bool]:
    parts = _list(data)
    _need(len(parts) == 2 and isinstance(parts[1], bool), "not a guard")
    return _integer(parts[0], 0, count - 1), parts[1]


def _integer(data: Any, low: int, high: int) -> int:
    if type(data) is not int or not low <= data <= high:
        raise _not(f"an integer from {low} to {high}", data)
    return data


def _indices(data: Any, count: int) -> tuple[int, ...]:
    return tuple(_integer(i, 0, count - 1) for i in _list(data))


def _harmless(data: Any) -> str:
    """A name that may appear in generated text."""
    if _NAME.fullmatch(_string(data)) is None:
        raise _not("a name", data)
    return _string(data)


def _constant(data: Any) -> bool | int | float | str:
    """A template's constant, which appears in generated text."""
    if isinstance(data, str):
        return _harmless(data)
    _need(type(data) in (bool, int, float), f"{data!r} is not a template constant")
    return data  # type: ignore[no-any-return]
