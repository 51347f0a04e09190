"""One update of every algorithm against what the equations say."""

import copy
import math
import pickle

import pytest
import torch
from kernel_inputs import philox_candidates
from small_agents import ACT, OBS, SMALL, make_agent, make_batch
from torch.utils._python_dispatch import TorchDispatchMode

from flame_ext import _core
from flame_ext.agent import Agent
from flame_ext.backends import TorchBackend, make_backend
from flame_ext.backends.native_evaluator import draw_seed
from flame_ext.build import deployed_networks
from flame_ext.config import ALGORITHMS, make_config
from flame_ext.errors import BackendUnavailableError
from flame_ext.policies import reweighting
from flame_ext.reference import best_of
from flame_ext.replay import Batch
from flame_ext.td_target import target_noise, td_target


def target_of(agent: Agent, batch: Batch) -> torch.Tensor:
    noise = target_noise(agent.actor, batch, agent.generator)
    return td_target(
        agent.actor, agent.target_critics, batch, noise, agent.temperature.alpha, agent.generator
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_updates_move_every_network_and_are_reproducible(algorithm: str) -> None:
    first, second = make_agent(algorithm), make_agent(algorithm)
    start = {name: net.flat.detach().clone() for name, net in first.networks().items()}
    for agent in (first, second):
        for step in range(4):
            metrics = agent.update(make_batch(step))
    assert all(math.isfinite(value) for value in metrics.values())
    for name, net in first.networks().items():
        assert not torch.equal(net.flat, start[name]), name
        assert torch.equal(net.flat, second.networks()[name].flat), name


def test_a_seed_is_of_weights_and_draws() -> None:
    first, other = (make_agent(embedding_dim=8, seed=seed) for seed in (0, 1))
    assert not torch.equal(first.generator.get_state(), other.generator.get_state())
    for name, network in first.networks().items():
        assert not torch.equal(network.flat, other.networks()[name].flat), name


def test_a_policy_batch_above_the_batch_takes_all_of_it() -> None:
    whole, above = make_agent(policy_batch_size=32), make_agent(policy_batch_size=64)
    assert whole.update(make_batch()) == above.update(make_batch())


def test_an_average_of_all_that_acts_is_deployed() -> None:
    agent, batch = make_agent(policy_tau=0.8, embedding_dim=8), make_batch()
    networks = agent.networks()
    acting = {
        "deployed_actor": "actor",
        "deployed_critics": "critics",
        "deployed_state_encoder": "seen_state_encoder",
        "deployed_pair_encoder": "seen_pair_encoder",
    }
    averages = {name: networks[name].flat.clone() for name in acting}
    for tau in (9 / 10, 9 / 11, 0.8, 0.8):
        agent.update(batch)
        for name, average in averages.items():
            average += tau * (networks[acting[name]].flat.detach() - average)
    for name, average in averages.items():
        torch.testing.assert_close(networks[name].flat, average)


def test_the_deployed_policy_acts_and_another_explores() -> None:
    agent, batch = make_agent(policy_tau=0.25), make_batch()
    agent.update(batch)
    noise = torch.randn(32, 1, ACT, generator=agent.generator.clone_state())
    explored = agent.explore(batch.obs)
    assert torch.equal(explored, agent.actor.best_action(agent.critics, batch.obs, noise).detach())
    acted = agent.act(batch.obs, noise)
    deployed = agent.deployed_actor.best_action(agent.deployed_critics, batch.obs, noise)
    assert torch.equal(acted, deployed)
    assert not torch.equal(acted, explored)


def test_without_an_average_the_policy_itself_acts() -> None:
    agent = make_agent(policy_tau=1.0)
    assert agent.deployed_actor is agent.actor
    assert agent.deployed_critics is agent.critics
    assert "deployed_actor.flat" not in agent.state_dict()


def test_no_call_passes_the_policys_step() -> None:
    agent = make_agent(policy_delay=3)
    agent.update(make_batch())
    assert agent.updates_to_policy_step == 2
    with pytest.raises(ValueError, match="the policy's step is due after 2"):
        agent.update(make_batch(), updates=4)
    assert "policy_loss" in agent.update(make_batch(), updates=2)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_actions_stay_in_the_box_for_any_number_of_particles(algorithm: str) -> None:
    agent = make_agent(algorithm)
    for particles in (1, 4):
        action = agent.act(torch.randn(7, OBS), 3 * torch.randn(7, particles, ACT))
        assert action.shape == (7, ACT)
        assert action.abs().max() <= 1


def test_termination_does_not_bootstrap() -> None:
    agent = make_agent(reward_scale=0.5)
    batch = make_batch(discount=0.0)
    torch.testing.assert_close(target_of(agent, batch), 0.5 * batch.reward)


@pytest.mark.parametrize("entropy_in_target", [False, True])
def test_td_target_of_sac(entropy_in_target: bool) -> None:
    """reward + discount (Qmin' - [entropy] alpha log pi) with the draw that the agent makes."""
    agent = make_agent("sac", entropy_in_target=entropy_in_target)
    batch = make_batch()
    state = agent.generator.get_state()
    target = target_of(agent, batch)
    agent.generator.set_state(state)
    noise = torch.randn(32, 1, ACT, generator=agent.generator)[:, 0]
    mean, std = agent.actor.network.distribution(batch.next_obs)  # type: ignore[operator]
    normal = torch.distributions.Normal(mean, std)
    squash = torch.distributions.TransformedDistribution(
        normal, [torch.distributions.TanhTransform()]
    )
    action = torch.tanh(mean + std * noise)
    value = agent.target_critics.q_min(batch.next_obs, action)
    if entropy_in_target:
        value = value - agent.temperature.alpha * squash.log_prob(action).sum(-1)
    torch.testing.assert_close(target, batch.reward + 0.99 * value, rtol=1e-4, atol=1e-4)


def test_the_targets_action_is_the_policys_whatever_estimates_its_density() -> None:
    options = {"entropy_estimator": "multi_step", "entropy_steps": 3, "reverse_kl_weight": 0.0}
    agent, batch = make_agent(entropy_in_target=True, **options), make_batch()
    state = agent.generator.get_state()
    target = target_of(agent, batch)
    agent.generator.set_state(state)
    noise = target_noise(agent.actor, batch, agent.generator)[:, 0]
    with torch.no_grad():
        action = agent.actor.action(batch.next_obs, noise)
        log_prob = agent.actor.sample(batch.next_obs, noise, agent.generator).log_prob
        value = (
            agent.target_critics.q_min(batch.next_obs, action) - agent.temperature.alpha * log_prob
        )
    torch.testing.assert_close(target, batch.reward + 0.99 * value)


def test_critic_step_is_the_gradient_of_the_summed_squared_errors() -> None:
    agent, batch = make_agent(), make_batch()
    target = torch.randn(32)
    TorchBackend().critic_step(agent.critics, batch.obs, batch.action, target)
    q = agent.critics.q_values(batch.obs, batch.action)
    expected = torch.autograd.grad(((q - target) ** 2).mean(1).sum(), agent.critics.flat)[0]
    torch.testing.assert_close(agent.critics.flat.grad, expected)


def test_policy_step_leaves_the_critics_without_gradient() -> None:
    agent = make_agent()
    agent.update(make_batch())
    before = agent.critics.flat.grad
    assert before is not None
    kept = before.clone()
    batch = make_batch()
    states = batch.obs[:16], batch.action[:16]
    TorchBackend().actor_step(agent.actor, *states, agent.critics, 0.2, agent.generator)
    assert torch.equal(agent.critics.flat.grad, kept)
    assert agent.critics.flat.requires_grad


class HostWaits(TorchDispatchMode):
    """Collects operations that read a device's memory on the host, or send it some."""

    OPERATIONS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "lift_fresh")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.OPERATIONS:
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_host_waits_are_seen() -> None:
    with HostWaits() as waits:
        torch.ones(()).item()
        torch.tensor([1.0]).nonzero()
    assert waits.seen == ["_local_scalar_dense", "lift_fresh", "nonzero"]


