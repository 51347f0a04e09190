"""Pictures: the numbers behind them, and that they can be drawn from a run directory."""

import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from flame_ext.build import deployed_networks, make_actor, make_critics
from flame_ext.config import make_config
from flame_ext.errors import RunDirectoryError
from flame_ext.evaluate import Evaluation
from flame_ext.loggers import EvaluationLog
from flame_ext.multigoal import ENV_ID
from flame_ext.plots import (
    aggregate_curves,
    plot_learning_curves,
    plot_multigoal,
    rollout_goals,
)
from flame_ext.policy import POLICY_FILE, PolicySpec, save_policy

matplotlib_image = pytest.importorskip("matplotlib.image")


def write_run(run_dir, algorithm, rows, seconds_per_step=1.0):
    """A run directory with evaluations: rows of (step, returns of the episodes)."""
    run_dir.mkdir(parents=True)
    (run_dir / "config.json").write_text(json.dumps({"algorithm": algorithm}))
    log = EvaluationLog(run_dir)
    for step, returns in rows:
        log.write(Evaluation(step, seconds_per_step * step, tuple(returns), (1,) * len(returns)))
    return run_dir


def write_policy(run_dir, algorithm, env_id=ENV_ID):
    """An untrained policy for a task of two observations and two actions."""
    options = {"hidden_sizes": (16,), "embedding_dim": 0, "sampling_steps": 1}
    config = make_config(algorithm, overrides=options)
    spec = PolicySpec(algorithm, config.to_dict(), 2, 2, (-1.0, -1.0), (1.0, 1.0), env_id)
    networks = deployed_networks(make_actor(config, 2, 2), make_critics(config, 2, 2, None))
    tensors = {f"{name}.flat": net.flat.detach().numpy() for name, net in networks.items()}
    save_policy(run_dir / POLICY_FILE, spec, tensors)
    (run_dir / "config.json").write_text(json.dumps({"algorithm": algorithm}))
    return run_dir


def has_content(path):
    """Whether a picture has more than one colour in it."""
    return np.ptp(matplotlib_image.imread(path)[..., :3]) > 0.5


def test_a_run_counts_once(tmp_path):
    run = write_run(tmp_path / "a", "flame", [(10, [1.0])])
    with pytest.raises(ValueError, match="given twice"):
        aggregate_curves([run, tmp_path / "." / "a"])


def test_seeds_are_averaged_per_algorithm(tmp_path):
    runs = [
        write_run(tmp_path / "a", "flame", [(10, [1.0, 3.0]), (20, [10.0])]),
        write_run(tmp_path / "b", "sac", [(10, [0.0, 4.0])]),
        write_run(tmp_path / "c", "flame", [(10, [4.0]), (20, [20.0])]),
    ]
    flame, sac = aggregate_curves(runs)
    assert (flame.algorithm, flame.runs, sac.algorithm, sac.runs) == ("flame", 2, "sac", 1)
    assert flame.x.tolist() == [10, 20]
    assert flame.mean.tolist() == [3.0, 15.0]
    assert flame.spread.tolist() == [1.0, 5.0]
    # One run alone: the spread is that of its episodes.
    assert sac.spread.tolist() == [2.0]


def test_variants_are_averaged_apart_and_tasks_not_at_all(tmp_path):
    runs = [write_run(tmp_path / name, "flame", [(10, [1.0])]) for name in "abc"]
    for run, gamma in zip(runs, (0.9, 0.9, 0.8), strict=True):
        config = {"algorithm": "flame", "gamma": gamma, "total_steps": int(100 * gamma)}
        (run / "config.json").write_text(json.dumps(config))
    curves = aggregate_curves(runs)
    assert [(c.options, c.runs) for c in curves] == [("gamma=0.9", 2), ("gamma=0.8", 1)]
    other = write_policy(write_run(tmp_path / "d", "flame", [(10, [7.0])]), "flame", "Hopper-v5")
    with pytest.raises(ValueError, match="several tasks"):
        aggregate_curves([write_policy(runs[0], "flame"), other])


def test_runs_are_compared_where_all_have_been(tmp_path):
    runs = [
        write_run(tmp_path / "a", "flame", [(0, [0.0]), (20, [20.0]), (40, [40.0])]),
        write_run(tmp_path / "b", "flame", [(10, [0.0]), (30, [0.0])]),
    ]
    (curve,) = aggregate_curves(runs)
    assert curve.x.tolist() == [10, 20, 30]
    assert curve.mean.tolist() == [5.0, 10.0, 15.0]


def test_time_is_an_axis_too(tmp_path):
    slow = write_run(tmp_path / "a", "flame", [(10, [0.0]), (20, [10.0])], seconds_per_step=3.0)
    fast = write_run(tmp_path / "b", "flame", [(10, [2.0]), (20, [20.0])], seconds_per_step=2.0)
    (curve,) = aggregate_curves([slow, fast], "wall_time")
    assert curve.x.tolist() == [25, 50]
    assert curve.mean.tolist() == [1, 15]
    assert has_content(plot_learning_curves([slow], tmp_path / "time.png", "wall_time"))


