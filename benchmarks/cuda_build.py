"""CUDA's template kernels as text, and the machine code of cubins as text; minicc.codegen.cuda compiles."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import minicc.kernels
from minicc.codegen.cuda import find_tool

KERNELS = Path(minicc.kernels.__path__[0]) / "cuda"


def render(name: str, constants: Mapping[str, object], changes: Mapping[str, str] | None = None) -> str:
    """A kernel file's text with its constants put in, and further replacements."""
    text = (KERNELS / f"{name}.py").read_text(encoding="utf-8")
    for key, value in constants.items():
        text, count = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
        if count != 1:
            raise KeyError(f"{name} has no constant {key}")
    for old, new in (changes or {}).items():
        text = text.replace(old, new)
    return text


def machine_text(cubin: bytes) -> str:
    """The SASS of a cubin. Raises RuntimeError without cuobjdump."""
    tool = find_tool("cuobjdump")
    if tool is None:
        raise RuntimeError("cuobjdump is not installed: pip install nvidia-cuda-cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
