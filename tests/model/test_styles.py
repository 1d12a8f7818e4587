"""LoRAs as styles: compared with peft, and with the baseline where there is a condition; and how they come and go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.baseline import Baseline
from mogle_rt import InputError
from mogle_rt.bundle import schema
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.config import ModelConfig
from mogle_rt.conversion.lora import LowRank, read_adapter
from mogle_rt.engines.contract import Conditions
from mogle_rt.engines.torch_engine import TorchEngine
from mogle_rt.loop.denoise import denoise
from mogle_rt.loop.schedule import make_schedule
from mogle_rt.model.styles import MOST_RANK, StyledTransformer, capacity_for
from tests.checkpoints import TINY, Files, random_tensors
from tests.conftest import assert_close, in_the_interpreter, relative_rms

CPU = torch.device("cpu")
GRID, STEPS = (2, 3), 3
TOKENS = GRID[0] * GRID[1]
LAYERS = {
    name.removesuffix(".weight"): shape
    for name, shape in schema.transformer_tensors(TINY).items()
    if len(shape) == 2  # all layers with a matrix
}
# Layers that also take the condition's rows, after the image's.
SHARED_ENDS = ("norm1.linear", "norm.linear", "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "mlp")


def write_style(path: Path, seed: int, rank: int, layers: Sequence[str] = tuple(LAYERS), size: float = 1.0) -> Path:
    """A random LoRA in diffusers' spelling."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in layers:
        out, inner = LAYERS[layer]
        shapes |= {f"{layer}.lora_A.weight": (rank, inner), f"{layer}.lora_B.weight": (out, rank)}
    tensors = random_tensors(shapes, torch.Generator().manual_seed(seed))
    scaled = {name: size * t if "lora_B" in name else t for name, t in tensors.items()}
    save_file({f"transformer.{name}": t for name, t in scaled.items()}, path)
    return path


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle(tiny_bundle)


def engine_of(bundle: Bundle, styles: Mapping[Path, float], kernels: str = "torch", **switches: bool) -> TorchEngine:
    """An engine with these adapters active."""
    engine = TorchEngine(bundle, CPU, torch.float32, ModelConfig(**switches), kernels=kernels)
    for path, weight in styles.items():
        engine.styles.load(path.stem, read_adapter(path, TINY), weight)
    return engine


def conditions(batch: int = 1, seed: int = 0, **placement: Any) -> Conditions:
    g = torch.Generator().manual_seed(seed)
    return Conditions.from_mask_latents(
        torch.randn(batch, 20, TOKENS, 64, generator=g),
        prompt_embeds=torch.randn(batch, 5, TINY.joint_attention_dim, generator=g),
        pooled_prompt_embeds=torch.randn(batch, TINY.pooled_projection_dim, generator=g),
        guidance_scale=3.0,
        grid=GRID,
        **placement,
    )


def run(engine: TorchEngine, asked: Conditions | None = None) -> Tensor:
    """The latents after all steps."""
    schedule = make_schedule(engine.weights.source.config.scheduler, STEPS, TOKENS)
    asked = conditions() if asked is None else asked
    engine.prepare(asked, schedule)
    noise = torch.randn(asked.masks.batch, TOKENS, 64, generator=torch.Generator().manual_seed(9))
    return denoise(engine, noise, schedule)


def chosen(*parts: str) -> list[str]:
    return [layer for layer in LAYERS if any(part in layer for part in parts)]


STYLES: list[list[tuple[int, float, Sequence[str]]]] = [
    [(3, 1.0, tuple(LAYERS))],
    [(3, 0.7, tuple(LAYERS)), (9, -0.4, tuple(LAYERS))],
    [(5, 1.3, chosen("to_q", "to_v", "add_k")), (17, 0.5, chosen("proj_mlp", "ff", "to_v")), (2, 1.0, chosen("norm"))],
    [(4, 1.0, chosen("embed"))],
]
# Triton's interpreter is slow, so the kernels run only where they get other arguments: with several adapters at once.
PARAMETERS = [
    *((kernels, batch, number) for kernels, batch in (("torch", 1), ("torch", 3)) for number in range(len(STYLES))),
    *(pytest.param("triton", 2, number, marks=in_the_interpreter) for number in (1, 2)),
]


