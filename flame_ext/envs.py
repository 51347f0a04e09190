"""Environments: anything a user has, turned into one checked handle that the loop steps."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import gymnasium
from gymnasium import spaces, wrappers
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.wrappers import vector as vector_wrappers

from flame_ext import multigoal as _multigoal  # noqa: F401  (registers flame_ext/MultiGoal-v0)
from flame_ext.env_handle import (
    SAME_STEP_RECIPE,
    StepResult,
    VectorEnvHandle,
    check_action_space,
    check_observation_space,
    spec_of,
)
from flame_ext.env_likeness import differences
from flame_ext.env_state import Environment, EnvState
from flame_ext.errors import EnvironmentDataError, nearest_hint
from flame_ext.fresh_observation import FreshObservation
from flame_ext.mujoco_warnings import as_python_warnings

__all__ = [
    "EnvFactory",
    "EnvLike",
    "EnvState",
    "EnvironmentDataError",
    "StepResult",
    "VectorEnvHandle",
    "make_eval_env",
    "make_vector_env",
]

# Wrappers that learn across episodes.
_STATISTICS = (
    wrappers.NormalizeObservation,
    wrappers.NormalizeReward,
    vector_wrappers.NormalizeReward,  # the other one refuses SAME_STEP itself
)

EnvFactory: TypeAlias = Callable[[], Environment]
EnvLike: TypeAlias = "str | Environment | VectorEnv[Any, Any, Any] | EnvFactory"


def make_vector_env(env: EnvLike, *, num_envs: int | None = None, seed: int = 0) -> VectorEnvHandle:
    """Turn an id, environment, vector environment or factory into a handle.

    Args:
        env: A registered id; one ``gymnasium.Env``; a ``gymnasium.vector.VectorEnv`` with
            ``AutoresetMode.SAME_STEP``; or a function without arguments that makes one
            ``gymnasium.Env``. Dict and Tuple observations are flattened.
        num_envs: Environments to run. None: one, or as many as the vector environment has.
        seed: Decides the environments' randomness from the first ``reset`` on.

    Raises:
        ValueError: If the id is unknown, ``num_envs`` does not fit, the autoreset mode is
            another one, or the spaces cannot be used (the text says what can).
        TypeError: If ``env`` is none of these, or a factory returns something else.
        ImportError: If the environment needs a package that is not installed.
    """
    if num_envs is not None and num_envs < 1:
        raise ValueError(f"num_envs={num_envs} was given; it must be at least 1.")
    if isinstance(env, VectorEnv):
        _check_vector(env, num_envs)
        return VectorEnvHandle(env, seed=seed)
    if isinstance(env, gymnasium.Env):
        if (num_envs or 1) > 1:
            raise ValueError(
                f"One environment object was given with num_envs={num_envs}; one object is one "
                "environment. Pass a factory such as lambda: MyEnv() (or an id), or num_envs=1."
            )
        # The object is used as it is; SyncVectorEnv would otherwise share it with nobody.
        return VectorEnvHandle(_build_vector([lambda: env]), seed=seed)
    factory = _factory_of(env)
    return VectorEnvHandle(_build_vector([factory] * (num_envs or 1)), seed=seed)


def make_eval_env(
    env: EnvLike, *, num_envs: int = 1, seed: int = 0, render_mode: str | None = None
) -> VectorEnvHandle:
    """Build separate environments of the same kind, for evaluation.

    Args:
        env: As for ``make_vector_env``. Objects are rebuilt from their Gymnasium spec, or copied.
        num_envs: How many, side by side; just one if an object can be copied only once.
        seed: Decides the environments' randomness.
        render_mode: ``"rgb_array"`` to use ``render`` (an id only).

    Raises:
        ValueError: If no second environment can be built from ``env``.
    """
    if isinstance(env, VectorEnv):
        source: Environment | str = _single_of(env)
    elif isinstance(env, str | gymnasium.Env):
        source = env
    else:
        return make_vector_env(env, num_envs=num_envs, seed=seed)
    if isinstance(source, str):
        factory = _factory_of(source, **({"render_mode": render_mode} if render_mode else {}))
        return VectorEnvHandle(_build_vector([factory] * num_envs), seed=seed)
    twins = _twins_of(source, num_envs)
    factories: list[EnvFactory] = [lambda twin=twin: twin for twin in twins]  # type: ignore[misc]
    return VectorEnvHandle(_build_vector(factories), seed=seed)


def _factory_of(env: object, **kwargs: Any) -> EnvFactory:
    """A function that makes one environment from an id or a user's factory."""
    if isinstance(env, str):
        _check_id(env)
        return lambda: _make_by_id(env, **kwargs)
    if not callable(env):
        raise TypeError(
            f"env is of type {type(env).__name__}; allowed are a registered id, a gymnasium.Env, a "
            "gymnasium.vector.VectorEnv, or a function without arguments that makes one "
            "gymnasium.Env."
        )

    def make() -> Environment:
        made = env()
        if not isinstance(made, gymnasium.Env):
            raise TypeError(
                f"The environment factory returned {type(made).__name__}; it must return one "
                "gymnasium.Env, a new one at every call."
            )
        return made

    return make


