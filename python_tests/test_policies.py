"""What each policy hands to the mathematics: its own times, noise, options and candidates."""

import math

import pytest
import torch
from small_agents import ACT, OBS, make_agent, make_batch
from torch import Tensor

from flame_ext.backends.native_evaluator import NativeEvaluator
from flame_ext.policies import diffusion, flow, reweighting
from flame_ext.policies.reweighting import damped_logits, resample
from flame_ext.reference import LogProb, Reweighted, best_of, log_prob, sample_flow
from flame_ext.sampling import signal_and_scale


def test_times_of_the_flow_loss() -> None:
    fractions = {"instantaneous_fraction": 0.2, "acting_fraction": 0.3}
    actor = make_agent(reverse_kl_weight=0.0, **fractions).actor
    r, t = actor.times(torch.rand(20_000, 3, generator=torch.Generator().manual_seed(0)))
    assert (r == t).float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert ((r == 0) & (t == 1)).float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert ((r >= 0) & (r <= t) & (t > 0) & (t <= 1)).all()


def test_the_density_estimator_gets_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"entropy_estimator": "multi_step", "entropy_steps": 3, "entropy_trace": "hutchinson"}
    agent, seen = make_agent(reverse_kl_weight=0.0, **options), {}
    monkeypatch.setattr(flow, "log_prob", lambda *_, **given: seen.update(given))
    agent.actor.sample(torch.zeros(100, OBS), torch.zeros(100, ACT), agent.generator)
    assert (seen["estimator"], seen["steps"], seen["trace"]) == ("multi_step", 3, "hutchinson")
    assert seen["probe"].unique().tolist() == [-1, 1]


def test_sources_of_z() -> None:
    obs, done = make_batch().obs, make_batch().action
    agent = make_agent(z_source="policy")
    noise = torch.randn(32, ACT, generator=agent.generator.clone_state())
    source, _ = agent.actor.draw_ends(obs, done, agent.critics, 0.1, agent.generator)
    assert torch.equal(source, agent.actor.action(obs, noise).detach())
    agent = make_agent(z_source="replay")
    source, _ = agent.actor.draw_ends(obs, done, agent.critics, 0.1, agent.generator)
    assert torch.equal(source, done)
    agent = make_agent(z_source="uniform")
    draws = torch.rand(32, ACT, generator=agent.generator.clone_state())
    source, _ = agent.actor.draw_ends(obs, done, agent.critics, 0.1, agent.generator)
    torch.testing.assert_close(source, 2 * draws - 1)
    agent = make_agent(z_source="target")
    actions = 2 * torch.rand(32, 8, ACT, generator=agent.generator.clone_state()) - 1
    cold = 1e-7  # the best candidate has all the weight
    source, _ = agent.actor.draw_ends(obs, done, agent.critics, cold, agent.generator)
    assert torch.equal(source, best_of(agent.critics, obs, actions))


