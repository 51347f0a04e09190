"""Maximum-entropy reinforcement learning with one-step flow policies (FLAME).

Names load on first use, so that acting with a saved policy needs numpy and no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flame_ext import callbacks, diagnosis, errors, ops, reference
    from flame_ext.callbacks import Callback
    from flame_ext.config import Config, make_config
    from flame_ext.native import BackendInfo, backend_info
    from flame_ext.onnx_export import export_onnx
    from flame_ext.policy import Policy, load
    from flame_ext.run_result import RunResult
    from flame_ext.trainer import Trainer

__version__: str

# Public name -> the module that defines it.
_EXPORTS = {
    "BackendInfo": "flame_ext.native",
    "Callback": "flame_ext.callbacks",
    "Config": "flame_ext.config",
    "Policy": "flame_ext.policy",
    "RunResult": "flame_ext.run_result",
    "Trainer": "flame_ext.trainer",
    "backend_info": "flame_ext.native",
    "export_onnx": "flame_ext.onnx_export",
    "load": "flame_ext.policy",
    "make_config": "flame_ext.config",
}
_SUBMODULES = ("callbacks", "diagnosis", "errors", "ops", "reference")

__all__ = [
    "BackendInfo",
    "Callback",
    "Config",
    "Policy",
    "RunResult",
    "Trainer",
    "__version__",
    "backend_info",
    "callbacks",
    "diagnosis",
    "errors",
    "export_onnx",
    "load",
    "make_config",
    "ops",
    "reference",
]


def __getattr__(name: str) -> Any:
    """Import the module behind a public name when the name is first used."""
    import importlib

    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("flame_ext")
    if name in _SUBMODULES:
        return importlib.import_module(f"flame_ext.{name}")
    if name not in _EXPORTS:
        raise AttributeError(f"module 'flame_ext' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
