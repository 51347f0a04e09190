"""Capture and restore the inside of one environment, for resuming bit-equal to never stopping.

Gymnasium has no such interface, so this module takes an environment apart: its wrappers, its
random generator, its plain attributes and, for MuJoCo, the simulator's own state. It returns None
rather than a guess for anything it does not know completely; a resumed run then starts new
episodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import gymnasium
import numpy as np
from gymnasium import wrappers
from numpy.typing import NDArray

from flame_ext.env_likeness import CONSTANT_ATTRIBUTES, is_mujoco, is_plain, model_digest
from flame_ext.fresh_observation import FreshObservation

Environment = gymnasium.Env[Any, Any]

# Wrappers that keep nothing from one step to the next but the counter of TimeLimit.
_KNOWN_WRAPPERS = (
    wrappers.ClipAction,
    wrappers.FlattenObservation,
    wrappers.OrderEnforcing,
    wrappers.PassiveEnvChecker,
    wrappers.RescaleAction,
    wrappers.RescaleObservation,
    wrappers.TimeLimit,
    FreshObservation,
)

# As `CONSTANT_ATTRIBUTES`, of an environment that runs MuJoCo.
_MUJOCO_ATTRIBUTES = frozenset(
    {"data", "fullpath", "model", "mujoco_renderer", "observation_structure"}
)

# What MuJoCo derives in a step and environments read at the start of the next one, when it is
# still stale by one substep (Humanoid's centre of mass): recomputing it would change the reward.
_MUJOCO_DERIVED = (
    "actuator_force",
    "cacc",
    "cfrc_ext",
    "cfrc_int",
    "cinert",
    "cvel",
    "geom_xmat",
    "geom_xpos",
    "qacc",
    "qfrc_actuator",
    "qfrc_constraint",
    "sensordata",
    "site_xmat",
    "site_xpos",
    "subtree_com",
    "ten_length",
    "ximat",
    "xipos",
    "xmat",
    "xpos",
    "xquat",
)


@dataclass(frozen=True)
class EnvState:
    """State of one or several environments as plain data.

    Attributes:
        arrays: Numpy arrays by name (any shape, any numeric type).
        meta: JSON-serialisable values (integers may exceed 64 bits).
    """

    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


def capture_env(env: Environment) -> EnvState | None:
    """Copy everything that decides how ``env`` goes on, or return None if that cannot be known.

    Known are MuJoCo environments but for their model, and environments whose attributes are all
    numbers, texts, tuples of those, arrays of their own memory or spaces, inside wrappers without
    a memory.
    """
    state = EnvState()
    layer = env
    while isinstance(layer, gymnasium.Wrapper):
        if type(layer) not in _KNOWN_WRAPPERS:
            return None
        if isinstance(layer, wrappers.TimeLimit):
            # Private, but TimeLimit offers nothing public to read or set its counter.
            state.meta["elapsed_steps"] = layer._elapsed_steps
        layer = layer.env
    state.meta["bit_generator"] = layer.np_random.bit_generator.state
    if not _capture_attributes(layer, state):
        return None
    if is_mujoco(layer):
        state.meta["model"] = model_digest(layer)
        _capture_mujoco(layer, state)
    return state


def has_model_of(env: Environment, state: EnvState) -> bool:
    """Whether ``state`` comes from the MuJoCo model that ``env`` has, or from none."""
    model = model_digest(env.unwrapped)
    return bool(state.meta.get("model", model) == model)


def restore_env(env: Environment, state: EnvState) -> None:
    """Put the state from ``capture_env`` into ``env``, which must be built alike and reset once.

    Its MuJoCo model stays as it is: see ``has_model_of``.
    """
    layer = env
    while isinstance(layer, gymnasium.Wrapper):
        if isinstance(layer, wrappers.TimeLimit):
            layer._elapsed_steps = state.meta["elapsed_steps"]
        layer = layer.env
    layer.np_random.bit_generator.state = state.meta["bit_generator"]
    for name, value in state.meta["attributes"].items():
        setattr(layer, name, tuple(value) if isinstance(value, list) else value)
    for name, generators in state.meta.get("spaces", {}).items():
        for space, generator in zip(_nested(getattr(layer, name)), generators, strict=True):
            space.np_random.bit_generator.state = generator
    for name, array in state.arrays.items():
        kind, _, key = name.partition("/")
        if kind == "attribute":
            # A numpy scalar is kept as an array without dimensions; [()] gives it back.
            setattr(layer, key, array.copy() if array.ndim else array[()])
    if is_mujoco(layer):
        _restore_mujoco(layer, state)


def _capture_attributes(env: Environment, state: EnvState) -> bool:
    """Store the plain attributes of ``env``; False if some attribute is not plain."""
    plain: dict[str, Any] = {}
    generators: dict[str, list[Any]] = {}  # of spaces, which may be sampled from
    known = CONSTANT_ATTRIBUTES | (_MUJOCO_ATTRIBUTES if is_mujoco(env) else frozenset())
    if _share_memory([v for v in vars(env).values() if isinstance(v, np.ndarray)]):
        return False
    for name, value in vars(env).items():
        if name in known:
            continue
        if isinstance(value, np.ndarray | np.generic):
            array = np.array(value)
            if array.dtype.kind not in "biuf":
                return False
            state.arrays[f"attribute/{name}"] = array
        elif is_plain(value):
            plain[name] = value
        elif isinstance(value, gymnasium.Space):
            generators[name] = [s.np_random.bit_generator.state for s in _nested(value)]
        else:
            return False
    state.meta["attributes"] = plain
    state.meta["spaces"] = generators
    return True


def _nested(space: Any) -> Iterator[gymnasium.Space[Any]]:
    """The space and all that it consists of."""
    yield space
    parts = getattr(space, "spaces", ())
    for part in parts.values() if isinstance(parts, Mapping) else parts:
        yield from _nested(part)


def _share_memory(arrays: Sequence[NDArray[Any]]) -> bool:
    """Whether one array shows another one, or memory of something else than an array."""
    return any(np.may_share_memory(a, b) for a, b in combinations(arrays, 2)) or any(
        _owner(array).base is not None for array in arrays
    )


def _owner(array: NDArray[Any]) -> NDArray[Any]:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _capture_mujoco(env: Any, state: EnvState) -> None:
    import mujoco

    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    integration = np.empty(mujoco.mj_stateSize(env.model, kind))
    mujoco.mj_getState(env.model, env.data, integration, kind)
    state.arrays["mujoco/integration"] = integration
    for name in _MUJOCO_DERIVED:
        state.arrays[f"mujoco/{name}"] = np.array(getattr(env.data, name))


def _restore_mujoco(env: Any, state: EnvState) -> None:
    import mujoco

    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    mujoco.mj_setState(env.model, env.data, state.arrays["mujoco/integration"], kind)
    for name in _MUJOCO_DERIVED:
        getattr(env.data, name)[:] = state.arrays[f"mujoco/{name}"]
