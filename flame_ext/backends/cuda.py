"""The native CUDA backend: whole steps by the fused kernels, in place on the flat buffers.

Kernels run on PyTorch's current stream of the tensors' device, with workspaces from PyTorch's
caching allocator; none of them allocates or synchronises by itself. An agent's updates are captured
in CUDA graphs (``FLAME_EXT_CUDA_GRAPHS=0`` launches their kernels one by one).
"""

from __future__ import annotations

import os
from typing import Any, cast

import torch
from torch import Tensor

from flame_ext.backends.cuda_call import (
    device_scalar,
    pointer,
    rows_pointer,
    run_with_workspace,
    stream,
)
from flame_ext.backends.cuda_evaluator import CudaEvaluator
from flame_ext.backends.cuda_graph import GraphedSteps
from flame_ext.backends.native_views import mlp_spec
from flame_ext.backends.samplers import native_sampler, next_action_steps
from flame_ext.backends.torch import StepRunner, TorchBackend, adam_moments, zeroed_gradient
from flame_ext.config import MatmulPrecision
from flame_ext.critics import Critics
from flame_ext.errors import BackendUnavailableError
from flame_ext.native import load_core
from flame_ext.networks import FlatMLP
from flame_ext.policies.base import Actor
from flame_ext.policies.flow import FlowActor
from flame_ext.replay import Batch
from flame_ext.scalars import Scalar, Scalars
from flame_ext.td_target import target_noise


def require_cuda() -> None:
    """Raises unless this build has the kernels and this machine a device.

    Raises:
        BackendUnavailableError: The text says which of the two is missing.
    """
    core = load_core()
    if not core.build_info()["cuda_toolkit"]:
        raise BackendUnavailableError(
            "backend='cuda' is not in this build: no nvcc was found when it was installed; "
            "reinstall where nvcc is on the PATH, or use backend='torch', 'cpu' or 'auto'"
        )
    if not core.cuda_devices():
        problem = core.cuda_problem()
        raise BackendUnavailableError(
            f"backend='cuda' finds no CUDA device{problem and f' ({problem})'}; use "
            "backend='torch', 'cpu' or 'auto'"
        )


