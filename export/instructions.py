"""What the manifest tells whoever drives the graphs: the order of calls, the schedule, and the classes of masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mogle_rt.config import SchedulerConfig
from mogle_rt.masks import CLASS_NAMES, PALETTE

PROMPT = (
    "prompt_embeds [B, T, J] (T5) and pooled_prompt_embeds [B, P] (CLIP), with the masks' batch B, come from elsewhere: the "
    "text encoders were not exported; `mogle-rt embed` writes both into a file"
)
PROMPT_BY_GRAPHS = (
    "the library named tokenizers reads the files under tokenizers, and pads and cuts texts as they say; the numbers go in "
    "as int64, without an attention mask: text_encoder(clip_ids) -> pooled_prompt_embeds [B, P], text_encoder_2(t5_ids) -> "
    "prompt_embeds [B, T, J], with the masks' batch B"
)
ORDER = (
    "pictures: of each mask 20; picture 0 is the mask in the classes' colors, picture 1 + i is class i (255 where it is, "
    "else 0, in all three channels); uint8 [P, H, W, 3], H and W multiples of 16; equal pictures need be encoded once",
    "vae_encoder(pictures) -> latents [P, N, 64], N = H / 16 * W / 16; gather them to mask_latents [B, 20, N, 64]",
    "experts(mask_latents) -> bank, gate_input",
    PROMPT,
    "prepare(prompt_embeds, pooled_prompt_embeds, model_timesteps, timesteps, guidance = 1000 * "
    "guidance_scale, grid = (H / 16, W / 16), position_delta = (0, 0), position_scale = 1) -> text, time_table, "
    "modulation, condition_modulation, rope_cos, rope_sin; sequence = T + 2 N",
    "latents = standard normal noise [B, N, 64]",
    "for k in 0 ... S - 1: step(latents, step = k, all of the above) -> velocity; latents += (sigma[k + 1] - sigma[k]) * "
    "velocity, in float32, then rounded to the graphs' dtype; condition is the step's mixture, not needed by the loop",
    "where condition_scale is not 1, step_scaled in step's place, with log_condition_scale = log(condition_scale), "
    "-10000 for 0",
    "vae_decoder(latents, grid) -> images [B, 3, H, W] in [0, 1]",
    "an engine's file: 8 bytes MOGLETRT, the header's length n as a little-endian uint64, n bytes of header (JSON, UTF-8), "
    "plan_bytes bytes of TensorRT's plan; its inputs and outputs are its graph's",
)
CLASSES = tuple(
    {"index": i, "name": name, "color": color}
    for i, (name, color) in enumerate(zip(CLASS_NAMES, PALETTE.tolist(), strict=True))
)


def drive(*, text_encoders: bool) -> tuple[str, ...]:
    """The order of calls. text_encoders: whether they are among the graphs."""
    return tuple(PROMPT_BY_GRAPHS if line == PROMPT and text_encoders else line for line in ORDER)


def schedule(config: SchedulerConfig) -> Mapping[str, Any]:
    """The scheduler's configuration, and the formulas that make the steps' times of it."""
    return {
        "scheduler": config.to_dict(),
        "formulas": [
            "in float64: s = linspace(1, 1 / S, S), S steps",
            "use_dynamic_shifting: mu = base_shift + (max_shift - base_shift) / (max_image_seq_len - "
            "base_image_seq_len) * (N - base_image_seq_len), N image tokens; exponential: s = exp(mu) / (exp(mu) + "
            "(1 / s - 1)), linear: s = mu / (mu + (1 / s - 1)); otherwise s = shift * s / (1 + (shift - 1) * s)",
            "sigma = s rounded to float32, then 0; timesteps = sigma * num_train_timesteps in float32; model_timesteps = "
            "timesteps / 1000 * 1000 in float32",
        ],
    }
