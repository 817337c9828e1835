"""Attention in one kernel against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.template_harness import TARGETS, Array, call

SIZES = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 63, 64, 65, 97]))
LENGTHS = st.one_of(st.integers(1, 40), st.sampled_from([255, 256, 257, 300, 520, 777]))


def exact(q: Array, k: Array, v: Array, mask: Array | None, scale: float, causal: bool) -> Array:
    """The definition, in float64, head by head."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    batch, heads, s, _ = q.shape
    t, group = k.shape[2], heads // k.shape[1]
    y = np.zeros((batch, heads, s, v.shape[3]))
    for b in range(batch):
        for h in range(heads):
            scores = q[b, h] @ k[b, h // group].T * scale
            if mask is not None:
                scores = scores + np.broadcast_to(mask, (batch, heads, s, t))[b, h]
            if causal:
                scores[np.arange(t)[None, :] > np.arange(s)[:, None] + t - s] = -np.inf
            with np.errstate(all="ignore"):
                weights = np.exp(scores - scores.max(axis=1, keepdims=True))
                weights = weights / weights.sum(axis=1, keepdims=True)
            weights[np.isneginf(scores).all(axis=1)] = 0
            y[b, h] = weights @ v[b, h // group]
    return y


def laid_out(rng: np.random.Generator, shape: tuple[int, ...], order: str, gap: int) -> Array:
    """An array of heads [B, H, S, D] whose memory is [B, H, S, D] or [B, S, H, D], with a gap behind each row."""
    b, h, s, d = shape
    memory = rng.standard_normal((b, h, s, d + gap) if order == "heads" else (b, s, h, d + gap)).astype(np.float32)
    x = memory if order == "heads" else memory.transpose(0, 2, 1, 3)
    return x[..., :d]


def strides(x: Array) -> list[int]:
    return [step // 4 for step in x.strides]


def attend(
    q: Array, k: Array, v: Array, y: Array, mask: Array | None, scale: float, causal: bool, target: str = "cpu",
    threads: int = 1, cuts: tuple[float, ...] = (0.4,),
) -> None:  # fmt: skip
    """Run the template; the last axes of k, v and y are contiguous."""
    batch, heads, s, d = q.shape
    groups, t = k.shape[1:3]
    wide = None if mask is None else np.broadcast_to(mask, (batch, heads, s, t))
    words = {
        "Q": q, "K": k, "V": v, "Y": y, "MASK": 0 if wide is None else wide, "B": batch, "GROUPS": groups,
        "GROUP": heads // groups, "S": s, "T": t, "D": d, "DV": v.shape[3],
        "SCALE": int(np.float32(scale).view(np.int32)), "CAUSAL": int(causal),
        **dict(zip(("Q_B", "Q_H", "Q_ROW", "Q_D"), strides(q))), **dict(zip(("K_B", "K_H", "K_ROW"), strides(k))),
        **dict(zip(("V_B", "V_H", "V_ROW"), strides(v))), **dict(zip(("Y_B", "Y_H", "Y_ROW"), strides(y))),
        **({} if wide is None else dict(zip(("M_B", "M_H", "M_ROW", "M_KEY"), strides(wide)))),
    }  # fmt: skip
    constants = {"NR": 2 * TARGETS[target].vector_width}
    call("attention", constants, words, target=target, threads=threads, cuts=cuts)


def check(
    shape: tuple[int, int, int, int, int, int, int], *, order: str = "heads", gap: int = 0, masked: str = "none",
    causal: bool = False, seed: int = 0, target: str = "cpu", threads: int = 1, cuts: tuple[float, ...] = (0.4,),
    spread: float = 1.0,
) -> None:  # fmt: skip
    """Run (batch, heads of keys, group, s, t, d, dv) and compare; nothing outside the result may change."""
    batch, groups, group, s, t, d, dv = shape
    heads = groups * group
    rng = np.random.default_rng(seed)
    q = laid_out(rng, (batch, heads, s, d), order, gap) * np.float32(spread)
    k, v = laid_out(rng, (batch, groups, t, d), order, gap), laid_out(rng, (batch, groups, t, dv), order, gap)
    shapes = {"full": (batch, heads, s, t), "heads": (heads, s, t), "rows": (batch, 1, s, t), "keys": (batch, 1, 1, t),
              "keys by head": (heads, 1, t), "queries": (s, 1)}  # fmt: skip
    mask = None
    if masked != "none":
        mask = rng.standard_normal(shapes[masked]).astype(np.float32) * 3
        mask[rng.random(mask.shape) < 0.4] = rng.choice([-np.inf, np.finfo(np.float32).min, -10000])
    gap_of_y = 5
    memory = np.full((batch, s, heads, dv + gap_of_y), np.nan, np.float32)
    y = memory.transpose(0, 2, 1, 3)[..., :dv]
    scale = 1 / np.sqrt(max(d, 1))
    attend(q, k, v, y, mask, scale, causal, target, threads, cuts)
    assert np.isnan(memory[..., dv:]).all(), "wrote outside the result"
    want = exact(q, k, v, mask, scale, causal)
    bound = 2e-5 * spread if mask is None or not (mask == -10000).any() else 5e-3
    np.testing.assert_allclose(y, want, rtol=0, atol=bound * max(1.0, float(np.abs(v).max(initial=0))))


@settings(max_examples=150, deadline=None)
@given(
    batch=st.integers(1, 2), groups=st.integers(1, 3), group=st.sampled_from([1, 1, 2, 3, 8]), s=SIZES, t=LENGTHS,
    d=SIZES, dv=SIZES, order=st.sampled_from(["heads", "rows"]), gap=st.sampled_from([0, 3]),
    masked=st.sampled_from(["none", "full", "heads", "rows", "keys", "keys by head", "queries"]), causal=st.booleans(),
    threads=st.sampled_from([1, 2, 7]), cuts=st.lists(st.floats(0, 1), max_size=3).map(tuple), seed=st.integers(0, 1000),
)  # fmt: skip
def test_attention(batch, groups, group, s, t, d, dv, order, gap, masked, causal, threads, cuts, seed):
    check((batch, groups, group, s, t, d, dv), order=order, gap=gap, masked=masked, causal=causal, seed=seed,
          threads=threads, cuts=cuts)  # fmt: skip


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "cpu"])
@pytest.mark.parametrize("masked", ["none", "full", "keys"])
def test_smaller_targets(target, masked):
    check((2, 2, 3, 13, 301, 33, 21), masked=masked, target=target, threads=2)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rows", range(1, 40))
def test_last_panels(target, rows):
    """Any number of queries is left for the last panel, or taken singly; sizes with and without whole vectors."""
    d, dv = [(64, 64), (37, 90), (8, 3), (5, 33)][rows % 4]
    masked = ["none", "full", "keys"][rows % 3]
    check((1, 2, 1, rows, 530, d, dv), masked=masked, causal=rows % 2 == 1, seed=rows, target=target)


def test_queries_taken_singly_have_strides():
    """Decoding a group of heads: the queries of one position lie in different heads, at any distance."""
    rng = np.random.default_rng(5)
    q = rng.standard_normal((2, 3, 9, 4)).astype(np.float32).transpose(0, 3, 1, 2)[:, :, :1]  # [2, 4, 1, 9]
    k, v = laid_out(rng, (2, 2, 300, 9), "rows", 2), laid_out(rng, (2, 2, 300, 20), "heads", 1)
    y = np.empty((2, 4, 1, 20), np.float32)
    attend(q, k, v, y, None, 0.5, True)
    np.testing.assert_allclose(y, exact(q, k, v, None, 0.5, True), atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 2, 1, 300, 1500, 64, 64), (1, 1, 4, 1, 1000, 128, 128), (1, 1, 1, 7, 9, 256, 256)])