@pytest.mark.parametrize("embedding_dim", [0, 12])
@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        *((algorithm, {}) for algorithm in ALGORITHMS),
        ("flame", {"proposal": "policy"}),
        ("flame", {"z_source": "target", "entropy_in_target": True, "target_particles": 4}),
        ("flame", {"entropy_estimator": "multi_step", "entropy_trace": "hutchinson"}),
        ("flame", {"reverse_kl_weight": 0.0, "z_source": "policy"}),
    ],
)
def test_no_step_waits_for_the_host(
    algorithm: str, options: dict[str, object], embedding_dim: int
) -> None:
    """Else a CUDA graph could not hold it."""
    agent = make_agent(algorithm, embedding_dim=embedding_dim, **options)
    steps = (torch.tensor(0.2, dtype=torch.float64), 2, True, True)
    agent._steps(make_batch(), *steps)
    with HostWaits() as waits:
        scalars = agent._steps(make_batch(1), *steps)
    assert all(isinstance(x, torch.Tensor) for x in scalars.values())
    assert "policy_loss" in scalars
    assert waits.seen == []


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_state_dict_continues_bit_equal(algorithm: str) -> None:
    agent, copy = make_agent(algorithm), make_agent(algorithm, seed=9)
    for step in range(3):
        agent.update(make_batch(step))
    copy.load_state_dict({k: v.clone() for k, v in agent.state_dict().items()})
    for step in range(3, 6):
        agent.update(make_batch(step))
        copy.update(make_batch(step))
    for name, tensor in agent.state_dict().items():
        assert torch.equal(tensor, copy.state_dict()[name]), name


