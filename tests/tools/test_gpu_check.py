"""tools/gpu_check on bundles for the CPU: what is packed comes back, and one bad case costs only itself."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import minicc
from minicc.targets.cuda import parse_cuda_target
from tests.passes.models import parse
from tools.gpu_check import build as build_module
from tools.gpu_check import run as run_module
from tools.gpu_check.__main__ import main
from tools.gpu_check.build import DTYPES, build, make_periodic, pack_within, reference
from tools.gpu_check.bundle import (
    PERIOD,
    TOLERANCE,
    Case,
    Manifest,
    largest_difference,
    pack,
    periodic,
    read_arrays,
    read_manifest,
    unpack,
    write_arrays,
    write_manifest,
)
from tools.gpu_check.layers import ATTENTION, LAYERS, Layer, layer_model, layer_module, numbers
from tools.gpu_check.run import NO_TIME, Results, part_of, plan, run, supervise
from tools.gpu_check.table import state_of, table
from tools.gpu_check.timing import medians
from tools.gpu_check.worker import tolerance

SHAPES = arrays.array_shapes(min_dims=1, max_dims=3, max_side=150)


def case(model: str, precision: str = "fp32", artifact: str = "a.minicc") -> Case:
    host, kept, own = ("Host: why",), ("Exp e: may overflow",), "" if precision == "fp16" else f"models/{model}.onnx"
    return Case(model, precision, artifact, f"data/{model}.npz", ("x",), 1.5, 10, 2, host, kept, "", own)


def dense(width: int) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    first, second = (", ".join(f"{v:.4f}" for v in rng.standard_normal(width * width) / width**0.5) for _ in range(2))
    weights = f"float[{width},{width}] w = {{{first}}}, float[{width},{width}] v = {{{second}}}"
    return parse("a = MatMul(x, w) b = Relu(a) y = MatMul(b, v)", f"(float[n,{width}] x) => (float[n,{width}] y) <{weights}>")


# -- weights that compress


@given(SHAPES)
def test_periodic_arrays_repeat_and_keep_their_shape(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for kept in (set(), {0}):
        index = np.ix_(*(np.arange(size) % (size if axis in kept else PERIOD) for axis, size in enumerate(shape)))
        np.testing.assert_array_equal(periodic(array, kept=kept), array[index], strict=True)


@given(st.integers(PERIOD + 1, 400))
def test_periodic_weights_keep_the_size_of_sums(depth: int) -> None:
    """A sum over channels that repeat is as large as one over independent channels, within a factor of two."""
    rng = np.random.default_rng(1)
    w = rng.standard_normal((depth, 300)).astype(np.float32)
    x = periodic(rng.standard_normal((50, depth)).astype(np.float32))
    ratio = (x @ periodic(w, contracted=0)).std() / (rng.standard_normal((50, depth)) @ w).std()
    assert 0.5 < ratio < 2


def test_a_periodic_model_has_the_same_layers_and_is_a_small_archive(tmp_path: Path) -> None:
    model = dense(300)
    operators = [node.op_type for node in model.graph.node]
    make_periodic(model)
    onnx.checker.check_model(model)
    assert [node.op_type for node in model.graph.node] == operators
    outputs = reference(model, {"x": np.ones((2, 300), np.float32)})
    assert np.isfinite(outputs["y"]).all() and outputs["y"].std() > 0.01
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "model").write_bytes(model.SerializeToString())
    assert pack(tmp_path / "b").stat().st_size < model.ByteSize() / 10


@pytest.mark.parametrize("integer", [False, True], ids=["dequantised", "integer"])
def test_filters_of_a_quantised_model_repeat_and_its_sums_stay(integer: bool) -> None:
    rng = np.random.default_rng(2)
    weights = rng.integers(-128, 128, (200, 80, 3, 3), np.int8)
    product = "c = ConvInteger(q, w, z) y = Cast<to=1>(c)" if integer else "f = DequantizeLinear(w, s, i) y = Conv(x, f)"
    nodes = f"q, s, z = DynamicQuantizeLinear(x) {product}"
    model = parse(nodes, "(float[1,80,9,9] x) => (float[1,200,7,7] y) <int8 i = {0}, int8[1] w = {0}>")
    model.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(weights, "w"))
    feeds = {"x": rng.standard_normal((1, 80, 9, 9)).astype(np.float32)}
    before = reference(model, feeds)["y"]
    make_periodic(model)
    after = reference(model, feeds)["y"]
    np.testing.assert_array_equal(after, before[:, np.arange(200) % PERIOD])


# -- single layers


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_a_layer_is_the_same_in_onnx_and_in_minicc(name: str) -> None:
    """Smaller sizes of the same kinds, compiled for the CPU in every form."""
    layer = small(LAYERS[name])
    for precision in layer.precisions:
        feeds, weights = numbers(layer, precision)
        dtype = DTYPES[precision]
        expected = reference(layer_model(layer, weights, feeds, feeds["x0"].dtype), feeds)
        module = minicc.compile(layer_model(layer, weights, feeds, dtype), strict=True)
        got = module.run(None, {n: a.astype(dtype) for n, a in feeds.items()})[0]
        assert got.dtype == (np.int32 if precision == "int8" else dtype)
        error, problem = largest_difference(expected, {"y": got.astype(expected["y"].dtype)})
        assert problem == "" and error <= (0 if precision == "int8" else TOLERANCE[precision])


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_a_layer_is_the_same_in_pytorch(name: str) -> None:
    """With the weights of the ONNX model, gates in PyTorch's order."""
    torch = pytest.importorskip("torch")
    layer = small(LAYERS[name])
    feeds, weights = numbers(layer, layer.precisions[0])
    expected = reference(layer_model(layer, weights, feeds, feeds["x0"].dtype), feeds)["y"]
    module = layer_module(layer)
    if layer.kind == "lstm":
        order = [0, 2, 3, 1]  # input, output, forget, cell to input, forget, cell, output
        parts = [weights[0][0], weights[1][0], *np.split(weights[2][0], 2)]
        weights = [np.concatenate([np.split(part, 4)[gate] for gate in order]) for part in parts]
    owned = list(module.buffers()) if layer.kind == "integer" else list(module.parameters())
    with torch.no_grad():
        for own, weight in zip(owned, weights, strict=True):
            own.copy_(torch.from_numpy(weight))
        got = module(*(torch.from_numpy(x) for x in feeds.values())).numpy()
    np.testing.assert_allclose(got.reshape(expected.shape), expected, rtol=1e-4, atol=1e-4)


