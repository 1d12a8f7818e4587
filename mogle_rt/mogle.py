"""The mixture: one global and 19 region experts, weighed for each step and place by a gate (paper: MoGLE).

The experts see only the mask, so their outputs, the *bank*, are computed once an image. A step is left with the gate
and the weighted sum. Tokens are sequence-major, [N, B, …], see `mogle_rt.ops`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from mogle_rt.config import NUM_EXPERTS, MogleConfig
from mogle_rt.lora import empty_parameter
from mogle_rt.ops import Ops


class Bank(NamedTuple):
    """What the experts and the gate know of the masks before the first step.

    Attributes:
        outputs: [N, B, 20, 64], every expert's output; or, where no gate weighs them, their sum [N, B, 1, 64].
        gate_input: [N, B, 64], global mask latents plus the noise projection's bias; None without a gate.
    """

    outputs: Tensor
    gate_input: Tensor | None


class MixtureOfExperts(nn.Module):
    """Experts and gate.

    Args:
        config: sizes and ablation.
        weight_is_scale: average the gate's weights over the tokens.
    """

    def __init__(self, config: MogleConfig, *, weight_is_scale: bool = False) -> None:
        super().__init__()
        self.config = config
        self.weight_is_scale = weight_is_scale
        C, H, G = config.latent_dim, config.expert_dim, config.gate_dim
        if config.has_expert:
            self.expert_in = empty_parameter(NUM_EXPERTS, H, C)
            self.expert_in_bias = empty_parameter(NUM_EXPERTS, H)
            self.expert_out = empty_parameter(NUM_EXPERTS, C, H)
            self.expert_out_bias = empty_parameter(NUM_EXPERTS, C)
        if config.has_gating:
            self.time_in = nn.Linear(C, C, device="meta")
            self.time_out = nn.Linear(C, C, device="meta")
            self.noise_proj = nn.Linear(C, C, device="meta")
            self.gate_in = nn.Linear(C, G, device="meta")
            self.gate_out = nn.Linear(G, NUM_EXPERTS, device="meta")

    def bank(self, mask_latents: Tensor, ops: Ops) -> Bank:
        """Once an image. mask_latents: [B, 20, N, 64], packed VAE latents of the palette picture and the 19 planes."""
        if self.config.has_expert:
            layers = (self.expert_in, self.expert_in_bias, self.expert_out, self.expert_out_bias)
            outputs = ops.experts(mask_latents, *layers)
        else:
            outputs = mask_latents.permute(2, 0, 1, 3).contiguous()
        if not self.config.has_gating:
            return Bank(outputs.sum(2, keepdim=True), None)
        gate_input = mask_latents[:, 0].transpose(0, 1) + self.noise_proj.bias
        return Bank(outputs, gate_input.contiguous())

    def time_table(self, timesteps: Tensor) -> Tensor | None:
        """The gate's time embedding of every step: [S] scheduler timesteps (0…1000) -> [S, 64]; None without a gate."""
        if not self.config.has_gating:
            return None
        sinusoid = get_timestep_embedding(
            timesteps, self.config.latent_dim, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        hidden = self.time_in(sinusoid.to(self.time_in.weight.dtype))
        return self.time_out(F.silu(hidden))

    def forward(self, latents: Tensor, bank: Bank, time: Tensor | None, out: Tensor, ops: Ops) -> None:
        """Condition tokens of one step.

        Args:
            latents: [N, B, 64], packed noisy latents.
            bank: see `bank`.
            time: [1, 64], this step's row of `time_table`.
            out: [N, B, 64].
            ops: see `mogle_rt.ops`.
        """
        if bank.gate_input is None or time is None:
            out.copy_(bank.outputs[:, :, 0])
            return
        mix = ops.gate_mix_mean if self.weight_is_scale else ops.gate_mix
        layers = (self.gate_in.weight, self.gate_in.bias, self.gate_out.weight, self.gate_out.bias)
        mix(latents, bank.gate_input, time[0], self.noise_proj.weight, *layers, bank=bank.outputs, out=out)
