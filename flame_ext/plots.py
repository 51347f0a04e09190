"""Pictures of runs: learning curves over seeds, and what a policy does in the multi-goal task."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from numpy.typing import NDArray

from flame_ext.errors import RunDirectoryError
from flame_ext.loggers import read_evaluations
from flame_ext.multigoal import ENV_ID, MAX_EPISODE_STEPS, MultiGoalEnv
from flame_ext.policy import Policy, load

Array = NDArray[np.float64]

# What a learning curve is drawn against: a column of evaluations.csv.
CurveAxis = Literal["step", "wall_time"]

# Okabe-Ito colours: told apart with every common form of colour blindness.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
_ALGORITHM_COLOURS = {
    "flame": "#D55E00",
    "flame-r": "#E69F00",
    "sac": "#0072B2",
    "diffusion": "#009E73",
}
_ALGORITHM_NAMES = {"flame": "FLAME", "flame-r": "FLAME-R", "sac": "SAC", "diffusion": "Diffusion"}
_GREY = "#8A8A8A"
_DPI = 150


@dataclass(frozen=True)
class Curve:
    """Evaluation returns of one algorithm, or variant of it, over its runs.

    Attributes:
        algorithm: Its name.
        options: In what it differs from the algorithm's other runs, ``key=value``.
        x: Environment steps, or the mean over runs of the seconds that they took (T,).
        mean: Mean over runs of the mean return (T,).
        spread: Standard deviation (T,): over runs, or over episodes if there is one run only.
        runs: Number of runs.
    """

    algorithm: str
    options: str
    x: Array
    mean: Array
    spread: Array
    runs: int


@dataclass(frozen=True)
class GoalRollouts:
    """Episodes in the multi-goal task.

    Attributes:
        paths: Positions of each episode, (steps + 1, 2) each.
        goals: Index of the goal that each episode reached (episodes,), -1 for none.
        num_goals: Number of goals.
    """

    paths: tuple[Array, ...]
    goals: NDArray[np.int64]
    num_goals: int

    @property
    def fractions(self) -> Array:
        """Fraction of the episodes that reached each goal (num_goals,)."""
        counts = np.bincount(self.goals[self.goals >= 0], minlength=self.num_goals)
        return np.asarray(counts / len(self.goals), dtype=np.float64)


class ActingPolicy(Protocol):
    """What `rollout_goals` needs of a policy."""

    def act(
        self, obs: NDArray[Any], num_particles: int = 1, deterministic: bool = False
    ) -> NDArray[np.float32]:
        """Actions (B, A) for observations (B, O), in environment units."""


def run_facts(run_dir: str | Path) -> tuple[str, str | None]:
    """Algorithm and environment id (or None) of a run directory.

    Raises:
        RunDirectoryError: If it is not one.
    """
    run_dir = Path(run_dir)
    try:
        algorithm = json.loads((run_dir / "config.json").read_text())["algorithm"]
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise RunDirectoryError(
            f"{run_dir} is not a run directory of flame_ext ({error}); give the directory that "
            "`flame-ext train` printed."
        ) from error
    try:
        return algorithm, load(run_dir).env_id
    except RunDirectoryError:  # No policy yet; its evaluations can still be drawn.
        return algorithm, None


def aggregate_curves(run_dirs: Sequence[str | Path], axis: CurveAxis = "step") -> list[Curve]:
    """Average the evaluations of all runs of each algorithm, in the order of their appearance.

    Runs of an algorithm whose options differ are averaged apart. Runs are compared where all that
    are averaged have been evaluated; between their own evaluations they are interpolated linearly.

    Raises:
        ValueError: If no run is given or one twice, the runs are of several tasks, or those of one
            algorithm have no steps in common.
        FileNotFoundError: If a run has no evaluations.
        RunDirectoryError: If a directory is not a run's.
    """
    if not run_dirs:
        raise ValueError("no run directory was given; give at least one.")
    if len({Path(run_dir).resolve() for run_dir in run_dirs}) < len(run_dirs):
        raise ValueError("a run directory was given twice; it would count as two seeds.")
    facts = [run_facts(run_dir) for run_dir in run_dirs]
    tasks = sorted({task for _, task in facts if task})
    if len(tasks) > 1:
        raise ValueError(f"the runs are of several tasks, {', '.join(tasks)}: plot one at a time.")
    groups: dict[tuple[str, str], list[dict[str, list[Any]]]] = {}
    variants = _variants([Path(run_dir) for run_dir in run_dirs], [name for name, _ in facts])
    for run_dir, (algorithm, _), options in zip(run_dirs, facts, variants, strict=True):
        table = read_evaluations(run_dir)
        if not table["step"]:
            raise ValueError(f"{run_dir} has no evaluation yet.")
        groups.setdefault((algorithm, options), []).append(table)
    return [_average(*variant, tables, axis) for variant, tables in groups.items()]


def _variants(run_dirs: list[Path], algorithms: list[str]) -> list[str]:
    """Of each run, the options in which runs of its algorithm differ; those that all of them have.

    (An option that only newer versions write says nothing about older runs.)
    """
    configs = [json.loads((run_dir / "config.json").read_text()) for run_dir in run_dirs]
    names = []
    for config, algorithm in zip(configs, algorithms, strict=True):
        same = [c for c, a in zip(configs, algorithms, strict=True) if a == algorithm]
        shared = set.intersection(*(set(c) for c in same)) - {"total_steps"}
        keys = sorted(key for key in shared if any(c[key] != config[key] for c in same))
        names.append(", ".join(f"{key}={config[key]}" for key in keys))
    return names


def _average(
    algorithm: str, options: str, tables: list[dict[str, list[Any]]], axis: CurveAxis
) -> Curve:
    first = max(table["step"][0] for table in tables)
    last = min(table["step"][-1] for table in tables)
    steps = np.unique([step for table in tables for step in table["step"]])
    steps = steps[(steps >= first) & (steps <= last)]
    if not len(steps):
        raise ValueError(
            f"the runs of {algorithm} have no evaluated steps in common; plot them one by one."
        )

    def at_steps(column: str) -> Array:
        return np.stack([np.interp(steps, t["step"], t[column]) for t in tables])

    returns = at_steps("mean_return")
    spread = returns.std(axis=0) if len(tables) > 1 else np.array(tables[0]["std_return"])
    x = at_steps(axis).mean(axis=0)
    return Curve(algorithm, options, x, returns.mean(axis=0), spread, len(tables))


def plot_learning_curves(
    run_dirs: Sequence[str | Path],
    output: str | Path,
    axis: CurveAxis = "step",
    *,
    title: str | None = None,
) -> Path:
    """Draw evaluation returns, one curve per algorithm and variant.

    The band is one standard deviation: over runs, or over the episodes of a single run.

    Args:
        run_dirs: Run directories; those of the same algorithm and options are averaged.
        output: The picture; its ending decides the format (png, pdf, svg).
        axis: Against environment steps or against the time that training took.
        title: None takes the tasks that the runs' policies name.

    Returns:
        The path of the picture.

    Raises:
        ValueError: If there is nothing to draw together.
        FileNotFoundError: If a run has no evaluations.
        RunDirectoryError: If a directory is not a run's.
    """
    curves = aggregate_curves(run_dirs, axis)
    if title is None:
        tasks = {task for task in (run_facts(run_dir)[1] for run_dir in run_dirs) if task}
        title = ", ".join(sorted(tasks)) or "learning curve"
    scale, label = (1.0, "environment steps") if axis == "step" else (1 / 60, "minutes of training")
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    labels: list[str] = []
    for index, curve in enumerate(curves):
        colour = _COLOURS[index % len(_COLOURS)]
        if not curve.options:
            colour = _ALGORITHM_COLOURS.get(curve.algorithm, colour)
        name = _ALGORITHM_NAMES.get(curve.algorithm, curve.algorithm)
        name += f" ({curve.options})" if curve.options else ""
        runs = f"{name}, {curve.runs} seeds" if curve.runs > 1 else f"{name}, 1 seed"
        labels.append(textwrap.fill(runs, 90))
        marker = "o" if len(curve.x) < 30 else None
        x = scale * curve.x
        axes.plot(x, curve.mean, color=colour, lw=2, marker=marker, ms=4, label=labels[-1])
        low, high = curve.mean - curve.spread, curve.mean + curve.spread
        axes.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
    axes.set_xlabel(label)
    axes.set_ylabel("evaluation return")
    axes.set_title(title)
    axes.xaxis.set_major_formatter(_short_number)
    if max(map(len, labels)) < 50:
        axes.legend(frameon=False, loc="best")
    else:  # Runs that differ in many options: below the picture, which grows by it.
        lines = sum(label.count("\n") + 1 for label in labels)
        figure.set_figheight(figure.get_figheight() + 0.16 * lines)
        figure.legend(frameon=False, loc="outside lower left", fontsize=8)
    _tidy(axes)
    return _save(figure, output)


def plot_multigoal(
    run_dirs: Sequence[str | Path], output: str | Path, episodes: int = 100, *, seed: int = 0
) -> Path:
    """Draw what policies do in the multi-goal task, one column per run.

    Above: the paths of sampled episodes, coloured by the goal they reached. Below: Qmin over all
    actions at the origin, with sampled actions.

    Args:
        run_dirs: Runs of ``flame_ext/MultiGoal-v0``, for example one of ``flame`` and of ``sac``.
        output: The picture; its ending decides the format.
        episodes: Episodes per run.
        seed: Decides the start positions and the sampled actions.

    Returns:
        The path of the picture.

    Raises:
        ValueError: If no run is given, or a run is of another environment.
        RunDirectoryError: If a directory holds no policy.
    """
    if not run_dirs:
        raise ValueError("no run directory was given; give at least one.")
    policies = [_load_multigoal(run_dir, seed) for run_dir in run_dirs]
    figure = Figure(figsize=(4.6 * len(policies), 8.4), layout="compressed")
    grid = figure.subplots(2, len(policies), squeeze=False)
    for column, policy in enumerate(policies):
        rollouts = rollout_goals(policy, episodes, seed=seed)
        name = _ALGORITHM_NAMES.get(policy.algorithm, policy.algorithm)
        _draw_paths(grid[0, column], rollouts, name)
        _draw_q(figure, grid[1, column], policy)
    return _save(figure, output)


def rollout_goals(
    policy: ActingPolicy, episodes: int, *, num_goals: int = 4, seed: int = 0
) -> GoalRollouts:
    """Run sampled episodes of the multi-goal task side by side.

    Args:
        policy: Acts on a batch of positions.
        episodes: How many; at least 1.
        num_goals: Goals of the task.
        seed: Decides the start positions.

    Raises:
        ValueError: If ``episodes`` is less than 1.
    """
    if episodes < 1:
        raise ValueError(f"episodes={episodes} was given; it must be at least 1.")
    envs = [MultiGoalEnv(num_goals=num_goals) for _ in range(episodes)]
    seeds = np.random.SeedSequence(seed).generate_state(episodes)
    obs = np.stack([env.reset(seed=int(s))[0] for env, s in zip(envs, seeds, strict=True)])
    goals = np.full(episodes, -1, dtype=np.int64)
    for _ in range(MAX_EPISODE_STEPS):
        running = np.flatnonzero(goals < 0)
        if not len(running):
            break
        actions = policy.act(obs[running])
        for index, action in zip(running, actions, strict=True):
            obs[index], _, _, _, info = envs[index].step(action)
            goals[index] = info["goal"]
    return GoalRollouts(tuple(env.trail for env in envs), goals, num_goals)


def _load_multigoal(run_dir: str | Path, seed: int) -> Policy:
    policy = load(run_dir, seed=seed)
    if policy.env_id != ENV_ID:
        raise ValueError(
            f"{run_dir} is a run of {policy.env_id}; this picture is of {ENV_ID} only. Use "
            "plot_learning_curves (flame-ext plot --kind curves) for other environments."
        )
    return policy


def _draw_paths(axes: Axes, rollouts: GoalRollouts, name: str) -> None:
    env = MultiGoalEnv(num_goals=rollouts.num_goals)
    for path, goal in zip(rollouts.paths, rollouts.goals, strict=True):
        colour = _COLOURS[goal % len(_COLOURS)] if goal >= 0 else _GREY
        axes.plot(path[:, 0], path[:, 1], color=colour, lw=1.0, alpha=0.45)
    for index, (goal, fraction) in enumerate(zip(env.goals, rollouts.fractions, strict=True)):
        colour = _COLOURS[index % len(_COLOURS)]
        axes.add_patch(Circle(tuple(goal), env.goal_radius, fill=False, ec=colour, lw=2.5))
        # Outwards above and below the centre; above the goal at the sides, where paths come in.
        sideways = abs(goal[0]) > abs(goal[1])
        at = goal + (np.array([0.0, 1.5]) if sideways else 1.5 * goal / np.linalg.norm(goal))
        axes.text(at[0], at[1], f"{fraction:.0%}", ha="center", va="center", fontweight="bold")
    axes.plot(0, 0, marker="+", ms=12, mew=2, color="black")
    shares = " / ".join(f"{100 * fraction:.0f}" for fraction in rollouts.fractions)
    missed = 1.0 - rollouts.fractions.sum()
    axes.set_title(
        f"{name}: {len(rollouts.goals)} episodes\nreached {shares} %, none {100 * missed:.0f} %"
    )
    axes.set(xlim=(-7, 7), ylim=(-7, 7), xlabel="position 1", ylabel="position 2", aspect="equal")
    axes.set(xticks=[-5, 0, 5], yticks=[-5, 0, 5])
    _tidy(axes)


def _draw_q(figure: Figure, axes: Axes, policy: Policy) -> None:
    axis = np.linspace(-1.0, 1.0, 101)
    first, second = np.meshgrid(axis, axis)
    actions = np.stack([first.ravel(), second.ravel()], axis=1)
    q = policy.q_value(np.zeros_like(actions), actions).reshape(first.shape)
    contours = axes.contourf(first, second, q, levels=24, cmap="cividis")
    axes.contour(first, second, q, levels=12, colors="white", linewidths=0.4, alpha=0.5)
    sampled = policy.act(np.zeros((300, 2)))
    # Many samples lie on the box's edge; they must not be cut in half there.
    style: dict[str, Any] = {"color": "#D55E00", "edgecolor": "white", "lw": 0.5}
    axes.scatter(sampled[:, 0], sampled[:, 1], s=16, clip_on=False, zorder=3, **style)
    figure.colorbar(contours, ax=axes, shrink=0.8, format="%.3g")
    axes.set(xticks=[-1, 0, 1], yticks=[-1, 0, 1])
    axes.set(xlim=(-1, 1), ylim=(-1, 1), xlabel="action 1", ylabel="action 2", aspect="equal")
    axes.set_title("Q at the origin, 300 sampled actions", fontsize=11)


def _short_number(value: float, _: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _tidy(axes: Axes) -> None:
    axes.grid(True, color="#DDDDDD", lw=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _save(figure: Figure, output: str | Path) -> Path:
    output = Path(output)
    allowed = figure.canvas.get_supported_filetypes()
    if output.suffix[1:].lower() not in allowed:
        raise ValueError(
            f"output={str(output)!r} has no known picture format; end it in .png, .pdf or .svg."
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=_DPI)
    return output
