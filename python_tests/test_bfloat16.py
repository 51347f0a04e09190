"""Training with bfloat16 products against float64 PyTorch whose products are rounded alike."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from kernel_inputs import Array, draw, make_critics, make_network, make_policy
from torch import Tensor

from flame_ext import _core, networks, reference
from flame_ext.agent import Agent
from flame_ext.backends import make_backend
from flame_ext.backends.native_evaluator import NativeEvaluator
from flame_ext.config import make_config
from flame_ext.networks import FlatMLP
from flame_ext.replay import Batch

OBS, ACT = 5, 3
pytestmark = pytest.mark.skipif(
    not _core.bfloat16_supported(), reason="this CPU has no AVX512-BF16"
)


def rounded(x: Tensor) -> Tensor:
    return x.float().bfloat16().to(x.dtype)


class RoundedProduct(torch.autograd.Function):
    """x W^T and its derivatives, each a product of rounded factors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return rounded(x) @ rounded(weight).mT

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        g = rounded(gradients[0])
        by_x = (g @ rounded(weight)).sum_to_size(x.shape)
        return by_x, (g.mT @ rounded(x)).sum_to_size(weight.shape)


def rounded_matmul(x: Tensor, weight: Tensor) -> Tensor:
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    out = RoundedProduct.apply(rows, weight)
    return out.view(weight.shape[0], *x.shape[1:-1], weight.shape[1])


def rounded_affine(x: Tensor, layer: networks.Layer, bias: bool = True) -> Tensor:
    out = rounded_matmul(x, layer.weight)
    return out + networks._broadcast(layer.bias, out) if bias else out


