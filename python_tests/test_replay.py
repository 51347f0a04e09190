"""Replay buffer and observation normaliser."""

import numpy as np
import pytest
import torch

from flame_ext.normalizer import ObservationNormalizer
from flame_ext.replay import ReplayBuffer


def fill(buffer: ReplayBuffer, start: int, count: int) -> None:
    ids = np.arange(start, start + count, dtype=np.float32)
    buffer.add(
        np.stack([ids, ids + 0.25], 1),
        ids[:, None],
        -ids,
        (ids % 2).astype(bool),
        -ids[:, None] * np.ones((1, 2), np.float32),
    )


def test_rows_come_back_whole_and_the_oldest_are_overwritten() -> None:
    buffer = ReplayBuffer(10, 2, 1)
    fill(buffer, 0, 8)
    fill(buffer, 8, 6)
    assert buffer.size == 10
    batch = buffer.sample(500, torch.Generator().manual_seed(0), 0.9)
    ids = batch.action[:, 0]
    assert set(ids.tolist()) == set(range(4, 14))
    torch.testing.assert_close(batch.obs, torch.stack([ids, ids + 0.25], 1))
    torch.testing.assert_close(batch.reward, -ids)
    torch.testing.assert_close(batch.discount, 0.9 * (1 - ids % 2))
    torch.testing.assert_close(batch.next_obs, -ids.unsqueeze(1).expand(-1, 2))


@pytest.mark.parametrize(
    ("counts", "kept"),
    [((8,), range(8)), ((8, 6, 3), range(7, 17)), ((8, 2, 3), range(3, 13))],
)
def test_what_is_sampled_are_the_latest_rows(counts: tuple[int, ...], kept: range) -> None:
    buffer, start = ReplayBuffer(10, 2, 1), 0
    buffer._rows.fill_(-1)
    for count in counts:
        fill(buffer, start, count)
        start += count
    batch = buffer.sample(500, torch.Generator().manual_seed(0), 0.9)
    assert set(batch.action[:, 0].tolist()) == set(kept)


def test_a_batch_splits_into_equal_parts_only() -> None:
    buffer = ReplayBuffer(10, 2, 1)
    fill(buffer, 0, 8)
    batch = buffer.sample(6, torch.Generator().manual_seed(0), 0.9)
    parts = batch.split(3)
    assert [len(part) for part in parts] == [2, 2, 2]
    for name in ("obs", "action", "reward", "discount", "next_obs"):
        together = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(together, getattr(batch, name)), name
    with pytest.raises(ValueError, match="no 4 equal parts"):
        batch.split(4)


def test_state_continues_exactly() -> None:
    first = ReplayBuffer(10, 2, 1)
    fill(first, 0, 9)
    fill(first, 9, 4)
    second = ReplayBuffer(10, 2, 1)
    second.load_state_dict(first.state_dict())
    for buffer in (first, second):
        fill(buffer, 13, 4)
    batches = [b.sample(64, torch.Generator().manual_seed(1), 0.9) for b in (first, second)]
    assert torch.equal(batches[0].obs, batches[1].obs)


def test_refuses_empty_and_foreign_state() -> None:
    with pytest.raises(ValueError, match="buffer is empty"):
        ReplayBuffer(10, 2, 1).sample(1, torch.Generator(), 0.9)
    other = ReplayBuffer(10, 3, 1)
    with pytest.raises(ValueError, match="another environment"):
        other.load_state_dict(ReplayBuffer(10, 2, 1).state_dict())


def test_normalizer_matches_numpy_in_any_chunks() -> None:
    data = np.random.default_rng(0).normal(5.0, [1.0, 100.0, 0.01], (1000, 3))
    normalizer = ObservationNormalizer(3)
    for chunk in np.split(data.astype(np.float32), [1, 7, 300]):
        normalizer.update(chunk)
    shift, scale = normalizer.shift_and_scale()
    np.testing.assert_allclose(shift, data.mean(0), rtol=1e-5)
    np.testing.assert_allclose(1 / scale, data.std(0), rtol=1e-3)
    out = normalizer(torch.from_numpy(data.astype(np.float32)))
    np.testing.assert_allclose(out.std(0).numpy(), 1, rtol=1e-2)
    copy = ObservationNormalizer(3)
    copy.load_state_dict(normalizer.state_dict())
    assert torch.equal(copy(out), normalizer(out))


def test_constant_observations_stay_finite_and_outliers_are_clipped() -> None:
    normalizer = ObservationNormalizer(2)
    normalizer.update(np.array([[3, -1], [3, 1]] * 10, np.float32))
    found = normalizer(torch.tensor([[3.0, 1e6], [3.0, -1e6]]))
    assert torch.equal(found, torch.tensor([[0.0, 10.0], [0.0, -10.0]]))


def _fill(buffer: object, count: int) -> None:
    ids = np.arange(count, dtype=np.float32)
    rows = np.stack([ids, ids], 1)
    buffer.add(rows, ids[:, None], ids, np.zeros(count, bool), rows)  # type: ignore[attr-defined]


def test_more_rows_than_fit_are_refused() -> None:
    large = ReplayBuffer(10, 2, 1)
    _fill(large, 10)
    with pytest.raises(ValueError, match="buffer_size"):
        ReplayBuffer(9, 2, 1).load_state_dict(large.state_dict())


def test_one_observation_has_no_variance_yet() -> None:
    normalizer = ObservationNormalizer(2)
    normalizer.update(np.array([[3.0, -1.0]], np.float32))
    assert torch.allclose(normalizer(torch.tensor([[4.0, -1.5]])), torch.tensor([[1.0, -0.5]]))


def test_a_loaded_state_is_not_changed_by_what_is_seen_later() -> None:
    first, second = ObservationNormalizer(2), ObservationNormalizer(2)
    first.update(np.random.default_rng(0).normal(size=(20, 2)))
    state = first.state_dict()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    second.load_state_dict(state)
    second.update(np.full((5, 2), 9.0))
    assert all(torch.equal(state[name], kept[name]) for name in kept)
