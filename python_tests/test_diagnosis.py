"""What `flame-ext diagnose` measures of a run."""

import dataclasses
import hashlib
import math
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.wrappers import TimeLimit
from small_agents import OBS, make_agent
from small_envs import Counting
from small_runs import TASK, TINY

from flame_ext import cli, diagnosis
from flame_ext import value_bias as value_bias_module
from flame_ext.diagnosis import diagnose
from flame_ext.trainer import Trainer
from flame_ext.value_bias import Episode, ValueBias, measure_value_bias, play_episodes

UNEVALUATED = {**TINY, "eval_interval": 0}


def trained(run_dir: Path, algorithm: str = "flame", **options: object) -> Path:
    config = {**UNEVALUATED, **options}
    Trainer(TASK, algorithm=algorithm, config=config, run_dir=run_dir).run(total_steps=80)
    return run_dir


@pytest.mark.parametrize(
    ("algorithm", "options", "own", "others"),
    [
        ("flame", {}, {"entropy, exact", "squared residual at (0, 1)"}, {"entropy"}),
        (
            "flame",
            {"reweighting_weight": 0, "embedding_dim": 8, "normalize_observations": True},
            {"distance to actions of 4 steps"},
            {"squared residual at r = t"},
        ),
        (
            "flame-r",
            {},
            {"entropy, 4 steps, log-det", "squared residual at r = t"},
            {"entropy, exact", "squared residual at (0, 1)"},
        ),
        ("sac", {}, {"entropy"}, {"entropy, exact"}),
        ("diffusion", {}, {"standard deviation of actions"}, {"entropy"}),
    ],
)
def test_measures_what_the_algorithm_has(
    tmp_path: Path, algorithm: str, options: dict, own: set, others: set
) -> None:
    figures = diagnose(trained(tmp_path / "run", algorithm, **options), states=50)
    assert own <= figures.keys()
    assert not others & figures.keys()
    assert all(map(math.isfinite, figures.values()))
    assert figures["Q of the best of 16 over the mean"] >= 0


def test_what_it_measures_is_the_policy(tmp_path: Path) -> None:
    trainer = Trainer(
        TASK, config={**UNEVALUATED, "reverse_kl_weight": 0}, run_dir=tmp_path / "run"
    )
    trainer.run(total_steps=40)
    actor = trainer.agent.actor
    with torch.no_grad():
        actor.network.flat.zero_()  # u = 0: an action is its noise, clipped
    trainer.save()
    figures = diagnose(tmp_path / "run", states=400)
    normal_entropy = 2 * 0.5 * math.log(2 * math.pi * math.e)
    for name in ("exact", "4 steps, log-det", "4 steps, Hutchinson", "trace of one step"):
        assert figures[f"entropy, {name}"] == pytest.approx(normal_entropy, abs=0.15)
    assert figures["distance to actions of 16 steps"] == 0
    assert figures["share of folded samples"] == 0
    # P(|N(0, 1)| > 0.98), and the deviation of a clipped N(0, 1).
    assert figures["share of actions at the bounds"] == pytest.approx(0.327, abs=0.02)
    assert figures["standard deviation of actions"] == pytest.approx(0.718, abs=0.03)


