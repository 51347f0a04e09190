"""Native training kernels against PyTorch in float64 (`flame_ext.networks`, `reference`).

The CPU's for every instruction set of this machine and CUDA's, executed on the host.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from flame_ext import _core, reference
from flame_ext.backends.cpu import NativeEvaluator
from flame_ext.networks import Critics, FlatMLP, GaussianPolicyNet, MeanVelocityNet
from flame_ext.sampling import flow_steps, time_feature_rows

Array = np.ndarray[Any, np.dtype[np.float32]]
EPS = float(np.finfo(np.float32).eps)
ACTIVATIONS = ("relu", "silu", "mish")
each_isa = pytest.mark.usefixtures("isa")
each_target = pytest.mark.usefixtures("kernels")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = _core.num_threads()
    yield
    _core.set_num_threads(before)


def array(x: torch.Tensor) -> Array:
    return x.detach().numpy()


def draw(*shape: int, scale: float = 1.0, seed: int = 0) -> Array:
    rng = np.random.default_rng([seed, *shape])
    return (scale * rng.standard_normal(shape)).astype(np.float32)


def spec_of(net: FlatMLP) -> _core.MlpSpec:
    return _core.MlpSpec(
        net.layer_sizes,
        members=net.members,
        activation=net.activation,
        layer_norm=net.layer_norm,
    )


def shaken(net: FlatMLP, seed: int = 0) -> FlatMLP:
    """Moves gains, offsets and biases off their initial values, padding stays zero."""
    with torch.no_grad():
        noise = torch.Generator().manual_seed(seed)
        for layer in net.layers():
            for x in (layer.bias, layer.gain, layer.offset):
                if x is not None:
                    x.add_(0.2 * torch.randn(x.shape, generator=noise))
    return net


def make_critics(
    obs_dim: int, action_dim: int, hidden: tuple[int, ...], seed: int = 1, **options: Any
) -> Critics:
    generator = torch.Generator().manual_seed(seed)
    critics = Critics(obs_dim, action_dim, hidden, generator=generator, **options)
    shaken(critics, seed)
    return critics


def assert_as_accurate(ours: Array, single: torch.Tensor, exact: torch.Tensor) -> None:
    """Our error is at most twice that of float32 PyTorch, both against float64.

    The floor of a few roundings of the largest value covers results that float32 PyTorch happens to
    get nearly exact.
    """
    wanted = exact.detach().double().numpy()
    assert ours.shape == wanted.shape
    assert np.isfinite(wanted).all()
    error = float(np.abs(ours - wanted).max(initial=0.0))
    theirs = float(np.abs(array(single).astype(np.float64) - wanted).max(initial=0.0))
    floor = 4 * EPS * float(np.abs(wanted).max(initial=0.0))
    assert error <= 2 * theirs + floor, f"error {error:.3g}, float32 PyTorch has {theirs:.3g}"


# --- Ensemble forward and twin Q ------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize(
    ("rows", "sizes", "members"),
    [
        (1, (3, 5), 1),
        (2, (1, 16, 1), 2),
        (31, (20, 33, 47, 6), 1),
        (33, (393, 64, 64, 17), 2),
        (257, (55, 256, 256, 6), 1),
        (100, (23, 100, 101, 102, 1), 3),
    ],
)
@each_target
def test_mlp_forward(activation, layer_norm, rows, sizes, members):
    net = FlatMLP(
        (sizes[0],),
        sizes[1:-1],
        sizes[-1],
        members=members,
        activation=activation,
        layer_norm=layer_norm,
        generator=torch.Generator().manual_seed(3),
    )
    shaken(net)
    x = draw(rows, sizes[0], scale=2.0)
    ours = _core.mlp_forward(spec_of(net), array(net.flat), x)
    single = net(torch.from_numpy(x))
    exact = copy.deepcopy(net).double()(torch.from_numpy(x).double())
    assert_as_accurate(ours, single, exact)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize(
    ("rows", "sizes", "members"), [(1, (3, 5), 1), (101, (23, 47, 33, 12), 1), (49, (7, 16, 2), 2)]
)
@each_isa
def test_recorded_mlp(rows, sizes, members, layer_norm):
    """Through autograd, as the losses use it: output and gradient, twice from one recording."""
    net = FlatMLP(
        (sizes[0],),
        sizes[1:-1],
        sizes[-1],
        members=members,
        activation="silu",
        layer_norm=layer_norm,
        generator=torch.Generator().manual_seed(3),
    )
    shaken(net)
    x = torch.from_numpy(draw(rows, sizes[0], scale=2.0))
    weight = torch.from_numpy(draw(members, rows, sizes[-1]))

    def gradient(network, dtype):
        output = network(x.to(dtype))
        (by_flat,) = torch.autograd.grad((output * weight.to(dtype)).sum(), network.flat)
        return output, by_flat

    single = gradient(net, torch.float32)
    exact = gradient(copy.deepcopy(net).double(), torch.float64)
    net.evaluator = NativeEvaluator(net)
    recorded = net(x)
    assert recorded.grad_fn is not None
    for ours, theirs, truth in zip(gradient(net, torch.float32), single, exact, strict=True):
        assert_as_accurate(ours.detach().numpy(), theirs, truth)
    twice = [
        torch.autograd.grad((recorded * weight).sum(), net.flat, retain_graph=True)[0]
        for _ in range(2)
    ]
    assert torch.equal(*twice)


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize(("rows", "action_dim"), [(1, 1), (64, 6), (33, 17)])
def test_tanh_gaussian(rows, action_dim, scale):
    """Sample, log-density and gradient, from the middle of the box to saturated actions."""
    net = GaussianPolicyNet(3, action_dim, (8,))
    output = torch.from_numpy(draw(rows, 2 * action_dim, scale=scale))
    noise = torch.from_numpy(draw(rows, action_dim, seed=1))
    weights = torch.from_numpy(draw(rows, action_dim, seed=2)), torch.from_numpy(draw(rows, seed=3))

    def evaluate(function, dtype):
        leaf = output.to(dtype).requires_grad_()
        sample = function(leaf, noise.to(dtype))
        total = (sample.action * weights[0]).sum() + (sample.log_prob * weights[1]).sum()
        return sample.action, sample.log_prob, torch.autograd.grad(total, leaf)[0]

    ours = evaluate(NativeEvaluator(net).tanh_gaussian, torch.float32)
    single = evaluate(reference.tanh_gaussian, torch.float32)
    exact = evaluate(reference.tanh_gaussian, torch.float64)
    for value, theirs, truth in zip(ours, single, exact, strict=True):
        assert_as_accurate(value.detach().numpy(), theirs, truth)


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (40, 6), (7, 17), (2, 40)])
def test_monotonicity_gap(rows, size):
    """Rows above the margin, at it and far below, with the gradient of the smallest eigenvalue."""
    identity = torch.eye(size)
    shift = torch.linspace(-3, 3, rows).view(-1, 1, 1)
    transport = torch.from_numpy(draw(rows, size, size, scale=0.5)) + shift * identity
    transport[0] = 0.02 * identity if rows > 1 else -identity

    def evaluate(function, dtype):
        leaf = transport.to(dtype).requires_grad_()
        gap = function(leaf, 0.02)
        return gap, torch.autograd.grad(gap.square().sum(), leaf)[0]

    net = MeanVelocityNet(2, size, (8,))
    ours = evaluate(NativeEvaluator(net).monotonicity_gap, torch.float32)
    single = evaluate(reference.monotonicity_gap, torch.float32)
    exact = evaluate(reference.monotonicity_gap, torch.float64)
    assert (exact[0] > 0).any()
    for value, theirs, truth in zip(ours, single, exact, strict=True):
        assert_as_accurate(value.detach().numpy(), theirs, truth)


def test_monotonicity_gap_shows_nan():
    transport = np.full((1, 3, 3), np.nan, np.float32)
    assert np.isnan(_core.monotonicity_gap(transport, 0.02)[0])


@each_target
def test_mlp_forward_takes_strided_and_unaligned_rows():
    net = FlatMLP((7,), (32,), 3, generator=torch.Generator().manual_seed(0))
    memory = draw(21 * 12 + 1)[1:].reshape(21, 12)
    view = memory[::2, 3:10]
    args = spec_of(net), array(net.flat)
    assert np.array_equal(
        _core.mlp_forward(*args, view), _core.mlp_forward(*args, np.ascontiguousarray(view))
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@each_target
def test_activations_at_extreme_inputs(activation):
    """One unit with weight 1 passes its activation through; no input may overflow or turn NaN."""
    net = FlatMLP((1,), (1,), 1, activation=activation)
    with torch.no_grad():
        for layer in net.layers():
            layer.weight.fill_(1)
            layer.bias.zero_()
    x = np.concatenate([np.linspace(-100, 100, 4001), [-1e30, -1e4, 1e4, 1e30, 0.0]])
    x = x.astype(np.float32).reshape(-1, 1)
    ours = _core.mlp_forward(spec_of(net), array(net.flat), x)[0]
    exact = copy.deepcopy(net).double()(torch.from_numpy(x).double())[0].detach().numpy()
    assert (np.abs(ours - exact) <= 6 * EPS * np.abs(exact) + 1e-30).all()
    nan = np.full((1, 1), np.nan, np.float32)
    assert np.isnan(_core.mlp_forward(spec_of(net), array(net.flat), nan)).all()


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize(
    ("states", "candidates", "obs_dim", "action_dim", "hidden"),
    [
        (1, 1, 1, 1, (8,)),
        (2, 33, 3, 6, (24, 24)),
        (31, 7, 17, 6, (256, 256)),
        (5, 100, 376, 17, (64, 64, 64)),
        (257, 2, 3, 1, (40,)),
        (3, 5, 4, 2, ()),
    ],
)
@each_target
def test_twin_q(layer_norm, states, candidates, obs_dim, action_dim, hidden):
    critics = make_critics(obs_dim, action_dim, hidden, layer_norm=layer_norm)
    obs, actions = draw(states, obs_dim), np.tanh(draw(states, candidates, action_dim))
    q_min, q_each = _core.twin_q(spec_of(critics), array(critics.flat), obs, actions, each=True)
    inputs = torch.from_numpy(obs).unsqueeze(1), torch.from_numpy(actions)
    single = critics.q_values(*inputs)
    exact = copy.deepcopy(critics).double().q_values(*(x.double() for x in inputs))
    assert_as_accurate(q_each, single, exact)
    assert np.array_equal(q_min, q_each.min(0))
    only_min = _core.twin_q(spec_of(critics), array(critics.flat), obs, actions)
    assert np.array_equal(only_min, q_min)


def test_twin_q_minimum_shows_nan_of_any_member():
    critics = make_critics(3, 2, (8,))
    with torch.no_grad():
        critics.layers()[-1].bias[0] = float("nan")
    q_min = _core.twin_q(spec_of(critics), array(critics.flat), draw(4, 3), draw(4, 5, 2))
    assert np.isnan(q_min).all()


# --- Critic step ----------------------------------------------------------------------------------


def critic_gradient(
    critics: Critics, obs: Array, action: Array, target: Array, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    net = copy.deepcopy(critics).to(dtype)
    inputs = [torch.from_numpy(x).to(dtype) for x in (obs, action, target)]
    loss = (net.q_values(*inputs[:2]) - inputs[2]).square().mean(1)
    loss.sum().backward()
    assert net.flat.grad is not None
    return loss.detach(), net.flat.grad


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize(
    ("rows", "obs_dim", "action_dim", "hidden", "members"),
    [
        (1, 1, 1, (8,), 1),
        (2, 3, 6, (24, 25), 2),
        (31, 17, 6, (64, 64, 64), 2),
        (33, 376, 17, (48, 48), 2),
        (257, 17, 6, (256, 256), 2),
        (33, 3, 2, (), 2),
    ],
)
@each_target
def test_critic_step(activation, layer_norm, rows, obs_dim, action_dim, hidden, members):
    critics = make_critics(
        obs_dim, action_dim, hidden, layer_norm=layer_norm, activation=activation, members=members
    )
    obs, action, target = draw(rows, obs_dim), np.tanh(draw(rows, action_dim)), draw(rows)
    gradients = np.zeros_like(array(critics.flat))
    args = spec_of(critics), array(critics.flat), gradients, obs, action, target
    loss, q_mean, q = _core.critic_step(*args)
    loss32, single = critic_gradient(critics, obs, action, target, torch.float32)
    loss64, exact = critic_gradient(critics, obs, action, target, torch.float64)
    assert_as_accurate(gradients, single, exact)
    assert_as_accurate(np.asarray(loss), loss32, loss64)
    assert np.allclose(q_mean, q.mean(1), rtol=1e-5, atol=1e-6)

    once = gradients.copy()
    _core.critic_step(*args)
    assert np.allclose(gradients, 2 * once, rtol=1e-6, atol=1e-9)


@each_target
def test_critic_step_with_extreme_targets():
    critics = make_critics(17, 6, (64, 64), layer_norm=True)
    obs, action = draw(65, 17, scale=1e2), np.tanh(draw(65, 6))
    target = draw(65, scale=1e3)
    gradients = np.zeros_like(array(critics.flat))
    _core.critic_step(spec_of(critics), array(critics.flat), gradients, obs, action, target)
    _, single = critic_gradient(critics, obs, action, target, torch.float32)
    _, exact = critic_gradient(critics, obs, action, target, torch.float64)
    assert_as_accurate(gradients, single, exact)


# --- Qmin's action gradient -----------------------------------------------------------------------


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize(
    ("rows", "obs_dim", "action_dim", "hidden"),
    [(1, 1, 1, (8,)), (31, 17, 6, (64, 64)), (257, 3, 6, (40, 40, 40)), (33, 376, 17, (48, 32))],
)
@each_target
def test_q_gradient(layer_norm, rows, obs_dim, action_dim, hidden):
    critics = make_critics(obs_dim, action_dim, hidden, layer_norm=layer_norm)
    obs, action = draw(rows, obs_dim), np.tanh(draw(rows, action_dim))
    q_min, gradient = _core.q_gradient(spec_of(critics), array(critics.flat), obs, action)
    results = []
    for dtype in (torch.float32, torch.float64):
        net = copy.deepcopy(critics).to(dtype)
        a = torch.from_numpy(action).to(dtype).requires_grad_()
        q = net.q_min(torch.from_numpy(obs).to(dtype), a)
        q.sum().backward()
        results.append((q.detach(), a.grad))
    assert_as_accurate(q_min, results[0][0], results[1][0])
    assert_as_accurate(gradient, results[0][1], results[1][1])


# --- Truncated normal and the reweighted velocity -------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (-1.0, 2.0),
        (-20.0, 20.0),
        (5.0, 7.0),
        (-7.0, -5.0),
        (30.0, 31.0),
        (-31.0, -30.0),
        (-200.0, -199.0),
        (-1e3, 2.0),
        (-0.5, -0.4999),
        (29.99, 30.0),
    ],
)
@each_target
def test_truncated_normal_inverts_the_distribution_function(low, high):
    """Phi(x) relative to the interval must give the uniform draw back, also 30 deviations out."""
    rng = np.random.default_rng(0)
    n = 1003
    uniform = rng.uniform(1e-6, 1 - 1e-6, n).astype(np.float32)
    bounds = np.full(n, low, np.float32), np.full(n, high, np.float32)
    x = _core.truncated_normal(*bounds, uniform).astype(np.float64)
    left, right = float(bounds[0][0]), float(bounds[1][0])
    assert ((x >= left) & (x <= right)).all()
    log_cdf = [
        torch.special.log_ndtr(torch.as_tensor(v).double()).numpy() for v in (left, right, x)
    ]
    if left + right > 0:
        values = (-right, -left, -x)
        log_cdf = [torch.special.log_ndtr(torch.as_tensor(v).double()).numpy() for v in values]
    below = np.exp(log_cdf[2] - log_cdf[1]) - np.exp(log_cdf[0] - log_cdf[1])
    recovered = below / -np.expm1(log_cdf[0] - log_cdf[1])
    if left + right > 0:
        recovered = 1 - recovered
    # Rounding x to float32 moves it by half a unit in the last place.
    hazard = max(abs(left), abs(right)) if min(abs(left), abs(right)) > 1 else 1.0
    rounding = EPS * np.abs(x).max() * max(1 / (right - left), min(hazard, 1e3)) + 1e-6
    assert np.abs(recovered - uniform).max() < 2 * rounding


def reverse_inputs(states: int, obs_dim: int, action_dim: int) -> tuple[Array, ...]:
    """Observations, z, signal and scale, with times at and near 1 among them."""
    rng = np.random.default_rng(states)
    t = rng.uniform(0.01, 1, states).astype(np.float32)
    t[:2] = (1, 0.9995)[:states]
    action = rng.uniform(-1, 1, (states, action_dim)).astype(np.float32)
    z = (1 - t[:, None]) * action + t[:, None] * draw(states, action_dim)
    return draw(states, obs_dim), z.astype(np.float32), 1 - t, t


@pytest.mark.parametrize(("scale", "alpha"), [(1.0, 0.3), (1e3, 1e-3)])
@pytest.mark.parametrize(
    ("states", "candidates", "obs_dim", "action_dim", "hidden"),
    [
        (1, 1, 1, 1, (8,)),
        (2, 33, 3, 6, (24, 24)),
        (31, 7, 17, 6, (64, 64)),
        (33, 100, 376, 17, (32, 32)),
        (3, 2000, 3, 2, (16,)),
        (257, 5, 17, 6, (40, 40)),
    ],
)
@each_target
@torch.no_grad()
def test_reweighted_velocity(scale, alpha, states, candidates, obs_dim, action_dim, hidden):
    critics = make_critics(obs_dim, action_dim, hidden, layer_norm=True)
    critics.scale_output_layer(5 * scale)
    obs, z, signal, noise_scale = reverse_inputs(states, obs_dim, action_dim)
    uniform = np.random.default_rng(1).random((states, candidates, action_dim), np.float32)
    uniform = np.clip(uniform, EPS, 1 - EPS).astype(np.float32)
    velocity, ess, _ = _core.reweighted_velocity(
        spec_of(critics), array(critics.flat), obs, z, signal, noise_scale, alpha, uniform=uniform
    )
    results = []
    for dtype in (torch.float32, torch.float64):
        net = copy.deepcopy(critics).to(dtype)
        s, z_, u = to_tensors(dtype, obs, z, uniform)
        sig, sc = (x.unsqueeze(1) for x in to_tensors(dtype, signal, noise_scale))
        action, noise = reference.reverse_candidates(z_, sig, sc, u)
        logits = net.candidate_q_min(s, action) / alpha
        results.append(reference.reweighted_velocity(logits, action, noise))
    assert np.isfinite(velocity).all()
    assert ((ess >= 1 - EPS) & (ess <= candidates * (1 + EPS))).all()
    if scale == 1:
        assert_as_accurate(velocity, results[0].velocity, results[1].velocity)
        # Its error is that of the logits, Q / alpha, whose rounding depends on the order of sums.
        assert np.allclose(ess, results[1].ess.numpy(), rtol=1e-5)
    else:
        # The weights sit on one candidate; where two nearly tie, float32 Q values may swap them.
        decided = results[1].weights.amax(1).numpy() > 1 - 1e-6
        exact = results[1].velocity.numpy()
        agrees = np.abs(velocity - exact).max(1) < 1e-4 * (1 + np.abs(exact).max(1))
        assert (agrees | ~decided).mean() > 0.95


@each_target
def test_reweighted_velocity_draws_from_the_philox_stream():
    critics = make_critics(3, 6, (16,))
    inputs = reverse_inputs(11, 3, 6)
    args = spec_of(critics), array(critics.flat), *inputs, 0.5
    uniform = _core.philox_uniform(7, 3, 100, 11 * 9 * 6).reshape(11, 9, 6)
    drawn = _core.reweighted_velocity(*args, num_candidates=9, seed=7, stream=3, offset=100)
    given = _core.reweighted_velocity(*args, uniform=uniform)
    for a, b in zip(drawn[:2], given[:2], strict=True):
        assert np.array_equal(a, b)


@each_target
def test_resampled_candidates_follow_the_weights():
    """At t = 1 candidates are uniform; resampling them by Q draws from the target (SIR)."""
    critics = make_critics(1, 1, (16,))
    critics.scale_output_layer(10)
    n = 4000
    obs, z = np.zeros((n, 1), np.float32), np.zeros((n, 1), np.float32)
    one = np.ones(n, np.float32)
    args = spec_of(critics), array(critics.flat), obs, z, 0 * one, one, 0.5
    resampled = _core.reweighted_velocity(*args, num_candidates=64, seed=1, resample=True)[2][:, 0]
    grid = np.linspace(-1, 1, 2001, dtype=np.float32).reshape(1, -1, 1)
    q = _core.twin_q(spec_of(critics), array(critics.flat), obs[:1], grid)[0].astype(np.float64)
    density = np.exp((q - q.max()) / 0.5)
    cdf = np.cumsum(density) / density.sum()
    levels = np.interp(resampled, grid[0, :, 0], cdf)
    distance = np.abs(np.sort(levels) - (np.arange(n) + 0.5) / n).max()
    assert distance < 1.95 / np.sqrt(n) + 0.01  # Kolmogorov-Smirnov at 0.1 %, and SIR's own bias


def test_lattice_candidates_estimate_the_same_velocity_no_worse():
    critics = make_critics(3, 6, (32, 32))
    args = spec_of(critics), array(critics.flat), *reverse_inputs(64, 3, 6), 1.0
    truth = _core.reweighted_velocity(*args, num_candidates=20_000, seed=99)[0]
    errors = {}
    for sampling in ("random", "lattice"):
        runs = [
            _core.reweighted_velocity(*args, num_candidates=64, seed=s, sampling=sampling)[0]
            for s in range(8)
        ]
        errors[sampling] = float(np.mean([np.square(run - truth).mean() for run in runs]))
    assert errors["lattice"] < errors["random"]


# --- MeanFlow -------------------------------------------------------------------------------------

POLICIES = [
    (1, 1, 1, (8,)),
    (2, 3, 6, (33, 24)),
    (31, 17, 6, (64, 64, 64)),
    (257, 17, 6, (256, 256)),
    (33, 376, 17, (48, 48)),
]


def make_policy(
    obs_dim: int, action_dim: int, hidden: tuple[int, ...], seed: int = 2, **options: Any
) -> MeanVelocityNet:
    generator = torch.Generator().manual_seed(seed)
    net = MeanVelocityNet(obs_dim, action_dim, hidden, generator=generator, **options)
    shaken(net, seed)
    return net


def to_tensors(dtype: torch.dtype, *arrays: Array) -> list[torch.Tensor]:
    return [torch.from_numpy(x).to(dtype) for x in arrays]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize(("rows", "obs_dim", "action_dim", "hidden"), POLICIES)
@each_target
def test_meanflow_step(activation, layer_norm, rows, obs_dim, action_dim, hidden):
    net = make_policy(obs_dim, action_dim, hidden, activation=activation, layer_norm=layer_norm)
    obs, z, velocity = (
        draw(rows, obs_dim),
        draw(rows, action_dim),
        2 * draw(rows, action_dim, seed=1),
    )
    t = np.random.default_rng(rows).uniform(0.01, 1, rows).astype(np.float32)
    r = np.where(np.arange(rows) % 3 == 0, t, 0.5 * t).astype(np.float32)
    gradients = np.zeros_like(array(net.flat))
    loss = _core.meanflow_step(
        spec_of(net), array(net.flat), gradients, obs, z, r, t, velocity, None
    )
    results = []
    for dtype in (torch.float32, torch.float64):
        copied = copy.deepcopy(net).to(dtype)
        s, z_, v = to_tensors(dtype, obs, z, velocity)
        r_, t_ = (x.unsqueeze(1) for x in to_tensors(dtype, r, t))
        value = reference.meanflow_loss(copied, z_, r_, t_, s, v)
        value.backward()
        results.append((value.detach(), copied.flat.grad))
    assert_as_accurate(np.asarray(loss), results[0][0], results[1][0])
    assert_as_accurate(gradients, results[0][1], results[1][1])


# --- Density of the flow policy -------------------------------------------------------------------


def flow_tables(steps: int, flow: str = "mean") -> tuple[Array, Array]:
    table = flow_steps(steps, flow)
    return time_feature_rows(table), np.array([step.q for step in table], np.float32)


def away_from_kinks(net: MeanVelocityNet, obs: Array, noise: Array) -> Array:
    """Samples whose density is smooth at the scale of rounding errors.

    With relu the Jacobian jumps where a unit changes sign, so no float32 result has a bounded error
    there. Such samples are those whose float64 density moves visibly when the noise moves by 3e-6.
    """
    exact = copy.deepcopy(net).double()
    s, x = to_tensors(torch.float64, obs, noise)
    values = [reference.log_prob(exact, s, x + shift).log_prob for shift in (-3e-6, 0, 3e-6)]
    spread = torch.stack(values).detach().numpy()
    smooth = np.ptp(spread, axis=0) < 1e-4
    assert smooth.mean() > 0.9
    return smooth


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "obs_dim", "action_dim", "hidden"), POLICIES)
@each_target
def test_exact_density(activation, layer_norm, rows, obs_dim, action_dim, hidden):
    net = make_policy(obs_dim, action_dim, hidden, activation=activation, layer_norm=layer_norm)
    obs, noise = draw(rows, obs_dim), draw(rows, action_dim)
    args = spec_of(net), array(net.flat), obs, noise, *flow_tables(1)
    action, log_prob, folded = _core.flow_density(*args, "log_det")
    single = reference.log_prob(net, *to_tensors(torch.float32, obs, noise))
    exact = reference.log_prob(copy.deepcopy(net).double(), *to_tensors(torch.float64, obs, noise))
    assert_as_accurate(action, single.action, exact.action)
    smooth = away_from_kinks(net, obs, noise)
    assert_as_accurate(log_prob[smooth], single.log_prob[smooth], exact.log_prob[smooth])
    assert np.array_equal(folded[smooth], exact.folded[smooth].numpy())


@pytest.mark.parametrize(
    ("options", "divergence"),
    [
        ({"estimator": "one_step_trace"}, "trace"),
        ({"estimator": "multi_step", "steps": 4, "trace": "log_det"}, "log_det"),
        (
            {"estimator": "multi_step", "steps": 3, "trace": "exact", "flow": "instantaneous"},
            "trace",
        ),
        ({"estimator": "multi_step", "steps": 5, "trace": "hutchinson"}, "probe"),
    ],
)
@each_target
def test_density_estimators_with_several_samples_per_state(options, divergence):
    net = make_policy(17, 6, (64, 48))
    obs, noise = draw(7, 17), draw(7, 23, 6)
    probe = np.sign(draw(7, 23, 6, seed=5)) if divergence == "probe" else None
    tables = flow_tables(options.get("steps", 1), options.get("flow", "mean"))
    action, log_prob, folded = _core.flow_density(
        spec_of(net), array(net.flat), obs, noise, *tables, divergence, probe
    )
    results = []
    for dtype in (torch.float32, torch.float64):
        s, x = to_tensors(dtype, obs, noise)
        p = None if probe is None else torch.from_numpy(probe).to(dtype)
        copied = copy.deepcopy(net).to(dtype)
        results.append(reference.log_prob(copied, s.unsqueeze(1), x, probe=p, **options))
    assert_as_accurate(action, results[0].action, results[1].action)
    assert_as_accurate(log_prob, results[0].log_prob, results[1].log_prob)
    assert np.array_equal(folded, results[1].folded.numpy())


def density_gradient(net: MeanVelocityNet, dtype: torch.dtype, arrays: list[Array]) -> torch.Tensor:
    copied = copy.deepcopy(net).to(dtype)
    obs, noise, d_action, d_log_prob = to_tensors(dtype, *arrays)
    result = reference.log_prob(copied, obs, noise)
    ((result.action * d_action).sum() + (result.log_prob * d_log_prob).sum()).backward()
    assert copied.flat.grad is not None
    return copied.flat.grad


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "obs_dim", "action_dim", "hidden"), POLICIES)
@each_isa
def test_density_gradient(activation, layer_norm, rows, obs_dim, action_dim, hidden):
    net = make_policy(obs_dim, action_dim, hidden, activation=activation, layer_norm=layer_norm)
    arrays = [draw(rows, obs_dim), draw(rows, action_dim)]
    arrays += [draw(rows, action_dim, seed=3), draw(rows, seed=4)]
    args = spec_of(net), array(net.flat), *arrays[:2], *flow_tables(1)
    recorded = _core.RecordedDensity(*args)
    action, log_prob, folded = _core.flow_density(*args, "log_det")
    assert np.allclose(recorded.action, action, rtol=1e-5, atol=1e-5)
    assert np.allclose(recorded.log_prob, log_prob, rtol=1e-4, atol=1e-4)
    assert np.array_equal(recorded.folded, folded)
    gradients = np.zeros_like(array(net.flat))
    recorded.backward(gradients, *arrays[2:])
    single = density_gradient(net, torch.float32, arrays)
    exact = density_gradient(net, torch.float64, arrays)
    assert_as_accurate(gradients, single, exact)
    again = np.zeros_like(gradients)
    recorded.backward(again, *arrays[2:])
    assert np.array_equal(again, gradients)


@each_isa
def test_sample_without_density_has_the_action_gradient_alone():
    net = make_policy(3, 2, (32, 32), layer_norm=True)
    obs, noise, d_action = draw(9, 3), draw(9, 2), draw(9, 2, seed=3)
    args = spec_of(net), array(net.flat), obs, noise, *flow_tables(1)
    gradients = np.zeros_like(array(net.flat))
    _core.RecordedDensity(*args, density=False).backward(gradients, d_action, draw(9))
    arrays = [obs, noise, d_action, np.zeros(9, np.float32)]
    assert_as_accurate(
        gradients,
        density_gradient(net, torch.float32, arrays),
        density_gradient(net, torch.float64, arrays),
    )


# --- Optimizer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 16, 1000, 40_003])
@each_target
def test_adam_follows_torch(size):
    start = draw(size)
    ours, first, second = start.copy(), np.zeros_like(start), np.zeros_like(start)
    theirs = torch.nn.Parameter(torch.from_numpy(start.copy()).double())
    optimizer = torch.optim.Adam([theirs], lr=3e-3, betas=(0.9, 0.99), eps=1e-7)
    for step in range(1, 11):
        gradient = draw(size, scale=10.0 ** (step % 5 - 3), seed=step)
        _core.adam(ours, gradient, first, second, step, 3e-3, 0.9, 0.99, 1e-7)
        theirs.grad = torch.from_numpy(gradient).double()
        optimizer.step()
    assert np.abs(ours - theirs.detach().numpy()).max() < 4e-6 * max(1.0, np.abs(start).max())


@pytest.mark.parametrize("size", [1, 7, 1000, 40_003])
@each_target
def test_soft_update(size):
    target, online = draw(size), draw(size, seed=1)
    wanted = target + 0.005 * (online.astype(np.float64) - target)
    _core.soft_update(target, online, 0.005)
    assert np.allclose(target, wanted, rtol=2 * EPS, atol=2 * EPS)


# --- Threads and refusals -------------------------------------------------------------------------


def run_everything(threads: int, recorded: bool = True) -> list[Array]:
    """All kernels on one input, with the given number of threads.

    CUDA has no kernel that records the density for a gradient.
    """
    _core.set_num_threads(threads)
    critics = make_critics(17, 6, (72, 64), layer_norm=True)
    spec, flat = spec_of(critics), array(critics.flat)
    obs, action = draw(301, 17), np.tanh(draw(301, 6))
    gradients = np.zeros_like(flat)
    loss, _, q = _core.critic_step(spec, flat, gradients, obs, action, draw(301))
    net = make_policy(17, 6, (72, 64), layer_norm=True)
    policy, weights = spec_of(net), array(net.flat)
    flow_gradients, kl_gradients = np.zeros_like(weights), np.zeros_like(weights)
    t = 0.01 + 0.99 * np.abs(np.tanh(draw(301, seed=7)))
    flow_args = obs, action, 0.5 * t, t, draw(301, 6, seed=8)
    flow_loss = _core.meanflow_step(policy, weights, flow_gradients, *flow_args)
    reverse_kl: list[Array] = []
    if recorded:
        density_args = policy, weights, obs, draw(301, 6, seed=9), *flow_tables(1)
        density = _core.RecordedDensity(*density_args)
        density.backward(kl_gradients, draw(301, 6), draw(301))
        reverse_kl = [density.log_prob, kl_gradients]
    parameters, first, second = flat.copy(), np.zeros_like(flat), np.zeros_like(flat)
    _core.adam(parameters, gradients, first, second, 1, 1e-3, 0.9, 0.999, 1e-8)
    _core.soft_update(first, parameters, 0.3)
    return [
        _core.mlp_forward(spec, flat, draw(301, 23)),
        _core.twin_q(spec, flat, obs, np.tanh(draw(301, 9, 6))),
        gradients,
        np.asarray(loss),
        q,
        parameters,
        first,
        flow_gradients,
        np.asarray(flow_loss),
        *reverse_kl,
        *_core.q_gradient(spec, flat, obs, action),
        *_core.reweighted_velocity(
            spec, flat, obs, action, 1 - t, t, 0.2, num_candidates=7, seed=3, resample=True
        ),
        *_core.flow_density(policy, weights, obs, draw(301, 5, 6), *flow_tables(2), "log_det"),
    ]


@each_isa
def test_results_are_the_same_bits_for_any_number_of_threads():
    one = run_everything(1)
    for threads in (2, 3, 8):
        for a, b in zip(one, run_everything(threads), strict=True):
            assert np.array_equal(a, b)


def test_refusals_say_what_to_do():
    critics = make_critics(3, 2, (8,))
    spec, flat = spec_of(critics), array(critics.flat)
    obs, actions = draw(4, 3), draw(4, 5, 2)
    with pytest.raises(ValueError, match=r"obs has shape \(4, 2\); it must be \(4, 3\)"):
        _core.twin_q(spec, flat, obs[:, :2], actions)
    with pytest.raises(ValueError, match="parameters has dtype float64; it must be float32"):
        _core.twin_q(spec, flat.astype(np.float64), obs, actions)
    with pytest.raises(ValueError, match=r"parameters has shape \(7,\)"):
        _core.twin_q(spec, flat[:7], obs, actions)
    with pytest.raises(ValueError, match="strided columns"):
        _core.twin_q(spec, flat, np.asfortranarray(obs), actions)
    with pytest.raises(ValueError, match="not C-contiguous"):
        _core.twin_q(spec, flat, obs, np.asfortranarray(actions))
    frozen = np.zeros_like(flat)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="gradients is read-only"):
        _core.critic_step(spec, flat, frozen, obs, actions[:, 0].copy(), draw(4))
    with pytest.raises(ValueError, match="activation is 'gelu'"):
        _core.MlpSpec((3, 1), members=1, activation="gelu", layer_norm=False)
    with pytest.raises(ValueError, match="first step is 1"):
        _core.adam(flat.copy(), flat, flat.copy(), flat.copy(), 0, 1e-3, 0.9, 0.999, 1e-8)


def test_cuda_kernels_do_not_depend_on_the_order_of_threads():
    """A value read in the phase that writes it would differ: the sign of a missing barrier."""
    before = _core.isa_active()
    results = []
    for order in ("rising", "falling"):
        _core.run_cuda_on_host(order)
        results.append(run_everything(1, recorded=False))
    _core.set_isa(before)
    for rising, falling in zip(*results, strict=True):
        assert np.array_equal(rising, falling)


def test_cuda_kernels_refuse_what_does_not_fit_the_device():
    net = FlatMLP((8,), (1024,), 3)
    before = _core.isa_active()
    _core.run_cuda_on_host("rising", 48 * 1024)
    with pytest.raises(ValueError, match=r"1024 columns need .* this device has 49152 bytes"):
        _core.mlp_forward(spec_of(net), array(net.flat), draw(4, 8))
    _core.set_isa(before)
