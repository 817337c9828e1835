"""Sizes of convolution by Fourier transforms, for whoever makes weights, kernels or plans of it; needs no Numba.

Here, among the kernels, because their machine code depends on it (see `codegen.build.toolchain`).
"""

# Inputs of a tile along an axis with taps; along an axis without, 1.
SIDES = (8, 12, 16, 20, 24, 32, 48, 64)
# Floats of the inputs of a block of tiles in Fourier's form (without gaps), and of the products of a panel with them.
INPUTS, PRODUCTS = 294912, 131072


def frequencies(height: int, width: int) -> int:
    """How many complex numbers hold the transform of height x width real ones: see `packing.fft_order` for their order."""
    real = 1 if width == 1 else 2  # columns whose transform is that of real numbers
    return real * (height // 2 + 1) + max(width // 2 - 1, 0) * height


def most_tiles(height: int, width: int, lanes: int) -> int:
    """The most tiles in a block: their products with a panel of `lanes` columns take PRODUCTS floats."""
    return max(1, min(32, PRODUCTS // (2 * frequencies(height, width) * lanes)))