def test_foreign_state_is_refused() -> None:
    with pytest.raises(ValueError, match="hidden_sizes or the environment's sizes differ"):
        make_agent(hidden_sizes=(8,)).load_state_dict(make_agent().state_dict())


def test_backends_do_not_fall_back() -> None:
    cpu = torch.device("cpu")
    assert make_backend("torch", cpu).name == "torch"
    assert make_backend("cpu", cpu).name == "cpu"
    with pytest.raises(ValueError, match="did you mean 'torch'"):
        make_backend("torhc", cpu)
    no_device = not _core.cuda_devices()
    with pytest.raises(BackendUnavailableError if no_device else ValueError, match="cuda"):
        make_backend("cuda", cpu)


def test_diffusion_has_no_density() -> None:
    actor = make_agent("diffusion").actor
    with pytest.raises(ValueError, match="no tractable log-density"):
        actor.sample(torch.zeros(1, OBS), torch.zeros(1, ACT), torch.Generator())


def native_candidates(
    z: torch.Tensor, num_candidates: int, sampling: str, generator: torch.Generator
) -> torch.Tensor:
    """What the native reweighting draws: Philox streams of a seed from the generator."""
    assert sampling == "stratified"
    shape = (len(z), num_candidates, z.shape[1])
    return philox_candidates(int(draw_seed(generator)), shape).to(z.dtype)


