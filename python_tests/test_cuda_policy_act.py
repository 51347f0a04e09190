"""The CUDA acting kernels, executed on the host, against `reference` in float64.

Few rows go to cooperating blocks, as many as the device has multiprocessors; more rows, and
networks that do not fit them, to tiles.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from kernel_inputs import (
    ACTIVATIONS,
    Array,
    assert_as_accurate,
    draw,
    make_critics,
    make_policy,
    to_tensors,
)

from flame_ext import _core, reference
from flame_ext.backends.native_views import array, flow_table, mlp_spec
from flame_ext.critics import Critics
from flame_ext.networks import MeanVelocityNet
from flame_ext.sampling import Flow

ORDERS = pytest.mark.parametrize("falling", [False, True])
# Rows, that is states times particles, on both sides of what cooperating blocks take.
SHAPES = [
    (1, 1, 1, 1, (8,)),
    (1, 1, 17, 6, (256, 256, 256)),
    (1, 1, 376, 17, (48, 33)),
    (1, 3, 1, 6, (33, 24)),
    (1, 32, 17, 6, (40, 56)),
    (2, 3, 376, 17, (24, 40, 17)),
    (2, 1, 17, 1, (64,)),
    (2, 32, 3, 2, (40, 40)),
    (31, 1, 17, 6, (64, 48)),
    (33, 1, 17, 6, (64, 48)),
    (31, 3, 3, 6, (33, 24)),
    (33, 32, 17, 6, (24,)),
    (3, 2, 4, 2, ()),
]


def act(
    net: MeanVelocityNet,
    critics: Critics,
    obs: Array,
    noise: Array,
    *,
    steps: int = 1,
    flow: Flow = "mean",
    falling: bool = False,
    shared_kib: int = 227,
    multiprocessors: int = 132,
    tensor_cores: bool = False,
) -> Array:
    return _core.policy_act_on_host(
        mlp_spec(net),
        array(net.flat),
        mlp_spec(critics),
        array(critics.flat),
        obs,
        np.ascontiguousarray(noise),
        *flow_table(steps, flow),
        order="falling" if falling else "rising",
        shared_bytes=shared_kib * 1024,
        multiprocessors=multiprocessors,
        tensor_cores=tensor_cores,
    )


@torch.no_grad()
def particles_and_q(
    net: MeanVelocityNet,
    critics: Critics,
    obs: Array,
    noise: Array,
    dtype: torch.dtype,
    **flow: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Actions ``(B, N, A)`` and their Qmin ``(B, N)``."""
    net, critics = (copy.deepcopy(x).to(dtype) for x in (net, critics))
    s, z = to_tensors(dtype, obs, noise)
    particles = reference.sample_flow(net, s.unsqueeze(1), z, **flow).clamp(-1, 1)
    return particles, critics.candidate_q_min(s, particles)


def assert_chosen(ours: Array, single: torch.Tensor, exact: torch.Tensor, q: torch.Tensor) -> None:
    """Every state's action is a particle whose exact Q is the largest up to float32's rounding."""
    distance = np.abs(ours[:, None] - exact.numpy()).max(2)
    chosen = distance.argmin(1)
    states = np.arange(len(ours))
    values = q.numpy()
    assert (values[states, chosen] >= values.max(1) - 1e-5 * (1 + np.abs(values).max())).all()
    assert_as_accurate(ours, single[states, chosen], exact[states, chosen])


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize(("states", "particles", "obs_dim", "action_dim", "hidden"), SHAPES)
@ORDERS
def test_best_action(falling, states, particles, obs_dim, action_dim, hidden, layer_norm):
    net = make_policy(obs_dim, action_dim, hidden, layer_norm=layer_norm)
    critics = make_critics(obs_dim, action_dim, hidden, layer_norm=not layer_norm)
    obs, noise = draw(states, obs_dim), draw(states, particles, action_dim)
    ours = act(net, critics, obs, noise, falling=falling, shared_kib=99 if falling else 227)
    single, _ = particles_and_q(net, critics, obs, noise, torch.float32)
    exact, q = particles_and_q(net, critics, obs, noise, torch.float64)
    assert_chosen(ours, single, exact, q)


@ORDERS
def test_many_particles_on_tensor_cores(falling):
    net, critics = make_policy(17, 6, (40, 33)), make_critics(17, 6, (64, 48))
    obs, noise = draw(9, 17), draw(9, 7, 6)
    ours = act(net, critics, obs, noise, falling=falling, tensor_cores=True)
    single, _ = particles_and_q(net, critics, obs, noise, torch.float32)
    exact, q = particles_and_q(net, critics, obs, noise, torch.float64)
    assert_chosen(ours, single, exact, q)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("steps", "flow"), [(1, "mean"), (3, "mean"), (4, "instantaneous")])
