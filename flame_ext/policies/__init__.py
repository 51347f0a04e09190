"""The policies that the one MaxEnt loop can train."""

from __future__ import annotations

from collections.abc import Callable

import torch

from flame_ext.config import Config
from flame_ext.policies.base import Actor
from flame_ext.policies.diffusion import DiffusionActor
from flame_ext.policies.flow import FlowActor
from flame_ext.policies.gaussian import GaussianActor

__all__ = ["Actor", "make_actor"]

_ACTORS: dict[str, Callable[..., Actor]] = {
    "flame": FlowActor,
    "flame-r": FlowActor,
    "sac": GaussianActor,
    "diffusion": DiffusionActor,
}


def make_actor(
    config: Config, obs_dim: int, action_dim: int, generator: torch.Generator | None = None
) -> Actor:
    """Builds the actor of `config.algorithm` with freshly drawn weights."""
    return _ACTORS[config.algorithm](config, obs_dim, action_dim, generator)
