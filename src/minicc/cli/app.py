"""The commands of `minicc`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

import minicc
from minicc.cli import common, doctor, measure
from minicc.cli.common import Dims, Fixed, Inputs, Json, Level, Model, Seed, Target, Threads, Trust, guarded
from minicc.debug.peaks import measure_peaks
from minicc.debug.roofline import draw_roofline
from minicc.errors import InputError

app = typer.Typer(
    name="minicc",
    help="Compiles ONNX models to fast CPU code.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the `minicc` script."""
    app()


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    """Compiles ONNX models to fast CPU code."""
    if version:
        print(f"minicc {minicc.__version__}")
        raise typer.Exit


@app.command()
def demo() -> None:
    """Compile the small model shipped with minicc, run it, and show what happened."""
    from minicc.demo.run import run_demo

    raise typer.Exit(guarded(lambda: run_demo(common.out)))


@app.command()
def run(
    model: Model,
    inputs: Inputs = None,
    dim: Dims = None,
    seed: Seed = 0,
    target: Target = "cpu",
    threads: Threads = None,
    level: Level = 2,
    dims: Fixed = "",
    trust: Trust = False,
    json: Json = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="write the outputs to this .npz file")
    ] = None,
) -> None:
    """Compile and run a model, with random inputs where none are given."""

    def command() -> None:
        module = common.open_model(model, target, threads, level, trust, dims)
        results = module.run_items(common.read_inputs(module.inputs, inputs, dim, seed))
        named = dict(zip((p.name for p in module.outputs), results))
        if output is not None:
            _write_arrays(output, named)
        if json:
            common.print_json({name: common.describe(item) for name, item in named.items()})
        else:
            for name, item in named.items():
                common.out.print(f"{name}: {common.describe(item)}", markup=False, highlight=False)

    guarded(command)


def _write_arrays(path: Path, named: dict[str, Any]) -> None:
    arrays = {
        name: item for name, item in named.items() if isinstance(item, np.ndarray) and item.dtype != object
    }
    try:
        np.savez(path, allow_pickle=False, **{k.replace("/", "_"): item for k, item in arrays.items()})
    except OSError as error:
        raise InputError(f"{path} cannot be written", why=str(error)) from error


@app.command("compile")
def compile_(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="the file to write")],
    target: Target = "cpu",
    threads: Threads = None,
    level: Level = 2,
    dims: Fixed = "",
    json: Json = False,
    strict: Annotated[bool, typer.Option(help="fail when a node has no compiled kernel")] = False,
    tune: Annotated[bool, typer.Option(help="time several ways of computing each layer, and keep the fastest")] = False,
) -> None:
    """Compile a model and save it; `minicc run` and `minicc.load` read the file."""

    def command() -> None:
        module = common.open_model(model, target, threads, level, dims=dims, strict=strict, tune=tune)
        module.save(output)
        targets = [module.target.name, *(other.target.name for other in module.others)]
        stats = {"file": str(output), "bytes": output.stat().st_size, "targets": targets, **module.stats()}
        if json:
            common.print_json(stats)
        else:
            common.out.print(
                f"{output}: {stats['bytes']} bytes, {stats['kernels']} kernels, "
                f"{stats['kernel_calls']} calls, {len(stats['host_nodes'])} host nodes",
                highlight=False,
            )
            if module.others:
                common.out.print(f"  variants: {', '.join(targets)}", highlight=False)
            for line in module.report.tuned:
                common.out.print(f"  {line}", markup=False, highlight=False)

    guarded(command)


@app.command()
def inspect(
    model: Model,
    json: Json = False,
    passes: Annotated[
        bool, typer.Option("--passes", help="show the graph after all passes, and what each did")
    ] = False,
) -> None:
    """Show a model: signature, opsets, operators, and with --passes what the optimiser makes of it."""
    from minicc.cli.inspection import inspect as inspect_model

    guarded(lambda: inspect_model(model, passes, json))


