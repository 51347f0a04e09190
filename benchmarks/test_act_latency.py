"""How long acting takes: every algorithm, then the one-step policy against other runtimes.

    pytest benchmarks/test_act_latency.py --benchmark-only -s

Times are printed, never asserted; what is asserted is that the compared programs agree. The peers
run interleaved with ours in one process on one thread, so that a busy machine slows all of them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper

from flame_ext import _core
from flame_ext.latency import untrained_policy
from flame_ext.policy import PRECISIONS
from flame_ext.sampling import flow_steps, time_feature_rows

SIZES = {"halfcheetah": (17, 6), "humanoid": (348, 17)}
HIDDEN = (256, 256, 256)


@pytest.fixture(autouse=True)
def one_thread():
    """One thread for everybody: the comparison is between programs, not between thread counts."""
    before = _core.num_threads(), torch.get_num_threads()
    _core.set_num_threads(1)
    torch.set_num_threads(1)
    yield
    _core.set_num_threads(before[0])
    torch.set_num_threads(before[1])


@pytest.mark.parametrize("batch", [1, 256])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("algorithm", "particles"),
    # Diffusion policies are evaluated as the best of 16 (`eval_particles`).
    [("flame", 1), ("flame", 32), ("flame-r", 1), ("diffusion", 1), ("diffusion", 16), ("sac", 1)],
)
def test_algorithms(benchmark, algorithm, particles, size, batch):
    obs_dim, action_dim = SIZES[size]
    policy = untrained_policy(algorithm, obs_dim, action_dim)
    obs = np.random.default_rng(0).standard_normal((batch, obs_dim)).astype(np.float32)
    benchmark.group = f"{size}, batch {batch}"
    benchmark.extra_info["network evaluations"] = policy.spec.config["sampling_steps"]
    rounds = 2000 // (batch * particles) + 10
    action = benchmark.pedantic(
        policy.act, (obs,), {"num_particles": particles}, rounds=rounds, warmup_rounds=3
    )
    assert action.shape == (batch, action_dim)
    assert (np.abs(action) <= 1).all()


class OneStepNet:
    """A random one-step policy, its time columns folded into the first bias, and its peers."""

    def __init__(self, obs_dim: int, action_dim: int) -> None:
        rng = np.random.default_rng(1)
        self.obs_dim, self.action_dim = obs_dim, action_dim
        self.features = time_feature_rows(flow_steps(1, "mean"))
        sizes = (action_dim + obs_dim + self.features.shape[1], *HIDDEN, action_dim)
        self.layers = [
            (
                (rng.standard_normal((n_out, n_in)) / np.sqrt(n_in)).astype(np.float32),
                (0.1 * rng.standard_normal(n_out)).astype(np.float32),
            )
            for n_in, n_out in itertools.pairwise(sizes)
        ]
        weight, bias = self.layers[0]
        columns = action_dim + obs_dim
        self.folded = [
            (weight[:, :columns].copy(), bias + weight[:, columns:] @ self.features[0]),
            *self.layers[1:],
        ]

    def packed(self, precision: str) -> _core.PackedPolicy:
        parts = [part.ravel() for layer in self.layers for part in layer]
        return _core.PackedPolicy(
            kind="flow",
            obs_dim=self.obs_dim,
            action_dim=self.action_dim,
            policy=np.concatenate([np.pad(p, (0, -p.size % 16)) for p in parts]),
            hidden=list(HIDDEN),
            activation="mish",
            time_features=self.features,
            steps=np.float32([[1, -1, 1, 0, 0]]),
            precision=precision,
        )

    def torch_eager(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        layers = [(torch.from_numpy(w), torch.from_numpy(b)) for w, b in self.folded]

        def act(obs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():
                h = torch.cat([noise, obs], dim=-1)
                for weight, bias in layers[:-1]:
                    h = F.mish(F.linear(h, weight, bias))
                return (noise - F.linear(h, *layers[-1])).clamp_(-1, 1)

        return act

    def onnx_session(self) -> onnxruntime.InferenceSession:
        nodes = [helper.make_node("Concat", ["noise", "obs"], ["h0"], axis=1)]
        weights = []
        for i, (weight, bias) in enumerate(self.folded):
            weights += [
                numpy_helper.from_array(weight, f"w{i}"),
                numpy_helper.from_array(bias, f"b{i}"),
            ]
            out = f"z{i}"
            nodes.append(helper.make_node("Gemm", [f"h{i}", f"w{i}", f"b{i}"], [out], transB=1))
            if i < len(HIDDEN):
                nodes.append(helper.make_node("Mish", [out], [f"h{i + 1}"]))
        nodes += [
            helper.make_node("Sub", ["noise", f"z{len(HIDDEN)}"], ["raw"]),
            helper.make_node("Clip", ["raw", "low", "high"], ["action"]),
        ]
        weights += [
            numpy_helper.from_array(np.float32(bound), name)
            for name, bound in (("low", -1), ("high", 1))
        ]
        graph = helper.make_graph(
            nodes,
            "act",
            [
                helper.make_tensor_value_info("obs", TensorProto.FLOAT, [1, self.obs_dim]),
                helper.make_tensor_value_info("noise", TensorProto.FLOAT, [1, self.action_dim]),
            ],
            [helper.make_tensor_value_info("action", TensorProto.FLOAT, [1, self.action_dim])],
            weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
        model.ir_version = 9
        onnx.checker.check_model(model)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )


def bound_run(session: onnxruntime.InferenceSession, obs, noise) -> tuple[Callable, np.ndarray]:
    """ONNX Runtime's fastest call: inputs and output bound once to numpy memory."""
    action = np.empty_like(noise)
    binding = session.io_binding()
    for name, array in (("obs", obs), ("noise", noise)):
        binding.bind_input(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
    binding.bind_output("action", "cpu", 0, np.float32, action.shape, action.ctypes.data)
    return lambda: session.run_with_iobinding(binding), action


def interleaved(calls: dict[str, Callable], seconds: float = 4.0) -> dict[str, np.ndarray]:
    """Microseconds per call of each program in each round; a round is a short burst of each."""
    burst = 20
    for call in calls.values():
        for _ in range(50):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, call in calls.items():
            call()  # brings the weights back into the cache after the other programs
            start = time.perf_counter()
            for _ in range(burst):
                call()
            times[name].append((time.perf_counter() - start) / burst * 1e6)
    return {name: np.array(values) for name, values in times.items()}


@pytest.mark.parametrize("size", SIZES)
def test_one_step_against_other_runtimes(benchmark, size):
    net = OneStepNet(*SIZES[size])
    rng = np.random.default_rng(2)
    obs = rng.standard_normal((1, net.obs_dim)).astype(np.float32)
    noise = rng.standard_normal((1, net.action_dim)).astype(np.float32)
    packed = {precision: net.packed(precision) for precision in PRECISIONS}
    eager = net.torch_eager()
    run_onnx, onnx_action = bound_run(net.onnx_session(), obs, noise)
    obs_torch, noise_torch = torch.from_numpy(obs), torch.from_numpy(noise)
    calls = {
        "flame_ext fp32": lambda: packed["fp32"].act(obs, noise),
        "flame_ext fp16": lambda: packed["fp16"].act(obs, noise),
        "flame_ext bf16": lambda: packed["bf16"].act(obs, noise),
        "ONNX Runtime, io_binding": run_onnx,
        "PyTorch eager, folded": lambda: eager(obs_torch, noise_torch),
    }
    ours = calls["flame_ext fp32"]()
    run_onnx()
    np.testing.assert_allclose(onnx_action, ours, atol=1e-5)
    np.testing.assert_allclose(eager(obs_torch, noise_torch).numpy(), ours, atol=1e-5)
    np.testing.assert_allclose(calls["flame_ext fp16"](), ours, atol=5e-3)
    np.testing.assert_allclose(calls["flame_ext bf16"](), ours, atol=3e-2)

    times = interleaved(calls)
    quiet = {name: np.quantile(values, 0.02) for name, values in times.items()}
    print(f"\n{size}, batch 1, 3x256 mish, {_core.isa_active()}, one thread; us median / quiet")
    for name, values in times.items():
        print(f"  {name:<26}{np.median(values):8.1f} /{quiet[name]:7.2f}")
    for precision, policy in packed.items():
        name = f"flame_ext {precision}"
        floor = policy.read_weights_seconds(5000) * 1e6
        kb = policy.weight_bytes / 1e3
        print(
            f"  {name}: {kb:.0f} kB of weights, read alone in {floor:.2f} us "
            f"({kb / floor:.0f} GB/s); act takes {quiet[name] / floor:.2f} of that floor"
        )
        for peer in ("ONNX Runtime, io_binding", "PyTorch eager, folded"):
            ratio = np.median(times[peer] / times[name])
            print(
                f"  {peer} / {name}: {ratio:.1f}x (median of rounds), "
                f"{quiet[peer] / quiet[name]:.1f}x (quiet)"
            )
    benchmark.group = f"one step, {size}"
    benchmark(calls["flame_ext fp32"])
