"""Other runtimes that a model can be measured beside: one function each, imported when it is asked for.

MNN and ncnn read formats of their own. Their converters, and a first call, run in a process of their own
(`python -m minicc.peers`), because either may end the process on a model that it does not know. MNN's converter is called
below its command, which installs a package for usage statistics. Nothing here belongs to the compiler.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from minicc.errors import InputError

Call = Callable[[], Sequence[Any]]
_TRIAL_SECONDS = 120.0


def peer(name: str, path: Path, feeds: Mapping[str, Any], threads: int) -> Call:
    """A call of the model in another runtime with as many threads, in float32. Both raise InputError where that cannot be."""
    if name not in PEERS:
        raise InputError(f"unknown runtime {name!r}", hint=f"one of {', '.join(PEERS)}")
    packages, make = PEERS[name]
    for package in packages:
        if find_spec(package) is None:
            extra = " --no-deps" if package == "pnnx" else ""  # its program needs none of them
            raise InputError(f"{package} is not installed", hint=f"pip install{extra} {package}")
    try:
        made = make(path, feeds, threads)
    except InputError:
        raise
    except Exception as error:  # theirs, of many kinds
        raise InputError(f"{name} cannot run {path}", why=str(error)) from error

    def call() -> Sequence[Any]:
        try:
            return made()
        except Exception as error:
            raise InputError(f"{name} cannot run {path} on these inputs", why=str(error)) from error

    return call


# ---------------------------------------------------------------------------------------- runtimes that read ONNX files


def _ort(path: Path, feeds: Mapping[str, Any], threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def call() -> Sequence[Any]:
        return session.run(None, dict(feeds))  # type: ignore[no-any-return]

    return call


def _openvino(path: Path, feeds: Mapping[str, Any], threads: int) -> Call:
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = core.compile_model(core.read_model(str(path)), "CPU", settings).create_infer_request()
    return lambda: list(request.infer(dict(feeds)).values())


# ------------------------------------------------------------------------------------ runtimes with formats of their own


def _tried(name: str) -> Callable[[Path, Mapping[str, Any], int], Call]:
    """A runtime of `_CONVERTED`: converted and called once in another process, then loaded here."""

    def make(path: Path, feeds: Mapping[str, Any], threads: int) -> Call:
        with tempfile.TemporaryDirectory() as folder:
            arrays: dict[str, Any] = {key: np.asarray(value) for key, value in feeds.items()}
            np.savez(Path(folder, "feeds.npz"), **arrays)
            command = [sys.executable, "-m", "minicc.peers", name, str(path), folder, str(threads)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=_TRIAL_SECONDS, check=False)
            except subprocess.TimeoutExpired:
                raise InputError(f"{name} cannot run {path}", why=f"no result after {_TRIAL_SECONDS:.0f} s") from None
            if done.returncode:
                said = [line for line in done.stderr.splitlines() if line.strip()]
                why = said[-1] if said else f"its process ended with {done.returncode}"
                raise InputError(f"{name} cannot run {path}", why=why)
            _, load = _CONVERTED[name]
            with _on_stderr():
                return load(Path(folder), path, feeds, threads)

    return make


def _trial(name: str, path: Path, folder: Path, threads: int) -> None:
    """Convert the model into `folder` and call it once: the work of the other process."""
    with np.load(folder / "feeds.npz", allow_pickle=False) as file:
        feeds = {key: file[key] for key in file.files}
    convert, load = _CONVERTED[name]
    convert(path, folder, feeds)
    load(folder, path, feeds, threads)()


@contextmanager
def _on_stderr() -> Iterator[None]:
    """What libraries print goes to stderr, so that a command's own output can be read by programs."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _names(path: Path) -> tuple[list[str], list[str]]:
    """Inputs without initial values, and outputs, of an ONNX file."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    return [i.name for i in graph.input if i.name not in weights], [o.name for o in graph.output]


def _convert_mnn(path: Path, folder: Path, feeds: Mapping[str, Any]) -> None:
    import _tools  # MNN's converter itself

    del feeds
    made = folder / "model.mnn"
    _tools.mnnconvert(["mnnconvert", "-f", "ONNX", "--modelFile", str(path), "--MNNModel", str(made), "--bizCode", "minicc"])
    if not made.exists():
        raise ValueError("its converter does not take the model")


def _load_mnn(folder: Path, path: Path, feeds: Mapping[str, Any], threads: int) -> Call:
    from MNN import expr, nn

    kinds = {np.dtype(np.float32): expr.float, np.dtype(np.int32): expr.int, np.dtype(np.uint8): expr.uint8}
    inputs, outputs = _names(path)
    arrays = []
    for key in inputs:
        array = np.asarray(feeds[key])
        # MNN has neither int64 nor bool: its converter makes both int32.
        array = np.ascontiguousarray(array.astype(np.int32) if array.dtype in (np.int64, np.bool_) else array)
        if array.dtype not in kinds:
            raise ValueError(f"input {key} is {array.dtype}, which MNN does not have")
        arrays.append((array, kinds[array.dtype]))
    manager = nn.create_runtime_manager(({"backend": "CPU", "precision": "high", "numThread": threads},))
    network = nn.load_module_from_file(str(folder / "model.mnn"), inputs, outputs, runtime_manager=manager)

    def call() -> Sequence[Any]:
        found = network.forward([expr.const(a, list(a.shape), expr.NCHW, kind) for a, kind in arrays])
        return [np.array(value.read()) for value in (found if isinstance(found, list) else [found])]

    return call


_PNNX_DTYPES = {"float32": "f32", "float64": "f64", "float16": "f16", "int64": "i64", "int32": "i32", "uint8": "u8", "int8": "i8"}


def _convert_ncnn(path: Path, folder: Path, feeds: Mapping[str, Any]) -> None:
    found = find_spec("pnnx")
    assert found is not None and found.origin is not None
    program = Path(found.origin).with_name("pnnx")  # importing the package would ask for torch
    shapes = []
    for key in _names(path)[0]:
        array = np.asarray(feeds[key])
        if array.dtype.name not in _PNNX_DTYPES:
            raise ValueError(f"input {key} is {array.dtype}, which pnnx does not have")
        shapes.append(f"[{','.join(map(str, array.shape))}]{_PNNX_DTYPES[array.dtype.name]}")
    program.chmod(0o755)  # wheels do not carry the mark of a program
    files = [f"{kind}={folder / name}" for kind, name in (
        ("ncnnparam", "model.param"), ("ncnnbin", "model.bin"), ("ncnnpy", "model.py"), ("pnnxparam", "pnnx.param"),
        ("pnnxbin", "pnnx.bin"), ("pnnxpy", "pnnx.py"), ("pnnxonnx", "pnnx.onnx"),
    )]  # fmt: skip
    # It writes a file beside the model, too: a link lets that be the folder.
    link = folder / "model.onnx"
    link.symlink_to(path.resolve())
    done = subprocess.run(
        [str(program), str(link), f"inputshape={','.join(shapes)}", "fp16=0", *files],
        capture_output=True, text=True, check=False, cwd=folder,
    )  # fmt: skip
    if done.returncode or not (folder / "model.param").exists():
        raise ValueError(f"pnnx does not convert the model ({done.returncode})")


def _load_ncnn(folder: Path, path: Path, feeds: Mapping[str, Any], threads: int) -> Call:
    import ncnn

    text = (folder / "model.py").read_text()
    inputs, outputs = _names(path)
    # How the model was cut to ncnn's arrays without a batch is said in the script that pnnx writes.
    given = re.findall(r'ex\.input\("(\w+)", ncnn\.Mat\((\w+)\.\w[^,]*(?:, batch_index=(\d+))?\)\.clone', text)
    taken = re.findall(r'_, (\w+) = ex\.extract\("(\w+)"\)', text)
    batches = dict(re.findall(r"from_numpy\((\w+)\.numpy\(batch_index=(\d+)\)\)", text))
    if len(given) != len(inputs) or len(taken) != len(outputs):
        raise ValueError("pnnx changed the inputs or outputs")
    network = ncnn.Net()
    network.opt.num_threads = threads
    network.opt.use_vulkan_compute = False
    for kind in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage"):
        setattr(network.opt, f"use_{kind}", False)
    if network.load_param(str(folder / "model.param")) or network.load_model(str(folder / "model.bin")):
        raise ValueError("ncnn does not load what pnnx made")
    mats = []
    for key, (blob, _, batch) in zip(inputs, given):
        array = np.asarray(feeds[key])
        array = np.ascontiguousarray(array.astype(np.int32) if array.dtype == np.int64 else array)
        mats.append((blob, ncnn.Mat(array, batch_index=int(batch)) if batch else ncnn.Mat(array)))

    def call() -> Sequence[Any]:
        with network.create_extractor() as extractor:
            for blob, mat in mats:
                extractor.input(blob, mat.clone())  # layers work in place
            results = []
            for variable, blob in taken:
                code, mat = extractor.extract(blob)
                if code:
                    raise ValueError(f"ncnn ended with {code}")
                batch = batches.get(variable)
                results.append(np.array(mat.numpy(batch_index=int(batch)) if batch else mat.numpy()))
            return results

    return call


_CONVERTED: Mapping[str, tuple[Callable[..., None], Callable[..., Call]]] = {
    "mnn": (_convert_mnn, _load_mnn),
    "ncnn": (_convert_ncnn, _load_ncnn),
}
PEERS: Mapping[str, tuple[tuple[str, ...], Callable[[Path, Mapping[str, Any], int], Call]]] = {
    "ort": (("onnxruntime",), _ort),
    "openvino": (("openvino",), _openvino),
    "mnn": (("MNN",), _tried("mnn")),
    "ncnn": (("ncnn", "pnnx"), _tried("ncnn")),
}

if __name__ == "__main__":
    name, path, folder, threads = sys.argv[1:]
    try:
        _trial(name, Path(path), Path(folder), int(threads))
    except Exception as error:
        sys.exit(str(error) or type(error).__name__)
