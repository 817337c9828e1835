"""Attention nodes onto their template: placement, operands and results in any order of axes, new shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minicc
from minicc.errors import ShapeError
from minicc.frontend.model import load_model
from minicc.ir.dims import Dim, symbol
from minicc.ir.evaluate import evaluate
from minicc.ir.graph import Graph, Value
from minicc.ir.types import TensorType, bf16, f16, f32
from minicc.lower.program import KernelStep
from minicc.options import Options
from minicc.runtime.module import CompiledModule
from minicc.targets.parse import target_of
from minicc.walk import optimise
from tests.compiling import compile_graph, host_ops
from tests.kernels.test_attention import exact
from tests.passes.models import parse, run_reference

Array = np.ndarray[Any, Any]
B, S, T = symbol("b"), symbol("s"), symbol("t")


def heads_of(graph: Graph, name: str, length: Dim, heads: int, size: int, order: str) -> Value:
    """Heads [b, heads, length, size] of a graph input that is [b, length, heads * size], or lies as they do."""
    if order == "heads":
        return graph.input(name, TensorType(f32, (B, heads, length, size)))
    x = graph.input(name, TensorType(f32, (B, length, heads * size)))
    split = graph.add("Reshape", [x, graph.symbolic_constant([B, length, heads, size])]).output
    return graph.add("Transpose", [split], {"perm": (0, 2, 1, 3)}).output


def attention(order: str, groups: int, heads: int, mask: tuple[Dim, ...] | None, causal: bool = False) -> Graph:
    """An attention whose heads are put together to [b, s, heads * size] and multiplied by weights."""
    graph = Graph()
    values = [heads_of(graph, "q", S, heads, 8, order), heads_of(graph, "k", T, groups, 8, order),
              heads_of(graph, "v", T, groups, 12, order)]  # fmt: skip
    if mask is not None:
        values.append(graph.input("mask", TensorType(f32, mask)))
    y = graph.add("Attention", values, {"scale": 0.4, "causal": causal}, domain="minicc").output
    moved = graph.add("Transpose", [y], {"perm": (0, 2, 1, 3)}).output
    joined = graph.add("Reshape", [moved, graph.symbolic_constant([B, S, heads * 12])]).output
    weights = np.random.default_rng(7).standard_normal((heads * 12, 10)).astype(np.float32)
    graph.outputs = [graph.add("MatMul", [joined, graph.constant(weights)]).output]
    return graph


def feeds_of(graph: Graph, rng: np.random.Generator, **sizes: int) -> list[Array]:
    found = []
    for value in graph.inputs:
        shape = [d if isinstance(d, int) else sizes[str(d)] for d in value.shape]
        found.append(rng.standard_normal(shape).astype(np.float32))
    return found


def templates(module: CompiledModule) -> list[str]:
    """Names of the kernels in order of their steps."""
    kernels = module.program.kernels
    return [kernels[s.kernel].name for s in module.program.steps if isinstance(s, KernelStep)]


@settings(max_examples=30, deadline=None)
@given(
    order=st.sampled_from(["rows", "heads"]), shared=st.sampled_from([(4, 4), (2, 6), (1, 3)]), causal=st.booleans(),
    mask=st.sampled_from([None, (S, T), (B, 1, 1, T), (1, 1, S, T), (symbol("m"), 1, S, T), (T,)]),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_graphs(order, shared, causal, mask, seed):
    graph = attention(order, *shared, mask, causal)
    optimise(graph, Options(check=2))
    module = compile_graph(graph)
    assert not host_ops(module)
    assert templates(module).count("attention") == 1
    assert not [name for name in templates(module) if "copy" in name or "transpose" in name]
    rng = np.random.default_rng(seed)
    compiled = module.stats()["compiles"]
    for b, s, t in ((2, 5, 9), (1, 1, 40), (3, 33, 17)):
        for m in {1, b}:
            feeds = feeds_of(graph, rng, b=b, s=s, t=t, m=m)
            np.testing.assert_allclose(module.run_items(feeds)[0], evaluate(graph, feeds)[0], rtol=1e-4, atol=1e-5)
    assert module.stats()["compiles"] == compiled


@pytest.mark.parametrize("number", [0.0, -2.5, -np.inf])
def test_a_mask_of_one_number(number):
    """Biases that were never trained are folded to one number; of -inf nothing may be attended."""
    graph = Graph()
    values = [graph.input(n, TensorType(f32, (2, 3, d, 8))) for n, d in zip("qkv", (S, T, T))]
    values.append(graph.constant(np.float32(number)))
    graph.outputs = [graph.add("Attention", values, {"scale": 0.4, "causal": False}, domain="minicc").output]
    module = compile_graph(graph)
    assert templates(module) == ["attention"]
    feeds = feeds_of(graph, np.random.default_rng(1), s=5, t=9)
    got, want = module.run_items(feeds)[0], evaluate(graph, feeds)[0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_result_read_as_it_is_keeps_its_order():
    """The transposed result is read too, and the plain one is an output: both are made."""
    graph = attention("rows", 2, 2, None)
    node = next(n for n in graph.nodes if n.op.name == "Attention")
    graph.outputs.append(node.output)
    optimise(graph, Options(check=2))
    module = compile_graph(graph)
    feeds = feeds_of(graph, np.random.default_rng(1), b=2, s=5, t=9)
    for got, want in zip(module.run_items(feeds), evaluate(graph, feeds), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_sizes_that_do_not_fit_are_refused():
    graph = Graph()
    q, k, v = (graph.input(n, TensorType(f32, (1, 2, d, 8))) for n, d in zip("qkv", (S, T, symbol("u"))))
    graph.outputs = [graph.add("Attention", [q, k, v], {"scale": 1.0}, domain="minicc").output]
    module = compile_graph(graph)
    arrays = [np.ones((1, 2, n, 8), np.float32) for n in (3, 5, 4)]
    with pytest.raises(ShapeError):
        module.run_items(arrays)


def kept(target: str, shape: tuple[Dim, ...] = (1, 2, S, 8), dtype: Any = f32) -> bool:
    """Whether attention is still whole after all passes."""
    graph = Graph()
    q = graph.input("q", TensorType(dtype, shape))
    graph.outputs = [graph.add("Attention", [q, q, q], {"scale": 1.0}, domain="minicc").output]
    optimise(graph, Options(check=1), target=target_of(target))
    return any(node.op.name == "Attention" for node in graph.nodes)


@pytest.mark.parametrize("target", ["cpu:sse", "cpu:avx2", "cpu:avx512", "cpu:neon"])
def test_where_the_template_takes_it(target):
    assert kept(target)
    assert kept(target, (B, 2, S, 256))
    assert not kept(target, dtype=f16)
    assert not kept(target, (1, 2, S, 5000))
    assert not kept(target, (1, 2, S, symbol("d")))


@pytest.mark.parametrize("target", ["cuda:sm_80", "cuda:sm_90"])
def test_where_a_gpu_takes_it(target):
    for dtype in (f32, f16, bf16):
        assert kept(target, (B, 2, S, 128), dtype)
        assert not kept(target, (1, 2, S, 129), dtype)
        assert not kept(target, (1, 2, S, symbol("d")), dtype)


@pytest.mark.parametrize("target", ["cpu:sse", "cpu:avx2", "cpu:avx512", "cpu:neon"])
def test_compiles_for_other_machines(target):
    """As com.microsoft's operator, through the whole walk."""
    node = onnx.helper.make_node("MultiHeadAttention", ["q", "k", "v"], ["y"], domain="com.microsoft", num_heads=2)
    model = parse("y = Identity(q)", "(float[b,s,16] q, float[b,t,16] k, float[b,t,16] v) => (float[b,s,16] y)")
    model.graph.node[0].CopyFrom(node)
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    module = minicc.compile(model, target=target)
    assert "attention" in str(module.explain())
    if target_of(target).missing_features():
        return
    rng = np.random.default_rng(0)
    feeds = {n: rng.standard_normal((2, 7, 16)).astype(np.float32) for n in "qkv"}
    np.testing.assert_allclose(module.run(None, feeds)[0], run_reference(model, feeds)[0], rtol=1e-4, atol=1e-5)


