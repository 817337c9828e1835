"""The templates: hand-written compute-bound kernels, their word layouts, how kernel files are made of them.

A template is a module of kernels/cpu whose text is a complete kernel. A kernel file is that text with its
constants, word numbers and `epilogue` function replaced, so this module reads template files and never
imports them (they need Numba). All templates work in the index space (b0, b1, i, j): two batch axes, row,
column; `epilogue(args, b0, b1, i, j, acc)` gets every element of the result once and stores it.

Words are int64, in the order of `Template.words`; addresses are bytes, strides count elements, and batch
strides of 0 share an operand. Words marked `bind` below are written by `bind` when the others are known; give
0. The epilogue's words follow (`epilogue_base`).

gemm      C[b0, b1, i, j] = sum_k A[b0, b1, i, k] * B[b0, b1, k, j]
  A B             addresses; B is packed by `packing.pack_b` or the template "pack"
  M N K           extents
  A_ROW           row stride of A (its k axis is contiguous)
  A_B0 A_B1       batch strides of A
  B_B0 B_B1       batch strides of packed B: a whole one is ceil(N / NR) * K * NR
  B0 B1           batch extents
  ROW_TILES PANELS  (bind) row tiles and panels per unit

gemm_bits C[b0, b1, i, j] = sum_k A[b0, b1, i, k] * (q[k, j] - Z[k / SIZE, j]) * S[k / SIZE, j]; words that gemm has as there.
          Constants: BITS of the numbers q, 2, 4 or 8; CENTRED: 1 when every Z is 2^(BITS - 1), which is then not read
  W S Z           addresses; words, scales and zero points packed by `packing.pack_b`, see kernels/cpu/gemm_bits.py
  SIZE            numbers of a block along K, a multiple of 32 / BITS unless there is one block
  HEIGHT PANELS   (bind) rows and panels per unit

round_rows  rows rounded to 8 bits by blocks (no epilogue). BITS (constant): of the weights they will meet
  A TARGET        addresses; TARGET int32 [B0][B1][M][ceil(K / SIZE)][SIZE / 4]
  SCALES SUMS     of each block: what a rounded number stands for, and their sum, float32 [B0][B1][M][ceil(K / SIZE)]
  M K A_ROW A_B0 A_B1 B0 B1 SIZE  as gemm_bits

gemm_rounded  as gemm_bits, of rows rounded by round_rows. Constants: BITS, 2 or 4; CENTRED; VNNI: 1 where the target has it
  X X_SCALES X_SUMS  addresses of what round_rows made
  W S Z           as gemm_bits, W with words up to whole blocks of K
  M N K B0 B1 SIZE HEIGHT PANELS  as gemm_bits

conv      convolution, channels last, 1 to 3 spatial axes: b0 = image, b1 = group, i = output pixel (row-major
          over the output's spatial axes), j = output channel within the group
  X W             addresses; W is packed by `packing.pack_conv`
  IMAGES GROUPS   extents of b0, b1
  M N C           output pixels per image; output and input channels per group
  X_IMAGE         stride of images
  X_D X_H X_W     strides of the spatial axes (channels are contiguous); unused leading axes 0
  ID IH IW OD OH OW  input and output extents; of unused leading axes 1
  KD KH KW SD SH SW DD DH DW  kernel extents, strides, dilations; of unused axes 1
  PD PH PW        pads before the first element (those behind follow from the output extents)
  MERGED ROW_TILES PANELS  (bind)

winograd  convolution with TAPS, 3 or 5, along two spatial axes or one of them, one group, no dilation, C >= VW; indices
          as conv (b1 = 0). Constants: OUT_H, OUT_W, the outputs of a tile, 2 or with 3 taps 4 along an axis with
          taps, 1 along one without; STRIDE of both axes, 1, or 2 with 3x3 taps and 2x2 outputs. W is packed by
          `packing.pack_winograd`
  X W IMAGES N C X_IMAGE X_H X_W IH IW OH OW PH PW   as conv
  TILES PANELS    (bind) tiles and panels per unit

winograd_input  the inputs of a 3x3 convolution at stride 1 of one group in Winograd's form, V [position][tile][C]; tiles run
          through the lines of all images (only on CUDA, no epilogue; kernels/cuda_winograd.py). Constants: ELEMENT; OUT, the
          outputs of a tile along an axis; LANES, channels of a thread
  X V IMAGES C X_IMAGE X_H X_W IH IW OH OW PH PW   as conv

winograd_output  its outputs from the products P [position][tile][N] of that form; indices as conv (only on CUDA)
  P IMAGES N OH OW  as conv

conv_fft  convolution at stride 1 of one group over one or two spatial axes, dilated or not; indices and words as winograd.
          Constants: SIDE_H, SIDE_W, the inputs of a tile, even, 1 along an axis without taps; OUT_H, OUT_W, its outputs:
          SIDE less (taps - 1) * dilation; FEW: 1 when C < VW, else 0. NR is VW. W is packed by `packing.pack_fft`

conv_integer  exact convolution of 8-bit integers with int32 sums in acc; indices and words as conv up to PW. W is packed by
          `packing.pack_conv_integer`. A matrix product [M, K] by [K, N] has IW = OW = M rows at distance X_W,
          C = K channels, and all kernel extents 1. Constants: POINTER, ptr_u8 or ptr_i8, the type of X; NUMBERS of a word: 2
          int16 less their zero points, or 4 bytes, for targets that multiply them; of bytes OFFSET, 128 when X is signed,
          and SUMMED, 1 when weights have zero points; MERGED, 1 when the KW pixels of a line, which lie behind each other,
          are one tap (weights by `packing.merge_taps`)
  X_ZERO          address of the zero point of X, or 0
  TOTALS          address of what `packing.integer_totals` made of weights that are bytes, or 0
  ROW_TILES PANELS  (bind)

conv_transpose  transposed convolution, channels last; indices and words as conv up to PW, where P* are ONNX's
          pads before the first element and S*, D* its strides and dilations; W is packed by
          `packing.pack_conv_transpose`; then
  ROW_TILES PANELS  (bind)

depthwise convolution with one input and one output channel per group, channels last: b0 = image, i = pixel,
          j = channel (b1 = 0). Words as conv up to PW with GROUPS = C = 1 and N = channels; W is packed by
          `packing.pack_narrow` (NR: panel_columns(target, channels)); then
  ROW_TILES PANELS  (bind)

conv_line convolution of narrow groups, as many output as input channels in each, channels last, at most two spatial axes;
          indices as depthwise. Constants: GROUP, the channels of a group, a divisor of VW; LINE_TAPS, STEP and APART,
          taps, stride and dilation along the line. Words as depthwise up to PW, W packed by
          `packing.pack_narrow`; then
  LINES PANELS    (bind)

conv_expand depthwise convolution of the activation of a 1x1 convolution, channels last, two spatial axes; indices and
          words as conv_line with C = input channels of the 1x1 convolution and X its input, of the extents I*. Constants:
          LINE_TAPS, STEP and APART as there; ACTIVATION, LOW, HIGH (see the kernel); then
  E BIAS          the 1x1 convolution's weights packed by `packing.pack_b`, its bias filled up to whole panels
  LINES BAND_LINES  (bind)

conv_few  convolution of few input channels in one group, at most two spatial axes, not dilated along the line; indices as
          depthwise. Constants: CHANNELS; LINE_TAPS and STEP, taps and stride along the line; PLANES: 1 when a line of a
          channel is contiguous (X_W = 1), 0 when the pixels of a line are (channels last, X_W = CHANNELS). Words as
          depthwise up to PW, W packed by `packing.pack_conv`; then
  X_C             stride between planes
  LINES PANELS    (bind)

pool      max or average pooling, channels last; indices as depthwise. AVERAGE (constant): 0 max, 1 average
  W               address of N floats that stand for padding: -inf for max, 0 for average
  the other words as depthwise, then
  E_D E_H E_W     pads after the last element, COUNT_PAD: 1 to count padding in the average (both else 0)
  ROW_TILES PANELS  (bind)

pack      a right operand in any strides -> panels [b0][b1][ceil(N / NR)][TAPS][C][NR] (no epilogue)
  SOURCE TARGET   addresses
  N C TAPS        extents; a matrix has C = K, TAPS = 1
  S_N S_C S_TAP   source strides
  S_B0 S_B1 T_B0 T_B1   batch strides of source and target
  B0 B1           batch extents
  TAIL            zeros written behind each batch's panels (a matrix: 0)

recurrent the sequential part of LSTM, GRU and RNN (no epilogue). Constants CELL and COUNT: lstm 4, gru 3,
          rnn 1; ACT_F ACT_G ACT_H: sigmoid tanh relu affine leaky_relu thresholded_relu scaled_tanh
          hard_sigmoid elu softsign softplus, with ALPHA_x and BETA_x; CLIP (0.0 for none), INPUT_FORGET,
          LINEAR_BEFORE_RESET
  GATES           x * W + biases [D][T][B][COUNT * H], made by gemm; strides G_D G_T G_B
  R R2            R^T, R_D and R2_D floats per direction. On CPUs packed by pack_gates: R the gates of the only or first
                  product of a step; of a GRU without LINEAR_BEFORE_RESET R z and r, R2 the hidden gate. On CUDA packed by
                  pack_b: R [H, COUNT * H]; of any GRU R [H, 2 * H] (z, r) and R2 [H, H]
  RB              [D][H]: with LINEAR_BEFORE_RESET the recurrent bias of the hidden gate (else in GATES), or 0
  P               peepholes [D][3 * H], or 0
  H0 C0           initial states, strides S_D S_B, or 0
  LENGTHS         int32 [B], or 0
  Y Y_H Y_C       results, or 0 each; strides of Y: Y_D Y_T Y_B, of the others S_D S_B
  SCRATCH         float32 memory of at least D * 2 * (B + 8) * 5 * H elements
  T B H DIRECTIONS  extents; REVERSE: 1 when the only direction runs backwards (a second one always does)
  ROWS STAGE      (bind)

attention softmax over t of (SCALE * Q K^T + MASK), times V (no epilogue). GROUP neighbouring heads of queries share
          one of the GROUPS heads of keys
  Q K V MASK Y    addresses; MASK may be 0
  B GROUPS GROUP S T D DV  extents: Q [B, GROUPS * GROUP, S, D], K [B, GROUPS, T, D], V [.., T, DV]
  SCALE           the bits of a float32; CAUSAL: 1 when query i attends key t only if t <= i + T - S
  Q_B Q_H Q_ROW Q_D  strides of Q; of K, V and Y the same but for the last axis, which is contiguous
  M_B M_H M_ROW M_KEY  strides of MASK (0 where it is broadcast)
  PANELS KEYS     (bind) panels of queries per unit, keys per block
  PARTIALS        on CUDA float32 memory of `cuda_attention.partial_size` elements where blocks may share out the keys

scatter   target[index(s), lane] = combine(itself, updates[s, lane]) for s in order, in place (no epilogue)
  TARGET INDICES UPDATES   addresses
  COUNT I_STEP U_STEP      the sequence s: its length, its strides in indices and updates
  RUN F_RUN       lanes side by side in all arrays; how many the target has
  BLOCK           (bind) lanes per unit
  AXES            further axes of lanes, up to 8: E_a extents, T_a I_a U_a strides in target, indices,
                  updates, F_a extents in the target
  DEPTH           numbers that make an index, up to 8 (1 without SHARED): N_d extents they count, M_d strides
  LENGTH          elements of updates, to be compared with the above

scan      running sums or products over [outer, axis, inner] (no epilogue)
  X Y             addresses
  OUTER COUNT INNER  extents
  START STEP      offset of the first position, and from one to the next

topk      the first K of every row of [outer, N, inner], in order (no epilogue)
  X VALUES POSITIONS  addresses; results are [outer, K, inner]
  OUTER N K INNER extents

suppress  non-maximum suppression per batch and class (no epilogue). Constant CENTER: boxes are centre and size
  BOXES SCORES    addresses of float32 [BATCHES, N, 4] and [BATCHES, CLASSES, N]
  LIMIT OVERLAP LEAST  addresses of scalars (int64, float32, float32), or 0
  CHOSEN COUNTS   results: positions [BATCHES, CLASSES, MOST] and how many there are [BATCHES, CLASSES]
  KEYS KEPT       int64 memory [BATCHES, CLASSES, N], float32 memory [BATCHES, CLASSES, 4, MOST]
  BATCHES CLASSES N MOST  extents

trees     the leaf that each row reaches in each tree (no epilogue). Constants NANS, EQUALS: some node tells them apart
  X               address of features [ROWS, WIDTH], of which the nodes ask for the first NEEDED
  NODES ROOTS NUMBERS  addresses of int32 [nodes, 4] (feature, split, below, above), [TREES], and by node the leaf's number
  Y               address of int32 [ROWS, TREES]
  ROWS TREES WIDTH NEEDED  extents; DEPTH: steps from a root to a leaf at most
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, MutableSequence, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from minicc.kernels import domain, recurrent, sequential
from minicc.targets.cpu import CpuTarget

# Lines around a generated epilogue in the text of a kernel.
EPILOGUE_BEGIN, EPILOGUE_END = "# -- generated epilogue", "# -- end of the epilogue"

_FOLDER = Path(__file__).parent

Domain = Callable[[domain.Words, Mapping[str, int], CpuTarget, int], int]
# Of a bound call: (first unit, units, ns on one thread) of each stage, none where all units may run together.
Stages = Callable[[domain.Words, Mapping[str, int]], Sequence[tuple[int, int, float]]]


class Template(NamedTuple):
    """One template.

    words:     names of its words, in order.
    constants: names that `render` must be given; NR brings MR, VW and TILE with it.
    domain:    fills the blocking words (by name) and returns the number of units; None where CPUs have no such template.
    fused:     whether it ends in an epilogue.
    stages:    the ranges of units that must run one after the other, in order, where there are such.
    """

    name: str
    words: tuple[str, ...]
    constants: tuple[str, ...]
    domain: Domain | None
    fused: bool = True
    stages: Stages | None = None


def _template(
    name: str, words: str, constants: str, domain: Domain | None, fused: bool = True, stages: Stages | None = None
) -> Template:
    return Template(name, tuple(words.split()), tuple(constants.split()), domain, fused, stages)


# The first words of templates whose windows slide over channels-last memory (kernels/cpu/windows.py).
_WINDOWS = (
    "X W IMAGES GROUPS M N C X_IMAGE X_D X_H X_W ID IH IW OD OH OW KD KH KW SD SH SW DD DH DW PD PH PW"
)

TEMPLATES: dict[str, Template] = {
    t.name: t
    for t in (
        _template(
            "gemm",
            "A B M N K A_ROW A_B0 A_B1 B_ROW B_B0 B_B1 B0 B1 ROW_TILES PANELS",
            "NR",
            domain.gemm_domain,
        ),
        _template(
            "gemm_bits",
            "A W S Z M N K A_ROW A_B0 A_B1 B0 B1 SIZE HEIGHT PANELS",
            "NR BITS CENTRED",
            domain.bits_domain,
        ),
        _template(
            "round_rows",
            "A TARGET SCALES SUMS M K A_ROW A_B0 A_B1 B0 B1 SIZE",
            "BITS",
            domain.round_domain,
            fused=False,
        ),
        _template(
            "gemm_rounded",
            "X X_SCALES X_SUMS W S Z M N K B0 B1 SIZE HEIGHT PANELS",
            "NR BITS CENTRED VNNI",
            domain.bits_domain,
        ),
        _template(
            "conv",
            f"{_WINDOWS} MERGED ROW_TILES PANELS",
            "NR",
            domain.conv_domain,
        ),
        _template(
            "winograd",
            "X W IMAGES N C X_IMAGE X_H X_W IH IW OH OW PH PW TILES PANELS",
            "NR OUT_H OUT_W STRIDE TAPS",
            domain.winograd_domain,
        ),
        _template("winograd_input", "X V IMAGES C X_IMAGE X_H X_W IH IW OH OW PH PW", "ELEMENT OUT LANES", None, fused=False),
        _template("winograd_output", "P IMAGES N OH OW", "OUT", None),
        _template(
            "conv_fft",
            "X W IMAGES N C X_IMAGE X_H X_W IH IW OH OW PH PW TILES PANELS",
            "NR SIDE_H SIDE_W OUT_H OUT_W FEW",
            domain.fft_domain,
        ),
        _template(
            "conv_integer",
            f"{_WINDOWS} X_ZERO TOTALS ROW_TILES PANELS",
            "NR POINTER NUMBERS OFFSET SUMMED MERGED",
            domain.conv_integer_domain,
        ),
        _template(
            "conv_transpose",
            f"{_WINDOWS} ROW_TILES PANELS",
            "NR",
            domain.conv_transpose_domain,
        ),
        _template(
            "depthwise",
            f"{_WINDOWS} ROW_TILES PANELS",
            "NR",
            domain.window_domain,
        ),
        _template(
            "conv_line",
            f"{_WINDOWS} LINES PANELS",
            "NR LINE_TAPS STEP APART GROUP",
            domain.line_domain,
        ),
        _template(
            "conv_expand",
            f"{_WINDOWS} E BIAS LINES BAND_LINES",
            "NR LINE_TAPS STEP APART ACTIVATION LOW HIGH",
            domain.expand_domain,
        ),
        _template(
            "conv_few",
            f"{_WINDOWS} X_C LINES PANELS",
            "NR LINE_TAPS STEP CHANNELS PLANES",
            domain.line_domain,
        ),
        _template(
            "pool",
            f"{_WINDOWS} E_D E_H E_W COUNT_PAD ROW_TILES PANELS",
            "NR AVERAGE",
            domain.window_domain,
        ),
        _template(
            "pack",
            "SOURCE TARGET N C TAPS S_N S_C S_TAP S_B0 S_B1 T_B0 T_B1 B0 B1 TAIL",
            "NR",
            domain.pack_domain,
            fused=False,
        ),
        _template(
            "recurrent",
            "GATES R R2 RB P H0 C0 LENGTHS Y Y_H Y_C SCRATCH T B H DIRECTIONS REVERSE G_D G_T G_B R_D R2_D"
            " Y_D Y_T Y_B S_D S_B ROWS STAGE",
            "NR CELL COUNT ACT_F ACT_G ACT_H ALPHA_F BETA_F ALPHA_G BETA_G ALPHA_H BETA_H CLIP INPUT_FORGET"
            " LINEAR_BEFORE_RESET",
            recurrent.recurrent_domain,
            fused=False,
            stages=recurrent.recurrent_stages,
        ),
        _template(
            "attention",
            "Q K V MASK Y B GROUPS GROUP S T D DV SCALE CAUSAL Q_B Q_H Q_ROW Q_D K_B K_H K_ROW V_B V_H V_ROW"
            " M_B M_H M_ROW M_KEY Y_B Y_H Y_ROW PANELS KEYS PARTIALS",
            "NR",
            domain.attention_domain,
            fused=False,
        ),
        _template(
            "scatter",
            "TARGET INDICES UPDATES COUNT I_STEP U_STEP RUN BLOCK AXES DEPTH F_RUN LENGTH"
            + "".join(f" {letter}_{number}" for letter in "ETIUFNM" for number in range(8)),
            "POINTER LOAD LOAD_OLD STORE INDEX SHARED COMBINE",
            sequential.scatter_domain,
            fused=False,
        ),
        _template(
            "scan",
            "X Y OUTER COUNT INNER START STEP",
            "POINTER LOAD STORE TYPE LANES COMBINE INITIAL EXCLUSIVE BLOCK",
            sequential.scan_domain,
            fused=False,
        ),
        _template(
            "topk",
            "X VALUES POSITIONS OUTER N K INNER",
            "POINTER LOAD LOAD_OLD STORE LARGEST",
            sequential.topk_domain,
            fused=False,
        ),
        _template(
            "suppress",
            "BOXES SCORES LIMIT OVERLAP LEAST CHOSEN COUNTS KEYS KEPT BATCHES CLASSES N MOST",
            "CENTER",
            sequential.suppress_domain,
            fused=False,
        ),
        _template(
            "trees",
            "X NODES ROOTS NUMBERS Y ROWS TREES WIDTH NEEDED DEPTH",
            "POINTER LOAD NANS EQUALS",
            sequential.trees_domain,
            fused=False,
        ),
    )
}


def epilogue_base(name: str) -> int:
    """Number of the first word of the epilogue: the count of the template's own words."""
    return len(TEMPLATES[name].words)


