"""Latency, agreement, start-up and memory of minicc beside other runtimes on the CPU: the whole table.

    python -m benchmarks.cpu [NAME ...] [--generated DIR] [--threads 1,2] [--peers ort,openvino,mnn,ncnn,torch]
                             [--batches 1,8] [--dim seq=512] [--seconds 3] [--out FOLDER] [--fresh]

Every row is a process of its own, in which all runtimes get the same inputs (the nominal shape of `benchmarks.inputs`) and are
measured in alternating blocks; each block starts after a pause, in which other runtimes' threads stop spinning, and an
uncounted call. Start-up (import to first result, the module in the cache; the least of three) and peak memory are those of
further processes for minicc and ONNX Runtime (benchmarks/start.py). Rows are written to FOLDER/results.json as they come and kept
unless --fresh; FOLDER/table.md is made of them, and `benchmarks.rooflines` draws them. A runtime that is absent, refuses a
model or gives other results is left empty; the row in results.json says why.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from rich.console import Console
from rich.progress import Progress

from benchmarks.compare import difference, interleaved, milliseconds, rule
from benchmarks.export import NAMES as GENERATED
from benchmarks.fetch import MODELS, ModelUnavailable
from benchmarks.inputs import case_at
from benchmarks.latency import machine
from benchmarks.models import load, locate

PAUSE, BLOCK = 0.06, 5
WRONG = 0.02  # a runtime whose results differ by more, relative to the largest, does not run the model
RUNTIMES = ("ort", "openvino", "mnn", "ncnn", "torch")
Row = dict[str, Any]

# Time of ONNX Runtime over time of minicc that we want, by family; every other model: 1.0.
GOALS: Mapping[str, tuple[float, tuple[str, ...]]] = {
    "3x3 convolutions": (1.3, ("resnet50", "resnet18", "vgg11", "resnet50_legacy13")),
    "U-Net": (2.0, ("unet",)),
    "mobile networks": (1.3, (
        "mobilenet_v2", "mobilenet_v2_legacy13", "mobilenet_v3_small", "efficientnet_b0", "shufflenet_v2_x1_0", "mnasnet1_0",
    )),
    "transformers": (1.2, (
        "bert_base", "bert_base_static", "distilbert", "minilm_l6_trained", "gpt2", "gpt2_kv", "llama_small",
        "whisper_tiny_encoder",
    )),
    "text and faces": (1.3, (
        "ch_PP-OCRv4_det_infer", "ch_PP-OCRv4_rec_infer", "ch_ppocr_mobile_v2.0_cls_infer", "centerface", "ssdlite320_nms",
    )),
    "small and audio": (1.3, (
        "silero_vad", "silero_vad_16k_op15", "silero_vad_v6", "hey_jarvis_v0.1", "hey_mycroft_v0.1", "kaldi", "nemo80",
        "melspectrogram", "embedding_model", "speech-embedding", "lstm_classifier", "wespeaker",
    )),
}  # fmt: skip


def goal_of(name: str) -> float:
    """The goal of a model."""
    return next((goal for goal, names in GOALS.values() if name in names), 1.0)


# ------------------------------------------------------------------------------------------- in a process of its own


def batched(model: onnx.ModelProto, batch: int) -> bool:
    """Make the first axis of every input `batch`; whether it was free to be so."""
    for value in model.graph.input:
        shape = value.type.tensor_type.shape
        if not shape.dim or not shape.dim[0].dim_param:
            return False
    return batch >= 1


def feeds_of(name: str, model: onnx.ModelProto, batch: int, sizes: Mapping[str, int] | None = None) -> dict[str, np.ndarray]:
    """Nominal inputs with some dimensions at given sizes, repeated along the first axis for a batch."""
    feeds = case_at(name, model, sizes or {}).feeds
    return {key: np.concatenate([array] * batch) if batch > 1 else array for key, array in feeds.items()}


def other_runtime(runtime: str, name: str, path: Path, feeds: Mapping[str, Any], threads: int) -> Any:
    """A call of the model in another runtime; PyTorch takes the network that a generated model was exported from."""
    from benchmarks.torch_peer import torch_peer
    from minicc.peers import peer

    return torch_peer(name, feeds, threads) if runtime == "torch" else peer(runtime, path, feeds, threads)


def unlike(expected: Sequence[Any], found: Sequence[Any]) -> float:
    """Largest difference of a runtime's outputs relative to the largest magnitude; their types and ranks are its own."""
    worst = 0.0
    for want, got in zip(expected, found, strict=True):
        a, b = (np.asarray(x).astype(np.float64).reshape(-1) for x in (want, got))
        if a.size != b.size:
            return float("inf")
        if a.size:
            error = float(np.abs(a - b).max()) / max(float(np.abs(a).max()), 1e-30)
            worst = max(worst, error) if error == error else float("inf")
    return worst


