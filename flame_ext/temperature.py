"""The entropy temperature and the rules that move it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flame_ext.config import Config

# Outside these bounds a temperature is a failure to be seen in the log, not followed.
MIN_ALPHA, MAX_ALPHA = 1e-5, 1e2

# torch.optim.Adam's defaults.
_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8


class Temperature:
    """Alpha, moved so that the entropy, or the effective sample size, nears its target.

    (Haarnoja et al. 2018b, Eq. 18, on log alpha.) Plain numbers and Adam written out: for one
    scalar the calls into a tensor library cost a hundred times the arithmetic.

    Args:
        config: Options of the algorithm.
        action_dim: A; the target entropy is proportional to it.

    Attributes:
        log_alpha: Logarithm of the temperature.
        target_entropy: In nats.
    """

    def __init__(self, config: Config, action_dim: int) -> None:
        self._config = config
        self.log_alpha = math.log(config.initial_alpha)
        self.target_entropy = config.target_entropy_scale * action_dim
        self._steps, self._mean, self._square = 0, 0.0, 0.0

    @property
    def alpha(self) -> float:
        """The temperature."""
        return math.exp(self.log_alpha)

    def step(self, entropy: float | None, ess: float | None) -> None:
        """One Adam step of log alpha; none if the rule's measurement is missing.

        Args:
            entropy: Mean -log pi(a | s) of the policy, in nats.
            ess: Mean effective sample size as a fraction of the candidates.
        """
        c = self._config
        if c.temperature == "entropy" and entropy is not None:
            excess = entropy - self.target_entropy
        elif c.temperature == "ess" and ess is not None:
            excess = ess - c.target_ess
        else:
            return
        # d/d(log alpha) of log_alpha * excess: too much entropy or too even weights lower alpha.
        self._steps += 1
        self._mean += (1 - _BETA1) * (excess - self._mean)
        self._square += (1 - _BETA2) * (excess * excess - self._square)
        mean = self._mean / (1 - _BETA1**self._steps)
        deviation = math.sqrt(self._square / (1 - _BETA2**self._steps))
        moved = self.log_alpha - c.alpha_learning_rate * mean / (deviation + _EPSILON)
        self.log_alpha = min(max(moved, math.log(MIN_ALPHA)), math.log(MAX_ALPHA))

    def state_dict(self) -> dict[str, Tensor]:
        """What `step` goes on from."""
        state = {
            "log_alpha": self.log_alpha,
            "optimizer.alpha.step": float(self._steps),
            "optimizer.alpha.exp_avg": self._mean,
            "optimizer.alpha.exp_avg_sq": self._square,
        }
        return {name: torch.tensor(x, dtype=torch.float64) for name, x in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores `state_dict`; further entries are ignored."""
        self.log_alpha = float(state["log_alpha"])
        self._steps = int(state["optimizer.alpha.step"])
        self._mean = float(state["optimizer.alpha.exp_avg"])
        self._square = float(state["optimizer.alpha.exp_avg_sq"])
