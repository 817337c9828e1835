"""Whether the text of a kernel waits for the kernel before it, on every way that a thread may go."""

from __future__ import annotations

from tests.cuda.ptx_interpreter import Instruction, parse
from tests.cuda.ptx_values import PtxError

_OWN = ("param", "shared", "local")  # memory that no other kernel writes
_ACCESSES = ("ld", "ldu", "st", "atom", "red", "cp", "tex", "call", "multimem", "suld", "sust")


def check_wait(ptx: str, entry: str = "") -> None:
    """PtxError unless all threads wait exactly once, before any of them touches memory or lets the next kernel be launched."""
    program = parse(ptx, entry)
    if not program.early:
        return
    ways, seen = [(0, False)], set[tuple[int, bool]]()  # the next instruction, whether the thread has waited
    while ways:
        way = ways.pop()
        if way in seen:
            continue
        seen.add(way)
        at, waited = way
        if at == len(program.instructions):
            _demand(waited, None)
            continue
        instruction = program.instructions[at]
        match instruction.parts[0], instruction.parts[1:]:
            case "griddepcontrol", ("wait",):
                if waited or instruction.guard:
                    raise PtxError(f"not every thread waits once: {instruction.text}")
                ways.append((at + 1, True))
                continue
            case ("ret" | "exit" | "griddepcontrol"), _:
                _demand(waited, instruction)
            case name, parts if name in _ACCESSES and not _is_own(name, parts):
                _demand(waited, instruction)
        if instruction.parts[0] == "bra":
            ways.append((program.labels[instruction.operands[0]], waited))
        if instruction.guard or instruction.parts[0] not in ("bra", "ret", "exit"):
            ways.append((at + 1, waited))


def _is_own(name: str, parts: tuple[str, ...]) -> bool:
    """Whether an access reaches only memory that no other kernel writes; copies have two sides."""
    return name != "cp" and bool(set(_OWN) & {part.partition("::")[0] for part in parts})


def _demand(waited: bool, instruction: Instruction | None) -> None:
    if not waited:
        raise PtxError(f"a thread does not wait for the kernel before this one: {instruction.text if instruction else 'end'}")
