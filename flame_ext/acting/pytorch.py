"""Acting through PyTorch, for installations without the native module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flame_ext.config import make_config
from flame_ext.networks import Critics, FlatMLP
from flame_ext.policies import make_actor
from flame_ext.policy import Array, PolicySpec, observation_rows
from flame_ext.sampling import OBSERVATION_CLIP


class TorchActingEngine:
    """Implements `flame_ext.policy.ActingEngine`."""

    name = "torch"

    def __init__(self, spec: PolicySpec, tensors: Mapping[str, Array], *, seed: int) -> None:
        config = make_config(spec.algorithm, overrides=spec.config)
        self._actor = make_actor(config, spec.obs_dim, spec.action_dim)
        self._critics = Critics(
            spec.obs_dim,
            spec.action_dim,
            config.hidden_sizes,
            activation=config.critic_activation,
            layer_norm=config.critic_layer_norm,
        )
        _load(self._actor.network, tensors["actor.flat"])
        _load(self._critics, tensors["critics.flat"])
        self._shift, self._scale = (tensors.get(f"normalizer.{n}") for n in ("shift", "scale"))
        self._middle, self._half = spec.action_middle_and_half()
        self._seed = seed

    @torch.no_grad()
    def act(
        self, obs: NDArray[Any], noise: Array | None, num_particles: int, draw: int
    ) -> NDArray[np.float32]:
        rows = observation_rows(obs, self._actor.obs_dim)
        shape = (len(rows), num_particles, self._actor.action_dim)
        if noise is None:
            rng = np.random.default_rng((self._seed, draw))
            noise = rng.standard_normal(shape, np.float32)
        base = torch.tensor(noise).view(shape)
        unit = self._actor.best_action(self._critics, self._normalize(rows), base).numpy()
        action: NDArray[np.float32] = (self._middle + self._half * unit).astype(np.float32)
        return action[0] if np.ndim(obs) == 1 else action

    @torch.no_grad()
    def q_min(self, obs: NDArray[Any], action: Array) -> NDArray[np.float32]:
        q: NDArray[np.float32] = self._critics.q_min(
            self._normalize(obs), torch.tensor(action)
        ).numpy()
        return q

    def _normalize(self, obs: NDArray[Any]) -> torch.Tensor:
        rows = np.asarray(obs, np.float32)
        if self._shift is not None and self._scale is not None:
            rows = (rows - self._shift) * self._scale
            rows = np.clip(rows, -OBSERVATION_CLIP, OBSERVATION_CLIP)
        return torch.tensor(rows)


def _load(network: FlatMLP, flat: Array) -> None:
    network.flat.requires_grad_(False).copy_(torch.tensor(flat))