class CudaBackend(TorchBackend):
    """Critic updates of a flow in one call, and every evaluation inside the losses, by kernels.

    Args:
        graphs: Whether updates are captured; None asks the environment.
    """

    name = "cuda"

    def __init__(self, graphs: bool | None = None) -> None:
        self._core = load_core()
        asked = os.environ.get("FLAME_EXT_CUDA_GRAPHS", "1") != "0"
        self._graphs = asked if graphs is None else graphs
        self._schedules: dict[Tensor, Tensor] = {}
        # PyTorch's determinants by MAGMA would synchronise the device, which no graph can hold.
        torch.backends.cuda.preferred_linalg_library("cusolver")

    def step_runner(self, generator: torch.Generator) -> StepRunner:
        return GraphedSteps(generator, capture=self._graphs)

    def set_learning_rate(self, optimizer: torch.optim.Adam, rate: float) -> None:
        super().set_learning_rate(optimizer, rate)
        self._schedule(optimizer)[:1].fill_(rate)  # assigning would copy from the host and wait

    def accelerate(self, network: FlatMLP, matmul_precision: MatmulPrecision = "float32") -> None:
        super().accelerate(network, matmul_precision)
        network.evaluator = CudaEvaluator(network)

    def critic_updates(
        self,
        actor: Actor,
        critics: Critics,
        target_critics: Critics,
        optimizer: torch.optim.Adam,
        batch: Batch,
        alpha: Scalar,
        generator: torch.Generator,
        updates: int = 1,
    ) -> Scalars:
        c = actor.config
        steps = next_action_steps(actor)
        # Other policies' own formulas are PyTorch's here.
        if steps is None or not isinstance(actor, FlowActor):
            return super().critic_updates(
                actor, critics, target_critics, optimizer, batch, alpha, generator, updates
            )
        if len(batch) % updates:
            raise ValueError(f"a batch of {len(batch)} transitions has no {updates} equal parts")
        flat, rows, columns = critics.flat, len(batch), actor.action_dim
        noise = target_noise(actor, batch, generator).squeeze(1)
        (group,) = optimizer.param_groups
        moments = adam_moments(optimizer)
        schedule = self._advanced_schedule(optimizer, updates)
        evaluator = cast("CudaEvaluator", actor.network.evaluator)
        tables = evaluator.device_table(steps, c.flow)
        temperature = device_scalar(alpha, flat) if c.entropy_in_target else None
        sums = flat.new_empty((2, updates, critics.members), dtype=torch.float64)
        run_with_workspace(
            self._core.cuda_critic_updates,
            flat,
            native_sampler(actor, steps),
            pointer(actor.network.flat, like=flat),
            mlp_spec(critics),
            _pair_encoder(critics),
            pointer(flat),
            pointer(moments["exp_avg"], flat.shape, flat),
            pointer(moments["exp_avg_sq"], flat.shape, flat),
            pointer(target_critics.flat, flat.shape, flat),
            updates,
            rows,
            *rows_pointer(batch.obs, (rows, actor.obs_dim), flat),
            *rows_pointer(batch.action, (rows, columns), flat),
            *rows_pointer(batch.reward, (rows,), flat),
            *rows_pointer(batch.discount, (rows,), flat),
            *rows_pointer(batch.next_obs, (rows, actor.obs_dim), flat),
            pointer(noise, (rows, columns), flat),
            c.reward_scale,
            0 if temperature is None else temperature.data_ptr(),
            c.tau,
            *group["betas"],
            group["eps"],
            *(pointer(table, table.shape, flat) for table in tables),
            schedule.data_ptr(),
            sums[0].data_ptr(),
            sums[1].data_ptr(),
        )
        return {"critic_loss": sums[0].mean(0).sum(), "q_mean": sums[1].mean()}

    def critic_step(self, critics: Critics, obs: Tensor, action: Tensor, target: Tensor) -> Scalars:
        gradient = zeroed_gradient(critics)
        sums = gradient.new_empty((2, critics.members), dtype=torch.float64)
        obs, action = (x.contiguous() for x in critics.inputs(obs, action))
        flat, rows, columns = critics.flat, len(obs), action.shape[1]
        run_with_workspace(
            self._core.cuda_critic_step,
            flat,
            mlp_spec(critics),
            pointer(flat),
            pointer(gradient),
            rows,
            columns,
            pointer(obs, (rows, obs.shape[1]), flat),
            pointer(action, (rows, columns), flat),
            pointer(target, (rows,), flat),
            sums[0].data_ptr(),
            sums[1].data_ptr(),
        )
        return {"critic_loss": sums[0].sum(), "q_mean": sums[1].mean()}

    def optimizer_step(self, optimizer: torch.optim.Adam) -> None:
        (group,) = optimizer.param_groups
        (parameter,) = group["params"]
        moments = adam_moments(optimizer)
        schedule = self._advanced_schedule(optimizer, 1)
        with torch.cuda.device(parameter.device):
            self._core.cuda_adam(
                parameter.numel(),
                pointer(parameter),
                pointer(parameter.grad, parameter.shape, parameter),
                pointer(moments["exp_avg"], parameter.shape, parameter),
                pointer(moments["exp_avg_sq"], parameter.shape, parameter),
                *group["betas"],
                group["eps"],
                schedule.data_ptr(),
                stream(parameter),
            )

    def _advanced_schedule(self, optimizer: torch.optim.Adam, updates: int) -> Tensor:
        """The schedule before `updates` steps, which are added to PyTorch's count."""
        schedule, step = self._schedule(optimizer), adam_moments(optimizer)["step"]
        schedule.view(torch.int64)[1].copy_(step)
        step += updates
        return schedule

    def _schedule(self, optimizer: torch.optim.Adam) -> Tensor:
        """Learning rate (float64) and steps taken (int64) in device memory, as `AdamSchedule`."""
        (group,) = optimizer.param_groups
        (parameter,) = group["params"]
        if parameter not in self._schedules:
            rate = parameter.new_full((2,), group["lr"], dtype=torch.float64)
            self._schedules[parameter] = rate
        return self._schedules[parameter]

    def soft_update(self, target: Tensor, online: Tensor, tau: float) -> None:
        with torch.cuda.device(target.device):
            self._core.cuda_soft_update(
                target.numel(),
                pointer(target),
                pointer(online, target.shape, target),
                tau,
                stream(target),
            )


def _pair_encoder(critics: Critics) -> tuple[Any, int] | None:
    """What critics see beside the action, as native code takes it."""
    if critics.encoder is None:
        return None
    network = critics.encoder.pair_network
    return mlp_spec(network), pointer(network.flat, like=critics.flat)
