"""`build`: compiles models for a target and packs them with inputs and expected outputs.

Expected outputs are ONNX Runtime's in float32. Large weights are made periodic first (`make_periodic`), so that a bundle of
whole networks fits what may be copied; nothing else about the models changes.
"""

from __future__ import annotations

import platform
import shutil
import time
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper

import minicc
from benchmarks.inputs import cases
from benchmarks.models import load, locate
from tools.gpu_check.bundle import LIMIT_BYTES, MIB, Array, Case, Manifest, pack, write_arrays, write_manifest

PERIOD = 61  # prime: a kernel that reads a tile beside the right one reads other numbers
PERIODIC_BYTES = 1 * MIB  # models below keep their own weights
# Small real ones first, so that a broken target shows at once.
MODELS = (
    "hey_jarvis_v0.1", "ch_ppocr_mobile_v2.0_cls_infer", "kaldi", "resnet18", "mobilenet_v2", "bert_base", "resnet50",
    "minilm_l6_trained", "unet", "efficientnet_b0", "whisper_tiny_encoder", "gpt2", "convnext_tiny", "llama_small",
)  # fmt: skip


def build(out: Path, target: str, models: Sequence[str], precisions: Sequence[str], generated: Path | None) -> Path:
    """Compile every model in every precision; returns the archive. A model that fails is recorded with its error."""
    shutil.rmtree(out, ignore_errors=True)
    (out / "artifacts").mkdir(parents=True)
    (out / "data").mkdir()
    found: list[Case] = []
    for name in models:
        model, _ = load(name, locate(name, generated, None))
        if model.ByteSize() > PERIODIC_BYTES:
            make_periodic(model)
        feeds = cases(name, model)[0].feeds
        expected = reference(model, feeds)
        write_arrays(out / "data" / f"{name}.npz", feeds, expected)
        for precision in precisions:
            case = compile_case(model.SerializeToString(), name, precision, target, out, tuple(feeds))
            print(f"{case.name:<32}{case.compile_s:>8.1f} s {case.bytes / MIB:>8.1f} MiB  {case.error}", flush=True)
            found.append(case)
    packages = ("numpy", "numba", "numba-cuda", "onnxruntime")
    write_manifest(out, Manifest(target, {"python": platform.python_version()} | dict(map(_version, packages)), tuple(found)))
    archive = pack(out)
    size = archive.stat().st_size
    print(f"{archive}: {size / MIB:.1f} MiB{'' if size <= LIMIT_BYTES else ', more than may be copied: leave some models out'}")
    return archive


def _version(package: str) -> tuple[str, str]:
    try:
        return package, version(package)
    except ModuleNotFoundError:
        return package, "missing"


def reference(model: onnx.ModelProto, feeds: dict[str, Array]) -> dict[str, Array]:
    """ONNX Runtime's outputs, in float32 on the CPU."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds)))


def compile_case(model: bytes, name: str, precision: str, target: str, out: Path, inputs: tuple[str, ...]) -> Case:
    """Compile and save one case."""
    artifact = f"artifacts/{name}-{precision}.minicc"
    data = f"data/{name}.npz"
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", minicc.HostNodesWarning)
            module = minicc.compile(model, target, precision=precision)
        seconds = time.perf_counter() - started
        module.save(out / artifact)
    except Exception as error:  # whatever it is, the other cases go on
        return Case(name, precision, "", data, inputs, time.perf_counter() - started, 0, 0, (), (), describe(error))
    rows = module.explain().rows
    host = tuple(f"{', '.join(row.layers)}: {row.note}" for row in rows if row.tier == "host")
    size, kernels = (out / artifact).stat().st_size, len({row.kernel for row in rows if row.kernel})
    return Case(name, precision, artifact, data, inputs, seconds, size, kernels, host, module.report.kept_in_fp32)


def describe(error: BaseException) -> str:
    """One line of an exception."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]


# -- weights that compress


def make_periodic(model: onnx.ModelProto) -> None:
    """Repeat the first `PERIOD` entries of every float weight along each of its longer axes.

    Layers, shapes, types and cost stay; the archive finds the repetitions also after weights have been folded, transposed,
    packed and converted, for vectors have the same period. Weights are scaled by the root of (period / contracted axis): a sum
    over equal channels grows faster than over independent ones.
    """
    contracted = _contracted_axes(model)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(periodic(array, contracted.get(tensor.name)), tensor.name))


def periodic(array: Array, contracted: int | None = None) -> Array:
    """The array with period `PERIOD` along every axis that is longer."""
    out = array
    for axis, size in enumerate(array.shape):
        if size > PERIOD:
            out = out.take(np.arange(size) % PERIOD, axis)
    if contracted is not None and array.ndim > 1 and array.shape[contracted] > PERIOD:
        out = out * np.float32(np.sqrt(PERIOD / array.shape[contracted]))
    return np.ascontiguousarray(out)


def _contracted_axes(model: onnx.ModelProto) -> dict[str, int]:
    """The axis of each weight over which its operator sums."""
    found: dict[str, int] = {}
    for node in model.graph.node:
        if len(node.input) < 2:
            continue
        attributes: dict[str, Any] = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Conv":
            found[node.input[1]] = 1
        elif node.op_type == "Gemm":
            found[node.input[1]] = 1 if attributes.get("transB") else 0
        elif node.op_type == "MatMul":
            found[node.input[1]] = -2
    return found
