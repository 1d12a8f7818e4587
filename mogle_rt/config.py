"""Options as frozen dataclasses. Each is validated once, when it is made; unknown names are refused."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from mogle_rt.errors import ConfigError

if TYPE_CHECKING:
    import torch

NUM_CLASSES = 19
MLP_RATIO = 4
NUM_EXPERTS = 1 + NUM_CLASSES  # the global expert, then one for each class
PATCH = 16  # pixels a token covers in each direction: 8x VAE times 2x2 packing
VAE_SCALE = 8

DTYPE_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def dtype_name(value: str | torch.dtype) -> str:
    """torch's own name of a dtype, such as "bfloat16", from "bf16", "fp16", "fp32", that name, or the dtype itself.

    Raises:
        ConfigError: anything else.
    """
    name = str(value).removeprefix("torch.")
    name = DTYPE_NAMES.get(name, name)
    if name not in DTYPE_NAMES.values():
        raise ConfigError(f"dtype must be bf16, fp16 or fp32, got {value}")
    return name


def parse_dtype(value: str | torch.dtype) -> torch.dtype:
    """A torch dtype from "bf16", "fp16", "fp32", torch's own name, or itself.

    Raises:
        ConfigError: anything else.
    """
    import torch  # here, as the command line reads options before it needs torch

    dtype = getattr(torch, dtype_name(value))
    assert isinstance(dtype, torch.dtype)
    return dtype


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of the option classes: strict construction from a mapping."""

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, what: str | None = None) -> Self:
        """Build from ``values``; names that start with ``_`` (diffusers' bookkeeping) are skipped.

        Raises:
            ConfigError: a name is unknown, one is missing, or a value is refused.
        """
        what = what or cls.__name__
        fields = {f.name: f for f in dataclasses.fields(cls)}
        given = {k: v for k, v in values.items() if not k.startswith("_")}
        for name in given:
            if name not in fields:
                near = difflib.get_close_matches(name, fields, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(fields)}"
                raise ConfigError(f"{what}: unknown option {name!r}{hint}")
        missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in given]
        if missing:
            raise ConfigError(f"{what}: missing {', '.join(missing)}")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping that `from_mapping` takes back."""
        return dataclasses.asdict(self)


def _require_bool(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not isinstance(value, bool):
            raise ConfigError(f"{type(owner).__name__}: {name} must be true or false, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Options):
    """The reference's switches: how condition and image see each other, and what the LoRA acts on.

    Attributes:
        union_cond_attn: everything attends to everything (the released setting); otherwise the condition and the rest
            do not see each other.
        add_cond_attn: the condition's gated attention output is added to the image stream of double blocks too.
        latent_lora: the branch LoRA acts on image rows too, in single blocks also on text rows.
        independent_condition: the condition does not see the rest, the rest sees it.
        weight_is_scale: gate weights are averaged over the tokens: one weight an expert.
    """

    union_cond_attn: bool = True
    add_cond_attn: bool = False
    latent_lora: bool = False
    independent_condition: bool = False
    weight_is_scale: bool = False

    def __post_init__(self) -> None:
        _require_bool(self, *(f.name for f in dataclasses.fields(self)))

    @classmethod
    def of(cls, value: ModelConfig | Mapping[str, Any] | None) -> ModelConfig:
        """Take what a person passes as ``model_config``: None, a mapping or a `ModelConfig`."""
        if value is None:
            return cls()
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            return cls.from_mapping(value, what="model_config")
        raise ConfigError(f"model_config must be a mapping or a ModelConfig, got {type(value).__name__}")


def _require_positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not _is_int(value, 1):
            raise ConfigError(f"{type(owner).__name__}: {name} must be a positive integer, got {value!r}")


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def _require_finite(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
            raise ConfigError(f"{type(owner).__name__}: {name} must be a number, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(Options):
    """Shape of the FLUX transformer, with the names of diffusers' `FluxTransformer2DModel`."""

    num_layers: int
    num_single_layers: int
    attention_head_dim: int
    num_attention_heads: int
    joint_attention_dim: int
    pooled_projection_dim: int
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    in_channels: int = 64
    out_channels: int | None = None
    patch_size: int = 1

    def __post_init__(self) -> None:
        axes = self.axes_dims_rope
        if not isinstance(axes, (list, tuple)) or len(axes) != 3 or not all(_is_int(d, 2) and d % 2 == 0 for d in axes):
            raise ConfigError(f"axes_dims_rope must be three even numbers, got {axes!r}")
        object.__setattr__(self, "axes_dims_rope", tuple(axes))
        _require_positive(
            self,
            "attention_head_dim",
            "num_attention_heads",
            "joint_attention_dim",
            "pooled_projection_dim",
            "in_channels",
        )
        for name in ("num_layers", "num_single_layers"):
            if not _is_int(getattr(self, name), 0):
                raise ConfigError(f"TransformerConfig: {name} must be 0 or more, got {getattr(self, name)!r}")
        if not self.num_layers + self.num_single_layers:
            raise ConfigError("TransformerConfig: num_layers and num_single_layers are both 0; there must be a block")
        _require_bool(self, "guidance_embeds")
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            raise ConfigError(
                f"axes_dims_rope {list(self.axes_dims_rope)} adds up to {sum(self.axes_dims_rope)}, "
                f"attention_head_dim is {self.attention_head_dim}: they must be equal"
            )
        if self.patch_size != 1:
            raise ConfigError(f"patch_size must be 1 (FLUX packs its latents outside), got {self.patch_size}")
        if self.out_channels not in (None, self.in_channels):
            raise ConfigError(f"out_channels must equal in_channels ({self.in_channels}), got {self.out_channels}")

    @property
    def width(self) -> int:
        """D, the model width: heads times head size."""
        return self.num_attention_heads * self.attention_head_dim


