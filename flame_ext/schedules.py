"""What changes as a run goes on: learning rates that fall, a discount that rises."""

from __future__ import annotations

from flame_ext.config import Config


def learning_rates(config: Config, steps: int, total_steps: int) -> dict[str, float]:
    """Of the networks that learn, by name, after `steps` environment steps."""
    policy = config.policy_learning_rate
    if config.final_policy_learning_rate is not None:
        policy += min(steps / total_steps, 1) * (config.final_policy_learning_rate - policy)
    encoder = config.embedding_learning_rate
    if _has_settled(config, steps):
        encoder *= config.settled_embedding_rate
    return {
        "critics": config.critic_learning_rate,
        "actor": policy,
        "state_encoder": encoder,
        "pair_encoder": encoder,
    }


def discount(config: Config, steps: int) -> float:
    """Gamma after `steps` environment steps."""
    if not _has_settled(config, steps):
        return config.gamma
    return 1 - (1 - config.gamma) / config.settled_horizon


def _has_settled(config: Config, steps: int) -> bool:
    return config.settle_after is not None and steps >= config.settle_after
