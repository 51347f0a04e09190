"""Networks, tensors and samplers as native code takes them."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flame_ext.native import load_core
from flame_ext.networks import FlatMLP
from flame_ext.sampling import (
    LOG_STD_RANGE,
    Flow,
    ddim_steps,
    flow_steps,
    step_rows,
    time_feature_rows,
)


def mlp_spec(network: FlatMLP, bfloat16: bool = False) -> Any:
    """The network's shape as the kernels take it, with the precision of the CPU's products."""
    shape = tuple(network.layer_sizes), network.members, network.activation, network.layer_norm
    return _mlp_spec(*shape, bfloat16)


@functools.cache
def _mlp_spec(
    sizes: tuple[int, ...], members: int, activation: str, layer_norm: bool, bfloat16: bool
) -> Any:
    return load_core().MlpSpec(
        list(sizes),
        members=members,
        activation=activation,
        layer_norm=layer_norm,
        bfloat16=bfloat16,
    )


def array(tensor: Tensor) -> NDArray[np.float32]:
    """The tensor's memory as numpy."""
    values: NDArray[np.float32] = tensor.detach().numpy()
    return values


@functools.cache
def flow_table(steps: int, flow: Flow) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Time features ``(steps, F)`` and step scales ``(steps,)`` of `flow_steps`."""
    table = flow_steps(steps, flow)
    return time_feature_rows(table), np.array([step.q for step in table], np.float32)


@functools.cache
def gaussian_sampler(spec: Any) -> Any:
    """The tanh Gaussian of a network."""
    return load_core().PolicySampler.gaussian(spec, LOG_STD_RANGE)


@functools.cache
def flow_sampler(spec: Any, steps: int, flow: Flow) -> Any:
    """`steps` steps along the flow of a network."""
    return load_core().PolicySampler.flow(spec, *flow_table(steps, flow))


@functools.cache
def denoising_sampler(spec: Any, steps: int) -> Any:
    """`steps` denoising steps of a network."""
    table = ddim_steps(steps)
    return load_core().PolicySampler.denoising(spec, time_feature_rows(table), step_rows(table))
