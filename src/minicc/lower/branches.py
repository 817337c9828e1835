"""If without control flow: the kernel calls of both branches become steps of the program around them, guarded.

So an If costs a look at its condition, not a program of its own. It applies where a branch is nothing but kernels and
sizes are bound alike whichever branch is taken: nothing that is true of one branch only may fail for the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from minicc.ir.dims import Atom, SymbolicDim
from minicc.ir.graph import Node
from minicc.ir.types import TensorType, Type, boolean
from minicc.lower.context import Lowering
from minicc.lower.program import Buffer, KernelStep, Program, Step, Word


def merges(node: Node, branches: Sequence[Program]) -> bool:
    """Whether the branches of an If can be steps of the program around it."""
    condition, *captures = node.inputs
    kind = None if condition is None else condition.type
    if not isinstance(kind, TensorType) or kind.shape is None or kind != TensorType(boolean, (1,) * len(kind.shape)):
        return False
    known = all(v is not None and isinstance(v.type, TensorType) and v.type.shape is not None for v in captures)
    return known and all(_plain(branch, [v.type for v in node.outputs]) for branch in branches)


def _plain(branch: Program, types: Sequence[Type]) -> bool:
    """Kernels only, outputs of the given types in memory of their own, no sizes that could fail."""
    outputs = [branch.buffers[b] for b in branch.outputs]
    written = {b for step in branch.steps if isinstance(step, KernelStep) for b in step.writes}
    return (
        all(_always_binds(step) for step in branch.steps)
        and all(_is_defined(d, positive=True) for b in branch.buffers for d in b.shape or ())
        and len(set(branch.outputs)) == len(outputs)
        and written.issuperset(branch.outputs)
        and all(b.kind == "output" and b.dtype and TensorType(b.dtype, b.shape) == t for b, t in zip(outputs, types))
    )


def _always_binds(step: Step) -> bool:
    if not isinstance(step, KernelStep) or step.requires:
        return False
    return all(_is_defined(d) for d in (step.units, *(w.value for w in step.words)))


def _is_defined(dim: object, positive: bool = False) -> bool:
    """Whether a size has a value for any sizes of its symbols (`positive`: surely one of at least 0)."""
    if isinstance(dim, int):
        return dim >= 0 or not positive
    if not isinstance(dim, SymbolicDim):
        return False
    atoms = {atom for monomial, _ in dim.terms for atom in monomial}
    signs = all(coefficient >= 0 for _, coefficient in dim.terms) or not positive
    return signs and all(_is_defined_atom(atom, positive) for atom in atoms)


def _is_defined_atom(atom: Atom, positive: bool) -> bool:
    if atom.op == "symbol":
        return True
    if atom.op == "max":
        return all(map(_is_defined, atom.args)) and (not positive or any(_is_defined(a, True) for a in atom.args))
    if atom.op == "min":
        return all(_is_defined(a, positive) for a in atom.args)
    if atom.op in ("//", "%"):
        divided, by = atom.args
        return isinstance(by, int) and by > 0 and _is_defined(divided, positive and atom.op == "//")
    return False


def merge_branches(low: Lowering, node: Node, condition: int, captures: Sequence[int], branches: Sequence[Program]) -> None:
    """Emit the steps of both branches, each where the buffer `condition` holds what is wanted."""
    outputs = [low.allocate(value) for value in node.outputs]
    for branch, wanted in zip(branches, (True, False)):
        places = dict(zip((*branch.inputs, *branch.outputs), (*captures, *outputs)))
        for number, buffer in enumerate(branch.buffers):
            if number not in places:
                places[number] = _add(low, buffer)
        for step in branch.steps:
            assert isinstance(step, KernelStep)
            low.steps.append(_guarded(step, places, condition, wanted, node.origin))


def _add(low: Lowering, buffer: Buffer) -> int:
    low.buffers.append(buffer)
    return len(low.buffers) - 1


def _guarded(step: KernelStep, places: Mapping[int, int], condition: int, wanted: bool, origin: tuple[str, ...]) -> KernelStep:
    words = tuple(w if w.buffer is None else Word(w.value, places[w.buffer]) for w in step.words)
    reads = tuple(dict.fromkeys((*(places[b] for b in step.reads), condition)))
    guards = ((condition, wanted), *((places[b], value) for b, value in step.guards))
    writes = tuple(places[b] for b in step.writes)
    origins = tuple(dict.fromkeys((*step.origin, *origin)))
    return replace(step, words=words, reads=reads, writes=writes, guards=guards, origin=origins)
