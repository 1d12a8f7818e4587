"""The two ways to compute the mixture: from a bank of the experts' outputs, or whole in one launch a step; and when
each is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mogle_rt import Pipeline
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.config import NUM_EXPERTS, ModelConfig, MogleConfig
from mogle_rt.engines.contract import Conditions
from mogle_rt.engines.torch_engine import TorchEngine
from mogle_rt.errors import ConfigError
from mogle_rt.kernels.inputs import Experts, Gate
from mogle_rt.loop.denoise import denoise
from mogle_rt.loop.schedule import make_schedule
from mogle_rt.model.mixture import Bank, Fused, MixtureOfExperts
from mogle_rt.ops import torch_ops
from tests.conftest import assert_close, needs_triton

CPU = torch.device("cpu")
GRID, TOKENS = (2, 3), 6


def masks(seed: int, batch: int, regions: int) -> Tensor:
    """Latents [B, 20, N, 64]: `regions` experts of an image have pictures of their own, all others share one picture."""
    g = torch.Generator().manual_seed(seed)
    black = torch.randn(TOKENS, 64, generator=torch.Generator().manual_seed(0))
    latents = black.expand(batch, NUM_EXPERTS, TOKENS, 64).clone()
    latents[:, : 1 + regions] = torch.randn(batch, 1 + regions, TOKENS, 64, generator=g)
    return latents


def run(engine: TorchEngine, bundle: Bundle, mask_latents: Tensor, seed: int = 0) -> Tensor:
    t, g, batch = bundle.config.transformer, torch.Generator().manual_seed(seed), len(mask_latents)
    schedule = make_schedule(bundle.config.scheduler, 2, TOKENS)
    conditions = Conditions.from_mask_latents(
        mask_latents,
        prompt_embeds=torch.randn(batch, 4, t.joint_attention_dim, generator=g),
        pooled_prompt_embeds=torch.randn(batch, t.pooled_projection_dim, generator=g),
        guidance_scale=3.5,
        grid=GRID,
    )
    engine.prepare(conditions, schedule)
    return denoise(engine, torch.randn(batch, TOKENS, 64, generator=g), schedule)


@pytest.mark.quick
@pytest.mark.parametrize("batch", [1, 2])
def test_fused_equals_the_bank(batch: int, tiny_bundle: Path) -> None:
    """Several runs go through the same buffers, and no run changes its masks."""
    bundle = Bundle(tiny_bundle)
    engines = [TorchEngine(bundle, CPU, torch.float32, ModelConfig(), mixture=m) for m in ("bank", "fused")]
    for seed, regions in ((1, 3), (2, 19), (3, 0)):
        given = masks(seed, batch, regions)
        before = given.clone()
        banked, fused = (run(engine, bundle, given, seed) for engine in engines)
        assert_close(fused, banked, rms=1e-6)
        assert torch.equal(given, before)
    kinds = [type(engine.prepared.inputs.mixture) for engine in engines]
    assert kinds == [Bank, Fused]
    assert [len(engine._runners) for engine in engines] == [1, 1]


@pytest.mark.quick
def test_equal_pictures_are_found(tiny_bundle: Path) -> None:
    """Equal pictures are found across the images of a batch, too. Most experts share the black one."""
    bundle = Bundle(tiny_bundle)
    engine = TorchEngine(bundle, CPU, torch.float32, ModelConfig(), mixture="fused")
    latents = masks(1, 1, 2).repeat(2, 1, 1, 1)
    latents[1, 2] += 1
    run(engine, bundle, latents)
    held = engine.prepared.inputs.mixture
    assert isinstance(held, Fused)
    absent = [-1] * (NUM_EXPERTS - 3)
    assert held.regions.index.tolist() == [[0, 1, 2, *absent], [0, 1, 4, *absent]]  # picture 3 is black


def test_black_is_computed_once_a_size(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, region_experts = Bundle(tiny_bundle), torch_ops.region_experts
    calls: list[int] = []

    def noted(experts: Experts) -> Tensor:
        calls.append(len(experts.planes))
        return region_experts(experts)

    monkeypatch.setattr(torch_ops, "region_experts", noted)
    engine = TorchEngine(bundle, CPU, torch.float32, ModelConfig())
    for seed in (1, 2):
        run(engine, bundle, masks(seed, 1, 3))
    assert calls == [1, 5, 5]  # first black alone; then, twice, the palette picture, three regions and black


def test_another_number_of_pictures_is_no_other_shape(tiny_bundle: Path) -> None:
    """A mask with more regions goes through the same buffers, so it needs no new graph."""
    bundle = Bundle(tiny_bundle)
    engine = TorchEngine(bundle, CPU, torch.float32, ModelConfig(), mixture="fused")
    run(engine, bundle, masks(1, 2, 3))
    step = engine.prepared
    for regions in (0, 19):
        run(engine, bundle, masks(2, 2, regions))
        assert engine.prepared is step


@pytest.mark.quick
@needs_triton
@pytest.mark.parametrize(
    ("batch", "own", "dtype", "steps", "expected"),
    [
        (1, True, torch.bfloat16, 28, "bank"),
        (4, True, torch.bfloat16, 28, "fused"),
        (4, False, torch.bfloat16, 28, "fused"),
        (4, True, torch.float32, 28, "bank"),
        (1, True, torch.bfloat16, 1, "fused"),  # with one step, a bank would be written and read only once
    ],
)
def test_which_serves_when(batch: int, own: bool, dtype: torch.dtype, steps: int, expected: str) -> None:
    """At 512 x 512 pixels and 11 pictures a mask. If `own`, every image has a mask of its own, else all have the same."""
    from mogle_rt.ops import triton_ops

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    C, H, G, N, present = 64, 32, 64, 1024, 11
    index = torch.full((batch, NUM_EXPERTS), -1, dtype=torch.int32)
    for image in range(batch):
        index[image, :present] = torch.arange(present) + (NUM_EXPERTS * image if own else 0)
    tokens = new(N, batch, C)
    gate = Gate(tokens, tokens, new(C), new(C, C), new(G, C), new(G), new(NUM_EXPERTS, G), new(NUM_EXPERTS))
    layers = new(NUM_EXPERTS, H, C), new(NUM_EXPERTS, H), new(NUM_EXPERTS, C, H), new(NUM_EXPERTS, C)
    experts = Experts(new(NUM_EXPERTS * batch, N, C), index, new(N, NUM_EXPERTS, C), *layers)
    assert triton_ops.cheaper_mixture(gate, experts, steps) == expected


@pytest.mark.quick
@pytest.mark.parametrize(
    ("mixture", "config", "model", "message"),
    [
        ("mixed", {}, {}, "mixture must be one of 'bank', 'fused', got 'mixed'"),
        ("fused", {}, {"weight_is_scale": True}, "but weight_is_scale averages the gate; use 'bank'"),
        ("fused", {"has_gating": False}, {}, "but this model lacks experts or gate; use 'bank'"),
        ("fused", {"has_expert": False}, {}, "but this model lacks experts or gate; use 'bank'"),
    ],
)
def test_impossible_mixtures(mixture: str, config: dict[str, Any], model: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        MixtureOfExperts(MogleConfig(**config), **model).check_mixture(mixture)


def test_the_pipeline_takes_it(tiny_bundle: Path) -> None:
    pipe = Pipeline(tiny_bundle, device="cpu", mixture="fused")
    pipe(None, None, 1, height=32, width=32, output_type="latent")
    assert isinstance(pipe.engine, TorchEngine)
    assert isinstance(pipe.engine.prepared.inputs.mixture, Fused)
    with pytest.raises(ConfigError, match="weight_is_scale"):
        Pipeline(tiny_bundle, device="cpu", mixture="fused", model_config={"weight_is_scale": True})
