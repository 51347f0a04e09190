"""The directory of a new run."""

from __future__ import annotations

import re
import time
from pathlib import Path

from flame_ext.errors import RunDirectoryError


def new_run_dir(run_dir: str | Path | None, env_id: str | None, algorithm: str, seed: int) -> Path:
    """Creates the run's directory; None makes one below ``runs/``.

    Raises:
        RunDirectoryError: If it exists and is not empty.
    """
    if run_dir is None:
        task = re.sub(r"[^\w.-]+", "_", env_id or "custom")
        stamp = time.strftime("%Y%m%d-%H%M%S")
        run_dir = Path("runs") / f"{task}-{algorithm}-s{seed}-{stamp}"
    path = Path(run_dir)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RunDirectoryError(
            f"{path} exists already; give a new run_dir, or continue that run with "
            f"Trainer.resume({str(path)!r}).run() or `flame-ext train --resume {path}`"
        )
    path.mkdir(parents=True, exist_ok=True)
    return path
