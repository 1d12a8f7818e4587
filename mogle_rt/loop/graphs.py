"""CUDA graphs of a step: on a GPU one captured graph runs every step of a run, with almost no work on the host.

A `Step` reads and writes the same memory each time, and the step's number is in that memory too. So it is captured once
for each shape and replayed for every step of every run of that shape. (If weights are streamed, there is a graph for
each section of the step. If a run computes less in some steps, there is one for each kind of step.) On other devices
the same step runs eagerly under the same rule: inputs are copied into its buffers, and a changed address is an error.

Steps of several shapes are kept, up to a limit in bytes. If memory runs out while a new one is made or captured, all
others are dropped, and it is tried once more.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from mogle_rt.fast.course import WHOLE, Kind, Way
from mogle_rt.loop.buffers import StepInputs, tensors_of
from mogle_rt.loop.step import Step

logger = logging.getLogger(__name__)

T = TypeVar("T")

WARM_UP = 3  # eager steps before the capture, in which libraries initialise and kernels are compiled
GRAPH = "cuda graph"


def why_eager(device: torch.device, cuda_graphs: bool) -> str | None:
    """The reason why CUDA graphs can't be used, or None if they can."""
    if not cuda_graphs:
        return "cuda_graphs=False"
    return None if device.type == "cuda" else f"CUDA graphs need a CUDA device, this is {device.type}"


def with_room(make: Callable[[], T], give_up: Callable[[], bool]) -> T:
    """Return the result of ``make``. If it runs out of memory, call ``give_up`` and then ``make`` once more.

    Args:
        give_up: frees memory that others hold; returns False if there was nothing to free.

    Raises:
        torch.OutOfMemoryError: there is still too little memory.
    """
    try:
        return make()
    except torch.OutOfMemoryError:
        if not give_up():
            raise
    # This is outside the handler, so the error is gone, and with it the tensors that its traceback kept alive.
    return make()


class Pool:
    """The memory pool that all graphs share, and the stream on which all of them are captured.

    There is one stream because the pool's blocks belong to a stream, and so do the workspaces of libraries.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.handle: Any = torch.cuda.graph_pool_handle()

    def renew(self) -> None:
        """Take a new pool after a failed capture, which may have made the old one unusable."""
        self.handle = torch.cuda.graph_pool_handle()


class Runner:
    """Runs one step repeatedly.

    Args:
        step: the step to run.
        reason: why no graph is used; None means that a graph is captured at the first `advance`.
        pool: the memory pool that graphs share; None creates one.
        give_up: frees the memory of other runners if there is too little for the capture; see `with_room`.

    Attributes:
        nbytes: bytes of the step's inputs and buffers. Intermediate results of a captured graph are not included: they
            lie in the pool, where all graphs use the same memory one after the other.
        execution: how steps are run: "cuda graph", or "eager: …" with the reason.
    """

    def __init__(
        self,
        step: Step,
        reason: str | None,
        pool: Pool | None = None,
        give_up: Callable[[], bool] = lambda: False,
    ) -> None:
        self.step, self.nbytes = step, step.nbytes
        self._pool, self._give_up = pool, give_up
        self.execution = GRAPH if reason is None else f"eager: {reason}"
        self._addresses: list[int] | None = None  # those at the first start
        # For each kind of step, one for each of its sections, once they are captured.
        self._graphs: dict[Kind, list[torch.cuda.CUDAGraph]] = {}
        self._device = step.buffers.latents.device

    def start(self, latents: Tensor, k: int) -> None:
        """Go to step k with these latents, [N, B, 64].

        Raises:
            RuntimeError: a buffer was replaced since the first start.
        """
        addresses = self.step.addresses()
        self._addresses = self._addresses or addresses
        if addresses != self._addresses:
            raise RuntimeError("a buffer of the step was replaced: inputs must be copied into it, see Step.load")
        self.step.buffers.latents.copy_(latents)
        self.step.seek(k)

    def advance(self, way: Way = WHOLE) -> None:
        """Run one step in this way."""
        kind = way.kind
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            self.step.prepare(way)
            if self.execution == GRAPH and kind not in self._graphs:
                self._capture(kind)
            if kind not in self._graphs:
                self.step.advance(kind)
                return
            for section, graph in zip(self.step.sections[kind], self._graphs[kind], strict=True):
                with self.step.weights_of(section):
                    graph.replay()

    def _capture(self, kind: Kind) -> None:
        """Warm up, capture, and restore what the warm-up changed. If the capture fails, warn and run eagerly.

        Errors of the step itself, such as too little memory, are raised unchanged by the warm-up.
        """
        pool = self._pool = self._pool or Pool(self._device)
        changing, index = self.step.carried, self.step.buffers.index
        saved, at = [t.clone() for t in changing], index.clone()

        def warm_up() -> None:
            for _ in range(WARM_UP):
                index.copy_(at)
                self.step.advance(kind)

        outer = torch.cuda.current_stream(self._device)
        pool.stream.wait_stream(outer)
        try:
            # The capture is inside this block too, because a failed capture leaves its stream current.
            with torch.cuda.stream(pool.stream):
                with_room(warm_up, self._give_up)
                if graphs := self._captured(pool, kind):
                    self._graphs[kind] = graphs
        finally:
            outer.wait_stream(pool.stream)
            for t, before in zip(changing, saved, strict=True):
                t.copy_(before)

    def _captured(self, pool: Pool, kind: Kind) -> list[torch.cuda.CUDAGraph]:
        """The step's graphs, or none if the driver or an operation of the step does not allow the capture."""
        made = self._recorded(pool, kind)
        if isinstance(made, torch.OutOfMemoryError) and self._give_up():
            del made  # the error's traceback holds tensors
            made = self._recorded(pool, kind)
        if isinstance(made, list):
            return made
        first_line = " ".join(str(made).split("\n", 1)[0].split())
        self.execution = f"eager: capturing the step failed: {first_line}"
        logger.warning("steps run one by one, which is slower: %s", self.execution)
        return []

    def _recorded(self, pool: Pool, kind: Kind) -> list[torch.cuda.CUDAGraph] | BaseException:
        """The graphs of the step's sections, in order, or the error that broke their capture."""
        graphs = []
        try:
            for section in self.step.sections[kind]:
                graph = torch.cuda.CUDAGraph()
                # "thread_local" lets other threads use the GPU during the capture.
                with torch.cuda.graph(graph, pool.handle, pool.stream, capture_error_mode="thread_local"):
                    self.step.run(section)
                graphs.append(graph)
        except RuntimeError as error:  # PyTorch and the driver raise subclasses of it
            pool.renew()
            return error.__context__ or error  # the first error is the cause; ending the capture raised the second
        return graphs


