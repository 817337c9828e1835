"""Networks of Keras as tf2onnx writes them: channels last behind transpositions, recurrent layers as loops.

    python -m benchmarks.keras_zoo --out DIR [--only NAME,NAME]       needs TensorFlow and tf2onnx, not minicc

Weights are random and seeded, nothing is downloaded; batch 1, fixed shapes. `benchmarks.cpu NAME ... --generated DIR` times them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

OPSET = 17
APPLICATIONS = ("MobileNet", "MobileNetV2", "EfficientNetB0", "EfficientNetV2B0", "DenseNet121", "NASNetMobile", "Xception",
                "InceptionV3", "ResNet50V2")  # fmt: skip


def networks() -> dict[str, Callable[[], tuple[Any, tuple[int, ...], str]]]:
    """Makers of (model, shape of its input, element type), by name."""
    import keras
    from keras import layers

    def sequence(shape: tuple[int, ...], *parts: Any, kind: str = "float32") -> tuple[Any, tuple[int, ...], str]:
        return keras.Sequential([keras.Input(shape, dtype=kind), *parts]), (1, *shape), kind

    def application(name: str) -> tuple[Any, tuple[int, ...], str]:
        model = getattr(keras.applications, name)(weights=None)
        return model, (1, *model.input_shape[1:]), "float32"

    def unet() -> tuple[Any, tuple[int, ...], str]:
        x = keras.Input((128, 128, 3))
        y, skipped = x, []
        for filters in (16, 32, 64):
            y = layers.BatchNormalization()(layers.Conv2D(filters, 3, padding="same", activation="relu")(y))
            skipped.append(y)
            y = layers.MaxPooling2D()(y)
        y = layers.Conv2D(128, 3, padding="same", activation="relu")(y)
        for filters, other in zip((64, 32, 16), skipped[::-1]):
            y = layers.Concatenate()([layers.Conv2DTranspose(filters, 3, strides=2, padding="same")(y), other])
            y = layers.Conv2D(filters, 3, padding="same", activation="swish")(y)
        return keras.Model(x, layers.Conv2D(2, 1, activation="softmax")(y)), (1, 128, 128, 3), "float32"

    made: dict[str, Callable[[], tuple[Any, tuple[int, ...], str]]] = {
        f"keras_{name.lower()}": (lambda name=name: application(name)) for name in APPLICATIONS
    }
    return made | {
        "keras_unet": unet,
        "keras_lstm": lambda: sequence((100, 40), layers.LSTM(128, return_sequences=True), layers.LSTM(64), layers.Dense(10)),
        "keras_bilstm": lambda: sequence(
            (100,), layers.Embedding(5000, 64), layers.Bidirectional(layers.LSTM(64, return_sequences=True)),
            layers.Bidirectional(layers.LSTM(32)), layers.Dense(1, activation="sigmoid"), kind="int32",
        ),
        "keras_gru": lambda: sequence((100, 40), layers.GRU(128, return_sequences=True), layers.GRU(64), layers.Dense(10)),
        "keras_rnn": lambda: sequence((50, 40), layers.SimpleRNN(64), layers.Dense(10)),
        "keras_convlstm": lambda: sequence(
            (8, 32, 32, 3), layers.ConvLSTM2D(16, 3, padding="same", return_sequences=True),
            layers.ConvLSTM2D(16, 3, padding="same"), layers.Conv2D(1, 3, padding="same"),
        ),
        "keras_conv1d": lambda: sequence(
            (400, 16), layers.Conv1D(64, 5, padding="causal", activation="relu"),
            layers.Conv1D(64, 5, dilation_rate=2, padding="causal", activation="relu"), layers.MaxPooling1D(2),
            layers.SeparableConv1D(64, 3), layers.GlobalMaxPooling1D(), layers.Dense(5),
        ),
        "keras_conv3d": lambda: sequence(
            (16, 32, 32, 3), layers.Conv3D(16, 3, padding="same", activation="relu"), layers.MaxPooling3D(),
            layers.Conv3D(32, 3, activation="elu"), layers.GlobalAveragePooling3D(), layers.Dense(5),
        ),
    }  # fmt: skip


def write(name: str, make: Callable[[], tuple[Any, tuple[int, ...], str]], folder: Path) -> None:
    import keras
    import tensorflow
    import tf2onnx

    keras.utils.set_random_seed(0)
    model, shape, kind = make()
    spec = [tensorflow.TensorSpec(shape, kind, name="x")]
    function = tensorflow.function(lambda x: model(x, training=False), input_signature=spec)
    tf2onnx.convert.from_function(function, input_signature=spec, opset=OPSET, output_path=str(folder / f"{name}.onnx"))
    print(f"{name}.onnx", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.keras_zoo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    wanted = set(filter(None, options.only.split(",")))
    for name, make in networks().items():
        if not wanted or name in wanted:
            write(name, make, options.out)


if __name__ == "__main__":
    main()
