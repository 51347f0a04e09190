"""The specification against closed forms, scipy, finite differences and autograd."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import truncnorm
from torch import Tensor

from flame_ext.critics import Critics
from flame_ext.networks import MeanVelocityNet
from flame_ext.reference import (
    best_of,
    denoise,
    log_prob,
    meanflow_loss,
    meanflow_loss_k_fold,
    one_step_action,
    reverse_candidates,
    reweighted_velocity,
    sample_flow,
    stratify,
    truncated_normal,
)
from flame_ext.sampling import signal_and_scale

SIZES = [(1, 1, 1), (2, 3, 6), (31, 17, 6), (33, 0, 2), (5, 376, 17)]


def double_net(
    obs_dim: int, action_dim: int, seed: int = 0, *, layer_norm: bool = False
) -> MeanVelocityNet:
    generator = torch.Generator().manual_seed(seed)
    net = MeanVelocityNet(obs_dim, action_dim, (32, 24), layer_norm=layer_norm, generator=generator)
    return net.double()


def draws(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def flow_inputs(batch: int, obs_dim: int, action_dim: int) -> tuple[Tensor, ...]:
    z, obs, velocity, times = draws(
        1, (batch, action_dim), (batch, obs_dim), (batch, action_dim), (batch, 2)
    )
    t = times[:, :1].sigmoid()
    return z, t * times[:, 1:].sigmoid(), t, obs, velocity


@pytest.mark.parametrize(
    ("low", "high"),
    [(-30, -29), (-30, 30), (28, 30), (5, 5.1), (-8, -5), (0, 30), (-6, -4.9), (-1e-3, 1e-3)],
)
def test_truncated_normal_agrees_with_scipy(low: float, high: float) -> None:
    uniform = torch.linspace(1e-6, 1 - 1e-6, 4001, dtype=torch.float64)
    bounds = [torch.full_like(uniform, bound) for bound in (low, high)]
    sample = truncated_normal(*bounds, uniform)
    expected = truncnorm.ppf(uniform.numpy(), low, high)
    np.testing.assert_allclose(sample.numpy(), expected, rtol=1e-11, atol=1e-13)
    single_uniform = uniform.float()
    single = truncated_normal(*(b.float() for b in bounds), single_uniform)
    assert torch.isfinite(single).all()
    # Compared at the rounded uniform: rounding it moves the quantile by 1 / density.
    expected = truncnorm.ppf(single_uniform.double().numpy(), low, high)
    np.testing.assert_allclose(single.numpy(), expected, rtol=3e-6, atol=2e-6)


@pytest.mark.parametrize("time", [0.01, 0.3, 0.9, 0.9995, 1.0])
def test_reverse_candidates_lie_in_the_cube_and_explain_z(time: float) -> None:
    z, uniform = draws(2, (64, 3), (64, 200, 3))
    t = torch.full((64, 1), time, dtype=torch.float64)
    action, noise = reverse_candidates(z, 1 - t, t, torch.special.ndtr(uniform))
    assert action.abs().max() <= 1
    rebuilt = (1 - time) * action + time * noise
    torch.testing.assert_close(rebuilt, z.unsqueeze(1).expand_as(rebuilt), rtol=0, atol=1e-12)


def test_reverse_candidates_follow_the_posterior() -> None:
    """Their mean equals the truncated normal's, known from scipy."""
    z, t = torch.tensor([[0.9]]).double(), torch.tensor([[0.4]]).double()
    uniform = (torch.arange(20000, dtype=torch.float64) + 0.5).div(20000).view(1, -1, 1)
    action, _ = reverse_candidates(z, 1 - t, t, uniform)
    centre, width = 0.9 / 0.6, 0.4 / 0.6
    low, high = (-1 - centre) / width, (1 - centre) / width
    assert action.mean().item() == pytest.approx(
        truncnorm.mean(low, high, loc=centre, scale=width), abs=1e-5
    )


