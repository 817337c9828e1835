"""GroupQueryAttention in models that take sizes and fills from their mask, as exporters write them, beside ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import minicc

HEADS, GROUPS, SIZE, LONGEST = 4, 2, 16, 32
Array = np.ndarray[Any, Any]


def model(packed: bool, past: bool, positions: bool = False, bias: bool = False, **attrs: Any) -> onnx.ModelProto:
    """Fill and total length of the cache come from the mask [batch, total]."""
    float_, int_ = TensorProto.FLOAT, TensorProto.INT64
    width = {"q": HEADS * SIZE, "k": GROUPS * SIZE, "v": GROUPS * SIZE}
    names = {"q": sum(width.values())} if packed else width
    inputs = [helper.make_tensor_value_info(n, float_, ["batch", "steps", w]) for n, w in names.items()]
    inputs.append(helper.make_tensor_value_info("mask", int_, ["batch", "total"]))
    if past:
        inputs += [helper.make_tensor_value_info(n, float_, ["batch", GROUPS, "kept", SIZE]) for n in ("past_k", "past_v")]
    if positions:
        inputs.append(helper.make_tensor_value_info("positions", int_, ["batch", "steps"]))
    if bias:
        inputs.append(helper.make_tensor_value_info("bias", float_, ["batch", 1, "steps", "total"]))
    angles = np.random.default_rng(7).uniform(0, 3, (LONGEST, SIZE // 2)).astype(np.float32)
    constants = {"axis": np.array([1], np.int64), "one": np.array(1, np.int64), "cos": np.cos(angles), "sin": np.sin(angles)}
    nodes = [
        helper.make_node("ReduceSum", ["mask", "axis"], ["count"], keepdims=0),
        helper.make_node("Sub", ["count", "one"], ["last"]),
        helper.make_node("Cast", ["last"], ["lengths"], to=TensorProto.INT32),
        helper.make_node("Shape", ["mask"], ["shape"]),
        helper.make_node("Gather", ["shape", "one"], ["width"]),
        helper.make_node("Cast", ["width"], ["length"], to=TensorProto.INT32),
        helper.make_node(
            "GroupQueryAttention",
            ["q", *(("", "") if packed else ("k", "v")), *(("past_k", "past_v") if past else ("", "")), "lengths", "length",
             "cos", "sin", "positions" if positions else "", "bias" if bias else ""],
            ["y", "present_k", "present_v"], "attention", domain="com.microsoft", num_heads=HEADS, kv_num_heads=GROUPS, **attrs,
        ),
    ]  # fmt: skip
    outputs = [helper.make_tensor_value_info(n, float_, None) for n in ("y", "present_k", "present_v")]
    initializers = [numpy_helper.from_array(a, n) for n, a in constants.items()]
    graph = helper.make_graph(nodes, "attention", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def feeds(proto: onnx.ModelProto, batch: int, steps: int, fills: list[int]) -> dict[str, Array]:
    """fills: of the cache before the step, per sequence."""
    kept, total = max(fills), max(fills) + steps
    sizes = {"batch": batch, "steps": steps, "kept": kept, "total": total}
    rng = np.random.default_rng(3)
    found = {}
    for info in proto.graph.input:
        shape = [sizes[d.dim_param] if d.dim_param else d.dim_value for d in info.type.tensor_type.shape.dim]
        found[info.name] = rng.standard_normal(shape).astype(np.float32)
    found["mask"] = (np.arange(total) < np.array(fills)[:, None] + steps).astype(np.int64)
    if "positions" in found:
        found["positions"] = np.array(fills)[:, None] + np.arange(steps)[None]
    return found


def check(proto: onnx.ModelProto, module: minicc.Module, given_feeds: dict[str, Array], fills: list[int], steps: int) -> None:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    want, got = session.run(None, given_feeds), module.run(None, given_feeds)
    np.testing.assert_allclose(got[0], want[0], rtol=0, atol=2e-5)
    for a, b in zip(got[1:], want[1:]):
        assert a.shape == b.shape
        for row, fill in enumerate(fills):  # what lies behind a sequence means nothing
            np.testing.assert_allclose(a[row, :, : fill + steps], b[row, :, : fill + steps], rtol=0, atol=1e-6)


ATTRIBUTES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rotary": {"do_rotary": 1},
    "window": {"do_rotary": 1, "rotary_interleaved": 1, "local_window_size": 3},
    "cap": {"softcap": 2.0, "scale": 0.4},
}


@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
@pytest.mark.parametrize("attrs", ATTRIBUTES.values(), ids=ATTRIBUTES)
def test_decoding(packed: bool, attrs: dict[str, Any]) -> None:
    """A prompt and single steps through one module, no node on the host."""
    proto = model(packed, True, **attrs)
    module = minicc.compile(proto, strict=True)
    for steps, fills in ((5, [0, 0]), (1, [5, 5]), (1, [6, 3]), (1, [0, 0, 0])):
        check(proto, module, feeds(proto, len(fills), steps, fills), fills, steps)
    assert module.stats()["compiles"] + module.stats()["cache_hits"] == module.stats()["kernels"]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=3), st.booleans())
def test_any_fill(fills: list[int], packed: bool) -> None:
    proto = model(packed, True, do_rotary=1)
    check(proto, minicc.compile(proto, strict=True), feeds(proto, len(fills), 1, fills), fills, 1)


def test_a_prompt_without_a_cache() -> None:
    proto = model(False, False, do_rotary=1)
    check(proto, minicc.compile(proto, strict=True), feeds(proto, 2, 4, [0, 0]), [0, 0], 4)


def test_positions_and_a_bias() -> None:
    proto = model(False, True, positions=True, bias=True, do_rotary=1)
    check(proto, minicc.compile(proto, strict=True), feeds(proto, 2, 1, [4, 4]), [4, 4], 1)


@pytest.mark.parametrize("attrs", [{"smooth_softmax": 1}, {"do_rotary": 1}, {"kv_num_heads": 3}], ids=str)
def test_what_is_not_supported_is_an_error(attrs: dict[str, Any]) -> None:
    proto = model(False, True)
    node = proto.graph.node[-1]
    if "do_rotary" in attrs:
        node.input[7] = ""
    for attribute in list(node.attribute):
        if attribute.name in attrs:
            node.attribute.remove(attribute)
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attrs.items())
    with pytest.raises(minicc.ShapeError, match="attention"):
        minicc.compile(proto)
