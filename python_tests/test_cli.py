"""The command line, end to end on small runs."""

import csv
import importlib
import os
import re
import signal

import numpy as np
import pytest

from flame_ext import cli, latency, play
from flame_ext.checkpoint import read_checkpoint
from flame_ext.config import ALGORITHMS, Config, make_config
from flame_ext.config_text import describe_config, parse_overrides
from flame_ext.envs import make_vector_env
from flame_ext.plots import run_facts
from flame_ext.policy import load

SMALL = {
    "hidden_sizes": "16",
    "learning_starts": "20",
    "batch_size": "8",
    "policy_batch_size": "8",
    "log_interval": "20",
    "eval_interval": "40",
    "eval_episodes": "2",
    "num_envs": "2",
}


def flags(**options):
    return [word for key, value in options.items() for word in ("--set", f"{key}={value}")]


def train(run_dir, env="flame_ext/MultiGoal-v0", algorithm="sac", steps=80):
    words = ["train", env, "--algorithm", algorithm, "--steps", str(steps)]
    return [*words, "--run-dir", str(run_dir), *flags(**SMALL)]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "goals"
    assert cli.main(train(path)) == 0
    return path


def error_line(capsys, *words):
    """The one line that a wrong use prints; nothing else, and exit code 2."""
    assert cli.main(list(words)) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("flame-ext: error: ")
    assert "Traceback" not in captured.err + captured.out
    return captured.err


# Help -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--help"], ["train", "eval", "plot", "bench", "export", "info", "first steps"]),
        (
            ["train", "--help"],
            ["ENV", "--steps", "--set", "--resume", "randomness (default: 0)", *ALGORITHMS],
        ),
        (["eval", "--help"], ["RUN_DIR", "--episodes", "(default: 20)", "--video", "examples"]),
        (["plot", "--help"], ["RUN_DIR", "--output", "examples"]),
        (["bench", "--help"], ["--task"]),
        (["info", "--help"], ["installation"]),
    ],
)
def test_help_of_every_command(capsys, words, named):
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for word in named:
        assert word in text
    assert "None" not in text


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    version = importlib.import_module("importlib.metadata").version("flame_ext")
    assert capsys.readouterr().out == f"flame-ext {version}\n"


def test_every_option_is_listed_with_its_meaning():
    lines = describe_config(make_config("sac")).splitlines()
    assert [line.split()[0] for line in lines] == list(Config.__dataclass_fields__)
    assert all(len(line.split()) > 4 for line in lines)
    assert re.search(r"^gamma +0\.99 +Discount factor", "\n".join(lines), re.MULTILINE)


def test_show_config_applies_overrides(capsys):
    assert cli.main(["train", "--show-config", "--set", "gamma=0.5", "--num-envs", "7"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^gamma +0\.5 ", text, re.MULTILINE)
    assert re.search(r"^num_envs +7 ", text, re.MULTILINE)


# Overrides --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("3e-4", 3e-4),
        ("true", True),
        ("False", False),
        ("none", None),
        ("mish", "mish"),
        ("400,300", [400, 300]),
        ("[256]", [256]),
        ("a=b", "a=b"),
    ],
)
def test_values_of_set(text, value):
    parsed = parse_overrides([f"key={text}"])["key"]
    assert parsed == value
    assert type(parsed) is type(value)


def test_one_value_is_a_list_of_one_where_a_list_is_needed():
    assert parse_overrides(["hidden_sizes=16"]) == {"hidden_sizes": [16]}


@pytest.mark.parametrize("text", ["gamma", "=3"])
def test_malformed_set_is_named(text):
    with pytest.raises(ValueError, match="not of the form KEY=VALUE"):
        parse_overrides([text])


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "many", "nan", "inf"])
def test_steps_must_be_a_positive_whole_number(capsys, text):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "Pendulum-v1", f"--steps={text}"])
    assert caught.value.code == 2
    assert "not a positive whole number" in capsys.readouterr().err


# Training ---------------------------------------------------------------------------------------


