"""Trains a matrix of (tasks x algorithms x seeds) and reports it.

Every run is one `flame-ext train` process on one thread; as many run side by side as `--jobs`.
Finished runs are kept and interrupted ones resume, so the command can be repeated until the matrix
is complete. Evaluation curves, settings, the learning-curve figure and a table go to `--results`.

Run: python benchmarks/learning/matrix.py --tasks HalfCheetah-v5 --algorithms flame sac \
         --seeds 3 --steps 100000 --jobs 2 --results benchmarks/results/halfcheetah-100k
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flame_ext.plots import plot_learning_curves

PACKAGES = ("flame_ext", "torch", "numpy", "gymnasium", "mujoco")


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
        what = ["--resume", str(directory)]
    else:
        # Without a checkpoint nothing of it can be continued.
        shutil.rmtree(directory, ignore_errors=True)
        what = [run.task, "--algorithm", run.algorithm, "--preset", arguments.preset]
        what += ["--seed", str(run.seed), "--run-dir", str(directory)]
        what += [f"--set={option}" for option in arguments.set]
    command = [sys.executable, "-m", "flame_ext.cli", "train", *what, "--steps"]
    Path(arguments.runs).mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with (Path(arguments.runs) / f"{run.name}.log").open("a") as log:
        subprocess.run(
            [*command, str(arguments.steps)],
            check=True,
            stdout=log,
            stderr=log,
            env={**os.environ, **threads},
        )
    return directory


def _last_step(directory: Path) -> int:
    curve = directory / "evaluations.csv"
    rows = _rows(curve) if curve.exists() else []
    return int(rows[-1]["step"]) if rows else 0


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def report(directories: dict[Run, Path], arguments: argparse.Namespace) -> None:
    """Copies the curves, writes the provenance, draws the figure and prints the table."""
    results = Path(arguments.results)
    results.mkdir(parents=True, exist_ok=True)
    for run, directory in directories.items():
        shutil.copy(directory / "evaluations.csv", results / f"{run.name}.csv")
        shutil.copy(directory / "config.json", results / f"{run.name}.json")
    (results / "provenance.json").write_text(json.dumps(provenance(), indent=1) + "\n")
    plot_learning_curves(list(directories.values()), results / "learning_curves.png")
    lines = ["| task | algorithm | seeds | last | per seed | mean of last 10 % | best |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for task in arguments.tasks:
        for algorithm in arguments.algorithms:
            lines.append(_table_row(task, algorithm, directories, arguments.steps))
    (results / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _table_row(task: str, algorithm: str, directories: dict[Run, Path], steps: int) -> str:
    curves = [
        np.array(
            [(float(r["step"]), float(r["mean_return"])) for r in _rows(d / "evaluations.csv")]
        )
        for run, d in directories.items()
        if (run.task, run.algorithm) == (task, algorithm)
    ]
    last = np.array([c[-1, 1] for c in curves])
    tail = np.array([c[c[:, 0] > 0.9 * steps, 1].mean() for c in curves])
    best = np.array([c[:, 1].max() for c in curves])
    cells = [
        task,
        algorithm,
        str(len(curves)),
        f"{last.mean():.0f} +- {last.std():.0f}",
        " ".join(f"{value:.0f}" for value in last),
        f"{tail.mean():.0f} +- {tail.std():.0f}",
        f"{best.mean():.0f} +- {best.std():.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def provenance() -> dict[str, object]:
    """Commit, versions, machine and command behind a result."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "commit": commit,
        "command": " ".join(["python", *sys.argv]),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": f"{model}, {os.cpu_count()} cores",
    }


def main() -> None:
    """Trains what is missing, then reports."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=["HalfCheetah-v5"])
    parser.add_argument("--algorithms", nargs="+", default=["flame", "sac"])
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 .. N-1")
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
