"""Named choices and samplers as tables of numbers, shared by PyTorch and the native acting policy.

Needs numpy only: a saved policy acts without torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Activation = Literal["relu", "silu", "mish"]
Flow = Literal["mean", "instantaneous"]
Estimator = Literal["exact", "multi_step", "one_step_trace"]
Trace = Literal["exact", "hutchinson", "log_det"]
CandidateSampling = Literal["stratified", "random"]

# Low frequencies keep the MeanFlow tangent bounded: with sinusoids up to 50 rad training diverged.
TIME_FREQUENCIES = np.linspace(0.5, 3.0, 8)
TIME_FEATURES = 4 * len(TIME_FREQUENCIES)

# Every tensor of a flat parameter buffer starts at a multiple of so many floats.
PARAMETER_ALIGNMENT = 16
LAYER_NORM_EPS = 1e-5

# Bounds of a Gaussian policy's log standard deviation.
LOG_STD_RANGE = LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0

# Standardised observations beyond this say more about an untrained estimate than about the state.
OBSERVATION_CLIP = 10.0

# Guards the division by an embedding's mean absolute value.
EMBEDDING_MIN_SCALE = 1e-8
# Of the encoder's hidden layers.
EMBEDDING_ACTIVATION: Activation = "silu"

# The cosine schedule's offset (Nichol and Dhariwal 2021), and the least signal it leaves at t = 1.
_OFFSET = 0.008
_MIN_SIGNAL = 0.02


@dataclass(frozen=True)
class SamplerStep:
    """One network evaluation: ``x = p z + q net(z, r, t, s)``, then ``z <- m x + n z``.

    Attributes:
        r: Start time that the network is given.
        t: End time that the network is given.
        p: See above.
        q: See above.
        m: See above.
        n: See above.
        clip: Whether x is clipped to [-1, 1] first.
    """

    r: float
    t: float
    p: float
    q: float
    m: float
    n: float
    clip: bool


def flow_steps(steps: int, flow: Flow) -> list[SamplerStep]:
    """Z <- z - (t - r) u(z, r, t, s) over equal intervals; Euler on u(z, t, t, s) if instantaneous.

    (MeanFlow, Geng et al. 2025, Alg. 2; rectified flow, Liu et al. 2023.)
    """
    table = []
    for i in range(steps):
        t, r = 1 - i / steps, 1 - (i + 1) / steps
        table.append(SamplerStep(r if flow == "mean" else t, t, 1.0, r - t, 1.0, 0.0, False))
    return table


def ddim_steps(steps: int) -> list[SamplerStep]:
    """DDIM with eta = 0 (Song et al. 2021, Eq. 12); the predicted action is clipped.

    Clipping keeps the first steps stable, where 1 / signal is large.
    """
    table = []
    for i in range(steps):
        t = 1 - i / steps
        signal, scale = signal_and_scale(t)
        next_signal, next_scale = signal_and_scale(t - 1 / steps)
        n = next_scale / scale
        table.append(
            SamplerStep(t, t, 1 / signal, -scale / signal, next_signal - n * signal, n, True)
        )
    return table


def signal_and_scale(t: float) -> tuple[float, float]:
    """sqrt(alpha_bar) and sqrt(1 - alpha_bar) of the cosine schedule at t in [0, 1]."""
    quarter = 0.5 * math.pi / (1 + _OFFSET)
    signal = math.cos((t + _OFFSET) * quarter) / math.cos(_OFFSET * quarter)
    signal = min(max(signal, _MIN_SIGNAL), 1.0)
    return signal, math.sqrt(1 - signal * signal)


def time_feature_rows(table: list[SamplerStep]) -> NDArray[np.float32]:
    """The network's time columns of each step, ``(steps, TIME_FEATURES)``."""
    t = np.array([[step.t] for step in table])
    r = np.array([[step.r] for step in table])
    at, over = t * TIME_FREQUENCIES, (t - r) * TIME_FREQUENCIES
    columns = [np.sin(at), np.cos(at), np.sin(over), np.cos(over)]
    return np.concatenate(columns, axis=1).astype(np.float32)


def step_rows(table: list[SamplerStep]) -> NDArray[np.float32]:
    """What each step does with the network's output, as the kernels take it, ``(steps, 5)``."""
    rows = [[step.p, step.q, step.m, step.n, step.clip] for step in table]
    return np.array(rows, np.float32)


def sampler_steps(algorithm: str, steps: int, flow: Flow) -> list[SamplerStep]:
    """The sampler of a multi- or one-step policy."""
    return ddim_steps(steps) if algorithm == "diffusion" else flow_steps(steps, flow)