def test_training_leaves_a_complete_run_directory(run_dir):
    names = {path.name for path in run_dir.iterdir()}
    wanted = {"config.json", "progress.csv", "evaluations.csv", "tensorboard", "checkpoint"}
    assert wanted | {"best", "learning_curve.png"} <= names
    with (run_dir / "evaluations.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["40", "80"]
    assert run_facts(run_dir) == ("sac", "flame_ext/MultiGoal-v0")


def test_training_ends_with_the_result_and_the_picture(tmp_path, capsys):
    assert cli.main(train(tmp_path / "run", steps=1e2)) == 0
    captured = capsys.readouterr()
    assert re.search(r"final evaluation +return -?\d+\.\d \+- \d+\.\d over 2 epis", captured.out)
    assert f"{tmp_path / 'run'}/learning_curve.png" in captured.out
    assert "100/100" in captured.err


def test_a_run_can_be_stopped_by_its_return(tmp_path, capsys):
    words = train(tmp_path / "run", steps=400)
    assert cli.main([*words, "--stop-on-return=-1000000", "--stop-after-seconds", "1000"]) == 0
    assert "StopOnReturn" in capsys.readouterr().out
    with (tmp_path / "run" / "evaluations.csv").open(newline="") as file:
        assert max(int(row["step"]) for row in csv.DictReader(file)) < 400


def test_a_run_can_be_resumed(tmp_path, capsys):
    path = tmp_path / "run"
    assert cli.main(train(path)) == 0
    resume = ["train", "--resume", str(path)]
    assert cli.main([*resume, "--steps", "120"]) == 0
    assert "go on with --steps" not in capsys.readouterr().err
    assert cli.main(resume) == 0
    assert "the run has its 120 steps: go on with --steps" in capsys.readouterr().err
    with (path / "evaluations.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["40", "80", "120"]


def test_an_interrupted_run_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    trainer = importlib.import_module("flame_ext.trainer")

    def interrupt(self, total_steps=None):
        if saved:
            self.save()
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Trainer, "run", interrupt)
    for saved in (False, True):
        path = tmp_path / f"saved {saved}"
        assert cli.main(train(path)) == 130
        assert (f"flame-ext train --resume '{path}'\n" in capsys.readouterr().err) == saved


def test_a_terminated_run_saves_itself(tmp_path, monkeypatch):
    callbacks = importlib.import_module("flame_ext.callbacks")
    sent = []

    def terminate(self, trainer, metrics):
        sent.append(trainer.global_step)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(callbacks.StopAfterSeconds, "on_log", terminate)
    path = tmp_path / "run"
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main([*train(path), "--stop-after-seconds", "1000"]) == 130
    assert sent == [20]
    assert signal.getsignal(signal.SIGTERM) is before
    assert cli.main(["train", "--resume", str(path), "--steps", "60"]) == 0
    with (path / "evaluations.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["40", "60"]


# Wrong use --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["train"], "no environment was given"),
        (["train", "Pendulm-v1"], "did you mean 'Pendulum-v1'"),
        (["train", "CartPole-v1"], "only continuous actions"),
        (["train", "Pendulum-v1", "--algorithm", "sacc"], "did you mean 'sac'"),
        (["train", "Pendulum-v1", "--preset", "papr"], "did you mean 'paper'"),
        (["train", "Pendulum-v1", "--backend", "gpu"], "gpu"),
        (["train", "Pendulum-v1", "--set", "gama=0.9"], "did you mean 'gamma'"),
        (["train", "Pendulum-v1", "--set", "gamma=2"], "gamma=2"),
        (["train", "Pendulum-v1", "--seed=-1"], "seed=-1"),
        (["train", "Pendulum-v1", "--set", "gamma=high"], "gamma='high'"),
        (["train", "--resume", "nowhere"], "nowhere"),
        (["train", "--resume", "nowhere", "--set", "gamma=1"], "--set cannot be used with"),
        (["train", "--resume", "nowhere", "--seed", "3"], "--seed cannot be used with"),
        (["train", "--resume", "nowhere", "--seed", "0"], "--seed cannot be used with"),
        (["train", "--resume", "nowhere", "--algorithm", "flame"], "--algorithm cannot be used"),
        (["eval", "nowhere"], "nowhere"),
        (["eval", "nowhere", "--video", "film.avi"], "use .mp4 or .gif"),
        (["plot", "nowhere"], "nowhere"),
        (["bench", "--seconds", "0"], "must be positive"),
        (["bench", "--precision", "bf16"], "--precision is for a given policy"),
    ],
)
def test_wrong_use_gets_one_clear_line(tmp_path, monkeypatch, capsys, words, named):
    monkeypatch.chdir(tmp_path)
    assert named in error_line(capsys, *words)


def test_an_existing_run_is_not_overwritten(run_dir, capsys):
    before = (run_dir / "evaluations.csv").read_bytes()
    line = error_line(capsys, *train(run_dir))
    assert "exists already" in line
    assert (run_dir / "evaluations.csv").read_bytes() == before


