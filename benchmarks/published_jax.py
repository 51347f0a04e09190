"""One update and one action of the published JAX code (lzqw/FLAME) beside ours.

Both train FLAME-M at HalfCheetah's sizes with batch 256, K candidates and 3x256 mish networks, a
policy step in every update, best of 32 particles; the programs alternate in one process and use the
machine's threads as they like. Peak memory is that of a process which does nothing else. Nothing of
the published code is part of this repository: give a checkout of it, and an environment that has
jax, optax and dm-haiku.

Run: python benchmarks/published_jax.py --checkout ../FLAME --candidates 100 --rounds 10
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np

OBS_DIM, ACTION_DIM, BATCH = 17, 6, 256
PROGRAMS = ("ours", "published")
# Idle worker threads of a program may spin for a while after its call, on the other's cores.
PAUSE = 0.2  # seconds


def transitions() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "obs": rng.standard_normal((BATCH, OBS_DIM)).astype(np.float32),
        "action": rng.uniform(-1, 1, (BATCH, ACTION_DIM)).astype(np.float32),
        "reward": rng.standard_normal(BATCH).astype(np.float32),
        "next_obs": rng.standard_normal((BATCH, OBS_DIM)).astype(np.float32),
    }


def ours(
    candidates: int, sampling: str, matmul_precision: str
) -> tuple[Callable[[], object], Callable[[], object]]:
    import torch

    from flame_ext.agent import Agent
    from flame_ext.backends import make_backend
    from flame_ext.config import make_config
    from flame_ext.latency import untrained_policy
    from flame_ext.replay import Batch

    options = {"num_candidates": candidates, "policy_delay": 1, "batch_size": BATCH}
    options |= {"candidate_sampling": sampling, "matmul_precision": matmul_precision}
    config = make_config("flame", "paper", options)
    device = torch.device("cpu")
    agent = Agent(config, OBS_DIM, ACTION_DIM, make_backend("auto", device))
    rows = {name: torch.from_numpy(value) for name, value in transitions().items()}
    batch = Batch(**rows, discount=torch.full((BATCH,), 0.99))
    policy, obs = untrained_policy("flame", OBS_DIM, ACTION_DIM, "paper"), transitions()["obs"][:1]

    def update() -> None:
        with agent.backend.training():  # as the trainer does
            agent.update(batch)

    return update, lambda: policy.act(obs, num_particles=32)


def published(candidates: int, checkout: str) -> tuple[Callable[[], object], Callable[[], object]]:
    import jax
    import jax.numpy as jnp

    sys.path.insert(0, checkout)
    _stand_in("relax.utils.persistence", make_persist=lambda f: types.SimpleNamespace(f=f))
    _stand_in("flax.linen", softmax=jax.nn.softmax)
    _stand_in("flax", linen=sys.modules["flax.linen"])
    from relax.algorithm.mf_sac_ent import MFSACENT
    from relax.network.mf_sac_ent import create_mf_sac_ent_net
    from scripts.experience import Experience

    def mish(x: jax.Array) -> jax.Array:
        return x * jnp.tanh(jax.nn.softplus(x))

    hidden = [256] * 3
    sampling = {"num_timesteps": 1, "num_timesteps_test": 1, "num_particles": 32}
    agent, params = create_mf_sac_ent_net(
        jax.random.key(0), OBS_DIM, ACTION_DIM, hidden, hidden, mish, **sampling
    )
    algorithm = MFSACENT(agent, params, sample_k=candidates)
    batch = Experience(**transitions(), done=np.zeros(BATCH, dtype=bool))
    key = jax.random.key(1)
    return lambda: algorithm.update(key, batch), lambda: algorithm.get_action(key, batch.obs[:1])


def _stand_in(name: str, **members: object) -> None:
    """A module of the published code's imports that these two functions need next to nothing of."""
    module = types.ModuleType(name)
    vars(module).update(members)
    sys.modules[name] = module


def programs(arguments: argparse.Namespace, name: str) -> tuple[Callable, Callable]:
    if name == "ours":
        stratified, precision = arguments.stratified, arguments.matmul_precision
        if stratified is not None:
            return ours(stratified, "stratified", precision)
        return ours(arguments.candidates, "random", precision)
    return published(arguments.candidates, arguments.checkout)


def print_ratios(what: str, calls: dict[str, Callable], rounds: int, calls_per_round: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(PAUSE)
            call()
            start = time.perf_counter()
            for _ in range(calls_per_round):
                call()
            seconds[name].append((time.perf_counter() - start) / calls_per_round)
    ratio = np.array(seconds["published"]) / np.array(seconds["ours"])
    low, median, high = np.quantile(ratio, [0.1, 0.5, 0.9])
    times = ", ".join(f"{name} {np.median(s) * 1e3:.3f} ms" for name, s in seconds.items())
    print(f"{what}: {times}; ratio {median:.1f} (10-90 %: {low:.1f}-{high:.1f}, {rounds} rounds)")


def peak_memory(arguments: argparse.Namespace, name: str) -> str:
    """Peak resident megabytes of a process of its own, before and after five updates."""
    command = [sys.executable, __file__, "--checkout", arguments.checkout, "--memory-of", name]
    command += ["--candidates", str(arguments.candidates)]
    command += ["--matmul-precision", arguments.matmul_precision]
    if arguments.stratified is not None:
        command += ["--stratified", str(arguments.stratified)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return output.strip().splitlines()[-1]


def measure_memory(arguments: argparse.Namespace) -> None:
    update, _ = programs(arguments, arguments.memory_of)
    before = peak_megabytes()
    for _ in range(5):
        update()
    after = peak_megabytes()
    print(f"{after:.0f} MB, of which {after - before:.0f} MB by updating")


def peak_megabytes() -> float:
    """Peak resident memory of this process; getrusage's would include the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkout", required=True, help="a checkout of lzqw/FLAME")
    parser.add_argument("--candidates", type=int, default=100, help="K")
    parser.add_argument(
        "--stratified",
        type=int,
        help="stratified candidates of ours, as many as benchmarks/candidate_error.py finds enough",
    )
    parser.add_argument("--matmul-precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--memory-of", choices=PROGRAMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        measure_memory(arguments)
        return
    calls = {name: programs(arguments, name) for name in PROGRAMS}
    update = {name: both[0] for name, both in calls.items()}
    act = {name: both[1] for name, both in calls.items()}
    k = f"K {arguments.candidates}"
    if arguments.stratified is not None:
        k += f", ours {arguments.stratified} stratified"
    k += f", ours in {arguments.matmul_precision}"
    print_ratios(f"update, batch {BATCH}, {k}", update, arguments.rounds, 1)
    print_ratios("best-of-32 action, batch 1", act, arguments.rounds, 100)
    for name in PROGRAMS:
        print(f"peak memory, {name}: {peak_memory(arguments, name)}")


if __name__ == "__main__":
    main()
