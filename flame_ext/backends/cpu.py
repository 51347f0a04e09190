"""The native CPU backend: whole steps by the fused C++ kernels, in place on the flat buffers."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flame_ext.backends.native_evaluator import NativeEvaluator, draw_seed
from flame_ext.backends.native_views import array, flow_sampler, mlp_spec
from flame_ext.backends.samplers import native_sampler, next_action_steps
from flame_ext.backends.torch import TorchBackend, adam_moments, zeroed_gradient
from flame_ext.config import Config, MatmulPrecision
from flame_ext.critics import Critics
from flame_ext.embeddings import StateActionEncoder
from flame_ext.native import load_core
from flame_ext.networks import FlatMLP, MeanVelocityNet
from flame_ext.policies.base import Actor, normal_like
from flame_ext.policies.flow import MIN_TIME, WALL_SCALE, FlowActor
from flame_ext.policies.gaussian import GaussianActor
from flame_ext.replay import Batch
from flame_ext.sampling import EMBEDDING_MIN_SCALE
from flame_ext.scalars import Scalar, Scalars
from flame_ext.td_target import target_noise


class CpuBackend(TorchBackend):
    """Critic updates, policy loss with gradient and Adam as one native call each.

    Options without a fused form (several particles in the TD target, ``proposal="policy"``,
    the diffusion policy's loss) are built by autograd from native evaluations; PyTorch still
    differentiates a reverse-KL term through ``multi_step`` of one step or ``one_step_trace``.
    """

    name = "cpu"

    def __init__(self) -> None:
        self._core = load_core()
        # PyTorch's setting holds for the kernels too, unless they were given one of their own.
        if not os.environ.get("FLAME_EXT_NUM_THREADS"):
            self._core.set_num_threads(min(_pytorch_threads.count(), _MAX_THREADS))

    @contextmanager
    def training(self) -> Iterator[None]:
        """Keeps PyTorch's own threads off the cores that the kernels use.

        After every parallel operation they spin for milliseconds, waiting for the next one: with
        them beside it on two cores no kernel was faster on two threads than on one.
        """
        with _pytorch_threads.kept_to_one():
            yield

    def accelerate(self, network: FlatMLP, matmul_precision: MatmulPrecision = "float32") -> None:
        bfloat16 = matmul_precision == "bfloat16"
        if bfloat16 and not self._core.bfloat16_supported():
            raise ValueError(
                "matmul_precision='bfloat16' needs a CPU with AVX512-BF16 and AVX-512 in use; here "
                f"it is {self._core.isa_active()}. Use matmul_precision='float32'."
            )
        try:
            if isinstance(network, MeanVelocityNet):
                flow_sampler(mlp_spec(network), 1, "mean")
            network.evaluator = NativeEvaluator(network, bfloat16)
        except ValueError as error:
            raise ValueError(f"the native kernels: {error}. Use backend='torch'.") from error

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
        c = actor.config
        steps = next_action_steps(actor)
        if steps is None:
            return super().critic_updates(
                actor, critics, target_critics, optimizer, batch, alpha, generator, updates
            )
        rows = (batch.obs, batch.action, batch.reward, batch.discount, batch.next_obs)
        noise = target_noise(actor, batch, generator).squeeze(1)
        adam, trained = _Adam.of(optimizer), _evaluator(critics)
        loss, q_mean = self._core.critic_updates(
            native_sampler(actor, steps),
            _evaluator(actor.network).parameters,
            trained.spec,
            trained.parameters,
            adam.first_moment,
            adam.second_moment,
            _evaluator(target_critics).parameters,
            *(array(x) for x in rows),
            array(noise),
            reward_scale=c.reward_scale,
            alpha=alpha if c.entropy_in_target else 0.0,
            tau=c.tau,
            updates=updates,
            pair=_pair(critics),
            **adam.options(),
        )
        adam.advance(updates)
        return {"critic_loss": loss, "q_mean": q_mean}

    def critic_step(self, critics: Critics, obs: Tensor, action: Tensor, target: Tensor) -> Scalars:
        gradient, trained = zeroed_gradient(critics), _evaluator(critics)
        obs, action = critics.inputs(obs, action)
        losses, means, _ = self._core.critic_step(
            trained.spec,
            trained.parameters,
            gradient.numpy(),
            array(obs),
            array(action),
            array(target),
        )
        return {"critic_loss": sum(losses), "q_mean": float(np.mean(means))}

    def encoder_step(
        self, encoder: StateActionEncoder, obs: Tensor, action: Tensor, next_obs: Tensor
    ) -> Scalar:
        networks = encoder.state_network, encoder.pair_network
        loss: float = self._core.encoder_step(
            *(_evaluator(network).view for network in networks),
            *(zeroed_gradient(network).numpy() for network in networks),
            *(array(x) for x in (obs, action, next_obs)),
            min_scale=EMBEDDING_MIN_SCALE,
        )
        return loss

    def optimizer_step(self, optimizer: torch.optim.Adam) -> None:
        adam = _Adam.of(optimizer)
        self._core.adam(
            adam.parameters,
            adam.group["params"][0].grad.numpy(),
            adam.first_moment,
            adam.second_moment,
            **adam.options(),
        )
        adam.advance(1)

    def soft_update(self, target: Tensor, online: Tensor, tau: float) -> None:
        self._core.soft_update(array(target), array(online), tau)

    def actor_step(
        self,
        actor: Actor,
        obs: Tensor,
        action: Tensor,
        critics: Critics,
        alpha: Scalar,
        generator: torch.Generator,
    ) -> Scalars:
        if isinstance(actor, GaussianActor):
            return self._gaussian_step(actor, obs, critics, alpha, generator)
        if isinstance(actor, FlowActor) and _is_fused(actor.config):
            return self._flow_step(actor, obs, action, critics, alpha, generator)
        return super().actor_step(actor, obs, action, critics, alpha, generator)

    def _gaussian_step(
        self,
        actor: GaussianActor,
        obs: Tensor,
        critics: Critics,
        alpha: Scalar,
        generator: torch.Generator,
    ) -> Scalars:
        noise = normal_like(obs, (len(obs), actor.action_dim), generator)
        loss, log_prob = self._core.gaussian_loss(
            *_loss_arguments(actor, critics, obs), array(noise), alpha
        )
        return {"policy_loss": loss, "entropy": -log_prob}

    def _flow_step(
        self,
        actor: FlowActor,
        obs: Tensor,
        action: Tensor,
        critics: Critics,
        alpha: Scalar,
        generator: torch.Generator,
    ) -> Scalars:
        """As `FlowActor.loss`, with its gradient."""
        c = actor.config
        arguments = _loss_arguments(actor, critics, obs)
        loss, metrics = 0.0, {}
        if c.reverse_kl_weight > 0:
            noise = normal_like(obs, (len(obs), actor.action_dim), generator)
            kl, log_prob, fold_rate = self._core.flow_reverse_kl(
                *arguments,
                array(noise),
                alpha,
                weight=c.reverse_kl_weight,
                boundary_width=c.boundary_width,
                monotonicity_margin=c.monotonicity_margin,
                wall_scale=WALL_SCALE,
            )
            loss += c.reverse_kl_weight * kl
            metrics = {"entropy": -log_prob, "fold_rate": fold_rate, "reverse_kl_loss": kl}
        if c.reweighting_weight > 0:
            uniform = actor.draw_time_uniforms(obs, generator)
            source, noise = actor.draw_ends(obs, action, critics, alpha, generator)
            weight = c.reweighting_weight * alpha
            flow_loss, ess = self._core.flow_matching(
                *arguments,
                array(source),
                array(noise),
                array(uniform),
                alpha,
                weight=weight,
                min_time=MIN_TIME,
                instantaneous_fraction=c.instantaneous_fraction,
                acting_fraction=c.acting_fraction,
                num_candidates=c.num_candidates,
                sampling=c.candidate_sampling,
                seed=int(draw_seed(generator)),
            )
            loss += weight * flow_loss
            metrics |= {"ess": ess, "reweighted_loss": flow_loss}
        return {"policy_loss": loss, **metrics}


class _PytorchThreads:
    """PyTorch's number of threads, which is the process's: it comes back after the last run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs, self._count = 0, 1

    def count(self) -> int:
        """What it is, or will be again."""
        with self._lock:
            return self._count if self._runs else torch.get_num_threads()

    @contextmanager
    def kept_to_one(self) -> Iterator[None]:
        """Sets it to one; any number of runs may overlap."""
        with self._lock:
            if self._runs == 0:
                self._count = torch.get_num_threads()
            self._runs += 1
            torch.set_num_threads(1)
        try:
            yield
        finally:
            with self._lock:
                self._runs -= 1
                if self._runs == 0:
                    torch.set_num_threads(self._count)


_pytorch_threads = _PytorchThreads()
_MAX_THREADS = 256  # of the kernels


@dataclass(frozen=True)
class _Adam:
    """The memory of PyTorch's Adam as the kernels take it, in place.

    Attributes:
        parameters: Of its one tensor, a network's flat buffer.
        first_moment: Running mean of gradients.
        second_moment: Running mean of their squares.
        step: Steps taken, of no dimension.
        group: Its options.
    """

    parameters: NDArray[np.float32]
    first_moment: NDArray[np.float32]
    second_moment: NDArray[np.float32]
    step: NDArray[np.float32]
    group: dict[str, Any]

    @classmethod
    def of(cls, optimizer: torch.optim.Adam) -> _Adam:
        (group,) = optimizer.param_groups
        (parameter,) = group["params"]
        moments = adam_moments(optimizer)
        return cls(
            array(parameter),
            array(moments["exp_avg"]),
            array(moments["exp_avg_sq"]),
            array(moments["step"]),
            group,
        )

    def options(self) -> dict[str, Any]:
        """What the kernels are told of the next step."""
        beta1, beta2 = self.group["betas"]
        return {
            "step": int(self.step) + 1,
            "learning_rate": self.group["lr"],
            "beta1": beta1,
            "beta2": beta2,
            "epsilon": self.group["eps"],
        }

    def advance(self, steps: int) -> None:
        """Counts steps that were taken."""
        self.step[...] += steps


def _evaluator(network: FlatMLP) -> NativeEvaluator:
    return cast("NativeEvaluator", network.evaluator)


def _pair(critics: Critics) -> tuple[Any, NDArray[np.float32]] | None:
    """The encoder of what critics see beside the action."""
    return None if critics.encoder is None else _evaluator(critics.encoder.pair_network).view


def _is_fused(config: Config) -> bool:
    exact = config.reverse_kl_weight == 0 or config.entropy_estimator == "exact"
    return exact and config.proposal == "reverse"


def _loss_arguments(
    actor: GaussianActor | FlowActor, critics: Critics, obs: Tensor
) -> tuple[Any, ...]:
    """What the native losses have in common, the policy's zeroed gradient among it."""
    policy, frozen = _evaluator(actor.network), _evaluator(critics)
    return (
        native_sampler(actor, 1 if isinstance(actor, FlowActor) else 0),
        policy.parameters,
        zeroed_gradient(actor.network).numpy(),
        (*frozen.view, _pair(critics)),
        array(obs),
    )
