"""The fused critic update and policy losses against what PyTorch makes of the same draws."""

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from kernel_inputs import (
    Array,
    assert_as_accurate,
    critic_updates,
    draw,
    philox_candidates,
    to_tensors,
)
from torch import Tensor

from flame_ext import _core, reference
from flame_ext.agent import Agent
from flame_ext.backends import cpu, make_backend, native_evaluator
from flame_ext.backends.native_views import array, mlp_spec
from flame_ext.config import make_config
from flame_ext.policies import flow, gaussian, reweighting
from flame_ext.replay import Batch, ReplayBuffer
from flame_ext.sampling import LOG_STD_RANGE
from flame_ext.scalars import to_floats

OBS, ACT, ROWS, EMBEDDING = 5, 3, 33, 8


def make_agent(backend: str, algorithm: str, **options: Any) -> Agent:
    small = {"hidden_sizes": (32, 24), "embedding_dim": 0, "target_particles": 1}
    small |= {"reward_scale": 0.5, "tau": 0.1}
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


def sampled_updates(agent: Agent, seed: int, updates: int = 1) -> dict[str, float]:
    batch = replay().sample(updates * ROWS, torch.Generator().manual_seed(seed), 0.9)
    return critic_updates(agent, batch, updates)


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("sac", {"entropy_in_target": True}),
        ("sac", {"entropy_in_target": False}),
        ("flame", {"entropy_in_target": True, "initial_alpha": 0.5}),
        ("flame", {"entropy_in_target": False}),
        ("flame-r", {"sampling_steps": 3}),
        ("diffusion", {"sampling_steps": 3}),
    ],
)
@pytest.mark.usefixtures("kernels")
def test_fused_update_follows_the_sequence_of_steps(
    algorithm: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    agents = [make_agent(name, algorithm, **options) for name in ("torch", "cpu")]
    # A call of one of the steps would mean that the fused path was not taken.
    monkeypatch.setattr(agents[1].backend, "critic_step", None)
    for updates in (1, 3):
        first, second = (sampled_updates(agent, updates, updates) for agent in agents)
        assert second == pytest.approx(first, rel=1e-4, abs=1e-5)
    _assert_same_critics(*agents)
    assert torch.equal(*(agent.generator.get_state() for agent in agents))


def _assert_same_critics(first: Agent, second: Agent) -> None:
    agents = first, second
    for name in ("critics", "target_critics"):
        wanted, ours = (agent.networks()[name].flat for agent in agents)
        torch.testing.assert_close(ours, wanted, rtol=0, atol=2e-5)
    states = [agent.optimizers["critics"].state_dict()["state"][0] for agent in agents]
    assert states[0]["step"] == states[1]["step"] == 4


@pytest.mark.parametrize("algorithm", ["sac", "flame"])
@pytest.mark.usefixtures("kernels")
def test_fused_update_sees_embeddings(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    agents = [
        make_agent(name, algorithm, embedding_dim=EMBEDDING, entropy_in_target=True)
        for name in ("torch", "cpu")
    ]
    for agent in agents:
        with torch.no_grad():
            agent.target_critics.flat.mul_(0.5)
    monkeypatch.setattr(agents[1].backend, "critic_step", None)
    for updates in (1, 3):
        batch = replay().sample(updates * ROWS, torch.Generator().manual_seed(updates), 0.9)
        observed = agents[0]._observed(batch)
        first, second = (critic_updates(agent, observed, updates) for agent in agents)
        assert second == pytest.approx(first, rel=1e-4, abs=1e-5)
    _assert_same_critics(*agents)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_several_updates_in_a_call_are_the_same_as_one_by_one(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, single = (make_agent(backend, "sac") for _ in range(2))
    batch = replay().sample(3 * ROWS, torch.Generator().manual_seed(0), 0.9)
    noise = torch.randn(3 * ROWS, 1, ACT, generator=torch.Generator().manual_seed(1))

    def update(agent: Agent, part: Batch, draws: Tensor, updates: int) -> dict[str, float]:
        module = importlib.import_module(f"flame_ext.backends.{backend}")
        monkeypatch.setattr(module, "target_noise", lambda *_: draws)
        return critic_updates(agent, part, updates)

    metrics = update(together, batch, noise, 3)
    parts = [update(single, *each, 1) for each in zip(batch.split(3), noise.chunk(3), strict=True)]
    for name, value in metrics.items():
        assert value == pytest.approx(np.mean([part[name] for part in parts]), rel=1e-6)
    for name, network in together.networks().items():
        assert torch.equal(network.flat, single.networks()[name].flat), name


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("sac", {"target_particles": 2}),
        ("flame", {"entropy_estimator": "multi_step", "entropy_steps": 2, "reverse_kl_weight": 0}),
    ],
)
def test_other_targets_take_the_steps_one_by_one(algorithm: str, options: dict[str, Any]) -> None:
    agents = [make_agent(name, algorithm, **options) for name in ("torch", "cpu")]
    first, second = (sampled_updates(agent, 0) for agent in agents)
    assert second == pytest.approx(first, rel=1e-3, abs=1e-4)


SEED = 11


@pytest.fixture
def equal_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same float32 draws for every precision, wide enough to leave the box and to fold."""

    def normal(reference: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.from_numpy(draw(*shape, scale=2.0)).to(reference.dtype)

    def times(reference: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.from_numpy(np.abs(np.tanh(draw(*shape, seed=5)))).to(reference.dtype)

    def candidates(z: Tensor, count: int, sampling: str, generator: torch.Generator) -> Tensor:
        assert sampling == "stratified"
        return philox_candidates(SEED, (len(z), count, z.shape[1])).to(z.dtype)

    for module in (cpu, flow, gaussian):
        monkeypatch.setattr(module, "normal_like", normal)
    monkeypatch.setattr(flow, "uniform_like", times)
    monkeypatch.setattr(reweighting, "candidate_uniforms", candidates)
    for module in (cpu, native_evaluator):
        monkeypatch.setattr(module, "draw_seed", lambda generator: SEED)


def policy_step(
    backend: str,
    algorithm: str,
    dtype: torch.dtype,
    rows: int,
    policy_scale: float = 1.0,
    **options: Any,
) -> tuple[Array, dict[str, float]]:
    """The policy's gradient, its weights times `policy_scale`, and everything the loss reports."""
    agent = make_agent(backend, algorithm, policy_delay=1, **options)
    agent.actor.network.flat.data.mul_(policy_scale)
    for network in agent.networks().values():
        network.to(dtype)
    obs, action = to_tensors(dtype, draw(rows, OBS), np.tanh(draw(rows, ACT)))
    with torch.no_grad():
        obs = agent.critics.observe(obs)
    alpha = torch.tensor(0.3, dtype=dtype)
    reported = agent.backend.actor_step(
        agent.actor, obs, action, agent.critics, alpha, agent.generator
    )
    gradient = agent.actor.network.flat.grad
    assert gradient is not None
    return array(gradient), to_floats(reported)


@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("sac", {}),
        ("sac", {"policy_layer_norm": True, "policy_activation": "relu"}),
        ("flame", {"monotonicity_margin": 0.9}),
        ("flame", {"monotonicity_margin": 0.1, "policy_scale": 4.0}),
        ("flame", {"monotonicity_margin": 0.0, "reverse_kl_weight": 0.5, "num_candidates": 5}),
        ("flame", {"reweighting_weight": 0.0, "policy_layer_norm": True}),
        ("flame", {"reverse_kl_weight": 0.0, "z_source": "uniform"}),
        ("flame", {"boundary_width": 0.5, "policy_scale": 4.0}),
        ("flame", {"reweighting_weight": 0.3}),
        ("flame", {"acting_fraction": 0.4, "instantaneous_fraction": 0.1}),
        ("flame-r", {}),
        ("sac", {"embedding_dim": EMBEDDING}),
        ("flame", {"embedding_dim": EMBEDDING, "monotonicity_margin": 0.9}),
    ],
)
@pytest.mark.usefixtures("isa", "equal_draws")
def test_policy_losses_are_as_accurate_as_pytorch(
    algorithm: str, options: dict[str, Any], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    single, _ = policy_step("torch", algorithm, torch.float32, rows, **options)
    exact, wanted = policy_step("torch", algorithm, torch.float64, rows, **options)
    # Autograd would mean that the fused path was not taken.
    monkeypatch.setattr(Tensor, "backward", None)
    ours, reported = policy_step("cpu", algorithm, torch.float32, rows, **options)
    assert_as_accurate(ours, torch.from_numpy(single), torch.from_numpy(exact))
    assert reported == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    if options.get("monotonicity_margin") == 0.9:
        _, without = policy_step(
            "cpu", algorithm, torch.float32, rows, **options | {"monotonicity_margin": 0.0}
        )
        assert reported["policy_loss"] > without["policy_loss"], "the wall stood nowhere"
    if "policy_scale" in options and rows > 1:
        assert reported["fold_rate"] > 0.0, "no map folded"


@pytest.mark.parametrize("sampling", ["random", "stratified"])
def test_candidates_are_drawn_as_asked_for(monkeypatch: pytest.MonkeyPatch, sampling: str) -> None:
    seen, flow_matching = [], _core.flow_matching

    def note(*arguments: Any, **options: Any) -> Any:
        seen.append(options["sampling"])
        return flow_matching(*arguments, **options)

    monkeypatch.setattr(_core, "flow_matching", note)
    policy_step("cpu", "flame", torch.float32, 1, candidate_sampling=sampling)
    assert seen == [sampling]


@pytest.mark.parametrize("rows", [1, 7, 33])
@pytest.mark.parametrize("algorithm", ["sac", "flame", "flame-r"])
@pytest.mark.usefixtures("isa")
@torch.no_grad()
def test_actions_are_as_accurate_as_pytorch(algorithm: str, rows: int) -> None:
    def actions(backend: str, dtype: torch.dtype) -> Tensor:
        actor = make_agent(backend, algorithm).actor
        actor.network.to(dtype)
        obs, noise = to_tensors(dtype, draw(rows, OBS), draw(rows, ACT, scale=2.0))
        critics = make_agent(backend, algorithm).critics
        best = actor.best_action(critics, obs, noise.unsqueeze(1))
        torch.testing.assert_close(best, actor.action(obs, noise), rtol=1e-5, atol=1e-6)
        return best

    single, exact = (actions("torch", dtype) for dtype in (torch.float32, torch.float64))
    assert_as_accurate(array(actions("cpu", torch.float32)), single, exact)


@pytest.mark.parametrize("options", [{"proposal": "policy"}, {"entropy_estimator": "multi_step"}])
@pytest.mark.usefixtures("equal_draws")
def test_other_losses_are_built_by_autograd(options: dict[str, Any]) -> None:
    first, second = (
        policy_step(name, "flame", torch.float32, 33, **options)[1] for name in ("torch", "cpu")
    )
    assert second == pytest.approx(first, rel=1e-3, abs=1e-4)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(
    ("states", "samples"), [((7, 1), (7, 4)), ((1,), (1,)), ((65,), (65,)), ((0,), (0,))]
)
def test_denoising(states: tuple[int, ...], samples: tuple[int, ...]) -> None:
    """Actions of the multi-step policy, of several samples per state as of one."""
    net = make_agent("cpu", "diffusion").actor.network
    obs, noise = (torch.from_numpy(draw(*s)) for s in ((*states, OBS), (*samples, ACT)))
    with torch.no_grad():
        ours = native_evaluator.NativeEvaluator(net).denoise(obs, noise, 5)
        net.evaluator = None
        single = reference.denoise(net, obs, noise, 5)
        exact = reference.denoise(net.double(), obs.double(), noise.double(), 5)
    assert_as_accurate(array(ours), single, exact)
    assert len(ours) <= 1 or ours.abs().max() == 1  # some are clipped


def test_a_denoising_policy_has_no_density(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = make_agent("cpu", "diffusion")
    monkeypatch.setattr(cpu, "next_action_steps", lambda _: 20)  # no configuration leads here
    object.__setattr__(agent.config, "entropy_in_target", True)
    with pytest.raises(ValueError, match="a denoising policy has no density; alpha must be 0"):
        sampled_updates(agent, 0)


def test_refusals_say_what_to_do() -> None:
    agent = make_agent("cpu", "sac")
    critics = mlp_spec(agent.critics)
    with pytest.raises(ValueError, match="an even number of outputs; this spec has 2 and 1"):
        _core.PolicySampler.gaussian(critics, LOG_STD_RANGE)
    options = {"hidden_sizes": (32, 24), "embedding_dim": 0}
    wider = make_config("sac", overrides=options)
    agent.actor = Agent(wider, OBS + 1, ACT, agent.backend).actor
    with pytest.raises(ValueError, match="the policy takes 6 observations, the critics 5"):
        sampled_updates(agent, 0)
    net = agent.actor.network
    sampler = _core.PolicySampler.gaussian(mlp_spec(net), LOG_STD_RANGE)
    arrays = (
        array(net.flat),
        np.zeros_like(array(net.flat)),
        (critics, array(agent.critics.flat), None),
    )
    wide = ((ACT + 64 + OBS + 1, 8, 1), (ACT + 64, 8, 64))
    critics, pair = (
        _core.MlpSpec(sizes, members=1, activation="relu", layer_norm=False) for sizes in wide
    )
    views = [(spec, np.zeros(spec.parameter_count, np.float32)) for spec in (critics, pair)]
    with pytest.raises(ValueError, match="zs are the last 64 columns of the observation, which"):
        _core.gaussian_loss(
            sampler, *arrays[:2], (*views[0], views[1]), draw(4, OBS + 1), draw(4, ACT), 0.1
        )
    draws = draw(4, ACT), draw(4, ACT), np.full((4, 3), 0.5, np.float32)
    with pytest.raises(ValueError, match="this policy is not a flow; flow_matching takes one"):
        _core.flow_matching(
            sampler,
            *arrays,
            draw(4, OBS),
            *draws,
            0.1,
            weight=1.0,
            min_time=0.01,
            instantaneous_fraction=0.25,
            acting_fraction=0.25,
            num_candidates=4,
            sampling="random",
            seed=0,
        )
