"""The options of one MaxEnt off-policy algorithm; algorithms and presets are values of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from flame_ext.errors import check_choice
from flame_ext.sampling import Activation, CandidateSampling, Estimator, Flow, Trace

Algorithm = Literal["flame", "flame-r", "sac", "diffusion"]
Preset = Literal["default", "paper"]
Proposal = Literal["reverse", "policy"]
ZSource = Literal["uniform", "policy", "replay", "target"]
Temperature = Literal["entropy", "ess", "fixed"]
MatmulPrecision = Literal["float32", "bfloat16"]

ALGORITHMS: tuple[str, ...] = get_args(Algorithm)
PRESETS: tuple[str, ...] = get_args(Preset)


@dataclass(frozen=True)
class Config:
    """Every option of a run. Symbols in brackets are those of arXiv 2602.01606.

    `make_config` makes one; ``Config(algorithm=...)`` alone lacks what that algorithm's preset
    sets.

    Attributes:
        algorithm: Which policy the loop trains.
        total_steps: Environment steps of a run (transitions, summed over environments).
        num_envs: Environments stepped side by side; an environment object is one, a vector
            environment has its own number.
        learning_starts: Uniformly random steps before the first update.
        updates_per_step: Gradient updates per environment step (UTD); below 1 the fraction is
            accumulated.
        batch_size: Transitions per critic update [B].
        buffer_size: Transitions kept by the replay buffer.
        gamma: Discount factor per step.
        settle_after: Environment steps after which a run settles: a longer horizon shows falls that
            `gamma` hides, and a slower encoder gives critics and policies steadier features. None:
            never.
        settled_horizon: Factor, from then on, on the horizon 1 / (1 - gamma).
        settled_embedding_rate: Factor, from then on, on `embedding_learning_rate`.
        tau: Step of the exponential average that target critics follow.
        reward_scale: Factor on every reward before it is learned from.
        normalize_observations: Standardise observations by running mean and variance.
        hidden_sizes: Hidden widths of policy and critics.
        policy_activation: Hidden activation of the policy; a flow differentiates through it twice,
            so that relu is a poor choice there.
        critic_activation: Hidden activation of the critics.
        critic_layer_norm: LayerNorm in the critics.
        matmul_precision: What training rounds the factors of matrix products to; sums, weights and
            optimiser stay float32. ``bfloat16`` is about 1.5 times as fast and needs
            ``backend="cpu"`` and a processor with AVX512-BF16.
        embedding_dim: Length of the learned embeddings of states and of state-action pairs that
            policy and critics see beside the plain ones (`flame_ext.embeddings`); 0 learns none.
        embedding_learning_rate: Adam step of their encoder.
        embedding_tau: Step, per update of the encoder, of the exponential average of its weights
            whose embeddings are seen.
        policy_layer_norm: LayerNorm in the policy.
        critic_learning_rate: Adam step of the critics.
        policy_learning_rate: Adam step of the policy.
        final_policy_learning_rate: The policy's Adam step at the end of the run, reached linearly.
        policy_tau: Least step, per policy update, of the exponential average of all that acts
            (policy, critics, the encoder whose embeddings they see) that is evaluated and saved.
            The step is 9 / (9 + policy updates done) before; 0.0005 is reached after 18 000. 1
            keeps no average. Data are collected by the policy itself.
        policy_delay: Critic updates per update of the policy and of the encoder.
        policy_batch_size: States per policy update, the first of the last critic update's batch;
            a smaller batch is taken whole.
        initial_action_std: Standard deviation of a flow policy's first actions; not used with
            ``policy_layer_norm``, nor by the diffusion policy.
        temperature: How alpha is set: ``entropy`` holds the policy's entropy at the target (SAC),
            ``ess`` holds the effective sample size of the importance weights, ``fixed`` keeps it.
        initial_alpha: Entropy temperature at the start [alpha].
        alpha_learning_rate: Adam step of log alpha.
        alpha_interval: Critic updates per temperature update.
        target_entropy_scale: Target entropy is this times the action dimension, in nats. A tanh
            Gaussian reaches -1 by saturating; a flow's entropy is that of its unclipped map, where
            -0.75 means a standard deviation of 0.11.
        target_ess: Effective sample size that ``temperature="ess"`` holds, as a fraction of K.
        entropy_in_target: Whether the TD target subtracts alpha log pi(a'|s').
        entropy_estimator: Estimator of log pi, see `flame_ext.reference.log_prob`.
        entropy_steps: Sub-steps of the ``multi_step`` estimator.
        entropy_trace: Trace of the estimators that take one.
        num_candidates: Importance samples per (s, z, t) [K].
        candidate_sampling: How reverse candidates are drawn: ``random`` independently;
            ``stratified`` as a Latin hypercube, each coordinate once in each K-th of its
            distribution. The expectation is the same, the error under even weights that of many
            times as many.
        proposal: Where candidates come from: ``reverse`` truncated-normal reverse samples weighted
            by exp(Q / alpha); ``policy`` the policy's own samples, weighted by
            (exp(Q / alpha) / pi)^beta with beta such that the effective sample size is
            `proposal_ess` (a damped step towards the same target).
        proposal_ess: Effective sample size of ``proposal="policy"``, as a fraction of K.
        z_source: Actions that are noised to z: uniform, the policy's own, those of the replay
            buffer, or samples of the target (one candidate resampled by its weight). The
            diffusion policy takes its own.
        instantaneous_fraction: Fraction of the batch with r = t.
        acting_fraction: Fraction of the batch with (r, t) = (0, 1), the pair that acts. The reverse
            KL moves u there alone, so that the identity's time derivative means nothing: keep 0
            beside it.
        reweighting_weight: Weight of alpha times the Q-reweighted flow-matching loss.
        reverse_kl_weight: Weight of E[alpha log pi - Qmin] through the exact one-step density.
        monotonicity_margin: The one-step map should have a Jacobian whose symmetric part has no
            eigenvalue below this; a wall stands against it, quadratic down to eigenvalue 0 and
            linear below. A strictly monotone map is injective, so that its density is exact, and
            by Brenier's theorem one of them reaches any target. Without the wall, folding fakes
            entropy. 0 turns it off.
        boundary_width: Outside the box the reverse-KL target falls off as a Gaussian of this
            standard deviation around the clipped action, times a weight that grows with Q; without
            it entropy leaks out there. A narrow wall keeps actions from saturating.
        flow: ``mean`` acts along average velocities (MeanFlow), ``instantaneous`` along
            u(z, t, t, s) (rectified flow).
        sampling_steps: Network evaluations per action.
        train_particles: Best-of-N by Qmin while collecting data [N].
        exploration_noise: Standard deviation of Gaussian noise on collected actions.
        target_particles: Best-of-N by the target critics in the TD target.
        eval_particles: Best-of-N by Qmin in evaluation; the first is the action of zero noise.
        log_interval: Environment steps between rows of training metrics.
        eval_interval: Environment steps between evaluations; 0 evaluates only at the end.
        eval_episodes: Episodes per evaluation.
        checkpoint_interval: Environment steps between checkpoints; 0 saves only at the end.
    """

    algorithm: Algorithm = "flame"
    total_steps: int = 1_000_000
    num_envs: int = 5
    learning_starts: int = 5_000
    updates_per_step: float = 2.0
    batch_size: int = 64
    buffer_size: int = 1_000_000
    gamma: float = 0.99
    settle_after: int | None = 250_000
    settled_horizon: float = 2.0
    settled_embedding_rate: float = 0.25
    tau: float = 0.005
    reward_scale: float = 1.0
    normalize_observations: bool = False
    hidden_sizes: tuple[int, ...] = (256, 256)
    policy_activation: Activation = "silu"
    critic_activation: Activation = "relu"
    critic_layer_norm: bool = True
    matmul_precision: MatmulPrecision = "float32"
    embedding_dim: int = 128
    embedding_learning_rate: float = 1e-3
    embedding_tau: float = 0.002
    policy_layer_norm: bool = False
    critic_learning_rate: float = 1e-3
    policy_learning_rate: float = 1e-3
    final_policy_learning_rate: float | None = None
    policy_tau: float = 0.0005
    policy_delay: int = 4
    policy_batch_size: int = 64
    initial_action_std: float = 0.2
    temperature: Temperature = "entropy"
    initial_alpha: float = 0.05
    alpha_learning_rate: float = 3e-3
    alpha_interval: int = 1
    target_entropy_scale: float = -0.75
    target_ess: float = 0.25
    entropy_in_target: bool = False
    entropy_estimator: Estimator = "exact"
    entropy_steps: int = 1
    entropy_trace: Trace = "exact"
    num_candidates: int = 8
    candidate_sampling: CandidateSampling = "stratified"
    proposal: Proposal = "reverse"
    proposal_ess: float = 0.5
    z_source: ZSource = "replay"
    instantaneous_fraction: float = 0.5
    acting_fraction: float = 0.0
    reweighting_weight: float = 1.0
    reverse_kl_weight: float = 1.0
    monotonicity_margin: float = 0.02
    boundary_width: float = 2.0
    flow: Flow = "mean"
    sampling_steps: int = 1
    train_particles: int = 1
    exploration_noise: float = 0.0
    target_particles: int = 1
    eval_particles: int = 1
    log_interval: int = 1_000
    eval_interval: int = 10_000
    eval_episodes: int = 10
    checkpoint_interval: int = 100_000

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is None or (low <= value <= high and math.isfinite(value)):
                continue
            ends = f"{'(' if low == -_INF else '['}{low}, {high}{')' if high == _INF else ']'}"
            raise ValueError(f"{name}={value!r} is out of range; allowed: {ends}")
        if not self.hidden_sizes or min(self.hidden_sizes) < 1:
            raise ValueError(f"hidden_sizes={self.hidden_sizes!r}: give at least one width >= 1")
        if self.instantaneous_fraction + self.acting_fraction > 1:
            raise ValueError(
                f"instantaneous_fraction={self.instantaneous_fraction} and acting_fraction="
                f"{self.acting_fraction} are parts of one batch; their sum must not exceed 1"
            )
        if self.num_envs > self.buffer_size:
            raise ValueError(
                f"buffer_size={self.buffer_size} does not hold one step of num_envs={self.num_envs}"
            )
        self._check_estimator()
        if self.algorithm != "sac":
            self._check_flow()
        if self.temperature == "ess" and not self._draws_candidates:
            raise ValueError("temperature='ess' needs candidates: reweighting_weight > 0, not sac")
        if self.temperature == "ess" and self.proposal == "policy":
            raise ValueError(
                "proposal='policy' holds the effective sample size itself, at proposal_ess for "
                "every alpha: temperature='ess' would run away"
            )
        if self.algorithm == "diffusion" and (
            self.temperature == "entropy" or self.entropy_in_target
        ):
            raise ValueError(
                "the diffusion policy has no density: temperature='entropy' and entropy_in_target "
                "need one"
            )

    def _check_flow(self) -> None:
        one_step = (self.sampling_steps, self.flow) == (1, "mean")
        if self.reverse_kl_weight > 0 and not one_step:
            raise ValueError(
                "reverse_kl_weight > 0 needs the one-step policy (sampling_steps=1, flow='mean'): "
                "only there the exact density is one Jacobian"
            )
        if self.reverse_kl_weight > 0 and self.entropy_sub_steps > 1:
            raise ValueError(
                "reverse_kl_weight > 0 differentiates the density of the step that acts: "
                "entropy_estimator='multi_step' with entropy_steps > 1 would train another map"
            )
        if self.proposal == "policy" and not one_step:
            raise ValueError(
                "proposal='policy' needs the one-step policy (sampling_steps=1, flow='mean'): its "
                "density weighs its samples"
            )
        if self.reweighting_weight == self.reverse_kl_weight == 0:
            raise ValueError(
                "with reweighting_weight=0 and reverse_kl_weight=0 the policy learns nothing"
            )

    def _check_estimator(self) -> None:
        if (self.entropy_estimator, self.entropy_trace) == ("one_step_trace", "log_det"):
            raise ValueError(
                "entropy_estimator='one_step_trace' has no entropy_trace='log_det'; use 'exact' or "
                "'hutchinson'"
            )

    @property
    def entropy_sub_steps(self) -> int:
        """Steps that the estimator of the entropy takes: several of ``multi_step`` alone."""
        return self.entropy_steps if self.entropy_estimator == "multi_step" else 1

    @property
    def _draws_candidates(self) -> bool:
        return self.algorithm != "sac" and self.reweighting_weight > 0

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable copy."""
        return dataclasses.asdict(self)


