"""What a run feeds its agent, evaluates and keeps."""

import threading
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from small_runs import TASK, TINY, tiny
from torch import Tensor

import flame_ext
from flame_ext import trainer as trainer_module
from flame_ext.callbacks import FunctionCallback
from flame_ext.checkpoint import has_checkpoint, read_checkpoint
from flame_ext.trainer import Trainer

STANDARDISED = {**TINY, "normalize_observations": True}


class Far(gymnasium.Env):  # type: ignore[type-arg]
    """Observations far from standard, actions in [-2, 6]."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gymnasium.spaces.Box(-2, 6, (2,))

    def reset(self, *, seed=None, options=None):  # type: ignore[no-untyped-def]
        super().reset(seed=seed)
        self.steps = 0
        return self._obs(), {}

    def step(self, action):  # type: ignore[no-untyped-def]
        self.steps += 1
        return self._obs(), float(action[0]), False, self.steps == 7, {}

    def _obs(self) -> np.ndarray:
        normal = self.np_random.normal(size=2)
        return (normal * [50, 0.1] + [1000, -3]).astype(np.float32)


def observations(trainer: Trainer) -> Tensor:
    """Those of `Far` that were stored."""
    return trainer.replay.state_dict()["rows"][:, :2]


def test_the_saved_policy_is_the_one_that_was_evaluated(tmp_path: Path) -> None:
    """With its observations' standardisation, its box and the average over updates."""
    trainer = Trainer(Far, config=STANDARDISED, run_dir=tmp_path / "run")
    trainer.run(total_steps=160)
    obs = observations(trainer).numpy()
    noise = torch.zeros(len(obs), 1, 2)
    seen = trainer.to_agent(obs)
    unit = trainer.agent.act(seen, noise).numpy()
    saved = flame_ext.load(tmp_path / "run").act(obs, deterministic=True)
    np.testing.assert_allclose(saved, 2 + 4 * unit, atol=1e-3)
    critics = trainer.agent.critics
    with torch.no_grad():
        trained = trainer.agent.actor.best_action(critics, critics.observe(seen), noise).numpy()
    assert np.abs(trained - unit).max() > 1e-3


def test_what_the_agent_sees_is_standardised(tmp_path: Path) -> None:
    trainer = Trainer(Far, config=STANDARDISED, run_dir=tmp_path / "run")
    trainer.run(total_steps=400)
    batch = trainer.sample(2000, torch.Generator().manual_seed(0))
    for obs in (batch.obs, batch.next_obs, trainer.to_agent(observations(trainer).numpy())):
        torch.testing.assert_close(obs.mean(0), torch.zeros(2), rtol=0, atol=0.2)
        torch.testing.assert_close(obs.std(0), torch.ones(2), rtol=0, atol=0.2)


@pytest.mark.parametrize("call", ["explore", "act"])
def test_the_agent_acts_on_standardised_observations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    trainer = Trainer(Far, config=STANDARDISED, run_dir=tmp_path / "run")
    plain, seen = getattr(trainer.agent, call), []

    def note(obs: Tensor, *noise: Tensor) -> Tensor:
        seen.append(obs)
        return plain(obs, *noise)

    monkeypatch.setattr(trainer.agent, call, note)
    trainer.run(total_steps=120)
    assert torch.cat(seen).abs().max() <= 10  # about 1000 as the environment gives them


def test_every_observation_acted_on_is_counted(tmp_path: Path) -> None:
    trainer = Trainer(Far, config=STANDARDISED, run_dir=tmp_path / "run")
    trainer.run(total_steps=160)
    assert trainer.normalizer is not None
    state = trainer.normalizer.state_dict()
    assert state["count"] == 160
    torch.testing.assert_close(state["mean"], observations(trainer).double().mean(0))


def test_the_agent_acts_from_the_end_of_the_random_steps_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny(tmp_path / "run", eval_interval=0)
    explore, steps = trainer.agent.explore, []

    def note(obs: Tensor) -> Tensor:
        steps.append(trainer.global_step)
        return explore(obs)

    monkeypatch.setattr(trainer.agent, "explore", note)
    trainer.run(total_steps=50)
    assert steps == [40, 42, 44, 46, 48]


