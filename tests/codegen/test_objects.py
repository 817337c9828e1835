"""Objects: what compiles is free-standing, exact and repeatable; what could misbehave is refused by name."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from minicc.codegen import build
from minicc.codegen.build import build_objects, object_key
from minicc.codegen.objects import assembly, compile_object, llvm_ir
from minicc.codegen.symbols import undefined_symbols
from minicc.errors import ArtifactError, CodegenError
from minicc.runtime.objects import load_objects
from minicc.runtime.store import Store
from minicc.targets.cpu import host_target, parse_target

HOST = host_target()
Entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)

CHAIN = """
import numpy as np
from minicc.kernels.cpu.intrinsics import arg, ptr_f32, ld, st
def kernel(args, begin, end):
    x = ptr_f32(arg(args, 0)); s = ptr_f32(arg(args, 1)); y = ptr_f32(arg(args, 2))
    columns = arg(args, 3)
    for i in range(begin, end):
        for j in range(columns):
            v = ld(x, i * columns + j) * ld(s, j)
            st(y, i * columns + j, min(max(v, np.float32(0)), np.float32(6)))
"""

CONVERT = """
from minicc.kernels.cpu.intrinsics import *
def kernel(args, begin, end):
    x = ptr_{0}(arg(args, 0)); y = ptr_{1}(arg(args, 1))
    for i in range(begin, end):
        st{3}(y, i, ld{2}(x, i))
"""


def call(source: str, *words: object, n: int) -> None:
    """Compile, load and run a kernel over [0, n) in two pieces; arrays are passed by address."""
    loaded = load_objects({"k": compile_object(source, "k", HOST)})
    args = np.array([w.ctypes.data if isinstance(w, np.ndarray) else w for w in words], np.int64)
    function = Entry(loaded.address("k"))
    function(args.ctypes.data, 0, n // 3)
    function(args.ctypes.data, n // 3, n)


def test_kernel_computes() -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((50, 13)) * 5).astype(np.float32)
    s, y = rng.standard_normal(13).astype(np.float32), np.zeros((50, 13), np.float32)
    call(CHAIN, x, s, y, 13, n=50)
    np.testing.assert_array_equal(y, np.clip(x * s, 0, 6))


def test_object_is_repeatable_and_defines_one_symbol() -> None:
    first = compile_object(CHAIN, "k", HOST)
    assert first == compile_object(CHAIN, "k", HOST)
    assert undefined_symbols(first) == frozenset()


@pytest.mark.parametrize(
    ("target", "register"),
    [("cpu:sse", "xmm"), ("cpu:avx2", "ymm"), ("cpu:avx512", "zmm"), ("cpu:neon", "v0.4s")],
)
def test_every_target_is_vectorised(target: str, register: str) -> None:
    text = assembly(CHAIN, "k", parse_target(target))
    assert register in text
    assert len(compile_object(CHAIN, "k", parse_target(target))) > 500


def test_alias_scopes_remove_overlap_checks() -> None:
    assert "vector.memcheck" not in llvm_ir(CHAIN, "k", HOST)


def all_halves() -> np.ndarray:
    return np.arange(1 << 16, dtype=np.uint16)


@pytest.mark.parametrize(("name", "dtype"), [("f16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_half_precision_load_is_exact(name: str, dtype: type) -> None:
    bits, result = all_halves(), np.zeros(1 << 16, np.float32)
    call(CONVERT.format(name, "f32", f"_{name}", ""), bits, result, n=1 << 16)
    expected = bits.view(dtype).astype(np.float32)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(result[numbers].view(np.uint32), expected[numbers].view(np.uint32))
    assert np.isnan(result[~numbers]).all()


@pytest.mark.parametrize(("name", "dtype"), [("f16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_half_precision_store_rounds_to_nearest_even(name: str, dtype: type) -> None:
    # Every half value, the midpoint to the next one and its neighbours; then random bit patterns.
    values = all_halves().view(dtype).astype(np.float32)
    with np.errstate(all="ignore"):
        middle = (values + np.roll(values, -1)) / np.float32(2)
        near = [np.nextafter(middle, np.float32(side)) for side in (-np.inf, np.inf)]
        rng = np.random.default_rng(0)
        patterns = rng.integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)
        x = np.concatenate([values, middle, *near, patterns]).astype(np.float32)
        expected = x.astype(dtype)
    result = np.zeros(x.size, np.uint16)
    call(CONVERT.format("f32", name, "", f"_{name}"), x, result, n=x.size)
    numbers = ~np.isnan(x)
    np.testing.assert_array_equal(result[numbers], expected.view(np.uint16)[numbers])
    assert np.isnan(result.view(dtype)[~numbers].astype(np.float32)).all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("range(columns)", "range(0, columns, arg(args, 4))"), "can raise"),
        (("np.float32(6)", "6.0"), "convert it explicitly"),
        (("ld(s, j)", "np.float32(undefined)"), "undefined"),
        (("ld(s, j)", "ld(s, 'j')"), "line 9"),
        (("def kernel", "def other"), "kernel"),
        (("import numpy as np", "import numpy as np :"), "SyntaxError"),
    ],
)
def test_refused(change: tuple[str, str], reason: str) -> None:
    with pytest.raises(CodegenError, match=reason) as error:
        compile_object(CHAIN.replace(*change), "bad_kernel", HOST)
    assert "bad_kernel" in str(error.value)


def test_unknown_function_is_refused_by_name() -> None:
    source = "import math\n" + CHAIN.replace("ld(s, j)", "np.float32(math.gamma(ld(s, j)))")
    with pytest.raises(CodegenError, match="gamma"):
        compile_object(source, "k", HOST)


def test_loading_checks_objects() -> None:
    good = compile_object(CHAIN, "k", HOST)
    with pytest.raises(ArtifactError, match="damaged"):
        load_objects({"k": good[:300]})
    with pytest.raises(ArtifactError, match="damaged"):
        load_objects({"k": good[:-1]})
    with pytest.raises(ArtifactError, match="not an ELF"):
        load_objects({"k": b"no object at all"})
    with pytest.raises(ArtifactError, match="define"):
        load_objects({"other": good})
    foreign = "cpu:neon" if HOST.triple.startswith("x86") else "cpu:avx2"
    with pytest.raises(ArtifactError, match="architecture"):
        load_objects({"k": compile_object(CHAIN, "k", parse_target(foreign))})


def test_loading_needs_no_numba(tmp_path: Path) -> None:
    file = tmp_path / "k.o"
    file.write_bytes(compile_object(CHAIN, "k", HOST))
    program = (
        "import sys, pathlib\n"
        "from minicc.runtime.objects import load_objects\n"
        "from minicc.runtime.executor import Executor\n"
        "assert load_objects({'k': pathlib.Path(sys.argv[1]).read_bytes()}).address('k')\n"
        "assert not any(name.split('.')[0] in ('numba', 'onnx') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(file)], check=True, env={**os.environ})


NUMBA_BESIDE = """
import numba, numpy as np
from minicc.codegen.objects import compile_object
from minicc.errors import CodegenError
from minicc.targets.cpu import host_target

