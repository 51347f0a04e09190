"""The environments' inner state: exact save and restore."""

import json

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from small_envs import Counting

from flame_ext.env_state import EnvState
from flame_ext.envs import make_vector_env


class Counter(gymnasium.Env):
    """Observes how many steps it has made."""

    def __init__(self):
        self.observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float64)
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)
        self.count = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed, options=options)
        self.count = 0
        return self._obs(), {}

    def step(self, action):
        self.count += 1
        return self._obs(), 1.0, self.count == 3, False, {}

    def _obs(self):
        return np.array([self.count], dtype=np.float64)


RESTORABLE = [
    "flame_ext/MultiGoal-v0",
    "Pendulum-v1",
    "HalfCheetah-v5",
    "Hopper-v5",
    "Humanoid-v5",
    "Reacher-v5",
]


@pytest.mark.parametrize("env_id", RESTORABLE)
def test_a_restored_environment_goes_on_bit_equal(env_id):
    if "-v5" in env_id:
        pytest.importorskip("mujoco")
    handle = make_vector_env(env_id, num_envs=2, seed=3)
    handle.reset()
    actions = np.random.default_rng(0).uniform(-1, 1, (120, 2, handle.action_dim))
    for action in actions[:37]:
        handle.step(action)
    state = handle.get_state()
    other = make_vector_env(env_id, num_envs=2, seed=99)
    obs = other.set_state(EnvState(state.arrays, json.loads(json.dumps(state.meta))))
    assert obs.shape == (2, handle.obs_dim)
    for action in actions[37:]:
        expected, got = handle.step(action), other.step(action)
        assert np.array_equal(expected.obs, got.obs)
        assert np.array_equal(expected.next_obs, got.next_obs)
        assert np.array_equal(expected.reward, got.reward)
        assert expected.episode_returns == got.episode_returns
        assert expected.episode_lengths == got.episode_lengths


def test_environments_with_a_hidden_memory_have_no_state():
    class Listed(Counter):
        def __init__(self):
            super().__init__()
            self.history = []

    class Odd(gymnasium.Wrapper):
        pass

    for factory in (Listed, lambda: Odd(Counter())):
        handle = make_vector_env(factory)
        handle.reset()
        assert handle.get_state() is None


def test_arrays_that_show_the_memory_of_others_are_not_copied():
    """Copies of them would no longer follow what they show."""

    class Views(Counter):
        def __init__(self):
            super().__init__()
            self.state = np.zeros(2)
            self.position = self.state[:1]

    class Foreign(Counter):
        def __init__(self):
            super().__init__()
            self.state = np.frombuffer(bytearray(16))

    class Slices(Counter):
        def __init__(self):
            super().__init__()
            self.state = np.zeros(4)[:2]

    for factory, known in ((Views, False), (Foreign, False), (Slices, True)):
        handle = make_vector_env(factory)
        handle.reset()
        assert (handle.get_state() is not None) == known


def test_a_state_does_not_go_into_another_mujoco_model():
    """As of an environment that draws its model in every episode."""
    pytest.importorskip("mujoco")

    def make(mass):
        env = gymnasium.make("Hopper-v5")
        env.unwrapped.model.body_mass[1] = mass
        return env

    first, same, other = (make_vector_env(lambda m=m: make(m)) for m in (2.0, 2.0, 3.0))
    first.reset()
    first.step(np.ones((1, 3)))
    state = first.get_state()
    assert np.array_equal(same.set_state(state), state.arrays["handle/obs"])
    assert other.set_state(state) is None
    other.step(np.zeros((1, 3)))


def test_a_space_that_is_sampled_from_is_restored():
    class Sampling(Counter):
        def _obs(self):
            return self.observation_space.sample()

    handles = [make_vector_env(Sampling, seed=seed) for seed in (3, 99)]
    for handle in handles:
        handle.reset()
    handles[1].set_state(handles[0].get_state())
    action = np.zeros((1, 2))
    assert np.array_equal(*(handle.step(action).next_obs for handle in handles))


def test_an_environment_with_state_of_its_own_kind_is_not_guessed():
    class Hidden(Counter):
        def reset(self, **kwargs):
            self.data = [0.0]  # the name of MuJoCo's state
            return super().reset(**kwargs)

    handle = make_vector_env(Hidden)
    handle.reset()
    assert handle.get_state() is None


def test_a_state_of_another_number_of_environments_is_refused():
    handle = make_vector_env(Counter, num_envs=2)
    handle.reset()
    state = handle.get_state()
    with pytest.raises(ValueError, match="has 2 environments; this handle has 3"):
        make_vector_env(Counter, num_envs=3).set_state(state)


def test_a_restored_handle_goes_on_counting_steps() -> None:
    handle, other = (make_vector_env("Pendulum-v1", seed=seed) for seed in (3, 99))
    handle.reset()
    for _ in range(37):
        handle.step(np.zeros((1, 1)))
    other.set_state(handle.get_state())
    assert other.get_state().meta["steps"] == 37


def test_a_numpy_scalar_is_restored_as_one() -> None:
    class Scaled(Counting):
        def reset(self, **options):  # type: ignore[no-untyped-def]
            self.scale = np.float32(2.5)
            self.steps = 0
            return super().reset(**options)

    handle, other = make_vector_env(Scaled), make_vector_env(Scaled)
    handle.reset()
    other.set_state(handle.get_state())
    assert type(other.vector.unwrapped.envs[0].unwrapped.scale) is np.float32
