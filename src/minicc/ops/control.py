"""Control flow: If, Loop and Scan over body graphs whose captures are explicit inputs.

Inference writes the types of a node's inputs into its bodies and infers their nodes again where they
changed, so a body always agrees with its node. A carried tensor keeps the sizes it starts with unless the
body changes them; those become symbols. `eval` gets the running `Evaluation` first and uses it to run
bodies. SequenceMap is imported as a Loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from minicc.errors import MiniccError, ResourceLimitError, ShapeError
from minicc.ir.dims import Dim, maximum, symbols_of
from minicc.ir.evaluate import Evaluation, Item
from minicc.ir.graph import Graph, Value, symbols_in
from minicc.ir.opdef import REQUIRED, Inference, Kind, OpDef, register
from minicc.ir.types import OpaqueType, TensorType, Type, boolean, i64
from minicc.ops.failure import failing_branch


def set_input_types(body: Graph, types: Sequence[Type]) -> None:
    """Give a body's inputs these types; its nodes are inferred again when any of them is new."""
    if len(types) != len(body.inputs):
        raise ShapeError(f"body {body.name!r} has {len(body.inputs)} inputs, {len(types)} are given")
    changed = False
    for value, type_ in zip(body.inputs, types):
        if value.type != type_:
            value.type, changed = type_, True
    if changed:
        for node in body.nodes:
            body.refresh(node)


def _visible(n: Inference) -> frozenset[str]:
    """Symbols that have the same meaning outside the bodies."""
    return frozenset(symbols_in(v for v in n.inputs if v is not None and isinstance(v.type, TensorType)))


def _symbols(dims: Iterable[Dim]) -> set[str]:
    return {name for dim in dims for name in symbols_of(dim)}


def _exported(n: Inference, shape: Sequence[Dim], visible: frozenset[str]) -> tuple[Dim, ...]:
    """A body's shape as seen from outside: sizes that only the body knows become fresh symbols."""
    fresh = [n.fresh("d") for _ in shape]  # always drawn, so that a later inference draws the same ones
    return tuple(dim if symbols_of(dim) <= visible else new for dim, new in zip(shape, fresh))


def _infer_if(n: Inference) -> list[Type]:
    branches: tuple[Graph, Graph] = (n.attr("then_branch"), n.attr("else_branch"))
    if not n.has(0) or n.dtype(0) != boolean:
        raise n.error("the condition must be bool")
    captures = [n.value(i).type for i in range(1, len(n.inputs))]
    branches = _fitting(n, branches, captures)
    first, second = ([v.type for v in branch.outputs] for branch in branches)
    if len(first) != len(second):
        raise n.error(f"the branches have {len(first)} and {len(second)} outputs")
    visible = _visible(n)
    return [_merge_branches(n, a, b, visible) for a, b in zip(first, second)]


def _fitting(n: Inference, branches: tuple[Graph, Graph], captures: Sequence[Type]) -> tuple[Graph, Graph]:
    """The branches for these captures. One whose types come to misfit can never be taken: it becomes an error, unless both do."""
    fitting: list[Graph] = []
    problems: list[MiniccError] = []
    for name, branch in zip(("then_branch", "else_branch"), branches):
        try:
            set_input_types(branch, captures)
            fitting.append(branch)
        except MiniccError as error:
            problems.append(error)
            fitting.append(failing_branch(branch, branch.outputs, error.what))
            set_input_types(fitting[-1], captures)
            n.attrs[name] = fitting[-1]  # type: ignore[index]
    if len(problems) == len(fitting):
        raise problems[0]
    return fitting[0], fitting[1]


def _merge_branches(n: Inference, a: Type, b: Type, visible: frozenset[str]) -> Type:
    """The type that covers both branches."""
    if isinstance(a, OpaqueType) or isinstance(b, OpaqueType):
        if a != b:
            raise n.error(f"the branches give {a} and {b}")
        return a
    if a.dtype != b.dtype:
        raise n.error(f"the branches give {a} and {b}")
    if a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
        return TensorType(a.dtype, None)
    outside = _exported(n, a.shape, visible)
    fresh = [n.fresh("d") for _ in a.shape]
    dims = [o if x == y else new for o, x, y, new in zip(outside, a.shape, b.shape, fresh)]
    return TensorType(a.dtype, tuple(dims))


