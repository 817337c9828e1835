"""Attention and rotary embedding: ONNX's cases of all versions, a plain formula, and ONNX Runtime for
com.microsoft.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import onnx
import pytest

from tests.ops.onnx_cases import Case, cases_of, check_call, check_case
from tests.ops.runtime_oracle import check_against_onnxruntime
from tests.ops.test_matmul import normal

MICROSOFT = "com.microsoft"
B, S, T, N, D = 2, 3, 5, 2, 16  # batch, queries, keys, heads, head size
HIDDEN = N * D
MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32)


@pytest.mark.parametrize("case", cases_of("Attention", "RotaryEmbedding"), ids=lambda c: c.name)
def test_onnx_case(case: Case) -> None:
    check_case(case)


def _formula(q: np.ndarray, k: np.ndarray, v: np.ndarray, bias: Any, scale: float) -> np.ndarray:
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out = np.zeros((*q.shape[:3], v.shape[3]))
    each = q.shape[1] // k.shape[1]
    bias = np.broadcast_to(bias, (*q.shape[:3], k.shape[2]))
    for b, h, s in np.ndindex(*q.shape[:3]):
        scores = k[b, h // each] @ q[b, h, s] * scale + bias[b, h, s]
        weights = np.zeros_like(scores) if np.all(np.isneginf(scores)) else np.exp(scores - scores.max())
        out[b, h, s] = weights @ v[b, h // each] / max(weights.sum(), 1e-30)
    return out


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, "float", "hidden row"])
def test_minicc_attention(heads: tuple[int, int], causal: bool, mask: str | None) -> None:
    q, k, v = normal(2, heads[0], S, 8), normal(2, heads[1], T, 8), normal(2, heads[1], T, 6)
    bias: Any = None if mask is None else normal(1, 1, S, T)
    if mask == "hidden row":
        bias[0, 0, 1] = -np.inf
    total = np.zeros((S, T)) if bias is None else bias
    total = np.where(np.tri(S, T, T - S, dtype=bool), total, -np.inf) if causal else total
    inputs = [q, k, v] if bias is None else [q, k, v, bias]
    expected = _formula(q, k, v, total, 0.3).astype(np.float32)
    check_call(
        "Attention",
        inputs,
        {"scale": 0.3, "causal": causal},
        [expected],
        domain="minicc",
        rtol=1e-4,
        atol=1e-5,
    )


def _older_cases() -> list[Any]:
    """Versions 23 and 24, which differ from 25 only in attributes that they lack."""
    import onnx.backend.test.case.node as node_cases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = node_cases.collect_testcases(None)
    graphs = [(c, c.model.graph.node, c.model.opset_import[0].version) for c in found]
    return [
        c
        for c, nodes, version in graphs
        if len(nodes) == 1 and nodes[0].op_type == "Attention" and version < 25
    ]


@pytest.mark.parametrize("test", _older_cases(), ids=lambda c: c.name)
def test_older_onnx_case(test: Any) -> None:
    node, (inputs, outputs) = test.model.graph.node[0], test.data_sets[0]
    given = dict(zip((v.name for v in test.model.graph.input), inputs))
    expected = dict(zip((v.name for v in test.model.graph.output), outputs))
    attrs = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    arrays = [None if name not in given else np.asarray(given[name]) for name in node.input]
    wanted = [None if name not in expected else np.asarray(expected[name]) for name in node.output]
    check_call("Attention", arrays, attrs, wanted, rtol=test.rtol, atol=test.atol)


MULTI = {
    "plain": [normal(B, S, HIDDEN), normal(B, T, HIDDEN), normal(B, T, HIDDEN)],
    "bias and mask": [
        normal(B, S, HIDDEN),
        normal(B, T, HIDDEN),
        normal(B, T, HIDDEN),
        normal(3 * HIDDEN),
        MASK,
    ],
    "lengths and scores": [
        normal(B, S, HIDDEN),
        normal(B, T, HIDDEN),
        normal(B, T, HIDDEN),
        None,
        np.array([3, 5], np.int32),
        normal(1, N, S, T),
    ],
    "cached keys": [normal(B, S, HIDDEN), normal(B, N, T, D), normal(B, N, T, D)],
}


@pytest.mark.parametrize("inputs", MULTI.values(), ids=MULTI.keys())
def test_multi_head_attention(inputs: list[Any]) -> None:
    check_against_onnxruntime(
        "MultiHeadAttention", inputs, {"num_heads": N, "scale": 0.3}, domain=MICROSOFT, rtol=1e-4
    )


@pytest.mark.parametrize("causal", [0, 1])
def test_multi_head_attention_with_past(causal: int) -> None:
    parts = [normal(B, S, HIDDEN, seed=i) for i in range(3)]
    inputs = [*parts, None, None, None, normal(B, N, 4, D), normal(B, N, 4, D, seed=1)]
    attrs = {"num_heads": N, "unidirectional": causal}
    check_against_onnxruntime("MultiHeadAttention", inputs, attrs, outputs=3, domain=MICROSOFT, rtol=1e-4)


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("mask", [None, MASK, np.array([3, 5], np.int32)], ids=["none", "raw", "lengths"])
def test_microsoft_attention(causal: int, mask: np.ndarray | None) -> None:
    inputs = [normal(B, T, 6), normal(6, 3 * HIDDEN), normal(3 * HIDDEN), mask]
    check_against_onnxruntime(
        "Attention", inputs, {"num_heads": N, "unidirectional": causal}, domain=MICROSOFT, rtol=1e-4
    )


@pytest.mark.parametrize("causal", [0, 1])
def test_microsoft_attention_with_past(causal: int) -> None:
    inputs = [normal(B, 2, 6), normal(6, 3 * HIDDEN), normal(3 * HIDDEN), MASK, normal(2, B, N, 3, D)]
    attrs = {"num_heads": N, "unidirectional": causal}
    check_against_onnxruntime("Attention", inputs, attrs, outputs=2, domain=MICROSOFT, rtol=1e-4)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("window", [-1, 2])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_group_query_attention(interleaved: int, window: int, softcap: float) -> None:
    cos, sin = normal(10, D // 2), normal(10, D // 2, seed=1)
    attrs = {
        "num_heads": 4,
        "kv_num_heads": 2,
        "do_rotary": 1,
        "rotary_interleaved": interleaved,
        "local_window_size": window,
        "softcap": softcap,
    }
    prompt = [normal(B, S, 4 * D), normal(B, S, 2 * D), normal(B, S, 2 * D, seed=1), None, None,
              np.array([S - 1, S - 1], np.int32), np.int32(S), cos, sin]  # fmt: skip
    check_against_onnxruntime(
        "GroupQueryAttention", prompt, attrs, outputs=3, domain=MICROSOFT, rtol=1e-4, atol=1e-4
    )
    step = [
        normal(B, 1, 4 * D),
        normal(B, 1, 2 * D),
        normal(B, 1, 2 * D, seed=1),
        normal(B, 2, 4, D),
        normal(B, 2, 4, D, seed=1),
        np.array([4, 3], np.int32),
        np.int32(5),
        cos,
        sin,
    ]
    check_against_onnxruntime(
        "GroupQueryAttention", step, attrs, outputs=3, domain=MICROSOFT, compared=(0,), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("interleaved", [0, 1])
def test_microsoft_rotary_embedding(interleaved: int) -> None:
    cos, sin = normal(10, D // 2), normal(10, D // 2, seed=1)
    places = np.array([[0, 3, 9], [1, 2, 4]])
    attrs = {"interleaved": interleaved}
    for positions in (np.array([1]), places):
        check_against_onnxruntime(
            "RotaryEmbedding", [normal(B, S, HIDDEN), positions, cos, sin], attrs, domain=MICROSOFT
        )
    partial = {**attrs, "rotary_embedding_dim": D, "num_heads": N}
    check_against_onnxruntime(
        "RotaryEmbedding", [normal(B, N, S, 24), places, cos, sin], partial, domain=MICROSOFT
    )
