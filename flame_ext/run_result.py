"""What a run gave."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flame_ext.evaluate import Evaluation
from flame_ext.policy import POLICY_FILE


@dataclass(frozen=True)
class RunResult:
    """What a run gave.

    Attributes:
        evaluations: Every evaluation, the last one after the last step.
        steps: Environment steps taken, over all processes of a resumed run.
        wall_time: Seconds, likewise.
        run_dir: Where everything was written.
        stopped_by: Name of the callback that ended the run early, or None.
    """

    evaluations: tuple[Evaluation, ...]
    steps: int
    wall_time: float
    run_dir: Path
    stopped_by: str | None = None

    @property
    def final_return(self) -> float:
        """Mean return of the last evaluation."""
        return self.evaluations[-1].mean_return

    @property
    def best_return(self) -> float:
        """Highest mean return of any evaluation."""
        return max(e.mean_return for e in self.evaluations)

    @property
    def policy_path(self) -> Path:
        """The final policy, for `flame_ext.load`."""
        return self.run_dir / POLICY_FILE
