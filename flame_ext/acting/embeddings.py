"""Embeddings, and Q of critics that see them, by the native kernels and without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flame_ext.native import load_core
from flame_ext.policy import Array, PolicySpec, network_observations
from flame_ext.sampling import EMBEDDING_MIN_SCALE


class EmbeddedCritics:
    """As `flame_ext.critics.Critics` with an encoder, whose states the policy sees too.

    Args:
        spec: What the policy is.
        tensors: Its weights.
    """

    def __init__(self, spec: PolicySpec, tensors: Mapping[str, Array]) -> None:
        options, width = spec.config, spec.config["embedding_dim"]
        hidden = list(options["hidden_sizes"])
        self._core = core = load_core()
        self._tensors, self._obs_dim = tensors, spec.obs_dim

        def plain(inputs: int) -> object:
            sizes = [inputs, *hidden, width]
            return core.MlpSpec(sizes, members=1, activation="silu", layer_norm=False)

        self._specs = {
            "state_encoder": plain(spec.obs_dim),
            "pair_encoder": plain(spec.action_dim + width),
            "critics": core.MlpSpec(
                [spec.action_dim + spec.obs_dim + 2 * width, *hidden, 1],
                members=2,
                activation=options["critic_activation"],
                layer_norm=options["critic_layer_norm"],
            ),
        }

    def states(self, obs: NDArray[Any]) -> NDArray[np.float32]:
        """Raw observations ``(B, O)`` -> ``(B, O + Z)``, as policy and critics take them."""
        rows = network_observations(obs, self._tensors)
        state = self._forward("state_encoder", rows)[0]
        state /= np.maximum(np.abs(state).mean(-1, keepdims=True), EMBEDDING_MIN_SCALE)
        return np.concatenate([rows, state], axis=1)

    def q_min(self, states: Array, action: Array) -> NDArray[np.float32]:
        """Rows of `states`, action ``(B, A)`` in [-1, 1] -> ``(B,)``."""
        pair = self._forward("pair_encoder", action, states[:, self._obs_dim :])[0]
        q: NDArray[np.float32] = self._forward("critics", action, pair, states)[..., 0].min(0)
        return q

    def _forward(self, name: str, *blocks: Array) -> NDArray[np.float32]:
        rows = np.concatenate(blocks, axis=1)
        output: NDArray[np.float32] = self._core.mlp_forward(
            self._specs[name], self._tensors[f"{name}.flat"], rows
        )
        return output
