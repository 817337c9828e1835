"""The pass manager: order, switches, checks, report."""

from __future__ import annotations

import numpy as np
import pytest

from minicc.errors import InputError, VerifyError
from minicc.ir.graph import Graph
from minicc.ir.types import TensorType, f32
from minicc.options import Options
from minicc.passes import default_pipeline
from minicc.passes.manager import Pass, PassContext, Repeat, difference, flatten, run_passes
from tests.passes.models import graph_of

SIGNATURE = "(float[2,3] x) => (float[2,3] y)"


def sample() -> Graph:
    return graph_of("t = Relu(x) y = Neg(t)", SIGNATURE)


def nothing(graph: Graph, context: PassContext) -> int:
    return 0


def add_node(graph: Graph, context: PassContext) -> int:
    """Puts an Identity behind the first node: honest, and the same numbers."""
    first = graph.nodes[0].output
    readers = [(n, p) for n, p in first.uses]
    new = graph.add("Identity", [first]).output
    for node, position in readers:
        graph.set_input(node, position, new)
    return 1


def break_type(graph: Graph, context: PassContext) -> int:
    graph.nodes[0].output.type = TensorType(f32, (7,))
    return 1


def change_numbers(graph: Graph, context: PassContext) -> int:
    wrong = graph.add("Abs", [graph.inputs[0]]).output
    graph.replace(graph.outputs[0], wrong)
    return 1


def silent(graph: Graph, context: PassContext) -> int:
    add_node(graph, context)
    return 0


def test_passes_run_in_order_and_are_reported() -> None:
    seen: list[str] = []
    passes = [Pass("one", nothing), Pass("two", add_node), Pass("three", nothing)]
    report = run_passes(
        sample(), passes, Options(), [lambda name, graph: seen.append(f"{name} {len(graph.nodes)}")]
    )
    assert seen == ["one 2", "two 3", "three 3"]
    assert [(r.name, r.changes, r.nodes_before, r.nodes_after) for r in report.rows] == [
        ("one", 0, 2, 2), ("two", 1, 2, 3), ("three", 0, 3, 3),
    ]  # fmt: skip
    lines = str(report).splitlines()
    assert lines[0].split() == ["pass", "runs", "changes", "nodes", "ms", "rules", "fired"]
    assert lines[2].split()[:3] == ["two", "1", "1"]


def test_skipped_and_stopped_passes_do_not_run() -> None:
    passes = [Pass("one", nothing), Pass("two", add_node), Pass("three", nothing)]
    report = run_passes(sample(), passes, Options(skip=("two",)))
    assert [r.name for r in report.rows] == ["one", "three"]
    report = run_passes(sample(), passes, Options(stop_after="two"))
    assert [r.name for r in report.rows] == ["one", "two"] and report.stopped_after == "two"


@pytest.mark.parametrize("options", [Options(skip=("twoo",)), Options(stop_after="twoo")])
def test_unknown_names_are_errors_with_a_suggestion(options: Options) -> None:
    with pytest.raises(InputError, match="did you mean 'two'"):
        run_passes(sample(), [Pass("one", nothing), Pass("two", nothing)], options)


def test_repeat_stops_when_nothing_changes() -> None:
    left = [3]

    def countdown(graph: Graph, context: PassContext) -> int:
        if left[0] == 0:
            return 0
        left[0] -= 1
        return add_node(graph, context)

    report = run_passes(sample(), [Repeat((Pass("countdown", countdown), Pass("idle", nothing)))], Options())
    assert [(r.name, r.runs) for r in report.rows] == [("countdown", 4), ("idle", 4)]


def test_repeat_that_never_ends_is_an_error() -> None:
    with pytest.raises(VerifyError, match="still change the graph"):
        run_passes(sample(), [Repeat((Pass("grow", add_node),))], Options())


def test_a_broken_graph_names_the_pass() -> None:
    with pytest.raises(VerifyError, match="'breaks'"):
        run_passes(sample(), [Pass("fine", nothing), Pass("breaks", break_type)], Options(check=1))
    run_passes(sample(), [Pass("breaks", break_type)], Options(check=0))


def test_changed_numbers_name_the_pass() -> None:
    run_passes(sample(), [Pass("wrong", change_numbers)], Options(check=1))
    with pytest.raises(VerifyError, match="'wrong' changed the numbers of output 'y'"):
        run_passes(sample(), [Pass("wrong", change_numbers)], Options(check=2))


def test_a_pass_must_say_that_it_changed_something() -> None:
    with pytest.raises(VerifyError, match="did not say so"):
        run_passes(sample(), [Pass("silent", silent)], Options(check=2))


def test_the_environment_can_switch_passes_off() -> None:
    names = [p.name for p in flatten(default_pipeline(Options()))]
    options = Options.from_env({"MINICC_SKIP": ",".join(names)})
    graph = sample()
    assert run_passes(graph, default_pipeline(options), options).rows == ()
    assert len(graph.nodes) == 2


@pytest.mark.parametrize(
    ("expected", "actual", "word"),
    [
        (np.zeros(2, np.float32), np.zeros(3, np.float32), "expected float32[2]"),
        (np.zeros(2, np.float32), np.zeros(2, np.float64), "expected float32[2]"),
        (np.zeros(2, np.float32), np.array([0, np.nan], np.float32), "NaN"),
        (np.zeros(2, np.float32), np.array([0, np.inf], np.float32), "infinity"),
        (np.array([1, np.inf], np.float32), np.array([1, -np.inf], np.float32), "infinity"),
        (np.ones(2, np.float32), np.array([1, 1.01], np.float32), "largest difference"),
        (np.ones(2, np.int64), np.array([1, 2]), "1 of 2 elements"),
        (np.ones(2, np.float32), np.array([1, 1.0001], np.float32), ""),
        (np.array([np.nan, np.inf]), np.array([np.nan, np.inf]), ""),
    ],
)
def test_differences_are_described(expected: np.ndarray, actual: np.ndarray, word: str) -> None:  # type: ignore[type-arg]
    found = difference(expected, actual)
    assert (word in found) if word else found == ""
