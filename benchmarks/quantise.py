"""Write quantised forms of models with ONNX Runtime's tools, for `benchmarks.cpu`.

    python -m benchmarks.quantise --generated MODELS --out QUANTISED [NAME ...]

Convolutional networks are calibrated on three inputs: `NAME_u8s8`, unsigned activations and signed weights of a scale for each
channel, as Quantize and Dequantize nodes, and `NAME_u8u8`, unsigned weights of one scale, as QLinear operators.
Transformers get `NAME_dynamic`, whose activations are quantised at run time. Weights of seeded networks are not those of trained
ones: agreement between runtimes is what is seen here, accuracy is not.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process

from benchmarks.inputs import case_at

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2")
TRANSFORMERS = ("bert_base", "distilbert")
CALIBRATED_ON = 3

Feeds = dict[str, np.ndarray[Any, Any]]


class Inputs(quantization.CalibrationDataReader):
    """What calibration runs: seeded inputs of the model's shapes."""

    def __init__(self, name: str, model: onnx.ModelProto) -> None:
        feeds = case_at(name, model, {}).feeds
        generators = (np.random.default_rng(seed) for seed in range(CALIBRATED_ON))
        self.given: Iterator[Feeds] = iter(
            [{key: rng.standard_normal(x.shape).astype(x.dtype) for key, x in feeds.items()} for rng in generators]
        )

    def get_next(self) -> Feeds | None:
        """The next inputs, None behind the last."""
        return next(self.given, None)


def quantise(name: str, source: Path, folder: Path) -> list[Path]:
    """Write the quantised forms of one model; their paths."""
    kinds = quantization.QuantType
    with tempfile.TemporaryDirectory() as place:
        prepared = Path(place) / source.name
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        if name in TRANSFORMERS:
            path = folder / f"{name}_dynamic.onnx"
            quantization.quantize_dynamic(str(prepared), str(path), weight_type=kinds.QInt8)
            return [path]
        model = onnx.load(str(prepared))
        paths = [folder / f"{name}_u8s8.onnx", folder / f"{name}_u8u8.onnx"]
        for path, form, weights in zip(
            paths, (quantization.QuantFormat.QDQ, quantization.QuantFormat.QOperator), (kinds.QInt8, kinds.QUInt8)
        ):
            quantization.quantize_static(
                str(prepared), str(path), Inputs(name, model), quant_format=form, activation_type=kinds.QUInt8,
                weight_type=weights, per_channel=weights == kinds.QInt8,
            )  # fmt: skip
        return paths


def main() -> None:
    """Quantise the named models."""
    parser = argparse.ArgumentParser(prog="benchmarks.quantise", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[*NETWORKS, *TRANSFORMERS], help="models; default those named above")
    parser.add_argument("--generated", type=Path, required=True, help="folder of .onnx files made by benchmarks/export.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for the quantised models")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    logging.disable(logging.WARNING)
    for name in arguments.names:
        for path in quantise(name, arguments.generated / f"{name}.onnx", arguments.out):
            print(f"{path.name}  {path.stat().st_size >> 20} MiB")


if __name__ == "__main__":
    main()