def _one(item: Item) -> Any:
    """The number in an array of one element, of any rank."""
    array = np.asarray(item)
    if array.size != 1:
        raise ShapeError(f"a condition or trip count must have one element, it has shape {array.shape}")
    return array.reshape(-1)[0]


def _eval_if(
    run: Evaluation, cond: Item, *captures: Item, then_branch: Graph, else_branch: Graph
) -> tuple[Item, ...]:
    return tuple(run(then_branch if _one(cond) else else_branch, list(captures)))


register(
    OpDef(
        "If",
        Kind.CONTROL,
        _infer_if,
        _eval_if,
        attrs={"then_branch": REQUIRED, "else_branch": REQUIRED},
    )
)


def _carried_types(
    n: Inference,
    body: Graph,
    first: int,
    offset: int,
    count: int,
    fixed: Sequence[Type],
    last: Sequence[Type],
    returned: int,
) -> list[Type]:
    """Types of the carried body inputs that hold in every iteration.

    Node inputs `first..first+count` start body inputs `offset..offset+count`, and body outputs `returned..`
    feed them back. Starts from the initial types and gives up each size that the body changes, until none
    does (a fixpoint, as each size is given up once).
    """
    initial = [n.value(first + k).type for k in range(count)]
    given_up = [
        [n.fresh("carried") for _ in (t.shape or ())] if isinstance(t, TensorType) else [] for t in initial
    ]
    current = [_start(t, body.inputs[offset + k].type, given_up[k]) for k, t in enumerate(initial)]
    while True:
        set_input_types(body, [*fixed, *current, *last])
        changed = False
        for k, type_ in enumerate(current):
            wider = _widen(n, type_, body.outputs[returned + k].type, given_up[k], k)
            if wider != type_:
                current[k], changed = wider, True
        if not changed:
            return current


def _start(initial: Type, before: Type, given_up: Sequence[Dim]) -> Type:
    """The initial type, without the sizes that an earlier inference has given up already."""
    if not isinstance(initial, TensorType) or not isinstance(before, TensorType) or initial.shape is None:
        return initial
    if before.shape is None:
        return before.with_dtype(initial.dtype)
    if len(before.shape) != len(initial.shape):
        return initial
    return initial.with_shape(
        new if old == new else dim for dim, old, new in zip(initial.shape, before.shape, given_up)
    )


def _widen(n: Inference, carried: Type, returned: Type, given_up: Sequence[Dim], k: int) -> Type:
    if isinstance(carried, OpaqueType) or isinstance(returned, OpaqueType):
        if isinstance(carried, OpaqueType) and isinstance(returned, OpaqueType):
            return carried
        raise n.error(f"carried value {k} starts as {carried} and becomes {returned}")
    if carried.dtype != returned.dtype:
        raise n.error(f"carried value {k} starts as {carried} and becomes {returned}")
    if carried.shape is None or returned.shape is None or len(carried.shape) != len(returned.shape):
        return carried.with_shape(None)
    dims = [
        dim if dim in (after, new) else new
        for dim, after, new in zip(carried.shape, returned.shape, given_up)
    ]
    return carried.with_shape(dims)


def _final_types(n: Inference, carried: Sequence[Type], visible: frozenset[str]) -> list[Type]:
    return [
        t.with_shape(_exported(n, t.shape, visible))
        if isinstance(t, TensorType) and t.shape is not None
        else t
        for t in carried
    ]


def _scan_output(n: Inference, type_: Type, trips: Dim, axis: int, visible: frozenset[str]) -> Type:
    if not isinstance(type_, TensorType):
        raise n.error(f"a scan output must be a tensor, got {type_}")
    if type_.shape is None:
        return type_
    dims = list(_exported(n, type_.shape, visible))
    dims.insert(n.axis(axis, len(dims) + 1), trips)
    return type_.with_shape(dims)


