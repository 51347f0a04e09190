"""Holds a policy while whole episodes judge it, and tells when it is the best so far.

A policy that learns may walk after one update and fall after the next. The episodes that are
collected anyway tell which, if the policy stays as it is while they last (policy checkpoints;
Fujimoto et al. 2023, arXiv 2306.02451, Sec. 4.3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flame_ext.env_handle import StepResult


class PolicyAssessment:
    """Judges every policy by the worst of its episodes.

    Args:
        episodes: Episodes that a policy is held for; fewer once one of them is worse than the best
            policy's worst.
        num_envs: Environments stepped side by side, n.

    Attributes:
        holds: Whether the policy has to stay as it is.
        best_return: Worst return of the best policy so far; -inf before there is one.
    """

    def __init__(self, episodes: int, num_envs: int) -> None:
        self.holds = False
        self.best_return = float("-inf")
        self._episodes = episodes
        self._returns: list[float] = []
        # Whether the episode of an environment was begun by the policy that is being judged.
        self._whole: NDArray[np.bool_] = np.zeros(num_envs, np.bool_)

    def add(self, step: StepResult) -> bool:
        """Takes what a step of the environments gave.

        Returns:
            Whether the policy that acted has just shown to be the best so far.
        """
        ended = step.terminated | step.truncated
        whole = self._whole[ended]
        self._returns += [r for r, w in zip(step.episode_returns, whole, strict=True) if w]
        self._whole |= ended
        worst = min(self._returns, default=self.best_return)
        self.holds = worst >= self.best_return and len(self._returns) < self._episodes
        if self.holds:
            return False
        self._returns.clear()
        self._whole = ended  # the episodes that the next policy begins
        is_best = worst >= self.best_return
        self.best_return = max(worst, self.best_return)
        return is_best

    def state_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        return {
            "holds": self.holds,
            "best_return": self.best_return,
            "returns": list(self._returns),
            "whole": self._whole.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`."""
        self.holds, self.best_return = state["holds"], state["best_return"]
        self._returns = list(state["returns"])
        self._whole = np.array(state["whole"], np.bool_)
