"""Multi-layer perceptrons whose parameters live in one flat buffer.

One contiguous buffer per network makes Adam, the soft target update, checkpoints and the native
kernels one operation each; the layout below is the single truth that C++ reads too.

Layout, per layer in order: weight ``(members, out, in)``, bias ``(members, out)`` and, for hidden
layers with LayerNorm, gain and offset ``(members, out)``. Every tensor starts at a multiple of
`PARAMETER_ALIGNMENT` floats; padding is zero and receives no gradient.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flame_ext.constants import constant
from flame_ext.sampling import (
    LAYER_NORM_EPS,
    LOG_STD_MAX,
    LOG_STD_MIN,
    PARAMETER_ALIGNMENT,
    TIME_FEATURES,
    TIME_FREQUENCIES,
    Activation,
    CandidateSampling,
)
from flame_ext.scalars import Scalar


def _relu_derivative(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def _silu_derivative(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _mish_derivative(x: Tensor) -> Tensor:
    t = torch.tanh(F.softplus(x))
    return t + x * (1 - t * t) * torch.sigmoid(x)


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "relu": (F.relu, _relu_derivative),
    "silu": (F.silu, _silu_derivative),
    "mish": (F.mish, _mish_derivative),
}


@dataclass(frozen=True)
class Layer:
    """Views of one layer's parameters; `gain` and `offset` are None without LayerNorm."""

    weight: Tensor
    bias: Tensor
    gain: Tensor | None
    offset: Tensor | None


