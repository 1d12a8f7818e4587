"""The loop does nothing on the device that isn't needed, and its progress bar counts only finished steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mogle_rt.engines.velocity import VelocityLoop
from mogle_rt.loop.blend import Kept
from mogle_rt.loop.denoise import denoise, euler
from mogle_rt.loop.progress import Progress
from mogle_rt.loop.schedule import Position, Schedule, step_capacity, with_further_rows

pytestmark = pytest.mark.quick

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
STEPS = 5
SCHEDULE = Schedule(torch.linspace(1, 0, STEPS + 1), torch.arange(STEPS), torch.arange(STEPS))


class Engine:
    """An engine that adds 1 to its latents in each step. `events` makes it like a GPU, which does queued steps later.

    Attributes:
        asked: the calls that it got. queued, finished: how many steps are.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.queued = self.finished = 0
        self._latents = torch.zeros(1, 2, 3)

    def start(self, latents: Tensor, k: int = 0) -> None:
        self.asked.append(f"start {k}")
        self._latents = latents

    def advance(self) -> None:
        self.queued += 1
        self._latents = self._latents + 1

    def latents(self) -> Tensor:
        self.asked.append("latents")
        self.finished = self.queued
        return self._latents.clone()


def test_nothing_is_copied_without_a_callback() -> None:
    """Only the result is copied. With a callback, the latents are copied for it, and back after every step."""
    engine = Engine()
    result = denoise(engine, torch.zeros(1, 2, 3), SCHEDULE, progress=Progress(CPU, lambda n: None))
    assert torch.equal(result, torch.full((1, 2, 3), float(STEPS)))
    assert engine.asked == ["start 0", "latents"]
    engine = Engine()
    result = denoise(engine, torch.zeros(1, 2, 3), SCHEDULE, lambda k, latents: latents.mul_(2))
    assert result.unique().tolist() == [2.0 + 4 + 8 + 16 + 32]
    assert engine.asked == ["start 0"] + [e for k in range(STEPS) for e in ("latents", f"start {k + 1}")] + ["latents"]


def test_on_a_cpu_a_step_counts_when_it_returns() -> None:
    engine, counted = Engine(), [0]

    def tick(steps: int) -> None:
        counted.append(counted[-1] + steps)
        assert counted[-1] == engine.queued

    denoise(engine, torch.zeros(1, 2, 3), SCHEDULE, progress=Progress(CPU, tick))
    assert counted == list(range(STEPS + 1))


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Callable[[Engine, int], list[int]]:
    """Replaces CUDA's events by those of a fake GPU, which finishes one of an engine's steps after some looks at it."""
    engine, every, looks = Engine(), 1, [0]

    class Event:
        def record(self, stream: object) -> None:
            assert stream == "stream of cuda"
            self.step = engine.queued

        def query(self) -> bool:
            looks[0] += 1
            if looks[0] % every == 0:
                engine.finished = min(engine.finished + 1, engine.queued)
            return self.step <= engine.finished

        def synchronize(self) -> None:
            raise AssertionError("the host waits for the GPU")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", Event.synchronize)
    monkeypatch.setattr("mogle_rt.loop.progress.POLL", 0)

    def behind(of: Engine, looks_a_step: int) -> list[int]:
        nonlocal engine, every
        engine, every = of, looks_a_step
        return looks

    return behind


@pytest.mark.parametrize("looks_a_step", [1, 3, 100])
def test_on_a_gpu_a_step_counts_when_its_event_has_come(
    looks_a_step: int, events: Callable[[Engine, int], list[int]]
) -> None:
    """The bar never runs ahead of the GPU, the host never waits in the loop, and in the end all steps are counted."""
    engine, bar = Engine(), [0]
    looks = events(engine, looks_a_step)

    def tick(steps: int) -> None:
        bar[0] += steps
        assert bar[0] <= engine.finished

    progress, seen = Progress(CUDA, tick), []

    def stop() -> bool:  # asked after every step
        seen.append((engine.queued, bar[0], looks[0]))
        return False

    denoise(engine, torch.zeros(1, 2, 3), SCHEDULE, stop=stop, progress=progress)
    assert bar == [STEPS]
    assert [queued for queued, *_ in seen] == [1, 2, 3, 4, 5]
    if looks_a_step == 100:
        assert [(counted, n) for _, counted, n in seen] == [(0, k) for k in range(1, 6)]  # the host looks once a step


