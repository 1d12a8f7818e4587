"""What the configurations of the VAE and the text encoders may say: of what type, and in which range.

They are diffusers' and transformers' own, and those libraries build what a configuration asks for. A name that no table
here holds does not reach them: so a file can't ask for what it has no weights for, for code, or for a download.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from mogle_rt.errors import ConfigError
from mogle_rt.values import OneOf, Range, parsed, quoted

Width = Annotated[int, Range(1, 1 << 16)]
Layers = Annotated[int, Range(1, 256)]
Vocabulary = Annotated[int, Range(1, 1 << 24)]
Token = Annotated[int, Range(-1, (1 << 31) - 1)] | None
Small = Annotated[float, Range(0, 1e3)]
Name = Annotated[str, lambda value, what: _short(value, what)]
Factor = Annotated[float, Range(1e-6, 1e6)]

VAE: Mapping[str, Any] = {
    "in_channels": Annotated[int, Range(3, 3)],
    "out_channels": Annotated[int, Range(3, 3)],
    "down_block_types": tuple[Annotated[str, OneOf("DownEncoderBlock2D", "AttnDownEncoderBlock2D")], ...],
    "up_block_types": tuple[Annotated[str, OneOf("UpDecoderBlock2D", "AttnUpDecoderBlock2D")], ...],
    "block_out_channels": tuple[Width, ...],
    "layers_per_block": Annotated[int, Range(1, 32)],
    "act_fn": Name,
    "latent_channels": Annotated[int, Range(1, 1024)],
    "norm_num_groups": Width,
    "sample_size": Annotated[int, Range(1, 1 << 20)] | None,
    "scaling_factor": Factor,
    "shift_factor": Annotated[float, Range(-1e6, 1e6)],
    "latents_mean": tuple[float, ...] | None,
    "latents_std": tuple[float, ...] | None,
    "force_upcast": bool,
    "use_quant_conv": bool,
    "use_post_quant_conv": bool,
    "mid_block_add_attention": bool,
}
CLIP: Mapping[str, Any] = {
    "model_type": Name,
    "vocab_size": Vocabulary,
    "hidden_size": Width,
    "intermediate_size": Width,
    "projection_dim": Width,
    "num_hidden_layers": Layers,
    "num_attention_heads": Width,
    "max_position_embeddings": Width,
    "hidden_act": Name,
    "layer_norm_eps": Small,
    "attention_dropout": Small,
    "initializer_range": Small,
    "initializer_factor": Small,
    "bos_token_id": Token,
    "eos_token_id": Token,
    "pad_token_id": Token,
}
T5: Mapping[str, Any] = {
    "model_type": Name,
    "vocab_size": Vocabulary,
    "d_model": Width,
    "d_kv": Width,
    "d_ff": Width,
    "num_layers": Layers,
    "num_decoder_layers": Layers | None,
    "num_heads": Width,
    "relative_attention_num_buckets": Annotated[int, Range(4, 1 << 12)],
    "relative_attention_max_distance": Width,
    "dropout_rate": Small,
    "classifier_dropout": Small,
    "layer_norm_epsilon": Small,
    "initializer_factor": Small,
    "feed_forward_proj": Name,
    "dense_act_fn": Name,
    "is_gated_act": bool,
    "is_decoder": bool,
    "is_encoder_decoder": bool,
    "use_cache": bool,
    "tie_word_embeddings": bool,
    "scale_decoder_outputs": bool,
    "bos_token_id": Token,
    "eos_token_id": Token,
    "pad_token_id": Token,
    "decoder_start_token_id": Token,
}
TABLES = {"vae": VAE, "text_encoder": CLIP, "text_encoder_2": T5}
LAYER_COUNTS = {"text_encoder": ("num_hidden_layers",), "text_encoder_2": ("num_layers", "num_decoder_layers")}


def component(part: str, config: Any) -> dict[str, Any]:
    """The entries of a configuration that its library is to see, each of its type and in its range.

    Args:
        part: "vae", "text_encoder" or "text_encoder_2".

    Raises:
        ConfigError: it is no object, or an entry has another type or lies outside.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"{part} must be a configuration, got {type(config).__name__}")
    table = TABLES[part]
    return {n: parsed(table[n], value, f"{part}: {n}") for n, value in config.items() if n in table}


def check_layers(part: str, config: Mapping[str, Any], tensors: int) -> None:
    """A text encoder has no more layers than tensors, before any is built.

    Raises:
        ConfigError: it claims more.
    """
    for name in LAYER_COUNTS[part]:
        if (config.get(name) or 0) > tensors:
            raise ConfigError(f"{part}: {name} is {config[name]}, but there are only {tensors} tensors")


def _short(value: str, what: str) -> None:
    if len(value) > 60:
        raise ConfigError(f"{what} must be a name, got {quoted(value)}")
