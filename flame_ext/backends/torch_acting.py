"""Acting through PyTorch, for machines and policies that the native module does not cover."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from flame_ext.config import make_config
from flame_ext.networks import Critics, FlatMLP
from flame_ext.policies import make_actor
from flame_ext.policies.base import best_action
from flame_ext.policy import Array, PolicySpec


class TorchActingEngine:
    """Implements `flame_ext.policy.ActingEngine`."""

    name = "torch"

    def __init__(self, spec: PolicySpec, tensors: Mapping[str, Array]) -> None:
        config = make_config(spec.algorithm, overrides=spec.config)
        self._actor = make_actor(config, spec.obs_dim, spec.action_dim)
        self._critics = Critics(
            spec.obs_dim,
            spec.action_dim,
            config.hidden_sizes,
            activation=config.activation,
            layer_norm=config.critic_layer_norm,
        )
        _load(self._actor.network, tensors["actor.flat"])
        _load(self._critics, tensors["critics.flat"])

    @torch.no_grad()
    def act(self, obs: Array, noise: Array) -> Array:
        rows, base = torch.tensor(obs), torch.tensor(noise)
        return _numpy(best_action(self._actor, self._critics, rows, base))

    @torch.no_grad()
    def q_min(self, obs: Array, action: Array) -> Array:
        return _numpy(self._critics.q_min(torch.tensor(obs), torch.tensor(action)))


def _load(network: FlatMLP, flat: Array) -> None:
    network.flat.requires_grad_(False).copy_(torch.tensor(flat))


def _numpy(tensor: torch.Tensor) -> Array:
    array: Array = tensor.numpy().astype(np.float32, copy=False)
    return array
