"""The command line, in this process: what it prints, writes and returns."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from typer.testing import CliRunner

import minicc
from minicc.cli import compare
from minicc.cli.app import app
from minicc.cli.common import describe
from minicc.demo import model_path

DIGITS = str(model_path())


def call(*args: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(args), catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stdout


def call_json(*args: str, code: int = 0) -> Any:
    return json.loads(call(*args, "--json", code=code))


def refused(*args: str) -> str:
    result = CliRunner().invoke(app, list(args), catch_exceptions=False)
    assert result.exit_code == 2 and "Traceback" not in result.output
    return result.stderr


def test_help_and_version() -> None:
    shown = call("--help")
    for command in ("demo", "run", "compile", "bench", "diff", "inspect", "explain", "profile", "doctor"):
        assert command in shown
    assert minicc.__version__ in call("--version")


def test_run_with_files(tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((3, 1, 8, 8), np.float32)
    np.save(tmp_path / "x.npy", x)
    shown = call("run", DIGITS, "-i", f"image={tmp_path / 'x.npy'}", "-o", str(tmp_path / "out.npz"))
    assert "probabilities: float32[3, 10]" in shown
    np.testing.assert_array_equal(np.load(tmp_path / "out.npz")["probabilities"], minicc.compile(DIGITS)(x))


def test_sizes_to_compile_for(tmp_path: Path) -> None:
    saved = str(tmp_path / "m.minicc")
    call("compile", DIGITS, "-o", saved, "--dims", "batch=2")
    assert call_json("run", saved)["probabilities"].startswith("float32[2, 10]")
    assert call_json("run", DIGITS, "--dims", "batch=3")["probabilities"].startswith("float32[3, 10]")
    assert "batch" in refused("run", DIGITS, "--dims", "bacth=3")
    assert "minicc compile" in refused("run", saved, "--dims", "batch=3")


def test_run_with_random_inputs() -> None:
    found = call_json("run", DIGITS, "--dim", "batch=4")
    assert found["probabilities"].startswith("float32[4, 10]")
    assert (
        call("run", DIGITS, "--seed", "1")
        == call("run", DIGITS, "--seed", "1")
        != call("run", DIGITS, "--seed", "2")
    )


def test_compile_then_use_the_file(tmp_path: Path) -> None:
    file = str(tmp_path / "digits.minicc")
    assert call_json("compile", DIGITS, "-o", file)["kernels"] > 0
    assert call("run", file) == call("run", DIGITS)
    assert "digits" in call("inspect", file)
    assert call_json("profile", file, "--repeats", "1")["steps"]


def test_inspect() -> None:
    found = call_json("inspect", DIGITS)
    assert found["inputs"] == ["image: f32[batch,1,8,8]"] and found["operators"]["Conv"] > 0
    with_passes = call_json("inspect", DIGITS, "--passes")
    assert with_passes["operators"] == found["operators"] and "Fused" in with_passes["graph"]
    assert "fuse" in call("inspect", DIGITS, "--passes")


def test_explain() -> None:
    assert {row["tier"] for row in call_json("explain", DIGITS)["steps"]} >= {"conv", "gemm"}
    assert "def kernel" in call("explain", DIGITS, "--layer", "head.dense")
    assert "did you mean" in refused("explain", DIGITS, "--layer", "dense")


def test_profile_and_trace(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    assert "ms per run" in call("profile", DIGITS, "--repeats", "2", "--trace", str(trace))
    assert json.loads(trace.read_text())["traceEvents"]


def test_roofline_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "digits.png"
    call("profile", DIGITS, "--repeats", "1", "--roofline", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "cannot be written" in refused("profile", DIGITS, "--roofline", str(tmp_path / "no" / "digits.png"))


def test_bench_against_onnxruntime() -> None:
    rows = call_json("bench", DIGITS, "--against", "ort", "--seconds", "0.1")["results"]
    assert [r["runtime"] for r in rows] == ["minicc", "ort"]
    assert all(0 < r["min_ms"] <= r["median_ms"] <= r["p90_ms"] * 1.001 for r in rows)
    assert "ort" in call("bench", DIGITS, "--against", "ort", "--seconds", "0.05")
    assert "unknown runtime" in refused("bench", DIGITS, "--against", "abacus")


def test_diff_agrees() -> None:
    for other in ("ort", "eval"):
        found = call_json("diff", DIGITS, "--against", other, "--dim", "batch=2")
        assert found["agree"] and found["outputs"][0]["difference"] < 1e-4


def chain() -> onnx.ModelProto:
    """x -> Relu -> Sin -> Neg -> Abs, named first to fourth."""
    steps = list(
        zip(
            ("Relu", "Sin", "Neg", "Abs"),
            ("first", "second", "third", "fourth"),
            ("x", "a", "b", "c"),
            "abcy",
        )
    )
    nodes = [helper.make_node(op, [source], [result], name) for op, name, source, result in steps]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])
    graph = helper.make_graph(nodes, "g", [x], [helper.make_empty_tensor_value_info("y")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


def test_diff_finds_the_first_wrong_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that computes Sin as Sin + 1 from the second layer on."""
    path = tmp_path / "chain.onnx"
    onnx.save(chain(), path)
    right = compare.build

    def wrong(imported: Any, *args: Any) -> Any:
        module = right(imported, *args)
        if any(
            node.op.name == "Fused" or node.op.name in ("Sin", "Neg", "Abs") for node in imported.graph.nodes
        ):
            layers = str(module.explain())
            if "second" in layers:
                run = module.run_items
                module.run_items = lambda items: [a + 1 for a in run(items)]
        return module

    monkeypatch.setattr(compare, "build", wrong)
    x = np.linspace(-1, 1, 7, dtype=np.float32)
    assert "second" in compare.first_divergence(path, [x], 1e-3, 2)
    monkeypatch.setattr(compare, "build", right)
    assert compare.first_divergence(path, [x], 1e-3, 2) == ""


