"""Other runtimes that a model can be measured beside: one function each, imported when it is asked for.

MNN and ncnn are not here: MNN's converter installs a package for usage statistics when it is imported, and ncnn's wheel has
no converter from ONNX.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minicc.errors import InputError

Call = Callable[[], Sequence[Any]]


def peer(name: str, path: Path, feeds: Mapping[str, Any], threads: int) -> Call:
    """A call of the model in another runtime with as many threads, in float32. Raises InputError where it cannot be had."""
    if name not in PEERS:
        raise InputError(f"unknown runtime {name!r}", hint=f"one of {', '.join(PEERS)}")
    package, make = PEERS[name]
    if find_spec(package) is None:
        raise InputError(f"{package} is not installed", hint=f"pip install {package}")
    try:
        return make(path, feeds, threads)
    except Exception as error:  # theirs, of many kinds
        raise InputError(f"{package} cannot run {path}", why=str(error)) from error


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


PEERS: Mapping[str, tuple[str, Callable[[Path, Mapping[str, Any], int], Call]]] = {
    "ort": ("onnxruntime", _ort),
    "openvino": ("openvino", _openvino),
}
