"""What MuJoCo remarks on a model when it is built, through Python's `warnings`."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import gymnasium
from gymnasium.envs.registration import EnvSpec


@contextmanager
def as_python_warnings(env: str | EnvSpec) -> Iterator[None]:
    """While `env` is made, MuJoCo's remarks become Python warnings: shown once, to be filtered.

    By itself MuJoCo writes every one to stderr and to ``MUJOCO_LOG.TXT``, for each environment
    again. That a model uses what is deprecated only its authors can mend; such a remark is a
    DeprecationWarning, which Python does not show unless it is asked to.
    """
    spec = _spec_of(env)
    if spec is None or not _is_mujoco(spec):
        yield
        return
    import mujoco

    remarks: list[str] = []
    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(remarks.append)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)
        for remark in remarks:
            category = DeprecationWarning if "deprecated" in remark else UserWarning
            warnings.warn(f"{spec.id}: {remark}", category, stacklevel=1)


def _spec_of(env: str | EnvSpec) -> EnvSpec | None:
    try:
        return env if isinstance(env, EnvSpec) else gymnasium.spec(env)
    except gymnasium.error.Error:
        return None  # making it will say what is wrong


def _is_mujoco(spec: EnvSpec) -> bool:
    """Whether MuJoCo, which is not imported for others, simulates it and is installed."""
    return "mujoco" in str(spec.entry_point) and importlib.util.find_spec("mujoco") is not None
