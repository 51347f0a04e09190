"""Updates from a captured graph, on a stand-in for CUDA's that records what PyTorch computes.

What only a device can show is in test_cuda_kernels.py.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flame_ext.agent import Agent
from flame_ext.backends import TorchBackend, cuda_graph
from flame_ext.config import make_config
from flame_ext.replay import Batch

OBS, ACT, ROWS = 5, 3, 8


class RecordedGraph(TorchDispatchMode):
    """Every operation with the memory of its results, to be computed into it again.

    Recording runs the operations, other than on a device, so that the first replay has nothing
    left to do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, ...]] = []
        self.generators: list[torch.Generator] = []
        self.replays = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, results))
        return results

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.generators.append(generator)

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        if self.replays == 1:
            return
        for func, args, kwargs, results in self.operations:
            anew = func(*args, **kwargs)
            for old, new in zip(tree_leaves(results), tree_leaves(anew), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Stream:
    def __init__(self, device: object = None) -> None:
        self.device = device

    def wait_stream(self, stream: Stream) -> None:
        assert isinstance(stream, Stream)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[RecordedGraph]:
    made: list[RecordedGraph] = []

    def make_graph() -> RecordedGraph:
        made.append(RecordedGraph())
        return made[-1]

    @contextmanager
    def capture(graph: RecordedGraph, *, stream: Stream, capture_error_mode: str):
        assert isinstance(stream, Stream)
        assert capture_error_mode == "thread_local"
        with graph:
            yield

    for name, stand_in in {
        "CUDAGraph": make_graph,
        "graph": capture,
        "Stream": Stream,
        "stream": lambda _: nullcontext(),
        "current_stream": Stream,
        "device": lambda _: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return made


class GraphedBackend(TorchBackend):
    def step_runner(self, generator: torch.Generator) -> cuda_graph.GraphedSteps:
        return cuda_graph.GraphedSteps(generator)


def make_agent(backend: TorchBackend, algorithm: str, options: dict[str, object]) -> Agent:
    common = {"hidden_sizes": (16, 16), "policy_batch_size": 4, "num_candidates": 4}
    often = {"policy_delay": 3, "alpha_interval": 9}
    config = make_config(algorithm, overrides={**common, **often, **options})
    return Agent(config, OBS, ACT, backend, seed=0)


def make_batch(seed: int, updates: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    rows = updates * ROWS
    obs, next_obs = (torch.randn(rows, OBS, generator=g) for _ in range(2))
    action = 2 * torch.rand(rows, ACT, generator=g) - 1
    reward, draws = torch.randn(rows, generator=g), torch.rand(rows, generator=g)
    return Batch(obs, action, reward, 0.99 * (draws < 0.9), next_obs)


@pytest.mark.parametrize("embedding_dim", [0, 6])
@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("flame", {}),
        ("sac", {}),
        ("flame-r", {"sampling_steps": 2}),
        ("diffusion", {"sampling_steps": 2}),
        ("flame", {"proposal": "policy", "entropy_in_target": True}),
        ("flame", {"z_source": "target", "target_particles": 2}),
    ],
)
def test_replayed_updates_are_the_updates(
    algorithm: str,
    options: dict[str, object],
    embedding_dim: int,
    graphs: list[RecordedGraph],
) -> None:
    """With new batches, temperatures and draws, whatever is due, and other graphs in between."""
    options = {**options, "embedding_dim": embedding_dim}
    replayed = make_agent(GraphedBackend(), algorithm, options)
    launched = make_agent(TorchBackend(), algorithm, options)
    for i in range(80):
        updates = 2 if i % 5 == 1 else 1
        batch = make_batch(i, updates)
        ours, wanted = (agent.update(batch, updates) for agent in (replayed, launched))
        assert ours == pytest.approx(wanted, rel=1e-4, abs=1e-5), i
    for name, network in launched.networks().items():
        torch.testing.assert_close(replayed.networks()[name].flat, network.flat)
    assert torch.equal(replayed.generator.get_state(), launched.generator.get_state())
    assert len(graphs) == 5, "no policy step; of one or two updates with or without a temperature's"
    assert all(graph.replays > 0 for graph in graphs)
    assert sum(graph.replays for graph in graphs) == 80 - 5 * cuda_graph.WARM_UPS
    assert all(graph.generators == [replayed.generator] for graph in graphs)


def test_without_capturing_every_update_is_launched(graphs: list[RecordedGraph]) -> None:
    agent = make_agent(TorchBackend(), "flame", {})
    runner = cuda_graph.GraphedSteps(agent.generator, capture=False)
    for i in range(5):
        assert runner(agent._steps, make_batch(i, 1), 0.1, 1, True, True)["policy_loss"] != 0
    assert graphs == []
