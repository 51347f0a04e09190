"""Observations as the space says, which environments may not write to afterwards."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from flame_ext.errors import EnvironmentDataError


class FreshObservation(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Copies observations, for environments that return one array again and again.

    Gymnasium keeps the last observation of an episode by reference while it resets: such an
    environment would overwrite what the critic bootstraps from at a time limit. Infos, which
    nobody reads, are left out: Gymnasium joins those of several environments and so asks for equal
    kinds and sizes in every step.
    """

    def reset(self, **options: Any) -> Any:
        """As of the environment, with an observation of its own."""
        obs, _ = self.env.reset(**options)
        return self._copy(self.observation_space, obs), {}

    def step(self, action: Any) -> Any:
        """As of the environment, with an observation of its own."""
        obs, reward, terminated, truncated, _ = self.env.step(action)
        shape = np.asarray(reward).shape
        if shape:
            self._refuse("reward", shape, ())
        return self._copy(self.observation_space, obs), reward, terminated, truncated, {}

    def _copy(self, space: spaces.Space[Any], obs: Any) -> Any:
        if isinstance(space, spaces.Dict):
            return {key: self._copy(part, obs[key]) for key, part in space.items()}
        if isinstance(space, spaces.Tuple):
            return tuple(self._copy(part, obs[i]) for i, part in enumerate(space.spaces))
        own = np.array(obs)
        if own.shape != space.shape:
            self._refuse("observation", own.shape, space.shape)
        return own

    def _refuse(self, what: str, given: object, expected: object) -> None:
        raise EnvironmentDataError(
            f"{self.env} returned {what} of shape {given}; it must be {expected}"
        )

    @property
    def spec(self) -> EnvSpec | None:  # type: ignore[override]
        """The environment's own: this wrapper does not make it another one."""
        return self.env.spec