def test_a_policy_that_is_its_target_weighs_its_samples_evenly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With Q = alpha log pi the weights exp(Q / alpha) / pi are equal."""
    agent, obs = make_agent(proposal="policy", proposal_ess=0.01), make_batch().obs
    drawn: list[LogProb] = []

    def density(*arguments: object) -> LogProb:
        drawn.append(log_prob(*arguments))
        return drawn[-1]

    def q_min(obs: Tensor, action: Tensor) -> Tensor:
        return 0.3 * drawn[-1].log_prob

    monkeypatch.setattr(flow, "log_prob", density)
    monkeypatch.setattr(agent.critics, "candidate_q_min", q_min)
    t = torch.full((32, 1), 0.01)
    with torch.no_grad():
        _, found = agent.actor._from_policy(obs, t, agent.critics, 0.3, agent.generator)
    torch.testing.assert_close(found.ess, torch.full((32,), 8.0))
    # At so little noise one candidate explains z.
    assert (t * found.velocity).abs().max() < 0.1


def test_candidates_of_the_policy_are_valued_in_the_box(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, obs, seen = make_agent(proposal="policy"), make_batch().obs, []

    def q_min(obs: Tensor, action: Tensor) -> Tensor:
        seen.append(action)
        return torch.zeros(action.shape[:2])

    monkeypatch.setattr(agent.critics, "candidate_q_min", q_min)
    with torch.no_grad():
        agent.actor.network.flat.zero_()  # N(0, 1), a third of it outside
        agent.actor._from_policy(obs, torch.full((32, 1), 0.5), agent.critics, 0.3, agent.generator)
    assert seen[0].abs().max() == 1


@pytest.mark.parametrize("algorithm", ["flame", "diffusion"])
@pytest.mark.parametrize("sampling", ["random", "stratified"])
def test_candidates_are_drawn_as_asked_for(
    monkeypatch: pytest.MonkeyPatch, algorithm: str, sampling: str
) -> None:
    seen, uniforms = [], reweighting.candidate_uniforms

    def note(z: Tensor, count: int, sampling: str, generator: torch.Generator) -> Tensor:
        seen.append((count, sampling))
        return uniforms(z, count, sampling, generator)

    monkeypatch.setattr(reweighting, "candidate_uniforms", note)
    make_agent(algorithm, candidate_sampling=sampling).update(make_batch())
    assert seen == [(8, sampling)]


def test_the_diffusion_learns_at_its_samplers_times(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, batch, seen = make_agent("diffusion", sampling_steps=5), make_batch(), {}
    velocity = agent.actor.network.velocity

    def note(z: Tensor, r: Tensor, t: Tensor, obs: Tensor) -> Tensor:
        seen.update(r=r, t=t)
        return velocity(z, r, t, obs)

    def reweighted(critics, obs, z, signal, scale, *_: object) -> Reweighted:
        seen["mixed"] = torch.cat([signal, scale], 1)
        return Reweighted(torch.zeros_like(z), torch.ones(len(z)), None)

    monkeypatch.setattr(agent.actor.network, "velocity", note)
    monkeypatch.setattr(diffusion, "reverse_reweighted", reweighted)
    agent.actor.loss(batch.obs, batch.action, agent.critics, 0.1, agent.generator)
    assert torch.equal(seen["r"], seen["t"])
    assert set((5 * seen["t"]).round().int().flatten().tolist()) == {1, 2, 3, 4, 5}
    wanted = [signal_and_scale(t) for t in seen["t"].flatten().tolist()]
    torch.testing.assert_close(seen["mixed"], torch.tensor(wanted))


def test_the_diffusion_learns_the_noise_of_its_own_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agent, batch = make_agent("diffusion"), make_batch()
    with torch.no_grad():
        agent.actor.network.flat.zero_()  # predicts 0, so that the loss is the target's square
    draws = agent.generator.clone_state()
    torch.rand(32, 1, generator=draws)  # times
    base, noise = (torch.randn(32, ACT, generator=draws) for _ in range(2))
    explained = torch.randn(32, ACT)

    def reweighted(critics, obs, z, signal, scale, *_: object) -> Reweighted:
        torch.testing.assert_close(z, signal * agent.actor.action(obs, base) + scale * noise)
        velocity = explained - (z - scale * explained) / signal
        return Reweighted(velocity, torch.full((32,), 4.0), None)

    monkeypatch.setattr(diffusion, "reverse_reweighted", reweighted)
    found = agent.actor.loss(batch.obs, batch.action, agent.critics, 0.1, agent.generator)
    torch.testing.assert_close(found.loss, explained.square().sum(-1).mean(), rtol=1e-3, atol=0)
    assert found.metrics["ess"] == 4 / 8


def test_a_flow_starts_with_the_spread_that_is_asked_for() -> None:
    for scale in (0.1, 0.4):
        actor = make_agent(initial_action_std=scale).actor
        noise = torch.randn(4000, ACT, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            action = actor.action(torch.zeros(4000, OBS), noise)
        assert action.std(0).mean().item() == pytest.approx(scale, rel=0.3)


@pytest.mark.parametrize("activation", ["relu", "silu", "mish"])
@pytest.mark.parametrize("hidden_sizes", [(64, 64), (64, 64, 64)])
def test_a_flow_starts_without_folds(activation: str, hidden_sizes: tuple[int, ...]) -> None:
    options = {"policy_activation": activation, "hidden_sizes": hidden_sizes}
    actor = make_agent(initial_action_std=0.2, **options).actor
    draws = torch.Generator().manual_seed(0)
    obs, noise = (torch.randn(2000, n, generator=draws) for n in (OBS, ACT))
    with torch.no_grad():
        start = log_prob(actor.network, obs, noise)
    assert not start.folded.any()
    assert start.action.std(0).mean().item() == pytest.approx(0.2, rel=0.5)


@pytest.mark.parametrize("flow_kind", ["mean", "instantaneous"])
def test_so_does_one_of_several_steps(flow_kind: str) -> None:
    several = {"sampling_steps": 20, "flow": flow_kind, "reverse_kl_weight": 0.0}
    actor = make_agent(initial_action_std=0.3, **several).actor
    noise = torch.randn(4000, ACT, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        action = actor.action(torch.zeros(4000, OBS), noise)
    assert action.std(0).mean().item() == pytest.approx(0.3, rel=0.2)


def test_the_exact_density_is_that_of_all_steps_that_act() -> None:
    several = {"sampling_steps": 4, "reverse_kl_weight": 0.0}
    agent = make_agent(**several)
    obs, noise = torch.randn(3, OBS), torch.randn(3, ACT)
    sample = agent.actor.sample(obs, noise, agent.generator)

    def acted(z: torch.Tensor) -> torch.Tensor:
        return sample_flow(agent.actor.network, obs, z, 4, "mean")

    torch.testing.assert_close(sample.action, acted(noise))
    jacobian = torch.autograd.functional.jacobian(lambda z: acted(z).sum(0), noise)
    log_det = jacobian.transpose(0, 1).det().abs().log()
    normal = -0.5 * noise.square().sum(1) - 0.5 * ACT * math.log(2 * math.pi)
    torch.testing.assert_close(sample.log_prob, normal - log_det, rtol=1e-4, atol=1e-4)


def test_so_it_is_where_native_kernels_have_no_gradient_for_it() -> None:
    agent = make_agent(sampling_steps=4, reverse_kl_weight=0.0)
    obs, noise = torch.randn(3, OBS), torch.randn(3, ACT)
    expected = agent.actor.sample(obs, noise, agent.generator)
    agent.actor.network.evaluator = NativeEvaluator(agent.actor.network)
    found = agent.actor.sample(obs, noise, agent.generator)
    torch.testing.assert_close(found.action, expected.action)
    torch.testing.assert_close(found.log_prob, expected.log_prob)
    assert found.log_prob.requires_grad


def test_damped_logits_hold_the_effective_sample_size() -> None:
    logits = 100 * torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    weights = torch.softmax(damped_logits(logits, 0.5), dim=1)
    ess = (1 / weights.square().sum(1)).mean() / 32
    assert ess.item() == pytest.approx(0.5, abs=0.01)
    gentle = 1e-3 * logits
    torch.testing.assert_close(
        torch.softmax(damped_logits(gentle, 0.5), 1), torch.softmax(gentle, 1)
    )


def test_resample_follows_the_weights() -> None:
    action = torch.arange(4.0).view(1, 4, 1).expand(20000, -1, -1)
    logits = torch.log(torch.tensor([0.1, 0.2, 0.3, 0.4])).expand(20000, -1)
    drawn = resample(action, logits, torch.Generator().manual_seed(0)).squeeze(1).long()
    frequency = torch.bincount(drawn, minlength=4) / 20000
    torch.testing.assert_close(frequency, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.02, rtol=0)
