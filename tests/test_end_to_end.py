"""The whole walk on random models: `minicc.compile` against ONNX Runtime and against numpy evaluation.

Each random model is also run at further batch sizes, saved and loaded, compiled again, and compiled without
some of the passes. The last tests call one module from many threads, many times, and from a new process.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import minicc
from minicc.frontend.model import load_model
from minicc.ir.evaluate import evaluate
from minicc.options import Options
from minicc.passes import default_pipeline
from minicc.passes.manager import flatten
from tests.passes.models import parse, run_reference
from tests.strategies import Array, models

Case = tuple[onnx.ModelProto, dict[str, Array]]
PASSES = [p.name for p in flatten(default_pipeline(Options()))]


def examples(count: int) -> settings:
    """Hypothesis settings without shrinking: every smaller example would be one more compilation."""
    phases = (Phase.explicit, Phase.reuse, Phase.generate)
    return settings(max_examples=count, phases=phases, suppress_health_check=list(HealthCheck), deadline=None)


def assert_close(actual: Sequence[Array], expected: Sequence[Array]) -> None:
    """Equal types and shapes, and numbers within 1e-4 of each output's largest magnitude (but at least 1)."""
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected):
        assert (a.dtype, a.shape) == (e.dtype, e.shape)
        scale = max(float(np.abs(e).max(initial=0)), 1.0)
        np.testing.assert_allclose(a / scale, e / scale, rtol=0, atol=1e-4)


def assert_equal(actual: Sequence[Array], expected: Sequence[Array]) -> None:
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, e)


def batch_sizes(model: onnx.ModelProto, feeds: dict[str, Array]) -> list[dict[str, Array]]:
    """The feeds, and feeds of other batch sizes where the model has a symbolic batch axis."""
    if not any(d.dim_param for i in model.graph.input for d in i.type.tensor_type.shape.dim):
        return [feeds]
    rng = np.random.default_rng(0)
    shapes = {name: array.shape[1:] for name, array in feeds.items()}
    sizes = [{name: rng.standard_normal((n, *shape)).astype(np.float32) for name, shape in shapes.items()} for n in (1, 5)]
    return [feeds, *sizes]


def check_walk(case: Case, folder: Path) -> None:
    model, feeds = case
    module = minicc.compile(model, strict=True)
    before = module.stats()
    graph = load_model(model).graph
    answers = []
    for given_ in batch_sizes(model, feeds):
        found = module.run(None, given_)
        assert_close(found, run_reference(model, given_))
        assert_close(found, evaluate(graph, given_))
        answers.append((given_, found))
    after = module.stats()
    assert (after["compiles"], after["pass_runs"]) == (before["compiles"], before["pass_runs"])

    module.save(folder / "saved.minicc")
    loaded = minicc.load(folder / "saved.minicc")
    again = minicc.compile(model, strict=True)
    assert loaded.notes["graph"] == again.notes["graph"] == module.notes["graph"]
    assert loaded.program == again.program == module.program
    assert loaded.stats()["compiles"] == again.stats()["compiles"] == 0
    for given_, found in answers:
        assert_equal(loaded.run(None, given_), found)
        assert_equal(again.run(None, given_), found)


