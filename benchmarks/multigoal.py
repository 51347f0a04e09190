"""What an expressive policy is for: goals that FLAME and SAC reach in the multi-goal task.

Trains both for several seeds with the same options, budget and critics, plays sampled one-step
episodes with each final policy and reports the fraction that ended at each of four equally good
goals. Finished runs are kept, so the command can be repeated until all are done. Figure, table,
CSV, options and provenance go to `--output`.

Run: python benchmarks/multigoal.py --seeds 3 --output benchmarks/results/multigoal
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from learning.provenance import provenance

from flame_ext import Trainer, load, make_config
from flame_ext.loggers import EVALUATIONS_FILE, read_evaluations
from flame_ext.multigoal import ENV_ID
from flame_ext.plots import plot_multigoal, rollout_goals

NUM_GOALS = 4
ALGORITHMS = ("flame", "sac")
# Most data come from uniform actions: critics that have hardly seen a goal differ between equally
# good ones by more than alpha, and then any policy goes where the critic errs most.
SHARED = {
    "learning_starts": 8_000,
    "num_envs": 8,
    "hidden_sizes": (128, 128),
    "embedding_dim": 0,
    "batch_size": 128,
    "policy_batch_size": 128,
    "updates_per_step": 0.75,
    # The policy's masses of equally good goals settle as its step shrinks.
    "final_policy_learning_rate": 2e-4,
    "policy_delay": 1,
    "gamma": 0.95,
    "tau": 0.02,
    "temperature": "fixed",
    "initial_alpha": 0.3,
    "entropy_in_target": True,
    "policy_tau": 1.0,
    "exploration_noise": 0.2,
    "eval_interval": 0,
    "eval_episodes": 5,
    "checkpoint_interval": 0,
}
# Reweighting alone: the reverse-KL term is mode seeking.
OPTIONS: dict[str, dict[str, object]] = {
    "flame": {
        "reverse_kl_weight": 0.0,
        "proposal": "reverse",
        "z_source": "target",
        "num_candidates": 16,
        "instantaneous_fraction": 0.25,
        "acting_fraction": 0.25,
        "initial_action_std": 0.35,
        "target_particles": 4,
    },
    "sac": {},
}


@dataclass(frozen=True)
class Outcome:
    """Episodes of one trained policy.

    Attributes:
        algorithm: Its name.
        seed: Seed of its training.
        fractions: Fraction of the episodes that ended at each goal.
        seconds: Wall time of its training.
    """

    algorithm: str
    seed: int
    fractions: tuple[float, ...]
    seconds: float

    @property
    def missed(self) -> float:
        """Fraction of the episodes that reached no goal."""
        return max(0.0, 1.0 - sum(self.fractions))


def train(algorithm: str, seed: int, steps: int, runs: Path) -> Path:
    """Trains one policy unless that is done with these options; returns its run directory."""
    run_dir = runs / f"{algorithm}-s{seed}"
    config = make_config(
        algorithm, overrides={**SHARED, **OPTIONS[algorithm], "total_steps": steps}
    )
    finished = (run_dir / EVALUATIONS_FILE).exists() and read_evaluations(run_dir)["step"]
    if finished and finished[-1] >= steps:
        made_with = json.loads((run_dir / "config.json").read_text())
        if made_with == json.loads(json.dumps(config.to_dict())):
            return run_dir
    shutil.rmtree(run_dir, ignore_errors=True)
    Trainer(ENV_ID, algorithm=algorithm, config=config, run_dir=run_dir, seed=seed).run()
    return run_dir


def play(algorithm: str, seed: int, run_dir: Path, episodes: int) -> Outcome:
    """Plays sampled episodes, one particle per action, with a final policy."""
    rollouts = rollout_goals(load(run_dir, seed=seed), episodes, seed=seed)
    seconds = float(read_evaluations(run_dir)["wall_time"][-1])
    return Outcome(algorithm, seed, tuple(rollouts.fractions.tolist()), seconds)


def table(outcomes: list[Outcome]) -> str:
    """Percent of the episodes at each goal, one row per run."""
    goals = [f"goal {index}" for index in range(NUM_GOALS)]
    head = ["algorithm", "seed", *goals, "none", "training s"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for o in outcomes:
        shares = [f"{100 * share:.1f} %" for share in (*o.fractions, o.missed)]
        row = [o.algorithm, str(o.seed), *shares, f"{o.seconds:.0f}"]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def report(outcomes: list[Outcome], runs: dict[tuple[str, int], Path], output: Path) -> None:
    """Writes goals.csv, table.md, multigoal.png, options.json and provenance.json."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / "goals.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        goals = [f"goal_{index}" for index in range(NUM_GOALS)]
        writer.writerow(["algorithm", "seed", *goals, "none", "training_seconds"])
        for o in outcomes:
            shares = [f"{share:.4f}" for share in (*o.fractions, o.missed)]
            writer.writerow([o.algorithm, o.seed, *shares, f"{o.seconds:.1f}"])
    first_seed = outcomes[0].seed
    pictured = [runs[algorithm, first_seed] for algorithm in ALGORITHMS]
    plot_multigoal(pictured, output / "multigoal.png", seed=first_seed)
    options = {name: {**SHARED, **OPTIONS[name]} for name in ALGORITHMS}
    (output / "options.json").write_text(json.dumps(options, indent=1) + "\n")
    (output / "provenance.json").write_text(json.dumps(provenance(), indent=1) + "\n")
    (output / "table.md").write_text(table(outcomes) + "\n")


def main() -> None:
    """Trains, plays, reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N - 1 (default 3)")
    parser.add_argument("--steps", type=int, default=14_000, help="environment steps per run")
    parser.add_argument("--episodes", type=int, default=400, help="episodes per trained policy")
    parser.add_argument("--threads", type=int, default=1, help="threads of a training")
    parser.add_argument("--runs", type=Path, default=Path("runs/multigoal"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/multigoal"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    runs, outcomes = {}, []
    for algorithm in ALGORITHMS:
        for seed in range(arguments.seeds):
            run_dir = train(algorithm, seed, arguments.steps, arguments.runs)
            runs[algorithm, seed] = run_dir
            outcomes.append(play(algorithm, seed, run_dir, arguments.episodes))
    report(outcomes, runs, arguments.output)
    print(table(outcomes))


if __name__ == "__main__":
    main()