def _infer_loop(n: Inference) -> list[Type]:
    body: Graph = n.attr("body")
    count = int(n.attr("n_carried"))
    if len(body.inputs) < 2 + count or len(body.outputs) < 1 + count:
        raise n.error(
            f"the body has {len(body.inputs)} inputs and {len(body.outputs)} outputs, "
            f"{count} values are carried"
        )
    head = [body.inputs[0].type, body.inputs[1].type]  # the import chooses rank 0 or 1
    captures = [n.value(i).type for i in range(2 + count, len(n.inputs))]
    carried = _carried_types(n, body, 2, 2, count, head, captures, 1)
    visible = _visible(n)
    unknown = n.fresh("trips")
    trips = _trip_count(n, body)
    finals = _final_types(n, carried, visible)
    scans = [
        _scan_output(n, v.type, unknown if trips is None else trips, 0, visible)
        for v in body.outputs[1 + count :]
    ]
    return [*finals, *scans]


def _trip_count(n: Inference, body: Graph) -> Dim | None:
    """The number of iterations, when nothing but M decides it."""
    if not n.has(0) or not runs_on(body):
        return None
    trips = n.content(0)
    if trips is None or trips.size != 1:
        return None
    if n.has(1):
        start = n.content(1)
        if (
            start is None
            or start.size != 1
            or (start.reshape(-1)[0] is not True and start.reshape(-1)[0] != 1)
        ):
            return None
    return maximum(trips.reshape(-1)[0], 0)


def runs_on(body: Graph) -> bool:
    """True when a Loop body returns the condition it got, or a constant true."""
    value: Value = body.outputs[0]
    while value.producer is not None and value.producer.op.name == "Identity":
        source = value.producer.inputs[0]
        if source is None:
            return False
        value = source
    return value is body.inputs[1] or (
        value.data is not None and value.data.size == 1 and bool(value.data.all())
    )


def _like(item: Any, value: Value) -> Item:
    """A number as an array of the element type and rank (0 or 1) of a body input."""
    type_ = value.tensor
    return np.full((1,) * len(type_.shape or ()), item, dtype=type_.dtype.numpy)


def _eval_loop(
    run: Evaluation, trips: Item, cond: Item, *rest: Item, body: Graph, n_carried: int
) -> tuple[Item, ...]:
    carried, captures = list(rest[:n_carried]), list(rest[n_carried:])
    limit = None if trips is None else int(_one(trips))
    going = True if cond is None else bool(_one(cond))
    if going and limit is not None and limit > run.max_loop_iterations and runs_on(body):
        raise _too_many(run, limit)
    collected: list[list[Item]] = [[] for _ in body.outputs[1 + n_carried :]]
    step = total = 0
    while going and (limit is None or step < limit):
        if step >= run.max_loop_iterations:
            raise _too_many(run, step)
        head = [_like(step, body.inputs[0]), _like(going, body.inputs[1])]
        results = run(body, [*head, *carried, *captures])
        going = bool(_one(results[0]))
        carried = results[1 : 1 + n_carried]
        for items, item in zip(collected, results[1 + n_carried :]):
            items.append(item)
            total += item.nbytes
        if total > run.max_bytes:
            raise ResourceLimitError(
                f"the outputs of a loop exceed max_bytes={run.max_bytes}", why=f"after {step} iterations"
            )
        step += 1
    scans = [_stack(items, value, 0, run) for items, value in zip(collected, body.outputs[1 + n_carried :])]
    return (*carried, *scans)


def _too_many(run: Evaluation, count: int) -> ResourceLimitError:
    return ResourceLimitError(
        f"a loop runs {count} iterations or more",
        hint="raise max_loop_iterations",
        why=f"the limit is max_loop_iterations={run.max_loop_iterations}",
    )


def _stack(items: Sequence[Item], value: Value, axis: int, run: Evaluation) -> Item:
    if items:
        return np.stack(items, axis=axis)
    dims = [d if isinstance(d, int) else run.sizes.get(str(d), 0) for d in value.tensor.shape or ()]
    dims.insert(axis if axis >= 0 else axis + len(dims) + 1, 0)
    return np.zeros(dims, value.tensor.dtype.numpy)


