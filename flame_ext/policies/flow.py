"""FLAME's flow policies: MeanFlow (one step) and rectified flow (several steps)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from flame_ext.config import Config
from flame_ext.critics import Critics
from flame_ext.networks import MeanVelocityNet
from flame_ext.policies.base import Actor, ActorLoss, normal_like, reverse_kl, uniform_like
from flame_ext.policies.reweighting import damped_logits, resample, reverse_reweighted
from flame_ext.reference import (
    LogProb,
    Reweighted,
    log_prob,
    meanflow_loss,
    monotonicity_gap,
    reweighted_velocity,
    sample_flow,
)
from flame_ext.sampling import Estimator, Flow, Trace
from flame_ext.scalars import Scalar, Scalars

# Below this time z is its action to within the network's resolution and 1 / t only adds rounding.
MIN_TIME = 1e-2

# Walls stand against Q's gradient, so they grow with Q's scale and not only with alpha, which may
# fall by orders of magnitude.
WALL_SCALE = 0.01


class FlowEvaluator(Protocol):
    """What a backend may compute for a flow's network; one derivative by the parameters."""

    def sample_flow(self, obs: Tensor, noise: Tensor, steps: int, flow: Flow) -> Tensor:
        """As `reference.sample_flow`, without gradient."""

    def best_action(
        self, obs: Tensor, noise: Tensor, critics: Critics, steps: int, flow: Flow
    ) -> Tensor:
        """As `Actor.best_action`, without gradient."""

    def differentiates_log_prob(self, estimator: Estimator, obs: Tensor, noise: Tensor) -> bool:
        """Whether `log_prob` records a gradient for these options; it evaluates all of them."""

    def log_prob(
        self,
        obs: Tensor,
        noise: Tensor,
        *,
        estimator: Estimator = "exact",
        steps: int = 1,
        trace: Trace = "exact",
        flow: Flow = "mean",
        probe: Tensor | None = None,
    ) -> LogProb:
        """As `reference.log_prob`."""

    def meanflow_loss(
        self, z: Tensor, r: Tensor, t: Tensor, obs: Tensor, velocity: Tensor
    ) -> Tensor:
        """As `reference.meanflow_loss`."""

    def monotonicity_gap(self, transport: Tensor, margin: float) -> Tensor:
        """As `reference.monotonicity_gap` for rows."""


