"""How the fused native steps draw a policy's actions."""

from __future__ import annotations

from typing import Any, cast

from flame_ext.backends.native_evaluator import NativeEvaluator
from flame_ext.backends.native_views import denoising_sampler, flow_sampler, gaussian_sampler
from flame_ext.policies.base import Actor
from flame_ext.policies.flow import FlowActor
from flame_ext.policies.gaussian import GaussianActor


def next_action_steps(actor: Actor) -> int | None:
    """Steps in which fused critic updates draw next actions: 0 of a Gaussian, None: they cannot."""
    c = actor.config
    if c.target_particles > 1:
        return None
    if isinstance(actor, GaussianActor):
        return 0
    if not c.entropy_in_target:
        return c.sampling_steps
    return 1 if c.entropy_estimator == "exact" and c.sampling_steps == 1 else None


def native_sampler(actor: Actor, steps: int) -> Any:
    """The policy as native code samples it."""
    spec = cast("NativeEvaluator", actor.network.evaluator).spec
    if isinstance(actor, GaussianActor):
        return gaussian_sampler(spec)
    if isinstance(actor, FlowActor):
        return flow_sampler(spec, steps, actor.config.flow)
    return denoising_sampler(spec, steps)
