"""`build`: compiles models for a target and packs them with inputs and expected outputs.

Expected outputs are ONNX Runtime's in float32; quantised models run as they are. Large float weights are made periodic first
(`make_periodic`), so that a bundle of whole networks fits what may be copied; nothing else about the models changes.
"""

from __future__ import annotations

import platform
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

import minicc
from benchmarks.compare import rule, session
from benchmarks.cuda_kernels import build as build_tiles
from benchmarks.inputs import cases
from benchmarks.models import load, locate
from minicc import walk
from minicc.frontend.model import load_model
from minicc.lower.context import Choices
from minicc.module import Stages
from minicc.targets.parse import target_of
from tools.gpu_check.bundle import LIMIT_BYTES, MIB, Array, Case, Manifest, pack, periodic, write_arrays, write_manifest
from tools.gpu_check.layers import LAYERS, WINOGRAD, layer_model, numbers

TILE_ELEMENTS = ("tf32", "bf16")  # of the products that are timed with every tile
PERIODIC_BYTES = 1 * MIB  # models below keep their own weights
# Small real ones first, so that a broken target shows at once; then those whose tf32 differences are open, and the layers.
MODELS = (
    "hey_jarvis_v0.1", "ch_ppocr_mobile_v2.0_cls_infer", "kaldi", "resnet50", "unet", "efficientnet_b0", *LAYERS,
    "resnet18", "mobilenet_v2", "bert_base", "minilm_l6_trained", "whisper_tiny_encoder", "gpt2", "convnext_tiny", "llama_small",
    "fknetwork_int8", "common_old", "efficientword_resnet50_qint8",
)  # fmt: skip


def build(out: Path, target: str, models: Sequence[str], precisions: Sequence[str], generated: Path | None) -> Path:
    """Compile every model in every precision; returns the archive. A model that fails is recorded with its error."""
    shutil.rmtree(out, ignore_errors=True)
    (out / "artifacts").mkdir(parents=True)
    (out / "data").mkdir()
    (out / "models").mkdir()
    found: list[Case] = []
    for name in models:
        jobs = layer_jobs(name, precisions, out) if name in LAYERS else network_jobs(name, precisions, generated, out)
        for job in jobs:
            case = compile_job(job, target, out)
            print(f"{case.name:<32}{case.compile_s:>8.1f} s {case.bytes / MIB:>8.1f} MiB  {case.error}", flush=True)
            found.append(case)
    if target.startswith("cuda"):
        build_tiles(out / "tiles", ("gemm", "conv"), TILE_ELEMENTS)
    packages = ("numpy", "numba", "numba-cuda", "onnxruntime")
    made_by = {"python": platform.python_version()} | dict(map(_version, packages))
    return pack_within(out, Manifest(target, made_by, tuple(found)), LIMIT_BYTES)


def pack_within(out: Path, manifest: Manifest, limit: int) -> Path:
    """The archive, without the last networks of the list where it would be larger than may be copied; the manifest names them."""
    while True:
        write_manifest(out, manifest)
        archive = pack(out)
        size = archive.stat().st_size
        print(f"{archive}: {size / MIB:.1f} MiB", flush=True)
        networks = [case.model for case in manifest.cases if case.artifact and case.model not in LAYERS]
        if size <= limit or not networks:
            return archive
        why = f"left out: with it the bundle has {size / MIB:.0f} MiB of {limit / MIB:.0f}"
        print(f"{networks[-1]} is {why}")
        gone = [case for case in manifest.cases if case.model == networks[-1]]
        for file in {f for case in gone for f in (case.artifact, case.data, case.onnx) if f}:
            (out / file).unlink(missing_ok=True)
        cases = tuple(replace(case, artifact="", onnx="", error=why) if case in gone else case for case in manifest.cases)
        manifest = replace(manifest, cases=cases)


def _version(package: str) -> tuple[str, str]:
    try:
        return package, version(package)
    except ModuleNotFoundError:
        return package, "missing"


def reference(model: onnx.ModelProto, feeds: dict[str, Array]) -> dict[str, Array]:
    """ONNX Runtime's outputs, in float32 on the CPU; of quantised models as they are written, without its rewrites.

    On a processor without VNNI instructions its products of u8 and s8 saturate: build such bundles on one with them.
    """
    run = session(model.SerializeToString(), None, plain=is_quantised(model))
    return dict(zip([o.name for o in run.get_outputs()], run.run(None, feeds)))


def is_quantised(model: onnx.ModelProto) -> bool:
    return rule(model).kind == "quantised"


@dataclass(frozen=True)
class Job:
    """What to compile for one case: model, what minicc is asked for as `precision`, the case's arrays and model in the bundle."""

    name: str
    precision: str
    model: bytes
    option: str
    inputs: tuple[str, ...]
    data: str
    onnx: str


