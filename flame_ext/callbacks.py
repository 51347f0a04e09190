"""Callbacks: what a user adds to a run, and the ways to end it early."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from flame_ext.errors import check_choice
from flame_ext.evaluate import Evaluation

if TYPE_CHECKING:  # For types only: the trainer imports this module.
    from flame_ext.run_result import RunResult
    from flame_ext.trainer import Trainer

Event = Literal["start", "log", "evaluation", "end"]


def says_stop(answer: object) -> bool:
    """Whether a callback answered False, numpy's too; 0 or an empty list must not stop a run."""
    return isinstance(answer, bool | np.bool_) and not answer


class Callback:
    """Called by the trainer while a run goes on; override what is needed.

    Returning False from any method but ``on_end`` stops the run: it is then evaluated and saved as
    at its regular end. ``trainer`` offers ``global_step``, ``run_dir``, ``agent`` and ``stop()``.
    """

    def on_start(self, trainer: Trainer) -> bool | None:
        """Before the first step of this process."""

    def on_log(self, trainer: Trainer, metrics: Mapping[str, float]) -> bool | None:
        """After each row of training metrics (every ``log_interval`` steps)."""

    def on_evaluation(self, trainer: Trainer, evaluation: Evaluation) -> bool | None:
        """After each evaluation."""

    def on_end(self, trainer: Trainer, result: RunResult) -> None:
        """After the last evaluation and checkpoint."""


def as_callbacks(callbacks: Callback | Iterable[Callback]) -> tuple[Callback, ...]:
    """One or several as a tuple; raises TypeError for what is no `Callback`."""
    callbacks = (callbacks,) if isinstance(callbacks, Callback) else tuple(callbacks)
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise TypeError(
                f"callbacks holds {callback!r}, which is no Callback; a function goes into "
                "FunctionCallback(function)"
            )
    return callbacks


class StopOnReturn(Callback):
    """Stops the run once an evaluation's mean return reaches a threshold.

    Args:
        threshold: Mean evaluation return that is good enough.
    """

    def __init__(self, threshold: float) -> None:
        if math.isnan(threshold):
            raise ValueError("threshold=nan was given; no return reaches it.")
        self.threshold = float(threshold)

    def on_evaluation(self, trainer: Trainer, evaluation: Evaluation) -> bool | None:
        """Stop if the mean return is at least the threshold."""
        return evaluation.mean_return < self.threshold


class StopAfterSeconds(Callback):
    """Stops the run after a time, looked at whenever metrics are logged or an evaluation ends.

    Args:
        seconds: Wall-clock time of this process; positive.
    """

    def __init__(self, seconds: float) -> None:
        if not seconds > 0:
            raise ValueError(f"seconds={seconds} was given; it must be positive.")
        self.seconds = float(seconds)
        self._deadline = float("inf")

    def on_start(self, trainer: Trainer) -> bool | None:
        """Start the clock."""
        self._deadline = time.monotonic() + self.seconds
        return None

    def on_log(self, trainer: Trainer, metrics: Mapping[str, float]) -> bool | None:
        """Stop if the time is over."""
        return time.monotonic() < self._deadline

    def on_evaluation(self, trainer: Trainer, evaluation: Evaluation) -> bool | None:
        """Stop if the time is over."""
        return time.monotonic() < self._deadline


class FunctionCallback(Callback):
    """Calls a function at one kind of event.

    Args:
        function: Called as ``function(trainer)`` at ``"start"``, else ``function(trainer, x)`` with
            x the metrics (``"log"``), the `Evaluation` or the `RunResult`. Returning False stops
            the run.
        event: ``"start"``, ``"log"``, ``"evaluation"`` or ``"end"``.

    Example:
        >>> Trainer(env, callbacks=[FunctionCallback(lambda trainer, e: e.mean_return < 3000)])
    """

    def __init__(self, function: Callable[..., Any], event: Event = "evaluation") -> None:
        check_choice("event", event, get_args(Event))
        self.function, self.event = function, event

    def on_start(self, trainer: Trainer) -> bool | None:
        """Call the function if this is its event."""
        return self._call("start", trainer)

    def on_log(self, trainer: Trainer, metrics: Mapping[str, float]) -> bool | None:
        """Call the function if this is its event."""
        return self._call("log", trainer, metrics)

    def on_evaluation(self, trainer: Trainer, evaluation: Evaluation) -> bool | None:
        """Call the function if this is its event."""
        return self._call("evaluation", trainer, evaluation)

    def on_end(self, trainer: Trainer, result: RunResult) -> None:
        """Call the function if this is its event."""
        self._call("end", trainer, result)

    def _call(self, event: Event, *args: object) -> bool | None:
        if event != self.event:
            return None
        return False if says_stop(self.function(*args)) else None
