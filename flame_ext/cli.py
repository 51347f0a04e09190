"""The command ``flame-ext``: train, evaluate, diagnose, draw, measure, export, report.

Heavy packages are imported inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from flame_ext.errors import FlameError

if TYPE_CHECKING:
    from flame_ext.config import Config
    from flame_ext.trainer import Trainer

_USAGE_ERROR = 2
_INTERRUPTED = 130

_DESCRIPTION = "Maximum-entropy reinforcement learning with one-step flow policies (FLAME)."

_EPILOG = """\
first steps:
  flame-ext train HalfCheetah-v5 --steps 100000      train, evaluate, draw the learning curve
  flame-ext eval runs/NAME --episodes 20             play with the trained policy
  flame-ext plot runs/A runs/B --output curves.png   compare runs
  flame-ext COMMAND --help                           every option of a command
"""

_TRAIN_EPILOG = """\
examples:
  flame-ext train HalfCheetah-v5 --steps 100000 --seed 1 --run-dir runs/cheetah
  flame-ext train flame_ext/MultiGoal-v0 --algorithm sac --steps 20000
  flame-ext train Hopper-v5 --set batch_size=512 --set hidden_sizes=400,300
  flame-ext train --resume runs/cheetah --steps 200000

The run directory holds config.json, progress.csv, evaluations.csv, tensorboard/, checkpoint/,
policy.safetensors (what acts), best/ (the same at the best evaluation) and learning_curve.png.
Ctrl-C (or SIGTERM) saves a checkpoint and stops.
"""

_EVAL_EPILOG = """\
examples:
  flame-ext eval runs/cheetah --episodes 20
  flame-ext eval runs/cheetah/best --num-particles 32
  flame-ext eval runs/cheetah --video cheetah.gif
"""

_PLOT_EPILOG = """\
examples:
  flame-ext plot runs/cheetah                                 its learning curve
  flame-ext plot runs/flame-* runs/sac-* --output curves.png  mean and band over seeds
  flame-ext plot runs/goals-flame runs/goals-sac              paths and Q in the multi-goal task
"""

_EXPORT_EPILOG = """\
The model takes obs (batch, O), raw, and noise (batch, A), zeros for the deterministic action, and
gives action (batch, A) in the environment's units. Needs the package onnx.
"""

_BENCH_EPILOG = """\
examples:
  flame-ext bench policy.safetensors   median and tail of this policy on this machine, without torch
  flame-ext bench --task humanoid      untrained policies of that task's sizes side by side
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0 done, 2 wrong use, 130 interrupted)."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = _build_parser(arguments).parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        print("flame-ext: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except (FlameError, ValueError, TypeError, ImportError, OSError) as error:
        if options.traceback:
            traceback.print_exc()
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"flame-ext: error: {message}", file=sys.stderr)
        return _USAGE_ERROR
    return 0


def run() -> NoReturn:
    """Entry point of ``python -m flame_ext.cli``."""
    sys.exit(main())


# Arguments --------------------------------------------------------------------------------------


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Shows each option's default where there is one; examples stay as they are written."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        # By identity: the default 0 of a seed equals False.
        unsaid = any(action.default is value for value in (None, False, argparse.SUPPRESS))
        unsaid = unsaid or action.default == [] or "(default" in text
        return text if unsaid else f"{text} (default: %(default)s)"


