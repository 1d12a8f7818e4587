"""Arguments of every kernel at the sizes of FLUX.1-dev: 512 x 512 pixels, 512 text tokens, one image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mogle_rt.kernels.common import Cost, Launch, recording
from mogle_rt.kernels.gate_mix import (
    gate_mix,
    gate_mix_cost,
    gate_mix_mean,
    gate_mix_mean_cost,
    gate_mix_mean_ref,
    gate_mix_ref,
    partial_sums,
)
from mogle_rt.kernels.gate_mix_embed import gate_mix_embed, gate_mix_embed_cost, gate_mix_embed_ref
from mogle_rt.kernels.joint_attention import joint_attention, joint_attention_cost, joint_attention_ref
from mogle_rt.kernels.norm_modulate import norm_modulate, norm_modulate_cost, norm_modulate_ref
from mogle_rt.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_cost, qk_norm_rope_ref
from mogle_rt.kernels.region_expert_mix import region_expert_mix, region_expert_mix_cost, region_expert_mix_ref
from mogle_rt.kernels.region_experts import region_experts, region_experts_cost, region_experts_ref
from mogle_rt.kernels.residual_norm_modulate import (
    residual,
    residual_cost,
    residual_norm_modulate,
    residual_norm_modulate_cost,
    residual_norm_modulate_ref,
    residual_ref,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TEXT, IMAGE = 512, 1024
HEADS, HEAD = 24, 128
WIDTH = HEADS * HEAD
LATENT, GATE, EXPERT, EXPERTS = 64, 64, 32, 20
PRESENT = 11  # pictures: the mask's own and ten regions, as in a portrait
RANK = 4  # of a LoRA; q, k, v and proj_mlp have one each, side by side, and widths are padded to a multiple of 8


@dataclass(frozen=True)
class Workload:
    """A kernel with its twin, its declared cost and the arguments of one call."""

    name: str
    run: Callable[..., None]
    reference: Callable[..., None]
    cost: Callable[..., Cost]
    arguments: dict[str, Any]

    def declared(self) -> Cost:
        """What the call takes at least."""
        return self.cost(**self.arguments)

    def launches(self) -> list[Launch]:
        """The call's launches, recorded."""
        with recording() as launches:
            self.run(**self.arguments)
        return launches


def workloads(dtype: torch.dtype, device: str) -> list[Workload]:
    """All of them; on the meta device without contents, else with random values."""
    L, N, B, D = TEXT + 2 * IMAGE, IMAGE, 1, WIDTH
    generator = None if device == "meta" else torch.Generator(device).manual_seed(0)

    def new(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        x = torch.empty(shape, dtype=dtype, device=device)
        return x if generator is None else x.normal_(0, scale, generator=generator)

    streams = [TEXT + N, L]
    gate = {
        "latents": new(N, B, LATENT),
        "gate_input": new(N, B, LATENT),
        "time": new(LATENT),
        "noise_weight": new(LATENT, LATENT, scale=LATENT**-0.5),
        "gate_in_weight": new(GATE, LATENT, scale=LATENT**-0.5),
        "gate_in_bias": new(GATE),
        "gate_out_weight": new(EXPERTS, GATE, scale=GATE**-0.5),
        "gate_out_bias": new(EXPERTS),
    }
    bank = new(N, B, EXPERTS, LATENT)
    norm = {
        "x": new(L, B, D),
        "scale": new(2, B, D),
        "shift": new(2, B, D),
        "bounds": streams,
        "out": new(L, B, D + 4 * RANK),
        "lora_down": new(D, 4 * RANK, scale=D**-0.5),
        "lora_from": streams[0],
    }
    update = {
        "y": new(L, B, D + 8),
        "gate": new(2, B, D),
        "lora_up": new(8, D),
        "lora_up_from": streams[0],
        "clip": False,
    }
    experts = {
        "planes": new(PRESENT, N, LATENT),
        "index": torch.full((B, EXPERTS), -1, dtype=torch.int32, device=device),
        "absent": new(N, EXPERTS, LATENT),
        "expert_in_weight": new(EXPERTS, EXPERT, LATENT, scale=LATENT**-0.5),
        "expert_in_bias": new(EXPERTS, EXPERT),
        "expert_out_weight": new(EXPERTS, LATENT, EXPERT, scale=EXPERT**-0.5),
        "expert_out_bias": new(EXPERTS, LATENT),
    }
    experts["index"][:, :PRESENT] = torch.arange(PRESENT, dtype=torch.int32, device=device)
    return [
        Workload("norm_modulate", norm_modulate, norm_modulate_ref, norm_modulate_cost, norm),
        Workload(
            "residual_norm_modulate",
            residual_norm_modulate,
            residual_norm_modulate_ref,
            residual_norm_modulate_cost,
            norm | update,
        ),
        Workload("residual", residual, residual_ref, residual_cost, {"x": norm["x"], "bounds": streams} | update),
        Workload(
            "qk_norm_rope",
            qk_norm_rope,
            qk_norm_rope_ref,
            qk_norm_rope_cost,
            {
                "x": new(L, B, 3, HEADS, HEAD),
                "norm_weight": new(2, 2, HEAD),
                "bounds": [TEXT, L],
                "rope": new(L, HEAD, dtype=torch.float32),
            },
        ),
        Workload("gate_mix", gate_mix, gate_mix_ref, gate_mix_cost, gate | {"bank": bank, "out": new(N, B, LATENT)}),
        Workload(
            "gate_mix_mean",
            gate_mix_mean,
            gate_mix_mean_ref,
            gate_mix_mean_cost,
            gate
            | {
                "bank": bank,
                "out": new(N, B, LATENT),
                "sums": new(partial_sums(N, B), B, EXPERTS, dtype=torch.float32),
            },
        ),
        Workload(
            "gate_mix_embed",
            gate_mix_embed,
            gate_mix_embed_ref,
            gate_mix_embed_cost,
            gate
            | {
                "bank": bank,
                "embed_weight": new(D, LATENT, scale=LATENT**-0.5),
                "embed_bias": new(D),
                "lora_down": new(LATENT, RANK, scale=LATENT**-0.5),
                "lora_up": new(RANK, D),
                "latent_lora": False,
                "out": new(2 * N, B, D),
            },
        ),
        Workload("region_experts", region_experts, region_experts_ref, region_experts_cost, experts | {"bank": bank}),
        Workload(
            "region_expert_mix",
            region_expert_mix,
            region_expert_mix_ref,
            region_expert_mix_cost,
            gate | experts | {"out": new(N, B, LATENT)},
        ),
        Workload(
            "joint_attention",
            joint_attention,
            joint_attention_ref,
            joint_attention_cost,
            dict(zip("qkv", new(L, B, 3, HEADS, HEAD).unbind(2), strict=True))
            | {
                "out": new(L, B, D),
                "condition_from": streams[0],
                "visibility": "scaled",
                "log_scale": 0.5,
            },
        ),
    ]
