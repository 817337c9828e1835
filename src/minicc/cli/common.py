"""What the commands share: options, inputs, compiling with a progress bar, output, errors."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from minicc.debug.inputs import random_inputs
from minicc.errors import InputError, MiniccError
from minicc.module import Module, load
from minicc.options import Options
from minicc.runtime.signature import Port

out = Console()
err = Console(stderr=True)
FAILURE = 2
SHOW_AFTER = 1.0  # seconds until a progress bar appears

Model = Annotated[Path, typer.Argument(help="an ONNX model, or a module saved by `minicc compile`")]
Dims = Annotated[list[str] | None, typer.Option("--dim", help="size of a symbolic dimension, as batch=4")]
Fixed = Annotated[str, typer.Option("--dims", help="sizes of symbolic dimensions to compile for, as batch=1,sequence=128")]
Inputs = Annotated[
    list[str] | None, typer.Option("--input", "-i", help="input array, as name=file.npy; random otherwise")
]
Seed = Annotated[int, typer.Option(help="seed of random inputs")]
Json = Annotated[bool, typer.Option("--json", help="print JSON for programs to read")]
_TARGETS = "cpu, cpu:sse, cpu:avx2, cpu:avx512, cpu:neon, cuda, cuda:sm_80, cuda:sm_90, cuda:compute_80; or as cuda:sm_80+sm_90"
Target = Annotated[str, typer.Option(help=_TARGETS)]
Threads = Annotated[int | None, typer.Option(help="threads; all that are available by default")]
Level = Annotated[
    int, typer.Option("-O", min=0, max=2, help="0 no fusion, 1 no layout changes, 2 everything")
]
Trust = Annotated[
    bool, typer.Option(help="use the machine code of a saved module although it is not signed by you")
]
T = TypeVar("T")


def guarded(command: Callable[[], T]) -> T:
    """Run a command; errors become a message without a traceback and exit code 2."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = lambda message, *_, **__: err.print(
                f"warning: {message}", markup=False, highlight=False
            )
            return command()
    except MiniccError as error:
        err.print(f"{type(error).__name__}: {error}", markup=False, highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        err.print("interrupted")
    raise typer.Exit(FAILURE)


def open_model(
    path: Path, target: str, threads: int | None, level: int = 2, trust: bool = False, dims: str = "", **options: Any
) -> Module:
    """Compile a model, or load a saved module (told by its zip header), with progress on a terminal."""
    if dims:
        options["dims"] = dims
        if is_saved(path):
            raise InputError("a saved module has the sizes that it was compiled for", hint="give --dims to `minicc compile`")
    chosen = Options.from_env().override(**options)
    if threads is not None:
        chosen = chosen.override(threads=threads)
    with Bar() as progress:
        if is_saved(path):
            return load(path, trust=trust, options=chosen, progress=progress)
        from minicc.api import compile as compile_model

        return compile_model(path, target, options=chosen.override(opt_level=level), progress=progress)


def is_saved(path: Path) -> bool:
    """Whether a file is a zip, as saved modules are."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"PK\x03\x04"
    except OSError:
        return False  # the frontend says what is wrong with it


def parse_pairs(items: Sequence[str], what: str) -> dict[str, str]:
    """`name=value` arguments. Raises InputError."""
    pairs = {}
    for item in items:
        name, equals, value = item.rpartition("=")
        if not equals or not name or not value:
            raise InputError(f"{item!r} is not {what}")
        pairs[name] = value
    return pairs


def parse_dims(items: Sequence[str]) -> dict[str, int]:
    """`--dim` arguments. Raises InputError."""
    dims = {}
    for name, text in parse_pairs(items, "a dimension; write it as batch=4").items():
        if not text.isdigit():
            raise InputError(f"dimension {name} must be a non-negative number, got {text!r}")
        dims[name] = int(text)
    return dims


def read_inputs(
    ports: Sequence[Port], files: Sequence[str] | None, dims: Sequence[str] | None, seed: int
) -> list[Any]:
    """Inputs in order: from .npy files where given, random otherwise, their symbols as in the files."""
    given: dict[str, np.ndarray[Any, Any]] = {}
    for name, file in parse_pairs(files or (), "an input; write it as name=file.npy").items():
        given[name] = read_array(Path(file))
    unknown = sorted(set(given) - {p.name for p in ports})
    if unknown:
        raise InputError(
            f"no input is called {', '.join(unknown)}", hint=f"the inputs are {', '.join(map(str, ports))}"
        )
    sizes = parse_dims(dims or ())
    for port in ports:
        if port.name in given and port.shape is not None:
            for dim, size in zip(port.shape, given[port.name].shape):
                if isinstance(dim, str) and dim.isidentifier():
                    sizes.setdefault(dim, size)
    if all(p.name in given for p in ports):
        return [given[p.name] for p in ports]
    return [given.get(p.name, array) for p, array in zip(ports, random_inputs(ports, sizes, seed))]


def read_array(path: Path) -> np.ndarray[Any, Any]:
    """A .npy file. Raises InputError."""
    try:
        loaded = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be read as a .npy file", why=str(error)) from error
    if not isinstance(loaded, np.ndarray):
        raise InputError(f"{path} holds several arrays; give a .npy file")
    return loaded


def print_json(data: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(data, indent=1, default=_plain) + "\n")


def describe(item: Any) -> str:
    """A short text of an output."""
    if not isinstance(item, np.ndarray):
        return f"{type(item).__name__} of {len(item)}" if isinstance(item, (list, dict)) else repr(item)
    text = f"{item.dtype}{list(item.shape)}"
    if item.size and item.dtype.kind in "fiu":
        values = item.astype(np.float64)
        text += f"  min {values.min():.6g}  max {values.max():.6g}  mean {values.mean():.6g}"
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return dict(value)
    return str(value)


class Bar:
    """A progress bar on the error stream that appears when something takes longer than a second."""

    def __init__(self) -> None:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self.bar = Progress(*columns, console=err, transient=True)
        self.task: Any = None
        self.started = time.perf_counter()

    def __enter__(self) -> Callable[[str, int, int], None]:
        return self.progress

    def __exit__(self, *_: object) -> None:
        if self.task is not None:
            self.bar.stop()

    def progress(self, stage: str, done: int, of: int) -> None:
        if not err.is_terminal:
            return
        if self.task is None:
            if time.perf_counter() - self.started < SHOW_AFTER and stage != "kernels":
                return  # compiling kernels always takes longer
            self.bar.start()
            self.task = self.bar.add_task(stage, total=None)
        self.bar.update(self.task, description=stage, completed=done, total=of or None)
