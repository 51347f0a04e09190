"""Constant tensors that are sent to a device once: sending them anew would keep it waiting."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def constant(values: tuple[float, ...], like: Tensor) -> Tensor:
    """The values ``(n,)`` with the dtype and on the device of `like`; not to be written to."""
    return _constant(values, like.dtype, like.device)


@functools.cache  # for good: a captured graph reads them
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # It outlives the caller's mode. torch.compile takes no keyword here.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)
