"""The loop's step, replayed: on a GPU one captured CUDA graph does every step of a run, without work on the host.

A `Step` reads and writes the same memory each time, and its number is in that memory too. So it is captured once for
each shape and replayed for every step of every run of that shape. Elsewhere the same step runs eagerly, under the same
rule: inputs are copied into its buffers, and a changed address is an error.

Steps of several shapes are kept, up to a bound in bytes. When memory runs out while a new one is made or captured, all
others are given up, and it is tried once more.
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

from mogle_rt.loop.buffers import StepInputs, tensors_of
from mogle_rt.loop.step import Step

logger = logging.getLogger(__name__)

T = TypeVar("T")

WARM_UP = 3  # eager steps before capture: libraries set themselves up, kernels are compiled
GRAPH = "cuda graph"


def why_eager(device: torch.device, cuda_graphs: bool) -> str | None:
    """The reason why no graph can be used, or None."""
    if not cuda_graphs:
        return "cuda_graphs=False"
    return None if device.type == "cuda" else f"CUDA graphs need a CUDA device, this is {device.type}"


def with_room(make: Callable[[], T], give_up: Callable[[], bool]) -> T:
    """What ``make`` gives. Where memory runs out in it, others' memory is given up, and it is called once more.

    Args:
        give_up: lets go of memory; False where there was nothing to let go of.

    Raises:
        torch.OutOfMemoryError: there is too little memory all the same.
    """
    try:
        return make()
    except torch.OutOfMemoryError:
        if not give_up():
            raise
    # Out of the handler: the error is gone, and with it the half-made tensors that its traceback held.
    return make()


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
        give_up: lets go of other runners' memory, where there is too little for the capture; see `with_room`.

    Attributes:
        nbytes: bytes of the step's inputs and buffers. What a captured graph takes for results within the step is not
            among them: it lies in the pool, where all graphs use the same memory one after the other.
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
        """Warm up, then capture; what the warm-up changed is put back. After a failure, warn and run eagerly.

        An error of the step itself, such as too little memory, is raised by the warm-up as it is.
        """
        pool = self._pool = self._pool or Pool(self._device)
        changing = (self.step.buffers.latents, self.step.buffers.index)
        saved = [t.clone() for t in changing]

        def warm_up() -> None:
            for _ in range(WARM_UP):
                self.step.buffers.index.copy_(saved[1])
                self.step.advance()

        outer = torch.cuda.current_stream(self._device)
        pool.stream.wait_stream(outer)
        try:
            with torch.cuda.stream(pool.stream):  # around the capture, too: one that fails leaves its stream current
                with_room(warm_up, self._give_up)
                self._graph = self._captured(pool)
        finally:
            outer.wait_stream(pool.stream)
            for t, before in zip(changing, saved, strict=True):
                t.copy_(before)

    def _captured(self, pool: Pool) -> torch.cuda.CUDAGraph | None:
        """The step's graph, or None where the driver or an operation of the step refuses."""
        made = self._recorded(pool)
        if isinstance(made, torch.OutOfMemoryError) and self._give_up():
            del made  # the error's traceback holds tensors
            made = self._recorded(pool)
        if isinstance(made, torch.cuda.CUDAGraph):
            return made
        first_line = " ".join(str(made).split("\n", 1)[0].split())
        self.execution = f"eager: capturing the step failed: {first_line}"
        logger.warning("steps run one by one, which is slower: %s", self.execution)
        return None

    def _recorded(self, pool: Pool) -> torch.cuda.CUDAGraph | BaseException:
        """The step's graph, or what broke its capture."""
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may use the GPU meanwhile.
            with torch.cuda.graph(graph, pool.handle, pool.stream, capture_error_mode="thread_local"):
                self.step.advance()
        except RuntimeError as error:  # torch's and the driver's errors are such
            pool.renew()
            return error.__context__ or error  # what broke the capture, not what its end said of it
        return graph


class Runners:
    """Runners by shape, the most recently used ones.

    Args:
        device: of the steps.
        cuda_graphs: whether graphs may be used.
        limit: bytes of inputs and buffers that all runners together may hold, see `Runner.nbytes`. The one in use is
            kept whatever it takes; with a limit of 0 it is the only one.

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
        """Bytes that all runners hold."""
        return sum(runner.nbytes for runner in self._runners.values())

    def clear(self) -> None:
        """Forget all."""
        self._runners.clear()

    def find(self, shapes: Hashable) -> Step | None:
        """The step of these shapes, if there is one."""
        runner = self._runners.get(shapes)
        return None if runner is None else runner.step

    def give_up_others(self, needed: Collection[Hashable]) -> bool:
        """Let go of all runners but those of the needed shapes; False where there was no other."""
        others = [key for key in self._runners if key not in needed]
        for key in others:
            del self._runners[key]
        if others:
            logger.warning("memory is short: %d kept steps of other shapes were given up", len(others))
        return bool(others)

    def get(self, shapes: Hashable, inputs: StepInputs, make: Callable[[], Step]) -> Runner:
        """The runner of these shapes, with these inputs; a step is made where there is none.

        Raises:
            torch.OutOfMemoryError: there is too little memory, even without the other runners.
        """
        runner = self._runners.get(shapes)
        if runner is not None:
            runner.step.load(inputs)
            self._runners.move_to_end(shapes)
            return runner
        # The inputs are a part of the new runner, and there already; how much its buffers take is not known yet.
        self._shrink(self.limit - sum(t.nbytes for t in tensors_of(inputs)))
        give_up = partial(self.give_up_others, [shapes])
        runner = Runner(with_room(make, give_up), self._reason, self._pool, give_up)
        self._shrink(self.limit - runner.nbytes)
        self._runners[shapes] = runner
        return runner

    def _shrink(self, limit: int) -> None:
        """Let go of the least recently used runners, until the others hold no more than so many bytes."""
        while self._runners and self.nbytes > limit:
            self._runners.popitem(last=False)