def bind(
    name: str,
    constants: Mapping[str, object],
    words: MutableSequence[int],
    target: CpuTarget,
    threads: int,
) -> int:
    """Fill a call's blocking words in place, its sizes being known; returns the number of units. KeyError without a CPU form."""
    template = TEMPLATES[name]
    if template.domain is None:
        raise KeyError(f"template {name} has no form for CPUs")
    named = dict(zip(template.words, words))
    numbers = {key: value for key, value in constants.items() if isinstance(value, int)}
    units = template.domain(named, numbers, target, threads)
    words[: len(template.words)] = [named[word] for word in template.words]
    return units


def stages(name: str, constants: Mapping[str, object], words: Sequence[int]) -> Sequence[tuple[int, int, float]]:
    """The stages of a bound call: (first unit, units, ns on one thread) each; none where all its units may run together."""
    template = TEMPLATES[name]
    if template.stages is None:
        return ()
    numbers = {key: value for key, value in constants.items() if isinstance(value, int)}
    return template.stages(dict(zip(template.words, words)), numbers)


def render(name: str, constants: Mapping[str, object], epilogue: str, target: CpuTarget) -> str:
    """The text of a kernel: the template with its constants, word numbers and epilogue put in.

    epilogue: module text that ends in `def epilogue(args, b0, b1, i, j, acc)`; "" keeps the template's own,
        which stores to a dense result at the address in the first epilogue word.
    KeyError when a constant is missing or unknown.
    """
    template = TEMPLATES[name]
    values: dict[str, object] = dict(zip(template.words, range(len(template.words))))
    values["EPILOGUE"] = len(template.words)
    if "NR" in constants:
        values |= domain.tile_constants(target, int(str(constants["NR"])))
    for constant in template.constants:
        values[constant] = constants[constant]
    unknown = set(constants) - set(template.constants)
    if unknown:
        raise KeyError(f"template {name} has no constants {sorted(unknown)}")
    return fill("cpu", name, values, epilogue)


