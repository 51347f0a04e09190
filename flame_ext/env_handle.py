"""One handle over any vector environment: exact episode ends, actions in [-1, 1], finite values.

The handle hides three things that are easy to get wrong: the observation at the end of an episode
(what the critic bootstraps from is not what the policy acts on next), the scale of the actions,
and values that are not numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import iterate
from numpy.typing import NDArray

from flame_ext.env_likeness import differences
from flame_ext.env_state import Environment, EnvState, capture_env, has_model_of, restore_env
from flame_ext.errors import EnvironmentDataError
from flame_ext.mujoco_warnings import as_python_warnings

FloatArray: TypeAlias = NDArray[np.float32]

SAME_STEP_RECIPE = (
    'gymnasium.make_vec("HalfCheetah-v5", num_envs=4, vectorization_mode="sync", '
    'vector_kwargs={"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP})'
)


@dataclass(frozen=True)
class StepResult:
    """What one step of n environments gave.

    Attributes:
        obs: Observations to act on next (n, O); of a new episode where one has just ended.
        reward: Rewards (n,), float32.
        terminated: Episodes that ended for good (n,), bool: do not bootstrap.
        truncated: Episodes cut off (n,), bool: bootstrap from ``next_obs``.
        next_obs: Observations that the actions led to (n, O); the last one of an ended episode.
        episode_returns: Sum of rewards of each episode that has just ended, in environment order.
        episode_lengths: Steps of each of those episodes.
    """

    obs: FloatArray
    reward: FloatArray
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    next_obs: FloatArray
    episode_returns: tuple[float, ...]
    episode_lengths: tuple[int, ...]


class VectorEnvHandle:
    """A checked vector environment that takes actions in [-1, 1] and gives float32 rows.

    Built by ``make_vector_env`` and ``make_eval_env``. Episodes restart by themselves.

    Attributes:
        num_envs: Number of environments, n.
        obs_dim: Length of one flattened observation, O.
        action_dim: Length of one flattened action, A.
        action_low: Lower action bounds in environment units (A,), float32.
        action_high: Upper action bounds in environment units (A,), float32.
    """

    def __init__(self, vector: VectorEnv[Any, Any, Any], *, seed: int) -> None:
        check_observation_space(vector.single_observation_space)
        action_space = check_action_space(vector.single_action_space)
        self.vector = vector
        self.num_envs = int(vector.num_envs)
        self.obs_dim = spaces.flatdim(vector.single_observation_space)
        self.action_dim = int(np.prod(action_space.shape))
        self.action_low, self.action_high = _float32_bounds(action_space)
        self._seed = seed
        self._action_space = action_space
        # Centre and half range, in float64: [-1, 1] boxes then pass through without rounding.
        self._centre = (self.action_high.astype(np.float64) + self.action_low) / 2.0
        self._half_range = (self.action_high.astype(np.float64) - self.action_low) / 2.0
        self._obs: FloatArray | None = None
        self._steps = 0
        self._returns = np.zeros(self.num_envs)
        self._lengths = np.zeros(self.num_envs, dtype=np.int64)

    @cached_property
    def spec_id(self) -> str | None:
        """Registered id, or None where the id alone would make another environment."""
        base = self.vector.unwrapped
        spec_id = _sufficient_id(spec_of(base)) if self.vector is base else None
        if spec_id is None:
            return None
        with as_python_warnings(spec_id):
            made = gymnasium.make(spec_id)
        alike = not any(differences(env, made) for env in self._local_envs())
        made.close()
        return spec_id if alike else None

    def reset(self, seed: int | None = None) -> FloatArray:
        """Start a new episode in every environment; returns observations (n, O).

        Args:
            seed: Decides all further randomness of the environments; the handle's own by default.

        Raises:
            EnvironmentDataError: If an observation is not finite.
        """
        # Gymnasium's own rule is seed, seed + 1, ...: runs with neighbouring seeds would share
        # most of their environments. Hashed seeds are independent.
        root = np.random.SeedSequence(self._seed if seed is None else seed)
        seeds = [int(word) for word in root.generate_state(self.num_envs)]
        # Only Gymnasium's two own vector environments are known to take a seed per environment.
        several = isinstance(self.vector.unwrapped, SyncVectorEnv | AsyncVectorEnv)
        obs, _ = self.vector.reset(seed=seeds if several else seeds[0])  # type: ignore[arg-type]
        self._returns[:] = 0.0
        self._lengths[:] = 0
        flat_obs = self._check_rows(self._flatten(obs), "observation after reset")
        self._obs = flat_obs
        return np.copy(flat_obs)

    def step(self, action: NDArray[Any]) -> StepResult:
        """Act in every environment.

        Args:
            action: Actions (n, A) in [-1, 1]; what rounding puts outside is clipped.

        Raises:
            ValueError: If the actions have another shape or are not finite.
            EnvironmentDataError: If an observation or reward is not finite. Nothing of the step
                is kept, and ``reset`` starts afresh.
        """
        self._steps += 1
        obs, reward, terminated, truncated, infos = self.vector.step(self._to_env(action))
        flat_obs = self._check_rows(self._flatten(obs), "observation")
        rewards = self._check_rows(np.asarray(reward, dtype=np.float64), "reward")
        done = np.asarray(terminated, dtype=np.bool_) | np.asarray(truncated, dtype=np.bool_)
        self._obs = flat_obs
        self._returns += np.asarray(reward, dtype=np.float64)
        self._lengths += 1
        ended = done.any()
        result = StepResult(
            obs=flat_obs.copy(),
            reward=rewards,
            terminated=np.array(terminated, dtype=np.bool_),
            truncated=np.array(truncated, dtype=np.bool_),
            next_obs=self._final_rows(flat_obs, done, infos) if ended else flat_obs.copy(),
            episode_returns=tuple(self._returns[done].tolist()) if ended else (),
            episode_lengths=tuple(self._lengths[done].tolist()) if ended else (),
        )
        if ended:
            self._returns[done] = 0.0
            self._lengths[done] = 0
        return result

    @property
    def longest_running(self) -> int:
        """Steps of the longest of the episodes in progress."""
        return int(self._lengths.max())

    def get_state(self) -> EnvState | None:
        """State from which ``set_state`` goes on bit-equal, or None if an environment hides it.

        Holds for MuJoCo tasks, MultiGoal and other environments of plain attributes, run in this
        process. The result is plain data: numpy arrays, and values that JSON can hold.
        """
        envs = self._local_envs()
        captured = [capture_env(env) for env in envs]
        if not envs or self._obs is None or any(state is None for state in captured):
            return None
        total = EnvState()
        total.meta["steps"] = self._steps
        total.meta["envs"] = [state.meta for state in captured if state is not None]
        total.arrays["handle/obs"] = self._obs.copy()
        total.arrays["handle/returns"] = self._returns.copy()
        total.arrays["handle/lengths"] = self._lengths.copy()
        for index, state in enumerate(captured):
            for name, array in (state or EnvState()).arrays.items():
                total.arrays[f"env{index}/{name}"] = array
        return total

    def set_state(self, state: EnvState) -> FloatArray | None:
        """Put a state from ``get_state`` back; returns the observations to act on next (n, O).

        None, after a reset, where a MuJoCo model is not the state's: it may be drawn anew in
        every episode, or the environment be another one.

        Raises:
            ValueError: If the state belongs to another number of environments, or these
                environments cannot take one.
        """
        envs = self._local_envs()
        if len(envs) != len(state.meta["envs"]):
            raise ValueError(
                f"The saved state has {len(state.meta['envs'])} environments; this handle has "
                f"{len(envs)} that can take one. Resume with the same env and num_envs."
            )
        self.reset()
        parts = [_part(state, index) for index in range(len(envs))]
        if not all(map(has_model_of, envs, parts)):
            return None
        for env, part in zip(envs, parts, strict=True):
            restore_env(env, part)
        self._steps = int(state.meta["steps"])
        self._returns[:] = state.arrays["handle/returns"]
        self._lengths[:] = state.arrays["handle/lengths"]
        obs: FloatArray = np.array(state.arrays["handle/obs"], dtype=np.float32)
        self._obs = obs
        return np.copy(obs)

    def render(self) -> NDArray[np.uint8]:
        """Image of the first environment (H, W, 3); needs ``render_mode="rgb_array"``."""
        frames = self.vector.render()
        if not frames or frames[0] is None:
            raise ValueError(
                "The environment gives no image. Build it with render_mode='rgb_array'."
            )
        return np.asarray(frames[0], dtype=np.uint8)

    def close(self) -> None:
        """Release the environments."""
        self.vector.close()

    def _to_env(self, action: NDArray[Any]) -> NDArray[Any]:
        shape = (self.num_envs, self.action_dim)
        if action.shape != shape or not np.isfinite(action).all():
            found = "values that are not finite" if action.shape == shape else str(action.shape)
            raise ValueError(f"Actions of shape {shape} and finite are needed; got {found}.")
        scaled = self._centre + self._half_range * action
        scaled = np.minimum(np.maximum(scaled, self.action_low), self.action_high)
        rows = scaled.reshape(self.num_envs, *self._action_space.shape)
        actions: NDArray[Any] = rows.astype(self._action_space.dtype)
        return actions

    def _flatten(self, obs: Any) -> NDArray[Any]:
        # Environments built by this package arrive flat; a user's vector environment of Dict
        # observations does not, and Gymnasium's wrapper for that refuses SAME_STEP.
        if isinstance(self.vector.single_observation_space, spaces.Box):
            return np.asarray(obs).reshape(self.num_envs, self.obs_dim)
        return np.stack([self._flatten_one(o) for o in iterate(self.vector.observation_space, obs)])

    def _flatten_one(self, obs: Any) -> NDArray[Any]:
        return np.asarray(spaces.flatten(self.vector.single_observation_space, obs))

    def _final_rows(
        self, obs: FloatArray, done: NDArray[np.bool_], infos: Mapping[str, Any]
    ) -> FloatArray:
        """Copy of ``obs`` in which ended episodes have their true last observation."""
        rows = obs.astype(np.float64)
        for index in np.flatnonzero(done):
            if "final_obs" not in infos or infos["final_obs"][index] is None:
                raise EnvironmentDataError(
                    f"Environment {index} ended an episode at step {self._steps} without "
                    "infos['final_obs'], the last observation. A vector environment must follow "
                    f"AutoresetMode.SAME_STEP, as for example {SAME_STEP_RECIPE}."
                )
            final = infos["final_obs"][index]
            if self._is_reused(int(index), final):
                raise EnvironmentDataError(
                    f"Environment {index} returns one array again and again, so that its reset has "
                    "overwritten the last observation of the episode. Return a copy, or pass the "
                    "id or a factory instead of a vector environment."
                )
            rows[index] = self._flatten_one(final)
        return self._check_rows(rows, "final observation")

    def _is_reused(self, index: int, final: Any) -> bool:
        """Whether a user's environment has reset into the array of its last observation."""
        base = self.vector.unwrapped
        # Private, but nothing public has the observations before they are put together.
        latest = base._env_obs[index] if isinstance(base, SyncVectorEnv) else None
        both = isinstance(final, np.ndarray) and isinstance(latest, np.ndarray)
        return both and np.may_share_memory(final, latest)

    def _check_rows(self, values: NDArray[Any], what: str) -> FloatArray:
        """Return values (n, ...) as float32, or say which one is NaN or inf."""
        with np.errstate(over="ignore"):  # An overflow becomes inf, which is reported below.
            rows: FloatArray = values.astype(np.float32)
        if np.isfinite(rows).all():
            return rows
        bad = np.argwhere(~np.isfinite(rows))[0].tolist()
        index, *column = bad
        where = f"{what}[{column[0]}]" if column else what
        raise EnvironmentDataError(
            f"Environment {index} returned {where} = {values[tuple(bad)]} at step "
            f"{self._steps}; it must be finite in float32. Check the environment (a diverging "
            "simulation, a division by zero); nothing from this step was stored."
        )

    def _local_envs(self) -> tuple[Environment, ...]:
        """The single environments, where they live in this process."""
        base = self.vector.unwrapped
        # A wrapper around the vector environment may hold a memory of its own.
        if self.vector is base and isinstance(base, SyncVectorEnv):
            return tuple(base.envs)
        return ()


