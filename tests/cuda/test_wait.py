"""Kernels that may be launched early: where they wait, in text and in machine code, and when the runtime launches so."""

from __future__ import annotations

import re
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("numba.cuda.extending", reason="numba-cuda is not installed")
pytest.importorskip("cuda.bindings.nvvm", reason="cuda-bindings is not installed")

import minicc
from benchmarks.cuda_build import conv_text, gemm_text, machine_text
from minicc.codegen.cuda import compile_cubin, compile_ptx, find_tool
from minicc.codegen.cuda_wait import with_wait
from minicc.kernels.cuda_launch import Launch
from minicc.kernels.cuda_tiles import DOT_TILES, FMA_TILES, GROUP_TILES, TENSOR_TILES, TMA_TILES
from minicc.options import Options
from minicc.runtime.cuda import calls, facts
from minicc.runtime.cuda.driver import Gpu, Stream
from minicc.runtime.module import CompiledModule
from minicc.targets.cuda import CudaTarget
from tests.cuda.fake_device import FakeDevice
from tests.cuda.modules import node_model, pretended
from tests.cuda.ptx_interpreter import Memory, PtxError, run
from tests.cuda.ptx_wait import check_wait
from tests.cuda.test_gemm import AMPERE, HOPPER
from tools.gpu_check import worker
from tools.gpu_check.bundle import Case, write_arrays

X = np.random.default_rng(8).standard_normal((3, 40), np.float32)
KERNELS = {
    "groups": gemm_text("bf16", GROUP_TILES[-1]),
    "warps of a cluster": gemm_text("f16", TENSOR_TILES[-2], 16, 4),
    "threads": gemm_text("f32", FMA_TILES[1]),
    "few rows": gemm_text("f32", DOT_TILES[0]),
    "convolution": conv_text("tf32", TENSOR_TILES[-2]),
}
WAIT, NEXT = "\tgriddepcontrol.wait;\n", "\tgriddepcontrol.launch_dependents;\n"


@lru_cache
def ptx(name: str) -> str:
    return compile_ptx(KERNELS[name], "kernel", HOPPER)


def softmax(**options: Any) -> minicc.Module:
    """Two kernels, a loop with a reduction and a product."""
    proto = node_model("Softmax", {"x": X}, ["s"])
    node = proto.graph.node.add(op_type="MatMul", input=["s", "w"], output=["y"])
    weights = proto.graph.initializer.add(name="w", dims=[40, 16], data_type=1)
    weights.raw_data = np.random.default_rng(9).standard_normal((40, 16), np.float32).tobytes()
    proto.graph.output[0].name = node.output[0]
    return minicc.compile(proto, target="cuda:sm_90", strict=True, **options)


LINE = st.one_of(
    st.sampled_from(["add.s32 %r1, %r1, 1;", "ld.param.u64 %rd1, [k_param_0];", "setp.lt.s32 %p1, %r1, 5;", "// nothing"]),
    st.sampled_from(["ld.global.u32 %r1, [%rd1];", "st.shared.u32 [%r1], %r2;", "bar.sync 0;", "@%p1 ret;"]),
    st.tuples(st.sampled_from(["", "@%p1 ", "@!%p1 "]), st.integers(0, 11)),
)


@given(st.lists(LINE, max_size=11))
def test_every_thread_of_any_kernel_waits_before_it_touches_memory(chosen: list[Any]) -> None:
    """Any control flow: loops, branches over others, and threads that end early."""
    body = "".join(
        f"$L_{n}:\n\t{line if isinstance(line, str) else f'{line[0]}bra $L_{min(line[1], len(chosen))};'}\n"
        for n, line in enumerate(chosen)
    )
    head = ".target sm_90a\n.visible .entry k(\n\t.param .u64 k_param_0\n)\n{\n\t.reg .b32 %r<3>;\n"
    text = f"{head}{body}$L_{len(chosen)}:\n\tret;\n}}\n"
    found = with_wait(text, HOPPER)
    check_wait(found)
    assert found.replace(WAIT, "").replace(NEXT, "") == text
    assert with_wait(text, AMPERE) == text


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compute_before_they_wait(name: str) -> None:
    text = ptx(name)
    check_wait(text)
    head = text[: text.index(WAIT)]
    assert head.count(";") > 150 and text.count("griddepcontrol") == 2
    if name == "threads":
        assert "griddepcontrol" not in compile_ptx(KERNELS[name], "kernel", AMPERE)


