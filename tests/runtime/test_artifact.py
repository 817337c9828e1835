"""Saved modules: the same numbers after loading, from anywhere but never from a damaged or hostile file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minicc.errors import ArtifactError, MiniccError
from minicc.ir.dims import broadcast, maximum, minimum, symbol
from minicc.ir.expr import Expr, accumulator, const, iteration, load, reduce, select
from minicc.ir.types import TensorType, boolean, f32, i64
from minicc.lower.kernel import Body, LoopKernel, Operand, TemplateKernel
from minicc.lower.kernel import Store as Write
from minicc.lower.program import ControlStep, HostStep, Program
from minicc.lower.serialize import from_data, to_data
from minicc.options import Options
from minicc.runtime import artifact
from minicc.runtime.artifact import Saved
from minicc.runtime.module import CompiledModule
from minicc.runtime.store import Store
from minicc.runtime.validate import check_program
from minicc.targets.cpu import host_target
from tests.runtime.programs import KERNELS, Sketch, code

n = symbol("n")


def rich_program() -> Program:
    """Every construct the format knows, not meant to run."""
    body = Body(
        (Operand(f32, (1, None)), Operand(f32, (1, 0), output=True, shared=True)),
        (
            Write(
                1,
                reduce(
                    "sum",
                    (1, 2),
                    (("word", 0), ("literal", 3)),
                    select(
                        Expr("lt", boolean, (iteration(0), Expr("dim", i64, arg=0))),
                        load(0, f32, [iteration(0)]),
                        const(float("-inf"), f32),
                    ),
                ),
            ),
        ),
        1,
    )
    epilogue = Body((Operand(f32, (None, 0, 0, 1), True),), (Write(0, accumulator(f32)),), 0)
    inner = Sketch("body")
    x, y = inner.buffer("input", (n,)), inner.buffer("output", (n,))
    inner.call("double", (x,), y)
    s = Sketch("rich")
    a = s.buffer("input", (n, maximum(n - 3, 2), broadcast(n, symbol("m")), n * n // 2, minimum(n % 3, 5)))
    w = s.constant(np.arange(6, dtype=np.float32).reshape(2, 3))
    names = s.buffer("constant", (2,), "string", data=np.array(["a", "b"], object))
    shape = s.buffer("content", (3,), "i64", content=(n, (1 << 63) - 1, n * 2))
    out = s.buffer("host", (symbol("k"),))
    s.steps.append(
        HostStep(
            "",
            "NonZero",
            {"axis": 1, "names": ("x", b"y"), "data": np.ones(2, np.int8), "none": None},
            (a, None, w, names, shape),
            (out,),
            (TensorType(f32, (symbol("k"),)),),
            ("node",),
            "why",
        )
    )
    result = s.buffer("host", (symbol("k"),))
    s.steps.append(
        ControlStep(
            "If",
            {},
            (out, out),
            (result,),
            (TensorType(f32, (symbol("k"),)),),
            (inner.program((x,), (y,), kernels=False),) * 2,
        )
    )
    program = s.program((a,), (result,))
    more = (
        LoopKernel(1, body, "rows"),
        TemplateKernel("gemm", (("NR", 16), ("FLAG", True), ("KIND", "f32")), epilogue, "gemm"),
    )
    return Program(
        **{**{f: getattr(program, f) for f in program.__dataclass_fields__}, "kernels": KERNELS + more}
    )


def test_program_survives_json() -> None:
    program = rich_program()
    data, arrays = to_data(program)
    back = from_data(json.loads(json.dumps(data)), lambda number, dtype, shape: arrays[number])
    assert str(back) == str(program)
    assert back.kernels == program.kernels and back.inputs == program.inputs
    assert [b.shape for b in back.buffers] == [b.shape for b in program.buffers]
    np.testing.assert_array_equal(back.buffers[2].data, ["a", "b"])


def paths(data: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    out = [prefix]
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        out += paths(value, (*prefix, key))
    return out


ODD = st.sampled_from(
    [
        None,
        -1,
        0,
        1,
        10**6,
        1 << 70,
        0.5,
        True,
        "",
        "x",
        "__import__('os')",
        '"""\nimport os\n"""',
        [],
        [0],
        [[1]],
        {},
        {"a": 1},
    ]
)
DATA = json.loads(json.dumps(to_data(rich_program())[0]))
PATHS = paths(DATA)


@settings(max_examples=600, deadline=None)
@given(st.integers(1, len(PATHS) - 1), ODD)
def test_mutated_program_is_refused_or_valid(which: int, value: Any) -> None:
    data = json.loads(json.dumps(DATA))
    place = data
    *way, last = PATHS[which]
    for key in way:
        place = place[key]
    place[last] = value

    def array(number: int, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
        if number or int(np.prod(shape, dtype=object)) > 1000:
            raise ArtifactError("no such weights")
        return np.zeros(shape, dtype.numpy)

    with contextlib.suppress(ArtifactError):
        check_program(from_data(data, array))


@pytest.mark.parametrize("name", ['"""\nimport os', "a b", "x;y", "", "a\n", 5])
def test_names_cannot_carry_code(name: Any) -> None:
    data = json.loads(json.dumps(DATA))
    data["kernels"][0]["name"] = name
    with pytest.raises(ArtifactError):
        from_data(data, lambda *_: np.zeros((2, 3), np.float32))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