def test_interrupted_steps_do_not_count(events: Callable[[Engine, int], list[int]]) -> None:
    engine, bar = Engine(), [0]
    events(engine, 2)

    def tick(steps: int) -> None:
        bar[0] += steps

    denoise(engine, torch.zeros(1, 2, 3), SCHEDULE, stop=lambda: engine.queued == 3, progress=Progress(CUDA, tick))
    assert bar == [3]


class Still(VelocityLoop):
    """A loop whose velocities are 0, so its latents stay."""

    def step(self, latents: Tensor, k: int) -> Tensor:
        return torch.zeros_like(latents)


def test_steps_past_the_end_are_refused() -> None:
    engine = Still()
    with pytest.raises(RuntimeError, match=r"prepare\(\) must be called before a step"):
        engine.advance()
    engine.follow(SCHEDULE, CPU)
    engine.start(torch.zeros(1, 2, 3), STEPS - 1)
    engine.advance()
    with pytest.raises(IndexError, match=r"all 5 steps of the schedule are done: call start\(\)"):
        engine.advance()
    with pytest.raises(IndexError, match="step must be 0 to 5, as the schedule has 5 steps, got 6"):
        engine.start(torch.zeros(1, 2, 3), STEPS + 1)
    engine.start(torch.zeros(1, 2, 3), 0)
    engine.advance()
    engine.follow(SCHEDULE, CPU)  # a new run begins at its first step
    for _ in range(STEPS):
        engine.advance()


def test_a_failed_step_can_be_done_again() -> None:
    position = Position(2)
    assert [position.next_step(), position.next_step()] == [0, 0]
    position.go_to(2)
    with pytest.raises(IndexError):
        position.next_step()
    with pytest.raises(IndexError, match="got -1"):
        position.go_to(-1)


def test_tables_have_room_for_more_steps() -> None:
    assert [step_capacity(s) for s in (1, 8, 9, 16, 28, 32, 33, 1000)] == [8, 8, 16, 16, 32, 32, 64, 1024]
    rows = torch.tensor([[1.0], [2.0]])
    assert with_further_rows(rows, 4, -1.0).tolist() == [[1.0], [2.0], [-1.0], [-1.0]]
    assert with_further_rows(rows, 2).data_ptr() != rows.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_update_is_rounded_once(dtype: torch.dtype) -> None:
    """The difference of two neighbouring noise levels has more digits than the dtype."""
    latents, velocity = torch.randn(2, 1, 50, 64).to(dtype)
    velocity *= 100  # so that the difference decides the result
    sigma, sigma_next = torch.tensor(0.6789), torch.tensor(0.6543)
    exact = latents.double() + (sigma_next.double() - sigma.double()) * velocity.double()
    error = (euler(latents, velocity, sigma, sigma_next).double() - exact).abs()
    half_a_step = torch.finfo(dtype).eps / 2
    assert bool((error <= 1.01 * half_a_step * exact.abs() + 1e-5).all())


def test_the_noise_levels_of_an_edit_are_not_rounded() -> None:
    """In bfloat16 the image that an edit keeps gets the same noise levels as the schedule's."""
    one, sigmas = torch.ones(1, 2, 3), torch.tensor([0.6789, 0.6543, 0.0])
    kept = Kept(original=one, difference=one, amount=one, sigmas=sigmas)
    assert torch.equal(kept.to(CPU, torch.bfloat16).sigmas, sigmas)
