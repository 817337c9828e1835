"""Helpers of the pass tests: models in ONNX text, ONNX Runtime as the oracle, one pass at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime

import minicc.ops  # noqa: F401  registers the ops
from minicc.frontend.model import load_model
from minicc.ir.evaluate import evaluate
from minicc.ir.graph import Graph, Node
from minicc.options import Options
from minicc.passes.manager import Pass, PassContext, Report, difference, random_feeds, run_passes

Array = np.ndarray[Any, Any]


def parse(body: str, signature: str, opset: int = 21) -> onnx.ModelProto:
    """A model from ONNX text: the nodes in braces and the signature such as `(float[2,3] x) => (float[2,3]
    y)`.
    """
    text = f'<ir_version: 10, opset_import: ["" : {opset}]>\nmain {signature} {{\n{body}\n}}'
    return onnx.parser.parse_model(text)


def graph_of(body: str, signature: str, opset: int = 21) -> Graph:
    """The imported graph of a model in ONNX text."""
    return load_model(parse(body, signature, opset)).graph


def run_reference(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> list[Array]:
    """What ONNX Runtime gives, without its optimisations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, dict(feeds)))


def apply(
    graph: Graph, *passes: Pass, context: PassContext | None = None, feeds: Sequence[Any] | None = None
) -> Report:
    """Run passes with every check on, and compare the numbers before and after on random inputs."""
    feeds = random_feeds(graph) if feeds is None else feeds
    assert feeds is not None
    names = [v.name for v in graph.outputs]
    expected = evaluate(graph, feeds)
    report = run_passes(graph, passes, Options(check=2), context=context)
    assert [v.name for v in graph.outputs] == names
    for before, after in zip(expected, evaluate(graph, feeds)):
        assert difference(before, after) == ""
    return report


def walk(graph: Graph) -> Iterator[Node]:
    """All nodes, also those in bodies."""
    for node in graph.nodes:
        yield node
        for body in node.attrs.values():
            if isinstance(body, Graph):
                yield from walk(body)


def ops(graph: Graph) -> dict[str, int]:
    """How many nodes of each op there are, bodies included."""
    return dict(Counter(node.op.name for node in walk(graph)))
