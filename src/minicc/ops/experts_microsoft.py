"""com.microsoft's mixtures of experts: MoE and QMoE (Shazeer et al., 2017).

A router chooses k experts, small networks of two layers, for each row; their results are added, weighted by the router. On the
host only the chosen ones are computed. MoE is compiled where that saves little: there every expert sees every row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from minicc.ir.dims import product
from minicc.ir.opdef import Inference, Kind, OpDef, register
from minicc.ir.types import TensorType, f32, u8
from minicc.ops.helpers import Array, default_refuse, widen
from minicc.ops.matmul import unpack_bits
from minicc.ops.norm import as_type, axes_of, optional, required, reshaped
from minicc.ops.softmax import softmax, softmax_array

if TYPE_CHECKING:
    from minicc.ir.graph import Builder, Node, Value

_DOMAIN = "com.microsoft"
_MOST_WASTE = 4  # experts for each chosen one, up to which all of them are computed
_ATTRS: dict[str, Any] = {
    "activation_alpha": 1.0, "activation_beta": 0.0, "activation_type": "relu", "k": 1, "normalize_routing_weights": 0,
    "swiglu_fusion": 0, "swiglu_limit": None, "swiglu_limit_after_activation": 0, "use_sparse_mixer": 0,
}  # fmt: skip
_GATED = ("swiglu", "geglu")
_ACTIVATIONS = ("relu", "relu2", "gelu", "silu", "identity", *_GATED)


def _check(n: Inference, gate: int) -> TensorType:
    """The type of the result; `gate` is the position of the third layer's weights."""
    x, router, attrs = n.shape(0), n.shape(1), n.attrs
    if len(x) not in (2, 3) or len(router) != 2:
        raise n.error("needs rows of rank 2 or 3 and a router of rank 2")
    if attrs["activation_type"] not in _ACTIVATIONS:
        raise n.error(f"activation {attrs['activation_type']!r} is unknown, known: {', '.join(_ACTIVATIONS)}")
    if attrs["use_sparse_mixer"]:
        raise n.error("the sparse mixer is not supported")
    if attrs["k"] < 1 or (isinstance(router[1], int) and attrs["k"] > router[1]):
        raise n.error(f"{attrs['k']} of {router[1]} experts")
    if attrs["swiglu_fusion"] not in (0, 1, 2):
        raise n.error(f"swiglu_fusion {attrs['swiglu_fusion']} is unknown")
    apart = attrs["activation_type"] in _GATED and not attrs["swiglu_fusion"]
    if apart and not n.has(gate):
        raise n.error("a gated activation that is not fused needs the weights of a third layer")
    if n.has(gate) and attrs["activation_type"] in _GATED and not apart:
        raise n.error("a fused activation has no third layer")
    return n.type(0)


# -- numpy: each expert computes the rows that chose it

Layers = Callable[[int], tuple[Any, ...]]  # an expert to weights and bias of its three layers, None for those it has not


def _activated(hidden: Array, gate: Array | None, attrs: Mapping[str, Any]) -> Array:
    """The activation of rows; `gate` is what a third layer gives."""
    name = attrs["activation_type"]
    if name in _GATED and gate is None:
        pairs = hidden.reshape(len(hidden), -1, 2) if attrs["swiglu_fusion"] == 1 else None
        halves = np.split(hidden, 2, axis=1) if pairs is None else [pairs[..., 0], pairs[..., 1]]
        hidden, gate = halves[0], halves[1]
    if name == "swiglu" and gate is not None:
        limit = np.float32(np.inf if attrs["swiglu_limit"] is None else attrs["swiglu_limit"])
        late = attrs["swiglu_limit_after_activation"]
        hidden = hidden if late else np.minimum(hidden, limit)
        turned = hidden / (1 + np.exp(-np.float32(attrs["activation_alpha"]) * hidden))
        turned = np.minimum(turned, limit) if late else turned
        return np.asarray(turned * (np.clip(gate, -limit, limit) + np.float32(attrs["activation_beta"])))
    out = _plain(name, hidden)
    return out if gate is None else np.asarray(out * gate)


def _plain(name: str, x: Array) -> Array:
    if name == "silu":
        return np.asarray(x / (1 + np.exp(-x)))
    if name in ("gelu", "geglu"):
        return np.asarray(x * (1 + np.tanh(np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x**3))) / 2)
    if name == "identity":
        return x
    return np.asarray(np.maximum(x, 0) ** (2 if name == "relu2" else 1))


