"""Twin soft Q functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flame_ext.embeddings import StateActionEncoder
from flame_ext.networks import FlatMLP
from flame_ext.sampling import Activation


class Critics(FlatMLP):
    """Twin soft Q functions. Input columns: action (A), observation (O).

    Args:
        obs_dim: O.
        action_dim: A.
        hidden_sizes: Width of each hidden layer.
        activation: Hidden activation.
        layer_norm: Normalise hidden pre-activations.
        members: Q functions.
        encoder: Where given, the input columns are [action, zsa] (A + Z) and [observation, zs]
            (O + Z), and observations are what `observe` returns. It is not trained
            with the critics.
        generator: Source of the initial weights.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden_sizes: Sequence[int] = (256, 256),
        *,
        activation: Activation = "mish",
        layer_norm: bool = True,
        members: int = 2,
        encoder: StateActionEncoder | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        more = 0 if encoder is None else encoder.embedding_dim
        super().__init__(
            (action_dim + more, obs_dim + more),
            hidden_sizes,
            1,
            members=members,
            activation=activation,
            layer_norm=layer_norm,
            generator=generator,
        )
        self.obs_dim, self.action_dim = obs_dim, action_dim
        self.encoder = encoder

    def inputs(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Observation and action as the network takes them: actions with their embeddings.

        Args:
            obs: ``(..., O)``, with an encoder ``(..., O + Z)``.
            action: ``(..., A)``, broadcastable.

        Returns:
            `obs`, and ``(..., A)``, with an encoder ``(..., A + Z)``.
        """
        if self.encoder is None:
            return obs, action
        pair = self.encoder.pair(obs[..., self.obs_dim :], action)
        return obs, torch.cat([action.expand(*pair.shape[:-1], -1), pair], dim=-1)

    def observe(self, obs: Tensor) -> Tensor:
        """States ``(..., O)`` as policy and critics take them: plain, or with their embedding."""
        return obs if self.encoder is None else self.encoder.observe(obs)

    def q_values(self, obs: Tensor, action: Tensor) -> Tensor:
        """Every member's value: obs and action as in `inputs` -> ``(members, ...)``."""
        obs, action = self.inputs(obs, action)
        output: Tensor = self(action, obs)
        return output.squeeze(-1)

    def q_min(self, obs: Tensor, action: Tensor) -> Tensor:
        """The smallest member's value, ``(...)``."""
        frozen = action.requires_grad and not self.flat.requires_grad
        if self.evaluator is not None and frozen and action.dim() == 2:
            return self.evaluator.q_min(*self.inputs(obs, action))
        return self.q_values(obs, action).amin(0)

    def candidate_q_min(self, obs: Tensor, action: Tensor) -> Tensor:
        """Qmin of K actions ``(B, K, A)`` in each of the states of `inputs` -> ``(B, K)``."""
        states = obs.unsqueeze(1)
        if self.evaluator is not None and not torch.is_grad_enabled():
            states, action = self.inputs(states, action)
            return self.evaluator.candidates(states.squeeze(1), action)
        return self.q_min(states, action)
