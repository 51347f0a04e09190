"""Stable-Baselines3's SAC under the conditions of `matrix.py`, as an outside reference.

Its own defaults (two hidden layers of 256, learning rate 3e-4, target entropy -A) with the
harness's number of environments, update-to-data ratio, warm-up and evaluation; of `--set` only
those count. Needs `pip install stable-baselines3`; `matrix.py --algorithms sb3-sac` calls it.

Run: python benchmarks/learning/sb3_sac.py HalfCheetah-v5 --steps 100000 --seed 0 --run-dir DIR
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import gymnasium
import numpy as np
import stable_baselines3
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from flame_ext.config import Config, make_config
from flame_ext.config_text import parse_overrides
from flame_ext.envs import make_eval_env
from flame_ext.evaluate import MAX_EVAL_ENVS, Evaluation, run_episodes
from flame_ext.loggers import EvaluationLog

SETTINGS = ("learning_rate", "batch_size", "buffer_size", "gamma", "tau", "learning_starts")
SETTINGS += ("gradient_steps", "n_envs")


class Evaluate(BaseCallback):
    """Deterministic evaluations with the harness's own episodes and file format."""

    def __init__(self, task: str, seed: int, run_dir: Path, config: Config) -> None:
        super().__init__()
        self.seed = seed + 1_000_003
        envs = min(config.eval_episodes, MAX_EVAL_ENVS)
        self.env = make_eval_env(task, num_envs=envs, seed=self.seed)
        self.log, self.config = EvaluationLog(run_dir), config
        self.interval = config.eval_interval or config.total_steps
        self.start = time.perf_counter()

    def _on_step(self) -> bool:
        before = self.num_timesteps - self.config.num_envs
        last = self.num_timesteps >= self.config.total_steps
        if last or self.num_timesteps // self.interval > before // self.interval:
            self._evaluate()
        return True

    def _evaluate(self) -> None:
        outcome = run_episodes(self.env, self._act, self.config.eval_episodes, seed=self.seed)
        wall_time = time.perf_counter() - self.start
        self.log.write(Evaluation(self.num_timesteps, wall_time, *outcome))

    def _act(self, obs: np.ndarray) -> np.ndarray:
        action, _ = self.model.predict(obs, deterministic=True)
        space = self.training_env.action_space
        assert isinstance(space, gymnasium.spaces.Box)
        return (2 * (action - space.low) / (space.high - space.low) - 1).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--preset", default="default", help="whose conditions hold")
    parser.add_argument("--set", action="append", default=[], help="as for `flame-ext train`")
    arguments = parser.parse_args()
    conditions = {**parse_overrides(arguments.set), "total_steps": arguments.steps}
    config = make_config("sac", arguments.preset, conditions)
    arguments.run_dir.mkdir(parents=True)
    model = SAC(
        "MlpPolicy",
        make_vec_env(arguments.task, n_envs=config.num_envs, seed=arguments.seed),
        learning_starts=config.learning_starts,
        gradient_steps=round(config.updates_per_step * config.num_envs),
        seed=arguments.seed,
        device="cpu",
    )
    settings = {name: getattr(model, name) for name in SETTINGS}
    settings |= {"algorithm": "sb3-sac", "version": stable_baselines3.__version__}
    (arguments.run_dir / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
    evaluate = Evaluate(arguments.task, arguments.seed, arguments.run_dir, config)
    model.learn(arguments.steps, callback=evaluate)


if __name__ == "__main__":
    main()
