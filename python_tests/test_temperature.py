"""The temperature follows its target as PyTorch's Adam would move it, and survives a checkpoint."""

from __future__ import annotations

import math

import pytest
import torch
from small_agents import make_agent, make_batch

from flame_ext.config import make_config
from flame_ext.temperature import MAX_ALPHA, MIN_ALPHA, Temperature

ACT = 3


def make_temperature(algorithm: str = "sac", **options: object) -> Temperature:
    return Temperature(make_config(algorithm, overrides=options), ACT)


@pytest.mark.parametrize(("excess", "direction"), [(5.0, -1), (-5.0, 1)])
def test_it_falls_when_entropy_exceeds_its_target(excess: float, direction: int) -> None:
    temperature = make_temperature()
    before = temperature.log_alpha
    temperature.step(temperature.target_entropy + excess, None)
    assert (temperature.log_alpha - before) * direction > 0


def test_it_follows_the_effective_sample_size_within_bounds() -> None:
    temperature = make_temperature("diffusion", target_ess=0.25)
    before = temperature.log_alpha
    temperature.step(None, 0.9)
    assert temperature.log_alpha < before
    temperature.log_alpha = 50.0
    temperature.step(None, 0.1)
    assert temperature.alpha == pytest.approx(MAX_ALPHA)
    temperature.log_alpha = -50.0
    temperature.step(None, 0.9)
    assert temperature.alpha == pytest.approx(MIN_ALPHA)


def test_without_a_measurement_it_stays() -> None:
    temperature = make_temperature()
    before = temperature.log_alpha
    temperature.step(None, 0.5)
    assert temperature.log_alpha == before


def test_its_steps_are_adams() -> None:
    temperature = make_temperature(alpha_learning_rate=0.03)
    log_alpha = torch.tensor(temperature.log_alpha, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([log_alpha], lr=0.03)
    for step in range(20):
        entropy = 4 * math.sin(step) - 3
        temperature.step(entropy, None)
        log_alpha.grad = torch.tensor(entropy - temperature.target_entropy).double()
        adam.step()
    assert temperature.log_alpha == pytest.approx(log_alpha.item(), rel=1e-5)


def test_a_restored_temperature_goes_on_bit_equal() -> None:
    first, second = make_temperature(), make_temperature()
    for _ in range(3):
        first.step(-1.5, None)
    second.load_state_dict(first.state_dict())
    for temperature in (first, second):
        temperature.step(0.5, None)
    assert first.log_alpha == second.log_alpha


@pytest.mark.parametrize(("interval", "first"), [(1, [2, 4]), (4, [4, 8]), (5, [6, 10])])
def test_the_temperature_moves_once_per_interval_of_critic_updates(
    interval: int, first: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = make_agent("sac", policy_delay=2, alpha_interval=interval)
    steps: list[int] = []
    monkeypatch.setattr(agent.temperature, "step", lambda *_: steps.append(agent.updates))
    for _ in range(40):
        agent.update(make_batch())
    assert steps[:2] == first
    assert len(steps) == 40 // max(interval, 2)


def test_it_starts_where_it_is_told() -> None:
    temperature = Temperature(make_config("sac", overrides={"initial_alpha": 0.3}), 3)
    assert temperature.alpha == pytest.approx(0.3)
