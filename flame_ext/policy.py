"""The trained policy as robots and scripts use it: numpy in, numpy out."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flame_ext.errors import RunDirectoryError

POLICY_FILE = "policy.safetensors"
_FORMAT = 1
# Where a run directory keeps policies, in the order `load` looks for them.
_PLACES = ("", "checkpoint", "best")

Array = NDArray[np.float32]


@dataclass(frozen=True)
class PolicySpec:
    """What a saved policy is, beside its weights.

    Attributes:
        algorithm: ``flame``, ``flame-r``, ``sac`` or ``diffusion``.
        config: The run's options, by name.
        obs_dim: O.
        action_dim: A.
        action_low: Lower bound of each action in environment units.
        action_high: Upper bound.
        env_id: The environment's registered id, or None.
    """

    algorithm: str
    config: Mapping[str, Any]
    obs_dim: int
    action_dim: int
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    env_id: str | None


class ActingEngine(Protocol):
    """Computes actions in [-1, 1] from normalised observations; safe to call from threads."""

    name: str

    def act(self, obs: Array, noise: Array) -> Array:
        """Obs ``(B, O)``, noise ``(B, N, A)`` -> ``(B, A)``, best of N by Qmin."""

    def q_min(self, obs: Array, action: Array) -> Array:
        """Obs ``(B, O)``, action ``(B, A)`` in [-1, 1] -> ``(B,)``."""


class Policy:
    """Acts in environment units.

    Args:
        spec: What the policy is.
        tensors: ``actor.flat``, ``critics.flat`` and, for normalised observations,
            ``normalizer.shift`` and ``normalizer.scale``; float32.
        engine: Computes actions; None builds the best one of this installation.
        seed: Seeds the noise of stochastic actions.
    """

    def __init__(
        self,
        spec: PolicySpec,
        tensors: Mapping[str, Array],
        *,
        engine: ActingEngine | None = None,
        seed: int | None = None,
    ) -> None:
        self.spec = spec
        self.algorithm, self.env_id = spec.algorithm, spec.env_id
        self._shift = tensors.get("normalizer.shift")
        self._scale = tensors.get("normalizer.scale")
        low = np.asarray(spec.action_low, np.float64)
        high = np.asarray(spec.action_high, np.float64)
        self._middle, self._half = 0.5 * (high + low), 0.5 * (high - low)
        self._rng, self._lock = np.random.default_rng(seed), threading.Lock()
        self._engine = engine or _make_engine(spec, tensors)

    @property
    def backend(self) -> str:
        """Name of the engine that computes actions."""
        return self._engine.name

    def act(
        self, obs: NDArray[Any], num_particles: int = 1, deterministic: bool = False
    ) -> NDArray[np.float32]:
        """Chooses actions.

        Args:
            obs: One observation ``(O,)`` or a batch ``(B, O)``.
            num_particles: Candidate actions per observation; the one with the highest Qmin acts
                (best-of-N). 1 is a plain sample.
            deterministic: Use the same base noise on every call, the first particle's being zero:
                equal observations give equal actions.

        Returns:
            ``(A,)`` or ``(B, A)`` within the environment's bounds.

        Raises:
            ValueError: If the shape does not fit or num_particles < 1.
        """
        rows = self._rows(obs)
        if num_particles < 1:
            raise ValueError(f"num_particles={num_particles}: give at least 1")
        shape = (len(rows), num_particles, self.spec.action_dim)
        if deterministic:
            noise = np.broadcast_to(fixed_noise(*shape[1:]), shape)
        else:
            with self._lock:
                noise = self._rng.standard_normal(shape, np.float32)
        action = self._engine.act(self._normalize(rows), noise)
        scaled = (self._middle + self._half * action).astype(np.float32)
        return scaled[0] if np.ndim(obs) == 1 else scaled

    def q_value(self, obs: NDArray[Any], action: NDArray[Any]) -> NDArray[np.float32]:
        """Qmin(s, a): obs ``(B, O)``, action ``(B, A)`` in environment units -> ``(B,)``."""
        rows = self._rows(obs)
        actions = np.atleast_2d(np.asarray(action, np.float64))
        if actions.shape != (len(rows), self.spec.action_dim):
            raise ValueError(
                f"action has shape {np.shape(action)}, expected {(len(rows), self.spec.action_dim)}"
            )
        unit = ((actions - self._middle) / self._half).astype(np.float32)
        return self._engine.q_min(self._normalize(rows), unit)

    def _rows(self, obs: NDArray[Any]) -> Array:
        rows = np.asarray(obs, np.float32)
        if rows.ndim == 1:
            rows = rows[None]
        if rows.ndim != 2 or rows.shape[1] != self.spec.obs_dim:
            raise ValueError(
                f"obs has shape {np.shape(obs)}, this policy takes ({self.spec.obs_dim},) or "
                f"(B, {self.spec.obs_dim})"
            )
        return rows

    def _normalize(self, rows: Array) -> Array:
        if self._shift is None or self._scale is None:
            return rows
        from flame_ext.normalizer import CLIP

        clipped: Array = np.clip((rows - self._shift) * self._scale, -CLIP, CLIP)
        return clipped


def fixed_noise(num_particles: int, action_dim: int) -> Array:
    """Base noise of deterministic acting ``(N, A)``: zero, then fixed standard normal rows."""
    noise = np.random.default_rng(0).standard_normal((num_particles, action_dim), np.float32)
    noise[0] = 0
    return noise


def _make_engine(spec: PolicySpec, tensors: Mapping[str, Array]) -> ActingEngine:
    from flame_ext.backends.torch_acting import TorchActingEngine

    return TorchActingEngine(spec, tensors)


def save_policy(path: Path, spec: PolicySpec, tensors: Mapping[str, Array]) -> None:
    """Writes one self-contained safetensors file, atomically; it holds no code."""
    from safetensors.numpy import save

    header = json.dumps({"format": _FORMAT, **dataclasses.asdict(spec)})
    data = save({name: np.ascontiguousarray(t) for name, t in tensors.items()}, {"policy": header})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def load(path: str | Path, *, seed: int | None = None) -> Policy:
    """Loads a policy from a run directory, its ``best/`` folder or a policy file.

    Args:
        path: A run directory gives the latest policy, ``RUN_DIR/best`` the best evaluated one.
        seed: Seeds the noise of stochastic actions.

    Raises:
        RunDirectoryError: If no policy is there, or the file is not one.
    """
    file = _find(Path(path))
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as saved:
            header = json.loads((saved.metadata() or {})["policy"])
            tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
        version = header.pop("format")
        if version != _FORMAT:
            raise RunDirectoryError(
                f"{file} has format {version}, this version of flame_ext reads {_FORMAT}"
            )
        for bound in ("action_low", "action_high"):
            header[bound] = tuple(header[bound])
        spec = PolicySpec(**header)
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise RunDirectoryError(f"{file} is not a flame_ext policy: {error}") from error
    return Policy(spec, tensors, seed=seed)


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    for place in _PLACES:
        if (path / place / POLICY_FILE).is_file():
            return path / place / POLICY_FILE
    raise RunDirectoryError(
        f"no policy in {path}: expected {POLICY_FILE} there or in its checkpoint/ or best/ folder. "
        "Was the run stopped before its first checkpoint?"
    )
