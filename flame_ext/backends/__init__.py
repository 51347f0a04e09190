"""Who computes the whole steps of training, and the operators of `flame_ext.ops`."""

from __future__ import annotations

from typing import Literal, get_args

from flame_ext.backends.torch import TorchBackend
from flame_ext.errors import BackendUnavailableError, check_choice

__all__ = ["BACKENDS", "Backend", "BackendName", "make_backend", "resolve_operator"]

BackendName = Literal["auto", "torch", "cpu", "cuda"]
BACKENDS: tuple[str, ...] = get_args(BackendName)

Backend = TorchBackend


def make_backend(name: str) -> Backend:
    """The backend that trains; only ``auto`` chooses by itself.

    Raises:
        BackendUnavailableError: If this build or machine lacks the backend.
    """
    resolve_operator(name, "training step")
    return TorchBackend()


def resolve_operator(name: str, operator: str) -> str:
    """The backend that computes `operator`.

    Raises:
        BackendUnavailableError: If this build or machine lacks it; only ``auto`` chooses.
    """
    check_choice("backend", name, BACKENDS)
    if name in ("auto", "torch"):
        return "torch"
    raise BackendUnavailableError(
        f"backend={name!r} has no {operator} in this build; use backend='torch' or 'auto'"
    )