EXACT_IN_TARGET = {"entropy_in_target": True, "entropy_estimator": "exact"}


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        *((algorithm, {"embedding_dim": z}) for algorithm in ALGORITHMS for z in (0, 12)),
        *(("flame", {"proposal": "policy", "embedding_dim": z}) for z in (0, 12)),
        ("flame", EXACT_IN_TARGET),
        # Its actions take several steps, that density one.
        ("flame-r", {**EXACT_IN_TARGET, "sampling_steps": 3}),
    ],
)
def test_ten_updates_agree_between_torch_and_native(
    algorithm: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss by loss, from the same weights and draws; then the parameters."""
    monkeypatch.setattr(reweighting, "candidate_uniforms", native_candidates)
    common = {**SMALL, "hidden_sizes": (32, 24), "embedding_tau": 0.25}
    config = make_config(algorithm, overrides={**common, **options})
    agents = [
        Agent(config, OBS, ACT, make_backend(name, torch.device("cpu")), seed=0)
        for name in ("torch", "cpu")
    ]
    for step in range(10):
        losses = [agent.update(make_batch(step)) for agent in agents]
        assert losses[0].keys() == losses[1].keys()
        for name, value in losses[0].items():
            assert losses[1][name] == pytest.approx(value, rel=2e-3, abs=2e-3), (step, name)
    for name, net in agents[0].networks().items():
        twin = agents[1].networks()[name].flat
        torch.testing.assert_close(twin, net.flat, rtol=0, atol=5e-3)


def test_accelerated_networks_are_copied_pickled_and_replaced() -> None:
    agent = Agent(
        make_config("sac", overrides=SMALL), OBS, ACT, make_backend("cpu", torch.device("cpu"))
    )
    obs, action = torch.randn(4, OBS), torch.randn(4, ACT)
    critics = agent.critics.requires_grad_(False)
    q = critics.candidate_q_min(obs, action.unsqueeze(1))
    for twin in (copy.deepcopy(critics), pickle.loads(pickle.dumps(critics))):
        assert torch.equal(twin.candidate_q_min(obs, action.unsqueeze(1)), q)
        twin.double().float().flat.zero_()  # its memory is another one then
        assert torch.equal(twin.candidate_q_min(obs, action.unsqueeze(1)), torch.zeros(4, 1))
    assert torch.equal(critics.candidate_q_min(obs, action.unsqueeze(1)), q)


def test_networks_beyond_the_kernels_are_refused_at_once() -> None:
    for options, action_dim in (({"hidden_sizes": (130,)}, 65), ({"hidden_sizes": (8,) * 8}, ACT)):
        config = make_config("flame", overrides={**SMALL, **options})
        with pytest.raises(ValueError, match="Use backend='torch'"):
            Agent(config, OBS, action_dim, make_backend("cpu", torch.device("cpu")))


def test_native_losses_refuse_what_they_cannot_differentiate() -> None:
    """No silent zero: a second derivative and a forward-mode tangent raise."""
    config = make_config("flame", overrides=SMALL)
    agent = Agent(config, OBS, ACT, make_backend("cpu", torch.device("cpu")))
    obs, noise = torch.randn(8, OBS), torch.randn(8, ACT)
    sample = agent.actor.sample(obs, noise, agent.generator)
    first = torch.autograd.grad(sample.log_prob.sum(), agent.actor.network.flat, create_graph=True)[
        0
    ]
    with pytest.raises(RuntimeError):
        first.sum().backward()

    def log_prob(flat: torch.Tensor) -> torch.Tensor:
        agent.actor.network._parameters["flat"] = flat  # type: ignore[assignment]
        return agent.actor.sample(obs, noise, agent.generator).log_prob

    flat = agent.actor.network.flat.detach()
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(log_prob, (flat,), (torch.ones_like(flat),))


def test_policy_and_encoder_learn_from_the_last_updates_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agent = make_agent(policy_delay=2, policy_batch_size=10, embedding_dim=8)
    batch = make_batch()
    seen = {}
    for name in ("actor_step", "encoder_step"):
        step = getattr(agent.backend, name)

        def note(network, *rows, name=name, step=step):
            seen[name] = rows
            return step(network, *rows)

        monkeypatch.setattr(agent.backend, name, note)
    agent.update(batch, updates=2)  # of 16 rows each
    obs, action = seen["actor_step"][:2]
    assert torch.equal(obs[:, :OBS], batch.obs[16:26])
    assert torch.equal(action, batch.action[16:26])
    columns = (batch.obs, batch.action, batch.next_obs)
    for found, column in zip(seen["encoder_step"], columns, strict=True):
        assert torch.equal(found, column[16:])


def test_critics_and_policy_see_the_encoders_average() -> None:
    agent, batch = make_agent(embedding_dim=8), make_batch()
    for step in range(3):
        agent.update(make_batch(step))
    observed = agent._observed(batch)
    for found, obs in ((observed.obs, batch.obs), (observed.next_obs, batch.next_obs)):
        assert torch.equal(found, agent.critics.encoder.observe(obs).detach())
        assert not torch.equal(found, agent.encoder.observe(obs).detach())


def test_the_deployed_networks_act_with_their_own_encoder_and_critics() -> None:
    agent, batch = make_agent(policy_tau=0.25, embedding_dim=8), make_batch()
    noise = torch.randn(32, 8, ACT, generator=torch.Generator().manual_seed(0))
    critics = agent.deployed_critics
    with torch.no_grad():
        for network in deployed_networks(agent.deployed_actor, critics).values():
            network.flat.mul_(-1.5)  # far from those that are trained
        states = critics.observe(batch.obs)
        expected = best_of(critics, states, agent.deployed_actor.action(states.unsqueeze(1), noise))
    assert torch.equal(agent.act(batch.obs, noise), expected)


def test_the_average_moves_with_policy_updates_and_counts_them() -> None:
    agent = make_agent(policy_tau=0.01, policy_delay=3)
    networks = agent.networks()
    average = networks["deployed_critics"].flat.clone()
    for update in range(1, 10):
        agent.update(make_batch(update))
        if update % 3 == 0:
            average += 9 / (9 + update // 3) * (networks["critics"].flat.detach() - average)
        torch.testing.assert_close(networks["deployed_critics"].flat, average)


@pytest.mark.parametrize(
    ("option", "still"),
    [
        ("critic_learning_rate", {"critics", "target_critics"}),
        ("policy_learning_rate", {"actor"}),
        (
            "embedding_learning_rate",
            {"state_encoder", "pair_encoder", "seen_state_encoder", "seen_pair_encoder"},
        ),
    ],
)
def test_a_learning_rate_is_of_its_own_networks(option: str, still: set[str]) -> None:
    agent = make_agent(embedding_dim=8, policy_tau=1.0, **{option: 0.0})
    start = {name: net.flat.detach().clone() for name, net in agent.networks().items()}
    agent.update(make_batch())
    found = {n for n, net in agent.networks().items() if torch.equal(net.flat, start[n])}
    assert found == still


@pytest.mark.parametrize("name", make_agent(embedding_dim=8).networks())
def test_a_weight_that_is_not_finite_is_seen_in_every_network(name: str) -> None:
    agent = make_agent(embedding_dim=8)
    assert agent.is_finite()
    with torch.no_grad():
        agent.networks()[name].flat[3] = torch.inf
    assert not agent.is_finite()


def test_the_target_takes_the_best_of_several() -> None:
    agent, batch = make_agent(target_particles=5), make_batch()
    noise = target_noise(agent.actor, batch, agent.generator)
    found = td_target(agent.actor, agent.target_critics, batch, noise, 0.1, agent.generator)
    with torch.no_grad():
        actions = [agent.actor.action(batch.next_obs, noise[:, i]) for i in range(5)]
        values = [agent.target_critics.q_min(batch.next_obs, action) for action in actions]
    torch.testing.assert_close(found, batch.reward + 0.99 * torch.stack(values).amax(0))


def test_its_entropy_is_that_of_a_plain_sample() -> None:
    agent, batch = make_agent("sac", target_particles=5), make_batch()
    noise = target_noise(agent.actor, batch, agent.generator)
    found = td_target(agent.actor, agent.target_critics, batch, noise, 0.1, agent.generator)
    with torch.no_grad():
        samples = [
            agent.actor.sample(batch.next_obs, noise[:, i], agent.generator) for i in range(5)
        ]
        values = [agent.target_critics.q_min(batch.next_obs, x.action) for x in samples]
        value = torch.stack(values).amax(0) - 0.1 * samples[0].log_prob
    torch.testing.assert_close(found, batch.reward + 0.99 * value)


@pytest.mark.parametrize(
    ("algorithm", "measured"), [("sac", "entropy"), ("flame", "entropy"), ("diffusion", "ess")]
)
def test_the_temperature_is_given_what_was_measured(
    algorithm: str, measured: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, seen = make_agent(algorithm), []

    def note(entropy: float | None, ess: float | None) -> None:
        seen.append({"entropy": entropy, "ess": ess})

    monkeypatch.setattr(agent.temperature, "step", note)
    metrics = agent.update(make_batch())
    assert seen == [{"entropy": metrics.get("entropy"), "ess": metrics.get("ess")}]
    assert seen[0][measured] is not None


def test_the_target_entropy_is_the_actions() -> None:
    assert make_agent("sac").temperature.target_entropy == -ACT


def test_entropy_is_measured_where_the_loss_does_not() -> None:
    agent = make_agent(
        reverse_kl_weight=0.0,
        entropy_estimator="multi_step",
        entropy_steps=3,
        policy_learning_rate=0.0,
    )
    with torch.no_grad():
        agent.actor.network.flat.zero_()  # N(0, 1) in every state
    entropy = agent.update(make_batch())["entropy"]
    assert entropy == pytest.approx(ACT * 0.5 * math.log(2 * math.pi * math.e), abs=1.5)


def test_exploration_noise_is_added_within_the_box() -> None:
    obs = make_batch().obs
    plain, noisy = (make_agent(exploration_noise=scale).explore(obs) for scale in (0.0, 1.0))
    assert noisy.abs().max() == 1
    assert (noisy - plain)[noisy.abs() < 1].std() > 0.3


def test_data_are_collected_by_the_best_of_several() -> None:
    agent, obs = make_agent(train_particles=4), make_batch().obs
    noise = torch.randn(32, 4, ACT, generator=agent.generator.clone_state())
    expected = agent.actor.best_action(agent.critics, obs, noise).detach()
    assert torch.equal(agent.explore(obs), expected)


def test_data_are_collected_with_the_networks_that_are_trained() -> None:
    agent, obs = make_agent(train_particles=4, policy_tau=0.25, embedding_dim=8), make_batch().obs
    with torch.no_grad():
        for network in deployed_networks(agent.deployed_actor, agent.deployed_critics).values():
            network.flat.mul_(-1.5)  # far from those that are trained
        noise = torch.randn(32, 4, ACT, generator=agent.generator.clone_state())
        expected = agent.actor.best_action(agent.critics, agent.critics.observe(obs), noise)
    assert torch.equal(agent.explore(obs), expected)
