"""`minicc doctor`: facts about this machine."""

from __future__ import annotations

import platform
from importlib import metadata, util
from typing import Any

import minicc
from minicc.options import Options
from minicc.runtime.rates import rates_of
from minicc.runtime.store import Store
from minicc.targets.cpu import available_threads, host_target

_PACKAGES = ("numpy", "onnx", "numba", "llvmlite", "ml_dtypes")
_OPTIONAL = {
    "onnxruntime": "minicc bench, diff and demo compare with it",
    "openvino": "minicc bench compares with it",
    "matplotlib": "roofline pictures",
    "numba_cuda": "the CUDA target",
}


def facts() -> dict[str, Any]:
    """What minicc finds on this machine, by name."""
    target = host_target()
    options = Options.from_env()
    store = Store(options.store_dir)
    rates = rates_of(target, store)
    found: dict[str, Any] = {
        "minicc": minicc.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": target.cpu,
        "vectors": f"{target.vector_width} x float32, {target.vector_registers} registers",
        "caches": f"L1 {target.l1_bytes >> 10} KiB, L2 {target.l2_bytes >> 10} KiB",
        "rates": f"a byte from memory {rates.memory:.1f}, from a cache {rates.cache:.1f}, a value transformed {rates.value:.1f} "
        "times a product's operation",
        "threads": available_threads(),
        "kernel store": f"{options.store_dir or 'off'}, {store.size() / 1e6:.1f} MB",
        "native executor": "thread pool"
        if platform.system() == "Linux"
        else "one thread (the pool needs Linux)",
    }
    for package in _PACKAGES:
        found[package] = metadata.version(package)
    for package, use in _OPTIONAL.items():
        found[package] = _version(package) or f"not installed ({use})"
    return found


def _version(package: str) -> str:
    try:
        return metadata.version(package.replace("_", "-")) if util.find_spec(package) else ""
    except (metadata.PackageNotFoundError, ImportError):
        return ""
