"""The transformer equals other implementations: without a condition diffusers' own, with one the baseline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from benchmarks.baseline import Baseline
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.config import ModelConfig, TransformerConfig
from mogle_rt.cost.counting import OpCounter
from mogle_rt.engines.contract import Conditions
from mogle_rt.engines.torch_engine import TorchEngine
from mogle_rt.loop.buffers import StepInputs
from mogle_rt.loop.schedule import make_schedule
from mogle_rt.loop.step import Step
from mogle_rt.model.layout import Layout
from mogle_rt.model.mixture import Bank
from mogle_rt.model.modulation import modulation_tables, time_embedding
from mogle_rt.model.positions import condition_ids, rope_table, token_ids
from mogle_rt.ops import attention
from mogle_rt.ops.attention import (
    PLAIN_QUERIES,
    WHOLE_SCORES,
    AttentionPlan,
    Visibility,
    attention_by_products,
    attention_with_lse,
    joint_attention,
    plain_attention_with_lse,
    scores_room,
)
from tests.checkpoints import Files, write_checkpoint
from tests.conftest import assert_close, make_once, relative_rms

CPU = torch.device("cpu")


def config(heads: int, axes: tuple[int, int, int], double: int, single: int, *, guidance: bool) -> TransformerConfig:
    return TransformerConfig(
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=sum(axes),
        num_attention_heads=heads,
        joint_attention_dim=20,
        pooled_projection_dim=12,
        guidance_embeds=guidance,
        axes_dims_rope=axes,
    )


CONFIGS = [
    config(2, (4, 6, 6), 1, 1, guidance=True),
    config(3, (4, 8, 12), 2, 3, guidance=False),
    config(1, (2, 2, 4), 0, 2, guidance=True),
    config(5, (8, 12, 12), 2, 0, guidance=False),
]


@pytest.mark.quick
@pytest.mark.parametrize("number", range(len(CONFIGS)))
@pytest.mark.parametrize("batch", [1, 3])
def test_without_condition_equals_diffusers(number: int, batch: int, tmp_path: Path) -> None:
    c = CONFIGS[number]
    files = write_checkpoint(tmp_path, c, seed=number)
    theirs = FluxTransformer2DModel.from_pretrained(files.flux / "transformer")
    bundle = Bundle(files.convert(tmp_path / "b.safetensors"))
    engine = TorchEngine(bundle, CPU, torch.float32, ModelConfig())

    grid, text_rows = (3, 5), 7
    ids = token_ids(grid)
    latents = torch.randn(batch, len(ids), 64)
    text, pooled = torch.randn(batch, text_rows, 20), torch.randn(batch, 12)
    guidance = torch.full((batch,), 3.0) if c.guidance_embeds else None
    t = 0.731
    expected = theirs(
        hidden_states=latents,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=torch.full((batch,), t),
        guidance=guidance,
        txt_ids=torch.zeros(text_rows, 3),
        img_ids=ids,
    ).sample
    temb = time_embedding(
        torch.tensor([t]) * 1000, None if guidance is None else guidance * 1000, pooled, engine.weights
    )
    tables = modulation_tables(c, temb, None, engine.weights)
    inputs = StepInputs(
        mixture=Bank(torch.empty(0), None),
        time_table=None,
        text=engine.context_embedder(text.transpose(0, 1)),
        modulation=tables,
        modulation_of=(torch.empty(0), torch.empty(0), torch.empty(0), torch.empty(0)),
        rope=engine.ops.rope_buffer(rope_table(torch.cat([torch.zeros(text_rows, 3), ids]), c.axes_dims_rope)),
        sigma_steps=torch.zeros(1),
        log_scale=torch.zeros(1),
    )
    layout = Layout(text=text_rows, image=len(ids), condition=0)
    step = Step(engine.transformer, engine.mogle, inputs, layout, engine.ops)
    step.buffers.latents.copy_(latents.transpose(0, 1))
    step.select()
    step.velocity()
    assert_close(step.buffers.velocity.transpose(0, 1), expected, rms=2e-6)


@pytest.fixture(scope="module")
def odd_files(shared_folder: Path) -> Files:
    """A checkpoint whose sizes, numbers of blocks and rank no other one has. Read-only."""
    return Files(make_once(shared_folder / "odd", lambda folder: write_checkpoint(folder, CONFIGS[1], seed=5, rank=3)))


@pytest.fixture(scope="module")
def odd_bundle(odd_files: Files, shared_folder: Path) -> Path:
    return make_once(shared_folder / "odd_bundle.safetensors", odd_files.convert)


SWITCHES: list[dict[str, bool]] = [
    {},
    {"add_cond_attn": True},
    {"latent_lora": True},
    {"latent_lora": True, "add_cond_attn": True, "independent_condition": True},
    {"union_cond_attn": False},
    {"union_cond_attn": False, "add_cond_attn": True, "latent_lora": True},
    {"independent_condition": True, "weight_is_scale": True},
]


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "+".join(s) or "released")
@pytest.mark.parametrize("condition_scale", [1.0, 0.4, 2.5])
@pytest.mark.parametrize("most_whole_scores", [WHOLE_SCORES, 0], ids=["products", "fused"])
def test_step_equals_the_baseline(
    switches: dict[str, bool],
    condition_scale: float,
    most_whole_scores: int,
    odd_files: Files,
    odd_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With random weights, odd sizes and a rank other than 4, the reference's own way of computing gives the same step."""
    monkeypatch.setattr(attention, "WHOLE_SCORES", most_whole_scores)
    baseline = Baseline.from_files(odd_files.flux, odd_files.lora, odd_files.mogle, **switches)  # type: ignore[arg-type]
    bundle = Bundle(odd_bundle)
    engine = TorchEngine(bundle, CPU, torch.float32, ModelConfig(**switches))
    grid, steps = (3, 5), 3
    tokens = grid[0] * grid[1]
    mask_latents = torch.randn(1, 20, tokens, 64)
    text, pooled, latents = torch.randn(1, 9, 20), torch.randn(1, 12), torch.randn(1, tokens, 64)
    schedule = make_schedule(bundle.config.scheduler, steps, tokens)
    engine.prepare(
        Conditions.from_mask_latents(
            mask_latents,
            prompt_embeds=text,
            pooled_prompt_embeds=pooled,
            guidance_scale=4.0,
            grid=grid,
            condition_scale=condition_scale,
            position_delta=(1, -2),
            position_scale=1.5,
        ),
        schedule,
    )
    assert (engine.prepared.buffers.scores is None) == (most_whole_scores == 0)
    for k in (0, steps - 1):
        t = schedule.timesteps[k : k + 1]
        condition = baseline.condition(mask_latents, latents, t)
        assert_close(engine.condition(latents, k), condition, rms=1e-5)
        velocity = baseline.velocity(
            latents,
            condition,
            text,
            pooled,
            t,
            4.0,
            height=grid[0] * 16,
            width=grid[1] * 16,
            condition_scale=condition_scale,
            position_delta=(1, -2),
            position_scale=1.5,
        )
        assert_close(engine.velocity(latents, condition, k), velocity, rms=3e-6)


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, c: int, plan: AttentionPlan) -> torch.Tensor:
    """Attention in float64, with the whole mask."""
    q, k, v = (x.double().permute(1, 2, 0, 3) for x in (q, k, v))
    group_q, group_k = (torch.arange(x.shape[2]) >= c for x in (q, k))
    same = group_q[:, None] == group_k[None]
    bias = torch.zeros(same.shape, dtype=torch.float64)
    if plan.visibility is Visibility.SCALED:
        bias[~same] = plan.log_scale.double()
    elif plan.visibility is Visibility.SEPARATE:
        bias[~same] = -torch.inf
    elif plan.visibility is Visibility.INDEPENDENT:
        bias[group_q[:, None] & ~same] = -torch.inf
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias
    return (scores.softmax(-1) @ v).permute(2, 0, 1, 3).flatten(2)