@pytest.mark.parametrize(("kernels", "batch", "number"), PARAMETERS)
def test_without_a_condition_equals_peft(
    kernels: str, batch: int, number: int, bundle: Bundle, tiny_files: Files, tmp_path: Path
) -> None:
    """diffusers' transformer with peft's adapters gives the same. Here the condition has rows, but nothing sees them."""
    theirs = FluxTransformer2DModel.from_pretrained(tiny_files.flux / "transformer")
    styles: dict[Path, float] = {}
    for i, (rank, weight, layers) in enumerate(STYLES[number]):
        path = write_style(tmp_path / f"style{i}.safetensors", i, rank, layers)
        theirs.load_lora_adapter(tmp_path, weight_name=path.name, prefix="transformer", adapter_name=path.stem)
        styles[path] = weight
    theirs.set_adapters([path.stem for path in styles], list(styles.values()))
    asked = conditions(batch, condition_scale=0.0)
    schedule = make_schedule(bundle.config.scheduler, STEPS, TOKENS)
    latents, k = torch.randn(batch, TOKENS, 64), 1
    ids = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(2.0), torch.arange(3.0), indexing="ij"), -1)
    expected = theirs(
        hidden_states=latents,
        encoder_hidden_states=asked.prompt_embeds,
        pooled_projections=asked.pooled_prompt_embeds,
        timestep=schedule.model_timesteps[k : k + 1].expand(batch) / 1000,
        guidance=torch.full((batch,), 3.0),
        txt_ids=torch.zeros(5, 3),
        img_ids=ids.reshape(TOKENS, 3),
    ).sample
    engine = engine_of(bundle, styles, kernels)
    engine.prepare(asked, schedule)
    velocity = engine.velocity(latents, torch.randn(batch, TOKENS, 64), k)
    assert_close(velocity, expected, rms=1e-5)
    plain = engine_of(bundle, {}, kernels)
    plain.prepare(asked, schedule)
    assert relative_rms(plain.velocity(latents, torch.zeros(batch, TOKENS, 64), k), expected) > 1e-2


SWITCHES: list[dict[str, bool]] = [
    {},
    {"add_cond_attn": True},
    {"latent_lora": True},
    {"latent_lora": True, "add_cond_attn": True, "independent_condition": True},
    {"union_cond_attn": False},
]


def add_style(transformer: nn.Module, adapter: Mapping[str, LowRank]) -> None:
    """Add a style to the baseline. Image and condition pass its layers one after the other, so the condition's calls are
    left out."""

    def hook(down: Tensor, up: Tensor, *, shared: bool) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        calls = 0

        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            of_condition = shared and calls % 2 == 0
            return output if of_condition else output + inputs[0] @ down.t() @ up.t()

        return add

    modules = dict(transformer.named_modules())
    for layer, branch in adapter.items():
        in_block = layer.startswith("single") and layer.endswith("proj_out")
        shared = in_block or layer.endswith(SHARED_ENDS) or layer.startswith(("time_text_embed", "x_embedder"))
        modules[layer].register_forward_hook(hook(branch.down, branch.up, shared=shared))


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "+".join(s) or "released")
@pytest.mark.parametrize("condition_scale", [1.0, 0.4])
def test_with_a_condition_equals_the_baseline(
    switches: dict[str, bool], condition_scale: float, bundle: Bundle, tiny_files: Files, tmp_path: Path
) -> None:
    baseline = Baseline.from_files(tiny_files.flux, tiny_files.lora, tiny_files.mogle, **switches)  # type: ignore[arg-type]
    path = write_style(tmp_path / "style.safetensors", 1, 6)
    add_style(baseline.transformer, read_adapter(path, TINY))
    engine = engine_of(bundle, {path: 1.0}, **switches)  # type: ignore[arg-type]
    asked = conditions(condition_scale=condition_scale)
    schedule = make_schedule(bundle.config.scheduler, STEPS, TOKENS)
    engine.prepare(asked, schedule)
    latents, condition = torch.randn(1, TOKENS, 64), torch.randn(1, TOKENS, 64)
    for k in range(STEPS):
        expected = baseline.velocity(
            latents,
            condition,
            asked.prompt_embeds,
            asked.pooled_prompt_embeds,
            schedule.timesteps[k : k + 1],
            3.0,
            height=GRID[0] * 16,
            width=GRID[1] * 16,
            condition_scale=condition_scale,
        )
        assert_close(engine.velocity(latents, condition, k), expected, rms=1e-5)