def measure(name: str, path: Path, options: argparse.Namespace) -> Row:
    """One row: medians of every runtime, and the difference of minicc and of each from ONNX Runtime's plain results."""
    import minicc

    threads, batch = options.threads[0], options.batches[0]
    model, source = load(name, path)
    if batch > 1 and not batched(model, batch):
        return {"skipped": "its batch is fixed"}
    try:
        feeds, equal = feeds_of(name, model, batch, options.dim), rule(model)
    except ValueError as error:
        return {"skipped": str(error)}
    outputs = [output.name for output in model.graph.output]
    del model
    with tempfile.TemporaryDirectory() as folder:
        file = path
        if isinstance(source, bytes):
            file = Path(folder, "model.onnx")
            file.write_bytes(source)
        module = minicc.compile(file, threads=threads)
        calls: dict[str, Any] = {"minicc": lambda: module.run(None, feeds)}
        ours = calls["minicc"]()
        row: Row = {"refused": {}, "error": {}}
        expected = ours
        for other in options.peers:
            try:
                call = other_runtime(other, name, file, feeds, threads)
                found = call()
                expected = found if other == "ort" else expected
                error = unlike(expected, found)
            except (minicc.MiniccError, ValueError) as refusal:
                why = getattr(refusal, "why", "") or str(refusal)
                row["refused"][other] = why.splitlines()[0][:200]
                continue
            if error > WRONG:
                row["refused"][other] = f"its results differ by {error:.1e}"
            else:
                calls[other], row["error"][other] = call, error
        row["error"]["minicc"] = max(difference(equal, o, e, np.asarray(a))[0] for o, e, a in zip(outputs, expected, ours))
        times = interleaved(list(calls.values()), options.seconds * len(calls), block=BLOCK, pause=PAUSE)
        if batch == 1 and not options.dim:
            row["roofline"] = roofline(module, list(feeds.values()), threads)
        return row | {"ms": dict(zip(calls, map(milliseconds, times)))}


def roofline(module: Any, inputs: Sequence[np.ndarray], threads: int) -> Row:
    """The machine's peaks now, and of each template kernel its layer, share of the time, and rates (benchmarks.rooflines)."""
    from minicc.debug.peaks import measure_peaks
    from minicc.debug.profile import profile

    peaks = measure_peaks(threads)
    found = profile(module, inputs, repeats=5)
    rows = [r for r in found.rows if r.tier not in ("loops", "host") and r.gflops > 0 and r.gbytes > 0]
    kernels = [[", ".join(r.layers[:1]), r.share, r.gflops, r.gbytes] for r in rows]
    return {"gflops": peaks.gflops, "gbytes": peaks.gbytes, "kernels": kernels}


# ------------------------------------------------------------------------------------------------------- the whole table


