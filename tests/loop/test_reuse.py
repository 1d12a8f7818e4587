"""Steps that aren't computed: what they do to the latents, and that nothing of another run or image is ever used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mogle_rt import FastConfig, Pipeline
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.config import ModelConfig
from mogle_rt.engines.contract import Conditions
from mogle_rt.engines.torch_engine import TorchEngine
from mogle_rt.engines.velocity import VelocityLoop
from mogle_rt.fast.course import Kind
from mogle_rt.loop.denoise import denoise, euler
from mogle_rt.loop.graphs import GRAPH
from mogle_rt.loop.schedule import Schedule, make_schedule
from mogle_rt.loop.step import Step
from tests.loop.test_graphs import GRID, FakeCuda, asked_of, bundle

__all__ = ["bundle"]  # a fixture

CPU = torch.device("cpu")
STEPS = 9
MASK = FastConfig(steps_mask="110100001")
LAST = replace(MASK, order=0)
WAYS = pytest.mark.parametrize("fast", [MASK, LAST], ids=str)
EDIT_AT = 4  # a step that isn't computed follows


def engine_of(bundle: Bundle) -> TorchEngine:
    return TorchEngine(bundle, CPU, torch.float32, ModelConfig())


def schedule_of(bundle: Bundle) -> Schedule:
    return make_schedule(bundle.config.scheduler, STEPS, GRID[0] * GRID[1])


def noise(batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(batch, GRID[0] * GRID[1], 64, generator=torch.Generator().manual_seed(seed))


def drawn(engine: TorchEngine, bundle: Bundle, asked: Conditions, on_step: Any = None) -> Tensor:
    schedule = schedule_of(bundle)
    engine.prepare(asked, schedule)
    return denoise(engine, noise(asked.masks.batch), schedule, on_step)


def by_hand(bundle: Bundle, asked: Conditions, fast: FastConfig) -> Tensor:
    """The loop written out: a computed step asks the engine for its velocity, all others take theirs from the last two."""
    engine, schedule = engine_of(bundle), schedule_of(bundle)
    engine.prepare(replace(asked, fast=None), schedule)
    latents, sigmas, known = noise(asked.masks.batch), schedule.sigmas, dict[int, Tensor]()
    for k in range(STEPS):
        if "110100001"[k] == "1":
            known[k] = velocity = engine.step(latents, k)
        else:
            (i, u), (j, velocity) = list(known.items())[-2:]
            if fast.order:
                velocity = velocity + (sigmas[k] - sigmas[j]) / (sigmas[j] - sigmas[i]) * (velocity - u)
        latents = euler(latents, velocity, sigmas[k], sigmas[k + 1])
    return latents


@WAYS
@pytest.mark.parametrize("batch", [1, 2])
def test_steps_that_are_not_computed(bundle: Bundle, fast: FastConfig, batch: int) -> None:
    """In a batch as alone: every image follows its own velocities."""
    asked = replace(asked_of(bundle)(1, batch=batch), fast=fast)
    engine = engine_of(bundle)
    made = drawn(engine, bundle, asked)
    assert engine.computed_steps == 4
    expected = by_hand(bundle, asked, fast)
    assert (made - expected).abs().max() < 1e-5 * expected.abs().max()
    other = drawn(engine, bundle, replace(asked, fast=LAST if fast is MASK else MASK))
    assert (made - other).abs().max() > 1e-3 * expected.abs().max()


def test_nothing_is_computed_in_them(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[Kind] = []
    advance = Step.advance

    def noted(step: Step, kind: Kind = Kind.WHOLE) -> None:
        kinds.append(kind)
        advance(step, kind)

    monkeypatch.setattr(Step, "advance", noted)
    monkeypatch.setattr(Step, "_transform", lambda step, section: None)
    drawn(engine_of(bundle), bundle, replace(asked_of(bundle)(1), fast=MASK))
    assert "".join("1" if kind is Kind.WHOLE else "0" for kind in kinds) == "110100001"


@WAYS
@pytest.mark.quick
def test_nothing_of_another_call_is_used(bundle: Bundle, fast: FastConfig) -> None:
    """Neither of one of the same shape, nor of one of another shape, nor of an exact one in between."""
    asked = asked_of(bundle)
    calls = [
        replace(asked(seed, text=text), fast=mode)
        for seed, text, mode in [(1, 5, fast), (2, 5, fast), (3, 6, fast), (2, 5, fast), (2, 5, None), (2, 5, fast)]
    ]
    engine = engine_of(bundle)
    for call in calls:
        assert torch.equal(drawn(engine, bundle, call), drawn(engine_of(bundle), bundle, call))


@WAYS
def test_a_stopped_call_leaves_nothing(bundle: Bundle, fast: FastConfig) -> None:
    """The next one begins with a computed step, although the step at which the last one stopped is none."""
    asked, schedule = replace(asked_of(bundle)(1), fast=fast), schedule_of(bundle)
    engine = engine_of(bundle)
    engine.prepare(asked, schedule)
    denoise(engine, noise(seed=5), schedule, stop=iter([False] * EDIT_AT + [True]).__next__)
    engine.start(noise(), EDIT_AT + 1)  # without another `prepare`
    engine.advance()
    fresh = engine_of(bundle)
    fresh.prepare(replace(asked, fast=None), schedule)
    fresh.start(noise(), EDIT_AT + 1)
    fresh.advance()
    assert torch.equal(engine.latents(), fresh.latents())


@WAYS
def test_nothing_is_reused_after_an_edit(bundle: Bundle, fast: FastConfig) -> None:
    """Where a callback changes the latents, in place or for others, the rest is what a run from there draws."""
    asked = replace(asked_of(bundle)(1), fast=fast)

    engine, after = engine_of(bundle), list[Tensor]()

    def edit(k: int, latents: Tensor) -> Tensor:
        after.append(latents.mul_(1.5).clone() if k == EDIT_AT else latents.clone())
        return latents

    made = drawn(engine, bundle, asked, edit)
    assert engine.computed_steps == 5  # one more, after the edit
    fresh, schedule = engine_of(bundle), schedule_of(bundle)
    fresh.prepare(asked, schedule)
    assert torch.equal(made, denoise(fresh, after[EDIT_AT], schedule, first=EDIT_AT + 1))


@WAYS
def test_a_callback_that_only_looks_changes_nothing(bundle: Bundle, fast: FastConfig) -> None:
    asked = replace(asked_of(bundle)(1), fast=fast)
    engine = engine_of(bundle)
    plain = drawn(engine, bundle, asked)
    assert torch.equal(drawn(engine, bundle, asked, lambda k, latents: latents), plain)
    assert torch.equal(drawn(engine, bundle, asked, lambda k, latents: None), plain)
    assert engine.computed_steps == 4


@WAYS
def test_nothing_is_reused_after_a_failure(bundle: Bundle, fast: FastConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a broken step has half written is not continued; the step itself can be done again."""
    engine, schedule = engine_of(bundle), schedule_of(bundle)
    engine.prepare(replace(asked_of(bundle)(1), fast=fast), schedule)
    engine.start(noise())
    for _ in range(EDIT_AT):
        engine.advance()
    with monkeypatch.context() as patched:
        patched.setattr(Step, "_update", lambda step, velocity: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.advance()
    computed = engine.computed_steps
    engine.advance()
    assert engine.computed_steps == computed + 1


def test_order_0_takes_the_exact_run_s_graph(bundle: Bundle) -> None:
    """Nothing more is kept for it, so a computed step is the same, operation by operation."""
    engine, asked = engine_of(bundle), asked_of(bundle)(1)
    drawn(engine, bundle, asked)
    step = engine.prepared
    drawn(engine, bundle, replace(asked, fast=LAST))
    assert engine.prepared is step
    drawn(engine, bundle, replace(asked, fast=MASK))
    assert engine.prepared is not step
    more = {id(t) for t in engine.prepared.carried} - {id(t) for t in vars(engine.prepared.buffers).values()}
    assert engine.prepared.nbytes - step.nbytes == 2 * noise().nbytes + 4
    assert len(more) == 3


@WAYS
def test_graphs_of_both_kinds(bundle: Bundle, fast: FastConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for computed steps, one for the others; warming up and capturing leave no trace."""
    asked = replace(asked_of(bundle)(1), fast=fast)
    expected = drawn(engine_of(bundle), bundle, asked)
    cuda = FakeCuda(monkeypatch)
    cuda.engine = engine = engine_of(bundle)
    for _ in range(2):
        assert torch.equal(drawn(engine, bundle, asked), expected)
        assert engine.execution == GRAPH
        assert len(cuda.captures) == 2


class Exported(VelocityLoop):
    """An engine that computes velocities alone, as exported ones do."""

    def __init__(self, bundle: Bundle) -> None:
        self.inner = engine_of(bundle)

    def prepare(self, conditions: Conditions, schedule: Schedule) -> None:
        self.inner.prepare(replace(conditions, fast=None), schedule)
        self.follow(schedule, CPU, conditions)

    def step(self, latents: Tensor, k: int) -> Tensor:
        return self.inner.step(latents, k)


@WAYS
def test_exported_engines_do_the_same(bundle: Bundle, fast: FastConfig) -> None:
    """Those that compute velocities alone."""
    engine, asked, schedule = Exported(bundle), replace(asked_of(bundle)(1), fast=fast), schedule_of(bundle)
    expected = drawn(engine_of(bundle), bundle, asked)
    for on_step in (None, lambda k, latents: latents):
        engine.prepare(asked, schedule)
        made = denoise(engine, noise(), schedule, on_step)
        assert engine.computed_steps == 4
        assert (made - expected).abs().max() < 1e-5 * expected.abs().max()
    engine.prepare(asked, schedule)
    denoise(engine, noise(), schedule, lambda k, latents: latents * 2 if k == EDIT_AT else latents)
    assert engine.computed_steps == 5


@pytest.fixture
def pipe(tiny_bundle: Path) -> Pipeline:
    pipe = Pipeline(tiny_bundle, device="cpu", dtype="fp32")
    pipe.set_progress_bar_config(disable=True)
    return pipe


Draw = Callable[..., Tensor]


@pytest.fixture
def draw(pipe: Pipeline) -> Draw:
    def latents(**options: Any) -> Tensor:
        options = {"num_inference_steps": 6, "height": 32, "width": 48, "seed": 3} | options
        result: Any = pipe(output_type="latent", **options).images
        return result

    return latents


@pytest.mark.quick
def test_off_is_as_before_and_on_is_repeatable(pipe: Pipeline, draw: Draw) -> None:
    exact = draw()
    assert pipe.last_run.computed_steps == pipe.last_run.steps == 6
    pipe.fast = "fast"
    fast = draw()
    assert (pipe.last_run.computed_steps, pipe.last_run.steps) == (3, 6)
    assert not torch.equal(fast, exact)
    assert torch.equal(draw(), fast)
    pipe.fast = FastConfig(order=0)  # nothing is left out
    assert torch.equal(draw(), exact)
    pipe.fast = None
    assert torch.equal(draw(), exact)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps(pipe: Pipeline, draw: Draw, steps: int) -> None:
    exact = draw(num_inference_steps=steps)
    pipe.fast = FastConfig(steps_mask="1000")
    made = draw(num_inference_steps=steps)
    assert pipe.last_run.computed_steps == min(steps, 2)
    assert torch.equal(made, exact) is (steps < 3)


def test_images_of_a_batch_are_those_drawn_alone(pipe: Pipeline, draw: Draw) -> None:
    pipe.fast = "fast"
    both = draw(num_images_per_prompt=2)
    for i in range(2):
        alone = draw(seed=3 + i)
        assert (both[i] - alone[0]).abs().max() < 1e-5 * alone.abs().max()


def test_edits(pipe: Pipeline) -> None:
    """What is kept stays as it is in every step; the first step of an edit is computed, wherever it begins."""
    image, mask = torch.rand(1, 3, 64, 64), np.zeros((64, 64), dtype=np.uint8)
    mask[:16] = 13
    pipe.fast = FastConfig(steps_mask="110001", order=1)
    options: dict[str, Any] = {"num_inference_steps": 6, "seed": 1, "output_type": "pt"}
    for strength, computed in ((1.0, 3), (0.7, 2), (0.1, 1)):
        made: Any = pipe.inpaint(image, mask, "red hair", "hair", strength, **options).images
        assert pipe.last_run.computed_steps == computed
        assert torch.equal(made[:, :, 48:], image[:, :, 48:])
        assert not torch.equal(made, image)


def test_copies_keep_the_mode(pipe: Pipeline) -> None:
    import pickle

    pipe.fast = MASK
    assert pickle.loads(pickle.dumps(pipe)).fast == MASK
    assert pipe.to("cpu").fast == MASK
