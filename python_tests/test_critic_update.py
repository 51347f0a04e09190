"""The fused critic update against the PyTorch backend's sequence of steps."""

from typing import Any

import pytest
import torch

from flame_ext import _core
from flame_ext.agent import Agent
from flame_ext.backends import make_backend
from flame_ext.backends.cpu import mlp_spec
from flame_ext.config import make_config
from flame_ext.replay import ReplayBuffer
from flame_ext.sampling import LOG_STD_RANGE

OBS, ACT, ROWS = 5, 3, 33


def make_agent(backend: str, algorithm: str, **options: Any) -> Agent:
    small = {"hidden_sizes": (32, 24), "target_particles": 1, "reward_scale": 0.5, "tau": 0.1}
    config = make_config(algorithm, overrides={**small, **options})
    return Agent(config, OBS, ACT, make_backend(backend, torch.device("cpu")), seed=0)


def replay() -> ReplayBuffer:
    """Every third transition terminates; its batches are columns of wider rows."""
    g = torch.Generator().manual_seed(0)
    buffer = ReplayBuffer(100, OBS, ACT)
    obs, action, reward, next_obs = (
        torch.randn(100, *shape, generator=g).numpy() for shape in ((OBS,), (ACT,), (), (OBS,))
    )
    terminated = (torch.arange(100) % 3 == 0).float().numpy()
    buffer.add(obs, action, reward, terminated, next_obs)
    return buffer


def critic_update(agent: Agent, seed: int) -> dict[str, float]:
    batch = replay().sample(ROWS, torch.Generator().manual_seed(seed))
    return agent.backend.critic_update(
        agent.actor,
        agent.critics,
        agent.target_critics,
        agent.optimizers["critics"],
        batch,
        agent.alpha,
        agent.generator,
    )


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("sac", {"entropy_in_target": True}),
        ("sac", {"entropy_in_target": False}),
        ("flame", {"entropy_in_target": True, "initial_alpha": 0.5}),
        ("flame", {"entropy_in_target": False}),
        ("flame-r", {"sampling_steps": 3}),
    ],
)
@pytest.mark.usefixtures("kernels")
def test_fused_update_follows_the_sequence_of_steps(
    algorithm: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    agents = [make_agent(name, algorithm, **options) for name in ("torch", "cpu")]
    # A call of one of the steps would mean that the fused path was not taken.
    monkeypatch.setattr(agents[1].backend, "critic_step", None)
    for seed in range(3):
        first, second = (critic_update(agent, seed) for agent in agents)
        assert second == pytest.approx(first, rel=1e-4, abs=1e-5)
    for name in ("critics", "target_critics"):
        wanted, ours = (agent.networks()[name].flat for agent in agents)
        torch.testing.assert_close(ours, wanted, rtol=0, atol=2e-5)
    states = [agent.optimizers["critics"].state_dict()["state"][0] for agent in agents]
    assert states[0]["step"] == states[1]["step"] == 3
    assert torch.equal(*(agent.generator.get_state() for agent in agents))


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("sac", {"target_particles": 2}),
        ("flame", {"entropy_estimator": "multi_step", "entropy_steps": 2, "reverse_kl_weight": 0}),
        ("diffusion", {}),
    ],
)
def test_other_targets_take_the_steps_one_by_one(algorithm: str, options: dict[str, Any]) -> None:
    agents = [make_agent(name, algorithm, **options) for name in ("torch", "cpu")]
    first, second = (critic_update(agent, 0) for agent in agents)
    assert second == pytest.approx(first, rel=1e-3, abs=1e-4)


def test_refusals_say_what_to_do() -> None:
    agent = make_agent("cpu", "sac")
    critics = mlp_spec(agent.critics)
    with pytest.raises(ValueError, match="an even number of outputs; this spec has 2 and 1"):
        _core.PolicySampler.gaussian(critics, LOG_STD_RANGE)
    wider = make_config("sac", overrides={"hidden_sizes": (32, 24), "target_particles": 1})
    agent.actor = Agent(wider, OBS + 1, ACT, agent.backend).actor
    with pytest.raises(ValueError, match="the policy takes 6 observations, the critics 5"):
        critic_update(agent, 0)