def _late(text: str) -> str:
    """With the wait behind the first access to memory."""
    rest = text.replace(WAIT + NEXT, "", 1)
    first = re.search(r"\n\s*(@%p\d+ )?(ld\.global|cp\.async)[^;]*;[^\n]*\n", rest)
    assert first is not None
    return rest[: first.end()] + WAIT + NEXT + rest[first.end() :]


FAULTS = {
    "missing": lambda text: text.replace(WAIT, ""),
    "for some threads": lambda text: text.replace(WAIT, WAIT.replace("grid", "@%p1 grid")),
    "behind the next launch": lambda text: text.replace(WAIT + NEXT, NEXT + WAIT),
    "late": _late,
}


@pytest.mark.parametrize("text", [gemm_text("bf16", TMA_TILES[-1]), conv_text("bf16", TMA_TILES[-3])], ids=["product", "windows"])
def test_the_copy_engine_is_asked_when_the_kernel_before_has_ended(text: str) -> None:
    check_wait(compile_ptx(text, "kernel", HOPPER))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["threads", "few rows"])
def test_faults_of_waiting_are_noticed_in_the_text(name: str, fault: str) -> None:
    text = ptx(name)
    changed = FAULTS[fault](text)
    assert changed != text
    with pytest.raises(PtxError, match="wait"):
        check_wait(changed)


SMALL = """
from minicc.kernels.cuda.intrinsics import arg, ld, ptr_f32, st
from minicc.kernels.cuda.tiles import thread
WORDS = 2
THREADS = 32
def kernel(args):
    i = thread()
    st(ptr_f32(arg(args, 1)), i, ld(ptr_f32(arg(args, 0)), i) * 2)
"""


@pytest.mark.parametrize("fault", ["", "missing", "behind the next launch", "late"])
def test_faults_of_waiting_are_noticed_when_a_kernel_runs(fault: str) -> None:
    text = FAULTS.get(fault, str)(compile_ptx(SMALL, "kernel", HOPPER))
    memory, x = Memory(), np.arange(32, dtype=np.float32)
    words = [memory.place(x), memory.place(x)]
    with pytest.raises(PtxError, match="does not wait") if fault else nullcontext():
        run(text, "kernel", (1, 1, 1), 32, 0, words, memory)
        np.testing.assert_array_equal(memory.read(words[1], (32,), np.float32), 2 * x)


ACCESS = re.compile(r"\b(LD|LDG|ST|STG|ATOM|ATOMG|RED|REDG|LDGSTS|UTMA\w*|UBLK\w*)\b")


@pytest.mark.parametrize("name", KERNELS)
def test_machine_code_waits_before_it_touches_memory(name: str) -> None:
    """The assembler moves neither an access before the wait, nor the next launch."""
    if find_tool("ptxas") is None or find_tool("cuobjdump") is None:
        pytest.skip("ptxas or cuobjdump is not installed")
    cubin = compile_cubin(KERNELS[name], "kernel", HOPPER).data
    code = machine_text(cubin)
    (wait,), (following,) = ([m.start() for m in re.finditer(rf"\b{word}\b", code)] for word in ("ACQBULK", "PREEXIT"))
    first = ACCESS.search(code)
    assert first is not None and wait < following and wait < first.start()
    assert facts.waits(cubin)


def test_only_machine_code_that_waits_says_so() -> None:
    source = KERNELS["few rows"]
    assert not facts.waits(compile_cubin(source, "kernel", AMPERE).data)
    cubin = compile_cubin(source, "kernel", HOPPER).data
    for other in (b"", b"\x7fELF", cubin[:100], ptx("few rows").encode()):
        assert not facts.waits(other)


