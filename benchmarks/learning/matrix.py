"""Trains a matrix of (tasks x algorithms x seeds) and reports it.

Every run is one `flame-ext train` process on one thread; as many run side by side as `--jobs`.
When a run ends, its curve, its settings and its provenance (commit, versions, machine, command, as
of its start) go to `--results`, where figures and tables are drawn anew from the finished runs.
Runs that are finished there or in `--runs` are kept and interrupted ones resume, so the command can
be repeated, on another machine too, until the matrix is complete. The algorithm `sb3-sac` is
Stable-Baselines3's SAC (`sb3_sac.py`); it starts again when interrupted.

Run: python benchmarks/learning/matrix.py --tasks HalfCheetah-v5 --algorithms flame sac \
         --seeds 3 --steps 100000 --jobs 2 --runs runs/compare --results runs/compare-results
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from aggregate import bootstrap, interquartile_mean, probability_of_improvement, ratio
from numpy.typing import NDArray
from provenance import provenance

from flame_ext.cli import parse_overrides
from flame_ext.config import make_config
from flame_ext.loggers import read_evaluations
from flame_ext.plots import plot_learning_curves

# The installed command: `python -m` in a checkout would import its sources, which have no kernels.
FLAME_EXT = str(Path(sysconfig.get_path("scripts")) / "flame-ext")

# Files of a run's directory that are kept, and the endings of their copies.
RESULT_FILES = {"evaluations.csv": ".csv", "config.json": ".json"}
# Options that committed runs are older than, with the values at which those runs were made.
YOUNGER_OPTIONS = {
    "policy_tau": 1.0,
    "embedding_dim": 0,
    "embedding_learning_rate": 1e-3,
    "embedding_tau": 0.002,
}
_SEPARATE = "give other --runs and --results"

Evaluations = dict[str, list[Any]]  # columns of one run's evaluations.csv
Curves = dict[tuple[str, str], dict[int, Evaluations]]  # by task and algorithm, then by seed


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


class Matrix:
    """The runs of one command and the results of those that are finished."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.results = Path(arguments.results)
        self.results.mkdir(parents=True, exist_ok=True)
        Path(arguments.runs).mkdir(parents=True, exist_ok=True)
        self.runs = [
            Run(task, algorithm, seed)
            for seed in range(arguments.seeds)
            for task in arguments.tasks
            for algorithm in arguments.algorithms
        ]
        self._finished: set[Run] = set()
        self._reporting = threading.Lock()

    def directory(self, run: Run) -> Path:
        """Where the run lives."""
        return Path(self.arguments.runs) / run.name

    def complete(self, run: Run) -> None:
        """Trains or resumes a run, keeps its results and reports."""
        train(run, self.directory(run), self.arguments)
        with self._reporting:
            self.keep(run)
            report(self)

    @property
    def finished(self) -> list[Run]:
        """The runs that are complete, in order."""
        return [run for run in self.runs if run in self._finished]

    @property
    def unfinished(self) -> list[Run]:
        """The others."""
        return [run for run in self.runs if run not in self._finished]

    def find_finished(self) -> None:
        """Keeps the results of what is complete in `--runs` or, from elsewhere, in `--results`."""
        self._take_back()
        for run in self.runs:
            steps = read_steps(self.directory(run))
            if steps and steps[-1] >= self.arguments.steps:
                check_request(run, self.directory(run), self.arguments)
                if steps[-1] > self.arguments.steps:
                    raise SystemExit(
                        f"{self.directory(run)} has {steps[-1]:.0f} steps: {_SEPARATE}"
                    )
                self.keep(run)

    def keep(self, run: Run) -> None:
        """Copies a finished run's curve, settings and provenance to the results."""
        directory = self.directory(run)
        for name, ending in RESULT_FILES.items():
            shutil.copy(directory / name, self.results / (run.name + ending))
        origins = {**self._origins(), run.name: json.loads(_provenance(directory).read_text())}
        text = json.dumps(dict(sorted(origins.items())), indent=1)
        self._origins_file.write_text(text + "\n")
        # A run writes its last evaluation before its process ends, so its files alone do not tell.
        self._finished.add(run)

    def _take_back(self) -> None:
        """Makes run directories, without checkpoints, of results that were kept elsewhere."""
        origins = self._origins()
        for run in self.runs:
            directory = self.directory(run)
            if run.name in origins and not directory.exists():
                directory.mkdir()
                for name, ending in RESULT_FILES.items():
                    shutil.copy(self.results / (run.name + ending), directory / name)
                _provenance(directory).write_text(json.dumps(origins[run.name], indent=1) + "\n")

    @property
    def _origins_file(self) -> Path:
        return self.results / "provenance.json"

    def _origins(self) -> dict[str, Any]:
        file = self._origins_file
        return json.loads(file.read_text()) if file.exists() else {}