class FlowActor(Actor):
    """A flow policy trained by Q-reweighted flow matching, reverse KL, or both."""

    network: MeanVelocityNet
    has_log_prob = True

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
        if not config.policy_layer_norm:
            self.network.start_as_contraction(config.initial_action_std, config.sampling_steps)

    def action(self, obs: Tensor, noise: Tensor) -> Tensor:
        c = self.config
        native = self._native()
        if native is not None and not torch.is_grad_enabled():
            return native.sample_flow(obs, noise, c.sampling_steps, c.flow).clamp_(-1, 1)
        return sample_flow(self.network, obs, noise, c.sampling_steps, c.flow).clamp(-1, 1)

    def best_action(self, critics: Critics, obs: Tensor, noise: Tensor) -> Tensor:
        c, native = self.config, self._native()
        plain = critics.encoder is None or noise.shape[1] == 1
        if native is not None and plain and not torch.is_grad_enabled():
            return native.best_action(obs, noise, critics, c.sampling_steps, c.flow)
        return super().best_action(critics, obs, noise)

    def sample(self, obs: Tensor, noise: Tensor, generator: torch.Generator) -> LogProb:
        estimator, steps, trace = self._estimator()
        probe = None
        if trace == "hutchinson":
            bits = torch.randint(0, 2, noise.shape, generator=generator, device=noise.device)
            probe = (2 * bits - 1).to(noise.dtype)
        native = self._native()
        evaluate: Callable[..., LogProb] = functools.partial(log_prob, self.network)
        if native is not None and (
            not torch.is_grad_enabled() or native.differentiates_log_prob(estimator, obs, noise)
        ):
            evaluate = native.log_prob
        flow = self.config.flow
        return evaluate(
            obs, noise, estimator=estimator, steps=steps, trace=trace, flow=flow, probe=probe
        )

    def _estimator(self) -> tuple[Estimator, int, Trace]:
        """Of the density, with its steps and trace: `exact` is that of all steps that act."""
        c = self.config
        if c.entropy_estimator == "exact" and c.sampling_steps > 1:
            return "multi_step", c.sampling_steps, "log_det"
        return c.entropy_estimator, c.entropy_sub_steps, c.entropy_trace

    def _native(self) -> FlowEvaluator | None:
        """The backend's kernels for this network, if it has any."""
        return cast("FlowEvaluator | None", self.network.evaluator)

    def loss(
        self,
        obs: Tensor,
        action: Tensor,
        critics: Critics,
        alpha: Scalar,
        generator: torch.Generator,
    ) -> ActorLoss:
        c = self.config
        loss = torch.zeros((), dtype=obs.dtype, device=obs.device)
        metrics: Scalars = {}
        if c.reverse_kl_weight > 0:
            kl, sample = self._reverse_kl(obs, critics, alpha, generator)
            loss = loss + c.reverse_kl_weight * kl
            metrics["entropy"] = -sample.log_prob.detach().mean()
            metrics["fold_rate"] = sample.fold_rate
            metrics["reverse_kl_loss"] = kl.detach()
        if c.reweighting_weight > 0:
            flow_loss, metrics["ess"] = self._reweighted_loss(
                obs, action, critics, alpha, generator
            )
            # Both terms pull towards exp(Q / alpha), the reverse KL in units of reward. Without the
            # factor alpha a low temperature would leave flow matching alone against Q, and with K
            # candidates its target is much wider than exp(Q / alpha).
            loss = loss + c.reweighting_weight * alpha * flow_loss
            metrics["reweighted_loss"] = flow_loss.detach()
        return ActorLoss(loss, metrics)

    def _reverse_kl(
        self, obs: Tensor, critics: Critics, alpha: Scalar, generator: torch.Generator
    ) -> tuple[Tensor, LogProb]:
        """E[alpha log pi - Qmin] through the exact density."""
        noise = normal_like(obs, (len(obs), self.action_dim), generator)
        sample = self.sample(obs, noise, generator)
        q_min = critics.q_min(obs, sample.action.clamp(-1, 1))
        q_scale = q_min.detach().abs().mean()
        walls = (alpha + WALL_SCALE * q_scale) * self._walls(sample).mean()
        return reverse_kl(sample, q_min, alpha) + walls, sample

    def _walls(self, sample: LogProb) -> Tensor:
        """Penalty where entropy would otherwise grow for free, ``(B,)``.

        Q is flat outside the box, and a folded map counts the same actions several times: without
        walls both happen within a few hundred updates.
        """
        c = self.config
        outside = sample.action - sample.action.clamp(-1, 1)
        wall = outside.square().sum(-1) / (2 * c.boundary_width**2)
        margin = c.monotonicity_margin
        if sample.transport is None or margin == 0:
            return wall
        native = self._native()
        measure = monotonicity_gap if native is None else native.monotonicity_gap
        depth = measure(sample.transport, margin)
        # Linear where the map folds: the square of one deep fold outweighs thousands of batches.
        penalty = F.huber_loss(depth, torch.zeros_like(depth), reduction="none", delta=margin)
        return wall + penalty / margin**2

    def _reweighted_loss(
        self,
        obs: Tensor,
        action: Tensor,
        critics: Critics,
        alpha: Scalar,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """The collapsed MeanFlow loss on the reweighted velocity, and the mean ESS fraction."""
        r, t = self.times(self.draw_time_uniforms(obs, generator))
        with torch.no_grad():
            if self.config.proposal == "policy":
                z, reweighted = self._from_policy(obs, t, critics, alpha, generator)
            else:
                z, reweighted = self._from_reverse(obs, action, t, critics, alpha, generator)
        native = self._native()
        if native is not None:
            loss = native.meanflow_loss(z, r, t, obs, reweighted.velocity)
        else:
            loss = meanflow_loss(self.network, z, r, t, obs, reweighted.velocity)
        return loss, reweighted.ess.mean() / self.config.num_candidates

    @staticmethod
    def draw_time_uniforms(obs: Tensor, generator: torch.Generator) -> Tensor:
        """What `times` takes, ``(B, 3)``."""
        return uniform_like(obs, (obs.shape[0], 3), generator)

    def times(self, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Times r, t of the MeanFlow loss: some r = t, some (0, 1), else r < t at random."""
        t = MIN_TIME + (1 - MIN_TIME) * draws[:, :1]
        r = t * draws[:, 2:]
        kind = draws[:, 1:2]
        instantaneous = kind < self.config.instantaneous_fraction
        acting = kind >= 1 - self.config.acting_fraction
        t = torch.where(acting, 1.0, t)
        return torch.where(instantaneous, t, torch.where(acting, 0.0, r)), t

    def _from_reverse(
        self,
        obs: Tensor,
        action: Tensor,
        t: Tensor,
        critics: Critics,
        alpha: Scalar,
        generator: torch.Generator,
    ) -> tuple[Tensor, Reweighted]:
        source, noise = self.draw_ends(obs, action, critics, alpha, generator)
        z = (1 - t) * source + t * noise
        k, sampling = self.config.num_candidates, self.config.candidate_sampling
        reweighted = reverse_reweighted(critics, obs, z, 1 - t, t, alpha, k, sampling, generator)
        return z, reweighted

    @torch.no_grad()
    def draw_ends(
        self,
        obs: Tensor,
        action: Tensor,
        critics: Critics,
        alpha: Scalar,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Actions a of `Config.z_source` and noise eps of z = (1 - t) a + t eps, ``(B, A)``."""
        source = self._source_actions(obs, action, critics, alpha, generator)
        return source, normal_like(obs, (obs.shape[0], self.action_dim), generator)

    def _source_actions(
        self,
        obs: Tensor,
        action: Tensor,
        critics: Critics,
        alpha: Scalar,
        generator: torch.Generator,
    ) -> Tensor:
        """Actions that are noised to z, `Config.z_source`."""
        shape = (len(obs), self.action_dim)
        if self.config.z_source == "replay":
            return action
        if self.config.z_source == "policy":
            return self.action(obs, normal_like(obs, shape, generator))
        if self.config.z_source == "uniform":
            return 2 * uniform_like(obs, shape, generator) - 1
        candidates = (shape[0], self.config.num_candidates, shape[1])
        actions = 2 * uniform_like(obs, candidates, generator) - 1
        return resample(actions, critics.candidate_q_min(obs, actions) / alpha, generator)

    def _from_policy(
        self,
        obs: Tensor,
        t: Tensor,
        critics: Critics,
        alpha: Scalar,
        generator: torch.Generator,
    ) -> tuple[Tensor, Reweighted]:
        """Candidates from the policy itself, weighted towards the target by a damped step."""
        k = self.config.num_candidates
        noise = normal_like(obs, (len(obs), k, self.action_dim), generator)
        native, states = self._native(), obs.unsqueeze(1)
        own = native.log_prob(states, noise) if native else log_prob(self.network, states, noise)
        action = own.action.clamp(-1, 1)
        q_min = critics.candidate_q_min(obs, action)
        logits = damped_logits(q_min / alpha - own.log_prob, self.config.proposal_ess)
        source = resample(action, logits, generator)
        z = (1 - t) * source + t * normal_like(obs, tuple(source.shape), generator)
        candidate_noise = (z.unsqueeze(1) - (1 - t.unsqueeze(1)) * action) / t.unsqueeze(1)
        likelihood = -0.5 * candidate_noise.square().sum(-1)
        posterior = reweighted_velocity(logits + likelihood, action, candidate_noise)
        # Reported is how evenly the proposal is weighted, not how many candidates explain one z.
        weights = torch.softmax(logits, dim=1)
        return z, Reweighted(posterior.velocity, 1 / weights.square().sum(1), weights)