@pytest.mark.parametrize(("asked", "old", "target"), [
    (True, False, "cuda:sm_90"), (False, False, "cuda:sm_90"), (True, True, "cuda:sm_90"), (True, False, "cuda:sm_80"),
])  # fmt: skip
def test_launches_overlap_where_that_is_asked_for_and_all_kernels_wait(
    asked: bool, old: bool, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = softmax() if target == "cuda:sm_90" else minicc.compile(node_model("Neg", {"x": X}, ["y"]), target=target)
    code = module.code
    if old:  # one of its kernels was compiled before kernels waited
        symbol = code.symbols[-1]
        code = code._replace(objects={**code.objects, symbol: compile_cubin(SMALL, symbol, AMPERE).data})
    options = Options.from_env().override(overlap=asked)
    found = CompiledModule(module.program, code, module.target, options)
    devices: list[FakeDevice] = []
    monkeypatch.setattr(calls, "Gpu", lambda _number: devices.append(FakeDevice(code.sources)) or devices[-1])
    monkeypatch.setattr(CudaTarget, "missing_features", lambda _self: ())
    results = found(X)
    assert devices[0].overlaps == (asked and not old and target == "cuda:sm_90")
    if target == "cuda:sm_90":
        e = np.exp(X.astype(np.float64) - X.max(-1, keepdims=True))
        weights = np.random.default_rng(9).standard_normal((40, 16), np.float32)
        np.testing.assert_allclose(results, e / e.sum(-1, keepdims=True) @ weights, rtol=1e-4, atol=1e-5)


def test_replays_with_and_without_are_compared_and_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = softmax()
    (tmp_path / "bundle").mkdir()
    module.save(tmp_path / "bundle" / "m.minicc")
    write_arrays(tmp_path / "bundle" / "m.npz", {"x": X}, {})
    case = Case("m", "fp32", "m.minicc", "m.npz", ("x",), 0, 0, 2, (), ())
    monkeypatch.setattr(worker, "IN_A_ROW", 2)
    with pretended(module):
        row = worker.overlap(tmp_path / "bundle", case, "cuda", 0.01)
    assert row["overlaps"] and row["same"] and set(row["ms"]) == {"replay", "overlap"} and min(row["ms"].values()) > 0


def test_the_loading_caller_decides(tmp_path: Path) -> None:
    softmax().save(tmp_path / "m.minicc")
    assert minicc.load(tmp_path / "m.minicc", overlap=True).options.overlap
    softmax(overlap=True).save(tmp_path / "m.minicc")
    assert not minicc.load(tmp_path / "m.minicc").options.overlap


@pytest.mark.parametrize("overlap", [False, True])
def test_all_launches_but_the_first_ask_for_it(overlap: bool) -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    log: list[tuple[Any, ...]] = []

    def call(name: str, *arguments: Any) -> Any:
        if name == "cuLaunchKernelEx":
            config, kernel = arguments[:2]
            ((serial,), count) = config.attrs, config.numAttrs
            wanted = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            assert (serial.id, serial.value.programmaticStreamSerializationAllowed, count) == (wanted, 1, 1)
            shape = (config.gridDimX, config.gridDimY, config.gridDimZ, config.blockDimX, config.blockDimY, config.blockDimZ)
            log.append(("early", kernel, *shape, config.sharedMemBytes, int(config.hStream)))
        elif name == "cuLaunchKernel":
            log.append(("late", *arguments[:8], int(arguments[8])))
        return 1.0

    gpu = Gpu.__new__(Gpu)
    known = SimpleNamespace(**vars(driver) | {"cuGraphExecDestroy": lambda _graph: None})
    vars(gpu).update(_driver=known, _call=call, _context=0)
    kernels = {"a": 0, "b": 16, "c": 0}
    launches = [(name, Launch((2, 1, 1), 64, shared), [1, 2]) for name, shared in kernels.items()]
    stream = Stream(driver.CUstream(5), lambda: None)
    gpu.record(launches, stream, overlap)
    kinds = ["late", "early", "early"] if overlap else ["late"] * 3
    assert log == [(kind, name, 2, 1, 1, 64, 1, 1, shared, 5) for kind, (name, shared) in zip(kinds, kernels.items())]
    log.clear()
    gpu.times(launches, stream)  # an event between two kernels is no kernel to wait for
    assert [entry[0] for entry in log] == ["late"] * 3
