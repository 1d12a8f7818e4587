"""Steps that are left out while the velocity changes little: each image decides for itself, in a batch as alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mogle_rt import FastConfig
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.engines.contract import Conditions
from mogle_rt.fast.adaptive import AdaptiveCourse, Image, needs
from mogle_rt.fast.course import Kind
from mogle_rt.loop.denoise import denoise, euler
from mogle_rt.loop.graphs import GRAPH
from tests.loop.test_graphs import FakeCuda, asked_of, bundle
from tests.loop.test_reuse import STEPS, Exported, drawn, engine_of, noise, schedule_of

__all__ = ["bundle"]  # a fixture

ADAPTIVE = FastConfig(max_change=0.5, max_skips=2)
ORDERS = pytest.mark.parametrize("fast", [ADAPTIVE, replace(ADAPTIVE, order=0)], ids=str)
SIGMAS = [1.0, 0.9, 0.8, 0.6, 0.4, 0.2]


def asked(bundle: Bundle, fast: FastConfig | None, batch: int = 1, seed: int = 1) -> Conditions:
    return replace(asked_of(bundle)(seed, batch=batch), fast=fast)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("computed", "rate", "k", "needed"),
    [
        ([], 0.0, 0, True),  # the first
        ([0], 0.0, 1, True),  # one velocity says nothing of change
        ([0, 1], 0.5, 2, False),  # 0.5 · 0.1 ≤ 0.1
        ([0, 1], 1.01, 2, True),
        ([0, 1], 0.3, 3, False),
        ([0, 1], 0.34, 3, True),  # 0.34 · 0.3
        ([0, 1], 0.0, 4, True),  # two were left out
        ([0, 1, 4], 0.0, 5, True),  # the last
        ([0, 1], float("nan"), 2, True),
    ],
)
def test_what_is_needed(computed: list[int], rate: float, k: int, needed: bool) -> None:
    config = FastConfig(max_change=0.1, max_skips=2)
    assert needs(Image(computed, rate), k, config, SIGMAS, 0) is needed


@pytest.mark.quick
def test_images_decide_for_themselves() -> None:
    course = AdaptiveCourse(FastConfig(max_change=0.1), SIGMAS, 2)
    seen = []
    for k, changes in enumerate([(9.0, 9.0), (0.01, 5.0), (0.0, 5.0), (0.0, 0.0)]):
        way = course.way(k)
        seen.append((way.kind, way.fresh))
        course.done(k, changes)
    assert seen[:3] == [(Kind.WHOLE, (True, True))] * 2 + [(Kind.WHOLE, (False, True))]
    assert course.way(4).fresh == (False, False)
    assert course.way(4).kind is Kind.REUSED
    weights = course.way(4).weights
    assert weights[0] == pytest.approx((0.4 - 0.9) / (0.9 - 1.0))  # from steps 0 and 1
    assert weights[1] == pytest.approx((0.4 - 0.6) / (0.6 - 0.8))  # from steps 2 and 3
    assert course.computed == 4


def by_hand(bundle: Bundle, conditions: Conditions, x: Tensor, fast: FastConfig) -> tuple[Tensor, list[int]]:
    """One image, written out."""
    engine, schedule = engine_of(bundle), schedule_of(bundle)
    engine.prepare(replace(conditions, fast=None), schedule)
    most = fast.max_change
    assert most is not None
    sigmas, rate, known = schedule.sigmas, torch.tensor(0.0), dict[int, Tensor]()
    for k in range(STEPS):
        latest = max(known, default=-1)
        foretold = rate * (sigmas[latest] - sigmas[k])
        if k in (0, STEPS - 1) or len(known) < 2 or k - latest > fast.max_skips or foretold > most:
            velocity = engine.step(x, k)
            if known:
                rate = (velocity - known[latest]).norm() / velocity.norm() / (sigmas[latest] - sigmas[k])
            known[k] = velocity
        else:
            (i, u), (j, velocity) = list(known.items())[-2:]
            if fast.order:
                velocity = velocity + (sigmas[k] - sigmas[j]) / (sigmas[j] - sigmas[i]) * (velocity - u)
        x = euler(x, velocity, sigmas[k], sigmas[k + 1])
    return x, list(known)


@ORDERS
def test_a_run(bundle: Bundle, fast: FastConfig) -> None:
    engine = engine_of(bundle)
    made = drawn(engine, bundle, asked(bundle, fast))
    expected, computed = by_hand(bundle, asked(bundle, None), noise(), fast)
    assert (made - expected).abs().max() < 1e-5 * expected.abs().max()
    assert engine.computed_steps == len(computed) < STEPS
    assert torch.equal(drawn(engine, bundle, asked(bundle, fast)), made)


@ORDERS
def test_images_of_a_batch_are_those_drawn_alone(bundle: Bundle, fast: FastConfig) -> None:
    """Also where they leave out different steps."""
    both = asked(bundle, fast, batch=2)
    made = drawn(engine_of(bundle), bundle, both)
    courses = []
    for i in range(2):
        rows = slice(i, i + 1)
        one = Conditions.from_mask_latents(
            both.masks.stacked()[rows],
            prompt_embeds=both.prompt_embeds[rows],
            pooled_prompt_embeds=both.pooled_prompt_embeds[rows],
            **{n: getattr(both, n) for n in ("guidance_scale", "grid", "position_delta")},
        )
        alone, computed = by_hand(bundle, one, noise(2)[rows], fast)
        courses.append(computed)
        assert (made[rows] - alone).abs().max() < 2e-5 * alone.abs().max()
    assert courses[0] != courses[1]


@pytest.mark.quick
def test_no_change_allowed_is_exact(bundle: Bundle) -> None:
    engine = engine_of(bundle)
    made = drawn(engine, bundle, asked(bundle, FastConfig(max_change=0.0)))
    assert engine.computed_steps == STEPS
    assert torch.equal(made, drawn(engine, bundle, asked(bundle, None)))


@ORDERS
def test_nothing_of_another_call_is_used(bundle: Bundle, fast: FastConfig) -> None:
    engine = engine_of(bundle)
    for seed, mode in ((1, fast), (2, fast), (2, None), (2, fast)):
        call = asked(bundle, mode, seed=seed)
        assert torch.equal(drawn(engine, bundle, call), drawn(engine_of(bundle), bundle, call))


@ORDERS
def test_nothing_is_reused_after_an_edit(bundle: Bundle, fast: FastConfig) -> None:
    engine, after = engine_of(bundle), list[Tensor]()

    def edit(k: int, latents: Tensor) -> Tensor:
        after.append(latents.mul_(1.5).clone() if k == 3 else latents.clone())
        return latents

    made = drawn(engine, bundle, asked(bundle, fast), edit)
    fresh, schedule = engine_of(bundle), schedule_of(bundle)
    fresh.prepare(asked(bundle, fast), schedule)
    assert torch.equal(made, denoise(fresh, after[3], schedule, first=4))


@ORDERS
def test_graphs(bundle: Bundle, fast: FastConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    call = asked(bundle, fast, batch=2)
    expected = drawn(engine_of(bundle), bundle, call)
    cuda = FakeCuda(monkeypatch)
    cuda.engine = engine = engine_of(bundle)
    for _ in range(2):
        assert torch.equal(drawn(engine, bundle, call), expected)
        assert engine.execution == GRAPH
        assert len(cuda.captures) == 2


@ORDERS
def test_exported_engines_do_the_same(bundle: Bundle, fast: FastConfig) -> None:
    engine, call, schedule = Exported(bundle), asked(bundle, fast, batch=2), schedule_of(bundle)
    torch_engine = engine_of(bundle)
    expected = drawn(torch_engine, bundle, call)
    made: Any = None
    for _ in range(2):
        engine.prepare(call, schedule)
        made = denoise(engine, noise(2), schedule)
    assert engine.computed_steps == torch_engine.computed_steps < STEPS
    assert (made - expected).abs().max() < 1e-5 * expected.abs().max()
