"""The model sizes that are timed, as random checkpoints. Both sides load the same files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.baseline import Baseline
from benchmarks.machine import Shape
from examples.mask import face
from mogle_rt import Pipeline
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.config import MLP_RATIO, PATCH, ModelConfig, TransformerConfig
from mogle_rt.encoders.mask_planes import MaskPlanes
from mogle_rt.engines.contract import Conditions
from mogle_rt.engines.torch_engine import TorchEngine
from mogle_rt.export.exporter import export
from mogle_rt.loop.schedule import Schedule, make_schedule
from mogle_rt.masks import CLASS_NAMES, Labels, resize
from tests.checkpoints import VAE, write_checkpoint

GUIDANCE = 3.5
QUARTER_VAE = VAE | {"block_out_channels": [32, 64, 128, 128], "layers_per_block": 2, "norm_num_groups": 8}
TINY_VAE = VAE | {"block_out_channels": [8, 16, 16, 16]}  # as small, compared with the steps, as FLUX's
MODULATION = re.compile(r"\.norm(1|1_context)?\.linear\.|norm_out\.|time_text_embed\.")  # needed before the loop only


@dataclass(frozen=True, kw_only=True)
class Size:
    """The shape of a model: its transformer, its number of text tokens T, and its VAE."""

    transformer: TransformerConfig
    text: int
    vae: dict[str, Any]


def _transformer(heads: int, axes: tuple[int, int, int], double: int, single: int, **widths: int) -> TransformerConfig:
    return TransformerConfig(
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=sum(axes),
        num_attention_heads=heads,
        guidance_embeds=True,
        axes_dims_rope=axes,
        **widths,
    )


FLUX_AXES, FLUX_WIDTHS = (16, 56, 56), {"joint_attention_dim": 4096, "pooled_projection_dim": 768}
SIZES = {
    "tiny": Size(  # the golden checkpoint's shape
        transformer=_transformer(3, (4, 6, 6), 2, 3, joint_attention_dim=40, pooled_projection_dim=24),
        text=24,
        vae=TINY_VAE,
    ),
    "quarter VAE": Size(
        transformer=_transformer(1, (4, 6, 6), 1, 1, joint_attention_dim=16, pooled_projection_dim=16),
        text=1,
        vae=QUARTER_VAE,
    ),
    "width 256": Size(
        transformer=_transformer(4, (16, 24, 24), 2, 4, joint_attention_dim=64, pooled_projection_dim=64),
        text=32,
        vae=TINY_VAE,
    ),
    "width 1536": Size(transformer=_transformer(12, FLUX_AXES, 1, 2, **FLUX_WIDTHS), text=32, vae=TINY_VAE),
    "FLUX width": Size(transformer=_transformer(24, FLUX_AXES, 1, 2, **FLUX_WIDTHS), text=512, vae=TINY_VAE),
}


class Models:
    """A random checkpoint of one size. It is written once; each side is loaded from it when first used."""

    def __init__(self, name: str, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.name, self.size, self.folder, self.device, self.dtype = name, SIZES[name], folder, device, dtype
        self.files = write_checkpoint(folder, self.size.transformer, vae=self.size.vae)
        self.path = self.files.convert(folder / "bundle.safetensors")

    @cached_property
    def bundle(self) -> Bundle:
        return Bundle(self.path)

    @cached_property
    def pipeline(self) -> Pipeline:
        pipe = Pipeline(self.path, self.device, self.dtype)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @cached_property
    def onnx_pipeline(self) -> Pipeline:
        """The same pipeline on onnxruntime, from an export that is made once."""
        folder = export(self.path, dtype=self.dtype)
        pipe = Pipeline(self.path, self.device, self.dtype, engine="onnxruntime", engine_path=folder)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @cached_property
    def eager_pipeline(self) -> Pipeline:
        """An engine whose operations can be counted: it uses no CUDA graph, whose replay would show none of them."""
        pipe = Pipeline(self.path, self.device, self.dtype, cuda_graphs=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @cached_property
    def engine(self) -> TorchEngine:
        return TorchEngine(self.bundle, self.device, self.dtype, ModelConfig())

    @cached_property
    def baseline(self) -> Baseline:
        files = self.files
        return Baseline.from_files(files.flux, files.lora, files.mogle, dtype=self.dtype).to(self.device)

    def forget_masks(self) -> None:
        """Empty the caches in which the pipelines keep encodings of masks."""
        for pipe in (self.pipeline, self.eager_pipeline):
            pipe.conditioning_cache.clear()

    def resident_bytes(self, *parts: str) -> int:
        """Bytes of these parts' weights, without those that a run no longer needs at its first step."""
        return sum(
            info.end - info.begin
            for name, info in self.bundle.tensors.items()
            if name.partition(".")[0] in parts and not MODULATION.search(name)
        )


def face_mask() -> Labels:
    """A drawn face, [512, 512], with the 12 classes that occur in CelebAMask-HQ's 27000.png."""
    labels = face()
    for name, other in (("l_ear", "hair"), ("mouth", "l_lip"), ("cloth", "background")):
        labels[labels == CLASS_NAMES.index(name)] = CLASS_NAMES.index(other)
    return labels


