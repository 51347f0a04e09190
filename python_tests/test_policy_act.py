"""The native acting policy against a float64 numpy reference, at odd sizes and on every ISA."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from acting_reference import Case, Net, assert_as_good_as_float32

from flame_ext import _core


@pytest.mark.parametrize("batch", [1, 2, 31, 33, 257])
@pytest.mark.parametrize("obs_dim", [1, 3, 17, 376])
@pytest.mark.parametrize("action_dim", [1, 6, 17])
def test_one_step_action(isa, batch, obs_dim, action_dim):
    case = Case.random(batch + obs_dim, obs_dim, action_dim)
    obs, noise = case.inputs(batch)
    got = case.pack().act(obs, noise[:, 0])
    assert got.dtype == np.float32
    assert got.shape == (batch, action_dim)
    exact = case.actions(obs, noise)[:, 0]
    assert_as_good_as_float32(got, exact, case.actions(obs, noise, np.float32)[:, 0])
    assert (np.abs(exact) < 1).mean() > 0.5


@pytest.mark.parametrize("activation", ["relu", "silu", "mish"])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("hidden", [(256, 256, 256), (33,), (7, 100, 16)])
def test_architectures(isa, activation, layer_norm, hidden):
    case = Case.random(5, 11, 4, hidden, activation=activation, layer_norm=layer_norm)
    packed = case.pack()
    for batch in (1, 13):
        obs, noise = case.inputs(batch)
        exact, single = (case.actions(obs, noise, t)[:, 0] for t in (np.float64, np.float32))
        assert_as_good_as_float32(packed.act(obs, noise[:, 0]), exact, single)


@pytest.mark.parametrize(("batch", "particles"), [(1, 32), (3, 7), (33, 5), (2, 150)])
@pytest.mark.parametrize(("critic_norm", "embedding_dim"), [(False, 0), (True, 0), (True, 21)])
def test_best_of_n(isa, batch, particles, critic_norm, embedding_dim):
    case = Case.random(7, 17, 6, critic_norm=critic_norm, embedding_dim=embedding_dim)
    packed = case.pack()
    obs, noise = case.inputs(batch, particles)
    got = packed.act(obs, noise)
    actions = case.actions(obs, noise)
    q = case.q_min(np.repeat(obs, particles, axis=0), actions.reshape(-1, case.action_dim)).reshape(
        batch, particles
    )
    distance = np.abs(actions - got[:, None]).max(-1)
    chosen = distance.argmin(1)
    assert distance.min(1).max() < 1e-5
    # The winner in float32 may differ from float64's only where they tie to rounding.
    assert (q.max(1) - q[np.arange(batch), chosen] < 1e-4 * (1 + np.abs(q).max())).all()
    assert (q.max(1) - q.min(1)).min() > 1e-2


@pytest.mark.parametrize("batch", [1, 33, 130])
@pytest.mark.parametrize(("obs_dim", "action_dim", "embedding_dim"), [(1, 1, 3), (17, 6, 128)])
def test_sees_embedded_states(isa, batch, obs_dim, action_dim, embedding_dim):
    case = Case.random(9, obs_dim, action_dim, embedding_dim=embedding_dim)
    obs, noise = case.inputs(batch)
    exact, single = (case.actions(obs, noise, t)[:, 0] for t in (np.float64, np.float32))
    assert_as_good_as_float32(case.pack().act(obs, noise[:, 0]), exact, single)
    without_features = dataclasses.replace(
        case,
        state_encoder=dataclasses.replace(
            case.state_encoder, tensors=tuple(0 * t for t in case.state_encoder.tensors)
        ),
    )
    exact, single = (
        without_features.actions(obs, noise, t)[:, 0] for t in (np.float64, np.float32)
    )
    assert_as_good_as_float32(without_features.pack().act(obs, noise[:, 0]), exact, single)


@pytest.mark.parametrize("embedding_dim", [0, 21])
def test_q_min(isa, embedding_dim):
    case = Case.random(8, 17, 6, embedding_dim=embedding_dim)
    obs, noise = case.inputs(33)
    action = noise[:, 0].clip(-1, 1)
    got = case.pack().q_min(obs, action)
    exact, single = (case.q_min(obs, action, t) for t in (np.float64, np.float32))
    assert_as_good_as_float32(got, exact, single)


def test_several_euler_steps(isa):
    steps = tuple((1.0, -0.125, 1.0, 0.0, 0.0) for _ in range(8))
    case = Case.random(9, 5, 3, steps=steps)
    obs, noise = case.inputs(17)
    exact, single = (case.actions(obs, noise, t)[:, 0] for t in (np.float64, np.float32))
    assert_as_good_as_float32(case.pack().act(obs, noise[:, 0]), exact, single)


def test_denoising_steps(isa):
    steps = ((3.0, -2.5, 0.6, 0.3, 1.0), (1.5, -1.0, 0.8, 0.2, 1.0), (1.1, -0.3, 1.0, 0.0, 1.0))
    case = Case.random(10, 5, 3, steps=steps)
    obs, noise = case.inputs(17, particles=2)
    got = np.stack([case.pack().act(obs, noise[:, i]) for i in range(2)], axis=1)
    exact, single = (case.actions(obs, noise, t) for t in (np.float64, np.float32))
    assert_as_good_as_float32(got, exact, single)


@pytest.mark.parametrize("particles", [1, 5])
def test_gaussian_policy(isa, particles):
    rng = np.random.default_rng(11)
    net = Net.random(rng, 9, (40, 24), 2 * 4)
    critics = Net.random(rng, 4 + 9, (20,), 1, members=2)
    packed = _core.PackedPolicy(
        kind="gaussian",
        obs_dim=9,
        action_dim=4,
        policy=net.flat,
        hidden=[40, 24],
        activation="mish",
        log_std_range=(-5.0, 2.0),
        critics=critics.flat,
        critic_hidden=[20],
    )
    obs = rng.standard_normal((33, 9)).astype(np.float32)
    noise = rng.standard_normal((33, particles, 4)).astype(np.float32)
    mean, raw = np.split(net(obs)[0], 2, axis=1)
    std = np.exp(-5 + 3.5 * (np.tanh(raw) + 1))
    actions = np.tanh(mean[:, None] + std[:, None] * noise)
    q = np.stack([critics(np.concatenate([actions[:, i], obs], axis=1)) for i in range(particles)])[
        ..., 0
    ].min(1)
    expected = actions[np.arange(33), q.argmax(0)]
    np.testing.assert_allclose(packed.act(obs, noise), expected, atol=2e-6)


def round_to(precision: str, values: np.ndarray) -> np.ndarray:
    """The nearest values that 16 bits hold, as float32."""
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    return torch.from_numpy(values).to(kind).float().numpy()


@pytest.mark.parametrize(("precision", "error"), [("fp16", 1e-2), ("bf16", 8e-2)])
@pytest.mark.parametrize("hidden", [(64, 48), (96, 20, 160)])
def test_weights_are_rounded_once(isa, flush_denormals, precision, error, hidden):
    """With weights that 16 bits hold exactly, the result is that of fp32; else off by their error.

    Widths of one to three panels with whole and partial blocks.
    """
    case = Case.random(12, 17, 6, hidden=hidden)
    obs, noise = case.inputs(33)
    rounded = [round_to(precision, t) if t.ndim == 3 else t for t in case.policy.tensors]
    rounded[0][:, :, -32:] = case.policy.tensors[0][:, :, -32:]  # time is folded in fp32
    net = dataclasses.replace(case.policy, tensors=tuple(rounded))
    exact_case = dataclasses.replace(case, policy=net)
    for rows in (slice(None), slice(0, 1)):
        ours = case.pack(precision=precision).act(obs[rows], noise[rows, 0])
        wanted = exact_case.pack().act(obs[rows], noise[rows, 0])
        np.testing.assert_array_equal(ours, wanted)
        assert np.abs(ours - case.actions(obs[rows], noise[rows])[:, 0]).max() < error


@pytest.fixture(params=[False, True], ids=["denormals kept", "denormals flushed"])
def flush_denormals(request):
    """Training flushes denormals for the rest of the process; packed weights must not change."""
    torch.set_flush_denormal(request.param)
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_conversion_is_to_the_nearest(isa, flush_denormals, precision):
    """One input column, one hidden unit per value: the weights come back through the output."""
    values = np.concatenate(
        [
            np.float32([0, -0.0, 1, 65504, -65504, 2**-14, 2**-24, 2**-25, 1.5 * 2**-25]),
            np.float32([1 + 2**-11, 1 + 3 * 2**-11, 2**-14 - 2**-26, 0.1, -1e-7]),
            np.float32([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20]),
            np.random.default_rng(0).standard_normal(50).astype(np.float32),
        ]
    )
    width = len(values)
    tensors = (
        values.reshape(1, width, 1),
        np.zeros((1, width), np.float32),
        np.eye(width, dtype=np.float32)[None],
        np.zeros((1, width), np.float32),
    )
    net = Net(1, (width,), width, "relu", False, 1, tensors)
    packed = _core.PackedPolicy(
        kind="flow",
        obs_dim=1,
        action_dim=width,
        policy=np.concatenate(
            [
                np.pad(t.ravel(), (0, -t.size % 16))
                for t in (
                    np.concatenate([np.zeros((1, width, width), np.float32), tensors[0]], axis=2),
                    *tensors[1:],
                )
            ]
        ),
        hidden=[width],
        activation=net.activation,
        time_features=np.zeros((1, 0), np.float32),
        steps=np.float32([[0, 2.0**-16, 1, 0, 0]]),
        precision=precision,
    )
    expected = round_to(precision, values) * np.float32(2.0**-16)
    for sign in (1, -1):
        got = packed.act(np.float32([sign]), np.zeros(width, np.float32))
        np.testing.assert_array_equal(got, np.maximum(sign * expected, 0))


def test_weights_out_of_range_are_refused():
    case = Case.random(13, 3, 2)
    case.policy.tensors[2][0, 5, 7] = 7e4
    with pytest.raises(ValueError, match=r"layer 1 is 70000, outside of fp16's range.*fp32"):
        case.pack(precision="fp16")
    case.pack(precision="bf16")
    case.policy.tensors[2][0, 5, 7] = 3.4e38
    with pytest.raises(ValueError, match=r"layer 1 is 3.4e\+38, outside of bf16's range.*fp32"):
        case.pack(precision="bf16")
    case.pack()


def test_isas_agree():
    case = Case.random(14, 17, 6, hidden=(256, 256, 256))
    obs, noise = case.inputs(33)
    packed = case.pack()
    before = _core.isa_active()
    results = []
    for name in _core.isa_supported():
        _core.set_isa(name)
        results.append(packed.act(obs, noise[:, 0]))
    _core.set_isa(before)
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], atol=3e-6)


@pytest.mark.parametrize("particles", [1, 3])
def test_thread_count_does_not_change_a_bit(particles):
    case = Case.random(15, 17, 6)
    obs, noise = case.inputs(257, particles)
    packed = case.pack()
    before = _core.num_threads()
    results = []
    for threads in (1, 2, 3, 7):
        _core.set_num_threads(threads)
        results.append(packed.act(obs, noise))
    _core.set_num_threads(before)
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_a_row_has_the_same_bits_in_every_batch(isa):
    case = Case.random(24, 17, 6, hidden=(64, 100))
    packed = case.pack()
    obs, noise = case.inputs(67)
    together = packed.act(obs, noise[:, 0])
    for size in (1, 2, 7, 33):
        parts = [packed.act(obs[i : i + size], noise[i : i + size, 0]) for i in range(0, 67, size)]
        np.testing.assert_array_equal(np.concatenate(parts), together)


def test_callers_in_several_threads():
    case = Case.random(16, 17, 6)
    packed = case.pack()
    before = _core.num_threads()
    _core.set_num_threads(2)
    inputs = [case.inputs(1 + 40 * (i % 2), 1 + i % 3, seed=i) for i in range(12)]
    expected = [packed.act(obs, noise) for obs, noise in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            got = list(pool.map(lambda pair: packed.act(*pair), inputs))
            for one, other in zip(got, expected, strict=True):
                np.testing.assert_array_equal(one, other)
    _core.set_num_threads(before)


def test_native_noise_is_the_documented_stream(isa):
    case = Case.random(17, 17, 6)
    packed = case.pack()
    for batch, particles in ((1, 1), (33, 1), (5, 4)):
        obs, _ = case.inputs(batch)
        noise = _core.philox_normal(21, 22, 23, batch * particles * 6)
        expected = packed.act(obs, noise.reshape(batch, particles, 6))
        got = packed.act(obs, num_particles=particles, seed=21, stream=22, offset=23)
        np.testing.assert_array_equal(got, expected)
        other = packed.act(obs, num_particles=particles, seed=22, stream=22, offset=23)
        assert (other != got).any()


def test_layouts_and_dtypes_of_observations():
    case = Case.random(18, 17, 6)
    packed = case.pack()
    obs, noise = case.inputs(9)
    expected = packed.act(obs, noise[:, 0])
    wide = np.zeros((9, 40), np.float32)
    wide[:, 3:37:2] = obs
    for view in (
        np.asfortranarray(obs),
        wide[:, 3:37:2],
        obs.astype(np.float64),
        np.asfortranarray(obs.astype(np.float64)),
        obs[::-1][::-1],
        obs.astype(">f4"),
        misaligned(obs),
        misaligned(obs.astype(np.float64)),
    ):
        np.testing.assert_array_equal(packed.act(view, noise[:, 0]), expected)
    np.testing.assert_array_equal(packed.act(np.repeat(obs, 2, 0)[::2], noise[:, 0]), expected)
    strided_noise = np.repeat(noise[:, 0], 2, axis=1)[:, ::2]
    np.testing.assert_array_equal(packed.act(obs, strided_noise), expected)
    np.testing.assert_array_equal(packed.act(obs, misaligned(noise[:, 0])), expected)


def misaligned(array):
    """A copy that begins at an odd address."""
    buffer = b"\0" + array.tobytes()
    return np.frombuffer(buffer, array.dtype, array.size, 1).reshape(array.shape)


def test_one_observation_gives_one_action():
    case = Case.random(19, 17, 6)
    packed = case.pack()
    obs, noise = case.inputs(1, 4)
    one = packed.act(obs[0], noise[0, 0])
    assert one.shape == (6,)
    np.testing.assert_array_equal(one, packed.act(obs, noise[:, 0])[0])
    np.testing.assert_array_equal(packed.act(obs[0], noise[0]), packed.act(obs, noise)[0])
    assert packed.act(np.zeros((0, 17)), np.zeros((0, 6))).shape == (0, 6)


def test_normalisation_and_action_box():
    case = Case.random(20, 17, 6)
    rng = np.random.default_rng(0)
    shift, scale = rng.standard_normal(17), rng.uniform(0.1, 3, 17)
    middle, half = rng.standard_normal(6), rng.uniform(0.1, 3, 6)
    low, high = middle - half, middle + half
    packed = case.pack(
        obs_shift=shift, obs_scale=scale, obs_clip=2.0, action_low=low, action_high=high
    )
    obs, noise = case.inputs(9)
    normalised = ((obs - shift) * scale).clip(-2, 2)
    assert (np.abs(normalised) == 2).any()
    expected = middle + half * case.actions(normalised, noise)[:, 0]
    np.testing.assert_allclose(packed.act(obs, noise[:, 0]), expected, atol=1e-4)


def test_extreme_inputs(isa):
    case = Case.random(21, 3, 2)
    packed = case.pack()
    obs, noise = case.inputs(7)
    obs[0], obs[1], obs[2] = 1e6, -1e6, 1e30
    noise[3] = 1e4
    exact = case.actions(obs[[0, 1, 3]], noise[[0, 1, 3]])[:, 0]
    got = packed.act(obs, noise[:, 0])
    np.testing.assert_allclose(got[[0, 1, 3]], exact, atol=1e-3)
    assert (np.abs(got) <= 1).all()
    assert not np.isnan(got).any()
    obs[4, 1] = np.nan
    poisoned = packed.act(obs, noise[:, 0])
    assert np.isnan(poisoned[4]).all()
    np.testing.assert_array_equal(np.delete(poisoned, 4, 0), np.delete(got, 4, 0))


def test_nan_never_wins_best_of_n():
    case = Case.random(22, 3, 2)
    obs, noise = case.inputs(1, 3)
    expected = case.pack().act(obs, noise[:, 1:])
    noise[0, 0, 0] = np.nan
    np.testing.assert_array_equal(case.pack().act(obs, noise), expected)


def test_bad_arguments_are_named():
    case = Case.random(23, 17, 6)
    packed = case.pack()
    obs, noise = case.inputs(2, 3)
    with pytest.raises(ValueError, match=r"obs has shape \(2, 16\), this policy takes \(17,\)"):
        packed.act(obs[:, 1:], noise)
    with pytest.raises(ValueError, match=r"noise does not fit.*A = 6 and B = 2"):
        packed.act(obs, noise[:1])
    for wrong in ("text", [0.0, [1.0]]):
        with pytest.raises(ValueError, match=r"could not convert|inhomogeneous"):
            packed.act(wrong)
    with pytest.raises(TypeError, match="takes integers >= 0"):
        packed.act(obs, seed=-1)
    with pytest.raises(TypeError, match="takes integers >= 0"):
        packed.act(obs, num_particles=2.0)
    with pytest.raises(ValueError, match="num_particles is 0"):
        packed.act(obs, num_particles=0)
    with pytest.raises(ValueError, match="obs has 3 axes"):
        packed.act(obs[None], noise)
    with pytest.raises(ValueError, match=r"holds \d+ floats, but its layer sizes need \d+"):
        dataclasses.replace(case, obs_dim=18).pack()
    embedded = Case.random(0, 17, 6, embedding_dim=8)
    for wrong, message in (
        ({"pair_encoder": None}, "with it, and only with it, give both encoders"),
        ({"embedding_dim": 0}, "with it, and only with it, give both encoders"),
        ({"embedding_dim": 9}, r"the policy holds \d+ floats, but its layer sizes need \d+"),
        ({"embedding_min_scale": 0.0}, "embedding_min_scale is 0; it must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            embedded.pack(**wrong)
    with pytest.raises(ValueError, match="activation='gelu' is unknown; choose one of relu"):
        _core.PackedPolicy(
            kind="gaussian",
            obs_dim=1,
            action_dim=1,
            policy=np.zeros(64, np.float32),
            hidden=[2],
            activation="gelu",
        )
    for tensor, layer in ((-1, 2), (0, 0)):  # the output's bias, the first weight
        case.policy.tensors[tensor].flat[0] = np.nan
        with pytest.raises(ValueError, match=f"parameters hold nan in layer {layer}"):
            case.pack()


def test_a_nan_of_any_critic_shows(isa):
    case = Case.random(23, 17, 6)
    obs, noise = case.inputs(3)
    case.critics.tensors[-2][1] = np.where(np.arange(48) % 2, 3e38, -3e38)  # inf - inf
    assert np.isnan(case.pack().q_min(obs, noise[:, 0])).all()


def test_best_of_n_needs_critics():
    net = Net.random(np.random.default_rng(0), 3, (8,), 2)
    packed = _core.PackedPolicy(
        kind="gaussian", obs_dim=3, action_dim=1, policy=net.flat, hidden=[8], activation="relu"
    )
    assert not packed.has_critics
    with pytest.raises(ValueError, match="packed without critics"):
        packed.act(np.zeros(3, np.float32), num_particles=2)
    with pytest.raises(ValueError, match="has no Q"):
        packed.q_min(np.zeros((1, 3), np.float32), np.zeros((1, 1), np.float32))
