"""Write the 26 generated models as ONNX files, each checked against torch in ONNX Runtime.

    python -m benchmarks.export --out DIR [--only NAME,NAME] [--layers 2]

Run it in an environment of its own (benchmarks/README.md): torch is no dependency of minicc. The files are
reproducible: seeded weights, no names or stack traces of the exporting machine.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort

if TYPE_CHECKING:
    from benchmarks.networks import Network

NAMES = (
    "bert_base", "bert_base_static", "gpt2", "gpt2_kv", "llama_small", "whisper_tiny_encoder", "distilbert",
    "minilm_l6_trained", "mlp_mixer", "lstm_classifier", "ssdlite320_nms", "unet", "lraspp_mobilenet_v3",
    "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "vgg11", "squeezenet1_1",
    "convnext_tiny", "shufflenet_v2_x1_0", "mnasnet1_0", "resnext50_32x4d", "resnet50_legacy13",
    "mobilenet_v2_legacy13",
)
TOLERANCE = 1e-4


def export(network: Network, path: Path) -> None:
    """Trace and write one network; the exporters' chatter is dropped."""
    import torch

    common: dict[str, Any] = {"input_names": network.inputs, "output_names": network.outputs}
    common["opset_version"] = network.opset
    quiet = io.StringIO()
    with torch.no_grad(), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        if network.exporter == "dynamo":
            shapes = dynamic_shapes(network) if network.dynamic else None
            arguments = tuple(network.arguments)
            torch.onnx.export(
                network.module, arguments, str(path), dynamo=True, external_data=False, dynamic_shapes=shapes,
                **common,
            )
        else:
            torch.onnx.export(
                network.module, tuple(network.arguments), str(path), dynamo=False,
                dynamic_axes=network.dynamic or None, **common,
            )
    tidy(path, network)


def dynamic_shapes(network: Network) -> tuple[Any, ...]:
    """torch.export's description of the symbolic axes, in the structure of the arguments."""
    import torch

    names = iter(network.inputs)

    def describe(argument: Any) -> Any:
        if isinstance(argument, (list, tuple)):
            return [describe(each) for each in argument]
        return dict.fromkeys(network.dynamic.get(next(names), {}), torch.export.Dim.DYNAMIC)

    shapes = tuple(describe(argument) for argument in network.arguments)
    variadic = type(network.module).forward.__code__.co_flags & 0x04
    return (shapes,) if variadic else shapes


def tidy(path: Path, network: Network) -> None:
    """Give symbolic dimensions their readable names and drop what names the exporting machine."""
    model = onnx.load(path)
    graph = model.graph
    names: dict[str, str] = {}
    for value in graph.input:
        for axis, name in network.dynamic.get(value.name, {}).items():
            names.setdefault(value.type.tensor_type.shape.dim[axis].dim_param, name)
    values = [*graph.input, *graph.output, *graph.value_info]
    for value in values:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param and dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]
    for message in (model, graph, *model.functions, *graph.node, *values, *graph.initializer):
        for field in ("metadata_props", "doc_string"):
            if field in message.DESCRIPTOR.fields_by_name:
                message.ClearField(field)
    path.write_bytes(model.SerializeToString(deterministic=True))


def flatten(tree: Any) -> list[Any]:
    if isinstance(tree, (list, tuple)):
        return [leaf for each in tree for leaf in flatten(each)]
    return [tree]


def verify(network: Network, path: Path) -> float:
    """Largest relative difference between ONNX Runtime and torch; ValueError when the model is no good."""
    import torch

    onnx.checker.check_model(str(path))
    with torch.no_grad():
        expected = [tensor.numpy() for tensor in flatten(network.module(*network.arguments))]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = dict(zip(network.inputs, (tensor.numpy() for tensor in flatten(network.arguments))))
    found = session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})
    worst = 0.0
    for want, got in zip(expected, found, strict=True):
        if want.shape != got.shape or not np.isfinite(got).all() or np.ptp(got) == 0:
            raise ValueError(f"{path.name}: wrong shape, not finite or constant")
        worst = max(worst, float(np.abs(got - want).max() / np.abs(want).max()))
    if worst > TOLERANCE:
        raise ValueError(f"{path.name}: differs from torch by {worst:.1e}")
    return worst


def prepare() -> None:
    """Nothing is downloaded, and exporters' warnings are dropped."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


def write(known: Mapping[str, Callable[[], Network]], folder: Path) -> int:
    """Export and verify networks, a line for each; 1 if any fails."""
    folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name, build in known.items():
        path = folder / f"{name}.onnx"
        start = time.perf_counter()
        try:
            network = build()
            network.module.eval()
            export(network, path)
            worst = verify(network, path)
        except Exception as error:      # one exporter's failure must not keep the other models away
            failed += 1
            path.unlink(missing_ok=True)
            print(f"{name:24} {type(error).__name__}: {error}"[:400], flush=True)
            continue
        size, seconds = path.stat().st_size / 1e6, time.perf_counter() - start
        print(f"{name:24} {size:7.1f} MB  differs from torch by {worst:.1e}  {seconds:.0f} s", flush=True)
    return 1 if failed else 0


def main() -> int:
    """Export the chosen models; 1 if any fails."""
    parser = argparse.ArgumentParser("benchmarks.export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for NAME.onnx")
    parser.add_argument("--only", default=",".join(NAMES), help="comma-separated names; default all")
    parser.add_argument("--layers", type=int, help="cap the depth of the transformers, for smaller files")
    arguments = parser.parse_args()
    prepare()
    from benchmarks.networks import builders

    known = builders(arguments.layers)
    names = arguments.only.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"unknown model {unknown[0]}; known: {', '.join(NAMES)}")
    return write({name: known[name] for name in names}, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
