"""The memory that a job needs, part by part, from shapes alone: nothing is read, allocated or run.

Weights, inputs and buffers are added up from the shapes that the engine itself uses. What a stage allocates for a
moment follows from a few numbers that were counted: on the meta device for GPUs (`mogle_rt.cost.counting`), and
measured on a CPU, where libraries have scratch memory of their own. Tests compare both with the planned numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from mogle_rt.bundle.source import TensorSource
from mogle_rt.config import MLP_RATIO, NUM_EXPERTS, PATCH, ModelConfig
from mogle_rt.encoders.vae import DECODE_PIXELS, ENCODE_PIXELS, pictures_at_once, vae_dtype
from mogle_rt.fast.settings import FastConfig
from mogle_rt.linear.packed import PackedWeight
from mogle_rt.loop.buffers import buffer_shapes
from mogle_rt.loop.reuse import difference_shapes, followed_shapes, kept_shapes
from mogle_rt.loop.schedule import step_capacity
from mogle_rt.memory.planner import Demand, SublayerBytes
from mogle_rt.memory.streaming import slot_bytes
from mogle_rt.model.layout import Layout
from mogle_rt.model.loading import LayerPlan, plan_layers
from mogle_rt.model.transformer import sublayers
from mogle_rt.ops.choice import choose

# Values of the VAE's activations that are alive at once, for each pixel and each channel of its widest feature maps
# (128 in FLUX's VAE). In 16 bits the decoder's last norms are computed in float32 besides.
ENCODED, DECODED, DECODED_HALF = 5.03, 6.02, 7.52
TEXT_PARTS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A job as the planner sees it.

    Attributes:
        device: where it runs. dtype: of activations and weights.
        height, width, batch, steps, text_tokens: see `Pipeline.__call__`.
        model, kernels, weight_format: see `TorchEngine`.
        prompts: whether text encoders read prompts; otherwise embeddings are given.
        vae: parameters of the VAE. text: parameters of the text encoders, by part. Where they are empty, the source's
            tensors are counted.
        tile: pixels of a side of the VAE's tiles; 0 if images are encoded and decoded whole.
        fast: what the steps leave out; None computes everything.
        edit: whether a part of given images is kept, see `mogle_rt.loop.blend.Kept`.
    """

    device: torch.device
    dtype: torch.dtype
    height: int
    width: int
    batch: int = 1
    steps: int = 28
    text_tokens: int = 512
    model: ModelConfig = field(default_factory=ModelConfig)
    kernels: str | None = None
    weight_format: str = PackedWeight.name
    prompts: bool = True
    vae: int = 0
    text: Mapping[str, int] = field(default_factory=dict)
    tile: int = 0
    fast: FastConfig | None = None
    edit: bool = False


def demand(source: TensorSource, run: Run) -> Demand:
    """The memory that a job needs.

    Args:
        source: the bundle, or one without weights.

    Raises:
        ConfigError: kernels or weight format don't exist, or the kernels don't take so wide a model.
    """
    config, item, kind = source.config.transformer, run.dtype.itemsize, run.device.type
    ops = choose(run.kernels, run.device)
    plans = plan_layers(
        source,
        run.device,
        run.dtype,
        weight_format=run.weight_format,
        fused=ops.RIDING,
        latent_lora=run.model.latent_lora,
    )
    tokens = run.height // PATCH * (run.width // PATCH)
    layout = Layout(text=run.text_tokens, image=tokens, condition=tokens, add_cond_attn=run.model.add_cond_attn)
    buffers = buffer_shapes(
        config,
        layout,
        run.batch,
        device=kind,
        dtype=run.dtype,
        most_before=max(plan.shape[1] - plan.stored.shape[1] for plan in plans.values()),
        most_after=max(plan.shape[0] - plan.stored.shape[0] for plan in plans.values()),
    )
    vae_item = vae_dtype(source.config.vae, run.dtype).itemsize
    text = dict(run.text) or {part: _parameters(source, part) for part in TEXT_PARTS}
    modulation = [
        info.numel for name, info in source.tensors.items() if name.startswith("transformer.") and _modulates(name)
    ]
    in_sublayers = {name for names in sublayers(config) for name in names}
    return Demand(
        always=_small_parts(source, plans, item)
        + sum(_held(plan) for name, plan in plans.items() if name not in in_sublayers),
        sublayers=tuple(_sublayer([plans[name] for name in names]) for names in sublayers(config)),
        run=sum(map(math.prod, buffers.values())) * item
        + _inputs(source, run, layout)
        + _kept(source, run, layout)
        + _edit(source, run, layout),
        tables=_tables(source, run) * item,
        vae=(run.vae or _parameters(source, "vae")) * vae_item,
        text=sum(text.values()) * item if run.prompts else 0,
        text_work=_text_work(source, run) if run.prompts and any(text.values()) else 0,
        text_streamed=_largest_text(source, text) * item if run.prompts else 0,
        modulation=sum(modulation) * item,
        encode=_encoder(run, source, vae_item),
        prepare=max(modulation, default=0) * item,
        step=_step(run, layout, source, plans),
        decode=_decoder(run, source, vae_item),
    )


def _parameters(source: TensorSource, part: str) -> int:
    return sum(source.tensors[f"{part}.{name}"].numel for name in source.names(part))


def _modulates(name: str) -> bool:
    return ".linear." in name or ".time_text_embed." in name


def _held(plan: LayerPlan) -> int:
    return plan.weight_format.held_bytes(plan.stored, plan.shape)


def _sublayer(plans: list[LayerPlan]) -> SublayerBytes:
    able = all(plan.weight_format.streamable for plan in plans)
    layouts = [plan.weight_format.slot_layout(plan.stored, plan.shape) for plan in plans] if able else []
    return SublayerBytes(sum(map(_held, plans)), slot_bytes(layouts) if able else None)


