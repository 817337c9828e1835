"""Products and convolutions that are timed on a GPU: operands, expected numbers, words, the same in PyTorch.

Needs numpy only (and PyTorch for its part), because minicc is not installed where this runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
CHECKED_ROWS = 48


def draw(element: str, shape: tuple[int, ...]) -> Array:
    """Random numbers of an element type; bf16 as uint16."""
    rng = np.random.default_rng(7)
    if element == "s8":
        return rng.integers(-128, 128, shape).astype(np.int8)
    numbers = rng.standard_normal(shape, np.float32)
    if element == "bf16":
        return (numbers.view(np.uint32) >> 16).astype(np.uint16)
    return numbers.astype(np.float16) if element == "f16" else numbers


def exact(element: str, array: Array) -> Array:
    """The numbers as float64."""
    if element == "bf16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


@dataclass(frozen=True)
class Gemm:
    """[batches, m, k] times [batches, k, n]."""

    m: int
    n: int
    k: int
    batches: int = 1
    template = "gemm"

    @property
    def rows(self) -> int:
        """Rows of one batch; `repeats` of them have tiles of their own."""
        return self.m

    @property
    def repeats(self) -> int:
        return self.batches

    @property
    def depth(self) -> int:
        """Products that a result sums."""
        return self.k

    @property
    def result(self) -> tuple[int, ...]:
        return (self.batches * self.m, self.n)

    @property
    def operations(self) -> float:
        return 2.0 * self.m * self.n * self.k * self.batches

    def operands(self, element: str) -> tuple[Array, Array]:
        """A, and B as rows of k."""
        return draw(element, (self.batches, self.m, self.k)), draw(element, (self.batches, self.n, self.k))

    def expected(self, element: str, a: Array, b: Array) -> tuple[Array, Array]:
        """Some rows of the result, and their numbers."""
        picked = np.unique(np.linspace(0, self.m - 1, CHECKED_ROWS).astype(int))
        found = exact(element, a[:, picked]) @ np.swapaxes(exact(element, b), -1, -2)
        return (np.arange(self.batches)[:, None] * self.m + picked).ravel(), found.reshape(-1, self.n)

    def words(self, a: int, b: int, c: int, tiles: tuple[int, int]) -> list[int]:
        # Rows of k are multiples of 16 bytes, so that those of B are not padded.
        sizes = [self.m, self.n, self.k, self.k, self.m * self.k, 0, self.k, self.n * self.k, 0, self.batches, 1]
        return [a, b, *sizes, *tiles, c]

    def torch(self, element: str, dtype: Any) -> Callable[[], Any]:
        """The same product in PyTorch."""
        import torch

        batch = () if self.batches == 1 else (self.batches,)
        a = torch.randn(*batch, self.m, self.k, device="cuda").to(dtype)
        b = torch.randn(*batch, self.n, self.k, device="cuda").to(dtype).transpose(-1, -2)
        return lambda: (torch._int_mm if element == "s8" else torch.matmul)(a, b)


@dataclass(frozen=True)
class Conv:
    """Square images, channels last."""

    images: int
    size: int
    channels: int
    filters: int
    window: int
    stride: int = 1
    groups: int = 1
    template = "conv"

    @property
    def out(self) -> int:
        return (self.size + 2 * (self.window // 2) - self.window) // self.stride + 1

    @property
    def rows(self) -> int:
        return self.images * self.out**2

    @property
    def repeats(self) -> int:
        return self.groups

    @property
    def depth(self) -> int:
        return self.window**2 * self.channels // self.groups

    @property
    def result(self) -> tuple[int, ...]:
        return (self.rows, self.filters)

    @property
    def operations(self) -> float:
        return 2.0 * self.rows * self.filters * self.depth

    def operands(self, element: str) -> tuple[Array, Array]:
        """X channels last, and filters as rows of k = (y, x, channel) per group."""
        shape = (self.images, self.size, self.size, self.channels)
        return draw(element, shape), draw(element, (self.groups, self.filters // self.groups, self.depth))

    def expected(self, element: str, a: Array, b: Array) -> tuple[Array, Array]:
        """Some pixels of the result, and their numbers."""
        picked = np.unique(np.linspace(0, self.rows - 1, CHECKED_ROWS).astype(int))
        edge = self.window // 2
        padded = np.pad(a, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
        images, pixels = np.divmod(picked, self.out**2)
        ys, xs = (v * self.stride for v in np.divmod(pixels, self.out))
        windows = np.stack([padded[i, y : y + self.window, x : x + self.window] for i, y, x in zip(images, ys, xs, strict=True)])
        taps = windows.reshape(len(picked), self.window**2, self.groups, -1)
        per_group = taps.transpose(2, 0, 1, 3).reshape(self.groups, len(picked), -1)
        found = exact(element, per_group) @ np.swapaxes(exact(element, b), -1, -2)
        return picked, found.transpose(1, 0, 2).reshape(len(picked), -1)

    def words(self, a: int, b: int, c: int, tiles: tuple[int, int]) -> list[int]:
        pixels, row = self.out**2, self.size * self.channels
        sizes = [self.images, self.groups, pixels, self.filters // self.groups, self.channels // self.groups]
        strides = [self.size * row, 0, row, self.channels]
        extents = [1, self.size, self.size, 1, self.out, self.out, 1, self.window, self.window]
        steps = [1, self.stride, self.stride, 1, 1, 1, 0, self.window // 2, self.window // 2]
        return [a, b, *sizes, *strides, *extents, *steps, 0, *tiles, c]

    def torch(self, element: str, dtype: Any) -> Callable[[], Any]:
        """The same convolution in PyTorch, channels last."""
        import torch

        if element == "s8":
            raise RuntimeError("PyTorch has no such convolution")
        last = torch.channels_last
        x = torch.randn(self.images, self.channels, self.size, self.size, device="cuda").to(dtype).to(memory_format=last)
        shape = (self.filters, self.channels // self.groups, self.window, self.window)
        w = torch.randn(*shape, device="cuda").to(dtype).to(memory_format=last)
        pads = self.window // 2
        return lambda: torch.nn.functional.conv2d(x, w, stride=self.stride, padding=pads, groups=self.groups)


# Large ones, a transformer's layers, ResNet-50's, thin and ragged ones.
CASES: tuple[Gemm | Conv, ...] = (
    Gemm(4096, 4096, 4096), Gemm(2048, 2048, 2048), Gemm(512, 3072, 768), Gemm(512, 768, 3072), Gemm(2048, 768, 768),
    Gemm(25088, 64, 256), Gemm(392, 2048, 512), Gemm(384, 384, 64, 48), Gemm(16, 4096, 4096), Gemm(1, 4096, 4096),
    Gemm(127, 129, 136), Conv(8, 56, 64, 64, 3), Conv(8, 28, 128, 128, 3), Conv(8, 14, 256, 256, 3), Conv(8, 7, 512, 512, 3),
    Conv(8, 56, 256, 128, 1), Conv(8, 224, 4, 64, 7, 2), Conv(8, 28, 256, 256, 3, 2), Conv(8, 56, 128, 128, 3, 1, 4),
)  # fmt: skip
