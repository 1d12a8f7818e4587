"""Options as frozen dataclasses. Each is validated once, when it is created. Unknown names are errors."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from mogle_rt.errors import ConfigError
from mogle_rt.values import Range, quoted, real

if TYPE_CHECKING:
    import torch

NUM_CLASSES = 19
MLP_RATIO = 4
NUM_EXPERTS = 1 + NUM_CLASSES  # the global expert, then one for each class
PATCH = 16  # pixels that a token covers in each direction: 8x by the VAE, times 2x by packing
VAE_SCALE = 8

BYTE_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
BYTE_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
BYTE_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
DTYPE_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def dtype_name(value: str | torch.dtype) -> str:
    """PyTorch's name of a dtype, such as "bfloat16".

    Args:
        value: "bf16", "fp16" or "fp32", PyTorch's name of one of them, or the dtype itself.

    Raises:
        ConfigError: the value is anything else.
    """
    name = str(value).removeprefix("torch.")
    name = DTYPE_NAMES.get(name, name)
    if name not in DTYPE_NAMES.values():
        raise ConfigError(f"dtype must be bf16, fp16 or fp32, got {value}")
    return name


def parse_bytes(value: str | int) -> int:
    """A number of bytes, such as "8GB" (10^9 bytes each), "7.5 GiB" (2^30 bytes each) or 8_000_000_000.

    Raises:
        ConfigError: it is not a number of bytes, or not a positive one.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    else:
        match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?) ?([A-Za-z]{0,3})", str(value).strip())
        if match is None or match[2].upper() not in BYTE_UNITS:
            raise ConfigError(f"max_memory must be a size such as '8GB' or '7.5GiB', got {str(value)[:40]!r}")
        number = int(float(match[1]) * BYTE_UNITS[match[2].upper()])
    if number <= 0:
        raise ConfigError(f"max_memory must be positive, got {str(value)[:40]!r}")
    return number


def parse_dtype(value: str | torch.dtype) -> torch.dtype:
    """The torch dtype of a value that `dtype_name` accepts.

    Raises:
        ConfigError: the value is anything else.
    """
    import torch  # imported here because the command line reads options before it needs torch

    dtype = getattr(torch, dtype_name(value))
    assert isinstance(dtype, torch.dtype)
    return dtype


@dataclass(frozen=True, kw_only=True)
class Options:
    """The base of the option classes, which can be built from a mapping with strict checks."""

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, what: str | None = None) -> Self:
        """Build the options from ``values``. Names that start with ``_`` (diffusers' bookkeeping) are skipped.

        Args:
            what: how messages name the options; by default the name of the class.

        Raises:
            ConfigError: a name is unknown, a required one is missing, or a value is not allowed.
        """
        what = what or cls.__name__
        fields = {f.name: f for f in dataclasses.fields(cls)}
        given = {k: v for k, v in values.items() if not k.startswith("_")}
        for name in given:
            if name not in fields:
                near = difflib.get_close_matches(name, fields, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(fields)}"
                raise ConfigError(f"{what}: unknown option {quoted(name)}{hint}")
        missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in given]
        if missing:
            raise ConfigError(f"{what}: missing {', '.join(missing)}")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping from which `from_mapping` builds the same options."""
        return dataclasses.asdict(self)


def _require_bool(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not isinstance(value, bool):
            raise ConfigError(f"{type(owner).__name__}: {name} must be true or false, got {quoted(value)}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Options):
    """The reference's switches: whether condition and image attend to each other, and what the LoRA acts on.

    Attributes:
        union_cond_attn: everything attends to everything (the released setting). Otherwise the condition and the rest
            do not attend to each other.
        add_cond_attn: in double blocks, the condition's gated attention output is added to the image stream too.
        latent_lora: the condition branch's LoRA acts on image rows too, and in single blocks also on text rows.
        independent_condition: the condition does not attend to the rest, but the rest attends to the condition.
        weight_is_scale: the gate's weights are averaged over the tokens, so that each expert has a single weight.
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
        """The config for what a user passes as ``model_config``: None (the defaults), a mapping or a `ModelConfig`.

        Raises:
            ConfigError: the value is of another type, or the mapping is wrong, see `Options.from_mapping`.
        """
        if value is None:
            return cls()
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            return cls.from_mapping(value, what="model_config")
        raise ConfigError(f"model_config must be a mapping or a ModelConfig, got {type(value).__name__}")


