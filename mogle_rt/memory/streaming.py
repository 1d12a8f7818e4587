"""Streamed weights: those of some sublayers take turns in a few slots of memory.

A step uses its sublayers in a fixed order. While one of them is computed, a thread of its own reads the weights of the
next streamed one into a free slot. So a model needs no more memory than its resident weights and the slots, and the
same bytes come out: each product is the one that a resident weight would make.

There are two rings of slots. On a CPU, weights are read from the mapped file straight into a slot, converted to the
dtype of the products. On a GPU, each slot has a pinned neighbour in the host's memory, from which one copy stream
brings the bytes to the device. Events keep the order both ways: a product waits until its weights have arrived, and a
copy waits until the products that used the slot before are done. The thread that draws never waits for the GPU.

A layer always finds its weights at the same address, so a CUDA graph of the computations between two streamed
sublayers stays valid, see `mogle_rt.loop.graphs`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mogle_rt.linear.contract import Further, SlotLayout, StoredLayer, WeightFormat
from mogle_rt.model.loading import LayerPlan

SLOTS = 2  # one is computed with while the other is filled
ALIGNMENT = 256  # bytes, as the allocators of PyTorch align tensors


class Worker(Protocol):
    """What runs one task after the other beside the caller, as a `ThreadPoolExecutor` with one thread does."""

    def submit(self, fn: Any, /, *args: Any) -> Future[None]: ...


def slot_bytes(layouts: Sequence[SlotLayout]) -> int:
    """Bytes that a sublayer's weights take in a slot. layouts: of its layers."""
    return sum(_aligned(math.prod(shape) * dtype.itemsize) for layout in layouts for shape, dtype in layout)


def _aligned(number: int) -> int:
    return -(-number // ALIGNMENT) * ALIGNMENT


def _views(slot: Tensor, layouts: Sequence[SlotLayout]) -> list[list[Tensor]]:
    """The tensors of a sublayer's layers, one after the other in a slot of bytes."""
    views, begin = [], 0
    for layout in layouts:
        of_layer = []
        for shape, dtype in layout:
            size = math.prod(shape) * dtype.itemsize
            of_layer.append(slot[begin : begin + size].view(dtype).view(shape))
            begin += _aligned(size)
        views.append(of_layer)
    return views


@dataclass
class _Layer:
    """How to read the weight of a layer."""

    plan: LayerPlan
    further: Further


class Ring(ABC):
    """Slots of memory in which the weights of streamed sublayers take turns.

    Args:
        sublayers: all of a step, in order, each with the plans of its layers.
        streamed: places of the streamed ones among them, ascending.
        device: of the products.
        worker: fills the slots; by default a thread of the ring's own.

    Attributes:
        numbers: of the streamed sublayers, by their place among all.
        nbytes: bytes of the slots on the device.
    """

    def __init__(
        self,
        sublayers: Sequence[Sequence[LayerPlan]],
        streamed: Sequence[int],
        device: torch.device,
        worker: Worker | None = None,
    ) -> None:
        self.numbers: Mapping[int, int] = {place: number for number, place in enumerate(streamed)}
        self.device = device
        self._layouts = [
            [plan.weight_format.slot_layout(plan.stored, plan.shape) for plan in sublayers[place]] for place in streamed
        ]
        self._layers: list[dict[int, _Layer]] = [{} for _ in streamed]
        self._plans = [sublayers[place] for place in streamed]
        count = min(SLOTS, len(streamed))
        size = max(map(slot_bytes, self._layouts))
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(count)]
        self.nbytes = count * size
        self._worker = worker or ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._free = [True] * count
        self._next = 0  # the sublayer whose weights are asked for next
        self._coming: deque[tuple[int, Future[None]]] = deque()  # asked for, and not yet acquired

    def slot_of(self, number: int) -> int:
        """The slot of a streamed sublayer, always the same."""
        return number % len(self.slots)

    def hold(self, place: int, leaf: int, stored: StoredLayer, further: Further) -> WeightFormat:
        """See `mogle_rt.model.loading.LayerStream.hold`."""
        number = self.numbers[place]
        plan = self._plans[number][leaf]
        on_cpu = Further(*(None if t is None else t.cpu() for t in (further.columns, further.rows)))
        self._layers[number][leaf] = _Layer(plan, on_cpu)
        in_slot = _views(self.slots[self.slot_of(number)], self._layouts[number])[leaf]
        return plan.weight_format.in_slot(stored, further, plan.parts, in_slot)

    def acquire(self, number: int) -> None:
        """Wait until the weights of a streamed sublayer are in their slot, or, on a GPU, until their copy is queued.

        Raises:
            CheckpointError, OSError: the weights can't be read.
        """
        if not self._coming or self._coming[0][0] != number:
            self.restart(number)
        _, filled = self._coming.popleft()
        filled.result()
        self._wait_for_copy(self.slot_of(number))

    def release(self, number: int) -> None:
        """Give the slot of a sublayer, which was computed or queued, to the next that needs it."""
        slot = self.slot_of(number)
        self._mark_used(slot)
        self._free[slot] = True
        self._ask()

    def restart(self, number: int = 0) -> None:
        """Begin anew with a sublayer, wherever the ring stood: at the first step, or after an error or an interrupt."""
        while self._coming:
            _, filled = self._coming.popleft()
            with suppress(Exception):  # it belongs to a step that is no longer computed
                filled.result()
        for slot in range(len(self.slots)):
            self._mark_used(slot)
            self._free[slot] = True
        self._next = number
        self._ask()

    def _ask(self) -> None:
        """Have the next sublayers' weights read, as long as their slots are free. After the last comes the first."""
        while self._free[slot := self.slot_of(self._next)]:
            self._free[slot] = False
            self._coming.append((self._next, self._worker.submit(self._fill, self._next, slot)))
            self._next = (self._next + 1) % len(self._layers)

    @torch.inference_mode()
    def _read(self, number: int, into: Tensor) -> None:
        """Read the weights of a streamed sublayer into a slot of the host's memory."""
        views = _views(into, self._layouts[number])
        for leaf, layer in self._layers[number].items():
            layer.plan.weight_format.fill_slot(layer.plan.stored, layer.further, views[leaf])

    @abstractmethod
    def _fill(self, number: int, slot: int) -> None:
        """Bring the weights of a streamed sublayer into a slot. Called by the worker."""

    @abstractmethod
    def _wait_for_copy(self, slot: int) -> None:
        """Let what is computed from now on wait for the slot's copy."""

    @abstractmethod
    def _mark_used(self, slot: int) -> None:
        """Let the slot's next copy wait for what was computed until now."""


