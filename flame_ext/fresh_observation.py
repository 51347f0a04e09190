"""Observations that environments may not write to afterwards."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec


class FreshObservation(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Copies observations, for environments that return one array again and again.

    Gymnasium keeps the last observation of an episode by reference while it resets: such an
    environment would overwrite what the critic bootstraps from at a time limit.
    """

    def step(self, action: Any) -> Any:
        """As of the environment, with an observation of its own."""
        obs, *rest = self.env.step(action)
        return np.array(obs), *rest

    @property
    def spec(self) -> EnvSpec | None:  # type: ignore[override]
        """The environment's own: this wrapper does not make it another one."""
        return self.env.spec
