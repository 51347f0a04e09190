"""Which policies whole episodes show to be the best."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_trainer import tiny

import flame_ext
from flame_ext.assessment import PolicyAssessment
from flame_ext.env_handle import StepResult


def step(*returns: float | None) -> StepResult:
    """A step of as many environments: the return of an episode that ended with it, or None."""
    ended = np.array([r is not None for r in returns])
    rows = np.zeros((len(returns), 1), np.float32)
    finished = tuple(r for r in returns if r is not None)
    return StepResult(
        obs=rows,
        reward=rows[:, 0],
        terminated=ended,
        truncated=np.zeros_like(ended),
        next_obs=rows,
        episode_returns=finished,
        episode_lengths=(1,) * len(finished),
    )


def test_a_policy_is_held_for_its_episodes_and_judged_by_the_worst() -> None:
    assessment = PolicyAssessment(episodes=2, num_envs=1)
    assert not assessment.add(step(9.0))  # begun before the policy: not its own
    assert assessment.holds
    assert not assessment.add(step(5.0))
    assert assessment.holds
    assert not assessment.add(step(None))
    assert assessment.add(step(3.0))
    assert not assessment.holds
    assert assessment.best_return == 3.0


def test_a_policy_worse_than_the_best_is_let_go_at_once() -> None:
    assessment = PolicyAssessment(episodes=2, num_envs=1)
    for value in (0.0, 3.0, 3.0):
        assessment.add(step(value))
    assert assessment.best_return == 3.0
    assert not assessment.add(step(2.0))
    assert not assessment.holds
    assert not assessment.add(step(4.0))
    assert assessment.holds
    assert assessment.add(step(3.0))


def test_episodes_that_several_policies_played_do_not_count() -> None:
    assessment = PolicyAssessment(episodes=1, num_envs=2)
    assert not assessment.add(step(1.0, None))
    assert assessment.add(step(1.0, None))  # the second environment's episode goes on
    assert not assessment.add(step(None, 100.0))
    assert assessment.holds
    assert assessment.add(step(None, 2.0))
    assert assessment.best_return == 2.0


def test_its_state_goes_on_where_it_was() -> None:
    first = PolicyAssessment(episodes=2, num_envs=2)
    for returns in ((1.0, None), (2.0, None), (1.5, 3.0), (4.0, None)):
        first.add(step(*returns))
    second = PolicyAssessment(episodes=2, num_envs=2)
    second.load_state_dict(first.state_dict())
    assert first.holds
    for returns in ((None, 1.75), (None, 9.0), (1.0, None)):
        assert first.add(step(*returns)) == second.add(step(*returns))
        assert first.state_dict() == second.state_dict()


@pytest.mark.parametrize("embedding_dim", [0, 8])
def test_the_best_policy_is_evaluated_and_saved(tmp_path: Path, embedding_dim: int) -> None:
    options = {"embedding_dim": embedding_dim, "assessment_episodes": 1, "policy_tau": 1.0}
    trainer = tiny(tmp_path / "run", updates_per_step=1, **options)
    acting = []
    deploy = trainer.agent.deploy

    def watch() -> None:
        assert trainer._update_debt >= 1  # nothing was learned while it was judged
        acting.append(trainer.agent.actor.network.flat.clone())
        deploy()

    trainer.agent.deploy = watch  # type: ignore[method-assign]
    trainer.run(total_steps=400)
    agent = trainer.agent
    assert len(acting) >= 2
    assert not torch.equal(acting[0], acting[-1])
    assert torch.equal(agent.deployed_actor.network.flat, acting[-1])
    assert not torch.equal(agent.actor.network.flat, acting[-1])
    assert agent.updates > 300
    obs = np.linspace(-1, 1, 10, dtype=np.float32).reshape(5, 2)
    acted = agent.act(torch.from_numpy(obs), torch.zeros(5, 1, 2)).numpy()
    saved = flame_ext.load(tmp_path / "run").act(obs, deterministic=True)
    low, high = trainer.env.action_low, trainer.env.action_high
    np.testing.assert_allclose(2 * (saved - low) / (high - low) - 1, acted, atol=1e-5)
