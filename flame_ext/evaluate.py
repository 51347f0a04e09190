"""Episodes with a fixed policy."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flame_ext.env_handle import VectorEnvHandle
from flame_ext.errors import FlameError

# Episodes run side by side, so that the policy acts on a batch; how many decides the start states.
MAX_EVAL_ENVS = 10
# An episode of so many steps is taken for one that never ends.
MAX_EPISODE_STEPS = 100_000

ActFunction = Callable[[NDArray[np.float32]], NDArray[Any]]


@dataclass(frozen=True)
class Evaluation:
    """Returns of complete episodes.

    Attributes:
        step: Environment steps trained so far.
        wall_time: Seconds of training so far, over all processes of a resumed run.
        returns: Undiscounted return of each episode.
        lengths: Steps of each episode.
    """

    step: int
    wall_time: float
    returns: tuple[float, ...]
    lengths: tuple[int, ...]

    @property
    def mean_return(self) -> float:
        """Mean over episodes."""
        return float(np.mean(self.returns))

    @property
    def std_return(self) -> float:
        """Standard deviation over episodes."""
        return float(np.std(self.returns))

    @property
    def mean_length(self) -> float:
        """Mean steps per episode."""
        return float(np.mean(self.lengths))


def run_episodes(
    env: VectorEnvHandle,
    act: ActFunction,
    episodes: int,
    *,
    seed: int | None = None,
    interrupted: threading.Event | None = None,
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Returns and lengths of `episodes` complete episodes.

    Every environment plays the same number of episodes (the last ones one fewer), so that short
    episodes are not counted more often than long ones.

    Args:
        env: Environments to play in.
        act: Maps observations ``(n, O)`` to actions ``(n, A)`` in [-1, 1].
        episodes: How many.
        seed: Reset seed.
        interrupted: Ends the episodes at their next step.

    Raises:
        FlameError: If an episode does not end.
        KeyboardInterrupt: If `interrupted` was set.
    """
    quota = [len(range(i, episodes, env.num_envs)) for i in range(env.num_envs)]
    returns: list[float] = []
    lengths: list[int] = []
    obs = env.reset(seed)
    while any(quota):
        check_ends(env)
        if interrupted is not None and interrupted.is_set():
            raise KeyboardInterrupt
        step = env.step(act(obs))
        finished = np.flatnonzero(step.terminated | step.truncated)
        results = zip(finished, step.episode_returns, step.episode_lengths, strict=True)
        for index, episode_return, length in results:
            if quota[index]:
                quota[index] -= 1
                returns.append(episode_return)
                lengths.append(length)
        obs = step.obs
    return tuple(returns), tuple(lengths)


def check_ends(env: VectorEnvHandle) -> None:
    """Raises FlameError if an evaluation's episode seems to have no end."""
    if env.longest_running >= MAX_EPISODE_STEPS:
        raise FlameError(
            f"an evaluation's episode has not ended after {MAX_EPISODE_STEPS:,} steps. Give "
            "the environment a time limit, as by gymnasium.wrappers.TimeLimit; what was learned is "
            "saved and goes on with Trainer.resume(run_dir, env=...)."
        )
