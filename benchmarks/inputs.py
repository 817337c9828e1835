"""Realistic, seeded inputs for any ONNX model, in several shapes where the model has dynamic dimensions.

Contents follow from the name, dtype and shape of an input: token ids within the embedding's rows, attention
masks with a padded tail, smooth images with text-like strokes, speech-like waveforms, lengths that fit.
`KNOWN` holds only what those rules cannot see. Noise would do for speed, but it drives many trained models to
a constant output that hides wrong kernels.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

Shape = tuple[int, ...]
SAMPLE_RATE = 16_000
_FORWARDING = ("Cast", "Identity", "Unsqueeze", "Squeeze", "Reshape", "Transpose", "Gather", "Slice")


@dataclass(frozen=True)
class Input:
    """One graph input: dims hold sizes or symbol names; vocabulary is the height of its table."""

    name: str
    dtype: np.dtype[Any]
    dims: tuple[int | str, ...]
    vocabulary: int | None = None


@dataclass(frozen=True)
class Known:
    """What the rules cannot know about one model.

    shapes:   complete shape assignments, input name to shape; the nominal one first.
    content:  kind of content by input name, one of CONTENT.
    declared: dimensions to write into the model, where the file's own are only an example.
    """

    shapes: tuple[Mapping[str, Shape], ...] = ()
    content: Mapping[str, str] = field(default_factory=dict)
    declared: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One set of inputs; label spells its shapes."""

    label: str
    feeds: dict[str, np.ndarray]


def _single(name: str, *shapes: Shape) -> tuple[Mapping[str, Shape], ...]:
    return tuple({name: shape} for shape in shapes)


def _silero(*sizes: tuple[int, int]) -> tuple[Mapping[str, Shape], ...]:
    return tuple({"input": (b, n), "state": (2, b, 128), "sr": ()} for b, n in sizes)


def _tokens(*names: str) -> tuple[Mapping[str, Shape], ...]:
    return tuple(dict.fromkeys(names, shape) for shape in ((2, 128), (1, 17), (3, 64)))


