"""Running passes: the loop around them, its checks and its report.

For each pass, always in this order: skip if switched off, run, tidy, verify, statistics, observers, and, when
asked, a comparison of numbers with the graph as it came in. What the passes do is theirs; the list of passes
is in `__init__`.
"""

from __future__ import annotations

import difflib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minicc.errors import InputError, MiniccError, VerifyError
from minicc.ir.dims import evaluate as evaluate_dim
from minicc.ir.dims import symbols_of
from minicc.ir.evaluate import evaluate
from minicc.ir.graph import Graph, Node
from minicc.ir.rewrite import Rewrites
from minicc.ir.samples import random_array
from minicc.ir.text import print_graph
from minicc.ir.types import OpaqueType
from minicc.ir.verify import Stage, verify
from minicc.options import Options
from minicc.report import PassRow

MAX_ROUNDS = 20
CHECK_SIZE = 3  # what symbols are bound to when numbers are compared
CHECK_BYTES = 1 << 30
RELATIVE_TOLERANCE = 2e-3
HALF_TOLERANCE = 0.05  # where values are rounded to 16 bits on the way


def no_template(_: Node) -> bool:
    """A target without templates."""
    return False


def no_pair(_region: Sequence[Node], _node: Node) -> str:
    """A target that computes no two convolutions at once."""
    return "the target has no kernel for both"


@dataclass
class PassContext:
    """What passes know besides the graph, and where they leave their counts.

    keep:          whether the target computes a node of an EXPAND op whole.
    is_anchor:     whether a node has a template that takes an epilogue.
    refuse_pair:   why a region that ends in the input of another anchor is not computed together with it; "" when it is.
    channels_last: whether the target's convolutions want layout "NHWC".
    zero_points:   whether the target's integer products take zero points.
    resize_by_axis: whether the target gains when an interpolation is done axis by axis.
    row:           elements of a template's row below which its epilogue is computed one by one; 0 where that never matters.
    widen:         whether models of 16-bit floats are computed in float32.
    symbols:       sizes known outside the graph at hand (set while bodies are visited).
    """

    options: Options = field(default_factory=Options)
    keep: Callable[[Node], bool] = no_template
    is_anchor: Callable[[Node], bool] = no_template
    refuse_pair: Callable[[Sequence[Node], Node], str] = no_pair
    channels_last: bool = True
    zero_points: bool = True
    resize_by_axis: bool = True
    row: int = 0
    widen: bool = True
    symbols: frozenset[str] = frozenset()
    rules: Counter[str] = field(default_factory=Counter)
    refusals: Counter[tuple[str, str]] = field(default_factory=Counter)

    def record(self, found: Rewrites) -> int:
        """Take over the counts of a rewriting; returns its number of changes."""
        self.rules.update(found.applied)
        self.refusals.update(found.refused)
        return found.changes


@dataclass(frozen=True)
class Pass:
    """One pass: `run(graph, context)` returns its number of changes; `stage` is what holds after it.

    rounds: it changes the numbers on purpose, so that later passes are compared with the numbers it left.
    """

    name: str
    run: Callable[[Graph, PassContext], int]
    stage: Stage = Stage.IMPORTED
    rounds: bool = False


@dataclass(frozen=True)
class Repeat:
    """Passes run in turn until none changes anything."""

    passes: tuple[Pass, ...]


Pipeline = Sequence[Pass | Repeat]
Observer = Callable[[str, Graph], None]


@dataclass(frozen=True)
class Report:
    """The rows of a run in pipeline order; `str` gives a table."""

    rows: tuple[PassRow, ...]
    stopped_after: str = ""

    def __str__(self) -> str:
        lines = [f"{'pass':<22}{'runs':>5}{'changes':>9}{'nodes':>14}{'ms':>9}  rules fired"]
        for row in self.rows:
            fired = ", ".join(
                f"{name} {times}" for name, times in sorted(row.rules.items(), key=lambda r: (-r[1], r[0]))
            )
            nodes = f"{row.nodes_before} -> {row.nodes_after}"
            lines.append(
                f"{row.name:<22}{row.runs:>5}{row.changes:>9}{nodes:>14}{row.milliseconds:>9.1f}"
                f"  {fired}".rstrip()
            )
        return "\n".join(lines)


