"""The native CPU backend: whole steps by the fused C++ kernels, in place on the flat buffers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flame_ext.backends.native_evaluator import (
    NativeEvaluator,
    array,
    draw_seed,
    mlp_spec,
)
from flame_ext.backends.samplers import native_sampler, next_action_steps
from flame_ext.backends.torch import TorchBackend, adam_moments, zeroed_gradient
from flame_ext.config import Config
from flame_ext.native import load_core
from flame_ext.networks import Critics, FlatMLP
from flame_ext.policies.base import Actor, PolicyStep, normal_like
from flame_ext.policies.flow import WALL_SCALE, FlowActor
from flame_ext.policies.gaussian import GaussianActor
from flame_ext.replay import Batch
from flame_ext.td_target import target_noise


class CpuBackend(TorchBackend):
    """Critic updates, policy loss with gradient and Adam as one native call each.

    Options without a fused form (several particles in the TD target, ``proposal="policy"``, the
    diffusion policy) are built by autograd from native evaluations; PyTorch still differentiates a
    reverse-KL term through ``multi_step`` or ``one_step_trace``.
    """

    name = "cpu"

    def __init__(self) -> None:
        self._core = load_core()
        # PyTorch's setting holds for the kernels too, unless they were given one of their own.
        if not os.environ.get("FLAME_EXT_NUM_THREADS"):
            self._core.set_num_threads(torch.get_num_threads())

    @contextmanager
    def training(self) -> Iterator[None]:
        """Keeps PyTorch's own threads off the cores that the kernels use.

        After every parallel operation they spin for milliseconds, waiting for the next one: with
        them beside it on two cores no kernel was faster on two threads than on one.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def accelerate(self, network: FlatMLP) -> None:
        network.evaluator = NativeEvaluator(network)

    def critic_updates(
        self,
        actor: Actor,
        critics: Critics,
        target_critics: Critics,
        optimizer: torch.optim.Adam,
        batch: Batch,
        alpha: Tensor,
        generator: torch.Generator,
        updates: int = 1,
    ) -> dict[str, float]:
        c = actor.config
        steps = next_action_steps(actor)
        if steps is None:
            return super().critic_updates(
                actor, critics, target_critics, optimizer, batch, alpha, generator, updates
            )
        rows = (batch.obs, batch.action, batch.reward, batch.terminated, batch.next_obs)
        noise = target_noise(actor, batch, generator).squeeze(1)
        (group,) = optimizer.param_groups
        moments = adam_moments(optimizer)
        first_step = int(moments["step"]) + 1
        loss, q_mean = self._core.critic_updates(
            native_sampler(actor, steps),
            array(actor.network.flat),
            mlp_spec(critics),
            array(critics.flat),
            array(moments["exp_avg"]),
            array(moments["exp_avg_sq"]),
            array(target_critics.flat),
            *(array(x) for x in rows),
            array(noise),
            reward_scale=c.reward_scale,
            gamma=c.gamma,
            alpha=float(alpha) if c.entropy_in_target else 0.0,
            tau=c.tau,
            updates=updates,
            **_adam_options(first_step, group),
        )
        moments["step"] += updates
        return {"critic_loss": loss, "q_mean": q_mean}

    def critic_step(
        self, critics: Critics, obs: Tensor, action: Tensor, target: Tensor
    ) -> dict[str, float]:
        gradient = zeroed_gradient(critics)
        losses, means, _ = self._core.critic_step(
            mlp_spec(critics),
            array(critics.flat),
            gradient.numpy(),
            array(obs),
            array(action),
            array(target),
        )
        return {"critic_loss": sum(losses), "q_mean": float(np.mean(means))}

    def optimizer_step(self, optimizer: torch.optim.Adam) -> None:
        (group,) = optimizer.param_groups
        (parameter,) = group["params"]
        moments = adam_moments(optimizer)
        moments["step"] += 1
        tensors = (parameter, parameter.grad, moments["exp_avg"], moments["exp_avg_sq"])
        self._core.adam(
            *(array(x).reshape(-1) for x in tensors),
            **_adam_options(int(moments["step"]), group),
        )

    def soft_update(self, target: Tensor, online: Tensor, tau: float) -> None:
        self._core.soft_update(array(target), array(online), tau)

    def actor_step(
        self,
        actor: Actor,
        obs: Tensor,
        action: Tensor,
        critics: Critics,
        alpha: Tensor,
        generator: torch.Generator,
    ) -> PolicyStep:
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
        alpha: Tensor,
        generator: torch.Generator,
    ) -> PolicyStep:
        noise = normal_like(obs, (len(obs), actor.action_dim), generator)
        loss, log_prob = self._core.gaussian_loss(
            *_loss_arguments(actor, critics, obs), array(noise), float(alpha)
        )
        return PolicyStep(loss, log_prob, None, {})

    def _flow_step(
        self,
        actor: FlowActor,
        obs: Tensor,
        action: Tensor,
        critics: Critics,
        alpha: Tensor,
        generator: torch.Generator,
    ) -> PolicyStep:
        """As `FlowActor.loss`, with its gradient."""
        c, temperature = actor.config, float(alpha)
        arguments = _loss_arguments(actor, critics, obs)
        loss, metrics = 0.0, {}
        log_prob, ess = None, None
        if c.reverse_kl_weight > 0:
            noise = normal_like(obs, (len(obs), actor.action_dim), generator)
            kl, log_prob, fold_rate = self._core.flow_reverse_kl(
                *arguments,
                array(noise),
                temperature,
                weight=c.reverse_kl_weight,
                boundary_width=c.boundary_width,
                monotonicity_margin=c.monotonicity_margin,
                wall_scale=WALL_SCALE,
            )
            loss += c.reverse_kl_weight * kl
            metrics = {"fold_rate": fold_rate, "reverse_kl_loss": kl}
        if c.reweighting_weight > 0:
            r, t = actor.draw_times(obs, generator)
            z = actor.draw_noised(obs, action, t, critics, alpha, generator)
            weight = c.reweighting_weight * temperature
            flow_loss, ess = self._core.flow_matching(
                *arguments,
                array(z),
                array(r).reshape(-1),
                array(t).reshape(-1),
                temperature,
                weight=weight,
                num_candidates=c.num_candidates,
                sampling=c.candidate_sampling,
                seed=draw_seed(generator),
            )
            loss += weight * flow_loss
            metrics["reweighted_loss"] = flow_loss
        return PolicyStep(loss, log_prob, ess, metrics)


def _is_fused(config: Config) -> bool:
    exact = config.reverse_kl_weight == 0 or config.entropy_estimator == "exact"
    return exact and config.proposal == "reverse"


def _loss_arguments(
    actor: GaussianActor | FlowActor, critics: Critics, obs: Tensor
) -> tuple[Any, ...]:
    """What the native losses have in common, the policy's zeroed gradient among it."""
    return (
        native_sampler(actor, 1 if isinstance(actor, FlowActor) else 0),
        array(actor.network.flat),
        zeroed_gradient(actor.network).numpy(),
        mlp_spec(critics),
        array(critics.flat),
        array(obs),
    )


def _adam_options(step: int, group: dict[str, Any]) -> dict[str, Any]:
    beta1, beta2 = group["betas"]
    return {
        "step": step,
        "learning_rate": group["lr"],
        "beta1": beta1,
        "beta2": beta2,
        "epsilon": group["eps"],
    }
