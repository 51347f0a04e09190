"""What changes as a run goes on."""

from pathlib import Path

import pytest
import torch
from small_runs import TINY

from flame_ext import Trainer
from flame_ext.config import make_config
from flame_ext.schedules import discount


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, [0.99, 0.99, 0.99, 0.99]),
        ({"settle_start": 100}, [0.99, 0.99, 0.99, 0.99]),
        ({"final_gamma": 0.996}, [0.99, 0.99, 0.99, 0.99]),
        ({"settle_start": 100, "final_gamma": 0.996}, [0.99, 0.99, 0.995, 0.996]),
        ({"settle_start": 100, "final_gamma": 1}, [0.99, 0.99, 0.995, 0.999]),
        ({"settle_start": 100, "final_gamma": 1, "gamma": 1}, [1, 1, 1, 1]),
    ],
)
def test_the_horizon_grows_from_the_settlings_start_on(
    options: dict[str, float], wanted: list[float]
) -> None:
    config = make_config(overrides={"settle_start": None, "final_gamma": None, **options})
    assert [discount(config, steps) for steps in (0, 100, 200, 1000)] == pytest.approx(wanted)


def test_the_discount_does_not_fall() -> None:
    with pytest.raises(ValueError, match=r"final_gamma=0\.9 is below gamma=0\.99"):
        make_config(overrides={"final_gamma": 0.9})


def test_a_run_learns_with_the_discount_of_its_step(tmp_path: Path) -> None:
    settling = {"gamma": 0.9, "final_gamma": 0.98, "settle_start": 20}
    trainer = Trainer("Pendulum-v1", config={**TINY, **settling}, run_dir=tmp_path / "run")
    trainer.run(40)
    batch = trainer.sample(4, torch.Generator().manual_seed(0))
    torch.testing.assert_close(batch.discount, torch.full((4,), 0.95))
