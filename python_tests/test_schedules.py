"""What changes as a run goes on."""

from pathlib import Path

import pytest
import torch
from small_agents import make_agent
from small_runs import TINY

from flame_ext import Trainer
from flame_ext.config import make_config
from flame_ext.schedules import discount


@pytest.mark.parametrize("embedding_dim", [0, 8])
@pytest.mark.parametrize(
    ("options", "falling", "rates"),
    [
        (
            {"policy_learning_rate": 2e-3, "final_policy_learning_rate": 2e-4},
            {"actor"},
            [2e-3, 1.1e-3, 2e-4, 2e-4],
        ),
        (
            {"embedding_learning_rate": 2e-3, "settle_after": 100, "settled_embedding_rate": 0.1},
            {"state_encoder", "pair_encoder"},
            [2e-3, 2e-3, 2e-4, 2e-4],
        ),
    ],
)
def test_a_learning_rate_falls(
    options: dict[str, float], falling: set[str], rates: list[float], embedding_dim: int
) -> None:
    agent = make_agent(embedding_dim=embedding_dim, **options)
    for steps, rate in zip((0, 50, 100, 150), rates, strict=True):
        agent.set_progress(steps, 100)
        for name, optimizer in agent.optimizers.items():
            wanted = rate if name in falling else 1e-3
            assert optimizer.param_groups[0]["lr"] == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"settle_after": None}, [0.99, 0.99, 0.99]),
        ({"settle_after": 100}, [0.99, 0.99, 0.995]),
        ({"settle_after": 0}, [0.995, 0.995, 0.995]),
        ({"settle_after": 100, "settled_horizon": 10}, [0.99, 0.99, 0.999]),
        ({"settle_after": 100, "settled_horizon": 1}, [0.99, 0.99, 0.99]),
        ({"settle_after": 100, "gamma": 1}, [1, 1, 1]),
    ],
)
def test_a_settled_run_has_a_longer_horizon(options: dict[str, float], wanted: list[float]) -> None:
    config = make_config(overrides=options)
    assert [discount(config, steps) for steps in (0, 99, 100)] == pytest.approx(wanted)


def test_a_run_learns_with_the_discount_of_its_step(tmp_path: Path) -> None:
    settling = {"gamma": 0.9, "settle_after": 20}
    trainer = Trainer("Pendulum-v1", config={**TINY, **settling}, run_dir=tmp_path / "run")
    for steps, gamma in ((20, 0.9), (40, 0.95)):
        trainer.run(steps)
        batch = trainer.sample(4, torch.Generator().manual_seed(0))
        torch.testing.assert_close(batch.discount, torch.full((4,), gamma))
