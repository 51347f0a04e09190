"""The saved policy: numpy in and out, environment units, determinism, errors."""

import copy
import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from flame_ext import policy as policy_module
from flame_ext.agent import Agent
from flame_ext.backends import TorchBackend
from flame_ext.build import deployed_networks
from flame_ext.config import ALGORITHMS, make_config
from flame_ext.errors import BackendUnavailableError, RunDirectoryError
from flame_ext.latency import untrained_policy
from flame_ext.policy import (
    Policy,
    PolicySpec,
    Precision,
    fixed_noise,
    load,
    read_policy,
    save_policy,
)

OBS, ACT = 5, 3
LOW, HIGH = (-1.0, 0.0, -2.0), (1.0, 4.0, 3.0)


def weights(agent: Agent) -> dict[str, np.ndarray]:
    networks = deployed_networks(agent.actor, agent.critics)
    return {f"{name}.flat": net.flat.detach().numpy() for name, net in networks.items()}


def make_policy(
    path: Path,
    algorithm: str,
    normalized: bool = False,
    backend: str = "auto",
    embedding_dim: int = 0,
) -> tuple[Policy, Agent]:
    options = {"hidden_sizes": (16, 16), "embedding_dim": embedding_dim}
    config = make_config(algorithm, overrides=options)
    agent = Agent(config, OBS, ACT, TorchBackend(), seed=3)
    spec = PolicySpec(algorithm, config.to_dict(), OBS, ACT, LOW, HIGH, "Task-v0")
    tensors = weights(agent)
    if normalized:
        tensors["normalizer.shift"] = np.full(OBS, 2, np.float32)
        tensors["normalizer.scale"] = np.full(OBS, 0.5, np.float32)
    save_policy(path / "policy.safetensors", spec, tensors)
    return load(path, backend=backend, seed=0), agent


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("particles", "embedding_dim"), [(1, 0), (5, 0), (1, 8), (5, 8)])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_acts_as_the_agent_in_environment_units(
    tmp_path: Path, algorithm: str, particles: int, embedding_dim: int, backend: str
) -> None:
    policy, agent = make_policy(tmp_path, algorithm, backend=backend, embedding_dim=embedding_dim)
    assert policy.backend == backend
    obs = np.random.default_rng(0).normal(size=(7, OBS)).astype(np.float32)
    noise = torch.tensor(fixed_noise(particles, ACT)).expand(7, -1, -1)
    unit = agent.act(torch.from_numpy(obs), noise).numpy()
    low, high = np.array(LOW), np.array(HIGH)
    expected = low + (unit + 1) / 2 * (high - low)
    action = policy.act(obs, particles, deterministic=True)
    assert action.dtype == np.float32
    np.testing.assert_allclose(action, expected, rtol=1e-5, atol=1e-5)
    single = policy.act(obs[0], particles, True)
    assert single.shape == (ACT,)
    np.testing.assert_allclose(single, action[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_outliers_are_clipped_as_in_training(tmp_path: Path, backend: str) -> None:
    policy, _ = make_policy(tmp_path, "flame", True, backend)
    far, edge = (policy.act(np.full(OBS, x), deterministic=True) for x in (1e4, 2 + 10 / 0.5))
    np.testing.assert_array_equal(far, edge)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_deterministic_action_has_no_noise_and_others_vary(tmp_path: Path, backend: str) -> None:
    policy, agent = make_policy(tmp_path, "sac", backend=backend)
    with torch.no_grad():
        mean, _ = agent.actor.network.distribution(torch.zeros(1, OBS))
    unit = policy.spec.unit_action(policy.act(np.zeros(OBS), deterministic=True))
    np.testing.assert_allclose(unit, mean[0].tanh().numpy(), atol=1e-5)
    assert not np.array_equal(policy.act(np.zeros(OBS)), policy.act(np.zeros(OBS)))


def test_without_a_seed_every_load_draws_its_own(tmp_path: Path) -> None:
    make_policy(tmp_path, "flame")
    assert not np.array_equal(*(load(tmp_path).act(np.zeros(OBS)) for _ in range(2)))


def test_a_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, agent = make_policy(tmp_path, "sac")
    with monkeypatch.context() as patch:
        patch.setattr(policy_module, "_FORMAT", 2)
        save_policy(tmp_path / "new" / "policy.safetensors", policy.spec, weights(agent))
    with pytest.raises(RunDirectoryError, match="has format 2"):
        load(tmp_path / "new")


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_actions_stay_in_the_box(tmp_path: Path, backend: str) -> None:
    """In float32 the middle and half of the range add up to more than these boxes' bounds."""
    policy, agent = make_policy(tmp_path, "flame")
    low, high = np.array([(-3.0718, -0.0698), (-0.1, 0.7), (-0.2, 1.0)], np.float32).T
    box = {"action_low": tuple(low.tolist()), "action_high": tuple(high.tolist())}
    spec = dataclasses.replace(policy.spec, **box)
    tensors = weights(agent)
    save_policy(tmp_path / "box" / "policy.safetensors", spec, tensors)
    noise = 1e3 * np.random.default_rng(0).standard_normal((50, 1, ACT), np.float32)
    engine = load(tmp_path / "box", backend=backend)._engine
    action = engine.act(np.zeros((50, OBS), np.float32), noise, 1, 0)
    assert ((low <= action) & (action <= high)).all()
    for bound in (low, high):
        assert (action == bound).any(0).all()


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_views_of_any_order_are_taken(tmp_path: Path, backend: str) -> None:
    policy, _ = make_policy(tmp_path, "flame", backend=backend)
    obs = np.random.default_rng(0).normal(size=(7, OBS)).astype(np.float32)
    expected = policy.act(obs, deterministic=True)
    for view in (obs[::-1, ::-1], np.asfortranarray(obs)[::-1]):
        action = policy.act(np.ascontiguousarray(view), deterministic=True)
        np.testing.assert_array_equal(policy.act(view, deterministic=True), action)
    np.testing.assert_allclose(action[::-1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("precision", "error"), [("fp16", 5e-3), ("bf16", 4e-2)])
@pytest.mark.parametrize("embedding_dim", [0, 8])
def test_half_the_bits_stay_close(
    tmp_path: Path, embedding_dim: int, precision: Precision, error: float
) -> None:
    policy, _ = make_policy(tmp_path, "flame", embedding_dim=embedding_dim)
    rounded = load(tmp_path, precision=precision)
    obs = np.random.default_rng(0).normal(size=(50, OBS))
    np.testing.assert_allclose(
        rounded.act(obs, deterministic=True), policy.act(obs, deterministic=True), atol=error
    )


def test_a_missing_native_module_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Acting is slower then, or impossible: neither should be a riddle."""
    make_policy(tmp_path, "flame")
    monkeypatch.setitem(sys.modules, "flame_ext._core", None)
    with pytest.warns(RuntimeWarning, match="acting in PyTorch: the native module"):
        assert load(tmp_path).backend == "torch"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendUnavailableError, match="pip install"):
        load(tmp_path)


@pytest.mark.parametrize("embedding_dim", [0, 8])
def test_acting_needs_no_torch(tmp_path: Path, embedding_dim: int) -> None:
    """In a fresh interpreter that cannot import torch, from several threads at once."""
    make_policy(tmp_path, "flame", embedding_dim=embedding_dim)
    script = """
import sys, threading
sys.modules["torch"] = None
import numpy as np, flame_ext
policy = flame_ext.load(sys.argv[1], seed=0)
actions = []
def work():
    for _ in range(50):
        actions.append(policy.act(np.zeros(5), num_particles=4))
threads = [threading.Thread(target=work) for _ in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
assert len(actions) == 200 and len({a.tobytes() for a in actions}) > 150
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, cwd=tmp_path)


def test_stochastic_actions_vary_and_follow_the_seed(tmp_path: Path) -> None:
    policy, _ = make_policy(tmp_path, "flame")
    obs = np.zeros(OBS)
    first, second = policy.act(obs), policy.act(obs)
    assert not np.array_equal(first, second)
    again = load(tmp_path, seed=0)
    assert np.array_equal(again.act(obs), first)
    assert np.array_equal(policy.act(obs, deterministic=True), again.act(obs, deterministic=True))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_another_seed_gives_other_actions(tmp_path: Path, backend: str) -> None:
    make_policy(tmp_path, "flame")
    first, again, other = (
        load(tmp_path, backend=backend, seed=seed).act(np.zeros(OBS)) for seed in (0, 0, 1)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(("particles", "embedding_dim"), [(1, 0), (5, 0), (5, 8)])
def test_normalisation_travels_with_the_policy(
    tmp_path: Path, backend: str, particles: int, embedding_dim: int
) -> None:
    plain, normalized = (
        make_policy(tmp_path / str(n), "flame", n, backend, embedding_dim)[0] for n in (False, True)
    )
    obs = np.linspace(-1, 1, OBS).astype(np.float32)
    expected = plain.act((obs - 2) * 0.5, particles, deterministic=True)
    np.testing.assert_allclose(normalized.act(obs, particles, True), expected, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("embedding_dim", [0, 8])
def test_q_value_takes_environment_units(tmp_path: Path, backend: str, embedding_dim: int) -> None:
    policy, agent = make_policy(tmp_path, "sac", backend=backend, embedding_dim=embedding_dim)
    obs = np.zeros((2, OBS), np.float32)
    q = policy.q_value(obs, np.array([LOW, HIGH]))
    corners = torch.tensor([[-1.0] * ACT, [1.0] * ACT])
    with torch.no_grad():
        states = agent.critics.observe(torch.zeros(2, OBS))
        expected = agent.critics.q_min(states, corners).numpy()
    np.testing.assert_allclose(q, expected, rtol=1e-5, atol=1e-6)


def test_refuses_what_does_not_fit(tmp_path: Path) -> None:
    policy, _ = make_policy(tmp_path, "flame")
    with pytest.raises(ValueError, match=r"obs has shape \(4,\), this policy takes \(5,\)"):
        policy.act(np.zeros(4))
    with pytest.raises(ValueError, match="num_particles=0"):
        policy.act(np.zeros(OBS), num_particles=0)
    with pytest.raises(ValueError, match="action has shape"):
        policy.q_value(np.zeros((2, OBS)), np.zeros((3, ACT)))
    with pytest.raises(RunDirectoryError, match=r"there is no .*nowhere"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunDirectoryError, match="no policy in"):
        load(tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("config", {}),
        ("config", None),
        ("action_low", (0.0,)),
        ("action_high", 3),
        ("obs_dim", None),
    ],
)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_damaged_header_is_refused(
    tmp_path: Path, name: str, value: object, backend: str
) -> None:
    policy, agent = make_policy(tmp_path, "sac")
    tensors = weights(agent)
    file = tmp_path / "x" / "policy.safetensors"
    save_policy(file, dataclasses.replace(policy.spec, **{name: value}), tensors)
    with pytest.raises(RunDirectoryError):
        load(file, backend=backend)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_damaged_weights_are_refused(tmp_path: Path, backend: str) -> None:
    policy, agent = make_policy(tmp_path, "sac")
    file = tmp_path / "x" / "policy.safetensors"
    for damage in (lambda flat: flat * np.float32(np.nan), lambda flat: flat[:-16]):
        tensors = weights(agent)
        tensors["critics.flat"] = damage(tensors["critics.flat"])
        save_policy(file, policy.spec, tensors)
        with pytest.raises(ValueError, match=r"critics|finite"):
            load(file, backend=backend)


@pytest.mark.parametrize(
    ("obs_dim", "hidden_sizes"), [(300, [506, *[2147483584] * 5]), (2**31 - 1, [16, 16])]
)
def test_sizes_whose_products_overflow_are_refused(
    tmp_path: Path, obs_dim: int, hidden_sizes: list[int]
) -> None:
    policy, agent = make_policy(tmp_path, "sac")
    config = {**policy.spec.config, "hidden_sizes": hidden_sizes}
    spec = dataclasses.replace(policy.spec, config=config, obs_dim=obs_dim)
    file = tmp_path / "x" / "policy.safetensors"
    save_policy(file, spec, weights(agent))
    with pytest.raises(ValueError, match=r"it must be from [01] to 1048576"):
        load(file, backend="cpu")


@pytest.mark.parametrize("seed", [-1, 0.5, 1 << 63])
def test_seeds_are_checked(tmp_path: Path, seed: int) -> None:
    make_policy(tmp_path, "sac")
    with pytest.raises(ValueError, match=r"seed=.*whole number from 0 to"):
        load(tmp_path, seed=seed)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_other_algorithms_and_missing_weights_are_refused(tmp_path: Path, backend: str) -> None:
    policy, _ = make_policy(tmp_path, "flame")
    flat = np.zeros(16, np.float32)
    unknown = dataclasses.replace(policy.spec, algorithm="unheard-of")
    file = tmp_path / "x" / "policy.safetensors"
    save_policy(file, unknown, {"actor.flat": flat, "critics.flat": flat})
    with pytest.raises(ValueError, match="unheard-of"):
        load(file, backend=backend)
    save_policy(file, policy.spec, {"actor.flat": flat})
    with pytest.raises(RunDirectoryError, match=r"lacks the weights critics\.flat"):
        load(file, backend=backend)
    embedded = dataclasses.replace(policy.spec, config={**policy.spec.config, "embedding_dim": 8})
    save_policy(file, embedded, {"actor.flat": flat, "critics.flat": flat})
    with pytest.raises(RunDirectoryError, match=r"lacks the weights state_encoder\.flat, pair"):
        load(file, backend=backend)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_options_that_no_longer_exist_do_not_matter(tmp_path: Path, backend: str) -> None:
    policy, agent = make_policy(tmp_path, "flame")
    older = dataclasses.replace(policy.spec, config={**policy.spec.config, "gone": 250})
    tensors = weights(agent)
    save_policy(tmp_path / "older" / "policy.safetensors", older, tensors)
    obs = np.ones((2, OBS), np.float32)
    action = load(tmp_path / "older", backend=backend).act(obs, deterministic=True)
    np.testing.assert_allclose(action, policy.act(obs, deterministic=True), rtol=1e-5, atol=1e-5)


def test_an_action_without_a_choice_is_zero_on_the_unit_scale(tmp_path: Path) -> None:
    policy, _ = make_policy(tmp_path, "sac")
    spec = dataclasses.replace(policy.spec, action_low=(-1.0, 0.5, 0.0), action_high=(1, 0.5, 4))
    np.testing.assert_array_equal(spec.unit_action(np.array([0.5, 0.5, 1.0])), [0.5, 0.0, -0.5])


def test_a_run_directory_is_its_latest_policy(tmp_path: Path) -> None:
    spec = untrained_policy("sac", 3, 2, hidden_sizes=(8,)).spec
    weights = {name: np.zeros(8, np.float32) for name in ("actor.flat", "critics.flat")}
    if spec.config["embedding_dim"]:
        weights |= {f"{n}.flat": np.zeros(8, np.float32) for n in ("state_encoder", "pair_encoder")}
    for place in ("best", ""):
        named = dataclasses.replace(spec, env_id=place or "latest")
        save_policy(tmp_path / place / policy_module.POLICY_FILE, named, weights)
        assert read_policy(tmp_path)[0].env_id == named.env_id  # best alone, then the latest
    assert read_policy(tmp_path / "best")[0].env_id == "best"


def test_an_interrupted_save_leaves_the_former_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = untrained_policy("sac", 3, 2, hidden_sizes=(8,)).spec
    file, weights = tmp_path / "policy.safetensors", {"actor.flat": np.zeros(8, np.float32)}
    save_policy(file, spec, weights)
    former = file.read_bytes()
    write = Path.write_bytes

    def fill_the_disk(path: Path, data: bytes) -> int:
        write(path, data[: len(data) // 2])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill_the_disk)
    with pytest.raises(OSError, match="No space"):
        save_policy(file, spec, weights)
    assert file.read_bytes() == former


def test_a_policy_says_what_it_is_and_that_it_is_not_copied(tmp_path: Path) -> None:
    policy, _ = make_policy(tmp_path, "flame")
    assert repr(policy) == "Policy(flame on Task-v0, 5 observations, 3 actions, cpu)"
    with pytest.raises(TypeError, match="load it again"):
        pickle.dumps(policy)
    with pytest.raises(TypeError, match="load it again"):
        copy.deepcopy(policy)