def train(run: Run, directory: Path, arguments: argparse.Namespace) -> None:
    """Trains a run to the end, from its checkpoint where it has one."""
    if (directory / "checkpoint" / "manifest.json").exists():
        check_request(run, directory, arguments)
        command = [FLAME_EXT, "train", "--resume", str(directory)]
    else:
        # Without a checkpoint nothing of it can be continued.
        shutil.rmtree(directory, ignore_errors=True)
        _provenance(directory).write_text(json.dumps(provenance(), indent=1) + "\n")
        command = _start(run, arguments, directory)
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with directory.with_suffix(".log").open("a") as log:
        environment = {**os.environ, **threads}
        command += ["--steps", str(arguments.steps)]
        subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)


def _start(run: Run, arguments: argparse.Namespace, directory: Path) -> list[str]:
    common = [run.task, "--seed", str(run.seed), "--run-dir", str(directory)]
    common += [f"--set={option}" for option in options_of(run.algorithm, arguments.set)]
    common += ["--preset", arguments.preset]
    if run.algorithm == "sb3-sac":
        return [sys.executable, str(Path(__file__).with_name("sb3_sac.py")), *common]
    return [FLAME_EXT, "train", *common, "--algorithm", run.algorithm]


def options_of(algorithm: str, given: list[str]) -> list[str]:
    """Of KEY=VALUE for every run and ALGORITHM:KEY=VALUE, those of an algorithm as KEY=VALUE."""
    return [option for owner, option in map(split_owner, given) if owner in ("", algorithm)]


def split_owner(option: str) -> tuple[str, str]:
    """The algorithm that an option is for, or "", and KEY=VALUE."""
    name, equals, value = option.partition("=")
    owner, _, key = name.rpartition(":")
    return owner, key + equals + value


def _provenance(directory: Path) -> Path:
    return directory.with_suffix(".provenance.json")


def read_steps(directory: Path) -> list[float]:
    """Environment steps at which a run was evaluated."""
    try:
        steps: list[float] = read_evaluations(directory)["step"]
    except FileNotFoundError:
        return []
    return steps


