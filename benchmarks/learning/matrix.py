"""Trains a matrix of (tasks x algorithms x seeds) and reports it.

Every run is one `flame-ext train` process on one thread; as many run side by side as `--jobs`.
When a run ends, its curve, its settings and its provenance (commit, versions, machine, command, as
of its start) go to `--results`, which `report.py` then draws and tabulates anew. Ctrl-C and SIGTERM
stop the runs with a checkpoint. Runs that are finished there or in `--runs` are kept and
interrupted ones resume, so the command can be repeated, on another machine too, until the matrix is
complete. The algorithm `sb3-sac` is Stable-Baselines3's SAC (`sb3_sac.py`); it starts again when
interrupted.

Run: python benchmarks/learning/matrix.py --tasks HalfCheetah-v5 --algorithms flame sac \
         --seeds 3 --steps 100000 --jobs 2 --runs runs/compare --results runs/compare-results
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from provenance import provenance
from report import RESULT_FILES, Run, differences, read_results, read_settings, report

from flame_ext.checkpoint import has_checkpoint
from flame_ext.config import Config, make_config
from flame_ext.config_text import parse_overrides
from flame_ext.loggers import read_evaluations
from flame_ext.run_dir import held

# The installed command: `python -m` in a checkout would import its sources, which have no kernels.
FLAME_EXT = str(Path(sysconfig.get_path("scripts")) / "flame-ext")
_POLL_SECONDS = 0.5
_SEPARATE = "give other --runs and --results"


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
        self._reporting = threading.Lock()
        self._stopping = threading.Event()

    def directory(self, run: Run) -> Path:
        """Where the run lives."""
        return Path(self.arguments.runs) / run.name

    def length(self, run: Run) -> int:
        """Steps after which the run ends: all its environments make the last one."""
        num_envs = wanted_config(run, self.arguments).num_envs
        return math.ceil(self.arguments.steps / num_envs) * num_envs

    def find_unfinished(self) -> list[Run]:
        """Keeps the results of what `--runs` holds complete; returns the runs without any."""
        results = {run.name: result for run, result in read_results(self.results).items()}
        unfinished = []
        for run in self.runs:
            if run.name in results:
                check_request(run, self.results / f"{run.name}.json", self.arguments)
                if results[run.name].steps != self.length(run):
                    raise SystemExit(f"{self.results} has runs of other lengths: {_SEPARATE}")
            elif (steps := read_steps(self.directory(run))) < self.length(run):
                unfinished.append(run)
            elif steps > self.length(run):
                raise SystemExit(f"{self.directory(run)} has {steps:.0f} steps: {_SEPARATE}")
            else:
                check_request(run, self.directory(run) / "config.json", self.arguments)
                self.keep(run)
        return unfinished

    def run(self) -> None:
        """Completes the runs that are missing, `--jobs` side by side.

        Raises:
            KeyboardInterrupt: At Ctrl-C or SIGTERM, when the runs have saved checkpoints.
        """
        unfinished = self.find_unfinished()
        if len(unfinished) < len(self.runs):
            report(self.results, self.arguments.baseline)
        with ThreadPoolExecutor(self.arguments.jobs) as pool:
            try:
                list(pool.map(self.complete, unfinished))
            except KeyboardInterrupt:
                self._stopping.set()
                raise

    def complete(self, run: Run) -> None:
        """Trains or resumes a run, keeps its results and reports."""
        train(run, self.directory(run), self.arguments, self._stopping)
        with self._reporting:
            self.keep(run)
            report(self.results, self.arguments.baseline)

    def keep(self, run: Run) -> None:
        """Copies a finished run's curve, settings and provenance to the results."""
        directory = self.directory(run)
        for name, ending in RESULT_FILES.items():
            shutil.copy(directory / name, self.results / (run.name + ending))
        file = self.results / "provenance.json"
        origins = json.loads(file.read_text()) if file.exists() else {}
        origins[run.name] = json.loads(_provenance(directory).read_text())
        file.write_text(json.dumps(dict(sorted(origins.items())), indent=1) + "\n")


def train(
    run: Run, directory: Path, arguments: argparse.Namespace, stopping: threading.Event
) -> None:
    """Trains a run to the end, from its checkpoint where it has one."""
    if has_checkpoint(directory):
        check_request(run, directory / "config.json", arguments)
        command = [FLAME_EXT, "train", "--resume", str(directory)]
    else:
        if directory.exists():
            with held(directory):  # Without a checkpoint nothing of it can be continued.
                shutil.rmtree(directory)
        _provenance(directory).write_text(json.dumps(provenance(), indent=1) + "\n")
        command = _start(run, arguments, directory)
    command += ["--steps", str(arguments.steps)]
    supervise(command, directory.with_name(f"{directory.name}.log"), stopping)


def supervise(command: list[str], log_file: Path, stopping: threading.Event) -> None:
    """Waits for a run of one thread, or tells it to stop and waits until it has.

    Raises:
        SystemExit: If it failed or was stopped.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with log_file.open("a") as log:
        # A session of its own: a terminal's Ctrl-C would reach it beside our SIGTERM, and the
        # second signal cuts a run off without a checkpoint.
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    while process.poll() is None:
        if stopping.wait(_POLL_SECONDS):
            process.terminate()
            process.wait()
    if process.returncode:
        last = log_file.read_text().strip().rpartition("\n")[2]
        raise SystemExit(f"{log_file}: exit status {process.returncode}, {last}")


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
    return directory.with_name(f"{directory.name}.provenance.json")


def read_steps(directory: Path) -> float:
    """The environment step at which a run was evaluated last, or 0."""
    try:
        steps: list[float] = read_evaluations(directory)["step"]
    except FileNotFoundError:
        return 0
    return steps[-1] if steps else 0


def check_request(run: Run, settings: Path, arguments: argparse.Namespace) -> None:
    """A run that is gone on with or taken as finished must be one that this command would make."""
    if run.algorithm == "sb3-sac":
        return  # its settings are the library's own
    config = wanted_config(run, arguments)
    wanted = json.loads(json.dumps(config.to_dict() | {"total_steps": arguments.steps}))
    if different := differences(read_settings(settings), wanted):
        raise SystemExit(f"{settings} differs from this command in {different}: {_SEPARATE}")


def wanted_config(run: Run, arguments: argparse.Namespace) -> Config:
    """The options of the run; those of `sac` for Stable-Baselines3's."""
    overrides = parse_overrides(options_of(run.algorithm, arguments.set))
    algorithm = "sac" if run.algorithm == "sb3-sac" else run.algorithm
    return make_config(algorithm, arguments.preset, overrides)


def main() -> None:
    """Trains what is missing and reports after every run."""
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
    parser.add_argument("--runs", help="where the runs live (default: runs/ and --results' name)")
    parser.add_argument("--results", required=True, help="where the report goes")
    arguments = parser.parse_args()
    arguments.runs = arguments.runs or str(Path("runs") / Path(arguments.results).name)
    owners = {owner for owner, _ in map(split_owner, arguments.set)}
    if unknown := owners - {"", *arguments.algorithms}:
        parser.error(f"--set names {', '.join(sorted(unknown))}, which is not in --algorithms")
    matrix = Matrix(arguments)
    try:
        for run in matrix.runs:
            wanted_config(run, arguments)
    except ValueError as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        matrix.run()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
