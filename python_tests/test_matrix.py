"""What the learning benchmark does with runs that are there already."""

import argparse
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import matrix
import pytest
from report import Run

from flame_ext.checkpoint import has_checkpoint
from flame_ext.config import make_config
from flame_ext.errors import RunDirectoryError
from flame_ext.run_dir import held

RUN = Run("module.of:Task-v0", "flame", 0)
ARGUMENTS = argparse.Namespace(preset="default", set=[], steps=100)


def test_a_run_that_is_at_work_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "progress.csv").touch()
    with held(tmp_path / "run"), pytest.raises(RunDirectoryError, match="another trainer"):
        matrix.train(RUN, tmp_path / "run", ARGUMENTS, threading.Event())
    assert (tmp_path / "run" / "progress.csv").exists()


def test_a_checkpoint_that_was_being_replaced_is_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(matrix, "supervise", lambda command, *_: commands.append(command))
    checkpoint = tmp_path / "run" / "checkpoint.old"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    settings = make_config("flame", overrides={"total_steps": 100}).to_dict()
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings))
    matrix.train(RUN, tmp_path / "run", ARGUMENTS, threading.Event())
    assert commands[0][1:3] == ["train", "--resume"]
    assert checkpoint.exists()


def test_runs_of_dotted_ids_have_files_of_their_own(tmp_path: Path) -> None:
    names = {matrix._provenance(tmp_path / Run(RUN.task, a, 0).name) for a in ("flame", "sac")}
    assert len(names) == 2


def test_sigterm_stops_the_runs_with_checkpoints(tmp_path: Path) -> None:
    options = ["--set", "learning_starts=20", "log_interval=50", "hidden_sizes=[32]"]
    command = [sys.executable, matrix.__file__, "--tasks", "Pendulum-v1", "--algorithms", "sac"]
    command += ["--seeds", "1", "--runs", str(tmp_path), "--results", str(tmp_path / "results")]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as process:
        run = tmp_path / Run("Pendulum-v1", "sac", 0).name
        while not (run / "progress.csv").exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.1)
        process.terminate()
        assert process.wait(timeout=60) == 128 + signal.SIGINT
    with held(run):
        assert has_checkpoint(run)
    assert not (tmp_path / "results" / f"{run.name}.csv").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--tasks", "Pendulm-v1"], "did you mean 'Pendulum-v1'"),
        (["--tasks", "Pendulum-v1", "--set", "batchsize=3"], "did you mean 'batch_size'"),
    ],
)
def test_mistakes_are_named_in_one_line(tmp_path: Path, words: list[str], named: str) -> None:
    command = [sys.executable, matrix.__file__, "--runs", str(tmp_path), "--results", str(tmp_path)]
    options = [*words, "--algorithms", "sac", "--seeds", "1"]
    result = subprocess.run([*command, *options], capture_output=True, text=True)
    assert result.returncode > 0
    assert named in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
