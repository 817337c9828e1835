"""Graph to Program: every node becomes kernel steps, a host step or a control step.

The walk goes over the nodes in order. A node with a template gets it, with its fused epilogue; otherwise generated
loops; otherwise the host, with the reason. The tier of each node is a fact of the result, never a silent choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from minicc.ir.dims import Dim
from minicc.ir.expr import Expr, const, iteration
from minicc.ir.graph import Graph, Node, Value
from minicc.ir.opdef import Kind
from minicc.ir.types import OpaqueType, TensorType, i64
from minicc.lower.affine import linearise, row_major
from minicc.lower.body import Write
from minicc.lower.branches import merge_branches, merges
from minicc.lower.context import Choices, KernelTable, Lowering, is_view, together
from minicc.lower.inplace import reuse_in_place
from minicc.lower.program import Buffer, ControlStep, HostStep, KernelStep, Program, Step
from minicc.lower.requirements import requirements
from minicc.lower.slices import sliced_symbol
from minicc.lower.templates import find_template
from minicc.lower.updates import updates_of
from minicc.options import Options
from minicc.passes.common import RESHAPES
from minicc.passes.fuse import has_loops, wants_rows
from minicc.targets.cpu import CpuTarget
from minicc.targets.parse import Target

# Constants of fewer bytes are not worth releasing.
RELEASED_BYTES = 1 << 14


def lower(graph: Graph, target: Target, options: Options, consume: bool = False, choices: Choices | None = None) -> Program:
    """Lower a graph (and the bodies of its control flow) to a program for a target.

    consume: large constants leave the graph with the last node that reads them, so that weights are not held twice,
    as the model has them and packed; the graph is of no use afterwards. choices: which way to go where there are several.
    """
    table = KernelTable()
    sliced = sliced_symbol(graph)
    program = lower_graph(graph, target, options, table, consume, choices)
    return Program(
        program.name, program.buffers, program.steps, program.inputs, program.outputs, program.input_types,
        program.output_types, tuple(table.index), tuple(v.name for v in graph.inputs),
        tuple(v.name for v in graph.outputs), sliced, program.updates,
    )  # fmt: skip


def lower_graph(graph: Graph, target: Target, options: Options, table: KernelTable, consume: bool = False,
                choices: Choices | None = None) -> Program:  # fmt: skip
    """One graph with a kernel table shared by the whole program."""
    last_read = _last_read(graph) if consume else {}
    low = Lowering(target, table, options.winograd, options.precision, choices, options.fft, options.rounding)
    low.outputs = frozenset(graph.outputs)
    for value in graph.inputs:
        low.allocate(value, "input")
    inputs = [low.places[v] for v in graph.inputs]
    required: list[Dim] = []
    for node in graph.nodes:
        before = len(low.steps)
        lower_node(low, node, options)
        if len(low.steps) == before or isinstance(low.steps[-1], KernelStep):
            required += requirements(node)  # host and control steps check for themselves
        required = _attach(low.steps, before, required)
        for value in last_read.get(node, ()):
            value.data = None  # `Lowering.constants` may keep its id: the graph gets no new arrays from now on
    before = len(low.steps)
    outputs = [_output(low, value, graph) for value in graph.outputs]
    _attach(low.steps, before, required)
    buffers, low.buffers = low.buffers, []
    if isinstance(target, CpuTarget):
        together(buffers)
    for number in outputs:
        found = buffers[number]
        if found.kind == "temporary":
            buffers[number] = Buffer(found.name, found.dtype, found.shape, "output")
    steps = drop_unread(low.steps, frozenset(outputs))
    if options.opt_level > 0:
        steps = reuse_in_place(steps, buffers, frozenset(outputs), table, tuple(table.index))
    program = Program(
        graph.name, tuple(buffers), tuple(steps), tuple(inputs), tuple(outputs),
        tuple(v.type for v in graph.inputs), tuple(v.type for v in graph.outputs),
    )  # fmt: skip
    return replace(program, updates=updates_of(program, low.updated))


def _last_read(graph: Graph) -> dict[Node, list[Value]]:
    """The large constants to release after each node; what a view or the graph itself reads may be needed later."""
    last: dict[Value, Node] = {}
    for node in graph.nodes:
        own = node.attrs["body"].constants() if node.op.name == "Fused" else []
        last |= dict.fromkeys([v for v in (*node.inputs, *own) if v is not None], node)
    found: dict[Node, list[Value]] = {}
    for value, node in last.items():
        large = value.data is not None and value.data.nbytes >= RELEASED_BYTES
        if large and value not in graph.outputs and not any(map(is_view, value.consumers())):
            found.setdefault(node, []).append(value)
    return found


def _attach(steps: list[Step], first: int, required: list[Dim]) -> list[Dim]:
    """Give requirements to the last kernel step from `first` on; returns those that still wait for one (of a view)."""
    for at in range(len(steps) - 1, first - 1, -1):
        step = steps[at]
        if isinstance(step, KernelStep):
            steps[at] = replace(step, requires=tuple(dict.fromkeys((*step.requires, *required))))
            return []
    return required


def drop_unread(steps: Sequence[Step], kept: frozenset[int]) -> list[Step]:
    """Steps without kernels whose results nobody reads (operands prepared for a template that refused in the end)."""
    read: set[int] = set(kept)
    out: list[Step] = []
    for step in reversed(steps):
        if isinstance(step, KernelStep):
            if not read.intersection(step.writes):
                continue
            read.update(step.reads)
        else:
            read.update(b for b in step.inputs if b is not None)
        out.append(step)
    return out[::-1]


def _output(low: Lowering, value: Value, graph: Graph) -> int:
    """The buffer of a graph output; a copy when it would be the caller's own array, a constant, or another output's.

    A reshape of something that lives on has another shape, so an output never shares a buffer under another shape.
    """
    if isinstance(value.type, OpaqueType) or value.type.shape is None:
        return low.buffer(value)
    node = value.producer
    if node is not None and low.is_inline(value) and node.op.name not in RESHAPES and value.type.dtype.name in _COPYABLE:
        # A copy of its own is an output as it is; reshapes share their source's array.
        low.emit_loops([value], low.composer(), node.origin, f"copy_{node.op.name.lower()}")
        return low.places[value]
    number = low.buffer(value)
    found = low.buffers[number]
    taken = [low.places.get(v) for v in graph.outputs if v is not value]
    own = value.producer is not None and not is_view(value.producer)
    if found.kind in ("temporary", "host") and own and number not in taken and found.shape == value.type.shape:
        return number
    if value.type.dtype.name not in _COPYABLE:
        return number
    index = [iteration(a) for a in range(len(value.shape))]
    offset = linearise(index, value.shape)
    copy = low.new_buffer(value.name, value.type.dtype, value.shape, "temporary")
    load = Expr("load", value.type.dtype, (offset,), number)
    low.emit_writes([Write(copy, value.type.dtype, offset, load)], value.shape, (), "copy_output")
    return copy


_COPYABLE = frozenset(["f32", "f64", "f16", "bf16", "i8", "i16", "i32", "i64", "u8", "u16", "u32", "u64", "bool"])


def lower_node(low: Lowering, node: Node, options: Options) -> None:
    """Emit the steps of one node, by the first tier that takes it."""
    if is_view(node):
        return  # composed into its readers
    if node.op.name == "Fused":
        _lower_fused(low, node)
        return
    if node.op.kind is Kind.CONTROL:
        _lower_control(low, node, options)
        return
    reasons: list[str] = []
    template = find_template(node, low.target) if _ranked(node) else None
    if template is not None:
        refusal = template(low, node, None)
        if not refusal:
            return
        reasons.append(refusal)
    if node.op.name == "Concat" and has_loops(node):
        _lower_concat(low, node)
        return
    if has_loops(node) or (node.op.kind is Kind.CONTRACT and _contract_loops(node)):
        _make_rows(low, [node], {v: v for v in node.inputs if v is not None})
        inside = set(node.outputs)
        for output in node.outputs:
            if output.uses or output.index == 0 or output in inside:
                composer = low.composer(inside.__contains__)
                low.emit_loops([output], composer, node.origin, node.op.name.lower(), note="; ".join(reasons))
        return
    own = node.op.refuse(node) if node.op.refuse is not None else None
    reasons.append(own or _why_host(node))
    _lower_host(low, node, "; ".join(r for r in reasons if r))


def _ranked(node: Node) -> bool:
    """Whether every input and output is a tensor of known rank."""
    values = [v for v in (*node.inputs, *node.outputs) if v is not None]
    return all(isinstance(v.type, TensorType) and v.type.shape is not None for v in values)


def _contract_loops(node: Node) -> bool:
    if node.op.refuse is not None and node.op.refuse(node) is not None:
        return False
    return all(
        isinstance(v.type, TensorType) and v.type.shape is not None and v.type.dtype.name in _COPYABLE
        for v in (*node.inputs, *node.outputs) if v is not None
    )  # fmt: skip


def _why_host(node: Node) -> str:
    if node.symbols:
        return "data-dependent: a size of its result is known only when it has run"
    if node.op.kind is Kind.HOST:
        return "the operator has no kernel yet"
    for v in (*node.inputs, *node.outputs):
        if v is None:
            continue
        if isinstance(v.type, OpaqueType):
            return f"{v.type} is not a tensor"
        if v.type.shape is None:
            return f"the rank of {v.name} is known only at run time"
        if v.type.dtype.name not in _COPYABLE:
            return f"no kernels for element type {v.type.dtype}"
    return f"no kernel for {node.op}"


def _lower_fused(low: Lowering, node: Node) -> None:
    body: Graph = node.attrs["body"]
    outer = dict(zip(body.inputs, node.inputs))
    anchor = node.attrs["anchor"]
    if anchor:
        lead = body.nodes[node.attrs["lead"]]
        template = find_template(lead, low.target)
        refusal = template(low, node, lead) if template is not None else "no template"
        if not refusal:
            return
        _lower_unfused(low, node, body, outer, refusal)
        return
    inside = {v for n in body.nodes for v in n.outputs}
    _make_rows(low, body.nodes, outer)
    composer = low.composer(inside.__contains__, lambda v: outer.get(v, v))  # type: ignore[arg-type, return-value]
    low.emit_loops(node.outputs, composer, node.origin, body.name, sources=body.outputs)


def _make_rows(low: Lowering, nodes: Sequence[Node], outer: Mapping[Value, Value | None]) -> None:
    """Make the views in memory that some of the nodes read neighbours of, at positions that are computed.

    outer: what stands for the inputs of a body outside; for nodes of a graph themselves their inputs.
    """
    for node in nodes:
        value = node.inputs[0] if node.inputs else None
        read = outer.get(value) if value is not None else None
        if read is not None and low.is_inline(read) and wants_rows(node, read):
            low.buffer(read)


def _lower_unfused(low: Lowering, node: Node, body: Graph, outer: dict[Value, Value | None], why: str) -> None:
    """The nodes of a body one by one, when the template refused the group after all."""
    first = len(low.steps)
    mapping: dict[Value, Value] = {b: v for b, v in outer.items() if v is not None}
    for inner in body.nodes:
        copy = Node(inner.op, [None if v is None else mapping.get(v, v) for v in inner.inputs], inner.attrs, inner.origin)
        copy.outputs = tuple(Value(v.name, v.type, copy, v.index, v.data, v.content) for v in inner.outputs)
        for v in copy.outputs:
            v.uses.append((copy, 0))
        mapping.update(zip(inner.outputs, copy.outputs))
        lower_node(low, copy, Options())
    low.steps[first:] = [replace(s, note=s.note or why) if isinstance(s, KernelStep) else s for s in low.steps[first:]]
    for value, result in zip(node.outputs, body.outputs):
        low.places[value] = low.buffer(mapping[result])


def _lower_concat(low: Lowering, node: Node) -> None:
    """Each input is copied to its part of the output."""
    output = node.output
    axis = node.attrs["axis"] % len(output.shape)
    number = low.allocate(output)
    strides = row_major(output.shape)
    start = 0
    for value in node.inputs:
        assert value is not None
        index = [iteration(a) for a in range(len(value.shape))]
        offset = const(0, i64)
        for position, stride in zip(index, strides):
            offset = offset + position * stride
        offset = offset + start * strides[axis]  # type: ignore[operator]
        element = low.composer().element(value, index)
        low.emit_writes([Write(number, value.tensor.dtype, offset, element)], value.shape, node.origin, "concat")
        start = start + value.shape[axis]  # type: ignore[assignment, operator]


def _lower_host(low: Lowering, node: Node, reason: str) -> None:
    inputs = tuple(None if v is None else low.shaped_buffer(v) for v in node.inputs)
    for value in node.outputs:
        low.allocate(value, "host")
    low.steps.append(HostStep(
        node.op.domain, node.op.name, node.attrs, inputs, tuple(low.places[v] for v in node.outputs),
        tuple(v.type for v in node.outputs), node.origin, reason,
    ))  # fmt: skip


def _lower_control(low: Lowering, node: Node, options: Options) -> None:
    names = ("then_branch", "else_branch") if node.op.name == "If" else ("body",)
    bodies = tuple(lower_graph(node.attrs[name], low.target, options, low.kernels, choices=low.choices) for name in names)
    attrs = {k: v for k, v in node.attrs.items() if not isinstance(v, Graph)}
    merged = node.op.name == "If" and isinstance(low.target, CpuTarget) and options.opt_level > 0 and merges(node, bodies)
    inputs = tuple(None if v is None else low.shaped_buffer(v) for v in node.inputs)
    if merged:
        condition, *captures = (b for b in inputs if b is not None)
        merge_branches(low, node, condition, captures, bodies)
        return
    for value in node.outputs:
        low.allocate(value, "host")
    low.steps.append(ControlStep(
        node.op.name, attrs, inputs, tuple(low.places[v] for v in node.outputs),
        tuple(v.type for v in node.outputs), bodies, node.origin,
    ))  # fmt: skip
