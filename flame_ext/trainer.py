"""The loop: collect, update, log, evaluate, save."""

from __future__ import annotations

import dataclasses
import io
import json
import threading
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flame_ext.agent import Agent
from flame_ext.backends import make_backend
from flame_ext.build import deployed_networks
from flame_ext.callbacks import Callback, as_callbacks, says_stop
from flame_ext.checkpoint import (
    arrays_to_tensors,
    read_checkpoint,
    strip_prefix,
    with_prefix,
    write_checkpoint,
)
from flame_ext.config import Config, make_config
from flame_ext.devices import resolve_device
from flame_ext.envs import EnvLike, EnvState
from flame_ext.errors import DivergenceError, RunDirectoryError, check_seed
from flame_ext.evaluate import Evaluation, run_episodes
from flame_ext.interrupts import interrupts_between_steps
from flame_ext.loggers import EvaluationLog, MultiLogger, make_loggers
from flame_ext.normalizer import ObservationNormalizer
from flame_ext.policies.base import uniform_like
from flame_ext.policy import POLICY_FILE, PolicySpec, fixed_noise, save_policy
from flame_ext.process_settings import denormals_flushed, keep_freed_memory
from flame_ext.progress import Progress
from flame_ext.replay import Batch, ReplayBuffer
from flame_ext.run_dir import held, new_run_dir
from flame_ext.run_envs import make_evaluation_env, make_training_env, share_an_environment
from flame_ext.run_result import RunResult
from flame_ext.schedules import discount
from flame_ext.tally import Tally

CONFIG_FILE = "config.json"


