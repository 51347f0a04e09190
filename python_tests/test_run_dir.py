"""A run's directory: never overwritten, one trainer at a time, no code in its files."""

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from small_runs import TASK, TINY, tiny

import flame_ext
from flame_ext import checkpoint
from flame_ext.errors import RunDirectoryError
from flame_ext.run_dir import new_run_dir
from flame_ext.trainer import Trainer


def test_directories_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("x")
    with pytest.raises(RunDirectoryError, match=r"exists already.*or delete it"):
        tiny(tmp_path / "run")
    with pytest.raises(RunDirectoryError, match=r"no checkpoint.* in a new directory"):
        Trainer.resume(tmp_path / "run")
    with pytest.raises(RunDirectoryError, match=r"there is no .*run/typo"):
        Trainer.resume(tmp_path / "run" / "typo")
    tiny(tmp_path / "a b").run(total_steps=2)
    for part in ("checkpoint", "best"):
        with pytest.raises(RunDirectoryError, match=r"part of the run in .*a b: give that"):
            Trainer.resume(tmp_path / "a b" / part)
    with pytest.raises(RunDirectoryError, match=r"exists already.*--resume '.*a b'"):
        tiny(tmp_path / "a b")


def test_runs_that_begin_in_one_second_get_directories_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "now")
    found = [new_run_dir(None, "Task-v0", "flame", 3) for _ in range(3)]
    name = "runs/Task-v0-flame-s3-now"
    assert found == [Path(name), Path(f"{name}-2"), Path(f"{name}-3")]


def test_a_directory_takes_one_trainer_at_a_time(tmp_path: Path) -> None:
    run, before_and_after = tmp_path / "run", []

    def intrude(trainer: Trainer, _: object) -> None:
        trainer.save()
        before_and_after.append((run / "evaluations.csv").read_bytes())
        with pytest.raises(RunDirectoryError, match="another trainer is at work"):
            Trainer.resume(run).run(total_steps=400)
        before_and_after.append((run / "evaluations.csv").read_bytes())

    watch = flame_ext.callbacks.FunctionCallback(intrude, event="evaluation")
    Trainer(TASK, config=TINY, run_dir=run, callbacks=[watch]).run(total_steps=80)
    before, after = before_and_after
    assert before == after
    assert Trainer.resume(run).run(total_steps=120).steps == 120, "it was not given back"


def test_a_hostile_checkpoint_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    tiny(run).run(total_steps=60)
    (run / "checkpoint" / "state.safetensors").write_bytes(b"\x80\x04cos\nsystem\n.")
    with pytest.raises(RunDirectoryError, match="damaged"):
        Trainer.resume(run)
    (run / "policy.safetensors").write_bytes(b"\x80\x04cos\nsystem\n.")
    with pytest.raises(RunDirectoryError, match="not a flame_ext policy"):
        flame_ext.load(run)


@pytest.mark.parametrize("gone", ["env_id", "config", "seed", "global_step", "replay.rows"])
def test_a_checkpoint_that_lacks_something_is_refused(tmp_path: Path, gone: str) -> None:
    run = tmp_path / "run"
    tiny(run).run(total_steps=60)
    tensors, manifest = checkpoint.read_checkpoint(run)
    for part in (tensors, manifest):
        part.pop(gone, None)  # type: ignore[attr-defined]
    checkpoint.write_checkpoint(run, tensors, manifest)
    with pytest.raises(RunDirectoryError, match=f"lacks '{gone.rpartition('.')[2]}'"):
        Trainer.resume(run)


def test_an_interrupted_save_leaves_one_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(step: int) -> None:
        checkpoint.write_checkpoint(tmp_path, {"x": torch.ones(1)}, {"step": step})

    def saved() -> dict[str, int]:
        return checkpoint.read_checkpoint(tmp_path)[1]

    def fill_the_disk(*_: object) -> None:
        raise SafetensorError("No space left on device")

    save(1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", fill_the_disk)
        with pytest.raises(OSError, match="cannot write"):
            save(2)
    assert saved() == {"step": 1}
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.old")  # killed between two renames
    assert saved() == {"step": 1}
    save(3)
    assert saved() == {"step": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_a_save_that_is_killed_before_its_last_rename_keeps_the_former_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.write_checkpoint(tmp_path, {"x": torch.ones(1)}, {"step": 1})
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if path.suffix == ".tmp":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.write_checkpoint(tmp_path, {"x": torch.ones(1)}, {"step": 2})
    assert checkpoint.read_checkpoint(tmp_path)[1] == {"step": 1}


@pytest.mark.parametrize("file", ["manifest.json", "state.safetensors"])
def test_a_checkpoint_cut_short_is_called_damaged(tmp_path: Path, file: str) -> None:
    checkpoint.write_checkpoint(tmp_path, {"x": torch.ones(9)}, {"step": 1})
    place = tmp_path / "checkpoint" / file
    place.write_bytes(place.read_bytes()[:-5])
    with pytest.raises(RunDirectoryError, match="is damaged"):
        checkpoint.read_checkpoint(tmp_path)