_CHOICES: dict[str, tuple[str, ...]] = {
    "algorithm": ALGORITHMS,
    "policy_activation": get_args(Activation),
    "critic_activation": get_args(Activation),
    "temperature": get_args(Temperature),
    "matmul_precision": get_args(MatmulPrecision),
    "entropy_estimator": get_args(Estimator),
    "entropy_trace": get_args(Trace),
    "candidate_sampling": get_args(CandidateSampling),
    "proposal": get_args(Proposal),
    "z_source": get_args(ZSource),
    "flow": get_args(Flow),
}

# Those that may be None, and what they are otherwise.
_OPTIONAL: dict[str, float] = {"settle_after": 0, "final_policy_learning_rate": 0.0}

_INF = float("inf")
_RANGES: dict[str, tuple[float, float]] = {
    "total_steps": (1, _INF),
    "num_envs": (1, _INF),
    "learning_starts": (0, _INF),
    "updates_per_step": (0, _INF),
    "batch_size": (1, _INF),
    "buffer_size": (1, _INF),
    "gamma": (0, 1),
    "settle_after": (0, _INF),
    "settled_horizon": (1, _INF),
    "settled_embedding_rate": (0, _INF),
    "tau": (0, 1),
    "reward_scale": (1e-12, _INF),
    "critic_learning_rate": (0, _INF),
    "embedding_dim": (0, _INF),
    "embedding_learning_rate": (0, _INF),
    "embedding_tau": (1e-12, 1),
    "policy_learning_rate": (0, _INF),
    "final_policy_learning_rate": (0, _INF),
    "policy_tau": (1e-12, 1),
    "policy_delay": (1, _INF),
    "policy_batch_size": (1, _INF),
    "initial_action_std": (0, 1),
    "initial_alpha": (1e-12, _INF),
    "alpha_learning_rate": (0, _INF),
    "alpha_interval": (1, _INF),
    "target_entropy_scale": (-_INF, _INF),
    "target_ess": (0, 1),
    "entropy_steps": (1, _INF),
    "num_candidates": (1, _INF),
    "proposal_ess": (0, 1),
    "instantaneous_fraction": (0, 1),
    "acting_fraction": (0, 1),
    "reweighting_weight": (0, _INF),
    "reverse_kl_weight": (0, _INF),
    "monotonicity_margin": (0, 1),
    "boundary_width": (1e-6, _INF),
    "sampling_steps": (1, _INF),
    "train_particles": (1, _INF),
    "exploration_noise": (0, 1),
    "target_particles": (1, _INF),
    "eval_particles": (1, _INF),
    "log_interval": (1, _INF),
    "eval_interval": (0, _INF),
    "eval_episodes": (1, _INF),
    "checkpoint_interval": (0, _INF),
}

