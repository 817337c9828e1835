"""Which op is lowered by which template: one table, one function per family.

A function `(low, node, lead) -> refusal` emits the steps of `node` and returns "", or returns a sentence and emits
nothing. `lead` is the anchor inside a `Fused` node's body, None when the node stands alone.
"""

from __future__ import annotations

from collections.abc import Callable

from minicc.ir.graph import Node
from minicc.ir.types import TensorType, i32
from minicc.lower.context import Lowering
from minicc.lower.templates.attention import lower_attention, takes_attention
from minicc.lower.templates.bits import lower_matmul_bits, takes_bits
from minicc.lower.templates.cache import lower_cache_update, lower_tensor_scatter
from minicc.lower.templates.common import FLOATS
from minicc.lower.templates.conv import lower_conv
from minicc.lower.templates.conv_transpose import lower_conv_transpose
from minicc.lower.templates.cuda import lower_cuda_conv, lower_cuda_matmul
from minicc.lower.templates.integer import lower_conv_integer, lower_matmul_integer
from minicc.lower.templates.matmul import lower_matmul
from minicc.lower.templates.pool import lower_pool
from minicc.lower.templates.recurrent import lower_recurrent
from minicc.lower.templates.scan import lower_scan
from minicc.lower.templates.scatter import lower_scatter_elements, lower_scatter_nd
from minicc.lower.templates.suppress import lower_select_boxes
from minicc.lower.templates.topk import lower_topk
from minicc.lower.templates.trees import lower_tree_leaves
from minicc.targets.cuda import CudaTarget
from minicc.targets.parse import Target

Lower = Callable[[Lowering, Node, Node | None], str]
TABLE: dict[tuple[str, str], Lower] = {
    ("", "Conv"): lower_conv,
    ("", "ConvTranspose"): lower_conv_transpose,
    ("", "MatMul"): lower_matmul,
    ("", "ConvInteger"): lower_conv_integer,
    ("", "MatMulInteger"): lower_matmul_integer,
    ("", "MaxPool"): lower_pool,
    ("", "AveragePool"): lower_pool,
    ("", "ScatterElements"): lower_scatter_elements,
    ("", "ScatterND"): lower_scatter_nd,
    ("", "TensorScatter"): lower_tensor_scatter,
    ("minicc", "CacheUpdate"): lower_cache_update,
    ("", "CumSum"): lower_scan,
    ("", "CumProd"): lower_scan,
    ("", "LSTM"): lower_recurrent,
    ("", "GRU"): lower_recurrent,
    ("", "RNN"): lower_recurrent,
    ("", "TopK"): lower_topk,
    ("minicc", "Attention"): lower_attention,
    ("minicc", "SelectBoxes"): lower_select_boxes,
    ("minicc", "TreeLeaves"): lower_tree_leaves,
    ("com.microsoft", "MatMulNBits"): lower_matmul_bits,
}
# Templates that end in a generated epilogue.
FUSED = frozenset((
    ("", "Conv"), ("", "ConvTranspose"), ("", "MatMul"), ("", "ConvInteger"), ("", "MatMulInteger"), ("", "MaxPool"),
    ("", "AveragePool"), ("com.microsoft", "MatMulNBits"),
))  # fmt: skip


# Those with a CUDA form.
CUDA_TABLE: dict[tuple[str, str], Lower] = {
    ("", "ConvTranspose"): lower_conv_transpose,
    ("", "MaxPool"): lower_pool,
    ("", "AveragePool"): lower_pool,
    ("", "Conv"): lower_cuda_conv,
    ("", "ConvInteger"): lower_cuda_conv,
    ("", "MatMul"): lower_cuda_matmul,
    ("", "MatMulInteger"): lower_cuda_matmul,
    ("", "ScatterElements"): lower_scatter_elements,
    ("", "ScatterND"): lower_scatter_nd,
    ("", "TensorScatter"): lower_tensor_scatter,
    ("minicc", "CacheUpdate"): lower_cache_update,
    ("", "CumSum"): lower_scan,
    ("", "CumProd"): lower_scan,
    ("", "LSTM"): lower_recurrent,
    ("", "GRU"): lower_recurrent,
    ("", "RNN"): lower_recurrent,
    ("", "TopK"): lower_topk,
    ("minicc", "Attention"): lower_attention,
    ("minicc", "SelectBoxes"): lower_select_boxes,
    ("minicc", "TreeLeaves"): lower_tree_leaves,
}


def find_template(node: Node, target: Target) -> Lower | None:
    """The lowering function of a node's op for a target, or None when it has no template."""
    table = CUDA_TABLE if isinstance(target, CudaTarget) else TABLE
    return table.get((node.op.domain, node.op.name))


def keeps(target: Target) -> Callable[[Node], bool]:
    """Which nodes of ops that are defined by smaller ones a target computes whole."""

    def keep(node: Node) -> bool:
        if (node.op.domain, node.op.name) == ("minicc", "Attention"):
            return takes_attention(node, target)
        return (node.op.domain, node.op.name) == ("com.microsoft", "MatMulNBits") and takes_bits(node, target)

    return keep


def is_anchor(node: Node) -> bool:
    """Whether fusion may grow an epilogue on this node."""
    if (node.op.domain, node.op.name) not in FUSED or not isinstance(node.output.type, TensorType):
        return False
    accumulated = (i32,) if node.op.name.endswith("Integer") else FLOATS
    return node.output.type.shape is not None and node.output.type.dtype in accumulated
