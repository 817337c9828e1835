"""In-place reuse: a kernel writes its result over an operand nobody reads afterwards.

Runs over the finished steps of one program. It applies when every read of the dying array is at exactly the place that
is written, so that each element is read by the unit that overwrites it; the kernel is then a variant that loads through the
output's pointer, which keeps alias information true.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from minicc.kernels.template import epilogue_base
from minicc.lower.context import KernelTable
from minicc.lower.kernel import Body, Kernel, LoopKernel
from minicc.lower.program import Buffer, KernelStep, Step, Word


def reuse_in_place(steps: Sequence[Step], buffers: Sequence[Buffer], kept: frozenset[int], table: KernelTable,
                   kernels: Sequence[Kernel]) -> list[Step]:  # fmt: skip
    """Steps with results renamed onto the arrays they overwrite; `kept` buffers (outputs) are neither."""
    last_read: dict[int, int] = {}
    writers: dict[int, int] = {}
    for at, step in enumerate(steps):
        # What a host or control step returns may be a view of its operand: nobody ever overwrites that.
        until = at if isinstance(step, KernelStep) else len(steps)
        for buffer in _reads(step):
            last_read[buffer] = max(until, last_read.get(buffer, 0))
        for buffer in step.writes if isinstance(step, KernelStep) else step.outputs:
            writers[buffer] = writers.get(buffer, 0) + 1
    renamed: dict[int, int] = {}
    known = list(kernels)
    out: list[Step] = []
    for at, original in enumerate(steps):
        step = _rename(original, renamed)
        if isinstance(step, KernelStep) and len(step.writes) == 1:
            target = step.writes[0]
            if target not in kept and buffers[target].kind == "temporary" and writers.get(target) == 1:
                found = _overwritable(step, known[step.kernel], buffers, target, last_read, at, kept)
                if found is not None:
                    source, kernel = found
                    number = table.number(kernel)
                    if number == len(known):
                        known.append(kernel)
                    renamed[target] = source
                    last_read[source] = last_read.get(target, at)
                    renamed_step = _rename(step, {target: source})
                    assert isinstance(renamed_step, KernelStep)
                    step = replace(renamed_step, kernel=number)
        out.append(step)
    return out


def _reads(step: Step) -> list[int]:
    if isinstance(step, KernelStep):
        return list(step.reads)
    return [b for b in step.inputs if b is not None]


def _rename(step: Step, renamed: dict[int, int]) -> Step:
    def new(buffer: int) -> int:
        return renamed.get(buffer, buffer)

    if isinstance(step, KernelStep):
        words = tuple(w if w.buffer is None else Word(w.value, new(w.buffer)) for w in step.words)
        guards = tuple((new(b), wanted) for b, wanted in step.guards)
        reads, writes = tuple(map(new, step.reads)), tuple(map(new, step.writes))
        return replace(step, words=words, reads=reads, writes=writes, guards=guards)
    inputs = tuple(None if b is None else new(b) for b in step.inputs)
    return replace(step, inputs=inputs)


def _overwritable(step: KernelStep, kernel: Kernel, buffers: Sequence[Buffer], target: int, last_read: dict[int, int],
                  at: int, kept: frozenset[int]) -> tuple[int, Kernel] | None:  # fmt: skip
    """(array to overwrite, kernel variant), or None."""
    body = kernel.body if isinstance(kernel, LoopKernel) else kernel.epilogue
    if body is None or len(body.stores) != 1:
        return None
    base = kernel.rank if isinstance(kernel, LoopKernel) else epilogue_base(kernel.template)
    places = _places(body, step.words, base)
    own = {w.buffer for w in step.words[:base]} | {b for b, _ in step.guards}
    store = places[body.stores[0].operand]
    for source in step.reads:
        found = buffers[source]
        if source in own or source in kept or found.kind != "temporary" or last_read.get(source) != at:
            continue
        mine = [i for i, (buffer, _, _) in enumerate(places) if buffer == source]
        same = found.dtype == buffers[target].dtype and found.shape == buffers[target].shape
        if same and mine and all(places[i][1:] == store[1:] for i in mine):
            operands = tuple(replace(o, shared=True) if i in mine else o for i, o in enumerate(body.operands))
            changed = replace(body, operands=operands)
            return source, (replace(kernel, body=changed) if isinstance(kernel, LoopKernel)
                            else replace(kernel, epilogue=changed))  # fmt: skip
    return None


def _places(body: Body, words: Sequence[Word], base: int) -> list[tuple[int | None, object, tuple[object, ...]]]:
    """Per operand: its buffer, its first element, its strides (literals and words)."""
    out: list[tuple[int | None, object, tuple[object, ...]]] = []
    at = base
    for operand in body.operands:
        address = words[at]
        at += 1
        strides: list[object] = []
        for stride in operand.strides:
            if stride is None:
                strides.append(words[at].value)
                at += 1
            else:
                strides.append(stride)
        out.append((address.buffer, address.value, tuple(strides)))
    return out