@pytest.mark.parametrize("threads", [1, 2])
def test_large(shape, threads):
    check(shape, threads=threads)


@pytest.mark.parametrize("shape", [(0, 1, 1, 4, 5, 6, 7), (1, 1, 1, 0, 5, 6, 7), (1, 1, 1, 4, 5, 0, 7), (1, 1, 1, 4, 5, 6, 0)])
def test_empty(shape):
    check(shape)


def test_no_keys_give_zeros():
    q, k = np.ones((1, 2, 3, 8), np.float32), np.zeros((1, 2, 0, 8), np.float32)
    y = np.full((1, 2, 3, 8), np.nan, np.float32)
    attend(q, k, k, y, None, 1.0, False)
    assert (y == 0).all()


@pytest.mark.parametrize("spread", [30.0, 1000.0])
def test_large_scores(spread):
    """Maxima that grow from block to block scale the earlier sums down, by factors that become 0."""
    check((1, 1, 1, 20, 1000, 16, 16), spread=spread)


def test_growing_scores():
    q = np.ones((1, 1, 3, 4), np.float32)
    k = np.repeat(np.arange(900, dtype=np.float32)[None, None, :, None], 4, 3)
    v = np.random.default_rng(0).standard_normal((1, 1, 900, 5)).astype(np.float32)
    y = np.empty((1, 1, 3, 5), np.float32)
    attend(q, k, v, y, None, 0.25, False)  # exact in float32
    np.testing.assert_allclose(y, exact(q, k, v, None, 0.25, False), rtol=1e-5)


def test_nan_stays_in_its_row():
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((1, 1, n, 8)).astype(np.float32) for n in (5, 300, 300))
    q[0, 0, 2, 1] = np.nan
    y = np.empty((1, 1, 5, 8), np.float32)
    attend(q, k, v, y, None, 0.3, False)
    want = exact(np.nan_to_num(q), k, v, None, 0.3, False)
    rows = [0, 1, 3, 4]
    assert np.isnan(y[0, 0, 2]).all()
    np.testing.assert_allclose(y[0, 0, rows], want[0, 0, rows], atol=1e-5)