FLUX_DEV = TransformerConfig(
    num_layers=19,
    num_single_layers=38,
    attention_head_dim=128,
    num_attention_heads=24,
    joint_attention_dim=4096,
    pooled_projection_dim=768,
    guidance_embeds=True,
    axes_dims_rope=(16, 56, 56),
)


@dataclass(frozen=True, kw_only=True)
class MogleConfig(Options):
    """Shape and ablation of the mixture: experts 64 -> hidden -> 64, a gate over 20 of them.

    Attributes:
        has_gating: False sums the experts without weights.
        has_expert: False takes the region latents themselves in the experts' place.
    """

    has_gating: bool = True
    has_expert: bool = True
    latent_dim: int = 64
    expert_dim: int = 32
    gate_dim: int = 64

    def __post_init__(self) -> None:
        _require_bool(self, "has_gating", "has_expert")
        _require_positive(self, "latent_dim", "expert_dim", "gate_dim")


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig(Options):
    """Flow-matching schedule, with the names of diffusers' `FlowMatchEulerDiscreteScheduler`."""

    num_train_timesteps: int = 1000
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    shift_terminal: float | None = None
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    invert_sigmas: bool = False
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    stochastic_sampling: bool = False

    def __post_init__(self) -> None:
        _require_positive(self, "num_train_timesteps", "base_image_seq_len", "max_image_seq_len")
        _require_finite(self, "shift", "base_shift", "max_shift")
        _require_bool(self, "use_dynamic_shifting")
        if self.shift <= 0:
            raise ConfigError(f"SchedulerConfig: shift must be more than 0, got {self.shift!r}")
        if self.base_image_seq_len == self.max_image_seq_len:
            raise ConfigError(
                f"SchedulerConfig: base_image_seq_len and max_image_seq_len must differ, both are "
                f"{self.max_image_seq_len}"
            )
        if self.time_shift_type not in ("exponential", "linear"):
            raise ConfigError(f"time_shift_type must be 'exponential' or 'linear', got {self.time_shift_type!r}")
        for name in ("invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
            if getattr(self, name):
                raise ConfigError(
                    f"scheduler option {name} is not a schedule Face-MoGLE was made with; set it to false"
                )
        if self.stochastic_sampling or self.shift_terminal:
            raise ConfigError("scheduler options stochastic_sampling and shift_terminal are not supported by this loop")


MAX_TEXT_TOKENS = 512  # the most T5 tokens that FLUX takes
