"""Environment steps per second of whole training loops: ours, Stable-Baselines3, RLtools.

One environment, one update per step, batch 256, two hidden layers of 256, a policy step in every
update (`delay 2`: in every second one, as FLAME is published), no evaluation. Every measurement is
a process of its own on all cores; the programs take turns, and a ratio is taken within each round.
The peers are measured where they are installed (`pip install stable-baselines3 rltools mkl
mkl-include`; RLtools compiles itself, so it needs a C++ compiler, and without MKL it multiplies in
plain loops).

Run: python benchmarks/whole_loop.py --rounds 3
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time

import numpy as np

from flame_ext import backend_info

TASK = "HalfCheetah-v5"
WARM_UP, MEASURED = 2_000, 2_000
LEARNING_STARTS, BATCH = 500, 256


def ours(algorithm: str, **options: object) -> float:
    from flame_ext import Trainer
    from flame_ext.callbacks import Callback

    class Clock(Callback):
        def __init__(self) -> None:
            self.times: dict[int, float] = {}

        def on_log(self, trainer: Trainer, metrics: object) -> None:
            self.times[trainer.global_step] = time.perf_counter()

    config = {
        "num_envs": 1,
        "updates_per_step": 1,
        "learning_starts": LEARNING_STARTS,
        "batch_size": BATCH,
        "policy_batch_size": BATCH,
        "hidden_sizes": (256, 256),
        "embedding_dim": 0,
        "policy_delay": 1,
        "eval_interval": 0,
        "eval_episodes": 1,
        "log_interval": MEASURED,
        **options,
    }
    clock = Clock()
    with tempfile.TemporaryDirectory() as run_dir:
        trainer = Trainer(
            TASK, algorithm=algorithm, config=config, run_dir=run_dir, callbacks=[clock]
        )
        trainer.run(WARM_UP + MEASURED)
    return MEASURED / (clock.times[WARM_UP + MEASURED] - clock.times[WARM_UP])


def sb3_sac() -> float:
    from stable_baselines3 import SAC
    from stable_baselines3.common.callbacks import BaseCallback

    class Clock(BaseCallback):
        def __init__(self) -> None:
            super().__init__()
            self.times: list[float] = []

        def _on_step(self) -> bool:
            self.times.append(time.perf_counter())
            return True

    clock = Clock()
    options = {"learning_starts": LEARNING_STARTS, "batch_size": BATCH, "device": "cpu"}
    SAC("MlpPolicy", TASK, **options).learn(WARM_UP + MEASURED, callback=clock)
    return MEASURED / (clock.times[-1] - clock.times[-1 - MEASURED])


def rltools_sac() -> float:
    import gymnasium
    from rltools import SAC

    layers = 3  # two hidden ones and the output
    program = SAC(
        lambda: gymnasium.make(TASK),
        enable_evaluation=False,
        ACTOR_BATCH_SIZE=BATCH,
        CRITIC_BATCH_SIZE=BATCH,
        ACTOR_HIDDEN_DIM=256,
        CRITIC_HIDDEN_DIM=256,
        ACTOR_NUM_LAYERS=layers,
        CRITIC_NUM_LAYERS=layers,
        N_WARMUP_STEPS=LEARNING_STARTS,
        EPISODE_STEP_LIMIT=1000,
        STEP_LIMIT=WARM_UP + MEASURED + 1,
    )
    state = program.State(0)
    for _ in range(WARM_UP):
        state.step()
    start = time.perf_counter()
    for _ in range(MEASURED):
        state.step()
    return MEASURED / (time.perf_counter() - start)


PROGRAMS = {
    "flame_ext sac": lambda: ours("sac"),
    "flame_ext sac, bfloat16": lambda: ours("sac", matmul_precision="bfloat16"),
    "flame_ext flame, K 8": lambda: ours("flame"),
    "flame_ext flame, K 8, bfloat16": lambda: ours("flame", matmul_precision="bfloat16"),
    "flame_ext flame, K 8, delay 2": lambda: ours("flame", policy_delay=2),
    "flame_ext flame, K 32": lambda: ours("flame", num_candidates=32),
    "Stable-Baselines3 SAC": sb3_sac,
    "RLtools SAC": rltools_sac,
}
NEEDS = {"Stable-Baselines3 SAC": "stable_baselines3", "RLtools SAC": "rltools"}
REFERENCE = "Stable-Baselines3 SAC"


def measure(name: str) -> float:
    command = [sys.executable, __file__, "--program", name]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(output.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--program", choices=PROGRAMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.program:
        print(PROGRAMS[arguments.program]())
        return
    missing = {name for name, module in NEEDS.items() if importlib.util.find_spec(module) is None}
    for name in missing:
        print(f"not measured, not installed: {name}")
    if not backend_info().bfloat16:
        print("not measured, no AVX512-BF16: bfloat16")
        missing |= {name for name in PROGRAMS if "bfloat16" in name}
    names = [name for name in PROGRAMS if name not in missing]
    rates = np.array([[measure(name) for name in names] for _ in range(arguments.rounds)])
    reference = rates[:, [names.index(REFERENCE)]] if REFERENCE in names else None
    for i, name in enumerate(names):
        line = (
            f"{name:<31}{np.median(rates[:, i]):8.1f} steps/s (each round {rates[:, i].round(1)})"
        )
        if reference is not None:
            line += f"  {np.median(rates[:, i] / reference[:, 0]):.2f}x {REFERENCE}"
        print(line)


if __name__ == "__main__":
    main()
