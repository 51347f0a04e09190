"""The benchmark scripts run to their end, in miniature; what they measure is not looked at."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("bandit.py", "--seeds 1 --updates 3 --samples 500"),
        ("roofline.py", "--hidden 16 --batch 8 --candidates 4 --rounds 2 --output results"),
        ("multigoal.py", "--seeds 1 --steps 8200 --episodes 8 --runs runs --output results"),
    ],
)
def test_script_runs(tmp_path: Path, script: str, arguments: str) -> None:
    done = run(tmp_path, script, arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


def test_matrix_goes_on_from_its_results_alone(tmp_path: Path) -> None:
    matrix = (
        "--tasks Pendulum-v1 --algorithms flame sac --steps 60 --results results --runs runs "
        "--set num_envs=7 hidden_sizes=16 learning_starts=40 batch_size=8 policy_batch_size=8 "
        "eval_episodes=1 eval_interval=0 flame:num_candidates=4 --seeds "
    )
    first = run(tmp_path, "learning/matrix.py", matrix + "1")
    assert "| Pendulum-v1 | flame | 1 |" in first.stdout, first.stderr[-2000:]
    curves = {path: path.read_text() for path in (tmp_path / "results").glob("*.csv")}
    assert len(curves) == 2
    own = [json.loads(path.with_suffix(".json").read_text()) for path in sorted(curves)]
    assert [(c["algorithm"], c["num_candidates"]) for c in own] == [("flame", 4), ("sac", 8)]

    foreign = run(tmp_path, "learning/matrix.py", matrix.replace("flame:", "flmae:") + "1")
    assert foreign.returncode != 0
    assert "--set names flmae, which is not in --algorithms" in foreign.stderr

    shutil.rmtree(tmp_path / "runs")
    report = run(tmp_path, "learning/report.py", "results")
    assert report.stdout == first.stdout[-len(report.stdout) :], report.stderr[-2000:]
    assert report.stdout == (tmp_path / "results" / "table.md").read_text()
    second = run(tmp_path, "learning/matrix.py", matrix + "2")
    assert "| Pendulum-v1 | sac | 2 |" in second.stdout, second.stderr[-2000:]
    # Wall times are among the columns: a run made anew would differ.
    assert all(path.read_text() == text for path, text in curves.items())

    shutil.rmtree(tmp_path / "runs")
    for seed in range(2):
        settings = tmp_path / "results" / f"Pendulum-v1-flame-s{seed}.json"
        settings.write_text(settings.read_text().replace('"gamma": 0.99', '"gamma": 0.9'))
        if seed == 0:
            mixed = run(tmp_path, "learning/report.py", "results")
            assert "Pendulum-v1-flame-s1 and Pendulum-v1-flame-s0 differ in gamma" in mixed.stderr
    third = run(tmp_path, "learning/matrix.py", matrix + "2")
    assert third.returncode != 0
    assert "differs from this command in gamma" in third.stderr


def run(folder: Path, script: str, arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a benchmark script in a folder."""
    command = [sys.executable, str(BENCHMARKS / script), *arguments.split()]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
