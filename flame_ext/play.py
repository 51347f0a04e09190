"""Playing with saved policies: episodes and films, behind ``flame-ext eval``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flame_ext.envs import VectorEnvHandle, make_eval_env, make_vector_env
from flame_ext.evaluate import MAX_EVAL_ENVS, run_episodes
from flame_ext.policy import Policy

_FRAMES_PER_SECOND = 30  # of an environment that does not say


@dataclass(frozen=True)
class Acting:
    """How a policy is used.

    Attributes:
        num_particles: Best of N by Qmin.
        deterministic: Whether equal observations get equal actions.
    """

    num_particles: int = 1
    deterministic: bool = True


def evaluate_policy(
    policy: Policy,
    env_id: str,
    episodes: int,
    acting: Acting,
    *,
    seed: int = 0,
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Returns and lengths of ``episodes`` episodes, up to `MAX_EVAL_ENVS` side by side.

    Args:
        policy: The policy, for the sizes of this environment.
        env_id: A registered Gymnasium id.
        episodes: How many; at least 1.
        acting: How the policy is used.
        seed: Decides the episodes.

    Raises:
        ValueError: If the environment is unknown or its sizes are not the policy's.
    """
    env = make_vector_env(env_id, num_envs=min(episodes, MAX_EVAL_ENVS), seed=seed)
    try:
        act = _unit_actions(policy, env, acting)
        return run_episodes(env, act, episodes, seed=seed)
    finally:
        env.close()


def film_episode(
    policy: Policy,
    env_id: str,
    path: Path,
    acting: Acting,
    *,
    seed: int = 0,
) -> None:
    """Write one episode as a video; arguments as for `evaluate_policy`.

    Raises:
        ImportError: If the packages for this format are missing.
        ValueError: If the environment gives no images, or the file's ending is unknown.
    """
    require_video_support(path)
    from imageio import v2 as imageio

    with _rendering(env_id):
        env = make_eval_env(env_id, seed=seed, render_mode="rgb_array")
    try:
        act = _unit_actions(policy, env, acting)
        rate = env.vector.metadata.get("render_fps", _FRAMES_PER_SECOND)
        # A GIF counts milliseconds per frame, a film frames per second.
        timing = {"duration": 1000 / rate} if path.suffix.lower() == ".gif" else {"fps": rate}
        obs, done = env.reset(seed), False
        with _rendering(env_id):
            frame = env.render()
        path.parent.mkdir(parents=True, exist_ok=True)
        writer: Any = imageio.get_writer(path, **timing)
        with writer:
            writer.append_data(frame)
            while not done:
                step = env.step(act(obs))
                obs, done = step.obs, bool(step.terminated[0] or step.truncated[0])
                if not done:  # the next episode has begun
                    with _rendering(env_id):
                        frame = env.render()
                    writer.append_data(frame)
    finally:
        env.close()


@contextmanager
def _rendering(env_id: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Drivers and simulators raise what they like.
        raise ValueError(
            f"{env_id} cannot be rendered here: {error}. It must take render_mode='rgb_array'; "
            "without a display MuJoCo needs MUJOCO_GL=egl (with a GPU) or MUJOCO_GL=osmesa (with "
            "libOSMesa)."
        ) from error


def require_video_support(path: Path) -> None:
    """Raise before any episode is played if a video cannot be written to ``path``.

    Raises:
        ValueError: If the ending is neither .mp4 nor .gif.
        ImportError: If imageio, or imageio-ffmpeg for .mp4, is not installed.
    """
    if path.suffix.lower() not in (".mp4", ".gif"):
        raise ValueError(f"the video {str(path)!r} has an unknown ending; use .mp4 or .gif.")
    try:
        importlib.import_module("imageio")
        if path.suffix.lower() == ".mp4":
            importlib.import_module("imageio_ffmpeg")
    except ImportError as error:
        raise ImportError(
            f"writing {path} needs a package that is not installed ({error}); run "
            "`pip install imageio imageio-ffmpeg`, or write a .gif."
        ) from error


def _unit_actions(
    policy: Policy, env: VectorEnvHandle, acting: Acting
) -> Callable[[NDArray[np.float32]], NDArray[np.float64]]:
    """The policy as a function onto [-1, 1], which is what environment handles take."""
    sizes = (policy.spec.obs_dim, policy.spec.action_dim)
    if sizes != (env.obs_dim, env.action_dim):
        raise ValueError(
            f"the policy takes {sizes[0]} observations and gives {sizes[1]} actions; "
            f"{env.spec_id} has {env.obs_dim} and {env.action_dim}. Use the run's environment."
        )

    def act(obs: NDArray[np.float32]) -> NDArray[np.float64]:
        action = policy.act(obs, acting.num_particles, acting.deterministic)
        return policy.spec.unit_action(action)

    return act
