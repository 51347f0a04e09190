"""Runs of a few steps."""

from pathlib import Path

from flame_ext.trainer import Trainer

TASK = "flame_ext/MultiGoal-v0"
TINY = {
    "hidden_sizes": (16, 16),
    "batch_size": 16,
    "policy_batch_size": 8,
    "num_candidates": 4,
    "num_envs": 2,
    "learning_starts": 40,
    "log_interval": 40,
    "eval_interval": 80,
    "eval_episodes": 2,
    "checkpoint_interval": 0,
    "buffer_size": 10_000,
}


def tiny(run_dir: Path, algorithm: str = "flame", **options: object) -> Trainer:
    return Trainer(TASK, algorithm=algorithm, config={**TINY, **options}, run_dir=run_dir)