def test_a_layer_of_integers_must_be_exact() -> None:
    assert tolerance(case("layer_integer_2048", "int8")) == 0
    assert tolerance(case("fknetwork_int8", "int8")) == TOLERANCE["int8"]


def small(layer: Layer) -> Layer:
    if layer.kind in ("conv", "deconv"):
        _, channels, _, filters, window, stride, *groups = layer.sizes
        return Layer(layer.kind, (1, min(channels, 8), 9, min(filters, 8), window, stride, *(min(g, 8) for g in groups)))
    if layer.kind in ATTENTION:
        batch, heads, groups, queries, keys, size = layer.sizes
        least = 2 if groups != heads else 6
        return Layer(layer.kind, (min(batch, 2), 6, least, min(queries, 24), min(keys, 24), min(size, 24)))
    return Layer(layer.kind, tuple(min(size, 24) for size in layer.sizes))


# -- bundles


def test_a_bundle_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    (folder / "data").mkdir(parents=True)
    manifest = Manifest("cuda:sm_90", {"numpy": "2"}, (case("a"), case("b", "fp16", "")))
    write_manifest(folder, manifest)
    feeds, outputs = {"x": np.arange(3)}, {"x": np.ones(2, np.float32), "y": np.array(True)}
    write_arrays(folder / "data" / "a.npz", feeds, outputs)
    found = unpack(pack(folder), tmp_path / "there")
    assert read_manifest(found) == manifest and unpack(folder, tmp_path) == folder
    for want, got in zip((feeds, outputs), read_arrays(found / "data" / "a.npz"), strict=True):
        assert want.keys() == got.keys()
        for name, array in want.items():
            np.testing.assert_array_equal(got[name], array, strict=True)


