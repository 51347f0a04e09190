"""How far the critics' values are from the returns that the policy then collects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from flame_ext.evaluate import check_ends
from flame_ext.policies.base import normal_like
from flame_ext.trainer import Trainer

FloatArray = NDArray[np.float64]

# Of an episode that is cut off, the steps within so many horizons 1 / (1 - gamma) of its end are
# left out: their returns would be mostly the critics' own value of the last state.
_HORIZONS = 3


@dataclass(frozen=True)
class ValueBias:
    """Values of the policy's own actions beside their returns, in units of scaled rewards.

    Attributes:
        value: Mean Qmin(s, a).
        discounted_return: Mean return from (s, a) on, with entropies where the TD target has them.
        error: Root mean square of their differences.
    """

    value: float
    discounted_return: float
    error: float


def measure_value_bias(episodes: Sequence[Episode], gamma: float) -> ValueBias | None:
    """Compares values with returns, step by step.

    Args:
        episodes: Of `play_episodes`.
        gamma: Discount factor per step.

    Returns:
        None where episodes are cut off too early to tell.
    """
    horizon = round(_HORIZONS / (1 - gamma)) if gamma < 1 else 0
    values: list[FloatArray] = []
    returns: list[FloatArray] = []
    for episode in episodes:
        kept = max(len(episode.values) - (horizon if episode.truncated else 0), 0)
        values.append(np.array(episode.values[:kept]))
        returns.append(episode.returns(gamma)[:kept])
    value, after = np.concatenate(values), np.concatenate(returns)
    if not len(value):
        return None
    error = np.sqrt(np.mean((value - after) ** 2))
    return ValueBias(float(value.mean()), float(after.mean()), float(error))


@dataclass
class Episode:
    """What each step of one episode gave.

    Attributes:
        values: Qmin(s, a).
        rewards: Scaled.
        entropies: -alpha log pi(a | s) where the TD target has it, else 0.
        end_value: Soft value of the state that a time limit cut off; 0 if the episode terminated.
        truncated: Whether a time limit cut it off.
    """

    values: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    end_value: float = 0.0
    truncated: bool = False

    def returns(self, gamma: float) -> FloatArray:
        """What Q(s, a) estimates in every step; a step's own entropy is no part of it."""
        following = self.end_value
        returns = np.empty(len(self.rewards))
        for step in reversed(range(len(returns))):
            returns[step] = self.rewards[step] + gamma * following
            following = returns[step] + self.entropies[step]
        return returns


def play_episodes(trainer: Trainer, seed: int) -> list[Episode]:
    """One episode per evaluation environment, played as the TD target takes actions.

    That is with samples of the policy that is trained, the best of `target_particles`.

    Args:
        trainer: The run.
        seed: Decides episodes and samples.

    Raises:
        FlameError: If an episode does not end.
    """
    env = trainer.eval_env
    generator = torch.Generator(trainer.device).manual_seed(seed)
    episodes = [Episode() for _ in range(env.num_envs)]
    running = np.ones(env.num_envs, dtype=bool)
    obs = env.reset(seed)
    while running.any():
        check_ends(env)
        action, value, entropy = _act(trainer, obs, generator)
        step = env.step(action)
        reward = trainer.config.reward_scale * step.reward
        for i in np.flatnonzero(running):
            episodes[i].values.append(float(value[i]))
            episodes[i].rewards.append(float(reward[i]))
            episodes[i].entropies.append(float(entropy[i]))
        cut_off = running & step.truncated & ~step.terminated
        if cut_off.any():
            _, value, entropy = _act(trainer, step.next_obs, generator)
            for i in np.flatnonzero(cut_off):
                episodes[i].truncated, episodes[i].end_value = True, float(value[i] + entropy[i])
        running &= ~(step.terminated | step.truncated)
        obs = step.obs
    return episodes


@torch.no_grad()
def _act(
    trainer: Trainer, obs: NDArray[np.float32], generator: torch.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """What `td_target` takes in each state, its Qmin, and its part of the soft value."""
    agent = trainer.agent
    states = agent.critics.observe(trainer.to_agent(obs))
    shape = (len(states), trainer.config.target_particles, agent.action_dim)
    noise = normal_like(states, shape, generator)
    action = agent.actor.best_action(agent.critics, states, noise)
    value = agent.critics.q_min(states, action)
    entropy = torch.zeros_like(value)
    if trainer.config.entropy_in_target:
        log_prob = agent.actor.sample(states, noise[:, 0], generator).log_prob
        entropy = -agent.temperature.alpha * log_prob
    return action.cpu().numpy(), value.cpu().numpy(), entropy.cpu().numpy()
