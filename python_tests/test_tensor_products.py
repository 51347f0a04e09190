"""Products on tensor cores (csrc/cuda/mma.h, tensor_product.h), emulated on the host.

The emulation adds as badly as any generation of tensor cores does; that the hardware's fragments
lie as said here is seen on a device only (test_cuda_kernels.py).
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from kernel_inputs import EPS, Array, assert_as_accurate, draw, make_critics

from flame_ext import _core
from flame_ext.backends.native_views import array, mlp_spec

LANES = np.arange(32)
GROUP, IN_GROUP = LANES // 4, LANES % 4
# Rows and columns of each lane's elements as the PTX manual draws them for mma.m16n8k8 with .tf32.
A_AT = (
    np.stack([GROUP, GROUP + 8, GROUP, GROUP + 8], 1),
    np.stack([IN_GROUP, IN_GROUP, IN_GROUP + 4, IN_GROUP + 4], 1),
)
B_AT = np.stack([IN_GROUP, IN_GROUP + 4], 1), np.stack([GROUP, GROUP], 1)
D_AT = (
    np.stack([GROUP, GROUP, GROUP + 8, GROUP + 8], 1),
    np.stack([2 * IN_GROUP, 2 * IN_GROUP + 1] * 2, 1),
)
ROWS_PER_WARP = (8, 4, 2)


def to_tf32(x: Array) -> Array:
    """Eleven significant bits, to the nearest, ties away from zero."""
    return ((x.view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32)


def warp_mma(a: Array, b: Array, d: Array) -> Array:
    """(16, 8) times (8, 8) plus (16, 8), through the lanes' registers and back."""
    result = np.full((16, 8), np.nan, np.float32)
    result[D_AT] = _core.mma_on_host(a[A_AT], b[B_AT], d[D_AT])
    return result


def test_mma_fragments_lie_where_the_ptx_manual_has_them():
    a, b, d = (np.round(draw(*shape, scale=9.0)) for shape in ((16, 8), (8, 8), (16, 8)))
    assert np.array_equal(warp_mma(a, b, d), a @ b + d)


def test_mma_truncates_its_sums():
    ones = np.ones((16, 8), np.float32)
    small = np.zeros((8, 8), np.float32)
    small[0] = 1 - 2.0**-11
    start = np.full((16, 8), 2.0**24, np.float32)
    assert np.array_equal(warp_mma(ones, small, start), start)
    assert np.array_equal(warp_mma(-ones, small, -start), -start)
    small[0] = 2.0**-140
    assert np.array_equal(warp_mma(ones, small, 0 * start), np.full_like(start, 2.0**-140))


@pytest.mark.parametrize("name", ["x", "w"])
def test_a_wrong_element_shows(name):
    """Every element of a product's factors is used once, at its own place."""
    x, w = np.round(draw(31, 23, scale=9.0)), np.round(draw(9, 23, scale=9.0))
    changed = {"x": x, "w": w}[name]
    changed[5, 17] += 1
    for rows_per_warp in ROWS_PER_WARP:
        assert np.array_equal(_core.product_on_host(x, w, rows_per_warp, True), x @ w.T)


