"""The counter against counts by hand, the reference's ledger against its code, and the published figures."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from torch import Tensor

from benchmarks import baseline
from mogle_rt.apps import cli
from mogle_rt.bundle import schema
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.config import FLUX_DEV, ModelConfig, MogleConfig, TransformerConfig
from mogle_rt.cost import counting as counting_module
from mogle_rt.cost.counting import Count, counting
from mogle_rt.cost.estimate import Estimate, estimate
from mogle_rt.cost.gpus import GPUS, RESERVED_GIB, find_gpu
from mogle_rt.cost.job import FLUX_BUNDLE, FLUX_TEXT, Job, WeightlessBundle
from mogle_rt.cost.reference import reference_step
from mogle_rt.errors import ConfigError, InputError
from mogle_rt.fast.settings import FastConfig
from mogle_rt.ops.attention import AttentionPlan, Visibility, joint_attention
from tests.checkpoints import TINY
from tests.conftest import needs_triton

META = torch.device("meta")
WIDE = replace(FLUX_DEV, num_layers=1, num_single_layers=2)  # FLUX.1-dev's width, few blocks


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, device=META, dtype=dtype)


def counted(function: Callable[[], object]) -> Count:
    with counting() as counter:
        function()
        return counter.take()


def job(transformer: TransformerConfig, *, rank: int = 4, mogle: MogleConfig | None = None, **options: Any) -> Job:
    ranks = dict.fromkeys(schema.lora_modules(transformer), rank)
    config = replace(FLUX_BUNDLE, transformer=transformer, mogle=mogle or MogleConfig())
    return Job(config=config, ranks=ranks, **options)


# ---------------------------------------------------------------------------------------------------- the counter

A, B, C = empty(4, 8), empty(8, 3), empty(4, 8)
HALF = empty(4, 8, dtype=torch.bfloat16)
IDS = torch.empty(5, device=META, dtype=torch.int64)
LINEAR = torch.nn.Linear(8, 3, device=META)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("function", "launches", "flops", "read", "written"),
    [
        (lambda: A @ B, 1, 2 * 4 * 8 * 3, 4 * (32 + 24), 4 * 12),
        (lambda: LINEAR(A), 1, 2 * 4 * 8 * 3, 4 * (32 + 24 + 3), 4 * 12),
        (lambda: empty(4, 3).addmm_(A, B), 1, 2 * 4 * 8 * 3, 4 * (12 + 32 + 24), 4 * 12),
        (lambda: empty(2, 4, 3).baddbmm_(A.expand(2, 4, 8), B.expand(2, 8, 3)), 1, 384, 4 * (24 + 32 + 24), 4 * 24),
        (lambda: A + C, 1, 0, 4 * 64, 4 * 32),
        (lambda: A + HALF, 1, 0, 4 * 32 + 2 * 32, 4 * 32),
        (lambda: A.add_(C), 1, 0, 4 * 64, 4 * 32),
        (lambda: A[:, :2].mul_(2), 1, 0, 4 * 8, 4 * 8),
        (lambda: A + A[:1].expand(4, 8), 1, 0, 4 * (32 + 8), 4 * 32),
        (lambda: A.copy_(C), 1, 0, 4 * 32, 4 * 32),
        (lambda: A.zero_(), 1, 0, 0, 4 * 32),
        (lambda: torch.zeros_like(A), 1, 0, 0, 4 * 32),
        (lambda: torch.mul(A, 2, out=C), 1, 0, 4 * 32, 4 * 32),
        (lambda: torch.addcmul(C, A, A, out=A), 1, 0, 4 * 96, 4 * 32),
        (lambda: torch.cat([A, C]), 1, 0, 4 * 64, 4 * 64),
        (lambda: A.to(torch.bfloat16), 1, 0, 4 * 32, 2 * 32),
        (lambda: A.to(torch.float32), 0, 0, 0, 0),
        (lambda: F.embedding(IDS, A), 1, 0, 8 * 5 + 4 * 40, 4 * 40),
        (lambda: F.layer_norm(A, (8,)), 1, 0, 4 * 32, 4 * (32 + 4 + 4)),
        (lambda: A.view(2, 16).t()[1:].unflatten(0, (3, 5)).expand(2, 3, 5, 2).unbind(0), 0, 0, 0, 0),
        (lambda: A.view(2, 16).t().reshape(32), 1, 0, 4 * 32, 4 * 32),
        (lambda: (torch.empty_like(A), A.new_empty(3), A.detach()), 0, 0, 0, 0),
        (lambda: torch.ones(3) + 1, 0, 0, 0, 0),  # tensors on the CPU: nothing is launched on the device
    ],
)
def test_counts_by_hand(function: Callable[[], object], launches: int, flops: int, read: int, written: int) -> None:
    for mode in (contextlib.nullcontext, torch.inference_mode):
        with counting() as counter, mode():
            function()
        count = counter.take()
        assert (count.launches, count.flops, count.read, count.written) == (launches, flops, read, written)
        assert count.moved == read + written


@pytest.mark.quick
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_one_operation(masked: bool) -> None:
    q, k = (empty(2, 3, length, 16, dtype=torch.bfloat16) for length in (10, 40))
    mask = empty(10, 40, dtype=torch.bfloat16) if masked else None
    count = counted(lambda: F.scaled_dot_product_attention(q, key=k, value=k, attn_mask=mask))
    assert count.launches == 1
    assert count.flops == 2 * 2 * 2 * 3 * 10 * 40 * 16
    assert count.read == 2 * (2 * 3 * 16 * (10 + 40 + 40) + (400 if masked else 0))
    out = 2 * 2 * 3 * 10 * 16
    assert out <= count.written <= out + 4 * 2 * 3 * 32 + 32  # with the log-sum-exp (rows padded to 32) and a seed


def test_scaled_attention_has_no_scores() -> None:
    """Two groups, each attending to both: four attentions, whose products are those of one."""
    q = empty(300, 1, 2, 16)
    plans = [AttentionPlan(visibility, empty(1)) for visibility in (Visibility.JOINT, Visibility.SCALED)]
    whole, scaled = (counted(lambda plan=plan: joint_attention(q, q, q, 200, plan)) for plan in plans)  # type: ignore[misc]
    assert scaled.flops == whole.flops == 4 * 300 * 300 * 32
    assert scaled.peak < 300 * 300 * 4


def test_counting_leaves_nothing_behind() -> None:
    from mogle_rt.ops import attention

    before = attention.attention_with_lse
    with pytest.raises(KeyError), counting():
        raise KeyError
    assert attention.attention_with_lse is before


@pytest.mark.quick
@pytest.mark.parametrize(
    "options",
    [
        {"kernels": "torch", "dtype": torch.float32},
        pytest.param({"kernels": "triton", "weights": "int8", "batch": 2}, marks=needs_triton),
        pytest.param({"kernels": "triton", "fast": FastConfig(refresh_every=3, steps_mask="fast")}, marks=needs_triton),
    ],
)
def test_an_operation_done_again_counts_the_same(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It isn't run again: its count and the shapes of its results are known. All that is counted equals what runs give."""
    small = job(TINY, height=64, width=48, text_tokens=16, steps=8, **options)
    again: list[Count] = []
    seen = counting_module._Seen.again

    def noted(self: counting_module._Seen, operands: list[Tensor]) -> tuple[Any, list[Tensor]]:
        again.append(self.done)
        return seen(self, operands)

    monkeypatch.setattr(counting_module._Seen, "again", noted)
    known = estimate(small)
    assert len(again) > 200
    monkeypatch.setattr(counting_module._Seen, "suits", lambda *_: False)
    assert estimate(small) == known


