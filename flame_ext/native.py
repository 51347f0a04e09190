"""What the native module can do on this machine: build, instruction sets, threads, CUDA.

Imports neither torch nor the native module at import time, so a broken build can still be reported.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

BackendName = Literal["torch", "cpu", "cuda"]


def load_core() -> ModuleType:
    """Return ``flame_ext._core``.

    Raises:
        ImportError: The module is missing or does not load; the text says why and what to do.
    """
    try:
        return importlib.import_module("flame_ext._core")
    except ImportError as error:
        raise ImportError(
            f"the native module flame_ext._core does not load ({error}). Install the package with "
            "`pip install .` from its root and run Python in another directory (there the sources "
            "in 'flame_ext' hide the installed package), "
            "or choose backend='torch'."
        ) from error


@dataclass(frozen=True)
class BackendInfo:
    """The report behind ``flame_ext.backend_info()`` and ``flame-ext info``.

    Attributes:
        version: Version of the package.
        torch_version: Installed torch, or an empty string.
        auto_backend: What ``backend="auto"`` picks with ``device="cpu"``.
        auto_reason: Why.
        native: Whether the native module loads.
        native_error: Why it does not, or an empty string; what follows is empty then.
        compiler: C++ compiler that built it.
        build_type: CMake build type, with the sanitizers if any.
        isas_compiled: Instruction sets in the build, in rising order.
        isas_supported: Those which this machine can run.
        isa: The one in use (``FLAME_EXT_ISA`` overrides the choice).
        bfloat16: Whether training can take bfloat16 products (``matmul_precision``).
        threads: Threads that the native kernels may use.
        cuda_archs: Architectures in the build, empty without CUDA.
        cuda_toolkit: Version of nvcc, empty without CUDA.
        cuda_devices: Devices that the native module sees.
        cuda_problem: Why it sees none although there is a driver, such as one that is too old.
    """

    version: str
    torch_version: str
    auto_backend: BackendName
    auto_reason: str
    native: bool
    native_error: str = ""
    compiler: str = ""
    build_type: str = ""
    isas_compiled: tuple[str, ...] = ()
    isas_supported: tuple[str, ...] = ()
    isa: str = ""
    bfloat16: bool = False
    threads: int = 0
    cuda_archs: str = ""
    cuda_toolkit: str = ""
    cuda_devices: tuple[str, ...] = ()
    cuda_problem: str = ""

    def __str__(self) -> str:
        if self.native:
            native = f"{self.compiler}, {self.build_type}"
            isa = f"{self.isa} (supported {_join(self.isas_supported)}; "
            isa += f"compiled {_join(self.isas_compiled)})"
            isa += "; bfloat16 products" if self.bfloat16 else ""
            threads = str(self.threads)
        else:
            native, isa, threads = f"missing: {self.native_error}", "-", "-"
        cuda = "not in this build"
        if self.cuda_toolkit:
            cuda = f"toolkit {self.cuda_toolkit}, {self.cuda_archs}; "
            cuda += f"devices: {self.cuda_problem or _join(self.cuda_devices)}"
        rows = [
            ("flame_ext", self.version),
            ("native module", native),
            ("instructions", isa),
            ("threads", threads),
            ("CUDA", cuda),
            ("torch", self.torch_version or "not installed"),
            ("auto backend", f"{self.auto_backend} ({self.auto_reason})"),
        ]
        return "\n".join(f"{name:<14} {value}" for name, value in rows)


def _join(names: tuple[str, ...]) -> str:
    return ", ".join(names) if names else "none"


def _installed_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def auto_backend(device: str) -> tuple[BackendName, str]:
    """What ``backend="auto"`` stands for, and the reason.

    Args:
        device: Type of the device that trains, ``"cpu"`` or ``"cuda"``.
    """
    if device != "cpu":
        return "torch", "the CUDA kernels are not measured yet: only with backend='cuda'"
    try:
        load_core()
    except ImportError as error:
        return "torch", str(error)
    return "cpu", "native CPU kernels; with device='cuda' it is torch"


def backend_info() -> BackendInfo:
    """Describe the build and the machine.

    Raises:
        ValueError: ``FLAME_EXT_ISA`` names an instruction set that is unknown or unsupported
            here, or ``FLAME_EXT_NUM_THREADS`` is no number of threads.
    """
    installed = (_installed_version("flame_ext"), _installed_version("torch"))
    auto = auto_backend("cpu")
    try:
        core = load_core()
    except ImportError as error:
        return BackendInfo(*installed, *auto, native=False, native_error=str(error))
    build = core.build_info()
    sanitize = f" with {build['sanitize']} sanitizers" if build["sanitize"] else ""
    return BackendInfo(
        *installed,
        *auto,
        native=True,
        compiler=build["compiler"],
        build_type=build["build_type"] + sanitize,
        isas_compiled=tuple(core.isa_compiled()),
        isas_supported=tuple(core.isa_supported()),
        isa=core.isa_active(),
        bfloat16=core.bfloat16_supported(),
        threads=core.num_threads(),
        cuda_archs=build["cuda_archs"],
        cuda_toolkit=build["cuda_toolkit"],
        cuda_devices=tuple(core.cuda_devices()),
        cuda_problem=core.cuda_problem(),
    )
