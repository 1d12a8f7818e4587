"""AdaLN modulations of the whole schedule, before the loop (REFERENCE: norm1, norm1_context, norm, norm_out).

All timesteps are known beforehand, so each modulation layer is one matrix product over (step, image). Its weight is
read, used and let go: a quarter of the model's weights never has to stay in memory. The condition's modulations belong
to timestep 0 and are constant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

from mogle_rt.config import TransformerConfig
from mogle_rt.schema import SINUSOID_DIM

Weights = Callable[[str], Tensor]  # full bundle name -> tensor on the device and in the dtype of the run


@dataclass(frozen=True)
class StepModulation:
    """Modulations of one step. Scales have their 1 added already.

    Attributes:
        double: [B, G, L, 6, D] for image (G = 0) and condition (G = 1) in double block L; the six are
            shift, scale, gate of attention, then of the MLP.
        context: [B, L, 6, D] for text.
        single: [B, G, L, 3, D] for text and image (G = 0) and condition (G = 1): shift, scale, gate.
        out: [B, 2, D], scale and shift of the last norm.
    """

    double: Tensor
    context: Tensor
    single: Tensor
    out: Tensor


@dataclass(frozen=True)
class ModulationTables:
    """Modulations of all S steps, in the layout of `StepModulation` with a leading S (without G); the condition's once."""

    double: Tensor  # [S, B, L, 6, D]
    context: Tensor  # [S, B, L, 6, D]
    single: Tensor  # [S, B, L, 3, D]
    out: Tensor  # [S, B, 2, D]
    condition_double: Tensor | None  # [B, L, 6, D]
    condition_single: Tensor | None  # [B, L, 3, D]

    def at(self, step: int) -> StepModulation:
        """The modulations of one step."""
        double, single = self.double[step][:, None], self.single[step][:, None]
        if self.condition_double is not None and self.condition_single is not None:
            double = torch.cat([double, self.condition_double[:, None]], dim=1)
            single = torch.cat([single, self.condition_single[:, None]], dim=1)
        return StepModulation(double, self.context[step], single, self.out[step])


def _mlp(x: Tensor, name: str, weights: Weights) -> Tensor:
    x = F.linear(x, weights(f"{name}.linear_1.weight"), weights(f"{name}.linear_1.bias"))
    return F.linear(F.silu(x), weights(f"{name}.linear_2.weight"), weights(f"{name}.linear_2.bias"))


def _sinusoid(t: Tensor, dtype: torch.dtype) -> Tensor:
    return get_timestep_embedding(t, SINUSOID_DIM, flip_sin_to_cos=True, downscale_freq_shift=0).to(dtype)


def time_embedding(timesteps: Tensor, guidance: Tensor | None, pooled: Tensor, weights: Weights) -> Tensor:
    """temb = MLP(t) + MLP(guidance) + MLP(pooled).

    Args:
        timesteps: [S], in the transformer's scale 0…1000.
        guidance: [B], guidance_scale times 1000, or None for models without it.
        pooled: [B, P], CLIP's pooled prompt embeddings.

    Returns:
        [S, B, D] in ``pooled``'s dtype.
    """
    prefix = "transformer.time_text_embed"
    constant = _mlp(pooled, f"{prefix}.text_embedder", weights)
    if guidance is not None:
        constant = constant + _mlp(_sinusoid(guidance, pooled.dtype), f"{prefix}.guidance_embedder", weights)
    return _mlp(_sinusoid(timesteps, pooled.dtype), f"{prefix}.timestep_embedder", weights)[:, None] + constant


def modulation_tables(
    config: TransformerConfig,
    temb: Tensor,
    condition_temb: Tensor | None,
    weights: Weights,
    *,
    latent_lora: bool = False,
) -> ModulationTables:
    """Every modulation of a run, layer by layer.

    Args:
        temb: [S, B, D], see `time_embedding`.
        condition_temb: [B, D], the same for timestep 0; None without a condition.
        weights: reads a tensor of the bundle; it is let go after its layer.
        latent_lora: the branch LoRA acts on the image's (and in single blocks the text's) modulation too.
    """
    steps, batch, width = temb.shape
    rows = F.silu(temb).reshape(steps * batch, width)
    condition = None if condition_temb is None else F.silu(condition_temb)

    def table(count: int, chunks: int, leading: tuple[int, ...]) -> Tensor:
        return temb.new_empty(*leading, count, chunks, width)

    double, context = (table(config.num_layers, 6, (steps, batch)) for _ in range(2))
    single = table(config.num_single_layers, 3, (steps, batch))
    condition_double = None if condition is None else table(config.num_layers, 6, (batch,))
    condition_single = None if condition is None else table(config.num_single_layers, 3, (batch,))

    def fill(name: str, into: Tensor, condition_into: Tensor | None = None, *, lora: bool = False) -> None:
        weight, bias = weights(f"transformer.{name}.weight"), weights(f"transformer.{name}.bias")
        for x, out, with_lora in ((rows, into, lora), (condition, condition_into, True)):
            if x is None or out is None:
                continue
            y = F.linear(x, weight, bias)
            if with_lora:
                down, up = weights(f"lora.{name}.lora_A.weight"), weights(f"lora.{name}.lora_B.weight")
                y = torch.addmm(y, x @ down.t(), up.t())
            out.copy_(y.view(out.shape))

    for i in range(config.num_layers):
        fill(
            f"transformer_blocks.{i}.norm1.linear",
            double[:, :, i],
            None if condition_double is None else condition_double[:, i],
            lora=latent_lora,
        )
        fill(f"transformer_blocks.{i}.norm1_context.linear", context[:, :, i])
    for i in range(config.num_single_layers):
        fill(
            f"single_transformer_blocks.{i}.norm.linear",
            single[:, :, i],
            None if condition_single is None else condition_single[:, i],
            lora=latent_lora,
        )
    out = temb.new_empty(steps, batch, 2, width)
    fill("norm_out.linear", out)
    for t in (double, context, single, condition_double, condition_single):
        if t is not None:
            t[..., 1::3, :] += 1  # scale -> 1 + scale
    out[..., 0, :] += 1  # here the scale stands first
    return ModulationTables(double, context, single, out, condition_double, condition_single)