@pytest.mark.quick
def test_operations_that_differ_in_one_argument_are_told_apart() -> None:
    number = torch.empty(4, device=META, dtype=torch.int64)
    with counting() as counter:
        assert [(number + one).dtype for one in (1, 1.0, True)] == [torch.int64, torch.float32, torch.int64]
        assert [A.sum(dims).shape for dims in ((0,), (1,), (0, 1))] == [(8,), (4,), ()]
        assert [A.sum(0, keepdim=kept).shape for kept in (True, False)] == [(1, 8), (8,)]
        assert [x.clone().stride() for x in (A, B.T, C)] == [(8, 1), (1, 3), (8, 1)]
        first, second = A.clone(), C.clone()
        for tensor in (first, second):
            assert tensor.add_(1) is tensor  # in place: the result is the operand
        first_max, second_max = A.max(1), C.max(1)  # two results, the second of integers
        assert (second_max.values.shape, second_max.indices.dtype) == (first_max.values.shape, torch.int64)
        before = counter.live
        kept = [A.clone() for _ in range(3)]
        assert counter.live - before == 3 * 4 * 32
        del kept
        assert counter.live == before


def test_memory_is_followed() -> None:
    with counting() as counter:
        a = empty(100)
        b = a + 1
        view = b[:50]
        del b
        assert counter.live == 800  # the view keeps it
        assert (a * 2).shape == a.shape
        assert counter.live == 800
        del view
        assert counter.live == 400
        a.add_(1)
        assert counter.take().peak == 1200
        assert counter.take().peak == 400


