"""What steps report: plain numbers, or tensors of no dimension that a device still computes."""

from __future__ import annotations

import torch
from torch import Tensor

Scalar = float | Tensor
Scalars = dict[str, Scalar]


def stacked(scalars: Scalars) -> Tensor:
    """All of them in float64, ``(n,)``, where the tensors among them are."""
    tensors = [x for x in scalars.values() if isinstance(x, Tensor)]
    like = torch.empty((), dtype=torch.float64, device=tensors[0].device if tensors else None)
    return torch.stack(
        [x.to(like) if isinstance(x, Tensor) else like.new_full((), x) for x in scalars.values()]
    )


def to_floats(scalars: Scalars) -> dict[str, float]:
    """Plain numbers, in one transfer from the device."""
    plain = {name: x for name, x in scalars.items() if isinstance(x, float)}
    if len(plain) == len(scalars):
        return plain
    return dict(zip(scalars, stacked(scalars).tolist(), strict=True))