def factors(kind: str, rows: int, depth: int, columns: int) -> tuple[Array, Array]:
    x, w = draw(rows, depth, seed=1), draw(columns, depth, seed=2)
    if kind == "positive":
        x, w = np.abs(x), np.abs(w)
    if kind == "large":
        x, w = 1e3 * x, 1e6 * w
    if kind == "tiny":
        x, w = 1e-15 * x, 1e-18 * w
    if kind == "spread":
        x, w = x * np.exp(6 * draw(rows, depth, seed=3)), w * np.exp(6 * draw(columns, depth))
    if kind == "cancelling":
        x[:, depth // 2 * 2 - 1 : 0 : -2] = x[:, : depth // 2 * 2 : 2]
        w[:, depth // 2 * 2 - 1 : 0 : -2] = -w[:, : depth // 2 * 2 : 2]
        x += 1e-3 * draw(rows, depth, seed=4)
    return x.astype(np.float32), w.astype(np.float32)


KINDS = ["normal", "positive", "large", "tiny", "spread", "cancelling"]
SIZES = [
    (1, 1, 1),
    (2, 6, 8),
    (31, 17, 6),
    (33, 23, 257),
    (257, 100, 64),
    (64, 256, 256),
    (17, 512, 129),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "depth", "columns"), SIZES)
def test_products_are_as_accurate_as_float32(kind, rows, depth, columns):
    x, w = factors(kind, rows, depth, columns)
    ours = _core.product_on_host(x, w, 4, True)
    single = torch.from_numpy(x) @ torch.from_numpy(w).T
    exact = torch.from_numpy(x).double() @ torch.from_numpy(w).double().T
    if kind != "cancelling" or depth > 16:  # few small sums are exact in float32 by chance
        assert_as_accurate(ours, single, exact)
    # Every sum by the size of its own terms; float32's bound is depth / 2 roundings.
    bound = 8 * EPS * (np.abs(x).astype(np.float64) @ np.abs(w).T) + 1e-44
    assert (np.abs(ours - exact.numpy()) <= bound).all()


def test_one_tf32_product_would_not_be_accurate():
    x, w = factors("normal", 64, 256, 256)
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    rounded = to_tf32(x).astype(np.float64) @ to_tf32(w).T.astype(np.float64)
    ours = np.abs(_core.product_on_host(x, w, 4, True) - exact).max()
    assert np.abs(rounded - exact).max() > 100 * ours


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_rows_do_not_depend_on_the_tile_or_the_batch(order):
    x, w = factors("normal", 133, 100, 72)
    whole = _core.product_on_host(x, w, 8, True)
    for rows_per_warp, rows in itertools.product(ROWS_PER_WARP, (1, 2, 31, 64, 133)):
        part = _core.product_on_host(x[:rows], w, rows_per_warp, True, order=order)
        assert np.array_equal(part, whole[:rows])


def test_unaligned_weights_give_the_same_bits():
    x, w = factors("normal", 5, 100, 72)
    memory = np.zeros(w.size + 4, np.float32)
    offsets = {(memory[i : i + w.size].ctypes.data % 16, i) for i in range(4)}
    assert {left for left, _ in offsets} == {0, 4, 8, 12}
    results = []
    for _, i in offsets:
        copied = memory[i : i + w.size].reshape(w.shape)
        copied[...] = w
        results.append(_core.product_on_host(x, copied, 2, True))
    assert all(np.array_equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, None])
def test_what_is_not_finite_shows_and_stays_in_its_row_and_column(value, bits):
    if bits is not None:
        value = np.uint32(bits).view(np.float32)
    x, w = factors("normal", 40, 23, 20)
    x[7, 11] = value
    ours = _core.product_on_host(x, w, 4, True)
    assert not np.isfinite(ours[7]).any()
    assert np.isfinite(np.delete(ours, 7, 0)).all()
    x[7, 11], w[3, 22] = 0, value
    ours = _core.product_on_host(x, w, 4, True)
    assert not np.isfinite(ours[:, 3]).any()
    assert np.isfinite(np.delete(ours, 3, 1)).all()


def test_candidate_q_values_do_not_depend_on_the_tile():
    critics = make_critics(17, 6, (128,), members=1)
    obs, actions = draw(83, 17), np.tanh(draw(83, 100, 6))
    args = mlp_spec(critics), array(critics.flat)
    before = _core.isa_active()
    results = []
    for kilobytes in (227, 60, 35):  # tiles of 64, 32 and 16 rows
        _core.run_cuda_on_host("rising", kilobytes * 1024, tensor_cores=True)
        results.append(_core.twin_q(*args, obs, actions))
    results.append(_core.twin_q(*args, obs[:1], actions[:1]))
    _core.set_isa(before)
    assert all(np.array_equal(results[0], other) for other in results[1:3])
    assert np.array_equal(results[0][:1], results[3])
