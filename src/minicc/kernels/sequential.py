"""Domains of the templates that are sequential inside a unit: scatter, scan, topk, suppress, trees.

Their kernels trust the sizes they get, so sizes that came from different arrays are compared here, where the
words are known.
"""

# ruff: noqa: ARG001  (all domain functions have the same parameters)

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from minicc.errors import ShapeError
from minicc.kernels.domain import UNITS_PER_THREAD, Words, ceil_divide
from minicc.targets.cpu import CpuTarget

# Axes of lanes, and numbers of an index, that a scatter can have.
SCATTER_AXES = 8
# Fewer lanes than this are not worth a unit of their own: each unit reads all indices.
SCATTER_LANES = 64


def scatter_domain(w: Words, constants: Mapping[str, int], target: CpuTarget | None, threads: int) -> int:
    """Fill BLOCK; one unit is a block of lanes.

    Raises ShapeError when the updates do not fit the indices, or the indices the target.
    """
    extents = [w[f"E_{axis}"] for axis in range(w["AXES"])]
    outer = prod(extents)
    updates = w["COUNT"] * w["RUN"] * outer
    if w["LENGTH"] != updates:
        raise ShapeError(f"{w['LENGTH']} updates are given for {updates} places")
    w["BLOCK"] = max(1, w["RUN"])
    counted = [w[f"N_{d}"] for d in range(w["DEPTH"])]
    if not updates or 0 in counted:
        return 0
    if w["RUN"] > w["F_RUN"] or any(e > w[f"F_{axis}"] for axis, e in enumerate(extents)):
        raise ShapeError("the indices of a scatter have a larger extent than its data")
    wanted = ceil_divide(threads * UNITS_PER_THREAD, outer) if threads > 1 else 1
    if wanted > 1:
        w["BLOCK"] = min(w["RUN"], max(SCATTER_LANES, ceil_divide(w["RUN"], wanted)))
    return outer * ceil_divide(w["RUN"], w["BLOCK"])


def scan_domain(w: Words, constants: Mapping[str, int], target: CpuTarget | None, threads: int) -> int:
    """One unit is one row of the last axis, or one block of inner elements."""
    return w["OUTER"] * ceil_divide(w["INNER"], constants["BLOCK"]) if w["COUNT"] else 0


def topk_domain(w: Words, constants: Mapping[str, int], target: CpuTarget | None, threads: int) -> int:
    """One unit is one row. ShapeError when it has fewer than K elements."""
    if w["K"] > w["N"]:
        raise ShapeError(f"TopK asks for {w['K']} of {w['N']} elements")
    return w["OUTER"] * w["INNER"] if w["K"] else 0


def suppress_domain(w: Words, constants: Mapping[str, int], target: CpuTarget | None, threads: int) -> int:
    """One unit is one class of one batch."""
    return w["BATCHES"] * w["CLASSES"]


def trees_domain(w: Words, constants: Mapping[str, int], target: CpuTarget | None, threads: int) -> int:
    """One unit is one row. ShapeError when it has fewer features than the nodes ask for."""
    if w["NEEDED"] > w["WIDTH"]:
        raise ShapeError(f"a tree ensemble asks for {w['NEEDED']} features, rows have {w['WIDTH']}")
    return w["ROWS"] if w["TREES"] else 0
