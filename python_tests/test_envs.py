"""Environments: exact transitions, action scaling, clear refusals."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from small_envs import Counter, Counting, Reusing

from flame_ext.envs import EnvironmentDataError, make_eval_env, make_vector_env
from flame_ext.evaluate import run_episodes

SAME_STEP = {"vector_kwargs": {"autoreset_mode": AutoresetMode.SAME_STEP}}


class Spaced(gymnasium.Env):
    """Only its spaces matter."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed, options=options)
        return self.observation_space.sample(), {}

    def step(self, action):
        assert action.shape == self.action_space.shape
        return self.observation_space.sample(), 0.0, False, False, {}


def box(*shape):
    return spaces.Box(-1.0, 1.0, shape, np.float32)


# Transitions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("truncate", [False, True])
def test_the_transition_at_an_episodes_end_is_exact(truncate):
    handle = make_vector_env(lambda: Counter(truncate=truncate), num_envs=2)
    assert handle.reset().tolist() == [[0, 1], [0, 1]]
    zero = np.zeros((2, 2), dtype=np.float32)
    first, second, third = handle.step(zero), handle.step(zero), handle.step(zero)
    assert first.next_obs.tolist() == first.obs.tolist() == [[1, 1], [1, 1]]
    assert second.episode_returns == ()
    assert third.next_obs.tolist() == [[3, 1], [3, 1]]
    assert third.obs.tolist() == [[0, 2], [0, 2]]
    assert third.terminated.tolist() == [not truncate] * 2
    assert third.truncated.tolist() == [truncate] * 2
    assert third.reward.tolist() == [30.0, 30.0]
    assert third.episode_returns == (60.0, 60.0)
    assert third.episode_lengths == (3, 3)
    assert handle.step(zero).next_obs.tolist() == [[1, 2], [1, 2]]


def test_environments_end_one_by_one():
    lengths = iter([2, 3])
    handle = make_vector_env(lambda: Counter(length=next(lengths)), num_envs=2)
    handle.reset()
    zero = np.zeros((2, 2), dtype=np.float32)
    handle.step(zero)
    second = handle.step(zero)
    assert second.next_obs[:, 0].tolist() == [2, 2]
    assert second.obs[:, 0].tolist() == [0, 2]
    assert second.terminated.tolist() == [True, False]
    assert (second.episode_returns, second.episode_lengths) == ((30.0,), (2,))


def test_short_episodes_count_no_more_than_long_ones():
    """And an episode begins with its own first observation, not with the last one's end."""
    lengths, seen = iter([2, 9]), set()
    handle = make_vector_env(lambda: Counter(length=next(lengths)), num_envs=2)

    def act(obs):
        seen.update(obs[:, 0].tolist())
        return np.zeros((2, 2))

    _, found = run_episodes(handle, act, 4)
    assert sorted(found) == [2, 2, 9, 9]
    assert seen == set(range(9))


def test_an_environment_may_return_one_array_again_and_again():
    """Its reset would overwrite the last observation, which Gymnasium keeps by reference."""

    handle = make_vector_env(lambda: Reusing(truncate=True))
    handle.reset()
    steps = [handle.step(np.zeros((1, 2))) for _ in range(3)]
    assert steps[-1].truncated[0]
    assert steps[-1].next_obs.tolist() == [[3, 1]]
    assert steps[-1].obs.tolist() == [[0, 2]]


def test_a_users_vector_environment_that_does_so_is_refused():
    handle = make_vector_env(
        SyncVectorEnv([lambda: Reusing(truncate=True)], autoreset_mode=AutoresetMode.SAME_STEP)
    )
    handle.reset()
    for _ in range(2):
        handle.step(np.zeros((1, 2)))
    with pytest.raises(EnvironmentDataError, match="returns one array again and again"):
        handle.step(np.zeros((1, 2)))


def test_infos_may_be_of_any_kind():
    """Gymnasium joins those of several environments, and asks for equal kinds and sizes."""

    class Telling(Counter):
        def step(self, action):
            *rest, _ = super().step(action)
            return *rest, {
                "contacts": np.zeros(self.count),
                "goal": (None, {}, "a")[self.count % 3],
            }

    class InDict(Telling):
        def __init__(self):
            super().__init__()
            self.observation_space = spaces.Dict({"a": self.observation_space})

        def _obs(self):
            return {"a": super()._obs()}

    for factory in (Telling, InDict):
        handle = make_vector_env(factory, num_envs=2)
        handle.reset()
        for _ in range(4):
            assert handle.step(np.zeros((2, 2))).obs.shape == (2, 2)


