"""The 4-mode bandit: how well a one-step policy fits a known target, and what each estimator says.

No observation, two action dimensions, Q(a) = log sum_i exp(-|a - mu_i|^2 / (2 * 0.15^2)) with
mu_i = (+-0.5, +-0.5) and alpha = 1, so that pi* is known on a grid. Prints, for several seeds,
KL(pi || pi*), the mass of each mode and every entropy estimator beside a k-nearest-neighbour
estimate from the policy's own samples. `--set` gives the ablations.

Run: python benchmarks/bandit.py --seeds 3
     python benchmarks/bandit.py --seeds 3 --set reweighting_weight=0 reverse_kl_weight=1
     python benchmarks/bandit.py --seeds 3 --set reverse_kl_weight=0
     python benchmarks/bandit.py --seeds 3 --set monotonicity_margin=0
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import torch
from scipy.spatial import cKDTree
from scipy.special import digamma
from torch import Tensor

from flame_ext.config import make_config
from flame_ext.config_text import parse_overrides
from flame_ext.policies.flow import FlowActor
from flame_ext.reference import log_prob, sample_flow

MODE_STD = 0.15
MODES = torch.tensor([[0.5, 0.5], [0.5, -0.5], [-0.5, 0.5], [-0.5, -0.5]])
ALPHA = 1.0
TRUE_ENTROPY = 0.4218


class BanditQ:
    """The known Q in the place of learned critics; observations are empty."""

    evaluator = None  # no kernel computes it

    def q_min(self, obs: Tensor, action: Tensor) -> Tensor:
        """Q ``(..., A) -> (...)``."""
        squares = (action.unsqueeze(-2) - MODES.to(action)).square().sum(-1)
        return torch.logsumexp(-squares / (2 * MODE_STD**2), dim=-1)

    candidate_q_min = q_min


# The known target deserves more flow matching than a learned, moving one; there is no replay to
# take z from.
OPTIONS = {
    "batch_size": 256,
    "hidden_sizes": (128, 128, 128),
    "initial_action_std": 0.6,
    "z_source": "target",
    "num_candidates": 32,
    "instantaneous_fraction": 0.25,
    "reverse_kl_weight": 0.1,
}


def fit(seed: int, updates: int, **options: object) -> FlowActor:
    """A one-step policy fitted to the bandit by `flame`'s own loss, Adam 1e-3 decaying to zero."""
    config = make_config("flame", overrides={**OPTIONS, **options})
    actor = FlowActor(config, 0, 2, torch.Generator().manual_seed(seed))
    optimizer = torch.optim.Adam([actor.network.flat], lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    generator = torch.Generator().manual_seed(seed)
    obs, alpha = torch.zeros(config.batch_size, 0), torch.tensor(ALPHA)
    for _ in range(updates):
        optimizer.zero_grad()
        actor.loss(obs, obs, BanditQ(), alpha, generator).loss.backward()  # type: ignore[arg-type]
        optimizer.step()
        schedule.step()
    return actor


def log_partition(cells: int = 1000) -> float:
    """Log of the integral of exp(Q / alpha) over the cube, by the midpoint rule."""
    centres = (torch.arange(cells, dtype=torch.float64) + 0.5) * (2 / cells) - 1
    grid = torch.cartesian_prod(centres, centres)
    q = BanditQ().q_min(grid, grid) / ALPHA
    return float(torch.logsumexp(q, 0)) + 2 * math.log(2 / cells)


def knn_entropy(samples: np.ndarray, k: int = 4) -> float:
    """Kozachenko-Leonenko entropy in nats of samples ``(n, 2)``."""
    distance = cKDTree(samples).query(samples, k + 1)[0][:, -1]
    volume = math.log(math.pi) + 2 * np.log(np.maximum(distance, 1e-12)).mean()
    return float(volume + digamma(len(samples)) - digamma(k))


def entropies(actor: FlowActor, samples: int, seed: int = 0) -> dict[str, float]:
    """Every estimator's entropy of the one-step policy, and the fold rate."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((samples, 2), generator=generator)
    probe = 2 * torch.randint(0, 2, noise.shape, generator=generator).to(noise.dtype) - 1
    obs = torch.zeros(samples, 0)
    forms: dict[str, dict[str, object]] = {
        "exact": {},
        "multi_step 4, log-det": {"estimator": "multi_step", "steps": 4, "trace": "log_det"},
        "multi_step 4, Hutchinson": {"estimator": "multi_step", "steps": 4, "trace": "hutchinson"},
        "multi_step 16, Hutchinson": {
            "estimator": "multi_step",
            "steps": 16,
            "trace": "hutchinson",
        },
        "one_step_trace": {"estimator": "one_step_trace"},
    }
    with torch.no_grad():
        found = {
            name: log_prob(actor.network, obs, noise, probe=probe, **form)  # type: ignore[arg-type]
            for name, form in forms.items()
        }
        action = sample_flow(actor.network, obs, noise)
    result = {"kNN": knn_entropy(action.double().numpy())}
    result |= {name: -float(value.log_prob.mean()) for name, value in found.items()}
    result["fold rate"] = float(found["exact"].fold_rate)
    return result


def fit_quality(actor: FlowActor, samples: int, seed: int = 1) -> tuple[float, list[float]]:
    """KL(pi || pi*) with the kNN entropy, and the mass of each mode (quadrant)."""
    noise = torch.randn((samples, 2), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        action = sample_flow(actor.network, torch.zeros(samples, 0), noise)
    cross_entropy = log_partition() - float(BanditQ().q_min(action, action).mean())
    kl = cross_entropy - knn_entropy(action.double().numpy())
    quadrant = (action > 0).long() @ torch.tensor([2, 1])
    return kl, (torch.bincount(quadrant, minlength=4) / samples).tolist()


def main() -> None:
    """Fits one policy per seed and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=1500)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--set", nargs="*", default=[], help="options as KEY=VALUE")
    arguments = parser.parse_args()
    options = parse_overrides(arguments.set)
    print(f"true entropy {TRUE_ENTROPY}, log partition {log_partition():.4f}")
    for seed in range(arguments.seeds):
        actor = fit(seed, arguments.updates, **options)
        kl, masses = fit_quality(actor, arguments.samples)
        print(f"seed {seed}: KL {kl:.3f}, modes {' '.join(f'{m:.3f}' for m in masses)}")
        for name, value in entropies(actor, arguments.samples).items():
            print(f"  {name:26s} {value:8.4f}")


if __name__ == "__main__":
    main()
