"""Facts read from cubins, against what ptxas said."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("numba.cuda.extending", reason="numba-cuda is not installed")

from benchmarks.cuda_build import gemm_text, render
from minicc.codegen.cuda import compile_cubin, find_tool
from minicc.kernels.cuda_template import CUDA_TEMPLATES
from minicc.kernels.cuda_tiles import FMA_TILES, GROUP_TILES, TENSOR_TILES
from minicc.runtime.cuda.facts import kernel_facts
from minicc.targets.cuda import parse_cuda_target


@pytest.mark.parametrize(("element", "tile"), [("f32", FMA_TILES[1]), ("f16", GROUP_TILES[-1])])
def test_facts_are_those_of_ptxas(element, tile):
    if find_tool("ptxas") is None:
        pytest.skip("ptxas is not installed")
    built = compile_cubin(gemm_text(element, tile), "kernel", parse_cuda_target("cuda:sm_90"))
    facts = kernel_facts(built.data)
    assert facts is not None and facts.registers == built.registers and facts.stack_bytes == built.spills == 0
    assert str(facts) == f"{built.registers} registers"


CELLS = [("recurrent", {"CELL": cell, "COUNT": count}) for cell, count in (("gru", 3), ("rnn", 1))]


@pytest.mark.parametrize("target", ["cuda:sm_80", "cuda:sm_90"])
@pytest.mark.parametrize(("name", "constants"), [*((name, {}) for name in CUDA_TEMPLATES), *CELLS])
def test_no_template_spills(name, constants, target):
    """As their files stand, with as many threads as they are launched with; products and convolutions have tests of their own."""
    if find_tool("ptxas") is None:
        pytest.skip("ptxas is not installed")
    threads = CUDA_TEMPLATES[name].threads
    given = {**constants, **({} if threads is None else {"THREADS": threads})}
    assert compile_cubin(render(name, given), "kernel", parse_cuda_target(target)).spills == 0


def test_spilled_registers_are_seen():
    if find_tool("ptxas") is None:
        pytest.skip("ptxas is not installed")
    text = gemm_text("f16", TENSOR_TILES[0])
    crowded = text.replace("THREADS = 256", "THREADS = 1024")  # which leaves 64 registers to each thread
    assert crowded != text
    built = compile_cubin(crowded, "kernel", parse_cuda_target("cuda:sm_90"))
    facts = kernel_facts(built.data)
    assert built.spills > 0 and facts is not None and facts.stack_bytes > 0 and "stack" in str(facts)


@given(st.binary(max_size=300), st.booleans())
def test_other_files_have_no_facts(data, elf):
    assert kernel_facts(b"\x7fELF" + data if elf else data) is None