def _part(state: EnvState, index: int) -> EnvState:
    """What a handle's state has of one environment."""
    prefix = f"env{index}/"
    arrays = {n.removeprefix(prefix): a for n, a in state.arrays.items() if n.startswith(prefix)}
    return EnvState(arrays, state.meta["envs"][index])


def _float32_bounds(space: spaces.Box) -> tuple[FloatArray, FloatArray]:
    """Flat bounds, rounded into the box: 0.1 of float64 is less than that of float32."""
    low, high = space.low.ravel().astype(np.float32), space.high.ravel().astype(np.float32)
    inf = np.float32(np.inf)
    return (
        np.where(low < space.low.ravel(), np.nextafter(low, inf), low),
        np.where(high > space.high.ravel(), np.nextafter(high, -inf), high),
    )


def check_observation_space(space: spaces.Space[Any]) -> None:
    """Raise ValueError unless observations flatten to a fixed number of values, at least one."""
    if not space.is_np_flattenable:
        raise ValueError(
            f"The observation space is {space}; allowed are spaces of a fixed size (Box, "
            "Discrete, MultiDiscrete, MultiBinary, and Dict or Tuple of these). Wrap the "
            "environment so that it returns one of them."
        )
    if spaces.flatdim(space) == 0:
        raise ValueError(
            f"The observation space {space} is empty; at least one value is needed. Return a "
            "constant observation of one 0.0 if there is truly nothing to observe."
        )


