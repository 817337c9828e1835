"""How a recurrent layer is cut into units, and into stages where its sequences are fewer than the threads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from minicc.kernels.domain import Words, ceil_divide, tile_rows
from minicc.targets.cpu import CpuTarget

# Multiply-adds of one step's product, per thread, and of all steps from which on sharing out each step pays: the threads
# meet twice per step or more, and sleep before the first.
STEP_WORK = 64_000
WHOLE_WORK = 1_000_000
# More rows for the executor than this are not worth their memory.
MOST_STAGES = 1 << 14
# Multiply-adds of a product with one row per ns, about: the weights come from a cache.
RATE = 20.0


def recurrent_domain(w: Words, constants: Mapping[str, int], target: CpuTarget, threads: int) -> int:
    """Fill ROWS and STAGE of a recurrent layer; one unit is a block of so many sequences of one direction, or part of a stage."""
    sequences, gates = w["B"] * w["DIRECTIONS"], constants["COUNT"]
    tallest = max(1, min(tile_rows(target), w["B"]))
    w["ROWS"], w["STAGE"] = max(1, min(tallest, ceil_divide(sequences, threads))), 0
    blocks = w["DIRECTIONS"] * ceil_divide(w["B"], tallest)
    columns = _columns(w, gates)[0]
    work = blocks * tallest * w["H"] * columns
    stages = 2 + _per_step(gates) * w["T"]
    if 0 < blocks < threads and work >= STEP_WORK * threads and work * w["T"] >= WHOLE_WORK and stages <= MOST_STAGES:
        w["ROWS"] = tallest
        w["STAGE"] = blocks * ceil_divide(columns, constants["NR"])
        return stages * w["STAGE"]
    return w["DIRECTIONS"] * ceil_divide(w["B"], w["ROWS"])


def recurrent_stages(w: Words, constants: Mapping[str, int]) -> Sequence[tuple[int, int, float]]:
    """(first unit, units, ns on one thread) of each stage of kernels/cpu/recurrent.py; none where units are whole sequences."""
    if w["STAGE"] == 0:
        return ()
    gates, blocks = constants["COUNT"], w["DIRECTIONS"] * ceil_divide(w["B"], w["ROWS"])
    step: list[tuple[int, float]] = []
    for columns in _columns(w, gates):
        panels = ceil_divide(columns, constants["NR"])
        step += [(blocks * panels, blocks * w["ROWS"] * w["H"] * columns / RATE), (blocks, 0.0)]
    found = [(blocks, 0.0), *step * w["T"], (blocks, 0.0)]
    return [(at * w["STAGE"], units, cost) for at, (units, cost) in enumerate(found)]


def _columns(w: Words, gates: int) -> tuple[int, ...]:
    """Columns of the products of a step: a GRU has two."""
    return (2 * w["H"], w["H"]) if gates == 3 else (gates * w["H"],)


def _per_step(gates: int) -> int:
    return 4 if gates == 3 else 2
