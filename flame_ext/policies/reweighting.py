"""Q-reweighted regression targets shared by the flow and the diffusion policies."""

from __future__ import annotations

import torch
from torch import Tensor

from flame_ext.critics import Critics
from flame_ext.policies.base import uniform_like
from flame_ext.reference import (
    Reweighted,
    reverse_candidates,
    reweighted_velocity,
    stratify,
    take_best,
)
from flame_ext.sampling import CandidateSampling
from flame_ext.scalars import Scalar


@torch.no_grad()
def reverse_reweighted(
    critics: Critics,
    obs: Tensor,
    z: Tensor,
    signal: Tensor,
    scale: Tensor,
    alpha: Scalar,
    num_candidates: int,
    sampling: CandidateSampling,
    generator: torch.Generator,
) -> Reweighted:
    """Reverse samples of z weighted by exp(Qmin / alpha) (FLAME, Sec. 4.1).

    Args:
        critics: Frozen twin critics.
        obs: ``(B, O)``.
        z: ``(B, A)``, equal to signal * action + scale * noise.
        signal: ``(B, 1)``.
        scale: ``(B, 1)``.
        alpha: Temperature.
        num_candidates: K.
        sampling: `Config.candidate_sampling`.
        generator: Source of the uniform draws.
    """
    if critics.evaluator is not None and critics.encoder is None:
        velocity, ess = critics.evaluator.reweighted_velocity(
            obs, z, signal, scale, alpha, num_candidates, sampling, generator
        )
        return Reweighted(velocity, ess, None)
    uniform = candidate_uniforms(z, num_candidates, sampling, generator)
    action, noise = reverse_candidates(z, signal, scale, uniform)
    logits = critics.candidate_q_min(obs, action) / alpha
    return reweighted_velocity(logits, action, noise)


def candidate_uniforms(
    z: Tensor,
    num_candidates: int,
    sampling: CandidateSampling,
    generator: torch.Generator | None,
) -> Tensor:
    """U(0, 1) draws of K candidates for each z: ``(B, A)`` -> ``(B, K, A)``."""
    shape = (len(z), num_candidates, z.shape[-1])
    uniform = uniform_like(z, shape, generator)
    if sampling == "stratified":
        uniform = stratify(uniform, uniform_like(z, shape, generator))
    return uniform


def resample(action: Tensor, logits: Tensor, generator: torch.Generator) -> Tensor:
    """One candidate per state drawn by softmax(logits) (SIR): ``(B, K, A)`` -> ``(B, A)``."""
    # By Gumbel keys: older PyTorch's multinomial checks its weights on the host.
    exponential = torch.empty_like(logits).exponential_(generator=generator)
    return take_best(action, logits - exponential.log())


def damped_logits(logits: Tensor, ess_fraction: float, bisections: int = 12) -> Tensor:
    """Beta * logits with the largest beta in [0, 1] whose mean ESS is at least the given fraction.

    With logits = Qmin / alpha - log pi over the policy's own samples this is a damped step from pi
    towards pi* ~ exp(Q / alpha): its fixed point is pi* for every beta > 0, while the effective
    sample size no longer depends on alpha.

    Args:
        logits: ``(B, K)``.
        ess_fraction: In (0, 1].
        bisections: Halvings of the interval for beta.
    """
    centred = logits - logits.amax(1, keepdim=True)

    def ess(beta: Tensor) -> Tensor:
        weights = torch.softmax(beta * centred, dim=1)
        return (1 / weights.square().sum(1)).mean() / logits.shape[1]

    low, high = torch.zeros_like(logits[0, 0]), torch.ones_like(logits[0, 0])
    undamped = ess(high) >= ess_fraction
    for _ in range(bisections):
        middle = 0.5 * (low + high)
        enough = ess(middle) >= ess_fraction
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return torch.where(undamped, 1.0, low) * centred
