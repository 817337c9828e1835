"""Single layers, for comparing kernels with cuBLAS and cuDNN: as ONNX models (`layer_model`) and in PyTorch (`layer_module`).

In fp16 a layer is a float16 model, so that no conversion is timed; integer products are int8. Numbers are periodic (see `build`),
so that they pack well. Which layers there are is what docs/cuda.md has no figure for, or one that should be seen again.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from tools.gpu_check.bundle import Array, periodic

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Layer:
    """One operator: its kind and sizes.

    gemm, integer (int8 to int32): (rows, depth, columns).
    conv: (batch, channels, height = width, filters, window, stride, groups); deconv, transposed: the same without groups.
    attention, causal (attention too), masked (by an additive mask of all scores, shared by heads): (batch, heads, heads of keys,
    queries, keys, size). lstm: (length, batch, size, hidden).
    softmax, layernorm, mean (of all numbers), transpose: (rows, columns). add: (elements,).
    chain: (steps, rows, columns), softmaxes along columns and rows in turn, for what a kernel costs in a graph.
    """

    kind: str
    sizes: tuple[int, ...]

    @property
    def precisions(self) -> tuple[str, ...]:
        """Those it is built in. There is no "bf16": numpy cannot save it; recurrences are float32."""
        special = {"integer": ("int8",), "lstm": ("fp32",)}
        products = ("fp32", "tf32", "fp16") if self.kind in ("gemm", "conv", "deconv", *ATTENTION) else ("fp32", "fp16")
        return special.get(self.kind, products)

    @property
    def padding(self) -> int:
        """Of a convolution, at each side."""
        window, stride = self.sizes[4:6]
        return (window - stride) // 2 if self.kind == "deconv" else window // 2


ATTENTION = ("attention", "causal", "masked")
IMAGES = 3
HEADS = 3  # of attention that have numbers of their own
IMAGE_PERIOD = 17  # along both sides, prime as the other one
# Large, ragged and thin ones of each kind.
LAYERS = {
    "layer_gemm_4096": Layer("gemm", (4096, 4096, 4096)),
    "layer_gemm_2048": Layer("gemm", (2048, 2048, 2048)),
    "layer_gemm_256x768x3072": Layer("gemm", (256, 768, 3072)),
    "layer_gemm_16x4096x4096": Layer("gemm", (16, 4096, 4096)),
    "layer_gemm_1x4096x4096": Layer("gemm", (1, 4096, 4096)),
    "layer_gemm_127x131x129": Layer("gemm", (127, 131, 129)),
    "layer_integer_2048": Layer("integer", (2048, 2048, 2048)),
    "layer_integer_256x768x3072": Layer("integer", (256, 768, 3072)),
    "layer_conv_56_3x3": Layer("conv", (8, 64, 56, 64, 3, 1, 1)),
    "layer_conv_14_3x3": Layer("conv", (8, 256, 14, 256, 3, 1, 1)),
    "layer_conv_56_3x3_batch32": Layer("conv", (32, 64, 56, 64, 3, 1, 1)),
    "layer_conv_28_3x3_batch32": Layer("conv", (32, 128, 28, 128, 3, 1, 1)),
    "layer_conv_14_3x3_batch32": Layer("conv", (32, 256, 14, 256, 3, 1, 1)),
    "layer_conv_7_3x3_batch32": Layer("conv", (32, 512, 7, 512, 3, 1, 1)),
    "layer_conv_28_1x1": Layer("conv", (8, 512, 28, 128, 1, 1, 1)),
    "layer_conv_224_7x7": Layer("conv", (8, 3, 224, 64, 7, 2, 1)),
    "layer_conv_depthwise": Layer("conv", (8, 144, 56, 144, 3, 1, 144)),
    "layer_deconv_28_2x2": Layer("deconv", (8, 256, 28, 128, 2, 2)),
    "layer_deconv_28_4x4": Layer("deconv", (8, 128, 28, 64, 4, 2)),
    "layer_lstm": Layer("lstm", (128, 16, 256, 512)),
    "layer_attention_512": Layer("attention", (4, 12, 12, 512, 512, 64)),
    "layer_attention_128": Layer("attention", (8, 12, 12, 128, 128, 64)),
    "layer_attention_2048x128": Layer("attention", (2, 16, 16, 2048, 2048, 128)),
    "layer_attention_1500": Layer("attention", (1, 6, 6, 1500, 1500, 64)),
    "layer_attention_197x80": Layer("attention", (8, 12, 12, 197, 197, 80)),
    "layer_attention_causal_2048": Layer("causal", (2, 12, 12, 2048, 2048, 64)),
    "layer_attention_masked_384": Layer("masked", (8, 12, 12, 384, 384, 64)),
    "layer_attention_grouped": Layer("causal", (2, 32, 8, 1024, 1024, 128)),
    "layer_attention_decode": Layer("attention", (8, 32, 8, 1, 4096, 128)),
    "layer_attention_decode_8192": Layer("attention", (1, 32, 32, 1, 8192, 128)),
    "layer_attention_decode_8192_grouped": Layer("attention", (1, 32, 8, 1, 8192, 128)),
    "layer_attention_decode_1024x64": Layer("attention", (1, 12, 12, 1, 1024, 64)),
    "layer_attention_64_of_8192": Layer("attention", (1, 8, 8, 64, 8192, 64)),
    **{f"layer_{kind}_{rows}x{columns}": Layer(kind, (rows, columns))
       for kind in ("softmax", "layernorm") for rows, columns in ((65536, 1024), (262144, 128), (8192, 8192))},
    "layer_transpose": Layer("transpose", (8192, 8192)),
    "layer_mean": Layer("mean", (8192, 8192)),
    "layer_add": Layer("add", (1 << 22,)),
    "layer_add_64": Layer("add", (64,)),
    "layer_chain_32": Layer("chain", (32, 64, 64)),
}  # fmt: skip

# Convolutions whose direct sum is timed beside Winograd's form by every tile, which has not run on a GPU.
WINOGRAD = tuple(name for name in LAYERS if name.endswith("3x3_batch32"))


def shapes(layer: Layer) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Shapes of the inputs and of the weights."""
    match layer.kind, layer.sizes:
        case "gemm" | "integer", (m, k, n):
            return [(m, k)], [(k, n)]
        case "deconv", (batch, channels, size, filters, window, _):
            return [(batch, channels, size, size)], [(channels, filters, window, window), (filters,)]
        case "lstm", (length, batch, size, hidden):
            return [(length, batch, size)], [(1, 4 * hidden, size), (1, 4 * hidden, hidden), (1, 8 * hidden)]
        case "chain", (_, rows, columns):
            return [(rows, columns)], []
        case "conv", (batch, channels, size, filters, window, _, groups):
            return [(batch, channels, size, size)], [(filters, channels // groups, window, window), (filters,)]
        case "attention" | "causal" | "masked", (batch, heads, groups, queries, keys, size):
            operands = [(batch, heads, queries, size), *[(batch, groups, keys, size)] * 2]
            return [*operands, *[(batch, 1, queries, keys)] * (layer.kind == "masked")], []
        case "layernorm", (_, columns):
            return [layer.sizes], [(columns,), (columns,)]
        case "add", sizes:
            return [sizes] * 2, []
    return [layer.sizes], []


def numbers(layer: Layer, precision: str) -> tuple[dict[str, Array], list[Array]]:
    """Inputs by name and weights, in float32 with values that the precision represents exactly, or in int8."""
    rng = np.random.default_rng(7)
    inputs, weights = shapes(layer)
    depth = {
        "conv": lambda: int(np.prod(weights[0][1:])), "lstm": lambda: layer.sizes[3],
        "gemm": lambda: weights[0][0], "deconv": lambda: weights[0][0],
    }.get(layer.kind, lambda: 1)()  # fmt: skip

    def draw(shape: tuple[int, ...], scale: float = 1.0) -> Array:
        if layer.kind == "integer":
            return periodic(rng.integers(-128, 128, shape, np.int8))
        found = periodic(rng.standard_normal(shape).astype(np.float32)) * np.float32(scale)
        return found.astype(np.float16).astype(np.float32) if precision == "fp16" else found

    feeds = {f"x{i}": draw(s) for i, s in enumerate(inputs)}
    if layer.kind in ("conv", "deconv"):
        # Images are narrower than the period of weights: they repeat sooner, and few of them are different.
        inside = np.arange(layer.sizes[2]) % IMAGE_PERIOD
        feeds = {name: x[np.arange(len(x)) % IMAGES][:, :, inside][..., inside] for name, x in feeds.items()}
    if layer.kind in ATTENTION:
        # Few heads are different, neighbours along both axes among them.
        for name, x in feeds.items():
            batch, heads = np.indices(x.shape[:2])
            feeds[name] = x[0, : min(HEADS, x.shape[1])][(batch + heads) % min(HEADS, x.shape[1])]
    return feeds, [draw(s, depth**-0.5) for s in weights]


def layer_model(layer: Layer, weights: list[Array], feeds: dict[str, Array], dtype: Any) -> onnx.ModelProto:
    """The layer as an ONNX model whose tensors have a numpy element type; results of integer products have int32."""
    from onnx import TensorProto, helper, numpy_helper

    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    names = [f"w{i}" for i in range(len(weights))]
    inputs = [*feeds, *names]

    def node(operator: str, **attributes: Any) -> list[onnx.NodeProto]:
        return [helper.make_node(operator, inputs, ["y"], **attributes)]

    def steps() -> list[onnx.NodeProto]:
        tensors = [*feeds, *(f"s{i}" for i in range(1, layer.sizes[0])), "y"]
        return [helper.make_node("Softmax", [a], [b], axis=i % 2) for i, (a, b) in enumerate(pairwise(tensors))]

    def convolution(operator: str) -> list[onnx.NodeProto]:
        return node(operator, pads=[layer.padding] * 4, strides=[layer.sizes[5]] * 2, group=(*layer.sizes, 1)[6])

    nodes = {
        "gemm": lambda: node("MatMul"),
        "integer": lambda: node("MatMulInteger"),
        "conv": lambda: convolution("Conv"),
        "deconv": lambda: convolution("ConvTranspose"),
        "lstm": lambda: node("LSTM", hidden_size=layer.sizes[3]),
        **dict.fromkeys(("attention", "masked"), lambda: node("Attention")),
        "causal": lambda: node("Attention", is_causal=1),
        "softmax": lambda: node("Softmax", axis=-1),
        "layernorm": lambda: node("LayerNormalization", axis=-1),
        "mean": lambda: node("ReduceMean", keepdims=0),
        "transpose": lambda: node("Transpose", perm=[1, 0]),
        "add": lambda: node("Add"),
        "chain": steps,
    }[layer.kind]()
    result = TensorProto.INT32 if layer.kind == "integer" else kind
    graph = helper.make_graph(
        nodes, "layer", [helper.make_tensor_value_info(n, kind, a.shape) for n, a in feeds.items()],
        [helper.make_tensor_value_info("y", result, None)],
        [numpy_helper.from_array(w.astype(dtype), n) for n, w in zip(names, weights)],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def layer_module(layer: Layer) -> Any:
    """The layer in PyTorch, weights of its own."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Function(nn.Module):
        """A function of its inputs and of the weights."""

        def __init__(self) -> None:
            super().__init__()
            _, weights = shapes(layer)
            self.weights = nn.ParameterList()
            if layer.kind == "integer":
                self.register_buffer("matrix", torch.randint(-128, 128, weights[0], dtype=torch.int8))
            elif layer.kind == "lstm":
                self.lstm = nn.LSTM(*layer.sizes[2:])
            else:
                self.weights.extend(nn.Parameter(torch.randn(s) * 0.05) for s in weights)

        def forward(self, *x: torch.Tensor) -> torch.Tensor:
            w = list(self.weights)
            match layer.kind:
                case "gemm":
                    return x[0] @ w[0]
                case "conv":
                    return functional.conv2d(x[0], *w, stride=layer.sizes[5], padding=layer.padding, groups=layer.sizes[6])
                case "deconv":
                    return functional.conv_transpose2d(x[0], *w, stride=layer.sizes[5], padding=layer.padding)
                case "integer":
                    return torch._int_mm(x[0], self.matrix)
                case "lstm":
                    return self.lstm(x[0])[0]
                case "mean":
                    return x[0].mean()
                case "transpose":
                    return x[0].t().contiguous()
                case "chain":
                    found = x[0]
                    for step in range(layer.sizes[0]):
                        found = torch.softmax(found, step % 2)
                    return found
                case "attention" | "causal" | "masked":
                    grouped = layer.sizes[1] != layer.sizes[2]
                    return functional.scaled_dot_product_attention(*x, is_causal=layer.kind == "causal", enable_gqa=grouped)
                case "softmax":
                    return torch.softmax(x[0], -1)
                case "layernorm":
                    return functional.layer_norm(x[0], (layer.sizes[1],), *w)
            return x[0] + x[1]

    return Function().eval()
