"""Where a result came from."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

PACKAGES = ("flame_ext", "torch", "numpy", "gymnasium", "mujoco")


def provenance() -> dict[str, object]:
    """Commit, versions, machine and command behind a result."""
    # Of this file's checkout, wherever the command runs.
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    # Generations of a maker's server processors share their name.
    generation = f"family {facts.get('cpu family', '?')}, model {facts.get('model', '?')}"
    machine = f"{facts.get('model name', platform.processor())} ({generation})"
    return {
        "commit": commit,
        "command": " ".join(["python", *sys.argv]),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": f"{machine}, {os.cpu_count()} cores",
    }