LAYERS = Range(0, 1000)
SIZES = Range(1, 1 << 20)  # channels, heads, tokens, training steps
SHIFTS = Range(-100, 100)  # exponents: e¹⁰⁰ is far beyond any schedule's


def _require_positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not _is_int(value, 1):
            raise ConfigError(f"{type(owner).__name__}: {name} must be a positive integer, got {quoted(value)}")
        SIZES(value, f"{type(owner).__name__}: {name}")


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value


def _require_in(allowed: Range, owner: object, *names: str) -> None:
    for name in names:
        real(getattr(owner, name), f"{type(owner).__name__}: {name}", allowed)


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(Options):
    """The shape of the FLUX transformer, with the option names of diffusers' `FluxTransformer2DModel`."""

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
            raise ConfigError(f"axes_dims_rope must be three even numbers, got {quoted(axes)}")
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
                raise ConfigError(f"TransformerConfig: {name} must be 0 or more, got {quoted(getattr(self, name))}")
            LAYERS(getattr(self, name), f"TransformerConfig: {name}")
        if not self.num_layers + self.num_single_layers:
            raise ConfigError("TransformerConfig: num_layers and num_single_layers are both 0; there must be a block")
        _require_bool(self, "guidance_embeds")
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            raise ConfigError(
                f"axes_dims_rope {list(self.axes_dims_rope)} adds up to {sum(self.axes_dims_rope)}, "
                f"attention_head_dim is {self.attention_head_dim}: they must be equal"
            )
        if self.patch_size != 1:
            raise ConfigError(f"patch_size must be 1 (FLUX packs its latents outside), got {quoted(self.patch_size)}")
        if self.out_channels not in (None, self.in_channels):
            raise ConfigError(
                f"out_channels must equal in_channels ({self.in_channels}), got {quoted(self.out_channels)}"
            )

    @property
    def width(self) -> int:
        """D, the width of the model: the number of heads times the size of a head."""
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
    """The shape of the mixture: 20 experts, each 64 -> hidden -> 64, and a gate over them. It can lack either part.

    Attributes:
        has_gating: if False, the experts are summed without weights.
        has_expert: if False, the region latents are used in place of the experts' outputs.
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
    """The flow-matching schedule, with the option names of diffusers' `FlowMatchEulerDiscreteScheduler`."""

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
        _require_in(SHIFTS, self, "shift", "base_shift", "max_shift")
        _require_bool(self, "use_dynamic_shifting")
        if self.shift <= 0:
            raise ConfigError(f"SchedulerConfig: shift must be more than 0, got {self.shift!r}")
        if self.base_image_seq_len == self.max_image_seq_len:
            raise ConfigError(
                f"SchedulerConfig: base_image_seq_len and max_image_seq_len must differ, both are "
                f"{self.max_image_seq_len}"
            )
        if self.time_shift_type not in ("exponential", "linear"):
            raise ConfigError(f"time_shift_type must be 'exponential' or 'linear', got {quoted(self.time_shift_type)}")
        for name in ("invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
            if getattr(self, name):
                raise ConfigError(
                    f"scheduler option {name} is not a schedule that Face-MoGLE was trained with; set it to false"
                )
        if self.stochastic_sampling or self.shift_terminal:
            raise ConfigError("scheduler options stochastic_sampling and shift_terminal are not supported by this loop")


MAX_TEXT_TOKENS = 512  # the largest number of T5 tokens that FLUX accepts
DEFAULT_GUIDANCE = 3.5  # of FLUX.1-dev
ENGINES = ("torch", "onnxruntime", "tensorrt", "tensorrt-rtx")
KERNELS = ("triton", "torch")
