"""A network's evaluations by the native CUDA kernels, where the losses are built by autograd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from flame_ext.backends.cuda_call import (
    device_scalar,
    pointer,
    run_with_workspace,
    stream,
)
from flame_ext.backends.native_evaluator import NativeEvaluator, chooser, draw_seed
from flame_ext.backends.native_views import flow_table, mlp_spec
from flame_ext.critics import Critics
from flame_ext.embeddings import normalised
from flame_ext.networks import FlatMLP, MeanVelocityNet
from flame_ext.reference import denoise, tanh_gaussian
from flame_ext.sampling import CandidateSampling, Flow
from flame_ext.scalars import Scalar

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
