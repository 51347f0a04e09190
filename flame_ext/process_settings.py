"""What training sets for the whole process: float mode and allocator."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """Adam's moments of parameters that rarely move become denormals, slow on every CPU."""
    before = float(torch.full((), 1e-40) * 1) == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def keep_freed_memory() -> None:
    """Stops glibc from handing large temporaries back, only to fault them in at the next update."""
    if sys.platform == "linux":
        mmap_threshold, trim_threshold = -3, -1
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # glibc; musl has none
            libc.mallopt(mmap_threshold, 1 << 30)
            libc.mallopt(trim_threshold, 1 << 30)
