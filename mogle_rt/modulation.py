"""AdaLN modulations of the whole schedule, before the loop (REFERENCE: norm1, norm1_context, norm, norm_out).

All timesteps are known beforehand, so each modulation layer is one matrix product over (step, image). Its weight is
read, used and let go: a quarter of the model's weights never has to stay in memory. The condition's modulations belong
to timestep 0 and are constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

from mogle_rt.config import TransformerConfig
from mogle_rt.schema import SINUSOID_DIM

Weights = Callable[[str], Tensor]  # full bundle name -> tensor on the device and in the dtype of the run


SingleModulation = Sequence[Sequence[Tensor]]
"""Shift, scale and gate, each [B, 1, D]: of text and image, then (if there is one) of the condition."""


@dataclass(frozen=True)
class StepModulation:
    """Modulations of one step, cut up for the blocks. Scales have their 1 added already.

    Attributes:
        double: for each double block shift, scale, gate of attention, then of the MLP, each [B, G, 1, D]: image
            (G = 0) and condition (G = 1).
        context: the same six for text, each [B, 1, D].
        single: for each single block, see `SingleModulation`.
        out: scale and shift of the last norm, each [B, 1, D].
    """

    double: Sequence[Sequence[Tensor]]
    context: Sequence[Sequence[Tensor]]
    single: Sequence[SingleModulation]
    out: Sequence[Tensor]


@dataclass(frozen=True)
class ModulationTables:
    """Modulations of all S steps; the condition's, which are constant, once."""

    double: Tensor  # [S, B, L, 6, D], image rows of double blocks
    context: Tensor  # [S, B, L, 6, D], text rows of double blocks
    single: Tensor  # [S, B, L, 3, D], text and image rows of single blocks
    out: Tensor  # [S, B, 2, D]
    condition_double: Tensor | None  # [B, L, 6, D]
    condition_single: Tensor | None  # [B, L, 3, D]

    def at(self, step: int) -> StepModulation:
        """The modulations of one step."""
        double, single = self.double[step][:, None], self.single[step][:, None]
        if self.condition_double is not None and self.condition_single is not None:
            double = torch.cat([double, self.condition_double[:, None]], dim=1)
            single = torch.cat([single, self.condition_single[:, None]], dim=1)
        singles = _cut(single.permute(2, 1, 3, 0, 4), 3, row_dims=1)
        groups = single.shape[1]
        return StepModulation(
            double=_cut(double.permute(2, 3, 0, 1, 4), 6, row_dims=2),
            context=_cut(self.context[step].permute(1, 2, 0, 3), 6, row_dims=1),
            single=[singles[i : i + groups] for i in range(0, len(singles), groups)],
            out=_cut(self.out[step].transpose(0, 1), 2, row_dims=1)[0],
        )


def _cut(table: Tensor, count: int, row_dims: int) -> list[Sequence[Tensor]]:
    """[..., count, rows..., D] -> lists of ``count`` views [rows..., 1, D]; one call makes all the views."""
    views = table.flatten(0, table.dim() - row_dims - 2).unsqueeze(-2).unbind(0)
    return [views[i : i + count] for i in range(0, len(views), count)]


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
