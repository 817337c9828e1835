"""The numbers behind Winograd's form, for whoever makes weights, kernels or plans of it; needs no Numba.

Here, among the kernels, because their machine code depends on it (see `codegen.build.toolchain`).
"""

# Interpolation points of 4 and 6 positions along an axis, besides infinity. With 5/8 and 3/2 in
# the place of the usual 1 and 2 the errors of float32 sums are a third; their powers are exact. Barabasz et al., "Error
# Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural Networks" (2020), show how much it matters.
POINTS: dict[int, tuple[float, ...]] = {4: (0.0, 1.0, -1.0), 6: (0.0, 5 / 8, -5 / 8, 3 / 2, -3 / 2)}


def side(out: int, stride: int = 1, taps: int = 3) -> int:
    """Inputs, and positions in Winograd's form, of `out` outputs along an axis; of 1 output without taps, 1."""
    return (out - 1) * stride + taps if out > 1 else 1