@given(st.integers(1, 3 * PERIOD), st.booleans())
def test_rows_that_repeat_are_kept_once(tmp_path_factory: pytest.TempPathFactory, rows: int, repeat: bool) -> None:
    array = np.random.default_rng(0).standard_normal((rows, 3)).astype(np.float32)
    array = array[np.arange(rows) % PERIOD] if repeat else array
    path = tmp_path_factory.mktemp("rows") / "a.npz"
    write_arrays(path, {"x": array}, {"rows:y": array})
    with np.load(path) as data:
        assert len(data["in:x"]) == (min(rows, PERIOD) if repeat else rows)
    feeds, outputs = read_arrays(path)
    np.testing.assert_array_equal(feeds["x"], array, strict=True)
    np.testing.assert_array_equal(outputs["rows:y"], array, strict=True)


@given(arrays.arrays(np.float32, SHAPES, elements=st.floats(-100, 100, width=32)), st.floats(0, 1, width=32))
def test_the_difference_is_relative_to_the_largest_number(want: Any, share: float) -> None:
    largest = float(np.abs(want).max(initial=0))
    assume(largest == 0 or largest > 1e-20)
    got = want.copy()
    got.flat[0] += np.float32(share * largest)
    error, problem = largest_difference({"y": want}, {"y": got})
    assert problem == "" and error == pytest.approx(share if largest else 0, abs=1e-5)


@pytest.mark.parametrize(
    "got",
    [{}, {"y": np.zeros(3, np.float32)}, {"y": np.zeros(2)}, {"y": np.array([0, np.nan], np.float32)}],
    ids=["missing", "shape", "type", "nan"],
)
def test_other_differences_are_named(got: dict[str, Any]) -> None:
    error, problem = largest_difference({"y": np.zeros(2, np.float32)}, got)
    assert error > max(TOLERANCE.values()) and "y" in problem


def test_times_are_per_call_and_in_turn() -> None:
    order: list[str] = []
    calls = {"slow": lambda: order.append("slow") or _spin(4e-3), "fast": lambda: order.append("fast") or _spin(1e-3)}
    found = medians(calls, lambda: None, 0.05)
    assert 4 <= found["slow"] < 12 and 1 <= found["fast"] < found["slow"]
    assert "fast" in order[order.index("slow") :] and order[-1] == "fast"


def _spin(seconds: float) -> None:
    import time

    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_a_quantised_model_is_built_once_as_it_is(tmp_path: Path) -> None:
    nodes = "q, s, z = DynamicQuantizeLinear(x) m = MatMulInteger(q, w, z) y = Cast<to=1>(m)"
    weights = "int8[4,2] w = {1, -2, 3, 4, -5, 6, 7, -128}"
    onnx.save(parse(nodes, f"(float[n,4] x) => (float[n,2] y) <{weights}>"), tmp_path / "m.onnx")
    onnx.save(dense(8), tmp_path / "good.onnx")
    build(tmp_path / "bundle", "cpu", ("m", "good"), ("fp32", "int8"), tmp_path)
    assert [c.name for c in read_manifest(tmp_path / "bundle").cases] == ["m/int8", "good/fp32"]


