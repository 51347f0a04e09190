"""The benchmark scripts run to their end, in miniature; what they measure is not looked at."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("bandit.py", "--seeds 1 --updates 3 --samples 500"),
        ("multigoal.py", "--seeds 1 --steps 8200 --episodes 8 --runs runs --output results"),
        (
            "learning/matrix.py",
            "--tasks Pendulum-v1 --algorithms flame sac --seeds 2 --steps 60 --results results "
            "--set hidden_sizes=16 learning_starts=40 batch_size=8 policy_batch_size=8 "
            "eval_episodes=1 eval_interval=0",
        ),
    ],
)
def test_script_runs(tmp_path: Path, script: str, arguments: str) -> None:
    command = [sys.executable, str(BENCHMARKS / script), *arguments.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
