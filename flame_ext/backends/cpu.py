"""The native CPU backend: whole steps by the fused C++ kernels, in place on the flat buffers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from flame_ext.backends.torch import TorchBackend
from flame_ext.native import load_core
from flame_ext.networks import Critics, FlatMLP
from flame_ext.reference import LogProb
from flame_ext.sampling import flow_steps, time_feature_rows

_ONE_STEP = flow_steps(1, "mean")


class CpuBackend(TorchBackend):
    """Critic step, target update and every large evaluation inside the losses by native kernels.

    Autograd only joins the flow policy's native pieces (exact density, MeanFlow loss, Qmin); the
    Gaussian policy's own network is differentiated by PyTorch.
    """

    name = "cpu"

    def __init__(self) -> None:
        self._core = load_core()
        self._core.set_num_threads(torch.get_num_threads())

    def accelerate(self, network: FlatMLP) -> None:
        network.evaluator = NativeEvaluator(network)

    def critic_step(
        self, critics: Critics, obs: Tensor, action: Tensor, target: Tensor
    ) -> dict[str, float]:
        if critics.flat.grad is None:
            critics.flat.grad = torch.zeros_like(critics.flat)
        gradient = critics.flat.grad.zero_()
        losses, means, _ = self._core.critic_step(
            _spec(critics),
            _array(critics.flat),
            gradient.numpy(),
            _array(obs),
            _array(action),
            _array(target),
        )
        return {"critic_loss": sum(losses), "q_mean": float(np.mean(means))}

    def soft_update(self, target: Tensor, online: Tensor, tau: float) -> None:
        self._core.soft_update(_array(target), _array(online), tau)


class NativeEvaluator:
    """A network's evaluations by native kernels.

    Args:
        network: A float32 network on the CPU; its flat buffer is read in place.
    """

    def __init__(self, network: FlatMLP) -> None:
        self.network, self.core = network, load_core()
        self.spec = _spec(network)

    def forward(self, blocks: tuple[Tensor, ...]) -> Tensor:
        """As `FlatMLP.forward`."""
        batch = np.broadcast_shapes(*(tuple(block.shape[:-1]) for block in blocks))
        rows = torch.cat([block.expand(*batch, -1) for block in blocks], dim=-1)
        flat_rows = rows.reshape(-1, rows.shape[-1])
        out = self.core.mlp_forward(self.spec, _array(self.network.flat), _array(flat_rows))
        return torch.from_numpy(out).view(self.network.members, *batch, -1)

    def q_min(self, obs: Tensor, action: Tensor) -> Tensor:
        """As `Critics.q_min` for rows, differentiable with respect to the action alone."""
        q: Tensor = _QMin.apply(action, obs, self)  # type: ignore[no-untyped-call]
        return q

    def log_prob(self, obs: Tensor, noise: Tensor) -> LogProb:
        """As `reference.log_prob` with the exact estimator, for rows ``(B, A)``.

        Differentiable with respect to the parameters; raises for a second derivative.
        """
        if not torch.is_grad_enabled():
            action, log_prob, folded = self.core.flow_density(
                *self.density_arguments(obs, noise), "log_det"
            )
            return LogProb(*(torch.from_numpy(x) for x in (action, log_prob, folded)))
        outputs = _Density.apply(  # type: ignore[no-untyped-call]
            self.network.flat, obs, noise, self
        )
        return LogProb(*outputs)

    def meanflow_loss(
        self, z: Tensor, r: Tensor, t: Tensor, obs: Tensor, velocity: Tensor
    ) -> Tensor:
        """As `reference.meanflow_loss`; differentiable once with respect to the parameters."""
        rows = (z, r, t, obs, velocity)
        loss: Tensor = _MeanFlowLoss.apply(self.network.flat, self, *rows)  # type: ignore[no-untyped-call]
        return loss

    def density_arguments(self, obs: Tensor, noise: Tensor) -> tuple[Any, ...]:
        """What the density kernels take for the one step that acts."""
        return (
            self.spec,
            _array(self.network.flat),
            _array(obs),
            _array(noise),
            time_feature_rows(_ONE_STEP),
            np.array([step.q for step in _ONE_STEP], np.float32),
        )

    def candidates(self, obs: Tensor, action: Tensor) -> Tensor:
        """As `Critics.candidate_q_min`: layer one's observation part once per state."""
        q = self.core.twin_q(
            self.spec, _array(self.network.flat), _array(obs), _array(action.contiguous())
        )
        return torch.from_numpy(q)


class _QMin(torch.autograd.Function):
    """Qmin and its gradient with respect to the action, from one native call."""

    @staticmethod
    def forward(ctx: Any, action: Tensor, obs: Tensor, evaluator: NativeEvaluator) -> Tensor:
        flat = _array(evaluator.network.flat)
        q, gradient = evaluator.core.q_gradient(evaluator.spec, flat, _array(obs), _array(action))
        ctx.save_for_backward(torch.from_numpy(gradient))
        return torch.from_numpy(q)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_q: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return d_q.unsqueeze(1) * gradient, None, None


class _Density(torch.autograd.Function):
    """Action, exact log-density, fold flag and transport Jacobian of the one-step policy."""

    @staticmethod
    def forward(
        ctx: Any, flat: Tensor, obs: Tensor, noise: Tensor, evaluator: NativeEvaluator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        recorded = evaluator.core.RecordedDensity(*evaluator.density_arguments(obs, noise))
        ctx.recorded, ctx.size = recorded, flat.numel()
        outputs = (recorded.action, recorded.log_prob, recorded.folded, recorded.transport)
        action, log_prob, folded, transport = (torch.from_numpy(x) for x in outputs)
        ctx.mark_non_differentiable(folded)
        return action, log_prob, folded, transport

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_action: Tensor, d_log_prob: Tensor, _: Tensor, d_transport: Tensor
    ) -> tuple[Tensor, None, None, None]:
        gradient = torch.zeros(ctx.size)
        ctx.recorded.backward(
            gradient.numpy(),
            _array(d_action.contiguous()),
            _array(d_log_prob.contiguous()),
            _array(d_transport.contiguous()),
        )
        return gradient, None, None, None


class _MeanFlowLoss(torch.autograd.Function):
    """The collapsed MeanFlow loss and its gradient, from one native call."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, evaluator: NativeEvaluator, *rows: Tensor) -> Tensor:
        z, r, t, obs, velocity = (_array(x.contiguous()) for x in rows)
        gradient = torch.zeros_like(flat)
        loss = evaluator.core.meanflow_step(
            evaluator.spec,
            _array(flat),
            gradient.numpy(),
            obs,
            z,
            r.reshape(-1),
            t.reshape(-1),
            velocity,
        )
        ctx.save_for_backward(gradient)
        return flat.new_tensor(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return d_loss * gradient, *[None] * 6


def _spec(network: FlatMLP) -> Any:
    return load_core().MlpSpec(
        list(network.layer_sizes),
        members=network.members,
        activation=network.activation,
        layer_norm=network.layer_norm,
    )


def _array(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.detach().numpy()
    return array