def test_stratified_draws_are_a_latin_hypercube() -> None:
    generator = torch.Generator().manual_seed(0)
    uniform, order = torch.rand(2, 500, 8, 3, generator=generator, dtype=torch.float64)
    draws = stratify(uniform, order)
    strata = (draws * 8).long()
    assert torch.equal(strata.sort(1).values, torch.arange(8).view(1, 8, 1).expand(500, 8, 3))
    # Every candidate is equally often in every stratum, whatever the other coordinates do.
    counts = torch.stack([(strata == i).double().mean(0) for i in range(8)])
    assert (counts - 1 / 8).abs().max() < 0.05
    together = (strata[..., 0] == strata[..., 1]).double().mean()
    assert abs(together - 1 / 8) < 0.02


def test_reweighted_velocity_extremes() -> None:
    """Logits of Q = 1e3 at alpha = 1e-3 stay finite; equal logits give the plain mean."""
    action, noise = draws(3, (7, 16, 2), (7, 16, 2))
    q = 1e3 * torch.linspace(0, 1, 16, dtype=torch.float64).expand(7, 16)
    sharp = reweighted_velocity(q / 1e-3, action, noise)
    torch.testing.assert_close(sharp.velocity, (noise - action)[:, -1])
    torch.testing.assert_close(sharp.ess, torch.ones(7, dtype=torch.float64))
    flat = reweighted_velocity(torch.zeros(7, 16, dtype=torch.float64), action, noise)
    torch.testing.assert_close(flat.velocity, (noise - action).mean(1))
    torch.testing.assert_close(flat.ess, torch.full((7,), 16.0, dtype=torch.float64))


