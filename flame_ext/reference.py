"""FLAME's mathematics in plain PyTorch: the specification that every kernel is tested against.

Written for reading and for float64, not for speed. Notation of Li et al. 2026 (arXiv 2602.01606)
and Geng et al. 2025 (MeanFlow, arXiv 2505.13447): flow time t = 0 is the action and t = 1 is
noise, ``z = (1 - t) action + t noise``, the conditional velocity is ``noise - action`` and
u(z, r, t, s) is the average velocity over [r, t].

Shapes: B states, K candidates or N particles per state, A action and O observation dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from flame_ext.critics import Critics
from flame_ext.errors import check_choice
from flame_ext.networks import MeanVelocityNet, mean_and_std
from flame_ext.sampling import Estimator, Flow, SamplerStep, Trace, ddim_steps, flow_steps

# Beyond this time the reverse posterior over actions is uniform to float32 accuracy, while
# inverting z = (1 - t) a + t eps divides by 1 - t.
MAX_CANDIDATE_TIME = 1 - 1e-3


# ---------------------------------------------------------------------------------------------
# Acting: MeanFlow one-step control and multi-step sampling
# ---------------------------------------------------------------------------------------------


def sample_flow(
    net: MeanVelocityNet, obs: Tensor, noise: Tensor, steps: int = 1, flow: Flow = "mean"
) -> Tensor:
    """Carries noise to an action, unclipped (MeanFlow, Alg. 2; rectified flow for FLAME-R).

    Args:
        net: Mean-velocity network.
        obs: ``(..., O)``.
        noise: Base sample eps, ``(..., A)``.
        steps: Sub-intervals of [0, 1]; 1 is FLAME's one-step control.
        flow: ``"mean"`` follows u over each interval, ``"instantaneous"`` takes Euler steps
            of u(z, t, t, s).

    Returns:
        ``(..., A)``, not clipped to the box.
    """
    z = noise
    for step in flow_steps(steps, flow):
        z = z + step.q * net.velocity(z, *times_like(z, step), obs)
    return z


def one_step_action(net: MeanVelocityNet, obs: Tensor, noise: Tensor) -> Tensor:
    """``clip(eps - u(eps, 0, 1, s), -1, 1)``: obs ``(..., O)``, noise ``(..., A)``."""
    return sample_flow(net, obs, noise).clamp(-1, 1)


def denoise(net: MeanVelocityNet, obs: Tensor, noise: Tensor, steps: int) -> Tensor:
    """Carries noise to an action in the box by DDIM with eta = 0 (Song et al. 2021, Eq. 12).

    Args:
        net: Predicts the noise in ``velocity(z, t, t, obs)``.
        obs: ``(..., O)``.
        noise: Base sample eps, ``(..., A)``.
        steps: Network evaluations.

    Returns:
        ``(..., A)`` in [-1, 1].
    """
    z = noise
    for step in ddim_steps(steps):
        eps = net.velocity(z, *times_like(z, step), obs)
        z = step.m * (step.p * z + step.q * eps).clamp(-1, 1) + step.n * z
    return z.clamp(-1, 1)


def best_of(critics: Critics, obs: Tensor, actions: Tensor) -> Tensor:
    """The candidate with the highest Qmin: obs ``(B, O)``, actions ``(B, N, A)`` -> ``(B, A)``."""
    return take_best(actions, critics.candidate_q_min(obs, actions))


def take_best(actions: Tensor, values: Tensor) -> Tensor:
    """The action of the highest value: actions ``(B, N, A)``, values ``(B, N)`` -> ``(B, A)``."""
    return actions[torch.arange(len(actions), device=actions.device), values.argmax(dim=1)]


def times_like(z: Tensor, step: SamplerStep) -> tuple[Tensor, Tensor]:
    """The network's r and t of a sampler step, broadcastable with z ``(..., A)``."""
    shape = (*[1] * (z.dim() - 1), 1)
    return z.new_full(shape, step.r), z.new_full(shape, step.t)


# ---------------------------------------------------------------------------------------------
# Reverse sampling: truncated-normal candidates and the Q-reweighted velocity
# ---------------------------------------------------------------------------------------------


