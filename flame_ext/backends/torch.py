"""The pure-PyTorch backend: runs anywhere and is what the native backends are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from flame_ext.config import MatmulPrecision
from flame_ext.critics import Critics
from flame_ext.embeddings import StateActionEncoder
from flame_ext.networks import FlatMLP
from flame_ext.policies.base import Actor
from flame_ext.replay import Batch
from flame_ext.scalars import Scalar, Scalars, to_floats
from flame_ext.td_target import target_noise, td_target


class StepRunner(Protocol):
    """Runs an agent's steps and waits for what they report."""

    def __call__(
        self, steps: Callable[..., Scalars], batch: Batch, alpha: float, *options: object
    ) -> dict[str, float]:
        """Plain numbers of ``steps(batch, alpha, *options)``.

        Args:
            steps: The same in every call. They do not wait for a device, and the tensors that they
                read and write, beside those given, stay where they are in memory.
            batch: Of any size.
            alpha: Temperature.
            options: Decide what the steps do.
        """


def run_steps(
    steps: Callable[..., Scalars], batch: Batch, alpha: float, *options: object
) -> dict[str, float]:
    """The `StepRunner` that just calls them."""
    return to_floats(steps(batch, alpha, *options))


class TorchBackend:
    """Whole steps by autograd; gradients land in each network's flat buffer."""

    name = "torch"

    @contextmanager
    def training(self) -> Iterator[None]:
        """Surrounds a training loop; PyTorch needs nothing."""
        yield

    def step_runner(self, generator: torch.Generator) -> StepRunner:
        """What runs an agent's steps, which draw from `generator`."""
        return run_steps

    def set_learning_rate(self, optimizer: torch.optim.Adam, rate: float) -> None:
        """The rate of all steps from now on."""
        optimizer.param_groups[0]["lr"] = rate

    def accelerate(self, network: FlatMLP, matmul_precision: MatmulPrecision = "float32") -> None:
        """Prepares a network of the agent; PyTorch needs nothing.

        Raises:
            ValueError: If the backend or the machine has no such products, or none of the network.
        """
        if matmul_precision != "float32":
            raise ValueError(
                f"matmul_precision={matmul_precision!r} needs backend='cpu'; got {self.name!r}"
            )

    def critic_updates(
        self,
        actor: Actor,
        critics: Critics,
        target_critics: Critics,
        optimizer: torch.optim.Adam,
        batch: Batch,
        alpha: Scalar,
        generator: torch.Generator,
        updates: int = 1,
    ) -> Scalars:
        """Adam steps of the critics towards `td_target`, and the targets' average after each.

        Args:
            actor: The policy; it stays as it is.
            critics: What is trained.
            target_critics: Their averages.
            optimizer: The critics' Adam.
            batch: ``updates`` equal parts, one for each step in order.
            alpha: Temperature.
            generator: Draws the next actions' noise of all steps at once.
            updates: Number of steps.

        Returns:
            Scalars to log, means over the steps.
        """
        noise = target_noise(actor, batch, generator)
        sums: Scalars = {}
        for part, draws in zip(batch.split(updates), noise.chunk(updates), strict=True):
            target = td_target(actor, target_critics, part, draws, alpha, generator)
            metrics = self.critic_step(critics, part.obs, part.action, target)
            self.optimizer_step(optimizer)
            self.soft_update(target_critics.flat, critics.flat, actor.config.tau)
            sums = {name: sums.get(name, 0.0) + value for name, value in metrics.items()}
        return {name: total / updates for name, total in sums.items()}

    def critic_step(self, critics: Critics, obs: Tensor, action: Tensor, target: Tensor) -> Scalars:
        """Gradient of the twin critics' summed mean squared error to `target` ``(B,)``."""
        critics.flat.grad = None
        q = critics.q_values(obs, action)
        loss = F.mse_loss(q, target.expand_as(q), reduction="none").mean(1).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return {"critic_loss": loss.detach(), "q_mean": q.detach().mean()}

    def encoder_step(
        self, encoder: StateActionEncoder, obs: Tensor, action: Tensor, next_obs: Tensor
    ) -> Scalar:
        """Gradients of the encoder's prediction loss, which is returned."""
        for network in encoder.networks().values():
            network.flat.grad = None
        loss = encoder.prediction_loss(obs, action, next_obs)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def actor_step(
        self,
        actor: Actor,
        obs: Tensor,
        action: Tensor,
        critics: Critics,
        alpha: Scalar,
        generator: torch.Generator,
    ) -> Scalars:
        """Gradient of the policy's loss on states ``(B, O)`` and actions ``(B, A)``.

        Returns:
            ``policy_loss`` and `ActorLoss.metrics`.
        """
        actor.network.flat.grad = None
        with _frozen(critics):
            result = actor.loss(obs, action, critics, alpha, generator)
            result.loss.backward()  # type: ignore[no-untyped-call]
        return {"policy_loss": result.loss.detach(), **result.metrics}

    def optimizer_step(self, optimizer: torch.optim.Adam) -> None:
        """One Adam step of a network's flat buffer."""
        optimizer.step()

    @torch.no_grad()
    def soft_update(self, target: Tensor, online: Tensor, tau: float) -> None:
        """Target <- target + tau (online - target), in place."""
        target.lerp_(online, tau)


@contextmanager
def _frozen(network: FlatMLP) -> Iterator[None]:
    """Lets gradients pass through the network to its inputs but not into its parameters."""
    network.flat.requires_grad_(False)
    try:
        yield
    finally:
        network.flat.requires_grad_(True)


def zeroed_gradient(network: FlatMLP) -> Tensor:
    """The network's gradient buffer, all zeros, for kernels that add to it."""
    if network.flat.grad is None:
        network.flat.grad = torch.zeros_like(network.flat)
    return network.flat.grad.zero_()


def adam_moments(optimizer: torch.optim.Adam) -> dict[str, Tensor]:
    """Adam's state for its one parameter, created as zeros if no step was taken yet."""
    parameter = optimizer.param_groups[0]["params"][0]
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter, requires_grad=False)
        state["exp_avg_sq"] = torch.zeros_like(parameter, requires_grad=False)
    return {slot: state[slot] for slot in ("step", "exp_avg", "exp_avg_sq")}