def test_the_traceback_is_shown_on_request(capsys):
    assert cli.main(["eval", "nowhere", "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_train_takes_its_seed(tmp_path):
    assert cli.main([*train(tmp_path / "run", steps=2), "--seed", "3"]) == 0
    assert read_checkpoint(tmp_path / "run")[1]["seed"] == 3


# After training ---------------------------------------------------------------------------------


def test_eval_reports_the_episodes(run_dir, capsys):
    words = ["eval", str(run_dir), "--episodes", "12", "--num-particles", "2"]
    assert cli.main(words) == 0
    first = capsys.readouterr().out
    assert "sac on flame_ext/MultiGoal-v0, best of 2" in first
    assert re.search(r"return +-?\d+\.\d \+- \d+\.\d over 12 episodes", first)
    assert re.search(r"goals +\d+\.\d% / \d+\.\d% / \d+\.\d% / \d+\.\d% of sampled", first)
    assert cli.main(words) == 0
    assert capsys.readouterr().out == first
    for change in (["--stochastic"], ["--precision", "bf16"]):
        assert cli.main([*words, *change]) == 0
        assert capsys.readouterr().out != first


def test_a_seed_of_eval_is_of_its_episodes(tmp_path, capsys):
    assert cli.main(train(tmp_path / "run", env="Pendulum-v1", steps=20)) == 0
    played = []
    for seed in ("0", "0", "1"):
        capsys.readouterr()
        assert cli.main(["eval", str(tmp_path / "run"), "--episodes", "2", "--seed", seed]) == 0
        played.append(capsys.readouterr().out)
    assert played[0] == played[1] != played[2]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [([], (4, True)), (["--stochastic"], (4, False)), (["--num-particles", "2"], (2, True))],
)
def test_eval_acts_as_it_is_told_or_as_the_run_did(tmp_path, monkeypatch, words, wanted):
    assert cli.main([*train(tmp_path / "run", steps=20), "--set", "eval_particles=4"]) == 0
    seen = []

    def played(policy, env_id, episodes, acting, *, seed):
        seen.append((acting.num_particles, acting.deterministic))
        return (0.0,), (1,)

    monkeypatch.setattr(play, "evaluate_policy", played)
    assert cli.main(["eval", str(tmp_path / "run"), "--episodes", "1", *words]) == 0
    assert seen == [wanted]


def test_eval_plays_the_policys_own_actions(tmp_path):
    """In the environment's units, here torques in [-2, 2]."""
    assert cli.main(train(tmp_path / "run", env="Pendulum-v1", steps=20)) == 0
    policy, env = load(tmp_path / "run"), make_vector_env("Pendulum-v1")
    obs = env.reset()
    played = play._unit_actions(policy, env, play.Acting())(obs)
    expected = policy.act(obs, deterministic=True)
    np.testing.assert_allclose(env._to_env(played), expected, rtol=1e-5)


def test_eval_in_an_environment_of_other_sizes_is_refused(run_dir, capsys):
    line = error_line(capsys, "eval", str(run_dir), "--env", "Pendulum-v1")
    assert "takes 2 observations and gives 2 actions; Pendulum-v1 has 3 and 1" in line


def test_eval_films_an_episode(run_dir, tmp_path, capsys):
    imageio = pytest.importorskip("imageio")
    film = tmp_path / "new" / "film.gif"
    words = ["eval", str(run_dir), "--episodes", "1", "--video", str(film)]
    assert cli.main(words) == 0
    assert str(film) in capsys.readouterr().out
    frames = imageio.mimread(film)
    assert 1 < len(frames) <= 30
    assert frames[0].shape[:2] == (256, 256)


def test_an_environment_that_gives_no_pictures_is_named(run_dir, tmp_path, capsys, monkeypatch):
    def broken(*_, **__):
        raise AttributeError("'NoneType' object has no attribute 'glGetError'")

    monkeypatch.setattr(play, "make_eval_env", broken)
    words = ["eval", str(run_dir), "--episodes", "1", "--video", str(tmp_path / "film.gif")]
    assert "cannot be rendered here: 'NoneType' object" in error_line(capsys, *words)


def test_a_missing_video_package_is_named_before_playing(run_dir, capsys, monkeypatch):
    real = importlib.import_module

    def without(name, *args):
        if name == "imageio_ffmpeg":
            raise ImportError("No module named 'imageio_ffmpeg'")
        return real(name, *args)

    monkeypatch.setattr(play.importlib, "import_module", without)
    line = error_line(capsys, "eval", str(run_dir), "--video", "film.mp4")
    assert "pip install imageio imageio-ffmpeg" in line


def test_plot_chooses_the_picture(run_dir, tmp_path, capsys):
    assert cli.main(["plot", str(run_dir), "--episodes", "3"]) == 0
    assert capsys.readouterr().out == f"{run_dir / 'multigoal.png'}\n"
    output = tmp_path / "curve.pdf"
    assert cli.main(["plot", str(run_dir), "--kind", "curves", "--output", str(output)]) == 0
    assert output.read_bytes().startswith(b"%PDF")


def test_bench_has_a_row_per_policy(capsys, monkeypatch):
    monkeypatch.setattr(latency, "_BATCHES", (1,))
    assert cli.main(["bench", "--seconds", "0.001"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines[1:-1]]
    assert [row[0] for row in rows] == ["flame", "flame", "flame-r", "diffusion", "sac"]
    assert all(float(row[3]) > 0 for row in rows)
    assert "17 observations, 6 actions" in lines[-1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bench_measures_one_policy(run_dir, capsys, precision):
    words = ["bench", str(run_dir), "--seconds", "0.001", "--precision", precision]
    assert cli.main(words) == 0
    head, *rows, last = capsys.readouterr().out.splitlines()
    assert head.split()[-4:] == ["median", "99.9", "%", "longest"]
    for row in rows:
        median, tail, longest = (float(cell) for cell in row.split()[2::2])
        assert 0 < median <= tail <= longest
    assert [row.split()[:2] for row in rows] == [
        [batch, n] for batch in ("1", "256") for n in ("1", "32")
    ]
    assert last == "sac: 2 observations, 2 actions; engine cpu"


def test_info_reports_the_installation(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert "native module" in text
    assert "auto backend" in text
