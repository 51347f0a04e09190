"""Whole updates as CUDA graphs: small kernels take longer to launch, one by one, than to run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flame_ext.replay import Batch
from flame_ext.scalars import Scalars, stacked

# What libraries and the optimizers set up in their first steps must not become part of a graph.
WARM_UPS = 3


class GraphedSteps:
    """A `StepRunner` that captures the steps once for every size of batch and choice of options.

    The first `WARM_UPS` calls of each run without a graph.

    Args:
        generator: What the steps draw from, on a CUDA device.
        capture: Whether to use graphs at all.
    """

    def __init__(self, generator: torch.Generator, *, capture: bool = True) -> None:
        self._generator, self._capture = generator, capture
        self._alpha = torch.zeros((), dtype=torch.float64, device=generator.device)
        # The same for warm-ups and captures: libraries keep memory for every stream they meet.
        self._stream = torch.cuda.Stream(generator.device)  # type: ignore[no-untyped-call]
        self._graphs: dict[tuple[Any, ...], _Graph] = {}

    def __call__(
        self, steps: Callable[..., Scalars], batch: Batch, alpha: float, *options: object
    ) -> dict[str, float]:
        """As `StepRunner`."""
        key = (len(batch), *options)
        if key not in self._graphs:
            self._graphs[key] = _Graph(batch)
        graph = self._graphs[key]

        def launch() -> Scalars:
            return steps(graph.batch, self._alpha, *options)

        with torch.cuda.device(self._generator.device):
            self._alpha.fill_(alpha)
            graph.load(batch)
            if self._capture and graph.runs == WARM_UPS:
                graph.capture(launch, self._stream, self._generator)
            graph.run(launch, self._stream)
        return graph.read()


class _Graph:
    """What is captured for one size of batch and one choice of options.

    Attributes:
        batch: What is read, in memory of its own.
        runs: How often it was run.
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = Batch(*map(torch.empty_like, batch.columns()))
        self.runs = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._names: list[str] = []
        self._values = torch.empty(0)

    def load(self, batch: Batch) -> None:
        """Makes a batch the one that is read."""
        for kept, column in zip(self.batch.columns(), batch.columns(), strict=True):
            kept.copy_(column)

    def capture(
        self,
        launch: Callable[[], Scalars],
        stream: torch.cuda.Stream,
        generator: torch.Generator,
    ) -> None:
        """Records what is launched, without running it."""
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(generator)
        # What other threads do meanwhile is no concern of this graph.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self._names, self._values = stacked(launch())
        self._graph = graph

    def run(self, launch: Callable[[], Scalars], stream: torch.cuda.Stream) -> None:
        """Runs the graph if there is one, else launches."""
        self.runs += 1
        if self._graph is not None:
            self._graph.replay()
            return
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._names, self._values = stacked(launch())
        torch.cuda.current_stream().wait_stream(stream)

    def read(self) -> dict[str, float]:
        """What the last run reports, once it is done."""
        return dict(zip(self._names, self._values.tolist(), strict=True))