def test_networks_that_do_not_fit_are_left_out_and_named(tmp_path: Path) -> None:
    for folder in ("artifacts", "data", "models"):
        (tmp_path / "b" / folder).mkdir(parents=True)
    cases = tuple(
        Case(name, p, f"artifacts/{name}-{p}", f"data/{name}", ("x",), 1.0, 1, 1, (), (), "", f"models/{name}")
        for name in ("first", "second", "third", "layer_add") for p in ("fp32", "tf32")
    )  # fmt: skip
    for file in {f for c in cases for f in (c.artifact, c.data, c.onnx)}:
        (tmp_path / "b" / file).write_bytes(np.random.default_rng(len(file)).bytes(10_000))
    archive = pack_within(tmp_path / "b", Manifest("cpu", {}, cases), 90_000)
    assert archive.stat().st_size <= 90_000
    found = read_manifest(unpack(archive, tmp_path / "there")).cases
    assert [c.model for c in found if c.artifact] == ["first", "first", "layer_add", "layer_add"]
    assert all("left out" in c.error for c in found if c.model in ("second", "third"))
    assert not (tmp_path / "there" / "artifacts" / "third-fp32").exists()
    assert not any(job.endswith("third/fp32") for job in plan(read_manifest(tmp_path / "there"), rivals=True))


# -- running


