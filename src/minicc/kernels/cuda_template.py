"""The templates that have a CUDA form: their launches, and how their kernel files are made.

Words are those of `template.TEMPLATES` on every target. The text is kernels/cuda/NAME.py, whose function is
`kernel(args)`; constants that only CPUs need are not in it. A new form is a file there and a row in the table here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableSequence
from dataclasses import dataclass

from minicc.kernels import cuda_attention, cuda_tiles, cuda_winograd
from minicc.kernels import cuda_launch as launches
from minicc.kernels.cuda_launch import Launch
from minicc.kernels.domain import Words
from minicc.kernels.template import TEMPLATES, fill
from minicc.targets.cuda import CudaTarget

Constants = Mapping[str, int | float | str]


@dataclass(frozen=True, slots=True)
class CudaTemplate:
    """One CUDA form.

    launch:    fills the blocking words (by name) and returns the launch; raises ShapeError for sizes that do not fit.
    constants: names that `render` must be given, where they are not those of the CPU's form.
    threads:   the most threads of a block; None where `expand` gives THREADS.
    expand:    constants of the text that follow from those of the kernel; raises LookupError for wrong ones.
    file:      name of the kernel file for these constants, where it is not the template's.
    """

    launch: Callable[[Words, Constants, CudaTarget], Launch]
    constants: tuple[str, ...] | None = None
    threads: int | None = launches.ELEMENT_THREADS
    expand: Callable[[Constants], dict[str, object]] = dict
    file: Callable[[Constants], str] | None = None


CUDA_TEMPLATES: dict[str, CudaTemplate] = {
    "gemm": CudaTemplate(
        cuda_tiles.launch_gemm, cuda_tiles.TILE_CONSTANTS, None, cuda_tiles.product_constants, cuda_tiles.product_file
    ),
    "conv": CudaTemplate(
        cuda_tiles.launch_conv, cuda_tiles.CONV_CONSTANTS, None, cuda_tiles.conv_constants, cuda_tiles.conv_file
    ),
    "attention": CudaTemplate(
        cuda_attention.launch_attention, cuda_attention.CONSTANTS, None, cuda_attention.attention_constants,
        cuda_attention.attention_file,
    ),
    "winograd_input": CudaTemplate(cuda_winograd.launch_winograd_input, expand=cuda_winograd.winograd_constants),
    "winograd_output": CudaTemplate(cuda_winograd.launch_winograd_output, expand=cuda_winograd.winograd_constants),
    "conv_transpose": CudaTemplate(launches.launch_conv_transpose),
    "depthwise": CudaTemplate(launches.launch_windows),
    "pool": CudaTemplate(launches.launch_windows),
    "scan": CudaTemplate(launches.launch_scan),
    "scatter": CudaTemplate(launches.launch_scatter),
    "topk": CudaTemplate(launches.launch_topk),
    "suppress": CudaTemplate(launches.launch_suppress, threads=launches.REDUCTION_THREADS),
    "trees": CudaTemplate(launches.launch_trees),
    "recurrent": CudaTemplate(launches.launch_recurrent, threads=launches.RECURRENT_THREADS),
}


def constants_of(name: str) -> tuple[str, ...]:
    """Names of the constants of a template's CUDA form; KeyError when there is none."""
    own = CUDA_TEMPLATES[name].constants
    return TEMPLATES[name].constants if own is None else own


def bind(name: str, constants: Constants, words: MutableSequence[int], target: CudaTarget) -> Launch:
    """Fill a call's blocking words in place, its sizes being known; returns its launch."""
    layout = TEMPLATES[name].words
    named = dict(zip(layout, words))
    launch = CUDA_TEMPLATES[name].launch(named, constants, target)
    words[: len(layout)] = [named[word] for word in layout]
    return launch


def render(name: str, constants: Constants, epilogue: str, words: int) -> str:
    """The text of a kernel: the CUDA form with its constants, word numbers and epilogue put in.

    epilogue: module text that ends in `def epilogue(args, b0, b1, i, j, acc)`, or "" for the file's own.
    words: of the whole call, without that of a workspace. KeyError when a constant is missing or unknown.
    """
    layout, template = TEMPLATES[name].words, CUDA_TEMPLATES[name]
    if set(constants) != set(constants_of(name)):
        raise KeyError(f"template {name} has the constants {sorted(constants_of(name))}, not {sorted(constants)}")
    values: dict[str, object] = {**{word: at for at, word in enumerate(layout)}, "EPILOGUE": len(layout), "WORDS": words}
    if template.threads is not None:
        values["THREADS"] = template.threads
    values |= template.expand(constants)
    if values.get("STREAM"):
        values |= {"WORKSPACE": words, "WORDS": words + 1}
    return fill("cuda", name if template.file is None else template.file(constants), values, epilogue)
