"""Ctrl-C and SIGTERM, answered between the steps of training."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interrupts_between_steps() -> Iterator[threading.Event]:
    """Sets the event at Ctrl-C or SIGTERM; the second one interrupts at once, as usual.

    A step that was cut in half cannot be resumed bit-equal. Outside the main thread, where signals
    do not arrive, nothing changes.
    """
    wanted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield wanted
        return

    def note(number: int, _: object) -> None:
        wanted.set()
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield wanted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
