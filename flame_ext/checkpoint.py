"""Checkpoints as safetensors and JSON: everything a run depends on, and nothing that executes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flame_ext.errors import RunDirectoryError

CHECKPOINT_DIR = "checkpoint"
_STATE_FILE, _MANIFEST_FILE = "state.safetensors", "manifest.json"


def write_checkpoint(
    run_dir: Path, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]
) -> None:
    """Replaces the run's checkpoint; an interruption leaves either the old or the new one.

    Args:
        run_dir: The run directory.
        tensors: Named tensors.
        manifest: JSON-serialisable values.
    """
    temporary, final, old = (run_dir / f"{CHECKPOINT_DIR}{end}" for end in (".tmp", "", ".old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, temporary / _STATE_FILE)
    except SafetensorError as error:  # as on a full disk
        raise OSError(f"cannot write {temporary / _STATE_FILE}: {error}") from error
    (temporary / _MANIFEST_FILE).write_text(json.dumps(manifest, indent=1, default=_to_json))
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    temporary.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def has_checkpoint(run_dir: Path) -> bool:
    """Whether the run can be resumed."""
    return _checkpoint_dir(run_dir) is not None


def _checkpoint_dir(run_dir: Path) -> Path | None:
    places = (run_dir / CHECKPOINT_DIR, run_dir / f"{CHECKPOINT_DIR}.old")
    return next((p for p in places if (p / _MANIFEST_FILE).is_file()), None)


def read_checkpoint(run_dir: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the manifest of the run's checkpoint.

    Raises:
        RunDirectoryError: If there is none, or it is damaged.
    """
    place = _checkpoint_dir(run_dir)
    if place is None:
        raise RunDirectoryError(_why_none(run_dir))
    try:
        manifest = json.loads((place / _MANIFEST_FILE).read_text())
        return load_file(place / _STATE_FILE), manifest
    except (SafetensorError, json.JSONDecodeError, FileNotFoundError) as error:
        raise RunDirectoryError(f"the checkpoint in {place} is damaged: {error}") from error


def _why_none(run_dir: Path) -> str:
    if not run_dir.exists():
        return f"there is no {run_dir}"
    if has_checkpoint(run_dir.parent):
        return f"{run_dir} is a part of the run in {run_dir.parent}: give that directory"
    return (
        f"no checkpoint in {run_dir}: a run writes one every checkpoint_interval steps and at its "
        "end. Start it again without resume, in a new directory."
    )


def _to_json(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON-serialisable")


def arrays_to_tensors(prefix: str, arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    """Numpy arrays as tensors named ``prefix.name``."""
    return {f"{prefix}.{name}": torch.from_numpy(np.array(a)) for name, a in arrays.items()}


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors renamed to ``prefix.name``."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def strip_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors named ``prefix.name``, as ``name``."""
    start = f"{prefix}."
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