@pytest.mark.parametrize(("states", "particles"), [(1, 1), (3, 5), (9, 7)])
@ORDERS
def test_activations_and_steps(falling, states, particles, steps, flow, activation):
    net = make_policy(5, 3, (24, 17), activation=activation)
    critics = make_critics(5, 3, (20, 33, 16), activation=activation)
    obs, noise = draw(states, 5), draw(states, particles, 3)
    ours = act(net, critics, obs, noise, steps=steps, flow=flow, falling=falling)
    options = {"steps": steps, "flow": flow}
    single, _ = particles_and_q(net, critics, obs, noise, torch.float32, **options)
    exact, q = particles_and_q(net, critics, obs, noise, torch.float64, **options)
    assert_chosen(ours, single, exact, q)


@pytest.mark.parametrize("members", [1, 2, 3])
@pytest.mark.parametrize(("states", "particles"), [(1, 1), (1, 7), (5, 6)])
def test_the_same_bits_for_any_number_of_blocks(states, particles, members):
    net = make_policy(17, 6, (40, 33), layer_norm=True)
    critics = make_critics(17, 6, (40, 65), members=members)
    obs, noise = draw(states, 17), draw(states, particles, 6)
    runs = [
        act(net, critics, obs, noise, falling=falling, multiprocessors=count)
        for falling, count in itertools.product((False, True), (1, 2, 5, 7, 16, 132))
    ]
    assert all(np.array_equal(run, runs[0]) for run in runs)


def test_the_same_bits_for_a_row_in_any_few():
    net, critics = make_policy(17, 6, (40, 33)), make_critics(17, 6, (40,))
    obs, noise = draw(32, 17), draw(32, 1, 6)
    together = act(net, critics, obs, noise)
    for first, count in ((0, 1), (3, 2), (7, 25)):
        part = slice(first, first + count)
        assert np.array_equal(act(net, critics, obs[part], noise[part]), together[part])


def test_weights_that_do_not_fit_go_to_tiles():
    """One multiprocessor holds its share of wide layers, or none of them is enough, or there is no
    cooperation."""
    net, critics = make_policy(17, 6, (256, 256)), make_critics(17, 6, (256, 256))
    obs, noise = draw(1, 17), draw(1, 2, 6)
    exact, q = particles_and_q(net, critics, obs, noise, torch.float64)
    single, _ = particles_and_q(net, critics, obs, noise, torch.float32)
    for count, shared in ((132, 227), (132, 64), (16, 99), (2, 99), (0, 227)):
        ours = act(net, critics, obs, noise, multiprocessors=count, shared_kib=shared)
        assert_chosen(ours, single, exact, q)


def test_weights_off_a_vector_boundary():
    net, critics = make_policy(17, 6, (40, 33)), make_critics(17, 6, (40,))
    obs, noise = draw(1, 17), draw(1, 4, 6)
    flats = [np.empty(x.flat.numel() + 1, np.float32)[1:] for x in (net, critics)]
    for flat, x in zip(flats, (net, critics), strict=True):
        flat[:] = array(x.flat)
    ours = _core.policy_act_on_host(
        mlp_spec(net),
        flats[0],
        mlp_spec(critics),
        flats[1],
        obs,
        noise,
        *flow_table(1, "mean"),
        order="rising",
        shared_bytes=227 * 1024,
        multiprocessors=132,
    )
    np.testing.assert_allclose(ours, act(net, critics, obs, noise), atol=1e-6)


@pytest.mark.parametrize("states", [3, 40])
@ORDERS
def test_nan_and_extreme_observations(falling, states):
    net = make_policy(17, 6, (40, 33), layer_norm=True)
    critics = make_critics(17, 6, (40, 24))
    obs, noise = draw(states, 17), draw(states, 3, 6)
    clean = act(net, critics, obs, noise, falling=falling)
    obs[1, 4] = np.nan
    obs[0], obs[2] = 1e30, -1e4
    poisoned = act(net, critics, obs, noise, falling=falling)
    assert np.isnan(poisoned[1]).all()
    assert np.array_equal(poisoned[3:], clean[3:])
    assert (np.abs(poisoned[2]) <= 1).all()
    alone = act(net, critics, obs[:2], noise[:2, :1], falling=falling)
    assert np.isnan(alone[1]).all()


@pytest.mark.parametrize("states", [1, 40])
@ORDERS
def test_nan_never_wins_and_the_first_of_equals_does(falling, states):
    net, critics = make_policy(3, 2, (24,)), make_critics(3, 2, (40, 24))
    obs, noise = draw(states, 3), draw(states, 4, 2)
    wanted = act(net, critics, obs, noise[:, 1:], falling=falling)
    noise[:, 0, 0] = np.nan
    assert np.array_equal(act(net, critics, obs, noise, falling=falling), wanted)
    critics.scale_output_layer(0)
    particles, _ = particles_and_q(net, critics, obs, noise, torch.float64)
    chosen = act(net, critics, obs, noise, falling=falling)
    np.testing.assert_allclose(chosen, particles[:, 1].numpy(), atol=1e-5)


def test_strided_observations_and_no_states():
    net, critics = make_policy(5, 2, (24,)), make_critics(5, 2, (24,))
    memory, noise = draw(6, 9), draw(3, 2, 2)
    view = memory[::2, 2:7]
    args = act(net, critics, view, noise), act(net, critics, np.ascontiguousarray(view), noise)
    assert np.array_equal(*args)
    assert act(net, critics, memory[:0, :5], noise[:0]).shape == (0, 2)
