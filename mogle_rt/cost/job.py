"""A job whose cost is to be counted, and its model without weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mogle_rt.bundle import schema
from mogle_rt.bundle.bundle import Bundle, BundleConfig, parameter_count
from mogle_rt.bundle.container import TensorInfo
from mogle_rt.bundle.source import TensorSource
from mogle_rt.bundle.storage import WeightStorage, storage_named, stored_shapes
from mogle_rt.config import FLUX_DEV, NUM_CLASSES, NUM_EXPERTS, PATCH, ModelConfig, MogleConfig, SchedulerConfig
from mogle_rt.errors import InputError
from mogle_rt.fast.settings import FastConfig

# black-forest-labs/FLUX.1-dev: vae/config.json and scheduler/scheduler_config.json; parameters of its CLIP and T5.
FLUX_BUNDLE = BundleConfig(
    transformer=FLUX_DEV,
    mogle=MogleConfig(),
    scheduler=SchedulerConfig(shift=3.0, use_dynamic_shifting=True),
    vae={
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "latent_channels": 16,
        "layers_per_block": 2,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
)
FLUX_TEXT = {"text_encoder": 123_060_480, "text_encoder_2": 4_762_310_656}


@dataclass(frozen=True, kw_only=True)
class Job:
    """The job to be counted. The default is one image of FLUX.1-dev with the released LoRA of rank 4.

    Attributes:
        config, ranks: see `Bundle`. text: parameters of the text encoders that the bundle holds.
        dtype: of weights and activations.
        classes: classes in each mask; all others are the same black picture. Faces' masks hold about a dozen.
        model, condition_scale: this engine's switches; the reference is counted at the released setting.
        kernels: this engine's operations, see `mogle_rt.ops.choice.choose`; the job is a GPU's.
        weights: the format that this engine's weights of the blocks are stored in; None: plainly.
        fast: what this engine's steps leave out; None computes everything.

    Raises:
        InputError: a size or count is out of range.
    """

    config: BundleConfig = FLUX_BUNDLE
    ranks: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(schema.lora_modules(FLUX_DEV), 4))
    text: Mapping[str, int] = field(default_factory=lambda: FLUX_TEXT)
    dtype: torch.dtype = torch.bfloat16
    height: int = 512
    width: int = 512
    batch: int = 1
    steps: int = 28
    text_tokens: int = 512
    classes: int = 12
    model: ModelConfig = field(default_factory=ModelConfig)
    condition_scale: float = 1.0
    kernels: str | None = None
    weights: str | None = None
    fast: FastConfig | None = None

    def __post_init__(self) -> None:
        if self.weights is not None:
            storage_named(self.weights)
        if self.fast is not None and self.fast.adapts:
            raise InputError(
                "with max_change the velocities decide which steps are computed: give a steps_mask to count"
            )
        for name, unit, most in (
            ("height", PATCH, 8192),
            ("width", PATCH, 8192),
            ("batch", 1, 1024),
            ("steps", 1, 1000),
            ("text_tokens", 1, 512),
            ("classes", 1, NUM_CLASSES),
        ):
            value = getattr(self, name)
            if not unit <= value <= most or value % unit:
                rule = f"a multiple of {unit} " if unit > 1 else ""
                raise InputError(f"{name} must be {rule}from {unit} to {most}, got {value}")

    @classmethod
    def of(cls, bundle: Bundle, **options: Any) -> Job:
        """A job with a bundle's model. Dtype, size and text tokens are the bundle's unless in ``options``."""
        text = {p: sum(bundle.tensors[f"{p}.{n}"].numel for n in bundle.names(p)) for p in FLUX_TEXT if bundle.names(p)}
        own: dict[str, Any] = {
            "dtype": bundle.tensors["transformer.x_embedder.weight"].dtype,
            "height": bundle.default_size,
            "width": bundle.default_size,
            "text_tokens": bundle.default_text_tokens,
            "weights": next(iter(sorted({storage.name for storage in bundle.storages.values()})), None),
        }
        return cls(config=bundle.config, ranks=bundle.lora_ranks(), text=text, **own | options)

    @property
    def tokens(self) -> int:
        """The number of image tokens, N."""
        return self.height // PATCH * (self.width // PATCH)

    @property
    def pictures(self) -> int:
        """How many of a mask's 20 pictures differ: the palette, a plane per class in it, black for the others."""
        return min(NUM_EXPERTS, self.classes + 2)


class WeightlessBundle(TensorSource):
    """A bundle without a file: the names and shapes that its configuration asks for, tensors without values."""

    def __init__(self, config: BundleConfig, ranks: Mapping[str, int], weights: str | None = None) -> None:
        transformer = schema.transformer_tensors(config.transformer)
        storages: dict[str, WeightStorage] = {}
        for stack in schema.block_stacks(config.transformer) if weights is not None else ():
            for layer in stack:
                out, inner = transformer[f"{layer}.weight"]
                storages[layer] = storage_named(str(weights)).of((out, inner))
        stored, dtypes = stored_shapes(transformer, storages)
        shapes = {
            "transformer": stored,
            "lora": schema.lora_tensors(config.transformer, dict(ranks)),
            "mogle": schema.mogle_tensors(config.mogle),
        }
        infos = {
            f"{part}.{name}": TensorInfo(dtypes.get(name, torch.float32), shape, 0, 0)
            for part, named in shapes.items()
            for name, shape in named.items()
        }
        super().__init__(config, infos, storages)

    def load(self, names: Sequence[str], device: torch.device, dtype: torch.dtype | None) -> Tensor:
        """An empty tensor of the shape that the real one has."""
        infos = [self.tensors[name] for name in names]
        rows, dtype = sum(info.shape[0] for info in infos), infos[0].dtype if dtype is None else dtype
        return torch.empty(rows, *infos[0].shape[1:], device=device, dtype=dtype)

    def release(self, names: Sequence[str]) -> None:
        """Does nothing, because no tensor is held in memory."""

    def parameters(self) -> dict[str, int]:
        """Parameters by part; ``modulation`` is what the loop doesn't need: AdaLN's layers and what feeds them."""
        counts = dict.fromkeys(("transformer", "modulation", "lora", "mogle"), 0)
        for name, info in self.tensors.items():
            counts[self._group(name)] += parameter_count({name: info}, self.storages)
        return counts

    def nbytes(self, dtype: torch.dtype) -> dict[str, int]:
        """Bytes by part, as of `parameters`: what is stored in a weight format as it is stored, all else in ``dtype``."""
        counts = dict.fromkeys(("transformer", "modulation", "lora", "mogle"), 0)
        for name, info in self.tensors.items():
            layer, _, kind = name.removeprefix("transformer.").rpartition(".")
            own = layer in self.storages and kind.startswith("weight")
            counts[self._group(name)] += info.numel * (info.dtype if own else dtype).itemsize
        return counts

    @staticmethod
    def _group(name: str) -> str:
        part, _, rest = name.partition(".")
        aside = part == "transformer" and (rest.startswith("time_text_embed.") or ".linear." in rest)
        return "modulation" if aside else part
