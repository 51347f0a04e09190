"""Acting through the native CPU kernels: one call, numpy in and out, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flame_ext.acting.embedded_critics import EmbeddedCritics
from flame_ext.native import load_core
from flame_ext.policy import Array, PolicySpec, Precision, network_observations, observation_rows
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
        self._seed, self._tensors = seed, tensors
        self._middle, self._half = middle, half = spec.action_middle_and_half()
        options = spec.config
        # Without embeddings the critics are part of the kernel's one call.
        embedded = options.get("embedding_dim", 0) > 0
        self._embedded = EmbeddedCritics(spec, tensors) if embedded else None
        self._packed = load_core().PackedPolicy(
            kind="gaussian" if spec.algorithm == "sac" else "flow",
            obs_dim=spec.obs_dim,
            action_dim=spec.action_dim,
            policy=tensors["actor.flat"],
            hidden=list(options["hidden_sizes"]),
            activation=options["policy_activation"],
            layer_norm=options["policy_layer_norm"],
            **_sampler_arguments(spec),
            log_std_range=LOG_STD_RANGE,
            critics=None if embedded else tensors["critics.flat"],
            critic_hidden=list(options["hidden_sizes"]),
            critic_activation=options["critic_activation"],
            critic_layer_norm=options["critic_layer_norm"],
            precision=precision,
            obs_shift=tensors.get("normalizer.shift"),
            obs_scale=tensors.get("normalizer.scale"),
            obs_clip=OBSERVATION_CLIP,
            action_middle=middle.astype(np.float32),
            action_half=half.astype(np.float32),
        )

    def act(
        self, obs: NDArray[Any], noise: Array | None, num_particles: int, draw: int
    ) -> NDArray[np.float32]:
        if self._embedded is not None and num_particles > 1:
            return self._best_action(self._embedded, obs, noise, num_particles, draw)
        action: NDArray[np.float32] = self._packed.act(obs, noise, num_particles, self._seed, draw)
        return action

    def _best_action(
        self,
        critics: EmbeddedCritics,
        obs: NDArray[Any],
        noise: Array | None,
        num_particles: int,
        draw: int,
    ) -> NDArray[np.float32]:
        rows = observation_rows(obs, self._packed.obs_dim)
        samples = np.repeat(rows, num_particles, axis=0)
        if noise is not None:
            noise = noise.reshape(len(samples), 1, -1)
        actions: NDArray[np.float32] = self._packed.act(samples, noise, 1, self._seed, draw)
        unit = ((actions - self._middle) / self._half).astype(np.float32)
        q = critics.q_min(network_observations(samples, self._tensors), unit)
        best = q.reshape(len(rows), -1).argmax(1)
        chosen: NDArray[np.float32] = actions.reshape(len(rows), num_particles, -1)[
            np.arange(len(rows)), best
        ]
        return chosen.reshape(np.shape(obs)[:-1] + chosen.shape[1:])

    def q_min(self, obs: NDArray[Any], action: Array) -> NDArray[np.float32]:
        if self._embedded is not None:
            return self._embedded.q_min(network_observations(obs, self._tensors), action)
        q: NDArray[np.float32] = self._packed.q_min(obs, action)
        return q


def _sampler_arguments(spec: PolicySpec) -> dict[str, Any]:
    if spec.algorithm == "sac":
        return {}
    options = spec.config
    table = sampler_steps(spec.algorithm, options["sampling_steps"], options["flow"])
    rows = [[step.p, step.q, step.m, step.n, step.clip] for step in table]
    return {"time_features": time_feature_rows(table), "steps": np.array(rows, np.float32)}
