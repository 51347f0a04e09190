"""Multi-step denoising policy with the same Q-reweighting: what FLAME has to match.

A variance-preserving diffusion with a cosine schedule (Nichol and Dhariwal 2021), trained on
reverse samples weighted by exp(Q / alpha) (reverse-sampling reweighted score matching, Ma et al.
2025, arXiv 2502.00361) and sampled by DDIM (Song et al. 2021, Eq. 12 with eta = 0), so that an
action is a function of one base-noise vector as for every other policy here.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor

from flame_ext.config import Config
from flame_ext.constants import constant
from flame_ext.critics import Critics
from flame_ext.networks import MeanVelocityNet
from flame_ext.policies.base import Actor, ActorLoss, normal_like, uniform_like
from flame_ext.policies.reweighting import reverse_reweighted
from flame_ext.reference import LogProb, denoise
from flame_ext.sampling import signal_and_scale
from flame_ext.scalars import Scalar


class DenoisingEvaluator(Protocol):
    """What a backend may compute for the policy's network."""

    def denoise(self, obs: Tensor, noise: Tensor, steps: int) -> Tensor:
        """As `reference.denoise`, without gradient."""


class DiffusionActor(Actor):
    """Predicts the noise eps(z, t, s); the network is the flow's, evaluated at r = t."""

    network: MeanVelocityNet
    has_log_prob = False

    def __init__(
        self,
        config: Config,
        obs_dim: int,
        action_dim: int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(config, obs_dim, action_dim)
        self.network = MeanVelocityNet(
            obs_dim,
            action_dim,
            config.hidden_sizes,
            activation=config.policy_activation,
            layer_norm=config.policy_layer_norm,
            generator=generator,
        )

    def action(self, obs: Tensor, noise: Tensor) -> Tensor:
        steps = self.config.sampling_steps
        native = cast("DenoisingEvaluator | None", self.network.evaluator)
        if native is not None and not torch.is_grad_enabled():
            return native.denoise(obs, noise, steps)
        return denoise(self.network, obs, noise, steps)

    def sample(self, obs: Tensor, noise: Tensor, generator: torch.Generator) -> LogProb:
        raise ValueError(
            "the diffusion policy has no tractable log-density; use entropy_in_target=False and "
            "temperature='ess' or 'fixed'"
        )

    def loss(
        self,
        obs: Tensor,
        action: Tensor,
        critics: Critics,
        alpha: Scalar,
        generator: torch.Generator,
    ) -> ActorLoss:
        shape = (len(obs), self.action_dim)
        with torch.no_grad():
            # Random times of the sampler's own grid, excluding t = 0 where there is no noise.
            steps = self.config.sampling_steps
            t = (uniform_like(obs, (len(obs), 1), generator) * steps).ceil() / steps
            signals, scales = zip(
                *(signal_and_scale(i / steps) for i in range(1, steps + 1)), strict=True
            )
            index = (t * steps).round().long() - 1
            signal, scale = constant(signals, obs)[index], constant(scales, obs)[index]
            source = self.action(obs, normal_like(obs, shape, generator))
            z = signal * source + scale * normal_like(obs, shape, generator)
            reweighted = reverse_reweighted(
                critics,
                obs,
                z,
                signal,
                scale,
                alpha,
                self.config.num_candidates,
                self.config.candidate_sampling,
                generator,
            )
            # E[noise] from E[noise - action] and z = signal E[action] + scale E[noise].
            target = (z + signal * reweighted.velocity) / (signal + scale)
        loss = (self.network.velocity(z, t, t, obs) - target).square().sum(-1).mean()
        ess = reweighted.ess.mean() / self.config.num_candidates
        return ActorLoss(loss, {"ess": ess, "reweighted_loss": loss.detach()})