def check_action_space(space: spaces.Space[Any]) -> spaces.Box:
    """Return the space as a Box of floats with finite bounds, or raise ValueError."""
    if not isinstance(space, spaces.Box) or space.dtype.kind != "f":
        raise ValueError(
            f"The action space is {space}; only continuous actions are supported (a Box of "
            "floats with finite bounds). For discrete actions use another algorithm."
        )
    if np.prod(space.shape) == 0:
        raise ValueError(f"The action space {space} is empty; at least one action is needed.")
    if not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
        raise ValueError(
            f"The action space {space} is unbounded; finite bounds are needed. Give the Box finite "
            "low and high, or wrap the environment in a gymnasium.wrappers.TransformAction with a "
            "finite action_space."
        )
    return space


def spec_of(vector: VectorEnv[Any, Any, Any]) -> EnvSpec | None:
    """The spec of the first environment, where it can be reached."""
    base = vector.unwrapped
    if isinstance(base, SyncVectorEnv):
        return base.envs[0].spec
    # Its own spec, where it has one, makes a vector environment.
    return base.get_attr("spec")[0] if isinstance(base, AsyncVectorEnv) else vector.spec


def _sufficient_id(spec: EnvSpec | None) -> str | None:
    """The id of `spec` if nothing else is needed to make the same environment."""
    registered = None if spec is None else gymnasium.registry.get(spec.id)
    if spec is None or registered is None or spec.additional_wrappers:
        return None
    own, default = ({**s.kwargs, "render_mode": None} for s in (spec, registered))
    same = own == default and spec.max_episode_steps == registered.max_episode_steps
    return spec.id if same else None