def test_arrays_handed_out_are_copies():
    handle = make_vector_env(Counter)
    obs = handle.reset()
    result = handle.step(np.zeros((1, 2)))
    obs[:] = 99.0
    result.obs[:] = 99.0
    assert result.next_obs.tolist() == [[1.0, 1.0]]
    assert handle.step(np.zeros((1, 2))).next_obs.tolist() == [[2.0, 1.0]]
    assert result.obs.dtype == result.reward.dtype == np.float32


def test_seeds_decide_everything_and_differ_between_environments():
    rows = [make_vector_env("Pendulum-v1", num_envs=3, seed=s).reset() for s in (5, 5, 6)]
    assert np.array_equal(rows[0], rows[1])
    # Not seed + index: neighbouring seeds share no environment.
    assert len(np.unique(np.concatenate([rows[0], rows[2]]), axis=0)) == 6
    handle = make_vector_env("Pendulum-v1", num_envs=3, seed=1)
    assert np.array_equal(handle.reset(seed=5), rows[0])


# Actions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (-2.0, 6.0), (0.0, 0.5), (-0.4, 0.4)])
def test_actions_are_scaled_to_any_box(low, high):
    env = Counter(low=low, high=high)
    handle = make_vector_env(env)
    handle.reset()
    for unit in (-1.0, -0.3, 0.0, 1.0):
        handle.step(np.full((1, 2), unit, dtype=np.float32))
        assert env.action == pytest.approx(low + (unit + 1.0) / 2.0 * (high - low), abs=1e-6)
        assert env.action_space.contains(env.action)
    handle.step(np.full((1, 2), 1.0 + 1e-6))
    assert env.action_space.contains(env.action)
    assert handle.action_low.tolist() == [np.float32(low)] * 2
    assert handle.action_high.tolist() == [np.float32(high)] * 2


def test_actions_stay_in_boxes_whose_bounds_float32_rounds_outwards():
    env = Counter()
    env.action_space = spaces.Box(-0.1, 0.1, (2,), np.float64)
    assert float(np.float32(0.1)) > 0.1
    handle = make_vector_env(env)
    handle.reset()
    for unit in (-1.0, 1.0):
        handle.step(np.full((1, 2), unit, dtype=np.float32))
        assert env.action_space.contains(env.action)
        assert env.action == pytest.approx(unit * 0.1)
    assert env.action_space.contains(handle.action_high.astype(np.float64))


def test_unit_box_actions_pass_without_rounding():
    env = Counter()
    handle = make_vector_env(env)
    handle.reset()
    action = np.random.default_rng(0).uniform(-1, 1, (1, 2)).astype(np.float32)
    handle.step(action)
    assert np.array_equal(env.action, action[0])


@pytest.mark.parametrize(
    ("action", "named"),
    [
        (np.zeros((2, 2)), r"\(2, 2\)"),
        (np.zeros(2), r"\(2,\)"),
        (np.full((1, 2), np.nan), "not finite"),
    ],
)
def test_bad_actions_are_refused(action, named):
    handle = make_vector_env(Counter)
    handle.reset()
    with pytest.raises(ValueError, match=named):
        handle.step(action)


# What can be given ------------------------------------------------------------------------------


def test_an_id_an_object_a_vector_and_a_factory_all_work():
    vector = gymnasium.make_vec("Pendulum-v1", num_envs=2, vectorization_mode="sync", **SAME_STEP)
    sources = [
        ("Pendulum-v1", 2),
        (lambda: gymnasium.make("Pendulum-v1"), 2),
        (vector, None),
        (vector, 2),
        (gymnasium.make("Pendulum-v1"), None),
        (gymnasium.make("Pendulum-v1"), 1),
    ]
    for source, num_envs in sources:
        handle = make_vector_env(source, num_envs=num_envs)
        n = 2 if source is vector else (num_envs or 1)
        assert (handle.num_envs, handle.obs_dim, handle.action_dim) == (n, 3, 1)
        assert handle.spec_id == "Pendulum-v1"
        assert handle.reset().shape == (n, 3)
        assert handle.step(np.zeros((n, 1))).obs.shape == (n, 3)


def test_worker_processes_give_the_same_episodes():
    results = []
    for vector in (SyncVectorEnv, AsyncVectorEnv):
        makers = [lambda: gymnasium.make("Pendulum-v1")] * 2
        env = vector(makers, autoreset_mode=AutoresetMode.SAME_STEP)
        handle = make_vector_env(env, seed=3)
        rows = [handle.reset()]
        rows += [handle.step(np.full((2, 1), 0.5)).next_obs for _ in range(201)]
        results.append(np.array(rows))
        assert handle.spec_id == "Pendulum-v1"
        handle.close()
    assert np.array_equal(*results)


