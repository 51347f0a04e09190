"""CUDA kernels beside PyTorch eager and torch.compile with CUDA graphs, by device events.

Rows "host to host" are acting as a robot sees it, by the host's clock: an observation in host
memory to an action there. The row "whole update" is by the host's clock too, as it ends with the
host reading what the update reports; its native form is one CUDA graph.

``python benchmarks/cuda_kernels.py --compile-seconds 600 --json FILE`` on a machine with a GPU. The
floor of each row is its operations at the rate that a large float32 matrix product (no TF32)
reaches in this process, for products on tensor cores too: what they have below it is their gain.
Nothing is asserted.
HalfCheetah sizes: 17 observations, 6 actions, 3 x 256 units, 256 states.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flame_ext import reference
from flame_ext.agent import Agent
from flame_ext.backends.cuda import CudaBackend
from flame_ext.backends.cuda_evaluator import CudaEvaluator
from flame_ext.backends.torch import TorchBackend
from flame_ext.config import make_config
from flame_ext.critics import Critics
from flame_ext.networks import MeanVelocityNet
from flame_ext.replay import Batch

B, K, OBS, ACT, HIDDEN = 256, 100, 17, 6, (256, 256, 256)
ROUNDS = 30
BUSY_CYCLES = 20_000_000  # about ten milliseconds
Run = Callable[[], Any]


@dataclass
class Row:
    name: str
    flop: float
    floor_us: float
    native_us: float
    eager_us: float
    compiled_us: float | None = None  # not timed yet, or torch.compile failed

    def __str__(self) -> str:
        times = (self.floor_us, self.native_us, self.eager_us, self.compiled_us)
        shown = ("-" if t is None else f"{t:.1f}" for t in times)
        return f"{self.name:<40}" + "".join(f"{text:>9}" for text in shown)


def device_us(run: Run) -> float:
    """Median time of one call on the device, between two events.

    The device is kept busy while the host launches, whose pace would otherwise be measured.
    """
    for _ in range(5):
        run()
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(BUSY_CYCLES)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times)


def host_us(run: Run) -> float:
    """Median time of a call that ends with its result in host memory."""
    for _ in range(5):
        run()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run()
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times)


def mlp_flop(rows: int, *sizes: int) -> float:
    return 2.0 * rows * sum(a * b for a, b in itertools.pairwise(sizes))


def peak_flop_per_us() -> float:
    n = 4096
    a, b = (torch.randn(n, n, device="cuda") for _ in range(2))
    return 2.0 * n**3 / device_us(lambda: a @ b)


def cases() -> list[tuple[str, float, Run, Run]]:
    """Name, operations, native and PyTorch form."""
    g = torch.Generator().manual_seed(0)
    net = MeanVelocityNet(OBS, ACT, HIDDEN, generator=g).cuda()
    critics = Critics(OBS, ACT, HIDDEN, generator=g).cuda()
    policy, twin, tensor = (CudaEvaluator(x) for x in (net, critics, critics))
    twin.tensor_cores, tensor.tensor_cores = False, True
    obs, noise = torch.randn(B, OBS, device="cuda"), torch.randn(B, ACT, device="cuda")
    t, target = torch.rand(B, 1, device="cuda"), torch.randn(B, device="cuda")
    several = torch.rand(B, K, ACT, device="cuda") * 2 - 1
    uniform = torch.rand(B, K, ACT, device="cuda").clamp_(1e-6, 1 - 1e-6)
    inputs, width = OBS + ACT + 32, (*HIDDEN, ACT)
    backend = CudaBackend()
    seed = torch.Generator("cuda").manual_seed(0)
    alpha = torch.tensor(0.2, dtype=torch.float64, device="cuda")

    def critic_step() -> None:
        critics.flat.grad = None
        q = critics.q_values(obs, noise)
        loss = F.mse_loss(q, target.expand_as(q), reduction="none").mean(1).sum()
        loss.backward()

    def meanflow() -> None:
        net.flat.grad = None
        reference.meanflow_loss(net, noise, t / 2, t, obs, noise).backward()

    def density_gradient(evaluate: Run) -> Run:
        def run() -> None:
            net.flat.grad = None
            sample = evaluate()
            (sample.action.sum() + sample.log_prob.sum()).backward()

        return run

    @torch.no_grad()
    def reweighted() -> Any:
        action, eps = reference.reverse_candidates(noise, 1 - t, t, uniform)
        logits = critics.candidate_q_min(obs, action) / alpha
        return reference.reweighted_velocity(logits, action, eps)

    no_grad = torch.no_grad()
    candidate_flop = 2 * (mlp_flop(B, OBS, HIDDEN[0]) + mlp_flop(B * K, ACT, *HIDDEN, 1))
    candidate_forms = (("", twin), (", tensor cores", tensor))
    found: list[tuple[str, float, Run, Run]] = [
        *(
            (
                f"twin Q of 100 candidates{suffix}",
                candidate_flop,
                lambda native=native: native.candidates(obs, several),
                no_grad(lambda: critics.candidate_q_min(obs, several)),
            )
            for suffix, native in candidate_forms
        ),
        *(
            (
                f"reweighted velocity{suffix}",
                candidate_flop,
                lambda native=native: native.reweighted_velocity(
                    obs, noise, 1 - t, t, alpha, K, "random", seed
                ),
                reweighted,
            )
            for suffix, native in candidate_forms
        ),
        (
            "critic step",
            6 * mlp_flop(B, OBS + ACT, *HIDDEN, 1),
            lambda: backend.critic_step(critics, obs, noise, target),
            critic_step,
        ),
        (
            "MeanFlow step",
            4 * mlp_flop(B, inputs, *width),
            lambda: policy.meanflow_gradient(noise, t / 2, t, obs, noise),
            meanflow,
        ),
        (
            "exact log pi",
            (1 + ACT) * mlp_flop(B, inputs, *width),
            no_grad(lambda: policy.log_prob(obs, noise)),
            no_grad(lambda: reference.log_prob(net, obs, noise)),
        ),
        (
            "exact log pi and gradient",
            3 * (1 + ACT) * mlp_flop(B, inputs, *width),
            density_gradient(lambda: policy.log_prob(obs, noise)),
            density_gradient(lambda: reference.log_prob(net, obs, noise)),
        ),
    ]
    return found


def acting_cases(host: bool) -> list[tuple[str, float, Run, Run]]:
    """As `cases`; with `host` from an observation in host memory to an action there."""
    g = torch.Generator().manual_seed(0)
    net = MeanVelocityNet(OBS, ACT, HIDDEN, generator=g).cuda()
    critics = Critics(OBS, ACT, HIDDEN, generator=g).cuda()
    native = CudaEvaluator(net)

    def eager(obs: Tensor, noise: Tensor) -> Tensor:
        actions = reference.one_step_action(net, obs.unsqueeze(1), noise)
        return actions[:, 0] if noise.shape[1] == 1 else reference.best_of(critics, obs, actions)

    def case(states: int, particles: int) -> tuple[str, float, Run, Run]:
        rows, noise = states * particles, torch.randn(states, particles, ACT, device="cuda")
        obs = torch.randn(states, OBS, device="cpu" if host else "cuda")
        flop = mlp_flop(rows, OBS + ACT + 32, *HIDDEN, ACT)
        if particles > 1:
            flop += 2 * mlp_flop(rows, OBS + ACT, *HIDDEN, 1)

        def run(act: Callable[[Tensor, Tensor], Tensor]) -> Run:
            if host:
                return torch.no_grad()(lambda: act(obs.cuda(), noise).cpu())
            return torch.no_grad()(lambda: act(obs, noise))

        name = f"act, {states} states" + (f", best of {particles}" if particles > 1 else "")
        ours = run(lambda s, z: native.best_action(s, z, critics, 1, "mean"))
        return name + (", host to host" if host else ""), flop, ours, run(eager)

    sizes = [(1, 1), (1, 32)] if host else [(1, 1), (1, 16), (1, 32), (16384, 1), (1024, 32)]
    return [case(*size) for size in sizes]


def update_case() -> tuple[str, float, Run, Run]:
    """As `cases`: an update of critics and policy with the published sizes."""
    config = make_config("flame", "paper", {"policy_delay": 1})
    native, eager = (
        Agent(config, OBS, ACT, backend, seed=0, device="cuda")
        for backend in (CudaBackend(), TorchBackend())
    )
    g = torch.Generator().manual_seed(0)
    obs, next_obs = (torch.randn(B, OBS, generator=g).cuda() for _ in range(2))
    action = torch.randn(B, ACT, generator=g).tanh().cuda()
    batch = Batch(obs, action, torch.zeros(B).cuda(), torch.full((B,), 0.99).cuda(), next_obs)
    policy, critic = (OBS + ACT + 32, *HIDDEN, ACT), (OBS + ACT, *HIDDEN, 1)
    next_actions = B * config.target_particles
    flop = mlp_flop(next_actions, *policy) + 2 * mlp_flop(next_actions, *critic)
    flop += 6 * mlp_flop(B, *critic) + 4 * mlp_flop(B, *policy)
    flop += 2 * mlp_flop(B * config.num_candidates, ACT, *HIDDEN, 1)
    return (
        f"whole update, K = {config.num_candidates}",
        flop,
        lambda: native.update(batch),
        lambda: eager.update(batch),
    )


def compiled_time(clock: Callable[[Run], float], eager: Run) -> float | None:
    """Of the PyTorch form under torch.compile with CUDA graphs; None where that fails."""
    torch._dynamo.reset()  # beyond a few graphs per function it would fall back to eager silently
    try:
        return clock(torch.compile(eager, mode="reduce-overhead", dynamic=False))
    except Exception as error:  # whatever a compiler raises must not lose the other rows
        print(f"torch.compile: {error}")
        return None


class TimeIsUp(BaseException):
    """No `Exception`, which would be taken for one of a compiler."""


def end_compiling(*_: object) -> None:
    raise TimeIsUp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", required=True)
    parser.add_argument(
        "--compile-seconds",
        type=int,
        default=0,
        help="time for torch.compile, which takes minutes; the whole update comes first",
    )
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    device, peak = torch.cuda.get_device_name(), peak_flop_per_us()
    timed = [(device_us, case) for case in [*cases(), *acting_cases(host=False)]]
    timed += [(host_us, case) for case in [*acting_cases(host=True), update_case()]]
    rows: list[Row] = []

    def report(row: Row) -> None:
        print(row, flush=True)
        found = {"device": device, "rows": [asdict(r) for r in rows]}
        Path(options.json).write_text(json.dumps(found, indent=1))

    print(f"{device}: float32 product {peak / 1e6:.1f} TFLOP/s")
    print(f"{'microseconds':<40}{'floor':>9}{'native':>9}{'eager':>9}{'compiled':>9}")
    for clock, (name, flop, native, eager) in timed:
        rows.append(Row(name, flop, flop / peak, clock(native), clock(eager)))
        report(rows[-1])
    if options.compile_seconds == 0:
        return
    signal.signal(signal.SIGALRM, end_compiling)
    signal.alarm(options.compile_seconds)
    try:
        for row, (clock, (*_, eager)) in zip(reversed(rows), reversed(timed), strict=True):
            row.compiled_us = compiled_time(clock, eager)
            report(row)
    except TimeIsUp:
        print("no time to compile the rest")
    finally:
        signal.alarm(0)


if __name__ == "__main__":
    main()
