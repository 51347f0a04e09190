"""Errors that say what was given, what is allowed and what to do."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable


class FlameError(RuntimeError):
    """A failure that the user can act on; its text says how."""


class BackendUnavailableError(FlameError):
    """The requested backend is not part of this build or this machine."""


class EnvironmentDataError(FlameError):
    """An environment returned NaN, infinity or what has another shape."""


class DivergenceError(FlameError):
    """Learning diverged: the networks' weights are no longer finite."""


class RunDirectoryError(FlameError):
    """A run directory exists, is missing or does not hold what is needed."""


def check_choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raises ValueError with the nearest allowed name unless `value` is one of `allowed`."""
    choices = list(allowed)
    if value in choices:
        return
    raise ValueError(
        f"{name}={value!r} is unknown{nearest_hint(str(value), choices) or '.'} "
        f"Choose one of: {', '.join(choices)}."
    )


def check_seed(seed: object) -> int:
    """The seed as an int; raises ValueError unless it is a whole number from 0 to 2^63 - 1."""
    try:
        value = operator.index(seed)  # type: ignore[arg-type]
    except TypeError:
        value = -1
    if not 0 <= value < 1 << 63:
        raise ValueError(f"seed={seed!r}: give a whole number from 0 to 2**63 - 1")
    return value


def nearest_hint(value: str, choices: Iterable[str]) -> str:
    """``"; did you mean 'x'?"``, or nothing where no choice is near.

    Of a name's last words, such as ``learning_rate``, all names that end in them.
    """
    choices = list(choices)
    near = [choice for choice in choices if choice.endswith(f"_{value}")]
    near = near or difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
