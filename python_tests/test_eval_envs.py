"""The environments that evaluations play in."""

import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import TimeLimit
from small_envs import Counter, Counting
from small_runs import TINY

from flame_ext.envs import EnvironmentDataError, make_eval_env, make_vector_env
from flame_ext.evaluate import MAX_EVAL_ENVS, run_episodes
from flame_ext.multigoal import MultiGoalEnv
from flame_ext.run_envs import make_evaluation_env
from flame_ext.trainer import Trainer

SAME_STEP = {"vector_kwargs": {"autoreset_mode": AutoresetMode.SAME_STEP}}


def test_the_evaluation_environment_is_separate():
    training = MultiGoalEnv(num_goals=3)
    specced = gymnasium.make("flame_ext/MultiGoal-v0", num_goals=5)
    vector = gymnasium.make_vec(
        "flame_ext/MultiGoal-v0", num_envs=2, vectorization_mode="sync", **SAME_STEP
    )
    sources = [(training, 3), (specced, 5), (vector, 4), ("flame_ext/MultiGoal-v0", 4)]
    sources.append((lambda: MultiGoalEnv(num_goals=2), 2))
    for source, num_goals in sources:
        evaluation = make_eval_env(source)
        assert evaluation.num_envs == 1
        inner = evaluation.vector.unwrapped.envs[0].unwrapped
        assert len(inner.goals) == num_goals
        if isinstance(source, gymnasium.Env):
            assert inner is not source.unwrapped
            source.reset(seed=0)
            before = source.unwrapped.position.copy()
            evaluation.reset()
            evaluation.step(np.ones((1, 2)))
            assert np.array_equal(source.unwrapped.position, before)


def test_worker_processes_are_evaluated_in_an_environment_like_theirs():
    """Also those of `make_vec`, whose own spec makes the vector environment."""
    vector = gymnasium.make_vec(
        "flame_ext/MultiGoal-v0", 2, vectorization_mode="async", num_goals=3, **SAME_STEP
    )
    try:
        assert len(make_eval_env(vector).vector.unwrapped.envs[0].unwrapped.goals) == 3
        assert make_vector_env(vector).spec_id is None
    finally:
        vector.close()


def test_an_object_that_cannot_be_doubled_is_refused():
    class Single(Counter):
        def __deepcopy__(self, memo):
            raise RuntimeError("holds a socket")

    with pytest.raises(ValueError, match=r"holds a socket.*factory"):
        make_eval_env(Single())


def test_several_evaluation_environments_are_copies_or_just_one():
    class Lendable(Counter):
        copies_left = 1

        def __deepcopy__(self, memo):
            if not Lendable.copies_left:
                raise RuntimeError("holds a socket")
            Lendable.copies_left -= 1
            return Lendable()

    for source in ("flame_ext/MultiGoal-v0", MultiGoalEnv, MultiGoalEnv()):
        evaluation = make_eval_env(source, num_envs=3)
        assert evaluation.num_envs == 3
        assert len({id(env.unwrapped) for env in evaluation.vector.unwrapped.envs}) == 3
    assert make_eval_env(Lendable(), num_envs=3).num_envs == 1


def test_the_evaluation_environment_has_what_a_user_changed():
    changed = gymnasium.make("Pendulum-v1")
    changed.unwrapped.g = 3.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluation = make_eval_env(changed, num_envs=2)
    envs = evaluation.vector.unwrapped.envs
    assert [env.unwrapped.g for env in envs] == [3, 3]
    assert changed.unwrapped not in [env.unwrapped for env in envs]
    assert make_vector_env(changed).spec_id is None
    assert make_vector_env(lambda: changed).spec_id is None


