"""The trained policy as robots and scripts use it: numpy in, numpy out."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import json
import secrets
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from flame_ext.config import ALGORITHMS
from flame_ext.errors import (
    BackendUnavailableError,
    RunDirectoryError,
    check_choice,
    check_seed,
)
from flame_ext.sampling import OBSERVATION_CLIP

POLICY_FILE = "policy.safetensors"
_FORMAT = 1
_TENSORS = ("actor.flat", "critics.flat")
_ENCODER_TENSORS = ("state_encoder.flat", "pair_encoder.flat")
# The options that decide what the weights mean.
_OPTIONS = (
    "hidden_sizes",
    "policy_activation",
    "policy_layer_norm",
    "critic_activation",
    "critic_layer_norm",
    "sampling_steps",
    "flow",
)
# Where a run directory keeps policies, in the order `load` looks for them.
_PLACES = ("", "best")

Array = NDArray[np.float32]
Precision = Literal["fp32", "fp16", "bf16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)


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

    def action_middle_and_half(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Environment units are middle + half * action for actions in [-1, 1]; ``(A,)`` each."""
        low, high = np.asarray(self.action_low), np.asarray(self.action_high)
        return 0.5 * (high + low), 0.5 * (high - low)

    def unit_action(self, action: NDArray[Any]) -> NDArray[np.float64]:
        """Actions ``(..., A)`` in environment units, in [-1, 1]; 0 where there is no choice."""
        middle, half = self.action_middle_and_half()
        unit: NDArray[np.float64] = (action - middle) / np.where(half > 0, half, 1.0)
        return unit


class ActingEngine(Protocol):
    """Computes actions in environment units from raw observations; safe to call from threads."""

    name: str

    def act(
        self, obs: NDArray[Any], noise: Array | None, num_particles: int, draw: int
    ) -> NDArray[np.float32]:
        """Best of N by Qmin: obs ``(B, O)``, noise ``(B, N, A)`` -> ``(B, A)``, or one row of each.

        Without noise the engine draws its own, numbered by `draw`. The engine checks the shapes:
        nothing but the kernel should stand between an observation and its action.
        """

    def q_min(self, obs: NDArray[Any], action: Array) -> NDArray[np.float32]:
        """Obs ``(B, O)``, action ``(B, A)`` in [-1, 1] -> ``(B,)``."""


