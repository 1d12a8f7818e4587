"""The reference's own inputs and outputs (tests/golden): every tensor of every case."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.baseline import Baseline
from mogle_rt import Pipeline
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.config import NUM_CLASSES, ModelConfig
from mogle_rt.encoders.group_norm import LEAST_PIXELS
from mogle_rt.engines.torch_engine import TorchEngine
from mogle_rt.loop.denoise import euler
from mogle_rt.loop.schedule import make_schedule
from tests.checkpoints import Files
from tests.conftest import CASES, GOLDEN, GoldenCase, assert_close, in_the_interpreter, relative_rms

TOLERANCE = 1e-5
CPU = torch.device("cpu")

Bundles = Callable[[str], Path]


def run_steps(
    case: GoldenCase,
    bundle: Bundle,
    model: ModelConfig,
    kernels: str,
    mixture: str | None,
    alone: Collection[int] | None = None,
) -> dict[str, Tensor]:
    """The case's loop, with the names of the golden tensors; or these steps alone, each from the golden latents."""
    height, width = case.size
    schedule = make_schedule(bundle.config.scheduler, case.settings["steps"], height * width // 256)
    engine = TorchEngine(bundle, CPU, torch.float32, model, kernels=kernels, mixture=mixture)
    engine.prepare(case.conditions, schedule)
    trace: dict[str, Tensor] = {}
    latents = case.tensors["noise"]
    for k in range(len(schedule)) if alone is None else alone:
        latents = latents if alone is None else case.tensors[f"latents.{k}"]
        trace[f"t.{k}"], trace[f"latents.{k}"] = schedule.timesteps[k : k + 1], latents
        trace[f"cond.{k}"] = engine.condition(latents, k)
        trace[f"noise_pred.{k}"] = engine.velocity(latents, trace[f"cond.{k}"], k)
        latents = euler(latents, trace[f"noise_pred.{k}"], schedule.sigmas[k], schedule.sigmas[k + 1])
    return trace | {"final_latents": latents}


@pytest.mark.quick
def test_every_case_is_here() -> None:
    assert len(CASES) == 16
    seen = {int(c) for name in CASES for c in GoldenCase.load(name).tensors["labels"].unique()}
    assert seen == set(range(NUM_CLASSES))


WAYS: list[tuple[str, str, str | None]] = [(name, kernels, None) for name in CASES for kernels in ("torch", "triton")]
WAYS += [(name, kernels, "fused") for name in ("base", "not_square") for kernels in ("torch", "triton")]


@pytest.mark.parametrize("name", CASES)
def test_steps_with_the_librarys_attention(name: str, golden_bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in long sequences and on GPUs; golden ones are short, and a CPU takes plain products there."""
    monkeypatch.setattr("mogle_rt.ops.attention.WHOLE_SCORES", 0)
    test_steps(name, "torch", None, golden_bundle)


@pytest.mark.parametrize(
    ("name", "kernels", "mixture"),
    [pytest.param(*way, marks=in_the_interpreter if way[1] == "triton" else pytest.mark.quick) for way in WAYS],
)
def test_steps(name: str, kernels: str, mixture: str | None, golden_bundle: Bundles) -> None:
    case = GoldenCase.load(name)
    last = case.settings["steps"] - 1
    # Triton's interpreter is slow: it runs the last step of each case, and of one case the first one too.
    alone = ({0, last} if name == "base" else {last}) if kernels == "triton" else None
    trace = run_steps(case, Bundle(golden_bundle(case.settings["checkpoint"])), case.model, kernels, mixture, alone)
    compared = [
        key for key in case.tensors if key.split(".")[0] in ("t", "latents", "cond", "noise_pred", "final_latents")
    ]
    if alone is not None:
        compared = [key for key in compared if key == "final_latents" or int(key.split(".")[1]) in alone]
    assert len(compared) >= (9 if alone is None else 4 * len(alone) + 1)  # of every case at least two steps are kept
    for key in compared:
        assert_close(trace[key], case.tensors[key], rms=TOLERANCE)


# The layout of pictures within the VAE has nothing to do with the switches of a case: two sizes show it.
LAYOUTS = [(name, LEAST_PIXELS) for name in CASES] + [("base", 0), ("not_square", 0)]


@pytest.mark.parametrize(
    ("name", "channels_last_from"), [pytest.param(*way, id="-".join(map(str, way))) for way in LAYOUTS]
)
def test_pipeline(name: str, channels_last_from: int, golden_bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the labels to the image, through the public call."""
    monkeypatch.setattr("mogle_rt.encoders.group_norm.LEAST_PIXELS", channels_last_from)
    case = GoldenCase.load(name)
    height, width = case.size
    pipe = Pipeline(golden_bundle(case.settings["checkpoint"]), device="cpu", dtype="fp32", model_config=case.model)
    labels = case.tensors["labels"]
    assert_close(pipe.conditioner([labels.numpy()]).stacked(), case.tensors["mask_latents"], rms=TOLERANCE)

    latents: list[Tensor] = []

    def keep(pipe: Pipeline, step: int, timestep: Tensor, values: dict[str, Any]) -> None:
        latents.append(values["latents"].clone())

    image = pipe(
        labels,
        prompt_embeds=case.tensors["prompt_embeds"],
        pooled_prompt_embeds=case.tensors["pooled_prompt_embeds"],
        latents=case.tensors["noise"],
        num_inference_steps=case.settings["steps"],
        height=height,
        width=width,
        output_type="pt",
        callback_on_step_end=keep,
        **case.placement,
    ).images
    assert isinstance(image, Tensor)
    assert len(latents) == case.settings["steps"]
    assert_close(latents[-1], case.tensors["final_latents"], rms=TOLERANCE)
    assert_close(image, case.tensors["image"], rms=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_baseline(name: str) -> None:
    """What the benchmarks compare with computes the same."""
    case = GoldenCase.load(name)
    height, width = case.size
    checkpoint = case.settings["checkpoint"]
    files = Files(GOLDEN / "checkpoints" / checkpoint)
    mixture = {f"has_{part}": not checkpoint.endswith(f"no-{part}") for part in ("gating", "expert")}
    baseline = Baseline.from_files(files.flux, files.lora, files.mogle, **case.model.to_dict(), **mixture)  # type: ignore[arg-type]
    placement = case.placement
    made = baseline(
        case.tensors["labels"],
        case.tensors["prompt_embeds"],
        case.tensors["pooled_prompt_embeds"],
        case.tensors["noise"],
        case.settings["steps"],
        placement.pop("guidance_scale"),
        height=height,
        width=width,
        **placement,
    )
    for key in ("mask_latents", "cond.0", "noise_pred.0", "final_latents", "image"):
        assert_close(made[key], case.tensors[key], rms=TOLERANCE)


FAULTS = {
    "lora dropped": ("base", "lora_up"),
    "experts swapped": ("base", "experts"),
    "gate fed with sigma": ("base", "sigma"),
    "region planes blank": ("base", "blank"),
    "scale ignored": ("condition_scale", "scale"),
    "switch ignored": ("add_cond_attn", "switch"),
    "gate per token": ("scalar_gate", "switch"),
    "position ignored": ("position", "position"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault: str, golden_bundle: Bundles) -> None:
    """The comparison above would notice each of these mistakes."""
    name, kind = FAULTS[fault]
    case = GoldenCase.load(name)
    bundle = Bundle(golden_bundle(case.settings["checkpoint"]))
    height, width = case.size
    schedule = make_schedule(bundle.config.scheduler, case.settings["steps"], height * width // 256)
    engine = TorchEngine(bundle, CPU, torch.float32, ModelConfig() if kind == "switch" else case.model)
    conditions = case.conditions
    if kind == "lora_up":
        for _, layer in engine.transformer.layers():
            layer.branches = [replace(branch, up=torch.zeros_like(branch.up)) for branch in layer.branches]
    if kind == "experts":
        engine.mogle.expert_in = torch.nn.Parameter(engine.mogle.expert_in.roll(1, 0), requires_grad=False)
    changes = {
        "blank": {
            "masks": replace(conditions.masks, index=conditions.masks.index[:, [0] + [19] * 19]),
        },
        "scale": {"condition_scale": 1.0},
        "position": {"position_delta": (0, 0), "position_scale": 1.0},
    }
    engine.prepare(replace(conditions, **changes.get(kind, {})), schedule)  # type: ignore[arg-type]
    if kind == "sigma":
        wrong = engine.mogle.time_table(schedule.sigmas[:-1])
        assert engine.prepared.inputs.time_table is not None
        assert wrong is not None
        with torch.inference_mode():
            engine.prepared.inputs.time_table[: len(wrong)].copy_(wrong)
    condition = engine.condition(case.tensors["noise"], 0)
    velocity = engine.velocity(case.tensors["noise"], condition, 0)
    errors = [
        relative_rms(condition, case.tensors["cond.0"]),
        relative_rms(velocity, case.tensors["noise_pred.0"]),
    ]
    assert max(errors) > 10 * TOLERANCE