def test_a_change_that_no_copy_has_is_told():
    """MuJoCo environments are copied by building them again."""
    pytest.importorskip("mujoco")
    changed = gymnasium.make("Hopper-v5")
    changed.unwrapped.model.opt.gravity[2] = -3.0
    with pytest.warns(UserWarning, match=r"not quite .*its own model.* pass a factory"):
        make_eval_env(changed)
    assert make_vector_env(changed).spec_id is None
    used = gymnasium.make("Hopper-v5")
    used.reset(seed=0)
    used.step(np.zeros(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make_eval_env(used)
    assert make_vector_env(used).spec_id == "Hopper-v5"


def test_pictures_come_from_evaluation_environments():
    evaluation = make_eval_env("flame_ext/MultiGoal-v0", render_mode="rgb_array")
    evaluation.reset()
    assert evaluation.render().shape == (256, 256, 3)
    silent = make_eval_env("flame_ext/MultiGoal-v0")
    silent.reset()
    with pytest.raises(ValueError, match="rgb_array"):
        silent.render()


def test_evaluations_may_have_an_environment_of_their_own(tmp_path: Path) -> None:
    """Worker processes cannot be copied; and sizes must fit."""
    vector = gymnasium.vector.AsyncVectorEnv(
        [Counting] * 2, autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP
    )
    with pytest.raises(ValueError, match="Pass eval_env"):
        Trainer(vector, config=TINY, run_dir=tmp_path / "none")
    with pytest.raises(ValueError, match="eval_env 3 and 1"):
        Trainer(vector, config=TINY, run_dir=tmp_path / "other", eval_env="Pendulum-v1")
    result = Trainer(vector, config=TINY, run_dir=tmp_path / "run", eval_env=Counting).run(60)
    assert result.final_return == 7
    vector.close()


def test_an_object_for_evaluations_is_taken_as_it_is(tmp_path: Path) -> None:
    """Also one that cannot be copied, or a vector environment of its own kind."""

    class Single(Counting):
        def __deepcopy__(self, memo: object) -> None:
            raise RuntimeError("holds a socket")

    robot = Single()
    mode = gymnasium.vector.AutoresetMode.SAME_STEP
    workers = gymnasium.vector.AsyncVectorEnv([Counting] * 2, autoreset_mode=mode)
    for name, eval_env in (("one", robot), ("two", workers)):
        trainer = Trainer(Counting, config=TINY, run_dir=tmp_path / name, eval_env=eval_env)
        assert trainer.run(50).final_return == 7
    assert robot.steps == 0  # after its last episode
    workers.close()


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_single_robot_begins_a_new_episode_after_an_evaluation(
    tmp_path: Path, wrapped: bool
) -> None:
    """Otherwise a transition would lead from before the evaluation to after it."""
    robot = Counting()
    limited = TimeLimit(robot, 5)
    env, eval_env = (limited, TimeLimit(robot, 3)) if wrapped else (limited, limited)
    options = {**TINY, "num_envs": 1, "eval_interval": 13}
    trainer = Trainer(env, config=options, run_dir=tmp_path / "run", eval_env=eval_env)
    assert trainer.run(60).final_return == (3 if wrapped else 5)
    rows = trainer.replay.state_dict()["rows"]
    assert torch.equal(rows[:, 1], rows[:, 0] + 1)
    assert rows[13, 0] == 0
    with pytest.warns(UserWarning, match="starts new episodes"):
        resumed = Trainer.resume(tmp_path / "run", env=env, eval_env=eval_env)
    resumed.run(70)
    rows = resumed.replay.state_dict()["rows"]
    assert torch.equal(rows[:, 1], rows[:, 0] + 1)


def test_a_broken_evaluation_costs_no_episode_in_progress(tmp_path: Path) -> None:
    class Broken(Counting):
        def step(self, action):  # type: ignore[no-untyped-def]
            return np.full(1, np.nan, np.float32), *super().step(action)[1:]

    with pytest.raises(EnvironmentDataError):
        Trainer(Counting, config=TINY, run_dir=tmp_path / "run", eval_env=Broken).run(80)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed = Trainer.resume(tmp_path / "run", env=Counting)
    assert resumed.run(total_steps=100).steps == 100


def test_evaluations_run_ten_episodes_side_by_side_at_most() -> None:
    for episodes in (3, 25):
        env = make_evaluation_env("flame_ext/MultiGoal-v0", None, episodes, seed=0)
        assert env.num_envs == min(episodes, MAX_EVAL_ENVS)


def test_a_seed_is_of_an_evaluations_environments() -> None:
    for own in (None, gymnasium.make("Pendulum-v1")):  # made alike, and an object as it is
        firsts = []
        for seed in (1, 1, 2):
            env = make_evaluation_env("Pendulum-v1", own, 1, seed)
            firsts.append(env.reset())
        assert np.array_equal(firsts[0], firsts[1])
        assert not np.array_equal(firsts[0], firsts[2])
    zero = lambda obs: np.zeros((1, 1))  # noqa: E731
    a, b, c = (run_episodes(env, zero, 1, seed=seed)[0] for seed in (5, 5, 6))
    assert a == b != c