def test_counts_add_up() -> None:
    a, b = Count(launches=1, flops=2, read=3, written=4, peak=5), Count(launches=10, peak=3)
    assert a + b == Count(launches=11, flops=2, read=3, written=4, peak=5)
    assert b + a * 2 == Count(launches=12, flops=4, read=6, written=8, peak=5)


# ---------------------------------------------------------------------------------------------------- the reference


def baseline_step(job: Job) -> Count:
    """One step of benchmarks/baseline.py, counted."""
    flux, dtype, size = job.config.transformer, job.dtype, (job.height, job.width)
    rank = max(job.ranks.values())
    switches = baseline.Switches(has_gating=job.config.mogle.has_gating, has_expert=job.config.mogle.has_expert)
    layers = list(schema.lora_modules(flux))
    with META:
        transformer = FluxTransformer2DModel.from_config(flux.to_dict())
        transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))
        mogle = baseline.MoGLE(switches)
    for module in (transformer, mogle):
        torch.nn.Module.to(module, dtype=dtype)
    model = baseline.Baseline(transformer, mogle, None, switches)
    for text in (job.text_tokens, 0):  # made once an image
        baseline.token_ids(*size, (0, 0), 1.0, text, META)
    timesteps, sigmas = empty(3), empty(4)
    inputs = (empty(1, 20, job.tokens, 64, dtype=dtype), empty(1, job.tokens, 64, dtype=dtype))
    prompt = empty(1, job.text_tokens, flux.joint_attention_dim, dtype=dtype)
    pooled = empty(1, flux.pooled_projection_dim, dtype=dtype)
    with counting() as counter:
        model.step(1, timesteps, sigmas, *inputs, prompt, pooled, 3.5, *size)
        return counter.take()


@pytest.mark.parametrize(
    "case",
    [
        job(FLUX_DEV),
        job(WIDE, dtype=torch.float32, height=256, width=512, text_tokens=77, rank=8),
        job(WIDE, dtype=torch.float16, height=1024, width=1024),
        job(TINY, dtype=torch.float32, height=64, width=48, text_tokens=16),
        job(replace(TINY, guidance_embeds=False), dtype=torch.bfloat16, height=128, width=128, text_tokens=8),
        job(TINY, mogle=MogleConfig(has_gating=False), text_tokens=8),
        job(TINY, mogle=MogleConfig(has_expert=False), text_tokens=8),
    ],
    ids=["flux", "wide-fp32", "wide-fp16", "tiny-fp32", "tiny-no-guidance", "no-gating", "no-expert"],
)
def test_ledger_is_the_baseline(case: Job) -> None:
    ledger, found = reference_step(case), baseline_step(case)
    assert ledger.launches == found.launches
    assert ledger.flops == found.flops
    assert ledger.read == pytest.approx(found.read, rel=1e-4)
    assert ledger.written == pytest.approx(found.written, rel=1e-4)
    assert ledger.peak == pytest.approx(found.peak, rel=0.04)


def test_ledger_is_the_published_count() -> None:
    """The published counts were made on the reference itself; the Euler update was added to them here."""
    ledger = reference_step(Job())
    assert ledger.launches == pytest.approx(9546 + 86, rel=0.001)
    assert ledger.read == pytest.approx(135.8e9, rel=0.001)
    assert ledger.written == pytest.approx(80.0e9, rel=0.001)
    assert ledger.flops == pytest.approx(37.7e12, rel=0.001)


# ------------------------------------------------------------------------------------------------------- this engine


