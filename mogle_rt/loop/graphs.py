"""The loop's step, replayed: on a GPU one captured CUDA graph does every step of a run, without work on the host.

A `Step` reads and writes the same memory each time, and its number is in that memory too. So it is captured once for
each shape and replayed for every step of every run of that shape. Elsewhere the same step runs eagerly, under the same
rule: inputs are copied into its buffers, and a changed address is an error.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from mogle_rt.loop.buffers import StepInputs
from mogle_rt.loop.step import Step

logger = logging.getLogger(__name__)

WARM_UP = 3  # eager steps before capture: libraries set themselves up, kernels are compiled
GRAPH = "cuda graph"


def why_eager(device: torch.device, cuda_graphs: bool) -> str | None:
    """The reason why no graph can be used, or None."""
    if not cuda_graphs:
        return "cuda_graphs=False"
    return None if device.type == "cuda" else f"CUDA graphs need a CUDA device, this is {device.type}"


class Pool:
    """The memory that graphs share: a pool, and the one stream of all captures, to which its blocks belong.

    (The workspaces of libraries are a stream's own, too.)
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.handle: Any = torch.cuda.graph_pool_handle()

    def renew(self) -> None:
        """Another one, after a failed capture: it may have taken the old one with it."""
        self.handle = torch.cuda.graph_pool_handle()


class Runner:
    """Runs one step again and again.

    Args:
        step: what is run.
        reason: why not in a graph; None captures one at the first `advance`.
        pool: for graphs, which share it; None makes one.

    Attributes:
        execution: how steps are run: "cuda graph", or "eager: …" with the reason.
    """

    def __init__(self, step: Step, reason: str | None, pool: Pool | None = None) -> None:
        self.step, self._pool = step, pool
        self.execution = GRAPH if reason is None else f"eager: {reason}"
        self._addresses: list[int] | None = None  # at the first start
        self._graph: torch.cuda.CUDAGraph | None = None
        self._device = step.buffers.latents.device

    def start(self, latents: Tensor, k: int) -> None:
        """Go to step k with these latents, [N, B, 64].

        Raises:
            RuntimeError: a buffer was exchanged for another since the first start.
        """
        addresses = self.step.addresses()
        self._addresses = self._addresses or addresses
        if addresses != self._addresses:
            raise RuntimeError("a buffer of the step was replaced: inputs must be copied into it, see Step.load")
        self.step.buffers.latents.copy_(latents)
        self.step.seek(k)

    def advance(self) -> None:
        """One step."""
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            if self.execution == GRAPH and self._graph is None:
                self._capture()
            if self._graph is None:
                self.step.advance()
            else:
                self._graph.replay()

    def _capture(self) -> None:
        """Warm up, then capture; what the warm-up changed is put back. A failed capture is told, and steps run eagerly.

        An error of the step itself is raised by the warm-up as it is.
        """
        pool = self._pool = self._pool or Pool(self._device)
        changing = (self.step.buffers.latents, self.step.buffers.index)
        saved = [t.clone() for t in changing]
        outer = torch.cuda.current_stream(self._device)
        pool.stream.wait_stream(outer)
        try:
            with torch.cuda.stream(pool.stream):  # around the capture, too: one that fails leaves its stream current
                for _ in range(WARM_UP):
                    self.step.buffers.index.copy_(saved[1])
                    self.step.advance()
                self._graph = self._captured(pool)
        finally:
            outer.wait_stream(pool.stream)
            for t, before in zip(changing, saved, strict=True):
                t.copy_(before)

    def _captured(self, pool: Pool) -> torch.cuda.CUDAGraph | None:
        """The step's graph, or None where the driver or an operation of the step refuses."""
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may use the GPU meanwhile.
            with torch.cuda.graph(graph, pool.handle, pool.stream, capture_error_mode="thread_local"):
                self.step.advance()
        except RuntimeError as error:  # torch's and the driver's errors are such
            cause = error.__context__ or error  # what broke the capture, not what its end said of it
            first_line = " ".join(str(cause).split("\n", 1)[0].split())
            self.execution = f"eager: capturing the step failed: {first_line}"
            logger.warning("steps run one by one, which is slower: %s", self.execution)
            pool.renew()
            return None
        return graph


class Runners:
    """Runners by shape, the most recent ones.

    Args:
        device: of the steps.
        cuda_graphs: whether graphs may be used.
        limit: how many shapes are kept. Each holds the activations of a step.
    """

    def __init__(self, device: torch.device, cuda_graphs: bool, limit: int) -> None:
        self._reason, self._limit = why_eager(device, cuda_graphs), limit
        if self._reason is not None:
            logger.info("steps run one by one: %s", self._reason)
        self._pool = Pool(device) if self._reason is None else None
        self._runners: OrderedDict[Hashable, Runner] = OrderedDict()

    def __len__(self) -> int:
        return len(self._runners)

    def clear(self) -> None:
        """Forget all."""
        self._runners.clear()

    def find(self, shapes: Hashable) -> Step | None:
        """The step of these shapes, if there is one."""
        runner = self._runners.get(shapes)
        return None if runner is None else runner.step

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
