"""Policy, critics and encoder of a configuration, with freshly drawn weights."""

from __future__ import annotations

from collections.abc import Callable

import torch

from flame_ext.config import Config
from flame_ext.critics import Critics
from flame_ext.embeddings import StateActionEncoder
from flame_ext.networks import FlatMLP
from flame_ext.policies.base import Actor
from flame_ext.policies.diffusion import DiffusionActor
from flame_ext.policies.flow import FlowActor
from flame_ext.policies.gaussian import GaussianActor

_ACTORS: dict[str, Callable[..., Actor]] = {
    "flame": FlowActor,
    "flame-r": FlowActor,
    "sac": GaussianActor,
    "diffusion": DiffusionActor,
}


def make_actor(
    config: Config, obs_dim: int, action_dim: int, generator: torch.Generator | None = None
) -> Actor:
    """Builds the actor of `config.algorithm`, which takes what `StateActionEncoder.observe` gives.

    Without embeddings that is the plain observation.
    """
    observed = obs_dim + config.embedding_dim
    return _ACTORS[config.algorithm](config, observed, action_dim, generator)


def make_critics(
    config: Config,
    obs_dim: int,
    action_dim: int,
    encoder: StateActionEncoder | None,
    generator: torch.Generator | None = None,
) -> Critics:
    """Builds the critics, which take what `encoder` observes, if there is one."""
    return Critics(
        obs_dim,
        action_dim,
        config.hidden_sizes,
        activation=config.critic_activation,
        layer_norm=config.critic_layer_norm,
        encoder=encoder,
        generator=generator,
    )


def make_encoder(
    config: Config, obs_dim: int, action_dim: int, generator: torch.Generator | None = None
) -> StateActionEncoder | None:
    """Builds the encoder; None where `Config.embedding_dim` is 0."""
    if config.embedding_dim == 0:
        return None
    return StateActionEncoder(
        obs_dim, action_dim, config.embedding_dim, config.hidden_sizes, generator=generator
    )


def deployed_networks(actor: Actor, critics: Critics) -> dict[str, FlatMLP]:
    """What a saved policy holds, by name."""
    networks: dict[str, FlatMLP] = {"actor": actor.network, "critics": critics}
    return networks if critics.encoder is None else networks | critics.encoder.networks()