def _mixture(x: Array, router: Array, weights: Array | None, layers: Layers, attrs: Mapping[str, Any]) -> Array:
    rows, chances = widen(x).reshape(-1, x.shape[-1]), softmax_array(widen(router), axis=-1)
    chosen = np.argsort(-chances, axis=1, kind="stable")[:, : attrs["k"]]
    factors = np.take_along_axis(chances if weights is None else widen(weights), chosen, axis=1)
    if attrs["normalize_routing_weights"]:
        factors = factors / factors.sum(axis=1, keepdims=True)
    out = np.zeros((len(rows), x.shape[-1]), np.float32)

    def layer(inputs: Array, matrix: Array, bias: Array | None) -> Array:
        found = inputs @ matrix.T
        return np.asarray(found if bias is None else found + bias)

    for expert in np.unique(chosen):
        where, rank = np.nonzero(chosen == expert)
        first, first_bias, second, second_bias, third, third_bias = layers(int(expert))
        gate = None if third is None else layer(rows[where], third, third_bias)
        inner = _activated(layer(rows[where], first, first_bias), gate, attrs)
        out[where] += layer(inner, second, second_bias) * factors[where, rank][:, None]
    return out.reshape(x.shape).astype(x.dtype)


# -- MoE(input, router, first weights and bias, second weights and bias, third weights and bias)


def _moe_infer(n: Inference) -> list[TensorType]:
    if any(n.has(i) and n.rank(i) != 3 for i in (2, 4, 6)) or any(n.has(i) and n.rank(i) != 2 for i in (3, 5, 7)):
        raise n.error("the weights must have rank 3, the biases rank 2")
    return [_check(n, 6)]


def _moe_refuse(node: Node) -> str | None:
    reason = default_refuse(node)
    if reason is not None:
        return reason
    experts, width = (required(node, i).shape[1] for i in (1, 2))
    if not isinstance(experts, int) or not isinstance(width, int):
        return "a number of experts known only at run time"
    return "few of many experts are chosen" if experts > _MOST_WASTE * node.attrs["k"] else None


def _routing(b: Builder, router: Value, attrs: Mapping[str, Any]) -> Value:
    """How much each row wants of each expert: [experts, rows, 1], 0 for those that are not chosen."""
    rows, experts = router.shape
    chances, places = b.ops("TopK", softmax(b, as_type(b, router, f32), 1), b.shape([attrs["k"]]), outputs=2, axis=1)
    if attrs["normalize_routing_weights"]:
        chances = b.op("Div", chances, b.op("ReduceSum", chances, axes_of(b, [1]), keepdims=1))
    assert isinstance(experts, int)
    numbers = b.constant(np.arange(experts).reshape(-1, 1, 1))
    mine = b.op("Where", b.op("Equal", places, numbers), chances, b.constant(np.float32(0)))
    return reshaped(b, b.op("ReduceSum", mine, axes_of(b, [2]), keepdims=1), (experts, rows, 1))


def _gated(b: Builder, hidden: Value, gate: Value, attrs: Mapping[str, Any]) -> Value:
    def limited(x: Value, low: float | None) -> Value:
        if attrs["swiglu_limit"] is None:
            return x
        return b.op("Clip", x, None if low is None else b.scalar(low, x), b.scalar(attrs["swiglu_limit"], x))

    late = attrs["swiglu_limit_after_activation"]
    hidden = hidden if late else limited(hidden, None)
    turned = b.op("Mul", hidden, b.op("Sigmoid", b.op("Mul", hidden, b.scalar(attrs["activation_alpha"], hidden))))
    turned = limited(turned, None) if late else turned
    gate = limited(gate, -(attrs["swiglu_limit"] or 0.0))
    return b.op("Mul", turned, b.op("Add", gate, b.scalar(attrs["activation_beta"], gate)))


