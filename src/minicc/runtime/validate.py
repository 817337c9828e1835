"""Checks of a program that came from a file: it must bind and run without touching memory of others.

Every reference, word count, element type and order of definition is checked, and the loops' fixed strides
against the sizes of buffers where both are numbers. Positions that a kernel computes from data (gathers)
are bounded by the kernel's own clamps, which a file could lack: that is why programs of unknown origin
deserve as much care as any code.
"""

from __future__ import annotations

from minicc.errors import ArtifactError
from minicc.ir.dims import Dim
from minicc.ir.types import KERNEL_DTYPES, OpaqueType, Type, boolean, leads_with
from minicc.kernels.template import TEMPLATES
from minicc.lower.kernel import Body, Kernel, LoopKernel, TemplateKernel
from minicc.lower.program import Buffer, ControlStep, KernelStep, Program, Step, Update, Word
from minicc.lower.updates import obstacle, writers_of

_BODIES = {"If": 2, "Loop": 1, "Scan": 1}
_ATTRS = {"If": (), "Loop": ("n_carried",), "Scan": ("n_state", "num_scan_inputs")}


def check_program(program: Program) -> None:
    """Raise ArtifactError for the first thing wrong in a program or the bodies of its control flow."""
    for kernel in program.kernels:
        _check_kernel(kernel)
    _check(program, program.kernels)


def _check(program: Program, kernels: tuple[Kernel, ...]) -> None:
    for buffer in program.buffers:
        _check_buffer(buffer)
    _check_ports(program)
    if program.sliced:  # runs in turns go through outputs, and inputs that have the axis, row by row
        named = any(leads_with(t, program.sliced) for t in program.input_types)
        whole = all(leads_with(t, program.sliced) for t in program.output_types)
        _need(named and whole, f"its outputs do not have rows of {program.sliced!r}", program.name)
    for update in program.updates:
        _check_update(update, program)
    written = {
        b for b, buffer in enumerate(program.buffers) if buffer.kind in ("input", "constant", "content")
    }
    _need(
        all(program.buffers[b].kind == "input" for b in program.inputs),
        "an input has no input buffer",
        program.name,
    )
    undefined = {b for b in written if program.buffers[b].kind == "input"} - set(program.inputs)
    _need(not undefined, "an input buffer is not an input", program.name)
    for step in program.steps:
        _check_step(step, program, kernels, written)
    for b in program.outputs:
        empty = program.buffers[b].kind == "output"  # checked again when it is known whether it has elements
        _need(b in written or empty, "an output is never computed", program.buffers[b].name)


def _check_update(update: Update, program: Program) -> None:
    """Where an output may be an input's memory, the step that copies is the first of several writers, and no read comes late."""
    ports = 0 <= update.input < len(program.inputs) and 0 <= update.output < len(program.outputs)
    _need(ports, "an update in place names no input and output", program.name)
    source, target = program.inputs[update.input], program.outputs[update.output]
    where = program.buffers[target].name
    _need(program.buffers[source].dtype == program.buffers[target].dtype, "an output updates an input of another type", where)
    if not update.reason:
        writers = writers_of(program, target)
        _need(len(writers) > 1 and writers[0] == update.copy, "an update in place has no copy to leave out", where)
        copies = program.steps[update.copy]
        single = isinstance(copies, KernelStep) and copies.writes == (target,)
        _need(single and not obstacle(program, source, writers), "an output cannot be updated in place", where)


def _check_ports(program: Program) -> None:
    for what, numbers, types, names in (
        ("input", program.inputs, program.input_types, program.input_names),
        ("output", program.outputs, program.output_types, program.output_names),
    ):
        _need(len(numbers) == len(types), f"{what}s and their types differ in number", program.name)
        _need(
            not names or len(names) == len(numbers), f"{what}s and their names differ in number", program.name
        )
        for b, type_ in zip(numbers, types):
            _check_type(type_, program.buffers[b])
    _need(len(set(program.inputs)) == len(program.inputs), "two inputs share a buffer", program.name)


