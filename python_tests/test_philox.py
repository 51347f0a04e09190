"""Philox4x32-10: published vectors, the numbering of draws, the distribution of normals."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from flame_ext import _core

# Random123 1.14, tests/kat_vectors, "philox4x32 10": counter, key, expected block.
KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_published_vectors(counter, key, expected):
    block = _core.philox4x32(np.array([counter], np.uint32), np.array([key], np.uint32))
    assert block.tolist() == [list(expected)]


def test_draws_are_numbered_as_documented():
    seed, stream, offset = 0x1234567890ABCDEF, 0xFEDCBA0987654321, 0xFFFFFFFE
    bits = _core.philox_bits(seed, stream, offset, 11)
    blocks = [offset + i for i in range(3)]  # the counter carries into its second word
    words = (2**32 - 1) & np.array(
        [[b, b >> 32, stream, stream >> 32] for b in blocks], dtype=object
    )
    key = np.array([[seed & 0xFFFFFFFF, seed >> 32]] * 3, np.uint32)
    expected = _core.philox4x32(words.astype(np.uint32), key).ravel()[:11]
    np.testing.assert_array_equal(bits, expected)


@pytest.mark.parametrize("draw", [_core.philox_bits, _core.philox_uniform, _core.philox_normal])
def test_offset_skips_four_draws(draw):
    np.testing.assert_array_equal(draw(7, 1, 5, 37)[8:], draw(7, 1, 7, 29))


def test_uniform_is_open_interval_and_uniform():
    u = _core.philox_uniform(3, 0, 0, 200_000)
    assert u.dtype == np.float32
    assert 0.0 < u.min() < u.max() < 1.0
    assert stats.kstest(u, "uniform").pvalue > 1e-3


def test_normals_follow_box_muller_of_the_bits():
    n = 200_000
    bits = _core.philox_bits(11, 5, 0, n).astype(np.float64).reshape(-1, 2)
    u = (2 * (bits[:, 0].astype(np.uint64) >> 9) + 1) / 2**24
    radius = np.sqrt(-2 * np.log(u))
    angle = 2 * np.pi * bits[:, 1] / 2**32
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()
    normal = _core.philox_normal(11, 5, 0, n)
    assert normal.dtype == np.float32
    assert np.abs(normal - expected).max() < 2e-6
    assert stats.kstest(normal, "norm").pvalue > 1e-3


def test_streams_and_seeds_are_independent():
    base = _core.philox_normal(1, 0, 0, 50_000)
    for other in (_core.philox_normal(2, 0, 0, 50_000), _core.philox_normal(1, 1, 0, 50_000)):
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.03


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="n is -1"):
        _core.philox_normal(0, 0, 0, -1)
    with pytest.raises(ValueError, match=r"counters \(n, 4\)"):
        _core.philox4x32(np.zeros((2, 4), np.uint32), np.zeros((1, 2), np.uint32))


@pytest.mark.gpu
def test_device_draws_equal_host_draws_bit_for_bit():
    import torch

    n = 100_003
    stream = torch.cuda.current_stream().cuda_stream
    bits = torch.empty(n, dtype=torch.int32, device="cuda")
    normal = torch.empty(n, dtype=torch.float32, device="cuda")
    _core.cuda_philox_bits(9, 8, 7, n, bits.data_ptr(), stream)
    _core.cuda_philox_normal(9, 8, 7, n, normal.data_ptr(), stream)
    host_bits = _core.philox_bits(9, 8, 7, n)
    np.testing.assert_array_equal(bits.cpu().numpy().view(np.uint32), host_bits)
    host = _core.philox_normal(9, 8, 7, n)
    np.testing.assert_array_equal(normal.cpu().numpy().view(np.uint32), host.view(np.uint32))