def _activation(b: Builder, hidden: Value, gate: Value | None, attrs: Mapping[str, Any]) -> Value:
    name, (experts, rows, width) = attrs["activation_type"], hidden.shape
    if name in _GATED and gate is None:
        if attrs["swiglu_fusion"] == 1:
            pairs = reshaped(b, hidden, (experts, rows, width // 2, 2))
            hidden, gate = (b.op("Gather", pairs, b.constant(np.int64(i)), axis=3) for i in (0, 1))
        else:
            cuts, axis = [b.shape([v]) for v in (0, width // 2, width)], b.shape([2])
            hidden, gate = (b.op("Slice", hidden, cuts[i], cuts[i + 1], axis) for i in (0, 1))
    if name == "swiglu":
        assert gate is not None
        return _gated(b, hidden, gate, attrs)
    if name in ("gelu", "geglu"):
        out = b.op("Gelu", hidden, approximate="tanh")
    elif name == "silu":
        out = b.op("Mul", hidden, b.op("Sigmoid", hidden))
    else:
        out = hidden if name == "identity" else b.op("Relu", hidden)
        out = b.op("Mul", out, out) if name == "relu2" else out
    return out if gate is None else b.op("Mul", out, gate)


def _moe_expand(b: Builder, node: Node) -> list[Value]:
    x, attrs = required(node, 0), node.attrs
    rows = as_type(b, reshaped(b, x, (1, product(x.shape[:-1]), x.shape[-1])), f32)

    def layer(inputs: Value, position: int) -> Value:
        weights, bias = as_type(b, required(node, position), f32), optional(node, position + 1)
        found = b.op("MatMul", inputs, b.op("Transpose", weights, perm=[0, 2, 1]))
        if bias is None:
            return found
        return b.op("Add", found, as_type(b, reshaped(b, bias, (bias.shape[0], 1, bias.shape[1])), f32))

    gate = None if optional(node, 6) is None else layer(rows, 6)
    found = layer(_activation(b, layer(rows, 2), gate, attrs), 4)
    wanted = b.op("Mul", found, _routing(b, required(node, 1), attrs))
    total = b.op("ReduceSum", wanted, axes_of(b, [0]), keepdims=0)
    return [reshaped(b, as_type(b, total, x.tensor.dtype), x.shape)]


def _moe_eval(x: Array, router: Array, *arrays: Array | None, **attrs: Any) -> Array:
    given = (*arrays, *(None,) * 6)[:6]

    def layers(expert: int) -> tuple[Any, ...]:
        return tuple(None if a is None else widen(a[expert]) for a in given)

    return _mixture(x, router, None, layers, attrs)


register(OpDef(
    "MoE", Kind.EXPAND, infer=_moe_infer, eval=_moe_eval, expand=_moe_expand, refuse=_moe_refuse, attrs=_ATTRS, domain=_DOMAIN,
))  # fmt: skip


# -- QMoE: weights, scales and biases of the three layers, their zero points, and what the router weighs with when it is
# something else than what it chooses with


def _bits(attrs: Mapping[str, Any], layer: int) -> int:
    return int(attrs[f"fc{layer + 1}_expert_weight_bits"] or attrs["expert_weight_bits"])


def _qmoe_infer(n: Inference) -> list[TensorType]:
    if n.attr("quant_type") != "int" or any(n.has(i) for i in range(15, 21)):
        raise n.error(f"weights of type {n.attr('quant_type')!r} are not supported")
    if n.attr("weights_prepacked") == 1:
        raise n.error("weights packed for one device are not supported", hint="export with weights_prepacked=0")
    if any(n.dtype(i) != u8 for i in (2, 5)) or any(_bits(n.attrs, i) not in (2, 4, 8) for i in range(3)):
        raise n.error("needs weights of 2, 4 or 8 bits in bytes")
    if any(not n.has(i) for i in (3, 6)):
        raise n.error("the scales are missing")
    return [_check(n, 8)]


def _expert_weights(packed: Array, scales: Array, zeros: Array | None, bits: int) -> Array:
    """One expert's layer in float32; a scale for each output, or for each block of an output's inputs."""
    numbers = unpack_bits(packed, bits).astype(np.float32)
    outputs, inputs = numbers.shape
    steps = widen(scales).reshape(outputs, -1)
    blocks = steps.shape[1]
    points = np.full((outputs, blocks), 1 << (bits - 1), np.float32)
    if zeros is not None:  # by block: packed along the blocks; by output: along the outputs
        unpacked = unpack_bits(zeros, bits)
        points = unpacked[:, :blocks].astype(np.float32) if zeros.ndim == 2 else unpacked[:outputs, None].astype(np.float32)
    size = inputs // blocks
    return np.asarray((numbers - np.repeat(points, size, axis=1)) * np.repeat(steps, size, axis=1))


def _qmoe_eval(x: Array, router: Array, *arrays: Array | None, **attrs: Any) -> Array:
    given = (*arrays, *(None,) * 13)[:13]

    def layers(expert: int) -> tuple[Any, ...]:
        out: list[Any] = []
        for layer in range(3):
            packed, scales, bias = given[3 * layer : 3 * layer + 3]
            zeros = given[9 + layer]
            if packed is None or scales is None:
                out += [None, None]
                continue
            points = None if zeros is None else zeros[expert]
            out.append(_expert_weights(packed[expert], scales[expert], points, _bits(attrs, layer)))
            out.append(None if bias is None else widen(bias[expert]))
        return tuple(out)

    return _mixture(x, router, given[12], layers, attrs)


register(OpDef(
    "QMoE", Kind.HOST, infer=_qmoe_infer, eval=_qmoe_eval, domain=_DOMAIN,
    attrs={**_ATTRS, "accuracy_level": 0, "block_size": None, "expert_weight_bits": 4, "fc1_expert_weight_bits": None,
           "fc2_expert_weight_bits": None, "fc3_expert_weight_bits": None, "quant_type": "int", "weights_prepacked": -1},
))  # fmt: skip
