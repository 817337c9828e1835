"""Modules for several targets: one file, weights once, and each machine takes the best variant that it can run."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("numba.cuda.extending", reason="numba-cuda is not installed")
pytest.importorskip("cuda.bindings.nvvm", reason="cuda-bindings is not installed")

import minicc
from minicc.codegen.cuda import find_tool
from minicc.errors import ArtifactError, TargetError
from minicc.kernels.cuda_tiles import ALL_TILES, STREAM, tile_ways
from minicc.lower.kernel import TemplateKernel
from minicc.runtime.cuda import calls
from minicc.targets import cuda
from minicc.targets.parse import fitting, targets_of
from tests.cuda.fake_device import FakeDevice
from tests.test_cli import call

X = np.random.default_rng(6).standard_normal((70, 33), np.float32)
W = np.random.default_rng(7).standard_normal((33, 40), np.float32) / np.float32(6)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A product with a function behind it."""
    weights = [numpy_helper.from_array(W, "w")]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["p"], "product"), helper.make_node("Tanh", ["p"], ["y"], "tanh")]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, X.shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [70, 40])
    graph = helper.make_graph(nodes, "network", [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int]], None]:
    """Puts a pretended GPU of some capability into this machine."""

    def put(capability: tuple[int, int]) -> None:
        arch = f"sm_{capability[0]}{capability[1]}"
        device = replace(targets_of("cuda:sm_80")[0], name="cuda", capability=capability, arch=arch)
        monkeypatch.setattr(cuda, "_device_target", lambda _name, _number: device)

    return put


def units(module: Any) -> set[str]:
    kernels = [k for k in module.program.kernels if isinstance(k, TemplateKernel)]
    return {ALL_TILES[int(dict(k.constants)["TILE"])].unit for k in kernels}


def run(module: minicc.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "Gpu", lambda _number: FakeDevice(module.code.sources, 1 << 22))
    np.testing.assert_allclose(module(X), np.tanh(X.astype(np.float64) @ W), rtol=0, atol=3e-3)


def test_targets_come_best_first() -> None:
    for text in ("cuda:sm_80+compute_80+sm_90", "CUDA:sm_90+sm_80+compute_80+sm_80"):
        assert [t.name for t in targets_of(text)] == ["cuda:sm_90", "cuda:sm_80", "cuda:compute_80"]
    assert [t.name for t in targets_of("cpu:sse+avx512+avx2")] == ["cpu:avx512", "cpu:avx2", "cpu:sse"]
    for text in ("cuda:sm_90+sm_20", "cuda:sm_90+cuda:sm_80", "cpu:avx2+sm_90"):
        with pytest.raises(TargetError, match="unknown"):
            targets_of(text)


def test_text_for_every_later_device_keeps_to_what_all_have() -> None:
    """No tile needs more shared memory than the smallest has, and the kernels are those of sm_80."""
    (target,) = targets_of("cuda:compute_80")
    assert target.shared_bytes == 99 << 10  # type: ignore[union-attr]
    for element in ("f32", "tf32", "f16", "s8"):
        for sizes in ((4096, 4096, 4096), (33, 100, 5000)):
            for tile, splits in tile_ways(element, *sizes, 1, target):  # type: ignore[arg-type]
                assert splits in (1, STREAM) and tile.unit != "wgmma" and tile.shared_bytes <= 99 << 10