def _check_type(type_: Type, buffer: Buffer) -> None:
    """A declared type is its buffer's, so that what is checked is what kernels trust."""
    if isinstance(type_, OpaqueType):
        _need(buffer.dtype is None, "an opaque value has an array's buffer", buffer.name)
    else:
        same = type_.dtype == buffer.dtype and type_.shape == buffer.shape
        _need(same, "a value and its buffer have different types", buffer.name)


def _check_buffer(buffer: Buffer) -> None:
    if buffer.kind in ("temporary", "output"):
        _need(buffer.dtype is not None or buffer.kind == "output", "a temporary has no type", buffer.name)
    if buffer.kind == "constant":
        assert buffer.data is not None
        _need(buffer.data.shape == buffer.shape, "a constant has another shape than its array", buffer.name)
    if buffer.kind == "content":
        count = buffer.elements
        _need(
            isinstance(count, int) and count == len(buffer.content),
            "a content has the wrong number of elements",
            buffer.name,
        )


def _check_kernel(kernel: Kernel) -> None:
    if isinstance(kernel, LoopKernel):
        _check_body(kernel.body, kernel.name)
        return
    template = TEMPLATES.get(kernel.template)
    if template is None:
        raise ArtifactError(f"unknown kernel template {kernel.template!r}")
    names = {name for name, _ in kernel.constants}
    fits = names == set(template.constants) or _fits_cuda(kernel.template, names)
    _need(fits, f"constants {sorted(names)} do not fit the template", kernel.template)
    _need(kernel.epilogue is None or template.fused, "this template has no epilogue", kernel.template)
    if kernel.epilogue is not None:
        _check_body(kernel.epilogue, kernel.name)


def _fits_cuda(template: str, names: set[str]) -> bool:
    """Whether constants of these names fit the template's form on a GPU."""
    from minicc.kernels.cuda_template import CUDA_TEMPLATES, constants_of

    return template in CUDA_TEMPLATES and names == set(constants_of(template))


def _check_body(body: Body, where: str) -> None:
    for operand in body.operands:
        _need(operand.dtype in KERNEL_DTYPES, f"kernels cannot hold {operand.dtype}", where)


def _words_of(kernel: Kernel) -> tuple[int, Body | None]:
    """(words before those of the body, the body)."""
    if isinstance(kernel, TemplateKernel):
        return len(TEMPLATES[kernel.template].words), kernel.epilogue
    return kernel.rank, kernel.body


def _check_step(step: Step, program: Program, kernels: tuple[Kernel, ...], written: set[int]) -> None:
    where = ", ".join(step.origin)
    if isinstance(step, KernelStep):
        _check_kernel_step(step, program, kernels[step.kernel], written)
        return
    for b in step.inputs:
        _need(b is None or b in written, "a step reads what is not computed yet", where)
    for b, type_ in zip(step.outputs, step.types):
        buffer = program.buffers[b]
        _need(buffer.kind in ("host", "output"), f"a step writes a buffer of kind {buffer.kind}", buffer.name)
        _check_type(type_, buffer)
    written.update(step.outputs)
    if isinstance(step, ControlStep):
        _check_control(step, kernels, where)


def _check_control(step: ControlStep, kernels: tuple[Kernel, ...], where: str) -> None:
    _need(len(step.bodies) == _BODIES.get(step.op, -1), f"{step.op!r} has {len(step.bodies)} bodies", where)
    counts = []
    for name in _ATTRS[step.op]:
        value = step.attrs.get(name)
        _need(type(value) is int and value >= 0, f"attribute {name} of {step.op} is missing", where)
        counts.append(value)
    for name in ("scan_input_axes", "scan_input_directions", "scan_output_axes", "scan_output_directions"):
        values = step.attrs.get(name)
        _need(values is None or all(type(v) is int for v in values), f"attribute {name} is not a list", where)
    given = len(step.inputs) - (1 if step.op == "If" else 0)
    for body in step.bodies:
        _need(
            len(body.inputs) == given,
            f"a body of {step.op} takes {len(body.inputs)} inputs, {given} are given",
            where,
        )
        extra = 1 if step.op == "Loop" else 0
        _need(
            len(body.outputs) == len(step.outputs) + extra,
            f"a body of {step.op} has the wrong number of outputs",
            where,
        )
        _need(sum(v or 0 for v in counts) <= given, f"{step.op} carries more values than it is given", where)
        _check(body, kernels)


