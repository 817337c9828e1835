"""A sheet of rooflines, a panel for each model: how close its kernels come to what the machine can do.

    python -m benchmarks.rooflines FOLDER --out FILE.png [--threads 1]

FOLDER holds the results.json of `benchmarks.cpu`. A point is a template kernel call; its area is its share of the model's time.
Above the sloped line its operands are in the caches; above the level one it needs fewer operations than the definition
(Winograd). `minicc profile MODEL --roofline FILE` draws a single model with the names of its layers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

COLUMNS = 6


def draw(rows: Mapping[str, Mapping[str, Any]], path: Path, threads: int) -> int:
    """Write the sheet of the rows with so many threads and batch 1; the number of panels."""
    models = {key.split(" ")[0]: row for key, row in rows.items() if key.endswith(f" 1 {threads}") and row.get("roofline")}
    lines = -(-len(models) // COLUMNS)
    figure = Figure(figsize=(2.4 * COLUMNS, 1.9 * lines), dpi=80, layout="constrained")
    for at, (name, row) in enumerate(sorted(models.items())):
        axes = figure.add_subplot(lines, COLUMNS, at + 1)
        peak, bandwidth, kernels = (row["roofline"][key] for key in ("gflops", "gbytes", "kernels"))
        ridge = peak / bandwidth
        axes.plot([0.1, ridge, 1e4], [0.1 * bandwidth, peak, peak], color="black", linewidth=0.8)
        for _, share, gflops, gbytes in kernels:
            axes.scatter(gflops / gbytes, gflops, s=3 + 150 * share, alpha=0.6, linewidths=0, color="C0")
        used = sum(share for _, share, *_ in kernels)
        reached = sum(share * gflops for _, share, gflops, _ in kernels) / used / peak if used else 0.0
        axes.set_title(f"{name}: {used:.0%} of time, {reached:.0%} of peak", fontsize=6.5, pad=2)
        axes.set(xscale="log", yscale="log", xlim=(0.1, 1e4), ylim=(peak / 300, peak * 4))
        axes.tick_params(labelsize=5, length=2, pad=1)
        axes.grid(alpha=0.25)
    figure.supxlabel("operations per byte", fontsize=8)
    figure.supylabel("GFLOP/s", fontsize=8)
    figure.savefig(path)
    return len(models)


def main(arguments: argparse.Namespace) -> None:
    rows = json.loads((arguments.folder / "results.json").read_text())["rows"]
    print(f"{arguments.out}: {draw(rows, arguments.out, arguments.threads)} models")


if __name__ == "__main__":
    parser = argparse.ArgumentParser("benchmarks.rooflines", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/rooflines.png"))
    parser.add_argument("--threads", type=int, default=1)
    main(parser.parse_args())
