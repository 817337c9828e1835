"""Single layers, for comparing kernels with cuBLAS and cuDNN: as ONNX models (`layer_model`) and in PyTorch (`layer_module`).

In fp16 a layer is a float16 model, so that no conversion is timed. Numbers are periodic (see `build`), so that they pack well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tools.gpu_check.bundle import Array, periodic

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Layer:
    """One operator: its kind and sizes.

    gemm: (rows, depth, columns). conv: (batch, channels, height = width, filters, window, stride, groups).
    attention: (batch, heads, length, size). softmax, layernorm: (rows, columns). add: (elements,).
    """

    kind: str
    sizes: tuple[int, ...]


IMAGES = 3
IMAGE_PERIOD = 17  # along both sides, prime as the other one
# Large, ragged and thin ones of each kind.
LAYERS = {
    "layer_gemm_2048": Layer("gemm", (2048, 2048, 2048)),
    "layer_gemm_256x768x3072": Layer("gemm", (256, 768, 3072)),
    "layer_gemm_1x4096x4096": Layer("gemm", (1, 4096, 4096)),
    "layer_gemm_127x131x129": Layer("gemm", (127, 131, 129)),
    "layer_conv_56_3x3": Layer("conv", (8, 64, 56, 64, 3, 1, 1)),
    "layer_conv_14_3x3": Layer("conv", (8, 256, 14, 256, 3, 1, 1)),
    "layer_conv_28_1x1": Layer("conv", (8, 512, 28, 128, 1, 1, 1)),
    "layer_conv_224_7x7": Layer("conv", (8, 3, 224, 64, 7, 2, 1)),
    "layer_conv_depthwise": Layer("conv", (8, 144, 56, 144, 3, 1, 144)),
    "layer_attention_512": Layer("attention", (4, 12, 512, 64)),
    "layer_softmax": Layer("softmax", (4096, 1024)),
    "layer_layernorm": Layer("layernorm", (4096, 768)),
    "layer_add": Layer("add", (1 << 22,)),
}


def shapes(layer: Layer) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Shapes of the inputs and of the weights."""
    match layer.kind, layer.sizes:
        case "gemm", (m, k, n):
            return [(m, k)], [(k, n)]
        case "conv", (batch, channels, size, filters, window, _, groups):
            return [(batch, channels, size, size)], [(filters, channels // groups, window, window), (filters,)]
        case "attention", sizes:
            return [sizes] * 3, []
        case "layernorm", (_, columns):
            return [layer.sizes], [(columns,), (columns,)]
        case "add", sizes:
            return [sizes] * 2, []
    return [layer.sizes], []


def numbers(layer: Layer, precision: str) -> tuple[dict[str, Array], list[Array]]:
    """Inputs by name and weights in float32, with values that the precision represents exactly."""
    rng = np.random.default_rng(7)
    inputs, weights = shapes(layer)
    depth = int(np.prod(weights[0][1:])) if layer.kind == "conv" else weights[0][0] if layer.kind == "gemm" else 1

    def draw(shape: tuple[int, ...], scale: float = 1.0) -> Array:
        found = periodic(rng.standard_normal(shape).astype(np.float32)) * np.float32(scale)
        return found.astype(np.float16).astype(np.float32) if precision == "fp16" else found

    feeds = {f"x{i}": draw(s) for i, s in enumerate(inputs)}
    if layer.kind == "conv":  # images are narrower than the period of weights: they repeat sooner, and few of them are different
        inside = np.arange(layer.sizes[2]) % IMAGE_PERIOD
        feeds = {name: x[np.arange(len(x)) % IMAGES][:, :, inside][..., inside] for name, x in feeds.items()}
    return feeds, [draw(s, depth**-0.5) for s in weights]


def layer_model(layer: Layer, weights: list[Array], feeds: dict[str, Array], dtype: Any) -> onnx.ModelProto:
    """The layer as an ONNX model whose tensors have a numpy element type."""
    from onnx import helper, numpy_helper

    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    names = [f"w{i}" for i in range(len(weights))]
    inputs = [*feeds, *names]
    nodes = {
        "gemm": lambda: [helper.make_node("MatMul", inputs, ["y"])],
        "conv": lambda: [helper.make_node(
            "Conv", inputs, ["y"], pads=[layer.sizes[4] // 2] * 4, strides=[layer.sizes[5]] * 2, group=layer.sizes[6])],
        "attention": lambda: [helper.make_node("Attention", inputs, ["y"])],
        "softmax": lambda: [helper.make_node("Softmax", inputs, ["y"], axis=-1)],
        "layernorm": lambda: [helper.make_node("LayerNormalization", inputs, ["y"], axis=-1)],
        "add": lambda: [helper.make_node("Add", inputs, ["y"])],
    }[layer.kind]()  # fmt: skip
    graph = helper.make_graph(
        nodes, "layer", [helper.make_tensor_value_info(n, kind, a.shape) for n, a in feeds.items()],
        [helper.make_tensor_value_info("y", kind, None)],
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
            self.weights = nn.ParameterList(nn.Parameter(torch.randn(s) * 0.05) for s in weights)

        def forward(self, *x: torch.Tensor) -> torch.Tensor:
            w = list(self.weights)
            match layer.kind:
                case "gemm":
                    return x[0] @ w[0]
                case "conv":
                    return functional.conv2d(x[0], *w, stride=layer.sizes[5], padding=layer.sizes[4] // 2, groups=layer.sizes[6])
                case "attention":
                    return functional.scaled_dot_product_attention(*x)
                case "softmax":
                    return torch.softmax(x[0], -1)
                case "layernorm":
                    return functional.layer_norm(x[0], (layer.sizes[1],), *w)
            return x[0] + x[1]

    return Function().eval()
