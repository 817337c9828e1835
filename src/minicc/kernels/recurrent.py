"""How a recurrent layer is cut into units, and into stages where its sequences are fewer than the threads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from minicc.kernels.domain import Words, ceil_divide, tile_rows
from minicc.targets.cpu import CpuTarget

# Multiply-adds of a step per thread, and of all steps, from which on sharing out each step pays: the threads meet in every
# step, and sleep before the first.
STEP_WORK = 32_000
WHOLE_WORK = 1_000_000
# More rows for the executor than this are not worth their memory.
MOST_STAGES = 1 << 14
# Multiply-adds of a product with one row per ns, about: the weights come from a cache.
RATE = 20.0
# Tiles of sequences in a block at most, as in kernels/cpu/recurrent.py: weights are read from a near cache for each of them.
MOST_TILES = 4
# Hidden units computed in vain, as a share, that wider panels are worth.
WASTE = 0.07


def panel_units(target: CpuTarget, hidden: int) -> int:
    """NR: hidden units of a panel, two vectors of them or one where many of two would be padding."""
    width = target.vector_width
    wide, narrow = (ceil_divide(hidden, columns) * columns for columns in (2 * width, width))
    return 2 * width if wide <= narrow * (1 + WASTE) else width


def recurrent_domain(w: Words, constants: Mapping[str, int], target: CpuTarget, threads: int) -> int:
    """Fill ROWS and STAGE of a recurrent layer; one unit is a block of so many sequences of one direction, or part of a stage."""
    batch, directions, tall = w["B"], w["DIRECTIONS"], tile_rows(target)
    if batch == 0:
        w["ROWS"], w["STAGE"] = 1, 0
        return 0
    blocks = directions * ceil_divide(batch, tall)
    work = directions * batch * w["H"] * w["H"] * constants["COUNT"]
    stages = 2 + _rounds(constants) * w["T"]
    if blocks < threads and work >= STEP_WORK * threads and work * w["T"] >= WHOLE_WORK and stages <= MOST_STAGES:
        w["ROWS"] = min(batch, tall)
        w["STAGE"] = blocks * ceil_divide(w["H"], constants["NR"])
        return stages * w["STAGE"]
    shares = ceil_divide(threads, directions)
    least = max(ceil_divide(batch, MOST_TILES * tall), min(batch, shares))
    w["ROWS"], w["STAGE"] = ceil_divide(batch, ceil_divide(least, shares) * shares), 0
    return directions * ceil_divide(batch, w["ROWS"])


def recurrent_stages(w: Words, constants: Mapping[str, int]) -> Sequence[tuple[int, int, float]]:
    """(first unit, units, ns on one thread) of each stage of kernels/cpu/recurrent.py; none where units are whole sequences."""
    if w["STAGE"] == 0:
        return ()
    rounds, blocks = _rounds(constants), w["DIRECTIONS"] * ceil_divide(w["B"], w["ROWS"])
    gates = (2, 1) if rounds == 2 else (constants["COUNT"],)
    step = [(w["STAGE"], blocks * w["ROWS"] * w["H"] * w["H"] * count / RATE) for count in gates]
    found = [(blocks, 0.0), *step * w["T"], (blocks, 0.0)]
    return [(at * w["STAGE"], units, cost) for at, (units, cost) in enumerate(found)]


def _rounds(constants: Mapping[str, int]) -> int:
    """Products of a step that follow each other: two in a GRU whose hidden gate needs all reset gates."""
    return 2 if constants["COUNT"] == 3 and not constants["LINEAR_BEFORE_RESET"] else 1