def fill(folder: str, name: str, values: Mapping[str, object], epilogue: str) -> str:
    """The text of kernels/FOLDER/NAME.py with module-level constants and, unless it is "", the epilogue replaced.

    Values that the text does not name are left out.
    """
    text, places = _parsed(folder, name)
    lines = text.splitlines()
    for key, (first, last) in sorted(places.items(), key=lambda place: -place[1][0]):
        if key == "epilogue" and epilogue:
            lines[first:last] = _decorated(epilogue).splitlines()
        elif key in values:
            comment = lines[first].partition("  #")[2]
            lines[first:last] = [f"{key} = {values[key]}" + (f"  #{comment}" if comment else "")]
    return "\n".join(lines) + "\n"


def _decorated(epilogue: str) -> str:
    text = epilogue.strip("\n").replace("def epilogue(", "@helper\ndef epilogue(", 1)
    return f"{EPILOGUE_BEGIN}\n{text}\n\n{EPILOGUE_END}"


def split_epilogue(source: str) -> tuple[str, str] | None:
    """(the template around a generated epilogue, the epilogue as a module), or None for another kernel.

    Kernels that differ only in their epilogue share the first part, which is much the longer one to compile.
    """
    before, begin, rest = source.partition(EPILOGUE_BEGIN + "\n")
    epilogue, end, after = rest.partition(EPILOGUE_END + "\n")
    if not begin or not end:
        return None
    called = "from minicc.kernels.cpu.intrinsics import external_epilogue as epilogue\n"
    return before + called + after, epilogue.replace("@helper\n", "", 1)


@lru_cache(maxsize=64)
def _parsed(folder: str, name: str) -> tuple[str, dict[str, tuple[int, int]]]:
    """A template's text, and the line ranges of its module-level constants and its epilogue."""
    text = (_FOLDER / folder / f"{name}.py").read_text(encoding="utf-8")
    places = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            places[node.targets[0].id] = (node.lineno - 1, node.end_lineno or node.lineno)
        elif isinstance(node, ast.FunctionDef) and node.name == "epilogue":
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            places["epilogue"] = (first - 1, node.end_lineno or node.lineno)
    return text, places