def cut_hair(labels: Labels) -> Labels:
    """The mask with some hair turned into background."""
    edited = labels.copy()
    upper = edited[: len(edited) // 3]
    upper[upper == CLASS_NAMES.index("hair")] = CLASS_NAMES.index("background")
    assert (edited != labels).any(), "the mask has no hair to cut"
    return edited


class Job:
    """The images to make: masks, texts and noise, the same for both sides. The baseline makes them one by one.

    Attributes:
        labels: B different masks: one face, shifted a little further to the side each time.
        prompt: (B, T, J). pooled: (B, P). noise: (B, N, 64).
    """

    def __init__(self, models: Models, mask: Labels, pixels: int, batch: int, steps: int = 28) -> None:
        self.models, self.pixels, self.batch, self.steps = models, pixels, batch, steps
        size, g = models.size, torch.Generator().manual_seed(1)
        self.tokens = (pixels // PATCH) ** 2

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g).to(models.device, models.dtype)

        small = resize(mask, pixels, pixels)
        self.labels = [np.roll(small, i * pixels // 16, axis=1) for i in range(batch)]
        self.prompt = draw(batch, size.text, size.transformer.joint_attention_dim)
        self.pooled = draw(batch, size.transformer.pooled_projection_dim)
        self.noise = draw(batch, self.tokens, 64)
        self.k = steps // 2  # the step that is timed, where a single step is

    @property
    def product(self) -> Shape:
        """The largest matrix product of a step: a single block's q, k, v and MLP at once."""
        D = self.models.size.transformer.width
        return self.batch * (self.models.size.text + 2 * self.tokens), D, (3 + MLP_RATIO) * D

    @property
    def title(self) -> str:
        return f"{self.models.name}, {self.pixels} px, batch {self.batch}"

    @cached_property
    def masks(self) -> MaskPlanes:
        """The encoded pictures, as the engine takes them."""
        return self.models.pipeline.conditioner(self.labels)

    @cached_property
    def mask_latents(self) -> Tensor:
        """The same, stacked as the baseline takes them: (B, 20, N, 64)."""
        return self.masks.stacked()

    @cached_property
    def schedule(self) -> Schedule:
        plan = make_schedule(self.models.bundle.config.scheduler, self.steps, self.tokens)
        device = self.models.device
        return Schedule(plan.sigmas.to(device), plan.timesteps.to(device), plan.model_timesteps.to(device))

    @cached_property
    def conditions(self) -> Conditions:
        return Conditions(
            masks=self.masks,
            prompt_embeds=self.prompt,
            pooled_prompt_embeds=self.pooled,
            guidance_scale=GUIDANCE,
            grid=(self.pixels // PATCH, self.pixels // PATCH),
        )

    def prepare(self) -> None:
        """Prepare the engine: give it all that no step changes."""
        self.models.engine.prepare(self.conditions, self.schedule)

    def engine_condition(self) -> Tensor:
        return self.models.engine.condition(self.noise, self.k)

    def baseline_condition(self) -> Tensor:
        t = self.schedule.timesteps[self.k : self.k + 1]
        condition = self.models.baseline.condition
        return torch.cat([condition(self.mask_latents[i, None], self.noise[i, None], t) for i in range(self.batch)])

    def engine_step(self) -> Tensor:
        engine = self.models.engine
        engine.start(self.noise, self.k)
        engine.advance()
        return engine.latents()

    @torch.inference_mode()
    def eager_step(self) -> Tensor:
        """The same as `engine_step`, but one operation after the other, without a CUDA graph."""
        engine = self.models.engine
        engine.start(self.noise, self.k)
        engine.prepared.advance()
        return engine.latents()

    def baseline_step(self) -> Tensor:
        def one(i: int) -> Tensor:
            return self.models.baseline.step(
                self.k,
                self.schedule.timesteps,
                self.schedule.sigmas,
                self.mask_latents[i, None],
                self.noise[i, None],
                self.prompt[i, None],
                self.pooled[i, None],
                GUIDANCE,
                self.pixels,
                self.pixels,
            )

        return torch.cat([one(i) for i in range(self.batch)])

    def engine_images(self, pipeline: Pipeline | None = None) -> Tensor:
        """Draw the images, (B, 3, H, W), from encoding the masks to decoding; by default on the torch engine."""
        images = (pipeline or self.models.pipeline)(
            self.labels,
            prompt_embeds=self.prompt,
            pooled_prompt_embeds=self.pooled,
            latents=self.noise,
            num_inference_steps=self.steps,
            guidance_scale=GUIDANCE,
            height=self.pixels,
            width=self.pixels,
            output_type="pt",
        ).images
        assert isinstance(images, Tensor)
        return images

    def baseline_images(self) -> Tensor:
        def one(i: int) -> Tensor:
            return self.models.baseline(
                torch.from_numpy(self.labels[i]).to(self.models.device),
                self.prompt[i, None],
                self.pooled[i, None],
                self.noise[i, None],
                self.steps,
                GUIDANCE,
                height=self.pixels,
                width=self.pixels,
            )["image"]

        return torch.cat([one(i) for i in range(self.batch)])
