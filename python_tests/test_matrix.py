"""What the learning benchmark does with runs that are there already."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from flame_ext.config import make_config
from flame_ext.errors import RunDirectoryError
from flame_ext.run_dir import held

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "learning"))
import matrix
from report import Run

RUN = Run("module.of:Task-v0", "flame", 0)
ARGUMENTS = argparse.Namespace(preset="default", set=[], steps=100)


def test_a_run_that_is_at_work_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "progress.csv").touch()
    with held(tmp_path / "run"), pytest.raises(RunDirectoryError, match="another trainer"):
        matrix.train(RUN, tmp_path / "run", ARGUMENTS)
    assert (tmp_path / "run" / "progress.csv").exists()


def test_a_checkpoint_that_was_being_replaced_is_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command))
    checkpoint = tmp_path / "run" / "checkpoint.old"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    settings = make_config("flame", overrides={"total_steps": 100}).to_dict()
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings))
    matrix.train(RUN, tmp_path / "run", ARGUMENTS)
    assert commands[0][1:3] == ["train", "--resume"]
    assert checkpoint.exists()


def test_runs_of_dotted_ids_have_files_of_their_own(tmp_path: Path) -> None:
    names = {matrix._provenance(tmp_path / Run(RUN.task, a, 0).name) for a in ("flame", "sac")}
    assert len(names) == 2
