"""How templates that exist for every element type name its loads and stores, and which nodes they take."""

from __future__ import annotations

from minicc.ir.graph import Node
from minicc.ir.types import KERNEL_DTYPES, DType, TensorType, bf16, boolean, f16

Access = dict[str, int | float | str]


def access(dtype: DType) -> Access:
    """Constants POINTER, LOAD, LOAD_OLD and STORE of an element type; half types are float32 in registers."""
    suffix = f"_{dtype.name}" if dtype in (f16, bf16) else ""
    name = "u8" if dtype == boolean else dtype.name
    words = {"LOAD": "ld", "LOAD_OLD": "ld_out", "STORE": "st"}
    return {"POINTER": f"ptr_{name}", **{key: word + suffix for key, word in words.items()}}


def moving(dtype: DType) -> Access:
    """The same for elements that are only moved: bits of their width."""
    return {"POINTER": f"ptr_u{8 * dtype.bytes}", "LOAD": "ld", "LOAD_OLD": "ld_out", "STORE": "st"}


def refusal(node: Node) -> str:
    """Why no kernel can take the node: ranks, sizes known only after it has run, element types."""
    if node.symbols:
        return f"data-dependent: the output size {node.symbols[0]} is known only when the node has run"
    for value in (*node.inputs, *node.outputs):
        if value is None:
            continue
        if not isinstance(value.type, TensorType) or value.type.shape is None:
            return f"the rank of '{value.name}' is not known"
        if value.type.dtype not in KERNEL_DTYPES:
            return f"no kernel for element type {value.type.dtype}"
    return ""
