"""Networks, arrays and the measure of accuracy that the tests of the native kernels share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from flame_ext import _core
from flame_ext.agent import Agent
from flame_ext.critics import Critics
from flame_ext.networks import FlatMLP, MeanVelocityNet
from flame_ext.reference import stratify
from flame_ext.replay import Batch
from flame_ext.scalars import to_floats

Array = np.ndarray[Any, np.dtype[np.float32]]
EPS = float(np.finfo(np.float32).eps)
ACTIVATIONS = ("relu", "silu", "mish")
POLICIES = [
    (1, 1, 1, (8,)),
    (2, 3, 6, (33, 24)),
    (31, 17, 6, (64, 64, 64)),
    (257, 17, 6, (256, 256)),
    (33, 376, 17, (48, 48)),
]


def draw(*shape: int, scale: float = 1.0, seed: int = 0) -> Array:
    rng = np.random.default_rng([seed, *shape])
    return (scale * rng.standard_normal(shape)).astype(np.float32)


def shaken(net: FlatMLP, seed: int = 0) -> FlatMLP:
    """Moves gains, offsets and biases off their initial values, padding stays zero."""
    with torch.no_grad():
        noise = torch.Generator().manual_seed(seed)
        for layer in net.layers():
            for x in (layer.bias, layer.gain, layer.offset):
                if x is not None:
                    x.add_(0.2 * torch.randn(x.shape, generator=noise))
    return net


def make_network(sizes: tuple[int, ...], members: int, layer_norm: bool) -> FlatMLP:
    """A network of widths `sizes` whose first input block has two columns."""
    net = FlatMLP(
        (2, sizes[0] - 2),
        sizes[1:-1],
        sizes[-1],
        members=members,
        activation="silu",
        layer_norm=layer_norm,
        generator=torch.Generator().manual_seed(3),
    )
    return shaken(net)


def make_critics(
    obs_dim: int, action_dim: int, hidden: tuple[int, ...], seed: int = 1, **options: Any
) -> Critics:
    generator = torch.Generator().manual_seed(seed)
    critics = Critics(obs_dim, action_dim, hidden, generator=generator, **options)
    shaken(critics, seed)
    return critics


def make_policy(
    obs_dim: int, action_dim: int, hidden: tuple[int, ...], seed: int = 2, **options: Any
) -> MeanVelocityNet:
    generator = torch.Generator().manual_seed(seed)
    net = MeanVelocityNet(obs_dim, action_dim, hidden, generator=generator, **options)
    shaken(net, seed)
    return net


def to_tensors(dtype: torch.dtype, *arrays: Array) -> list[torch.Tensor]:
    return [torch.from_numpy(x).to(dtype) for x in arrays]


def philox_candidates(
    seed: int, shape: tuple[int, ...], *, stream: int = 0, offset: int = 0
) -> torch.Tensor:
    """The uniforms of the native reweighting's stratified candidates, ``(B, K, A)``."""
    uniform, order = (
        torch.from_numpy(_core.philox_uniform(seed, s, offset, math.prod(shape))).view(shape)
        for s in (stream, stream + 2)
    )
    return stratify(uniform.double(), order).clamp(max=1 - EPS / 4)


def _greatest(x: torch.Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def assert_as_accurate(
    ours: Array | torch.Tensor, single: torch.Tensor, exact: torch.Tensor
) -> None:
    """Our error is at most twice that of float32 PyTorch, both against float64.

    The floor of a few roundings of the largest value covers results that float32 PyTorch happens to
    get nearly exact.
    """
    ours, single, wanted = (torch.as_tensor(x).detach().cpu() for x in (ours, single, exact))
    assert ours.shape == wanted.shape
    assert wanted.isfinite().all()
    error, theirs = (_greatest(x.double() - wanted.double()) for x in (ours, single))
    floor = 4 * EPS * _greatest(wanted)
    assert error <= 2 * theirs + floor, f"error {error:.3g}, float32 PyTorch has {theirs:.3g}"


def critic_updates(agent: Agent, batch: Batch, updates: int = 1) -> dict[str, float]:
    """The backend's critic updates with what the agent hands over."""
    scalars = agent.backend.critic_updates(
        agent.actor,
        agent.critics,
        agent.target_critics,
        agent.optimizers["critics"],
        batch,
        agent.temperature.alpha,
        agent.generator,
        updates,
    )
    return to_floats(scalars)
