"""Figures and tables of a folder of results that `matrix.py` has filled.

Draws every task's learning curves against steps and against wall-clock time and writes and prints
`table.md`: returns per task and algorithm and, over the seeds that all algorithms have on all
tasks, the interquartile mean of the ratios to the baseline and the probability of improvement.

Run: python benchmarks/learning/report.py benchmarks/results/mujoco-250k
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from aggregate import bootstrap, interquartile_mean, probability_of_improvement, ratio
from numpy.typing import NDArray

from flame_ext.loggers import read_evaluations
from flame_ext.plots import plot_learning_curves

# Files of a run's directory that are kept, and the endings of their copies.
RESULT_FILES = {"evaluations.csv": ".csv", "config.json": ".json"}
# Options that committed runs are older than, with the values at which those runs were made.
_YOUNGER_OPTIONS = {
    "policy_tau": 1.0,
    "embedding_dim": 0,
    "embedding_learning_rate": 1e-3,
    "embedding_tau": 0.002,
    "matmul_precision": "float32",
}

Evaluations = dict[str, list[Any]]  # columns of one run's evaluations.csv


@dataclass(frozen=True, order=True)
class Run:
    """One cell of a matrix."""

    task: str
    algorithm: str
    seed: int

    @property
    def name(self) -> str:
        """File-system name."""
        return f"{self.task.replace('/', '_')}-{self.algorithm}-s{self.seed}"


@dataclass(frozen=True)
class Result:
    """A finished run's options and evaluations."""

    settings: dict[str, Any]
    evaluations: Evaluations

    @property
    def steps(self) -> float:
        """Length of the run in environment steps."""
        last: float = self.evaluations["step"][-1]
        return last

    @property
    def returns(self) -> NDArray[np.float64]:
        """Mean return of every evaluation."""
        return np.array(self.evaluations["mean_return"])

    @property
    def tail_mean(self) -> float:
        """Mean return over the evaluations of the last 10 %: one alone says little."""
        return float(self.returns[np.array(self.evaluations["step"]) > 0.9 * self.steps].mean())


Results = dict[Run, Result]


def read_results(folder: Path) -> Results:
    """The finished runs of a folder, in order.

    Raises:
        SystemExit: If runs of one algorithm have different settings, or runs different lengths: a
            row would mix two.
    """
    results: Results = {}
    with _run_directories(folder) as directories:
        for directory in directories:
            settings = read_settings(directory / "config.json")
            start, _, seed = directory.name.rpartition("-s")
            task = start.removesuffix(f"-{settings['algorithm']}")
            run = Run(task, settings["algorithm"], int(seed))
            results[run] = Result(settings, read_evaluations(directory))
    first: dict[str, Run] = {}
    for run, result in results.items():
        other = first.setdefault(run.algorithm, run)
        if different := differences(result.settings, results[other].settings):
            raise SystemExit(f"{folder}: {run.name} and {other.name} differ in {different}")
    if len(lengths := {result.steps for result in results.values()}) > 1:
        raise SystemExit(f"{folder}: runs of {sorted(lengths)} steps are mixed")
    return dict(sorted(results.items()))


def read_settings(file: Path) -> dict[str, Any]:
    """A run's options, those that it is older than included."""
    return _YOUNGER_OPTIONS | json.loads(file.read_text())


def differences(own: dict[str, Any], other: dict[str, Any]) -> str:
    """Names of the options in which two runs differ, or "" if they belong to one row."""
    # The length is looked at by itself, and older runs do not record it; others record options
    # that are gone, two that were off in all of them and one that embeddings alone obeyed.
    ignored = {"total_steps", "assessment_episodes", "policy_gradient_clip"}
    if own["embedding_dim"] == 0:
        ignored.add("embedding_interval")
    if own["algorithm"] == "sac":
        ignored.add("initial_action_std")  # a flow's alone
    own, other = _effective(own), _effective(other)
    keys = sorted((own.keys() | other.keys()) - ignored)
    return ", ".join(key for key in keys if own.get(key) != other.get(key))


def _effective(settings: dict[str, Any]) -> dict[str, Any]:
    """The options that decided something: a run that ends before it settles has no others."""
    settle_after = settings.get("settle_after")
    if settle_after is not None and settings["total_steps"] > settle_after:
        return settings
    return {name: value for name, value in settings.items() if not name.startswith("settle")}


