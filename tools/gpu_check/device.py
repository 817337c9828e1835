"""The device through PyTorch: arrays on it, waiting for it, and what it can do at best. "cpu" stands in for it in tests."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import minicc
from tools.gpu_check.bundle import MIB, Array
from tools.gpu_check.timing import medians

COPY_BYTES = 1024 * MIB


def place(module: Any, feeds: Mapping[str, Array], where: str) -> tuple[dict[str, Any], str]:
    """The inputs where the module reads them without a copy, and how they are given; numpy arrays where it takes nothing else."""
    if where == "cpu":
        return dict(feeds), "numpy"
    import torch

    given = {name: torch.from_numpy(np.ascontiguousarray(a)).to(where) for name, a in feeds.items()}
    try:
        module.run(None, given)
    except (TypeError, ValueError) as error:  # minicc.InputError is a ValueError
        return dict(feeds), f"numpy ({type(error).__name__}: {error})"[:200]
    return given, "device"


def to_host(outputs: list[Any]) -> list[Array]:
    """Outputs as numpy arrays, whatever they are on."""
    return [a if isinstance(a, np.ndarray) or not hasattr(a, "__dlpack__") else _from_device(a) for a in outputs]


def _from_device(array: Any) -> Array:
    import torch

    found: Array = torch.from_dlpack(array).cpu().numpy()
    return found


def replay_of(module: Any, given: Mapping[str, Any]) -> Callable[[], object] | None:
    """A call that only launches the module's captured graph for these inputs; None for modules without one."""
    try:
        found: Callable[[], object] = module.replay(given)
    except minicc.TargetError:
        return None
    return found


def synchroniser(where: str) -> Callable[[], object]:
    """What waits until the device is idle."""
    if where == "cpu":
        return lambda: None
    import torch

    return torch.cuda.synchronize


def is_sound(where: str) -> bool:
    """Whether this process can still use the device."""
    try:
        synchroniser(where)()
    except Exception:
        return False
    return True


def machine(where: str) -> dict[str, Any]:
    """Names and versions; on a GPU also the time of an empty graph's launch and of a large copy, from this very run."""
    import torch

    row: dict[str, Any] = {"machine": platform.platform(), "python": platform.python_version(), "torch": torch.__version__}
    if where == "cpu":
        return row
    properties = torch.cuda.get_device_properties(0)
    row |= {
        "device": properties.name, "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory, "cuda_of_torch": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
    }  # fmt: skip
    one = torch.zeros(1, device=where)
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=where)
    target = torch.empty_like(source)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one.add_(1)
    times = medians({"launch": graph.replay, "copy": lambda: target.copy_(source)}, synchroniser(where), 0.5)
    row["smallest_graph_ms"] = times["launch"]
    row["copy_gb_per_s"] = 2 * COPY_BYTES / times["copy"] / 1e6
    return row
