"""Acting through the native CPU kernels: one call, numpy in and out, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flame_ext.native import load_core
from flame_ext.policy import Array, PolicySpec, Precision
from flame_ext.sampling import (
    EMBEDDING_ACTIVATION,
    EMBEDDING_MIN_SCALE,
    LOG_STD_RANGE,
    OBSERVATION_CLIP,
    sampler_steps,
    step_rows,
    time_feature_rows,
)


class NativeActingEngine:
    """Implements `flame_ext.policy.ActingEngine`; immutable, so any number of threads may act.

    Args:
        spec: What the policy is.
        tensors: Its weights.
        seed: Seeds the kernels' Philox draws.
        precision: How weights are stored; 16 bits halve what a batch-1 action has to read, and bf16
            is the cheaper one to read, fp16 the more exact.

    Raises:
        ImportError: If the native module does not load.
        ValueError: If a weight is out of the precision's range.
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
        self._seed = seed
        self._packed = _pack_policy(spec, tensors, precision)

    def act(
        self, obs: NDArray[Any], noise: Array | None, num_particles: int, draw: int
    ) -> NDArray[np.float32]:
        action: NDArray[np.float32] = self._packed.act(obs, noise, num_particles, self._seed, draw)
        return action

    def q_min(self, obs: NDArray[Any], action: Array) -> NDArray[np.float32]:
        q: NDArray[np.float32] = self._packed.q_min(obs, action)
        return q


def _pack_policy(spec: PolicySpec, tensors: Mapping[str, Array], precision: Precision) -> Any:
    """The kernels' form of a policy."""
    options = spec.config
    return load_core().PackedPolicy(
        kind="gaussian" if spec.algorithm == "sac" else "flow",
        obs_dim=spec.obs_dim,
        action_dim=spec.action_dim,
        policy=tensors["actor.flat"],
        hidden=list(options["hidden_sizes"]),
        activation=options["policy_activation"],
        layer_norm=options["policy_layer_norm"],
        **_sampler_arguments(spec),
        log_std_range=LOG_STD_RANGE,
        critics=tensors["critics.flat"],
        critic_hidden=list(options["hidden_sizes"]),
        critic_activation=options["critic_activation"],
        critic_layer_norm=options["critic_layer_norm"],
        state_encoder=tensors.get("state_encoder.flat"),
        pair_encoder=tensors.get("pair_encoder.flat"),
        encoder_hidden=list(options["hidden_sizes"]),
        encoder_activation=EMBEDDING_ACTIVATION,
        embedding_dim=options.get("embedding_dim", 0),
        embedding_min_scale=EMBEDDING_MIN_SCALE,
        precision=precision,
        obs_shift=tensors.get("normalizer.shift"),
        obs_scale=tensors.get("normalizer.scale"),
        obs_clip=OBSERVATION_CLIP,
        action_low=np.asarray(spec.action_low, np.float32),
        action_high=np.asarray(spec.action_high, np.float32),
    )


def _sampler_arguments(spec: PolicySpec) -> dict[str, Any]:
    if spec.algorithm == "sac":
        return {}
    options = spec.config
    table = sampler_steps(spec.algorithm, options["sampling_steps"], options["flow"])
    return {"time_features": time_feature_rows(table), "steps": step_rows(table)}