def _cached(layers: int, heads: int, depth: int, *sizes: tuple[int, int]) -> tuple[Mapping[str, Shape], ...]:
    past = [f"past.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
    return tuple(
        {"input_ids": (1, n), "position_ids": (1, n), "attention_mask": (1, p + n)}
        | dict.fromkeys(past, (1, heads, p, depth))
        for n, p in sizes
    )


KNOWN: dict[str, Known] = {
    # Feature pyramids: height and width are multiples of 32.
    "ch_PP-OCRv4_det_infer": Known(_single("x", (1, 3, 640, 640), (2, 3, 160, 224), (1, 3, 224, 128))),
    # The text line is 48 pixels high.
    "ch_PP-OCRv4_rec_infer": Known(_single("x", (1, 3, 48, 320), (3, 3, 48, 96), (2, 3, 48, 200))),
    "ch_ppocr_mobile_v2.0_cls_infer": Known(_single("x", (1, 3, 48, 192), (4, 3, 48, 96), (2, 3, 64, 160))),
    # Written for OpenCV, which ignores the declared 10x3x32x32.
    "centerface": Known(
        _single("input.1", (1, 3, 480, 640), (2, 3, 96, 64), (1, 3, 224, 160)),
        {"input.1": "pixels"},
        {"input.1": ("batch", 3, "height", "width")},
    ),
    "slider": Known(content={"images": "unit"}),
    "common_det": Known(content={"images": "pixels"}),
    "common": Known(_single("input1", (1, 1, 64, 160), (1, 1, 64, 96), (1, 1, 64, 203))),
    "common_old": Known(_single("input1", (1, 1, 64, 160), (1, 1, 64, 96), (1, 1, 64, 203))),
    # 512 new samples after 64 of context at 16 kHz.
    "silero_vad": Known(_silero((1, 576), (3, 576), (8, 576))),
    "silero_vad_16k_op15": Known(_silero((1, 576), (3, 576), (8, 576))),
    "silero_vad_op18_ifless": Known(_silero((1, 576), (3, 576), (8, 576))),
    "silero_vad_16k_sequence": Known(content={"input": "waveform"}),
    "silero_vad_v6": Known(content={"input": "waveform"}),
    # Byte values, 256 is padding.
    "magika": Known(content={"bytes": "bytes"}),
    "nsnet2-20ms-baseline": Known(content={"input": "spectrum"}),
    "nsnet2-20ms-48k-baseline": Known(content={"input": "spectrum"}),
    "nmp": Known(content={"serving_default_input_2:0": "waveform"}),
    # The embedding looks at 76 frames of 10 ms, so shorter sounds are refused.
    "speech-embedding": Known(_single("samples:0", (1, 16_000), (3, 13_000), (2, 23_456))),
    "melspectrogram": Known(content={"input": "pcm"}),
    "embedding_model": Known(content={"input_1": "spectrum"}),
    "deepcut": Known(_single("input_1", (33, 21), (5, 21), (128, 21))),
    "bert_base": Known(_tokens("input_ids", "attention_mask", "token_type_ids")),
    "gpt2_kv": Known(_cached(2, 12, 64, (4, 16), (1, 31), (7, 2))),
    "whisper_tiny_encoder": Known(content={"input_features": "spectrum"}),
    "ssdlite320_nms": Known(content={"image": "unit"}),
}


# ---------------------------------------------------------------- signature


def declare(name: str, model: onnx.ModelProto) -> bool:
    """Write the known true dimensions into the model's inputs, in place; whether anything changed."""
    declared = KNOWN.get(name, Known()).declared
    for value in model.graph.input:
        for dim, true in zip(value.type.tensor_type.shape.dim, declared.get(value.name, ())):
            if isinstance(true, str):
                dim.dim_param = true
            else:
                dim.dim_value = true
    if declared:
        for value in model.graph.output:
            value.type.tensor_type.ClearField("shape")
        del model.graph.value_info[:]
    return bool(declared)


def signature(model: onnx.ModelProto) -> tuple[Input, ...]:
    """The inputs that a caller must give; an anonymous or negative dimension is named `<input>:<axis>`."""
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    inputs = []
    for value in model.graph.input:
        if value.name in weights:
            continue
        tensor = value.type.tensor_type
        dims: list[int | str] = []
        for axis, dim in enumerate(tensor.shape.dim):
            symbol = dim.dim_param if dim.dim_param not in ("", "?") else f"{value.name}:{axis}"
            dims.append(dim.dim_value if dim.dim_value > 0 else symbol)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        inputs.append(Input(value.name, dtype, tuple(dims), _vocabulary(model, value.name, weights)))
    return tuple(inputs)


def _vocabulary(model: onnx.ModelProto, name: str, weights: Mapping[str, Shape]) -> int | None:
    """Rows of the smallest weight that `name` indexes, directly or through shape-only nodes and casts."""
    reached, rows = {name}, []
    for node in model.graph.node:
        if node.op_type == "Gather" and node.input[1] in reached and len(weights.get(node.input[0], ())) == 2:
            rows.append(weights[node.input[0]][0])
        elif node.op_type in _FORWARDING and node.input[0] in reached:
            reached.update(node.output)
    return min(rows, default=None)


# ---------------------------------------------------------------- shapes


def shape_assignments(name: str, inputs: tuple[Input, ...]) -> list[dict[str, Shape]]:
    """Three or more complete shape assignments of a model with dynamic dimensions, one of a static model."""
    known = KNOWN.get(name, Known()).shapes
    symbols = {d: (axis, v) for v in inputs for axis, d in enumerate(v.dims) if isinstance(d, str)}
    count = len(known) or (3 if symbols else 1)
    assignments = []
    for index in range(count):
        sizes = {s: _size(s, axis, value, index) for s, (axis, value) in symbols.items()}
        shapes = {v.name: tuple(sizes[d] if isinstance(d, str) else d for d in v.dims) for v in inputs}
        if known:
            shapes.update(known[index])
            for value in inputs:        # inputs that the table leaves out follow an input of equal rank
                if value.name not in known[index]:
                    twin = next((s for s in known[index].values() if len(s) == len(value.dims)), None)
                    shapes[value.name] = twin or shapes[value.name]
        assignments.append(shapes)
    return assignments


def _size(symbol: str, axis: int, value: Input, index: int) -> int:
    """Size of one symbolic dimension in assignment `index`, from its name and place."""
    text = symbol.lower()
    if any(word in text for word in ("seq", "time", "frame", "length", "tokens")):
        choices = (32, 7, 57)
    elif "batch" in text or axis == 0:
        choices = (1, 3, 2)
    elif len(value.dims) == 4:
        choices = (128, 64, 96) if axis == 2 else (128, 96, 160)
    elif value.dtype.kind == "f" and len(value.dims) == 2:
        choices = (SAMPLE_RATE, SAMPLE_RATE // 4, 23_456)
    else:
        choices = (32, 7, 57)
    return choices[index % 3]


# ---------------------------------------------------------------- contents


def cases(name: str, model: onnx.ModelProto) -> list[Case]:
    """All input sets of a model; the same for the same name and model on every machine."""
    inputs = signature(model)
    return [_case(name, inputs, shapes, index) for index, shapes in enumerate(shape_assignments(name, inputs))]


def case_at(name: str, model: onnx.ModelProto, sizes: Mapping[str, int]) -> Case:
    """The nominal input set with some symbolic dimensions at given sizes; ValueError where the model has no such dimension."""
    inputs = signature(model)
    missing = set(sizes) - {dim for value in inputs for dim in value.dims if isinstance(dim, str)}
    if missing:
        raise ValueError(f"{name} has no dimension {', '.join(sorted(missing))}")
    nominal = shape_assignments(name, inputs)[0]
    shapes = {v.name: tuple(sizes.get(str(d), n) for d, n in zip(v.dims, nominal[v.name])) for v in inputs}
    return _case(name, inputs, shapes, 0)


def _case(name: str, inputs: Sequence[Input], shapes: Mapping[str, Shape], index: int) -> Case:
    """Arrays of these shapes, from numbers that only the model's name, the input's and the index decide."""
    content = KNOWN.get(name, Known()).content
    feeds = {}
    for value in inputs:
        random = np.random.default_rng(zlib.crc32(f"{name}/{value.name}/{index}".encode()))
        kind = content.get(value.name) or _kind(value)
        feeds[value.name] = _fill(kind, value, shapes, random)
    label = " ".join("x".join(map(str, shape)) or "scalar" for shape in shapes.values())
    return Case(label if len(shapes) < 4 else label[:40] + "...", feeds)


def _kind(value: Input) -> str:
    """Kind of content that the name, dtype and rank of an input suggest."""
    text, rank = value.name.lower(), len(value.dims)
    if value.dtype == np.bool_ or "mask" in text:
        return "mask"
    if value.dtype.kind in "iu":
        if rank == 0:
            return "rate"
        if "position" in text:
            return "positions"
        if "token_type" in text or "segment" in text:
            return "segments"
        return "lengths" if "len" in text else "ids"
    if value.vocabulary:
        return "ids"
    if "wave" in text or "audio" in text or (rank == 2 and isinstance(value.dims[1], str)):
        return "waveform"
    if (rank == 4 and value.dims[1] in (1, 3)) or (rank == 3 and value.dims[0] == 3):
        return "image"
    return "normal"


def _fill(kind: str, value: Input, shapes: Mapping[str, Shape], random: np.random.Generator) -> np.ndarray:
    """An array of one kind."""
    shape = shapes[value.name]
    if kind == "rate":
        return np.array(SAMPLE_RATE, value.dtype)
    if kind == "lengths":
        array = _lengths(shape, shapes)
    elif kind == "positions":
        total = next((s[-1] for n, s in shapes.items() if "mask" in n.lower()), shape[-1])
        array = np.broadcast_to(np.arange(total - shape[-1], total), shape)
    elif kind == "ids":
        array = random.integers(1, value.vocabulary or 100, shape)
    elif kind == "segments":
        array = np.broadcast_to(np.arange(shape[-1]) >= shape[-1] // 2, shape)
    elif kind == "mask":
        array = _mask(shape)
    elif kind == "bytes":
        array = random.integers(32, 127, shape)
        array[..., shape[-1] * 3 // 4 :] = 256
    elif kind in CONTENT:
        array = CONTENT[kind](shape, random)
    else:
        raise ValueError(f"unknown kind of content {kind!r} for input {value.name}")
    return np.ascontiguousarray(array.astype(value.dtype))


def _lengths(shape: Shape, shapes: Mapping[str, Shape]) -> np.ndarray:
    """Valid lengths, full for the first row and shorter below, of the input that has as many rows."""
    longest = next((s[1] for s in shapes.values() if len(s) >= 2 and s[0] == shape[0]), 1)
    return np.array([longest - row * longest // (4 * shape[0]) for row in range(shape[0])])


def _mask(shape: Shape) -> np.ndarray:
    """Ones; every row after the first ends with a quarter of zeros."""
    mask = np.ones(shape)
    mask[1:, ..., shape[-1] - shape[-1] // 4 :] = 0
    return mask


def waveform(shape: Shape, random: np.random.Generator) -> np.ndarray:
    """Voiced-like sound in [-1, 1] along the longest axis: harmonics of a gliding pitch, syllables, noise."""
    axis = int(np.argmax(shape))
    length, rows = shape[axis], int(np.prod(shape)) // shape[axis]
    seconds = np.arange(length) / SAMPLE_RATE
    pitch = random.uniform(90, 250, (rows, 1)) * (1 + 0.1 * np.sin(2 * np.pi * 2.0 * seconds))
    phase = 2 * np.pi * np.cumsum(pitch, axis=1) / SAMPLE_RATE
    sound = sum(np.sin(k * phase + k) / k for k in range(1, 9))
    syllables = np.clip(np.sin(2 * np.pi * 3.0 * seconds + random.uniform(0, 6, (rows, 1))), 0.05, 1)
    sound = 0.3 * sound * syllables + 0.01 * random.standard_normal((rows, length))
    rest = [size for each, size in enumerate(shape) if each != axis]
    return np.moveaxis(np.clip(sound, -1, 1).reshape(*rest, length), -1, axis)


def unit_image(shape: Shape, random: np.random.Generator) -> np.ndarray:
    """Images in [0, 1] over the last two axes: shading, filled boxes, lines of glyph-like strokes, noise.

    Planes of one image (the axis before the last two, where it is 1 or 3) share the boxes and strokes.
    """
    height, width = shape[-2:]
    planes = int(np.prod(shape[:-2]))
    rows, columns = _interpolation(height, 5), _interpolation(width, 5)
    image = rows @ random.uniform(0.5, 0.95, (planes, 5, 5)) @ columns.T
    for _ in range(3):
        top, left = random.integers(0, height - height // 3), random.integers(0, width - width // 3)
        box = image[:, top : top + max(1, height // 4), left : left + max(1, width // 4)]
        box[...] = random.uniform(0.3, 0.9, (planes, 1, 1))
    line = max(4, min(24, height // 3))
    for top in range(line // 2, height - line, 2 * line):
        strokes = random.random((line // 2, width // 2)) < 0.45
        strokes[:, :: max(3, line // 3)] = False
        strokes = np.kron(strokes, np.ones((2, 2), bool))
        image[:, top : top + strokes.shape[0], : strokes.shape[1]][:, strokes] *= 0.2
    image += 0.01 * random.standard_normal(image.shape)
    return np.clip(image, 0, 1).reshape(shape)


def _interpolation(size: int, knots: int) -> np.ndarray:
    """Linear interpolation matrix [size, knots]."""
    position = np.linspace(0, knots - 1, size)[:, None]
    weights: np.ndarray = np.clip(1 - np.abs(position - np.arange(knots)), 0, None)
    return weights


def spectrum(shape: Shape, random: np.random.Generator) -> np.ndarray:
    """Log-spectrum-like planes in about [-2, 2]: smooth in time and frequency."""
    planes = shape if shape[-1] > 1 else shape[:-1]
    return (unit_image(planes, random) * 4 - 2).reshape(shape)


CONTENT = {
    "normal": lambda shape, random: 0.5 * random.standard_normal(shape),
    "waveform": waveform,
    "pcm": lambda shape, random: np.round(waveform(shape, random) * 32767),
    "unit": unit_image,
    "pixels": lambda shape, random: np.round(unit_image(shape, random) * 255),
    "image": lambda shape, random: (unit_image(shape, random) - 0.5) / 0.25,
    "spectrum": spectrum,
}