def truncated_normal(low: Tensor, high: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-CDF sample of N(0, 1) truncated to [low, high], accurate in both tails.

    Works with log-probabilities of the tail that the interval lies nearer to, so that bounds far
    out (|bound| up to 30 and beyond) neither overflow nor pile up on a bound.

    Args:
        low: Lower bounds.
        high: Upper bounds, same shape, low <= high.
        uniform: U(0, 1) draws, same shape.

    Returns:
        Samples in [low, high], same shape.
    """
    flip = low + high > 0
    lower = torch.where(flip, -high, low)
    upper = torch.where(flip, -low, high)
    u = torch.where(flip, 1 - uniform, uniform)
    log_p = torch.logaddexp(
        torch.special.log_ndtr(lower) + torch.log1p(-u), torch.special.log_ndtr(upper) + u.log()
    )
    x = _inverse_log_ndtr(log_p).clamp(lower, upper)
    return torch.where(flip, -x, x)


def _inverse_log_ndtr(log_p: Tensor) -> Tensor:
    """Solves log Phi(x) = log_p: `ndtri` near the centre, Newton on log Phi in the left tail."""
    central = torch.special.ndtri(log_p.exp().clamp(max=1 - torch.finfo(log_p.dtype).eps))
    tail_log_p = log_p.clamp(max=-2.0)
    # Leading terms of the asymptotic expansion; Newton on a concave function then converges fast.
    x = -(-2 * (tail_log_p + 0.5 * math.log(2 * math.pi))).clamp(min=0.25).sqrt()
    for _ in range(6):
        log_cdf = torch.special.log_ndtr(x)
        log_density = -0.5 * x * x - 0.5 * math.log(2 * math.pi)
        x = x - (log_cdf - tail_log_p) * (log_cdf - log_density).exp()
    return torch.where(log_p < -5.0, x, central)


def stratify(uniform: Tensor, order: Tensor) -> Tensor:
    """Turns independent draws into a Latin hypercube (McKay, Beckman and Conover 1979).

    Each coordinate of the K candidates falls once in each of K strata of equal probability, so that
    what a sum over them owes to one coordinate at a time is integrated almost exactly.

    Args:
        uniform: U(0, 1) draws, places within a stratum, ``(B, K, A)``.
        order: Draws whose rank among the K is the stratum, ``(B, K, A)``.

    Returns:
        Draws in (0, 1], ``(B, K, A)``.
    """
    rank = order.argsort(dim=1, stable=True).argsort(dim=1)
    return (rank + uniform) / uniform.shape[1]


def reverse_candidates(
    z: Tensor, signal: Tensor, scale: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """Candidate actions that could have produced z (Ma et al. 2025, Sec. 4; FLAME, Sec. 4.1).

    Draws noise from N(0, I) truncated such that the implied action lies in the cube, which is the
    posterior of the action under a uniform prior.

    Args:
        z: Noised actions ``signal * action + scale * noise``, ``(B, A)``.
        signal: 1 - t for a flow, sqrt(alpha_bar) for a diffusion, ``(B, 1)``.
        scale: t, respectively sqrt(1 - alpha_bar), ``(B, 1)``, positive.
        uniform: U(0, 1) draws, ``(B, K, A)``.

    Returns:
        Candidate actions in [-1, 1] and their noise, both ``(B, K, A)``.
    """
    z, signal, scale = z.unsqueeze(1), signal.unsqueeze(1), scale.unsqueeze(1)
    safe_signal = signal.clamp(min=1 - MAX_CANDIDATE_TIME)
    low, high = (z - safe_signal) / scale, (z + safe_signal) / scale
    noise = truncated_normal(low.expand_as(uniform), high.expand_as(uniform), uniform)
    action = ((z - scale * noise) / safe_signal).clamp(-1, 1)
    action = torch.where(signal < safe_signal, 2 * uniform - 1, action)
    return action, (z - signal * action) / scale


@dataclass(frozen=True)
class Reweighted:
    """Self-normalised importance estimate of the target policy's marginal velocity.

    Attributes:
        velocity: ``(B, A)``, sum_k w_k (noise_k - action_k).
        ess: Effective sample size 1 / sum_k w_k^2, ``(B,)``, between 1 and K.
        weights: ``(B, K)``, rows sum to one; None from kernels that never hold them all.
    """

    velocity: Tensor
    ess: Tensor
    weights: Tensor | None


def reweighted_velocity(logits: Tensor, action: Tensor, noise: Tensor) -> Reweighted:
    """v_hat = sum_k softmax_k(logits) (noise_k - action_k) (FLAME, Sec. 4.1).

    For reverse candidates the logits are Qmin(s, a_k) / alpha: the partition function of
    exp(Q / alpha) cancels.

    Args:
        logits: Log importance weights up to a constant per row, ``(B, K)``.
        action: Candidates, ``(B, K, A)``.
        noise: Their noise, ``(B, K, A)``.
    """
    weights = torch.softmax(logits, dim=1)
    velocity = torch.einsum("bk,bka->ba", weights, noise - action)
    return Reweighted(velocity, 1 / weights.square().sum(1), weights)


# ---------------------------------------------------------------------------------------------
# The MeanFlow loss
# ---------------------------------------------------------------------------------------------


def meanflow_loss(
    net: MeanVelocityNet, z: Tensor, r: Tensor, t: Tensor, obs: Tensor, velocity: Tensor
) -> Tensor:
    """Mean squared violation of the MeanFlow identity (Geng et al. 2025, Eqs. 9-11).

    ``mean_b || u - sg(v - (t - r) JVP) ||^2`` with JVP = tangent of u along (v, 0, 1). With v the
    reweighted velocity this is the K-fold objective collapsed: the JVP is linear in its tangent
    and the weights sum to one, so the gradient is the same from B rows instead of B * K.

    Args:
        net: Mean-velocity network.
        z: ``(B, A)``.
        r: ``(B, 1)``.
        t: ``(B, 1)``, r <= t.
        obs: ``(B, O)``.
        velocity: Marginal velocity at z, ``(B, A)``.
    """
    with torch.no_grad():
        _, tangent = net.velocity_and_jvp(z, r, t, obs, velocity)
        target = velocity - (t - r) * tangent
    return (net.velocity(z, r, t, obs) - target).square().sum(-1).mean()


def meanflow_loss_k_fold(
    net: MeanVelocityNet,
    z: Tensor,
    r: Tensor,
    t: Tensor,
    obs: Tensor,
    velocities: Tensor,
    weights: Tensor,
) -> Tensor:
    """The published form: sum_k w_k || u - sg(v_k - (t - r) JVP_k) ||^2 on all B * K rows.

    Kept to prove that `meanflow_loss` has the same gradient. Its value differs by the weighted
    variance of the targets, which has none.

    Args:
        net: Mean-velocity network.
        z: ``(B, A)``.
        r: ``(B, 1)``.
        t: ``(B, 1)``, r <= t.
        obs: ``(B, O)``.
        velocities: Conditional velocities noise_k - action_k, ``(B, K, A)``.
        weights: ``(B, K)``, rows sum to one.
    """
    expand = [x.unsqueeze(1) for x in (z, r, t, obs)]
    z_k, r_k, t_k, obs_k = (x.expand(-1, velocities.shape[1], -1) for x in expand)
    with torch.no_grad():
        _, tangents = net.velocity_and_jvp(z_k, r_k, t_k, obs_k, velocities)
        targets = velocities - (t_k - r_k) * tangents
    errors = (net.velocity(z_k, r_k, t_k, obs_k) - targets).square().sum(-1)
    return (weights * errors).sum(1).mean()


# ---------------------------------------------------------------------------------------------
# Log-likelihood
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogProb:
    """Log-density of the flow policy at its own sample.

    Attributes:
        action: The sample, ``(..., A)``, before clipping.
        log_prob: log pi(action | s) in nats, ``(...)``.
        folded: True where det(I - J) < 0, ``(...)``: there the map from noise to action has turned
            orientation and change of variables bounds the entropy from above. `exact` and the
            trace `log_det` measure it; elsewhere all False.
        transport: d action / d noise of the last step, I - (t - r) J, ``(..., A, A)``; None where
            no Jacobian was computed or kept.
    """

    action: Tensor
    log_prob: Tensor
    folded: Tensor
    transport: Tensor | None = None

    @property
    def fold_rate(self) -> Tensor:
        """Fraction of folded samples, a scalar."""
        return self.folded.to(self.log_prob.dtype).mean()


def log_prob(
    net: MeanVelocityNet,
    obs: Tensor,
    noise: Tensor,
    *,
    estimator: Estimator = "exact",
    steps: int = 1,
    trace: Trace = "exact",
    flow: Flow = "mean",
    probe: Tensor | None = None,
) -> LogProb:
    """Log pi(a | s) of the sample that `noise` is carried to.

    - ``exact``: log N(noise) - log|det(I - J)| with the full Jacobian J of the one step that acts.
    - ``multi_step``: the decoupled estimator (FLAME, Sec. 4.2): the number of steps that estimate
      log pi is separate from the one step that acts; sums the divergence over the steps.
    - ``one_step_trace``: log|det(I - J)| replaced by -tr J over one step: what a one-step
      discretisation of the divergence integral gives, one to two nats off.

    Args:
        net: Mean-velocity network.
        obs: ``(..., O)``.
        noise: ``(..., A)``.
        estimator: See above.
        steps: Sub-steps of ``multi_step``; the others take one.
        trace: Divergence of a sub-step, ignored by ``exact``: ``"exact"`` trace by A tangents,
            ``"hutchinson"`` by one probe, ``"log_det"`` (only ``multi_step``) the sub-step's
            log-determinant, free of discretisation error for the n-step policy.
        flow: ``"mean"`` or ``"instantaneous"``, as in `sample_flow`.
        probe: Hutchinson probe of +-1 (Rademacher), ``(..., A)``; required by ``"hutchinson"``.

    Raises:
        ValueError: For an unknown option, a missing probe, or a step count that does not fit.
    """
    check_log_prob_options(estimator, steps, trace, probe)
    use_determinant = estimator == "exact" or trace == "log_det"
    log_det = torch.zeros_like(noise[..., 0])
    folded = torch.zeros_like(log_det, dtype=torch.bool)
    transport = None
    z = noise
    for step in flow_steps(steps, flow):
        times = times_like(z, step)
        if use_determinant:
            u, jacobian = net.velocity_and_jacobian(z, *times, obs)
            eye = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
            transport = eye + step.q * jacobian
            sign, logabsdet = torch.linalg.slogdet(transport)
            log_det = log_det + logabsdet
            folded = folded ^ (sign < 0)
        else:
            u, divergence = _divergence(net, z, *times, obs, None if trace == "exact" else probe)
            log_det = log_det + step.q * divergence
        z = z + step.q * u
    return LogProb(z, standard_normal_log_prob(noise) - log_det, folded, transport)


def tanh_gaussian(output: Tensor, noise: Tensor) -> LogProb:
    """The tanh-squashed Gaussian's sample and log-density (Haarnoja et al. 2018, App. C).

    Args:
        output: What the policy's network gives, ``(..., 2 A)``, see `networks.mean_and_std`.
        noise: N(0, 1) draws, ``(..., A)``.
    """
    mean, std = mean_and_std(output)
    pre_tanh = mean + std * noise
    # log(1 - tanh(x)^2) in the form that does not cancel for large |x|.
    log_slope = 2 * (math.log(2) - pre_tanh - F.softplus(-2 * pre_tanh))
    density = standard_normal_log_prob(noise) - (std.log() + log_slope).sum(-1)
    return LogProb(torch.tanh(pre_tanh), density, torch.zeros_like(density, dtype=torch.bool))


def monotonicity_gap(transport: Tensor, margin: float) -> Tensor:
    """How far the symmetric part's smallest eigenvalue lies below `margin`, ``(...)``, >= 0.

    Zero everywhere makes the map from noise to action strictly monotone, hence injective.

    Args:
        transport: Jacobians of the map, ``(..., A, A)``.
        margin: Smallest eigenvalue that is allowed.
    """
    smallest: Tensor = torch.linalg.eigvalsh(0.5 * (transport + transport.mT))[..., 0]
    return (margin - smallest).clamp(min=0)


def check_log_prob_options(
    estimator: Estimator, steps: int, trace: Trace, probe: Tensor | None
) -> None:
    """Raises ValueError for options that `log_prob` cannot combine."""
    check_choice("estimator", estimator, get_args(Estimator))
    check_choice("trace", trace, get_args(Trace))
    if steps < 1 or (steps > 1 and estimator != "multi_step"):
        raise ValueError(f"steps={steps}: multi_step takes steps >= 1, {estimator} exactly 1")
    if trace == "log_det" and estimator == "one_step_trace":
        raise ValueError("one_step_trace has no trace='log_det'; choose estimator='exact'")
    if trace == "hutchinson" and estimator != "exact" and probe is None:
        raise ValueError("trace='hutchinson' needs a probe of +-1 shaped like noise")


def _divergence(
    net: MeanVelocityNet, z: Tensor, r: Tensor, t: Tensor, obs: Tensor, probe: Tensor | None
) -> tuple[Tensor, Tensor]:
    """U and tr(du/dz), the latter as probe' J probe where a probe is given."""
    if probe is None:
        u, jacobian = net.velocity_and_jacobian(z, r, t, obs)
        return u, jacobian.diagonal(dim1=-2, dim2=-1).sum(-1)
    u, tangent = net.directional_derivative(z, r, t, obs, probe)
    return u, (probe * tangent).sum(-1)


def standard_normal_log_prob(noise: Tensor) -> Tensor:
    """Log N(noise; 0, I), ``(..., A)`` -> ``(...)``."""
    constant = 0.5 * noise.shape[-1] * math.log(2 * math.pi)
    return -0.5 * noise.square().sum(-1) - constant
