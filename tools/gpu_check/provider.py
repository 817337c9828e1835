"""The same models in ONNX Runtime's CUDA provider, with inputs and outputs on the device; "cpu" stands in for it in tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime

from tools.gpu_check.bundle import Array

CUDA = "CUDAExecutionProvider"


def missing(where: str) -> str:
    """Why there is no such provider here; empty when there is one."""
    if where == "cpu" or CUDA in onnxruntime.get_available_providers():
        return ""
    return f"onnxruntime {onnxruntime.__version__} has no {CUDA}"


def bound(
    path: Path, feeds: Mapping[str, Array], outputs: Mapping[str, Array], precision: str, where: str
) -> tuple[Callable[[], None], Callable[[], list[Array]], str]:
    """(a call, what reads its outputs, how it runs), warmed up: as a CUDA Graph where the provider can.

    outputs: arrays of the shapes and types that come out. Raises RuntimeError when the session does not use the provider.
    """
    forms = [(False, "cpu")] if where == "cpu" else [(True, "CUDA Graph"), (False, "stream")]
    problem: Exception | None = None
    for graph, form in forms:
        try:
            call, read = _bound(path, feeds, outputs, precision, where, graph)
            for _ in range(3):
                call()
            return call, read, form
        except Exception as error:  # a model that cannot be captured may still run
            problem = error
    raise RuntimeError(f"no session: {problem}") from problem


def _bound(
    path: Path, feeds: Mapping[str, Array], outputs: Mapping[str, Array], precision: str, where: str, graph: bool
) -> tuple[Callable[[], None], Callable[[], list[Array]]]:
    providers: Sequence[Any] = ["CPUExecutionProvider"]
    if where == "cuda":
        given = {"use_tf32": str(int(precision == "tf32")), "enable_cuda_graph": str(int(graph))}
        providers = [(CUDA, given), *providers]
    session = onnxruntime.InferenceSession(path, providers=providers)
    if where == "cuda" and session.get_providers()[0] != CUDA:
        raise RuntimeError(f"the session runs on {session.get_providers()[0]}")
    binding = session.io_binding()
    names = {port.name for port in session.get_inputs()}
    held = {n: onnxruntime.OrtValue.ortvalue_from_numpy(a, where, 0) for n, a in feeds.items() if n in names}
    made = {n: onnxruntime.OrtValue.ortvalue_from_shape_and_type(a.shape, a.dtype, where, 0) for n, a in outputs.items()}
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    for name, value in made.items():
        binding.bind_ortvalue_output(name, value)
    options = onnxruntime.RunOptions()
    # A call is enqueued only, as those of the others are; who measures waits for the device.
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def call() -> None:
        session.run_with_iobinding(binding, options)

    def read() -> list[Array]:
        binding.synchronize_outputs()
        return [made[name].numpy() for name in outputs]

    return call, read
