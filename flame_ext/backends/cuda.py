"""The native CUDA backend: whole steps by the fused kernels, in place on the flat buffers.

Kernels run on PyTorch's current stream of the tensors' device, with workspaces from PyTorch's
caching allocator; none of them allocates or synchronises by itself. An agent's updates are captured
in CUDA graphs (``FLAME_EXT_CUDA_GRAPHS=0`` launches their kernels one by one).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
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
from flame_ext.backends.cuda_graph import GraphedSteps
from flame_ext.backends.native_evaluator import NativeEvaluator, chooser, draw_seed
from flame_ext.backends.native_views import flow_table, mlp_spec
from flame_ext.backends.samplers import native_sampler, next_action_steps
from flame_ext.backends.torch import StepRunner, TorchBackend, adam_moments, zeroed_gradient
from flame_ext.config import MatmulPrecision
from flame_ext.critics import Critics
from flame_ext.embeddings import normalised
from flame_ext.errors import BackendUnavailableError
from flame_ext.native import load_core
from flame_ext.networks import FlatMLP, MeanVelocityNet
from flame_ext.policies.base import Actor
from flame_ext.policies.flow import FlowActor
from flame_ext.reference import denoise, tanh_gaussian
from flame_ext.replay import Batch
from flame_ext.sampling import CandidateSampling, Flow
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
        self._schedule(optimizer)[0] = rate

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
        # Other policies' own formulas and the embeddings are PyTorch's here.
        if steps is None or not isinstance(actor, FlowActor) or critics.encoder is not None:
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
            pointer(flat),
            pointer(moments["exp_avg"], flat.shape, flat),
            pointer(moments["exp_avg_sq"], flat.shape, flat),
            pointer(target_critics.flat, flat.shape, flat),
            updates,
            rows,
            *rows_pointer(batch.obs, (rows, critics.obs_dim), flat),
            *rows_pointer(batch.action, (rows, columns), flat),
            *rows_pointer(batch.reward, (rows,), flat),
            *rows_pointer(batch.terminated, (rows,), flat),
            *rows_pointer(batch.next_obs, (rows, critics.obs_dim), flat),
            pointer(noise, (rows, columns), flat),
            c.reward_scale,
            c.gamma,
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


# Compute capabilities with more than three times the rate of float32 in TF32 on tensor cores.
FAST_TF32 = ((8, 0), (9, 0))


class CudaEvaluator(NativeEvaluator):
    """A network's evaluations by CUDA kernels.

    Args:
        network: A float32 network on a CUDA device; its flat buffer is read in place.

    Attributes:
        tensor_cores: Whether tensor cores compute the products of candidate Q values, with three
            TF32 products for each so that the accuracy is that of float32.
    """

    differentiates_forward = False
    tanh_gaussian = staticmethod(tanh_gaussian)  # as PyTorch computes it

    def __init__(self, network: FlatMLP) -> None:
        super().__init__(network)
        self.tensor_cores = torch.cuda.get_device_capability(network.flat.device) in FAST_TF32
        self._tables: dict[tuple[int, Flow], tuple[Tensor, Tensor]] = {}

    def forward_rows(self, rows: Tensor, columns: int = 0) -> Tensor:
        """Without gradient, so that `columns` is always 0."""
        flat, rows = self.network.flat, rows.contiguous()
        sizes = self.network.layer_sizes
        out = rows.new_empty((self.network.members, len(rows), sizes[-1]))
        with torch.cuda.device(flat.device):
            self.core.cuda_mlp_forward(
                self.spec,
                pointer(flat),
                len(rows),
                pointer(rows, (len(rows), sizes[0]), flat),
                pointer(out),
                stream(flat),
            )
        return out

    def observe(self, obs: Tensor) -> Tensor:
        return torch.cat([obs, normalised(self.forward_rows(obs)[0])], dim=-1)

    def denoise(self, obs: Tensor, noise: Tensor, steps: int) -> Tensor:
        return denoise(cast("MeanVelocityNet", self.network), obs, noise, steps)

    def sample_gaussian(self, obs: Tensor, noise: Tensor) -> Tensor:
        return tanh_gaussian(self.forward_rows(obs)[0], noise).action

    def candidates(self, obs: Tensor, action: Tensor) -> Tensor:
        flat, obs, action = self.network.flat, obs.contiguous(), action.contiguous()
        states, candidates, columns = action.shape
        q_min = action.new_empty((states, candidates))
        run_with_workspace(
            self.core.cuda_twin_q,
            flat,
            self.spec,
            pointer(flat),
            states,
            candidates,
            columns,
            pointer(obs, (states, self.network.layer_sizes[0] - columns), flat),
            pointer(action, action.shape, flat),
            pointer(q_min),
            self.tensor_cores,
        )
        return q_min

    def q_gradient(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        flat, obs, action = self.network.flat, obs.contiguous(), action.contiguous()
        rows, columns = action.shape
        q_min, gradient = action.new_empty(rows), torch.empty_like(action)
        run_with_workspace(
            self.core.cuda_q_gradient,
            flat,
            self.spec,
            pointer(flat),
            rows,
            columns,
            pointer(obs, (rows, self.network.layer_sizes[0] - columns), flat),
            pointer(action, action.shape, flat),
            pointer(q_min),
            pointer(gradient),
        )
        return q_min, gradient

    def gap_and_gradient(self, transport: Tensor, margin: float) -> tuple[Tensor, Tensor]:
        transport = transport.contiguous()
        rows, columns = transport.shape[:2]
        gap, gradient = transport.new_empty(rows), torch.empty_like(transport)
        with torch.cuda.device(transport.device):
            self.core.cuda_monotonicity_gap(
                rows,
                columns,
                pointer(transport, (rows, columns, columns)),
                margin,
                pointer(gap),
                pointer(gradient),
                stream(transport),
            )
        return gap, gradient

    def meanflow_gradient(
        self, z: Tensor, r: Tensor, t: Tensor, obs: Tensor, velocity: Tensor
    ) -> tuple[Tensor, Tensor]:
        flat = self.network.flat
        gradient = torch.zeros_like(flat)
        loss = flat.new_empty((), dtype=torch.float64)
        z, r, t, obs, velocity = (x.detach().contiguous() for x in (z, r, t, obs, velocity))
        run_with_workspace(
            self.core.cuda_meanflow_step,
            flat,
            self.spec,
            pointer(flat),
            pointer(gradient),
            len(z),
            pointer(obs, (len(z), obs.shape[-1]), flat),
            pointer(z, z.shape, flat),
            pointer(velocity, z.shape, flat),
            pointer(r, (len(z), 1), flat),
            pointer(t, (len(z), 1), flat),
            loss.data_ptr(),
        )
        return loss.to(flat.dtype), gradient

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
        """As on the CPU, from the same uniforms for the same seed."""
        flat = self.network.flat
        obs, z, signal, scale = (x.contiguous() for x in (obs, z, signal, scale))
        rows, columns = z.shape
        velocity, ess = torch.empty_like(z), z.new_empty(rows)
        temperature, seed = device_scalar(alpha, flat), draw_seed(generator).to(flat.device)
        run_with_workspace(
            self.core.cuda_reweighted_velocity,
            flat,
            self.spec,
            pointer(flat),
            rows,
            num_candidates,
            columns,
            pointer(obs, (rows, self.network.layer_sizes[0] - columns), flat),
            pointer(z, z.shape, flat),
            pointer(signal, (rows, 1), flat),
            pointer(scale, (rows, 1), flat),
            temperature.data_ptr(),
            sampling,
            seed.data_ptr(),
            pointer(velocity),
            pointer(ess),
            self.tensor_cores,
        )
        return velocity, ess

    def best_action(
        self, obs: Tensor, noise: Tensor, critics: Critics | None, steps: int, flow: Flow
    ) -> Tensor:
        """In one call; up to 32 samples in one launch."""
        flat, obs, noise = self.network.flat, obs.contiguous(), noise.contiguous()
        states, samples, columns = noise.shape
        critics = chooser(critics, samples)
        time, scale = self.device_table(steps, flow)
        action = noise.new_empty((states, columns))
        obs_dim = self.network.layer_sizes[0] - columns - time.shape[1]
        if critics is not None and critics.obs_dim != obs_dim:
            raise ValueError(f"the policy takes {obs_dim} observations, critics {critics.obs_dim}")
        run_with_workspace(
            self.core.cuda_policy_act,
            flat,
            self.spec,
            pointer(flat),
            None if critics is None else mlp_spec(critics),
            0 if critics is None else pointer(critics.flat, None, flat),
            states,
            samples,
            pointer(obs, (states, obs_dim), flat),
            pointer(noise, noise.shape, flat),
            *time.shape,
            pointer(time),
            pointer(scale),
            pointer(action),
            self.tensor_cores,
        )
        return action

    def density(
        self,
        obs: Tensor,
        noise: Tensor,
        steps: int,
        flow: Flow,
        divergence: str,
        probe: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        flat, obs, noise = self.network.flat, obs.contiguous(), noise.contiguous()
        probe = None if probe is None else probe.contiguous()  # a copy must live until the launch
        action, log_prob = torch.empty_like(noise), torch.empty_like(noise[..., 0])
        folded = torch.empty_like(log_prob, dtype=torch.bool)
        time, scale = self.device_table(steps, flow)
        with torch.cuda.device(flat.device):
            self.core.cuda_flow_density(
                self.spec,
                pointer(flat),
                len(noise),
                noise.shape[1] if noise.dim() == 3 else 1,
                pointer(obs, (len(noise), obs.shape[-1]), flat),
                pointer(noise, noise.shape, flat),
                *time.shape,
                pointer(time),
                pointer(scale),
                divergence,
                0 if probe is None else pointer(probe, noise.shape, flat),
                pointer(action),
                pointer(log_prob),
                folded.data_ptr(),
                stream(flat),
            )
        return action, log_prob, folded

    def record_density(
        self, obs: Tensor, noise: Tensor, steps: int, flow: Flow
    ) -> tuple[tuple[Tensor, ...], RecordedStep]:
        # The backward pass reads the parameters again, as they were here.
        flat, obs, noise = self.network.flat.detach().clone(), obs.contiguous(), noise.contiguous()
        rows, columns = noise.shape
        time, scale = self.device_table(steps, flow)
        step = (self.spec, pointer(flat), rows, time.shape[1], pointer(scale))
        obs_dim = self.network.layer_sizes[0] - columns - time.shape[1]
        action, log_prob = torch.empty_like(noise), noise.new_empty(rows)
        folded = torch.empty_like(log_prob, dtype=torch.bool)
        transport = noise.new_empty((rows, columns, columns))
        record = run_with_workspace(
            self.core.cuda_flow_record,
            flat,
            *step,
            pointer(time, (1, time.shape[1]), flat),
            pointer(obs, (rows, obs_dim), flat),
            pointer(noise, noise.shape, flat),
            pointer(action),
            pointer(log_prob),
            folded.data_ptr(),
            pointer(transport),
        )
        return (action, log_prob, folded, transport), RecordedStep(step, record, (flat, scale))

    def density_gradient(self, recorded: RecordedStep, *d_outputs: Tensor) -> Tensor:
        gradient = torch.zeros_like(self.network.flat)
        d_action, d_log_prob, d_transport = (x.contiguous() for x in d_outputs)
        rows, columns = d_action.shape
        run_with_workspace(
            self.core.cuda_flow_backward,
            gradient,
            *recorded.step,
            recorded.record.data_ptr(),
            pointer(gradient),
            pointer(d_action, (rows, columns), gradient),
            pointer(d_log_prob, (rows,), gradient),
            pointer(d_transport, (rows, columns, columns), gradient),
        )
        return gradient

    def device_table(self, steps: int, flow: Flow) -> tuple[Tensor, Tensor]:
        """`flow_table`, copied to the device once."""
        if (steps, flow) not in self._tables:
            device = self.network.flat.device
            features, scales = (torch.from_numpy(x).to(device) for x in flow_table(steps, flow))
            self._tables[steps, flow] = features, scales
        return self._tables[steps, flow]


@dataclass
class RecordedStep:
    """What the gradient of a recorded step needs: its arguments, the record, their memory."""

    step: tuple[Any, ...]
    record: Tensor
    memory: tuple[Tensor, ...]