class HostRing(Ring):
    """A ring in the CPU's memory."""

    def _fill(self, number: int, slot: int) -> None:
        self._read(number, self.slots[slot])

    def _wait_for_copy(self, slot: int) -> None:
        pass  # it is done when the worker is

    def _mark_used(self, slot: int) -> None:
        pass  # a sublayer is computed when its call returns


class CudaRing(Ring):
    """A ring in a GPU's memory, filled through pinned memory by one copy stream.

    Attributes:
        host_bytes: bytes of pinned memory.
    """

    def __init__(
        self,
        sublayers: Sequence[Sequence[LayerPlan]],
        streamed: Sequence[int],
        device: torch.device,
        worker: Worker | None = None,
    ) -> None:
        super().__init__(sublayers, streamed, device, worker)
        self._pinned = [pinned_bytes(len(slot)) for slot in self.slots]
        self.host_bytes = sum(len(host) for host in self._pinned)
        self._copies = torch.cuda.Stream(device)
        self._arrived = [torch.cuda.Event() for _ in self.slots]
        self._used = [torch.cuda.Event() for _ in self.slots]

    def _fill(self, number: int, slot: int) -> None:
        self._arrived[slot].synchronize()  # the last copy out of this pinned memory; at first there was none
        self._read(number, self._pinned[slot])
        with torch.cuda.stream(self._copies), torch.inference_mode():
            self._copies.wait_event(self._used[slot])
            self._copy(slot, slot_bytes(self._layouts[number]))
            self._arrived[slot].record(self._copies)

    def _copy(self, slot: int, size: int) -> None:
        """Queue the copy of a slot's first bytes from the host to the device."""
        self.slots[slot][:size].copy_(self._pinned[slot][:size], non_blocking=True)

    def _wait_for_copy(self, slot: int) -> None:
        torch.cuda.current_stream(self.device).wait_event(self._arrived[slot])

    def _mark_used(self, slot: int) -> None:
        self._used[slot].record(torch.cuda.current_stream(self.device))


def pinned_bytes(size: int) -> Tensor:
    """Memory of the host that a GPU reads by itself."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def make_ring(sublayers: Sequence[Sequence[LayerPlan]], streamed: Sequence[int], device: torch.device) -> Ring | None:
    """The ring for a device; None where nothing is streamed."""
    if not streamed:
        return None
    return (CudaRing if device.type == "cuda" else HostRing)(sublayers, streamed, device)


def spread(total: int, streamed: int) -> list[int]:
    """Places of ``streamed`` of ``total`` sublayers, spread evenly, so that copies find as much time everywhere.

    >>> spread(6, 3)
    [1, 3, 5]
    """
    return [(number + 1) * total // streamed - 1 for number in range(streamed)]
