"""Whole small models for CUDA in the PTX interpreter beside ONNX Runtime, by the rule of benchmarks.compare."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

pytest.importorskip("numba.cuda.compiler", reason="numba-cuda is not installed (extra cuda)")

import minicc
import minicc.demo
from benchmarks import cuda_models
from benchmarks.compare import difference, rule, session
from benchmarks.inputs import cases
from benchmarks.models import load
from tests.cuda.modules import pretended

QUICK = ("fknetwork_int8", "silero_vad_v6", "thai2rom_encoder")
SLOW = (
    "ch_ppocr_mobile_v2.0_cls_infer", "hey_jarvis_v0.1", "hey_mycroft_v0.1", "kaldi", "magika", "melspectrogram", "nemo80",
    "nsnet2-20ms-baseline", "silero_vad", "silero_vad_16k_op15", "silero_vad_16k_sequence", "silero_vad_op18_ifless",
    "thai2rom_decoder", "wespeaker",
)  # fmt: skip
DIGITS = Path(minicc.demo.__path__[0]) / "digits.onnx"


def agrees(name: str, path: Path) -> None:
    """The case with the fewest numbers."""
    model, source = load(name, path)
    equal = rule(model)
    feeds = min(cases(name, model), key=lambda case: sum(np.asarray(a).size for a in case.feeds.values())).feeds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", minicc.HostNodesWarning)
        module = minicc.compile(source, target="cuda:sm_90")
    with pretended(module):
        found = module.run(None, feeds)
    wanted = session(source, 1, plain=equal.kind == "quantised").run(None, feeds)
    for output, want, got in zip(model.graph.output, wanted, found, strict=True):
        assert difference(equal, output.name, want, got)[1] == ""


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_trained_model(name: str, fetched: Callable[[str], Path]) -> None:
    agrees(name, fetched(name))


@pytest.mark.slow
def test_generated_model(generated: Callable[[str], Path]) -> None:
    agrees("lstm_classifier", generated("lstm_classifier"))


@pytest.mark.parametrize(
    ("precision", "limit"),
    [("fp32", 1e-5), *(pytest.param(*each, marks=pytest.mark.slow) for each in (("tf32", 5e-3), ("fp16", 5e-3), ("bf16", 4e-2)))],
)
def test_digits_in_every_precision(precision: str, limit: float) -> None:
    """Ten roundings of the operands, relative to the largest output."""
    model = onnx.load(DIGITS)
    module = minicc.compile(model, target="cuda:sm_90", precision=precision, strict=True)
    (port,) = module.inputs
    shape = tuple(size if isinstance(size, int) else 1 for size in port.shape)
    feeds = {port.name: np.random.default_rng(0).uniform(0, 1, shape).astype(np.float32)}
    with pretended(module):
        (found, *_) = module.run(None, feeds)
    (wanted, *_) = session(DIGITS, 1).run(None, feeds)
    assert np.abs(found - wanted).max() < limit * np.abs(wanted).max()


def test_figures_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """benchmarks.cuda_models: in processes of its own, what it cannot compile is a line and not the end."""
    (tmp_path / "digits.onnx").write_bytes(DIGITS.read_bytes())
    (tmp_path / "wrong.onnx").write_bytes(b"no model")
    options = ["--generated", str(tmp_path), "--json", str(tmp_path / "figures.json")]
    assert cuda_models.main(cuda_models.parse(["digits", *options])) == 0
    assert cuda_models.main(cuda_models.parse(["wrong", *options])) == 1
    (figures,) = json.loads((tmp_path / "figures.json").read_text())
    assert figures["name"] == "wrong" and figures["problem"]
    printed = capsys.readouterr().out
    assert "| digits | " in printed and "| wrong | |" in printed