def weighted() -> Program:
    """out = 2 * (x + w), with w a constant."""
    s = Sketch("weighted")
    x, w = s.buffer("input", (n, 4)), s.constant(np.arange(4, dtype=np.float32)[None].repeat(3, 0))
    t, out = s.buffer("temporary", (n, 4)), s.buffer("output", (n, 4))
    s.call("add", (x, w), t)
    s.call("double", (t,), out)
    return s.program((x,), (out,))


X = np.ones((3, 4), np.float32)
EXPECTED = 2 * (X + np.arange(4, dtype=np.float32))


def write(path: Path, store: Store) -> Path:
    notes = {"graph": "the graph"}
    artifact.save(path, Saved(weighted(), code(), host_target(), Options(), 7, notes), store)
    return path


def build(saved: Saved) -> CompiledModule:
    return CompiledModule(saved.program, saved.code, saved.target, saved.options, pass_runs=saved.pass_runs)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, store: Store) -> Path:
    return write(tmp_path_factory.mktemp("saved") / "m.minicc", store)


def test_loads_with_own_key(saved: Path, store: Store) -> None:
    found = artifact.read(saved, store, Options())
    assert found.code.compiled == 0 and found.pass_runs == 7 and found.notes["graph"] == "the graph"
    module = build(found)
    np.testing.assert_array_equal(module(X), EXPECTED)
    weights = next(b.data for b in found.program.buffers if b.kind == "constant")
    assert weights is not None and weights.ctypes.data % 64 == 0 and not weights.flags.owndata


def test_saving_twice_gives_equal_bytes(saved: Path, store: Store, tmp_path: Path) -> None:
    assert write(tmp_path / "again", store).read_bytes() == saved.read_bytes()


class Regenerated(Exception):
    pass


