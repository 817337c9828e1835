"""Train the small model of `minicc demo` and write it with its held-out images.

    python tools/train_demo.py            # needs scikit-learn (for the images) beside minicc; under a minute

A residual convolutional network for scikit-learn's 8x8 handwritten digits, trained with a few lines of numpy
(forward and backward of six layers, Adam). The exported graph keeps what compilers fold and fuse: input
scaling, batch normalisation behind every convolution, residual additions, pooling, a dense layer, softmax.
The seed is fixed; the last bits of the weights still depend on the matrix library that numpy was built with.
"""
# ruff: noqa: ARG002

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.lib.stride_tricks import sliding_window_view
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from sklearn.datasets import load_digits

FOLDER = Path(__file__).resolve().parent.parent / "src" / "minicc" / "demo"
SEED = 7
EPOCHS = 40
BATCH = 64
LEARNING_RATE = 3e-3
HELD_OUT = 360
EPSILON = 1e-5
Array = np.ndarray[Any, np.dtype[np.float32]]


# ---------------------------------------------------------------- layers: forward, backward, parameters


class Layer:
    """One layer: `forward` keeps what `backward` needs, `backward` fills `gradients`."""

    def __init__(self, **parameters: Array) -> None:
        self.parameters = {name: value.astype(np.float32) for name, value in parameters.items()}
        self.gradients: dict[str, Array] = {}


class Convolution(Layer):
    """3x3, stride 1, padding 1, without bias: [N, C, H, W] to [N, M, H, W]; weight [M, C, 3, 3]."""

    def __init__(self, random: np.random.Generator, channels: int, maps: int) -> None:
        scale = np.sqrt(2 / (9 * channels))
        super().__init__(weight=scale * random.standard_normal((maps, channels, 3, 3)))

    def forward(self, x: Array, training: bool) -> Array:
        self.columns = _columns(x)
        return _apply(self.columns, self.parameters["weight"])

    def backward(self, grad: Array) -> Array:
        maps = grad.shape[1]
        rows = grad.transpose(0, 2, 3, 1).reshape(-1, maps)
        weight = self.parameters["weight"]
        self.gradients = {"weight": (rows.T @ self.columns.reshape(rows.shape[0], -1)).reshape(weight.shape)}
        mirrored = weight.transpose(1, 0, 2, 3)[:, :, ::-1, ::-1]
        return _apply(_columns(grad), mirrored)