# The settings of the published code (arXiv 2602.01606 and its repository).
_PAPER: dict[str, Any] = {
    "settle_after": None,
    "learning_starts": 30_000,
    "updates_per_step": 0.2,
    "batch_size": 256,
    "hidden_sizes": (256, 256, 256),
    "embedding_dim": 0,
    "policy_activation": "mish",
    "critic_activation": "mish",
    "critic_layer_norm": False,
    "critic_learning_rate": 3e-4,
    "policy_learning_rate": 3e-4,
    "reward_scale": 0.2,
    "final_policy_learning_rate": 3e-5,
    "policy_tau": 1.0,
    "policy_delay": 2,
    "policy_batch_size": 256,
    "initial_alpha": 1.0,
    "alpha_learning_rate": 5e-3,
    "alpha_interval": 100,
    "target_entropy_scale": -3.0,
    "entropy_estimator": "multi_step",
    "entropy_steps": 4,
    "entropy_trace": "hutchinson",
    "num_candidates": 100,
    "candidate_sampling": "random",
    "proposal": "reverse",
    "z_source": "replay",
    "instantaneous_fraction": 0.0,
    "reverse_kl_weight": 0.0,
    "train_particles": 32,
    "target_particles": 32,
    "eval_particles": 32,
    "eval_episodes": 20,
}