@contextmanager
def rounded_products() -> Iterator[None]:
    """Inside it PyTorch's networks multiply rounded factors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "_matmul", rounded_matmul)
        patch.setattr(networks, "_affine", rounded_affine)
        yield


def make_agent(
    algorithm: str, precision: str, proposal: str = "reverse", backend: str = "cpu"
) -> Agent:
    options = {"hidden_sizes": (48, 33), "embedding_dim": 17, "policy_delay": 1}
    options |= {"matmul_precision": precision, "proposal": proposal}
    config = make_config(algorithm, overrides=options)
    return Agent(config, OBS, ACT, make_backend(backend, torch.device("cpu")), seed=0)


def make_batch(rows: int, seed: int) -> Batch:
    obs, next_obs = (torch.from_numpy(draw(rows, OBS, seed=seed + i)) for i in (0, 1))
    action = torch.from_numpy(draw(rows, ACT, seed=seed)).clamp(-1, 1)
    reward = torch.from_numpy(draw(rows, seed=seed))
    return Batch(obs, action, reward, torch.full((rows,), 0.99), next_obs)


def distance(a: Tensor | Array, b: Tensor | Array) -> float:
    """Root mean square of the difference."""
    a, b = (torch.as_tensor(x).detach().double() for x in (a, b))
    assert a.shape == b.shape
    return float((a - b).square().mean().sqrt())


def assert_rounded(ours: Tensor | Array, wanted: Tensor, exact: Tensor, share: float = 0.1) -> None:
    """Our distance from what rounding made is at most `share` of what it changed.

    Now and then a factor lies so near the middle between two bfloat16 that float32 and float64
    round it differently. Where kernels keep some factors in float32, the share is larger.
    """
    assert distance(wanted, exact) > 0
    assert distance(ours, wanted) <= share * distance(wanted, exact)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize(
    ("rows", "sizes", "members"),
    [
        (9, (3, 5), 1),
        (31, (20, 33, 47, 6), 2),
        (101, (600, 700, 3), 1),
        (257, (55, 256, 256, 6), 1),
    ],
)
def test_network_and_gradients(rows, sizes, members, layer_norm):
    net = make_network(sizes, members, layer_norm)
    x, constant = (torch.from_numpy(draw(rows, n)) for n in (2, sizes[0] - 2))
    weight = torch.from_numpy(draw(members, rows, sizes[-1], seed=1))

    def evaluate(network: FlatMLP, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaf = x.to(dtype).requires_grad_()
        output = network(leaf, constant.to(dtype))
        loss = (output * weight.to(dtype)).sum()
        return output, *torch.autograd.grad(loss, (network.flat, leaf))

    exact = evaluate(copy.deepcopy(net).double(), torch.float64)
    with rounded_products():
        wanted = evaluate(copy.deepcopy(net).double(), torch.float64)
    net.evaluator = NativeEvaluator(net, bfloat16=True)
    for results in zip(evaluate(net, torch.float32), wanted, exact, strict=True):
        assert_rounded(*results)
    with torch.no_grad():  # the kernel that records nothing
        assert_rounded(net(x, constant), wanted[0], exact[0])


@pytest.mark.parametrize(
    ("obs_dim", "action_dim"), [(17, 6), (11, 3), (4, 1), (700, 3), (0, 2), (0, 3)]
)
def test_critics(obs_dim, action_dim):
    """Where the first layer is multiplied in two parts, also at an odd column."""
    critics = make_critics(obs_dim, action_dim, (64, 48), activation="relu", layer_norm=True)
    obs, candidates = draw(33, obs_dim), draw(33, 7, action_dim)
    evaluator = NativeEvaluator(critics, bfloat16=True)

    def evaluate(network: FlatMLP) -> tuple[Tensor, Tensor, Tensor]:
        s, a = torch.from_numpy(obs).double(), torch.from_numpy(candidates).double()
        q_each = network(a, s.unsqueeze(1)).squeeze(-1)
        leaf = a[:, 0].clone().requires_grad_()
        lowest = network(leaf, s).squeeze(-1).amin(0)
        return q_each.amin(0), lowest, torch.autograd.grad(lowest.sum(), leaf)[0]

    exact = evaluate(copy.deepcopy(critics).double())
    with rounded_products():
        wanted = evaluate(copy.deepcopy(critics).double())
    first = np.ascontiguousarray(candidates[:, 0])
    q_min, gradient = _core.q_gradient(evaluator.spec, evaluator.parameters, obs, first)
    for results in zip((q_min, gradient), wanted[1:], exact[1:], strict=True):
        assert_rounded(*results, share=0.25)
    # The last layer reads candidates' activations in float32.
    q_each = _core.twin_q(evaluator.spec, evaluator.parameters, obs, candidates)
    assert_rounded(q_each, wanted[0], exact[0], share=0.7)


@pytest.mark.parametrize(("obs_dim", "action_dim"), [(17, 6), (11, 3)])
def test_exact_density_and_gradient(obs_dim, action_dim):
    net = make_policy(obs_dim, action_dim, (64, 48), activation="silu")
    net.start_as_contraction(0.35)
    obs, noise = (torch.from_numpy(draw(41, n)) for n in (obs_dim, action_dim))
    weight = torch.from_numpy(draw(41))

    def evaluate(log_prob: Any, flat: Tensor) -> tuple[Tensor, ...]:
        sample = log_prob(obs.to(flat.dtype), noise.to(flat.dtype), estimator="exact")
        total = (sample.log_prob * weight.to(flat.dtype)).sum()
        return sample.action, sample.log_prob, torch.autograd.grad(total, flat)[0]

    double = copy.deepcopy(net).double()
    in_pytorch = functools.partial(reference.log_prob, double)
    exact = evaluate(in_pytorch, double.flat)
    with rounded_products():
        wanted = evaluate(in_pytorch, double.flat)
    ours = evaluate(NativeEvaluator(net, bfloat16=True).log_prob, net.flat)
    for results in zip(ours[:2], wanted, exact, strict=False):
        assert_rounded(*results)
    # The tangents' own gradient of the first weights is a sum without products.
    assert_rounded(ours[2], wanted[2], exact[2], share=0.4)


@pytest.mark.parametrize(
    ("algorithm", "proposal"),
    [("flame", "reverse"), ("flame", "policy"), ("sac", "reverse"), ("diffusion", "reverse")],
)
def test_training_follows_float32(algorithm, proposal):
    """Every kernel of an update, at odd sizes: as float32 to a few roundings, but not the same."""
    agents = [make_agent(algorithm, precision, proposal) for precision in ("float32", "bfloat16")]
    for seed in range(3):
        first, second = (agent.update(make_batch(33, seed)) for agent in agents)
        assert second == pytest.approx(first, rel=0.03, abs=0.05)
        assert second["critic_loss"] != first["critic_loss"]
    for name, network in agents[0].networks().items():
        change = distance(network.flat, agents[1].networks()[name].flat)
        assert change < 0.02 * float(network.flat.detach().square().mean().sqrt())


def test_same_seed_is_the_same_bits_on_any_number_of_threads():
    threads = _core.num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            agent = make_agent("flame", "bfloat16")
            _core.set_num_threads(count)
            for seed in range(2):
                agent.update(make_batch(65, seed))
            results.append([x.flat.detach().clone() for x in agent.networks().values()])
    finally:
        _core.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_precision_that_is_missing_is_an_error():
    isa = _core.isa_active()
    with pytest.raises(ValueError, match="matmul_precision='bfloat16' needs backend='cpu'"):
        make_agent("sac", "bfloat16", backend="torch")
    try:
        _core.set_isa("avx2")
        assert not _core.bfloat16_supported()
        with pytest.raises(ValueError, match=r"needs a CPU with AVX512-BF16 .*it is avx2"):
            make_agent("sac", "bfloat16")
    finally:
        _core.set_isa(isa)