register(
    OpDef("Loop", Kind.CONTROL, _infer_loop, _eval_loop, attrs={"body": REQUIRED, "n_carried": REQUIRED})
)


def _axes(given: Sequence[int] | None, count: int) -> list[int]:
    return list(given) if given else [0] * count


def _infer_scan(n: Inference) -> list[Type]:
    body: Graph = n.attr("body")
    states, scanned = int(n.attr("n_state")), int(n.attr("num_scan_inputs"))
    if (
        scanned < 1
        or len(n.inputs) < states + scanned
        or len(body.inputs) < states + scanned
        or len(body.outputs) < states
    ):
        raise n.error(f"{states} states and {scanned} scanned inputs do not fit the body")
    elements: list[Type] = []
    trips: Dim | None = None
    for k, axis in enumerate(_axes(n.attr("scan_input_axes"), scanned)):
        type_ = n.type(states + k)
        if type_.shape is None:
            elements.append(type_)
            continue
        place = n.axis(axis, len(type_.shape))
        size = type_.shape[place]
        if isinstance(trips, int) and isinstance(size, int) and trips != size:
            raise n.error(f"scanned inputs have {trips} and {size} elements")
        trips = size if trips is None or isinstance(size, int) else trips
        elements.append(type_.with_shape(d for a, d in enumerate(type_.shape) if a != place))
    captures = [n.value(i).type for i in range(states + scanned, len(n.inputs))]
    carried = _carried_types(n, body, 0, 0, states, [], [*elements, *captures], 0)
    visible = _visible(n)
    unknown = n.fresh("trips")
    outputs = body.outputs[states:]
    axes = _axes(n.attr("scan_output_axes"), len(outputs))
    finals = _final_types(n, carried, visible)
    return [
        *finals,
        *(
            _scan_output(n, v.type, unknown if trips is None else trips, axis, visible)
            for v, axis in zip(outputs, axes)
        ),
    ]


def _eval_scan(
    run: Evaluation,
    *arrays: Item,
    body: Graph,
    n_state: int,
    num_scan_inputs: int,
    scan_input_axes: Sequence[int] | None,
    scan_input_directions: Sequence[int] | None,
    scan_output_axes: Sequence[int] | None,
    scan_output_directions: Sequence[int] | None,
) -> tuple[Item, ...]:
    states = list(arrays[:n_state])
    scanned = arrays[n_state : n_state + num_scan_inputs]
    captures = list(arrays[n_state + num_scan_inputs :])
    moved = [
        np.moveaxis(a, axis, 0)[:: -1 if backwards else 1]
        for a, axis, backwards in zip(
            scanned, _axes(scan_input_axes, len(scanned)), _axes(scan_input_directions, len(scanned))
        )
    ]
    trips = {len(a) for a in moved}
    if len(trips) != 1:
        raise ShapeError(f"scanned inputs have different lengths {sorted(trips)}")
    outputs = body.outputs[n_state:]
    collected: list[list[Item]] = [[] for _ in outputs]
    for step in range(trips.pop()):
        if step >= run.max_loop_iterations:
            raise _too_many(run, step)
        results = run(body, [*states, *(a[step, ...] for a in moved), *captures])
        states = results[:n_state]
        for items, item in zip(collected, results[n_state:]):
            items.append(item)
    directions = _axes(scan_output_directions, len(outputs))
    axes = _axes(scan_output_axes, len(outputs))
    return (
        *states,
        *(
            _stack(items[:: -1 if backwards else 1], value, axis, run)
            for items, value, axis, backwards in zip(collected, outputs, axes, directions)
        ),
    )


register(
    OpDef(
        "Scan",
        Kind.CONTROL,
        _infer_scan,
        _eval_scan,
        attrs={
            "body": REQUIRED,
            "n_state": REQUIRED,
            "num_scan_inputs": REQUIRED,
            "scan_input_axes": None,
            "scan_input_directions": None,
            "scan_output_axes": None,
            "scan_output_directions": None,
        },
    )
)

# Types of the first two inputs of a Loop body.
ITERATION, CONDITION = TensorType(i64, ()), TensorType(boolean, ())
