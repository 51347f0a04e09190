"""The native CPU backend: whole steps by the fused C++ kernels, in place on the flat buffers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flame_ext.backends.torch import TorchBackend
from flame_ext.native import load_core
from flame_ext.networks import Critics, FlatMLP


class CpuBackend(TorchBackend):
    """Critic step, twin Q, target update and network evaluations by native kernels.

    The policy's loss is differentiated by autograd; what it evaluates without gradient (candidate
    Q values, samples) is native.
    """

    name = "cpu"

    def __init__(self) -> None:
        self._core = load_core()
        self._core.set_num_threads(torch.get_num_threads())

    def accelerate(self, network: FlatMLP) -> None:
        network.evaluator = NativeEvaluator(network)

    def critic_step(
        self, critics: Critics, obs: Tensor, action: Tensor, target: Tensor
    ) -> dict[str, float]:
        if critics.flat.grad is None:
            critics.flat.grad = torch.zeros_like(critics.flat)
        gradient = critics.flat.grad.zero_()
        losses, means, _ = self._core.critic_step(
            _spec(critics),
            _array(critics.flat),
            gradient.numpy(),
            _array(obs),
            _array(action),
            _array(target),
        )
        return {"critic_loss": sum(losses), "q_mean": float(np.mean(means))}

    def soft_update(self, target: Tensor, online: Tensor, tau: float) -> None:
        self._core.soft_update(_array(target), _array(online), tau)


class NativeEvaluator:
    """A network's forward pass without gradient.

    Args:
        network: A float32 network on the CPU; its flat buffer is read in place.
    """

    def __init__(self, network: FlatMLP) -> None:
        self.network, self.core = network, load_core()
        self.spec = _spec(network)

    def forward(self, blocks: tuple[Tensor, ...]) -> Tensor:
        """As `FlatMLP.forward`."""
        batch = np.broadcast_shapes(*(tuple(block.shape[:-1]) for block in blocks))
        rows = torch.cat([block.expand(*batch, -1) for block in blocks], dim=-1)
        flat_rows = rows.reshape(-1, rows.shape[-1])
        out = self.core.mlp_forward(self.spec, _array(self.network.flat), _array(flat_rows))
        return torch.from_numpy(out).view(self.network.members, *batch, -1)

    def candidates(self, obs: Tensor, action: Tensor) -> Tensor:
        """As `Critics.candidate_q_min`: layer one's observation part once per state."""
        q = self.core.twin_q(
            self.spec, _array(self.network.flat), _array(obs), _array(action.contiguous())
        )
        return torch.from_numpy(q)


def _spec(network: FlatMLP) -> Any:
    return load_core().MlpSpec(
        list(network.layer_sizes),
        members=network.members,
        activation=network.activation,
        layer_norm=network.layer_norm,
    )


def _array(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.detach().numpy()
    return array
