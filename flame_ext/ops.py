"""FLAME's three operators as functions, on any backend.

``backend="torch"`` is `flame_ext.reference` and differentiates through autograd. ``"cpu"`` and
``"cuda"`` are the native kernels, never a silent fallback: they raise for a derivative that they
do not have. ``"auto"`` takes the best that has what is asked for.

The native kernels compute in float32. With respect to the network's parameters they differentiate
`meanflow_loss` and `log_prob` with ``estimator="exact"`` on rows ``(B, A)``, once;
everything else needs ``torch.no_grad()`` or parameters that require no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flame_ext import reference
from flame_ext.backends import BackendName, resolve_operator
from flame_ext.backends.cuda_evaluator import CudaEvaluator
from flame_ext.backends.native_evaluator import NativeEvaluator
from flame_ext.critics import Critics
from flame_ext.networks import FlatMLP, MeanVelocityNet
from flame_ext.policies.reweighting import candidate_uniforms
from flame_ext.reference import LogProb, Reweighted
from flame_ext.sampling import CandidateSampling, Estimator, Flow, Trace

__all__ = ["log_prob", "meanflow_loss", "one_step_action", "reweighted_velocity"]


def one_step_action(
    net: MeanVelocityNet,
    obs: Tensor,
    noise: Tensor,
    *,
    critics: Critics | None = None,
    backend: BackendName = "auto",
) -> Tensor:
    """One-step MeanFlow control ``clip(eps - u(eps, 0, 1, s), -1, 1)``, optionally best-of-N.

    Args:
        net: Mean-velocity network.
        obs: ``(B, O)``.
        noise: Base samples ``(B, A)``, or ``(B, N, A)`` with `critics`.
        critics: Choose the particle with the highest Qmin.
        backend: See the module.

    Returns:
        ``(B, A)``.

    Raises:
        ValueError: If the shapes do not fit.
        BackendUnavailableError: If the build or machine lacks the backend.
    """
    expected = 2 if critics is None else 3
    if noise.dim() != expected or noise.shape[0] != len(obs):
        raise ValueError(
            f"noise has shape {tuple(noise.shape)}; with {len(obs)} observations "
            f"{'and no critics (B, A)' if critics is None else 'and critics (B, N, A)'} is expected"
        )
    _check_columns(net, obs, noise)
    networks: list[FlatMLP] = [net] if critics is None else [net, critics]
    native = _native(backend, "one_step_action", networks, (obs, noise))
    if native is not None:
        particles = noise.unsqueeze(1) if critics is None else noise
        return native(net).best_action(obs, particles, critics, 1, "mean")
    with _evaluated_by_pytorch(networks):
        if critics is None:
            return reference.one_step_action(net, obs, noise)
        particles = reference.one_step_action(net, obs.unsqueeze(1), noise)
        return reference.best_of(critics, obs, particles)


def reweighted_velocity(
    critics: Critics,
    obs: Tensor,
    z: Tensor,
    t: Tensor,
    *,
    alpha: float | Tensor,
    num_candidates: int = 32,
    sampling: CandidateSampling = "stratified",
    generator: torch.Generator | None = None,
    backend: BackendName = "auto",
) -> Reweighted:
    """Marginal velocity of exp(Qmin / alpha) at z from reverse samples (FLAME, Sec. 4.1).

    Args:
        critics: Twin critics.
        obs: ``(B, O)``; with embeddings what `critics.observe` gives.
        z: Noised actions ``(1 - t) action + t noise``, ``(B, A)``.
        t: Flow times in (0, 1], ``(B, 1)``.
        alpha: Temperature, positive.
        num_candidates: K importance samples per state.
        sampling: ``stratified`` (a Latin hypercube) or ``random`` (independent) candidates.
        generator: Source of the draws; the native kernel takes one seed of it for its own.
        backend: See the module.

    Returns:
        The velocity and its effective sample size; the weights only from PyTorch.

    Raises:
        ValueError: If the shapes, the temperature or the number of candidates do not fit.
        BackendUnavailableError: If the build or machine lacks the backend.
    """
    if t.shape != (len(z), 1) or z.shape[1:] != (critics.action_dim,):
        raise ValueError(
            f"z has shape {tuple(z.shape)} and t {tuple(t.shape)}; expected "
            f"(B, {critics.action_dim}) and (B, 1)"
        )
    if num_candidates < 1:
        raise ValueError(f"num_candidates={num_candidates}: give at least 1")
    expected = len(z), critics.block_sizes[1]
    if obs.shape != expected:
        raise ValueError(
            f"obs has shape {tuple(obs.shape)}; expected {expected}"
            + (": what critics.observe gives" if critics.encoder else "")
        )
    if not float(alpha) > 0:
        raise ValueError(f"alpha={float(alpha)} must be positive: weights are exp(Q / alpha)")
    native = _native(backend, "reweighted_velocity", [critics], (obs, z, t))
    if native is not None:
        velocity, ess = native(critics).reweighted_velocity(
            obs, z, 1 - t, t, float(alpha), num_candidates, sampling, generator
        )
        return Reweighted(velocity, ess, None)
    uniform = candidate_uniforms(z, num_candidates, sampling, generator)
    action, noise = reference.reverse_candidates(z, 1 - t, t, uniform)
    with _evaluated_by_pytorch([critics]):
        logits = critics.candidate_q_min(obs, action) / alpha
    return reference.reweighted_velocity(logits, action, noise)


def meanflow_loss(
    net: MeanVelocityNet,
    z: Tensor,
    r: Tensor,
    t: Tensor,
    obs: Tensor,
    velocity: Tensor,
    *,
    backend: BackendName = "auto",
) -> Tensor:
    """Collapsed, reweighted MeanFlow loss; shapes as in `reference.meanflow_loss`.

    Raises:
        ValueError: If the shapes do not fit.
        BackendUnavailableError: If the build or machine lacks the backend.
    """
    _check_columns(net, obs, z)
    alike = z.shape == velocity.shape and r.shape == t.shape == (len(z), 1)
    if not alike or len(obs) != len(z):
        raise ValueError(
            f"z {tuple(z.shape)}, velocity {tuple(velocity.shape)}, r {tuple(r.shape)}, "
            f"t {tuple(t.shape)} and obs {tuple(obs.shape)} must be (B, A), (B, A), (B, 1), (B, 1) "
            "and (B, O)"
        )
    rows = (z, r, t, obs, velocity)
    native = _native(backend, "meanflow_loss", [net], rows, lambda _: True)
    if native is not None:
        return native(net).meanflow_loss(z, r, t, obs, velocity)
    with _evaluated_by_pytorch([net]):
        return reference.meanflow_loss(net, z, r, t, obs, velocity)


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
    backend: BackendName = "auto",
) -> LogProb:
    """Log-likelihood of the flow policy at its own samples; see `reference.log_prob`.

    Raises:
        ValueError: If the options or shapes do not fit.
        BackendUnavailableError: If the build or machine lacks the backend.
    """
    _check_columns(net, obs, noise)
    rows = (obs, noise) if probe is None else (obs, noise, probe)
    native = _native(
        backend,
        "log_prob",
        [net],
        rows,
        lambda evaluator: evaluator.differentiates_log_prob(estimator, obs, noise),
    )
    if native is not None:
        return native(net).log_prob(
            obs, noise, estimator=estimator, steps=steps, trace=trace, flow=flow, probe=probe
        )
    with _evaluated_by_pytorch([net]):
        return reference.log_prob(
            net, obs, noise, estimator=estimator, steps=steps, trace=trace, flow=flow, probe=probe
        )


def _native(
    backend: str,
    operator: str,
    networks: Sequence[FlatMLP],
    rows: tuple[Tensor, ...],
    differentiates: Callable[[type[NativeEvaluator]], bool] = lambda _: False,
) -> type[NativeEvaluator] | None:
    """The native kernels that compute this call, or None for PyTorch.

    Args:
        backend: What the caller asked for.
        operator: For messages.
        networks: Whose parameters are read.
        rows: The other tensors.
        differentiates: Whether an evaluator's kernel records a gradient by the parameters.

    Raises:
        ValueError: If a native backend was asked for tensors or derivatives that it lacks.
        BackendUnavailableError: If the build or machine lacks the backend.
    """
    flats = tuple(net.flat for net in networks)
    name = resolve_operator(backend, operator, rows + flats)
    if name == "torch":
        return None
    evaluator = CudaEvaluator if name == "cuda" else NativeEvaluator
    wanted = rows if differentiates(evaluator) else rows + flats
    reverse = torch.is_grad_enabled() and any(x.requires_grad for x in wanted)
    derivative = reverse or any(_has_tangent(x) for x in rows + flats)
    embedded = any(getattr(net, "encoder", None) is not None for net in networks)
    if not derivative and not embedded:
        return evaluator
    if backend == name:
        lacks = (
            f"no such derivative of {operator}: wrap the call in torch.no_grad(), or"
            if derivative
            else f"no {operator} by critics with an encoder:"
        )
        raise ValueError(f"backend={name!r} has {lacks} use backend='torch' or 'auto'")
    return None


@contextmanager
def _evaluated_by_pytorch(networks: Sequence[FlatMLP]) -> Iterator[None]:
    """An agent's networks evaluate themselves natively, which forward-mode tangents do not pass."""
    encoders = [net.encoder for net in networks if isinstance(net, Critics) and net.encoder]
    plain = [*networks, *(net for encoder in encoders for net in encoder.networks().values())]
    evaluators = [net.evaluator for net in plain]
    try:
        for net in plain:
            net.evaluator = None
        yield
    finally:
        for net, evaluator in zip(plain, evaluators, strict=True):
            net.evaluator = evaluator


def _has_tangent(x: Tensor) -> bool:
    """Whether forward-mode differentiation or a function transform follows this tensor."""
    return (
        torch._C._functorch.is_functorch_wrapped_tensor(x)
        or forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]
    )


def _check_columns(net: MeanVelocityNet, obs: Tensor, action: Tensor) -> None:
    if obs.shape[-1] != net.obs_dim or action.shape[-1] != net.action_dim:
        raise ValueError(
            f"obs has {obs.shape[-1]} columns and the actions {action.shape[-1]}; this network "
            f"takes {net.obs_dim} and {net.action_dim}"
        )
    if not _kind(obs) == _kind(action) == _kind(net.flat):
        raise ValueError(
            f"obs is {_kind(obs)}, the actions {_kind(action)} and the network {_kind(net.flat)}; "
            "all must be alike"
        )


def _kind(x: Tensor) -> str:
    return f"{x.dtype} on {x.device}"