def report(folder: Path, baseline: str) -> None:
    """Draws the figures, writes and prints the tables."""
    results = read_results(folder)
    with _run_directories(folder) as directories:
        named = {directory.name: directory for directory in directories}
        for task in {run.task: None for run in results}:
            runs = [named[run.name] for run in results if run.task == task]
            plot_learning_curves(runs, folder / f"{task}.png", title=task)
            plot_learning_curves(runs, folder / f"{task}-time.png", "wall_time", title=task)
    cells: dict[tuple[str, str], list[Result]] = {}
    for run, result in results.items():
        cells.setdefault((run.task, run.algorithm), []).append(result)
    lines = ["Return, mean +- standard deviation over seeds; minutes of wall time.", ""]
    lines += ["| task | algorithm | seeds | last | per seed | mean of last 10 % | best | minutes |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
    lines += [_table_row(*cell, runs) for cell, runs in cells.items()]
    lines += ["", *_comparison(results, baseline)]
    text = "\n".join(lines)
    (folder / "table.md").write_text(text + "\n")
    print(text, flush=True)


@contextmanager
def _run_directories(folder: Path) -> Iterator[list[Path]]:
    """The runs of a folder as run directories, which are links into it."""
    with tempfile.TemporaryDirectory() as scratch:
        directories = []
        for settings in sorted(folder.glob("*-s*.json")):
            directory = Path(scratch) / settings.stem
            directory.mkdir()
            for name, ending in RESULT_FILES.items():
                (directory / name).symlink_to(settings.with_suffix(ending).resolve())
            directories.append(directory)
        yield directories


def _comparison(results: Results, baseline: str) -> list[str]:
    """Every algorithm against the baseline, pooled over tasks; the seeds that all of them have."""
    tasks, algorithms = (
        list(dict.fromkeys(values))
        for values in zip(*((run.task, run.algorithm) for run in results), strict=True)
    )
    cells = [(task, algorithm) for task in tasks for algorithm in algorithms]
    seeds = sorted(
        set.intersection(
            *({run.seed for run in results if (run.task, run.algorithm) == cell} for cell in cells)
        )
    )
    if not seeds or baseline not in algorithms:
        return []
    tails = {
        algorithm: np.array(
            [[results[Run(task, algorithm, seed)].tail_mean for seed in seeds] for task in tasks]
        )
        for algorithm in algorithms
    }
    base = tails[baseline]
    if base.mean(1).min() <= 0:
        return [f"No ratios: {baseline} has a mean return that is not positive."]
    lines = [
        f"Mean return of the last 10 % divided by {baseline}'s on the task, seeds "
        f"{', '.join(map(str, seeds))}; 95 % "
        "stratified bootstrap intervals.",
        "",
        "| algorithm | IQM | probability of improvement |",
        "| --- | --- | --- |",
    ]
    for algorithm, scores in tails.items():
        if algorithm == baseline:  # one draw of its seeds on both sides of the ratio
            iqm = bootstrap(lambda own: interquartile_mean(ratio(own, own)), scores)
        else:
            iqm = bootstrap(lambda own, b: interquartile_mean(ratio(own, b)), scores, base)
        better = bootstrap(probability_of_improvement, scores, base)
        lines.append(f"| {algorithm} | {iqm} | {better} |")
    return lines


def _spread(values: NDArray[np.float64]) -> str:
    """Mean and standard deviation over seeds (that of a sample); one seed has none."""
    deviation = f" +- {values.std(ddof=1):.0f}" if len(values) > 1 else ""
    return f"{values.mean():.0f}{deviation}"


def _table_row(task: str, algorithm: str, results: list[Result]) -> str:
    minutes = np.array([result.evaluations["wall_time"][-1] / 60 for result in results])
    last = np.array([result.returns[-1] for result in results])
    cells = [
        task,
        algorithm,
        str(len(results)),
        _spread(last),
        " ".join(f"{value:.0f}" for value in last),
        _spread(np.array([result.tail_mean for result in results])),
        _spread(np.array([result.returns.max() for result in results])),
        f"{minutes.mean():.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Reports one folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="a folder that matrix.py has filled")
    parser.add_argument("--baseline", default="sac", help="what the others are compared with")
    arguments = parser.parse_args()
    if not any(arguments.results.glob("*-s*.json")):
        parser.error(f"{arguments.results} holds no finished run")
    report(arguments.results, arguments.baseline)


if __name__ == "__main__":
    main()
