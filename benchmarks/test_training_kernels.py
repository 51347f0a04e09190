"""Native training kernels beside PyTorch in one interleaved run; asserts correctness, never times.

Run with ``pytest benchmarks/test_training_kernels.py --benchmark-only -s``. HalfCheetah sizes:
17 observations, 6 actions, 3 x 256 units, 256 states. Each pair is timed round by round, first
one then the other, so that both see the same machine; the ratio is that of the medians.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from flame_ext import _core, ops
from flame_ext.agent import Agent
from flame_ext.backends import TorchBackend, make_backend
from flame_ext.config import make_config
from flame_ext.critics import Critics
from flame_ext.networks import ACTIVATIONS, MeanVelocityNet
from flame_ext.replay import Batch

B, K, OBS, ACT, HIDDEN = 256, 64, 17, 6, (256, 256, 256)
ROUNDS = 7


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_networks(activation: Any) -> tuple[MeanVelocityNet, Critics]:
    g = torch.Generator().manual_seed(0)
    net = MeanVelocityNet(OBS, ACT, HIDDEN, activation=activation, generator=g)
    net.start_as_contraction(0.35)
    return net, Critics(OBS, ACT, HIDDEN, activation=activation, generator=g)


def mlp_flop(rows: int, sizes: Sequence[int]) -> int:
    """Operations of one MLP's matrix products on `rows` rows."""
    return 2 * rows * sum(a * b for a, b in itertools.pairwise(sizes))


def twin_q_flop() -> int:
    """Two critics on B x K candidates, the observations' part of layer one once per state."""
    return 2 * (mlp_flop(B, (OBS, HIDDEN[0])) + mlp_flop(B * K, (ACT, *HIDDEN, 1)))


@pytest.fixture(autouse=True)
def equal_threads() -> None:
    """PyTorch gets as many threads as the kernels."""
    torch.set_num_threads(_core.num_threads())


def compare(
    benchmark: Any,
    name: str,
    native: Callable[[], Any],
    torch_form: Callable[[], Any],
    flop: int | None = None,
    other: str = "PyTorch",
) -> None:
    """Times both alternately, reports the native one and prints the ratio of medians."""
    times: tuple[list[float], list[float]] = ([], [])
    for run in (native, torch_form):
        run()
    for _ in range(ROUNDS):
        for run, seconds in zip((native, torch_form), times, strict=True):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    ours, theirs = (1e3 * statistics.median(seconds) for seconds in times)
    benchmark.extra_info |= {"native_ms": ours, "torch_ms": theirs, "ratio": theirs / ours}
    print(f"\n{name}: native {ours:.2f} ms, {other} {theirs:.2f} ms, ratio {theirs / ours:.2f}")
    if flop is not None:
        peak = _core.peak_gflops()
        floor = flop / peak / 1e6
        print(
            f"  {flop / 1e9:.2f} GFLOP in matrix products, floor {floor:.2f} ms at {peak:.0f} "
            f"GFLOP/s ({_core.num_threads()} threads): {floor / ours:.0%} of the peak"
        )
    benchmark.pedantic(native, rounds=ROUNDS)


def fast_mish(x: Tensor) -> Tensor:
    """The kernels' formula: one exponential and one division."""
    e = x.clamp(max=20).exp()
    n = e * (e + 2)
    return x * (n / (n + 2))


@pytest.mark.parametrize("activation", ["mish", "relu"])
@pytest.mark.parametrize("form", ["eager", "compiled"])
def test_twin_q(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, form: str, activation: str
) -> None:
    """Qmin of 256 x 64 candidates, no gradient; PyTorch too computes observations once per state.

    Compiled is its best form: torch.compile with the fast mish.
    """
    _, critics = make_networks(activation)
    obs, action = draw(B, OBS), draw(B, K, ACT).tanh()
    plain = make_networks(activation)[1]
    plain.load_state_dict(critics.state_dict())
    torch_form = plain.candidate_q_min
    if form == "compiled":
        monkeypatch.setitem(ACTIVATIONS, "mish", (fast_mish, ACTIVATIONS["mish"][1]))
        torch_form = torch.compile(torch_form)
    make_backend("cpu", torch.device("cpu")).accelerate(critics)
    with torch.no_grad():
        assert torch.allclose(
            critics.candidate_q_min(obs, action), torch_form(obs, action), atol=1e-4
        )
        compare(
            benchmark,
            f"twin Q, {activation}, PyTorch {form}",
            lambda: critics.candidate_q_min(obs, action),
            lambda: torch_form(obs, action),
            twin_q_flop(),
        )