@pytest.mark.quick
@pytest.mark.parametrize("visibility", list(Visibility))
@pytest.mark.parametrize("queries", [11, 26], ids=["rest only", "all"])
@pytest.mark.parametrize("batch", [1, 2])
def test_grouped_attention_equals_dense(visibility: Visibility, queries: int, batch: int) -> None:
    q, k, v = (torch.randn(rows, batch, 3, 24) for rows in (queries, 26, 26))
    plan = AttentionPlan(visibility, torch.tensor([-1.3]))
    assert_close(joint_attention(q, k, v, 15, plan), dense_attention(q, k, v, 15, plan).float(), rms=1e-6)


@pytest.mark.quick
@pytest.mark.parametrize("visibility", list(Visibility))
@pytest.mark.parametrize("queries", [11, 26], ids=["rest only", "all"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("condition_from", [15, 26], ids=["condition", "none"])
def test_attention_by_products_equals_dense(
    visibility: Visibility, queries: int, batch: int, condition_from: int
) -> None:
    """It is called as in a step: q, k and v lie side by side, the result has gaps between its rows, and its memory may
    hold anything before."""
    qkv, (heads, size) = torch.randn(26, batch, 3, 3, 24), (3, 24)
    q, k, v = qkv[:queries, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    plan = AttentionPlan(visibility, torch.tensor([-1.3]))
    scores = scores_room(q, heads, 26)
    assert scores is not None
    beside = torch.full((queries, batch, heads * size + 5), torch.nan)
    out = beside[..., : heads * size]
    attend = attention_by_products(q, k, v, condition_from, plan, scores.fill_(torch.nan), out)
    expected = dense_attention(q, k, v, condition_from, plan).float()
    for _ in range(2):
        assert attend() is out
        assert_close(out, expected, rms=1e-6)
    assert beside[..., heads * size :].isnan().all()


def test_scores_are_made_whole_where_it_is_faster() -> None:
    like = torch.empty(0)
    assert scores_room(like, 2, WHOLE_SCORES).shape == (2, WHOLE_SCORES, WHOLE_SCORES)  # type: ignore[union-attr]
    assert scores_room(like, 2, WHOLE_SCORES + 1) is None
    assert scores_room(like.bfloat16(), 2, 8) is None
    assert scores_room(like.to("meta"), 2, 8) is None


@pytest.mark.quick
@pytest.mark.parametrize("attend", [attention_with_lse, plain_attention_with_lse], ids=["kernel", "plain"])
def test_log_sum_exp(attend: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    """Both the CPU's kernel and the way of devices without such a kernel give it."""
    q, k, v = (torch.randn(2, 3, rows, 16) for rows in (5, 9, 9))
    out, lse = attend(q, k, v)
    scores = q @ k.transpose(-1, -2) / 4
    assert_close(lse, scores.logsumexp(-1), rms=1e-6)
    assert_close(out, scores.softmax(-1) @ v, rms=1e-6)


def test_plain_attention_is_done_in_parts() -> None:
    """On the meta device, which has no attention kernel, no tensor holds the scores of all queries at once."""
    rows = 4 * PLAIN_QUERIES
    q = torch.empty(1, 1, rows, 16, device="meta")
    with OpCounter() as counter:
        out, lse = attention_with_lse(q, q, q)
    assert (out.shape, lse.shape) == (q.shape, q.shape[:3])
    assert counter.take().peak < rows * rows * 4


def test_condition_scale_of_zero_separates() -> None:
    assert Visibility.of(ModelConfig(), 0.0) is Visibility.SEPARATE


@pytest.mark.quick
def test_position_is_moved_before_it_is_scaled() -> None:
    ids = condition_ids(token_ids((2, 2)), (1, -1), 2.0)
    assert ids[:, 0].eq(0).all()
    assert ids[:, 1:].tolist() == [[2.5, -1.5], [2.5, 0.5], [4.5, -1.5], [4.5, 0.5]]


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    files = write_checkpoint(tmp_path, CONFIGS[0])
    bundle = Bundle(files.convert(tmp_path / "b.safetensors"))
    conditions = Conditions.from_mask_latents(
        torch.randn(1, 20, 4, 64),
        prompt_embeds=torch.randn(1, 3, 20),
        pooled_prompt_embeds=torch.randn(1, 12),
        guidance_scale=3.5,
        grid=(2, 2),
    )
    schedule = make_schedule(bundle.config.scheduler, 2, 4)
    latents = torch.randn(1, 4, 64)
    results = []
    for precision in (torch.float32, dtype):
        engine = TorchEngine(bundle, CPU, precision, ModelConfig())
        engine.prepare(conditions, schedule)
        engine.start(latents.to(precision))
        engine.advance()
        assert engine.latents().dtype == precision
        results.append(engine.latents().float() - latents)
    assert relative_rms(results[1], results[0]) < (0.03 if dtype == torch.bfloat16 else 0.004)
