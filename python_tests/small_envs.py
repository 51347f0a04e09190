"""Environments whose every value is known."""

import gymnasium
import numpy as np
from gymnasium import spaces


class Counter(gymnasium.Env):
    """Counts its steps; ends after `length`; its reward is 10 * the count."""

    def __init__(self, length=3, truncate=False, low=-1.0, high=1.0, poison=None):
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = spaces.Box(low, high, (2,), np.float32)
        self.length, self.truncate, self.poison = length, truncate, poison
        self.count, self.episode = 0, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed, options=options)
        self.count, self.episode = 0, self.episode + 1
        return self._obs(), {}

    def step(self, action):
        self.action = np.array(action)
        self.count += 1
        done = self.count == self.length
        obs, reward = self._obs(), 10.0 * self.count
        if self.poison == "obs":
            obs[1] = np.nan
        elif self.poison == "overflow":
            obs[0] = 1e300
        elif self.poison == "reward":
            reward = np.inf
        elif self.poison == "final" and done:
            obs[0] = -np.inf
        return obs, reward, done and not self.truncate, done and self.truncate, {}

    def _obs(self):
        return np.array([self.count, self.episode], dtype=np.float64)


class Reusing(Counter):
    """Returns one array again and again."""

    def _obs(self):
        self.shared = getattr(self, "shared", np.zeros(2))
        self.shared[:] = self.count, self.episode
        return self.shared


class Counting(gymnasium.Env):  # type: ignore[type-arg]
    """Observes how many steps it has made; truncated after 7, never terminated."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):  # type: ignore[no-untyped-def]
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):  # type: ignore[no-untyped-def]
        self.steps += 1
        obs = np.array([self.steps], np.float32)
        return obs, 1.0, False, self.steps == 7, {}
