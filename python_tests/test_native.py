"""The build report, the choice of instruction set, threads, and what importing pulls in."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import flame_ext
from flame_ext import _core, native
from flame_ext.backends import make_backend


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that sees the installed package only."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        cwd=os.path.sep,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_native_module_is_the_one_in_use():
    info = flame_ext.backend_info()
    assert info.native
    assert make_backend("auto", torch.device("cpu")).name == info.auto_backend == "cpu"
    assert info.isa == _core.isa_active()


def test_report_names_the_build():
    info = flame_ext.backend_info()
    text = str(info)
    for part in (info.version, info.compiler, info.isa, info.auto_reason):
        assert part
        assert part in text


def test_report_without_native_module(monkeypatch):
    monkeypatch.setitem(sys.modules, "flame_ext._core", None)
    info = native.backend_info()
    assert not info.native
    assert info.auto_backend == "torch"
    assert "pip install" in str(info)
    with pytest.warns(RuntimeWarning, match="training in PyTorch: the native module"):
        assert make_backend("auto", torch.device("cpu")).name == "torch"


def test_generic_is_always_there_and_order_rises():
    assert _core.isa_supported()[0] == "generic"
    assert set(_core.isa_supported()) <= set(_core.isa_compiled())


def test_set_isa(isa):
    assert _core.isa_active() == isa


def test_set_isa_refuses_unknown_names():
    with pytest.raises(ValueError, match="'sse9', which is not an instruction set; choose one of"):
        _core.set_isa("sse9")
    with pytest.raises(TypeError):
        _core.set_isa(None)


@pytest.mark.parametrize("name", _core.isa_supported())
def test_environment_chooses_the_instruction_set(name):
    result = run_python(
        "from flame_ext import _core; print(_core.isa_active())", FLAME_EXT_ISA=name
    )
    assert result.stdout.strip() == name


def test_environment_with_a_wrong_instruction_set_is_an_error():
    result = run_python("import flame_ext; flame_ext.backend_info()", FLAME_EXT_ISA="neon")
    assert result.returncode != 0
    assert "ValueError: FLAME_EXT_ISA is 'neon'" in result.stderr


@pytest.mark.skipif("avx512" in _core.isa_supported(), reason="this machine has AVX-512")
def test_unsupported_instruction_set_is_an_error():
    with pytest.raises(ValueError, match=r"'avx512', which this .* choose one of: generic"):
        _core.set_isa("avx512")


FORKS = """
import os, signal, threading
import numpy as np
from flame_ext import _core

def zeros(*shape):
    return np.zeros(shape, np.float32)

def linear(inputs, outputs):
    spec = _core.MlpSpec((inputs, outputs), members=1, activation="relu", layer_norm=False)
    return spec, zeros(spec.parameter_count)

critic, policy = linear(5, 1), linear(3, 4)
sampler = _core.PolicySampler.gaussian(policy[0], (-5.0, 2.0))

def compute():
    args = policy[1], (*critic, None), zeros(1, 3), zeros(1, 2), 0.1
    _core.gaussian_loss(sampler, zeros(len(policy[1])), *args)

def compute_until_stopped():
    while not stopped.is_set():
        compute()

stopped = threading.Event()
threads = [threading.Thread(target=compute_until_stopped) for _ in range(2)]
for thread in threads:
    thread.start()
failed = 0
for _ in range(200):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        compute()
        os._exit(0)
    failed += os.waitpid(child, 0)[1] != 0
stopped.set()
print(failed)
"""


def test_a_forked_child_computes_though_threads_did():
    """It inherits no lock of theirs."""
    assert run_python(FORKS).stdout.strip() == "0"


def test_number_of_threads():
    before = _core.num_threads()
    _core.set_num_threads(3)
    assert _core.num_threads() == 3
    _core.set_num_threads(before)
    with pytest.raises(ValueError, match="number of threads is 0"):
        _core.set_num_threads(0)


def test_number_of_threads_from_the_environment():
    code = "from flame_ext import _core; print(_core.num_threads())"
    env = {"OMP_NUM_THREADS": "2"}
    assert run_python(code, **env, FLAME_EXT_NUM_THREADS="5").stdout.strip() == "5"
    assert run_python(code, **env, FLAME_EXT_NUM_THREADS="").stdout.strip() == "2"


@pytest.mark.parametrize("value", ["all", "0", "-1", "100000"])
def test_a_number_of_threads_that_is_none_is_refused(value):
    code = (
        "from flame_ext import _core\n"
        "try: _core.num_threads()\nexcept ValueError as error: print(error)"
    )
    printed = run_python(code, FLAME_EXT_NUM_THREADS=value).stdout
    assert f"FLAME_EXT_NUM_THREADS='{value}' is not a number of threads" in printed


def test_the_backend_takes_torchs_number_of_threads_unless_the_kernels_have_their_own():
    code = (
        "import torch; torch.set_num_threads(3); from flame_ext import _core; "
        "from flame_ext.backends import make_backend; make_backend('cpu', torch.device('cpu')); "
        "print(_core.num_threads())"
    )
    assert run_python(code, FLAME_EXT_NUM_THREADS="").stdout.strip() == "3"
    assert run_python(code, FLAME_EXT_NUM_THREADS="2").stdout.strip() == "2"


def test_overlapping_runs_give_torch_its_threads_back():
    code = (
        "import torch; torch.set_num_threads(3); from flame_ext import _core; "
        "from flame_ext.backends.cpu import CpuBackend; a, b = CpuBackend().training(), "
        "CpuBackend().training(); a.__enter__(); b.__enter__(); "
        "CpuBackend(); print(torch.get_num_threads(), _core.num_threads()); "
        "a.__exit__(None, None, None); b.__exit__(None, None, None); "
        "print(torch.get_num_threads())"
    )
    assert run_python(code, FLAME_EXT_NUM_THREADS="").stdout.split() == ["1", "3", "3"]


def test_a_daemon_thread_in_a_kernel_does_not_stop_the_exit():
    code = (
        "import threading, time; import numpy as np; from flame_ext import _core\n"
        "x = np.ones((4096, 512), np.float32)\n"
        "spec = _core.MlpSpec([512, 512, 1], members=1, activation='relu', layer_norm=False)\n"
        "flat = np.zeros(spec.parameter_count, np.float32)\n"
        "def work():\n"
        "    while True: _core.mlp_forward(spec, flat, x)\n"
        "for _ in range(2): threading.Thread(target=work, daemon=True).start()\n"
        "time.sleep(0.3)"
    )
    assert run_python(code).returncode == 0


def test_import_and_report_need_no_torch():
    code = (
        "import sys, flame_ext; flame_ext.backend_info(); "
        "print([m for m in ('torch', 'gymnasium', 'matplotlib') if m in sys.modules])"
    )
    result = run_python(code)
    assert result.stdout.strip() == "[]", result.stderr
