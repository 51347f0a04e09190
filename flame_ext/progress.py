"""What a person sees while a run goes on: a bar in a terminal, a line per evaluation elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TextIO

from tqdm import tqdm

from flame_ext.evaluate import Evaluation

# Metric -> short label and format, in the order shown.
_SHOWN = {
    "train_return": ("train return", ".0f"),
    "ess": ("ESS", ".3g"),
    "entropy": ("entropy", ".2f"),
    "alpha": ("alpha", ".3g"),
}


class Progress:
    """Progress of one run, on standard error.

    Args:
        total: Environment steps of the whole run.
        initial: Steps already done by an earlier process.
        algorithm: Shown as the bar's name.
        stream: Where to write; a bar only if it is a terminal.
    """

    def __init__(
        self, total: int, *, initial: int = 0, algorithm: str = "", stream: TextIO | None = None
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._total, self._initial, self._step = total, initial, initial
        self._first_updates: int | None = None
        self._updates = 0
        self._start = time.perf_counter()
        self._latest: dict[str, float] = {}
        self._bar: tqdm | None = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=total,
                initial=initial,
                desc=algorithm,
                unit=" steps",
                dynamic_ncols=True,
                smoothing=0.05,
                file=self._stream,
            )

    def update(self, step: int, updates: int) -> None:
        """Move to environment step ``step``, ``updates`` gradient updates after the run's start."""
        if self._first_updates is None:
            self._first_updates = updates
        advance, self._step, self._updates = step - self._step, step, updates
        if self._bar is not None:
            self._bar.update(advance)

    def show(self, metrics: Mapping[str, float]) -> None:
        """Take the latest training metrics; the bar shows train return, ESS, entropy and alpha."""
        self._latest.update({name: metrics[name] for name in _SHOWN if name in metrics})
        if self._bar is not None:
            self._bar.set_postfix_str(self._numbers(", "), refresh=False)

    def evaluated(self, evaluation: Evaluation) -> None:
        """Write one lasting line about an evaluation."""
        line = (
            f"step {evaluation.step:>9,}/{self._total:,}  "
            f"return {evaluation.mean_return:9.1f} +- {evaluation.std_return:.1f}  "
            f"{self._rate(self._step - self._initial):.0f} steps/s  {self._numbers('  ')}"
        ).rstrip()
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the bar as it is and go on below it."""
        if self._bar is not None:
            self._bar.close()

    def _numbers(self, separator: str) -> str:
        words = []
        if self._first_updates is not None:
            words.append(f"{self._rate(self._updates - self._first_updates):.0f} updates/s")
        for name, (label, style) in _SHOWN.items():
            if name in self._latest:
                words.append(f"{label} {self._latest[name]:{style}}")
        return separator.join(words)

    def _rate(self, count: int) -> float:
        return count / max(time.perf_counter() - self._start, 1e-9)