def network_jobs(name: str, precisions: Sequence[str], generated: Path | None, out: Path) -> Iterator[Job]:
    """A whole model in every precision, or as it is when it is quantised; inputs and outputs are the same ones in float32."""
    model, _ = load(name, locate(name, generated, None))
    quantised = is_quantised(model)
    wanted = [p for p in precisions if (p == "int8") == quantised]
    if model.ByteSize() > PERIODIC_BYTES:
        make_periodic(model)
    feeds, data, whole = cases(name, model)[0].feeds, f"data/{name}.npz", f"models/{name}.onnx"
    if wanted:
        write_arrays(out / data, feeds, reference(model, feeds))
        (out / whole).write_bytes(model.SerializeToString())
    for precision in wanted:
        option = "fp32" if quantised else precision
        own = "" if precision in ("fp16", "bf16") else whole
        yield Job(name, precision, model.SerializeToString(), option, tuple(feeds), data, own)


def layer_jobs(name: str, precisions: Sequence[str], out: Path) -> Iterator[Job]:
    """A single layer in its precisions; a float16 model in "fp16", with inputs and outputs of its own."""
    layer = LAYERS[name]
    for precision in (p for p in precisions if p in layer.precisions):
        feeds, weights = numbers(layer, precision)
        dtype = DTYPES[precision]
        expected = reference(layer_model(layer, weights, feeds, feeds["x0"].dtype), feeds)
        data = f"data/{name}-{precision}.npz"
        write_arrays(out / data, _as_type(feeds, dtype), _as_type(expected, dtype) if precision == "fp16" else expected)
        model = layer_model(layer, weights, feeds, dtype).SerializeToString()
        own = f"models/{name}-{precision}.onnx"
        (out / own).write_bytes(model)
        yield Job(name, precision, model, "tf32" if precision == "tf32" else "fp32", tuple(feeds), data, own)


# Of a layer's own tensors.
DTYPES = {"fp32": np.float32, "tf32": np.float32, "fp16": np.float16, "int8": np.int8}


def _as_type(arrays: dict[str, Array], dtype: Any) -> dict[str, Array]:
    return {name: array.astype(dtype) for name, array in arrays.items()}


def compile_job(job: Job, target: str, out: Path) -> Case:
    """Compile and save one case; an error becomes part of the case."""
    artifact = f"artifacts/{job.name}-{job.precision}.minicc"
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", minicc.HostNodesWarning)
            module = minicc.compile(job.model, target, precision=job.option)
        seconds = time.perf_counter() - started
        module.save(out / artifact)
    except Exception as error:  # whatever it is, the other cases go on
        seconds = time.perf_counter() - started
        return Case(job.name, job.precision, "", job.data, job.inputs, seconds, 0, 0, (), (), describe(error), job.onnx)
    rows = module.explain().rows
    host = tuple(f"{', '.join(row.layers)}: {row.note}" for row in rows if row.tier == "host")
    size, kernels = (out / artifact).stat().st_size, len({row.kernel for row in rows if row.kernel})
    kept = module.report.kept_in_fp32
    ways = compile_ways(job, target, out) if job.name in WINOGRAD else {}
    return Case(job.name, job.precision, artifact, job.data, job.inputs, seconds, size, kernels, host, kept, "", job.onnx, ways)


def compile_ways(job: Job, target: str, out: Path) -> dict[str, str]:
    """Artifacts of a layer by every tile of Winograd's form that is open, and by the first way of its direct sum."""
    options, machine, choices = minicc.Options.from_env().override(precision=job.option), target_of(target), Choices()
    walk.build(load_model(job.model, options), machine, options, Stages(None), choices)
    found = {}
    for layers, names in choices.open.items():
        direct = next(name for name in names if not name.startswith("winograd"))
        for name in (direct, *(name for name in names if name.startswith("winograd"))):
            module = walk.build(load_model(job.model, options), machine, options, Stages(None), Choices({layers: name}))
            found[name] = f"artifacts/{job.name}-{job.precision}-{name.replace(' ', '-')}.minicc"
            module.save(out / found[name])
    return found


def describe(error: BaseException) -> str:
    """One line of an exception."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]


# -- weights that compress


def make_periodic(model: onnx.ModelProto) -> None:
    """Repeat the first `PERIOD` entries of every float weight along each of its longer axes.

    Layers, shapes, types and cost stay; the archive finds the repetitions also after weights have been folded, transposed,
    packed and converted, for vectors have the same period. Weights are scaled by the root of (period / contracted axis): a sum
    over equal channels grows faster than over independent ones. Weights of 8 bits repeat along their other axes only, for the
    scales of a quantised model are those of its own sums.
    """
    contracted = _contracted_axes(model)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(periodic(array, contracted.get(tensor.name)), tensor.name))
        elif tensor.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8) and tensor.name in contracted:
            array = numpy_helper.to_array(tensor)
            summed = {contracted[tensor.name] % array.ndim}
            tensor.CopyFrom(numpy_helper.from_array(periodic(array, kept=summed), tensor.name))


def _contracted_axes(model: onnx.ModelProto) -> dict[str, int]:
    """The axis of each weight over which its operator sums."""
    found: dict[str, int] = {}
    sources = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    for node in model.graph.node:
        if len(node.input) < 2:
            continue
        weights = sources.get(node.input[1], node.input[1])
        attributes: dict[str, Any] = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type in ("Conv", "ConvInteger"):
            found[weights] = 1
        elif node.op_type == "Gemm":
            found[weights] = 1 if attributes.get("transB") else 0
        elif node.op_type in ("MatMul", "MatMulInteger"):
            found[weights] = -2
    return found
