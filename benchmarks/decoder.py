"""A decoder with weights of 4 bits as exporters for language models write it, beside ONNX Runtime.

    python -m benchmarks.decoder [--layers 4] [--threads 1,2] [--steps 0x16,16x1,100x1]

Products are MatMulNBits, attention is GroupQueryAttention with rotary positions, and lengths are computed from the mask. Steps
are PASTxNEW: tokens in the cache and tokens that come. Both compute products in float32 (accuracy level 0) or, where the model
allows it (level 4), with the left operand rounded to 8 bits. Weights are random.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

import minicc
from benchmarks.bits import LEVELS, header, row

BLOCK = 32
LONGEST = 512  # positions with rotary angles
MICROSOFT = "com.microsoft"
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Sizes:
    """Of a decoder; the usual ones are those of a model of about a billion weights, but for its depth."""

    layers: int = 4
    width: int = 2048
    heads: int = 32
    shared: int = 4  # heads of keys and values
    inner: int = 5632
    words: int = 32000

    @property
    def head(self) -> int:
        return self.width // self.heads


class _Writer:
    """Nodes and weights of a model that is being written."""

    def __init__(self, level: int) -> None:
        self.level, self.nodes, self.weights = level, [], {}  # type: ignore[var-annotated]
        self.random = np.random.default_rng(0)

    def constant(self, name: str, array: Array) -> str:
        self.weights[name] = array
        return name

    def node(self, op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, outputs, name=outputs[0], **attributes))
        return outputs[0]

    def product(self, x: str, k: int, n: int, name: str) -> str:
        blocks = k // BLOCK
        packed = self.constant(f"{name}.packed", self.random.integers(0, 256, (n, blocks, BLOCK // 2), np.uint8))
        scales = self.constant(f"{name}.scales", self.random.uniform(0.001, 0.01, n * blocks).astype(np.float32))
        attributes = {"K": k, "N": n, "bits": 4, "block_size": BLOCK, "accuracy_level": self.level}
        return self.node("MatMulNBits", [x, packed, scales], [name], domain=MICROSOFT, **attributes)

    def normalised(self, total: str, x: str, width: int, name: str) -> tuple[str, str]:
        """(the norm of total + x, the sum)."""
        ones = self.constant(f"{name}.weight", np.ones(width, np.float32))
        outputs = [name, "", "", f"{name}.sum"]
        self.node("SkipSimplifiedLayerNormalization", [total, x, ones], outputs, domain=MICROSOFT, epsilon=1e-5)
        return name, outputs[-1]


def model(sizes: Sizes, level: int = 0) -> Any:
    """The model: input_ids, attention_mask and caches to logits and longer caches."""
    w, d = _Writer(level), sizes.head
    w.constant("table", w.random.standard_normal((sizes.words, sizes.width)).astype(np.float32) * np.float32(0.1))
    total = w.node("Gather", ["table", "input_ids"], ["embedded"])
    w.constant("one", np.array([1], np.int64))
    w.constant("axis", np.array(1, np.int64))
    w.node("ReduceSum", ["attention_mask", "one"], ["count"], keepdims=1)
    w.node("Sub", ["count", "one"], ["last"])
    w.node("Cast", ["last"], ["lengths"], to=TensorProto.INT32)
    w.node("Shape", ["attention_mask"], ["mask.shape"])
    w.node("Gather", ["mask.shape", "axis"], ["mask.length"], axis=0)
    w.node("Cast", ["mask.length"], ["length"], to=TensorProto.INT32)
    angles = np.arange(LONGEST)[:, None] / 10000 ** (np.arange(d // 2) / (d // 2))
    rotary = [w.constant("cos", np.cos(angles).astype(np.float32)), w.constant("sin", np.sin(angles).astype(np.float32))]
    first = w.constant("first.weight", np.ones(sizes.width, np.float32))
    x = w.node("SimplifiedLayerNormalization", [total, first], ["first"], axis=-1, epsilon=1e-5)
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "new"]),
              helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "length"])]  # fmt: skip
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "new", sizes.words])]
    for n in range(sizes.layers):
        query = w.product(x, sizes.width, sizes.width, f"{n}.query")
        key, value = (w.product(x, sizes.width, sizes.shared * d, f"{n}.{name}") for name in ("key", "value"))
        past, present = ([f"{when}.{n}.{name}" for name in ("key", "value")] for when in ("past", "present"))
        for names, ports, length in ((past, inputs, "past"), (present, outputs, "length")):
            shape = ["batch", sizes.shared, length, d]
            ports += [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names]
        w.node("GroupQueryAttention", [query, key, value, *past, "lengths", "length", *rotary], [f"{n}.attention", *present],
               domain=MICROSOFT, num_heads=sizes.heads, kv_num_heads=sizes.shared, do_rotary=1, scale=d**-0.5)  # fmt: skip
        projected = w.product(f"{n}.attention", sizes.width, sizes.width, f"{n}.projected")
        x, total = w.normalised(total, projected, sizes.width, f"{n}.middle")
        gate, up = (w.product(x, sizes.width, sizes.inner, f"{n}.{name}") for name in ("gate", "up"))
        w.node("Sigmoid", [gate], [f"{n}.sigmoid"])
        w.node("Mul", [gate, f"{n}.sigmoid"], [f"{n}.swish"])
        w.node("Mul", [f"{n}.swish", up], [f"{n}.inner"])
        down = w.product(f"{n}.inner", sizes.inner, sizes.width, f"{n}.down")
        x, total = w.normalised(total, down, sizes.width, f"{n}.end")
    w.product(x, sizes.width, sizes.words, "logits")
    constants = [numpy_helper.from_array(array, name) for name, array in w.weights.items()]
    graph = helper.make_graph(w.nodes, "decoder", inputs, outputs, constants)
    sets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=sets, ir_version=10)


def feeds(sizes: Sizes, past: int, new: int, batch: int = 1, seed: int = 0) -> dict[str, Array]:
    """Inputs of a step: random words and caches."""
    rng = np.random.default_rng(seed)
    found: dict[str, Array] = {
        "input_ids": rng.integers(0, sizes.words, (batch, new)),
        "attention_mask": np.ones((batch, past + new), np.int64),
    }
    for n in range(sizes.layers):
        for name in ("key", "value"):
            cache = rng.standard_normal((batch, sizes.shared, past, sizes.head))
            found[f"past.{n}.{name}"] = cache.astype(np.float32)
    return found


def main() -> None:
    import onnxruntime

    parser = argparse.ArgumentParser(description="a decoder with weights of 4 bits beside ONNX Runtime")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--steps", default="0x16,16x1,100x1")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each line of the table")
    options = parser.parse_args()
    sizes = Sizes(options.layers)
    print(header("past + new"))
    for threads in map(int, options.threads.split(",")):
        calls: dict[str, Any] = {}
        for level in LEVELS:
            made = model(sizes, level)
            module = minicc.compile(made, threads=threads)
            session_options = onnxruntime.SessionOptions()
            session_options.intra_op_num_threads = threads
            session = onnxruntime.InferenceSession(made.SerializeToString(), session_options)
            calls[f"minicc {level}"] = lambda given, module=module: module.run(None, given)[0]
            calls[f"ort {level}"] = lambda given, session=session: session.run(None, given)[0]
        for step in options.steps.split(","):
            past, new = map(int, step.split("x"))
            print(row(calls, feeds(sizes, past, new), options.seconds, f"{past} + {new}", threads), flush=True)


if __name__ == "__main__":
    main()
