"""What several seeds on several tasks say together (Agarwal et al. 2021, arXiv 2108.13264).

Scores are ``(tasks, seeds)``, already normalised so that tasks may be pooled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A statistic with its 95 % stratified bootstrap interval; one seed has none."""

    value: float
    interval: tuple[float, float] | None

    def __str__(self) -> str:
        interval = "one seed" if self.interval is None else "{:.2f}, {:.2f}".format(*self.interval)
        return f"{self.value:.2f} [{interval}]"


def interquartile_mean(scores: Scores) -> float:
    """Mean of the middle half of all runs, Sec. 4.3."""
    return float(stats.trim_mean(scores.ravel(), 0.25))


def ratio(ours: Scores, baseline: Scores) -> Scores:
    """Scores as multiples of the baseline's mean on each task."""
    return ours / baseline.mean(axis=1, keepdims=True)


def probability_of_improvement(ours: Scores, theirs: Scores) -> float:
    """Chance that a run of ours beats one of theirs, averaged over tasks, Sec. 4.3; ties half."""
    difference = ours[:, :, None] - theirs[:, None, :]
    return float((np.sign(difference) / 2 + 0.5).mean())


def bootstrap(
    statistic: Callable[..., float], *scores: Scores, resamples: int = 5000, seed: int = 0
) -> Estimate:
    """The statistic with its interval; seeds are resampled within each task, Sec. 4.1."""
    value = statistic(*scores)
    if all(s.shape[1] == 1 for s in scores):
        return Estimate(value, None)
    rng = np.random.default_rng(seed)
    draws = [statistic(*(_resample(s, rng) for s in scores)) for _ in range(resamples)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(value, (float(low), float(high)))


def _resample(scores: Scores, rng: np.random.Generator) -> Scores:
    tasks, seeds = scores.shape
    return np.take_along_axis(scores, rng.integers(seeds, size=(tasks, seeds)), axis=1)
