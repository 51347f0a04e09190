"""Agents and batches small enough for a test."""

import torch

from flame_ext.agent import Agent
from flame_ext.backends import TorchBackend
from flame_ext.config import make_config
from flame_ext.replay import Batch

OBS, ACT = 5, 3
SMALL = {
    "hidden_sizes": (16, 16),
    "embedding_dim": 0,
    "batch_size": 32,
    "policy_batch_size": 16,
    "policy_delay": 1,
    "num_candidates": 8,
}


def make_agent(algorithm: str = "flame", seed: int = 0, **options: object) -> Agent:
    config = make_config(algorithm, overrides={**SMALL, **options})
    return Agent(config, OBS, ACT, TorchBackend(), seed=seed)


def make_batch(seed: int = 0, discount: float = 0.99) -> Batch:
    g = torch.Generator().manual_seed(seed)
    return Batch(
        obs=torch.randn(32, OBS, generator=g),
        action=2 * torch.rand(32, ACT, generator=g) - 1,
        reward=torch.randn(32, generator=g),
        discount=torch.full((32,), discount),
        next_obs=torch.randn(32, OBS, generator=g),
    )
