"""Acting through the native CPU kernels: one call, numpy in and out, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flame_ext.acting.embeddings import EmbeddedCritics
from flame_ext.native import load_core
from flame_ext.policy import Array, PolicySpec, Precision, observation_rows
from flame_ext.sampling import (
    LOG_STD_RANGE,
    OBSERVATION_CLIP,
    sampler_steps,
    time_feature_rows,
)


class NativeActingEngine:
    """Implements `flame_ext.policy.ActingEngine`; immutable, so any number of threads may act.

    Args:
        spec: What the policy is.
        tensors: Its weights.
        seed: Seeds the kernels' Philox draws.
        precision: How weights are stored; float16 halves what a batch-1 action has to read.

    Raises:
        ImportError: If the native module does not load.
        ValueError: If a weight is out of float16's range.
    """

    name = "cpu"

    def __init__(
        self,
        spec: PolicySpec,
        tensors: Mapping[str, Array],
        *,
        seed: int,
        precision: Precision = "fp32",
    ) -> None:
        self._seed, self._obs_dim = seed, spec.obs_dim
        self._middle, self._half = middle, half = spec.action_middle_and_half()
        options = spec.config
        # Without embeddings everything is in the kernel's one call.
        width = options.get("embedding_dim", 0)
        self._embedded = EmbeddedCritics(spec, tensors) if width else None
        self._packed = load_core().PackedPolicy(
            kind="gaussian" if spec.algorithm == "sac" else "flow",
            obs_dim=spec.obs_dim + width,
            action_dim=spec.action_dim,
            policy=tensors["actor.flat"],
            hidden=list(options["hidden_sizes"]),
            activation=options["policy_activation"],
            layer_norm=options["policy_layer_norm"],
            **_sampler_arguments(spec),
            log_std_range=LOG_STD_RANGE,
            critics=None if width else tensors["critics.flat"],
            critic_hidden=list(options["hidden_sizes"]),
            critic_activation=options["critic_activation"],
            critic_layer_norm=options["critic_layer_norm"],
            precision=precision,
            obs_shift=None if width else tensors.get("normalizer.shift"),
            obs_scale=None if width else tensors.get("normalizer.scale"),
            obs_clip=OBSERVATION_CLIP,
            action_middle=middle.astype(np.float32),
            action_half=half.astype(np.float32),
        )

    def act(
        self, obs: NDArray[Any], noise: Array | None, num_particles: int, draw: int
    ) -> NDArray[np.float32]:
        action: NDArray[np.float32]
        if self._embedded is None:
            action = self._packed.act(obs, noise, num_particles, self._seed, draw)
            return action
        states = self._embedded.states(observation_rows(obs, self._obs_dim))
        if num_particles > 1:
            action = self._best_action(self._embedded, states, noise, num_particles, draw)
        else:
            action = self._packed.act(states, _rows_of(noise), 1, self._seed, draw)
        return action[0] if np.ndim(obs) == 1 else action

    def _best_action(
        self,
        critics: EmbeddedCritics,
        states: Array,
        noise: Array | None,
        num_particles: int,
        draw: int,
    ) -> NDArray[np.float32]:
        samples = np.repeat(states, num_particles, axis=0)
        action: NDArray[np.float32] = self._packed.act(
            samples, _rows_of(noise), 1, self._seed, draw
        )
        unit = ((action - self._middle) / self._half).astype(np.float32)
        best = critics.q_min(samples, unit).reshape(len(states), -1).argmax(1)
        chosen: NDArray[np.float32] = action.reshape(len(states), num_particles, -1)[
            np.arange(len(states)), best
        ]
        return chosen

    def q_min(self, obs: NDArray[Any], action: Array) -> NDArray[np.float32]:
        if self._embedded is not None:
            return self._embedded.q_min(self._embedded.states(obs), action)
        q: NDArray[np.float32] = self._packed.q_min(obs, action)
        return q


def _rows_of(noise: Array | None) -> Array | None:
    """``(..., A)`` as one sample for each of as many states."""
    return None if noise is None else noise.reshape(-1, 1, noise.shape[-1])


def _sampler_arguments(spec: PolicySpec) -> dict[str, Any]:
    if spec.algorithm == "sac":
        return {}
    options = spec.config
    table = sampler_steps(spec.algorithm, options["sampling_steps"], options["flow"])
    rows = [[step.p, step.q, step.m, step.n, step.clip] for step in table]
    return {"time_features": time_feature_rows(table), "steps": np.array(rows, np.float32)}
