"""ScatterElements and ScatterND: data is copied to the result, which the `scatter` template updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from minicc.ir.dims import Dim, product
from minicc.ir.expr import Expr, iteration
from minicc.ir.graph import Node, Value
from minicc.ir.types import boolean
from minicc.kernels.sequential import SCATTER_AXES
from minicc.lower.affine import linearise, row_major
from minicc.lower.body import Write
from minicc.lower.context import Lowering
from minicc.lower.program import Word
from minicc.lower.templates import common, elements

_COMBINE = {"none": "replace", "add": "add", "mul": "multiply", "max": "maximum", "min": "minimum"}
_LOGICAL = {"add": "maximum", "mul": "minimum"}  # of bools, stored as 0 and 1


@dataclass(frozen=True)
class _Axis:
    """An axis of lanes: its extent, strides in target and indices, and extent in the target."""

    extent: Dim
    target: Dim
    indices: Dim
    whole: Dim


def lower_scatter_elements(low: Lowering, node: Node, lead: Node | None) -> str:  # noqa: ARG001
    """Lanes are all axes but the one that indices count through; those behind it make the run if they can."""
    refusal = elements.refusal(node)
    if refusal:
        return refusal
    data, indices, updates = _inputs(node)
    rank = len(data.shape)
    axis = int(node.attrs["axis"]) % rank
    target_strides, index_strides = row_major(data.shape), row_major(indices.shape)
    others = [a for a in range(rank) if a != axis]
    lanes = _merged(
        [_Axis(indices.shape[a], target_strides[a], index_strides[a], data.shape[a]) for a in others]
    )
    run = _Axis(1, 1, 1, 1)
    if lanes and lanes[-1].target == 1 and lanes[-1].indices == 1:
        run = lanes.pop()
    if len(lanes) > SCATTER_AXES:
        return f"more than {SCATTER_AXES} axes that do not merge"
    values: dict[str, Word | Dim] = {
        "COUNT": indices.shape[axis], "I_STEP": index_strides[axis], "U_STEP": index_strides[axis],
        "RUN": run.extent, "F_RUN": run.whole, "AXES": len(lanes), "DEPTH": 1,
        "N_0": data.shape[axis], "M_0": target_strides[axis],
    }  # fmt: skip
    for number, lane in enumerate(lanes):
        values |= {
            f"E_{number}": lane.extent, f"T_{number}": lane.target, f"I_{number}": lane.indices,
            f"U_{number}": lane.indices, f"F_{number}": lane.whole,
        }  # fmt: skip
    _emit(low, node, values, data, indices, updates, shared=False)
    return ""


def lower_scatter_nd(low: Lowering, node: Node, lead: Node | None) -> str:  # noqa: ARG001
    """Lanes are the elements of one slice of updates."""
    refusal = elements.refusal(node)
    if refusal:
        return refusal
    data, indices, updates = _inputs(node)
    depth = indices.shape[-1]
    if not isinstance(depth, int):
        return "data-dependent: the length of an index is not known at compile time"
    if depth > SCATTER_AXES:
        return f"an index of more than {SCATTER_AXES} numbers"
    run = product(data.shape[depth:])
    values: dict[str, Word | Dim] = {
        "COUNT": product(indices.shape[:-1]), "I_STEP": depth, "U_STEP": run, "RUN": run, "F_RUN": run,
        "DEPTH": depth,
    }  # fmt: skip
    for number, (extent, stride) in enumerate(zip(data.shape[:depth], row_major(data.shape))):
        values |= {f"N_{number}": extent, f"M_{number}": stride}
    _emit(low, node, values, data, indices, updates, shared=True)
    return ""


def _inputs(node: Node) -> tuple[Value, Value, Value]:
    data, indices, updates = node.inputs
    assert data is not None and indices is not None and updates is not None
    return data, indices, updates


def _merged(axes: list[_Axis]) -> list[_Axis]:
    """Without axes of one element, and with neighbours that both arrays walk contiguously made one."""
    out: list[_Axis] = []
    for inner in axes:
        if inner.extent == 1 and isinstance(inner.whole, int) and inner.whole > 0:
            continue
        last, size = out[-1] if out else None, inner.extent
        if last and last.target == inner.target * size and last.indices == inner.indices * size:
            out[-1] = _Axis(last.extent * size, inner.target, inner.indices, last.whole * inner.whole)
        else:
            out.append(inner)
    return out


def _emit(low: Lowering, node: Node, values: dict[str, Word | Dim], data: Value, indices: Value,
          updates: Value, *, shared: bool) -> None:  # fmt: skip
    reduction = node.attrs["reduction"]
    dtype = data.tensor.dtype
    combine = _COMBINE[reduction]
    if dtype == boolean:
        combine = _LOGICAL.get(reduction, combine)
    position = [iteration(a) for a in range(len(data.shape))]
    old = low.composer().element(data, position)
    target = write_over(low, node, old, low.buffer(indices), updates, values, shared=shared, combine=combine)
    if data.shape == node.output.shape:
        low.updates(data, target)


def write_over(low: Lowering, node: Node, old: Expr, indices: int, updates: Value, values: Mapping[str, Word | Dim], *,
               shared: bool, combine: str = "replace") -> int:  # fmt: skip
    """Steps that write `old` to every element of a node's result, then updates over it; the result's array.

    indices: the array of positions. values: what the template's words hold, but for its arrays and the number of updates.
    """
    dtype, shape = node.output.tensor.dtype, node.output.shape
    update = low.buffer(updates)
    target = low.allocate(node.output)
    place = linearise([iteration(a) for a in range(len(shape))], shape)
    low.emit_writes([Write(target, dtype, place, old)], shape, node.origin, "copy")
    positions = low.buffers[indices].dtype
    assert positions is not None
    constants = {
        **(elements.moving(dtype) if combine == "replace" else elements.access(dtype)),
        "INDEX": f"ptr_{positions.name}", "SHARED": shared, "COMBINE": combine,
    }  # fmt: skip
    count = product(updates.shape)
    common.emit(
        low, node, "scatter", constants,
        {**values, "TARGET": Word(0, target), "INDICES": Word(0, indices), "UPDATES": Word(0, update), "LENGTH": count},
        None, (indices, update), 0, writes=(target,), cost=count * 2, name=node.op.name,
    )  # fmt: skip
    return target