@app.command()
def explain(
    model: Model,
    target: Target = "cpu",
    level: Level = 2,
    dims: Fixed = "",
    json: Json = False,
    trust: Trust = False,
    layer: Annotated[str, typer.Option(help="print the kernel texts of this layer instead")] = "",
) -> None:
    """Show which layers became which kernels, on which tier, and why not a faster one."""

    def command() -> None:
        module = common.open_model(model, target, None, level, trust, dims)
        if layer:
            print(module.source(layer))
        elif json:
            common.print_json(module.explain().to_dict())
        else:
            print(module.explain())

    guarded(command)


@app.command()
def profile(
    model: Model,
    inputs: Inputs = None,
    dim: Dims = None,
    seed: Seed = 0,
    target: Target = "cpu",
    threads: Threads = None,
    level: Level = 2,
    dims: Fixed = "",
    trust: Trust = False,
    json: Json = False,
    repeats: Annotated[int, typer.Option(min=1, help="measured runs")] = 10,
    trace: Annotated[Path | None, typer.Option(help="write a Chrome trace to this file")] = None,
    roofline: Annotated[Path | None, typer.Option(help="draw the kernels below the machine's peaks")] = None,
) -> None:
    """Show where the time of a run goes, kernel by kernel."""

    def command() -> None:
        module = common.open_model(model, target, threads, level, trust, dims)
        found = module.profile(*common.read_inputs(module.inputs, inputs, dim, seed), repeats=repeats)
        if trace is not None:
            found.to_chrome_trace(trace)
        if roofline is not None:
            draw_roofline(found, measure_peaks(found.threads), roofline)
        if json:
            common.print_json(found.to_dict())
        else:
            print(found)

    guarded(command)


@app.command()
def bench(
    model: Model,
    inputs: Inputs = None,
    dim: Dims = None,
    seed: Seed = 0,
    target: Target = "cpu",
    threads: Threads = None,
    level: Level = 2,
    dims: Fixed = "",
    trust: Trust = False,
    json: Json = False,
    against: Annotated[str, typer.Option(help="also measure these, separated by commas: ort, openvino, mnn, ncnn")] = "",
    seconds: Annotated[float, typer.Option(min=0.01, help="measuring time")] = 3.0,
) -> None:
    """Measure latency, side by side and interleaved with other runtimes."""

    def command() -> None:
        module = common.open_model(model, target, threads, level, trust, dims)
        items = common.read_inputs(module.inputs, inputs, dim, seed)
        with common.Bar() as progress:
            rows = measure.bench(
                module, model, items, [a for a in against.split(",") if a], seconds, progress
            )
        if json:
            common.print_json({"model": str(model), "threads": module.stats()["threads"], "results": rows})
        else:
            common.out.print(measure.table(rows))

    guarded(command)


@app.command()
def diff(
    model: Model,
    inputs: Inputs = None,
    dim: Dims = None,
    seed: Seed = 0,
    target: Target = "cpu",
    threads: Threads = None,
    level: Level = 2,
    json: Json = False,
    against: Annotated[str, typer.Option(help="ort: ONNX Runtime; eval: numpy")] = "ort",
    tolerance: Annotated[
        float, typer.Option(help="largest difference, relative to the largest element")
    ] = 1e-3,
) -> None:
    """Compare outputs with another runtime; where they differ (exit code 1), find the first wrong layer."""

    from minicc.cli.compare import diff as compare
    from minicc.cli.compare import diff_text

    def command() -> bool:
        module = common.open_model(model, target, threads, level)
        items = common.read_inputs(module.inputs, inputs, dim, seed)
        found = compare(module, model, items, against, tolerance, level)
        if json:
            common.print_json(found)
        else:
            print(diff_text(found))
        return bool(found["agree"])

    if not guarded(command):
        raise typer.Exit(1)


@app.command("doctor")
def doctor_(json: Json = False) -> None:
    """Show what this machine offers: processor, versions, cache, and what is missing."""

    def command() -> None:
        facts = doctor.facts()
        if json:
            common.print_json(facts)
        else:
            for name, value in facts.items():
                common.out.print(f"{name + ':':<22}{value}", markup=False, highlight=False, soft_wrap=True)

    guarded(command)
