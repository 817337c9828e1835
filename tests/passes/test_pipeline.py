"""Properties of the whole list of passes on random models: the same numbers, whichever passes run."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minicc.frontend.model import load_model
from minicc.ir.evaluate import evaluate
from minicc.ir.text import print_graph
from minicc.options import Options
from minicc.passes import default_pipeline
from minicc.passes.manager import flatten, run_passes
from tests.passes.models import run_reference
from tests.strategies import models

NAMES = [p.name for p in flatten(default_pipeline(Options()))]
MODELS = settings(max_examples=50, suppress_health_check=list(HealthCheck))
# Reassociation of float32 constants and folding into weights round differently.
TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}


def assert_close(actual: Any, expected: Any) -> None:
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected):
        assert a.dtype == e.dtype
        scale = max(float(np.abs(e).max(initial=0)), 1.0)
        np.testing.assert_allclose(a / scale, e / scale, **TOLERANCE)


@MODELS
@given(models())
def test_all_passes_preserve_the_numbers(case: tuple[onnx.ModelProto, dict[str, Any]]) -> None:
    model, feeds = case
    graph = load_model(model).graph
    run_passes(graph, default_pipeline(Options()), Options(check=2))
    assert_close(evaluate(graph, feeds), run_reference(model, feeds))


@MODELS
@given(models(), st.sets(st.sampled_from(NAMES)))
def test_any_subset_of_passes_gives_equal_numbers(
    case: tuple[onnx.ModelProto, dict[str, Any]], skip: set[str]
) -> None:
    model, feeds = case
    graph = load_model(model).graph
    expected = evaluate(graph, feeds)
    options = Options(check=1, skip=tuple(sorted(skip)))
    report = run_passes(graph, default_pipeline(options), options)
    assert not {row.name for row in report.rows} & skip
    assert_close(evaluate(graph, feeds), expected)


@MODELS
@given(models())
def test_passes_are_deterministic(case: tuple[onnx.ModelProto, dict[str, Any]]) -> None:
    model, _ = case
    texts = []
    for _ in range(2):
        graph = load_model(model).graph
        run_passes(graph, default_pipeline(Options()), Options())
        texts.append(print_graph(graph))
    assert texts[0] == texts[1]


@MODELS
@given(models(max_nodes=6), st.sampled_from((0, 1, 2)))
def test_every_level_gives_the_numbers(case: tuple[onnx.ModelProto, dict[str, Any]], level: int) -> None:
    model, feeds = case
    graph = load_model(model).graph
    expected = evaluate(graph, feeds)
    options = Options(opt_level=level)
    run_passes(graph, default_pipeline(options), options)
    assert_close(evaluate(graph, feeds), expected)
