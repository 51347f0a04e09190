"""Native kernels of networks, critics and optimizer against PyTorch in float64.

The CPU's for every instruction set of this machine and CUDA's, executed on the host.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from kernel_inputs import (
    ACTIVATIONS,
    EPS,
    Array,
    assert_as_accurate,
    draw,
    make_critics,
    make_network,
    shaken,
)

from flame_ext import _core
from flame_ext.backends.native_evaluator import NativeEvaluator
from flame_ext.backends.native_views import array, mlp_spec
from flame_ext.critics import Critics
from flame_ext.networks import FlatMLP

each_isa = pytest.mark.usefixtures("isa")
each_target = pytest.mark.usefixtures("kernels")
each_candidate_target = pytest.mark.usefixtures("candidate_kernels")


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
    ours = _core.mlp_forward(mlp_spec(net), array(net.flat), x)
    single = net(torch.from_numpy(x))
    exact = copy.deepcopy(net).double()(torch.from_numpy(x).double())
    assert_as_accurate(ours, single, exact)


@each_target
def test_mlp_forward_takes_strided_and_unaligned_rows():
    net = FlatMLP((7,), (32,), 3, generator=torch.Generator().manual_seed(0))
    memory = draw(21 * 12 + 1)[1:].reshape(21, 12)
    view = memory[::2, 3:10]
    args = mlp_spec(net), array(net.flat)
    assert np.array_equal(
        _core.mlp_forward(*args, view), _core.mlp_forward(*args, np.ascontiguousarray(view))
    )


@each_isa
def test_no_rows_have_no_gradient():
    net = make_network((3, 8, 2), members=1, layer_norm=False)
    net.evaluator = NativeEvaluator(net)
    x = torch.zeros(0, 2, requires_grad=True)
    out = net(x, torch.zeros(0, 1))
    assert out.shape == (1, 0, 2)
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 2)
    assert not net.flat.grad.any()


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
    ours = _core.mlp_forward(mlp_spec(net), array(net.flat), x)[0]
    exact = copy.deepcopy(net).double()(torch.from_numpy(x).double())[0].detach().numpy()
    assert (np.abs(ours - exact) <= 6 * EPS * np.abs(exact) + 1e-30).all()
    nan = np.full((1, 1), np.nan, np.float32)
    assert np.isnan(_core.mlp_forward(mlp_spec(net), array(net.flat), nan)).all()


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize(
    ("rows", "sizes", "members"), [(1, (3, 5), 1), (101, (23, 47, 33, 12), 1), (49, (7, 16, 2), 2)]
)
@each_isa
def test_recorded_mlp(rows, sizes, members, layer_norm):
    """Through autograd, as the losses use it: output and gradients, twice from one recording."""
    net = make_network(sizes, members, layer_norm)
    x = torch.from_numpy(draw(rows, 2, scale=2.0)).requires_grad_()
    constant = torch.from_numpy(draw(rows, sizes[0] - 2, scale=2.0))
    weight = torch.from_numpy(draw(members, rows, sizes[-1]))

    def gradient(network, dtype):
        output = network(x.to(dtype), constant.to(dtype))
        loss = (output * weight.to(dtype)).sum()
        return output, *torch.autograd.grad(loss, (network.flat, x))

    single = gradient(net, torch.float32)
    exact = gradient(copy.deepcopy(net).double(), torch.float64)
    net.evaluator = NativeEvaluator(net)
    recorded = net(x, constant)
    for ours, theirs, truth in zip(gradient(net, torch.float32), single, exact, strict=True):
        assert_as_accurate(ours.detach().numpy(), theirs, truth)
    inputs = (net.flat, x)
    first, second = (
        torch.autograd.grad((recorded * weight).sum(), inputs, retain_graph=True) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))
    # Of a frozen network only the inputs have a gradient, whichever block asks for it.
    net.requires_grad_(False)
    frozen = torch.autograd.grad((net(x, constant) * weight).sum(), x)[0]
    assert torch.equal(frozen, first[1])
    assert not net(x.detach(), constant).requires_grad
    constant.requires_grad_()
    ours = torch.autograd.grad((net(x.detach(), constant) * weight).sum(), constant)[0]
    net.evaluator = None
    theirs = torch.autograd.grad((net(x.detach(), constant) * weight).sum(), constant)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


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
@each_candidate_target
def test_twin_q(layer_norm, states, candidates, obs_dim, action_dim, hidden):
    critics = make_critics(obs_dim, action_dim, hidden, layer_norm=layer_norm)
    obs, actions = draw(states, obs_dim), np.tanh(draw(states, candidates, action_dim))
    q_min, q_each = _core.twin_q(mlp_spec(critics), array(critics.flat), obs, actions, each=True)
    inputs = torch.from_numpy(obs).unsqueeze(1), torch.from_numpy(actions)
    single = critics.q_values(*inputs)
    exact = copy.deepcopy(critics).double().q_values(*(x.double() for x in inputs))
    assert_as_accurate(q_each, single, exact)
    assert np.array_equal(q_min, q_each.min(0))
    only_min = _core.twin_q(mlp_spec(critics), array(critics.flat), obs, actions)
    assert np.array_equal(only_min, q_min)


def test_twin_q_of_no_states_is_empty():
    critics = make_critics(3, 2, (8,))
    q_min = _core.twin_q(mlp_spec(critics), array(critics.flat), draw(0, 3), draw(0, 5, 2))
    assert q_min.shape == (0, 5)


def test_twin_q_minimum_shows_nan_of_any_member():
    critics = make_critics(3, 2, (8,))
    with torch.no_grad():
        critics.layers()[-1].bias[0] = float("nan")
    q_min = _core.twin_q(mlp_spec(critics), array(critics.flat), draw(4, 3), draw(4, 5, 2))
    assert np.isnan(q_min).all()


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
    args = mlp_spec(critics), array(critics.flat), gradients, obs, action, target
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
    _core.critic_step(mlp_spec(critics), array(critics.flat), gradients, obs, action, target)
    _, single = critic_gradient(critics, obs, action, target, torch.float32)
    _, exact = critic_gradient(critics, obs, action, target, torch.float64)
    assert_as_accurate(gradients, single, exact)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize(
    ("rows", "obs_dim", "action_dim", "hidden"),
    [(1, 1, 1, (8,)), (31, 17, 6, (64, 64)), (257, 3, 6, (40, 40, 40)), (33, 376, 17, (48, 32))],
)
@each_target
def test_q_gradient(layer_norm, rows, obs_dim, action_dim, hidden):
    critics = make_critics(obs_dim, action_dim, hidden, layer_norm=layer_norm)
    obs, action = draw(rows, obs_dim), np.tanh(draw(rows, action_dim))
    q_min, gradient = _core.q_gradient(mlp_spec(critics), array(critics.flat), obs, action)
    results = []
    for dtype in (torch.float32, torch.float64):
        net = copy.deepcopy(critics).to(dtype)
        a = torch.from_numpy(action).to(dtype).requires_grad_()
        q = net.q_min(torch.from_numpy(obs).to(dtype), a)
        q.sum().backward()
        results.append((q.detach(), a.grad))
    assert_as_accurate(q_min, results[0][0], results[1][0])
    assert_as_accurate(gradient, results[0][1], results[1][1])


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
    _core.soft_update(target, online, 1.0)
    assert np.array_equal(target, online)