def test_dict_observations_are_flattened_also_at_the_end():
    space = spaces.Dict({"a": box(2), "b": spaces.Tuple((box(1, 2), spaces.Discrete(3)))})

    class DictEnv(Spaced):
        def step(self, action):
            obs, reward, _, _, info = super().step(action)
            self.last = obs
            return obs, reward, True, False, info

    env = DictEnv(space, box(1))
    single = make_vector_env(env)
    vector = SyncVectorEnv(
        [lambda: DictEnv(space, box(1))] * 2, autoreset_mode=AutoresetMode.SAME_STEP
    )
    for handle in (single, make_vector_env(vector)):
        assert handle.obs_dim == 2 + 2 + 3
        assert handle.reset().shape == (handle.num_envs, 7)
        result = handle.step(np.zeros((handle.num_envs, 1)))
        inner = handle.vector.unwrapped.envs[0].unwrapped
        assert np.array_equal(result.next_obs[0], spaces.flatten(space, inner.last))
        assert not np.array_equal(result.next_obs[0], result.obs[0])


def test_boxes_of_any_shape_and_type_are_flattened():
    env = Spaced(spaces.Box(0, 255, (2, 3), np.uint8), box(2, 2))
    handle = make_vector_env(env)
    assert (handle.obs_dim, handle.action_dim) == (6, 4)
    assert handle.reset().dtype == np.float32
    handle.step(np.zeros((1, 4)))


# Refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("observation_space", "action_space", "named"),
    [
        (box(3), spaces.Discrete(4), "only continuous actions"),
        (box(3), spaces.Box(0, 9, (2,), np.int64), "only continuous actions"),
        (box(3), spaces.Dict({"a": box(1)}), "only continuous actions"),
        (box(3), spaces.Box(-np.inf, np.inf, (2,), np.float32), "unbounded"),
        (box(3), spaces.Box(np.array([0, 0.0]), np.array([1, np.inf]), dtype=np.float64), "unbou"),
        (box(3), box(0), "empty"),
        (box(0), box(1), "empty"),
        (spaces.Dict({}), box(1), "empty"),
        (spaces.Sequence(box(1)), box(1), "fixed size"),
    ],
)
def test_spaces_that_cannot_be_learned_are_refused(observation_space, action_space, named):
    with pytest.raises(ValueError, match=named):
        make_vector_env(lambda: Spaced(observation_space, action_space))


def test_vector_environments_with_another_autoreset_are_refused():
    for mode in (AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED):
        vector = SyncVectorEnv([Counter], autoreset_mode=mode)
        with pytest.raises(ValueError, match=r"SAME_STEP.*gymnasium\.make_vec"):
            make_vector_env(vector)


def test_the_recipe_in_that_refusal_works():
    with pytest.raises(ValueError, match="Build it so") as caught:
        make_vector_env(SyncVectorEnv([Counter]))
    recipe = str(caught.value).partition("for example ")[2].partition(", or pass")[0]
    vector = eval(recipe.replace("HalfCheetah-v5", "Pendulum-v1"), {"gymnasium": gymnasium})
    assert make_vector_env(vector).num_envs == 4


def test_unknown_ids_are_answered_with_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean 'Pendulum-v1'"):
        make_vector_env("Pendulm-v1")
    with pytest.raises(ValueError, match="did you mean 'flame_ext/MultiGoal-v0'"):
        make_vector_env("flame/MultiGoal-v0")
    with pytest.raises(ValueError, match="is unknown"):
        make_eval_env("zzzzzzzz")


@pytest.mark.parametrize("name", ["NormalizeObservation", "NormalizeReward"])
def test_wrappers_with_statistics_of_their_own_are_refused(name):
    wrapper = getattr(gymnasium.wrappers, name)
    with pytest.raises(ValueError, match=f"{name} keeps .* normalize_observations=true"):
        make_vector_env(lambda: gymnasium.wrappers.TimeLimit(wrapper(Counter()), 5))


def test_also_around_vector_environments():
    vector = gymnasium.make_vec("Pendulum-v1", num_envs=2, vectorization_mode="sync", **SAME_STEP)
    with pytest.raises(ValueError, match="NormalizeReward keeps"):
        make_vector_env(gymnasium.wrappers.vector.NormalizeReward(vector))


def test_an_object_for_several_environments_is_refused():
    with pytest.raises(ValueError, match=r"num_envs=4.*factory"):
        make_vector_env(Counter(), num_envs=4)
    shared = Counter()
    with pytest.raises(ValueError, match="same object twice"):
        make_vector_env(lambda: shared, num_envs=2)