def test_first_actions_are_uniform_in_the_box(tmp_path: Path) -> None:
    trainer = tiny(tmp_path / "run", learning_starts=600, eval_interval=0)
    trainer.run(total_steps=600)
    action = trainer.replay.state_dict()["rows"][:, 4:6]
    shares = torch.histc(action, 4, -1, 1) / action.numel()
    assert (shares - 0.25).abs().max() < 0.05


def test_the_best_policy_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one of several that are equally good."""
    scores = iter([1.0, 3.0, 3.0, 2.0])
    monkeypatch.setattr(trainer_module, "run_episodes", lambda *_, **__: ((next(scores),), (1,)))
    best, kept = tmp_path / "run" / "best" / "policy.safetensors", []
    watch = FunctionCallback(lambda *_: kept.append(best.read_bytes()), event="evaluation")
    run = Trainer(TASK, config=TINY, run_dir=tmp_path / "run", callbacks=[watch])
    result = run.run(total_steps=320)
    assert len(set(kept[:3])) == 3
    assert kept[2] == kept[3]
    assert (result.best_return, result.final_return) == (3, 2)


def test_a_run_saves_itself_at_its_interval(tmp_path: Path) -> None:
    saved = []

    def look(trainer: Trainer, _: object) -> None:
        if has_checkpoint(trainer.run_dir):
            saved.append(read_checkpoint(trainer.run_dir)[1]["global_step"])

    watch = FunctionCallback(look, event="log")
    options = {**TINY, "checkpoint_interval": 60, "eval_interval": 0}
    Trainer(TASK, config=options, run_dir=tmp_path / "run", callbacks=[watch]).run(160)
    assert saved == [60, 60, 120]


def test_a_resumed_run_goes_on_counting_time(tmp_path: Path) -> None:
    first = tiny(tmp_path / "run").run(total_steps=80)
    resumed = Trainer.resume(tmp_path / "run")
    assert resumed.wall_time > 0
    assert resumed.wall_time == pytest.approx(first.wall_time, abs=0.5)


def test_a_run_anneals_the_policys_learning_rate(tmp_path: Path) -> None:
    trainer = tiny(tmp_path / "run", policy_learning_rate=1e-3, final_policy_learning_rate=0.0)
    trainer.run(total_steps=160)
    rate = trainer.agent.optimizers["actor"].param_groups[0]["lr"]
    assert rate == pytest.approx(1e-3 * 2 / 160)  # of the last step, of two environments


def test_evaluations_choose_among_their_particles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny(tmp_path / "run", eval_particles=3)
    act, shapes = trainer.agent.act, set()

    def note(obs: Tensor, noise: Tensor) -> Tensor:
        shapes.add(noise.shape)
        return act(obs, noise)

    monkeypatch.setattr(trainer.agent, "act", note)
    trainer.run(total_steps=40)
    assert shapes == {(2, 3, 2)}


def test_evaluation_and_training_share_no_episode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, starts = Trainer("Pendulum-v1", config=TINY, run_dir=tmp_path / "run"), []
    for env in (trainer.env, trainer.eval_env):

        def note(seed: int | None = None, reset: Any = env.reset) -> np.ndarray:
            starts.append(reset(seed))
            return starts[-1]

        monkeypatch.setattr(env, "reset", note)
    trainer.run(total_steps=40)
    assert len(np.unique(np.concatenate(starts), axis=0)) == 4


def test_a_run_may_be_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Trainer(TASK, config=TINY, run_dir=tmp_path / "run", progress=False).run(80)
    Trainer.resume(tmp_path / "run", progress=False).run(160)
    assert capsys.readouterr() == ("", "")
    Trainer.resume(tmp_path / "run").run(240)
    assert "return" in capsys.readouterr().err


def test_a_run_may_be_in_a_thread(tmp_path: Path) -> None:
    steps = []
    thread = threading.Thread(target=lambda: steps.append(tiny(tmp_path / "run").run(40).steps))
    thread.start()
    thread.join()
    assert steps == [40]