def _build_vector(factories: list[EnvFactory]) -> VectorEnv[Any, Any, Any]:
    """Vector environment with SAME_STEP autoreset and flat observations."""

    def flat(factory: EnvFactory) -> EnvFactory:
        def make() -> Environment:
            env = factory()
            _refuse_statistics(env)
            check_observation_space(env.observation_space)
            check_action_space(env.action_space)
            fresh = FreshObservation(env)
            is_box = isinstance(env.observation_space, spaces.Box)
            return fresh if is_box else wrappers.FlattenObservation(fresh)

        return make

    makers = [flat(factory) for factory in factories]
    # The handle copies what it returns, so the vector environment need not.
    vector: VectorEnv[Any, Any, Any] = SyncVectorEnv(
        makers, copy=False, autoreset_mode=AutoresetMode.SAME_STEP
    )
    made = {id(env.unwrapped) for env in vector.envs}  # type: ignore[attr-defined]
    if len(made) < len(factories):
        raise ValueError(
            "The environment factory returned the same object twice; it must make a new "
            "environment at every call, for example lambda: MyEnv()."
        )
    return vector


def _refuse_statistics(env: Environment | VectorEnv[Any, Any, Any]) -> None:
    """Raise for wrappers whose statistics evaluation, replay and the saved policy would lack."""
    layer: Any = env
    while isinstance(layer, gymnasium.Wrapper | VectorWrapper):
        if isinstance(layer, _STATISTICS):
            raise ValueError(
                f"{type(layer).__name__} keeps running statistics that evaluations, the replay "
                "buffer and the saved policy do not share. Leave it out and use the options "
                "normalize_observations=true or reward_scale."
            )
        layer = layer.env


def _check_id(env_id: str) -> None:
    """Raise for an id that is not registered, with the nearest one that is."""
    if ":" in env_id or env_id in gymnasium.registry:
        return  # "module:Name" registers on import, inside gymnasium.make.
    names = list(gymnasium.registry)
    if any(name.rpartition("-v")[0] == env_id for name in names):
        return  # Without a version Gymnasium takes the newest one.
    raise ValueError(
        f"env={env_id!r} is unknown: give an id that gymnasium.pprint_registry() lists, or "
        f"'module:Name-v0' to import its module first{nearest_hint(env_id, names)}"
    )


def _make(env: str | EnvSpec, **kwargs: Any) -> Environment:
    with as_python_warnings(env):
        return gymnasium.make(env, **kwargs)


def _make_by_id(env_id: str, **kwargs: Any) -> Environment:
    try:
        return _make(env_id, **kwargs)
    except gymnasium.error.DependencyNotInstalled as error:
        raise ImportError(f"{env_id} needs a package that is not installed: {error}") from error
    except gymnasium.error.Error as error:
        raise ValueError(f"env={env_id!r} cannot be made: {error}") from error


def _check_vector(vector: VectorEnv[Any, Any, Any], num_envs: int | None) -> None:
    _refuse_statistics(vector)
    mode = vector.metadata.get("autoreset_mode")
    if mode not in (AutoresetMode.SAME_STEP, AutoresetMode.SAME_STEP.value):
        raise ValueError(
            f"The vector environment's autoreset mode is {mode}; only AutoresetMode.SAME_STEP "
            "gives the exact transition at an episode's end. Build it so, for example "
            f"{SAME_STEP_RECIPE}, or pass the id or a factory with num_envs."
        )
    if num_envs not in (None, vector.num_envs):
        raise ValueError(
            f"num_envs={num_envs} was given with a vector environment of {vector.num_envs}; leave "
            "num_envs out or make them equal."
        )


def _single_of(vector: VectorEnv[Any, Any, Any]) -> Environment:
    """One environment like those of a user's vector environment."""
    base = vector.unwrapped
    if vector is not base:
        raise ValueError(
            f"No evaluation environment can be built from {vector}: it would lack the wrappers "
            f"around {base}. Pass eval_env, such as a factory of one environment."
        )
    if isinstance(base, SyncVectorEnv):
        return base.envs[0]
    spec = spec_of(vector)
    if spec is None:
        raise ValueError(
            f"No separate evaluation environment can be built from {vector}, which has no spec. "
            "Pass eval_env, such as a factory of one environment."
        )
    return _make(spec)


def _twins_of(env: Environment, count: int) -> list[Environment]:
    """``count`` environments like ``env``, or one where no further ones can be built."""
    twins = [_twin_of(env)]
    try:
        twins += [_twin_of(env) for _ in range(count - 1)]
    except ValueError:  # A device or window that opens once more, but not count times.
        return twins[:1]
    return twins if len({id(twin.unwrapped) for twin in twins}) == count else twins[:1]


def _twin_of(env: Environment) -> Environment:
    """A second environment like ``env``: from its spec if that makes the same, else a deep copy."""
    builders: list[EnvFactory] = [lambda: copy.deepcopy(env)]
    if env.spec is not None:
        spec = env.spec
        builders.insert(0, lambda: _make(spec))
    unlike, reasons = [], []
    for build in builders:
        try:
            twin = build()
        except Exception as error:  # User code: anything; reported below.
            reasons.append(str(error))
            continue
        own = differences(env, twin)
        if not own:
            return twin
        unlike.append((twin, own))
    if not unlike:
        raise ValueError(
            f"No separate evaluation environment can be built from {env}: {'; '.join(reasons)}. "
            "Pass an id or a factory (lambda: MyEnv()) instead of an object, or eval_env."
        )
    twin, own = unlike[0]
    warnings.warn(
        f"evaluations play in an environment that is not quite {env}: it has its own "
        f"{', '.join(own)}. If that matters, pass a factory (lambda: MyEnv()) instead of an "
        "object, or eval_env.",
        stacklevel=2,
    )
    return twin
