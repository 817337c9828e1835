"""Command line: build, run; `work` and `once` are what `run` starts."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from minicc.errors import TargetError
from tools.gpu_check.bundle import PRECISIONS, read_arrays, read_manifest


def main(arguments: list[str]) -> int:
    """The exit status: 1 when no model could be built, or when one that ran did not agree; 2 without a GPU for the bundle."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check")
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="compile models here and pack them")
    build.add_argument("--out", type=Path, required=True)
    build.add_argument("--target", default="cuda:sm_90")
    build.add_argument("--models", default="")
    build.add_argument("--precisions", default=",".join(PRECISIONS))
    build.add_argument("--generated", type=Path, default=None, help="folder of benchmarks.export's models")
    run = commands.add_parser("run", help="check and time a bundle on the device")
    run.add_argument("bundle", type=Path)
    run.add_argument("--json", type=Path, required=True)
    run.add_argument("--seconds", type=float, default=540)
    run.add_argument("--only", default="", help="jobs whose name contains one of these parts, with commas between")
    run.add_argument("--no-compile", action="store_true", help="leave torch.compile and ONNX Runtime out")
    work = commands.add_parser("work")
    work.add_argument("bundle", type=Path)
    work.add_argument("--seconds", type=float, required=True)
    work.add_argument("jobs", nargs="+")
    once = commands.add_parser("once")
    once.add_argument("bundle", type=Path)
    once.add_argument("cases", nargs="+")
    facts = commands.add_parser("facts", help="registers, spills and instructions of a bundle's kernels, by family")
    facts.add_argument("bundle", type=Path)
    show = commands.add_parser("show", help="the table of a JSON file")
    show.add_argument("json", type=Path)
    given = parser.parse_args(arguments)
    if given.command == "build":
        from tools.gpu_check.build import MODELS
        from tools.gpu_check.build import build as make

        models = given.models.split(",") if given.models else MODELS
        make(given.out, given.target, models, given.precisions.split(","), given.generated)
        return int(not any(case.artifact for case in read_manifest(given.out).cases))
    elif given.command == "run":
        from tools.gpu_check.run import run as check
        from tools.gpu_check.table import state_of

        try:
            data = check(given.bundle, given.json, given.seconds, given.only, not given.no_compile)
        except TargetError as error:
            print(error, file=sys.stderr)
            return 2
        return int(any(state_of(row) in ("DIFFERS", "error") for row in data["cases"].values()))
    elif given.command == "work":
        from tools.gpu_check.worker import work as do

        do(given.bundle, read_manifest(given.bundle), given.jobs, given.seconds)
    elif given.command == "once":
        run_once(given.bundle, given.cases)
    elif given.command == "facts":
        from tools.gpu_check.facts import cubins_of, facts_table

        print(facts_table(cubins_of(sorted((given.bundle / "artifacts").glob("*.minicc")))))
    else:
        from tools.gpu_check.table import table

        print(table(json.loads(given.json.read_text())))
    return 0


def run_once(folder: Path, names: list[str]) -> None:
    """Load and run cases once, without PyTorch: what memory checkers watch."""
    import minicc

    for case in read_manifest(folder).cases:
        if case.name in names:
            minicc.load(folder / case.artifact, trust=True).run(None, read_arrays(folder / case.data)[0])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