def _check_kernel_step(step: KernelStep, program: Program, kernel: Kernel, written: set[int]) -> None:
    where = f"{kernel.name} ({', '.join(step.origin)})"
    first, body = _words_of(kernel)
    _need(len(step.words) >= first, "a call has too few words", where)
    if isinstance(kernel, LoopKernel) and kernel.short:
        fits = kernel.rank > 1 and step.words[kernel.rank - 1] == Word(kernel.short)
        _need(fits, "the rows of a call are not as long as its kernel's", where)
    for b in step.reads:
        _need(
            b in written or b in step.writes,
            "a kernel reads what is not computed yet",
            program.buffers[b].name,
        )
    for b in step.writes:
        buffer = program.buffers[b]
        _need(
            buffer.kind in ("temporary", "output"),
            f"a kernel writes a buffer of kind {buffer.kind}",
            buffer.name,
        )
    for b, _ in step.guards:
        flag = program.buffers[b]
        one = flag.dtype == boolean and flag.shape is not None and flag.elements == 1
        _need(one and b in step.reads and b in written, "a call depends on what is no condition", where)
    touched = {*step.reads, *step.writes}
    for word in step.words:
        if word.buffer is not None:
            buffer = program.buffers[word.buffer]
            _need(word.buffer in touched, "a word names a buffer that the call does not read or write", where)
            _need(
                buffer.dtype in KERNEL_DTYPES and buffer.shape is not None,
                "a kernel touches an opaque buffer",
                where,
            )
    if body is not None:
        _need(len(step.words) == first + body.n_words, f"a call has {len(step.words)} words", where)
        _check_operands(step, program, body, first, kernel)
    written.update(step.writes)


def _check_operands(step: KernelStep, program: Program, body: Body, at: int, kernel: Kernel) -> None:
    extents = [w.value for w in step.words[:at]] if isinstance(kernel, LoopKernel) else None
    for number, operand in enumerate(body.operands):
        where = f"{kernel.name} ({', '.join(step.origin)}), operand {number}"
        address = step.words[at]
        if address.buffer is None:
            raise ArtifactError("an operand has no buffer", where=where)
        buffer = program.buffers[address.buffer]
        if buffer.dtype != operand.dtype:
            raise ArtifactError(
                "the program is not valid",
                where=where,
                why=f"an operand of type {operand.dtype} is a buffer of {buffer.dtype}",
            )
        if operand.output:
            _need(address.buffer in step.writes, "a call does not name what it writes", where)
        strides: list[Dim] = []
        at += 1
        for stride in operand.strides:
            if stride is None:
                _need(step.words[at].buffer is None, "a stride is an address", where)
                strides.append(step.words[at].value)
                at += 1
            else:
                strides.append(stride)
        if extents is not None:
            _check_range(address, strides, extents, buffer, operand.output, where)
    _need(
        all(w.buffer is None for w in step.words[at : at + body.sizes]),
        "a size is an address",
        where=kernel.name,
    )


def _check_range(
    address: Word, strides: list[Dim], extents: list[Dim], buffer: Buffer, output: bool, where: str
) -> None:
    """Stores of a loop kernel stay inside the buffer, when all its sizes are numbers."""
    elements, start = buffer.elements, address.value
    known_strides = [s for s in strides if isinstance(s, int)]
    known_extents = [e for e in extents if isinstance(e, int)]
    if len(known_strides) < len(strides) or len(known_extents) < len(extents) or len(strides) < len(extents):
        return
    if not output or 0 in known_extents or not isinstance(elements, int) or not isinstance(start, int):
        return
    reach = [stride * (extent - 1) for stride, extent in zip(known_strides, known_extents)]
    low, high = start + sum(min(r, 0) for r in reach), start + sum(max(r, 0) for r in reach)
    _need(low >= 0 and high < elements, "a kernel writes outside its buffer", where)


def _need(condition: bool, why: str, where: str = "") -> None:
    if not condition:
        raise ArtifactError("the program is not valid", why=why, where=where)
