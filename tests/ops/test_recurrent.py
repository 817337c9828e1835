"""Recurrent layers against ONNX's cases and ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ops.onnx_cases import Case, cases_of, check_case
from tests.ops.runtime_oracle import check_against_onnxruntime
from tests.ops.test_matmul import normal, weights

T, B, IN, H = 5, 3, 4, 6  # steps, batch, input size, hidden size
LENGTHS = np.array([5, 2, 3], np.int32)


@pytest.mark.parametrize("case", cases_of("LSTM", "GRU", "RNN"), ids=lambda c: c.name)
def test_onnx_case(case: Case) -> None:
    check_case(case)


def _weights(gates: int, directions: int) -> list[np.ndarray]:
    return [normal(T, B, IN), normal(directions, gates * H, IN), normal(directions, gates * H, H) * 0.5,
            normal(directions, 2 * gates * H)]  # fmt: skip


def _directions(name: str) -> int:
    return 2 if name == "bidirectional" else 1


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "lengths"])
@pytest.mark.parametrize("extra", [{}, {"clip": 0.5}, {"input_forget": 1}], ids=str)
def test_lstm(direction: str, lengths: np.ndarray | None, extra: dict[str, object]) -> None:
    d = _directions(direction)
    inputs = [*_weights(4, d), lengths, normal(d, B, H), normal(d, B, H, seed=1), normal(d, 3 * H)]
    check_against_onnxruntime("LSTM", inputs, {"direction": direction, "hidden_size": H, **extra}, outputs=3)


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_lstm_activations(direction: str) -> None:
    d = _directions(direction)
    attrs = {
        "direction": direction, "hidden_size": H, "activations": ["HardSigmoid", "Tanh", "Elu"] * d,
        "activation_alpha": [0.3, 0.7] * d, "activation_beta": [0.4] * d,
    }  # fmt: skip
    check_against_onnxruntime("LSTM", _weights(4, d)[:3], attrs, outputs=3)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("before_reset", [0, 1])
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"clip": 0.5},
        {"activations": ["HardSigmoid", "Softsign"]},
        {"activations": ["Sigmoid", "LeakyRelu"], "activation_alpha": [0.3]},
    ],
    ids=str,
)
def test_gru(direction: str, before_reset: int, extra: dict[str, object]) -> None:
    d = _directions(direction)
    repeated = {k: v * d if isinstance(v, list) else v for k, v in extra.items()}
    attrs = {"direction": direction, "hidden_size": H, "linear_before_reset": before_reset, **repeated}
    check_against_onnxruntime("GRU", [*_weights(3, d), LENGTHS, normal(d, B, H)], attrs, outputs=2)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("extra", [{"activations": ["Relu"]}, {"clip": 0.3}], ids=str)
def test_rnn(direction: str, extra: dict[str, object]) -> None:
    d = _directions(direction)
    repeated = {k: v * d if isinstance(v, list) else v for k, v in extra.items()}
    attrs = {"direction": direction, "hidden_size": H, **repeated}
    check_against_onnxruntime("RNN", [*_weights(1, d), LENGTHS, normal(d, B, H)], attrs, outputs=2)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("per_column", [False, True])
def test_dynamic_quantize_lstm(direction: str, per_column: bool) -> None:
    d = _directions(direction)
    shape = (d, 4 * H) if per_column else (d,)
    scales = [np.abs(normal(*shape, seed=s)) * 0.01 + 0.005 for s in (0, 1)]
    zero = np.zeros(shape, np.int8)
    inputs = [
        normal(T, B, IN),
        weights(d, IN, 4 * H),
        weights(d, H, 4 * H),
        normal(d, 8 * H),
        None,
        normal(d, B, H),
        normal(d, B, H, seed=1),
        normal(d, 3 * H) * 0.1,
        scales[0],
        zero,
        scales[1],
        zero,
    ]
    attrs = {"direction": direction, "hidden_size": H}
    check_against_onnxruntime(
        "DynamicQuantizeLSTM",
        inputs,
        attrs,
        outputs=3,
        domain="com.microsoft",
        constants=(1, 2, 8, 9, 10, 11),
    )