def _columns(x: Array) -> Array:
    """3x3 neighbourhoods, zero padded: [N, H, W, C * 9]."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = sliding_window_view(padded, (3, 3), axis=(2, 3)).transpose(0, 2, 3, 1, 4, 5)
    return np.ascontiguousarray(windows).reshape(*windows.shape[:3], -1)


def _apply(columns: Array, weight: Array) -> Array:
    return np.ascontiguousarray((columns @ weight.reshape(weight.shape[0], -1).T).transpose(0, 3, 1, 2))


class BatchNormalization(Layer):
    """Per channel; statistics of the batch while training, running averages after."""

    def __init__(self, channels: int) -> None:
        super().__init__(scale=np.ones(channels), bias=np.zeros(channels))
        self.mean, self.variance = np.zeros(channels, np.float32), np.ones(channels, np.float32)

    def forward(self, x: Array, training: bool) -> Array:
        mean, variance = self.mean, self.variance
        if training:
            mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3))
            self.mean += 0.1 * (mean - self.mean)
            self.variance += 0.1 * (variance - self.variance)
        self.inverse = 1 / np.sqrt(variance + EPSILON)
        self.normal = (x - _channel(mean)) * _channel(self.inverse)
        return self.normal * _channel(self.parameters["scale"]) + _channel(self.parameters["bias"])

    def backward(self, grad: Array) -> Array:
        self.gradients = {"scale": (grad * self.normal).sum((0, 2, 3)), "bias": grad.sum((0, 2, 3))}
        count = grad.size // grad.shape[1]
        centred = grad - _channel(self.gradients["bias"] / count)
        centred -= self.normal * _channel(self.gradients["scale"] / count)
        return centred * _channel(self.parameters["scale"] * self.inverse)


def _channel(values: Array) -> Array:
    return values[:, None, None]


class Relu(Layer):
    def forward(self, x: Array, training: bool) -> Array:
        self.positive = x > 0
        return x * self.positive

    def backward(self, grad: Array) -> Array:
        return grad * self.positive


class MaxPool(Layer):
    """2x2, stride 2."""

    def forward(self, x: Array, training: bool) -> Array:
        n, c, h, w = x.shape
        blocks = x.reshape(n, c, h // 2, 2, w // 2, 2)
        result = blocks.max((3, 5))
        self.winners = blocks == result[:, :, :, None, :, None]
        return result

    def backward(self, grad: Array) -> Array:
        share = self.winners / self.winners.sum((3, 5), keepdims=True)
        spread = (grad[:, :, :, None, :, None] * share).astype(np.float32)
        n, c, h, w = grad.shape
        return spread.reshape(n, c, 2 * h, 2 * w)


class MeanAndDense(Layer):
    """Mean over the image, then a dense layer: [N, C, H, W] to [N, classes]; weight [C, classes]."""

    def __init__(self, random: np.random.Generator, channels: int, classes: int) -> None:
        weight = random.standard_normal((channels, classes)) / np.sqrt(channels)
        super().__init__(weight=weight, bias=np.zeros(classes))

    def forward(self, x: Array, training: bool) -> Array:
        self.shape, self.mean = x.shape, x.mean((2, 3))
        return self.mean @ self.parameters["weight"] + self.parameters["bias"]

    def backward(self, grad: Array) -> Array:
        self.gradients = {"weight": self.mean.T @ grad, "bias": grad.sum(0)}
        flat = grad @ self.parameters["weight"].T / (self.shape[2] * self.shape[3])
        return np.broadcast_to(flat[:, :, None, None], self.shape).astype(np.float32)


class Residual(Layer):
    """relu(x + body(x))."""

    def __init__(self, random: np.random.Generator, channels: int) -> None:
        self.body = _block(random, channels, channels) + _block(random, channels, channels)[:-1]
        super().__init__()
        self.relu = Relu()

    def forward(self, x: Array, training: bool) -> Array:
        return self.relu.forward(x + run(self.body, x, training), training)

    def backward(self, grad: Array) -> Array:
        grad = self.relu.backward(grad)
        return grad + back(self.body, grad)


def _block(random: np.random.Generator, channels: int, maps: int) -> list[Any]:
    return [Convolution(random, channels, maps), BatchNormalization(maps), Relu()]


def build(random: np.random.Generator) -> list[Any]:
    """The network: stem, residual, pool, widening, residual, classifier; input scaling is exported."""
    stem, widen = _block(random, 1, 16), _block(random, 16, 32)
    head = MeanAndDense(random, 32, 10)
    return [*stem, Residual(random, 16), MaxPool(), *widen, Residual(random, 32), head]


def run(layers: list[Any], x: Array, training: bool) -> Array:
    for layer in layers:
        x = layer.forward(x, training)
    return x


def back(layers: list[Any], grad: Array) -> Array:
    for layer in reversed(layers):
        grad = layer.backward(grad)
    return grad


def flatten(layers: list[Any]) -> list[Any]:
    """All layers, those inside residuals instead of the residuals."""
    nested = (flatten(layer.body) if isinstance(layer, Residual) else [layer] for layer in layers)
    return [each for group in nested for each in group]


# ---------------------------------------------------------------- training


def train(layers: list[Any], images: Array, labels: Array, random: np.random.Generator) -> None:
    """Adam on cross entropy with a cosine schedule; images are shifted by up to one pixel."""
    moments: dict[tuple[int, str], tuple[Array, Array]] = {}
    step, steps = 0, EPOCHS * (len(images) // BATCH)
    for _ in range(EPOCHS):
        order = random.permutation(len(images))
        for start in range(0, len(images) - BATCH + 1, BATCH):
            rows = order[start : start + BATCH]
            logits = run(layers, _shift(images[rows], random), True)
            grad = _softmax(logits)
            grad[np.arange(BATCH), labels[rows]] -= 1
            back(layers, grad / BATCH)
            step += 1
            rate = LEARNING_RATE * 0.5 * (1 + np.cos(np.pi * step / steps))
            for index, layer in enumerate(flatten(layers)):
                for name, value in layer.parameters.items():
                    gradient = layer.gradients[name]
                    zero = np.zeros_like(value)
                    first, second = moments.get((index, name), (zero, zero))
                    first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
                    moments[index, name] = first, second
                    unbiased = np.sqrt(second / (1 - 0.999**step)) + 1e-8
                    value -= (rate * first / (1 - 0.9**step) / unbiased).astype(np.float32)


def _shift(images: Array, random: np.random.Generator) -> Array:
    dy, dx = random.integers(0, 3, 2)
    return np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))[:, :, dy : dy + 8, dx : dx + 8]


def _softmax(logits: Array) -> Array:
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


# ---------------------------------------------------------------- export


def export(layers: list[Any]) -> onnx.ModelProto:
    """The trained network as an ONNX model over grey levels 0 to 16, with a dynamic batch."""
    nodes: list[onnx.NodeProto] = []
    weights = [numpy_helper.from_array(np.array(1 / 16, np.float32), "scale")]

    def add(op: str, name: str, *inputs: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, [*inputs], [f"{name}.out"], name, **attributes))
        return f"{name}.out"

    def weight(name: str, value: Array) -> str:
        weights.append(numpy_helper.from_array(value, name))
        return name

    def emit(block: list[Any], prefix: str, x: str) -> str:
        for index, layer in enumerate(block):
            name = f"{prefix}{index}"
            if isinstance(layer, Convolution):
                kernel = weight(f"{name}.weight", layer.parameters["weight"])
                x = add("Conv", f"{name}.conv", x, kernel, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
            elif isinstance(layer, BatchNormalization):
                fields = {**layer.parameters, "mean": layer.mean, "variance": layer.variance}
                names = [weight(f"{name}.{field}", value) for field, value in fields.items()]
                x = add("BatchNormalization", f"{name}.norm", x, *names, epsilon=EPSILON)
            elif isinstance(layer, Relu):
                x = add("Relu", f"{name}.relu", x)
            elif isinstance(layer, MaxPool):
                x = add("MaxPool", f"{name}.pool", x, kernel_shape=[2, 2], strides=[2, 2])
            elif isinstance(layer, Residual):
                x = add("Add", f"{name}.add", emit(layer.body, f"{name}.", x), x)
                x = add("Relu", f"{name}.relu", x)
            else:
                x = add("GlobalAveragePool", "head.mean", x)
                x = add("Flatten", "head.flatten", x)
                names = [weight(f"head.{field}", value) for field, value in layer.parameters.items()]
                x = add("Gemm", "head.dense", x, *names)
        return x

    logits = emit(layers, "layer", add("Mul", "input.scale", "image", "scale"))
    nodes.append(helper.make_node("Softmax", [logits], ["probabilities"], "head.softmax", axis=-1))
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 10])],
        weights,
    )
    opsets = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9, producer_name="tools/train_demo.py")
    onnx.checker.check_model(model, full_check=True)
    return model


def main() -> int:
    """Train, export, check the export against the training code, write both files; 1 below 97 % accuracy."""
    digits = load_digits()
    random = np.random.default_rng(SEED)
    order = random.permutation(len(digits.images))
    images = digits.images[order].astype(np.uint8)
    labels = digits.target[order].astype(np.uint8)
    scaled = (images[:, None] / 16).astype(np.float32)
    layers = build(random)
    train(layers, scaled[HELD_OUT:], labels[HELD_OUT:], random)
    expected = _softmax(run(layers, scaled[:HELD_OUT], False))
    model = export(layers)
    (found,) = ReferenceEvaluator(model).run(None, {"image": images[:HELD_OUT, None].astype(np.float32)})
    accuracy = float((found.argmax(1) == labels[:HELD_OUT]).mean())
    print(f"held-out accuracy {accuracy:.4f}, export differs by {np.abs(found - expected).max():.1e}")
    if accuracy < 0.97:
        return 1
    FOLDER.joinpath("digits.onnx").write_bytes(model.SerializeToString(deterministic=True))
    np.savez_compressed(FOLDER / "digits.npz", images=images[:HELD_OUT], labels=labels[:HELD_OUT])
    return 0


if __name__ == "__main__":
    sys.exit(main())