def test_the_conditions_rows_stay_as_they_are(bundle: Bundle, tmp_path: Path) -> None:
    """Where the condition sees only itself, a style changes no bit of its rows, in the residual stream or the
    modulations."""
    path = write_style(tmp_path / "style.safetensors", 1, 6)
    schedule = make_schedule(bundle.config.scheduler, STEPS, TOKENS)
    latents, condition = torch.randn(1, TOKENS, 64), torch.randn(1, TOKENS, 64)
    seen: list[list[Tensor]] = []
    for styles in ({}, {path: 1.0}):
        engine = engine_of(bundle, styles)
        engine.prepare(conditions(condition_scale=0.0), schedule)
        engine.velocity(latents, condition, 1)
        step = engine.prepared
        c = step.buffers.x.shape[0] - TOKENS
        seen.append([step.buffers.x, step.modulation.double, step.modulation.single])
    (plain, double, single), (styled, styled_double, styled_single) = seen
    assert torch.equal(plain[c:], styled[c:])
    assert torch.equal(double[:, :, 2], styled_double[:, :, 2])
    assert torch.equal(single[:, :, 1], styled_single[:, :, 1])
    assert relative_rms(plain[:c], styled[:c]) > 1e-2
    for i in (0, 1):
        assert relative_rms(double[:, :, i], styled_double[:, :, i]) > 1e-2
    assert relative_rms(single[:, :, 0], styled_single[:, :, 0]) > 1e-2


def branch_addresses(engine: TorchEngine) -> list[int]:
    transformer = engine.prepared.transformer
    assert isinstance(transformer, StyledTransformer)
    return [t.data_ptr() for branch in transformer.branches.values() for t in (branch.down, branch.up)]


def test_adapters_of_one_capacity_are_exchanged_in_place(bundle: Bundle, tmp_path: Path) -> None:
    """The step stays, and so would a captured graph. The result equals that of a new engine."""
    first = write_style(tmp_path / "first.safetensors", 1, 5)
    second = write_style(tmp_path / "second.safetensors", 2, 8)
    engine = engine_of(bundle, {first: 1.0, second: 0.0})
    images = [run(engine)]
    step, addresses = engine.prepared, [*engine.prepared.addresses(), *branch_addresses(engine)]
    for weights in ({first: 0.0, second: 1.0}, {first: -0.5, second: 0.0}, {first: 1.0, second: 0.0}):
        engine.styles.activate([path.stem for path in weights], list(weights.values()))
        images.append(run(engine))
        assert engine.prepared is step
        assert [*engine.prepared.addresses(), *branch_addresses(engine)] == addresses
        assert torch.equal(images[-1], run(engine_of(bundle, weights)))
    assert torch.equal(images[0], images[3])
    assert relative_rms(images[0], images[1]) > 1e-2