@pytest.fixture(scope="module")
def flux() -> Estimate:
    return estimate(Job())


def test_published_sizes(flux: Estimate) -> None:
    p, mine, theirs = flux.parameters, flux.engine, flux.reference
    assert p["transformer"] + p["modulation"] == pytest.approx(11.9e9, rel=0.005)
    assert p["modulation"] == pytest.approx(3.23e9, rel=0.02)  # with the last norm's and the time embedding's
    assert p["vae"] == 83_819_683
    assert theirs.decode.flops == pytest.approx(2.5e12, rel=0.01)
    attention = 4 * (512 // 8 * 512 // 8) ** 2 * 512  # in the middle of the VAE; the published figure leaves it out
    assert theirs.encode.flops - 20 * attention == pytest.approx(21.7e12, rel=0.01)
    assert mine.encode.flops == theirs.encode.flops * 14 / 20
    assert theirs.resident == 2 * sum(n for part, n in p.items() if not part.startswith("text"))
    assert theirs.peak_with_text - theirs.peak == 2 * (p["text_encoder"] + p["text_encoder_2"])


def test_text_encoder_sizes() -> None:
    """FLUX.1-dev's configurations: text_encoder/config.json and text_encoder_2/config.json."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    t5 = T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    )
    with META:
        models = {"text_encoder": CLIPTextModel(clip), "text_encoder_2": T5EncoderModel(t5)}
    assert {part: sum(p.numel() for p in m.parameters()) for part, m in models.items()} == FLUX_TEXT


def test_engine_needs_less(flux: Estimate) -> None:
    """With PyTorch's operations at most 60 % of the reference's launches and bytes a step, at full size."""
    mine, theirs = estimate(Job(kernels="torch")).engine.step, flux.reference.step
    assert mine.launches <= 0.6 * theirs.launches
    assert mine.moved <= 0.6 * theirs.moved
    assert 0.97 * theirs.flops < mine.flops < theirs.flops  # only the last block computes less
    assert flux.engine.flops < flux.reference.flops


@needs_triton
def test_kernels_need_far_less(flux: Estimate) -> None:
    """The reference takes 9,632 launches and 215.8 GB. With kernels, gate and mix are one launch."""
    mine = flux.engine.step
    assert mine.launches <= 511
    assert mine.moved <= 44.22e9


def test_modulation_is_let_go(flux: Estimate) -> None:
    mine, p = flux.engine, flux.parameters
    kept = 2 * (p["transformer"] + p["lora"] + p["mogle"] + p["vae"])
    assert mine.resident == pytest.approx(
        kept, rel=0.01
    )  # B of fused layers is block-diagonal, ranks are filled up to 16
    largest = 2 * 6 * FLUX_DEV.width**2
    assert largest < mine.prepare.peak - mine.resident < 3 * largest
    assert mine.peak == mine.decode.peak  # the VAE's pictures of full size take more than a step's activations


@pytest.mark.parametrize("options", [{}, {"condition_scale": 2.0}, {"model": ModelConfig(union_cond_attn=False)}])
def test_memory_grows_with_the_sequence(options: dict[str, Any]) -> None:
    """Memory grows linearly, whatever the switches. An attention mask, or stored scores, would grow quadratically."""

    def activations(height: int) -> int:
        engine = estimate(job(WIDE, text_tokens=16, height=height, width=512, classes=1, steps=4, **options)).engine
        return engine.step.peak - engine.resident

    small, large = activations(512), activations(2048)
    assert 3.5 < large / small < 4.5


def test_batches(flux: Estimate) -> None:
    four = estimate(Job(batch=4))
    assert four.engine.step.flops == pytest.approx(4 * flux.engine.step.flops, rel=0.001)
    assert four.engine.step.launches < 1.1 * flux.engine.step.launches
    assert four.engine.step.moved < 4 * flux.engine.step.moved  # weights are read once
    assert four.engine.resident == flux.engine.resident
    assert four.reference.step == flux.reference.step * 4
    assert four.reference.peak == flux.reference.peak  # one image after the other


def test_bundle_without_weights(tiny_bundle: Path) -> None:
    real = Bundle(tiny_bundle)
    weightless = WeightlessBundle(real.config, real.lora_ranks())
    core = {n: i.shape for n, i in real.tensors.items() if n.split(".")[0] in ("transformer", "lora", "mogle")}
    assert {n: i.shape for n, i in weightless.tensors.items()} == core
    counts = estimate(Job.of(real, height=64, width=64)).parameters
    parts = {"transformer": "transformer", "modulation": "transformer"}
    for part in ("transformer", "lora", "mogle", "vae", "text_encoder", "text_encoder_2"):
        total = sum(n for name, n in counts.items() if parts.get(name, name) == part)
        assert total == sum(real.tensors[f"{part}.{n}"].numel for n in real.names(part)), part


def test_bundle_gives_dtype(tiny_bundle: Path) -> None:
    assert Job.of(Bundle(tiny_bundle)).dtype == torch.float32
    assert Job.of(Bundle(tiny_bundle), dtype=torch.float16).dtype == torch.float16


@pytest.mark.parametrize(("classes", "pictures"), [(1, 3), (12, 14), (18, 20), (19, 20)])
def test_distinct_pictures(classes: int, pictures: int) -> None:
    assert Job(classes=classes).pictures == pictures


@pytest.mark.quick
@pytest.mark.parametrize(
    "wrong", [{"height": 500}, {"width": 0}, {"batch": 0}, {"steps": -1}, {"text_tokens": 513}, {"classes": 20}]
)
def test_impossible_jobs(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(wrong))} must be .* got {next(iter(wrong.values()))}"):
        Job(**wrong)  # type: ignore[arg-type]


@needs_triton
@pytest.mark.parametrize("part", ["expert_dim", "gate_dim"])
def test_models_too_wide_for_the_kernels(part: str) -> None:
    """The error comes when the engine is made, and says what would work. PyTorch's operations take any width, and
    the width of a part that the model doesn't have does not matter."""
    wide: dict[str, Any] = {part: 300}
    with pytest.raises(
        ConfigError, match=rf"^Triton's kernels take {part} up to 256, this model has 300; use kernels='torch'$"
    ):
        estimate(job(TINY, mogle=MogleConfig(**wide), kernels="triton"))
    estimate(job(TINY, mogle=MogleConfig(**wide), kernels="torch", height=32, width=32))
    unused = MogleConfig(**wide, has_expert=part != "expert_dim", has_gating=part != "gate_dim")
    estimate(job(TINY, mogle=unused, kernels="triton", height=32, width=32))
    heads = replace(TINY, attention_head_dim=260, axes_dims_rope=(20, 120, 120), num_attention_heads=1)
    with pytest.raises(ConfigError, match="take attention_head_dim up to 256, this model has 260"):
        estimate(job(heads, kernels="triton", height=32, width=32))


# -------------------------------------------------------------------------------------------------------------- cards


@pytest.mark.quick
def test_floors() -> None:
    card = find_gpu("RTX 4090")
    assert card.compute_ms(Count(flops=int(165.2e12)), 2) == pytest.approx(1000)
    assert card.compute_ms(Count(flops=int(82.6e12)), 4) == pytest.approx(1000)
    part = Count(flops=int(1165.2e12), eight_bit_flops=int(1000e12))
    assert card.compute_ms(part, 2, "int8") == pytest.approx(1000 + 1e6 / 660.6)
    assert card.compute_ms(part, 2, "fp8") == pytest.approx(1000 + 1e6 / 330.3)
    # A card without such instructions multiplies unpacked weights at its usual rate.
    assert find_gpu("A100 40GB").compute_ms(part, 2, "fp8") == pytest.approx(1165.2e3 / 312)
    assert card.memory_ms(1008e9) == pytest.approx(1000)
    assert card.fits((24 - RESERVED_GIB) * 2**30)
    assert not card.fits((24 - RESERVED_GIB) * 2**30 + 1)


@pytest.mark.quick
def test_cards_are_found() -> None:
    for card in GPUS:
        assert find_gpu(card.name) is card
        assert find_gpu(card.name.lower().replace(" ", "-")) is card
    assert find_gpu("4060").name == "RTX 4060 8GB"
    assert find_gpu("l4").name == "L4"
    with pytest.raises(ConfigError, match=r"'h100' is one of several; known: H100 SXM, H100 PCIe$"):
        find_gpu("h100")
    for unknown in ("", "Voodoo 2"):
        with pytest.raises(ConfigError, match=r"known: .*RTX 3060 12GB"):
            find_gpu(unknown)


# ------------------------------------------------------------------------------------------------------- command line


def run(*args: object) -> tuple[int, str, str]:
    """Exit status, output and errors of ``mogle-rt cost``."""
    out, err = io.StringIO(), io.StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with (
            mock.patch.object(sys, "argv", ["mogle-rt", "cost", *map(str, args)]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as caught,
        ):
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, handler)
    return int(caught.value.code or 0), out.getvalue(), err.getvalue()


def test_command_on_a_bundle(tiny_bundle: Path) -> None:
    status, out, err = run(tiny_bundle, "--height", 64, "--width", 48, "--gpu", "L4")
    assert (status, err) == (0, "")
    assert "dtype float32" in out
    for line in ("text_encoder_2", "kernel launches", "GB written", "at the peak", "fits without streaming"):
        assert line in out


@pytest.fixture(scope="module")
def flux_report() -> dict[str, Any]:
    """The command's JSON report of FLUX.1-dev."""
    status, out, err = run("--flux-dev", "--json", "--gpu", "RTX 4090")
    assert (status, err) == (0, "")
    return dict(json.loads(out))


def test_command_counts_what_the_bundle_draws(flux_report: dict[str, Any]) -> None:
    """By default the size and the text tokens that `generate` takes."""
    _, out, _ = run("demo", "--json")
    described = json.loads(out)["job"]
    bundle = Bundle("demo")
    assert (described["height"], described["width"]) == (bundle.default_size, bundle.default_size) == (128, 128)
    assert described["text_tokens"] == bundle.default_text_tokens == 48
    assert [flux_report["job"][name] for name in ("height", "width", "text_tokens")] == [512, 512, 512]
    _, out, _ = run("demo", "--json", "--width", 64)
    assert [json.loads(out)["job"][name] for name in ("height", "width")] == [128, 64]


def test_command_gives_json(tiny_bundle: Path) -> None:
    status, out, _ = run(tiny_bundle, "--height", 64, "--width", 48, "--gpu", "L4", "--dtype", "fp16", "--json")
    report = json.loads(out)
    assert status == 0
    assert report["job"]["image_tokens"] == 12
    assert report["job"]["dtype"] == "float16"
    step = report["cost"]["reference"]["step"]
    expected = reference_step(Job.of(Bundle(tiny_bundle), height=64, width=48, dtype=torch.float16))
    assert step == vars(expected)
    assert report["gpu"]["limits"]["mogle_rt"]["fits"] is True
    moved = step["read"] + step["written"]
    assert report["gpu"]["limits"]["reference"]["memory_ms"] == pytest.approx(moved / 300e9 * 1e3)


def test_command_at_full_size(flux_report: dict[str, Any]) -> None:
    assert flux_report["cost"]["reference"]["step"]["launches"] == reference_step(Job()).launches
    mine, theirs = (flux_report["gpu"]["limits"][name] for name in ("mogle_rt", "reference"))
    assert (mine["fits"], mine["fits_with_text"], theirs["fits"]) == (True, False, True)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--flux-dev", "--gpu", "Voodoo 2"], "error: gpu 'Voodoo 2' is unknown; known: H100 SXM, H100 PCIe, H200"),
        ([], "error: give a bundle or --flux-dev"),
        (["bundle.safetensors", "--flux-dev"], "error: give a bundle or --flux-dev"),
        (["--flux-dev", "--height", "500"], "error: height must be a multiple of 16"),
        (["--flux-dev", "--dtype", "int8"], "error: dtype must be bf16, fp16 or fp32, got int8"),
        (["nowhere.safetensors"], "error: nowhere.safetensors"),
    ],
)
def test_command_errors_are_one_line(args: list[str], message: str) -> None:
    status, out, err = run(*args)
    assert (status, out) == (1, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_fewer_steps_cost_what_a_shorter_schedule_costs() -> None:
    demo = Bundle("demo")
    fewer = estimate(Job.of(demo, steps=8, fast=FastConfig(most_steps=2))).engine
    assert fewer.flops == estimate(Job.of(demo, steps=2)).engine.flops < estimate(Job.of(demo, steps=8)).engine.flops
