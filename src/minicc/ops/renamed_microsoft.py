"""com.microsoft's operators that are another operator under a different name, or with attributes and inputs written otherwise.

Each is described by what it becomes; inference, numpy and the expansion follow from that. Convolutions and pooling have their
channels last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minicc.errors import ShapeError
from minicc.ir.graph import Builder, Node, Value, content_of
from minicc.ir.opdef import Inference, Kind, OpDef, get_op, register
from minicc.ir.types import Type
from minicc.ops.conv import CONV_ATTRS
from minicc.ops.helpers import (
    Array,
    as_dim,
    computed_in_f32,
    default_refuse,
    elements,
    propagate_moves,
    unknown_dims,
)
from minicc.ops.norm import optional, required
from minicc.ops.pool import POOL_ATTRS

_DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class Renamed:
    """What an operator becomes: `attributes` turns its own into the other's."""

    operator: str
    domain: str = ""
    attributes: Callable[[Mapping[str, Any]], dict[str, Any]] = dict

    def definition(self) -> OpDef:
        return get_op(self.operator, self.domain)

    def filled(self, attrs: Mapping[str, Any]) -> dict[str, Any]:
        """The other operator's attributes, those that are not given with their defaults."""
        return {**self.definition().attrs, **self.attributes(attrs)}

    def seen(self, n: Inference) -> Inference:
        return replace(n, attrs=self.filled(n.attrs))


def _register(name: str, renamed: Renamed, attrs: Mapping[str, Any], static: tuple[int, ...] = (), outputs: int = 1) -> None:
    def infer(n: Inference) -> Sequence[Type]:
        return renamed.definition().infer(renamed.seen(n))[:outputs]

    def propagate(n: Inference) -> Sequence[Any]:
        rule = renamed.definition().propagate
        return [None] * n.n_outputs if rule is None else rule(replace(renamed.seen(n), op=renamed.definition()))

    def evaluate(*arrays: Array | None, **given: Any) -> Any:
        found = renamed.definition().eval
        assert found is not None
        results = found(*arrays, **renamed.filled(given))
        return results[:outputs] if isinstance(results, tuple) else results

    def expand(b: Builder, node: Node) -> list[Value]:
        return [b.op(renamed.operator, *node.inputs, domain=renamed.domain, **renamed.filled(node.attrs))]

    register(OpDef(
        name, Kind.EXPAND, infer=infer, propagate=propagate, eval=evaluate, expand=expand, refuse=default_refuse,
        attrs=attrs, static_inputs=static, domain=_DOMAIN,
    ))  # fmt: skip


def _channels_last(attrs: Mapping[str, Any]) -> dict[str, Any]:
    return {**attrs, "layout": "NHWC"}


def _without_layout(attrs: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in attrs.items() if k != "layout"}


