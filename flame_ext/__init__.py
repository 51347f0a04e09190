"""Maximum-entropy reinforcement learning with one-step flow policies (FLAME).

Names load on first use, so that acting with a saved policy needs numpy and no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flame_ext.native import BackendInfo, backend_info

__version__: str

# Public name -> the module that defines it.
_EXPORTS = {
    "BackendInfo": "flame_ext.native",
    "backend_info": "flame_ext.native",
}

__all__ = ["BackendInfo", "__version__", "backend_info"]


def __getattr__(name: str) -> Any:
    """Import the module behind a public name when the name is first used."""
    import importlib

    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("flame_ext")
    if name not in _EXPORTS:
        raise AttributeError(f"module 'flame_ext' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
