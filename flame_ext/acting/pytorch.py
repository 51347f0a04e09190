"""Acting through PyTorch, for installations without the native module."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flame_ext.build import deployed_networks, make_actor, make_critics, make_encoder
from flame_ext.config import Config, make_config
from flame_ext.networks import FlatMLP
from flame_ext.policy import Array, PolicySpec, network_observations, observation_rows


class TorchActingEngine:
    """Implements `flame_ext.policy.ActingEngine`."""

    name = "torch"

    def __init__(self, spec: PolicySpec, tensors: Mapping[str, Array], *, seed: int) -> None:
        # A policy of another version may have options that no longer exist.
        known = {field.name for field in dataclasses.fields(Config)}
        options = {name: value for name, value in spec.config.items() if name in known}
        config = make_config(spec.algorithm, overrides=options)
        sizes = spec.obs_dim, spec.action_dim
        self._obs_dim = spec.obs_dim
        self._actor = make_actor(config, *sizes)
        self._critics = make_critics(config, *sizes, make_encoder(config, *sizes))
        for name, network in deployed_networks(self._actor, self._critics).items():
            _load(name, network, tensors[f"{name}.flat"])
        self._tensors = tensors
        self._middle, self._half = spec.action_middle_and_half()
        self._low, self._high = np.asarray(spec.action_low), np.asarray(spec.action_high)
        self._seed = seed

    @torch.no_grad()
    def act(
        self, obs: NDArray[Any], noise: Array | None, num_particles: int, draw: int
    ) -> NDArray[np.float32]:
        rows = observation_rows(obs, self._obs_dim)
        shape = (len(rows), num_particles, self._actor.action_dim)
        if noise is None:
            rng = np.random.default_rng((self._seed, draw))
            noise = rng.standard_normal(shape, np.float32)
        base = torch.tensor(noise).view(shape)
        unit = self._actor.best_action(self._critics, self._observe(rows), base).numpy()
        scaled = np.clip(self._middle + self._half * unit, self._low, self._high)
        action: NDArray[np.float32] = scaled.astype(np.float32)
        return action[0] if np.ndim(obs) == 1 else action

    @torch.no_grad()
    def q_min(self, obs: NDArray[Any], action: Array) -> NDArray[np.float32]:
        q: NDArray[np.float32] = self._critics.q_min(
            self._observe(obs), torch.tensor(action)
        ).numpy()
        return q

    def _observe(self, obs: NDArray[Any]) -> torch.Tensor:
        rows = np.ascontiguousarray(network_observations(obs, self._tensors))
        return self._critics.observe(torch.tensor(rows))


def _load(name: str, network: FlatMLP, flat: Array) -> None:
    if flat.shape != tuple(network.flat.shape) or not np.isfinite(flat).all():
        raise ValueError(
            f"the weights {name}.flat have shape {flat.shape}; {tuple(network.flat.shape)} and "
            "finite values are needed"
        )
    network.flat.requires_grad_(False).copy_(torch.tensor(flat))