CAUSAL_CASES = {
    "as many keys": (("s", "s"), False, "is_causal = 1", True),
    "behind a past": (("s", "s"), True, "is_causal = 1", True),
    "a window that ends at the query": (("s", "s"), False, "right_window_size = 0", True),
    "other keys": (("s", "t"), False, "is_causal = 1", False),
    "a window on both sides": (("s", "s"), False, "is_causal = 1, left_window_size = 2", False),
}


@pytest.mark.parametrize("case", CAUSAL_CASES)
def test_causal_attention_needs_no_mask(case: str) -> None:
    """Of ONNX's Attention, where its last query attends the last key; elsewhere the window becomes a mask."""
    (queries, keys), past, attributes, whole = CAUSAL_CASES[case]
    heads = {"q": queries, "k": keys, "v": keys, **({"pk": "p", "pv": "p"} if past else {})}
    inputs = ", ".join(f"float[b,2,{length},8] {name}" for name, length in heads.items())
    body = f'y{", k2, v2" if past else ""} = Attention <{attributes}> (q, k, v{", , pk, pv" if past else ""})'
    graph = load_model(parse(body, f"({inputs}) => (float[b,2,{queries},8] y)", 26)).graph
    optimise(graph, Options(check=2))
    (node,) = [node for node in graph.nodes if node.op.name == "Attention"]
    assert node.attrs["causal"] == whole and (len(node.inputs) > 3 and node.inputs[3] is not None) == (not whole)
    rng = np.random.default_rng(4)
    feeds = {name: rng.standard_normal((3, 2, {"s": 5, "t": 7, "p": 4}[length], 8)).astype(np.float32)
             for name, length in heads.items()}  # fmt: skip
    k, v = (np.concatenate([feeds[f"p{n}"], feeds[n]], axis=2) if past else feeds[n] for n in "kv")
    ahead = np.arange(k.shape[2]) - np.arange(5)[:, None] - (4 if past else 0)
    allowed = (ahead <= 0) & (ahead >= (-2 if "left" in attributes else -99))
    want = exact(feeds["q"], k, v, np.where(allowed, 0, -np.inf), 8**-0.5, False)
    found = compile_graph(graph).run_items([feeds[value.name] for value in graph.inputs])[0]
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