def test_leaves_the_run_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tmp_path / "run")

    def contents() -> dict[Path, str]:
        files = [path for path in run.rglob("*") if path.is_file()]
        return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    before = contents()
    assert cli.main(["diagnose", str(run), "--states", "20"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split()[0] == "alpha"
    assert before == contents()
    assert cli.main(["diagnose", str(tmp_path / "none")]) == 2


def test_a_run_without_an_id_takes_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    Trainer(lambda: gymnasium.make(TASK, num_goals=3), config=UNEVALUATED, run_dir=run).run(80)
    assert cli.main(["diagnose", str(run)]) == 2
    assert cli.main(["diagnose", str(run), "--env", TASK, "--states", "20"]) == 0
    assert "alpha" in capsys.readouterr().out


class Paying(gymnasium.Env):
    """One unit of reward per step; ends after `length` steps."""

    observation_space = gymnasium.spaces.Box(-1, 1, (1,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def __init__(self, length: int) -> None:
        self.length = length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(1, np.float32), 1.0, self.steps == self.length, False, {}


def value_bias(run_dir: Path, env: object, value: float, **options: object) -> ValueBias | None:
    """With critics that say `value` of everything, at gamma = 0.9."""
    config = {**UNEVALUATED, "gamma": 0.9, "entropy_in_target": False, **options}
    trainer = Trainer(env, algorithm="sac", config=config, run_dir=run_dir)
    with torch.no_grad():
        trainer.agent.critics.flat.zero_()
        trainer.agent.critics.layers()[-1].bias.fill_(value)
    return measure_value_bias(play_episodes(trainer, seed=0), gamma=0.9)


def test_values_of_a_terminating_episode(tmp_path: Path) -> None:
    bias = value_bias(tmp_path / "run", lambda: Paying(20), 3.0, reward_scale=2.0)
    after = 2 * (1 - 0.9 ** np.arange(20, 0, -1)) / (1 - 0.9)
    assert bias.value == pytest.approx(3)
    assert bias.discounted_return == pytest.approx(after.mean())
    assert bias.error == pytest.approx(np.sqrt(((3 - after) ** 2).mean()))


def test_values_of_an_episode_that_is_cut_off(tmp_path: Path) -> None:
    """It goes on with the last state's value, and the last 30 steps, which lean on it, are out."""
    bias = value_bias(tmp_path / "run", lambda: TimeLimit(Paying(10**9), 60), 12.0)
    share = 0.9 ** np.arange(60, 30, -1)
    assert bias.discounted_return == pytest.approx((10 * (1 - share) + 12 * share).mean())
    assert value_bias(tmp_path / "short", lambda: TimeLimit(Paying(10**9), 30), 12.0) is None


def test_returns_are_soft_from_the_next_step_on() -> None:
    episode = Episode(rewards=[1.0, 2.0, 4.0], entropies=[10.0, 20.0, 30.0], end_value=8.0)
    last = 4 + 0.5 * 8
    middle = 2 + 0.5 * (30 + last)
    np.testing.assert_allclose(episode.returns(0.5), [1 + 0.5 * (20 + middle), middle, last])


def test_entropies_count_where_the_critics_learn_them(tmp_path: Path) -> None:
    plain, soft = (
        value_bias(tmp_path / str(on), lambda: Paying(20), 0.0, entropy_in_target=on)
        for on in (False, True)
    )
    assert soft.discounted_return != pytest.approx(plain.discounted_return, abs=1e-3)


def test_returns_are_in_the_environments_units(tmp_path: Path) -> None:
    def env() -> gymnasium.Env:
        return Paying(20)

    run = tmp_path / "run"
    Trainer(env, config={**UNEVALUATED, "reward_scale": 0.5}, run_dir=run).run(total_steps=80)
    assert diagnose(run, env=env, states=20)["return of an episode"] == pytest.approx(20)


def test_episodes_are_played_by_the_policy_that_is_valued(tmp_path: Path) -> None:
    """The best of `target_particles`, as in the TD target."""
    trainer = Trainer(TASK, config=UNEVALUATED, run_dir=tmp_path / "run")
    values = []
    for particles in (1, 16):
        trainer.config = dataclasses.replace(trainer.config, target_particles=particles)
        values.append([episode.values[0] for episode in play_episodes(trainer, seed=0)])
    single, best = np.array(values)
    assert (best >= single).mean() > 0.9
    assert best.mean() > single.mean()


@pytest.mark.parametrize(("both", "end"), [(False, 7.0), (True, 0.0)])
def test_the_value_of_a_cut_off_state_is_of_its_last_observation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, both: bool, end: float
) -> None:
    """And one that is terminated as well has none."""

    class Ending(Counting):
        def step(self, action):  # type: ignore[no-untyped-def]
            obs, reward, _, truncated, info = super().step(action)
            return obs, reward, both and truncated, truncated, info

    def act(_, obs, __):  # type: ignore[no-untyped-def]
        return np.zeros((len(obs), 1), np.float32), obs[:, 0], np.zeros(len(obs), np.float32)

    monkeypatch.setattr(value_bias_module, "_act", act)
    trainer = Trainer(Ending, algorithm="sac", config=TINY, run_dir=tmp_path / "run")
    for episode in play_episodes(trainer, seed=0):
        assert episode.values == list(range(7))
        assert (episode.end_value, episode.truncated) == (end, not both)


def test_values_are_compared_at_the_discount_that_the_critics_learn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gammas: list[float] = []
    monkeypatch.setattr(diagnosis, "measure_value_bias", lambda _, gamma: gammas.append(gamma))
    config = {**TINY, "eval_interval": 0, "gamma": 0.9, "settle_after": 40, "settled_horizon": 2}
    Trainer(TASK, config=config, run_dir=tmp_path / "run").run(total_steps=80)
    diagnosis.diagnose(tmp_path / "run", states=20)
    assert gammas == [pytest.approx(0.95)]


def test_the_best_of_several_is_held_against_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = make_agent()
    values = torch.arange(16.0).expand(4, 16)
    monkeypatch.setattr(agent.critics, "candidate_q_min", lambda *_: values)
    with torch.no_grad():
        figures = diagnosis._policy(agent, torch.zeros(4, OBS), torch.Generator().manual_seed(0))
    assert figures["Q of the best of 16 over the mean"] == 7.5
    assert figures["standard deviation of Q over actions"] == pytest.approx(4.7610, abs=1e-4)


def test_a_state_that_is_cut_off_has_its_entropy(tmp_path: Path) -> None:
    """Negative here, as the policy is narrow."""
    config = {**TINY, "entropy_in_target": True, "initial_alpha": 2.0}
    trainer = Trainer(Counting, algorithm="sac", config=config, run_dir=tmp_path / "run")
    with torch.no_grad():
        trainer.agent.critics.flat.zero_()
        trainer.agent.actor.network.flat.zero_()
        trainer.agent.actor.network.layers()[-1].bias[0, 1] = -9  # std = exp(-5)
    # -log pi is 0.5 log(2 pi e) - 5 = -3.6 on average
    ends = [episode.end_value for episode in play_episodes(trainer, seed=0)]
    assert all(-10 < end < -4 for end in ends)
    assert all(sum(e.entropies) < 0 for e in play_episodes(trainer, seed=0))


def test_episodes_may_have_an_environment_of_their_own(tmp_path: Path) -> None:
    """As in training: an environment that cannot be copied."""

    class Single(Counting):
        def __deepcopy__(self, memo: object) -> None:
            raise RuntimeError("holds a socket")

    options = {**TINY, "num_envs": 1, "eval_interval": 0}
    run = tmp_path / "run"
    Trainer(Single(), config=options, run_dir=run, eval_env=Counting).run(60)
    figures = diagnose(run, env=Single(), eval_env=lambda: TimeLimit(Counting(), 4), states=20)
    assert figures["return of an episode"] == 4
