"""What people who know diffusers' pipelines expect of one, by the names that they know."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor

from mogle_rt.arguments import check_embeddings, check_options, prompt_list
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.bundle.shipped import NAME
from mogle_rt.calls.prompts import PromptEncoder, repeated
from mogle_rt.calls.turns import TakesTurns, one_at_a_time
from mogle_rt.config import dtype_name, parse_dtype
from mogle_rt.conversion.hub import RELEASED_FLUX, find
from mogle_rt.engines.contract import Engine
from mogle_rt.errors import CheckpointError, ConfigError, InputError
from mogle_rt.memory.devices import choose_device, choose_dtype

logger = logging.getLogger(__name__)

DEFAULT_FILE = "ckpt.safetensors"  # a bundle's usual name, in a folder or on the hub

# Options of diffusers' from_pretrained that choose among a folder's files, or say how they are loaded.
_OPTIONS_OF_FOLDERS = (
    "variant", "revision", "cache_dir", "token", "force_download", "local_files_only", "subfolder", "custom_pipeline",
    "custom_revision", "device_map", "max_memory", "offload_folder", "offload_state_dict", "quantization_config",
    "transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler",
)  # fmt: skip


def find_bundle(name: str | Path) -> str | Path:
    """The bundle that is meant: ``demo``, a path, a folder with a bundle of the usual name in it, or a hub id.

    Raises:
        CheckpointError: there is none. For a folder in diffusers' layout, the message says how to convert it.
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


