"""What the loop asks of a policy, whatever its distribution."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from flame_ext.config import Config
from flame_ext.critics import Critics
from flame_ext.networks import FlatMLP
from flame_ext.reference import LogProb, best_of
from flame_ext.scalars import Scalar, Scalars


@dataclass(frozen=True)
class ActorLoss:
    """A policy loss with what its computation learned on the way.

    Attributes:
        loss: Scalar to minimise.
        metrics: Scalars to log without gradient; among them, where the loss measures them,
            ``entropy`` (of fresh samples, in nats) and ``ess`` (the mean effective sample size as
            a fraction of the candidates).
    """

    loss: Tensor
    metrics: Scalars


class Actor(ABC):
    """A policy that turns one base-noise vector into one action.

    Attributes:
        network: Its only trainable parameters.
        has_log_prob: Whether `sample` can measure log pi.
    """

    network: FlatMLP
    has_log_prob: bool

    def __init__(self, config: Config, obs_dim: int, action_dim: int) -> None:
        self.config = config
        self.obs_dim, self.action_dim = obs_dim, action_dim

    @abstractmethod
    def action(self, obs: Tensor, noise: Tensor) -> Tensor:
        """The action in [-1, 1]: obs ``(..., O)``, noise ``(..., A)`` -> ``(..., A)``."""

    def best_action(self, critics: Critics, obs: Tensor, noise: Tensor) -> Tensor:
        """Best of N by Qmin: obs ``(B, O)``, noise ``(B, N, A)`` -> ``(B, A)`` in [-1, 1]."""
        if noise.shape[1] == 1:
            return self.action(obs, noise.squeeze(1))
        return best_of(critics, obs, self.action(obs.unsqueeze(1), noise))

    @abstractmethod
    def sample(self, obs: Tensor, noise: Tensor, generator: torch.Generator) -> LogProb:
        """A differentiable sample before clipping, with its log-density."""

    @abstractmethod
    def loss(
        self,
        obs: Tensor,
        action: Tensor,
        critics: Critics,
        alpha: Scalar,
        generator: torch.Generator,
    ) -> ActorLoss:
        """The policy's loss; critics and alpha are constants.

        Args:
            obs: States ``(B, O)``.
            action: What was done there, ``(B, A)`` in [-1, 1].
            critics: Frozen twin critics.
            alpha: Temperature.
            generator: Source of the draws.
        """


def normal_like(reference: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """N(0, 1) draws with the dtype and device of `reference`."""
    return torch.randn(shape, generator=generator, dtype=reference.dtype, device=reference.device)


def uniform_like(
    reference: Tensor, shape: tuple[int, ...], generator: torch.Generator | None
) -> Tensor:
    """U(0, 1) draws with the dtype and device of `reference`, never exactly 0."""
    uniform = torch.rand(shape, generator=generator, dtype=reference.dtype, device=reference.device)
    return uniform.clamp_(min=torch.finfo(reference.dtype).eps)


def reverse_kl(sample: LogProb, q_min: Tensor, alpha: Scalar) -> Tensor:
    """E[alpha log pi(a | s) - Qmin(s, a)], SAC's policy objective (Haarnoja et al. 2018, Eq. 7)."""
    return (alpha * sample.log_prob - q_min).mean()
