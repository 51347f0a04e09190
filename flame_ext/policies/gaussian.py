"""Soft actor-critic's tanh-squashed Gaussian policy (Haarnoja et al. 2018)."""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor

from flame_ext.config import Config
from flame_ext.critics import Critics
from flame_ext.networks import GaussianPolicyNet
from flame_ext.policies.base import Actor, ActorLoss, normal_like, reverse_kl
from flame_ext.reference import LogProb, tanh_gaussian
from flame_ext.scalars import Scalar


class GaussianEvaluator(Protocol):
    """What a backend computes for a Gaussian policy beside its network."""

    def sample_gaussian(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Actions for rows, without gradient."""

    def tanh_gaussian(self, output: Tensor, noise: Tensor) -> LogProb:
        """As `reference.tanh_gaussian` for rows, differentiable once by the network's output."""


class GaussianActor(Actor):
    """a = tanh(mean + std * noise); zero noise gives SAC's deterministic action."""

    network: GaussianPolicyNet
    has_log_prob = True

    def __init__(
        self,
        config: Config,
        obs_dim: int,
        action_dim: int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(config, obs_dim, action_dim)
        self.network = GaussianPolicyNet(
            obs_dim,
            action_dim,
            config.hidden_sizes,
            activation=config.policy_activation,
            layer_norm=config.policy_layer_norm,
            generator=generator,
        )

    def action(self, obs: Tensor, noise: Tensor) -> Tensor:
        native = self._native()
        if native is not None and obs.dim() == noise.dim() == 2 and not torch.is_grad_enabled():
            return native.sample_gaussian(obs, noise)
        mean, std = self.network.distribution(obs)
        return torch.tanh(mean + std * noise)

    def sample(self, obs: Tensor, noise: Tensor, generator: torch.Generator) -> LogProb:
        output: Tensor = self.network(obs)[0]
        native = self._native()
        evaluate = tanh_gaussian if native is None else native.tanh_gaussian
        return evaluate(output, noise)

    def _native(self) -> GaussianEvaluator | None:
        """The backend's kernels for this policy, if it has any."""
        return cast("GaussianEvaluator | None", self.network.evaluator)

    def loss(
        self,
        obs: Tensor,
        action: Tensor,
        critics: Critics,
        alpha: Scalar,
        generator: torch.Generator,
    ) -> ActorLoss:
        noise = normal_like(obs, (len(obs), self.action_dim), generator)
        sample = self.sample(obs, noise, generator)
        loss = reverse_kl(sample, critics.q_min(obs, sample.action), alpha)
        return ActorLoss(loss, {"entropy": -sample.log_prob.detach().mean()})