def test_the_plan_leaves_out_what_was_not_built() -> None:
    cases = (
        case("kaldi"), case("resnet18", artifact=""), case("bert_base"), case("bert_base", "fp16"), case("resnet50"),
        case("q", "int8"),
    )  # fmt: skip
    manifest = Manifest("cuda:sm_90", {}, cases)
    assert plan(manifest, rivals=True) == [
        "machine:", "tiles:", "tma:", "stream:",
        "check:kaldi/fp32", "check:bert_base/fp32", "check:bert_base/fp16", "check:resnet50/fp32", "check:q/int8",
        "overlap:resnet50/fp32",
        "provider:kaldi/fp32", "provider:bert_base/fp32", "provider:resnet50/fp32", "provider:q/int8",
        "compile:bert_base/fp16", "compile:resnet50/fp32", "compile:bert_base/fp32", "compile:kaldi/fp32",
    ]  # fmt: skip
    assert {part_of(job) for job in plan(manifest, rivals=False)} == {"check"}
    assert not any(job.startswith("overlap") for job in plan(replace(manifest, target="cpu"), rivals=True))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of three small models; the second one's expected outputs are wrong, the third one's artifact is damaged."""
    folder = tmp_path_factory.mktemp("gpu_check")
    for name in ("good", "wrong", "damaged"):
        onnx.save(dense(8), folder / f"{name}.onnx")
    build(folder / "bundle", "cpu", ("good", "wrong", "damaged"), ("fp32", "fp16"), folder)
    bundle = folder / "bundle"
    feeds, outputs = read_arrays(bundle / "data" / "wrong.npz")
    write_arrays(bundle / "data" / "wrong.npz", feeds, {"y": outputs["y"] * np.float32(1.5)})
    (bundle / "artifacts" / "damaged-fp32.minicc").write_bytes(b"no zip")
    return bundle


def test_one_bad_case_costs_only_itself(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(built), "--json", str(tmp_path / "report.json"), "--seconds", "60"]) == 1
    data = json.loads((tmp_path / "report.json").read_text())
    assert {name: state_of(row) for name, row in data["cases"].items()} == {
        "good/fp32": "agrees", "good/fp16": "agrees", "wrong/fp32": "DIFFERS", "wrong/fp16": "DIFFERS",
        "damaged/fp32": "error", "damaged/fp16": "agrees",
    }  # fmt: skip
    assert data["cases"]["good/fp32"]["check"]["ms"]["minicc"] > 0
    assert all(calls == 1 and ms > 0 for _, calls, ms in data["cases"]["good/fp32"]["check"]["kernels"])
    assert data["cases"]["good/fp16"]["check"]["difference"] > data["cases"]["good/fp32"]["check"]["difference"]
    printed = capsys.readouterr().out
    assert printed.strip() == table(data).strip()
    assert "damaged/fp32: ArtifactError" in printed
    beside = data["cases"]["good/fp32"]["provider"]
    assert beside["ms"].keys() == {"onnxruntime", "minicc"} and beside["onnxruntime_difference"] < 1e-6
    assert data["cases"]["damaged/fp32"]["provider"]["state"] == "error" and "provider" not in data["cases"]["good/fp16"]
    assert data["cases"]["good/fp32"]["compile"]["rival"]


def test_without_time_everything_is_skipped_and_still_reported(built: Path, tmp_path: Path) -> None:
    run(built, tmp_path / "report.json", seconds=0)
    data = json.loads((tmp_path / "report.json").read_text())
    assert {row["check"]["state"] for row in data["cases"].values()} == {"skipped"}
    for part in ("check", "provider", "compile"):
        assert f"{part}: {NO_TIME}: good/fp32" in table(data)


def test_without_a_gpu_a_run_ends_at_once_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not parse_cuda_target("cuda:sm_90").missing_features():
        pytest.skip("there is a GPU")
    write_manifest(tmp_path, Manifest("cuda:sm_90", {}, (case("a"),)))
    assert main(["run", str(tmp_path), "--json", str(tmp_path / "report.json")]) == 2
    assert re.search("no GPU to run a bundle for 'cuda:sm_90'\n.*lacks a GPU: .*(libcuda|reports 0)", capsys.readouterr().err)


def test_parts_of_a_run_and_products_with_every_tile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done: list[str] = []

    def noted(folder: Path, jobs: list[str], deadline: float, results: Results) -> None:
        done.extend(jobs)

    monkeypatch.setattr(run_module, "supervise", noted)
    write_manifest(tmp_path, Manifest("cpu", {}, (case("kaldi"), case("unet"), case("unet", "tf32"))))
    run(tmp_path, tmp_path / "r.json", 10, "kaldi,tf32", rivals=False)
    assert done == ["machine:", "check:kaldi/fp32", "check:unet/tf32"]
    results = Results(tmp_path / "r.json", Manifest("cuda:sm_90", {}, ()))
    row = {"case": "4096", "kernel": "wgmma", "ms": 0.195, "torch_ms": None, "error": 1e-7, "right": True, "chosen": True}
    results.add("tiles:", "done", {"rows": [row, row | {"right": False, "chosen": False, "torch_ms": 0.1734}]})
    results.add("tma:", "error", {"error": "gave up", "rows": [row | {"kernel": "tma"}]})
    found = table(results.data)
    assert "| 4096 | **wgmma** | 195.0 |  | 1.0e-07 |\n| 4096 | wgmma | 195.0 | 173.4 | 1.0e-07 WRONG |\n" in found
    assert "WRONG |\n| 4096 | **tma** | 195.0" in found and "tma: gave up" in found
    cases = Results(tmp_path / "r.json", Manifest("cuda:sm_90", {}, (case("unet"), case("kaldi"))))
    cases.add("overlap:unet/fp32", "done", {"overlaps": True, "same": False, "ms": {"replay": 0.3, "overlap": 0.2}})
    cases.add("overlap:kaldi/fp32", "done", {"overlaps": False, "same": True, "ms": {"replay": 0.3, "overlap": 0.3}})
    shown = table(cases.data)
    assert "| 0.2 |" in shown and "| 1.50 |" in shown
    assert "unet/fp32: launches that overlap gave other bits" in shown and "kaldi/fp32: its launches cannot overlap" in shown


def test_ways_of_a_layer_are_compared_and_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(LAYERS, "layer_small", Layer("conv", (1, 32, 9, 24, 3, 1, 1)))
    monkeypatch.setattr(build_module, "WINOGRAD", ("layer_small",))
    build(tmp_path / "bundle", "cpu", ("layer_small",), ("fp32",), None)
    (found,) = read_manifest(tmp_path / "bundle").cases
    direct, *tiles = found.ways
    assert direct.startswith("direct") and set(tiles) == {"winograd 2x2", "winograd 4x4"}
    capsys.readouterr()
    data = run(tmp_path / "bundle", tmp_path / "r.json", 60, rivals=False)
    check = data["cases"]["layer_small/fp32"]["check"]
    assert check["ways"].keys() == found.ways.keys() < check["ms"].keys()
    assert all(row["agrees"] and row["kernels"] for row in check["ways"].values())
    assert "| layer_small/fp32 | winograd 4x4 | " in capsys.readouterr().out
    check["ways"]["winograd 4x4"]["agrees"] = False
    assert "WRONG |" in table(data)


@pytest.mark.parametrize("script", ["import os; os._exit(7)", "import time; time.sleep(60)"], ids=["dies", "hangs"])
def test_a_worker_that_dies_or_hangs_costs_one_job(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process begins the first job it is given and ends; another one is started for the rest."""
    folder, manifest = tmp_path, Manifest("cpu", {}, (case("a"), case("b")))
    program = tmp_path / "python"
    program.write_text(
        f"#!{run_module.sys.executable}\nimport sys, json\njobs = sys.argv[7:]\n"
        "say = lambda state: print('@gpu_check ' + json.dumps({'job': jobs[0], 'state': state, 'row': {}}), flush=True)\n"
        f"say('begin')\nif jobs[0] == 'check:a/fp32':\n    {script}\nsay('done')\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(run_module.sys, "executable", str(program))
    monkeypatch.setattr(run_module, "CHECK_SECONDS", 2.0)
    results = Results(tmp_path / "r.json", manifest)
    supervise(folder, ["check:a/fp32", "check:b/fp32"], run_module.time.monotonic() + 30, results)
    states = {name: row["check"]["state"] for name, row in results.data["cases"].items()}
    assert states == {"a/fp32": "error", "b/fp32": "done"}


def test_no_part_takes_the_time_of_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every job takes long; still each part has begun one."""
    program = tmp_path / "python"
    program.write_text(
        f"#!{run_module.sys.executable}\nimport sys, json, time\njob = sys.argv[7]\n"
        "print('@gpu_check ' + json.dumps({'job': job, 'state': 'begin', 'row': {}}), flush=True)\ntime.sleep(60)\n"
    )
    program.chmod(0o755)
    begun: list[str] = []

    class Recorded(Results):
        def add(self, job: str, state: str, row: dict[str, Any]) -> None:
            begun.append(f"{part_of(job)} {state}")
            super().add(job, state, row)

    monkeypatch.setattr(run_module.sys, "executable", str(program))
    monkeypatch.setattr(run_module, "Results", Recorded)
    monkeypatch.setattr(run_module, "RESERVE_SECONDS", 0.0)
    write_manifest(tmp_path, Manifest("cpu", {}, (case("a"), case("b"))))
    started = run_module.time.monotonic()
    data = run(tmp_path, tmp_path / "r.json", seconds=10)
    assert run_module.time.monotonic() - started < 14 and 9 < data["seconds"] < 13
    assert set(begun) == {"check skipped", "provider skipped", "compile skipped"}


@pytest.mark.parametrize("exit_code", [0, 9])
def test_memory_checkers_are_asked_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exit_code: int) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\necho '========= Invalid __global__ read of size 4 bytes'\nexit {exit_code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = run_module.sanitize(tmp_path, Manifest("cuda:sm_90", {}, (case("a"),)), run_module.time.monotonic() + 60)
    assert found["state"] == ("error" if exit_code else "done") and list(found["tools"]) == ["memcheck", "racecheck", "synccheck"]
    assert found["tools"]["racecheck"]["errors"] == {"Invalid __global__ read of size 4 bytes": 1}
    late = run_module.sanitize(tmp_path, Manifest("cuda:sm_90", {}, (case("a"),)), run_module.time.monotonic())
    assert late["state"] == "skipped" and NO_TIME in late["error"]


def test_a_model_that_does_not_compile_is_recorded(tmp_path: Path) -> None:
    onnx.save(dense(8), tmp_path / "m.onnx")
    folders = ["--out", str(tmp_path / "bundle"), "--generated", str(tmp_path)]
    assert main(["build", *folders, "--target", "cpu:no_such", "--models", "m", "--precisions", "fp32"]) == 1
    (found,) = read_manifest(tmp_path / "bundle").cases
    assert found.artifact == "" and found.error.startswith("TargetError")
    assert plan(read_manifest(tmp_path / "bundle"), rivals=True) == ["machine:"]
