"""Soft actor-critic's loop with the policy as an option (FLAME, Alg. 1)."""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor

from flame_ext.backends import Backend
from flame_ext.backends.torch import adam_moments
from flame_ext.build import deployed_networks, make_actor, make_critics, make_encoder
from flame_ext.config import Config
from flame_ext.embeddings import StateActionEncoder
from flame_ext.networks import FlatMLP
from flame_ext.policies.base import normal_like
from flame_ext.replay import Batch
from flame_ext.scalars import Scalar, Scalars
from flame_ext.schedules import learning_rates
from flame_ext.temperature import Temperature


class Agent:
    """Twin soft critics, a policy, the average of both that is deployed, and a temperature.

    Args:
        config: Options of the algorithm.
        obs_dim: O.
        action_dim: A.
        backend: Computes the whole steps.
        seed: Seeds the initial weights and every later draw.
        device: Where networks and draws live.
    """

    def __init__(
        self,
        config: Config,
        obs_dim: int,
        action_dim: int,
        backend: Backend,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.backend = config, backend
        self.obs_dim, self.action_dim = obs_dim, action_dim
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        initial = torch.Generator().manual_seed(seed)
        sizes = obs_dim, action_dim
        self.encoder = make_encoder(config, *sizes, initial)
        self.actor = make_actor(config, *sizes, initial)
        # Policy, critics and targets see one average of the encoder, which never jumps.
        self.critics = make_critics(config, *sizes, copy.deepcopy(self.encoder), initial)
        self.target_critics = copy.deepcopy(self.critics)
        self.target_critics.encoder = self.critics.encoder
        self.deployed_actor, self.deployed_critics = self.actor, self.critics
        if config.policy_tau < 1:
            self.deployed_actor = copy.deepcopy(self.actor)
            self.deployed_critics = copy.deepcopy(self.critics)
        rates = learning_rates(config, 0, config.total_steps)
        self.optimizers = {}
        for name, network in self.networks().items():
            network.to(self.device)
            network.requires_grad_(name in rates)
            backend.accelerate(network, config.matmul_precision)
            if name in rates:
                self.optimizers[name] = _adam(network.flat, rates[name])
        self.temperature = Temperature(config, action_dim)
        self.updates = 0
        self._run_steps = backend.step_runner(self.generator)

    def set_progress(self, steps: int, total_steps: int) -> None:
        """Sets the learning rates that fall, after `steps` of the run's environment steps."""
        rates = learning_rates(self.config, steps, total_steps)
        for name, optimizer in self.optimizers.items():
            if optimizer.param_groups[0]["lr"] != rates[name]:
                self.backend.set_learning_rate(optimizer, rates[name])

    @torch.no_grad()
    def act(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Best of N by Qmin of the policy that is evaluated and saved.

        Args:
            obs: States ``(B, O)``.
            noise: Base noise ``(B, N, A)``.

        Returns:
            Actions ``(B, A)`` in [-1, 1].
        """
        critics = self.deployed_critics
        return self.deployed_actor.best_action(critics, critics.observe(obs), noise)

    @torch.no_grad()
    def explore(self, obs: Tensor) -> Tensor:
        """Actions for collecting data: ``(B, O)`` -> ``(B, A)``."""
        shape = (len(obs), self.config.train_particles, self.action_dim)
        noise = normal_like(obs, shape, self.generator)
        action = self.actor.best_action(self.critics, self.critics.observe(obs), noise)
        if self.config.exploration_noise > 0:
            disturbance = normal_like(obs, tuple(action.shape), self.generator)
            action = (action + self.config.exploration_noise * disturbance).clamp(-1, 1)
        return action

    @property
    def updates_to_policy_step(self) -> int:
        """Critic updates until the policy's next one."""
        return self.config.policy_delay - self.updates % self.config.policy_delay

    def update(self, batch: Batch, updates: int = 1) -> dict[str, float]:
        """Critic updates, then the policy's, the encoder's and temperature's if they are due.

        Args:
            batch: ``updates`` equal parts, one for each critic update in order; the policy and
                the encoder learn from the last.
            updates: At most `updates_to_policy_step`: the policy stays as it is between them.

        Returns:
            Scalars to log.

        Raises:
            ValueError: If a policy step would be passed, or the batch does not divide.
        """
        c = self.config
        if not 1 <= updates <= self.updates_to_policy_step:
            raise ValueError(
                f"updates={updates}; the policy's step is due after {self.updates_to_policy_step}"
            )
        done = self.updates + updates
        policy_due = done % c.policy_delay == 0
        alpha_due = policy_due and done % c.alpha_interval < c.policy_delay
        alpha = self.temperature.alpha
        metrics = self._run_steps(self._steps, batch, alpha, updates, policy_due, alpha_due)
        self.updates = done
        if policy_due:
            if alpha_due:
                self.temperature.step(metrics.get("entropy"), metrics.get("ess"))
            metrics["alpha"] = self.temperature.alpha
            if c.policy_tau < 1:
                self._average_deployed()
        return metrics

    def _steps(
        self, batch: Batch, alpha: Scalar, updates: int, policy_due: bool, alpha_due: bool
    ) -> Scalars:
        """What `update` has the backend do; the host reads no tensor meanwhile."""
        observed = self._observed(batch)
        scalars = self.backend.critic_updates(
            self.actor,
            self.critics,
            self.target_critics,
            self.optimizers["critics"],
            observed,
            alpha,
            self.generator,
            updates,
        )
        if policy_due:
            rows = len(batch)
            first = rows - rows // updates
            last = slice(first, min(first + self.config.policy_batch_size, rows))
            scalars |= self._policy_step(observed.obs[last], batch.action[last], alpha, alpha_due)
            if self.encoder is not None:
                learned = (batch.obs, batch.action, batch.next_obs)
                scalars |= self._encoder_step(self.encoder, *(x[first:] for x in learned))
        return scalars

    @torch.no_grad()
    def _observed(self, batch: Batch) -> Batch:
        """The batch as policy and critics take it."""
        if self.encoder is None:
            return batch
        obs, next_obs = map(self.critics.observe, (batch.obs, batch.next_obs))
        return dataclasses.replace(batch, obs=obs, next_obs=next_obs)

    def _encoder_step(
        self, encoder: StateActionEncoder, obs: Tensor, action: Tensor, next_obs: Tensor
    ) -> Scalars:
        assert self.critics.encoder is not None
        loss = self.backend.encoder_step(encoder, obs, action, next_obs)
        averages = self.critics.encoder.networks()
        for name, network in encoder.networks().items():
            self.backend.optimizer_step(self.optimizers[name])
            average = averages[name].flat
            self.backend.soft_update(average, network.flat, self.config.embedding_tau)
        return {"encoder_loss": loss}

    def _policy_step(
        self, obs: Tensor, action: Tensor, alpha: Scalar, measure_entropy: bool
    ) -> Scalars:
        scalars = self.backend.actor_step(
            self.actor, obs, action, self.critics, alpha, self.generator
        )
        self.backend.optimizer_step(self.optimizers["actor"])
        if measure_entropy and "entropy" not in scalars and self.actor.has_log_prob:
            scalars["entropy"] = self._entropy(obs)
        return scalars

    @torch.no_grad()
    def _average_deployed(self) -> None:
        """All that acts, in one average: a policy fits the features that it was trained on.

        Until the average spans 1 / `policy_tau` policy updates it spans a ninth of those done, so
        that little is left of the first ones.
        """
        done = self.updates // self.config.policy_delay
        tau = max(self.config.policy_tau, 9 / (9 + done))
        acting = deployed_networks(self.actor, self.critics)
        for name, average in deployed_networks(self.deployed_actor, self.deployed_critics).items():
            self.backend.soft_update(average.flat, acting[name].flat, tau)

    @torch.no_grad()
    def _entropy(self, obs: Tensor) -> Tensor:
        noise = normal_like(obs, (len(obs), self.action_dim), self.generator)
        return -self.actor.sample(obs, noise, self.generator).log_prob.mean()

    def networks(self) -> dict[str, FlatMLP]:
        """The networks by name, as checkpoints store them."""
        networks: dict[str, FlatMLP] = {
            "actor": self.actor.network,
            "critics": self.critics,
            "target_critics": self.target_critics,
        }
        for prefix, encoder in (("", self.encoder), ("seen_", self.critics.encoder)):
            if encoder is not None:
                networks |= {f"{prefix}{name}": net for name, net in encoder.networks().items()}
        if self.deployed_actor is not self.actor:
            deployed = deployed_networks(self.deployed_actor, self.deployed_critics)
            networks |= {f"deployed_{name}": net for name, net in deployed.items()}
        return networks

    def is_finite(self) -> bool:
        """Whether every weight of every network is."""
        return all(bool(net.flat.isfinite().all()) for net in self.networks().values())

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that learning depends on, as named tensors."""
        state = {f"{name}.flat": net.flat.detach() for name, net in self.networks().items()}
        state |= self.temperature.state_dict()
        state["updates"] = torch.tensor(self.updates)
        state["generator"] = self.generator.get_state()
        for name, optimizer in self.optimizers.items():
            for slot, value in adam_moments(optimizer).items():
                state[f"optimizer.{name}.{slot}"] = value
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores `state_dict`.

        Raises:
            ValueError: If a tensor's shape does not fit the configured networks.
        """
        for name, net in self.networks().items():
            saved = state[f"{name}.flat"]
            if saved.shape != net.flat.shape:
                raise ValueError(
                    f"saved {name} has {saved.numel()} parameters, this configuration "
                    f"{net.flat.numel()}: hidden_sizes or the environment's sizes differ"
                )
            net.flat.copy_(saved)
        self.temperature.load_state_dict(state)
        self.updates = int(state["updates"])
        if state["generator"].numel() != self.generator.get_state().numel():
            raise ValueError(
                f"the saved draws are of another kind of device than {self.device}: resume with "
                "the run's"
            )
        self.generator.set_state(state["generator"].cpu())
        for name, optimizer in self.optimizers.items():
            for slot, value in adam_moments(optimizer).items():
                value.copy_(state[f"optimizer.{name}.{slot}"])


def _adam(parameter: Tensor, learning_rate: float) -> torch.optim.Adam:
    return torch.optim.Adam([parameter], lr=learning_rate, fused=True)
