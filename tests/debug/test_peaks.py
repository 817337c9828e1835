"""Measured peaks, and the bound they give."""

from __future__ import annotations

import time

import numpy as np

from minicc.debug.peaks import Peaks, measure_peaks


def test_the_bound_is_that_of_the_scarcer_resource() -> None:
    peaks = Peaks(1, gflops=100.0, gbytes=10.0)
    assert peaks.bound(1e11, 1.0) == 1.0
    assert peaks.bound(1.0, 1e11) == 10.0


def test_no_product_of_numpy_is_above_the_measured_peak() -> None:
    peaks = measure_peaks(1)
    n = 512
    a = np.ones((n, n), np.float32)
    out = np.empty_like(a)
    start = time.process_time()  # of all threads of BLAS together
    for _ in range(8):
        np.matmul(a, a, out=out)
    rate = 8 * 2 * n**3 / (time.process_time() - start) * 1e-9
    assert rate < 1.5 * peaks.gflops  # clocks move
    assert peaks.gbytes > 0.1