def report(matrix: Matrix) -> None:
    """Draws the figures, writes and prints the tables of the finished runs."""
    finished = matrix.finished
    check_settings({run: matrix.directory(run) for run in finished})
    for task in matrix.arguments.tasks:
        runs = [matrix.directory(run) for run in finished if run.task == task]
        if runs:
            stem = task.replace("/", "_")
            plot_learning_curves(runs, matrix.results / f"{stem}.png")
            plot_learning_curves(runs, matrix.results / f"{stem}-time.png", "wall_time")
    curves: Curves = {}
    for run in finished:
        evaluations = read_evaluations(matrix.directory(run))
        curves.setdefault((run.task, run.algorithm), {})[run.seed] = evaluations
    lines = ["Return, mean +- standard deviation over seeds; minutes of wall time.", ""]
    lines += ["| task | algorithm | seeds | last | per seed | mean of last 10 % | best | minutes |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
    lines += [
        _table_row(*cell, list(runs.values()), matrix.arguments.steps)
        for cell, runs in curves.items()
    ]
    lines += ["", *_comparison(curves, matrix.arguments)]
    (matrix.results / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)


def check_settings(directories: dict[Run, Path]) -> None:
    """Runs of one algorithm must have the same settings, or a row would mix two."""
    settings: dict[str, tuple[Run, dict[str, Any]]] = {}
    for run, directory in directories.items():
        own = YOUNGER_OPTIONS | json.loads((directory / "config.json").read_text())
        first, others = settings.setdefault(run.algorithm, (run, own))
        if different := _differences(own, others):
            raise SystemExit(f"{run.name} and {first.name} differ in {different}: {_SEPARATE}")


def check_request(run: Run, directory: Path, arguments: argparse.Namespace) -> None:
    """A run that is taken as finished must be one that this command would make."""
    if run.algorithm == "sb3-sac":
        return  # its settings are the library's own
    overrides = parse_overrides(options_of(run.algorithm, arguments.set))
    wanted = json.loads(
        json.dumps(make_config(run.algorithm, arguments.preset, overrides).to_dict())
    )
    own = YOUNGER_OPTIONS | json.loads((directory / "config.json").read_text())
    if different := _differences(own, wanted):
        raise SystemExit(f"{directory} differs from this command in {different}: {_SEPARATE}")


def _differences(own: dict[str, Any], other: dict[str, Any]) -> str:
    # The harness itself sees to the steps, which older runs do not record; others record options
    # that are gone, two that were off in all of them and one that embeddings alone obeyed.
    ignored = {"total_steps", "assessment_episodes", "policy_gradient_clip"}
    if own["embedding_dim"] == 0:
        ignored.add("embedding_interval")
    keys = sorted((own.keys() | other.keys()) - ignored)
    return ", ".join(key for key in keys if own.get(key) != other.get(key))


def _comparison(curves: Curves, arguments: argparse.Namespace) -> list[str]:
    """Every algorithm against the baseline, pooled over tasks; the seeds that all of them have."""
    cells = [(task, a) for task in arguments.tasks for a in arguments.algorithms]
    seeds = sorted(set.intersection(*(set(curves.get(cell, {})) for cell in cells)))
    if not seeds or arguments.baseline not in arguments.algorithms:
        return []
    tails = {
        algorithm: np.array(
            [
                [_tail_mean(curves[task, algorithm][seed], arguments.steps) for seed in seeds]
                for task in arguments.tasks
            ]
        )
        for algorithm in arguments.algorithms
    }
    base = tails[arguments.baseline]
    if base.mean(1).min() <= 0:
        return [f"No ratios: {arguments.baseline} has a mean return that is not positive."]
    lines = [
        f"Mean return of the last 10 % divided by {arguments.baseline}'s on the task, seeds "
        f"{', '.join(map(str, seeds))}; 95 % "
        "stratified bootstrap intervals.",
        "",
        "| algorithm | IQM | probability of improvement |",
        "| --- | --- | --- |",
    ]
    for algorithm, scores in tails.items():
        if algorithm == arguments.baseline:  # one draw of its seeds on both sides of the ratio
            iqm = bootstrap(lambda own: interquartile_mean(ratio(own, own)), scores)
        else:
            iqm = bootstrap(lambda own, b: interquartile_mean(ratio(own, b)), scores, base)
        better = bootstrap(probability_of_improvement, scores, base)
        lines.append(f"| {algorithm} | {iqm} | {better} |")
    return lines


def _tail_mean(run: Evaluations, steps: int) -> float:
    """Mean return over the evaluations of the last 10 %: one alone says little."""
    returns = np.array(run["mean_return"])
    return float(returns[np.array(run["step"]) > 0.9 * steps].mean())


def _spread(values: NDArray[np.float64]) -> str:
    """Mean and standard deviation over seeds (that of a sample); one seed has none."""
    deviation = f" +- {values.std(ddof=1):.0f}" if len(values) > 1 else ""
    return f"{values.mean():.0f}{deviation}"


def _table_row(task: str, algorithm: str, runs: list[Evaluations], steps: int) -> str:
    minutes = np.array([run["wall_time"][-1] / 60 for run in runs])
    returns = [np.array(run["mean_return"]) for run in runs]
    last = np.array([r[-1] for r in returns])
    tail = np.array([_tail_mean(run, steps) for run in runs])
    best = np.array([r.max() for r in returns])
    cells = [
        task,
        algorithm,
        str(len(runs)),
        _spread(last),
        " ".join(f"{value:.0f}" for value in last),
        _spread(tail),
        _spread(best),
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
    parser.add_argument(
        "--set",
        nargs="*",
        action="extend",
        default=[],
        help="options as KEY=VALUE for every run, ALGORITHM:KEY=VALUE for those of one algorithm",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    parser.add_argument("--runs", help="where the runs live (default: runs/ and --results' name)")
    parser.add_argument("--results", required=True, help="where the report goes")
    arguments = parser.parse_args()
    arguments.runs = arguments.runs or str(Path("runs") / Path(arguments.results).name)
    owners = {owner for owner, _ in map(split_owner, arguments.set)}
    if unknown := owners - {"", *arguments.algorithms}:
        parser.error(f"--set names {', '.join(sorted(unknown))}, which is not in --algorithms")
    matrix = Matrix(arguments)
    matrix.find_finished()
    if matrix.finished:
        report(matrix)
    if not arguments.report_only:
        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(matrix.complete, matrix.unfinished))


if __name__ == "__main__":
    main()
