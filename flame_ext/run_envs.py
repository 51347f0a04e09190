"""The environments of one run: those it learns from, and those that evaluations play in."""

from __future__ import annotations

import gymnasium

from flame_ext.env_handle import VectorEnvHandle
from flame_ext.envs import EnvLike, make_eval_env, make_vector_env
from flame_ext.evaluate import MAX_EVAL_ENVS


def make_training_env(env: EnvLike, num_envs: int, seed: int) -> VectorEnvHandle:
    """An id or a factory `num_envs` times; objects are taken as they are."""
    return make_vector_env(env, num_envs=None if _is_object(env) else num_envs, seed=seed)


def make_evaluation_env(
    env: EnvLike, eval_env: EnvLike | None, episodes: int, seed: int
) -> VectorEnvHandle:
    """What `eval_env` gives, an object as it is; None: separate environments like `env`.

    Raises:
        ValueError: If none can be built.
    """
    if eval_env is None or not _is_object(eval_env):
        source = env if eval_env is None else eval_env
        return make_eval_env(source, num_envs=min(episodes, MAX_EVAL_ENVS), seed=seed)
    return make_vector_env(eval_env, seed=seed)


def share_an_environment(first: VectorEnvHandle, second: VectorEnvHandle) -> bool:
    """Whether steps of one are steps of the other, as with a single robot."""
    return not _innermost(first).isdisjoint(_innermost(second))


def _innermost(handle: VectorEnvHandle) -> set[int]:
    vector = handle.vector.unwrapped
    return {id(vector), *(id(env.unwrapped) for env in getattr(vector, "envs", ()))}


def _is_object(env: EnvLike) -> bool:
    return isinstance(env, gymnasium.Env | gymnasium.vector.VectorEnv)