def test_shapes_are_compared_with_the_space():
    class Wide(Counter):
        def _obs(self):
            return np.zeros(self.width)

    class Listed(Counter):
        def step(self, action):
            obs, reward, *rest = super().step(action)
            return obs, np.array([reward]), *rest

    Wide.width = 3
    with pytest.raises(EnvironmentDataError, match=r"observation of shape \(3,\); .* \(2,\)"):
        make_vector_env(Wide).reset()
    Wide.width = 2
    handle = make_vector_env(Wide)
    handle.reset()
    Wide.width = 1
    with pytest.raises(EnvironmentDataError, match=r"observation of shape \(1,\); .* \(2,\)"):
        handle.step(np.zeros((1, 2)))
    listed = make_vector_env(Listed)
    listed.reset()
    with pytest.raises(EnvironmentDataError, match=r"reward of shape \(1,\); it must be \(\)"):
        listed.step(np.zeros((1, 2)))


def test_so_are_those_of_a_dict_observations_parts():
    class Swapped(Spaced):
        def reset(self, **options):
            return {"a": np.zeros(3), "b": (np.zeros(2), 1)}, {}

    space = spaces.Dict({"a": box(2), "b": spaces.Tuple((box(3), spaces.Discrete(2)))})
    with pytest.raises(EnvironmentDataError, match=r"observation of shape \(3,\); .* \(2,\)"):
        make_vector_env(Swapped(space, box(1))).reset()


def test_other_misuse_is_refused():
    vector = SyncVectorEnv([Counter] * 2, autoreset_mode=AutoresetMode.SAME_STEP)
    with pytest.raises(ValueError, match="num_envs=3"):
        make_vector_env(vector, num_envs=3)
    with pytest.raises(ValueError, match="num_envs=0"):
        make_vector_env("Pendulum-v1", num_envs=0)
    with pytest.raises(TypeError, match="of type int"):
        make_vector_env(3)
    with pytest.raises(TypeError, match="returned str"):
        make_vector_env(lambda: "Pendulum-v1")


@pytest.mark.parametrize(
    ("poison", "step", "named"),
    [
        ("obs", 1, r"Environment 1 returned observation\[1\] = nan at step 1"),
        ("overflow", 1, r"Environment 1 returned observation\[0\] = 1e\+300 at step 1"),
        ("reward", 1, r"Environment 1 returned reward = inf at step 1"),
        ("final", 3, r"Environment 1 returned final observation\[0\] = -inf at step 3"),
    ],
)
def test_values_that_are_not_finite_are_named(poison, step, named):
    poisons = iter([None, poison])
    handle = make_vector_env(lambda: Counter(poison=next(poisons)), num_envs=2)
    handle.reset()
    for _ in range(step - 1):
        handle.step(np.zeros((2, 2)))
    with pytest.raises(EnvironmentDataError, match=named):
        handle.step(np.zeros((2, 2)))


def test_a_vector_environment_without_final_obs_is_reported():
    class Forgetful(gymnasium.vector.VectorWrapper):
        def step(self, actions):
            *rest, _ = self.env.step(actions)
            return (*rest, {})

    vector = SyncVectorEnv([Counter], autoreset_mode=AutoresetMode.SAME_STEP)
    handle = make_vector_env(Forgetful(vector))
    handle.reset()
    handle.step(np.zeros((1, 2)))
    handle.step(np.zeros((1, 2)))
    with pytest.raises(EnvironmentDataError, match="without infos"):
        handle.step(np.zeros((1, 2)))


def test_an_id_that_would_make_another_environment_is_none():
    short = gymnasium.make("Pendulum-v1", max_episode_steps=50)
    scaled = gymnasium.wrappers.RescaleAction(gymnasium.make("Pendulum-v1"), -1, 1)
    assert make_vector_env(short).spec_id is None
    assert make_vector_env(scaled).spec_id is None


def test_a_reset_in_the_middle_begins_a_new_return() -> None:
    handle, zero = make_vector_env(lambda: Counter(length=3)), np.zeros((1, 2))
    handle.reset()
    handle.step(zero)
    handle.reset()
    assert handle.longest_running == 0
    last = [handle.step(zero) for _ in range(3)][-1]
    assert (last.episode_returns, last.episode_lengths) == ((60.0,), (3,))


def test_a_written_observation_does_not_reach_the_handles_state() -> None:
    handle = make_vector_env(Counting)
    for hand_out in (lambda: handle.reset(), lambda: handle.step(np.zeros((1, 1))).obs):
        obs = hand_out()
        before = obs.copy()
        obs[:] = -99
        assert np.array_equal(handle.get_state().arrays["handle/obs"], before)
