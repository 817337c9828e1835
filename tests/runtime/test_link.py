"""The linker of objects: LLVM's as the oracle, damaged objects, where code lies and when it is given back."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import re
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llvmlite import binding as llvm

from minicc.codegen.elf import read_elf
from minicc.codegen.objects import compile_object
from minicc.errors import ArtifactError
from minicc.runtime import link
from minicc.runtime.executor import executor_sources
from minicc.runtime.objects import load_objects
from minicc.targets.cpu import host_target

pytestmark = pytest.mark.skipif(not link.can_link(), reason="the linker is for Linux on x86-64")
Entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)

# Constants in memory, vectors of them, and calls of the C library.
KERNEL = """
import math
import numpy as np
from minicc.kernels.cpu.intrinsics import arg, ld, ptr_f32, st

def kernel(args, begin, end):
    source, target = ptr_f32(arg(args, 0)), ptr_f32(arg(args, 1))
    for i in range(begin, end):
        st(target, i, np.float32(math.{function}(ld(source, i))) * np.float32({factor}) + np.float32(i & 3))
"""


@cache
def kernel(function: str, factor: float) -> bytes:
    return compile_object(KERNEL.format(function=function, factor=factor), f"k_{function}", host_target())


def objects() -> dict[str, bytes]:
    return {f"k_{name}": kernel(name, factor) for name, factor in (("sin", 0.5), ("erf", -3.7), ("expm1", 1.1))}


def call(address: int, x: np.ndarray) -> np.ndarray:
    y = np.zeros_like(x)
    words = np.array([x.ctypes.data, y.ctypes.data], np.int64)
    Entry(address)(words.ctypes.data, 0, x.size)
    return y


X = np.linspace(-3, 3, 101, dtype=np.float32)


def test_it_gives_the_results_of_llvms_linker() -> None:
    ours, general = load_objects(objects()), load_objects(objects(), general=True)
    for symbol in objects():
        result = call(ours.address(symbol), X)
        np.testing.assert_array_equal(result, call(general.address(symbol), X))
        assert np.abs(result).max() > 1


def test_it_takes_the_executor() -> None:
    sources = executor_sources()
    parts = {symbol: read_elf(compile_object(text, symbol, host_target())) for symbol, text in sources.items()}
    found = link.link(parts)
    assert found is not None and set(found[1]) == set(sources)


WORD = """
declare float @expf(float)
define void @k(ptr %args, i64 %begin, i64 %end) {
  store ptr @expf, ptr %args
  ret void
}
"""
WRITABLE = """
@state = internal global i64 5
define void @k(ptr %args, i64 %begin, i64 %end) {
  %old = load i64, ptr @state
  %new = add i64 %old, 1
  store i64 %new, ptr @state
  store i64 %new, ptr %args
  ret void
}
"""


def assembled(text: str) -> bytes:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    data: bytes = target.create_target_machine(opt=0, reloc="pic", codemodel="small").emit_object(llvm.parse_assembly(text))
    return data


def test_an_address_through_a_word() -> None:
    data = assembled(WORD)
    found = link.link({"k": read_elf(data)})
    assert found is not None
    words = np.zeros(1, np.int64)
    Entry(found[1]["k"])(words.ctypes.data, 0, 0)
    function = ctypes.CFUNCTYPE(ctypes.c_float, ctypes.c_float)(int(words[0]))
    assert function(1.0) == pytest.approx(np.e, rel=1e-6)


def test_objects_with_writable_data_are_left_to_llvm() -> None:
    data = assembled(WRITABLE)
    assert link.link({"k": read_elf(data)}) is None
    loaded, words = load_objects({"k": data}), np.zeros(1, np.int64)
    for expected in (6, 7):
        Entry(loaded.address("k"))(words.ctypes.data, 0, 0)
        assert words[0] == expected


def load_damaged(data: bytes) -> None:
    """Loading may succeed (a constant was hit); otherwise it is an ArtifactError, and nothing else."""
    try:
        parts = read_elf(data)
        link.link({"k_sin": parts})
    except ValueError:
        with pytest.raises(ArtifactError):
            load_objects({"k_sin": data})


@given(st.integers(0, 1 << 20))
def test_cut_objects_are_refused(where: int) -> None:
    data = kernel("sin", 0.5)
    with pytest.raises(ArtifactError, match=r"damaged|not an ELF"):
        load_objects({"k_sin": data[: where % len(data)]})


@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 7)), min_size=1, max_size=8))
def test_flipped_bits(flips: list[tuple[int, int]]) -> None:
    data = bytearray(kernel("sin", 0.5))
    for where, bit in flips:
        data[where % len(data)] ^= 1 << bit
    load_damaged(bytes(data))


@given(st.integers(0, 1 << 20), st.integers(0, (1 << 64) - 1))
def test_foreign_numbers_in_tables(where: int, number: int) -> None:
    """Eight bytes at a time, where headers, symbols and relocations are."""
    data = bytearray(kernel("erf", -3.7))
    at = where % (len(data) // 8) * 8
    data[at : at + 8] = number.to_bytes(8, "little")
    load_damaged(bytes(data))


def mappings() -> list[tuple[int, int, str]]:
    found = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) (\S+)", Path("/proc/self/maps").read_text(), re.M)
    return [(int(start, 16), int(end, 16), rights) for start, end, rights in found]


def rights_at(address: int) -> str:
    return next((rights for start, end, rights in mappings() if start <= address < end), "")


def test_memory_is_executable_and_not_writable_and_is_given_back() -> None:
    both = [one for one in mappings() if "wx" in one[2]]  # others' (libffi)
    loaded = [load_objects(objects()) for _ in range(20)]
    assert {rights_at(one.address("k_sin")) for one in loaded} == {"r-xp"}
    assert [one for one in mappings() if "wx" in one[2]] == both

    def executable() -> int:
        gc.collect()
        return sum(end - start for start, end, rights in mappings() if rights == "r-xp")

    before = executable()
    del loaded
    assert before - executable() >= 20 * mmap.PAGESIZE


def test_two_sets_at_once_from_many_threads() -> None:
    general = load_objects(objects(), general=True)  # code lives as long as what it was loaded by
    expected = call(general.address("k_erf"), X)
    failures: list[object] = []

    def work() -> None:
        for _ in range(20):
            both = load_objects(objects()), load_objects({"k_erf": kernel("erf", -3.7)})
            failures.extend(one for one in both if not np.array_equal(call(one.address("k_erf"), X), expected))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_it_needs_no_llvm(tmp_path: Path) -> None:
    for symbol, data in objects().items():
        (tmp_path / symbol).write_bytes(data)
    program = (
        "import sys, pathlib\n"
        "from minicc.runtime.objects import load_objects\n"
        "load_objects({p.name: p.read_bytes() for p in pathlib.Path(sys.argv[1]).iterdir()})\n"
        "assert 'llvmlite' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, env={**os.environ})
