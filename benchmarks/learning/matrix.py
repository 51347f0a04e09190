"""Trains a matrix of (tasks x algorithms x seeds) and reports it.

Every run is one `flame-ext train` process on one thread; as many run side by side as `--jobs`.
Finished runs are kept and interrupted ones resume, so the command can be repeated until the matrix
is complete. Every run's curve and settings, the provenance of each (commit, versions, machine,
command, as of its start), the learning-curve figures and the tables go to `--results`. The
algorithm `sb3-sac` is Stable-Baselines3's SAC (`sb3_sac.py`); it starts again when interrupted.

Run: python benchmarks/learning/matrix.py --tasks HalfCheetah-v5 --algorithms flame sac \
         --seeds 3 --steps 100000 --jobs 2 --results benchmarks/results/halfcheetah-100k
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from aggregate import bootstrap, interquartile_mean, probability_of_improvement
from provenance import provenance

from flame_ext.loggers import read_evaluations
from flame_ext.plots import plot_learning_curves

# The installed command: `python -m` in a checkout would import its sources, which have no kernels.
FLAME_EXT = str(Path(sysconfig.get_path("scripts")) / "flame-ext")

Evaluations = dict[str, list[Any]]  # columns of one run's evaluations.csv
Curves = dict[tuple[str, str], list[Evaluations]]  # by task and algorithm, one per seed


@dataclass(frozen=True)
class Run:
    """One cell of the matrix."""

    task: str
    algorithm: str
    seed: int

    @property
    def name(self) -> str:
        """File-system name."""
        return f"{self.task.replace('/', '_')}-{self.algorithm}-s{self.seed}"


def train(run: Run, arguments: argparse.Namespace) -> Path:
    """Trains, resumes or skips one run; returns its directory."""
    directory = Path(arguments.runs) / run.name
    if _last_step(directory) >= arguments.steps:
        return directory
    if (directory / "checkpoint" / "manifest.json").exists():
        command = [FLAME_EXT, "train", "--resume", str(directory)]
    else:
        # Without a checkpoint nothing of it can be continued.
        shutil.rmtree(directory, ignore_errors=True)
        Path(arguments.runs).mkdir(parents=True, exist_ok=True)
        _provenance_file(directory).write_text(json.dumps(provenance(), indent=1) + "\n")
        command = _start(run, arguments, directory)
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with directory.with_suffix(".log").open("a") as log:
        environment = {**os.environ, **threads}
        command += ["--steps", str(arguments.steps)]
        subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)
    return directory


def _start(run: Run, arguments: argparse.Namespace, directory: Path) -> list[str]:
    common = [run.task, "--seed", str(run.seed), "--run-dir", str(directory)]
    common += [f"--set={option}" for option in arguments.set]
    if run.algorithm == "sb3-sac":
        return [sys.executable, str(Path(__file__).with_name("sb3_sac.py")), *common]
    what = ["--algorithm", run.algorithm, "--preset", arguments.preset]
    return [FLAME_EXT, "train", *common, *what]


def _provenance_file(directory: Path) -> Path:
    return directory.with_suffix(".provenance.json")


def _last_step(directory: Path) -> float:
    try:
        steps: list[float] = read_evaluations(directory)["step"]
    except FileNotFoundError:
        return 0
    return steps[-1] if steps else 0


def report(directories: dict[Run, Path], arguments: argparse.Namespace) -> None:
    """Copies the curves and their provenance, draws the figures, writes and prints the tables."""
    results = Path(arguments.results)
    results.mkdir(parents=True, exist_ok=True)
    origins = {}
    for run, directory in directories.items():
        shutil.copy(directory / "evaluations.csv", results / f"{run.name}.csv")
        shutil.copy(directory / "config.json", results / f"{run.name}.json")
        origins[run.name] = json.loads(_provenance_file(directory).read_text())
    (results / "provenance.json").write_text(json.dumps(origins, indent=1) + "\n")
    for task in arguments.tasks:
        runs = [d for run, d in directories.items() if run.task == task]
        plot_learning_curves(runs, results / f"{task.replace('/', '_')}.png")
    lines = ["| task | algorithm | seeds | last | per seed | mean of last 10 % | best | minutes |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
    curves = {
        (task, algorithm): [
            read_evaluations(directories[Run(task, algorithm, seed)])
            for seed in range(arguments.seeds)
        ]
        for task in arguments.tasks
        for algorithm in arguments.algorithms
    }
    lines += [_table_row(*cell, runs, arguments.steps) for cell, runs in curves.items()]
    lines += ["", *_comparison(curves, arguments)]
    (results / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _comparison(curves: Curves, arguments: argparse.Namespace) -> list[str]:
    """Every algorithm against the baseline, pooled over tasks."""
    last = {
        algorithm: np.array(
            [[c["mean_return"][-1] for c in curves[task, algorithm]] for task in arguments.tasks]
        )
        for algorithm in arguments.algorithms
    }
    base = last.get(arguments.baseline)
    if base is None or base.mean(1).min() <= 0:
        return []  # a ratio to a negative return says nothing
    lines = [
        f"Last return divided by {arguments.baseline}'s mean on the task; 95 % stratified "
        "bootstrap intervals.",
        "",
        "| algorithm | IQM | probability of improvement |",
        "| --- | --- | --- |",
    ]
    for algorithm, scores in last.items():
        iqm = bootstrap(interquartile_mean, scores / base.mean(1, keepdims=True))
        better = bootstrap(probability_of_improvement, scores, base)
        lines.append(f"| {algorithm} | {iqm} | {better} |")
    return lines


def _table_row(task: str, algorithm: str, runs: list[Evaluations], steps: int) -> str:
    minutes = np.array([run["wall_time"][-1] / 60 for run in runs])
    returns = [np.array(run["mean_return"]) for run in runs]
    last = np.array([r[-1] for r in returns])
    tail = np.array(
        [
            r[np.array(run["step"]) > 0.9 * steps].mean()
            for r, run in zip(returns, runs, strict=True)
        ]
    )
    best = np.array([r.max() for r in returns])
    cells = [
        task,
        algorithm,
        str(len(runs)),
        f"{last.mean():.0f} +- {last.std():.0f}",
        " ".join(f"{value:.0f}" for value in last),
        f"{tail.mean():.0f} +- {tail.std():.0f}",
        f"{best.mean():.0f} +- {best.std():.0f}",
        f"{minutes.mean():.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Trains what is missing, then reports."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=["HalfCheetah-v5"])
    parser.add_argument("--algorithms", nargs="+", default=["flame", "sac"])
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 .. N-1")
    parser.add_argument("--baseline", default="sac", help="what the others are compared with")
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--preset", default="default")
    parser.add_argument("--set", nargs="*", default=[], help="options as KEY=VALUE for every run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--runs", default="runs/matrix", help="where the runs live")
    parser.add_argument("--results", required=True, help="where the report goes")
    arguments = parser.parse_args()
    matrix = [
        Run(task, algorithm, seed)
        for seed in range(arguments.seeds)
        for task in arguments.tasks
        for algorithm in arguments.algorithms
    ]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        finished = list(pool.map(lambda run: train(run, arguments), matrix))
    report(dict(zip(matrix, finished, strict=True)), arguments)


if __name__ == "__main__":
    main()
