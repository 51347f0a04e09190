"""What changes as a run goes on: learning rates that fall, a discount that rises."""

from __future__ import annotations

from flame_ext.config import Config


def learning_rates(config: Config, steps: int, total_steps: int) -> dict[str, float]:
    """Of the networks that learn, by name, after `steps` environment steps."""
    policy = config.policy_learning_rate
    if config.final_policy_learning_rate is not None:
        policy += min(steps / total_steps, 1) * (config.final_policy_learning_rate - policy)
    encoder = config.embedding_learning_rate / _settling(config, steps)
    return {
        "critics": config.critic_learning_rate,
        "actor": policy,
        "state_encoder": encoder,
        "pair_encoder": encoder,
    }


def discount(config: Config, steps: int) -> float:
    """Gamma after `steps` environment steps: its horizon 1 / (1 - gamma) grows as a run settles."""
    if config.final_gamma is None:
        return config.gamma
    return 1 - max((1 - config.gamma) / _settling(config, steps), 1 - config.final_gamma)


def _settling(config: Config, steps: int) -> float:
    """What divides the encoder's learning rate and multiplies the horizon."""
    return 1.0 if config.settle_start is None else max(steps / config.settle_start, 1.0)
