"""What a run's policy, importance weights and critics are like: ``flame-ext diagnose``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flame_ext import ops
from flame_ext.agent import Agent
from flame_ext.envs import EnvLike
from flame_ext.policies.base import normal_like, uniform_like
from flame_ext.policies.flow import MIN_TIME, FlowActor
from flame_ext.reference import Reweighted, log_prob, meanflow_loss, sample_flow
from flame_ext.sampling import Estimator, Trace
from flame_ext.trainer import Trainer
from flame_ext.value_bias import measure_value_bias, play_episodes

# Samples of the policy in each state.
_SAMPLES = 16
# Candidates for the velocity that the MeanFlow identity is held against.
_CANDIDATES = 64
# An action so near to the box's face lies on it.
_AT_FACE = 0.02
# Sub-steps whose actions are compared with those of one.
_STEPS = (2, 4, 16)
_ESTIMATORS: Mapping[str, tuple[Estimator, int, Trace]] = {
    "exact": ("exact", 1, "exact"),
    "4 steps, log-det": ("multi_step", 4, "log_det"),
    "4 steps, Hutchinson": ("multi_step", 4, "hutchinson"),
    "trace of one step": ("one_step_trace", 1, "exact"),
}


@torch.no_grad()
def diagnose(
    run_dir: str | Path,
    *,
    env: EnvLike | None = None,
    eval_env: EnvLike | None = None,
    states: int = 500,
    seed: int = 0,
) -> dict[str, float]:
    """Measures the policy that a run trains, its weights and its critics, at its checkpoint.

    Nothing in the run's directory is changed.

    Args:
        run_dir: A run with a checkpoint.
        env: Needed only if the run was not started from an environment id.
        eval_env: What the episodes are played in, as for `Trainer`.
        states: States of the replay buffer that are looked at.
        seed: Decides states, samples and the episodes in which values are compared with returns.

    Returns:
        Figures by name, those that the algorithm has; `training.md` says what they tell.

    Raises:
        RunDirectoryError: If there is no usable checkpoint.
    """
    trainer = Trainer.resume(run_dir, env=env, eval_env=eval_env)
    agent = trainer.agent
    generator = torch.Generator(agent.device).manual_seed(seed)
    batch = trainer.sample(states, generator)
    obs = agent.critics.observe(batch.obs)
    figures = {"alpha": agent.temperature.alpha, **_policy(agent, obs, generator)}
    if isinstance(agent.actor, FlowActor):
        figures |= _entropies(agent.actor, obs, generator)
        if trainer.config.flow == "mean":
            figures |= _step_gaps(agent.actor, obs, generator)
        if trainer.config.reweighting_weight > 0:
            figures |= _flow_matching(agent, agent.actor, obs, batch.action, generator)
    episodes = play_episodes(trainer, seed)
    scale = trainer.config.reward_scale
    figures["return of an episode"] = float(np.mean([sum(e.rewards) / scale for e in episodes]))
    bias = measure_value_bias(episodes, trainer.discount)
    if bias is not None:
        figures |= {
            "Q": bias.value,
            "discounted return": bias.discounted_return,
            "Q - return": bias.value - bias.discounted_return,
            "Q - return, root mean square": bias.error,
        }
    return figures


def _policy(agent: Agent, obs: Tensor, generator: torch.Generator) -> dict[str, float]:
    noise = normal_like(obs, (len(obs), _SAMPLES, agent.action_dim), generator)
    action = agent.actor.action(obs.unsqueeze(1), noise)
    q_min = agent.critics.candidate_q_min(obs, action)
    figures = {
        "standard deviation of actions": action.std(1).mean(),
        "share of actions at the bounds": (action.abs() > 1 - _AT_FACE).float().mean(),
        "standard deviation of Q over actions": q_min.std(1).mean(),
        f"Q of the best of {_SAMPLES} over the mean": (q_min.amax(1) - q_min.mean(1)).mean(),
    }
    if agent.actor.has_log_prob and not isinstance(agent.actor, FlowActor):
        figures["entropy"] = -agent.actor.sample(obs, noise[:, 0], generator).log_prob.mean()
    return {name: float(value) for name, value in figures.items()}


def _entropies(actor: FlowActor, obs: Tensor, generator: torch.Generator) -> dict[str, float]:
    """By every estimator that fits the flow; `exact` is that of the policy of one step."""
    noise = normal_like(obs, (len(obs), actor.action_dim), generator)
    probe = normal_like(obs, tuple(noise.shape), generator).sign()
    figures = {}
    for name, (estimator, steps, trace) in _ESTIMATORS.items():
        if estimator == "multi_step" or actor.config.flow == "mean":
            sample = log_prob(
                actor.network,
                obs,
                noise,
                estimator=estimator,
                steps=steps,
                trace=trace,
                flow=actor.config.flow,
                probe=probe,
            )
            figures[f"entropy, {name}"] = -float(sample.log_prob.mean())
            if estimator == "exact":
                figures["share of folded samples"] = float(sample.fold_rate)
    return figures


def _step_gaps(actor: FlowActor, obs: Tensor, generator: torch.Generator) -> dict[str, float]:
    """Mean distance, per coordinate, of one-step actions from those of more steps."""
    noise = normal_like(obs, (len(obs), actor.action_dim), generator)
    one = sample_flow(actor.network, obs, noise).clamp(-1, 1)
    return {
        f"distance to actions of {steps} steps": float(
            (sample_flow(actor.network, obs, noise, steps).clamp(-1, 1) - one).abs().mean()
        )
        for steps in _STEPS
    }


def _flow_matching(
    agent: Agent, actor: FlowActor, obs: Tensor, action: Tensor, generator: torch.Generator
) -> dict[str, float]:
    """How even the importance weights are, and how well u satisfies the MeanFlow identity."""
    c, alpha = actor.config, agent.temperature.alpha
    source, noise = actor.draw_ends(obs, action, agent.critics, alpha, generator)
    draws = uniform_like(obs, (len(obs), 2), generator)
    t = MIN_TIME + (1 - MIN_TIME) * draws[:, :1]

    def reweighted(t: Tensor, candidates: int) -> tuple[Tensor, Reweighted]:
        z = (1 - t) * source + t * noise
        return z, ops.reweighted_velocity(
            agent.critics,
            obs,
            z,
            t,
            alpha=alpha,
            num_candidates=candidates,
            sampling=c.candidate_sampling,
            generator=generator,
            backend="torch",
        )

    k = c.num_candidates
    _, drawn = reweighted(t, k)
    assert drawn.weights is not None  # PyTorch gives them
    figures = {
        f"effective share of {k} candidates": float(drawn.ess.mean()) / k,
        f"largest weight of {k} candidates": float(drawn.weights.amax(1).mean()),
    }
    pairs = {"r = t": (t, t)}
    if c.flow == "mean":
        one = torch.ones_like(t)
        pairs |= {"r < t": (t * draws[:, 1:], t), "(0, 1)": (0 * one, one)}
    for name, (start, end) in pairs.items():
        z, target = reweighted(end, _CANDIDATES)
        loss = meanflow_loss(actor.network, z, start, end, obs, target.velocity)
        figures[f"squared residual at {name}"] = float(loss)
    return figures
