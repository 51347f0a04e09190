"""The loop: files it leaves, resume, callbacks, errors, learning."""

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from small_envs import Counting
from small_runs import TASK, TINY, tiny

import flame_ext
from flame_ext import evaluate
from flame_ext import trainer as trainer_module
from flame_ext.callbacks import Callback
from flame_ext.checkpoint import read_checkpoint
from flame_ext.errors import (
    DivergenceError,
    EnvironmentDataError,
    FlameError,
    RunDirectoryError,
)
from flame_ext.interrupts import interrupts_between_steps
from flame_ext.trainer import Trainer


@pytest.mark.parametrize("algorithm", ["flame", "flame-r", "sac", "diffusion"])
def test_a_run_leaves_everything_a_user_expects(tmp_path: Path, algorithm: str) -> None:
    result = tiny(tmp_path / "run", algorithm).run(total_steps=160)
    assert result.steps == 160
    assert [e.step for e in result.evaluations] == [80, 160]
    assert all(len(e.returns) == 2 for e in result.evaluations)
    names = {p.name for p in result.run_dir.iterdir()}
    assert {"config.json", "progress.csv", "evaluations.csv", "tensorboard", "best"} <= names
    assert json.loads((result.run_dir / "config.json").read_text())["algorithm"] == algorithm
    policy = flame_ext.load(result.run_dir)
    assert policy.algorithm == algorithm
    assert policy.act(np.zeros(2), num_particles=3).shape == (2,)


@pytest.mark.parametrize(("backend", "expected"), [("cpu", 1), ("torch", 2)])
def test_pytorch_leaves_the_cores_to_the_native_kernels(
    tmp_path: Path, backend: str, expected: int
) -> None:
    """Only while a run goes on, and not in the pure-PyTorch backend."""
    seen: list[int] = []
    watch = flame_ext.callbacks.FunctionCallback(
        lambda *_: seen.append(torch.get_num_threads()), event="log"
    )
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        Trainer(
            TASK, config=TINY, backend=backend, run_dir=tmp_path / "run", callbacks=[watch]
        ).run(total_steps=80)
        assert seen == [expected] * 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("task", "more"),
    [
        (TASK, {}),
        ("InvertedPendulum-v5", {"embedding_dim": 8}),
    ],
)
def test_resuming_is_bit_equal_to_never_stopping(
    tmp_path: Path, task: str, more: dict[str, object]
) -> None:
    """Stopped in the middle of episodes, of an update's debt and of the encoder's interval."""
    options = {**TINY, "updates_per_step": 0.7, "normalize_observations": True, **more}
    whole = Trainer(task, config=options, run_dir=tmp_path / "whole")
    whole.run(total_steps=200)
    Trainer(task, config=options, run_dir=tmp_path / "parts").run(total_steps=94)
    parts = Trainer.resume(tmp_path / "parts")
    parts.run(total_steps=200)
    expected, _ = read_checkpoint(tmp_path / "whole")
    found, _ = read_checkpoint(tmp_path / "parts")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    assert parts.evaluations[-1].returns == whole.evaluations[-1].returns


