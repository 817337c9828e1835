"""Modules made of hand-written programs: calls, binding, memory, control flow, errors, threads."""

from __future__ import annotations

import gc
import threading
import time
from typing import Any

import numpy as np
import pytest

from minicc.errors import InputError, MiniccError, ResourceLimitError, ShapeError
from minicc.ir.dims import symbol
from minicc.ir.types import OpaqueType, TensorType, boolean, f32, i64
from minicc.lower.program import ControlStep, HostStep, KernelStep, Program, Word
from tests.runtime.programs import KERNELS, NAMES, Sketch, chain, module

n, k = symbol("n"), symbol("k")


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).random(shape, np.float32)


def test_calls() -> None:
    m = module(chain(4))
    x, y = random(5, 4), random(5, 4)
    expected = 16 * (x + y)
    np.testing.assert_array_equal(m(x, y), expected)
    np.testing.assert_array_equal(m(y=y, x=x), expected)
    np.testing.assert_array_equal(m(x, y=y), expected)
    np.testing.assert_array_equal(m.run(None, {"x": x, "y": y})[0], expected)
    np.testing.assert_array_equal(m.run(["out0"], {"x": x, "y": y})[0], expected)
    np.testing.assert_array_equal(m(x[::-1], y[::-1]), expected[::-1])  # not contiguous
    np.testing.assert_array_equal(m(x.tolist(), y), expected)
    assert [str(p) for p in m.inputs] == ["x: f32[n,4]", "y: f32[n,4]"]
    assert m.outputs[0].name == "out0" and m.outputs[0].dtype == "f32" and m.outputs[0].shape == ("n", 4)


