"""What steps report: plain numbers, or tensors of no dimension that a device still computes."""

from __future__ import annotations

import torch
from torch import Tensor

Scalar = float | Tensor
Scalars = dict[str, Scalar]


def to_floats(scalars: Scalars) -> dict[str, float]:
    """Plain numbers, in one transfer from the device."""
    tensors = {name: x for name, x in scalars.items() if isinstance(x, Tensor)}
    plain = {name: x for name, x in scalars.items() if not isinstance(x, Tensor)}
    return plain | dict(zip(tensors, stacked(list(tensors.values())).tolist(), strict=True))


def stacked(tensors: list[Tensor]) -> Tensor:
    """All of them ``(n,)`` in the widest dtype among them."""
    if not tensors:
        return torch.empty(0)
    widest = max(tensors, key=lambda x: x.dtype.itemsize)
    return torch.stack([x.to(widest) for x in tensors])
