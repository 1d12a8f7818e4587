"""`Pipeline`: a mask and a prompt in, a face out. The names and habits of diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from tqdm import tqdm

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
)
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.calls.callbacks import StepCallback, called_back
from mogle_rt.calls.decoding import Decoder
from mogle_rt.calls.habits import DiffusersHabits
from mogle_rt.calls.other_options import check_other_options
from mogle_rt.calls.prompts import PromptEncoder, repeated
from mogle_rt.calls.results import OutputType, PipelineOutput, RunReport
from mogle_rt.calls.stages import Stages, progress_bar
from mogle_rt.calls.styles import LoraMethods
from mogle_rt.calls.turns import one_at_a_time
from mogle_rt.config import PATCH, VAE_SCALE, ModelConfig
from mogle_rt.encoders.cache import TensorCache
from mogle_rt.encoders.conditioning import Conditioner, MaskPosterior
from mogle_rt.encoders.mask_planes import MaskPlanes
from mogle_rt.encoders.vae import autoencoder, load_autoencoder, pack_latents, vae_dtype
from mogle_rt.engines.choice import EngineName, engine_dtype, make_engine
from mogle_rt.engines.contract import Conditions, Engine
from mogle_rt.loop.denoise import denoise
from mogle_rt.loop.progress import Progress
from mogle_rt.loop.schedule import Schedule, make_schedule
from mogle_rt.masks.classes import Labels
from mogle_rt.masks.labels import MaskLike, resize, to_label_batch
from mogle_rt.masks.orders import Order
from mogle_rt.masks.sizes import default_size, warn_of_distortion
from mogle_rt.memory.devices import choose_device, choose_dtype
from mogle_rt.torch_api.settings import settled

CACHE_BYTES = 256 << 20


class Pipeline(DiffusersHabits, LoraMethods):
    """Face-MoGLE from a bundle. Threads may share one: their calls are made one after the other. Other processes may not:
    a pipeline that is pickled, copied or sent to a spawned process opens its bundle anew.

    Args:
        checkpoint: a bundle, see ``mogle-rt convert``; or ``demo``, the small one in the package (128 x 128 pixels).
        device: "cpu", "cuda", "cuda:N" or N, or "mps"; None takes the best there is.
        dtype: "fp32", "bf16", "fp16" or a torch dtype; None takes what the device multiplies fast. In "fp16" the VAE
            computes in float32, unless its configuration says ``"force_upcast": false``.
        model_config: the reference's switches, see `ModelConfig`; unknown names are refused.
        kernels: "triton" or "torch", the operations of a step; None takes what the environment variable
            MOGLE_RT_KERNELS says, and without it Triton's fused kernels on GPUs and PyTorch elsewhere. For "torch".
        cuda_graphs: replay the loop's steps as one CUDA graph, where there is a CUDA device. For "torch".
        mixture: where the experts run: "bank", once an image, or "fused", in every step together with the gate; None
            takes for each call what costs less on the device. For "torch".
        engine: what runs the steps: "torch", or, from an export, "onnxruntime", "tensorrt" or "tensorrt-rtx".
        engine_path: the export's folder; None: the bundle's own. Its dtype is then the default.
        cache_bytes: how much the encodings of masks, and those of prompts, may each keep from call to call; 0 keeps
            none.
        allow_tf32: let NVIDIA GPUs compute float32 products and convolutions of PyTorch's in TF32, which is faster and
            rounds their operands to 11 significant bits. By default float32 means float32, whatever PyTorch's own
            flags say. For "torch", and for the VAE and the text encoders of every engine.

    Attributes:
        conditioning_cache, prompt_cache: see `TensorCache`; ``clear()`` empties them.
        last_run: what the last call did, see `RunReport`.

    Raises:
        CheckpointError: the file is not a bundle, damaged, or doesn't fit its own configuration.
        ConfigError, DeviceError: an option is unknown or can't be had here.
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
        }
        self._open()
        self.last_run = RunReport()

    def _open(self) -> None:
        for held in ("engine", "vae", "conditioner", "decoder", "prompt_encoder"):
            vars(self).pop(held, None)  # what was loaded before goes first: the new one needs its memory
        o, checkpoint = self._options, self._options["checkpoint"]
        self.model_config: ModelConfig = o["model_config"]
        self.device = choose_device(o["device"])
        self.dtype = choose_dtype(engine_dtype(o["engine"], o["engine_path"], checkpoint, o["dtype"]), self.device)
        self.bundle = Bundle(checkpoint)
        vae_config = self.bundle.config.vae
        weights = self.bundle.part("vae", self.device, vae_dtype(vae_config, self.dtype))
        self.vae = load_autoencoder(autoencoder(vae_config), weights, f"{checkpoint} (vae)")
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
        )
        self.conditioning_cache = TensorCache(o["cache_bytes"])
        self.prompt_cache = TensorCache(o["cache_bytes"])
        self.conditioner = Conditioner(self.vae, self.conditioning_cache)
        self.prompt_encoder = PromptEncoder(self.bundle, self.device, self.dtype, self.prompt_cache)
        self.decoder = Decoder(self.vae)

    @one_at_a_time
    @torch.no_grad()
    def __call__(
        self,
        mask: MaskLike | Sequence[MaskLike] | None = None,
        prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 28,
        guidance_scale: float = 3.5,
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
        **others: Any,
    ) -> PipelineOutput:
        """Draw faces. Each image of a batch is the one it would be alone, up to rounding.

        Args:
            mask: a semantic mask or a list of them, in any form that `mogle_rt.masks` reads; None is all background
                (text only). Resized to height x width by nearest neighbour; a warning says where that stretches it.
            prompt: a text or a list of them; None is the empty prompt (mask only). One mask goes with several prompts
                and one prompt with several masks.
            num_inference_steps: denoising steps S.
            guidance_scale: FLUX's distilled guidance; models without it ignore it.
            height, width: pixels, multiples of 16. If both are None, the image has the mask's shape and about as many pixels
                as the model's own square (of 512, or the VAE's own size where that is less). That square serves where
                there is no mask, where masks differ in shape, and where ``latents`` are given. If one is None, it is the
                square's side.
            num_images_per_prompt: images for each pair of mask and prompt.
            generator: a generator for the noise, or a list with one for each image.
            latents: packed noise [B, N, 64] in place of drawn noise, N = height / 16 * width / 16.
            prompt_embeds, pooled_prompt_embeds: T5's [B, T, J] and CLIP's [B, P] in place of a prompt.
            condition_scale: strength of attention between the condition and the rest; 1 is the model's own, 0 none.
            position_delta: moves the condition by (rows, columns) of tokens.
            position_scale: size of a condition token in image tokens.
            max_sequence_length: T5 tokens, at most 512; None takes as many as the bundle's tokenizer says (FLUX's: 512).
            output_type: "pil", "np" [B, H, W, 3], "pt" [B, 3, H, W], both in [0, 1], or "latent" (packed).
            callback_on_step_end: called as ``callback(pipe, step, timestep, {"latents": …})`` after each step; may
                return new latents in such a dict. Setting ``pipe.interrupt = True`` in it ends the loop there.
            callback_on_step_end_tensor_inputs: as in diffusers; ``["latents"]`` is all there is.
            mask_posterior: "mean" of the VAE's posterior, or "sample" to draw from it with the generator, as the
                reference does.
            return_dict: False gives the tuple ``(images,)`` in place of a `PipelineOutput`, as in diffusers.
            seed: in place of generators: image i of the batch is drawn as its only image would be with ``seed + i``, or
                with ``seed[i]``. A seed is the same noise on every device.
            mask_order: what the numbers of a label map mean, see `mogle_rt.masks.to_labels`: "celebamask", "bisenet",
                "farl", or the names of the classes.
            others: arguments of diffusers' `FluxPipeline` that have no use here: an error says why, unless they say "none".

        Raises:
            InputError: an argument is out of range, counts or shapes don't match, or a callback calls the pipeline.
            MaskError: a mask can't be read.
            CheckpointError: a prompt was given, and the bundle has no text encoders.
            NumericalError: the result is not finite.
        """
        check_other_options(others, prompt)
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
        # Numbers of other kinds, as numpy's, become Python's own: what is computed mustn't depend on the kind.
        height, width, num_inference_steps = int(height), int(width), int(num_inference_steps)
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
        labels = [resize(one, height, width) for one in labels] or [np.zeros((height, width), dtype=np.uint8)]
        prompts = prompt_list(prompt, prompt_embeds, pooled_prompt_embeds)
        if prompt_embeds is not None:
            t = self.bundle.config.transformer
            check_embeddings(prompt_embeds, pooled_prompt_embeds, t.joint_attention_dim, t.pooled_projection_dim)
        pairs = common_count(len(labels), len(prompts) if prompt_embeds is None else prompt_embeds.shape[0])
        batch = pairs * num_images_per_prompt
        generator = generator if seed is None else seeded_generators(seed, generator, batch)
        generators = generator_list(generator, batch, self.device)
        report = self.last_run = RunReport(batch_size=batch, steps=num_inference_steps)
        self._num_timesteps, self._guidance_scale = num_inference_steps, guidance_scale

        schedule = make_schedule(self.bundle.config.scheduler, num_inference_steps, grid[0] * grid[1])
        noise = self._noise(latents, batch, height, width, generator if generators is None else generators)
        with progress_bar(num_inference_steps, self._progress_bar_config) as bar:
            stage = Stages(bar, self.device, report.seconds, described="desc" in self._progress_bar_config)
            with stage("text"):
                if prompt_embeds is None or pooled_prompt_embeds is None:
                    prompt_embeds, pooled_prompt_embeds = self.prompt_encoder(prompts, max_sequence_length)
            with stage("mask"):
                masks = self._encode_masks(labels, batch, mask_posterior, generator, generators)
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
                    ),
                    schedule,
                )
            with stage("denoise"):
                packed = self._denoise(noise, schedule, callback_on_step_end, bar)
            report.interrupted, report.execution = self._interrupt, self.engine.execution
            report.weights = self.engine.weight_formats
            images = packed
            if output_type != "latent":
                with stage("decode"):
                    images = self.decoder(packed, height, width, output_type)
        return PipelineOutput(images=images) if return_dict else (images,)  # type: ignore[return-value]

    def _encode_masks(
        self,
        labels: list[Labels],
        batch: int,
        posterior: MaskPosterior,
        generator: Generators,
        generators: list[torch.Generator] | None,
    ) -> MaskPlanes:
        if posterior == "mean":
            return self.conditioner(labels).repeated(batch)
        every = [labels[i * len(labels) // batch] for i in range(batch)]
        seeds = generators if generators is not None else [generator] * batch
        return self.conditioner(every, posterior=posterior, generators=seeds)  # type: ignore[arg-type]

    def _noise(self, latents: Tensor | None, batch: int, height: int, width: int, generator: Any) -> Tensor:
        channels = self.bundle.config.transformer.in_channels
        tokens = height // PATCH * (width // PATCH)
        if latents is not None:
            check_tensor("latents", latents, (batch, tokens, channels))
            return latents.to(self.device, self.dtype)
        shape = (batch, channels // 4, height // VAE_SCALE, width // VAE_SCALE)
        # Always drawn in float32: one seed is one noise in every dtype.
        noise = randn_tensor(shape, generator=generator, device=self.device, dtype=torch.float32)
        return pack_latents(noise).to(self.dtype)

    def _denoise(self, noise: Tensor, schedule: Schedule, callback: StepCallback | None, bar: tqdm[NoReturn]) -> Tensor:
        bar.unpause()  # its rate is that of the steps

        def on_step(k: int, latents: Tensor) -> Tensor:
            assert callback is not None
            return called_back(callback, self, k, schedule.timesteps[k], latents)

        return denoise(
            self.engine,
            noise,
            schedule,
            None if callback is None else on_step,
            lambda: self._interrupt,
            None if bar.disable else Progress(self.device, bar.update),
        )
