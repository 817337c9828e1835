"""The benchmark of CUDA kernels, its GPU replaced by the interpreter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba.cuda.extending", reason="numba-cuda is not installed")
pytest.importorskip("cuda.bindings.nvvm", reason="cuda-bindings is not installed")

from benchmarks import cuda_kernels
from benchmarks.cuda_cases import Conv, Gemm
from minicc.codegen import cuda as codegen
from minicc.codegen.cuda import Cubin, compile_ptx
from minicc.kernels import cuda_tiles
from minicc.kernels.cuda_launch import TensorMap
from tests.cuda import ptx_tma
from tests.cuda.ptx_interpreter import Memory, run


class Interpreter:
    """The benchmark's device: "cubins" are PTX."""

    def __init__(self) -> None:
        self.memory = Memory()

    def upload(self, array: Any) -> int:
        return self.memory.place(array)

    def encode(self, map_: TensorMap) -> bytes:
        return ptx_tma.encode(map_)

    def download(self, address: int, shape: tuple[int, ...], dtype: Any) -> Any:
        return self.memory.read(address, shape, dtype)

    def clear(self, address: int, size: int) -> None:
        self.memory.bytes[address : address + size] = 0xFF

    def free(self, *addresses: int) -> None:
        pass

    def load(self, cubin: bytes, shared: int) -> str:
        assert shared <= 227 * 1024
        return cubin.decode()

    def launch(self, function: str, grid: int, threads: int, shared: int, words: list[int]) -> None:
        run(function, "kernel", (grid, 1, 1), threads, shared, words, self.memory)

    def milliseconds(self, launch: Any, launches: int) -> float:
        return 1.0


def test_benchmark_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = (Gemm(20, 70, 64, 2), Gemm(3, 20, 64), Conv(2, 6, 32, 24, 3, 2, 2), Conv(2, 6, 64, 24, 3, 2))
    monkeypatch.setattr(cuda_kernels, "CASES", cases)
    monkeypatch.setattr(cuda_kernels, "TOLERANCES", {"f16": 3e-5, "s8": 0.0})
    monkeypatch.setattr(cuda_kernels, "Device", Interpreter)
    monkeypatch.setattr(cuda_kernels, "torch_milliseconds", lambda *_: None)
    monkeypatch.setattr(cuda_tiles, "TENSOR_TILES", cuda_tiles.TENSOR_TILES[-1:])
    monkeypatch.setattr(cuda_tiles, "GROUP_TILES", cuda_tiles.GROUP_TILES[-1:])
    monkeypatch.setattr(cuda_tiles, "TMA_TILES", cuda_tiles.TMA_TILES[-1:])
    monkeypatch.setattr(codegen, "compile_cubin", lambda *kernel: Cubin(compile_ptx(*kernel).encode(), 0, 0, 0))
    cuda_kernels.build(tmp_path)
    rows = cuda_kernels.run(tmp_path)
    assert len(rows) == 41  # all tiles that take the rows of a case
    assert sum("_tma_" in row["kernel"] for row in rows) == 5
    assert all(row["right"] for row in rows), [row["error"] for row in rows]
    assert sum(row["chosen"] for row in rows) == 8
    assert json.loads((tmp_path / "results.json").read_text()) == rows
    for job, part in (("tma", "_tma_"), ("stream", "_s")):
        names = [row["kernel"] for row in cuda_kernels.run(tmp_path, cases[:1], (job,))]
        assert names and all(part in name for name in names)


def test_a_wrong_kernel_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_kernels, "CASES", (Gemm(20, 70, 64),))
    monkeypatch.setattr(cuda_kernels, "TOLERANCES", {"s8": 0.0})
    monkeypatch.setattr(cuda_kernels, "Device", Interpreter)
    monkeypatch.setattr(cuda_kernels, "torch_milliseconds", lambda *_: None)
    monkeypatch.setattr(cuda_tiles, "TENSOR_TILES", cuda_tiles.TENSOR_TILES[-1:])
    monkeypatch.setattr(cuda_tiles, "GROUP_TILES", ())
    monkeypatch.setattr(cuda_tiles, "TMA_TILES", ())

    def compile_wrongly(*kernel: Any) -> Cubin:
        return Cubin(compile_ptx(*kernel).replace("s8.s8", "u8.s8").encode(), 0, 0, 0)

    monkeypatch.setattr(codegen, "compile_cubin", compile_wrongly)
    cuda_kernels.build(tmp_path)
    rows = cuda_kernels.run(tmp_path)
    assert [row["right"] for row in rows] == [False] * 3
    assert all(np.isfinite(row["error"]) for row in rows)
