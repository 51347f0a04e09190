"""How long a policy takes to act, behind ``flame-ext bench``."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flame_ext.policy import Policy, PolicySpec, make_engine

# Observation and action sizes of the tasks that latency is quoted for.
TASK_SIZES = {"halfcheetah": (17, 6), "humanoid": (348, 17)}
_BATCHES = (1, 256)
_QUANTILES = {"median": 0.5, "99.9 %": 0.999, "longest": 1.0}


def task_latencies(task: str = "halfcheetah", *, seconds: float = 0.3) -> str:
    """Median time of `Policy.act` with untrained networks of the default sizes, as a table.

    Args:
        task: ``halfcheetah`` (17 observations, 6 actions) or ``humanoid`` (348, 17).
        seconds: Measuring time per number.

    Raises:
        ValueError: If ``seconds`` is not positive.
    """
    obs_dim, action_dim = TASK_SIZES[task]
    cases = [("flame", 1), ("flame", 32), ("flame-r", 1), ("diffusion", 1), ("sac", 1)]
    head = f"{'policy':<12}{'evaluations':>12}{'best of':>9}"
    lines = [head + "".join(f"{f'batch {batch}':>14}" for batch in _BATCHES)]
    for algorithm, particles in cases:
        policy = untrained_policy(algorithm, obs_dim, action_dim)
        row = f"{algorithm:<12}{policy.spec.config['sampling_steps']:>12}{particles:>9}"
        for batch in _BATCHES:
            times = act_times(policy, batch, particles, seconds)
            row += f"{np.median(times) * 1e6:>11.0f} us"
        lines.append(row)
    lines.append(_described(task, policy))
    return "\n".join(lines)


def policy_latencies(policy: Policy, *, seconds: float = 0.3) -> str:
    """Time of `Policy.act`, median and tail, as a table; needs no torch.

    Args:
        policy: The policy, loaded as it will act.
        seconds: Measuring time per row.

    Raises:
        ValueError: If ``seconds`` is not positive.
    """
    lines = [f"{'batch':>5}{'best of':>9}" + "".join(f"{name:>14}" for name in _QUANTILES)]
    for batch in _BATCHES:
        for particles in (1, 32):
            times = act_times(policy, batch, particles, seconds)
            points = np.quantile(times, [*_QUANTILES.values()]) * 1e6
            row = "".join(f"{point:>11.1f} us" for point in points)
            lines.append(f"{batch:>5}{particles:>9}{row}")
    lines.append(_described(policy.algorithm, policy))
    return "\n".join(lines)


def _described(name: str, policy: Policy) -> str:
    sizes = f"{policy.spec.obs_dim} observations, {policy.spec.action_dim} actions"
    return f"{name}: {sizes}; engine {policy.backend}"


def act_times(policy: Policy, batch: int, particles: int, seconds: float) -> NDArray[np.float64]:
    """Times of single calls of `Policy.act` during `seconds`, in seconds.

    Raises:
        ValueError: If ``seconds`` is not positive.
    """
    if not seconds > 0:
        raise ValueError(f"seconds={seconds} was given; it must be positive.")
    shape = (batch, policy.spec.obs_dim) if batch > 1 else (policy.spec.obs_dim,)
    obs = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for _ in range(3):  # Caches, lazy initialisation.
        policy.act(obs, num_particles=particles)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        policy.act(obs, num_particles=particles)
        times.append(time.perf_counter() - start)
    return np.asarray(times)


def untrained_policy(
    algorithm: str, obs_dim: int, action_dim: int, preset: str = "default", **overrides: Any
) -> Policy:
    """A policy with fresh weights and the preset's options of ``algorithm``, but `overrides`."""
    from flame_ext.build import deployed_networks, make_actor, make_critics, make_encoder
    from flame_ext.config import make_config

    config = make_config(algorithm, preset, overrides)
    sizes = obs_dim, action_dim
    critics = make_critics(config, *sizes, make_encoder(config, *sizes))
    networks = deployed_networks(make_actor(config, *sizes), critics)
    spec = PolicySpec(
        algorithm=algorithm,
        config=config.to_dict(),
        obs_dim=obs_dim,
        action_dim=action_dim,
        action_low=(-1.0,) * action_dim,
        action_high=(1.0,) * action_dim,
        env_id=None,
    )
    tensors = {f"{name}.flat": net.flat.detach().numpy() for name, net in networks.items()}
    return Policy(spec, make_engine(spec, tensors))
