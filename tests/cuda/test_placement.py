"""What runs as a kernel on a CPU runs as one on a GPU: all of ONNX's cases lowered for both, and the tables of templates."""

from __future__ import annotations

from collections import Counter

import pytest

from minicc.codegen.source import kernel_source
from minicc.ir.graph import Graph
from minicc.ir.opdef import Kind, all_ops, find_op
from minicc.ir.types import KERNEL_DTYPES, dtype_of
from minicc.lower.lower import lower
from minicc.lower.program import HostStep, Program
from minicc.lower.templates import CUDA_TABLE, TABLE
from minicc.options import Options
from minicc.targets.parse import target_of
from minicc.walk import optimise
from tests.compiling import add_call
from tests.lower.test_lower import batches, name_of
from tests.ops.onnx_cases import Case, all_cases


def cases() -> list[Case]:
    """Cases of registered ops on types that kernels load and store, in order of their op."""
    found = []
    for case in all_cases():
        arrays = [a for a in (*case.inputs, *case.outputs) if a is not None]
        if find_op(case.op, case.domain) and all(a.dtype != object and dtype_of(a.dtype) in KERNEL_DTYPES for a in arrays):
            found.append(case)
    return sorted(found, key=lambda c: c.op)


def program(batch: list[Case], target: str, symbolic: bool) -> Program:
    """The cases after all passes, lowered, and the texts of all kernels printed."""
    graph = Graph("cases")
    for case in batch:
        add_call(graph, case.op, case.inputs, case.attrs, outputs=len(case.outputs), domain=case.domain, symbolic=symbolic)
    machine = target_of(target)
    optimise(graph, Options(), target=machine)
    made = lower(graph, machine, Options())
    for kernel in made.kernels:
        assert "def kernel" in kernel_source(kernel, machine)
    return made


def on_host(made: Program) -> Counter[str]:
    """How often each op is left to numpy."""
    return Counter(step.op for step in made.steps if isinstance(step, HostStep))


@pytest.mark.parametrize("symbolic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("batch", batches(cases()), ids=name_of)
def test_what_is_a_kernel_on_a_cpu_is_one_on_a_gpu(batch: list[Case], symbolic: bool) -> None:
    gpu = on_host(program(batch, "cuda:sm_90", symbolic))
    cpu = on_host(program(batch, "cpu:avx2", symbolic))
    assert gpu == cpu


def test_every_template_of_a_cpu_has_one_on_a_gpu() -> None:
    """Products with packed weights become others there (passes/packed_weights.py)."""
    assert set(TABLE) - {("com.microsoft", "MatMulNBits")} == set(CUDA_TABLE)


def test_ops_without_loops_have_a_template_on_a_gpu() -> None:
    """These are of no use without one."""
    for op in all_ops():
        if op.kind is Kind.TEMPLATE:
            assert (op.domain, op.name) in CUDA_TABLE, op
