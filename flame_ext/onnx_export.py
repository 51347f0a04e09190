"""A saved policy as one ONNX graph, for programs in other languages."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flame_ext.policy import Array, PolicySpec, read_policy
from flame_ext.sampling import (
    EMBEDDING_ACTIVATION,
    EMBEDDING_MIN_SCALE,
    LAYER_NORM_EPS,
    LOG_STD_RANGE,
    OBSERVATION_CLIP,
    PARAMETER_ALIGNMENT,
    sampler_steps,
    time_feature_rows,
)

OPSET = 18  # the first with Mish


def export_onnx(policy: str | Path, output: str | Path) -> None:
    """Writes what `Policy.act` computes for one sample per observation as an ONNX model.

    The graph takes ``obs`` ``(B, O)``, raw, and ``noise`` ``(B, A)``, draws from N(0, 1) or zeros
    for the deterministic action, and gives ``action`` ``(B, A)`` in the environment's units; all
    float32. Several sampling steps are unrolled. The best of N, which needs the critics, is not
    part of it.

    Args:
        policy: A run directory, its ``best/`` folder or a policy file.
        output: The .onnx file.

    Raises:
        ImportError: If the package onnx is not installed.
        RunDirectoryError: If there is no policy.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError(
            f"the package onnx is needed ({error}); run `pip install onnx`"
        ) from error
    spec, tensors = read_policy(policy)
    model = _Graph(onnx).policy(spec, tensors)
    onnx.checker.check_model(model, full_check=True)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(output))


