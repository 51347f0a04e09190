"""Native kernels of the policies' losses and densities against `reference` in float64.

The CPU's for every instruction set of this machine and CUDA's, executed on the host.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from kernel_inputs import (
    ACTIVATIONS,
    EPS,
    POLICIES,
    Array,
    assert_as_accurate,
    draw,
    make_critics,
    make_policy,
    philox_candidates,
    to_tensors,
)

from flame_ext import _core, reference
from flame_ext.backends.native_evaluator import NativeEvaluator
from flame_ext.backends.native_views import array, flow_table, mlp_spec
from flame_ext.networks import GaussianPolicyNet, MeanVelocityNet

each_isa = pytest.mark.usefixtures("isa")
each_target = pytest.mark.usefixtures("kernels")
each_candidate_target = pytest.mark.usefixtures("candidate_kernels")


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
@pytest.mark.usefixtures("kernels")
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


@pytest.mark.usefixtures("kernels")
def test_monotonicity_gap_shows_nan():
    transport = np.full((1, 3, 3), np.nan, np.float32)
    assert np.isnan(_core.monotonicity_gap(transport, 0.02)[0])


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
@each_candidate_target
@torch.no_grad()
def test_reweighted_velocity(scale, alpha, states, candidates, obs_dim, action_dim, hidden):
    critics = make_critics(obs_dim, action_dim, hidden, layer_norm=True)
    critics.scale_output_layer(5 * scale)
    obs, z, signal, noise_scale = reverse_inputs(states, obs_dim, action_dim)
    uniform = np.random.default_rng(1).random((states, candidates, action_dim), np.float32)
    uniform = np.clip(uniform, EPS, 1 - EPS).astype(np.float32)
    velocity, ess = _core.reweighted_velocity(
        mlp_spec(critics), array(critics.flat), obs, z, signal, noise_scale, alpha, uniform=uniform
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


@each_candidate_target
def test_reweighted_velocity_draws_from_the_philox_stream():
    critics = make_critics(3, 6, (16,))
    inputs = reverse_inputs(11, 3, 6)
    args = mlp_spec(critics), array(critics.flat), *inputs, 0.5
    shape, draws = (11, 9, 6), {"seed": 7, "stream": 3, "offset": 100}
    uniform = {
        "random": _core.philox_uniform(*draws.values(), math.prod(shape)).reshape(shape),
        "stratified": array(philox_candidates(7, shape, stream=3, offset=100).float()),
    }
    for sampling, expected in uniform.items():
        drawn = _core.reweighted_velocity(*args, num_candidates=9, sampling=sampling, **draws)
        given = _core.reweighted_velocity(*args, uniform=expected)
        # Strata are placed in double, the draws that are handed over are rounded to float.
        error = 0.0 if sampling == "random" else 1e-4
        for a, b in zip(drawn, given, strict=True):
            np.testing.assert_allclose(a, b, rtol=error, atol=error)


def test_stratified_candidates_need_a_quarter_of_the_random_ones():
    critics = make_critics(3, 6, (32, 32))
    args = mlp_spec(critics), array(critics.flat), *reverse_inputs(64, 3, 6), 1.0
    truth = _core.reweighted_velocity(*args, num_candidates=20_000, seed=99, sampling="random")[0]
    errors = {}
    for sampling, count in (("random", 64), ("stratified", 16)):
        runs = [
            _core.reweighted_velocity(*args, num_candidates=count, seed=s, sampling=sampling)[0]
            for s in range(8)
        ]
        errors[sampling] = float(np.mean([np.square(run - truth).mean() for run in runs]))
    assert errors["stratified"] < errors["random"]


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
    loss = _core.meanflow_step(mlp_spec(net), array(net.flat), gradients, obs, z, r, t, velocity)
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
    args = mlp_spec(net), array(net.flat), obs, noise, *flow_table(1, "mean")
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
    tables = flow_table(options.get("steps", 1), options.get("flow", "mean"))
    action, log_prob, folded = _core.flow_density(
        mlp_spec(net), array(net.flat), obs, noise, *tables, divergence, probe
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
    """Of obs, noise, d_action, d_log_prob and, where it is given, d_transport."""
    copied = copy.deepcopy(net).to(dtype)
    obs, noise, *weights = to_tensors(dtype, *arrays)
    result = reference.log_prob(copied, obs, noise)
    outputs = (result.action, result.log_prob, result.transport)
    pairs = zip(outputs, weights, strict=False)
    sum((x * weight).sum() for x, weight in pairs if x is not None).backward()
    assert copied.flat.grad is not None
    return copied.flat.grad


# With samples that fill a tile of 64 rows, and a network without hidden layers.
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("rows", "obs_dim", "action_dim", "hidden"), [*POLICIES, (3, 4, 63, (40, 33)), (9, 4, 2, ())]
)
@each_target
def test_density_gradient(activation, layer_norm, rows, obs_dim, action_dim, hidden):
    net = make_policy(obs_dim, action_dim, hidden, activation=activation, layer_norm=layer_norm)
    arrays = [draw(rows, obs_dim), draw(rows, action_dim)]
    arrays += [draw(rows, action_dim, seed=3), draw(rows, seed=4)]
    d_transport = draw(rows, action_dim, action_dim, seed=5)
    args = mlp_spec(net), array(net.flat), *arrays[:2], *flow_table(1, "mean")
    recorded = _core.RecordedDensity(*args)
    action, log_prob, folded = _core.flow_density(*args, "log_det")
    assert np.allclose(recorded.action, action, rtol=1e-5, atol=1e-5)
    assert np.allclose(recorded.log_prob, log_prob, rtol=1e-4, atol=1e-4)
    assert np.array_equal(recorded.folded, folded)
    for given in (arrays, [*arrays, d_transport]):
        gradients = np.zeros_like(array(net.flat))
        recorded.backward(gradients, *given[2:])
        single = density_gradient(net, torch.float32, given)
        exact = density_gradient(net, torch.float64, given)
        assert_as_accurate(gradients, single, exact)
    again = np.zeros_like(gradients)
    recorded.backward(again, *given[2:])
    assert np.array_equal(again, gradients)
