"""Every CPU kernel of acting and training beside its floor: operations, bytes, what is left.

A kernel cannot be faster than its matrix products at the peak rate of multiply-adds, nor than
touching its operands once: weights, inputs, results, optimiser state. Both rates are measured here,
in this process on the same threads; bytes come at the rate at which a buffer of that size is read
over and over, so the caches count. Times are printed, never asserted. `--output` keeps the table
with its provenance.

Run: FLAME_EXT_NUM_THREADS=1 python benchmarks/roofline.py --output benchmarks/results/roofline
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from learning.provenance import provenance
from torch import Tensor

from flame_ext import _core
from flame_ext.backends.cpu import CpuBackend
from flame_ext.backends.native_evaluator import NativeEvaluator
from flame_ext.backends.native_views import array, mlp_spec
from flame_ext.backends.torch import adam_moments
from flame_ext.critics import Critics
from flame_ext.latency import untrained_policy
from flame_ext.networks import MeanVelocityNet

FLOAT = 4  # bytes
DENSITY_SAMPLES = 8


@dataclass(frozen=True)
class Kernel:
    """One call: operations of its matrix products, bytes of memory that it must touch."""

    name: str
    run: Callable[[], object]
    operations: float
    bytes: float


def product(rows: int, *sizes: int) -> float:
    """Operations of a chain of matrix products on `rows` rows."""
    return 2.0 * rows * sum(a * b for a, b in itertools.pairwise(sizes))


class Problem:
    """Networks and data of one size.

    Args:
        obs_dim: O.
        action_dim: A.
        hidden: Hidden widths of policy and critics.
        batch: States B.
        candidates: Candidate actions per state K.
    """

    def __init__(
        self, obs_dim: int, action_dim: int, hidden: Sequence[int], batch: int, candidates: int
    ) -> None:
        g = torch.Generator().manual_seed(0)
        self.batch, self.count = batch, candidates
        self.obs_dim, self.action_dim, self.hidden = obs_dim, action_dim, tuple(hidden)
        self.policy = MeanVelocityNet(obs_dim, action_dim, self.hidden, generator=g)
        self.policy.start_as_contraction(0.2)
        self.critics = Critics(
            obs_dim, action_dim, self.hidden, activation="relu", layer_norm=True, generator=g
        )
        self.obs = torch.randn(batch, obs_dim, generator=g)
        self.noise = torch.randn(batch, action_dim, generator=g)
        self.action = self.noise.tanh()
        self.column = torch.linspace(0.02, 1, batch).unsqueeze(1)

    @property
    def kernels(self) -> list[Kernel]:
        """All of them, acting first."""
        return [*self._acting(), *self._critics(), *self._flow(), *self._optimiser()]

    def _acting(self) -> list[Kernel]:
        policy = untrained_policy("flame", self.obs_dim, self.action_dim, embedding_dim=0)
        hidden = tuple(policy.spec.config["hidden_sizes"])
        obs = array(self.obs[0])
        inputs = self.obs_dim + self.action_dim
        one = product(1, inputs, *hidden, self.action_dim)
        judge = 2 * product(1, inputs, *hidden, 1)
        weights = FLOAT * one / 2
        critics = FLOAT * judge / 2
        name = "x".join(map(str, hidden))
        return [
            Kernel(f"act, {name}", lambda: policy.act(obs, num_particles=1), one, weights),
            Kernel(
                f"act, best of 32, {name}",
                lambda: policy.act(obs, num_particles=32),
                # The observation's part of layer one is the same for all particles.
                32 * (one + judge) - 31 * 3 * product(1, self.obs_dim, hidden[0]),
                weights + critics,
            ),
        ]

    def _critics(self) -> list[Kernel]:
        b, k, a = self.batch, self.count, self.action_dim
        inputs, first = self.obs_dim + a, self.hidden[0]
        evaluator, spec = NativeEvaluator(self.critics), mlp_spec(self.critics)
        flat = array(self.critics.flat)
        gradient = np.zeros_like(flat)
        obs, action = array(self.obs), array(self.action)
        target = array(self.noise[:, 0].contiguous())
        several = self.action.unsqueeze(1).repeat(1, k, 1)
        forward = 2 * product(b, inputs, *self.hidden, 1)
        candidates = 2 * (product(b, self.obs_dim, first) + product(b * k, a, *self.hidden, 1))
        generator = torch.Generator().manual_seed(0)
        rows = self.obs, self.noise, 1 - self.column, self.column
        data = _bytes(self.critics.flat, self.obs)
        return [
            Kernel(
                f"twin Q of {b} x {k} candidates",
                lambda: evaluator.candidates(self.obs, several),
                candidates,
                data + _bytes(several) * (a + 1) / a,
            ),
            Kernel(
                f"reweighted velocity, {b} x {k}",
                lambda: evaluator.reweighted_velocity(
                    *rows, 1.0, k, sampling="stratified", generator=generator
                ),
                candidates,
                data + 2 * _bytes(self.noise),
            ),
            Kernel(
                f"critic step, {b}",
                lambda: _core.critic_step(spec, flat, gradient, obs, action, target),
                # Forward, weight gradients, and deltas of all layers but the first's input.
                3 * forward - 2 * product(b, inputs, first),
                data + _bytes(self.action) + gradient.nbytes,
            ),
            Kernel(
                f"Qmin and its gradient, {b}",
                lambda: evaluator.q_gradient(self.obs, self.action),
                # Back through the smaller critic of each row, to the action's columns.
                forward + product(b, *self.hidden, 1) + product(b, a, first),
                data + 2 * _bytes(self.action),
            ),
        ]

    def _flow(self) -> list[Kernel]:
        b, a = self.batch, self.action_dim
        net = NativeEvaluator(self.policy)
        sizes = self.policy.layer_sizes
        forward, entry = product(b, *sizes), product(b, sizes[0], sizes[1])
        weights = _bytes(self.policy.flat)
        io = _bytes(self.obs, self.noise)
        several = self.noise.unsqueeze(1).repeat(1, DENSITY_SAMPLES, 1)
        # One value and A tangents, whose first layer is a column of its weights.
        density = forward + a * (forward - entry)
        deltas = self.noise, self.noise[:, 0], torch.zeros(b, a, a)

        def density_and_gradient() -> Tensor:
            _, recorded = net.record_density(self.obs, self.noise, 1, "mean")
            return net.density_gradient(recorded, *deltas)

        return [
            Kernel(
                f"MeanFlow step, {b}",
                lambda: net.meanflow_gradient(
                    self.noise, 0 * self.column, self.column, self.obs, self.action
                ),
                # Value, tangent, weight gradients, deltas.
                4 * forward - entry,
                2 * weights + io + _bytes(self.noise),
            ),
            Kernel(
                f"exact log pi, {b} x {DENSITY_SAMPLES}",
                lambda: net.density(self.obs, several, 1, "mean", "log_det"),
                DENSITY_SAMPLES * density,
                weights + _bytes(self.obs) + 2 * _bytes(several),
            ),
            Kernel(
                f"exact log pi and its gradient, {b}",
                density_and_gradient,
                # Deltas and weight gradients of the value and of every tangent.
                3 * density - entry,
                2 * weights + io + _bytes(*deltas),
            ),
        ]

    def _optimiser(self) -> list[Kernel]:
        backend = CpuBackend()
        flat = self.critics.flat
        flat.grad = torch.ones_like(flat)
        optimizer = torch.optim.Adam([flat], lr=1e-3)
        adam_moments(optimizer)
        target = flat.detach().clone()
        count = flat.numel()
        return [
            Kernel(
                f"Adam, {count} parameters",
                lambda: backend.optimizer_step(optimizer),
                0,
                4 * FLOAT * count,  # parameters, gradient, two moments
            ),
            Kernel(
                f"soft update, {count} parameters",
                lambda: backend.soft_update(target, flat, 0.005),
                0,
                2 * FLOAT * count,
            ),
        ]


def _bytes(*tensors: Tensor) -> int:
    return FLOAT * sum(x.numel() for x in tensors)


def seconds(run: Callable[[], object], rounds: int) -> np.ndarray:
    """Times of repeated calls; a warm-up of a few more goes before."""
    times = []
    for i in range(rounds + 3):
        start = time.perf_counter()
        run()
        if i >= 3:
            times.append(time.perf_counter() - start)
    return np.array(times)


def row(kernel: Kernel, peak: float, rounds: int) -> list[str]:
    """One line of the table."""
    rate = _core.read_gbps(max(int(kernel.bytes), 1))
    compute, memory = kernel.operations / peak / 1e3, kernel.bytes / rate / 1e3
    floor = max(compute, memory)
    times = 1e6 * seconds(kernel.run, rounds)
    quiet, median = np.quantile(times, 0.1), np.median(times)
    return [
        kernel.name,
        f"{kernel.operations / 1e6:.2f}",
        f"{kernel.bytes / 1e3:.0f}",
        f"{compute:.1f}",
        f"{memory:.1f} at {rate:.0f}",
        f"{quiet:.1f} / {median:.1f}",
        f"{floor / quiet:.0%} of {'products' if compute >= memory else 'memory'}",
    ]


COLUMNS = [
    "kernel",
    "MFLOP",
    "kB",
    "products, us",
    "memory, us at GB/s",
    "measured, us (10 % / median)",
    "floor / measured",
]


def table(problem: Problem, rounds: int) -> list[str]:
    """Markdown lines."""
    peak = _core.peak_gflops()
    threads, isa = _core.num_threads(), _core.isa_active()
    lines = [
        f"O {problem.obs_dim}, A {problem.action_dim}, networks "
        f"{'x'.join(map(str, problem.hidden))}, batch {problem.batch}; {threads} thread(s), "
        f"{isa}, {peak:.0f} GFLOP/s:",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|" + " --- |" * len(COLUMNS),
    ]
    lines += [f"| {' | '.join(row(kernel, peak, rounds))} |" for kernel in problem.kernels]
    return [*lines, ""]


def main() -> None:
    """Measures, prints and keeps the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--obs-dim", type=int, default=17)
    parser.add_argument("--action-dim", type=int, default=6)
    # The sizes of the published experiments, then the default preset's.
    parser.add_argument("--hidden", nargs="+", default=["256,256,256", "256,256"])
    parser.add_argument("--batch", nargs="+", type=int, default=[256, 64])
    parser.add_argument("--candidates", nargs="+", type=int, default=[64, 8])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--output", type=Path, help="folder for table.md and provenance.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines: list[str] = []
    sizes = zip(arguments.hidden, arguments.batch, arguments.candidates, strict=True)
    for hidden, batch, candidates in sizes:
        widths = [int(width) for width in hidden.split(",")]
        problem = Problem(arguments.obs_dim, arguments.action_dim, widths, batch, candidates)
        with torch.no_grad():
            lines += table(problem, arguments.rounds)
    text = "\n".join(lines)
    print(text)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "table.md").write_text(text)
        origin = json.dumps(provenance(), indent=1) + "\n"
        (arguments.output / "provenance.json").write_text(origin)


if __name__ == "__main__":
    main()