# Where an algorithm's defaults differ from the class's: `flame`'s policy step costs several times
# `sac`'s, so it takes half of the batch.
_MULTI_STEP_DEFAULT: dict[str, Any] = {
    "num_candidates": 32,
    "eval_particles": 16,
    "initial_action_std": 0.35,
    "temperature": "ess",
    "alpha_learning_rate": 1e-3,
    "target_ess": 0.15,
}
_DEFAULT: dict[str, dict[str, Any]] = {
    "flame": {"policy_batch_size": 32},
    "flame-r": _MULTI_STEP_DEFAULT,
    "sac": {},
    "diffusion": _MULTI_STEP_DEFAULT,
}

# What makes an algorithm itself, in every preset. FLAME-R and the diffusion policy sample in
# several steps, where the exact density of section 4.1 does not apply.
_MULTI_STEP: dict[str, Any] = {
    "sampling_steps": 20,
    "proposal": "reverse",
    "reverse_kl_weight": 0.0,
    "instantaneous_fraction": 1.0,
}
_ALGORITHM: dict[str, dict[str, Any]] = {
    "flame": {},
    "flame-r": {
        **_MULTI_STEP,
        "flow": "instantaneous",
        "entropy_estimator": "multi_step",
        "entropy_trace": "hutchinson",
        "entropy_steps": 4,
    },
    "sac": {
        "sampling_steps": 1,
        "reweighting_weight": 0.0,
        "train_particles": 1,
        "target_particles": 1,
        "eval_particles": 1,
        "policy_tau": 1.0,
        "entropy_in_target": True,
        "alpha_learning_rate": 1e-3,
        "target_entropy_scale": -1.0,
    },
    "diffusion": {**_MULTI_STEP, "temperature": "ess"},
}