@examples(24)
@given(case=models())
def test_random_models(tmp_path_factory: pytest.TempPathFactory, case: Case) -> None:
    check_walk(case, tmp_path_factory.mktemp("walk"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@examples(500)
@given(case=models(max_nodes=16))
def test_many_random_models(tmp_path_factory: pytest.TempPathFactory, case: Case) -> None:
    check_walk(case, tmp_path_factory.mktemp("walk"))


def check_subset(case: Case, skip: set[str]) -> None:
    model, feeds = case
    with warnings.catch_warnings():  # without the pass `expand`, composite ops have no kernel
        warnings.simplefilter("ignore", minicc.HostNodesWarning)
        module = minicc.compile(model, skip=tuple(sorted(skip)))
    assert not {row.name for row in module.report.passes} & skip
    for given_ in batch_sizes(model, feeds):
        assert_close(module.run(None, given_), run_reference(model, given_))


@examples(16)
@given(models(max_nodes=8), st.sets(st.sampled_from(PASSES)))
def test_any_subset_of_passes(case: Case, skip: set[str]) -> None:
    check_subset(case, skip)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@examples(300)
@given(models(max_nodes=12), st.sets(st.sampled_from(PASSES)))
def test_many_subsets_of_passes(case: Case, skip: set[str]) -> None:
    check_subset(case, skip)


def transformer() -> onnx.ModelProto:
    """Attention, a normalisation and a linear layer over [batch, length, 8], as exporters write them."""
    rng = np.random.default_rng(3)
    body = """
        q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)
        kt = Transpose<perm = [0, 2, 1]>(k)
        s = MatMul(q, kt) p = Softmax<axis = -1>(s) a = MatMul(p, v)
        r = Add(a, x) n = LayerNormalization(r, g, b)
        h = MatMul(n, w1) e = Relu(h) y = MatMul(e, w2)
    """
    model = parse(body, "(float[batch, length, 8] x) => (float[batch, length, 8] y)")
    sizes = {"wq": (8, 8), "wk": (8, 8), "wv": (8, 8), "g": (8,), "b": (8,), "w1": (8, 40), "w2": (40, 8)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) / 3 for name, shape in sizes.items()}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in arrays.items())
    return model


@pytest.mark.parametrize("threads", [1, 3])
def test_eight_callers_of_mixed_shapes(threads: int) -> None:
    """Bit-equal to the same calls made one after the other."""
    module = minicc.compile(transformer(), threads=threads, strict=True)
    rng = np.random.default_rng(5)
    inputs = [rng.standard_normal((b, s, 8)).astype(np.float32) for b in (1, 2, 5) for s in (1, 7, 16, 33, 90)]
    serial = [np.array(module(x)) for x in inputs]
    for x, y in zip(inputs, serial):
        assert_close([y], run_reference(transformer(), {"x": x}))
    wrong: list[Any] = []

    def caller(seed: int) -> None:
        order = np.random.default_rng(seed)
        try:
            wrong.extend(
                inputs[i].shape
                for i in order.integers(0, len(inputs), 60)
                if not np.array_equal(module(inputs[i]), serial[i])
            )
        except Exception as error:
            wrong.append(error)

    callers = [threading.Thread(target=caller, args=(seed,)) for seed in range(8)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert wrong == []


def in_new_process(script: str) -> str:
    """What a script prints in a fresh interpreter with this run's kernel store."""
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def transformer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The transformer in a file, its kernels in the store."""
    path = tmp_path_factory.mktemp("models") / "transformer.onnx"
    onnx.save(transformer(), path)
    minicc.compile(path)
    return path


def test_compilation_in_a_new_process_runs_no_jit(transformer_file: Path) -> None:
    found = in_new_process(f"""
        import sys
        import minicc
        stats = minicc.compile({str(transformer_file)!r}).stats()
        print(stats["compiles"], stats["cache_hits"] == stats["kernels"] > 0, "numba" in sys.modules)
    """)
    assert found.split() == ["0", "True", "False"]


@pytest.mark.skipif(sys.platform == "win32", reason="the peak of the resident memory comes from getrusage")
def test_no_growth_of_memory_over_a_thousand_calls(transformer_file: Path) -> None:
    """Every call makes an output of up to 100 kB; mixed shapes pass through the bindings kept."""
    found = in_new_process(f"""
        import resource
        import numpy as np
        import minicc
        module = minicc.compile({str(transformer_file)!r}, threads=2)
        inputs = [np.ones((b, s, 8), np.float32) for b in range(1, 6) for s in range(1, 640, 80)]
        def calls(count):
            for i in range(count):
                module(inputs[i % len(inputs)])
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(calls(200), calls(1000))
    """)
    before, after = map(int, found.split())
    unit = 1 if sys.platform == "darwin" else 1024
    assert (after - before) * unit < 1 << 20, f"{(after - before) * unit} bytes more after 1,000 calls"