class _Graph:
    """Nodes in the order of computation; every method adds some and returns its output's name."""

    def __init__(self, onnx: Any) -> None:
        self._onnx = onnx
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._names = itertools.count()

    def policy(self, spec: PolicySpec, tensors: Mapping[str, Array]) -> Any:
        obs = "obs"
        if "normalizer.shift" in tensors:
            centred = self.node("Sub", obs, tensors["normalizer.shift"])
            scaled = self.node("Mul", centred, tensors["normalizer.scale"])
            obs = self.node("Clip", scaled, -OBSERVATION_CLIP, OBSERVATION_CLIP)
        if "state_encoder.flat" in tensors:
            obs = self.node("Concat", obs, self.embedding(spec, tensors, obs), axis=-1)
        sample = self.gaussian if spec.algorithm == "sac" else self.denoised
        unit = sample(spec, tensors["actor.flat"], obs)
        middle, half = spec.action_middle_and_half()
        scaled = self.node("Mul", unit, half.astype(np.float32))
        moved = self.node("Add", scaled, middle.astype(np.float32))
        above = self.node("Max", moved, np.asarray(spec.action_low, np.float32))
        self.node("Min", above, np.asarray(spec.action_high, np.float32), name="action")
        return self._model(spec)

    def embedding(self, spec: PolicySpec, tensors: Mapping[str, Array], obs: str) -> str:
        options = spec.config
        widths = (spec.obs_dim, *options["hidden_sizes"], options["embedding_dim"])
        layers = _layers(tensors["state_encoder.flat"], widths, layer_norm=False)
        features = self.mlp(obs, layers, EMBEDDING_ACTIVATION)
        mean = self.node("ReduceMean", self.node("Abs", features), np.array([-1]), keepdims=1)
        return self.node("Div", features, self.node("Max", mean, EMBEDDING_MIN_SCALE))

    def gaussian(self, spec: PolicySpec, flat: Array, obs: str) -> str:
        options, a = spec.config, spec.action_dim
        widths = (_observed(spec), *options["hidden_sizes"], 2 * a)
        layers = _layers(flat, widths, options["policy_layer_norm"])
        output = self.mlp(obs, layers, options["policy_activation"])
        columns = np.array([-1])
        mean = self.node("Slice", output, np.array([0]), np.array([a]), columns)
        raw = self.node("Slice", output, np.array([a]), np.array([2 * a]), columns)
        low, high = LOG_STD_RANGE
        half = 0.5 * (high - low)
        log_std = self.node("Add", self.node("Mul", self.node("Tanh", raw), half), low + half)
        spread = self.node("Mul", self.node("Exp", log_std), "noise")
        return self.node("Tanh", self.node("Add", mean, spread))

    def denoised(self, spec: PolicySpec, flat: Array, obs: str) -> str:
        """Several evaluations of one network; time's columns go into the first bias."""
        options = spec.config
        table = sampler_steps(spec.algorithm, options["sampling_steps"], options["flow"])
        times = time_feature_rows(table)
        columns = spec.action_dim + _observed(spec)
        widths = (columns + times.shape[1], *options["hidden_sizes"], spec.action_dim)
        (first, bias, *norm), *others = _layers(flat, widths, options["policy_layer_norm"])
        z = "noise"
        for step, time in zip(table, times, strict=True):
            layers = [(first[:, :columns], bias + first[:, columns:] @ time, *norm), *others]
            inputs = self.node("Concat", z, obs, axis=-1)
            output = self.mlp(inputs, layers, options["policy_activation"])
            x = self.combination(step.p, z, step.q, output)
            x = self.node("Clip", x, -1.0, 1.0) if step.clip else x
            z = self.combination(step.m, x, step.n, z)
        return self.node("Clip", z, -1.0, 1.0)

    def combination(self, a: float, x: str, b: float, y: str) -> str:
        """A x + b y, without the operations that a 0 or a 1 leaves out."""
        terms = [
            term if factor == 1 else self.node("Mul", term, factor)
            for factor, term in ((a, x), (b, y))
            if factor != 0
        ]
        return terms[0] if len(terms) == 1 else self.node("Add", *terms)

    def mlp(self, x: str, layers: Sequence[tuple[Array, ...]], activation: str) -> str:
        for weight, bias, *norm in layers[:-1]:
            x = self.node("Gemm", x, weight, bias, transB=1)
            if norm:
                x = self.node("LayerNormalization", x, *norm, epsilon=LAYER_NORM_EPS)
            x = self.activated(x, activation)
        return self.node("Gemm", x, *layers[-1], transB=1)

    def activated(self, x: str, activation: str) -> str:
        if activation == "silu":
            return self.node("Mul", x, self.node("Sigmoid", x))
        return self.node({"relu": "Relu", "mish": "Mish"}[activation], x)

    def node(self, kind: str, *inputs: Any, name: str | None = None, **options: Any) -> str:
        """Adds an operation on names and constants."""
        name = name or f"{kind.lower()}{next(self._names)}"
        operands = [x if isinstance(x, str) else self._constant(x) for x in inputs]
        self._nodes.append(self._onnx.helper.make_node(kind, operands, [name], **options))
        return name

    def _constant(self, value: Any) -> str:
        array = np.asarray(value)
        array = array.astype(np.int64 if array.dtype.kind == "i" else np.float32)
        name = f"constant{next(self._names)}"
        self._constants.append(self._onnx.numpy_helper.from_array(array, name))
        return name

    def _model(self, spec: PolicySpec) -> Any:
        helper, float32 = self._onnx.helper, self._onnx.TensorProto.FLOAT
        widths = {"obs": spec.obs_dim, "noise": spec.action_dim, "action": spec.action_dim}
        rows = {
            name: helper.make_tensor_value_info(name, float32, ["batch", width])
            for name, width in widths.items()
        }
        graph = helper.make_graph(
            self._nodes, "policy", [rows["obs"], rows["noise"]], [rows["action"]], self._constants
        )
        # The oldest file format that has the operators, for runtimes that are not the newest.
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8
        )


def _observed(spec: PolicySpec) -> int:
    return spec.obs_dim + int(spec.config.get("embedding_dim", 0))


def _layers(flat: Array, widths: Sequence[int], layer_norm: bool) -> list[tuple[Array, ...]]:
    """Weight ``(out, in)``, bias and perhaps gain and offset of every layer of a flat buffer."""
    layers, at = [], 0

    def take(*shape: int) -> Array:
        nonlocal at
        size = int(np.prod(shape))
        part = flat[at : at + size].reshape(shape)
        at += size + -size % PARAMETER_ALIGNMENT
        return part

    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        normed = layer_norm and i < len(widths) - 2
        shapes = [(fan_out, fan_in), *[(fan_out,)] * (3 if normed else 1)]
        layers.append(tuple(take(*shape) for shape in shapes))
    return layers
