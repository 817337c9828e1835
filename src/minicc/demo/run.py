"""`minicc demo`: the whole walk on one small model, from ONNX file to predictions, and what happened between.

It uses only the public interface, so it doubles as an example. ONNX Runtime is compared with where installed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from statistics import median

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from minicc import api
from minicc.demo import load_images, model_path

SHADES = " .:-=+*#%@"
SHOWN = 8
TOLERANCE = 1e-4
MEASURED_SECONDS = 0.5


def run_demo(console: Console) -> int:
    """Compile, run, show, compare; 0 when 97 % of the images are recognised and ONNX Runtime agrees."""
    images, labels = load_images()
    batch = np.ascontiguousarray(images[:, None], np.float32)
    console.rule("minicc: handwritten digits")
    start = time.perf_counter()
    module = api.compile(model_path())
    compiled = time.perf_counter() - start
    start = time.perf_counter()
    (probabilities,) = module.run(None, {"image": batch})
    first = time.perf_counter() - start
    _show_compilation(console, module)
    done = "compiled" if "passes" in module.report.seconds else "loaded what an earlier run compiled"
    console.print(f"{done} in {compiled:.2f} s, first run of {len(batch)} images in {first * 1e3:.1f} ms\n")

    predictions = probabilities.argmax(axis=1)
    wrong = np.flatnonzero(predictions != labels)
    _show_digits(console, images[:SHOWN], predictions[:SHOWN], labels[:SHOWN])
    if wrong.size:
        console.print("mistaken for another digit:")
        _show_digits(console, images[wrong][:SHOWN], predictions[wrong][:SHOWN], labels[wrong][:SHOWN])
    accuracy = 1 - wrong.size / len(labels)
    console.print(f"accuracy on {len(labels)} held-out images: [bold]{accuracy:.1%}[/]\n")

    one = batch[:1]
    ours = _milliseconds(lambda: module.run(None, {"image": one}))
    difference = _compare(console, batch, probabilities, ours)
    return 0 if accuracy >= 0.97 and difference <= TOLERANCE else 1


def _show_compilation(console: Console, module: api.Module) -> None:
    """What each pass changed, and what the program consists of."""
    table = Table(title="what the passes did", title_justify="left")
    for title in ("pass", "rules that fired"):
        table.add_column(title)
    for title in ("nodes", "ms"):
        table.add_column(title, justify="right")
    for row in module.report.passes:
        if row.changes:
            fired = ", ".join(f"{rule} {count}" for rule, count in row.rules.items()) or str(row.changes)
            nodes = f"{row.nodes_before} -> {row.nodes_after}"
            table.add_row(row.name, fired, nodes, f"{row.milliseconds:.1f}")
    console.print(table)
    console.print(str(module.explain()), markup=False, highlight=False)


def _show_digits(
    console: Console, images: NDArray[np.uint8], predictions: NDArray[np.int64], labels: NDArray[np.uint8]
) -> None:
    """Images side by side, two characters per pixel, with prediction and label below; as many as fit the terminal."""
    fitting = max(1, (console.width + 2) // (2 * images.shape[2] + 2))
    images, predictions, labels = images[:fitting], predictions[:fitting], labels[:fitting]
    shades = np.array(list(SHADES))[images.astype(int) * (len(SHADES) - 1) // 16]
    for line in range(shades.shape[1]):
        console.print("  ".join("".join(np.repeat(image[line], 2)) for image in shades), markup=False)
    for title, digits in (("predicted", predictions), ("label", labels)):
        console.print("  ".join(f"{f'{title} {digit}':<16}" for digit in digits), highlight=False)
    console.print()


def _compare(console: Console, batch: NDArray[np.float32], found: NDArray[np.float32], ours: float) -> float:
    """Latency table, with ONNX Runtime where installed; the largest difference relative to its output."""
    table = Table(title="one image", title_justify="left")
    for title in ("runtime", "median ms", "largest relative difference"):
        table.add_column(title)
    table.add_row("minicc", f"{ours:.3f}", "")
    difference = 0.0
    if find_spec("onnxruntime"):
        import onnxruntime

        session = onnxruntime.InferenceSession(str(model_path()), providers=["CPUExecutionProvider"])
        (expected,) = session.run(None, {"image": batch})
        difference = float(np.abs(found - expected).max() / np.abs(expected).max())
        theirs = _milliseconds(lambda: session.run(None, {"image": batch[:1]}))
        table.add_row("ONNX Runtime", f"{theirs:.3f}", f"{difference:.1e}")
    else:
        table.add_row("ONNX Runtime", "not installed", "pip install onnxruntime")
    console.print(table)
    return difference


def _milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call in milliseconds, over half a second."""
    times: list[float] = []
    end = time.perf_counter() + MEASURED_SECONDS
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times) * 1e3
