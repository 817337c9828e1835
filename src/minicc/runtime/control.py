"""If, Loop and Scan over compiled bodies.

A body is a `Runner` of its own; captured arrays, carried values and contiguous slices are handed over as
they are, without copies. Sizes of the enclosing program are visible in a body, what a body learns stays
inside. Semantics follow the ONNX operators of these names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minicc.errors import MiniccError, ResourceLimitError, ShapeError, VerifyError
from minicc.ir.dims import evaluate
from minicc.ir.types import TensorType, Type
from minicc.lower.program import ControlStep
from minicc.runtime.bind import Machine
from minicc.runtime.context import Array, Sizes
from minicc.runtime.engine import Item, Runner
from minicc.runtime.turns import is_native, run_turns

# What the collected outputs of a loop, which may end early, may take before its first turn.
BYTES_AHEAD = 1 << 28


class ControlCall:
    """One control step, ready to run: `call(items, sizes)` gives its outputs."""

    def __init__(self, step: ControlStep, bodies: Sequence[Runner], machine: Machine) -> None:
        self.step, self.bodies, self.machine = step, tuple(bodies), machine
        self.where = f"{step.op} node '{', '.join(step.origin)}'"
        runs = {"If": self._run_if, "Loop": self._run_loop, "Scan": self._run_scan}
        if step.op not in runs:
            raise VerifyError(f"{step.op!r} is not a control-flow operator", where=self.where)
        self._run = runs[step.op]
        self.native = step.op != "If" and is_native(self.bodies[0])

    def __call__(self, items: Sequence[Item], sizes: Sizes) -> Sequence[Item]:
        return self._run(items, sizes)

    def _run_if(self, items: Sequence[Item], sizes: Sizes) -> Sequence[Item]:
        condition, *captures = items
        return self.bodies[0 if self._one(condition) else 1].run(captures, dict(sizes))

    def _run_loop(self, items: Sequence[Item], sizes: Sizes) -> Sequence[Item]:
        body, limit_total = self.bodies[0], self.machine.max_bytes
        count = int(self.step.attrs["n_carried"])
        trips, condition, *rest = items
        carried, captures = list(rest[:count]), rest[count:]
        limit = None if trips is None else int(self._one(trips))
        going = condition is None or bool(self._one(condition))
        most = self.machine.max_loop_iterations
        types = body.program.input_types
        turns = most if limit is None else min(limit, most)
        if self.native and going and turns > 0:
            head = [_number(0, types[0]), _number(True, types[1])]
            forwards = ((), (False,) * (len(body.program.outputs) - 1 - count))
            ahead = min(limit_total, BYTES_AHEAD)
            result = run_turns(body, turns, head, carried, (), captures, forwards, dict(sizes), ahead)
            if result is not None:
                if result.turns == most and result.going and (limit is None or limit > most):
                    raise self._too_many(most)
                return [*result.states, *result.collected]
        collected: list[list[Array]] = [[] for _ in body.program.outputs[1 + count :]]
        iteration = total = 0
        while going and (limit is None or iteration < limit):
            if iteration >= most:
                raise self._too_many(iteration)
            head = [_number(iteration, types[0]), _number(going, types[1])]
            results = body.run([*head, *carried, *captures], dict(sizes))
            going = bool(self._one(results[0]))
            carried = results[1 : 1 + count]
            for arrays, item in zip(collected, results[1 + count :]):
                arrays.append(item)
                total += item.nbytes
            if total > limit_total:
                raise ResourceLimitError(
                    "the collected outputs of a loop take too much memory",
                    where=self.where,
                    hint="raise max_bytes",
                    why=f"{total} bytes after {iteration + 1} turns; the limit is max_bytes={limit_total}",
                )
            iteration += 1
        declared = body.program.output_types[1 + count :]
        return [
            *carried,
            *(self._stack(arrays, type_, 0, sizes) for arrays, type_ in zip(collected, declared)),
        ]

    def _run_scan(self, items: Sequence[Item], sizes: Sizes) -> Sequence[Item]:
        body, attrs = self.bodies[0], self.step.attrs
        n_state, n_scanned = int(attrs["n_state"]), int(attrs["num_scan_inputs"])
        states, captures = list(items[:n_state]), items[n_state + n_scanned :]
        scanned = [
            np.ascontiguousarray(np.moveaxis(array, axis, 0))
            for array, axis in zip(
                items[n_state : n_state + n_scanned], _per_item(attrs, "scan_input_axes", n_scanned)
            )
        ]
        lengths = {len(array) for array in scanned}
        if len(lengths) != 1:
            raise ShapeError(
                "scanned inputs have different lengths", where=self.where, why=str(sorted(lengths))
            )
        declared = body.program.output_types[n_state:]
        axes = _per_item(attrs, "scan_output_axes", len(declared))
        backwards = [
            [direction != 0 for direction in _per_item(attrs, f"scan_{kind}_directions", count)]
            for kind, count in (("input", n_scanned), ("output", len(declared)))
        ]
        turns, machine = lengths.pop(), self.machine
        if self.native and 0 < turns <= machine.max_loop_iterations:
            given = (states, scanned, captures, backwards, dict(sizes), machine.max_bytes)
            result = run_turns(body, turns, (), *given)
            if result is not None:
                stacks = zip(result.collected, axes)
                return [*result.states, *(np.ascontiguousarray(np.moveaxis(a, 0, axis)) for a, axis in stacks)]
        scanned = [array[::-1] if reverse else array for array, reverse in zip(scanned, backwards[0])]
        collected: list[list[Array]] = [[] for _ in declared]
        for iteration in range(turns):
            if iteration >= machine.max_loop_iterations:
                raise self._too_many(iteration)
            results = body.run(
                [*states, *(array[iteration, ...] for array in scanned), *captures], dict(sizes)
            )
            states = results[:n_state]
            for arrays, item in zip(collected, results[n_state:]):
                arrays.append(item)
        outputs = (
            self._stack(arrays[:: -1 if reverse else 1], type_, axis, sizes)
            for arrays, type_, axis, reverse in zip(collected, declared, axes, backwards[1])
        )
        return [*states, *outputs]

    def _one(self, item: Item) -> Any:
        """The number in an array of one element, of any rank."""
        array = np.asarray(item)
        if array.size != 1:
            raise ShapeError(
                "a condition or trip count must have one element",
                where=self.where,
                why=f"its shape is {list(array.shape)}",
            )
        return array.item()

    def _too_many(self, iterations: int) -> MiniccError:
        return ResourceLimitError(
            f"a loop runs more than {iterations} iterations",
            where=self.where,
            hint="raise max_loop_iterations",
            why=f"the limit is max_loop_iterations={self.machine.max_loop_iterations}",
        )

    def _stack(self, arrays: Sequence[Array], type_: Type, axis: int, sizes: Sizes) -> Array:
        """The per-iteration outputs along a new axis."""
        if arrays:
            if len({a.shape for a in arrays}) > 1:
                raise ShapeError("a loop's output changes its shape between iterations", where=self.where)
            return np.stack(arrays, axis=axis)
        assert isinstance(type_, TensorType)
        shape = [_size_or_zero(d, sizes) for d in type_.shape or ()]
        shape.insert(axis if axis >= 0 else axis + len(shape) + 1, 0)
        return np.empty(shape, type_.dtype.numpy)


def _number(value: int, type_: Type) -> Array:
    """A number as an array of a body input's element type and rank (0 or 1)."""
    assert isinstance(type_, TensorType)
    return np.full((1,) * len(type_.shape or ()), value, dtype=type_.dtype.numpy)


def _per_item(attrs: Mapping[str, Any], name: str, count: int) -> Sequence[int]:
    return attrs.get(name) or (0,) * count


def _size_or_zero(dim: Any, sizes: Sizes) -> int:
    """A size of the body, or 0 for one that only an iteration would have shown."""
    try:
        return evaluate(dim, sizes)
    except KeyError:
        return 0