def test_a_run_interrupted_in_the_middle_of_a_step_resumes_bit_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny(tmp_path / "whole")
    whole.run(total_steps=200)
    parts = tiny(tmp_path / "parts")
    policy_step = parts.agent._policy_step

    def interrupted(*args: torch.Tensor) -> dict[str, float]:
        if parts.global_step >= 80:
            monkeypatch.setattr(parts.agent, "_policy_step", policy_step)
            os.kill(os.getpid(), signal.SIGINT)
        return policy_step(*args)

    monkeypatch.setattr(parts.agent, "_policy_step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        parts.run(total_steps=200)
    assert parts.global_step == 80
    assert signal.getsignal(signal.SIGINT) is before
    resumed = Trainer.resume(tmp_path / "parts")
    assert resumed.run().steps == 200, "the steps of the run are its own"
    for name, network in whole.agent.networks().items():
        assert torch.equal(network.flat, resumed.agent.networks()[name].flat), name


def test_a_second_interrupt_is_answered_at_once() -> None:
    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(1)

    # A shell's background job ignores SIGINT, and Python then leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with interrupts_between_steps() as wanted:
            interrupt()
            assert wanted.is_set()
            with pytest.raises(KeyboardInterrupt):
                interrupt()
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_in_the_last_evaluation_is_not_lost(tmp_path: Path) -> None:
    interrupt = flame_ext.callbacks.FunctionCallback(lambda *_: os.kill(os.getpid(), signal.SIGINT))
    trainer = Trainer(TASK, config=TINY, run_dir=tmp_path / "run", callbacks=[interrupt])
    with pytest.raises(KeyboardInterrupt):
        trainer.run(total_steps=40)
    assert [evaluation.step for evaluation in trainer.evaluations] == [40]


def test_an_interrupt_ends_an_evaluation_at_its_next_step(tmp_path: Path) -> None:
    """It may take minutes; the resumed run makes up for it."""

    class Interrupting(Counting):
        def step(self, action):  # type: ignore[no-untyped-def]
            steps.append(0)
            if len(steps) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return super().step(action)

    steps: list[int] = []
    options = {**TINY, "num_envs": 1, "eval_episodes": 1}
    trainer = Trainer(Counting, config=options, run_dir=tmp_path / "run", eval_env=Interrupting)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(total_steps=120)
    assert (len(steps), trainer.global_step, trainer.evaluations) == (3, 80, [])
    resumed = Trainer.resume(tmp_path / "run", env=Counting).run()
    assert [evaluation.step for evaluation in resumed.evaluations] == [81, 120]


def test_fewer_steps_than_done_are_refused(tmp_path: Path) -> None:
    trainer = tiny(tmp_path / "run")
    trainer.run(total_steps=81)  # by two environments: 82
    assert trainer.run(total_steps=np.int64(81)).steps == 82
    with pytest.raises(ValueError, match="total_steps=80: the run is at step 82"):
        trainer.run(total_steps=80)
    assert Trainer.resume(tmp_path / "run").config.total_steps == 81


def test_a_run_goes_on_after_it_was_stopped(tmp_path: Path) -> None:
    stop = flame_ext.callbacks.FunctionCallback(lambda *_: np.bool_(False), event="log")
    trainer = Trainer(TASK, config=TINY, run_dir=tmp_path / "run", callbacks=[stop])
    first = trainer.run(total_steps=120)
    assert (first.steps, first.stopped_by) == (40, "FunctionCallback")
    trainer.callbacks = ()
    second = trainer.run()
    assert (second.steps, second.stopped_by) == (120, None)
    times = [evaluation.wall_time for evaluation in second.evaluations]
    assert times == sorted(times)
    assert trainer.wall_time == trainer.wall_time == second.wall_time  # it stands between runs


def test_callbacks_may_come_from_a_generator_or_be_one(tmp_path: Path) -> None:
    stop = flame_ext.callbacks.FunctionCallback(lambda *_: False, event="log")
    for name, callbacks in (("several", iter([stop])), ("one", stop)):
        trainer = Trainer(TASK, config=TINY, run_dir=tmp_path / name, callbacks=callbacks)
        assert trainer.run(total_steps=120).stopped_by == "FunctionCallback"


def test_resuming_asks_for_what_an_id_alone_does_not_make(tmp_path: Path) -> None:
    def factory() -> gymnasium.Env:  # type: ignore[type-arg]
        return gymnasium.make(TASK, num_goals=2)

    Trainer(factory, config=TINY, run_dir=tmp_path / "run").run(total_steps=40)
    with pytest.raises(RunDirectoryError, match="pass it again"):
        Trainer.resume(tmp_path / "run")
    resumed = Trainer.resume(tmp_path / "run", env=factory)
    goals = {len(env.unwrapped.goals) for env in resumed.eval_env.vector.unwrapped.envs}
    assert goals == {2}


def test_also_around_vector_environments(tmp_path: Path) -> None:
    """A wrapper there changes what is learned, and evaluations would lack it."""
    mode = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
    plain = gymnasium.make_vec(TASK, 2, vectorization_mode="sync", vector_kwargs=mode)
    vector = gymnasium.wrappers.vector.TransformReward(plain, lambda reward: reward / 1000)
    with pytest.raises(ValueError, match=r"lack the wrappers .* Pass eval_env"):
        Trainer(vector, config=TINY, run_dir=tmp_path / "none")
    Trainer(vector, config=TINY, run_dir=tmp_path / "run", eval_env=TASK).run(total_steps=40)
    with pytest.raises(RunDirectoryError, match="pass it again"):
        Trainer.resume(tmp_path / "run")


def test_a_resumed_run_takes_callbacks_and_eval_env(tmp_path: Path) -> None:
    tiny(tmp_path / "run").run(total_steps=40)
    stop = flame_ext.callbacks.FunctionCallback(lambda *_: False, event="log")
    resumed = Trainer.resume(
        tmp_path / "run", callbacks=[stop], eval_env=lambda: gymnasium.make(TASK, num_goals=2)
    )
    goals = {len(env.unwrapped.goals) for env in resumed.eval_env.vector.unwrapped.envs}
    assert goals == {2}
    assert resumed.run(total_steps=200).stopped_by == "FunctionCallback"


def test_a_resumed_run_keeps_its_backend(tmp_path: Path) -> None:
    config = {**TINY, "eval_interval": 0}
    Trainer(TASK, config=config, backend="torch", run_dir=tmp_path / "run").run(total_steps=40)
    assert Trainer.resume(tmp_path / "run").backend.name == "torch"
    assert Trainer.resume(tmp_path / "run", backend="cpu").backend.name == "cpu"


def test_a_resumed_run_keeps_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**TINY, "eval_interval": 0}
    Trainer(TASK, config=config, device="cpu", run_dir=tmp_path / "run").run(total_steps=40)
    asked = []

    def note(device: str, backend: str) -> torch.device:
        asked.append(device)
        return torch.device("cpu")

    monkeypatch.setattr(trainer_module, "resolve_device", note)
    Trainer.resume(tmp_path / "run")
    Trainer.resume(tmp_path / "run", device="auto")
    assert asked == ["cpu", "auto"]


