"""The built-in multimodal task: its reward, its ends, its symmetry, its picture."""

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import flame_ext.multigoal as multigoal


def _make(**kwargs):
    return gymnasium.make(multigoal.ENV_ID, **kwargs)


def _return_of_first_action(first, goal_of_rest):
    """Return from the exact origin: one given step, then straight to a goal at full speed."""
    # Not radius 1: rounding would decide whether four full steps reach a goal at distance 5.
    env = _make(start_noise=0.0, goal_radius=0.9)
    obs, _ = env.reset(seed=0)
    goal = env.unwrapped.goals[goal_of_rest]
    total, done, action = 0.0, False, np.asarray(first, dtype=np.float32)
    while not done:
        obs, reward, terminated, truncated, _ = env.step(action)
        total, done = total + reward, terminated or truncated
        gap = goal - obs
        action = (gap / max(1.0, np.linalg.norm(gap))).astype(np.float32)
    return total


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_follows_the_gymnasium_interface():
    check_env(_make().unwrapped, skip_render_check=True)


def test_starts_near_the_origin_and_seeds_decide():
    env = _make()
    first, info = env.reset(seed=1)
    again, _ = env.reset(seed=1)
    other, _ = env.reset(seed=2)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.abs(first).max() < 0.1
    assert first.dtype == np.float32
    assert info == {"goal": -1}


def test_reward_by_hand():
    env = _make(start_noise=0.0)
    env.reset(seed=0)
    obs, reward, terminated, truncated, info = env.step(np.array([0.5, 0.25], dtype=np.float32))
    distance = np.hypot(5.0 - 0.5, 0.25)
    assert reward == pytest.approx(-0.2 * distance - 0.8 * (0.25 + 0.0625))
    assert (terminated, truncated, info["goal"]) == (False, False, -1)
    assert obs.tolist() == [0.5, 0.25]


@pytest.mark.parametrize("goal", range(4))
def test_every_goal_ends_the_episode_and_is_reported(goal):
    env = _make(start_noise=0.0)
    env.reset(seed=0)
    direction = (0.9 * env.unwrapped.goals[goal] / 5.0).astype(np.float32)
    steps, terminated, reward = 0, False, 0.0
    while not terminated:
        _, reward, terminated, _, info = env.step(direction)
        steps += 1
    assert info["goal"] == goal
    assert steps == 5
    assert reward == pytest.approx(2.0 - 0.2 * 0.5 - 0.8 * 0.81, abs=1e-4)


def test_standing_still_is_cut_off_but_not_terminated():
    env = _make()
    env.reset(seed=0)
    ends = [env.step(np.zeros(2, dtype=np.float32))[2:4] for _ in range(30)]
    assert ends[:-1] == [(False, False)] * 29
    assert ends[-1] == (False, True)


def test_goals_are_equally_good_and_separated_by_worse_actions():
    """Q at the origin has one separate maximum per goal: this is what makes the task multimodal."""
    axes = [(1, 0), (0, 1), (-1, 0), (0, -1)]
    straight = [_return_of_first_action(a, k) for k, a in enumerate(axes)]
    assert np.ptp(straight) < 1e-4
    diagonal = max(_return_of_first_action((1, 1), k) for k in range(4))
    half_diagonal = max(_return_of_first_action((0.7, 0.7), k) for k in range(4))
    still = max(_return_of_first_action((0, 0), k) for k in range(4))
    assert min(straight) > max(diagonal, half_diagonal, still) + 0.3


def test_number_of_goals_is_an_argument():
    env = multigoal.MultiGoalEnv(num_goals=6)
    assert env.goals.shape == (6, 2)
    assert np.allclose(np.linalg.norm(env.goals, axis=1), 5.0)


def test_the_arena_has_walls():
    env = multigoal.MultiGoalEnv(num_goals=1)
    env.reset(seed=0)
    for _ in range(20):
        obs, *_ = env.step(np.array([-1.0, 0.0], dtype=np.float32))
    assert obs[0] == -7.0


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"num_goals": 0}, "num_goals=0"),
        ({"goal_radius": 6.0}, "goal_radius=6.0"),
        ({"goal_distance": 8.0}, "goal_distance=8.0"),
        ({"start_noise": -1.0}, "start_noise=-1.0"),
        ({"render_mode": "human"}, "render_mode='human'"),
    ],
)
def test_bad_arguments_are_named(kwargs, named):
    with pytest.raises(ValueError, match=named):
        multigoal.MultiGoalEnv(**kwargs)


def test_picture_shows_goals_and_point():
    env = multigoal.MultiGoalEnv(render_mode="rgb_array", start_noise=0.0)
    env.reset(seed=0)
    before = env.render()
    env.step(np.array([1.0, 1.0], dtype=np.float32))
    after = env.render()
    assert before.shape == (256, 256, 3)
    assert before.dtype == np.uint8
    row, column = 128, int((5.0 + 7.0) / 14.0 * 256)
    assert before[row, column].tolist() == [0, 158, 115]
    # The second coordinate grows upwards: row 0 is the top of the picture.
    row, column = int((7.0 - 1.0) / 14.0 * 256), int((1.0 + 7.0) / 14.0 * 256)
    assert before[row, column].tolist() == [255, 255, 255]
    assert after[row, column].tolist() == [213, 94, 0]
    assert multigoal.MultiGoalEnv().render() is None
