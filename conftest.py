"""Settings of the whole suite: native guard, benchmarks off by default, GPU tests skipped."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest


def _native_error() -> str:
    try:
        importlib.import_module("flame_ext._core")
    except ImportError as error:
        return str(error)
    return ""


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Skip benchmark loops unless they are asked for; refuse a run without the native module.

    A silent fallback would turn every test green. FLAME_EXT_REQUIRE_NATIVE=0 allows a run of the
    pure-PyTorch part without a compiled module; set to 1 (as CI does) or unset, it is required.
    """
    option = config.option
    asked = getattr(option, "benchmark_only", False) or getattr(option, "benchmark_enable", False)
    if hasattr(option, "benchmark_skip") and not asked:
        option.benchmark_skip = True
    error = _native_error()
    if error and os.environ.get("FLAME_EXT_REQUIRE_NATIVE", "1") != "0":
        pytest.exit(
            f"flame_ext._core does not load ({error}): run `pip install .` in this environment and "
            "start `pytest` itself (`python -m pytest` from the root hides the installed package); "
            "FLAME_EXT_REQUIRE_NATIVE=0 allows a run without it",
            returncode=3,
        )


def pytest_report_header() -> list[str]:
    """Name what is tested."""
    import flame_ext

    return [f"flame_ext from {flame_ext.__file__}", *str(flame_ext.backend_info()).splitlines()]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where the native module sees no device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked or _native_error():
        return
    core = importlib.import_module("flame_ext._core")
    if core.cuda_devices():
        return
    built = core.build_info()["cuda_toolkit"]
    reason = "this build has no CUDA (no nvcc was found)"
    if built:
        reason = core.cuda_problem() or "no CUDA device is visible"
    for item in marked:
        item.add_marker(pytest.mark.skip(reason=reason))


def _supported_isas() -> list[str]:
    if _native_error():
        return []
    return importlib.import_module("flame_ext._core").isa_supported()


@pytest.fixture(params=_supported_isas())
def isa(request: pytest.FixtureRequest):
    """Run the test once per instruction set of this machine; the former choice comes back after."""
    core = importlib.import_module("flame_ext._core")
    before = core.isa_active()
    core.set_isa(request.param)
    yield request.param
    core.set_isa(before)


_TARGETS = [*_supported_isas(), "cuda", "cuda falling"]


@pytest.fixture(params=_TARGETS)
def kernels(request: pytest.FixtureRequest):
    """Run the test with each set of training kernels: the CPU's, then CUDA's executed on the host.

    The second CUDA set runs threads in falling order, which matters only where a barrier is
    missing, and has the shared memory of a small device, which takes other tiles.
    """
    core = importlib.import_module("flame_ext._core")
    before = core.isa_active()
    _run(core, request.param)
    yield request.param
    core.set_isa(before)


@pytest.fixture(params=[*_TARGETS, *(f"{name} tensor" for name in _TARGETS if "cuda" in name)])
def candidate_kernels(request: pytest.FixtureRequest):
    """As `kernels`, and CUDA's with their products on (emulated) tensor cores."""
    core = importlib.import_module("flame_ext._core")
    before = core.isa_active()
    _run(core, request.param)
    yield request.param
    core.set_isa(before)


def _run(core: ModuleType, target: str) -> None:
    if target.startswith("cuda"):
        small = "falling" in target
        core.run_cuda_on_host(
            "falling" if small else "rising",
            (99 if small else 227) * 1024,
            tensor_cores="tensor" in target,
        )
    else:
        core.set_isa(target)