def test_same_seed_twice_is_bit_equal_and_another_seed_differs(tmp_path: Path) -> None:
    def parameters(name: str, seed: int) -> torch.Tensor:
        trainer = Trainer(TASK, config=TINY, run_dir=tmp_path / name, seed=seed)
        trainer.run(total_steps=100)
        return trainer.agent.actor.network.flat.detach()

    first = parameters("a", 0)
    assert torch.equal(first, parameters("b", 0))
    assert not torch.equal(first, parameters("c", 1))


def test_a_seed_is_of_weights_and_draws(tmp_path: Path) -> None:
    first, other = (
        Trainer(TASK, config=TINY, run_dir=tmp_path / str(seed), seed=seed).agent for seed in (0, 1)
    )
    assert not torch.equal(first.generator.get_state(), other.generator.get_state())
    for name, network in first.networks().items():
        assert not torch.equal(network.flat, other.networks()[name].flat), name


def test_update_to_data_ratio_above_and_below_one(tmp_path: Path) -> None:
    for ratio, expected in ((0.25, 25), (3.0, 306)):
        trainer = tiny(tmp_path / str(ratio), "sac", updates_per_step=ratio, eval_interval=0)
        trainer.run(total_steps=140)
        assert trainer.agent.updates == expected


def test_callbacks_see_the_run_and_stop_it(tmp_path: Path) -> None:
    seen: list[str] = []

    class Recorder(Callback):
        def on_start(self, trainer: Trainer) -> None:
            seen.append("start")

        def on_evaluation(self, trainer: Trainer, evaluation: object) -> bool:
            seen.append("evaluation")
            return False

        def on_end(self, trainer: Trainer, result: object) -> None:
            seen.append("end")

    trainer = Trainer(TASK, config=TINY, run_dir=tmp_path / "run", callbacks=[Recorder()])
    result = trainer.run(total_steps=10_000)
    assert result.steps == 80
    assert result.stopped_by == "Recorder"
    assert seen[0] == "start"
    assert seen[-1] == "end"