class Runners:
    """The most recently used runners, by shape.

    Args:
        device: where the steps run.
        cuda_graphs: whether graphs may be used.
        limit: bytes of inputs and buffers that all runners together may hold, see `Runner.nbytes`. The runner in use is
            always kept; with a limit of 0 it is the only one.

    Attributes:
        limit: see above.
    """

    def __init__(self, device: torch.device, cuda_graphs: bool, limit: int) -> None:
        self._reason, self.limit = why_eager(device, cuda_graphs), limit
        if self._reason is not None:
            logger.info("steps run one by one: %s", self._reason)
        self._pool = Pool(device) if self._reason is None else None
        self._runners: OrderedDict[Hashable, Runner] = OrderedDict()

    def __len__(self) -> int:
        return len(self._runners)

    @property
    def nbytes(self) -> int:
        """Bytes that all runners hold together."""
        return sum(runner.nbytes for runner in self._runners.values())

    def clear(self) -> None:
        """Drop all runners."""
        self._runners.clear()

    def find(self, shapes: Hashable) -> Step | None:
        """The step of these shapes, or None if there is none."""
        runner = self._runners.get(shapes)
        return None if runner is None else runner.step

    def give_up_others(self, needed: Collection[Hashable]) -> bool:
        """Drop all runners except those of the needed shapes. Returns False if there were no others."""
        others = [key for key in self._runners if key not in needed]
        for key in others:
            del self._runners[key]
        if others:
            logger.warning("memory is short: %d kept steps of other shapes were given up", len(others))
        return bool(others)

    def get(self, shapes: Hashable, inputs: StepInputs, make: Callable[[], Step]) -> Runner:
        """The runner of these shapes, loaded with these inputs; its step is made if there is none yet.

        Raises:
            torch.OutOfMemoryError: there is too little memory, even without the other runners.
        """
        runner = self._runners.get(shapes)
        if runner is not None:
            runner.step.load(inputs)
            self._runners.move_to_end(shapes)
            return runner
        # The inputs will be part of the new runner and are in memory already. The size of its buffers is not known yet.
        self._shrink(self.limit - sum(t.nbytes for t in tensors_of(inputs)))
        give_up = partial(self.give_up_others, [shapes])
        runner = Runner(with_room(make, give_up), self._reason, self._pool, give_up)
        self._shrink(self.limit - runner.nbytes)
        self._runners[shapes] = runner
        return runner

    def _shrink(self, limit: int) -> None:
        """Drop the least recently used runners until the others hold at most ``limit`` bytes."""
        while self._runners and self.nbytes > limit:
            self._runners.popitem(last=False)
