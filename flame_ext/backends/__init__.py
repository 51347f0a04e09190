"""Who computes the whole steps of training, and the operators of `flame_ext.ops`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, get_args

# Under its own name it would be hidden by this package's module torch.
import torch as pytorch
from torch import Tensor

from flame_ext.backends.torch import TorchBackend
from flame_ext.errors import BackendUnavailableError, check_choice
from flame_ext.native import auto_backend, load_core

__all__ = ["BACKENDS", "Backend", "BackendName", "make_backend", "resolve_operator"]

BackendName = Literal["auto", "torch", "cpu", "cuda"]
BACKENDS: tuple[str, ...] = get_args(BackendName)

Backend = TorchBackend


def make_backend(name: str, device: pytorch.device) -> Backend:
    """The backend that trains on `device`; only ``auto`` chooses, and warns of a slow CPU.

    Raises:
        BackendUnavailableError: If this build or machine lacks the backend.
        ValueError: If the backend cannot compute on `device`.
    """
    check_choice("backend", name, BACKENDS)
    if name == "auto":
        name, reason = auto_backend(device.type)
        if (name, device.type) == ("torch", "cpu"):
            warnings.warn(f"training in PyTorch: {reason}", RuntimeWarning, stacklevel=3)
    if name == "torch":
        return TorchBackend()
    _require(name)
    if device.type != name:
        raise ValueError(f"backend={name!r} computes on a {name.upper()} device; got {device=!s}")
    if name == "cpu":
        from flame_ext.backends.cpu import CpuBackend

        return CpuBackend()
    from flame_ext.backends.cuda import CudaBackend

    return CudaBackend()


def resolve_operator(name: str, operator: str, tensors: Sequence[Tensor]) -> str:
    """The backend that computes `operator` on `tensors`.

    Raises:
        BackendUnavailableError: If this build or machine lacks it; only ``auto`` chooses.
        ValueError: If the backend cannot compute with these tensors.
    """
    check_choice("backend", name, BACKENDS)
    if name == "torch":
        return name
    wanted = "cpu" if name == "auto" else name
    fits = all(x.device.type == wanted and x.dtype == pytorch.float32 for x in tensors)
    if name == "auto":
        return "cpu" if fits and auto_backend("cpu")[0] == "cpu" else "torch"
    _require(name)
    if not fits:
        kinds = sorted({f"{x.dtype} on {x.device}" for x in tensors})
        raise ValueError(
            f"backend={name!r} computes {operator} with torch.float32 on a {name} device; got "
            f"{', '.join(kinds)}"
        )
    return name


def _require(name: str) -> None:
    """Raises unless this build and machine have the native backend."""
    try:
        load_core()
    except ImportError as error:
        raise BackendUnavailableError(str(error)) from error
    if name == "cuda":
        from flame_ext.backends.cuda import require_cuda

        require_cuda()
