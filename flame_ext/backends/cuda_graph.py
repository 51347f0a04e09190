"""Whole updates as CUDA graphs: small kernels take longer to launch, one by one, than to run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flame_ext.replay import Batch
from flame_ext.scalars import Scalars, stacked

# What libraries and the optimizers set up in their first steps must not become part of a graph.
WARM_UPS = 3


class GraphedSteps:
    """Steps of training that are captured once for every size of batch and choice of options.

    The first calls with either run, and are kept, without a graph.

    Args:
        steps: As in `TorchBackend.prepare_steps`. What they read and write beside the batch and
            alpha stays where it is in memory.
        generator: What they draw from, on a CUDA device.
        capture: Whether to use graphs at all.
    """

    def __init__(
        self, steps: Callable[..., Scalars], generator: torch.Generator, *, capture: bool = True
    ) -> None:
        self._steps, self._generator, self._capture = steps, generator, capture
        self._alpha = torch.zeros((), dtype=torch.float64, device=generator.device)
        # One for all: autograd adds up a parameter's gradient on the stream of its first one.
        self._stream = torch.cuda.Stream(generator.device)  # type: ignore[no-untyped-call]
        self._graphs: dict[tuple[Any, ...], _Graph] = {}

    def __call__(self, batch: Batch, alpha: float, *options: object) -> dict[str, float]:
        """Runs the steps; returns when they are done."""
        key = (len(batch), *options)
        if key not in self._graphs:
            self._graphs[key] = _Graph(self._steps, batch, self._alpha, options)
        graph = self._graphs[key]
        with torch.cuda.device(self._generator.device):
            self._alpha.fill_(alpha)
            graph.load(batch)
            if self._capture and graph.runs == WARM_UPS:
                graph.capture(self._stream, self._generator)
            graph.run(self._stream)
        return graph.read()


class _Graph:
    """The steps for one size of batch and one choice of options, with memory of their own."""

    def __init__(
        self,
        steps: Callable[..., Scalars],
        batch: Batch,
        alpha: Tensor,
        options: tuple[object, ...],
    ) -> None:
        self._batch = Batch(*(column.clone() for column in batch.columns()))
        self._steps, self._arguments = steps, (self._batch, alpha, *options)
        self.runs = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._names: list[str] = []
        self._values: Tensor | None = None

    def load(self, batch: Batch) -> None:
        """Makes a batch the input."""
        for kept, column in zip(self._batch.columns(), batch.columns(), strict=True):
            kept.copy_(column)

    def capture(self, stream: torch.cuda.Stream, generator: torch.Generator) -> None:
        """Records what the steps launch, without running it."""
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(generator)
        with torch.cuda.graph(graph, stream=stream):
            self._launch()
        self._graph = graph

    def run(self, stream: torch.cuda.Stream) -> None:
        """Runs the steps, from the graph if there is one."""
        self.runs += 1
        if self._graph is not None:
            self._graph.replay()
            return
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._launch()
        torch.cuda.current_stream().wait_stream(stream)

    def read(self) -> dict[str, float]:
        """The last run's result."""
        assert self._values is not None
        return dict(zip(self._names, self._values.tolist(), strict=True))

    def _launch(self) -> None:
        scalars = self._steps(*self._arguments)
        self._names, self._values = list(scalars), stacked(scalars)
