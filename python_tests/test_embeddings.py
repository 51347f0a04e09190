"""State-action embeddings: the encoder, the critics that see it, its part in an update."""

import numpy as np
import pytest
import torch
from kernel_inputs import assert_as_accurate, draw, to_tensors

from flame_ext.agent import Agent
from flame_ext.backends import TorchBackend, make_backend
from flame_ext.config import make_config
from flame_ext.critics import Critics
from flame_ext.embeddings import StateActionEncoder
from flame_ext.replay import Batch

OBS, ACT, Z = 5, 3, 8
CPU = torch.device("cpu")


def make_encoder(seed: int = 0) -> StateActionEncoder:
    generator = torch.Generator().manual_seed(seed)
    return StateActionEncoder(OBS, ACT, Z, (16, 12), generator=generator)


def make_batch(rows: int = 16) -> Batch:
    g = torch.Generator().manual_seed(0)
    return Batch(
        obs=torch.randn(rows, OBS, generator=g),
        action=2 * torch.rand(rows, ACT, generator=g) - 1,
        reward=torch.randn(rows, generator=g),
        discount=torch.full((rows,), 0.99),
        next_obs=torch.randn(rows, OBS, generator=g),
    )


def test_a_states_embedding_has_a_mean_absolute_value_of_one() -> None:
    encoder, obs = make_encoder(), torch.randn(7, OBS)
    plain = encoder.state_network(obs)[0]
    state = encoder.state(obs)
    torch.testing.assert_close(state.abs().mean(-1), torch.ones(7))
    torch.testing.assert_close(state * plain.abs().mean(-1, keepdim=True), plain)
    encoder.state_network.requires_grad_(False).flat.zero_()
    assert torch.equal(encoder.state(obs), torch.zeros(7, Z))


def test_the_loss_is_the_prediction_of_a_constant_next_state() -> None:
    encoder, b = make_encoder(), make_batch()
    target = encoder.state(b.next_obs).detach()
    prediction = encoder.pair_network(b.action, encoder.state(b.obs))[0]
    expected = (prediction - target).square().mean()
    loss = encoder.prediction_loss(b.obs, b.action, b.next_obs)
    torch.testing.assert_close(loss, expected)
    flats = [network.flat for network in encoder.networks().values()]
    ours, wanted = (torch.autograd.grad(x, flats) for x in (loss, expected))
    for gradient, other in zip(ours, wanted, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, other)


@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.usefixtures("isa")
def test_native_embeddings_are_as_accurate_as_pytorch(rows: int) -> None:
    def step(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        encoder, owner = make_encoder(), make_backend(backend, CPU)
        for network in encoder.networks().values():
            owner.accelerate(network.to(dtype))
        obs, action, next_obs = to_tensors(
            dtype, draw(rows, OBS), np.tanh(draw(rows, ACT)), draw(rows, OBS, seed=1)
        )
        with torch.no_grad():
            observed = encoder.observe(obs)
        loss = torch.as_tensor(owner.encoder_step(encoder, obs, action, next_obs))
        gradients = [network.flat.grad for network in encoder.networks().values()]
        return [observed, loss, *(g for g in gradients if g is not None)]

    with pytest.MonkeyPatch.context() as patch:
        single, exact = (step("torch", dtype) for dtype in (torch.float32, torch.float64))
        patch.setattr(torch.Tensor, "backward", None)  # of autograd
        ours = step("cpu", torch.float32)
    assert len(ours) == len(exact) == 4
    for own, other, wanted in zip(ours, single, exact, strict=True):
        assert_as_accurate(own.numpy(), other, wanted)


@pytest.mark.usefixtures("isa")
def test_a_state_without_features_has_no_embedding() -> None:
    encoder = make_encoder()
    for network in encoder.networks().values():
        make_backend("cpu", CPU).accelerate(network)
    with torch.no_grad():
        encoder.state_network.flat.zero_()
        observed = encoder.observe(torch.ones(2, OBS))
    assert torch.equal(observed, torch.cat([torch.ones(2, OBS), torch.zeros(2, Z)], 1))


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_critics_see_state_and_action_with_their_embeddings(backend: str) -> None:
    encoder = make_encoder()
    critics = Critics(OBS, ACT, (16,), encoder=encoder)
    plain = Critics(OBS + Z, ACT + Z, (16,))
    networks = [critics, *encoder.networks().values()]
    for network in networks:
        network.requires_grad_(False)
        make_backend(backend, CPU).accelerate(network)
    plain.requires_grad_(False).flat.copy_(critics.flat)
    obs, actions = torch.randn(6, OBS), torch.randn(6, 4, ACT)
    state = encoder.state(obs)
    for k in range(4):
        action = actions[:, k].clone().requires_grad_()
        wide = torch.cat([action, encoder.pair(state, action)], 1)
        expected = plain.q_min(torch.cat([obs, state], 1), wide)
        q = critics.q_min(encoder.observe(obs), action)
        torch.testing.assert_close(q, expected, rtol=1e-5, atol=1e-6)
        gradient, wanted = (torch.autograd.grad(x.sum(), action)[0] for x in (q, expected))
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            among = critics.candidate_q_min(encoder.observe(obs), actions)[:, k]
        torch.testing.assert_close(among, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("updates", [1, 2, 4])
def test_all_see_the_encoders_average_that_moves_with_each_policy_step(updates: int) -> None:
    options = {
        "hidden_sizes": (16, 16),
        "policy_delay": 4,
        "embedding_dim": Z,
        "embedding_tau": 0.25,
    }
    agent = Agent(make_config("sac", overrides=options), OBS, ACT, TorchBackend())

    def features(encoder: StateActionEncoder | None) -> torch.Tensor:
        assert encoder is not None
        return torch.cat([net.flat.detach() for net in encoder.networks().values()])

    new = average = features(agent.encoder)
    for _ in range(24 // updates):
        agent.update(make_batch(updates * 16), updates)
        due = agent.updates % 4 == 0
        assert torch.equal(features(agent.encoder), new) is not due
        new = features(agent.encoder)
        if due:
            average = average + 0.25 * (new - average)
        torch.testing.assert_close(features(agent.critics.encoder), average)
    assert agent.target_critics.encoder is agent.critics.encoder


def test_no_embedding_no_encoder() -> None:
    agent = Agent(make_config("sac", overrides={"embedding_dim": 0}), OBS, ACT, TorchBackend())
    assert agent.encoder is None
    assert agent.critics.layer_sizes[0] == OBS + ACT
    obs = torch.randn(6, OBS)
    assert torch.equal(agent.critics.observe(obs), obs)
    assert agent.networks().keys() == {"actor", "critics", "target_critics"}