def _grid_modes(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """The standard's names of the modes, which it changed in opset 20; unknown ones stay, to be named in the error."""
    modes = {"bilinear": "linear", "bicubic": "cubic", "nearest": "nearest"}
    return {**attrs, "mode": modes.get(attrs["mode"], repr(attrs["mode"]))}


_register("TransposeMatMul", Renamed("FusedMatMul", _DOMAIN), {"alpha": 1.0, "transA": 0, "transB": 0})
_register("GatherND", Renamed("GatherND"), {})
_register("GridSample", Renamed("GridSample", attributes=_grid_modes),
          {"align_corners": 0, "mode": "bilinear", "padding_mode": "zeros"})  # fmt: skip
_register("NhwcMaxPool", Renamed("MaxPool", attributes=_channels_last), _without_layout(POOL_ATTRS))
_register("NhwcFusedConv", Renamed("FusedConv", _DOMAIN, _channels_last),
          {**_without_layout(CONV_ATTRS), "activation": "", "activation_params": None})  # fmt: skip


# -- NhwcConv: as the kernels read it, the weight has its channels last too


def _last_to_second(rank: int) -> list[int]:
    return [0, rank - 1, *range(1, rank - 1)]


def _with_shape(n: Inference, position: int, shape: Sequence[Any]) -> Inference:
    """The node as inference would see it with another shape of one input."""
    old = n.value(position)
    new = Value(old.name, old.tensor.with_shape(shape))
    return replace(n, inputs=(*n.inputs[:position], new, *n.inputs[position + 1 :]))


def _nhwc_conv_infer(n: Inference) -> Sequence[Type]:
    weight = n.shape(1)
    if len(weight) < 3 or len(weight) != n.rank(0):
        raise n.error(f"the weight has rank {len(weight)}")
    value = _with_shape(n, 1, [weight[a] for a in _last_to_second(len(weight))])
    return get_op("Conv").infer(replace(value, attrs=_channels_last(n.attrs)))


def _nhwc_conv_expand(b: Builder, node: Node) -> list[Value]:
    weight = required(node, 1)
    weight = b.op("Transpose", weight, perm=_last_to_second(weight.tensor.rank))
    return [b.op("Conv", required(node, 0), weight, optional(node, 2), **_channels_last(node.attrs))]


def _nhwc_conv_eval(x: Array, w: Array, bias: Array | None = None, **attrs: Any) -> Any:
    conv = get_op("Conv").eval
    assert conv is not None
    return conv(x, np.moveaxis(w, -1, 1), bias, **_channels_last(attrs))


register(OpDef(
    "NhwcConv", Kind.EXPAND, infer=_nhwc_conv_infer, eval=_nhwc_conv_eval, expand=_nhwc_conv_expand, refuse=default_refuse,
    attrs=_without_layout(CONV_ATTRS), domain=_DOMAIN,
))  # fmt: skip


# -- ExpandDims: one axis of size 1, at a position that is an input


def _expand_dims_infer(n: Inference) -> list[Type]:
    shape, axes = n.shape(0), n.integers(1)
    if axes is None:
        return [n.type(0).with_shape(unknown_dims(n, len(shape) + 1))]
    if len(axes) != 1:
        raise n.error("the axis must be one number")
    axis = n.axis(axes[0], len(shape) + 1)
    return [n.type(0).with_shape((*shape[:axis], 1, *shape[axis:]))]


def _expand_dims_expand(b: Builder, node: Node) -> list[Value]:
    x, content = required(node, 0), required(node, 1).content
    assert content is not None
    axis = as_dim(elements(content)[0])
    assert axis is not None
    return [b.op("Unsqueeze", x, b.shape([axis]))]


register(OpDef(
    "ExpandDims", Kind.EXPAND, infer=_expand_dims_infer, expand=_expand_dims_expand, refuse=default_refuse,
    eval=lambda x, axis: np.expand_dims(x, int(axis.item())), propagate=propagate_moves(0), static_inputs=(1,), domain=_DOMAIN,
))  # fmt: skip


# -- Pad: the pads may be a row


def _pad_infer(n: Inference) -> Sequence[Type]:
    return get_op("Pad").infer(n)


def _pad_eval(x: Array, pads: Array, value: Array | None = None, *, mode: str) -> Any:
    pad = get_op("Pad").eval
    assert pad is not None
    return pad(x, pads.reshape(-1), value, mode=mode)


def _pad_expand(b: Builder, node: Node) -> list[Value]:
    content = required(node, 1).content
    assert content is not None
    return [b.op("Pad", required(node, 0), b.shape(elements(content)), optional(node, 2), mode=node.attrs["mode"])]


register(OpDef(
    "Pad", Kind.EXPAND, infer=_pad_infer, eval=_pad_eval, expand=_pad_expand, refuse=default_refuse,
    propagate=propagate_moves(0), attrs={"mode": "constant"}, static_inputs=(1,), domain=_DOMAIN,
))  # fmt: skip


# -- Range: the step may be left out


def _with_step(n: Inference) -> Inference:
    if n.has(2):
        return n
    one = np.ones((), n.dtype(0).numpy)
    step = Value("step", n.type(0).with_shape(()), data=one, content=content_of(one))
    return replace(n, inputs=(*n.inputs[:2], step))


def _range_infer(n: Inference) -> Sequence[Type]:
    standard = get_op("Range")
    return standard.infer(replace(_with_step(n), attrs=standard.attrs))


def _range_content(n: Inference) -> Sequence[Any]:
    standard = get_op("Range")
    assert standard.propagate is not None
    return standard.propagate(replace(_with_step(n), op=standard, attrs=standard.attrs))


def _range_eval(start: Array, limit: Array, delta: Array | None = None) -> Any:
    standard = get_op("Range")
    assert standard.eval is not None
    return standard.eval(start, limit, np.ones((), start.dtype) if delta is None else delta, **standard.attrs)


def _range_expand(b: Builder, node: Node) -> list[Value]:
    start, limit, step = required(node, 0), required(node, 1), optional(node, 2)
    return [b.op("Range", start, limit, b.scalar(1, start) if step is None else step)]


register(OpDef(
    "Range", Kind.EXPAND, infer=_range_infer, eval=_range_eval, expand=_range_expand, propagate=_range_content,
    refuse=default_refuse, static_inputs=(0, 1, 2), domain=_DOMAIN,
))  # fmt: skip


# -- ConvTransposeWithDynamicPads: the pads are an input


def _transpose_attrs(attrs: Mapping[str, Any], pads: Sequence[int] | None) -> dict[str, Any]:
    return {**attrs, "pads": pads or None, "output_shape": None, "layout": "NCHW"}


def _dynamic_pads_infer(n: Inference) -> Sequence[Type]:
    inner = replace(n, inputs=(n.inputs[0], n.inputs[1], n.inputs[3] if n.has(3) else None))
    pads = n.integers(2)
    found = get_op("ConvTranspose").infer(replace(inner, attrs=_transpose_attrs(n.attrs, pads)))
    if pads is not None or not n.has(2):
        return found
    shape = found[0].dims  # type: ignore[union-attr]
    return [n.type(0).with_shape((*shape[:2], *unknown_dims(n, len(shape) - 2)))]


def _dynamic_pads_expand(b: Builder, node: Node) -> list[Value]:
    pads = optional(node, 2)
    known = None if pads is None or pads.content is None else [int(v) for v in elements(pads.content)]
    x, w, bias = required(node, 0), required(node, 1), optional(node, 3)
    return [b.op("ConvTranspose", x, w, bias, **_transpose_attrs(node.attrs, known))]


def _dynamic_pads_refuse(node: Node) -> str | None:
    reason, pads = default_refuse(node), optional(node, 2)
    if reason is None and pads is not None and not all(isinstance(v, int) for v in elements(pads.content)):  # type: ignore[arg-type]
        return "pads that depend on sizes"
    return reason


@computed_in_f32
def _dynamic_pads_eval(x: Array, w: Array, pads: Array | None = None, bias: Array | None = None, **attrs: Any) -> Any:
    transposed = get_op("ConvTranspose").eval
    assert transposed is not None
    if pads is not None and len(pads) != 2 * (x.ndim - 2):
        raise ShapeError(f"ConvTransposeWithDynamicPads: {len(pads)} pads for {x.ndim - 2} spatial axes")
    return transposed(x, w, bias, **_transpose_attrs(attrs, None if pads is None else pads.tolist()))


register(OpDef(
    "ConvTransposeWithDynamicPads", Kind.EXPAND, infer=_dynamic_pads_infer, eval=_dynamic_pads_eval,
    expand=_dynamic_pads_expand, refuse=_dynamic_pads_refuse, static_inputs=(2,), domain=_DOMAIN,
    attrs={**{k: v for k, v in _without_layout(CONV_ATTRS).items() if k != "pads"}, "output_padding": None},
))  # fmt: skip
