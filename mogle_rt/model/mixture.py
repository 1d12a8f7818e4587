"""The mixture: one global and 19 region experts, weighed for each step and place by a gate (paper: MoGLE).

The experts see only the mask, so their outputs, the *bank*, can be computed once an image; a step is left with the
gate and the weighted sum. Or they are computed anew in every step, from the distinct pictures alone, in the same
launch as the gate and the sum (*fused*): where images share pictures, these are fewer bytes than a bank has. Tokens
are sequence-major, [N, B, …], see `mogle_rt.ops.choice`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from mogle_rt.config import NUM_EXPERTS, MogleConfig
from mogle_rt.errors import ConfigError
from mogle_rt.linear.views import empty_parameter
from mogle_rt.ops.contract import Ops
from mogle_rt.torch_api.private import has_values

MIXTURES = ("bank", "fused")


class Bank(NamedTuple):
    """What the gate knows of the masks before the first step.

    Attributes:
        outputs: [N, B, 20, 64], every expert's output; or, where no gate weighs them, their sum [N, B, 1, 64].
        gate_input: [N, B, 64], global mask latents plus the noise projection's bias; None without a gate.
    """

    outputs: Tensor
    gate_input: Tensor | None


@dataclass(frozen=True)
class Regions:
    """What the experts see.

    Attributes:
        planes: [P, N, 64], packed latents of pictures, of which the index names the distinct ones.
        index: int32 [B, 20], the plane that an expert sees, or -1: the picture that most of them share (the black one
            of all absent classes).
        absent: [N, 20, 64], every expert's output for that picture.
    """

    planes: Tensor
    index: Tensor
    absent: Tensor


class Fused(NamedTuple):
    """What experts and gate know of the masks before the first step, where both run in every step.

    Attributes:
        regions: what the experts see. gate_input: as of `Bank`.
    """

    regions: Regions
    gate_input: Tensor


def picture_contents(pictures: Tensor) -> list[Hashable]:
    """A key for each of [P, …], equal for pictures that are equal bit by bit. Waits for the GPU.

    Meta and fake tensors have no contents: there, all are taken to be distinct.
    """
    if not has_values(pictures):
        return [(number, tuple(pictures.shape)) for number in range(len(pictures))]
    return [picture.tobytes() for picture in pictures.contiguous().view(torch.uint8).cpu().numpy()]


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
        self._absent: tuple[Hashable, Tensor] | None = None  # the last shared picture, and the outputs for it
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

    def check_mixture(self, mixture: str | None) -> None:
        """Whether the mixture can be computed as asked: "bank", "fused", or None for whichever serves.

        Raises:
            ConfigError: it can't.
        """
        if mixture is not None and mixture not in MIXTURES:
            raise ConfigError(f"mixture must be one of {', '.join(map(repr, MIXTURES))}, got {mixture!r}")
        if mixture == "fused" and not self._can_fuse:
            reason = "weight_is_scale averages the gate" if self.weight_is_scale else "this model lacks experts or gate"
            raise ConfigError(f"mixture='fused' needs experts and a gate for each token, but {reason}; use 'bank'")

    @property
    def _can_fuse(self) -> bool:
        return self.config.has_expert and self.config.has_gating and not self.weight_is_scale

    @property
    def _expert_layers(self) -> tuple[Tensor, ...]:
        return self.expert_in, self.expert_in_bias, self.expert_out, self.expert_out_bias

    @property
    def _gate_layers(self) -> tuple[Tensor, ...]:
        gate = self.gate_in.weight, self.gate_in.bias, self.gate_out.weight, self.gate_out.bias
        return self.noise_proj.weight, *gate

    def prepare(self, mask_latents: Tensor, ops: Ops, mixture: str | None, steps: int) -> Bank | Fused:
        """Once an image. Nothing of the result is the caller's memory.

        Args:
            mask_latents: [B, 20, N, 64], packed VAE latents of the palette picture and the 19 planes.
            ops: see `mogle_rt.ops.choice`.
            mixture: "bank" or "fused"; None takes what `Ops.cheaper_mixture` says.
            steps: of the run.
        """
        if not self.config.has_expert:
            outputs = mask_latents.permute(2, 0, 1, 3).clone(memory_format=torch.contiguous_format)
            return self._bank(outputs, mask_latents)
        regions, index = self._regions(mask_latents, ops)
        if mixture is None and self._can_fuse:
            seen = regions.planes, index, regions.absent
            mixture = ops.cheaper_mixture(*seen, gate=self._gate_layers, experts=self._expert_layers, steps=steps)
        if mixture != "fused":
            outputs = ops.experts(regions.planes, regions.index, regions.absent, *self._expert_layers)
            return self._bank(outputs, mask_latents)
        own = replace(regions, planes=regions.planes.clone(), absent=regions.absent.clone())
        return Fused(own, self._gate_input(mask_latents))

    def _bank(self, outputs: Tensor, mask_latents: Tensor) -> Bank:
        if not self.config.has_gating:
            return Bank(outputs.sum(2, keepdim=True), None)
        return Bank(outputs, self._gate_input(mask_latents))

    def _gate_input(self, mask_latents: Tensor) -> Tensor:
        return (mask_latents[:, 0].transpose(0, 1) + self.noise_proj.bias).contiguous()

    def _regions(self, mask_latents: Tensor, ops: Ops) -> tuple[Regions, Tensor]:
        """Which experts see what, and the index on the CPU."""
        planes, first = mask_latents.flatten(0, 1), dict[Hashable, int]()
        contents = picture_contents(planes)
        numbers = [first.setdefault(content, number) for number, content in enumerate(contents)]
        shared, sharing = Counter(numbers).most_common(1)[0]
        if self._absent is None or self._absent[0] != contents[shared]:  # black is the same for all masks of a size
            self._absent = contents[shared], self._outputs_of(planes[shared], ops)
        listed = [-1 if sharing > 1 and number == shared else number for number in numbers]
        index = torch.tensor(listed, dtype=torch.int32, device="cpu").view(mask_latents.shape[:2])
        return Regions(planes, index.to(planes.device), self._absent[1]), index

    def _outputs_of(self, picture: Tensor, ops: Ops) -> Tensor:
        """Every expert's output for one picture: [N, 64] -> [N, 20, 64]."""
        index = torch.zeros(1, NUM_EXPERTS, dtype=torch.int32, device=picture.device)
        unread = picture.new_zeros(len(picture), NUM_EXPERTS, picture.shape[-1])
        return ops.experts(picture[None], index, unread, *self._expert_layers)[:, 0]

    def time_table(self, timesteps: Tensor) -> Tensor | None:
        """The gate's time embedding of every step: [S] scheduler timesteps (0…1000) -> [S, 64]; None without a gate."""
        if not self.config.has_gating:
            return None
        sinusoid = get_timestep_embedding(
            timesteps, self.config.latent_dim, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        hidden = self.time_in(sinusoid.to(self.time_in.weight.dtype))
        return self.time_out(F.silu(hidden))

    def forward(self, latents: Tensor, known: Bank | Fused, time: Tensor | None, out: Tensor, ops: Ops) -> None:
        """Condition tokens of one step.

        Args:
            latents: [N, B, 64], packed noisy latents.
            known: see `prepare`.
            time: [1, 64], this step's row of `time_table`.
            out: [N, B, 64].
            ops: see `mogle_rt.ops.choice`.
        """
        if known.gate_input is None or time is None:
            assert isinstance(known, Bank)
            out.copy_(known.outputs[:, :, 0])
            return
        gate = latents, known.gate_input, time[0], *self._gate_layers
        if isinstance(known, Fused):
            seen = known.regions
            layers = self._expert_layers
            ops.expert_mix(*gate, *layers, planes=seen.planes, index=seen.index, absent=seen.absent, out=out)
            return
        mix = ops.gate_mix_mean if self.weight_is_scale else ops.gate_mix
        mix(*gate, bank=known.outputs, out=out)
