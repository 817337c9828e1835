"""What travels to the GPU machine: a folder of artifacts and arrays with a manifest, as one compressed archive."""

from __future__ import annotations

import json
import lzma
import tarfile
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
MIB = 1 << 20
LIMIT_BYTES = 64 * MIB  # what may be copied to the machine
DICTIONARY_BYTES = 256 * MIB  # so that the archive finds equal weights in the artifacts of several precisions
PERIOD = 47  # prime: a kernel that reads a tile beside the right one reads other numbers
# "int8" is that of models which are quantised themselves, and their only one.
PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8")
# Largest allowed difference from float32, relative to the largest magnitude of an output: 20 unit roundoffs of the 16-bit types
# and of TF32's 10-bit significands; for quantised models that of `benchmarks.compare`.
TOLERANCE = {"fp32": 1e-4, "tf32": 20 * 2.0**-11, "fp16": 20 * 2.0**-11, "bf16": 20 * 2.0**-8, "int8": 2e-2}


@dataclass(frozen=True)
class Case:
    """One model in one precision.

    artifact, data: files in the bundle; artifact is empty when compilation failed, which `error` then explains.
    onnx:           the model's file in the bundle, for ONNX Runtime; empty where it has no such precision.
    inputs:         input names in the network's own order.
    compile_s:      seconds of `minicc.compile` with the kernel store as it was. bytes: size of the artifact.
    ways:           artifacts in which a convolution is a direct sum or goes by a tile of Winograd's form, by the way's name.
    host_nodes:     nodes that run on the host. kept_in_fp32: nodes that a 16-bit precision leaves in float32.
    """

    model: str
    precision: str
    artifact: str
    data: str
    inputs: tuple[str, ...]
    compile_s: float
    bytes: int
    kernels: int
    host_nodes: tuple[str, ...]
    kept_in_fp32: tuple[str, ...]
    error: str = ""
    onnx: str = ""
    ways: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.model}/{self.precision}"


@dataclass(frozen=True)
class Manifest:
    """The cases of a bundle, and what made it."""

    target: str
    made_by: Mapping[str, str]
    cases: tuple[Case, ...]

    @property
    def on_gpu(self) -> bool:
        return self.target.startswith("cuda")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / "manifest.json").write_text(json.dumps(asdict(manifest), indent=1))


def read_manifest(folder: Path) -> Manifest:
    data = json.loads((folder / "manifest.json").read_text())
    tuples = ("inputs", "host_nodes", "kept_in_fp32")
    cases = tuple(Case(**{k: tuple(v) if k in tuples else v for k, v in case.items()}) for case in data["cases"])
    return Manifest(data["target"], data["made_by"], cases)


def write_arrays(path: Path, feeds: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
    """Inputs and expected outputs of a model as one .npz file; rows that repeat are kept once, with their number."""
    arrays = {f"in:{name}": a for name, a in feeds.items()} | {f"out:{name}": a for name, a in outputs.items()}
    for name, array in list(arrays.items()):
        if array.ndim and len(array) > PERIOD and np.array_equal(array[PERIOD:], array[:-PERIOD]):
            arrays |= {name: array[:PERIOD], f"rows:{name}": np.array(len(array))}
    np.savez(path, **arrays)  # type: ignore[arg-type]


def read_arrays(path: Path) -> tuple[dict[str, Array], dict[str, Array]]:
    """(inputs, expected outputs) by name."""
    with np.load(path, allow_pickle=False) as data:
        found = {name: data[name] for name in data.files}
    for name in [name for name in found if name.startswith("rows:")]:
        found[name[5:]] = found[name[5:]][np.arange(found[name]) % PERIOD]
    return tuple({n[len(kind) :]: a for n, a in found.items() if n.startswith(kind)} for kind in ("in:", "out:"))  # type: ignore[return-value]


def pack(folder: Path) -> Path:
    """The folder as FOLDER.tar.xz beside it."""
    archive = folder.with_name(f"{folder.name}.tar.xz")
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 1, "dict_size": DICTIONARY_BYTES}]
    with lzma.open(archive, "wb", filters=filters) as stream, tarfile.open(fileobj=stream, mode="w") as tar:
        tar.add(folder, arcname=".")
    return archive


def unpack(path: Path, into: Path) -> Path:
    """The folder of a bundle given as a folder or as an archive, which is unpacked into `into`."""
    if path.is_dir():
        return path
    with lzma.open(path) as stream, tarfile.open(fileobj=stream) as tar:
        tar.extractall(into, filter="data")
    return into


def largest_difference(expected: Mapping[str, Array], actual: Mapping[str, Array]) -> tuple[float, str]:
    """The largest difference relative to the largest magnitude of its output, and what is wrong beyond numbers."""
    worst = 0.0
    for name, want in expected.items():
        got = actual.get(name)
        if got is None or got.shape != want.shape or got.dtype != want.dtype:
            found = "nothing" if got is None else f"{got.dtype}{list(got.shape)}"
            return float("inf"), f"{name}: expected {want.dtype}{list(want.shape)}, got {found}"
        if not want.size:
            continue
        if want.dtype.kind not in "f":
            wrong = int(np.count_nonzero(want != got))
            worst = max(worst, wrong / want.size)
            continue
        a, b = want.astype(np.float64), got.astype(np.float64)
        finite = np.isfinite(a)
        if not np.array_equal(finite, np.isfinite(b)):
            return float("inf"), f"{name}: infinities or NaN differ"
        if finite.any():
            worst = max(worst, float(np.abs(a - b)[finite].max() / max(np.abs(a[finite]).max(), 1e-30)))
    return worst, ""


def periodic(array: Array, contracted: int | None = None, kept: Container[int] = ()) -> Array:
    """The array with period `PERIOD` along every axis that is longer but those `kept`; scaled for sums over `contracted`."""
    out = array
    for axis, size in enumerate(array.shape):
        if size > PERIOD and axis not in kept:
            out = out.take(np.arange(size) % PERIOD, axis)
    if contracted is not None and array.ndim > 1 and array.shape[contracted] > PERIOD:
        out = out * np.float32(np.sqrt(PERIOD / array.shape[contracted]))
    return np.ascontiguousarray(out)