def make_config(
    algorithm: str = "flame",
    preset: str = "default",
    overrides: Mapping[str, Any] | Config | None = None,
) -> Config:
    """Builds a configuration: preset, then what the algorithm is, then `overrides`.

    Args:
        algorithm: One of `ALGORITHMS`.
        preset: One of `PRESETS`.
        overrides: Options by name; a complete `Config`, which must name the same algorithm, is
            returned as it is.

    Raises:
        ValueError: For an unknown name (with the nearest known one) or a value out of range.
        TypeError: For a value of the wrong type.
    """
    check_choice("algorithm", algorithm, ALGORITHMS)
    check_choice("preset", preset, PRESETS)
    if isinstance(overrides, Config):
        _check_algorithm(algorithm, overrides.algorithm)
        if preset != "default":
            raise ValueError(
                f"preset={preset!r} was given with a complete Config, which decides all"
            )
        return overrides
    fields = {field.name: field for field in dataclasses.fields(Config)}
    values: dict[str, Any] = {"algorithm": algorithm}
    values |= _PAPER if preset == "paper" else _DEFAULT[algorithm]
    values |= _ALGORITHM[algorithm]
    overrides = overrides or {}
    _check_algorithm(algorithm, overrides.get("algorithm", algorithm))
    for name, value in overrides.items():
        check_choice("option", name, fields)
        values[name] = _coerce(name, value, getattr(Config, name))
    return Config(**values)


def _check_algorithm(algorithm: str, overriding: str) -> None:
    if overriding != algorithm:
        raise ValueError(
            f"algorithm={algorithm!r} but config.algorithm={overriding!r}; choose the algorithm by "
            f"algorithm={overriding!r} (--algorithm {overriding})"
        )


def _coerce(name: str, value: Any, default: Any) -> Any:
    """Accepts numbers of numpy, lists for tuples and 1e6 for an int, as of JSON."""
    if isinstance(value, np.generic):
        value = value.item()
    if name in _OPTIONAL:
        if value is None:
            return None
        default = _OPTIONAL[name]
    if isinstance(default, tuple) and isinstance(value, (list, tuple)):
        return tuple(_coerce(name, v, 0) for v in value)
    if isinstance(default, bool):
        good = isinstance(value, bool)
    elif isinstance(default, int):
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        good = good and math.isfinite(value) and value == int(value)
    elif isinstance(default, float):
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
    else:
        good = isinstance(value, type(default))
    if not good:
        raise TypeError(
            f"{name}={value!r} is a {type(value).__name__}, expected {type(default).__name__}"
        )
    return type(default)(value)
