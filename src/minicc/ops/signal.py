"""Signal processing: DFT, STFT, window functions and the mel filter bank.

Fourier transforms of a length known at compile time become one matrix product with a constant table; longer
or unknown ones run on the host with numpy's FFT.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from minicc.errors import ShapeError
from minicc.ir.dims import Dim
from minicc.ir.opdef import Inference, Kind, OpDef, register
from minicc.ir.types import TensorType, f32
from minicc.ops.attention import counted
from minicc.ops.helpers import Array, computed_in_f32, default_refuse, element_type, unknown_dims
from minicc.ops.norm import as_type, optional, required, reshaped

if TYPE_CHECKING:
    from minicc.ir.graph import Builder, Node, Value

# A table of more elements costs more than an FFT on the host.
MAX_TABLE = 1 << 23


def _static(value: Value | None) -> Dim | None:
    """The single element of a static input."""
    return (
        None
        if value is None or value.content is None or not value.content.size
        else value.content.reshape(-1)[0]
    )


def fourier_table(points: int, length: int, components: int, *, inverse: bool, onesided: bool) -> Array:
    """The matrix [points * components, bins * parts] that transforms `points` leading values of a signal of
    `length`.

    Rows and columns run over (position, real or imaginary part). The inverse one-sided transform has a real
    result (parts = 1) and takes the first length // 2 + 1 bins.
    """
    real_result = inverse and onesided
    bins = length // 2 + 1 if onesided and not inverse else length
    angle = 2 * np.pi / length * (np.outer(np.arange(points), np.arange(bins)) % length)
    cos, sin = np.cos(angle), np.sin(angle)
    if inverse:
        cos, sin = cos / length, -sin / length
    if real_result:
        k = np.arange(points)
        twice = np.where((k == 0) | (2 * k == length), 1.0, 2.0)[:, None] * (k <= length // 2)[:, None]
        parts = np.stack([cos * twice, sin * twice], axis=1)[..., None]
    else:
        parts = np.stack([np.stack([cos, -sin], axis=-1), np.stack([sin, cos], axis=-1)], axis=1)
    return np.ascontiguousarray(parts[:, :components].reshape(points * components, -1))


# -- DFT


def _dft_axis(content: Any, rank: int) -> int:
    axis = -2 if content is None else int(np.asarray(content).reshape(-1)[0])
    if not -rank <= axis < rank or axis % rank == rank - 1:
        raise ShapeError(f"DFT axis {axis} is not a signal axis of rank {rank}")
    return axis % rank


def _dft_length(given: Dim | None, size: Dim, attrs: Any) -> Dim:
    if given is not None:
        return given
    return (size - 1) * 2 if attrs["inverse"] and attrs["onesided"] else size


def _dft_infer(n: Inference) -> list[TensorType]:
    shape = n.shape(0)
    if len(shape) < 2 or (isinstance(shape[-1], int) and shape[-1] not in (1, 2)):
        raise n.error("the last axis must hold real numbers (size 1) or real and imaginary parts (size 2)")
    if (n.has(1) and n.content(1) is None) or (n.has(2) and n.content(2) is None):
        parts = 1 if n.attr("onesided") and n.attr("inverse") else 2
        return [TensorType(n.dtype(0), (*unknown_dims(n, len(shape) - 1), parts))]
    try:
        axis = _dft_axis(n.content(2), len(shape))
    except ShapeError as error:
        raise n.error(error.what) from error
    length = _dft_length(_static(n.inputs[1]) if n.has(1) else None, shape[axis], n.attrs)
    one, inverse = n.attr("onesided"), n.attr("inverse")
    bins = length // 2 + 1 if one and not inverse else length
    return [TensorType(n.dtype(0), (*shape[:axis], bins, *shape[axis + 1 : -1], 1 if one and inverse else 2))]


def _dft_refuse(node: Node) -> str | None:
    reason = default_refuse(node)
    if reason is not None:
        return reason
    x = required(node, 0)
    axis = _dft_axis(None if optional(node, 2) is None else _static(optional(node, 2)), x.tensor.rank)
    length = _dft_length(_static(optional(node, 1)), x.shape[axis], node.attrs)
    size, components = x.shape[axis], x.shape[-1]
    if not isinstance(length, int) or not isinstance(size, int) or not isinstance(components, int):
        return "a Fourier transform of a length known only at run time"
    if length <= 0 or min(length, size) * components * length * 2 > MAX_TABLE:
        return f"a Fourier transform of length {length}, for which an FFT on the host is faster"
    return None


def _dft_expand(b: Builder, node: Node) -> list[Value]:
    x, attrs = required(node, 0), node.attrs
    rank = x.tensor.rank
    axis = _dft_axis(_static(optional(node, 2)), rank)
    length = _dft_length(_static(optional(node, 1)), x.shape[axis], attrs)
    size, components = x.shape[axis], x.shape[-1]
    assert isinstance(length, int) and isinstance(size, int) and isinstance(components, int)
    limit = length // 2 + 1 if attrs["inverse"] and attrs["onesided"] else length
    if size > limit:
        x, size = b.op("Slice", x, b.shape([0]), b.shape([limit]), b.shape([axis])), limit
    order = [a for a in range(rank - 1) if a != axis] + [axis, rank - 1]
    x = x if order == sorted(order) else b.op("Transpose", x, perm=order)
    lead = x.shape[:-2]
    table = fourier_table(
        size, length, components, inverse=bool(attrs["inverse"]), onesided=bool(attrs["onesided"])
    )
    out = b.op(
        "MatMul", reshaped(b, x, (*lead, size * components)), b.constant(table.astype(x.tensor.dtype.numpy))
    )
    parts = 1 if attrs["inverse"] and attrs["onesided"] else 2
    out = reshaped(b, out, (*lead, table.shape[1] // parts, parts))
    back = [order.index(a) for a in range(rank)]
    return [out if back == sorted(back) else b.op("Transpose", out, perm=back)]


@computed_in_f32
def _dft_eval(
    x: Array, dft_length: Array | None = None, axis: Array | None = None, *, inverse: int, onesided: int
) -> Array:
    where = _dft_axis(axis, x.ndim)
    given = None if dft_length is None else int(dft_length.reshape(-1)[0])
    length = int(_dft_length(given, x.shape[where], {"inverse": inverse, "onesided": onesided}))  # type: ignore[arg-type]
    signal = x[..., 0] if x.shape[-1] == 1 else x[..., 0] + 1j * x[..., 1]
    if inverse and onesided:
        return np.fft.irfft(signal, n=length, axis=where)[..., None].astype(x.dtype)
    out = (np.fft.ifft if inverse else np.fft.fft)(signal, n=length, axis=where)
    if onesided:
        out = np.take(out, range(length // 2 + 1), axis=where)
    return np.stack([out.real, out.imag], axis=-1).astype(x.dtype)


register(
    OpDef(
        "DFT",
        Kind.EXPAND,
        infer=_dft_infer,
        eval=_dft_eval,
        expand=_dft_expand,
        refuse=_dft_refuse,
        static_inputs=(1, 2),
        attrs={"inverse": 0, "onesided": 0},
    )
)


# -- STFT: signal [B, T, 1 or 2], frame_step, window [L], frame_length


def _frame_length(signal: Sequence[Dim], window: Sequence[Dim] | None, given: Dim | None) -> Dim:
    return given if given is not None else signal[1] if window is None else window[0]


def _stft_infer(n: Inference) -> list[TensorType]:
    signal = n.shape(0)
    if len(signal) not in (2, 3):
        raise n.error("the signal must be [batch, length, 1 or 2]")
    step = _static(n.inputs[1])
    if step is None or (n.has(3) and n.content(3) is None):
        return [TensorType(n.dtype(0), (signal[0], *unknown_dims(n, 2), 2))]
    length = _frame_length(
        signal, n.shape(2) if n.has(2) else None, _static(n.inputs[3]) if n.has(3) else None
    )
    frames = (signal[1] - length) // step + 1
    if isinstance(frames, int) and frames < 0:
        raise n.error(f"frames of {length} do not fit into a signal of {signal[1]}")
    return [TensorType(n.dtype(0), (signal[0], frames, length // 2 + 1 if n.attr("onesided") else length, 2))]


def _stft_refuse(node: Node) -> str | None:
    reason = default_refuse(node)
    if reason is not None:
        return reason
    signal, window = required(node, 0), optional(node, 2)
    length = _frame_length(
        signal.shape, window.shape if window is not None else None, _static(optional(node, 3))
    )
    components = signal.shape[2] if signal.tensor.rank == 3 else 1
    if (
        not isinstance(length, int)
        or not isinstance(components, int)
        or not isinstance(_static(required(node, 1)), int)
    ):
        return "frames of a length known only at run time"
    if length * components * length * 2 > MAX_TABLE:
        return f"a Fourier transform of length {length}, for which an FFT on the host is faster"
    return None


def _stft_expand(b: Builder, node: Node) -> list[Value]:
    signal, window = required(node, 0), optional(node, 2)
    step, (batch, frames, bins, _) = _static(required(node, 1)), node.output.shape
    length = _frame_length(
        signal.shape, window.shape if window is not None else None, _static(optional(node, 3))
    )
    components = signal.shape[2] if signal.tensor.rank == 3 else 1
    assert isinstance(length, int) and isinstance(components, int) and isinstance(step, int)
    starts = b.op("Mul", counted(b, frames), b.constant(np.int64(step)))
    places = b.op("Add", reshaped(b, starts, (frames, 1)), b.constant(np.arange(length, dtype=np.int64)))
    signal = reshaped(b, signal, (batch, signal.shape[1], components))
    parts = b.op("Gather", signal, places, axis=1)  # [batch, frames, length, components]
    table = b.constant(
        fourier_table(
            length, length, components, inverse=False, onesided=bool(node.attrs["onesided"])
        ).astype(signal.tensor.dtype.numpy)
    )
    if window is not None:  # scaling the table is free when the window is a constant
        scale = reshaped(b, as_type(b, window, signal.tensor.dtype), (length, 1, 1))
        rows = reshaped(b, table, (length, components, table.shape[1]))
        table = reshaped(b, b.op("Mul", rows, scale), table.shape)
    out = b.op("MatMul", reshaped(b, parts, (batch, frames, length * components)), table)
    return [reshaped(b, out, (batch, frames, bins, 2))]


@computed_in_f32
def _stft_eval(
    signal: Array,
    frame_step: Array,
    window: Array | None = None,
    frame_length: Array | None = None,
    *,
    onesided: int,
) -> Array:
    given = None if frame_length is None else int(frame_length.reshape(-1)[0])
    length = int(_frame_length(signal.shape, None if window is None else window.shape, given))  # type: ignore[arg-type]
    if signal.ndim == 3:
        values = signal[..., 0] if signal.shape[2] == 1 else signal[..., 0] + 1j * signal[..., 1]
    else:
        values = signal
    frames = np.lib.stride_tricks.sliding_window_view(values, length, axis=1)[
        :, :: int(frame_step.reshape(-1)[0])
    ]
    out = np.fft.fft(frames if window is None else frames * window, axis=-1)
    out = out[..., : length // 2 + 1] if onesided else out
    return np.stack([out.real, out.imag], axis=-1).astype(signal.dtype)


register(OpDef(
    "STFT", Kind.EXPAND, infer=_stft_infer, eval=_stft_eval, expand=_stft_expand, refuse=_stft_refuse,
    static_inputs=(1, 3), attrs={"onesided": 1},
))  # fmt: skip


# -- window functions: a0 - a1 cos(2 pi n / N) + a2 cos(4 pi n / N)


def _window_infer(n: Inference) -> list[TensorType]:
    size = _static(n.inputs[0])
    return [TensorType(element_type(n.attr("output_datatype")), (n.fresh("size") if size is None else size,))]


def _window_expand(coefficients: tuple[float, float, float]) -> Any:
    def expand(b: Builder, node: Node) -> list[Value]:
        size = _static(required(node, 0))
        assert size is not None
        span = size if node.attrs["periodic"] else size - 1
        place = b.op("Cast", counted(b, size), to=f32)
        length = b.op("Cast", b.op("Reshape", b.shape([span]), b.shape([])), to=f32)
        angle = b.op("Div", b.op("Mul", place, b.constant(np.float32(2 * np.pi))), length)
        a0, a1, a2 = (b.constant(np.float32(v)) for v in coefficients)
        out = b.op("Sub", a0, b.op("Mul", a1, b.op("Cos", angle)))
        if coefficients[2]:
            out = b.op("Add", out, b.op("Mul", a2, b.op("Cos", b.op("Add", angle, angle))))
        return [as_type(b, out, node.output.tensor.dtype)]

    return expand


def _window_eval(coefficients: tuple[float, float, float]) -> Any:
    def evaluate(size: Array, *, output_datatype: int, periodic: int) -> Array:
        count = int(size.reshape(-1)[0])
        with np.errstate(all="ignore"):
            angle = 2 * np.pi * np.arange(count) / (count if periodic else count - 1)
        a0, a1, a2 = coefficients
        return np.asarray(a0 - a1 * np.cos(angle) + a2 * np.cos(2 * angle)).astype(
            element_type(output_datatype).numpy
        )

    return evaluate


for _name, _coefficients in (
    ("HannWindow", (0.5, 0.5, 0.0)),
    ("HammingWindow", (25 / 46, 21 / 46, 0.0)),
    ("BlackmanWindow", (0.42, 0.5, 0.08)),
):
    register(
        OpDef(
            _name,
            Kind.EXPAND,
            infer=_window_infer,
            eval=_window_eval(_coefficients),
            expand=_window_expand(_coefficients),
            refuse=default_refuse,
            static_inputs=(0,),
            attrs={"output_datatype": 1, "periodic": 1},
        )
    )


# -- MelWeightMatrix: made of scalars, so it is folded in every real model


def _mel_infer(n: Inference) -> list[TensorType]:
    bins, length = _static(n.inputs[0]), _static(n.inputs[1])
    rows = n.fresh("d") if length is None else length // 2 + 1
    return [
        TensorType(element_type(n.attr("output_datatype")), (rows, n.fresh("d") if bins is None else bins))
    ]


def _mel_eval(num_mel_bins: Array, dft_length: Array, sample_rate: Array, lower: Array, upper: Array, *,
              output_datatype: int) -> Array:  # fmt: skip
    bins, length, rate = (int(v.reshape(-1)[0]) for v in (num_mel_bins, dft_length, sample_rate))
    low, high = (2595 * np.log10(1 + float(v.reshape(-1)[0]) / 700) for v in (lower, upper))
    mel = low + np.arange(bins + 2) * (high - low) / (bins + 2)
    hertz = 700 * (10 ** (mel / 2595) - 1)
    edges = ((length + 1) * hertz // rate).astype(np.int64)
    rows = np.arange(length // 2 + 1)[:, None]
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    with np.errstate(all="ignore"):
        rising = np.where((rows >= left) & (rows <= centre), (rows - left) / (centre - left), 0)
        falling = np.where((rows >= centre) & (rows < right), (right - rows) / (right - centre), 0)
    out = np.where(
        (rows >= centre) & (rows < right), falling, np.where(left == centre, rows == centre, rising)
    )
    return out.astype(element_type(output_datatype).numpy)


register(OpDef(
    "MelWeightMatrix", Kind.HOST, infer=_mel_infer, eval=_mel_eval, attrs={"output_datatype": 1},
))  # fmt: skip
