"""A network's evaluations by the native CPU kernels, where the losses are built by autograd."""

from __future__ import annotations

import itertools
import math
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from flame_ext.backends.native_views import (
    array,
    denoising_sampler,
    flow_sampler,
    flow_table,
    gaussian_sampler,
    mlp_spec,
)
from flame_ext.critics import Critics
from flame_ext.native import load_core
from flame_ext.networks import FlatMLP
from flame_ext.reference import (
    LogProb,
    check_log_prob_options,
    take_best,
)
from flame_ext.sampling import (
    EMBEDDING_MIN_SCALE,
    LOG_STD_RANGE,
    CandidateSampling,
    Estimator,
    Flow,
    Trace,
)
from flame_ext.scalars import Scalar

# What a kernel computes for `reference.log_prob`'s trace option.
DIVERGENCES = {"exact": "trace", "hutchinson": "probe", "log_det": "log_det"}


class NativeEvaluator:
    """A network's evaluations by native kernels.

    Args:
        network: A float32 network on the CPU; its flat buffer is read in place.
        bfloat16: Whether the factors of products are rounded to bfloat16; sums stay float32.
    """

    differentiates_forward = True

    def __init__(self, network: FlatMLP, bfloat16: bool = False) -> None:
        self.network, self.bfloat16 = network, bfloat16
        mlp_spec(network, bfloat16)  # raises where the kernels cannot run it

    # Looked up in each use: copies and pickles of a network carry no native objects along, and
    # what replaces its flat buffer is seen.

    @property
    def core(self) -> ModuleType:
        """The native module."""
        return load_core()

    @property
    def spec(self) -> Any:
        """The network's shape as native code takes it."""
        return mlp_spec(self.network, self.bfloat16)

    @property
    def parameters(self) -> NDArray[np.float32]:
        """The flat buffer's memory."""
        return array(self.network.flat)

    @property
    def view(self) -> tuple[Any, NDArray[np.float32]]:
        """The network as native code takes it."""
        return self.spec, self.parameters

    def forward(self, blocks: tuple[Tensor, ...]) -> Tensor:
        """As `FlatMLP.forward`, differentiable once."""
        batch = np.broadcast_shapes(*(tuple(block.shape[:-1]) for block in blocks))
        rows = torch.cat([block.expand(*batch, -1) for block in blocks], dim=-1)
        ends = itertools.accumulate(block.shape[-1] for block in blocks)
        columns = [end for block, end in zip(blocks, ends, strict=True) if block.requires_grad]
        out = self.forward_rows(rows.reshape(-1, rows.shape[-1]), max(columns, default=0))
        return out.view(self.network.members, *batch, out.shape[-1])

    def forward_rows(self, rows: Tensor, columns: int = 0) -> Tensor:
        """Outputs ``(members, B, out)`` of concatenated inputs ``(B, in)``.

        Differentiable by the parameters and by the first `columns` inputs.
        """
        if torch.is_grad_enabled() and (columns > 0 or self.network.flat.requires_grad):
            recorded: Tensor = _Forward.apply(  # type: ignore[no-untyped-call]
                self.network.flat, rows, self, columns
            )
            return recorded
        out = self.core.mlp_forward(self.spec, self.parameters, array(rows))
        return torch.from_numpy(out)

    def observe(self, obs: Tensor) -> Tensor:
        """As `StateActionEncoder.observe` for rows, without gradient; this network is f."""
        observed = self.core.observe(self.view, array(obs), min_scale=EMBEDDING_MIN_SCALE)
        return torch.from_numpy(observed)

    def q_gradient(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Qmin ``(B,)`` and its gradient with respect to the action ``(B, A)``."""
        rows = (array(x.contiguous()) for x in (obs, action))
        q, gradient = self.core.q_gradient(self.spec, self.parameters, *rows)
        return torch.from_numpy(q), torch.from_numpy(gradient)

    def meanflow_gradient(
        self, z: Tensor, r: Tensor, t: Tensor, obs: Tensor, velocity: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The collapsed MeanFlow loss and its gradient in the flat layout."""
        gradient = torch.zeros_like(self.network.flat)
        loss = self.core.meanflow_step(
            self.spec,
            self.parameters,
            gradient.numpy(),
            array(obs.contiguous()),
            array(z.contiguous()),
            array(r.reshape(-1).contiguous()),
            array(t.reshape(-1).contiguous()),
            array(velocity.contiguous()),
        )
        return gradient.new_tensor(loss), gradient

    def density(
        self,
        obs: Tensor,
        noise: Tensor,
        steps: int,
        flow: Flow,
        divergence: str,
        probe: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Action, log-density and fold flag of samples ``(S, A)`` or ``(S, K, A)``."""
        arguments = self.density_arguments(obs, noise, steps, flow)
        probes = None if probe is None else array(probe.contiguous())
        outputs = self.core.flow_density(*arguments, divergence, probes)
        action, log_prob, folded = (torch.from_numpy(x) for x in outputs)
        return action, log_prob, folded

    def record_density(
        self, obs: Tensor, noise: Tensor, steps: int, flow: Flow
    ) -> tuple[tuple[Tensor, ...], Any]:
        """Action, log-density, fold flag and transport of rows, and what their gradient needs."""
        recorded = self.core.RecordedDensity(*self.density_arguments(obs, noise, steps, flow))
        outputs = (recorded.action, recorded.log_prob, recorded.folded, recorded.transport)
        return tuple(torch.from_numpy(x) for x in outputs), recorded

    def density_gradient(self, recorded: Any, *d_outputs: Tensor) -> Tensor:
        """The parameters' gradient from those of action, log-density and transport."""
        gradient = torch.zeros_like(self.network.flat)
        recorded.backward(array(gradient), *(array(x.contiguous()) for x in d_outputs))
        return gradient

    def q_min(self, obs: Tensor, action: Tensor) -> Tensor:
        """As `Critics.q_min` for rows, differentiable with respect to the action alone."""
        q: Tensor = _QMin.apply(action, obs, self)  # type: ignore[no-untyped-call]
        return q

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
        """As `reference.log_prob`, without `LogProb.transport` where no gradient is recorded.

        The exact density of rows ``(B, A)`` is differentiable with respect to the parameters and
        raises for a second derivative; everything else is for ``torch.no_grad()``.
        """
        check_log_prob_options(estimator, steps, trace, probe)
        if torch.is_grad_enabled() and self.network.flat.requires_grad:
            if not self.differentiates_log_prob(estimator, obs, noise):
                raise RuntimeError(
                    "the native log_prob is differentiated for estimator='exact' and rows (B, A) "
                    f"only; got estimator={estimator!r} and noise {tuple(noise.shape)}"
                )
            outputs = _Density.apply(  # type: ignore[no-untyped-call]
                self.network.flat, obs, noise, self, steps, flow
            )
            return LogProb(*outputs)
        divergence = DIVERGENCES["log_det" if estimator == "exact" else trace]
        states, samples = per_state(obs, noise)
        shape = np.broadcast_shapes(tuple(obs.shape[:-1]), tuple(noise.shape[:-1]))
        probes = None
        if divergence == "probe" and probe is not None:
            probes = probe.expand(*shape, -1).reshape(samples.shape)
        action, log_prob, folded = self.density(states, samples, steps, flow, divergence, probes)
        return LogProb(
            action.view(*shape, noise.shape[-1]), log_prob.view(shape), folded.view(shape)
        )

    @staticmethod
    def differentiates_log_prob(estimator: Estimator, obs: Tensor, noise: Tensor) -> bool:
        """Whether `log_prob` records a gradient for these options."""
        rows = obs.dim() == noise.dim() == 2 and len(obs) == len(noise) > 0
        return rows and estimator == "exact"

    def sample_flow(self, obs: Tensor, noise: Tensor, steps: int, flow: Flow) -> Tensor:
        """As `reference.sample_flow`, without gradient: observations enter once per state."""
        states, samples = per_state(obs, noise)
        shape = np.broadcast_shapes(tuple(obs.shape[:-1]), tuple(noise.shape[:-1]))
        action, _, _ = self.density(states, samples, steps, flow, "none")
        return action.view(*shape, noise.shape[-1])

    def denoise(self, obs: Tensor, noise: Tensor, steps: int) -> Tensor:
        """As `reference.denoise`, without gradient."""
        shape = np.broadcast_shapes(tuple(obs.shape[:-1]), tuple(noise.shape[:-1]))
        rows = (array(x.contiguous()) for x in paired_rows(obs, noise))
        action = denoising_sampler(self.spec, steps).sample(self.parameters, *rows)
        return torch.from_numpy(action).view(*shape, noise.shape[-1])

    def best_action(
        self, obs: Tensor, noise: Tensor, critics: Critics | None, steps: int, flow: Flow
    ) -> Tensor:
        """Best of N by Qmin, without gradient.

        Args:
            obs: ``(B, O)``.
            noise: ``(B, N, A)``.
            critics: Not needed for N = 1.
            steps: Of the flow.
            flow: See `flow_steps`.

        Returns:
            ``(B, A)`` in [-1, 1].
        """
        critics = chooser(critics, noise.shape[1])
        if critics is None:
            rows = (array(obs.contiguous()), array(noise.squeeze(1).contiguous()))
            return torch.from_numpy(
                flow_sampler(self.spec, steps, flow).sample(self.parameters, *rows)
            )
        particles = self.sample_flow(obs.unsqueeze(1), noise, steps, flow).clamp_(-1, 1)
        return take_best(particles, type(self)(critics).candidates(obs, particles))

    def reweighted_velocity(
        self,
        obs: Tensor,
        z: Tensor,
        signal: Tensor,
        scale: Tensor,
        alpha: Scalar,
        num_candidates: int,
        sampling: CandidateSampling,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        """Reverse candidates, their weights, velocity and ESS in one pass; no gradient.

        The uniforms are the kernel's own Philox draws, seeded by one draw of `generator`.
        """
        seed = int(draw_seed(generator))
        velocity, ess = self.core.reweighted_velocity(
            self.spec,
            self.parameters,
            array(obs.contiguous()),
            array(z.contiguous()),
            array(signal.reshape(-1).contiguous()),
            array(scale.reshape(-1).contiguous()),
            alpha,
            num_candidates=num_candidates,
            sampling=sampling,
            seed=seed,
        )
        return torch.from_numpy(velocity), torch.from_numpy(ess)

    def sample_gaussian(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Actions tanh(mean + std noise) for rows, without gradient."""
        rows = (array(x.contiguous()) for x in (obs, noise))
        return torch.from_numpy(gaussian_sampler(self.spec).sample(self.parameters, *rows))

    def tanh_gaussian(self, output: Tensor, noise: Tensor) -> LogProb:
        """As `reference.tanh_gaussian` for rows, differentiable once by the network's output."""
        action, log_prob = _TanhGaussian.apply(output, noise, self.core)  # type: ignore[no-untyped-call]
        return LogProb(action, log_prob, torch.zeros_like(log_prob, dtype=torch.bool))

    def monotonicity_gap(self, transport: Tensor, margin: float) -> Tensor:
        """As `reference.monotonicity_gap` for rows, differentiable once."""
        gap: Tensor = _MonotonicityGap.apply(transport, margin, self)  # type: ignore[no-untyped-call]
        return gap

    def gap_and_gradient(self, transport: Tensor, margin: float) -> tuple[Tensor, Tensor]:
        """`monotonicity_gap` and its gradient: ``(B, A, A)`` -> ``(B,)``, ``(B, A, A)``."""
        gap, gradient = self.core.monotonicity_gap(array(transport.contiguous()), margin)
        return torch.from_numpy(gap), torch.from_numpy(gradient)

    def meanflow_loss(
        self, z: Tensor, r: Tensor, t: Tensor, obs: Tensor, velocity: Tensor
    ) -> Tensor:
        """As `reference.meanflow_loss`; differentiable once with respect to the parameters."""
        rows = (z, r, t, obs, velocity)
        loss: Tensor = _MeanFlowLoss.apply(self.network.flat, self, *rows)  # type: ignore[no-untyped-call]
        return loss

    def density_arguments(
        self, obs: Tensor, noise: Tensor, steps: int, flow: Flow
    ) -> tuple[Any, ...]:
        """What the density kernels take."""
        return (
            self.spec,
            self.parameters,
            array(obs.contiguous()),
            array(noise.contiguous()),
            *flow_table(steps, flow),
        )

    def candidates(self, obs: Tensor, action: Tensor) -> Tensor:
        """As `Critics.candidate_q_min`: layer one's observation part once per state."""
        q = self.core.twin_q(
            self.spec, self.parameters, array(obs.contiguous()), array(action.contiguous())
        )
        return torch.from_numpy(q)


class _Forward(torch.autograd.Function):
    """A network's output, with its gradient by the parameters and the first inputs."""

    @staticmethod
    def forward(
        ctx: Any, flat: Tensor, rows: Tensor, evaluator: NativeEvaluator, columns: int
    ) -> Tensor:
        recorded = evaluator.core.RecordedMlp(evaluator.spec, array(flat), array(rows), columns)
        ctx.recorded, ctx.size, ctx.shape = recorded, flat.numel(), rows.shape
        return torch.from_numpy(recorded.output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        gradient = torch.zeros(ctx.size) if ctx.needs_input_grad[0] else None
        leading = ctx.recorded.backward(
            array(d_output.contiguous()), None if gradient is None else gradient.numpy()
        )
        if leading.shape[1] == 0:
            return gradient, None, None, None
        d_rows = torch.zeros(ctx.shape)
        d_rows[:, : leading.shape[1]] = torch.from_numpy(leading)
        return gradient, d_rows, None, None


class _QMin(torch.autograd.Function):
    """Qmin and its gradient with respect to the action, from one native call."""

    @staticmethod
    def forward(ctx: Any, action: Tensor, obs: Tensor, evaluator: NativeEvaluator) -> Tensor:
        q, gradient = evaluator.q_gradient(obs, action)
        ctx.save_for_backward(gradient)
        return q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_q: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return d_q.unsqueeze(1) * gradient, None, None


class _TanhGaussian(torch.autograd.Function):
    """Action and log-density of the tanh-squashed Gaussian."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, noise: Tensor, core: Any) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(output, noise)
        ctx.core = core
        rows = (array(x.contiguous()) for x in (output, noise))
        sample = core.tanh_gaussian(*rows, LOG_STD_RANGE)
        action, log_prob = (torch.from_numpy(x) for x in sample)
        return action, log_prob

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_action: Tensor, d_log_prob: Tensor) -> tuple[Tensor, None, None]:
        arrays = (array(x.contiguous()) for x in (*ctx.saved_tensors, d_action, d_log_prob))
        gradient = ctx.core.tanh_gaussian_gradient(*arrays, LOG_STD_RANGE)
        return torch.from_numpy(gradient), None, None


class _Density(torch.autograd.Function):
    """Action, exact log-density, fold flag and transport Jacobian of the one-step policy."""

    @staticmethod
    def forward(
        ctx: Any,
        _: Tensor,
        obs: Tensor,
        noise: Tensor,
        evaluator: NativeEvaluator,
        steps: int,
        flow: Flow,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        outputs, ctx.recorded = evaluator.record_density(obs, noise, steps, flow)
        ctx.evaluator = evaluator
        action, log_prob, folded, transport = outputs
        ctx.mark_non_differentiable(folded)
        return action, log_prob, folded, transport

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_action: Tensor, d_log_prob: Tensor, _: Tensor, d_transport: Tensor
    ) -> tuple[Tensor | None, ...]:
        gradient = ctx.evaluator.density_gradient(ctx.recorded, d_action, d_log_prob, d_transport)
        return gradient, *[None] * 5


class _MonotonicityGap(torch.autograd.Function):
    """The gap and its gradient, from one native call."""

    @staticmethod
    def forward(ctx: Any, transport: Tensor, margin: float, evaluator: NativeEvaluator) -> Tensor:
        gap, gradient = evaluator.gap_and_gradient(transport, margin)
        ctx.save_for_backward(gradient)
        return gap

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_gap: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return d_gap.view(-1, 1, 1) * gradient, None, None


class _MeanFlowLoss(torch.autograd.Function):
    """The collapsed MeanFlow loss and its gradient, from one native call."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, evaluator: NativeEvaluator, *rows: Tensor) -> Tensor:
        loss, gradient = evaluator.meanflow_gradient(*rows)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return d_loss * gradient, *[None] * 6


def per_state(obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """States ``(S, O)`` and samples ``(S, K, A)`` or ``(S, A)`` of broadcastable arguments."""
    if noise.dim() == 3 and obs.dim() == 3 and obs.shape[:2] == (len(noise), 1):
        return obs.squeeze(1), noise
    return paired_rows(obs, noise)


def paired_rows(obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """States ``(S, O)`` and one sample of each ``(S, A)`` of broadcastable arguments."""
    shape = np.broadcast_shapes(tuple(obs.shape[:-1]), tuple(noise.shape[:-1]))
    rows = math.prod(shape)
    return (
        obs.expand(*shape, -1).reshape(rows, obs.shape[-1]),
        noise.expand(*shape, -1).reshape(rows, noise.shape[-1]),
    )


def chooser(critics: Critics | None, particles: int) -> Critics | None:
    """The critics that choose among so many particles, None for one."""
    if particles > 1 and critics is None:
        raise ValueError(f"the best of {particles} particles needs critics")
    return critics if particles > 1 else None


def draw_seed(generator: torch.Generator | None) -> Tensor:
    """One seed for a kernel's own generator, an int64 where `generator` draws."""
    device = None if generator is None else generator.device
    return torch.randint(2**63 - 1, (), generator=generator, device=device)
