"""The rules of the source tree: who imports whom, how long a file is, what a start costs, what is banned."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "minicc"

# A package imports only from itself and from those before it.
LAYERS = (
    "errors", "options", "report", "ir", "targets", "ops", "frontend", "passes", "kernels", "lower", "codegen",
    "runtime", "debug", "module", "walk", "tune", "api", "backend", "demo", "peers", "cli", "__main__",
)
# Packages that are slow to import or optional: functions may import them when they need them.
HEAVY = {
    "concurrent", "cuda", "llvmlite", "matplotlib", "ml_dtypes", "networkx", "numba", "onnx", "onnxruntime", "openvino",
    "MNN", "_tools", "ncnn", "rich",
}
# Our own modules that pull a heavy package in, imported late by those that must start without it.
DEFERRED = {
    "api.py": {"minicc.frontend.model", "minicc.lower.context", "minicc.tune", "minicc.walk"},
    "cli/app.py": {"minicc.cli.compare", "minicc.cli.inspection", "minicc.demo.run"},
    "cli/common.py": {"minicc.api"},
    "codegen/build.py": {"minicc.codegen.cuda", "minicc.codegen.objects"},
    "module.py": {"minicc.debug.explain", "minicc.debug.profile"},
    "runtime/artifact.py": {"minicc.codegen.build"},
    "runtime/bind.py": {"minicc.kernels"},
    "runtime/code.py": {"minicc.codegen.build", "minicc.codegen.source"},
    "runtime/executor.py": {"minicc.codegen.build"},
    "runtime/module.py": {"minicc.runtime.control", "minicc.runtime.cuda", "minicc.runtime.host"},
    "runtime/signature.py": {"difflib"},
    "runtime/validate.py": {"minicc.kernels.cuda_template"},
    "codegen/worker.py": {"minicc.codegen.build", "minicc.targets.cpu", "minicc.targets.cuda", "minicc.targets.parse"},
    "debug/bench_kernel.py": {"minicc.codegen.objects"},
    "debug/dump.py": {"minicc.codegen.cuda", "minicc.codegen.objects"},
    "runtime/host.py": {"minicc.ops"},
}
# Not loaded by `import minicc`.
NOT_AT_START = ("llvmlite", "ml_dtypes", "networkx", "numba", "onnx", "onnxruntime", "rich", "typer")
MAX_LINES = 600
# The promise is 0.2 s; the test allows three times that, for machines that are busy or slow.
START_SECONDS = 0.6

MODULES = sorted(SOURCE.rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of every imported module in a tree; `from minicc import api` names minicc.api."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module == "minicc":
                yield from ((node.lineno, f"minicc.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_go_one_way(path: Path) -> None:
    package = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if package == "__init__":
        return
    assert package in LAYERS, f"{package} has no place in LAYERS"
    allowed = LAYERS[: LAYERS.index(package) + 1]
    for line, module in imports(ast.parse(path.read_text())):
        if module.startswith("minicc."):
            assert module.split(".")[1] in allowed, f"line {line}: {package} may not import {module}"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_in_functions_are_of_heavy_modules_only(path: Path) -> None:
    deferred = DEFERRED.get(relative(path), set())
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for line, module in imports(function):
                heavy = module.split(".")[0] in HEAVY or module == "importlib"
                assert heavy or module in deferred, f"line {line}: {module} belongs to the top of the module"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_no_pickle_and_no_execution_outside_codegen(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for line, module in imports(tree):
        forbidden = {"pickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
        assert module.split(".")[0] not in forbidden, f"line {line}: {module}"
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant) and node.value.value is False
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Name) and called.id in ("exec", "eval"):
            assert relative(path).startswith("codegen/"), f"line {called.lineno}: {called.id}"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_modules_open_with_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not tree.body or ast.get_docstring(tree)


def test_files_are_short() -> None:
    folders = [ROOT / name for name in ("src", "tests", "benchmarks", "tools")]
    lengths = {p: len(p.read_text().splitlines()) for folder in folders for p in folder.rglob("*.py")}
    assert {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > MAX_LINES} == {}


def tracked_files() -> list[Path]:
    """Text files under version control; all text files of the source folders where there is no git."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        folders = [ROOT / name for name in ("src", "tests", "benchmarks", "tools", "docs")]
        paths = [path for folder in folders for path in folder.rglob("*")]
    return [p for p in paths if p.is_file() and p.suffix not in (".onnx", ".npz", ".png", ".pb", ".pyc")]


def test_no_path_of_one_machine() -> None:
    folders = "|".join(("work", "home", "root", "Users", "mnt"))
    machine = re.compile(rf"(?<![\w.~/\-])/(?:{folders})(?:/|\b)(?!\w)")
    found = []
    for path in tracked_files():
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if machine.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert found == []


START = """
import sys, time
start = time.perf_counter()
import minicc
print(time.perf_counter() - start, *sorted({name.split(".")[0] for name in sys.modules}))
"""


def test_import_is_light_and_quick() -> None:
    runs = []
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True, check=True)
        seconds, *loaded = done.stdout.split()
        runs.append(float(seconds))
        assert not set(NOT_AT_START) & set(loaded)
    assert median(runs) < START_SECONDS
