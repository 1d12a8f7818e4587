"""The loop's step, replayed: on a GPU one captured CUDA graph does every step of a run, without work on the host.

A `Step` reads and writes the same memory each time, and its number is in that memory too. So it is captured once for
each shape and replayed for every step of every run of that shape. Elsewhere the same step runs eagerly, under the same
rule: inputs are copied into its buffers, and a changed address is an error.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch

from mogle_rt.step import Step, StepInputs

logger = logging.getLogger(__name__)

WARM_UP = 3  # eager steps before capture: libraries set themselves up, kernels are compiled
GRAPH = "cuda graph"


def why_eager(device: torch.device, cuda_graphs: bool) -> str | None:
    """The reason why no graph can be used, or None."""
    if not cuda_graphs:
        return "cuda_graphs=False"
    return None if device.type == "cuda" else f"CUDA graphs need a CUDA device, this is {device.type}"


class Runner:
    """Runs one step again and again.

    Args:
        step: what is run.
        reason: why not in a graph; None captures one at the first `advance`.
        pool: the memory that graphs share.

    Attributes:
        execution: how steps are run: "cuda graph", or "eager: …" with the reason.
    """

    def __init__(self, step: Step, reason: str | None, pool: Any = None) -> None:
        self.step, self._pool = step, pool
        self.execution = GRAPH if reason is None else f"eager: {reason}"
        self._addresses: list[int] | None = None  # at the first step
        self._graph: torch.cuda.CUDAGraph | None = None

    def advance(self) -> None:
        """One step.

        Raises:
            RuntimeError: a buffer was exchanged for another since the first step.
        """
        addresses = self.step.addresses()
        self._addresses = self._addresses or addresses
        if addresses != self._addresses:
            raise RuntimeError("a buffer of the step was replaced: inputs must be copied into it, see Step.load")
        if self.execution == GRAPH and self._graph is None:
            self._capture()
        if self._graph is None:
            self.step.advance()
        else:
            self._graph.replay()

    def _capture(self) -> None:
        """Warm up, then capture; what the warm-up changed is put back. A failure is told, and steps run eagerly."""
        changing = (self.step.buffers.latents, self.step.buffers.index)
        saved = [t.clone() for t in changing]
        device = saved[0].device
        try:
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self.step.buffers.index.copy_(saved[1])
                    self.step.advance()
            torch.cuda.current_stream(device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                self.step.advance()
            self._graph = graph
        except RuntimeError as error:  # torch's and the driver's errors are such
            reason = " ".join(str(error).split("\n", 1)[0].split())
            self.execution = f"eager: capturing the step failed: {reason}"
            logger.warning("steps run one by one, which is slower: %s", self.execution)
        for t, before in zip(changing, saved, strict=True):
            t.copy_(before)


class Runners:
    """Runners by shape, the most recent ones.

    Args:
        device: of the steps.
        cuda_graphs: whether graphs may be used.
        limit: how many shapes are kept. Each holds the activations of a step.
    """

    def __init__(self, device: torch.device, cuda_graphs: bool, limit: int) -> None:
        self._reason, self._limit = why_eager(device, cuda_graphs), limit
        self._pool = torch.cuda.graph_pool_handle() if self._reason is None else None
        self._runners: OrderedDict[Hashable, Runner] = OrderedDict()

    def __len__(self) -> int:
        return len(self._runners)

    def get(self, shapes: Hashable, inputs: StepInputs, make: Callable[[], Step]) -> Runner:
        """The runner of these shapes, with these inputs; a step is made where there is none."""
        runner = self._runners.get(shapes)
        if runner is not None:
            runner.step.load(inputs)
            self._runners.move_to_end(shapes)
            return runner
        while len(self._runners) >= self._limit:
            self._runners.popitem(last=False)  # its buffers go before new ones come
        runner = self._runners[shapes] = Runner(make(), self._reason, self._pool)
        return runner