class Foreign:
    """An array of another library, with DLPack only."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


def test_dlpack() -> None:
    x = random(2, 4)
    np.testing.assert_array_equal(module(chain(1))(Foreign(x), x), 4 * x)


X = ones(2, 4)
WRONG = {
    "missing": ((X,), {}, "lacks input 'y'"),
    "too many": ((X, X, X), {}, "takes 2 inputs, got 3"),
    "unknown": ((X,), {"yy": X}, "did you mean 'y'"),
    "twice": ((X,), {"x": X, "y": X}, "given twice"),
    "dtype": ((X, X.astype(np.float64)), {}, "has type f64, expected f32[n,4]"),
    "byte order": ((X, X.astype(">f4")), {}, "other byte order"),
    "rank": ((X, X[0]), {}, "y[np.newaxis]"),
    "rank more": ((X, X[None]), {}, "y.squeeze(0)"),
    "size": ((X, ones(2, 5)), {}, "has shape [2, 5], expected f32[n,4]"),
    "symbol": ((X, ones(3, 4)), {}, "'n' is 2 in input 'x', but axis 0 of 'y' has 3"),
    "transposed": ((X, ones(4, 2)), {}, "transpose(1, 0)"),
    "object": ((X, object()), {}, "y"),
    "none": ((X, None), {}, "y"),
    "text": ((X, "text"), {}, "y"),
    "ragged": ((X, [[1.0], [1.0, 2.0]]), {}, "cannot be read as an array"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs(case: str) -> None:
    args, named, message = WRONG[case]
    with pytest.raises(InputError) as caught:
        module(chain(1))(*args, **named)
    assert message in str(caught.value)


def test_new_shapes_bind_once() -> None:
    m = module(chain(3))
    for size in (1, 7, 0, 7, 1, 500):
        x = random(size, 4)
        np.testing.assert_array_equal(m(x, x), 16 * x)
    assert m.stats()["binds"] == 4


def test_outputs_are_the_callers() -> None:
    m = module(chain(2))
    first = m(X, X)
    first[:] = -1
    second = m(X, X)
    assert (second == 8).all() and (first == -1).all()
    second.flags.writeable = True


def odd_outputs() -> Program:
    """Outputs that are an input, a constant, the same buffer twice, and a content."""
    s = Sketch("odd")
    x, c = s.buffer("input", (n,)), s.constant(np.arange(3, dtype=np.float32))
    t, content = s.buffer("output", (n,)), s.buffer("content", (2,), i64, content=(n * 2, 7))
    s.call("double", (x,), t)
    return s.program((x,), (x, c, t, t, content))


def test_odd_outputs_never_alias() -> None:
    m = module(odd_outputs())
    x = ones(5)
    for _ in range(2):
        outputs = m(x)
        for output, expected in zip(outputs, (x, [0, 1, 2], 2 * x, 2 * x, [10, 7])):
            np.testing.assert_array_equal(output, expected)
        for output in outputs:
            output[:] = 99
        x = ones(5)


def test_no_memory_growth() -> None:
    m = module(chain(5))
    peaks = []
    for _ in range(3):
        for size in range(1, 40):
            m(ones(size, 4), ones(size, 4))
        gc.collect()
        segment = m.runner.segments[0]
        peaks.append(sum(len(b._idle) for b in segment.recent.values()))
    assert len(m.runner.segments[0].recent.values()) == 16
    assert max(peaks) <= 2 * 16  # a shape bound ahead may have a context more


@pytest.mark.parametrize("threads", [1, 3])
def test_many_callers(threads: int) -> None:
    m = module(chain(6), threads=threads)
    wrong: list[int] = []

    def caller(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(150):
            x = rng.random((int(rng.integers(1, 60)), 4), np.float32)
            if not np.array_equal(m(x, x), 128 * x):
                wrong.append(seed)

    callers = [threading.Thread(target=caller, args=(i,)) for i in range(6)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert wrong == []
    assert m.stats()["threads"] == threads


def test_limits() -> None:
    m = module(chain(1), max_bytes=1024)
    m(ones(64, 4), ones(64, 4))
    with pytest.raises(ResourceLimitError, match=r"would take 1040 bytes[\s\S]*f32\[n,4\]"):
        m(ones(65, 4), ones(65, 4))
    s = Sketch("huge")
    x, y = s.buffer("input", (n,)), s.buffer("output", (n * n * n * n * n * n * n,))
    s.steps.append(KernelStep(0, (), 0, (x,), (y,)))
    m = module(s.program((x,), (y,)))
    with pytest.raises(ResourceLimitError):
        m(ones(10_000))
    s = Sketch("negative")
    x, y = s.buffer("input", (n,)), s.buffer("output", (n - 3,))
    s.call("double", (x,), y)
    with pytest.raises(ShapeError, match=r"negative size[\s\S]*n=2"):
        module(s.program((x,), (y,)))(ones(2))


def test_binding_is_fast() -> None:
    m = module(chain(600))
    m(X, X)
    segment = m.runner.segments[0]
    best = min(_timed(lambda size=size: segment.bind({"n": size})) for size in range(5))
    assert best < 0.02  # 1 ms on an idle machine


def test_small_calls_are_fast() -> None:
    m = module(chain(3), threads=1)
    m(X, X)
    best = min(_timed(lambda: [m(X, X) for _ in range(200)]) for _ in range(5)) / 200
    assert best < 100e-6  # 10 us on an idle machine


def _timed(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def with_host() -> Program:
    """kernel, NonZero on the host (a size known only then), kernel: y = 2 * (positions + 1)[0] ..."""
    s = Sketch("host")
    x = s.buffer("input", (n,))
    t = s.buffer("temporary", (n,))
    s.call("add", (x, x), t)
    positions = s.buffer("host", (1, k), i64)
    type_ = TensorType(i64, (1, k))
    s.steps.append(HostStep("", "NonZero", {}, (t,), (positions,), (type_,), ("find",), "data-dependent"))
    seven = s.constant(np.array([7], np.int64))
    moved = s.buffer("temporary", (1, k), i64)
    s.call("offset", (positions, seven), moved)
    count = s.buffer("content", (1,), i64, content=(k + n,))
    out = s.buffer("output", (1, k), i64)
    s.call("offset", (moved, count), out)
    back = s.buffer("output", (n,))
    s.call("double", (t,), back)  # a temporary of the first segment
    return s.program((x,), (out, back))


def test_host_steps_and_data_dependent_sizes() -> None:
    m = module(with_host())
    for array in ([0, 1, 0, 2, 3], [0, 0], [], [5]):
        x = np.array(array, np.float32)
        out, back = m(x)
        np.testing.assert_array_equal(out, np.array(np.nonzero(x)) + 7 + np.count_nonzero(x) + len(x))
        np.testing.assert_array_equal(back, 4 * x)
    assert m.stats()["host_nodes"] == [("NonZero", "find", "data-dependent")]


def test_host_errors_are_typed() -> None:
    s = Sketch("wrong")
    x, y = s.buffer("input", (n,)), s.buffer("host", (n,))
    out = s.buffer("output", (n,))
    two = s.constant(np.array([2, 3], np.int64))
    # Reshape to 2 x 3 gives another rank than declared.
    s.steps.append(HostStep("", "Reshape", {"allowzero": 0}, (x, two), (y,), (TensorType(f32, (n,)),), ("bad",), ""))
    s.call("double", (y,), out)
    for size in (6, 5):
        with pytest.raises(MiniccError, match="bad"):
            module(s.program((x,), (out,)))(ones(size))


def test_sequences_pass_through() -> None:
    s = Sketch("sequence")
    x = s.buffer("input", (n,))
    kind = OpaqueType("seq(tensor(float))")
    sequence = s.buffer("host", None)
    s.buffers[sequence] = type(s.buffers[sequence])("sequence", None, None, "host")
    attrs = {"opset": 11, "outputs": 1}
    s.steps.append(HostStep("", "SequenceConstruct", attrs, (x, x), (sequence,), (kind,), ("make",), ""))
    program = s.program((x,), ())
    program = Program(
        **{
            **{f: getattr(program, f) for f in program.__dataclass_fields__},
            "outputs": (sequence,),
            "output_types": (kind,),
            "output_names": ("all",),
        }
    )
    x_in = ones(3)
    (first, second) = module(program)(x_in)
    np.testing.assert_array_equal(first, second)
    assert first is not x_in and second is not x_in


def number(shape: tuple[Any, ...], dtype: Any = f32) -> TensorType:
    return TensorType(dtype, shape)


def if_program() -> Program:
    """out = cond ? 2x : x + w, with x and w captured."""
    s = Sketch("if")
    c, x = s.buffer("input", (), boolean), s.buffer("input", (n,))
    w = s.buffer("temporary", (n,))
    s.call("double", (x,), w)
    bodies = []
    for name, second in (("double", False), ("add", True)):
        b = Sketch(name)
        bx, bw, out = b.buffer("input", (n,)), b.buffer("input", (n,)), b.buffer("output", (n,))
        b.call(name, (bx, bw) if second else (bx,), out)
        bodies.append(b.program((bx, bw), (out,), kernels=False))
    r, out = s.buffer("host", (n,)), s.buffer("output", (n,))
    s.steps.append(ControlStep("If", {}, (c, x, w), (r,), (number((n,)),), tuple(bodies), ("branch",)))
    s.call("double", (r,), out)
    return s.program((c, x), (out,))


def test_if() -> None:
    m = module(if_program())
    x = random(6)
    np.testing.assert_array_equal(m(np.array(True), x), 4 * x)
    np.testing.assert_array_equal(m(np.array(False), x), 6 * x)


def loop_program() -> Program:
    """while i < M and total < limit: total = total + step; collect total. `step` is captured."""
    s = Sketch("loop")
    trips, start, step, limit = (
        s.buffer("input", (), i64),
        s.buffer("input", (1,)),
        s.buffer("input", (1,)),
        s.buffer("input", (1,)),
    )
    b = Sketch("body")
    b.buffer("input", (), i64)
    b.buffer("input", (), boolean)
    total, bstep, blimit = b.buffer("input", (1,)), b.buffer("input", (1,)), b.buffer("input", (1,))
    new = b.buffer("output", (1,))
    b.call("add", (total, bstep), new)
    going = b.buffer("output", (1,), boolean)
    b.call("less", (new, blimit), going)
    body = b.program((0, 1, total, bstep, blimit), (going, new, new), kernels=False)
    final, collected = s.buffer("host", (1,)), s.buffer("host", (symbol("t"), 1))
    s.steps.append(
        ControlStep(
            "Loop",
            {"n_carried": 1},
            (trips, None, start, step, limit),
            (final, collected),
            (number((1,)), number((symbol("t"), 1))),
            (body,),
            ("repeat",),
        )
    )
    return s.program((trips, start, step, limit), (final, collected))


def test_loop() -> None:
    m = module(loop_program())
    one, big = ones(1), np.array([100.0], np.float32)
    final, collected = m(np.array(5), one, one, big)
    assert final == 6
    np.testing.assert_array_equal(collected[:, 0], [2, 3, 4, 5, 6])
    final, collected = m(np.array(50), one, one, np.array([4.0], np.float32))
    np.testing.assert_array_equal(collected[:, 0], [2, 3, 4])
    final, collected = m(np.array(0), one, one, big)
    assert final == 1 and collected.shape == (0, 1) and collected.dtype == np.float32
    final[:] = 5
    assert one == 1


def test_loop_limits() -> None:
    one, endless = ones(1), np.array([np.inf], np.float32)
    with pytest.raises(ResourceLimitError, match=r"max_loop_iterations=20"):
        module(loop_program(), max_loop_iterations=20)(np.array(10**12), one, one, endless)
    with pytest.raises(ResourceLimitError, match="repeat"):
        module(loop_program(), max_bytes=100)(np.array(10**12), one, one, endless)


def scan_program(attrs: dict[str, Any], shape: tuple[Any, ...], out_shape: tuple[Any, ...]) -> Program:
    """Running sums over columns or rows of x, plus a captured bias."""
    s = Sketch("scan")
    start, x = s.buffer("input", (2,)), s.buffer("input", shape)
    b = Sketch("body")
    state, item = b.buffer("input", (2,)), b.buffer("input", (2,))
    new = b.buffer("output", (2,))
    b.call("add", (state, item), new)
    body = b.program((state, item), (new, new), kernels=False)
    final, sums = s.buffer("host", (2,)), s.buffer("host", out_shape)
    full = {
        "n_state": 1,
        "num_scan_inputs": 1,
        "scan_input_axes": None,
        "scan_input_directions": None,
        "scan_output_axes": None,
        "scan_output_directions": None,
        **attrs,
    }
    types = (number((2,)), number(out_shape))
    s.steps.append(ControlStep("Scan", full, (start, x), (final, sums), types, (body,), ("sums",)))
    return s.program((start, x), (final, sums))


def test_scan() -> None:
    x, start = random(7, 2), np.zeros(2, np.float32)
    final, sums = module(scan_program({}, (n, 2), (n, 2)))(start, x)
    np.testing.assert_array_equal(sums, np.cumsum(x, 0, dtype=np.float32))
    np.testing.assert_array_equal(final, sums[-1])
    attrs = {
        "scan_input_axes": (1,),
        "scan_input_directions": (1,),
        "scan_output_axes": (-1,),
        "scan_output_directions": (1,),
    }
    _, sums = module(scan_program(attrs, (2, n), (2, n)))(start, np.ascontiguousarray(x.T))
    np.testing.assert_array_equal(sums, np.cumsum(x[::-1], 0, dtype=np.float32)[::-1].T)


def test_many_callers_of_control_flow_and_host_steps() -> None:
    host, loop, branch = module(with_host()), module(loop_program()), module(if_program())
    wrong: list[str] = []

    def caller(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(40):
            x = rng.integers(0, 3, int(rng.integers(1, 9))).astype(np.float32)
            positions, back = host(x)
            expected = np.array(np.nonzero(x)) + 7 + np.count_nonzero(x) + len(x)
            if not np.array_equal(positions, expected) or not np.array_equal(back, 4 * x):
                wrong.append("host")
            turns = int(rng.integers(0, 9))
            final, collected = loop(np.array(turns), ones(1), ones(1), np.array([1e9], np.float32))
            if final != 1 + turns or len(collected) != turns:
                wrong.append("loop")
            if not np.array_equal(branch(np.array(turns % 2 == 0), x), (4 if turns % 2 == 0 else 6) * x):
                wrong.append("if")

    callers = [threading.Thread(target=caller, args=(i,)) for i in range(5)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert wrong == []


def test_growing_carried_value() -> None:
    """A loop whose carried value changes its shape binds each shape, and stays within the kept ones."""
    s = Sketch("grow")
    trips, start = s.buffer("input", (), i64), s.buffer("input", (n,))
    m_, b = symbol("m"), Sketch("body")
    b.buffer("input", (), i64)
    going = b.buffer("input", (), boolean)
    value = b.buffer("input", (m_,))
    doubled = b.buffer("temporary", (m_,))
    b.call("double", (value,), doubled)
    longer = b.buffer("host", (m_ * 2,))
    b.steps.append(HostStep("", "Concat", {"axis": 0}, (value, doubled), (longer,), (number((m_ * 2,)),), ("join",), ""))
    body = b.program((0, going, value), (going, longer), kernels=False)
    final = s.buffer("host", (symbol("f"),))
    s.steps.append(ControlStep("Loop", {"n_carried": 1}, (trips, None, start), (final,), (number((symbol("f"),)),), (body,)))
    m = module(s.program((trips, start), (final,)))
    expected = ones(1)
    for _ in range(5):
        expected = np.concatenate([expected, 2 * expected])
    np.testing.assert_array_equal(m(np.array(5), ones(1)), expected)


def test_views_of_temporaries_outlive_the_arena() -> None:
    """A host step in a loop body returns a view of a temporary, which the next iteration overwrites."""
    s, b = Sketch("views"), Sketch("body")
    trips, start = s.buffer("input", (), i64), s.buffer("input", (4,))
    b.buffer("input", (), i64)
    going = b.buffer("input", (), boolean)
    value = b.buffer("input", (4,))
    doubled, view = b.buffer("temporary", (4,)), b.buffer("host", (4,))
    b.call("double", (value,), doubled)
    minus = b.constant(np.array([-1], np.int64))
    attrs = {"allowzero": 0}
    b.steps.append(HostStep("", "Reshape", attrs, (doubled, minus), (view,), (number((4,)),), ("view",), ""))
    body = b.program((0, going, value), (going, view, view), kernels=False)
    final, all_ = s.buffer("host", (4,)), s.buffer("host", (n, 4))
    types = (number((4,)), number((n, 4)))
    s.steps.append(ControlStep("Loop", {"n_carried": 1}, (trips, None, start), (final, all_), types, (body,)))
    final_, all__ = module(s.program((trips, start), (final, all_)))(np.array(3), ones(4))
    np.testing.assert_array_equal(all__, np.array([2, 4, 8], np.float32)[:, None] * ones(3, 4))
    np.testing.assert_array_equal(final_, 8 * ones(4))


def test_programs_without_kernels() -> None:
    s = Sketch("empty")
    x = s.buffer("input", (n,))
    m = module(s.program((x,), (x,)))
    x_in = ones(3)
    out = m(x_in)
    np.testing.assert_array_equal(out, x_in)
    assert out is not x_in


def test_kernel_numbers_match() -> None:
    assert [kernel.name for kernel in KERNELS] == list(NAMES)
    assert Word(0, 1).buffer == 1