def clipped(x, low, high):
    total = 0.0
    for v in x:
        total += min(max(v, low), high) + np.floor(v)
    if total < -1000:
        raise ValueError('too low', total)
    return total

def at(values, i):
    return values[i]

x = np.array([-3.0, 0.5, 9.0])
before = numba.njit(clipped) if {before} else None
first = before(x, 0.0, 6.0) if before else None
compile_object({source!r}, "k", host_target())
try:
    compile_object("def kernel(args, begin, end):\\n    unknown(begin)\\n", "bad", host_target())
except CodegenError:
    pass
after = numba.njit(clipped)
assert after(x, 0.0, 6.0) == clipped(x, 0.0, 6.0) and first in (None, clipped(x, 0.0, 6.0))
assert numba.njit(cache=False)(lambda a, b: [min(a, b), max(a, b)])(np.float32(1), np.float32(2)) == [1, 2]
assert numba.njit(lambda values: sum([2 * v for v in values]))(x) == 2 * x.sum()  # closures have passes of their own
for function, arguments, kind in ((after, (x * 1e6 - 1e9, 0.0, 6.0), ValueError),
                                  (numba.njit(boundscheck=True)(at), (x, 5), IndexError)):
    try:
        function(*arguments)
    except kind:
        continue
    raise AssertionError('no error')
"""


@pytest.mark.parametrize("before", [False, True])
def test_numba_itself_works_beside_kernels(before: bool) -> None:
    """Numba's own functions that a kernel needed first (min, max) are whole for the user's functions too."""
    program = NUMBA_BESIDE.format(before=before, source=CHAIN)
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ})


def sources(count: int) -> dict[str, str]:
    return {f"k{i}": CHAIN.replace("np.float32(6)", f"np.float32({i}.5)") for i in range(count)}


def test_build_uses_the_store(tmp_path: Path) -> None:
    store, compiled = Store(tmp_path), []
    first = build_objects(sources(2), HOST, store, compiled.append)
    assert compiled == ["k0", "k1"] and list(first) == compiled
    again = build_objects(sources(3), HOST, store, compiled.append)
    assert compiled == ["k0", "k1", "k2"]
    assert {name: again[name] for name in first} == first


def test_keys_differ_by_everything_that_matters() -> None:
    keys = {
        object_key("k", CHAIN, HOST),
        object_key("j", CHAIN, HOST),
        object_key("k", CHAIN + " ", HOST),
        object_key("k", CHAIN, parse_target("cpu:sse")),
    }
    assert len(keys) == 4


def in_workers(wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    monkeypatch.setattr(build, "available_threads", lambda: 2)
    return build_objects(wanted, HOST, None)


def test_workers_give_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = sources(6)
    objects = in_workers(wanted, monkeypatch)
    assert list(objects) == list(wanted)
    assert objects["k3"] == compile_object(wanted["k3"], "k3", HOST)


def test_this_process_and_workers_share_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    here: list[str] = []
    compile_here = build.compile_here
    monkeypatch.setattr(build, "compile_here", lambda *kernel: here.append(kernel[1]) or compile_here(*kernel))
    wanted = sources(6)
    assert list(in_workers(wanted, monkeypatch)) == list(wanted)
    assert 0 < len(here) < len(wanted)


def test_an_error_in_a_worker_names_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = sources(5) | {"broken": CHAIN.replace("ld(s, j)", "np.float32(undefined)")}
    with pytest.raises(CodegenError, match="broken"):
        in_workers(wanted, monkeypatch)


def test_dying_workers_are_replaced_by_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    test = f"import os; os.getpid() == {os.getpid()} or os._exit(1)\n"
    wanted = {symbol: test + source for symbol, source in sources(5).items()}
    assert set(in_workers(wanted, monkeypatch)) == set(wanted)


def test_an_interrupt_ends_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    start = build._start_worker
    monkeypatch.setattr(build, "_start_worker", lambda: started.append(start()) or started[-1])
    monkeypatch.setattr(build, "available_threads", lambda: 2)

    def interrupt(symbol: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_objects(sources(6), HOST, None, interrupt)
    assert len(started) == 1  # and this process
    assert all(worker.returncode is not None for worker in started)
    assert not any(thread.name.startswith("compile") for thread in threading.enumerate())


def test_no_worker_can_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/does/not/exist")
    assert len(in_workers(sources(5), monkeypatch)) == 5
