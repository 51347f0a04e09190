"""The CUDA backend on a device: against float64 PyTorch, on other streams and in graphs.

What needs no device (index maps, tiles, reductions, the mathematics) is in the tests of
every kernel (test_network_kernels.py, test_policy_kernels.py).
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import pytest
import torch
from kernel_inputs import assert_as_accurate, critic_updates
from torch import Tensor

from flame_ext import ops, reference
from flame_ext.agent import Agent
from flame_ext.backends import make_backend
from flame_ext.backends.cuda import CudaBackend
from flame_ext.backends.cuda_evaluator import CudaEvaluator
from flame_ext.backends.cuda_graph import WARM_UPS
from flame_ext.backends.torch import TorchBackend
from flame_ext.config import ALGORITHMS, make_config
from flame_ext.critics import Critics
from flame_ext.networks import FlatMLP, MeanVelocityNet
from flame_ext.replay import Batch, ReplayBuffer

pytestmark = pytest.mark.gpu
SHAPES = [
    (3, 1, 1, (8,)),
    (31, 17, 6, (64, 64, 64)),
    (257, 17, 6, (256, 256)),
    (33, 376, 17, (48,)),
]


@pytest.fixture(autouse=True)
def _single_precision() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).cuda()


def make_critics(obs_dim: int, action_dim: int, hidden: tuple[int, ...], **options: Any) -> Critics:
    generator = torch.Generator().manual_seed(1)
    return Critics(obs_dim, action_dim, hidden, generator=generator, **options).cuda()


def make_policy(obs_dim: int, action_dim: int, hidden: tuple[int, ...]) -> MeanVelocityNet:
    generator = torch.Generator().manual_seed(2)
    return MeanVelocityNet(obs_dim, action_dim, hidden, generator=generator).cuda()


def exact(net: FlatMLP) -> Any:
    copied = copy.deepcopy(net).double()
    copied.evaluator = None
    return copied


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize(("rows", "obs_dim", "action_dim", "hidden"), SHAPES)
def test_critics(layer_norm, rows, obs_dim, action_dim, hidden):
    critics = make_critics(obs_dim, action_dim, hidden, layer_norm=layer_norm)
    obs, action, target = draw(rows, obs_dim), draw(rows, action_dim).tanh(), draw(rows)
    several = draw(rows, 5, action_dim, seed=1).tanh()
    native = CudaEvaluator(critics)
    results = []
    for net, kind in ((copy.deepcopy(critics), torch.float32), (exact(critics), torch.float64)):
        s, a, y, many = (x.to(kind) for x in (obs, action, target, several))
        a.requires_grad_()
        q = net.q_min(s, a)
        (d_action,) = torch.autograd.grad(q.sum(), a)
        loss = (net.q_values(s, a.detach()) - y).square().mean(1).sum()
        (d_flat,) = torch.autograd.grad(loss, net.flat)
        with torch.no_grad():
            results.append((q.detach(), d_action, d_flat, net.candidate_q_min(s, many)))
    metrics = CudaBackend().critic_step(critics, obs, action, target)
    assert metrics["critic_loss"] > 0
    ours = (*native.q_gradient(obs, action), critics.flat.grad, native.candidates(obs, several))
    for values in zip(ours, *results, strict=True):
        assert_as_accurate(*values)


@pytest.mark.parametrize("scale", [1.0, 1e3])
@pytest.mark.parametrize("tensor_cores", [False, True])
@pytest.mark.parametrize(("rows", "obs_dim", "action_dim", "hidden"), SHAPES)
@torch.no_grad()
def test_critics_candidates(rows, obs_dim, action_dim, hidden, tensor_cores, scale):
    """Tensor cores too have the accuracy of float32, and the same bits for a row in any batch."""
    critics = make_critics(obs_dim, action_dim, hidden, layer_norm=True)
    critics.scale_output_layer(scale)
    obs, actions = draw(rows, obs_dim), draw(rows, 33, action_dim).tanh()
    native = CudaEvaluator(critics)
    native.tensor_cores = tensor_cores
    ours = native.candidates(obs, actions)
    single = critics.candidate_q_min(obs, actions)
    wanted = exact(critics).candidate_q_min(obs.double(), actions.double())
    assert_as_accurate(ours, single, wanted)
    assert torch.equal(native.candidates(obs[:1], actions[:1]), ours[:1])
    many = 1 + 8192 // (33 * rows)  # tiles of 64 rows
    assert torch.equal(
        native.candidates(obs.repeat(many, 1), actions.repeat(many, 1, 1))[:rows], ours
    )


@pytest.mark.parametrize(("rows", "obs_dim", "action_dim", "hidden"), SHAPES)
def test_policy(rows, obs_dim, action_dim, hidden):
    net = make_policy(obs_dim, action_dim, hidden)
    obs, noise, velocity = draw(rows, obs_dim), draw(rows, action_dim), draw(rows, action_dim)
    t = torch.rand(rows, 1, generator=torch.Generator().manual_seed(3)).cuda()
    results = []
    for copied, kind in ((copy.deepcopy(net), torch.float32), (exact(net), torch.float64)):
        s, z, v, late = (x.to(kind) for x in (obs, noise, velocity, t))
        loss = reference.meanflow_loss(copied, z, late / 2, late, s, v)
        (d_flat,) = torch.autograd.grad(loss, copied.flat)
        with torch.no_grad():
            density = reference.log_prob(copied, s, z)
        results.append((loss.detach(), d_flat, density.action, density.log_prob))
    native = CudaEvaluator(net)
    loss, d_flat = native.meanflow_gradient(noise, t / 2, t, obs, velocity)
    with torch.no_grad():
        density = ops.log_prob(net, obs, noise, backend="cuda")
    for values in zip((loss, d_flat, density.action, density.log_prob), *results, strict=True):
        assert_as_accurate(*values)


@torch.no_grad()
def particles_and_q(net: FlatMLP, critics: Critics, obs: Tensor, noise: Tensor) -> list[Tensor]:
    """Clipped one-step actions ``(B, N, A)`` and their Qmin ``(B, N)``."""
    actions = reference.one_step_action(net, obs.unsqueeze(1), noise)
    return [actions, critics.candidate_q_min(obs, actions)]


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize(
    ("rows", "particles", "obs_dim", "action_dim", "hidden"),
    [
        (1, 1, 17, 6, (256, 256, 256)),
        (1, 1, 376, 17, (640, 640)),
        (1, 32, 17, 6, (256, 256, 256)),
        (2, 3, 376, 17, (48, 33)),
        (31, 1, 1, 1, (8,)),
        (33, 1, 17, 6, (64, 64)),
        (257, 5, 17, 6, (64, 64, 64)),
    ],
)
def test_policy_act(layer_norm, rows, particles, obs_dim, action_dim, hidden):
    net = make_policy(obs_dim, action_dim, hidden)
    critics = make_critics(obs_dim, action_dim, hidden, layer_norm=layer_norm)
    obs, noise = draw(rows, obs_dim), draw(rows, particles, action_dim)
    ours = CudaEvaluator(net).best_action(obs, noise, critics, 1, "mean")
    single, _ = particles_and_q(net, critics, obs, noise)
    wanted, q = particles_and_q(exact(net), exact(critics), obs.double(), noise.double())
    chosen = (ours.unsqueeze(1) - wanted).abs().amax(2).argmin(1)
    states = torch.arange(rows, device=obs.device)
    assert (q[states, chosen] >= q.amax(1) - 1e-5 * (1 + q.abs().max())).all()
    assert_as_accurate(ours, single[states, chosen], wanted[states, chosen])
    for _ in range(20):
        again = CudaEvaluator(net).best_action(obs, noise, critics, 1, "mean")
        assert torch.equal(again, ours)


@pytest.mark.parametrize(("rows", "particles"), [(1, 1), (1, 32), (40, 3)])
def test_acting_in_a_graph_and_on_another_stream(rows, particles):
    """New observations and weights between replays; a slow producer before the first call."""
    net, critics = make_policy(17, 6, (256, 256)), make_critics(17, 6, (256, 256))
    native = CudaEvaluator(net)
    inputs = [(draw(rows, 17, seed=i), draw(rows, particles, 6, seed=i)) for i in range(3)]
    obs, noise = (torch.full_like(x, float("nan")) for x in inputs[0])
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        obs.copy_(inputs[0][0])
        noise.copy_(inputs[0][1])
        first = native.best_action(obs, noise, critics, 1, "mean")
    side.synchronize()
    assert torch.equal(first, native.best_action(*inputs[0], critics, 1, "mean"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        action = native.best_action(obs, noise, critics, 1, "mean")
    for i in range(100):
        obs.copy_(inputs[i % 3][0])
        noise.copy_(inputs[i % 3][1])
        with torch.no_grad():
            net.flat.mul_(1.001)
        graph.replay()
        assert torch.equal(action, native.best_action(obs, noise, critics, 1, "mean"))


def test_acting_on_several_streams_at_once():
    """Two grids that wait at barriers must not keep each other from starting."""
    net, critics = make_policy(17, 6, (256, 256)), make_critics(17, 6, (256, 256))
    native, obs, noise = CudaEvaluator(net), draw(1, 17), draw(1, 32, 6)
    wanted = native.best_action(obs, noise, critics, 1, "mean")
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for i in range(200):
        with torch.cuda.stream(streams[i % 4]):
            results.append(native.best_action(obs, noise, critics, 1, "mean"))
    torch.cuda.synchronize()
    assert all(torch.equal(result, wanted) for result in results)


@pytest.mark.parametrize("with_transport", [False, True])
@pytest.mark.parametrize(("rows", "obs_dim", "action_dim", "hidden"), SHAPES)
def test_density_gradient(rows, obs_dim, action_dim, hidden, with_transport):
    net = make_policy(obs_dim, action_dim, hidden)
    obs, noise = draw(rows, obs_dim), draw(rows, action_dim)
    weights = [draw(rows, action_dim, seed=3), draw(rows, seed=4)]
    if with_transport:
        weights.append(draw(rows, action_dim, action_dim, seed=5))

    def evaluate(function: Any, net: FlatMLP, kind: torch.dtype) -> tuple[Tensor, ...]:
        sample = function(net, obs.to(kind), noise.to(kind))
        outputs = (sample.action, sample.log_prob, sample.transport)[: len(weights)]
        total = sum((x * w).sum() for x, w in zip(outputs, weights, strict=True))
        (d_flat,) = torch.autograd.grad(total, net.flat)
        return *(x.detach() for x in outputs), d_flat

    ours = evaluate(functools.partial(ops.log_prob, backend="cuda"), net, torch.float32)
    single = evaluate(reference.log_prob, copy.deepcopy(net), torch.float32)
    wanted = evaluate(reference.log_prob, exact(net), torch.float64)
    for values in zip(ours, single, wanted, strict=True):
        assert_as_accurate(*values)
    again = evaluate(functools.partial(ops.log_prob, backend="cuda"), net, torch.float32)
    assert torch.equal(again[-1], ours[-1])


@pytest.mark.parametrize("tensor_cores", [False, True])
def test_reweighted_velocity_is_the_cpus(tensor_cores):
    critics = make_critics(17, 6, (64, 64))
    obs, z = draw(37, 17), draw(37, 6)
    t = torch.linspace(0.05, 1, 37).unsqueeze(1).cuda()
    args = (obs, z, 1 - t, t)
    native = CudaEvaluator(critics)
    native.tensor_cores = tensor_cores
    ours = native.reweighted_velocity(
        *args, 0.3, 33, "stratified", torch.Generator().manual_seed(5)
    )
    from flame_ext.backends.native_evaluator import NativeEvaluator

    theirs = NativeEvaluator(copy.deepcopy(critics).cpu()).reweighted_velocity(
        *(x.cpu() for x in args), 0.3, 33, "stratified", torch.Generator().manual_seed(5)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("embedding_dim", [0, 24])
@pytest.mark.parametrize(
    ("algorithm", "entropy_in_target"), [("flame", False), ("flame", True), ("sac", True)]
)
def test_critic_updates_follow_pytorchs_steps(algorithm, entropy_in_target, embedding_dim):
    """A flow's in one call; from rows that lie in wider ones, as the replay buffer's do."""
    options = {"entropy_in_target": entropy_in_target, "embedding_dim": embedding_dim}
    config = make_config(algorithm, overrides=options)
    agents = [
        Agent(config, 17, 6, backend, seed=0, device="cuda")
        for backend in (TorchBackend(), CudaBackend())
    ]
    buffer = ReplayBuffer(200, 17, 6, "cuda")
    rows = [draw(200, *shape).cpu().numpy() for shape in ((17,), (6,), (), (17,))]
    buffer.add(*rows[:3], np.arange(200) % 3 == 0, rows[3])
    for updates in (1, 4):
        batch = buffer.sample(updates * 64, torch.Generator("cuda").manual_seed(updates), 0.99)
        batch = agents[0]._observed(batch)
        first, second = (critic_updates(agent, batch, updates) for agent in agents)
        assert second == pytest.approx(first, rel=1e-4, abs=1e-5)
    for name in ("critics", "target_critics"):
        wanted, ours = (agent.networks()[name].flat for agent in agents)
        # Adam divides by the gradient's size: where that is rounding, a step is of any size.
        difference = (ours - wanted).abs()
        assert (difference > 2e-5).sum() <= 20
        assert difference.max() <= 5 * config.critic_learning_rate
    steps = [agent.optimizers["critics"].state_dict()["state"][0]["step"] for agent in agents]
    assert steps[0] == steps[1] == 5


@pytest.mark.parametrize("algorithm", ["flame", "sac"])
def test_updates_with_embeddings_follow_pytorchs(algorithm):
    options = {"embedding_dim": 24, "policy_delay": 1}
    config = make_config(algorithm, overrides=options)
    agents = [
        Agent(config, 17, 6, backend, seed=0, device="cuda")
        for backend in (TorchBackend(), CudaBackend())
    ]
    rows = draw(64, 17), draw(64, 6).tanh(), draw(64), draw(64).lt(1).float(), draw(64, 17)
    for _ in range(5):
        first, second = (agent.update(Batch(*rows)) for agent in agents)
        assert second == pytest.approx(first, rel=2e-3, abs=2e-3)


LOG_DET = {
    "entropy_estimator": "multi_step",
    "entropy_trace": "log_det",
    "entropy_steps": 2,
    "reverse_kl_weight": 0,
}


@pytest.mark.parametrize("embedding_dim", [0, 24])
@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        *((algorithm, {}) for algorithm in ALGORITHMS),
        ("flame", {"entropy_in_target": True}),
        ("flame", {"proposal": "policy"}),
        ("flame", {"z_source": "target", "target_particles": 2}),
        ("flame", LOG_DET),
    ],
)
def test_captured_updates_are_those_launched_one_by_one(algorithm, options, embedding_dim):
    """A hundred: with and without a policy's step, with and without the temperature's."""
    fixed = {"policy_delay": 3, "alpha_interval": 9, "embedding_dim": embedding_dim}
    falling = {"final_policy_learning_rate": 1e-4, "settle_after": 50}
    overrides = {**fixed, **falling, **options}
    config = make_config(algorithm, overrides=overrides)
    agents = [
        Agent(config, 17, 6, CudaBackend(graphs), seed=0, device="cuda") for graphs in (True, False)
    ]
    rows = [draw(300, 17), draw(300, 6).tanh(), draw(300), draw(300).lt(1).float(), draw(300, 17)]
    for i in range(100):
        updates = 2 if i % 5 == 1 else 1
        index = torch.arange(i, i + 64 * updates)
        batch = Batch(*(x[index] for x in rows))
        for agent in agents:
            agent.set_progress(i, 100)
        first, second = (agent.update(batch, updates) for agent in agents)
        assert first == second, i
    for name, network in agents[0].networks().items():
        assert torch.equal(network.flat, agents[1].networks()[name].flat), name
    assert torch.equal(*(agent.generator.get_state() for agent in agents))
    graphed, launched = (list(agent._run_steps._graphs.values()) for agent in agents)
    assert all((g._graph is not None) == (g.runs > WARM_UPS) for g in graphed)
    assert any(g._graph is not None for g in graphed)
    assert all(g._graph is None for g in launched)


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (40, 6), (7, 17), (2, 64)])
def test_monotonicity_gap(rows, size):
    shift = torch.linspace(-3, 3, rows).cuda().view(-1, 1, 1) * torch.eye(size).cuda()
    transport = draw(rows, size, size) / 2 + shift
    native = CudaEvaluator(make_policy(2, 1, (8,)))
    ours = native.gap_and_gradient(transport, 0.02)
    results = []
    for kind in (torch.float32, torch.float64):
        leaf = transport.to(kind).requires_grad_()
        gap = reference.monotonicity_gap(leaf, 0.02)
        results.append((gap.detach(), *torch.autograd.grad(gap.sum(), leaf)))
    for values in zip(ours, *results, strict=True):
        assert_as_accurate(*values)


def update(backend: CudaBackend, critics: Critics, target: Critics, batch: list[Tensor]) -> None:
    """A critic update's kernels without the host's view of its loss."""
    gradient = critics.flat.grad
    gradient.zero_()
    q, d_action = CudaEvaluator(critics).q_gradient(*batch[:2])
    gradient[: q.numel()].add_(q)
    gradient[: d_action.numel()].add_(d_action.view(-1))
    backend.optimizer_step(critics.optimizer)
    backend.soft_update(target.flat, critics.flat, 0.05)


def test_graph_replays_equal_eager_steps():
    def start() -> tuple[CudaBackend, Critics, Critics]:
        critics = make_critics(17, 6, (64, 64))
        critics.flat.grad = torch.zeros_like(critics.flat)
        critics.optimizer = torch.optim.Adam([critics.flat], lr=1e-3)
        return CudaBackend(), critics, make_critics(17, 6, (64, 64))

    batch = [draw(64, 17), draw(64, 6).tanh()]
    eager, replayed = start(), start()
    for _ in range(103):
        with torch.no_grad():
            update(*eager, batch)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        for _ in range(3):
            update(*replayed, batch)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        update(*replayed, batch)
    for _ in range(100):
        graph.replay()
    for a, b in zip(eager[1:], replayed[1:], strict=True):
        assert torch.equal(a.flat, b.flat)


def test_kernels_wait_for_the_current_stream():
    critics = make_critics(17, 6, (64, 64))
    native, obs, action = CudaEvaluator(critics), draw(33, 17), draw(33, 4, 6).tanh()
    wanted = native.candidates(obs, action)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        late = torch.full_like(action, float("nan"))
        torch.cuda._sleep(50_000_000)
        late.copy_(action)
        assert torch.equal(native.candidates(obs, late), wanted)


def test_refusals():
    critics = make_critics(17, 6, (64, 64))
    native = CudaEvaluator(critics)
    with pytest.raises(ValueError, match=r"torch.float32 on cuda:0; got torch.float32 on cpu"):
        native.candidates(draw(3, 17).cpu(), draw(3, 4, 6))
    with pytest.raises(ValueError, match=r"shape \(3, 16\); expected \(3, 17\)"):
        native.candidates(draw(3, 16), draw(3, 4, 6))
    with pytest.raises(ValueError, match="CUDA device"):
        make_backend("cuda", torch.device("cpu"))
