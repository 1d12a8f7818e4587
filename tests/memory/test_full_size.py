"""The released model on a GPU of 8 GB, run on fake CUDA tensors: as much memory is counted as was planned, steps wait
for nothing, and copies run beside computations."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mogle_rt.bundle import schema
from mogle_rt.config import FLUX_DEV, NUM_EXPERTS, ModelConfig
from mogle_rt.cost.counting import counting
from mogle_rt.cost.demand import Run, demand
from mogle_rt.cost.job import FLUX_BUNDLE, FLUX_TEXT, WeightlessBundle
from mogle_rt.engines.contract import Conditions
from mogle_rt.engines.torch_engine import TorchEngine
from mogle_rt.loop.schedule import Schedule
from mogle_rt.loop.step import Section, Step
from mogle_rt.memory import streaming
from mogle_rt.memory.budget import CUDA_BYTES
from mogle_rt.memory.planner import TABLES_KEPT, make_plan
from mogle_rt.memory.streaming import CudaRing
from tests.conftest import make_once, needs_triton
from tests.loop.fake_cuda import compile_guard, fake_mode, install_guard, trace
from tests.memory.test_streaming import AtOnce

pytestmark = needs_triton

CUDA = torch.device("cuda")
STEPS = 28


@pytest.fixture(scope="module", autouse=True)
def _cuda_guard(shared_folder: Path) -> None:
    if torch.version.cuda is None:
        install_guard(make_once(shared_folder / "no_op_cuda_guard.so", compile_guard))


Happened = tuple[str, int]


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[Happened]:
    """What is queued on the two streams, in this order. Nothing is really copied or read."""
    noted: list[Happened] = []
    names = iter(range(99))

    class Event:
        def __init__(self) -> None:
            self.name = next(names)

        def record(self, stream: object) -> None:
            noted.append(("record", self.name))

        def synchronize(self) -> None:
            noted.append(("host waits", self.name))

    def stream(*_: object) -> SimpleNamespace:
        return SimpleNamespace(wait_event=lambda event: noted.append(("wait", event.name)))

    run = Step.run

    def section(step: Step, part: Section) -> None:
        noted.append(("compute", -1 if part.streamed is None else part.streamed))
        run(step, part)

    for name, fake in {"Event": Event, "Stream": stream, "current_stream": stream}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(streaming, "pinned_bytes", lambda size: torch.empty(size, dtype=torch.uint8, device="cpu"))
    monkeypatch.setattr(CudaRing, "_read", lambda ring, number, into: noted.append(("read", number)))
    monkeypatch.setattr(CudaRing, "_copy", lambda ring, slot, size: noted.append(("copy", slot)))
    monkeypatch.setattr(Step, "run", section)

    def ring(sublayers: Any, places: Any, device: torch.device) -> CudaRing | None:
        return CudaRing(sublayers, places, device, AtOnce()) if places else None

    monkeypatch.setattr("mogle_rt.engines.torch_engine.make_ring", ring)
    return noted


@pytest.mark.parametrize(("weights", "fewest", "most"), [(None, 40, 60), ("int8", 20, 40)])
def test_eight_gigabytes_are_enough(weights: str | None, fewest: int, most: int, order: list[Happened]) -> None:
    ranks = dict.fromkeys(schema.lora_modules(FLUX_DEV), 4)
    source = WeightlessBundle(FLUX_BUNDLE, ranks, weights=weights)
    run = Run(device=CUDA, dtype=torch.bfloat16, height=512, width=512, steps=STEPS, vae=83_819_683, text=FLUX_TEXT)
    needed = demand(source, run)
    plan = make_plan(needed, device="cuda", room=8 * 10**9 - CUDA_BYTES, set_aside=CUDA_BYTES)
    assert fewest < len(plan.streamed) < most
    with fake_mode(), counting() as counter, torch.inference_mode():

        def empty(*shape: int) -> Tensor:
            return torch.empty(*shape, device=CUDA, dtype=torch.bfloat16)

        engine = TorchEngine(source, CUDA, torch.bfloat16, ModelConfig(), cuda_graphs=False, streamed=plan.streamed)
        conditions = Conditions.from_mask_latents(
            empty(1, NUM_EXPERTS, 1024, 64),
            prompt_embeds=empty(1, 512, FLUX_DEV.joint_attention_dim),
            pooled_prompt_embeds=empty(1, FLUX_DEV.pooled_projection_dim),
            guidance_scale=3.5,
            grid=(32, 32),
        )
        engine.prepare(conditions, Schedule(torch.empty(STEPS + 1), torch.empty(STEPS), torch.empty(STEPS)))
        counter.take()
        engine.prepared.advance()
        counted = counter.take().peak
        order.clear()
        first = trace(engine.prepared.advance)  # raises where a step waits, or copies between host and device
        half = len(order)
        assert trace(engine.prepared.advance) == first

    # The plan also counts what isn't here: the VAE, and the tables of earlier runs, which a pipeline keeps.
    planned = plan.stages["denoise"] - needed.vae - (TABLES_KEPT - 1) * needed.tables
    assert counted == pytest.approx(planned, rel=0.05)
    assert counted + CUDA_BYTES < 8e9

    # Look at the second of these two steps. The weights of its first sublayers were asked for in the first step.
    computed = [(at, n) for at, (kind, n) in enumerate(order) if kind == "compute" and at >= half and n >= 0]
    assert [number for _, number in computed] == list(range(len(plan.streamed)))
    for (at, number), before in zip(computed, [half - 6, *(at for at, _ in computed)], strict=False):
        # Before a sublayer is queued, its successor's weights are on their way: copies run beside computations.
        assert ("read", (number + 1) % len(computed)) in order[before - 6 : at]
        # Right before it, the stream of computations waits for the copy of its weights. Right after it, an event records
        # that its slot is free.
        assert order[at - 1][0] == "wait"
        assert order[at + 1][0] == "record"
    # The host waits only where pinned memory is filled again, never for a computation.
    after_copies = [now for before, now in itertools.pairwise(order) if before[0] == "copy"]
    assert {kind for kind, _ in after_copies} == {"record"}
    assert {name for kind, name in order if kind == "host waits"} == {name for _, name in after_copies}