def flatten(pipeline: Pipeline) -> list[Pass]:
    """All passes of a pipeline, each name once, in order."""
    passes = [p for item in pipeline for p in (item.passes if isinstance(item, Repeat) else (item,))]
    return list({p.name: p for p in passes}.values())


def run_passes(graph: Graph, pipeline: Pipeline, options: Options | None = None,
               observers: Sequence[Observer] = (), context: PassContext | None = None) -> Report:  # fmt: skip
    """Run a pipeline on a graph in place and report.

    observers: called with (pass name, graph) after every run. Raises VerifyError when a pass breaks the
    graph, and InputError for an unknown name in options.skip or options.stop_after.
    """
    if context is None:
        context = PassContext(options or Options())
    options = options or context.options
    _check_names(pipeline, options)
    run = PassRun(graph, options, context, tuple(observers))
    stopped = ""
    for item in pipeline:
        stopped = run.repeat(item) if isinstance(item, Repeat) else run.once(item)[1]
        if stopped:
            break
    return Report(tuple(run.rows()), stopped)


def _check_names(pipeline: Pipeline, options: Options) -> None:
    names = [p.name for p in flatten(pipeline)]
    for wanted in (*options.skip, *filter(None, [options.stop_after])):
        if wanted not in names:
            close = difflib.get_close_matches(wanted, names, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise InputError(f"there is no pass {wanted!r}", hint=f"{hint}the passes are {', '.join(names)}")


class PassRun:
    """The state of one `run_passes`: statistics by pass, and the reference numbers when they are compared."""

    def __init__(
        self, graph: Graph, options: Options, context: PassContext, observers: tuple[Observer, ...]
    ) -> None:
        self.graph, self.options, self.context, self.observers = graph, options, context, observers
        self.statistics: dict[str, list[PassRow]] = {}
        self.stage, self.reachable = Stage.IMPORTED, max(Stage)
        self.reference: Reference | None = None
        graph.tidy()
        if options.check >= 1:
            verify(graph, pass_name="import")
        if options.check == 2:
            self.reference = Reference.of(graph, options)

    def repeat(self, item: Repeat) -> str:
        """Run passes in turn until a whole round changes nothing. Raises VerifyError when that never is."""
        for _ in range(MAX_ROUNDS):
            total = 0
            for one in item.passes:
                changes, stopped = self.once(one)
                if stopped:
                    return stopped
                total += changes
            if total == 0:
                return ""
        firing = {
            row.name: dict(row.rules) for one in item.passes for row in self.statistics.get(one.name, [])[-1:]
        }
        raise VerifyError(f"passes still change the graph after {MAX_ROUNDS} rounds", why=str(firing))

    def once(self, one: Pass) -> tuple[int, str]:
        """Run one pass; returns its changes, and its name when the pipeline must stop here."""
        stop = one.name if one.name == self.options.stop_after else ""
        if one.name in self.options.skip:
            if one.stage > Stage.IMPORTED:  # what the pass would have established does not hold
                self.reachable = min(self.reachable, Stage(one.stage - 1))
            return 0, stop
        before, graph, context = len(self.graph.nodes), self.graph, self.context
        text = print_graph(graph) if self.options.check == 2 else ""
        context.rules, context.refusals = Counter(), Counter()
        started = time.perf_counter()
        changes = one.run(graph, context)
        removed = graph.tidy()
        elapsed = (time.perf_counter() - started) * 1e3
        self.stage = min(max(self.stage, one.stage), self.reachable)
        if self.options.check >= 1 and (changes or removed):
            verify(graph, self.stage, pass_name=one.name, keep=context.keep)
        refusals = {f"{name}: {reason}": times for (name, reason), times in context.refusals.items()}
        row = PassRow(one.name, 1, changes, before, len(graph.nodes), elapsed, dict(context.rules), refusals)
        self.statistics.setdefault(one.name, []).append(row)
        for observer in self.observers:
            observer(one.name, graph)
        if self.options.check == 2:
            if changes == 0 and print_graph(graph) != text:
                raise VerifyError(f"pass {one.name!r} changed the graph and did not say so")
            if changes and one.rounds:
                self.reference = Reference.of(graph, self.options, HALF_TOLERANCE)
            elif changes and self.reference is not None:
                self.reference.compare(graph, one.name)
        return changes, stop

    def rows(self) -> Iterator[PassRow]:
        """One row for each pass, its runs added up."""
        for name, runs in self.statistics.items():
            rules: Counter[str] = Counter()
            refusals: Counter[str] = Counter()
            for row in runs:
                rules.update(row.rules)
                refusals.update(row.refusals)
            changes, milliseconds = sum(r.changes for r in runs), sum(r.milliseconds for r in runs)
            before, after = runs[0].nodes_before, runs[-1].nodes_after
            yield PassRow(name, len(runs), changes, before, after, milliseconds, dict(rules), dict(refusals))


# -- comparing numbers


@dataclass(frozen=True)
class Reference:
    """Random inputs and the outputs they gave before the first pass."""

    feeds: list[Any]
    outputs: list[Any]
    max_bytes: int
    tolerance: float

    @classmethod
    def of(cls, graph: Graph, options: Options, tolerance: float = RELATIVE_TOLERANCE) -> Reference | None:
        """None when random numbers do not make sense to the model (it reads out of range, or divides by a
        size).
        """
        feeds = random_feeds(graph)
        limit = min(options.max_bytes, CHECK_BYTES)
        if feeds is None or has_random_nodes(graph):
            return None
        try:
            return cls(feeds, evaluate(graph, feeds, max_bytes=limit), limit, tolerance)
        except MiniccError:
            return None

    def compare(self, graph: Graph, pass_name: str) -> None:
        """Raise VerifyError when the graph's outputs differ from the reference."""
        try:
            outputs = evaluate(graph, self.feeds, max_bytes=self.max_bytes)
        except MiniccError as error:
            raise VerifyError(
                f"pass {pass_name!r} made a graph that cannot be evaluated", why=str(error)
            ) from error
        for value, expected, actual in zip(graph.outputs, self.outputs, outputs):
            why = difference(expected, actual, self.tolerance)
            if why:
                raise VerifyError(f"pass {pass_name!r} changed the numbers of output {value.name!r}", why=why)


def has_random_nodes(graph: Graph) -> bool:
    """Whether some op, also in a body, draws random numbers."""
    return any(
        not node.op.deterministic
        or any(isinstance(b, Graph) and has_random_nodes(b) for b in node.attrs.values())
        for node in graph.nodes
    )


def random_feeds(graph: Graph, seed: int = 0, size: int = CHECK_SIZE) -> list[Any] | None:
    """Arrays for the graph's inputs, symbols bound to `size`; None when an input's rank is not known.

    Floats are normal numbers, integers are 0 or 1 (most integer inputs are indices).
    """
    rng = np.random.default_rng(seed)
    feeds: list[Any] = []
    for value in graph.inputs:
        if isinstance(value.type, OpaqueType) or value.type.shape is None:
            return None
        names = {name for d in value.type.shape for name in symbols_of(d)}
        shape = [max(evaluate_dim(d, dict.fromkeys(names, size)), 0) for d in value.type.shape]
        feeds.append(random_array(rng, value.type, shape))
    return feeds


def difference(expected: Any, actual: Any, tolerance: float = RELATIVE_TOLERANCE) -> str:
    """How two outputs differ beyond rounding; empty when they agree."""
    if not isinstance(expected, np.ndarray) or not isinstance(actual, np.ndarray):
        return "" if isinstance(actual, type(expected)) else f"expected {type(expected)}, got {type(actual)}"
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return f"expected {expected.dtype}{list(expected.shape)}, got {actual.dtype}{list(actual.shape)}"
    if expected.dtype.kind in "OSUbiu" or not expected.size:
        wrong = int(np.sum(expected != actual))
        return f"{wrong} of {expected.size} elements differ" if wrong else ""
    a, b = expected.astype(np.complex128), actual.astype(np.complex128)
    if not np.array_equal(np.isnan(a), np.isnan(b)):
        return "NaN appeared or disappeared"
    finite = np.isfinite(a) & np.isfinite(b)
    if not np.array_equal(a[~finite & ~np.isnan(a)], b[~finite & ~np.isnan(a)]):
        return "an infinity appeared or disappeared"
    if not finite.any():
        return ""
    tolerance = tolerance if expected.dtype.itemsize > 2 else HALF_TOLERANCE
    error = np.abs(a - b)[finite].max() / max(float(np.abs(a[finite]).max()), 1e-3)
    return f"the largest difference is {error:.3g} of the largest element" if error > tolerance else ""
