"""LinearAttention, CausalConvWithState and Det against ONNX's cases."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ops.onnx_cases import Case, cases_of, check_call, check_case
from tests.ops.test_matmul import normal


@pytest.mark.parametrize(
    "case", cases_of("LinearAttention", "CausalConvWithState", "Det"), ids=lambda c: c.name
)
def test_onnx_case(case: Case) -> None:
    check_case(case)


def test_state_carries_over() -> None:
    """Two halves of a sequence, the second from the first's state, give the whole sequence's output."""
    from minicc.ir.opdef import get_op

    attrs = {**get_op("LinearAttention").attrs, "q_num_heads": 4, "kv_num_heads": 2}
    q, k, v = normal(2, 6, 16), normal(2, 6, 8) * 0.3, normal(2, 6, 10)
    decay, beta = -np.abs(normal(2, 6, 2)), np.abs(normal(2, 6, 2)) * 0.1
    whole, last = get_op("LinearAttention").eval(q, k, v, None, decay, beta, **attrs)
    halves, state = [], None
    for part in (slice(0, 4), slice(4, 6)):
        inputs = [x[:, part] for x in (q, k, v)] + [state] + [x[:, part] for x in (decay, beta)]
        y, new = get_op("LinearAttention").eval(*inputs, **attrs)
        check_call("LinearAttention", inputs, {"q_num_heads": 4, "kv_num_heads": 2}, [y, new], rtol=1e-4)
        halves.append(y)
        state = new
    np.testing.assert_allclose(np.concatenate(halves, axis=1), whole, rtol=1e-5)
    np.testing.assert_allclose(state, last, rtol=1e-5)