def _build_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Parser of all commands; only the one in use is filled in, as that may import torch."""
    parser = argparse.ArgumentParser(
        prog="flame-ext", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=_Formatter
    )
    if "--version" in arguments:
        version = f"flame-ext {importlib.metadata.version('flame_ext')}"
        parser.add_argument("--version", action="version", version=version)
    else:
        parser.add_argument("--version", action="store_true", help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    for name, (summary, epilog, fill, command) in _COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=epilog,
            formatter_class=_Formatter,
        )
        sub.set_defaults(run=command)
        if name == chosen:
            fill(sub)
        sub.add_argument(
            "--traceback", action="store_true", help="on an error, show where it happened"
        )
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    from flame_ext.config import ALGORITHMS, PRESETS

    add = parser.add_argument
    add("env", nargs="?", metavar="ENV", help="Gymnasium id, for example HalfCheetah-v5")
    add("--steps", type=_count, metavar="N", help="environment steps (default: the preset's)")
    add("--algorithm", metavar="A", help=f"one of {', '.join(ALGORITHMS)} (default: flame)")
    add("--preset", metavar="P", help=f"one of {', '.join(PRESETS)}")
    add("--seed", type=int, metavar="S", help="decides all randomness (default: 0)")
    add("--run-dir", type=Path, metavar="D", help="new directory (default: one below runs/)")
    add("--backend", metavar="B", help="one of auto (default), torch, cpu, cuda")
    add("--device", metavar="DEV", help="one of auto (default), cpu, cuda, cuda:N")
    add("--num-envs", type=_count, metavar="N", help="environments (default: the preset's)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="change one option, may be repeated; --show-config lists them",
    )
    add("--stop-on-return", type=float, metavar="R", help="stop once an evaluation reaches R")
    add("--stop-after-seconds", type=float, metavar="T", help="stop after T seconds")
    add("--resume", type=Path, metavar="RUN_DIR", help="go on from a run's checkpoint")
    add("--show-config", action="store_true", help="list every option and exit")


def _add_eval(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run_dir", type=Path, metavar="RUN_DIR", help="a run directory, or its best/ folder")
    add("--episodes", type=_count, default=20, metavar="N", help="episodes to play")
    add("--num-particles", type=_count, metavar="N", help="best of N by Q (default: the run's)")
    add("--stochastic", action="store_true", help="sample actions instead of repeatable ones")
    add("--seed", type=int, default=0, metavar="S", help="decides the episodes")
    add("--env", metavar="ENV", help="Gymnasium id (default: the run's)")
    _add_precision(parser)
    add("--video", type=Path, metavar="FILE", help="also film one episode, .gif or .mp4")


def _add_precision(parser: argparse.ArgumentParser) -> None:
    from flame_ext.policy import PRECISIONS

    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="how the policy's weights are stored for acting",
    )


def _add_diagnose(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run_dir", type=Path, metavar="RUN_DIR", help="a run directory with a checkpoint")
    add("--env", metavar="ID", help="of a run that was not started from an environment id")
    add("--states", type=_count, default=500, metavar="N", help="states of the replay buffer")
    add("--seed", type=int, default=0, metavar="S", help="decides states, samples and episodes")


def _add_plot(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run_dirs", type=Path, nargs="+", metavar="RUN_DIR", help="run directories")
    add(
        "--output",
        type=Path,
        metavar="FILE",
        help=".png, .pdf or .svg (default: in the run's directory; of several, here)",
    )
    add(
        "--kind",
        choices=("auto", "curves", "multigoal"),
        default="auto",
        help="auto draws the multi-goal picture if all runs are of that task",
    )
    add(
        "--axis",
        choices=("step", "wall_time"),
        default="step",
        help="what curves are drawn against: environment steps or the time that training took",
    )
    add("--episodes", type=_count, default=100, metavar="N", help="episodes per multi-goal run")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    from flame_ext.latency import TASK_SIZES

    add = parser.add_argument
    add(
        "policy",
        nargs="?",
        type=Path,
        metavar="POLICY",
        help="a policy file or run directory (default: untrained policies of every algorithm)",
    )
    add(
        "--task",
        choices=tuple(TASK_SIZES),
        default="halfcheetah",
        help="observation and action sizes of untrained policies",
    )
    _add_precision(parser)
    add("--seconds", type=float, default=0.3, metavar="T", help="measuring time per number")


def _add_export(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("policy", type=Path, metavar="POLICY", help="a policy file or run directory")
    add(
        "--output",
        type=Path,
        metavar="FILE",
        help="default: policy.onnx beside the policy",
    )


def _add_nothing(parser: argparse.ArgumentParser) -> None:
    """``info`` has no options of its own."""


def _count(text: str) -> int:
    """A positive whole number; 1e6 and 1_000_000 are understood."""
    try:
        value = float(text)
        whole = int(value)
    except (ValueError, OverflowError):
        value, whole = 0.0, 0
    if whole < 1 or whole != value:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return whole


# Commands ---------------------------------------------------------------------------------------


def _train(options: argparse.Namespace) -> None:
    from flame_ext.checkpoint import has_checkpoint
    from flame_ext.config_text import describe_config

    config = _train_config(options)
    if options.show_config:
        print(describe_config(config))
        return
    trainer = _make_trainer(options, config)
    print(f"run directory  {trainer.run_dir}", file=sys.stderr)
    print(f"backend        {trainer.backend.name}, device {trainer.device}", file=sys.stderr)
    before = trainer.global_step
    try:
        result = trainer.run(options.steps)
    except KeyboardInterrupt:
        if has_checkpoint(trainer.run_dir):
            run_dir = shlex.quote(str(trainer.run_dir))
            print(f"\nsaved; go on with: flame-ext train --resume {run_dir}", file=sys.stderr)
        raise
    if result.steps == before:
        print(f"the run has its {before:,} steps: go on with --steps", file=sys.stderr)
    if trainer.agent.updates == 0:
        starts = trainer.config.learning_starts
        print(f"not trained: the first update is due after {starts:,} steps", file=sys.stderr)
    _report(result)


def _train_config(options: argparse.Namespace) -> Config:
    from flame_ext.config import make_config
    from flame_ext.config_text import parse_overrides

    overrides = parse_overrides(options.overrides)
    if options.num_envs is not None:
        overrides["num_envs"] = options.num_envs
    if options.resume is not None:
        _refuse_with_resume(options)
    if options.steps is not None:
        overrides["total_steps"] = options.steps
    return make_config(options.algorithm or "flame", options.preset or "default", overrides)


def _make_trainer(options: argparse.Namespace, config: Config) -> Trainer:
    from flame_ext.callbacks import Callback, StopAfterSeconds, StopOnReturn
    from flame_ext.trainer import Trainer

    callbacks: list[Callback] = []
    if options.stop_on_return is not None:
        callbacks.append(StopOnReturn(options.stop_on_return))
    if options.stop_after_seconds is not None:
        callbacks.append(StopAfterSeconds(options.stop_after_seconds))
    if options.resume is not None:
        return Trainer.resume(
            options.resume,
            env=options.env,
            backend=options.backend,
            device=options.device,
            callbacks=callbacks,
        )
    if options.env is None:
        raise ValueError("no environment was given; as in `flame-ext train HalfCheetah-v5`.")
    return Trainer(
        options.env,
        algorithm=config.algorithm,
        config=config,
        backend=options.backend or "auto",
        device=options.device or "auto",
        run_dir=options.run_dir,
        seed=options.seed or 0,
        callbacks=callbacks,
    )


def _refuse_with_resume(options: argparse.Namespace) -> None:
    """A resumed run keeps its options: say so instead of ignoring new ones."""
    fixed = {
        "--set": bool(options.overrides),
        "--num-envs": options.num_envs is not None,
        "--algorithm": options.algorithm is not None,
        "--preset": options.preset is not None,
        "--seed": options.seed is not None,
        "--run-dir": options.run_dir is not None,
        "--show-config": options.show_config,
    }
    given = [name for name, present in fixed.items() if present]
    if given:
        raise ValueError(
            f"{', '.join(given)} cannot be used with --resume: a resumed run keeps its options. "
            "Allowed are --steps, --backend, --device and the --stop options."
        )


def _report(result: Any) -> None:
    from flame_ext.plots import plot_learning_curves

    final = result.evaluations[-1]
    picture = plot_learning_curves([result.run_dir], result.run_dir / "learning_curve.png")
    if result.stopped_by:
        print(f"stopped by        {result.stopped_by}")
    print(
        f"final evaluation  return {final.mean_return:.1f} +- {final.std_return:.1f} over "
        f"{len(final.returns)} episodes, after {result.steps:,} steps and {result.wall_time:.0f} s"
    )
    print(f"best evaluation   return {result.best_return:.1f}, its policy in {result.run_dir}/best")
    print(f"learning curve    {picture}")
    print(f"play with it      flame-ext eval {shlex.quote(str(result.run_dir))}")


def _eval(options: argparse.Namespace) -> None:
    from flame_ext.multigoal import ENV_ID
    from flame_ext.play import Acting, evaluate_policy, film_episode, require_video_support
    from flame_ext.policy import load

    if options.video is not None:
        require_video_support(options.video)
    policy = load(options.run_dir, precision=options.precision, seed=options.seed)
    env_id = options.env or policy.env_id
    if env_id is None:
        raise ValueError(
            f"the run in {options.run_dir} used an environment without an id; give one with --env."
        )
    particles = options.num_particles or int(policy.spec.config["eval_particles"])
    acting = Acting(num_particles=particles, deterministic=not options.stochastic)
    returns, lengths = evaluate_policy(policy, env_id, options.episodes, acting, seed=options.seed)
    mean, spread = sum(returns) / len(returns), _deviation(returns)
    print(f"policy    {policy.algorithm} on {env_id}, best of {particles}")
    print(f"return    {mean:.1f} +- {spread:.1f} over {len(returns)} episodes")
    print(f"range     {min(returns):.1f} to {max(returns):.1f}")
    print(f"length    {sum(lengths) / len(lengths):.1f} steps")
    if env_id == ENV_ID:
        from flame_ext.plots import rollout_goals

        shares = rollout_goals(policy, options.episodes, seed=options.seed).fractions
        print(f"goals     {' / '.join(f'{share:.1%}' for share in shares)} of sampled episodes")
    if options.video is not None:
        film_episode(policy, env_id, options.video, acting, seed=options.seed)
        print(f"video     {options.video}")


def _deviation(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return float((sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5)


def _diagnose(options: argparse.Namespace) -> None:
    from flame_ext.diagnosis import diagnose

    figures = diagnose(options.run_dir, env=options.env, states=options.states, seed=options.seed)
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:<{width}}  {value:.4g}")


def _plot(options: argparse.Namespace) -> None:
    from flame_ext.multigoal import ENV_ID
    from flame_ext.plots import plot_learning_curves, plot_multigoal, run_facts

    kind = options.kind
    if kind == "auto":
        tasks = {run_facts(run_dir)[1] for run_dir in options.run_dirs}
        kind = "multigoal" if tasks == {ENV_ID} else "curves"
    name = "multigoal.png" if kind == "multigoal" else "learning_curve.png"
    folder = options.run_dirs[0] if len(options.run_dirs) == 1 else Path()
    output = options.output or folder / name
    if kind == "multigoal":
        plot_multigoal(options.run_dirs, output, options.episodes)
    else:
        plot_learning_curves(options.run_dirs, output, options.axis)
    print(output)


def _bench(options: argparse.Namespace) -> None:
    from flame_ext.latency import policy_latencies, task_latencies
    from flame_ext.policy import load

    if options.policy is not None:
        policy = load(options.policy, precision=options.precision)
        print(policy_latencies(policy, seconds=options.seconds))
    elif options.precision != "fp32":
        raise ValueError(
            "--precision is for a given policy: flame-ext bench POLICY --precision ..."
        )
    else:
        print(task_latencies(options.task, seconds=options.seconds))


def _export(options: argparse.Namespace) -> None:
    from flame_ext.onnx_export import export_onnx

    folder = options.policy if options.policy.is_dir() else options.policy.parent
    output = options.output or folder / "policy.onnx"
    export_onnx(options.policy, output)
    print(output)


def _info(options: argparse.Namespace) -> None:  # noqa: ARG001
    from flame_ext.native import backend_info

    print(backend_info())


_Fill = Callable[[argparse.ArgumentParser], None]
_Command = Callable[[argparse.Namespace], None]
_COMMANDS: dict[str, tuple[str, str, _Fill, _Command]] = {
    "train": ("train a policy in an environment", _TRAIN_EPILOG, _add_train, _train),
    "eval": ("play episodes with a trained policy", _EVAL_EPILOG, _add_eval, _eval),
    "diagnose": ("measure policy, weights and critics of a run", "", _add_diagnose, _diagnose),
    "plot": ("draw learning curves or the multi-goal task", _PLOT_EPILOG, _add_plot, _plot),
    "bench": ("measure how long policies take to act", _BENCH_EPILOG, _add_bench, _bench),
    "export": ("write a policy as an ONNX model", _EXPORT_EPILOG, _add_export, _export),
    "info": ("report on the installation", "", _add_nothing, _info),
}


if __name__ == "__main__":
    run()
