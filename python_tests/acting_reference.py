"""Acting policies in numpy, float64 or float32, beside their packed form, for the acting tests."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from flame_ext import _core

# The last step of a flow clips; denoising steps clip inside: rows (p, q, m, n, clip).
ONE_STEP = ((1.0, -1.0, 1.0, 0.0, 0.0),)
MIN_SCALE = 1e-2  # what a state's features are at least divided by


@dataclass(frozen=True)
class Net:
    """An ensemble of MLPs in the flat layout of flame_ext.networks, with its float64 forward."""

    inputs: int
    hidden: tuple[int, ...]
    outputs: int
    activation: str
    layer_norm: bool
    members: int
    tensors: tuple[np.ndarray, ...]

    @staticmethod
    def random(rng, inputs, hidden, outputs, activation="mish", layer_norm=False, members=1):
        tensors = []
        sizes = [inputs, *hidden, outputs]
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
            # A small output keeps most actions off the bounds, where clipping would hide errors.
            scale = (1.5 if i < len(hidden) else 0.4) / np.sqrt(max(fan_in, 1))
            tensors.append(scale * rng.standard_normal((members, fan_out, fan_in)))
            tensors.append(0.1 * rng.standard_normal((members, fan_out)))
            if layer_norm and i < len(hidden):
                tensors.append(1 + 0.1 * rng.standard_normal((members, fan_out)))
                tensors.append(0.1 * rng.standard_normal((members, fan_out)))
        tensors = tuple(t.astype(np.float32) for t in tensors)
        return Net(inputs, tuple(hidden), outputs, activation, layer_norm, members, tensors)

    @property
    def flat(self) -> np.ndarray:
        return np.concatenate([np.pad(t.ravel(), (0, -t.size % 16)) for t in self.tensors])

    def __call__(self, x: np.ndarray, dtype=np.float64) -> np.ndarray:
        """x (rows, inputs) -> (members, rows, outputs)."""
        tensors = iter(self.tensors)
        h = np.broadcast_to(x.astype(dtype), (self.members, *x.shape))
        for i in range(len(self.hidden) + 1):
            weight, bias = (next(tensors).astype(dtype) for _ in range(2))
            h = h @ weight.swapaxes(1, 2) + bias[:, None]
            if i == len(self.hidden):
                return h
            if self.layer_norm:
                gain, offset = (next(tensors).astype(dtype)[:, None] for _ in range(2))
                h = h - h.mean(-1, keepdims=True)
                h = gain * h / np.sqrt((h * h).mean(-1, keepdims=True) + dtype(1e-5)) + offset
            h = activate(self.activation, h)
        raise AssertionError


def activate(name: str, x: np.ndarray) -> np.ndarray:
    if name == "relu":
        return np.maximum(x, 0)
    if name == "silu":
        return x / (1 + np.exp(-x))
    return x * np.tanh(np.logaddexp(0, x))


@dataclass(frozen=True)
class Case:
    """A flow policy with critics: packed, and the same in numpy; with embeddings, two encoders."""

    obs_dim: int
    action_dim: int
    policy: Net
    critics: Net
    features: np.ndarray
    steps: tuple[tuple[float, ...], ...]
    state_encoder: Net | None = None
    pair_encoder: Net | None = None

    @staticmethod
    def random(
        seed,
        obs_dim,
        action_dim,
        hidden=(64, 48),
        steps=ONE_STEP,
        critic_norm=True,
        embedding_dim=0,
        **options,
    ):
        rng, z = np.random.default_rng(seed), embedding_dim
        policy = Net.random(rng, action_dim + obs_dim + z + 32, hidden, action_dim, **options)
        critics = Net.random(
            rng, action_dim + obs_dim + 2 * z, hidden, 1, layer_norm=critic_norm, members=2
        )
        features = rng.uniform(-1, 1, (len(steps), 32)).astype(np.float32)
        encoders = ()
        if z:
            sizes = (obs_dim, action_dim + z)
            encoders = [Net.random(rng, n, (40, 24), z, activation="silu") for n in sizes]
        return Case(obs_dim, action_dim, policy, critics, features, steps, *encoders)

    def pack(self, **options) -> _core.PackedPolicy:
        return _core.PackedPolicy(
            kind="flow",
            obs_dim=self.obs_dim,
            action_dim=self.action_dim,
            policy=self.policy.flat,
            hidden=list(self.policy.hidden),
            activation=self.policy.activation,
            layer_norm=self.policy.layer_norm,
            time_features=self.features,
            steps=np.array(self.steps, np.float32),
            critics=self.critics.flat,
            critic_hidden=list(self.critics.hidden),
            critic_activation=self.critics.activation,
            critic_layer_norm=self.critics.layer_norm,
            **self.packed_encoders() | options,
        )

    def packed_encoders(self):
        if self.state_encoder is None:
            return {}
        return {
            "state_encoder": self.state_encoder.flat,
            "pair_encoder": self.pair_encoder.flat,
            "encoder_hidden": list(self.state_encoder.hidden),
            "embedding_dim": self.state_encoder.outputs,
            "embedding_min_scale": MIN_SCALE,
        }

    def states(self, obs, dtype) -> np.ndarray:
        """Rows (B, O) as policy and critics take them."""
        if self.state_encoder is None:
            return obs.astype(dtype)
        zs = self.state_encoder(obs, dtype)[0]
        zs = zs / np.maximum(np.abs(zs).mean(1, keepdims=True), dtype(MIN_SCALE))
        return np.concatenate([obs.astype(dtype), zs], axis=1)

    def actions(self, obs, noise, dtype=np.float64) -> np.ndarray:
        """obs (B, O), noise (B, N, A) -> (B, N, A)."""
        rows = np.repeat(self.states(obs, dtype), noise.shape[1], axis=0)
        z = noise.reshape(len(rows), self.action_dim).astype(dtype)
        for features, (p, q, m, n, clip) in zip(self.features, self.steps, strict=True):
            time = np.broadcast_to(features, (len(rows), 32)).astype(dtype)
            u = self.policy(np.concatenate([z, rows, time], axis=1), dtype)[0]
            a = p * z + q * u
            if clip:
                a = a.clip(-1, 1)
            z = m * a + n * z
        return z.clip(-1, 1).reshape(noise.shape)

    def q_min(self, obs, action, dtype=np.float64) -> np.ndarray:
        states = self.states(obs, dtype)
        if self.pair_encoder is not None:
            pairs = np.concatenate([action.astype(dtype), states[:, self.obs_dim :]], axis=1)
            action = np.concatenate([action, self.pair_encoder(pairs, dtype)[0]], axis=1)
        return self.critics(np.concatenate([action, states], axis=1), dtype)[..., 0].min(0)

    def inputs(self, batch, particles=1, seed=1):
        rng = np.random.default_rng(seed)
        obs = rng.standard_normal((batch, self.obs_dim)).astype(np.float32)
        noise = 0.4 * rng.standard_normal((batch, particles, self.action_dim))
        return obs, noise.astype(np.float32)


def assert_as_good_as_float32(got, exact, float32):
    """The kernel's error is at most twice that of the same formula in float32 numpy.

    Eight units in the last place of 1 are granted besides: with few outputs numpy's error may
    happen to be next to nothing.
    """
    assert np.isfinite(got).all()
    error = np.abs(got - exact).max()
    assert error <= 2 * np.abs(float32 - exact).max() + 1e-6, error