@pytest.mark.parametrize(("batch", "obs_dim", "action_dim"), SIZES)
def test_collapsed_and_k_fold_gradients_are_equal(
    batch: int, obs_dim: int, action_dim: int
) -> None:
    net = double_net(obs_dim, action_dim)
    z, r, t, obs, _ = flow_inputs(batch, obs_dim, action_dim)
    velocities, logits = draws(4, (batch, 9, action_dim), (batch, 9))
    weights = torch.softmax(logits, dim=1)
    meanflow_loss_k_fold(net, z, r, t, obs, velocities, weights).backward()
    k_fold, net.flat.grad = net.flat.grad, None
    collapsed = torch.einsum("bk,bka->ba", weights, velocities)
    meanflow_loss(net, z, r, t, obs, collapsed).backward()
    torch.testing.assert_close(net.flat.grad, k_fold, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize(("batch", "obs_dim", "action_dim"), SIZES)
def test_meanflow_tangent_against_finite_differences(
    batch: int, obs_dim: int, action_dim: int, layer_norm: bool
) -> None:
    net = double_net(obs_dim, action_dim, layer_norm=layer_norm)
    z, r, t, obs, velocity = flow_inputs(batch, obs_dim, action_dim)
    h = 1e-5
    with torch.no_grad():
        u, tangent = net.velocity_and_jvp(z, r, t, obs, velocity)
        forward = net.velocity(z + h * velocity, r, t + h, obs)
        backward = net.velocity(z - h * velocity, r, t - h, obs)
    torch.testing.assert_close(u, net.velocity(z, r, t, obs))
    torch.testing.assert_close(tangent, (forward - backward) / (2 * h), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("batch", "obs_dim", "action_dim"), SIZES)
def test_exact_log_prob_against_autograd(batch: int, obs_dim: int, action_dim: int) -> None:
    net = double_net(obs_dim, action_dim)
    noise, obs = draws(5, (batch, action_dim), (batch, obs_dim))
    result = log_prob(net, obs, noise)
    assert result.action.shape == (batch, action_dim)
    for i in range(batch):
        row = obs[i : i + 1]
        jacobian = torch.autograd.functional.jacobian(
            lambda x, row=row: sample_flow(net, row, x.unsqueeze(0))[0], noise[i]
        )
        sign, logabsdet = torch.linalg.slogdet(jacobian)
        base = torch.distributions.Normal(0, 1).log_prob(noise[i]).sum()
        assert result.log_prob[i].item() == pytest.approx((base - logabsdet).item(), abs=1e-10)
        assert result.folded[i].item() == (sign.item() < 0)


def test_exact_log_prob_is_differentiable() -> None:
    net = double_net(2, 3)
    noise, obs = draws(6, (4, 3), (4, 2))

    def mean_log_prob(flat: Tensor) -> Tensor:
        return torch.func.functional_call(_LogProbModule(net, obs, noise), {"net.flat": flat}, ())

    flat = net.flat.detach().clone().requires_grad_()
    # Slow mode perturbs every parameter; fast mode checks a random projection of all of them.
    assert torch.autograd.gradcheck(mean_log_prob, (flat,), fast_mode=True)


class _LogProbModule(torch.nn.Module):
    def __init__(self, net: MeanVelocityNet, obs: Tensor, noise: Tensor) -> None:
        super().__init__()
        self.net, self.obs, self.noise = net, obs, noise

    def forward(self) -> Tensor:
        return log_prob(self.net, self.obs, self.noise).log_prob.mean()


def linear_flow(matrix: Tensor) -> MeanVelocityNet:
    """A network whose velocity is exactly ``matrix @ z`` (relu(x) - relu(-x) = x)."""
    dim = len(matrix)
    net = MeanVelocityNet(0, dim, (2 * dim,), activation="relu").double()
    with torch.no_grad():
        net.flat.zero_()
        first, last = net.layers()
        first.weight[0, :dim, :dim] = torch.eye(dim)
        first.weight[0, dim:, :dim] = -torch.eye(dim)
        last.weight[0, :, :dim] = matrix
        last.weight[0, :, dim:] = -matrix
    return net


def test_estimators_on_a_linear_flow() -> None:
    """With u = M z every estimator has a closed form, and multi_step converges to -tr M."""
    matrix = torch.tensor([[0.3, 0.1], [0.0, -0.4]]).double()
    net = linear_flow(matrix)
    noise = draws(7, (50, 2))[0]
    obs = torch.zeros(50, 0).double()
    base = torch.distributions.Normal(0, 1).log_prob(noise).sum(-1)
    eye = torch.eye(2).double()
    trace = matrix.trace()

    def check(expected: Tensor, **options: object) -> None:
        found = log_prob(net, obs, noise, **options).log_prob  # type: ignore[arg-type]
        torch.testing.assert_close(found, base - expected)

    check(torch.linalg.slogdet(eye - matrix)[1])
    check(-trace, estimator="one_step_trace")
    check(-trace, estimator="multi_step", steps=3)
    steps = 4 * torch.linalg.slogdet(eye - matrix / 4)[1]
    check(steps, estimator="multi_step", steps=4, trace="log_det")
    probe = torch.ones_like(noise)
    check(-(matrix.sum()), estimator="one_step_trace", trace="hutchinson", probe=probe)


def test_fold_rate_counts_orientation() -> None:
    noise, obs = draws(8, (10, 2))[0], torch.zeros(10, 0).double()
    folded = log_prob(linear_flow(torch.diag(torch.tensor([2.0, 0.0]))), obs, noise)
    assert folded.fold_rate == 1
    both = log_prob(linear_flow(torch.diag(torch.tensor([2.0, 2.0]))), obs, noise)
    assert both.fold_rate == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"estimator": "exakt"}, "did you mean 'exact'"),
        ({"trace": "hutchinson", "estimator": "multi_step"}, "needs a probe"),
        ({"steps": 4}, "exact exactly 1"),
        ({"estimator": "one_step_trace", "trace": "log_det"}, "choose estimator='exact'"),
    ],
)
def test_log_prob_refuses(options: dict[str, object], text: str) -> None:
    noise, obs = draws(9, (3, 2), (3, 1))
    with pytest.raises(ValueError, match=text):
        log_prob(double_net(1, 2), obs, noise, **options)  # type: ignore[arg-type]


def test_one_step_and_multi_step_sampling() -> None:
    """A constant-in-time linear flow: mean steps compose as (I - M / n)^n, Euler the same."""
    matrix = torch.tensor([[0.2, 0.0], [0.1, 0.5]]).double()
    net, noise = linear_flow(matrix), 0.3 * draws(10, (6, 2))[0]
    obs = torch.zeros(6, 0).double()
    once = noise @ (torch.eye(2).double() - matrix).T
    torch.testing.assert_close(one_step_action(net, obs, noise), once.clamp(-1, 1))
    fourth = torch.linalg.matrix_power(torch.eye(2).double() - matrix / 4, 4)
    for flow in ("mean", "instantaneous"):
        torch.testing.assert_close(
            sample_flow(net, obs, noise, 4, flow),  # type: ignore[arg-type]
            noise @ fourth.T,
        )