def child(arguments: Sequence[str], limit: float) -> Row:
    """The last line of a process of this module, as JSON; a row with "failed" when there is none."""
    command = [sys.executable, "-m", "benchmarks.cpu", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
        found: Row = json.loads(done.stdout.strip().splitlines()[-1])
        return found
    except subprocess.TimeoutExpired:
        return {"failed": f"gave up after {limit:.0f} s"}
    except (IndexError, ValueError):
        return {"failed": (done.stderr.strip().splitlines() or ["failed"])[-1][:300]}


def begin(runtime: str, file: Path) -> Row:
    """A start in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("start.py")), runtime, str(file), str(file.with_suffix(".npz"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    lines = done.stdout.strip().splitlines()
    row: Row = json.loads(lines[-1]) if lines and not done.returncode else {}
    return row


def jobs(options: argparse.Namespace) -> Iterator[tuple[str, int, int]]:
    """(model, batch, threads) of every row."""
    for name in options.names or [*(model.name for model in MODELS), *GENERATED]:
        for batch in options.batches:
            for threads in options.threads:
                yield name, batch, threads


def starts(name: str, path: Path) -> Row:
    """Start-up and peak memory, one thread: the least of three starts. A first start of minicc fills the cache."""
    model, source = load(name, path)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        if isinstance(source, bytes):
            file.write_bytes(source)
        else:
            onnx.save(model, file)
        np.savez(file.with_suffix(".npz"), **feeds_of(name, model, 1))
        del model
        found: Row = {}
        for runtime in ("minicc", *("minicc", "ort") * 3):
            begun = begin(runtime, file)
            if "start_s" in begun and begun["start_s"] < found.get(runtime, begun | {"start_s": 1e9})["start_s"]:
                found[runtime] = begun
        return found


def table(rows: Mapping[str, Row], peers: Sequence[str]) -> str:
    """The rows as Markdown: times, ratios to ONNX Runtime with a mark below the goal, and their geometric mean."""
    head = ["model", "batch", "threads", "minicc ms", *(f"{p} ms" for p in peers), "ORT / minicc", "goal", "error",
            "start s, minicc / ORT", "MiB, minicc / ORT"]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    ratios: dict[tuple[int, int], list[float]] = {}
    for key, row in rows.items():
        name, batch, threads = key.rsplit(" ", 2)
        if "ms" not in row:
            if "skipped" not in row:
                lines.append([name, batch, threads, row.get("failed", "failed")] + [""] * (len(head) - 4))
            continue
        ms, goal = row["ms"], goal_of(name.split()[0])
        ratio = ms["ort"] / ms["minicc"] if "ort" in ms else None
        if ratio is not None and " " not in name:
            ratios.setdefault((int(batch), int(threads)), []).append(ratio)
        began = row.get("starts", {})
        lines.append([
            name, batch, threads, f"{ms['minicc']:.3f}", *(f"{ms[p]:.3f}" if p in ms else "" for p in peers),
            "" if ratio is None else f"{ratio:.2f}{' *' if ratio < goal else ''}", f"{goal:.1f}", f"{row['error']['minicc']:.1e}",
            " / ".join(f"{began[r]['start_s']:.2f}" for r in ("minicc", "ort") if "start_s" in began.get(r, {})),
            " / ".join(f"{began[r]['peak_mib']:.0f}" for r in ("minicc", "ort") if "peak_mib" in began.get(r, {})),
        ])  # fmt: skip
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    for (batch, threads), found in sorted(ratios.items()):
        mean = exp(sum(map(log, found)) / len(found))
        ahead = sum(ratio >= 1 for ratio in found)
        text += f"\n\nbatch {batch}, {threads} thread(s): geometric mean {mean:.2f}, {ahead} of {len(found)} models ahead"
    return text + "\n\n`*`: below its goal.\n"


def run(options: argparse.Namespace) -> None:
    """Measure what is missing, and write the results after every row."""
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "results.json"
    data: Row = {"machine": machine(), "rows": {}}
    if file.exists() and not options.fresh:
        data["rows"] = json.loads(file.read_text())["rows"]
    wanted = list(jobs(options))
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("rows", total=len(wanted))
        for name, batch, threads in wanted:
            shown = " ".join([name, *(f"{dim}={size}" for dim, size in options.dim.items())])
            key = f"{shown} {batch} {threads}"
            progress.update(task, advance=1, description=key)
            if "ms" in data["rows"].get(key, {}):
                continue
            try:
                path = locate(name, options.generated, options.models)
            except ModelUnavailable as error:
                data["rows"][key] = {"skipped": str(error)}
                continue
            common = ["--file", str(path), "--seconds", str(options.seconds), "--batches", str(batch), "--threads", str(threads)]
            common += [f"--dim={dim}={size}" for dim, size in options.dim.items()]
            row = child([name, "--row", *common, "--peers", ",".join(options.peers)], 600)
            if "failed" in row and len(options.peers) > 1:  # one of the others may have ended the process
                row = child([name, "--row", *common, "--peers", options.peers[0]], 600)
            if "ms" in row and batch == 1 and not options.dim and threads == options.threads[0] and not options.no_start:
                row["starts"] = starts(name, path)
            data["rows"][key] = row
            file.write_text(json.dumps(data, indent=1))
    text = table(data["rows"], options.peers)
    (options.out / "table.md").write_text(text)
    print(text)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.cpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="models; default all")
    parser.add_argument("--generated", type=Path, help="folder of .onnx files made by benchmarks/export.py")
    parser.add_argument("--models", type=Path, help="folder of the fetched models (default: user cache)")
    parser.add_argument("--threads", type=_numbers, default=[1, 2])
    parser.add_argument("--batches", type=_numbers, default=[1])
    parser.add_argument("--dim", type=_size, action="append", default=[], help="size of a symbolic dimension, like seq=512")
    parser.add_argument("--peers", type=lambda text: [p for p in text.split(",") if p], default=list(RUNTIMES))
    parser.add_argument("--seconds", type=float, default=3.0, help="measuring time per runtime and row")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    parser.add_argument("--no-start", action="store_true", help="leave start-up and memory out")
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.dim = dict(options.dim)
    return options


def _size(text: str) -> tuple[str, int]:
    name, _, size = text.partition("=")
    return name, int(size)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(options: argparse.Namespace) -> None:
    if options.row:
        print(json.dumps(measure(options.names[0], options.file, options)))
    else:
        run(options)


if __name__ == "__main__":
    main(parse())
