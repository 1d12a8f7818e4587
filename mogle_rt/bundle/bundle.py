"""The bundle, ckpt.safetensors: one file that holds everything needed to draw an image, and is read lazily.

Tensors have the reference's names with the prefix ``transformer.``, ``lora.``, ``mogle.``, ``vae.``, ``text_encoder.``
or ``text_encoder_2.``. A bundle without text encoders may hold the embeddings of the empty prompt, with the prefix
``empty_prompt.``. Tokenizer files are uint8 tensors with the prefix ``tokenizer.`` or ``tokenizer_2.``. The
configurations are JSON in the metadata. `mogle_rt.convert` writes this file.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mogle_rt.bundle import schema, storage
from mogle_rt.bundle.components import TABLES, component
from mogle_rt.bundle.container import DTYPE_CODES, MappedFile, TensorInfo, read_chunks, read_header
from mogle_rt.bundle.schema import check_names
from mogle_rt.bundle.shipped import bundle_path
from mogle_rt.bundle.source import TensorSource
from mogle_rt.config import MAX_TEXT_TOKENS, PATCH, MogleConfig, Options, SchedulerConfig, TransformerConfig
from mogle_rt.errors import CheckpointError, ConfigError
from mogle_rt.values import read_json

if TYPE_CHECKING:
    import torch

FORMAT = "mogle_rt"
FORMAT_VERSION = 2
PLAIN_VERSION = 1  # of a bundle without weight formats, which earlier versions of this program read too
TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
PARTS = ("transformer", "lora", "mogle", "vae", *TEXT_PARTS, "empty_prompt")
EMPTY_SEQUENCE, EMPTY_VECTOR = "empty_prompt.prompt_embeds", "empty_prompt.pooled_prompt_embeds"
DEFAULT_SIZE = 512  # pixels
FLOATS = ("F32", "F16", "BF16")  # codes of a safetensors file


@dataclass(frozen=True, kw_only=True)
class BundleConfig(Options):
    """All configurations of a bundle.

    ``vae``, ``text_encoder`` and ``text_encoder_2`` are in the form of diffusers and transformers, which check them.
    """

    transformer: TransformerConfig
    mogle: MogleConfig
    scheduler: SchedulerConfig
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any] | None = None
    text_encoder_2: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for part in TABLES:
            values = getattr(self, part)
            if part == "vae" or values is not None:
                component(part, values)
                # It names a folder of whoever made the file, which is nobody else's business.
                object.__setattr__(self, part, {n: v for n, v in values.items() if n != "_name_or_path"})
        t, clip, t5 = self.transformer, self.text_encoder or {}, self.text_encoder_2 or {}
        for name, size, of, expected in (
            ("mogle latent_dim", self.mogle.latent_dim, "in_channels", t.in_channels),
            ("4 x vae latent_channels", 4 * self.vae.get("latent_channels", 4), "in_channels", t.in_channels),
            ("text_encoder hidden_size", clip.get("hidden_size"), "pooled_projection_dim", t.pooled_projection_dim),
            ("text_encoder_2 d_model", t5.get("d_model"), "joint_attention_dim", t.joint_attention_dim),
        ):
            if size not in (None, expected):
                raise ConfigError(f"{name} is {size}, the transformer's {of} is {expected}: they must be equal")

    @classmethod
    def parse(cls, text: str, *, what: str) -> BundleConfig:
        """Read the configurations from the JSON in a bundle's metadata. ``what`` names the file in errors.

        Raises:
            CheckpointError: the text is not JSON, or a configuration is not valid.
        """
        try:
            raw = read_json(text)
            return cls.from_mapping(
                raw
                | {
                    "transformer": TransformerConfig.from_mapping(raw["transformer"]),
                    "mogle": MogleConfig.from_mapping(raw["mogle"]),
                    "scheduler": SchedulerConfig.from_mapping(raw["scheduler"]),
                }
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{what}: the configuration in the file is damaged: {reason}") from None


class Bundle(TensorSource):
    """An open bundle. Opening it reads only the header, and checks every name, shape and size in it.

    Args:
        path: the file's path, or ``demo`` for the checkpoint in the package.

    Raises:
        CheckpointError: the file is not a safetensors file (see `mogle_rt.bundle.container.read_header`), not a bundle,
            or a bundle of another format version, or its tensors don't match its configuration.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = bundle_path(path)
        tensors, metadata = read_header(self.path)
        if metadata.get("format") != FORMAT:
            raise CheckpointError(
                f"{self.path}: a safetensors file, but not a mogle_rt bundle; make one with `mogle-rt convert`"
            )
        version = metadata.get("format_version", "")
        if version not in (str(PLAIN_VERSION), str(FORMAT_VERSION)):
            raise CheckpointError(
                f"{self.path}: bundle format {version!r}; this version reads {PLAIN_VERSION} to {FORMAT_VERSION}"
            )
        self.format_version = int(version)
        self._config_text, self._storage_text = metadata.get("config", ""), metadata.get("weights", "")
        stored = storage.parse(self._storage_text, what=str(self.path))
        super().__init__(BundleConfig.parse(self._config_text, what=str(self.path)), tensors, stored)
        self.content_hash = metadata.get("sha256", "")
        self._check_tensors()
        self._file = MappedFile(self.path)

    def __reduce__(self) -> tuple[type[Bundle], tuple[Path]]:
        """Copy or pickle only the path; the copy then opens the file again."""
        return type(self), (self.path.absolute(),)

    @property
    def has_text_encoders(self) -> bool:
        """Whether the bundle holds text encoders, so that prompts can be given as text."""
        configs = (self.config.text_encoder, self.config.text_encoder_2)
        return None not in configs and all(self.names(part) for part in TEXT_PARTS)

    @property
    def default_size(self) -> int:
        """The side of the default image, in pixels: 512, or the size that the VAE was made for if that is smaller."""
        size = self.config.vae.get("sample_size")
        if not isinstance(size, int) or isinstance(size, bool) or size < PATCH:
            return DEFAULT_SIZE
        return min(size // PATCH * PATCH, DEFAULT_SIZE)

    @property
    def default_text_tokens(self) -> int:
        """The default number of T5 tokens: the limit of T5's tokenizer (512 for FLUX), but at most 512.

        Without a tokenizer, it is that of the empty prompt's embeddings, if there are any.
        """
        if not self.names("tokenizer_2") and EMPTY_SEQUENCE in self.tensors:
            return self.tensors[EMPTY_SEQUENCE].shape[0]
        try:
            length = read_json(self.files("tokenizer_2")["tokenizer_config.json"])["model_max_length"]
        except (KeyError, TypeError, ValueError):
            return MAX_TEXT_TOKENS
        return min(length, MAX_TEXT_TOKENS) if isinstance(length, int) and length > 0 else MAX_TEXT_TOKENS

    def empty_prompt(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The embeddings of the empty prompt, T5's [T, J] and CLIP's [P], if they are there for T = ``tokens``."""
        if EMPTY_SEQUENCE not in self.tensors or self.tensors[EMPTY_SEQUENCE].shape[0] != tokens:
            return None
        return self.tensor(EMPTY_SEQUENCE), self.tensor(EMPTY_VECTOR)

    def _check_tensors(self) -> None:
        for full in self.tensors:
            if full.partition(".")[0] not in PARTS:
                raise CheckpointError(f"{self.path}: unexpected tensor {full!r}")
        blocks = self.config.transformer.num_layers + self.config.transformer.num_single_layers
        if blocks > len(self.tensors):  # checked first, because the lists below would be as long as the header claims
            raise CheckpointError(f"{self.path}: {len(self.tensors)} tensors can't make {blocks} blocks")
        config = self.config.transformer
        try:
            storage.check_stacks(self.storages, schema.block_stacks(config))
            expected, fixed = storage.stored_shapes(schema.transformer_tensors(config), self.storages)
        except ConfigError as error:
            raise CheckpointError(f"{self.path}: {error}") from None
        check_names(self._shapes("transformer"), expected, self.path)
        check_names(self._shapes("mogle"), schema.mogle_tensors(self.config.mogle), self.path)
        ranks = self.lora_ranks()
        for name in schema.lora_modules(self.config.transformer):
            if name not in ranks:
                raise CheckpointError(f"{self.path}: missing LoRA of layer {name!r}")
        check_names(self._shapes("lora"), schema.lora_tensors(self.config.transformer, ranks), self.path)
        if self.names("empty_prompt"):
            found = self._shapes("empty_prompt")
            length = min(max(1, *found.get("prompt_embeds", (1,))[:1]), MAX_TEXT_TOKENS)
            shapes = {
                "prompt_embeds": (length, config.joint_attention_dim),
                "pooled_prompt_embeds": (config.pooled_projection_dim,),
            }
            check_names(found, shapes, self.path)
        for name, info in self.tensors.items():
            allowed = ("U8",) if name.startswith("tokenizer") else FLOATS
            if name.startswith("transformer.") and name.removeprefix("transformer.") in fixed:
                allowed = (DTYPE_CODES[str(fixed[name.removeprefix("transformer.")])],)
            if info.code not in allowed:
                raise CheckpointError(f"{self.path}: tensor {name!r} can't be torch.{info.dtype_name}")

    def _shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        return {name: self.tensors[f"{part}.{name}"].shape for name in self.names(part)}

    def check_unchanged(self) -> None:
        """Check that nobody has written to the file since it was opened: see `MappedFile.check_unchanged`."""
        self._file.check_unchanged()

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor with this full name, as a read-only view of the file."""
        return self._file.tensor(self.tensors[name])

    def load(self, names: Sequence[str], device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
        """Return tensors stacked along their first dimension, see `TensorSource.load`.

        On the CPU, tensors that lie next to each other in the file and need no conversion are one view of the file,
        without a copy.

        Raises:
            CheckpointError: a float dtype was asked for, and the tensors are stored in a weight format.
        """
        import torch

        infos = [self.tensors[n] for n in names]
        if dtype is None:
            dtype = infos[0].dtype
        elif infos[0].code not in FLOATS and infos[0].dtype != dtype:
            raise CheckpointError(
                f"{self.path}: tensor {names[0]!r} is stored as {infos[0].dtype}: without its scales it is no weight"
            )
        if device.type == "cpu" and infos[0].dtype == dtype:
            view = self._file.view(infos)
            if view is not None:
                return view.view(-1, *infos[0].shape[1:])
        rows = [i.shape[0] for i in infos]
        out = torch.empty(sum(rows), *infos[0].shape[1:], device=device, dtype=dtype)
        for part, info in zip(out.split(rows), infos, strict=True):
            part.copy_(self._file.tensor(info))
            self._file.release(info)
        return out

    def expect(self, names: Sequence[str]) -> None:
        """Have the operating system read these tensors from the disk in the meantime."""
        for name in names:
            self._file.expect(self.tensors[name])

    def release(self, names: Sequence[str]) -> None:
        """Let the operating system drop these tensors from memory. If they are used again, they are read again."""
        for name in names:
            self._file.release(self.tensors[name])

    def files(self, part: str) -> dict[str, bytes]:
        """The contents of a tokenizer's files, by file name."""
        return {name: self.tensor(f"{part}.{name}").numpy().tobytes() for name in self.names(part)}

    def verify(self, progress: Callable[[int], None] | None = None) -> None:
        """Read the whole file and compare it with the hash in its header.

        Args:
            progress: called after each chunk with the chunk's number of bytes.

        Raises:
            CheckpointError: the contents were changed after conversion.
        """
        import torch

        digest = hashlib.sha256(self._config_text.encode())
        for name, info in sorted(self.tensors.items(), key=lambda item: (item[1].begin, item[1].end, item[0])):
            digest.update(hashed_entry(name, info))
            for chunk in read_chunks(self.path, info):
                digest.update(chunk.view(torch.uint8).numpy().data)
                if progress:
                    progress(chunk.nbytes)
        digest.update(self._storage_text.encode())
        if digest.hexdigest() != self.content_hash:
            raise CheckpointError(f"{self.path}: its contents were changed: the hash in the header is another")


def hashed_entry(name: str, info: TensorInfo) -> bytes:
    """What the bundle's hash includes of a tensor before its bytes, so that exchanged names change the hash."""
    return json.dumps([name, f"torch.{info.dtype_name}", list(info.shape)]).encode()


def parameter_count(tensors: Mapping[str, TensorInfo], storages: Mapping[str, storage.WeightStorage]) -> int:
    """The number of parameters in all tensors, without those that hold tokenizer files.

    A weight in a format of fewer bits counts as the matrix that it stands for.

    Args:
        storages: see `TensorSource`.
    """
    count = 0
    for name, info in tensors.items():
        layer, _, kind = name.removeprefix("transformer.").rpartition(".")
        stored = storages.get(layer) if name.startswith("transformer.") else None
        if stored is not None and kind.startswith("weight"):
            count += math.prod(stored.shape_of(info.shape)) if kind == "weight" else 0
        elif not name.startswith("tokenizer"):
            count += info.numel
    return count