def test_reweighted_velocity(benchmark: Any) -> None:
    """Candidates, twin Q and softmax sums of 256 x 64 reverse samples."""
    _, critics = make_networks("mish")
    obs, z, t = draw(B, OBS), draw(B, ACT), torch.linspace(0.02, 0.98, B).unsqueeze(1)

    def run(backend: Any) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return ops.reweighted_velocity(
            critics, obs, z, t, alpha=1.0, num_candidates=K, generator=generator, backend=backend
        ).velocity

    with torch.no_grad():
        # Different draws of the same estimate: equal within its Monte-Carlo error.
        assert ((run("cpu") - run("torch")) * t).abs().max() < 2
        native, plain = (functools.partial(run, name) for name in ("cpu", "torch"))
        compare(benchmark, "reweighted velocity", native, plain, twin_q_flop())


def test_meanflow_step(benchmark: Any) -> None:
    """Loss and gradient of 256 rows."""
    net, _ = make_networks("silu")
    t = torch.linspace(0.02, 1, B).unsqueeze(1)
    rows = draw(B, ACT), 0.5 * t, t, draw(B, OBS, seed=1), draw(B, ACT, seed=2)

    def run(backend: Any) -> Tensor:
        loss = ops.meanflow_loss(net, *rows, backend=backend)
        return torch.autograd.grad(loss, net.flat)[0]

    assert torch.allclose(run("cpu"), run("torch"), rtol=1e-3, atol=1e-4)
    # Primal, tangent and, for the primal only, both gradients.
    flop = 4 * mlp_flop(B, net.layer_sizes)
    compare(benchmark, "MeanFlow step", lambda: run("cpu"), lambda: run("torch"), flop)


@pytest.mark.parametrize("samples", [0, 8])
def test_exact_log_prob(benchmark: Any, samples: int) -> None:
    """Exact density of 256 rows with its gradient, or of 256 x 8 samples without."""
    net, _ = make_networks("silu")
    obs = draw(B, OBS)
    noise = draw(B, ACT) if samples == 0 else draw(B, samples, ACT)

    def run(backend: Any) -> Tensor:
        if samples == 0:
            sample = ops.log_prob(net, obs, noise, backend=backend)
            return torch.autograd.grad(sample.log_prob.mean(), net.flat)[0]
        with torch.no_grad():
            return ops.log_prob(net, obs.unsqueeze(1), noise, backend=backend).log_prob

    assert torch.allclose(run("cpu"), run("torch"), rtol=1e-3, atol=1e-3)
    name = "exact log pi and gradient" if samples == 0 else f"exact log pi of {samples} samples"
    # Primal and one tangent per action dimension; with a gradient, both products' transposes too.
    passes = 3 if samples == 0 else samples
    flop = passes * (1 + ACT) * mlp_flop(B, net.layer_sizes)
    compare(benchmark, name, lambda: run("cpu"), lambda: run("torch"), flop)


def update_as_trained(agent: Agent, batch: Batch, updates: int = 1) -> None:
    with agent.backend.training():
        agent.update(batch, updates)


def make_batch(rows: int) -> Batch:
    return Batch(
        obs=draw(rows, OBS),
        action=draw(rows, ACT, seed=1).tanh(),
        reward=draw(rows, seed=2),
        discount=torch.full((rows,), 0.99),
        next_obs=draw(rows, OBS, seed=3),
    )


