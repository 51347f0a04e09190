"""What steps report: plain numbers, or tensors of no dimension that a device still computes."""

from __future__ import annotations

import torch
from torch import Tensor

Scalar = float | Tensor
Scalars = dict[str, Scalar]


def to_floats(scalars: Scalars) -> dict[str, float]:
    """Plain numbers, in one transfer from the device."""
    plain = {name: x for name, x in scalars.items() if not isinstance(x, Tensor)}
    names, values = stacked(scalars)
    return plain | dict(zip(names, values.tolist(), strict=True))


def stacked(scalars: Scalars) -> tuple[list[str], Tensor]:
    """Names and values ``(n,)`` of the tensors among them, in the widest dtype."""
    tensors = {name: x for name, x in scalars.items() if isinstance(x, Tensor)}
    if not tensors:
        return [], torch.empty(0)
    widest = max(tensors.values(), key=lambda x: x.dtype.itemsize)
    return list(tensors), torch.stack([x.to(widest) for x in tensors.values()])