def test_another_capacity_has_a_step_of_its_own(bundle: Bundle, tmp_path: Path) -> None:
    """A kept step is used again for its capacity, with the weights of the adapters that are active then."""
    small = write_style(tmp_path / "small.safetensors", 1, 4)
    large = write_style(tmp_path / "large.safetensors", 2, 9)
    engine = engine_of(bundle, {})
    engine._runners.limit = 1 << 30  # as on a GPU
    plain, plain_step = run(engine), engine.prepared
    steps = []
    for path in (small, large, small):
        engine.styles.load(path.stem, read_adapter(path, TINY), 0.8)
        assert torch.equal(run(engine), run(engine_of(bundle, {path: 0.8})))
        steps.append(engine.prepared)
        engine.styles.remove([path.stem])
        assert torch.equal(run(engine), plain)
        assert engine.prepared is plain_step
    assert steps[0] is steps[2] is not steps[1]
    both = run(engine_of(bundle, {small: 0.8, large: 0.3}))
    assert relative_rms(both, run(engine_of(bundle, {small: 0.8}))) > 1e-3


def test_steps_of_other_shapes_share_the_branches(bundle: Bundle, tmp_path: Path) -> None:
    """Branches are kept once for all steps, and hold the active adapters whichever step runs next."""
    paths = [write_style(tmp_path / f"{name}.safetensors", seed, 4) for seed, name in enumerate("ab")]
    engine = engine_of(bundle, dict.fromkeys(paths, 1.0))
    engine._runners.limit = 1 << 30  # as on a GPU
    seen = []
    for path, batch in ((paths[0], 1), (paths[1], 2), (paths[0], 1)):
        engine.styles.activate([path.stem], [1.0])
        assert torch.equal(run(engine, conditions(batch)), run(engine_of(bundle, {path: 1.0}), conditions(batch)))
        seen.append((engine.prepared, engine.prepared.transformer))
    assert seen[0][0] is seen[2][0]
    assert seen[0][0] is not seen[1][0]
    assert seen[0][1] is seen[1][1]


@pytest.mark.parametrize("part", ["norm_out.linear", "context_embedder", "time_text_embed.text_embedder.linear_1"])
def test_layers_that_are_used_once_a_run(part: str, bundle: Bundle, tmp_path: Path) -> None:
    """A style of only such layers uses the step of no style. Tables that were made with another style are made anew."""
    path = write_style(tmp_path / "style.safetensors", 1, 4, [part])
    engine = engine_of(bundle, {})
    plain, step = run(engine), engine.prepared
    engine.styles.load("style", read_adapter(path, TINY))
    styled = run(engine)
    assert relative_rms(styled, plain) > 1e-4
    assert engine.prepared is step
    engine.styles.remove(["style"])
    assert torch.equal(run(engine), plain)


@pytest.mark.quick
def test_ranks_are_bounded(bundle: Bundle) -> None:
    out, inner = LAYERS["proj_out"]

    def adapter(rank: int) -> dict[str, LowRank]:
        return {"proj_out": LowRank(torch.zeros(rank, inner), torch.zeros(out, rank))}

    styles = engine_of(bundle, {}).styles
    styles.load("whole", adapter(MOST_RANK))
    with pytest.raises(InputError, match=f"'proj_out' add up to {MOST_RANK + 1}, at most {MOST_RANK}"):
        styles.load("more", adapter(1))
    assert (styles.names, styles.active) == (["whole"], {"whole": 1.0})
    styles.activate([], [])
    styles.load("more", adapter(1))
    assert styles.shape == (("proj_out", 8),)
    styles.activate(["whole", "more"], [0.0, 1.0])  # an adapter of weight 0 takes no room
    assert styles.shape == (("proj_out", 8),)
    styles.activate(["whole"], [0.0])
    assert len(styles.shape) == styles.version == 0
    assert not styles.acts_within("proj_out")


@pytest.mark.quick
@pytest.mark.parametrize(("rank", "room"), [(0, 0), (1, 8), (8, 8), (9, 16), (64, 64), (65, 128), (1024, 1024)])
def test_capacity(rank: int, room: int) -> None:
    assert capacity_for(rank) == room
