"""The printed form of a graph: what `show`, dumps, golden tests and error messages use.

One line per node, aligned and stable: outputs with their types, op, inputs, attributes that differ from their
defaults, and the ONNX nodes it comes from as a comment. Small constants are written out, symbolic ones as
`[batch, 12]`, large ones by name and type. There is no parser: tests write models in ONNX text through
`onnx.parser`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from minicc.ir.dims import SymbolicDim
from minicc.ir.graph import Graph, Node, Value

MAX_INLINE = 8  # elements of a constant written out
MAX_ORIGINS = 4  # names in a comment
MAX_LEFT, MAX_RIGHT = 48, 96  # widths up to which columns are aligned
INDENT = "  "


def print_graph(graph: Graph) -> str:
    """The text of a graph, ending in a newline; bodies of control flow and of fused nodes are indented below
    their node.
    """
    return "\n".join(_lines(graph, "", "graph")) + "\n"


def print_node(node: Node) -> str:
    """The line of one node, without alignment and without bodies."""
    left, right, comment = _columns(node)
    return f"{left} = {right}" + (f"  # {comment}" if comment else "")


def print_value(value: Value | None) -> str:
    """A value as an operand: its name, or the numbers of a small constant; `-` for a left-out input."""
    if value is None:
        return "-"
    if not value.is_constant:
        return value.name
    if value.content is not None and value.content.size <= MAX_INLINE:
        text = _array(value.content)
        return text if value.type.dtype.name in ("i64", "f32", "bool") else f"{value.type.dtype}{text}"  # type: ignore[union-attr]
    return f"{value.name}:{value.type}"


def _lines(graph: Graph, indent: str, word: str) -> list[str]:
    inputs = ", ".join(f"{v.name}: {v.type}" for v in graph.inputs)
    outputs = ", ".join(f"{print_value(v)}: {v.type}" for v in graph.outputs)
    lines = [f"{indent}{word} {graph.name}({inputs}) -> ({outputs})"]
    rows = [_columns(node) for node in graph.nodes]
    left_width = max((len(left) for left, _, _ in rows if len(left) <= MAX_LEFT), default=0)
    right_width = max((len(right) for _, right, _ in rows if len(right) <= MAX_RIGHT), default=0)
    for node, (left, right, comment) in zip(graph.nodes, rows):
        line = f"{indent}{INDENT}{left:<{left_width}} = {right:<{right_width if comment else 0}}"
        lines.append(f"{line}  # {comment}" if comment else line)
        for name, body in node.attrs.items():
            if isinstance(body, Graph):
                lines += _lines(body, indent + INDENT * 2, name)
    return lines


def _columns(node: Node) -> tuple[str, str, str]:
    left = ", ".join(f"{v.name}: {v.type}" for v in node.outputs)
    inputs = list(node.inputs)
    while inputs and inputs[-1] is None:
        inputs.pop()
    attrs = [
        f"{name}={_attribute(value)}" for name, value in node.attrs.items()
        if not isinstance(value, Graph) and not _is_default(value, node.op.attrs, name)
    ]  # fmt: skip
    call = f"{node.op}({', '.join(map(print_value, inputs))})"
    names = [name for name in node.origin[:MAX_ORIGINS] if name]
    more = len(node.origin) - MAX_ORIGINS
    comment = ", ".join(names) + (f", and {more} more" if more > 0 else "")
    return left, " ".join([call, *attrs]), comment.replace("\n", " ")


def _is_default(value: Any, defaults: Mapping[str, Any], name: str) -> bool:
    default = defaults.get(name)
    if isinstance(value, np.ndarray) or isinstance(default, np.ndarray):
        return value is default
    return type(value) is type(default) and value == default


def _attribute(value: Any) -> str:
    if isinstance(value, np.ndarray):
        if value.size <= MAX_INLINE:
            return _array(value.astype(object))
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    if isinstance(value, list | tuple):
        shown = ",".join(map(_attribute, value[:MAX_INLINE]))
        more = f",... {len(value)} in all" if len(value) > MAX_INLINE else ""
        return f"({shown}{more})"
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    return repr(value) if isinstance(value, str) and not value.isidentifier() else str(value)


def _array(content: Any) -> str:
    if content.ndim == 0:
        return _number(content.item())
    if content.ndim == 1:
        return f"[{', '.join(_number(v) for v in content)}]"
    return f"[{', '.join(_array(row) for row in content)}]"


def _number(value: Any) -> str:
    if isinstance(value, SymbolicDim):
        return str(value)
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, float | np.floating):
        text = f"{float(value):.7g}"
        return text if not text.lstrip("-").isdigit() else f"{text}.0"
    return str(value)