class Policy:
    """Acts in environment units. Any number of threads may use one policy.

    Args:
        spec: What the policy is.
        engine: Computes the actions.
    """

    def __init__(self, spec: PolicySpec, engine: ActingEngine) -> None:
        self.spec = spec
        self.algorithm, self.env_id = spec.algorithm, spec.env_id
        self._engine = engine
        # Taking the next number from a counter is atomic, so no lock is needed.
        self._draws = itertools.count()

    def __repr__(self) -> str:
        spec = self.spec
        return (
            f"Policy({spec.algorithm} on {spec.env_id}, {spec.obs_dim} observations, "
            f"{spec.action_dim} actions, {self.backend})"
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Policy is not copied or pickled: load it again, in every process")

    @property
    def backend(self) -> str:
        """Name of the engine that computes actions."""
        return self._engine.name

    def act(
        self, obs: NDArray[Any], num_particles: int = 1, deterministic: bool = False
    ) -> NDArray[np.float32]:
        """Chooses actions.

        Args:
            obs: One observation ``(O,)`` or a batch ``(B, O)``, raw: standardisation is part of the
                policy. Dict and Tuple observations flattened as by ``gymnasium.spaces.flatten``.
            num_particles: Candidate actions per observation; the one with the highest Qmin acts
                (best-of-N). 1 is a plain sample.
            deterministic: Use the same base noise on every call, the first particle's being zero:
                equal observations give equal actions.

        Returns:
            ``(A,)`` or ``(B, A)`` within the environment's bounds; NaN where the observation has
            NaN. (An infinite one gives NaN too, but with ``normalize_observations`` it counts as
            a very large one.)

        Raises:
            ValueError: If the shape does not fit or num_particles < 1.
        """
        if num_particles < 1:
            raise ValueError(f"num_particles={num_particles}: give at least 1")
        noise = None
        if deterministic:
            noise = fixed_noise(num_particles, self.spec.action_dim)
            if np.ndim(obs) == 2:
                noise = np.tile(noise, (len(obs), 1, 1))
        return self._engine.act(obs, noise, num_particles, next(self._draws))

    def q_value(self, obs: NDArray[Any], action: NDArray[Any]) -> NDArray[np.float32]:
        """Qmin(s, a), of rewards times ``reward_scale``.

        Args:
            obs: Observations ``(B, O)``, raw.
            action: Actions ``(B, A)`` in environment units.

        Returns:
            ``(B,)``.

        Raises:
            ValueError: If a shape does not fit.
        """
        rows = observation_rows(obs, self.spec.obs_dim)
        actions = np.atleast_2d(np.asarray(action, np.float64))
        if actions.shape != (len(rows), self.spec.action_dim):
            raise ValueError(
                f"action has shape {np.shape(action)}, expected {(len(rows), self.spec.action_dim)}"
            )
        return self._engine.q_min(rows, self.spec.unit_action(actions).astype(np.float32))


def observation_rows(obs: NDArray[Any], obs_dim: int) -> NDArray[Any]:
    """One observation ``(O,)`` or a batch ``(B, O)`` as ``(B, O)``.

    Raises:
        ValueError: If the shape does not fit.
    """
    obs = np.asarray(obs)
    rows = obs[None] if obs.ndim == 1 else obs
    if rows.ndim != 2 or rows.shape[1] != obs_dim:
        raise ValueError(
            f"obs has shape {obs.shape}, this policy takes ({obs_dim},) or (B, {obs_dim})"
        )
    return rows


def network_observations(obs: NDArray[Any], tensors: Mapping[str, Array]) -> Array:
    """Observations ``(B, O)`` as the networks take them: standardised if in training they were."""
    rows = np.asarray(obs, np.float32)
    if "normalizer.shift" not in tensors:
        return rows
    rows = (rows - tensors["normalizer.shift"]) * tensors["normalizer.scale"]
    return np.clip(rows, -OBSERVATION_CLIP, OBSERVATION_CLIP)


@functools.lru_cache(maxsize=32)
def fixed_noise(num_particles: int, action_dim: int) -> Array:
    """Base noise of deterministic acting ``(N, A)``: zero, then fixed standard normal rows."""
    noise = np.random.default_rng(0).standard_normal((num_particles, action_dim), np.float32)
    noise[0] = 0
    noise.setflags(write=False)
    return noise


def make_engine(
    spec: PolicySpec,
    tensors: Mapping[str, Array],
    *,
    backend: str = "auto",
    precision: Precision = "fp32",
    seed: int = 0,
) -> ActingEngine:
    """The engine that acts for a policy: native without torch, or PyTorch.

    Args:
        spec: What the policy is.
        tensors: ``actor.flat``, ``critics.flat``; for embeddings ``state_encoder.flat`` and
            ``pair_encoder.flat``, for normalised observations ``normalizer.shift`` and
            ``normalizer.scale``; float32.
        backend: ``cpu`` (native), ``torch``, or ``auto``: native, or PyTorch with a warning where
            the module does not load.
        precision: How the weights of the policy are stored, ``fp32``, ``fp16`` or ``bf16``; the two
            of 16 bits native only.
        seed: Seeds the engine's own noise.

    Raises:
        ValueError: For an unknown backend, or a precision where it is not offered.
        BackendUnavailableError: If the native module does not load and ``cpu`` is asked for or
            torch is not installed.
    """
    check_choice("backend", backend, ("auto", "cpu", "torch"))
    if backend != "torch":
        try:
            from flame_ext.acting.native import NativeActingEngine

            return NativeActingEngine(spec, tensors, seed=seed, precision=precision)
        except ImportError as error:
            if backend == "cpu" or importlib.util.find_spec("torch") is None:
                raise BackendUnavailableError(str(error)) from error
            warnings.warn(f"acting in PyTorch: {error}", RuntimeWarning, stacklevel=3)
    if precision != "fp32":
        raise ValueError(f"precision={precision!r} needs the native backend; use 'fp32'")
    from flame_ext.acting.pytorch import TorchActingEngine

    return TorchActingEngine(spec, tensors, seed=seed)


def save_policy(path: Path, spec: PolicySpec, tensors: Mapping[str, Array]) -> None:
    """Writes one self-contained safetensors file, atomically; it holds no code."""
    from safetensors.numpy import save

    header = json.dumps({"format": _FORMAT, **dataclasses.asdict(spec)})
    data = save({name: np.ascontiguousarray(t) for name, t in tensors.items()}, {"policy": header})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def load(
    path: str | Path,
    *,
    backend: str = "auto",
    precision: Precision = "fp32",
    seed: int | None = None,
) -> Policy:
    """Loads a policy to act with.

    Args:
        path: A policy file, or a run directory for the latest policy and ``RUN_DIR/best`` for the
            best evaluated one.
        backend: ``auto``, ``cpu`` or ``torch``, see `make_engine`.
        precision: ``fp32``, ``fp16`` or ``bf16``, see `make_engine`.
        seed: Seeds the noise of stochastic actions; None draws a fresh one.

    Raises:
        RunDirectoryError: If no policy is there, or the file is not one.
        ValueError: If the policy is of an algorithm that this version does not know, or the seed
            is no whole number from 0 to 2^63 - 1.
    """
    seed = secrets.randbits(63) if seed is None else check_seed(seed)
    spec, tensors = read_policy(path)
    return Policy(spec, make_engine(spec, tensors, backend=backend, precision=precision, seed=seed))


def read_policy(path: str | Path) -> tuple[PolicySpec, dict[str, Array]]:
    """What a saved policy is, and its weights by name; arguments and errors as in `load`."""
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
        for size in ("obs_dim", "action_dim"):
            header[size] = int(header[size])
        for bound in ("action_low", "action_high"):
            header[bound] = tuple(map(float, header[bound]))
            if len(header[bound]) != header["action_dim"]:
                raise RunDirectoryError(f"{file} has {len(header[bound])} values of {bound}")
        spec = PolicySpec(**header)
        encoder = _ENCODER_TENSORS if spec.config.get("embedding_dim") else ()
        _check_present(file, "weights", _TENSORS + encoder, tensors)
        _check_present(file, "options", _OPTIONS, spec.config)
    # Text that is not of this form; JSONDecodeError is a ValueError.
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunDirectoryError(f"{file} is not a flame_ext policy: {error}") from error
    check_choice("algorithm", spec.algorithm, ALGORITHMS)
    return spec, tensors


def _check_present(
    file: Path, what: str, wanted: Sequence[str], present: Mapping[str, object]
) -> None:
    missing = [name for name in wanted if name not in present]
    if missing:
        raise RunDirectoryError(f"{file} lacks the {what} {', '.join(missing)}")


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.exists():
        raise RunDirectoryError(f"there is no {path}")
    for place in _PLACES:
        if (path / place / POLICY_FILE).is_file():
            return path / place / POLICY_FILE
    raise RunDirectoryError(
        f"no policy in {path}: expected {POLICY_FILE} there or in its best/ folder. "
        "Was the run stopped before its first checkpoint?"
    )
