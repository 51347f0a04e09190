"""What all native kernels keep: the same bits at any thread count, refusals that say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from kernel_inputs import Array, draw, make_critics, make_policy

from flame_ext import _core
from flame_ext.backends.native_views import array, flow_table, mlp_spec
from flame_ext.networks import FlatMLP

each_isa = pytest.mark.usefixtures("isa")
each_target = pytest.mark.usefixtures("kernels")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = _core.num_threads()
    yield
    _core.set_num_threads(before)


def run_everything(threads: int) -> list[Array]:
    """All kernels on one input, with the given number of threads."""
    _core.set_num_threads(threads)
    critics = make_critics(17, 6, (72, 64), layer_norm=True)
    spec, flat = mlp_spec(critics), array(critics.flat)
    obs, action = draw(301, 17), np.tanh(draw(301, 6))
    gradients = np.zeros_like(flat)
    loss, _, q = _core.critic_step(spec, flat, gradients, obs, action, draw(301))
    net = make_policy(17, 6, (72, 64), layer_norm=True)
    policy, weights = mlp_spec(net), array(net.flat)
    flow_gradients, kl_gradients = np.zeros_like(weights), np.zeros_like(weights)
    t = 0.01 + 0.99 * np.abs(np.tanh(draw(301, seed=7)))
    flow_args = obs, action, 0.5 * t, t, draw(301, 6, seed=8)
    flow_loss = _core.meanflow_step(policy, weights, flow_gradients, *flow_args)
    density_args = policy, weights, obs, draw(301, 6, seed=9), *flow_table(1, "mean")
    density = _core.RecordedDensity(*density_args)
    density.backward(kl_gradients, draw(301, 6), draw(301), draw(301, 6, 6))
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
        density.log_prob,
        density.transport,
        kl_gradients,
        *_core.q_gradient(spec, flat, obs, action),
        *_core.reweighted_velocity(
            spec, flat, obs, action, 1 - t, t, 0.2, num_candidates=7, seed=3
        ),
        *_core.flow_density(
            policy, weights, obs, draw(301, 5, 6), *flow_table(2, "mean"), "log_det"
        ),
    ]


@each_isa
def test_results_are_the_same_bits_for_any_number_of_threads():
    one = run_everything(1)
    for threads in (2, 3, 8):
        for a, b in zip(one, run_everything(threads), strict=True):
            assert np.array_equal(a, b)


@pytest.mark.parametrize("recorded", ["mlp", "density"])
def test_one_recorded_pass_is_differentiated_by_several_threads(recorded):
    """Autograd takes a Python function for safe under the GIL, which the kernels release."""
    net = make_policy(17, 6, (128, 128))
    spec, flat = mlp_spec(net), array(net.flat)
    if recorded == "mlp":
        mlp = _core.RecordedMlp(spec, flat, draw(512, net.layer_sizes[0]), net.layer_sizes[0])
        deltas = [(draw(1, 512, 6, seed=seed),) for seed in (1, 2)]

        def backward(i):
            return mlp.backward(*deltas[i])

    else:
        density = _core.RecordedDensity(
            spec, flat, draw(512, 17), draw(512, 6), *flow_table(1, "mean")
        )
        deltas = [(draw(512, 6, seed=seed), draw(512, seed=seed)) for seed in (1, 2)]

        def backward(i):
            gradients = np.zeros_like(flat)
            density.backward(gradients, *deltas[i])
            return gradients

    _core.set_num_threads(1)
    alone = [backward(i) for i in range(2)]
    with ThreadPoolExecutor(2) as threads:
        for i, result in enumerate(threads.map(backward, [0, 1] * 40)):
            assert np.array_equal(result, alone[i % 2])


@each_isa
def test_workers_flush_denormals_where_the_caller_does():
    """Otherwise bits would depend on which thread takes which rows, from one call to the next."""
    _core.set_num_threads(2)
    n = 1 << 18
    gradient = np.full(n, 1e-21, np.float32)
    for flush in (False, True, False):
        torch.set_flush_denormal(flush)
        zeros = [np.zeros(n, np.float32) for _ in range(3)]
        _core.adam(zeros[0], gradient, zeros[1], zeros[2], 1, 1e-3, 0.9, 0.999, 1e-8)
        # 0.001 * 1e-42 is a denormal.
        assert (zeros[2] == 0).all() == flush
        assert (zeros[2] == 0).any() == flush


@pytest.mark.parametrize("steps", [1, 2])
def test_no_rows_are_no_work(steps):
    net = make_policy(3, 2, (8,))
    sampler = _core.PolicySampler.flow(mlp_spec(net), *flow_table(steps, "mean"))
    assert sampler.sample(array(net.flat), draw(0, 3), draw(0, 2)).shape == (0, 2)


def linear_critics(weight):
    """Q = weight (a_1 + a_2), twice, for states of one number."""
    spec = _core.MlpSpec((3, 1), members=2, activation="relu", layer_norm=False)
    flat = np.zeros(spec.parameter_count, np.float32)
    flat[:6] = [weight, weight, 0.0] * 2
    return spec, flat


def reweighted_uniform(critics, uniform):
    """Candidates 2 u - 1 of one state, as at signal 0."""
    zero, one = np.zeros((1, 1), np.float32), np.ones(1, np.float32)
    inputs = zero, np.zeros((1, 2), np.float32), 0 * one, one
    candidates = np.array(uniform, np.float32)[None, :, None].repeat(2, 2)
    return _core.reweighted_velocity(*critics, *inputs, 1.0, uniform=candidates)


@each_target
@pytest.mark.parametrize("uniform", [(0.01, 0.5, 0.5), (0.5, 0.01, 0.5), (0.5, 0.5, 0.01)])
def test_a_candidate_of_infinitely_low_q_has_no_weight(uniform):
    _, ess = reweighted_uniform(linear_critics(3e38), uniform)
    assert ess == pytest.approx(2)


@each_target
@pytest.mark.parametrize("uniform", [(0.99, 0.5, 0.5), (0.5, 0.99, 0.5), (0.5, 0.5, 0.99)])
def test_a_candidate_of_infinitely_high_q_is_not_hidden(uniform):
    """As of a softmax: an overflowing critic must show."""
    velocity, ess = reweighted_uniform(linear_critics(3e38), uniform)
    assert np.isnan(velocity).all()
    assert np.isnan(ess)


@each_target
def test_candidates_that_do_not_compare_are_not_hidden():
    velocity, _ = reweighted_uniform(linear_critics(np.nan), (0.25, 0.5, 0.75))
    assert np.isnan(velocity).all()


@each_target
def test_a_transport_that_is_not_finite_has_no_gap():
    transport = np.array([[[2.0, np.nan], [0.0, 2.0]], [[2.0, 0.0], [0.0, 2.0]]], np.float32)
    gap, gradient = _core.monotonicity_gap(transport, 0.1)
    assert np.isnan(gap[0])
    assert np.isnan(gradient[0]).all()
    assert gap[1] == 0


def test_refusals_say_what_to_do():
    critics = make_critics(3, 2, (8,))
    spec, flat = mlp_spec(critics), array(critics.flat)
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
    with pytest.raises(ValueError, match="activation='gelu' is unknown"):
        _core.MlpSpec((3, 1), members=1, activation="gelu", layer_norm=False)
    with pytest.raises(ValueError, match="first step is 1"):
        _core.adam(flat.copy(), flat, flat.copy(), flat.copy(), 0, 1e-3, 0.9, 0.999, 1e-8)


def test_cuda_kernels_do_not_depend_on_the_order_of_threads():
    """A value read in the phase that writes it would differ: the sign of a missing barrier."""
    before = _core.isa_active()
    results = []
    for order in ("rising", "falling"):
        _core.run_cuda_on_host(order)
        results.append(run_everything(1))
    _core.set_isa(before)
    for rising, falling in zip(*results, strict=True):
        assert np.array_equal(rising, falling)


def test_cuda_density_gradient_does_not_depend_on_the_tile():
    net = make_policy(5, 3, (64, 48))
    args = mlp_spec(net), array(net.flat), draw(37, 5), draw(37, 3), *flow_table(1, "mean")
    before = _core.isa_active()
    results = []
    for kilobytes in (40, 30, 26):  # tiles of 32, 24 and 16 rows
        _core.run_cuda_on_host("rising", kilobytes * 1024)
        density, gradients = _core.RecordedDensity(*args), np.zeros_like(array(net.flat))
        density.backward(gradients, draw(37, 3), draw(37), draw(37, 3, 3))
        results.append((density.log_prob, gradients))
    _core.set_isa(before)
    for tiles in zip(*results, strict=True):
        assert all(np.array_equal(tiles[0], other) for other in tiles[1:])


def test_cuda_kernels_refuse_what_does_not_fit_the_device():
    net = FlatMLP((8,), (1024,), 3)
    before = _core.isa_active()
    _core.run_cuda_on_host("rising", 48 * 1024)
    with pytest.raises(ValueError, match=r"1024 columns need .* this device has 49152 bytes"):
        _core.mlp_forward(mlp_spec(net), array(net.flat), draw(4, 8))
    _core.set_isa(before)
