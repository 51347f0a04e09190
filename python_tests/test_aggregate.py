"""The statistics of the learning benchmarks, against values worked out by hand."""

import numpy as np
import pytest
from aggregate import bootstrap, interquartile_mean, probability_of_improvement, ratio


def test_the_interquartile_mean_leaves_out_a_quarter_on_either_side() -> None:
    scores = np.array([[1.0, 2.0, 3.0, 100.0], [-50.0, 4.0, 5.0, 6.0]])
    assert interquartile_mean(scores) == (2 + 3 + 4 + 5) / 4


def test_the_probability_of_improvement_averages_pairs_within_tasks() -> None:
    ours, theirs = np.array([[1.0, 3.0], [5.0, 5.0]]), np.array([[2.0, 0.0], [5.0, 9.0]])
    first = 3 / 4  # 1 < 2, 1 > 0, 3 > 2, 3 > 0
    second = (0.5 + 0 + 0.5 + 0) / 4  # ties count half
    assert probability_of_improvement(ours, theirs) == (first + second) / 2


def test_the_bootstrap_resamples_within_tasks() -> None:
    """Tasks of equal seeds leave nothing to resample, however far apart they are."""
    scores = np.array([[1.0, 1.0, 1.0], [9.0, 9.0, 9.0]])
    assert bootstrap(np.mean, scores).interval == (5, 5)


def test_the_bootstrap_interval_is_that_of_the_mean() -> None:
    scores = np.random.default_rng(0).normal(3.0, 2.0, (1, 400))
    estimate = bootstrap(np.mean, scores)
    assert estimate.interval is not None
    low, high = estimate.interval
    assert low < scores.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * 2.0 / 20, rel=0.1)


def test_one_seed_has_no_interval() -> None:
    assert str(bootstrap(np.mean, np.array([[2.0], [4.0]]))) == "3.00 [one seed]"


def test_ratios_are_to_the_baselines_mean_on_the_same_task() -> None:
    ours, baseline = np.array([[2.0, 4.0], [30.0, 60.0]]), np.array([[1.0, 3.0], [10.0, 20.0]])
    assert np.array_equal(ratio(ours, baseline), [[1, 2], [2, 4]])


def test_the_bootstrap_resamples_each_task_by_itself() -> None:
    """One draw of seeds for both of these tasks would leave their mean where it is."""

    scores = np.array([[0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.0]])
    low, high = bootstrap(np.mean, scores).interval
    assert low < 1.2 < 1.8 < high
