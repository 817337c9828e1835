"""CUDA kernel text to PTX and to a cubin, without a GPU: numba-cuda writes PTX, ptxas assembles it."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import minicc.kernels

KERNELS = Path(minicc.kernels.__path__[0]) / "cuda"


@dataclass(frozen=True)
class Assembled:
    """A cubin, and what ptxas says of it: registers per thread, bytes spilled."""

    cubin: bytes
    registers: int
    spills: int


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


def words_of(text: str) -> int:
    """Number of a kernel's words, its own epilogue's address included."""
    found = re.search(r"(?m)^EPILOGUE = (\d+)", text)
    if found is None:
        raise ValueError("no EPILOGUE in this kernel")
    return int(found[1]) + 1


def ptx_of(text: str, words: int, threads: int, capability: tuple[int, int] = (9, 0), blocks: int = 1) -> str:
    """PTX of the text's `kernel(args)` whose entry is named "kernel". blocks: that must fit a multiprocessor."""
    from numba import cuda
    from numba.cuda import dispatcher, types

    names: dict[str, Any] = {}
    exec(compile(text, "<kernel>", "exec"), names)
    # Numba asks the device for its capability when it compiles functions that a kernel calls.
    device = SimpleNamespace(compute_capability=capability)
    with patch.object(dispatcher, "get_current_device", lambda: device):
        signature = types.void(types.UniTuple(types.int64, words))
        ptx, _ = cuda.compile_ptx(names["kernel"], signature, cc=capability, launch_bounds=(threads, blocks))
    entry = re.search(r"\.visible \.entry (\w+)", ptx)
    if entry is None:
        raise ValueError("no entry")
    return str(ptx).replace(entry[1], "kernel")


def find_tool(name: str) -> str | None:
    """ptxas, cuobjdump or nvdisasm of the wheels, or the one on the path."""
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        for found in sorted(Path(root).glob(f"*/bin/{name}")):
            return str(found)
    return shutil.which(name)


def assemble(ptx: str, arch: str = "sm_90") -> Assembled:
    """Machine code. Raises RuntimeError with ptxas's words."""
    tool = find_tool("ptxas")
    if tool is None:
        raise RuntimeError("ptxas is not installed: pip install nvidia-cuda-nvcc")
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        done = subprocess.run(
            [tool, f"-arch={arch}", "-O3", "-v", str(source), "-o", str(target)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(done.stderr[:2000])
        registers, stores = (re.search(p, done.stderr) for p in (r"Used (\d+) registers", r"(\d+) bytes spill stores"))
        return Assembled(target.read_bytes(), int(registers[1]) if registers else 0, int(stores[1]) if stores else 0)


def machine_text(cubin: bytes) -> str:
    """The SASS of a cubin. Raises RuntimeError without cuobjdump."""
    tool = find_tool("cuobjdump")
    if tool is None:
        raise RuntimeError("cuobjdump is not installed: pip install nvidia-cuda-cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
