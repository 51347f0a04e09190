"""The soft critics' target."""

from __future__ import annotations

import torch
from torch import Tensor

from flame_ext.critics import Critics
from flame_ext.policies.base import Actor, normal_like
from flame_ext.replay import Batch
from flame_ext.scalars import Scalar


def target_noise(actor: Actor, batch: Batch, generator: torch.Generator) -> Tensor:
    """Base samples of the next actions, ``(B, target_particles, A)``."""
    shape = (len(batch), actor.config.target_particles, actor.action_dim)
    return normal_like(batch.next_obs, shape, generator)


@torch.no_grad()
def td_target(
    actor: Actor,
    target_critics: Critics,
    batch: Batch,
    noise: Tensor,
    alpha: Scalar,
    generator: torch.Generator,
) -> Tensor:
    """Reward + discount (Qmin'(s', a') - [entropy] alpha log pi(a'|s')), ``(B,)``.

    With several `target_particles` a' is the best of them by Qmin'.

    Args:
        actor: The policy that acts in s'.
        target_critics: Q'.
        batch: B transitions, their observations as the policy takes them.
        noise: Base samples of a' ``(B, target_particles, A)``, see `target_noise`.
        alpha: Temperature.
        generator: Draws the probes of an entropy estimator that takes them.
    """
    c = actor.config
    obs = batch.next_obs
    candidates = actor.action(obs.unsqueeze(1), noise)
    value = target_critics.candidate_q_min(obs, candidates).amax(1)
    if c.entropy_in_target:
        # The density is the plain sample's, since best-of-N has none in closed form. Its estimator
        # may take other steps than the policy that acts: FLAME's decoupled one.
        value = value - alpha * actor.sample(obs, noise[:, 0], generator).log_prob
    return c.reward_scale * batch.reward + batch.discount * value
