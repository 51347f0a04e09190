"""Acting through the native CPU kernels where policy and critics see learned embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flame_ext.acting.native import NativeActingEngine
from flame_ext.native import load_core
from flame_ext.policy import Array, PolicySpec, Precision, network_observations, observation_rows
from flame_ext.sampling import EMBEDDING_MIN_SCALE


class EmbeddedActingEngine(NativeActingEngine):
    """The native engine of a policy with embeddings; encoder and critics keep float32."""

    def __init__(
        self,
        spec: PolicySpec,
        tensors: Mapping[str, Array],
        *,
        seed: int,
        precision: Precision = "fp32",
    ) -> None:
        super().__init__(spec, tensors, seed=seed, precision=precision)
        self._obs_dim, self._tensors = spec.obs_dim, tensors
        self._middle, self._half = spec.action_middle_and_half()
        self._core = load_core()
        self._networks = _network_specs(spec, self._core)

    def act(
        self, obs: NDArray[Any], noise: Array | None, num_particles: int, draw: int
    ) -> NDArray[np.float32]:
        states = self._observe(observation_rows(obs, self._obs_dim))
        samples = np.repeat(states, num_particles, axis=0)
        if noise is not None:
            noise = noise.reshape(len(samples), 1, -1)
        action = super().act(samples, noise, 1, draw)
        if num_particles > 1:
            unit = ((action - self._middle) / self._half).astype(np.float32)
            q = self._q_min(samples, unit).reshape(len(states), num_particles)
            best = np.where(np.isnan(q), -np.inf, q).argmax(1)
            action = action.reshape(len(states), num_particles, -1)[np.arange(len(states)), best]
        return action[0] if np.ndim(obs) == 1 else action

    def q_min(self, obs: NDArray[Any], action: Array) -> NDArray[np.float32]:
        return self._q_min(self._observe(obs), action)

    def _observe(self, obs: NDArray[Any]) -> NDArray[np.float32]:
        """As `flame_ext.embeddings.StateActionEncoder.observe`, of raw observations."""
        rows = network_observations(obs, self._tensors)
        state = self._forward("state_encoder", rows)[0]
        state /= np.maximum(np.abs(state).mean(-1, keepdims=True), EMBEDDING_MIN_SCALE)
        return np.concatenate([rows, state], axis=1)

    def _q_min(self, states: Array, action: Array) -> NDArray[np.float32]:
        pair = self._forward("pair_encoder", action, states[:, self._obs_dim :])[0]
        q: NDArray[np.float32] = self._forward("critics", action, pair, states)[..., 0].min(0)
        return q

    def _forward(self, name: str, *blocks: Array) -> NDArray[np.float32]:
        rows = np.concatenate(blocks, axis=1)
        output: NDArray[np.float32] = self._core.mlp_forward(
            self._networks[name], self._tensors[f"{name}.flat"], rows
        )
        return output


def _network_specs(spec: PolicySpec, core: Any) -> dict[str, Any]:
    """Shapes of encoder and critics, as `flame_ext.build` makes them."""
    options, width = spec.config, spec.config["embedding_dim"]
    hidden = list(options["hidden_sizes"])

    def encoder(inputs: int) -> Any:
        sizes = [inputs, *hidden, width]
        return core.MlpSpec(sizes, members=1, activation="silu", layer_norm=False)

    return {
        "state_encoder": encoder(spec.obs_dim),
        "pair_encoder": encoder(spec.action_dim + width),
        "critics": core.MlpSpec(
            [spec.action_dim + spec.obs_dim + 2 * width, *hidden, 1],
            members=2,
            activation=options["critic_activation"],
            layer_norm=options["critic_layer_norm"],
        ),
    }
