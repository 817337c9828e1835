"""minicc: a graph-level deep-learning compiler. ONNX in, fast and readable kernels out.

    module = minicc.compile("model.onnx")
    y = module(x)

Names are loaded on first use, so that `import minicc` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from minicc import backend as backend
    from minicc import errors as errors
    from minicc.api import HostNodesWarning as HostNodesWarning
    from minicc.api import compile as compile  # noqa: A004
    from minicc.errors import MiniccError as MiniccError
    from minicc.module import Module as Module
    from minicc.module import load as load
    from minicc.options import Options as Options

_ERRORS = (
    "MiniccError",
    "InvalidModelError",
    "UnsupportedOpError",
    "ShapeError",
    "InputError",
    "TargetError",
    "ResourceLimitError",
    "ArtifactError",
    "PlacementError",
    "VerifyError",
    "CodegenError",
)
_HOMES = {
    "compile": "minicc.api",
    "HostNodesWarning": "minicc.api",
    "Module": "minicc.module",
    "load": "minicc.module",
    "Options": "minicc.options",
    **dict.fromkeys(_ERRORS, "minicc.errors"),
}
_MODULES = ("backend", "errors")

__all__ = sorted(["__version__", *_HOMES, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"minicc.{name}")
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'minicc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
