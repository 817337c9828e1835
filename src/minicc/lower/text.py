"""A program as readable text: one line per buffer and per step, bodies indented.

For people and for `diff`; it is not read back.
"""

from __future__ import annotations

from minicc.ir.dims import Dim
from minicc.lower.kernel import Kernel, TemplateKernel
from minicc.lower.program import Buffer, ControlStep, HostStep, KernelStep, Program, Step, Word


def print_program(program: Program) -> str:
    """The whole program, with the words of every kernel call."""
    return "\n".join(_lines(program, program.kernels, "")) + "\n"


def tier_of(step: Step, kernels: tuple[Kernel, ...]) -> str:
    """How a step is computed: "loops", a template's name, "host", or the control-flow operator."""
    if isinstance(step, KernelStep):
        kernel = kernels[step.kernel]
        return kernel.template if isinstance(kernel, TemplateKernel) else "loops"
    return "host" if isinstance(step, HostStep) else step.op


def type_text(buffer: Buffer) -> str:
    """Element type and shape of a buffer."""
    if buffer.dtype is None:
        return "object"
    shape = "?" if buffer.shape is None else ",".join(map(str, buffer.shape))
    return f"{buffer.dtype}[{shape}]"


def _lines(program: Program, kernels: tuple[Kernel, ...], indent: str) -> list[str]:
    buffers = program.buffers
    ins = ", ".join(f"{_name(b, buffers)}: {type_text(buffers[b])}" for b in program.inputs)
    outs = ", ".join(f"{_name(b, buffers)}: {type_text(buffers[b])}" for b in program.outputs)
    lines = [f"{indent}program {program.name} ({ins}) -> ({outs})"]
    for b, buffer in enumerate(buffers):
        content = f" = [{', '.join(map(str, buffer.content))}]" if buffer.kind == "content" else ""
        lines.append(f"{indent}  {_name(b, buffers):<32} {buffer.kind:<10} {type_text(buffer)}{content}")
    for number, step in enumerate(program.steps):
        lines += _step(number, step, program, kernels, indent + "  ")
    return lines


def _step(number: int, step: Step, program: Program, kernels: tuple[Kernel, ...], indent: str) -> list[str]:
    buffers = program.buffers
    comment = f"  # {', '.join(step.origin)}" if step.origin else ""
    if isinstance(step, KernelStep):
        reads, writes = (", ".join(_name(b, buffers) for b in group) for group in (step.reads, step.writes))
        name = f"{kernels[step.kernel].name}#{step.kernel}"
        lines = [f"{indent}{number:>4} {writes} = {name}({reads}) [{tier_of(step, kernels)}]{comment}"]
        lines.append(f"{indent}     words {' '.join(_word(w, buffers) for w in step.words)}")
        lines.append(
            f"{indent}     units {step.units}, cost {step.cost} ns, {step.flops} flop, {step.bytes} bytes"
        )
        if step.guards:
            wanted = ", ".join(f"{_name(b, buffers)} is {str(value).lower()}" for b, value in step.guards)
            lines.append(f"{indent}     only where {wanted}")
        return lines + ([f"{indent}     note: {step.note}"] if step.note else [])
    ins = ", ".join("-" if b is None else _name(b, buffers) for b in step.inputs)
    outs = ", ".join(_name(b, buffers) for b in step.outputs)
    lines = [f"{indent}{number:>4} {outs} = {step.op}({ins}) [{tier_of(step, kernels)}]{comment}"]
    if isinstance(step, ControlStep):
        for body in step.bodies:
            lines += _lines(body, kernels, indent + "     ")
    elif step.reason:
        lines.append(f"{indent}     reason: {step.reason}")
    return lines


def _name(number: int, buffers: tuple[Buffer, ...]) -> str:
    return f"%{number}.{buffers[number].name}"


def _word(word: Word, buffers: tuple[Buffer, ...]) -> str:
    value: Dim = word.value
    if word.buffer is None:
        return str(value).replace(" ", "")
    offset = "" if value == 0 else f"+{str(value).replace(' ', '')}"
    return f"&{_name(word.buffer, buffers)}{offset}"
