"""The directory of a run: a new one, and one process at a time in it."""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flame_ext.checkpoint import has_checkpoint
from flame_ext.errors import RunDirectoryError

if sys.platform != "win32":
    import fcntl


def new_run_dir(run_dir: str | Path | None, env_id: str | None, algorithm: str, seed: int) -> Path:
    """Creates the run's directory; None makes one below ``runs/``.

    Raises:
        RunDirectoryError: If it exists and is not empty.
    """
    if run_dir is None:
        task = re.sub(r"[^\w.-]+", "_", env_id or "custom")
        stamp = time.strftime("%Y%m%d-%H%M%S")
        return _make_unused(Path("runs") / f"{task}-{algorithm}-s{seed}-{stamp}")
    path = Path(run_dir)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        otherwise = "delete it"
        if has_checkpoint(path):
            command = f"flame-ext train --resume {shlex.quote(str(path))}"
            otherwise = f"continue its run with Trainer.resume({str(path)!r}).run() or `{command}`"
        raise RunDirectoryError(f"{path} exists already; give a new run_dir, or {otherwise}")
    path.mkdir(parents=True, exist_ok=True)
    return path


def _make_unused(path: Path) -> Path:
    """Makes the directory, numbered if another run began in the same second."""
    made, number = path, 1
    while True:
        try:
            made.mkdir(parents=True)
            return made
        except FileExistsError:
            number += 1
            made = path.with_name(f"{path.name}-{number}")


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Keeps other trainers out of the directory; does nothing where the system has no such locks.

    Raises:
        RunDirectoryError: If another trainer, of this process or another one, is at work in it.
    """
    if sys.platform == "win32":
        yield
        return
    directory = os.open(run_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunDirectoryError(
                f"another trainer is at work in {run_dir}: wait for its end or stop it, or give "
                "another run_dir"
            ) from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(directory)