@pytest.mark.parametrize("arch", ["sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_text_is_assembled_for_later_devices(arch: str, path: Path, tmp_path: Path) -> None:
    """What a driver does when it loads the text, by the assembler of the same release."""
    tool = find_tool("ptxas")
    if tool is None:
        pytest.skip("ptxas is not installed")
    for precision in ("tf32", "fp16"):
        for text in minicc.compile(path, target="cuda:compute_80", precision=precision).code.objects.values():
            assert text.endswith(b"}\0") and text.count(b"\0") == 1 and b".target sm_80\n" in text
            (tmp_path / "kernel.ptx").write_bytes(text[:-1])
            command = [tool, f"-arch={arch}", "-v", "kernel.ptx", "-o", "kernel.cubin"]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
            assert done.returncode == 0 and " 0 bytes spill stores" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("capability", "name", "unit"),
    [
        ((8, 0), "cuda:sm_80", "mma"),
        ((8, 6), "cuda:sm_80", "mma"),
        ((9, 0), "cuda:sm_90", "wgmma"),
        ((10, 0), "cuda:compute_80", "mma"),
        ((12, 0), "cuda:compute_80", "mma"),
    ],
)
def test_a_machine_takes_the_best_variant_that_it_can_run(
    capability: tuple[int, int], name: str, unit: str, path: Path, tmp_path: Path, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = minicc.compile(path, target="cuda:sm_80+sm_90+compute_80", precision="tf32")
    module.save(tmp_path / "m.minicc")
    monkeypatch.setattr("minicc.runtime.artifact.build_code", lambda *_: pytest.fail("compiled again"))
    machine(capability)
    loaded = minicc.load(tmp_path / "m.minicc")
    assert loaded.target.name == name and {other.target.name for other in loaded.others} | {name} == {
        "cuda:sm_80", "cuda:sm_90", "cuda:compute_80"}  # fmt: skip
    assert unit in units(loaded) and (unit == "wgmma" or "wgmma" not in units(loaded))
    run(loaded, monkeypatch)
    loaded.save(tmp_path / "again.minicc")
    assert (tmp_path / "again.minicc").read_bytes() == (tmp_path / "m.minicc").read_bytes()


def test_weights_that_are_equal_are_stored_once(path: Path, tmp_path: Path) -> None:
    sizes, programs = {}, {}
    for text in ("cuda:sm_90", "cuda:sm_80", "cuda:sm_80+sm_90"):
        minicc.compile(path, target=text, precision="tf32").save(tmp_path / "m.minicc")
        with zipfile.ZipFile(tmp_path / "m.minicc") as file:
            names = file.namelist()
            sizes[text] = file.getinfo("weights.bin").file_size
            programs[text] = {n: file.read(n) for n in names if n.endswith("program.json")}
            described = json.loads(file.read("manifest.json"))
        several = "+" in text
        assert ("variants" in described) == several == any(n.startswith("variants/1/objects/") for n in names)
    assert len(set(sizes.values())) == 1
    assert set(programs["cuda:sm_80+sm_90"]) == {"program.json", "variants/1/program.json"}
    # Each is what it is alone.
    assert programs["cuda:sm_80+sm_90"]["program.json"] == programs["cuda:sm_90"]["program.json"]
    assert programs["cuda:sm_80+sm_90"]["variants/1/program.json"] == programs["cuda:sm_80"]["program.json"]


def test_the_command_line_takes_several_targets(path: Path, tmp_path: Path) -> None:
    told = json.loads(call("compile", str(path), "-o", str(tmp_path / "m.minicc"), "--target", "cuda:sm_80+sm_90", "--json"))
    assert sorted(told["targets"]) == ["cuda:sm_80", "cuda:sm_90"]
    assert len(minicc.load(tmp_path / "m.minicc").others) == 1


def test_a_kept_module_has_all_variants(path: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"precision": "tf32", "cache_dir": str(tmp_path / "cache")}
    module = minicc.compile(path, target="cuda:sm_80+sm_90", **options)
    kept = minicc.compile(path, target="cuda:sm_80+sm_90", **options)
    assert set(kept.report.seconds) == {"load"} and kept.target == module.target
    assert [other.target for other in kept.others] == [other.target for other in module.others] != []
    assert not minicc.compile(path, target="cuda:sm_90", **options).others


def test_without_a_gpu_the_best_can_be_looked_at(path: Path) -> None:
    targets = targets_of("cuda:sm_80+sm_90")
    if any(not target.missing_features() for target in targets):
        pytest.skip("there is a GPU")
    assert fitting(targets) == 0
    module = minicc.compile(path, target="cuda:sm_80+sm_90")
    assert module.target.name == "cuda:sm_90" and "product" in str(module.explain())
    with pytest.raises(TargetError, match="lacks a GPU"):
        module(X)


def test_processors_have_variants_too(path: Path, tmp_path: Path) -> None:
    module = minicc.compile(path, target="cpu:sse+neon")
    if module.target.missing_features():
        pytest.skip("not an x86 machine")
    assert [other.target.name for other in module.others] == ["cpu:neon"]
    module.save(tmp_path / "m.minicc")
    loaded = minicc.load(tmp_path / "m.minicc")
    assert loaded.target == module.target and loaded.code.objects == module.code.objects
    np.testing.assert_allclose(loaded(X), np.tanh(X.astype(np.float64) @ W), rtol=0, atol=1e-5)


def changed(path: Path, change: Callable[[dict[str, Any], dict[str, bytes]], None]) -> None:
    """A file with its manifest or members changed, and the sums that an attacker would put right."""
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    manifest = json.loads(members["manifest.json"])
    change(manifest, members)
    members["manifest.json"] = json.dumps(manifest).encode()
    members["signature"] = hashlib.sha256(members["manifest.json"]).digest() + members["signature"][32:]
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)


def _drop(manifest: dict[str, Any], members: dict[str, bytes], name: str) -> None:
    del manifest["members"][name], members[name]


@pytest.mark.parametrize(("change", "message"), [
    (lambda manifest, _: manifest["variants"][0]["target"].update(arch="sm_80; evil"), "target is not valid"),
    (lambda manifest, _: manifest.update(variants=7), "manifest is not valid"),
    (lambda manifest, _: manifest["variants"].append({}), "manifest is not valid"),
    (lambda manifest, members: _drop(manifest, members, "variants/1/program.json"), "no program of variant 1"),
    (lambda _, members: members.update({"variants/1/evil.py": b""}), "unknown member"),
    (lambda _, members: members.update({"variants/0/program.json": b""}), "unknown member"),
    (lambda _, members: members.update({"variants/1/variants/1/program.json": b""}), "unknown member"),
])  # fmt: skip
def test_damaged_variants_are_refused(change: Any, message: str, path: Path, tmp_path: Path) -> None:
    minicc.compile(path, target="cuda:sm_80+sm_90").save(tmp_path / "m.minicc")
    changed(tmp_path / "m.minicc", change)
    with pytest.raises(ArtifactError, match=message):
        minicc.load(tmp_path / "m.minicc")


def test_code_of_strangers_is_built_again_and_other_variants_are_left_out(
    path: Path, tmp_path: Path, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    minicc.compile(path, target="cuda:sm_80+sm_90").save(tmp_path / "m.minicc")
    changed(tmp_path / "m.minicc", lambda manifest, _: manifest.update(odd=1))  # the user's signature is of another manifest
    machine((8, 0))
    loaded = minicc.load(tmp_path / "m.minicc")
    assert loaded.target.name == "cuda:sm_80" and loaded.others == ()
    assert loaded.code.from_cache == len(set(loaded.code.symbols))  # of this user's store
    trusted = minicc.load(tmp_path / "m.minicc", trust=True)
    assert [other.target.name for other in trusted.others] == ["cuda:sm_90"]
