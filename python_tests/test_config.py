"""Options: presets, algorithms, overrides and what is refused."""

import pytest

from flame_ext.config import ALGORITHMS, PRESETS, Config, make_config


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_combination_is_valid(algorithm: str, preset: str) -> None:
    config = make_config(algorithm, preset)
    assert config.algorithm == algorithm
    assert make_config(algorithm, overrides=config.to_dict()) == config


def test_paper_preset_has_the_published_settings() -> None:
    config = make_config("flame", "paper")
    assert (config.num_envs, config.updates_per_step, config.batch_size) == (5, 0.2, 256)
    assert (config.hidden_sizes, config.policy_activation) == ((256, 256, 256), "mish")
    assert (config.num_candidates, config.eval_particles) == (100, 32)
    assert config.target_entropy_scale == -3
    assert config.reverse_kl_weight == 0


def test_paper_preset_is_one_for_all_flow_policies() -> None:
    config = make_config("flame-r", "paper")
    assert (config.num_candidates, config.eval_particles) == (100, 32)
    assert config.temperature == "entropy"
    assert (config.flow, config.sampling_steps) == ("instantaneous", 20)


def test_algorithms_are_themselves() -> None:
    sac = make_config("sac")
    assert (sac.entropy_in_target, sac.target_entropy_scale) == (True, -1)
    assert make_config("flame-r").instantaneous_fraction == 1


def test_overrides_win_over_the_preset() -> None:
    config = make_config("flame-r", "paper", {"num_candidates": 7, "hidden_sizes": [8, 8]})
    assert (config.num_candidates, config.hidden_sizes) == (7, (8, 8))
    assert make_config("sac", overrides={"total_steps": 1e5}).total_steps == 100_000


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("flam", "default", {}), "did you mean 'flame'"),
        (("flame", "papper", {}), "did you mean 'paper'"),
        (("flame", "default", {"batchsize": 3}), "did you mean 'batch_size'"),
        (
            ("flame", "default", {"learning_rate": 1e-4}),
            "did you mean .*'critic_learning_rate' or 'policy_learning_rate'",
        ),
        (("flame", "default", {"critic_activation": "gelu"}), "Choose one of: relu, silu, mish"),
        (("flame", "default", {"gamma": 1.5}), r"gamma=1.5 is out of range; allowed: \[0, 1\]"),
        (("flame", "default", {"sampling_steps": 4}), "reverse_kl_weight > 0 needs the one-step"),
        (("flame", "default", {"hidden_sizes": ()}), "at least one width"),
        (("flame", "default", {"buffer_size": 4}), "does not hold one step of num_envs=5"),
        (
            ("sac", "default", Config(algorithm="flame")),
            "choose the algorithm by algorithm='flame'",
        ),
        (("flame", "paper", Config()), "given with a complete Config"),
        (("diffusion", "default", {"temperature": "entropy"}), "diffusion policy has no density"),
        (("diffusion", "default", {"entropy_in_target": True}), "diffusion policy has no density"),
        (("sac", "default", {"temperature": "ess"}), "temperature='ess' needs candidates"),
        (("flame-r", "default", {"reweighting_weight": 0}), "the policy learns nothing"),
        (("flame-r", "default", {"proposal": "policy"}), "proposal='policy' needs the one-step"),
        (("flame", "default", {"algorithm": "sac"}), r"by algorithm='sac' \(--algorithm sac\)"),
        (
            ("sac", "default", {"entropy_estimator": "one_step_trace", "entropy_trace": "log_det"}),
            "has no entropy_trace='log_det'",
        ),
        (
            ("flame", "default", {"entropy_estimator": "multi_step", "entropy_steps": 4}),
            "entropy_steps > 1 would train another map",
        ),
        (
            ("flame", "default", {"temperature": "ess", "proposal": "policy"}),
            "temperature='ess' would run away",
        ),
        (("flame", "default", {"updates_per_step": float("inf")}), r"=inf is .* \[0, inf\)"),
        (("sac", "default", {"target_entropy_scale": -float("inf")}), r"=-inf is .* \(-inf, inf\)"),
        (("flame", "default", {"policy_tau": 0}), "policy_tau=0.0 is out of range"),
        (
            ("flame", "default", {"instantaneous_fraction": 0.7, "acting_fraction": 0.4}),
            "parts of one batch",
        ),
        (("flame", "default", {"reward_scale": float("nan")}), "reward_scale=nan is out of range"),
    ],
)
def test_bad_values_are_named(arguments: tuple[str, str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make_config(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(("value", "kept"), [(None, "None"), (1e5, "100000")])
def test_an_option_may_be_none(value: object, kept: str) -> None:
    assert repr(make_config("flame", overrides={"settle_after": value}).settle_after) == kept


@pytest.mark.parametrize("value", ["3", 2.5, True])
def test_wrong_types_are_named(value: object) -> None:
    with pytest.raises(TypeError, match=r"num_candidates=.* expected int"):
        make_config("flame", overrides={"num_candidates": value})


@pytest.mark.parametrize("value", [[256.7], [True], "256"])
def test_widths_are_whole_numbers(value: object) -> None:
    with pytest.raises(TypeError, match="hidden_sizes="):
        make_config("flame", overrides={"hidden_sizes": value})


@pytest.mark.parametrize("name", ["gamma", "tau", "exploration_noise", "target_ess"])
def test_fractions_end_at_one(name: str) -> None:
    assert getattr(make_config("flame", overrides={name: 1.0}), name) == 1
    with pytest.raises(ValueError, match=f"{name}=1.01 is out of range"):
        make_config("flame", overrides={name: 1.01})


def test_an_algorithm_is_itself_in_the_paper_preset_too() -> None:
    sac = make_config("sac", "paper")
    assert (sac.target_particles, sac.eval_particles, sac.train_particles) == (1, 1, 1)
    assert (sac.policy_tau, sac.target_entropy_scale, sac.alpha_learning_rate) == (1, -1, 1e-3)
    assert make_config("flame-r", "paper").instantaneous_fraction == 1
    flame = make_config("flame", "paper")
    assert (flame.policy_delay, flame.reward_scale, flame.alpha_interval) == (2, 0.2, 100)
    assert (flame.policy_learning_rate, flame.final_policy_learning_rate) == (3e-4, 3e-5)