class DiffusersHabits(TakesTurns):
    """The methods of diffusers' pipelines that don't draw. `Pipeline` sets the attributes."""

    bundle: Bundle
    device: torch.device
    dtype: torch.dtype
    engine: Engine
    prompt_encoder: PromptEncoder
    _options: dict[str, Any]

    def __init__(self, *, allow_tf32: bool) -> None:
        super().__init__(allow_tf32=allow_tf32)
        self._interrupt, self._num_timesteps, self._guidance_scale = False, 0, 0.0
        self._progress_bar_config: dict[str, Any] = {}

    def _open(self) -> None:
        """Load everything anew, as ``_options`` says."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        torch_dtype: str | torch.dtype | None = None,
        **options: Any,
    ) -> Self:
        """A pipeline by a path or a hub id.

        Args:
            pretrained_model_name_or_path: a bundle, ``demo``, a folder that holds ``ckpt.safetensors``, or a hub id,
                ``owner/name`` (its ``ckpt.safetensors``) or ``owner/name/file.safetensors``.
            torch_dtype: the ``dtype`` of `Pipeline`.
            options: those of `Pipeline`. ``use_safetensors=True`` and ``low_cpu_mem_usage`` are what is always done.

        Raises:
            CheckpointError: see `find_bundle`. ConfigError: an option that belongs to diffusers' folders.
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
        pipeline: Any = cls  # the class that is made is `Pipeline`, which takes these
        return cast(Self, pipeline(find_bundle(pretrained_model_name_or_path), **options))

    @one_at_a_time
    def to(self, *targets: str | int | torch.device | torch.dtype, **named: Any) -> Self:
        """Move the pipeline to a device, to a dtype, or both: it is loaded anew there, from its bundle.

        What is kept of earlier masks and prompts is forgotten. If the new device or dtype can't be had, the pipeline is
        loaded as it was.

        Args:
            targets: a device and a dtype, in any order; or by name, ``device=`` and ``dtype=``.

        Raises:
            InputError: it is neither, or LoRAs are loaded.
            ConfigError, DeviceError: no such dtype or device, here or in this engine's export.
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
        before, offload = self._options, self.prompt_encoder.offload
        try:
            self._options = before | {"device": device, "dtype": dtype}
            self._open()
        except BaseException:
            self._options = before
            self._open()
            raise
        finally:
            self.prompt_encoder.offload = offload
        return self

    def _refuse_loras(self, what: str) -> None:
        if getattr(getattr(self.engine, "styles", None), "names", ()):
            raise InputError(f"a pipeline can't be {what} with its LoRAs; unload them first, and load them again there")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, copied or sent to another process, a pipeline is its bundle's path and its options: it opens anew."""
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
        """Denoising steps of the running call, or of the last one. For callbacks."""
        return self._num_timesteps

    @property
    def guidance_scale(self) -> float:
        """FLUX's guidance in the running call, or in the last one. For callbacks."""
        return self._guidance_scale

    @property
    def interrupt(self) -> bool:
        """Whether the running call is to stop after its current step. A callback may set it."""
        return self._interrupt

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        self._interrupt = value

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options for the tqdm bar, e.g. ``disable=True``. By default it shows on a terminal only.

        It counts denoising steps; its description, unless ``desc`` gives one, is what a call does at the moment.
        """
        self._progress_bar_config = options

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: str | torch.device | None = None) -> None:
        """Let the text encoders leave the device after each new prompt; they are read again from the bundle for the next.

        Of FLUX.1-dev they are a third of all bytes. Transformer and VAE stay. Images are the same.

        Raises:
            ConfigError: another device than the pipeline's is named.
        """
        chosen = gpu_id if device is None else device
        if chosen is not None:
            wanted = choose_device(chosen)
            if (wanted.type, wanted.index or 0) != (self.device.type, self.device.index or 0):
                raise ConfigError(f"the pipeline is on {self.device}, not on {wanted}; call to({str(wanted)!r}) first")
        with self._turn():
            self.prompt_encoder.offload, self.prompt_encoder.encoders = True, None

    def enable_sequential_cpu_offload(self, gpu_id: int | None = None, device: object = None) -> None:
        """Not to be had.

        Raises:
            ConfigError: always; it says what there is instead.
        """
        raise ConfigError(
            "enable_sequential_cpu_offload is not supported: the transformer's weights stay on the device for all steps; "
            "enable_model_cpu_offload(), or prompt_embeds from elsewhere, free the memory of the text encoders"
        )

    def enable_vae_slicing(self) -> None:
        """Nothing changes: the VAE always decodes a batch in parts of at most 1024 x 1024 pixels together."""

    def disable_vae_slicing(self) -> None:
        """Nothing changes, see `enable_vae_slicing`."""

    def enable_vae_tiling(self) -> None:
        """Nothing changes, and a warning says so: tiles would blend at their borders and change the image."""
        logger.warning(
            "enable_vae_tiling() changes nothing: images are decoded whole, since tiles would change them at their "
            "borders; where memory is too small, draw fewer pixels or take dtype bf16"
        )

    def disable_vae_tiling(self) -> None:
        """Nothing changes, see `enable_vae_tiling`."""

    def enable_attention_slicing(self, slice_size: object = "auto") -> None:
        """Nothing changes: attention never holds the matrix of all scores, so that there is nothing to slice."""

    def enable_xformers_memory_efficient_attention(self, attention_op: object = None) -> None:
        """Nothing changes, see `enable_attention_slicing`."""

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
            prompt_2: what T5 reads, where CLIP is to read something else.
            device: as in diffusers; the results are on the pipeline's own device.
            num_images_per_prompt: how often each is repeated.
            prompt_embeds, pooled_prompt_embeds: given, they are only repeated.
            lora_scale: None; no LoRA acts on the text encoders.

        Returns:
            prompt_embeds [B, T, J], pooled_prompt_embeds [B, P], and text_ids [T, 3], which are zeros as in FLUX.

        Raises:
            InputError: an argument is out of range. CheckpointError: the bundle holds no text encoders.
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
                    raise InputError(f"prompt and prompt_2 must be equally many, got {len(texts)} and {len(others)}")
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
    """Another process may have another working folder."""
    return NAME if str(checkpoint) == NAME else Path(checkpoint).absolute()


def _opened(cls: type[DiffusersHabits], options: dict[str, Any]) -> DiffusersHabits:
    return cls(**options)  # of a subclass of Pipeline
