"""Graphs compiled for CUDA, on the PTX interpreter, against their evaluation in numpy: ops in company, random graphs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

pytest.importorskip("numba.cuda.compiler", reason="numba-cuda is not installed (extra cuda)")

from minicc.ir.evaluate import evaluate
from minicc.ir.graph import Graph
from minicc.lower.templates import is_anchor
from minicc.options import Options
from minicc.passes import default_pipeline
from minicc.passes.fuse import fuse
from minicc.passes.manager import PassContext, run_passes
from tests.compiling import Array, host_ops
from tests.cuda.modules import compile_graph, pretended
from tests.lower.test_lower import assert_close, batches, in_company, name_of, one_of_each
from tests.ops.onnx_cases import Case
from tests.random_graphs import random_graph


def check(graph: Graph, rounds: Sequence[Sequence[Array]], wanted: Sequence[Sequence[Array]], names: Sequence[str]) -> None:
    module = compile_graph(graph)
    assert not host_ops(module)
    with pretended(module):
        for feeds, want in zip(rounds, wanted, strict=True):
            for got, right, name in zip(module.run_items(feeds), want, names, strict=True):
                assert_close(got, right, name)


@pytest.mark.parametrize("seed", [*range(2), *(pytest.param(s, marks=pytest.mark.slow) for s in range(2, 40))])
def test_random_graphs(seed: int) -> None:
    """All passes, lowering, kernels and the runtime on a random graph."""
    graph, rounds = random_graph(seed, 8)
    wanted = [evaluate(graph, feeds) for feeds in rounds]
    options = Options.from_env()
    run_passes(graph, default_pipeline(options), options, (), PassContext(options, is_anchor=is_anchor))
    check(graph, rounds, wanted, [f"output {i} of graph {seed}" for i in range(len(graph.outputs))])


@pytest.mark.slow
@pytest.mark.parametrize("batch", batches(one_of_each()), ids=name_of)
def test_ops_in_company(batch: list[Case]) -> None:
    """One case of each op behind views and computed inputs and before a further op."""
    graph = Graph("company")
    feeds: list[Array] = []
    names: list[str] = []
    for number, case in enumerate(batch):
        fed, outputs = in_company(graph, case, number % 2 == 0)
        feeds += fed
        graph.outputs += outputs
        names += [case.name] * len(outputs)
    want = evaluate(graph, feeds)
    fuse(graph, is_anchor)
    check(graph, [feeds], [want], names)