class Fragile(gymnasium.Env):  # type: ignore[type-arg]
    """Breaks at its 60th step."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,))
    action_space = gymnasium.spaces.Box(-3, 1, (1,))

    def __init__(self) -> None:
        self.steps = 0

    def reset(self, *, seed=None, options=None):  # type: ignore[no-untyped-def]
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):  # type: ignore[no-untyped-def]
        self.steps += 1
        value = np.nan if self.steps == 60 else 0.5
        return np.full(2, value, np.float32), 0.0, False, self.steps % 7 == 0, {}


def test_a_broken_environment_loses_nothing(tmp_path: Path) -> None:
    trainer = Trainer(Fragile, config={**TINY, "num_envs": 1}, run_dir=tmp_path / "run")
    with pytest.raises(EnvironmentDataError):
        trainer.run(total_steps=500)
    _, manifest = read_checkpoint(tmp_path / "run")
    assert manifest["global_step"] == 59
    with pytest.raises(RunDirectoryError, match=r"pass it again: Trainer.resume\(run_dir, env="):
        Trainer.resume(tmp_path / "run")
    with pytest.warns(UserWarning, match="starts new episodes"):
        resumed = Trainer.resume(tmp_path / "run", env=Fragile)
    assert resumed.run(total_steps=100).steps == 100


def test_a_resumed_run_does_not_repeat_its_first_episodes(tmp_path: Path) -> None:
    seeds = []

    class Hidden(Counting):
        def __init__(self) -> None:
            self.memory: list[int] = []  # a state that is not saved

        def reset(self, *, seed=None, options=None):  # type: ignore[no-untyped-def]
            seeds.append(seed)
            return super().reset(seed=seed)

    options = {**TINY, "num_envs": 1}
    Trainer(Hidden, config=options, run_dir=tmp_path / "run", eval_env=Counting).run(30)
    with pytest.warns(UserWarning, match="starts new episodes"):
        resumed = Trainer.resume(tmp_path / "run", env=Hidden, eval_env=Counting)
    resumed.run(40)
    given = [seed for seed in seeds if seed is not None]
    assert len(given) == len(set(given)) == 2


def test_a_step_that_fails_in_one_environment_is_no_transition_of_the_others(
    tmp_path: Path,
) -> None:
    class Failing(Counting):
        def step(self, action):  # type: ignore[no-untyped-def]
            made.append(0)
            if len(made) == 33:
                raise RuntimeError("the cable came loose")
            return super().step(action)

    made: list[int] = []
    options = {**TINY, "num_envs": 3}
    trainer = Trainer(Failing, config=options, run_dir=tmp_path / "run", eval_env=Counting)
    with pytest.raises(RuntimeError, match="the cable"):
        trainer.run(total_steps=60)
    with pytest.warns(UserWarning, match="a step failed"):
        resumed = Trainer.resume(tmp_path / "run", env=Counting)
    resumed.run(total_steps=60)
    rows = resumed.replay.state_dict()["rows"]
    assert len(rows) == 60
    assert torch.equal(rows[:, 1] - rows[:, 0], torch.ones(60)), "one step leads to the next count"


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"seed": -1}, ValueError, "seed=-1: give a whole number from 0"),
        ({"seed": None}, ValueError, "seed=None: give"),
        ({"device": "mps"}, ValueError, "device='mps': give auto, cpu, cuda or cuda:N"),
        ({"callbacks": [print]}, TypeError, r"no Callback; a function goes into FunctionCallback"),
        ({"config": {"buffer_size": 10**13}}, FlameError, r"320,000.0 GB.*lower buffer_size"),
    ],
)
def test_what_cannot_be_used_is_named(
    tmp_path: Path, arguments: dict[str, Any], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        Trainer(TASK, run_dir=tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    options = {**TINY, "batch_size": np.int64(8), "gamma": np.float32(0.5)}
    trainer = Trainer(TASK, config=options, run_dir=tmp_path / "run", seed=np.int64(3))
    trainer.run(total_steps=np.int64(20))
    resumed = Trainer.resume(tmp_path / "run")
    found = (resumed.config.batch_size, resumed.config.gamma, resumed.seed)
    assert found == (8, 0.5, 3)


def test_a_truncated_episode_bootstraps_from_its_final_observation(tmp_path: Path) -> None:
    """The rows stored hold the steps that were made, and no end that the critics would learn."""
    trainer = Trainer(Counting, config={**TINY, "num_envs": 1}, run_dir=tmp_path / "r")
    trainer.run(total_steps=70)
    rows = trainer.replay.state_dict()["rows"]
    obs, next_obs, terminated = rows[:, 0], rows[:, 1], rows[:, -1]
    assert torch.equal(obs, torch.arange(7.0).repeat(10))
    assert torch.equal(next_obs, obs + 1)
    assert not terminated.any()


def test_a_terminated_episode_does_not_bootstrap(tmp_path: Path) -> None:
    class Ending(Counting):
        def step(self, action):  # type: ignore[no-untyped-def]
            obs, reward, _, truncated, info = super().step(action)
            return obs, reward, truncated, False, info

    trainer = Trainer(Ending, config={**TINY, "num_envs": 1}, run_dir=tmp_path / "r")
    trainer.run(total_steps=70)
    rows = trainer.replay.state_dict()["rows"]
    assert torch.equal(rows[:, -1], (rows[:, 1] == 7).float())


def test_an_object_resumes_by_its_id_with_as_many_environments(tmp_path: Path) -> None:
    trainer = Trainer(gymnasium.make("Pendulum-v1"), config=TINY, run_dir=tmp_path / "run")
    assert trainer.config.num_envs == 1
    trainer.run(total_steps=40)
    options = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (options["num_envs"], options["total_steps"]) == (1, 40)
    assert Trainer.resume(tmp_path / "run").run(total_steps=60).steps == 60


def test_a_run_goes_on_with_other_episodes_after_a_failed_step(tmp_path: Path) -> None:
    seeds = []

    class Failing(Counting):
        calls = 0

        def reset(self, *, seed=None, options=None):  # type: ignore[no-untyped-def]
            seeds.append(seed)
            return super().reset(seed=seed)

        def step(self, action):  # type: ignore[no-untyped-def]
            Failing.calls += 1
            if Failing.calls == 30:
                raise RuntimeError("a cable")
            return super().step(action)

    options = {**TINY, "num_envs": 1}
    trainer = Trainer(Failing, config=options, run_dir=tmp_path / "run", eval_env=Counting)
    with pytest.raises(RuntimeError, match="a cable"):
        trainer.run(60)
    trainer.run(60)
    given = [seed for seed in seeds if seed is not None]
    assert len(given) == len(set(given)) == 2


def test_diverged_weights_never_replace_what_was_saved(tmp_path: Path) -> None:
    tiny(tmp_path / "run").run(total_steps=80)
    trainer = Trainer.resume(tmp_path / "run")
    policy = (tmp_path / "run" / "policy.safetensors").read_bytes()
    with torch.no_grad():
        trainer.agent.actor.network.flat[3] = torch.nan
    with pytest.raises(DivergenceError, match=r"learning diverged: at step 80 .* is kept"):
        trainer.run(total_steps=160)
    assert (tmp_path / "run" / "policy.safetensors").read_bytes() == policy
    assert Trainer.resume(tmp_path / "run").run(total_steps=160).steps == 160


def test_an_episode_without_end_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Endless(Counting):
        def step(self, action):  # type: ignore[no-untyped-def]
            return np.zeros(1, np.float32), 0.0, False, False, {}

    monkeypatch.setattr(evaluate, "MAX_EPISODE_STEPS", 50)
    with pytest.raises(FlameError, match=r"not ended after 50 steps.*TimeLimit"):
        Trainer(Endless, config=TINY, run_dir=tmp_path / "run").run(total_steps=40)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["flame", "sac"])
def test_the_defaults_learn_the_pendulum(tmp_path: Path, algorithm: str) -> None:
    """A short run ends at several times the return of a random policy (about 6)."""
    options = {
        "num_envs": 2,
        "learning_starts": 500,
        "updates_per_step": 1.0,
        "policy_delay": 1,
        "hidden_sizes": (64, 64),
        "eval_interval": 0,
        "eval_episodes": 5,
    }
    trainer = Trainer(
        "InvertedPendulum-v5", algorithm=algorithm, config=options, run_dir=tmp_path / "run"
    )
    assert trainer.run(total_steps=5_000).final_return > 30


def test_training_leaves_denormals_to_the_caller(tmp_path: Path) -> None:
    number = torch.full((), 1e-40)
    assert float(number * 1) > 0
    tiny(tmp_path / "run").run(total_steps=80)
    assert float(number * 1) > 0
