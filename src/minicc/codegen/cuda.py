"""From the source text of one CUDA kernel to PTX and to a cubin, without a GPU or a driver.

numba-cuda writes the PTX, ptxas (of the wheel nvidia-cuda-nvcc, else of the path) assembles it. This is the only
module that touches numba-cuda's private names, and the reason why pyproject.toml pins it. It neither caches
nor loads.
"""

from __future__ import annotations

import importlib.util
import linecache
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np

from minicc.codegen.cuda_wait import with_wait
from minicc.errors import CodegenError
from minicc.targets.cuda import CudaTarget

_INSTALL = "pip install 'minicc[cuda]'"


@dataclass(frozen=True)
class Cubin:
    """Machine code, and what ptxas says of it: registers per thread, bytes spilled, bytes of static shared memory."""

    data: bytes
    registers: int
    spills: int
    shared_bytes: int


def compile_cubin(source: str, symbol: str, target: CudaTarget) -> Cubin:
    """Compile the function `kernel(args)` of a module text to a cubin whose entry is `symbol`.

    source: module text with the numbers WORDS (parameters) and THREADS (most threads of a block), and with
        CONTRACT = False where every operation must be rounded by itself, BLOCKS where registers are to leave room for
        so many blocks on a multiprocessor.
    Raises CodegenError naming the kernel when it does not compile or a tool is missing.
    """
    ptx = compile_ptx(source, symbol, target)
    tool = find_tool("ptxas")
    if tool is None:
        raise CodegenError("ptxas is not installed", where=symbol, hint=_INSTALL)
    with tempfile.TemporaryDirectory() as folder:
        text, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        text.write_text(ptx)
        fused = [] if _contracts(source) else ["-fmad=false"]
        command = [tool, f"-arch={target.arch}", "-O3", "-v", *fused, str(text), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CodegenError("ptxas refuses a kernel", where=symbol, why=done.stderr[:2000])
        facts = [_fact(p, done.stderr) for p in (r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes smem")]
        return Cubin(cubin.read_bytes(), *facts)


def _contracts(source: str) -> bool:
    """Whether products and sums of a kernel may become fused multiply-adds."""
    return re.search(r"^CONTRACT = False\b", source, re.M) is None


def _fact(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def compile_ptx(source: str, symbol: str, target: CudaTarget) -> str:
    """The PTX of the function `kernel(args)` of a module text, its entry named `symbol`. Raises CodegenError."""
    function, words, bounds, blocks = _load_kernel(source, symbol)
    cuda, dispatcher, types = _numba_cuda()
    signature = types.void(types.UniTuple(types.int64, words))
    # Numba asks the device for its capability when it compiles functions that a kernel calls.
    device = SimpleNamespace(compute_capability=target.capability)
    compiler = cuda.compiler
    fused = {} if _contracts(source) else {"fma": False}

    def compile_cuda(*args: Any, nvvm_options: dict[str, Any], **options: Any) -> Any:
        return original(*args, nvvm_options={**nvvm_options, **fused}, **options)

    original = compiler.compile_cuda
    try:
        with (
            patch.object(dispatcher, "get_current_device", lambda: device),
            patch.object(compiler, "compile_cuda", compile_cuda),  # compile_ptx has no parameter for these options
        ):
            capability = (*target.capability, re.sub(r"\w*\d", "", target.arch))  # with the "a" of sm_90a
            ptx, _ = cuda.compile_ptx(function, signature, cc=capability, launch_bounds=bounds)
    except Exception as error:  # Numba's own, and whatever an intrinsic raises
        line = getattr(getattr(error, "loc", None), "line", None)
        text = linecache.getline(f"<kernel {symbol}>", line).strip() if line else ""
        where = f"{symbol}, line {line}: {text}" if text else symbol
        raise CodegenError("a kernel does not compile", where=where, why=str(error)) from error
    finally:
        linecache.cache.pop(f"<kernel {symbol}>", None)
    entry = re.search(r"\.visible \.entry (\w+)", ptx)
    if entry is None:
        raise CodegenError("the PTX of a kernel has no entry", where=symbol)
    text = with_wait(str(ptx).replace(entry[1], symbol), target)
    # Numba knows no clusters: blocks that see each other's shared memory.
    return text.replace(".maxntid", f".reqnctapercluster {blocks}, 1, 1\n.maxntid", 1) if blocks > 1 else text


def _load_kernel(source: str, symbol: str) -> tuple[Any, int, tuple[int, int], int]:
    """(function, number of words, (most threads of a block, least blocks of a multiprocessor), blocks of a cluster)."""
    _numba_cuda()  # before the text imports kernels/cuda
    file = f"<kernel {symbol}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    namespace: dict[str, Any] = {"__name__": f"minicc.generated.{symbol}"}
    try:
        exec(compile(source, file, "exec"), namespace)
        bounds = int(namespace["THREADS"]), int(namespace.get("BLOCKS", 1))
        return namespace["kernel"], int(namespace["WORDS"]), bounds, int(namespace.get("SPLITS", 1))
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise CodegenError("the text of a kernel is not a valid module", where=symbol, why=why) from error


@lru_cache(maxsize=1)
def _numba_cuda() -> tuple[Any, Any, Any]:
    if not hasattr(np, "row_stack"):  # numba-cuda reads it while it is imported; numpy 2.5 has it no more
        np.row_stack = np.vstack
    try:
        from numba import cuda
        from numba.cuda import dispatcher, types
    except ImportError as error:
        raise CodegenError("numba-cuda is not installed", why=str(error), hint=_INSTALL) from error
    return cuda, dispatcher, types


@lru_cache(maxsize=8)
def find_tool(name: str) -> str | None:
    """The path of ptxas, cuobjdump or nvdisasm: of NVIDIA's wheels, else on the path; None without one."""
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        for found in sorted(Path(root).glob(f"*/bin/{name}")):
            return str(found)
    return shutil.which(name)
