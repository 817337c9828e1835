"""The roofline picture of a profile: every template kernel's rate over its operations per byte, below the machine's peaks."""

from __future__ import annotations

import os

from minicc.debug.peaks import Peaks
from minicc.debug.profile import Profile
from minicc.errors import InputError

LABELLED = 6  # kernels with a name in the legend, those that take the longest


def draw_roofline(found: Profile, peaks: Peaks, path: str | os.PathLike[str]) -> None:
    """Write the picture; the format is that of the file's ending.

    A point's area is its share of the time. A point above the sloped line has its operands in the caches. Generated
    loops have no place in it: their operations are an estimate from above, which counts a hoisted reduction as often as
    it is used. Raises InputError for a file that cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("matplotlib is not installed", hint="pip install minicc[bench]") from error

    rows = [r for r in found.rows if r.tier not in ("loops", "host") and r.gflops > 0 and r.gbytes > 0]
    figure = Figure(figsize=(8, 4.5), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    places = [r.gflops / r.gbytes for r in rows]
    ridge = peaks.gflops / peaks.gbytes
    left, right = min([*places, ridge / 10]) / 2, max([*places, ridge * 10]) * 2
    axes.plot([left, ridge, right], [left * peaks.gbytes, peaks.gflops, peaks.gflops], color="black", linewidth=1)
    for at, (row, place) in enumerate(zip(rows, places, strict=True)):
        named = at < LABELLED
        layer = row.layers[0] if row.layers else row.name
        axes.scatter(
            place, row.gflops, s=12 + 600 * row.share, alpha=0.7, linewidths=0, zorder=3 if named else 2,
            color=f"C{at}" if named else "silver",
            label=f"{row.share:4.0%} of time, {row.gflops / peaks.gflops:4.0%} of peak: {layer[-36:]}" if named else None,
        )  # fmt: skip
    axes.set(
        xscale="log", yscale="log", xlim=(left, right), xlabel="operations per byte", ylabel="GFLOP/s",
        title=f"{found.name}: {found.whole * 1e3:.3g} ms on {found.threads} thread(s); "
        f"peaks {peaks.gflops:.0f} GFLOP/s, {peaks.gbytes:.0f} GB/s",
    )  # fmt: skip
    axes.grid(alpha=0.3)
    if rows:
        legend = figure.legend(loc="outside lower center", ncols=2, fontsize=7, frameon=False)
        for handle in legend.legend_handles:
            handle.set_sizes([30])  # type: ignore[union-attr]
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be written", why=str(error)) from error
