"""Steps of text and image alone, over the condition's kept keys and values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mogle_rt import ConfigError, FastConfig, Pipeline
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.bundle.schema import transformer_tensors
from mogle_rt.config import ModelConfig
from mogle_rt.conversion.lora import LowRank
from mogle_rt.engines.contract import Conditions
from mogle_rt.engines.torch_engine import TorchEngine
from mogle_rt.engines.velocity import VelocityLoop
from mogle_rt.fast.course import Kind
from mogle_rt.loop.denoise import denoise
from mogle_rt.loop.graphs import GRAPH
from mogle_rt.loop.schedule import make_schedule
from mogle_rt.loop.step import Step
from mogle_rt.model.transformer import sublayers
from tests.conftest import needs_triton
from tests.linear.quantised import quantised_bundle
from tests.loop.test_graphs import FakeCuda, asked_of, bundle
from tests.loop.test_reuse import STEPS, drawn, noise, schedule_of

__all__ = ["bundle"]  # a fixture

CPU = torch.device("cpu")
EVERY_3 = FastConfig(refresh_every=3)
WITH_MASK = FastConfig(steps_mask="110110101", refresh_every=2)
SWITCHES: list[tuple[dict[str, bool], float]] = [
    ({}, 1.0),
    ({"add_cond_attn": True, "latent_lora": True}, 1.0),
    ({"add_cond_attn": True, "weight_is_scale": True}, 1.0),
    ({"independent_condition": True}, 1.0),
    ({"union_cond_attn": False}, 1.0),
    ({}, 0.5),
]


def engine_of(bundle: Bundle, kernels: str | None = None, **options: Any) -> TorchEngine:
    model = ModelConfig(**options.pop("switches", {}))
    return TorchEngine(bundle, CPU, torch.float32, model, kernels=kernels, **options)


def velocities(step: Step) -> tuple[Tensor, Tensor]:
    """Of the present latents: in a whole step, and in one that keeps what this step has of the condition."""
    index = step.buffers.index.clone()
    latents = step.buffers.latents.clone()
    made = []
    for kind in (Kind.WHOLE, Kind.KEPT):
        step.buffers.latents.copy_(latents)
        step.buffers.index.copy_(index)
        for scratch in (step.buffers.qkv, step.buffers.condition):
            scratch.fill_(torch.nan)  # nothing but what is kept may come from the whole step
        step.advance(kind)
        made.append(step.buffers.velocity.clone())
    return made[0], made[1]


@pytest.mark.parametrize(("switches", "condition_scale"), SWITCHES, ids=str)
@pytest.mark.parametrize("kernels", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("batch", [1, 2])
def test_for_the_same_latents_nothing_changes(
    bundle: Bundle, switches: dict[str, bool], condition_scale: float, kernels: str, batch: int
) -> None:
    """What is kept is what the condition's rows would be; all other rows are computed as in a whole step."""
    asked = replace(asked_of(bundle)(1, batch=batch), condition_scale=condition_scale, fast=EVERY_3)
    engine = engine_of(bundle, kernels, switches=switches)
    engine.prepare(asked, schedule_of(bundle))
    engine.start(noise(batch), 1)
    with torch.inference_mode():
        whole, kept = velocities(engine.prepared)
    assert (whole - kept).abs().max() < 2e-5 * whole.abs().max()


def test_what_was_kept_is_used(bundle: Bundle) -> None:
    """A condition that sees itself alone depends on its tokens alone: with those of the first step, a whole step gives
    the same velocity."""
    kept, plain = (engine_of(bundle, switches={"independent_condition": True}) for _ in range(2))
    asked, schedule = asked_of(bundle)(1), schedule_of(bundle)
    kept.prepare(replace(asked, fast=EVERY_3), schedule)
    plain.prepare(asked, schedule)
    kept.start(noise(), 0)
    kept.advance()
    tokens = plain.condition(noise(), 0)
    for k in (1, 2):
        latents = kept.latents()
        expected = plain.velocity(latents, tokens, k)
        kept.advance()
        made = kept.prepared.buffers.velocity.transpose(0, 1)
        assert (made - expected).abs().max() < 2e-5 * expected.abs().max()
        assert (made - plain.step(latents, k)).abs().max() > 1e-4 * expected.abs().max()
    latents = kept.latents()
    kept.advance()  # computes the condition anew
    made = kept.prepared.buffers.velocity.transpose(0, 1)
    assert torch.equal(made, plain.step(latents, 3))