def test_foreign_code_is_not_used(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise Regenerated

    monkeypatch.setattr(artifact, "build_code", refuse)
    with pytest.raises(Regenerated):
        artifact.read(saved, Store(tmp_path / "other"), Options())
    trusted = artifact.read(saved, Store(tmp_path / "other"), Options(), trust=True)
    np.testing.assert_array_equal(build(trusted)(X), EXPECTED)


def test_resigned_by_a_stranger_is_not_trusted(
    saved: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise Regenerated

    monkeypatch.setattr(artifact, "build_code", refuse)
    path = repacked(saved, tmp_path / "m", lambda m: checked(m, "objects/add.o", b"evil"))
    with pytest.raises(Regenerated):
        artifact.read(path, store, Options())


TARGETS = {
    "vector_width": (0, 7, 1 << 40, "x"),
    "features": (5,),
    "l1_bytes": (0, -5),
    "vector_registers": (1,),
}


@pytest.mark.parametrize(("name", "value"), [(k, v) for k, values in TARGETS.items() for v in values])
def test_strange_targets_are_refused(
    name: str, value: Any, saved: Path, store: Store, tmp_path: Path
) -> None:
    def change(members: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
        manifest = json.loads(dict(members)["manifest.json"])
        manifest["target"][name] = value
        return checked(members, "manifest.json", json.dumps(manifest).encode())

    with pytest.raises(ArtifactError, match="target"):
        artifact.read(repacked(saved, tmp_path / "m", change), store, Options())


@pytest.mark.parametrize("wrong", [False, True])
def test_files_from_before_an_option_load(saved: Path, store: Store, tmp_path: Path, wrong: bool) -> None:
    def change(members: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
        manifest = json.loads(dict(members)["manifest.json"])
        del manifest["options"]["fft"]
        if wrong:
            manifest["options"]["winograd"] = 1
        return checked(members, "manifest.json", json.dumps(manifest).encode())

    path = repacked(saved, tmp_path / "m", change)
    if wrong:
        with pytest.raises(ArtifactError, match="winograd"):
            artifact.read(path, store, Options(), trust=True)
    else:
        assert artifact.read(path, store, Options(), trust=True).options.fft


def test_other_toolchain_is_not_used(saved: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise Regenerated

    monkeypatch.setattr(artifact, "build_code", refuse)
    monkeypatch.setattr(artifact, "installation", lambda: "another place")
    artifact.read(saved, store, Options())  # the same versions
    monkeypatch.setattr("minicc.codegen.build.toolchain", lambda: "newer")
    with pytest.raises(Regenerated):
        artifact.read(saved, store, Options())


def repacked(source: Path, target: Path, change: Any, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        members = [(i.filename, old.read(i)) for i in old.infolist()]
        for name, content in change(members):
            new.writestr(name, content)
    return target


def checked(members: list[tuple[str, bytes]], name: str, content: bytes) -> list[tuple[str, bytes]]:
    """One member exchanged, with the sums that an attacker would put right."""
    found = {**dict(members), name: content}
    if name != "manifest.json":
        manifest = json.loads(found["manifest.json"])
        manifest["members"][name] = [len(content), hashlib.sha256(content).hexdigest()]
        found["manifest.json"] = json.dumps(manifest).encode()
    found["signature"] = hashlib.sha256(found["manifest.json"]).digest() + found["signature"][32:]
    return list(found.items())


CHANGES = {
    "traversal": lambda m: [*m, ("../evil", b"")],
    "absolute": lambda m: [*m, ("/etc/evil", b"")],
    "unknown": lambda m: [*m, ("extra", b"")],
    "unlisted": lambda m: [*m, ("objects/extra.o", b"")],
    "no program": lambda m: [x for x in m if x[0] != "program.json"],
    "no weights": lambda m: [x for x in m if x[0] != "weights.bin"],
    "no signature": lambda m: [x for x in m if x[0] != "signature"],
    "no manifest": lambda m: [x for x in m if x[0] != "manifest.json"],
    "no object": lambda m: [x for x in m if x[0] != "objects/add.o"],
    "short weights": lambda m: [(k, v[:-4] if k == "weights.bin" else v) for k, v in m],
    "changed object": lambda m: [(k, v[:-1] + b"!" if k == "objects/add.o" else v) for k, v in m],
    "changed manifest": lambda m: [(k, v + b" " if k == "manifest.json" else v) for k, v in m],
    "list manifest": lambda m: checked(m, "manifest.json", b"[]"),
    "empty manifest": lambda m: checked(m, "manifest.json", b"{}"),
    "deep json": lambda m: checked(m, "manifest.json", b"[" * 100_000),
    "deep program": lambda m: checked(m, "program.json", b'{"dims":' + b"[" * 100_000),
    "empty program": lambda m: checked(m, "program.json", b"{}"),
    "not JSON": lambda m: checked(m, "program.json", b"\x00"),
    "fewer weights": lambda m: checked(m, "weights.bin", b""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_members_are_refused(change: str, saved: Path, store: Store, tmp_path: Path) -> None:
    path = repacked(saved, tmp_path / "m", CHANGES[change])
    with pytest.raises(ArtifactError):
        artifact.read(path, store, Options(), trust=True)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicates_and_compression_are_refused(saved: Path, store: Store, tmp_path: Path) -> None:
    twice = repacked(saved, tmp_path / "twice", lambda m: [*m, m[-1]])
    packed = repacked(saved, tmp_path / "packed", lambda m: m, zipfile.ZIP_DEFLATED)
    for path in (twice, packed, tmp_path / "absent", tmp_path):
        with pytest.raises(ArtifactError):
            artifact.read(path, store, Options(), trust=True)


def test_truncated_files_are_refused(saved: Path, store: Store, tmp_path: Path) -> None:
    content = saved.read_bytes()
    for size in [0, 1, 100, len(content) // 2, len(content) - 1, *range(0, len(content), 4001)]:
        (tmp_path / "cut").write_bytes(content[:size])
        with pytest.raises(ArtifactError):
            artifact.read(tmp_path / "cut", store, Options(), trust=True)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_flipped_bits(saved: Path, store: Store, tmp_path: Path, where: float, bit: int) -> None:
    """A flipped bit is refused, or it hit something without meaning such as a date."""
    content = bytearray(saved.read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    path = tmp_path / "flipped"
    path.write_bytes(content)
    try:
        found = artifact.read(path, store, Options())
    except ArtifactError:
        return
    except (
        MiniccError
    ) as error:  # only the signature was hit: these hand-made kernels cannot be generated again
        assert "kernel" in str(error)
        return
    np.testing.assert_array_equal(build(found)(X), EXPECTED)


def test_loading_imports_neither_numba_nor_onnx(saved: Path, store: Store) -> None:
    script = f"""
        import sys
        import numpy as np
        from pathlib import Path
        from minicc.options import Options
        from minicc.runtime import artifact
        from minicc.runtime.module import CompiledModule
        from minicc.runtime.store import Store
        store = Store(Path({str(store._folder.parent)!r}))
        s = artifact.read({str(saved)!r}, store, Options())
        m = CompiledModule(s.program, s.code, s.target, s.options)
        print(m(np.ones((3, 4), np.float32)).sum())
        assert "numba" not in sys.modules and "onnx" not in sys.modules
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        env={**os.environ, "MINICC_CACHE": ""},
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) == EXPECTED.sum()


def test_failed_save_leaves_nothing(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        write(tmp_path / "no" / "such" / "folder", store)
    assert list(tmp_path.iterdir()) == []
