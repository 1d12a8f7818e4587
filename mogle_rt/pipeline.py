"""`Pipeline`: it draws faces from masks and prompts, and is used like a pipeline of diffusers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mogle_rt.arguments import (
    Generators,
    check_embeddings,
    check_options,
    check_tensor,
    common_count,
    generator_list,
    prompt_list,
    refuse_prompt_as_mask,
    seeded_generators,
    warn_of_guidance,
)
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.calls.callbacks import StepCallback, denoise_for
from mogle_rt.calls.decoding import Decoder, Decodes
from mogle_rt.calls.habits import DiffusersHabits
from mogle_rt.calls.memory import FitsMemory, MemoryPlans, tells_of_memory
from mogle_rt.calls.other_options import check_other_options
from mogle_rt.calls.prompts import PromptEncoder, repeated
from mogle_rt.calls.results import OutputType, PipelineOutput, RunReport
from mogle_rt.calls.stages import Stages, progress_bar
from mogle_rt.calls.styles import LoraMethods
from mogle_rt.calls.turns import one_at_a_time
from mogle_rt.config import DEFAULT_GUIDANCE, PATCH, VAE_SCALE, ModelConfig
from mogle_rt.cost.demand import Run
from mogle_rt.edits.methods import EditMethods
from mogle_rt.edits.start import StartImage
from mogle_rt.encoders.cache import TensorCache
from mogle_rt.encoders.conditioning import Conditioner, MaskPosterior
from mogle_rt.encoders.vae import autoencoder, load_autoencoder, vae_dtype
from mogle_rt.engines.choice import EngineName, engine_dtype, make_engine
from mogle_rt.engines.contract import Conditions, Engine
from mogle_rt.fast.choice import FastModes
from mogle_rt.fast.settings import FastConfig
from mogle_rt.loop.denoise import initial_latents
from mogle_rt.loop.schedule import make_schedule
from mogle_rt.masks.labels import MaskLike, resize, to_label_batch
from mogle_rt.masks.orders import Order
from mogle_rt.masks.sizes import default_size, warn_of_distortion, warn_of_other_size
from mogle_rt.memory.devices import choose_device, choose_dtype
from mogle_rt.torch_api.settings import settled

CACHE_BYTES = 256 << 20


class Pipeline(DiffusersHabits, FitsMemory, Decodes, FastModes, LoraMethods, EditMethods):
    """Runs Face-MoGLE from a bundle.

    Threads may share a pipeline; their calls then wait for each other. Processes can't share one: a pipeline that is
    pickled, copied or sent to a spawned process opens its bundle again.

    Args:
        checkpoint: a bundle from ``mogle-rt convert``, or ``demo``, the small one in the package (128 x 128 pixels).
        device: "cpu", "cuda", "cuda:N" or N, or "mps"; None chooses the best available device.
        dtype: "fp32", "bf16", "fp16" or a torch dtype; None chooses one that the device multiplies fast. In "fp16" the
            VAE computes in float32, unless its configuration says ``"force_upcast": false``.
        model_config: the reference's switches, see `ModelConfig`; unknown names are refused.
        kernels: "triton" or "torch": which operations compute a step. None follows the environment variable
            MOGLE_RT_KERNELS; if that is not set, it chooses Triton's fused kernels on GPUs and PyTorch elsewhere. Only
            for engine "torch".
        cuda_graphs: whether to replay the loop's steps as one CUDA graph on a CUDA device. Only for engine "torch".
        mixture: when the experts run: "bank" runs them once per image, "fused" runs them in every step together with
            the gate. None chooses for each call what costs less on the device. Only for engine "torch".
        engine: what runs the steps: "torch", or an exported graph with "onnxruntime", "tensorrt" or "tensorrt-rtx".
        engine_path: the folder of the export; None means the bundle's own folder. With an export, the default of
            ``dtype`` is the export's.
        cache_bytes: the largest size of each of two caches that are kept between calls, one of encoded masks and one of
            encoded prompts; 0 turns them off.
        max_memory: the most memory that this process may use on the device, such as "8GB" or a number of bytes; None
            takes what is free, less a margin. Weights that don't fit are streamed, which takes time and changes nothing
            else; see ``plan``.
        allow_tf32: let NVIDIA GPUs compute PyTorch's float32 products and convolutions in TF32, which is faster but
            rounds the operands to 11 significant bits. By default float32 means float32, whatever PyTorch's own flags
            say. It applies to engine "torch", and to the VAE and the text encoders with every engine.
        fast: what is left out to save time, which changes the images: a `FastConfig`, or "balanced" or "fast" (see
            `mogle_rt.fast.choice`). None leaves nothing out. ``fast`` is also an attribute that calls look at.

    Attributes:
        conditioning_cache, prompt_cache: see `TensorCache`; ``clear()`` empties them.
        last_run: a report on the last call, see `RunReport`.

    Raises:
        CheckpointError: the file is not a bundle, is damaged, or doesn't match its own configuration.
        ConfigError, DeviceError: an option is unknown or not available here.
    """

    @settled()
    def __init__(
        self,
        checkpoint: str | Path,
        device: str | int | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        model_config: ModelConfig | Mapping[str, Any] | None = None,
        *,
        kernels: str | None = None,
        cuda_graphs: bool = True,
        mixture: Literal["bank", "fused"] | None = None,
        engine: EngineName = "torch",
        engine_path: str | Path | None = None,
        cache_bytes: int = CACHE_BYTES,
        allow_tf32: bool = False,
        max_memory: str | int | None = None,
        fast: str | FastConfig | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(allow_tf32=allow_tf32)
        self._options = {
            "checkpoint": checkpoint,
            "device": device,
            "dtype": dtype,
            "model_config": ModelConfig.of(model_config),
            "kernels": kernels,
            "cuda_graphs": cuda_graphs,
            "mixture": mixture,
            "engine": engine,
            "engine_path": engine_path,
            "cache_bytes": cache_bytes,
            "allow_tf32": allow_tf32,
            "max_memory": max_memory,
            "fast": fast,
        }
        self._open()
        self.last_run = RunReport()

    def _open(self) -> None:
        for held in ("engine", "vae", "conditioner", "decoder", "prompt_encoder"):
            vars(self).pop(held, None)  # free what was loaded before, because its memory is needed now
        o, checkpoint = self._options, self._options["checkpoint"]
        self.model_config: ModelConfig = o["model_config"]
        self.device = choose_device(o["device"])
        self.dtype = choose_dtype(engine_dtype(o["engine"], o["engine_path"], checkpoint, o["dtype"]), self.device)
        self.bundle = Bundle(checkpoint)
        self.fast = o["fast"]
        vae_config = self.bundle.config.vae
        self._vae_dtype = vae_dtype(vae_config, self.dtype)
        weights = self.bundle.part("vae", self.device, self._vae_dtype)
        self.vae = load_autoencoder(autoencoder(vae_config), weights, f"{checkpoint} (vae)")
        run = Run(
            device=self.device,
            dtype=self.dtype,
            height=self.bundle.default_size,
            width=self.bundle.default_size,
            text_tokens=self.bundle.default_text_tokens,
            model=self.model_config,
            kernels=o["kernels"],
            prompts=self.bundle.has_text_encoders,
            fast=self.fast,
        )
        self.memory_plans = MemoryPlans(self.bundle, run, o["max_memory"], streams=o["engine"] == "torch")
        self.engine: Engine = make_engine(
            o["engine"],
            o["engine_path"],
            self.bundle,
            self.device,
            self.dtype,
            self.model_config,
            kernels=o["kernels"],
            cuda_graphs=o["cuda_graphs"],
            mixture=o["mixture"],
            streamed=self.plan.streamed,
        )
        self.conditioning_cache = TensorCache(o["cache_bytes"])
        self.prompt_cache = TensorCache(o["cache_bytes"])
        self.conditioner = Conditioner(self.vae, self.conditioning_cache)
        self.prompt_encoder = PromptEncoder(self.bundle, self.device, self.dtype, self.prompt_cache)
        self.decoder = Decoder(self.vae)
        self._hold(self.plan)

    @one_at_a_time
    @tells_of_memory
    @torch.no_grad()
    def __call__(
        self,
        mask: MaskLike | Sequence[MaskLike] | None = None,
        prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 28,
        guidance_scale: float = DEFAULT_GUIDANCE,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        condition_scale: float = 1.0,
        position_delta: tuple[int, int] = (0, 0),
        position_scale: float = 1.0,
        max_sequence_length: int | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        mask_posterior: MaskPosterior = "mean",
        return_dict: bool = True,
        *,
        seed: int | Sequence[int] | None = None,
        mask_order: Order = "celebamask",
        start: StartImage | None = None,
        **others: Any,
    ) -> PipelineOutput:
        """Draw faces. Each image of a batch equals the image that would be drawn alone, up to rounding.

        Args:
            mask: a semantic mask or a list of masks, in any form that `mogle_rt.masks` reads. None means a mask of
                background only (text only). Masks are resized to height x width by nearest neighbour; a warning is
                logged if that distorts them.
            prompt: a text or a list of texts; None means the empty prompt (mask only). One mask can go with several
                prompts, and one prompt with several masks.
            num_inference_steps: the number of denoising steps, S.
            guidance_scale: FLUX's distilled guidance. Models without it ignore this; a warning says so if it isn't 3.5.
            height, width: pixels, multiples of 16. If both are None, the image has the mask's aspect ratio and about as
                many pixels as the model's default square, whose side is 512, or the VAE's own size if that is smaller.
                The image is this square if there is no mask, if masks differ in aspect ratio, or if ``latents`` are
                given. If only one of the two is None, it is the square's side.
            num_images_per_prompt: the number of images for each pair of mask and prompt.
            generator: a generator for the noise, or a list with one for each image.
            latents: packed noise [B, N, 64] to use instead of random noise, N = height / 16 * width / 16.
            prompt_embeds, pooled_prompt_embeds: T5's embeddings [B, T, J] and CLIP's [B, P], instead of a prompt.
            condition_scale: the strength of attention between the condition and the rest; 1 is as trained, 0 is none.
            position_delta: shifts the condition by (rows, columns), in tokens.
            position_scale: the size of a condition token, in image tokens.
            max_sequence_length: the number of T5 tokens, at most 512; None takes it from the bundle's tokenizer (512
                for FLUX).
            output_type: "pil", "np" [B, H, W, 3] or "pt" [B, 3, H, W], both in [0, 1], or "latent" (packed latents).
            callback_on_step_end: called as ``callback(pipe, step, timestep, {"latents": …})`` after each step. It may
                return a dict with new latents. If it sets ``pipe.interrupt = True``, the loop ends after this step.
                It mustn't wait for a thread that calls the same pipeline: both would wait for ever.
            callback_on_step_end_tensor_inputs: as in diffusers, but only ``["latents"]`` is supported.
            mask_posterior: "mean" uses the mean of the VAE's posterior; "sample" draws from it with the generator, as
                the reference does.
            return_dict: False returns the tuple ``(images,)`` instead of a `PipelineOutput`, as in diffusers.
            seed: a number or a list of numbers, instead of generators. Image i of the batch is the image that a call
                for one image draws with ``seed + i``, or with ``seed[i]``. A seed gives the same noise on every device.
            mask_order: what the numbers of a label map mean: "celebamask", "bisenet", "farl", or the names of the
                classes; see `mogle_rt.masks.to_labels`.
            start: images to start from instead of noise alone, as `edit`, `image_to_image` and `inpaint` make it.
            others: arguments of diffusers' `FluxPipeline` that are not supported here. They raise an error that says
                why, unless their value asks for nothing, such as None.

        Raises:
            InputError: an argument is out of range, counts or shapes don't match, or a callback calls the pipeline.
            MaskError: a mask can't be read.
            CheckpointError: a prompt was given, and the bundle has no text encoders; or the bundle's file was changed.
            NumericalError: the result is not finite.
        """
        check_other_options(others, prompt)
        self.bundle.check_unchanged()
        size = self.bundle.default_size
        fit_to_mask = height is None and width is None and latents is None
        height, width = size if height is None else height, size if width is None else width
        if max_sequence_length is None:
            max_sequence_length = self.bundle.default_text_tokens
        check_options(
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            num_images_per_prompt=num_images_per_prompt,
            condition_scale=condition_scale,
            position_delta=position_delta,
            position_scale=position_scale,
            max_sequence_length=max_sequence_length,
            output_type=output_type,
            callback=callback_on_step_end,
            callback_inputs=callback_on_step_end_tensor_inputs,
            mask_posterior=mask_posterior,
        )
        # Convert numbers of other types, such as NumPy's, to Python's: the result mustn't depend on the type.
        height, width, num_inference_steps = int(height), int(width), self.steps_of(int(num_inference_steps))
        num_images_per_prompt, max_sequence_length = int(num_images_per_prompt), int(max_sequence_length)
        guidance_scale, condition_scale = float(guidance_scale), float(condition_scale)
        rows, columns = map(float, position_delta)
        self._interrupt = False
        refuse_prompt_as_mask(mask)
        labels = [] if mask is None else to_label_batch(mask, order=mask_order)
        if labels and fit_to_mask:
            height, width = default_size(labels, size)
        grid = (height // PATCH, width // PATCH)
        warn_of_distortion(labels, height, width)
        warn_of_other_size(height, width, size)
        warn_of_guidance(guidance_scale, self.bundle.config.transformer.guidance_embeds)
        labels = [resize(one, height, width) for one in labels] or [np.zeros((height, width), dtype=np.uint8)]
        prompts = prompt_list(prompt, prompt_embeds, pooled_prompt_embeds)
        if prompt_embeds is not None:
            t = self.bundle.config.transformer
            check_embeddings(prompt_embeds, pooled_prompt_embeds, t.joint_attention_dim, t.pooled_projection_dim)
        pairs = common_count(len(labels), len(prompts) if prompt_embeds is None else prompt_embeds.shape[0])
        batch = pairs * num_images_per_prompt
        first = 0 if start is None else start.first_step(num_inference_steps, len(labels), height, width)
        generator = generator if seed is None else seeded_generators(seed, generator, batch)
        generators = generator_list(generator, batch, self.device)
        report = self.last_run = RunReport(batch_size=batch, steps=num_inference_steps - first)
        self._num_timesteps, self._guidance_scale = report.steps, guidance_scale

        shape = {"height": height, "width": width, "batch": batch, "steps": num_inference_steps, "fast": self.fast}
        shape["edit"] = start is not None and start.weights is not None
        tokens = max_sequence_length if prompt_embeds is None else prompt_embeds.shape[1]
        self._hold(self.memory_plans.for_call(**shape, text_tokens=tokens, prompts=prompt_embeds is None))
        schedule = make_schedule(self.bundle.config.scheduler, num_inference_steps, grid[0] * grid[1])
        if latents is not None:
            check_tensor("latents", latents, (batch, grid[0] * grid[1], self.bundle.config.transformer.in_channels))
        drawn_by = generator if generators is None else generators
        channels = self.bundle.config.transformer.in_channels // 4
        unpacked = (batch, channels, height // VAE_SCALE, width // VAE_SCALE)
        latents, kept = initial_latents(latents, unpacked, drawn_by, self.device, self.dtype), None
        with progress_bar(report.steps, self._progress_bar_config) as bar:
            stage = Stages(bar, self.device, report.seconds, described="desc" in self._progress_bar_config)
            with stage("text"):
                if prompt_embeds is None or pooled_prompt_embeds is None:
                    prompt_embeds, pooled_prompt_embeds = self.prompt_encoder(prompts, max_sequence_length)
            with stage("mask"), self._vae_in_memory():
                masks = self.conditioner.for_images(labels, batch, mask_posterior, drawn_by)
                if start is not None:
                    latents, kept = start.begin(self.conditioner.image_latents, latents, schedule, first)
            with stage("prepare"):
                self.engine.prepare(
                    Conditions(
                        masks=masks,
                        prompt_embeds=repeated(prompt_embeds, batch),
                        pooled_prompt_embeds=repeated(pooled_prompt_embeds, batch),
                        guidance_scale=guidance_scale,
                        grid=grid,
                        condition_scale=condition_scale,
                        position_delta=(rows, columns),
                        position_scale=float(position_scale),
                        kept=kept,
                        fast=self.fast,
                    ),
                    schedule,
                )
            with stage("denoise"):
                packed = denoise_for(self, latents, schedule, first, callback_on_step_end, bar)
            report.interrupted, report.execution = self._interrupt, self.engine.execution
            report.computed_steps, report.condition_steps = self.engine.computed_steps, self.engine.condition_steps
            report.weights = self.engine.weight_formats
            images = packed
            if output_type != "latent":
                with stage("decode"), self._vae_in_memory():
                    images = self.decoder(packed, height, width, output_type, None if start is None else start.finish)
        return PipelineOutput(images=images) if return_dict else (images,)  # type: ignore[return-value]