def _small_parts(source: TensorSource, plans: Mapping[str, LayerPlan], item: int) -> int:
    """Biases, LoRAs and norms of the layers; the text embedder; experts and gate."""
    config = source.config.transformer
    values = sum(plan.shape[0] + plan.rank * sum(plan.stored.shape) for plan in plans.values())
    values += config.width * (config.joint_attention_dim + 1) + _parameters(source, "mogle")
    values += config.attention_head_dim * (4 * config.num_layers + 2 * config.num_single_layers)
    return values * item


def _tables(source: TensorSource, run: Run) -> int:
    """Values of `ModulationTables`."""
    config = source.config.transformer
    double, single = config.num_layers, config.num_single_layers
    of_a_step, constant = 12 * double + 3 * single + 2, 6 * double + 3 * single
    return run.batch * config.width * (step_capacity(run.steps) * of_a_step + constant)


def _inputs(source: TensorSource, run: Run, layout: Layout) -> int:
    """Bytes of `StepInputs`, and of the modulations of one step."""
    config, item = source.config.transformer, run.dtype.itemsize
    of_a_step = 18 * config.num_layers + 6 * config.num_single_layers + 2  # with the condition's, which are constant
    latents = config.in_channels * layout.image
    values = run.batch * (config.width * (of_a_step + layout.text) + latents * (NUM_EXPERTS + 2)) + _tables(source, run)
    values += 2 * latents * NUM_EXPERTS  # the experts' outputs for black pictures, and the pictures themselves
    return values * item + 4 * layout.total * config.attention_head_dim


def _kept(source: TensorSource, run: Run, layout: Layout) -> int:
    """What steps keep for later ones in a fast mode."""
    config, fast = source.config.transformer, run.fast or FastConfig()
    kept = difference_shapes(layout, run.batch, config.in_channels) if fast.extrapolates else []
    kept += followed_shapes(layout, run.batch, config.in_channels) if fast.adapts else []
    nbytes = 4 * sum(map(math.prod, kept))
    if fast.keeps_condition:
        shapes = kept_shapes(config.num_layers, config.num_single_layers, layout, run.batch, config.width)
        nbytes += sum(map(math.prod, shapes)) * run.dtype.itemsize
    return nbytes


def _edit(source: TensorSource, run: Run, layout: Layout) -> int:
    """What an edit holds: `Kept` as the call makes it, its copy in the step, and the latents that it blends in."""
    if not run.edit:
        return 0
    latents = run.batch * layout.image * source.config.transformer.in_channels * run.dtype.itemsize
    return (3 + 3 + 1) * latents + (_edited_pixels(run) if run.device.type == "cpu" else 0)


def _edited_pixels(run: Run) -> int:
    """The given images and the weights of their pixels, float32 [B, 3, H, W] and [B, 1, H, W], on the CPU."""
    return 4 * (3 + 1) * run.batch * run.height * run.width


def _step(run: Run, layout: Layout, source: TensorSource, plans: Mapping[str, LayerPlan]) -> int:
    """What a step allocates for a moment."""
    config, rows = source.config.transformer, layout.total * run.batch
    D, item = config.width, run.dtype.itemsize
    if run.device.type == "cpu":
        # An MLP's activation in oneDNN's own memory, and the weight that oneDNN packs while it multiplies.
        packed = max(min(plan.shape[0], MLP_RATIO * D) * plan.shape[1] for plan in plans.values())
        return (rows * MLP_RATIO * D + packed) * item
    if choose(run.kernels, run.device).RIDING:
        return rows * (D * item + 4 * config.num_attention_heads)
    return int(8.1 * rows * D * item)


def _pixels(run: Run, most: int) -> int:
    """Pixels that the VAE works on at once."""
    if run.tile and max(run.height, run.width) > run.tile:
        return run.tile**2
    pixels = run.height * run.width
    return pixels * pictures_at_once(run.device, pixels, most)


def _encoder(run: Run, source: TensorSource, item: int) -> int:
    return int(ENCODED * _widest(source) * _pixels(run, ENCODE_PIXELS) * item)


def _decoder(run: Run, source: TensorSource, item: int) -> int:
    pixels = min(_pixels(run, DECODE_PIXELS), max(1, run.batch) * run.height * run.width)
    whole = 3 * run.batch * run.height * run.width * (item + 4)  # all images, and their conversion to pixels
    if run.edit and run.device.type == "cpu":  # the images with the kept pixels, and the given ones for each image
        whole += 12 * run.batch * run.height * run.width + _edited_pixels(run)
    return int((DECODED if item == 4 else DECODED_HALF) * _widest(source) * pixels * item) + whole


def _widest(source: TensorSource) -> int:
    """Channels of the VAE's widest feature maps."""
    channels = source.config.vae.get("block_out_channels", (128,))
    return int(channels[0])


def _largest_text(source: TensorSource, text: Mapping[str, int]) -> int:
    """Values of the largest tensor of the text encoders: T5's table of tokens."""
    names = [f"{part}.{name}" for part in TEXT_PARTS for name in source.names(part)]
    if names:
        return max(source.tensors[name].numel for name in names)
    return 32_128 * 4_096 if any(text.values()) else 0  # FLUX's


def _text_work(source: TensorSource, run: Run) -> int:
    """What T5 allocates for its prompts: attention's scores and its MLP's hidden layer."""
    t5 = source.config.text_encoder_2 or {}
    heads, hidden, width = (
        int(t5.get(name, flux)) for name, flux in (("num_heads", 64), ("d_ff", 10240), ("d_model", 4096))
    )
    tokens = run.text_tokens
    return run.batch * tokens * (3 * heads * tokens + 3 * hidden + 6 * width) * run.dtype.itemsize
