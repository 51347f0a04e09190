"""How many stratified candidates estimate v_hat as well as independent ones.

Takes critics, states and actions of a training run and noises the actions at uniform times. For
each effective sample size (ESS, as a fraction of K) the temperature is set that gives it, and the
root-mean-square error of v_hat is measured against that of many candidates.

Run: python benchmarks/candidate_error.py runs/HalfCheetah-v5 --candidates 100
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

from flame_ext import Trainer, ops
from flame_ext.policies.flow import MIN_TIME
from flame_ext.reference import Reweighted
from flame_ext.sampling import CandidateSampling

TRUTH_CANDIDATES = 50_000


class Problem:
    """Noised actions of a run's replay buffer, and its critics."""

    def __init__(self, run_dir: str, states: int) -> None:
        trainer = Trainer.resume(run_dir)
        generator = torch.Generator().manual_seed(0)
        batch = trainer.sample(states, generator)
        self.critics = trainer.agent.critics
        self.obs = self.critics.observe(batch.obs).detach()
        self.t = MIN_TIME + (1 - MIN_TIME) * torch.rand(states, 1, generator=generator)
        noise = torch.randn(batch.action.shape, generator=generator)
        self.z = (1 - self.t) * batch.action + self.t * noise

    @torch.no_grad()
    def estimate(
        self, alpha: float, candidates: int, sampling: CandidateSampling, seed: int
    ) -> Reweighted:
        return ops.reweighted_velocity(
            self.critics,
            self.obs,
            self.z,
            self.t,
            alpha=alpha,
            num_candidates=candidates,
            sampling=sampling,
            generator=torch.Generator().manual_seed(seed),
        )

    def temperature(self, ess: float) -> float:
        """The alpha at which the mean effective sample size is this fraction, by bisection."""
        low, high = math.log(1e-3), math.log(1e5)
        for _ in range(20):
            middle = 0.5 * (low + high)
            mean = float(self.estimate(math.exp(middle), 1000, "random", 1).ess.mean()) / 1000
            low, high = (low, middle) if mean > ess else (middle, high)
        return math.exp(0.5 * (low + high))

    def error(
        self, truth: Tensor, alpha: float, candidates: int, sampling: CandidateSampling, seeds: int
    ) -> float:
        """Root-mean-square error of v_hat's coordinates over states and seeds."""
        squares = [
            (self.estimate(alpha, candidates, sampling, seed).velocity - truth).square().mean()
            for seed in range(seeds)
        ]
        return float(torch.stack(squares).mean().sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", help="directory of a training run")
    parser.add_argument("--candidates", type=int, default=100, help="independent candidates, K")
    parser.add_argument("--ess", type=float, nargs="+", default=[0.94, 0.75, 0.5, 0.25])
    parser.add_argument("--states", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=12)
    arguments = parser.parse_args()
    problem = Problem(arguments.run_dir, arguments.states)
    for ess in arguments.ess:
        alpha = problem.temperature(ess)
        truth = problem.estimate(alpha, TRUTH_CANDIDATES, "random", -1).velocity
        k = arguments.candidates
        error = problem.error(truth, alpha, k, "random", arguments.seeds)
        print(f"ESS {ess:.0%} (alpha {alpha:.3g}): {k} random candidates, error {error:.4f}")
        for fewer in (4, 6, 8, 12, 16, 24, 32, 48, 64, 100):
            stratified = problem.error(truth, alpha, fewer, "stratified", arguments.seeds)
            print(f"  {fewer:4} stratified: {stratified:.4f}")
            if stratified <= error:
                break


if __name__ == "__main__":
    main()
