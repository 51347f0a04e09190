"""The operators with backend="cpu" against backend="torch": values, gradients and refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from kernel_inputs import assert_as_accurate
from torch import Tensor
from torch.autograd import forward_ad

from flame_ext import ops
from flame_ext.agent import Agent
from flame_ext.backends import make_backend
from flame_ext.config import make_config
from flame_ext.critics import Critics
from flame_ext.embeddings import StateActionEncoder
from flame_ext.networks import MeanVelocityNet
from flame_ext.sampling import CandidateSampling

B, K, OBS, ACT = 21, 5, 7, 3


def make_net(**options: Any) -> MeanVelocityNet:
    return MeanVelocityNet(
        OBS, ACT, (33, 24), generator=torch.Generator().manual_seed(1), **options
    )


def make_critics() -> Critics:
    return Critics(OBS, ACT, (33, 24), generator=torch.Generator().manual_seed(2))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def both(net: MeanVelocityNet, *rows: Tensor) -> list[tuple[Any, ...]]:
    """The arguments in float32 and in float64."""
    return [(net, *rows), (copy.deepcopy(net).double(), *(x.double() for x in rows))]


@pytest.mark.parametrize("layer_norm", [False, True])
def test_meanflow_loss_and_its_gradient(layer_norm: bool) -> None:
    net = make_net(layer_norm=layer_norm)
    t = torch.linspace(0.02, 1, B).unsqueeze(1)
    rows = draw(B, ACT), 0.3 * t, t, draw(B, OBS, seed=1), draw(B, ACT, seed=2)

    def gradient(net: MeanVelocityNet, *rows: Tensor, backend: Any) -> tuple[Tensor, Tensor]:
        net.flat.grad = None
        loss = 3 * ops.meanflow_loss(net, *rows, backend=backend)
        loss.backward()  # type: ignore[no-untyped-call]
        assert net.flat.grad is not None
        return loss.detach(), net.flat.grad.clone()

    single, exact = both(net, *rows)
    ours = gradient(*single, backend="cpu")
    assert all(
        torch.equal(a, b) for a, b in zip(ours, gradient(*single, backend="auto"), strict=True)
    )
    wanted = gradient(*single, backend="torch"), gradient(*exact, backend="auto")
    for a, b, c in zip(ours, *wanted, strict=True):
        assert_as_accurate(a, b, c)


@torch.no_grad()
def test_reweighted_velocity_estimates_the_same_velocity() -> None:
    """PyTorch and the kernel draw differently; many candidates give the same marginal velocity."""
    critics, obs, z = make_critics(), draw(B, OBS), 0.5 * draw(B, ACT)
    t = torch.linspace(0.1, 0.9, B).unsqueeze(1)

    def run(backend: Any, seed: int, sampling: CandidateSampling = "random") -> Any:
        generator = torch.Generator().manual_seed(seed)
        return ops.reweighted_velocity(
            critics,
            obs,
            z,
            t,
            alpha=0.5,
            num_candidates=20_000 if sampling == "random" else 2_000,
            sampling=sampling,
            generator=generator,
            backend=backend,
        )

    ours, theirs = run("cpu", 0), run("torch", 1)
    # The standard error of a mean of 2e4 actions is below 0.006; velocities are 1 / t as large.
    assert ((ours.velocity - theirs.velocity) * t).abs().max() < 0.04
    torch.testing.assert_close(ours.ess, theirs.ess, rtol=0.05, atol=0)
    for backend in ("cpu", "torch"):
        stratified = run(backend, 3, "stratified")
        assert ((ours.velocity - stratified.velocity) * t).abs().max() < 0.04
    assert torch.equal(run("cpu", 0).velocity, ours.velocity)
    assert not torch.equal(run("cpu", 2).velocity, ours.velocity)


@pytest.mark.parametrize("shape", [(B, ACT), (B, K, ACT), (2, K, B, ACT), (0, ACT)])
@pytest.mark.parametrize(
    "options",
    [
        {"estimator": "exact"},
        {"estimator": "one_step_trace"},
        {"estimator": "one_step_trace", "trace": "hutchinson"},
        {"estimator": "multi_step", "steps": 3},
        {"estimator": "multi_step", "steps": 4, "trace": "log_det"},
        {"estimator": "multi_step", "steps": 2, "trace": "hutchinson", "flow": "instantaneous"},
    ],
    ids=str,
)
@torch.no_grad()
def test_log_prob(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    net, noise = make_net(), draw(*shape)
    obs = {2: draw(shape[0], OBS), 3: draw(B, 1, OBS), 4: draw(1, 1, B, OBS)}[len(shape)]
    single, exact = both(net, obs, noise)
    probe = draw(*shape, seed=9).sign() if options.get("trace") == "hutchinson" else None
    ours = ops.log_prob(*single, **options, probe=probe, backend="cpu")
    theirs = ops.log_prob(*single, **options, probe=probe, backend="torch")
    wanted = ops.log_prob(*exact, **options, probe=None if probe is None else probe.double())
    assert torch.equal(ours.folded, wanted.folded)
    if noise.numel():
        assert_as_accurate(ours.action, theirs.action, wanted.action)
        assert_as_accurate(ours.log_prob, theirs.log_prob, wanted.log_prob)


def test_exact_log_prob_is_differentiable_with_its_transport() -> None:
    net, obs, noise = make_net(), draw(B, OBS), draw(B, ACT, seed=1)
    d_transport, d_action, d_log_prob = draw(B, ACT, ACT), draw(B, ACT, seed=5), draw(B, seed=6)

    def gradient(net: MeanVelocityNet, obs: Tensor, noise: Tensor, backend: Any) -> Tensor:
        sample = ops.log_prob(net, obs, noise, backend=backend)
        assert sample.transport is not None
        parts = [
            (value * weight.to(value)).sum()
            for value, weight in (
                (sample.action, d_action),
                (sample.log_prob, d_log_prob),
                (sample.transport, d_transport),
            )
        ]
        return torch.autograd.grad(sum(parts), net.flat)[0]  # type: ignore[arg-type]

    single, exact = both(net, obs, noise)
    assert_as_accurate(
        gradient(*single, "cpu"), gradient(*single, "torch"), gradient(*exact, "torch")
    )


@torch.no_grad()
def test_one_step_action_and_best_of() -> None:
    net, critics, obs = make_net(), make_critics(), draw(B, OBS)
    for noise, chooser in ((draw(B, ACT), None), (draw(B, K, ACT), critics)):
        ours, theirs = (
            ops.one_step_action(net, obs, noise, critics=chooser, backend=name)  # type: ignore[arg-type]
            for name in ("cpu", "torch")
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


def test_columns_of_wider_rows_are_taken() -> None:
    wide = torch.rand(B, 4, generator=torch.Generator().manual_seed(3))
    rows = draw(B, ACT), 0.5 * wide[:, :1], wide[:, :1], draw(B, OBS), draw(B, ACT, seed=1)
    ours, theirs = (ops.meanflow_loss(make_net(), *rows, backend=name) for name in ("cpu", "torch"))
    torch.testing.assert_close(ours, theirs)
    probe = draw(ACT, B).t()
    options = {"estimator": "multi_step", "trace": "hutchinson", "probe": probe}
    with torch.no_grad():
        ours, theirs = (
            ops.log_prob(make_net(), rows[3], rows[0], backend=name, **options).log_prob
            for name in ("cpu", "torch")
        )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_critics_with_an_encoder_are_pytorchs() -> None:
    encoder = StateActionEncoder(OBS, ACT, 4, (8,), generator=torch.Generator().manual_seed(3))
    critics = Critics(OBS, ACT, (16,), encoder=encoder)
    obs = critics.observe(draw(B, OBS))
    arguments = critics, obs, draw(B, ACT), torch.full((B, 1), 0.5)
    auto, theirs = (
        ops.reweighted_velocity(
            *arguments, alpha=1.0, generator=torch.Generator().manual_seed(5), backend=name
        )
        for name in ("auto", "torch")
    )
    assert torch.equal(auto.velocity, theirs.velocity)
    with pytest.raises(ValueError, match="no reweighted_velocity by critics with an encoder"):
        ops.reweighted_velocity(*arguments, alpha=1.0, backend="cpu")


def test_auto_keeps_every_derivative_and_cpu_refuses_what_it_lacks() -> None:
    net, obs, noise = make_net(), draw(B, OBS), draw(B, ACT)
    moved = noise.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(ops.log_prob(net, obs, moved).log_prob.sum(), moved)
    assert gradient.abs().max() > 0
    with pytest.raises(ValueError, match="no such derivative of log_prob"):
        ops.log_prob(net, obs, moved, backend="cpu")
    with pytest.raises(ValueError, match="no such derivative of log_prob"):
        ops.log_prob(net, obs, noise, estimator="one_step_trace", backend="cpu")
    with pytest.raises(ValueError, match="no such derivative of one_step_action"):
        ops.one_step_action(net, obs, noise, backend="cpu")
    with pytest.raises(ValueError, match=r"torch\.float64"):
        ops.log_prob(copy.deepcopy(net).double(), obs.double(), noise.double(), backend="cpu")


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_forward_mode_is_right_or_refused(backend: Any) -> None:
    """Under func.jvp and forward_ad the tangent of the noise is never lost."""
    net, obs, noise, direction = make_net(), draw(B, OBS), draw(B, ACT), draw(B, ACT, seed=4)

    def log_prob(noise: Tensor) -> Tensor:
        return ops.log_prob(net, obs, noise, backend=backend).log_prob

    def forward_ad(noise: Tensor) -> Tensor:
        with torch.no_grad(), torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(noise, direction)
            tangent = torch.autograd.forward_ad.unpack_dual(log_prob(dual)).tangent
            assert tangent is not None
            return tangent

    if backend == "cpu":
        with pytest.raises(ValueError, match="no such derivative"):
            torch.func.jvp(log_prob, (noise,), (direction,))
        with pytest.raises(ValueError, match="no such derivative"):
            forward_ad(noise)
        return
    tangent = torch.func.jvp(log_prob, (noise,), (direction,))[1]
    assert tangent.abs().max() > 0
    torch.testing.assert_close(forward_ad(noise), tangent)


def test_a_second_derivative_raises() -> None:
    net, obs, noise = make_net(), draw(B, OBS), draw(B, ACT)
    sample = ops.log_prob(net, obs, noise, backend="cpu")
    (first,) = torch.autograd.grad(sample.log_prob.sum(), net.flat, create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()  # type: ignore[no-untyped-call]


def test_pytorch_is_asked_also_of_networks_that_evaluate_themselves() -> None:
    """An agent's: their kernels would drop a forward-mode tangent without a word."""
    agent = Agent(
        make_config("flame", overrides={"hidden_sizes": (33, 24), "embedding_dim": 4}),
        OBS,
        ACT,
        make_backend("cpu", torch.device("cpu")),
        seed=0,
        device=torch.device("cpu"),
    )
    net, noise = agent.actor.network, draw(B, ACT)
    plain = copy.deepcopy(net)
    plain.evaluator = None
    obs, direction = draw(B, net.obs_dim, seed=1), draw(B, ACT, seed=2)
    tangents = []
    for network in (net, plain):
        with torch.no_grad(), forward_ad.dual_level():
            dual = forward_ad.make_dual(noise, direction)
            action = ops.one_step_action(network, obs, dual, backend="torch")
            tangents.append(forward_ad.unpack_dual(action).tangent)
    torch.testing.assert_close(*tangents, rtol=0, atol=0)
    assert net.evaluator is not None


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@torch.no_grad()
def test_rows_that_do_not_fit_are_named(backend: Any) -> None:
    net, critics, t = make_net(), make_critics(), torch.full((B, 1), 0.5)
    obs, action = draw(B, OBS), draw(B, ACT)
    with pytest.raises(ValueError, match=r"obs \(20, 7\) must be"):
        ops.meanflow_loss(net, action, 0.3 * t, t, obs[1:], action, backend=backend)
    with pytest.raises(ValueError, match=r"obs has shape \(20, 7\); expected \(21, 7\)"):
        ops.reweighted_velocity(critics, obs[1:], action, t, alpha=1.0, backend=backend)
    with pytest.raises(ValueError, match=r"the network torch\.float32 on cpu"):
        ops.one_step_action(net, obs.double(), action.double(), backend=backend)
    encoder = StateActionEncoder(OBS, ACT, 4, (8,))
    embedded = Critics(OBS, ACT, (16,), encoder=encoder)
    with pytest.raises(ValueError, match=r"expected \(21, 11\): what critics.observe gives"):
        ops.reweighted_velocity(embedded, obs, action, t, alpha=1.0, backend=backend)
