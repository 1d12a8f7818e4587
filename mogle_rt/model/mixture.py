"""The mixture of one global and 19 region experts, weighted for each step and token by a gate (paper: MoGLE).

The experts see only the mask, so their outputs, the *bank*, can be computed once per image. A step then computes only
the gate and the weighted sum. Alternatively (*fused*), the outputs are computed again in every step, in the same launch
as the gate and the sum. This reads only the distinct pictures, which are fewer bytes than the bank if images share
pictures. Tokens are sequence-major, [N, B, …], see `mogle_rt.ops.torch_ops`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from mogle_rt.config import NUM_EXPERTS, MogleConfig
from mogle_rt.encoders.mask_planes import MaskPlanes
from mogle_rt.errors import ConfigError
from mogle_rt.kernels.inputs import Experts, Gate
from mogle_rt.linear.views import empty_parameter
from mogle_rt.ops.contract import Ops
from mogle_rt.torch_api.private import has_values

MIXTURES = ("bank", "fused")


class Bank(NamedTuple):
    """Everything about the masks that a step needs if the experts run before the first step.

    Attributes:
        outputs: [N, B, 20, 64], the output of every expert; without a gate, their sum [N, B, 1, 64].
        gate_input: [N, B, 64], global mask latents plus the noise projection's bias; None without a gate.
    """

    outputs: Tensor
    gate_input: Tensor | None


@dataclass(frozen=True)
class Regions:
    """The inputs of the experts.

    Attributes:
        planes: [P, N, 64], packed latents of pictures; those that the index doesn't name are never read.
        index: int32 [B, 20], the plane that each expert sees. -1 stands for the picture that most of them share (the
            black picture of all absent classes).
        absent: [N, 20, 64], the output of every expert for that shared picture.
    """

    planes: Tensor
    index: Tensor
    absent: Tensor


class Fused(NamedTuple):
    """Everything about the masks that a step needs if both experts and gate run in every step.

    Attributes:
        regions: the inputs of the experts. gate_input: as in `Bank`.
    """

    regions: Regions
    gate_input: Tensor


class MixtureOfExperts(nn.Module):
    """The experts and the gate.

    Args:
        config: the sizes, and which parts the model has.
        weight_is_scale: whether to average the gate's weights over the tokens.
    """

    def __init__(self, config: MogleConfig, *, weight_is_scale: bool = False) -> None:
        super().__init__()
        self.config = config
        self.weight_is_scale = weight_is_scale
        self._absent: tuple[Tensor, Tensor] | None = None  # the last shared picture, and every expert's output for it
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
        """Check that this model can compute the mixture as requested: "bank", "fused", or None for either.

        Raises:
            ConfigError: the value is unknown, or the model can't compute it so.
        """
        if mixture is not None and mixture not in MIXTURES:
            raise ConfigError(f"mixture must be one of {', '.join(map(repr, MIXTURES))}, got {mixture!r}")
        if mixture == "fused" and not self._can_fuse:
            reason = "weight_is_scale averages the gate" if self.weight_is_scale else "this model lacks experts or gate"
            raise ConfigError(f"mixture='fused' needs experts and a gate for each token, but {reason}; use 'bank'")

    @property
    def _can_fuse(self) -> bool:
        return self.config.has_expert and self.config.has_gating and not self.weight_is_scale

    def _experts(self, regions: Regions) -> Experts:
        weights = self.expert_in, self.expert_in_bias, self.expert_out, self.expert_out_bias
        return Experts(regions.planes, regions.index, regions.absent, *weights)

    def _gate(self, latents: Tensor, gate_input: Tensor, time: Tensor) -> Gate:
        layers = self.gate_in.weight, self.gate_in.bias, self.gate_out.weight, self.gate_out.bias
        return Gate(latents, gate_input, time, self.noise_proj.weight, *layers)

    def prepare(self, masks: MaskPlanes, ops: Ops, mixture: str | None, steps: int) -> Bank | Fused:
        """Compute what no step changes; called once per image.

        The result shares no memory with the arguments, and its shapes depend only on B and N.

        Args:
            masks: the distinct pictures, and which expert sees which of them.
            ops: see `mogle_rt.ops.choice`.
            mixture: "bank" or "fused"; None chooses by `Ops.cheaper_mixture`.
            steps: the number of steps in the run.
        """
        if not self.config.has_expert:
            return self._bank(masks.stacked().permute(2, 0, 1, 3).contiguous(), masks)
        regions, index = self._regions(masks, ops)
        if mixture is None and self._can_fuse:
            tokens = masks.seen_by(0).transpose(0, 1)
            gate = self._gate(tokens, tokens, self.noise_proj.bias)  # only shapes matter; the choice reads no values
            mixture = ops.cheaper_mixture(gate, self._experts(replace(regions, index=index)), steps)
        if mixture != "fused":
            return self._bank(ops.region_experts(self._experts(regions)), masks)
        # The tensor has room for as many planes as a batch can have, so its shape is the same for all masks.
        room = regions.planes.new_zeros(masks.index.size, *regions.planes.shape[1:])
        room[: len(regions.planes)] = regions.planes
        return Fused(replace(regions, planes=room, absent=regions.absent.clone()), self._gate_input(masks))

    def _bank(self, outputs: Tensor, masks: MaskPlanes) -> Bank:
        if not self.config.has_gating:
            return Bank(outputs.sum(2, keepdim=True), None)
        return Bank(outputs, self._gate_input(masks))

    def _gate_input(self, masks: MaskPlanes) -> Tensor:
        return (masks.seen_by(0).transpose(0, 1) + self.noise_proj.bias).contiguous()

    def _regions(self, masks: MaskPlanes, ops: Ops) -> tuple[Regions, Tensor]:
        """The inputs of the experts, and a copy of their index on the CPU."""
        planes, numbers = masks.planes, masks.index.reshape(-1).tolist()
        shared, sharing = Counter(numbers).most_common(1)[0]
        if sharing > 1:
            absent = self._absent_outputs(planes[shared], ops)
            numbers = [-1 if number == shared else number for number in numbers]
        else:  # the index holds no -1, so these zeros are never read
            absent = planes.new_zeros(planes.shape[1], NUM_EXPERTS, planes.shape[2])
        index = torch.tensor(numbers, dtype=torch.int32, device="cpu").view(masks.index.shape)
        return Regions(planes, index.to(planes.device), absent), index

    def _absent_outputs(self, picture: Tensor, ops: Ops) -> Tensor:
        """The output of every expert for the shared picture. The last result is kept, because the black picture is the
        same for all masks of one size."""
        if self._absent is None or not _same_bits(self._absent[0], picture):
            self._absent = picture.clone(), self._outputs_of(picture, ops)
        return self._absent[1]

    def _outputs_of(self, picture: Tensor, ops: Ops) -> Tensor:
        """The output of every expert for one picture: [N, 64] -> [N, 20, 64]."""
        index = torch.zeros(1, NUM_EXPERTS, dtype=torch.int32, device=picture.device)
        unread = picture.new_zeros(len(picture), NUM_EXPERTS, picture.shape[-1])
        return ops.region_experts(self._experts(Regions(picture[None], index, unread)))[:, 0]

    def time_table(self, timesteps: Tensor) -> Tensor | None:
        """The gate's time embeddings of all steps: [S] scheduler timesteps (0…1000) -> [S, 64]. None without a gate."""
        if not self.config.has_gating:
            return None
        sinusoid = get_timestep_embedding(
            timesteps, self.config.latent_dim, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        hidden = self.time_in(sinusoid.to(self.time_in.weight.dtype))
        return self.time_out(F.silu(hidden))

    def forward(self, latents: Tensor, known: Bank | Fused, time: Tensor | None, out: Tensor, ops: Ops) -> None:
        """Compute the condition tokens of one step.

        Args:
            latents: [N, B, 64], packed noisy latents.
            known: the result of `prepare`.
            time: [1, 64], this step's row of `time_table`; None without a gate.
            out: [N, B, 64], where the tokens are written.
            ops: see `mogle_rt.ops.choice`.
        """
        if known.gate_input is None or time is None:
            assert isinstance(known, Bank)
            out.copy_(known.outputs[:, :, 0])
            return
        gate = self._gate(latents, known.gate_input, time[0])
        if isinstance(known, Fused):
            ops.region_expert_mix(gate, self._experts(known.regions), out)
            return
        mix = ops.gate_mix_mean if self.weight_is_scale else ops.gate_mix
        mix(gate, known.outputs, out)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two pictures are equal bit by bit. Meta and fake tensors have no values and count as different."""
    if not has_values(b) or (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return False
    return torch.equal(a.view(torch.uint8), b.contiguous().view(torch.uint8))
