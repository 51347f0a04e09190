"""Learned embeddings of states and actions, which make the critics' regression easier.

State-action learned embeddings (SALE; Fujimoto et al. 2023, arXiv 2306.02451, Sec. 4): a reward
says little about the dynamics, the next state says all of it. Two networks learn to predict it;
policy and critics see their features beside the plain state and action.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from flame_ext.networks import FlatMLP
from flame_ext.sampling import EMBEDDING_ACTIVATION, EMBEDDING_MIN_SCALE


class StateEvaluator(Protocol):
    """What a backend may compute for the state's network."""

    def observe(self, obs: Tensor) -> Tensor:
        """As `StateActionEncoder.observe` for rows, without gradient."""


def normalised(features: Tensor) -> Tensor:
    """Features ``(..., Z)`` divided by their mean absolute value (Eq. 3)."""
    return features / features.abs().mean(-1, keepdim=True).clamp(min=EMBEDDING_MIN_SCALE)


class StateActionEncoder:
    """Features zs = f(s) of a state, and zsa = g(zs, a), which predicts those of the next state.

    Args:
        obs_dim: O.
        action_dim: A.
        embedding_dim: Z, the length of either embedding.
        hidden_sizes: Width of each hidden layer of f and g.
        generator: Source of the initial weights.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        embedding_dim: int,
        hidden_sizes: Sequence[int] = (256, 256),
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        self.embedding_dim = embedding_dim
        self.state_network = FlatMLP(
            (obs_dim,),
            hidden_sizes,
            embedding_dim,
            activation=EMBEDDING_ACTIVATION,
            generator=generator,
        )
        self.pair_network = FlatMLP(
            (action_dim, embedding_dim),
            hidden_sizes,
            embedding_dim,
            activation=EMBEDDING_ACTIVATION,
            generator=generator,
        )

    def networks(self) -> dict[str, FlatMLP]:
        """F and g by name."""
        return {"state_encoder": self.state_network, "pair_encoder": self.pair_network}

    def state(self, obs: Tensor) -> Tensor:
        """Zs: obs ``(..., O)`` -> ``(..., Z)``."""
        return normalised(self.state_network(obs)[0])

    def observe(self, obs: Tensor) -> Tensor:
        """What policy and critics see: obs ``(..., O)`` -> ``(..., O + Z)``."""
        native = cast("StateEvaluator | None", self.state_network.evaluator)
        if native is not None and obs.dim() == 2 and not torch.is_grad_enabled():
            return native.observe(obs)
        return torch.cat([obs, self.state(obs)], dim=-1)

    def pair(self, state: Tensor, action: Tensor) -> Tensor:
        """Zsa: zs ``(..., Z)``, action ``(..., A)`` -> ``(..., Z)``."""
        features: Tensor = self.pair_network(action, state)[0]
        return features

    def prediction_loss(self, obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
        """Mean of (zsa - zs')^2, zs' a constant (Eq. 2): ``(B, O)``, ``(B, A)``, ``(B, O)``."""
        with torch.no_grad():
            next_state = self.state(next_obs)
        return F.mse_loss(self.pair(self.state(obs), action), next_state)