def test_best_of_takes_the_highest_minimum() -> None:
    critics = Critics(3, 2, (16,), generator=torch.Generator().manual_seed(0)).double()
    obs, actions = draws(11, (5, 3), (5, 8, 2))
    chosen = best_of(critics, obs, actions)
    for i in range(5):
        values = torch.stack([critics.q_min(obs[i : i + 1], a.unsqueeze(0))[0] for a in actions[i]])
        torch.testing.assert_close(chosen[i], actions[i, values.argmax()])


def test_standard_normal_when_the_network_is_zero() -> None:
    net = double_net(2, 4)
    with torch.no_grad():
        net.flat.zero_()
    noise, obs = draws(12, (3, 4), (3, 2))
    expected = -0.5 * noise.square().sum(-1) - 2 * math.log(2 * math.pi)
    torch.testing.assert_close(log_prob(net, obs, noise).log_prob, expected)


@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself
def test_the_specification_compiles() -> None:
    """What users hand to torch.compile, here without its code generator, whole and unbroken."""
    net = double_net(3, 2)
    obs, noise = draws(3, (5, 3), (5, 2))

    def evaluate() -> tuple[Tensor, Tensor, Tensor]:
        sample = log_prob(net, obs, noise)
        return one_step_action(net, obs, noise), sample.action, sample.log_prob

    compiled = torch.compile(evaluate, backend="eager", fullgraph=True)
    for got, expected in zip(compiled(), evaluate(), strict=True):
        torch.testing.assert_close(got, expected)


def test_steps_of_either_flow_ask_for_their_own_times() -> None:
    net = double_net(2, 3)
    noise, obs = draws(3, (5, 3), (5, 2))
    for name, span in (("mean", 0.25), ("instantaneous", 0.0)):
        z = noise
        for t in (1.0, 0.75, 0.5, 0.25):
            end = torch.full((5, 1), t, dtype=torch.float64)
            z = z - 0.25 * net.velocity(z, end - span, end, obs)
        torch.testing.assert_close(sample_flow(net, obs, noise, 4, name), z)


def test_denoising_keeps_the_noise_it_is_told() -> None:
    """Of a network that knows the action every z is signal * action + scale * one noise."""
    noise, action = draws(4, (6, 3), (6, 3))
    action = action.tanh()
    seen: list[Tensor] = []

    class Knowing:
        def velocity(self, z: Tensor, r: Tensor, t: Tensor, obs: Tensor) -> Tensor:
            signal, scale = signal_and_scale(t.flatten()[0].item())
            assert signal**2 + scale**2 == pytest.approx(1)
            seen.append((z - signal * action) / scale)
            return seen[-1]

    found = denoise(Knowing(), torch.zeros(6, 0).double(), noise, 5)
    torch.testing.assert_close(found, action)
    for told in seen[1:]:
        torch.testing.assert_close(told, seen[0])


def test_candidates_of_pure_noise_are_uniform_to_float32() -> None:
    """At t = 1 z says nothing of the action; dividing by 1 - t would cost three digits."""

    generator = torch.Generator().manual_seed(0)
    z, uniform = torch.randn(64, 3, generator=generator), torch.rand(64, 20, 3, generator=generator)
    one = torch.ones(64, 1)
    action, noise = reverse_candidates(z, 0 * one, one, uniform)
    assert torch.equal(action, 2 * uniform - 1)
    assert torch.equal(noise, z.unsqueeze(1).expand_as(noise))


def test_two_turns_restore_the_orientation() -> None:
    net = MeanVelocityNet(0, 1, (2,), activation="relu").double()  # test_reference: linear_flow
    with torch.no_grad():
        net.flat.zero_()
        first, last = net.layers()
        first.weight[0, :, 0] = torch.tensor([1.0, -1.0])
        last.weight[0, 0] = torch.tensor([8.0, -8.0])
    noise, obs = torch.randn(10, 1).double(), torch.zeros(10, 0).double()
    for steps in (1, 2, 3, 4):  # each step is z <- (1 - 8 / steps) z
        found = log_prob(net, obs, noise, estimator="multi_step", trace="log_det", steps=steps)
        assert found.fold_rate == steps % 2
