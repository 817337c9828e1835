"""Host steps: one node run by numpy, through its op's `eval` or ONNX's own evaluator.

The op is looked up by name, so a program loaded from a file runs the same code as a compiled one. Errors
come out typed, naming the node. Nothing here is fast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minicc.ir.evaluate import evaluate_node
from minicc.ir.graph import Node, Value
from minicc.ir.opdef import OpDef, find_op
from minicc.ir.types import OpaqueType, TensorType, Type
from minicc.lower.program import Buffer, HostStep, Program


class HostCall:
    """One host step, ready to run."""

    def __init__(self, step: HostStep, program: Program, max_bytes: int, max_loop_iterations: int) -> None:
        op = host_operator(step.domain, step.op, step.attrs)
        inputs = [None if b is None else _value(program.buffers[b]) for b in step.inputs]
        self.node = Node(op, inputs, step.attrs, step.origin)
        self.node.outputs = tuple(
            Value(program.buffers[b].name, type_, self.node, i)
            for i, (b, type_) in enumerate(zip(step.outputs, step.types))
        )
        self.max_bytes, self.max_loop_iterations = max_bytes, max_loop_iterations

    def __call__(self, arrays: Sequence[Any], sizes: Mapping[str, int]) -> Sequence[Any]:
        """The node's outputs. Raises ShapeError or ResourceLimitError naming the node."""
        return evaluate_node(
            self.node,
            arrays,
            max_bytes=self.max_bytes,
            max_loop_iterations=self.max_loop_iterations,
            sizes=sizes,
        )


def host_operator(domain: str, name: str, attrs: Mapping[str, Any]) -> OpDef:
    """The registered op of that name, else ONNX's own. Raises UnsupportedOpError when there is neither."""
    from minicc.ops import host  # fills the registry too; only programs with host steps pay for it

    op = find_op(name, domain)
    return op if op is not None else host.host_op(domain, name, attrs)


def _value(buffer: Buffer) -> Value:
    type_: Type = OpaqueType("object") if buffer.dtype is None else TensorType(buffer.dtype, buffer.shape)
    return Value(buffer.name, type_)
