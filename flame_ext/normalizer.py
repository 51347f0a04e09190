"""Running standardisation of observations."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flame_ext.sampling import OBSERVATION_CLIP


class ObservationNormalizer:
    """Mean and variance of every observation seen, in float64.

    Args:
        obs_dim: O.
        device: Where `__call__` computes.
    """

    def __init__(self, obs_dim: int, device: torch.device | str = "cpu") -> None:
        self._count = 0.0
        self._mean = np.zeros(obs_dim)
        self._squares = np.zeros(obs_dim)
        self._device = torch.device(device)
        self._refresh()

    def update(self, obs: np.ndarray) -> None:
        """Adds observations ``(n, O)`` (Chan, Golub and LeVeque 1979, pairwise update)."""
        batch = obs.astype(np.float64)
        count, mean = len(batch), batch.mean(axis=0)
        total = self._count + count
        delta = mean - self._mean
        self._mean += delta * count / total
        self._squares += np.square(batch - mean).sum(0) + delta**2 * self._count * count / total
        self._count = total
        self._refresh()

    def __call__(self, obs: Tensor) -> Tensor:
        """``(obs - mean) / std``, clipped to +-`OBSERVATION_CLIP`: ``(..., O)`` -> ``(..., O)``."""
        return ((obs - self._shift) * self._scale).clamp(-OBSERVATION_CLIP, OBSERVATION_CLIP)

    def shift_and_scale(self) -> tuple[np.ndarray, np.ndarray]:
        """float32 ``(O,)`` arrays with normalised = (obs - shift) * scale."""
        return self._shift.cpu().numpy(), self._scale.cpu().numpy()

    def state_dict(self) -> dict[str, Tensor]:
        """Count, mean and sum of squared deviations."""
        return {
            "count": torch.tensor(self._count, dtype=torch.float64),
            "mean": torch.from_numpy(self._mean.copy()),
            "squares": torch.from_numpy(self._squares.copy()),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores `state_dict`."""
        self._count = float(state["count"])
        self._mean = state["mean"].numpy().copy()
        self._squares = state["squares"].numpy().copy()
        self._refresh()

    def _refresh(self) -> None:
        variance = self._squares / self._count if self._count > 1 else np.ones_like(self._mean)
        scale = 1 / np.sqrt(variance + 1e-8)
        self._shift = torch.tensor(self._mean, dtype=torch.float32, device=self._device)
        self._scale = torch.tensor(scale, dtype=torch.float32, device=self._device)