def test_which_steps_compute_the_condition(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[str] = []
    advance = Step.advance

    def noted(step: Step, kind: Kind = Kind.WHOLE) -> None:
        kinds.append({Kind.WHOLE: "W", Kind.KEPT: "k", Kind.REUSED: "."}[kind])
        advance(step, kind)

    monkeypatch.setattr(Step, "advance", noted)
    for fast, expected in ((EVERY_3, "WkkWkkWkk"), (WITH_MASK, "Wk.Wk.W.k")):
        kinds.clear()
        engine = engine_of(bundle)
        drawn(engine, bundle, replace(asked_of(bundle)(1), fast=fast))
        assert "".join(kinds) == expected
        assert engine.computed_steps == STEPS - expected.count(".")
        assert engine.condition_steps == expected.count("W")


@pytest.mark.parametrize("kernels", ["torch", pytest.param("triton", marks=needs_triton)])
def test_styles(bundle: Bundle, kernels: str) -> None:
    """They act on text and image, in such steps too."""
    engine, g = engine_of(bundle, kernels), torch.Generator().manual_seed(0)
    shapes = transformer_tensors(bundle.config.transformer).items()
    layers = {name.removesuffix(".weight"): shape for name, shape in shapes if len(shape) == 2}
    engine.styles.load(
        "style",
        {n: LowRank(torch.randn(3, i, generator=g), torch.randn(o, 3, generator=g)) for n, (o, i) in layers.items()},
        0.1,
    )
    engine.prepare(replace(asked_of(bundle)(1), fast=EVERY_3), schedule_of(bundle))
    engine.start(noise(), 1)
    with torch.inference_mode():
        whole, kept = velocities(engine.prepared)
    assert (whole - kept).abs().max() < 2e-5 * whole.abs().max()


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_weights_of_fewer_bits(tiny_bundle: Path, tmp_path: Path, weights: str) -> None:
    engine = engine_of(small := Bundle(quantised_bundle(tiny_bundle, tmp_path / "small.safetensors", weights)))
    engine.prepare(replace(asked_of(small)(1), fast=EVERY_3), schedule_of(small))
    engine.start(noise(), 1)
    with torch.inference_mode():
        whole, kept = velocities(engine.prepared)
    assert weights in engine.weight_formats
    assert (whole - kept).abs().max() < 2e-5 * whole.abs().max()


@pytest.mark.quick
@pytest.mark.parametrize("fast", [EVERY_3, WITH_MASK], ids=str)
def test_nothing_of_another_call_is_used(bundle: Bundle, fast: FastConfig) -> None:
    asked = asked_of(bundle)
    calls = [
        replace(asked(seed, text=text), fast=mode)
        for seed, text, mode in [(1, 5, fast), (2, 5, fast), (3, 6, fast), (2, 5, fast), (2, 5, None), (2, 5, fast)]
    ]
    engine, exact = engine_of(bundle), drawn(engine_of(bundle), bundle, replace(calls[1], fast=None))
    for call in calls:
        assert torch.equal(drawn(engine, bundle, call), drawn(engine_of(bundle), bundle, call))
    assert (drawn(engine, bundle, calls[1]) - exact).abs().max() > 1e-4 * exact.abs().max()


def test_the_condition_is_computed_after_an_edit(bundle: Bundle) -> None:
    asked, after = replace(asked_of(bundle)(1), fast=EVERY_3), list[Tensor]()

    def edit(k: int, latents: Tensor) -> Tensor:
        after.append(latents.mul_(1.5).clone() if k == 3 else latents.clone())
        return latents

    engine = engine_of(bundle)
    made = drawn(engine, bundle, asked, edit)
    assert engine.condition_steps == 4  # 0, 3, 4 and 7
    fresh, schedule = engine_of(bundle), schedule_of(bundle)
    fresh.prepare(asked, schedule)
    assert torch.equal(made, denoise(fresh, after[3], schedule, first=4))


def test_images_of_a_batch_are_those_drawn_alone(bundle: Bundle) -> None:
    asked = replace(asked_of(bundle)(1, batch=2), fast=WITH_MASK)
    both = drawn(engine_of(bundle), bundle, asked)
    for i in range(2):
        rows = slice(i, i + 1)
        one = Conditions.from_mask_latents(
            asked.masks.stacked()[rows],
            prompt_embeds=asked.prompt_embeds[rows],
            pooled_prompt_embeds=asked.pooled_prompt_embeds[rows],
            **{n: getattr(asked, n) for n in ("guidance_scale", "grid", "position_delta", "fast")},
        )
        engine, schedule = engine_of(bundle), schedule_of(bundle)
        engine.prepare(one, schedule)
        alone = denoise(engine, noise(2)[rows], schedule)
        assert (both[rows] - alone).abs().max() < 2e-5 * alone.abs().max()


def test_each_kind_has_its_graph(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warming up and capturing leave no trace."""
    asked = replace(asked_of(bundle)(1), fast=WITH_MASK)
    expected = drawn(engine_of(bundle), bundle, asked)
    cuda = FakeCuda(monkeypatch)
    cuda.engine = engine = engine_of(bundle)
    for _ in range(2):
        assert torch.equal(drawn(engine, bundle, asked), expected)
        assert engine.execution == GRAPH
        assert len(cuda.captures) == 3


def test_streamed_weights(bundle: Bundle) -> None:
    """The same, bit for bit."""
    asked = replace(asked_of(bundle)(1), fast=WITH_MASK)
    places = range(len(sublayers(bundle.config.transformer)))
    streamed = engine_of(bundle, streamed=tuple(places))
    assert torch.equal(drawn(streamed, bundle, asked), drawn(engine_of(bundle), bundle, asked))


def test_what_is_kept_is_counted(bundle: Bundle) -> None:
    """A key and a value for each row of the condition in every block."""
    engine, asked, t = engine_of(bundle), asked_of(bundle)(1, batch=2), bundle.config.transformer
    drawn(engine, bundle, asked)
    plain = engine.prepared.nbytes
    drawn(engine, bundle, replace(asked, fast=EVERY_3))
    blocks, rows = t.num_layers + t.num_single_layers, 2 * asked.masks.tokens
    assert engine.prepared.nbytes - plain == blocks * rows * 2 * t.width * 4


def test_exported_engines_refuse(tiny_bundle: Path, bundle: Bundle) -> None:
    class Exported(VelocityLoop):
        def step(self, latents: Tensor, k: int) -> Tensor:
            return latents

    schedule = make_schedule(bundle.config.scheduler, STEPS, 6)
    with pytest.raises(ConfigError, match="refresh_every=3 needs engine torch: exported engines compute whole steps"):
        Exported().follow(schedule, CPU, replace(asked_of(bundle)(1), fast=EVERY_3))
    pipe = Pipeline(tiny_bundle, device="cpu")
    pipe._options = pipe._options | {"engine": "onnxruntime"}
    with pytest.raises(ConfigError, match="refresh_every=3 needs engine torch"):
        pipe.fast = EVERY_3


@pytest.mark.quick
def test_a_pipeline_tells_how_many_steps(tiny_bundle: Path) -> None:
    pipe = Pipeline(tiny_bundle, device="cpu", dtype="fp32", fast={"refresh_every": 2})
    pipe.set_progress_bar_config(disable=True)

    def draw() -> Tensor:
        made: Any = pipe(num_inference_steps=4, height=32, width=32, seed=1, output_type="latent").images
        return made

    kept = draw()
    assert (pipe.last_run.computed_steps, pipe.last_run.condition_steps) == (4, 2)
    assert torch.equal(draw(), kept)
    pipe.fast = None
    exact = draw()
    assert (pipe.last_run.computed_steps, pipe.last_run.condition_steps) == (4, 4)
    assert (kept - exact).abs().max() > 1e-5 * exact.abs().max()