class Trainer:
    """Trains one policy in one kind of environment.

    Args:
        env: An environment id, a Gymnasium environment, a vector environment
            (``AutoresetMode.SAME_STEP``) or a function that makes one environment.
        algorithm: ``flame``, ``flame-r``, ``sac`` or ``diffusion``.
        preset: ``default`` or ``paper``.
        config: Options by name that differ from the preset, or a complete `Config`.
        backend: ``auto``, ``torch``, ``cpu`` or ``cuda``; only ``auto`` chooses by itself.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; ``auto`` is ``cpu`` where the native
            CPU kernels are used, else ``cuda`` where PyTorch sees a device.
        run_dir: A new directory; None makes one below ``runs/``.
        seed: Decides weights, draws and the environments' randomness.
        callbacks: One or several, called while the run goes on; may stop it.
        eval_env: What evaluations play in, as for `env`, an object as it is; None makes separate
            environments like `env`. If it is or wraps the same object as `env`, evaluations cut
            training's episodes off.
        progress: Whether a run tells on stderr how it goes.

    Raises:
        ValueError: For options, seeds or spaces that cannot be used.
        TypeError: For what is no `Callback`.
        RunDirectoryError: If `run_dir` exists and is not empty.
        BackendUnavailableError: If this build or machine lacks the backend.
    """

    def __init__(
        self,
        env: EnvLike,
        *,
        algorithm: str = "flame",
        preset: str = "default",
        config: Mapping[str, Any] | Config | None = None,
        backend: str = "auto",
        device: str = "auto",
        run_dir: str | Path | None = None,
        seed: int = 0,
        callbacks: Callback | Iterable[Callback] = (),
        eval_env: EnvLike | None = None,
        progress: bool = True,
        _resuming: bool = False,
    ) -> None:
        wanted = make_config(algorithm, preset, config)
        self.seed = seed = check_seed(seed)
        self.callbacks = as_callbacks(callbacks)
        # Evaluation and training episodes must not share seeds.
        self._eval_seed = seed + 1_000_003
        self.device = resolve_device(device, backend)
        self._progress = progress
        self._asked_for = {"backend": backend, "device": device}
        self.env = make_training_env(env, wanted.num_envs, seed)
        # Environment objects come in their own number.
        self.config = dataclasses.replace(wanted, num_envs=self.env.num_envs)
        self._env_id = env if isinstance(env, str) else self.env.spec_id
        episodes = self.config.eval_episodes
        self.eval_env = make_evaluation_env(env, eval_env, episodes, self._eval_seed)
        sizes = (self.env.obs_dim, self.env.action_dim)
        _check_sizes(sizes, (self.eval_env.obs_dim, self.eval_env.action_dim))
        self._evaluations_end_episodes = share_an_environment(self.env, self.eval_env)
        self.backend = make_backend(backend, self.device)
        self.agent = Agent(self.config, *sizes, self.backend, seed=seed, device=self.device)
        self.replay = ReplayBuffer(self.config.buffer_size, *sizes, device=self.device)
        self.normalizer = (
            ObservationNormalizer(sizes[0], self.device)
            if self.config.normalize_observations
            else None
        )
        self.global_step = 0
        self.evaluations: list[Evaluation] = []
        self._update_debt = 0.0
        self._obs: np.ndarray | None = None
        keep_freed_memory()
        self._earlier_wall_time = 0.0
        self._start: float | None = None  # of the call of `run` in progress
        self._stopped_by: str | None = None
        self._tally = Tally()
        if _resuming and run_dir is not None:
            self.run_dir = Path(run_dir)  # which only `run` changes
        else:
            self.run_dir = new_run_dir(run_dir, self._env_id, algorithm, seed)
            self._write_config()

    @classmethod
    def resume(
        cls,
        run_dir: str | Path,
        *,
        env: EnvLike | None = None,
        backend: str | None = None,
        device: str | None = None,
        callbacks: Callback | Iterable[Callback] = (),
        eval_env: EnvLike | None = None,
        progress: bool = True,
    ) -> Trainer:
        """Continues a run from its checkpoint, bit-equal to never having stopped.

        Environments whose inner state cannot be saved start new episodes instead.

        Args:
            run_dir: Directory of the run.
            env: Needed only if the run was not started from an environment id.
            backend: As in the constructor; None takes the run's.
            device: As in the constructor; None takes the run's.
            callbacks: As in the constructor; callbacks are not saved.
            eval_env: As in the constructor; not saved either.
            progress: As in the constructor.

        Raises:
            RunDirectoryError: If there is no usable checkpoint.
        """
        run_dir = Path(run_dir)
        tensors, manifest = read_checkpoint(run_dir)
        try:
            env = env if env is not None else manifest["env_id"]
            options, seed = Config(**_from_json(manifest["config"])), manifest["seed"]
        except (KeyError, TypeError) as error:
            raise _unusable(run_dir, error) from error
        if env is None:
            raise RunDirectoryError(
                f"the run in {run_dir} used an environment without an id; pass it again: "
                "Trainer.resume(run_dir, env=...)"
            )
        asked_for = manifest.get("asked_for", {})
        trainer = cls(
            env,
            algorithm=options.algorithm,
            config=options,
            backend=backend or asked_for.get("backend", "auto"),
            device=device or asked_for.get("device", "auto"),
            run_dir=run_dir,
            seed=seed,
            callbacks=callbacks,
            eval_env=eval_env,
            progress=progress,
            _resuming=True,
        )
        trainer._restore(tensors, manifest)
        return trainer

    @denormals_flushed()
    def run(self, total_steps: int | None = None) -> RunResult:
        """Trains until `total_steps` environment steps, then evaluates and saves.

        An exception, Ctrl-C or SIGTERM saves a checkpoint before it is passed on; the signals are
        answered after the step in progress, a second one at once.

        Args:
            total_steps: Counted from the run's very first step; None takes that of the last call,
                also of a resumed run, and at first the configured one.

        Raises:
            ValueError: If the run has more steps than that already.
            DivergenceError: If the networks' weights are no longer finite; the checkpoint and the
                policy saved last are kept.
            RunDirectoryError: If another trainer is at work in the run's directory.
        """
        if total_steps is not None:
            self._plan(total_steps)
        with held(self.run_dir):
            return self._run()

    def _plan(self, total_steps: int) -> None:
        # Several environments may have gone beyond the last total by a part of a step.
        if total_steps <= self.global_step - self.env.num_envs:
            raise ValueError(f"total_steps={total_steps}: the run is at step {self.global_step:,}")
        options = self.config.to_dict() | {"total_steps": total_steps}
        self.config = make_config(self.config.algorithm, overrides=options)

    def _run(self) -> RunResult:
        self._write_config()
        self._stopped_by = None
        self._start = time.perf_counter()
        log = make_loggers(self.run_dir)
        evaluation_log = EvaluationLog(self.run_dir)
        progress = Progress(
            self.config.total_steps,
            initial=self.global_step,
            algorithm=self.config.algorithm,
            stream=None if self._progress else io.StringIO(),
        )
        self._call("on_start")
        try:
            with self.backend.training(), interrupts_between_steps() as interrupted:
                self._train(interrupted, log, evaluation_log, progress)
        finally:
            self.save()
            self._earlier_wall_time, self._start = self.wall_time, None
            progress.close()
            log.close()
        result = RunResult(
            tuple(self.evaluations),
            self.global_step,
            self.wall_time,
            self.run_dir,
            self._stopped_by,
        )
        self._call("on_end", result)
        return result

    def _train(
        self,
        interrupted: threading.Event,
        log: MultiLogger,
        evaluation_log: EvaluationLog,
        progress: Progress,
    ) -> None:
        c, total = self.config, self.config.total_steps
        while self.global_step < total and self._stopped_by is None and not interrupted.is_set():
            before = self.global_step
            self.agent.set_progress(before, total)
            self._collect()
            self._update()
            progress.update(self.global_step, self.agent.updates)
            if self._due(before, c.log_interval):
                self._log(log, progress)
            # Since the last one, which an interrupt may have cut off.
            evaluated = self.evaluations[-1].step if self.evaluations else 0
            if self._due(evaluated, c.eval_interval) and self.global_step < total:
                self._evaluate(interrupted, log, evaluation_log, progress)
            if self._due(before, c.checkpoint_interval) and self.global_step < total:
                self.save()
        evaluated = bool(self.evaluations) and self.evaluations[-1].step == self.global_step
        if not evaluated and not interrupted.is_set():
            self._evaluate(interrupted, log, evaluation_log, progress)
        if interrupted.is_set():
            raise KeyboardInterrupt

    def stop(self, reason: str = "stop()") -> None:
        """Ends the run after the current step; it is evaluated and saved as usual."""
        self._stopped_by = reason

    @property
    def wall_time(self) -> float:
        """Seconds of training so far, over all processes of a resumed run."""
        running = 0.0 if self._start is None else time.perf_counter() - self._start
        return self._earlier_wall_time + running

    def _due(self, since: int, interval: int) -> bool:
        """Whether a multiple of `interval` was reached after step `since`."""
        return interval > 0 and since // interval < self.global_step // interval

    def _collect(self) -> None:
        """One step of every environment into the replay buffer."""
        if self._obs is None:
            self._obs = self.env.reset(self.seed + self.global_step)
        if self.normalizer is not None:
            self.normalizer.update(self._obs)
        if self.global_step < self.config.learning_starts:
            like = torch.empty(0, device=self.device)
            shape = (self.env.num_envs, self.env.action_dim)
            action = 2 * uniform_like(like, shape, self.agent.generator) - 1
        else:
            action = self.agent.explore(self.to_agent(self._obs))
        executed = action.cpu().numpy()
        try:
            step = self.env.step(executed)
        except BaseException:
            # Some environments may have moved on, or diverged: new episodes instead.
            self._obs = None
            raise
        self.replay.add(self._obs, executed, step.reward, step.terminated, step.next_obs)
        self._obs = step.obs
        self.global_step += self.env.num_envs
        for episode_return in step.episode_returns:
            self._tally.add({"train_return": episode_return})
        if self.global_step >= self.config.learning_starts:
            self._update_debt += self.env.num_envs * self.config.updates_per_step

    def _update(self) -> None:
        """The updates that are owed; fractions are carried on."""
        while self._update_debt >= 1:
            updates = min(int(self._update_debt), self.agent.updates_to_policy_step)
            self._update_debt -= updates
            batch = self.sample(updates * self.config.batch_size, self.agent.generator)
            self._tally.add(self.agent.update(batch, updates))

    @property
    def discount(self) -> float:
        """Gamma of the updates in the last environment step, as of its beginning."""
        return discount(self.config, self.global_step - self.env.num_envs)

    def sample(self, batch_size: int, generator: torch.Generator) -> Batch:
        """Transitions of the replay buffer as the agent takes them."""
        batch = self.replay.sample(batch_size, generator, self.discount)
        if self.normalizer is None:
            return batch
        return dataclasses.replace(
            batch, obs=self.normalizer(batch.obs), next_obs=self.normalizer(batch.next_obs)
        )

    def to_agent(self, obs: np.ndarray) -> torch.Tensor:
        """Observations ``(n, O)`` as the agent takes them."""
        rows = torch.from_numpy(obs).to(self.device)
        return rows if self.normalizer is None else self.normalizer(rows)

    def _log(self, log: MultiLogger, progress: Progress) -> None:
        metrics = self._tally.pop()
        metrics |= {"updates": float(self.agent.updates), "wall_time": self.wall_time}
        log.log(self.global_step, metrics)
        progress.show(metrics)
        self._call("on_log", metrics)

    def _evaluate(
        self,
        interrupted: threading.Event,
        log: MultiLogger,
        evaluation_log: EvaluationLog,
        progress: Progress,
    ) -> None:
        c = self.config
        noise = torch.tensor(fixed_noise(c.eval_particles, self.env.action_dim))
        noise = noise.to(self.device).unsqueeze(0)

        def act(obs: np.ndarray) -> np.ndarray:
            rows = self.to_agent(obs)
            array: np.ndarray = self.agent.act(rows, noise.expand(len(rows), -1, -1)).cpu().numpy()
            return array

        if self._evaluations_end_episodes:
            self._obs = None
        # The same episodes at every evaluation: their start states do not blur the curve.
        outcome = run_episodes(
            self.eval_env, act, c.eval_episodes, seed=self._eval_seed, interrupted=interrupted
        )
        evaluation = Evaluation(self.global_step, self.wall_time, *outcome)
        best = all(evaluation.mean_return >= e.mean_return for e in self.evaluations)
        self.evaluations.append(evaluation)
        if best:
            self._save_policy(self.run_dir / "best" / POLICY_FILE)
        evaluation_log.write(evaluation)
        log.log(self.global_step, {"eval_return": evaluation.mean_return})
        progress.evaluated(evaluation)
        self._call("on_evaluation", evaluation)

    def _call(self, event: str, *args: object) -> None:
        for callback in self.callbacks:
            if says_stop(getattr(callback, event)(self, *args)):
                self.stop(type(callback).__name__)

    def save(self) -> None:
        """Writes the checkpoint and the policy file.

        Raises:
            DivergenceError: If a weight is not finite; nothing is written then.
        """
        if not self.agent.is_finite():
            raise DivergenceError(
                f"learning diverged: at step {self.global_step:,} weights are NaN or infinite. "
                f"What {self.run_dir} holds of earlier steps is kept. Check the scale of rewards "
                "(reward_scale) and observations (normalize_observations), or lower the learning "
                "rates."
            )
        env_state = self.env.get_state() if self._obs is not None else None
        tensors = with_prefix("agent", self.agent.state_dict())
        tensors |= with_prefix("replay", self.replay.state_dict())
        if self.normalizer is not None:
            tensors |= with_prefix("normalizer", self.normalizer.state_dict())
        if env_state is not None:
            tensors |= arrays_to_tensors("env", env_state.arrays)
        manifest = {
            "config": self.config.to_dict(),
            "env_id": self._env_id,
            "asked_for": self._asked_for,
            "seed": self.seed,
            "global_step": self.global_step,
            "update_debt": self._update_debt,
            "wall_time": self.wall_time,
            "evaluations": [dataclasses.asdict(e) for e in self.evaluations],
            "env_state": None if env_state is None else env_state.meta,
        }
        # The smaller file first: a full disk may still have room for it.
        self._save_policy(self.run_dir / POLICY_FILE)
        write_checkpoint(self.run_dir, tensors, manifest)

    def _restore(self, tensors: Mapping[str, torch.Tensor], manifest: Mapping[str, Any]) -> None:
        try:
            self.agent.load_state_dict(strip_prefix("agent", tensors))
            self.replay.load_state_dict(strip_prefix("replay", tensors))
            if self.normalizer is not None:
                self.normalizer.load_state_dict(strip_prefix("normalizer", tensors))
            self.global_step = manifest["global_step"]
            self._update_debt = manifest["update_debt"]
            self._earlier_wall_time = manifest["wall_time"]
            self.evaluations = [Evaluation(**_from_json(e)) for e in manifest["evaluations"]]
            env_state = manifest["env_state"]
        except (KeyError, TypeError) as error:
            raise _unusable(self.run_dir, error) from error
        if env_state is not None:
            arrays = {n: t.numpy() for n, t in strip_prefix("env", tensors).items()}
            self._obs = self.env.set_state(EnvState(arrays, env_state))
        if self._obs is None:
            warnings.warn(
                "the environment's inner state was not saved (a step failed, evaluations play in "
                "it, or it cannot be read) or is that of another MuJoCo model: the resumed run "
                "starts new episodes and is not bit-equal to one that never stopped",
                stacklevel=3,
            )

    def _write_config(self) -> None:
        text = json.dumps(self.config.to_dict(), indent=1)
        (self.run_dir / CONFIG_FILE).write_text(text + "\n")

    def _save_policy(self, path: Path) -> None:
        spec = PolicySpec(
            algorithm=self.config.algorithm,
            config=self.config.to_dict(),
            obs_dim=self.env.obs_dim,
            action_dim=self.env.action_dim,
            action_low=tuple(self.env.action_low.tolist()),
            action_high=tuple(self.env.action_high.tolist()),
            env_id=self._env_id,
        )
        networks = deployed_networks(self.agent.deployed_actor, self.agent.deployed_critics)
        tensors = {
            f"{name}.flat": network.flat.detach().cpu().numpy()
            for name, network in networks.items()
        }
        if self.normalizer is not None:
            shift, scale = self.normalizer.shift_and_scale()
            tensors |= {"normalizer.shift": shift, "normalizer.scale": scale}
        save_policy(path, spec, tensors)


def _unusable(run_dir: Path, error: Exception) -> RunDirectoryError:
    what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
    return RunDirectoryError(
        f"the checkpoint in {run_dir} is damaged or of another version of flame_ext: {what}"
    )


def _check_sizes(trained: tuple[int, int], evaluated: tuple[int, int]) -> None:
    if trained != evaluated:
        raise ValueError(
            f"env has {trained[0]} observations and {trained[1]} actions, eval_env {evaluated[0]} "
            f"and {evaluated[1]}: they must be of one kind."
        )


def _from_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no tuples; the dataclasses here have no lists."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
