"""Linear algebra beyond products: Det, on the host."""

from __future__ import annotations

import numpy as np

from minicc.ir.opdef import Inference, Kind, OpDef, register
from minicc.ir.types import TensorType
from minicc.ops.helpers import Array, computed_in_f32


def _det_infer(n: Inference) -> list[TensorType]:
    x = n.shape(0)
    square = len(x) >= 2 and (x[-1] == x[-2] or not all(isinstance(d, int) for d in x[-2:]))
    if not square or not n.dtype(0).is_float:
        raise n.error("needs square matrices of floats")
    return [TensorType(n.dtype(0), x[:-2])]


@computed_in_f32
def _det_eval(x: Array) -> Array:
    return np.asarray(np.linalg.det(x)).astype(x.dtype)


register(OpDef("Det", Kind.HOST, infer=_det_infer, eval=_det_eval))
