"""Who computes the whole steps of training, and the operators of `flame_ext.ops`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

# Under its own name it would be hidden by this package's module torch.
import torch as pytorch
from torch import Tensor

from flame_ext.backends.torch import TorchBackend
from flame_ext.errors import BackendUnavailableError, check_choice
from flame_ext.native import load_core

__all__ = ["BACKENDS", "Backend", "BackendName", "make_backend", "resolve_operator"]

BackendName = Literal["auto", "torch", "cpu", "cuda"]
BACKENDS: tuple[str, ...] = get_args(BackendName)

Backend = TorchBackend


def make_backend(name: str, device: pytorch.device) -> Backend:
    """The backend that trains on `device`; only ``auto`` chooses by itself.

    Raises:
        BackendUnavailableError: If this build or machine lacks the backend.
        ValueError: If the backend cannot compute on `device`.
    """
    check_choice("backend", name, BACKENDS)
    if name == "auto":
        name = _auto(device)
    if name == "torch":
        return TorchBackend()
    if name == "cpu":
        if device.type != "cpu":
            raise ValueError(f"backend='cpu' computes on the CPU, device={device} was given")
        return _make_cpu_backend()
    raise _unavailable(name, "training step")


def resolve_operator(name: str, operator: str, tensors: Sequence[Tensor]) -> str:
    """The backend that computes `operator` on `tensors`.

    Raises:
        BackendUnavailableError: If this build or machine lacks it; only ``auto`` chooses.
        ValueError: If the backend cannot compute with these tensors.
    """
    check_choice("backend", name, BACKENDS)
    if name == "torch":
        return name
    fits = all(x.device.type == "cpu" and x.dtype == pytorch.float32 for x in tensors)
    if name == "auto":
        return "cpu" if fits and _auto(pytorch.device("cpu")) == "cpu" else "torch"
    if name != "cpu":
        raise _unavailable(name, operator)
    if not fits:
        kinds = sorted({f"{x.dtype} on {x.device}" for x in tensors})
        raise ValueError(
            f"backend='cpu' computes {operator} with torch.float32 on the CPU; got "
            f"{', '.join(kinds)}"
        )
    _make_cpu_backend()
    return name


def _auto(device: pytorch.device) -> str:
    if device.type != "cpu":
        return "torch"
    try:
        load_core()
    except ImportError:
        return "torch"
    return "cpu"


def _make_cpu_backend() -> Backend:
    try:
        from flame_ext.backends.cpu import CpuBackend

        return CpuBackend()
    except ImportError as error:
        raise BackendUnavailableError(str(error)) from error


def _unavailable(name: str, what: str) -> BackendUnavailableError:
    return BackendUnavailableError(
        f"backend={name!r} has no {what} in this build; use backend='torch' or 'auto'"
    )