class Evaluator(Protocol):
    """Evaluates a network faster than PyTorch does; only critics are asked for Q.

    Attributes:
        differentiates_forward: Whether `forward` records a gradient.
    """

    differentiates_forward: bool

    def forward(self, blocks: tuple[Tensor, ...]) -> Tensor:
        """As `FlatMLP.forward`, at most once differentiable."""

    def candidates(self, obs: Tensor, action: Tensor) -> Tensor:
        """As `Critics.candidate_q_min`, without gradient."""

    def q_min(self, obs: Tensor, action: Tensor) -> Tensor:
        """As `Critics.q_min` for rows, differentiable with respect to the action alone."""

    def reweighted_velocity(
        self,
        obs: Tensor,
        z: Tensor,
        signal: Tensor,
        scale: Tensor,
        alpha: Scalar,
        num_candidates: int,
        sampling: CandidateSampling,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        """Velocity and ESS of `policies.reweighting.reverse_reweighted`, without gradient."""


class FlatMLP(nn.Module):
    """An ensemble of equally shaped MLPs over one flat parameter.

    The input is given as column blocks (for a critic: action, observation) that broadcast against
    each other. The first layer is linear, so each block is multiplied once at its own shape: with
    K candidate actions per state the observation's part is computed once per state, exactly.

    Args:
        block_sizes: Columns of each input block, in the weight's column order.
        hidden_sizes: Width of each hidden layer.
        output_size: Columns of the output.
        members: Networks in the ensemble (2 for twin critics).
        activation: Hidden activation.
        layer_norm: Normalise hidden pre-activations, with learned gain and offset.
        generator: Source of the initial weights.
    """

    def __init__(
        self,
        block_sizes: Sequence[int],
        hidden_sizes: Sequence[int],
        output_size: int,
        *,
        members: int = 1,
        activation: Activation = "mish",
        layer_norm: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation={activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}"
            )
        self.block_sizes = tuple(block_sizes)
        self.layer_sizes = (sum(block_sizes), *hidden_sizes, output_size)
        self.members = members
        self.activation = activation
        self.layer_norm = layer_norm
        self._shapes = self._parameter_shapes()
        self._split = [size for shape in self._shapes for size in _padded(math.prod(shape))]
        self.flat = nn.Parameter(torch.zeros(sum(self._split)))
        self.evaluator: Evaluator | None = None
        self.reset_parameters(generator)

    def _parameter_shapes(self) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []
        last = len(self.layer_sizes) - 2
        for i, (fan_in, fan_out) in enumerate(
            zip(self.layer_sizes[:-1], self.layer_sizes[1:], strict=True)
        ):
            shapes += [(self.members, fan_out, fan_in), (self.members, fan_out)]
            if self.layer_norm and i < last:
                shapes += [(self.members, fan_out)] * 2
        return shapes

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws U(-1/sqrt(fan_in), 1/sqrt(fan_in)) weights and biases, as `nn.Linear` does."""
        for layer in self.layers():
            bound = 1 / math.sqrt(max(layer.weight.shape[-1], 1))
            layer.weight.uniform_(-bound, bound, generator=generator)
            layer.bias.uniform_(-bound, bound, generator=generator)
            if layer.gain is not None and layer.offset is not None:
                layer.gain.fill_(1)
                layer.offset.zero_()

    @torch.no_grad()
    def scale_output_layer(self, scale: float) -> None:
        """Multiplies the output layer by `scale` (small: the network starts near zero)."""
        output = self.layers()[-1]
        output.weight.mul_(scale)
        output.bias.mul_(scale)

    def layers(self) -> list[Layer]:
        """Views of the parameters; autograd gathers their gradients into ``flat.grad``."""
        # `split` has one backward node for the whole buffer; slicing would allocate a full-size
        # gradient for every view.
        parts = torch.split(self.flat, self._split)[::2]
        tensors = iter(part.view(shape) for part, shape in zip(parts, self._shapes, strict=True))
        count = len(self.layer_sizes) - 1
        layers = []
        for i in range(count):
            normed = self.layer_norm and i < count - 1
            weight, bias = next(tensors), next(tensors)
            gain, offset = (next(tensors), next(tensors)) if normed else (None, None)
            layers.append(Layer(weight, bias, gain, offset))
        return layers

    def forward(self, *blocks: Tensor) -> Tensor:
        """Evaluates the ensemble.

        Args:
            *blocks: One tensor ``(..., block_sizes[i])`` per block, batch shapes broadcastable.

        Returns:
            ``(members, ..., output_size)``.
        """
        native = self.evaluator
        if native is not None and (native.differentiates_forward or not torch.is_grad_enabled()):
            return native.forward(blocks)
        layers = self.layers()
        activation = ACTIVATIONS[self.activation][0]
        h = self._first_layer(layers[0], blocks)
        for previous, layer in itertools.pairwise(layers):
            h = _affine(activation(_normalise(h, previous)), layer)
        return h

    def forward_with_tangents(
        self, blocks: Sequence[Tensor], tangents: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        """Evaluates the ensemble and its directional derivatives in one forward-mode pass.

        Both results are differentiable, so a loss may contain the Jacobian itself.

        Args:
            blocks: As in `forward`.
            tangents: Tangent of each block, None for zero. Shapes ``(T, ..., block_sizes[i])``
                with a leading axis of T directions, the rest broadcastable with the blocks.

        Returns:
            Output ``(members, ..., output_size)`` and tangents ``(members, T, ..., output_size)``.
        """
        layers = self.layers()
        value, derivative = ACTIVATIONS[self.activation]
        h = self._first_layer(layers[0], blocks)
        dh = self._first_layer(layers[0], tangents, bias=False)
        for previous, layer in itertools.pairwise(layers):
            h, dh = _normalise_with_tangents(h, dh, previous)
            dh = _affine(dh * derivative(h).unsqueeze(1), layer, bias=False)
            h = _affine(value(h), layer)
        return h, dh.expand(dh.shape[0], dh.shape[1], *h.shape[1:])

    def _first_layer(
        self, layer: Layer, blocks: Sequence[Tensor | None], bias: bool = True
    ) -> Tensor:
        if len(blocks) != len(self.block_sizes):
            raise ValueError(
                f"got {len(blocks)} input blocks, this network takes {len(self.block_sizes)} "
                f"with {self.block_sizes} columns"
            )
        h: Tensor | None = None
        columns = torch.split(layer.weight, list(self.block_sizes), dim=-1)
        for block, weight in zip(blocks, columns, strict=True):
            if block is None or weight.shape[-1] == 0:
                continue
            if block.shape[-1] != weight.shape[-1]:
                raise ValueError(
                    f"an input block has {block.shape[-1]} columns, expected {weight.shape[-1]}"
                )
            part = _matmul(block.unsqueeze(0), weight)
            h = part if h is None else h + part
        if h is None:
            raise ValueError("all input blocks are empty")
        return h + _broadcast(layer.bias, h) if bias else h


def _padded(size: int) -> tuple[int, int]:
    return size, -size % PARAMETER_ALIGNMENT


def _broadcast(parameter: Tensor, like: Tensor) -> Tensor:
    """Reshapes ``(members, out)`` to broadcast against ``(members, ..., out)``."""
    return parameter.view(parameter.shape[0], *[1] * (like.dim() - 2), parameter.shape[1])


def _matmul(x: Tensor, weight: Tensor) -> Tensor:
    """``(members or 1, ..., in) x (members, out, in) -> (members, ..., out)``."""
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    out = torch.matmul(rows, weight.mT)
    return out.view(weight.shape[0], *x.shape[1:-1], weight.shape[1])


def _affine(x: Tensor, layer: Layer, bias: bool = True) -> Tensor:
    if not bias:
        return _matmul(x, layer.weight)
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    out = torch.baddbmm(layer.bias.unsqueeze(1), rows, layer.weight.mT)
    return out.view(*x.shape[:-1], layer.weight.shape[1])


def _normalise(h: Tensor, layer: Layer) -> Tensor:
    """The layer's LayerNorm, or `h` itself where the layer has none."""
    if layer.gain is None or layer.offset is None:
        return h
    normed = F.layer_norm(h, h.shape[-1:], eps=LAYER_NORM_EPS)
    return torch.addcmul(_broadcast(layer.offset, h), normed, _broadcast(layer.gain, h))


def _normalise_with_tangents(h: Tensor, dh: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """LayerNorm of `h` ``(members, ..., out)`` and its tangents ``(members, T, ..., out)``."""
    if layer.gain is None or layer.offset is None:
        return h, dh
    centred = h - h.mean(-1, keepdim=True)
    inverse_std = (centred.square().mean(-1, keepdim=True) + LAYER_NORM_EPS).rsqrt()
    normed = centred * inverse_std
    lifted = normed.unsqueeze(1)
    along = (lifted * dh).mean(-1, keepdim=True)
    dnormed = (dh - dh.mean(-1, keepdim=True) - lifted * along) * inverse_std.unsqueeze(1)
    gain = _broadcast(layer.gain, h)
    return _broadcast(layer.offset, h) + gain * normed, gain.unsqueeze(1) * dnormed


_FREQUENCIES = tuple(TIME_FREQUENCIES.tolist())


def time_features(t: Tensor, r: Tensor) -> Tensor:
    """Low-frequency embedding of a time interval.

    Args:
        t: End time, ``(..., 1)``, in [0, 1].
        r: Start time, same shape, r <= t.

    Returns:
        ``(..., TIME_FEATURES)``: sin and cos of w t, then of w (t - r).
    """
    frequencies = constant(_FREQUENCIES, t)
    at, over = t * frequencies, (t - r) * frequencies
    return torch.cat([at.sin(), at.cos(), over.sin(), over.cos()], dim=-1)


class MeanVelocityNet(FlatMLP):
    """The average velocity u(z, r, t, s) of a MeanFlow (Geng et al. 2025, Eq. 3).

    Input columns: z (A), observation (O), time features (`TIME_FEATURES`). ``u(z, t, t, s)`` is
    the instantaneous velocity, so the same network serves rectified (multi-step) flow.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden_sizes: Sequence[int] = (256, 256),
        *,
        activation: Activation = "mish",
        layer_norm: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            (action_dim, obs_dim, TIME_FEATURES),
            hidden_sizes,
            action_dim,
            activation=activation,
            layer_norm=layer_norm,
            generator=generator,
        )
        self.obs_dim, self.action_dim = obs_dim, action_dim

    @torch.no_grad()
    def start_as_contraction(self, std: float, steps: int = 1, noise: float = 0.1) -> None:
        """Makes the initial policy of `steps` close to N(0, std^2) for every state, without folds.

        2 A units of every hidden layer carry z through: act(x) - act(-x) is x for relu and silu,
        and for mish, whose slope at 0 is 0.6, near 1.2 x where x is small: it carries z / 4. The
        output then starts as (1 - std^(1 / steps)) steps z plus `noise` times its random
        initialisation. A freshly drawn network has u near 0 instead, so its actions are the unit
        Gaussian, mostly on the box's walls.

        Raises:
            ValueError: If a hidden layer has fewer than 2 A units.
        """
        a = self.action_dim
        layers = self.layers()
        if min(layer.weight.shape[1] for layer in layers[:-1]) < 2 * a:
            raise ValueError(
                f"hidden layers of {self.layer_sizes[1:-1]} units are too narrow for {a} action "
                f"dimensions; give at least {2 * a}"
            )
        eye = torch.eye(a, dtype=self.flat.dtype, device=self.flat.device)
        gain, scale = (1.2, 0.25) if self.activation == "mish" else (1.0, 1.0)
        for i, layer in enumerate(layers[:-1]):
            weight = layer.weight[0, : 2 * a]
            weight.zero_()
            layer.bias[0, : 2 * a] = 0
            signs = (scale * eye,) if i == 0 else (eye / gain, -eye / gain)
            weight[:, : len(signs) * a] = torch.cat([torch.cat(signs, 1), -torch.cat(signs, 1)])
        self.scale_output_layer(noise)
        slope = steps * (1 - std ** (1 / steps)) / (gain * scale)
        layers[-1].weight[0, :, : 2 * a] += slope * torch.cat([eye, -eye], dim=1)

    def velocity(self, z: Tensor, r: Tensor, t: Tensor, obs: Tensor) -> Tensor:
        """u(z, r, t, s): z ``(..., A)``, r and t ``(..., 1)``, obs ``(..., O)`` -> ``(..., A)``."""
        output: Tensor = self(z, obs, time_features(t, r))
        return output[0]

    def velocity_and_jvp(
        self, z: Tensor, r: Tensor, t: Tensor, obs: Tensor, dz: Tensor
    ) -> tuple[Tensor, Tensor]:
        """U and its derivative along (dz, dr, dt) = (dz, 0, 1), the MeanFlow tangent."""
        frequencies = constant(_FREQUENCIES, t)
        at, over = t * frequencies, (t - r) * frequencies
        dfeatures = [at.cos(), -at.sin(), over.cos(), -over.sin()]
        dtime = torch.cat([frequencies * d for d in dfeatures], dim=-1)
        u, du = self.forward_with_tangents(
            (z, obs, time_features(t, r)), (dz.unsqueeze(0), None, dtime.unsqueeze(0))
        )
        return u[0], du[0, 0]

    def directional_derivative(
        self, z: Tensor, r: Tensor, t: Tensor, obs: Tensor, direction: Tensor
    ) -> tuple[Tensor, Tensor]:
        """U and J direction with J = du/dz, both ``(..., A)``."""
        u, du = self.forward_with_tangents(
            (z, obs, time_features(t, r)), (direction.unsqueeze(0), None, None)
        )
        return u[0], du[0, 0]

    def velocity_and_jacobian(
        self, z: Tensor, r: Tensor, t: Tensor, obs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """U ``(..., A)`` and J = du/dz ``(..., A, A)``, differentiable, by A forward tangents."""
        directions = torch.eye(self.action_dim, dtype=z.dtype, device=z.device)
        directions = directions.view(-1, *[1] * (z.dim() - 1), self.action_dim)
        u, columns = self.forward_with_tangents(
            (z, obs, time_features(t, r)), (directions, None, None)
        )
        return u[0], columns[0].movedim(0, -1)


class GaussianPolicyNet(FlatMLP):
    """Mean and log standard deviation of a tanh-squashed Gaussian (Haarnoja et al. 2018)."""

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden_sizes: Sequence[int] = (256, 256),
        *,
        activation: Activation = "mish",
        layer_norm: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            (obs_dim,),
            hidden_sizes,
            2 * action_dim,
            activation=activation,
            layer_norm=layer_norm,
            generator=generator,
        )
        self.obs_dim, self.action_dim = obs_dim, action_dim

    def distribution(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation before the tanh: obs ``(..., O)`` -> two ``(..., A)``."""
        output: Tensor = self(obs)
        return mean_and_std(output[0])


def mean_and_std(output: Tensor) -> tuple[Tensor, Tensor]:
    """Of a Gaussian policy network's output ``(..., 2 A)``, two ``(..., A)``."""
    mean, raw = output.chunk(2, dim=-1)
    half_range = 0.5 * (LOG_STD_MAX - LOG_STD_MIN)
    return mean, (LOG_STD_MIN + half_range * (torch.tanh(raw) + 1)).exp()
