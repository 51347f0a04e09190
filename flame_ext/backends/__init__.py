"""Who computes the whole steps of training, and the operators of `flame_ext.ops`."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from flame_ext.backends.torch import TorchBackend
from flame_ext.config import Config
from flame_ext.errors import BackendUnavailableError, check_choice

__all__ = ["BACKENDS", "Backend", "BackendName", "make_backend"]

BackendName = Literal["auto", "torch", "cpu", "cuda"]
BACKENDS: tuple[str, ...] = get_args(BackendName)

Backend = TorchBackend


def make_backend(name: str, device: torch.device, config: Config) -> Backend:
    """The backend that trains on `device`; only ``auto`` chooses by itself.

    Raises:
        BackendUnavailableError: If this build or machine lacks the backend.
    """
    check_choice("backend", name, BACKENDS)
    if name in ("auto", "torch"):
        return TorchBackend()
    raise BackendUnavailableError(
        f"backend={name!r} is not part of this build; use backend='torch' or 'auto'"
    )