def test_diff_reports_a_difference() -> None:
    found = call_json("diff", DIGITS, "--tolerance", "1e-12", code=1)
    assert not found["agree"] and "node" in found["first_diverging_layer"]


def test_doctor() -> None:
    found = call_json("doctor")
    assert found["threads"] >= 1 and found["numba"] and found["processor"]
    assert "kernel store" in call("doctor")


@pytest.mark.parametrize(
    "args",
    [
        ("run", "absent.onnx"),
        ("run", DIGITS, "--dim", "batch"),
        ("run", DIGITS, "--dim", "batch=-1"),
        ("run", DIGITS, "--dim", "width=3"),
        ("run", DIGITS, "-i", "image"),
        ("run", DIGITS, "-i", "image=absent.npy"),
        ("run", DIGITS, "-i", "picture=absent.npy"),
        ("run", DIGITS, "--target", "tpu"),
        ("run", __file__),
        ("compile", DIGITS, "-o", "no/such/folder/file"),
    ],
)
def test_errors_are_messages(args: tuple[str, ...]) -> None:
    assert "Error: " in refused(*args)


def test_relative_error() -> None:
    a = np.array([1.0, 2.0, np.nan])
    assert compare.relative_error(a, a) == (0.0, "")
    assert compare.relative_error(a + 0.5, a) == (0.25, "")
    assert compare.relative_error(a, np.array([1.0, 2.0, 3.0]))[1]
    assert compare.relative_error(a, a[:2])[1] and compare.relative_error(a, np.ones(3, np.int32))[1]
    assert compare.relative_error(np.array(["a"], object), np.array(["b"], object))[1]


def test_describe() -> None:
    assert describe([1, 2]) == "list of 2" and describe(None) == "None"
    assert describe(np.zeros((0, 2), np.int8)) == "int8[0, 2]"


def test_module_is_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "minicc", "--version"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and minicc.__version__ in done.stdout
