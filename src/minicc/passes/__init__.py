"""The optimiser: `default_pipeline` is the list of passes, in order."""

from __future__ import annotations

from minicc.ir.graph import Graph
from minicc.ir.verify import Stage
from minicc.options import Options
from minicc.passes.captures import fold_captures
from minicc.passes.clean import common_subexpressions, dead_code
from minicc.passes.expand import expand
from minicc.passes.fold import fold_constants, fold_shape_values
from minicc.passes.fold_affine import fold_affine
from minicc.passes.fuse import fuse
from minicc.passes.layout import choose_layout
from minicc.passes.loops import loop_values
from minicc.passes.manager import Pass, PassContext, Repeat
from minicc.passes.packed_weights import pack_products
from minicc.passes.precision import reduced_precision
from minicc.passes.quantise_integer import integer_products
from minicc.passes.recognise import recognise
from minicc.passes.resize import resize_by_axis
from minicc.passes.simplify import simplify
from minicc.passes.specialise import specialise_ranks
from minicc.passes.transposed_convolutions import phases_as_channels
from minicc.passes.transposes import sink_transposes
from minicc.passes.widen import widen_half
from minicc.passes.zero_points import zero_points


def _fuse(graph: Graph, context: PassContext) -> int:
    return fuse(graph, context.is_anchor, context.refuse_pair, context.row)


FOLD_SHAPES = Pass("fold-shape-values", fold_shape_values)
INTEGER_PRODUCTS = Pass("integer-products", integer_products)
PACKED_WEIGHTS = Pass("packed-weights", pack_products)
FOLD_CONSTANTS = Pass("fold-constants", fold_constants)
SPECIALISE = Pass("specialise-ranks", specialise_ranks)
CAPTURES = Pass("fold-captures", fold_captures)
LOOPS = Pass("loop-values", loop_values)
DEAD_CODE = Pass("dead-code", dead_code)
MERGE = Pass("common-subexpressions", common_subexpressions)
PRECISION = Pass("reduced-precision", reduced_precision, rounds=True)
EXPAND = Pass("expand", expand, Stage.EXPANDED)
ZERO_POINTS = Pass("zero-points", zero_points)
SIMPLIFY = Pass("simplify", simplify)
WIDEN = Pass("widen-half", widen_half, rounds=True)
RECOGNISE = Pass("recognise", recognise)
FOLD_AFFINE = Pass("fold-affine", fold_affine)
PHASES = Pass("phases-as-channels", phases_as_channels)
LAYOUT = Pass("choose-layout", choose_layout)
SINK = Pass("sink-transposes", sink_transposes)
RESIZE = Pass("resize-by-axis", resize_by_axis)
FUSE = Pass("fuse", _fuse, Stage.FUSED)


def default_pipeline(options: Options) -> tuple[Pass | Repeat, ...]:
    """The passes in order. opt_level 0 leaves only what lowering needs; 1 adds folding and fusion; 2 everything."""
    if options.opt_level == 0:
        return (FOLD_SHAPES, DEAD_CODE, PRECISION, EXPAND, FOLD_SHAPES, FOLD_CONSTANTS, ZERO_POINTS, DEAD_CODE)
    products = (INTEGER_PRODUCTS, PACKED_WEIGHTS)
    first = Repeat((FOLD_SHAPES, *products, FOLD_CONSTANTS, SPECIALISE, LOOPS, CAPTURES, SIMPLIFY, MERGE, DEAD_CODE))
    expanded = Repeat((*first.passes, ZERO_POINTS))
    layout = (PHASES, LAYOUT, SINK, RESIZE, first) if options.opt_level >= 2 else ()
    return (first, WIDEN, RECOGNISE, FOLD_AFFINE, PRECISION, EXPAND, expanded, *layout, FUSE)


__all__ = ["default_pipeline"]
