"""Whether two environments are alike, which their spec does not say of what a user changed."""

from __future__ import annotations

import hashlib
from typing import Any

import gymnasium
import numpy as np

# Attributes of a Gymnasium environment that no step changes, or that are handled by themselves.
CONSTANT_ATTRIBUTES = frozenset(
    {"_ezpickle_args", "_ezpickle_kwargs", "_np_random", "metadata", "spec"}
)


def differences(env: gymnasium.Env[Any, Any], fresh: gymnasium.Env[Any, Any]) -> list[str]:
    """What `env` has otherwise than a freshly made environment: its model, attributes by name.

    Compared are MuJoCo's model and attributes that are numbers, texts, tuples of those or arrays,
    where the fresh environment has them; None there is a place for what the first reset puts in.
    """
    env, fresh = env.unwrapped, fresh.unwrapped
    found = [] if model_digest(env) == model_digest(fresh) else ["model"]
    for name in sorted(vars(env).keys() - CONSTANT_ATTRIBUTES):
        value, other = getattr(env, name), getattr(fresh, name, None)
        if other is None or not (_is_comparable(value) and _is_comparable(other)):
            continue
        if not np.array_equal(np.asarray(value), np.asarray(other)):
            found.append(name)
    return found


def _is_comparable(value: object) -> bool:
    return isinstance(value, np.ndarray | np.generic) or is_plain(value)


def is_plain(value: object) -> bool:
    """Whether `value` is a number, a text, None or a tuple of those."""
    if isinstance(value, tuple):
        return all(is_plain(item) and not isinstance(item, tuple) for item in value)
    return value is None or type(value) in (bool, int, float, str)


def is_mujoco(env: gymnasium.Env[Any, Any]) -> bool:
    """Whether `env` runs a MuJoCo simulation, without importing mujoco for those that do not."""
    data = getattr(env, "data", None)
    return type(data).__name__ == "MjData" and type(data).__module__.startswith("mujoco")


def model_digest(env: Any) -> str | None:
    """Tells MuJoCo models apart; None for an environment without one."""
    if not is_mujoco(env):
        return None
    import mujoco

    model = np.empty(mujoco.mj_sizeModel(env.model), np.uint8)
    mujoco.mj_saveModel(env.model, None, model)
    return hashlib.sha256(model.tobytes()).hexdigest()