def test_runs_without_common_steps_are_refused(tmp_path):
    runs = [
        write_run(tmp_path / "a", "flame", [(0, [0.0])]),
        write_run(tmp_path / "b", "flame", [(10, [0.0])]),
    ]
    with pytest.raises(ValueError, match="no evaluated steps in common"):
        aggregate_curves(runs)


def test_learning_curves_are_drawn(tmp_path):
    runs = [
        write_run(tmp_path / name, name, [(0, [0.0, 1.0]), (1000, [5.0, 9.0])])
        for name in ("flame", "sac")
    ]
    output = plot_learning_curves(runs, tmp_path / "new" / "curve.png")
    assert output == tmp_path / "new" / "curve.png"
    assert has_content(output)


def test_runs_that_differ_in_many_options_are_told_apart(tmp_path):
    runs = [write_run(tmp_path / name, "flame", [(10, [1.0]), (20, [2.0])]) for name in "ab"]
    for run, value in zip(runs, (1, 2), strict=True):
        config = {"algorithm": "flame"} | {f"option_{i}": value for i in range(30)}
        (run / "config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as where nothing is left for the axes
        picture = plot_learning_curves(runs, tmp_path / "a.png")
    few = plot_learning_curves(runs[:1], tmp_path / "b.png")
    heights = [matplotlib_image.imread(file).shape[0] for file in (picture, few)]
    assert heights[0] > heights[1]


def test_what_cannot_be_drawn_is_named(tmp_path):
    with pytest.raises(RunDirectoryError, match="is not a run directory"):
        plot_learning_curves([tmp_path], tmp_path / "a.png")
    with pytest.raises(ValueError, match="at least one"):
        plot_learning_curves([], tmp_path / "a.png")
    run = write_run(tmp_path / "r", "flame", [(0, [0.0])])
    with pytest.raises(ValueError, match=r"'.*a\.xyz' has no known picture format"):
        plot_learning_curves([run], tmp_path / "a.xyz")
    (tmp_path / "r" / "evaluations.csv").unlink()
    with pytest.raises(FileNotFoundError, match="before the first evaluation"):
        plot_learning_curves([run], tmp_path / "a.png")


def scripted(directions):
    """A policy whose k-th episode walks along directions[k], told apart by its call order."""
    state = SimpleNamespace(rows=None)

    def act(obs):
        if state.rows is None:
            state.rows = np.array(directions, dtype=np.float32)
        # Episodes that have ended are left out of the batch: match by the nearest direction.
        angle = obs @ state.rows.T
        started = np.abs(obs).max(axis=1) > 0.5
        return np.where(started[:, None], state.rows[angle.argmax(axis=1)], state.rows[: len(obs)])

    return SimpleNamespace(act=act)


def test_evaluations_that_are_none_are_named(tmp_path):
    run = write_run(tmp_path / "r", "flame", [(10, [1.0])])
    file = run / "evaluations.csv"
    header = file.read_text().splitlines()[0]
    for text in ("", header + "\n"):
        file.write_text(text)
        with pytest.raises(ValueError, match="has no evaluation yet"):
            aggregate_curves([run])
    file.write_text("step,loss\n1,2\n")
    with pytest.raises(ValueError, match=r"columns \['step', 'loss'\]"):
        aggregate_curves([run])


def test_rollouts_count_every_goal():
    directions = [(1, 0), (0, 1), (0, 1), (-1, 0), (0, -1), (1, 0), (1, 0), (0, 1)]
    rollouts = rollout_goals(scripted(0.9 * np.array(directions)), len(directions))
    assert rollouts.goals.tolist() == [0, 1, 1, 2, 3, 0, 0, 1]
    assert rollouts.fractions.tolist() == [3 / 8, 3 / 8, 1 / 8, 1 / 8]
    assert {len(path) for path in rollouts.paths} == {6}
    assert np.allclose(rollouts.paths[3][-1], (-4.5, 0), atol=0.1)


def test_rollouts_that_reach_nothing_are_counted_too():
    still = SimpleNamespace(act=np.zeros_like)
    rollouts = rollout_goals(still, 3)
    assert rollouts.goals.tolist() == [-1, -1, -1]
    assert rollouts.fractions.tolist() == [0, 0, 0, 0]
    assert len(rollouts.paths[0]) == 31
    with pytest.raises(ValueError, match="episodes=0"):
        rollout_goals(still, 0)


def test_the_multigoal_picture_is_drawn_for_several_runs(tmp_path):
    runs = [write_policy(tmp_path / name, name) for name in ("flame", "sac")]
    output = plot_multigoal(runs, tmp_path / "goals.png", episodes=4)
    assert has_content(output)


def test_the_multigoal_picture_refuses_other_tasks(tmp_path):
    run = write_policy(tmp_path / "r", "flame", env_id="Pendulum-v1")
    with pytest.raises(ValueError, match="a run of Pendulum-v1"):
        plot_multigoal([run], tmp_path / "goals.png")
    with pytest.raises(ValueError, match="at least one"):
        plot_multigoal([], tmp_path / "goals.png")
