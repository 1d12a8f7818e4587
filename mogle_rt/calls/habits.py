"""The methods that users of diffusers' pipelines expect, under the same names."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor

from mogle_rt.arguments import check_embeddings, check_options, prompt_list
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.bundle.shipped import NAME
from mogle_rt.calls.memory import MemoryPlans
from mogle_rt.calls.prompts import PromptEncoder, repeated
from mogle_rt.calls.turns import TakesTurns, one_at_a_time
from mogle_rt.config import dtype_name, parse_dtype
from mogle_rt.conversion.hub import RELEASED_FLUX, find
from mogle_rt.encoders.cache import TensorCache
from mogle_rt.encoders.vae import VAE_TILE, set_tile
from mogle_rt.engines.contract import Engine
from mogle_rt.errors import CheckpointError, ConfigError, InputError
from mogle_rt.memory.devices import choose_device, choose_dtype

logger = logging.getLogger(__name__)

DEFAULT_FILE = "ckpt.safetensors"  # the usual file name of a bundle, in a folder or on the hub

# Options of diffusers' from_pretrained that choose which of a folder's files to load, or how to load them.
_OPTIONS_OF_FOLDERS = (
    "variant", "revision", "cache_dir", "token", "force_download", "local_files_only", "subfolder", "custom_pipeline",
    "custom_revision", "device_map", "offload_folder", "offload_state_dict", "quantization_config",
    "transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler",
)  # fmt: skip


def find_bundle(name: str | Path) -> str | Path:
    """Find a bundle: ``demo``, a path, a folder that holds ``ckpt.safetensors``, or a hub id.

    Raises:
        CheckpointError: there is no bundle. For a folder in diffusers' layout, the message says how to convert it.
    """
    if str(name) == NAME:
        return NAME
    if str(name) == RELEASED_FLUX:
        raise CheckpointError(
            f"{name}: is FLUX alone; `mogle-rt convert --released` makes a bundle with Face-MoGLE of it"
        )
    path = find(name, default_file=DEFAULT_FILE)
    if not path.is_dir():
        return path
    if (path / DEFAULT_FILE).is_file():
        return path / DEFAULT_FILE
    if any((path / inside).exists() for inside in ("model_index.json", "transformer", "config.json")):
        raise CheckpointError(
            f"{path}: is a folder of diffusers, which holds no Face-MoGLE; `mogle-rt convert --flux {path} --lora … "
            "--mogle …` makes a bundle of it"
        )
    raise CheckpointError(f"{path}: is a folder without a bundle {DEFAULT_FILE}; give the path of the file")


class DiffusersHabits(TakesTurns, ABC):
    """The methods of diffusers' pipelines, except the call itself. `Pipeline` sets the attributes."""

    bundle: Bundle
    device: torch.device
    dtype: torch.dtype
    engine: Engine
    prompt_encoder: PromptEncoder
    memory_plans: MemoryPlans
    vae: Any
    conditioning_cache: TensorCache
    _options: dict[str, Any]

    def __init__(self, *, allow_tf32: bool) -> None:
        super().__init__(allow_tf32=allow_tf32)
        self._interrupt, self._num_timesteps, self._guidance_scale = False, 0, 0.0
        self._progress_bar_config: dict[str, Any] = {}

    @abstractmethod
    def _open(self) -> None:
        """Load everything again, with ``_options``."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        torch_dtype: str | torch.dtype | None = None,
        **options: Any,
    ) -> Self:
        """Make a pipeline from a path or a hub id.

        Args:
            pretrained_model_name_or_path: the path of a bundle, ``demo``, a folder that holds ``ckpt.safetensors``, or
                a hub id: ``owner/name`` (for its ``ckpt.safetensors``) or ``owner/name/file.safetensors``.
            torch_dtype: the ``dtype`` of `Pipeline`.
            options: the options of `Pipeline`. ``use_safetensors=True`` and ``low_cpu_mem_usage`` are accepted, but
                change nothing: weights are always loaded in this way.

        Raises:
            CheckpointError: there is no such bundle; see `find_bundle`.
            ConfigError: an option only makes sense for a folder in diffusers' layout, or contradicts another option.
        """
        for name in _OPTIONS_OF_FOLDERS:
            if options.pop(name, None) is not None:
                raise ConfigError(f"{name} is not supported: a bundle is one file that holds everything; leave it out")
        options.pop("low_cpu_mem_usage", None)
        if options.pop("use_safetensors", None) is False:
            raise ConfigError("use_safetensors must be True: no pickle is ever read")
        if torch_dtype is not None:
            if options.setdefault("dtype", torch_dtype) not in (None, torch_dtype):
                raise ConfigError(f"torch_dtype is {torch_dtype} and dtype is {options['dtype']}: give one of them")
            options["dtype"] = torch_dtype
        pipeline: Any = cls  # at run time this is `Pipeline`, which takes these arguments
        return cast(Self, pipeline(find_bundle(pretrained_model_name_or_path), **options))

    @one_at_a_time
    def to(self, *targets: str | int | torch.device | torch.dtype, **named: Any) -> Self:
        """Move the pipeline to another device, dtype or both, by loading it again from its bundle.

        The caches of masks and prompts are emptied. If loading fails on the new device or in the new dtype, the
        pipeline is loaded again as it was before.

        Args:
            targets: a device, a dtype, or both in any order. Both can also be given by name: ``device=``, ``dtype=``.

        Raises:
            InputError: two devices or two dtypes are given, or LoRAs are loaded.
            ConfigError, DeviceError: the dtype or device is unknown or not available here, or this engine's export
                doesn't support it.
        """
        named.pop("silence_dtype_warnings", None)
        if unknown := set(named) - {"device", "dtype"}:
            raise TypeError(f"Pipeline.to() got an unexpected keyword argument {min(unknown)!r}")
        wanted = {key: value for key, value in named.items() if value is not None}
        for target in targets:
            key = "dtype" if _is_dtype(target) else "device"
            if key in wanted:
                raise InputError(f"to() takes one {key}, got {wanted[key]} and {target}")
            wanted[key] = target
        device = choose_device(wanted["device"]) if "device" in wanted else self.device
        dtype = choose_dtype(parse_dtype(wanted["dtype"]), device) if "dtype" in wanted else self.dtype
        if (device, dtype) == (self.device, self.dtype):
            return self
        self._refuse_loras("moved")
        before, offload, plans = self._options, self.prompt_encoder.offload, self.memory_plans
        try:
            self._options = before | {"device": device, "dtype": dtype}
            self._open()
        except BaseException:
            self._options = before
            self._open()
            raise
        finally:
            self.prompt_encoder.offload, self.memory_plans.streams_all = offload, plans.streams_all
            self._tile(plans.tile)
        return self

    def _refuse_loras(self, what: str) -> None:
        if getattr(getattr(self.engine, "styles", None), "names", ()):
            raise InputError(f"a pipeline can't be {what} with its LoRAs; unload them first, and load them again there")

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy or pickle only the bundle's path and the options; the copy then loads the bundle again."""
        self._refuse_loras("copied or pickled")
        return _opened, (type(self), self._options | {"checkpoint": _absolute(self._options["checkpoint"])})

    def __repr__(self) -> str:
        engine = self._options["engine"]
        return (
            f"{type(self).__name__}({str(self.bundle.path)!r}, device='{self.device}', dtype='{dtype_name(self.dtype)}', "
            f"engine={engine!r}, weights={self.engine.weight_formats!r})"
        )

    @property
    def num_timesteps(self) -> int:
        """The number of denoising steps in the running call, or in the last one. Callbacks can read it."""
        return self._num_timesteps

    @property
    def guidance_scale(self) -> float:
        """FLUX's guidance scale in the running call, or in the last one. Callbacks can read it."""
        return self._guidance_scale

    @property
    def interrupt(self) -> bool:
        """Whether the running call should stop after its current step. A callback may set this to True."""
        return self._interrupt

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        self._interrupt = value

    def set_progress_bar_config(self, **options: Any) -> None:
        """Set options of the tqdm progress bar, e.g. ``disable=True``. By default it appears only on a terminal.

        The bar counts denoising steps. Its description is the call's current stage, unless ``desc`` is given.
        """
        self._progress_bar_config = options

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: str | torch.device | None = None) -> None:
        """Free the text encoders after each new prompt, and read them from the bundle again for the next one.

        They are a third of FLUX.1-dev's bytes. The transformer and the VAE stay on the device. Images don't change.

        Raises:
            ConfigError: the given device is not the pipeline's device.
        """
        self._check_device(gpu_id if device is None else device)
        with self._turn():
            self.prompt_encoder.offload, self.prompt_encoder.encoders = True, None

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: str | torch.device | None = None
    ) -> None:
        """Stream all weights of the steps, and read T5 layer by layer: the least memory, see `Pipeline.plan`.

        Images don't change. By default, only what doesn't fit is streamed.

        Raises:
            ConfigError: the given device is not the pipeline's device, or the engine holds its weights itself.
        """
        self._check_device(gpu_id if device is None else device)
        if self._options["engine"] != "torch":
            raise ConfigError(f"engine {self._options['engine']} holds its weights itself; take engine torch")
        with self._turn():
            self.memory_plans.streams_all = True

    def _check_device(self, chosen: int | str | torch.device | None) -> None:
        if chosen is not None:
            wanted = choose_device(chosen)
            if (wanted.type, wanted.index or 0) != (self.device.type, self.device.index or 0):
                raise ConfigError(f"the pipeline is on {self.device}, not on {wanted}; call to({str(wanted)!r}) first")

    def enable_vae_slicing(self) -> None:
        """Does nothing: the VAE always decodes a batch in parts of at most 1024 x 1024 pixels (or of one image)."""

    def disable_vae_slicing(self) -> None:
        """Does nothing, see `enable_vae_slicing`."""

    def enable_vae_tiling(self) -> None:
        """Let the VAE work on tiles of 512 x 512 pixels in larger images: less memory, and another image.

        Tiles overlap by a quarter and are blended there, as in diffusers. A tile doesn't see the rest of the image, so
        colours and light may differ a little from those of an image that is decoded whole. By default, images are
        decoded whole.
        """
        with self._turn():
            self._tile(VAE_TILE)

    def disable_vae_tiling(self) -> None:
        """Encode and decode images whole again, see `enable_vae_tiling`."""
        with self._turn():
            self._tile(0)

    def _tile(self, tile: int) -> None:
        set_tile(self.vae, tile)
        self.memory_plans.tile = tile
        self.conditioning_cache.clear()  # its masks were encoded in the other way

    def enable_attention_slicing(self, slice_size: object = "auto") -> None:
        """Does nothing: attention never holds the whole matrix of scores, so there is nothing to slice."""

    def enable_xformers_memory_efficient_attention(self, attention_op: object = None) -> None:
        """Does nothing, see `enable_attention_slicing`."""

    @one_at_a_time
    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        prompt_2: str | Sequence[str] | None = None,
        device: object = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        max_sequence_length: int | None = None,
        lora_scale: None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embed prompts as a call does.

        Args:
            prompt, max_sequence_length: see `Pipeline.__call__`.
            prompt_2: the text for T5, if it should read another text than CLIP.
            device: ignored; it is here because diffusers has it. The results are on the pipeline's own device.
            num_images_per_prompt: how often each embedding is repeated.
            prompt_embeds, pooled_prompt_embeds: embeddings that are only repeated; prompts are then not encoded.
            lora_scale: must be None, because no LoRA acts on the text encoders.

        Returns:
            prompt_embeds [B, T, J], pooled_prompt_embeds [B, P], and text_ids [T, 3], which are zeros as in FLUX.

        Raises:
            InputError: an argument is out of range, or arguments contradict each other.
            CheckpointError: the bundle holds no text encoders.
        """
        if lora_scale is not None:
            raise InputError("lora_scale is not supported: no LoRA acts on the text encoders")
        tokens = self.bundle.default_text_tokens if max_sequence_length is None else max_sequence_length
        check_options(num_images_per_prompt=num_images_per_prompt, max_sequence_length=tokens)
        texts = prompt_list(None if prompt_embeds is not None else prompt, prompt_embeds, pooled_prompt_embeds)
        if prompt_embeds is not None and pooled_prompt_embeds is not None:
            t = self.bundle.config.transformer
            check_embeddings(prompt_embeds, pooled_prompt_embeds, t.joint_attention_dim, t.pooled_projection_dim)
            sequence, pooled = (x.to(self.device, self.dtype) for x in (prompt_embeds, pooled_prompt_embeds))
        else:
            sequence, pooled = self.prompt_encoder(texts, int(tokens))
            if prompt_2 is not None:
                others = prompt_list(prompt_2, None, None)
                if len(others) != len(texts):
                    raise InputError(
                        f"prompt and prompt_2 must have the same number of texts, got {len(texts)} and {len(others)}"
                    )
                sequence = self.prompt_encoder(others, int(tokens))[0]
        text_ids = torch.zeros(sequence.shape[1], 3, device=self.device, dtype=self.dtype)
        batch = len(sequence) * int(num_images_per_prompt)
        return repeated(sequence, batch), repeated(pooled, batch), text_ids


def _is_dtype(target: object) -> bool:
    if isinstance(target, torch.dtype):
        return True
    try:
        return isinstance(target, str) and bool(dtype_name(target))
    except ConfigError:
        return False


def _absolute(checkpoint: str | Path) -> str | Path:
    """Make the path absolute, because another process may have another working folder."""
    return NAME if str(checkpoint) == NAME else Path(checkpoint).absolute()


def _opened(cls: type[DiffusersHabits], options: dict[str, Any]) -> DiffusersHabits:
    return cls(**options)  # the options of `Pipeline` or of a subclass