def make_agents(algorithm: str, **options: Any) -> list[Agent]:
    """The same agent on the native and on the PyTorch backend."""
    return [make_agent(name, algorithm, **options) for name in ("cpu", "torch")]


def make_agent(backend: str, algorithm: str, **options: Any) -> Agent:
    config = make_config(algorithm, overrides=options)
    return Agent(config, OBS, ACT, make_backend(backend, torch.device("cpu")))


@pytest.mark.parametrize("algorithm", ["flame", "flame-r", "sac"])
def test_whole_update(benchmark: Any, algorithm: str) -> None:
    """A critic and a policy update as the trainer does them, Adam and target update included."""
    native, plain = make_agents(
        algorithm,
        hidden_sizes=HIDDEN,
        embedding_dim=0,
        policy_delay=1,
        batch_size=B,
        policy_batch_size=B,
    )
    batch = make_batch(B)
    first = native.update(batch), plain.update(batch)
    assert first[0]["critic_loss"] == pytest.approx(first[1]["critic_loss"], rel=1e-3)
    compare(
        benchmark,
        f"whole update, {algorithm}",
        lambda: update_as_trained(native, batch),
        lambda: plain.update(batch),
    )


def compare_policy_steps(
    benchmark: Any, ours: Agent, theirs: Agent, tolerance: float, other: str
) -> None:
    """A policy's update and all critic updates before it, of two agents with the same options."""
    config = ours.config
    count = config.policy_delay
    batch = make_batch(count * config.batch_size)
    for agent in (ours, theirs):
        update_as_trained(agent, batch, count)
    assert ours.temperature.alpha == pytest.approx(theirs.temperature.alpha, rel=tolerance)
    compare(
        benchmark,
        f"{count} critic updates and one of the policy, {config.algorithm}, embeddings "
        f"{config.embedding_dim}",
        lambda: update_as_trained(ours, batch, count),
        lambda: update_as_trained(theirs, batch, count),
        other=other,
    )


@pytest.mark.parametrize("embedding_dim", [0, 128])
@pytest.mark.parametrize("algorithm", ["flame", "sac"])
def test_updates_of_one_policy_step(benchmark: Any, algorithm: str, embedding_dim: int) -> None:
    """Of the default preset."""
    native, plain = make_agents(algorithm, embedding_dim=embedding_dim)
    compare_policy_steps(benchmark, native, plain, 1e-3, "PyTorch")


@pytest.mark.skipif(not _core.bfloat16_supported(), reason="this CPU has no AVX512-BF16")
@pytest.mark.parametrize("embedding_dim", [0, 128])
@pytest.mark.parametrize("algorithm", ["flame", "sac"])
def test_updates_in_bfloat16(benchmark: Any, algorithm: str, embedding_dim: int) -> None:
    """As above, beside the same kernels with float32 products."""
    rounded, single = (
        make_agent("cpu", algorithm, embedding_dim=embedding_dim, matmul_precision=precision)
        for precision in ("bfloat16", "float32")
    )
    compare_policy_steps(benchmark, rounded, single, 1e-2, "float32")


@pytest.mark.parametrize("algorithm", ["flame", "sac"])
def test_fused_critic_update(benchmark: Any, algorithm: str) -> None:
    """The critic update in one native call beside the same kernels called one by one."""
    agents = [make_agent("cpu", algorithm, embedding_dim=0) for _ in range(2)]
    batch = make_batch(agents[0].config.batch_size)

    def update(agent: Agent, method: Callable[..., dict[str, float]]) -> dict[str, float]:
        networks = agent.actor, agent.critics, agent.target_critics
        optimizer = agent.optimizers["critics"]
        return method(
            agent.backend, *networks, optimizer, batch, agent.temperature.alpha, agent.generator
        )

    fused = functools.partial(update, agents[0], type(agents[0].backend).critic_updates)
    single = functools.partial(update, agents[1], TorchBackend.critic_updates)
    assert fused() == pytest.approx(single(), rel=1e-3)
    compare(benchmark, f"critic update, {algorithm}", fused, single, other="single kernels")
