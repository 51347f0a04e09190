"""Where networks and the replay buffer live."""

from __future__ import annotations

import re

import torch

from flame_ext.errors import BackendUnavailableError
from flame_ext.native import auto_backend


def resolve_device(device: str, backend: str) -> torch.device:
    """The device of a run; arguments as of `Trainer`.

    Raises:
        ValueError: For another kind of device.
        BackendUnavailableError: If PyTorch does not see it.
    """
    if device == "auto":
        # Networks of this size leave a GPU idle in PyTorch, launch after launch.
        chosen = auto_backend("cpu")[0] if backend == "auto" else backend
        on_cuda = chosen != "cpu" and torch.cuda.is_available()
        return torch.device("cuda" if on_cuda else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"device={device!r}: give auto, cpu, cuda or cuda:N")
    if device != "cpu" and not torch.cuda.is_available():
        raise BackendUnavailableError(
            f"device={device!r} was given but PyTorch sees no CUDA device; use device='cpu'"
        )
    return torch.device(device)
