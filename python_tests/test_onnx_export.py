"""The exported model acts as the policy does, in ONNX Runtime."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import flame_ext
from flame_ext import cli
from flame_ext.build import deployed_networks, make_actor, make_critics, make_encoder
from flame_ext.config import make_config
from flame_ext.policy import PolicySpec, save_policy

OBS, ACT, B = 5, 3, 9
LOW, HIGH = np.array([(-3.0718, -0.0698), (-0.1, 0.7), (-2, 3)], np.float32).T


def save_random(path: Path, algorithm: str, normalised: bool, **options: Any) -> None:
    config = make_config(algorithm, overrides={"hidden_sizes": (24, 16), **options})
    critics = make_critics(config, OBS, ACT, make_encoder(config, OBS, ACT))
    networks = deployed_networks(make_actor(config, OBS, ACT), critics)
    rng = np.random.default_rng(0)
    # Fresh weights say nothing of gains and offsets.
    tensors = {
        f"{name}.flat": (net.flat.detach() + 0.1 * torch.randn(net.flat.shape)).numpy()
        for name, net in networks.items()
    }
    if normalised:
        tensors["normalizer.shift"] = rng.standard_normal(OBS).astype(np.float32)
        tensors["normalizer.scale"] = rng.uniform(0.2, 90, OBS).astype(np.float32)
    box = tuple(LOW.tolist()), tuple(HIGH.tolist())
    spec = PolicySpec(algorithm, config.to_dict(), OBS, ACT, *box, None)
    save_policy(path, spec, tensors)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("flame", {}),
        ("flame", {"policy_activation": "mish", "policy_layer_norm": True}),
        ("flame", {"embedding_dim": 8}),
        ("flame", {"sampling_steps": 3, "reverse_kl_weight": 0.0}),
        ("flame-r", {"policy_activation": "relu"}),
        ("sac", {"embedding_dim": 8}),
        ("diffusion", {}),
    ],
)
def test_the_model_acts_as_the_policy(
    tmp_path: Path, algorithm: str, options: dict[str, Any], normalised: bool
) -> None:
    torch.manual_seed(1)
    save_random(tmp_path / "policy.safetensors", algorithm, normalised, **options)
    policy = flame_ext.load(tmp_path)
    flame_ext.export_onnx(tmp_path, tmp_path / "policy.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "policy.onnx")
    rng = np.random.default_rng(2)
    obs = rng.standard_normal((B, OBS)).astype(np.float32)
    noise = rng.standard_normal((B, 1, ACT)).astype(np.float32)
    for draws in (noise, 0 * noise):
        (action,) = session.run(None, {"obs": obs, "noise": draws[:, 0]})
        expected = policy._engine.act(obs, draws, 1, 0)
        assert np.ptp(expected, axis=0).max() > 1e-3, "a constant would say nothing"
        np.testing.assert_allclose(action, expected, rtol=1e-4, atol=2e-4)
    (action,) = session.run(None, {"obs": obs, "noise": 1e3 * noise[:, 0]})
    assert ((action >= LOW) & (action <= HIGH)).all()


def test_the_command_names_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save_random(tmp_path / "policy.safetensors", "flame", normalised=False)
    assert cli.main(["export", str(tmp_path / "policy.safetensors")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'policy.onnx'}\n"
    assert onnxruntime.InferenceSession(tmp_path / "policy.onnx").get_inputs()[0].shape[1] == OBS


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match="pip install onnx"):
        flame_ext.export_onnx(tmp_path, tmp_path / "policy.onnx")
