"""What can run a step. The torch engine prepares everything that no step changes, then runs steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mogle_rt.attention import AttentionPlan
from mogle_rt.checkpoint import Bundle
from mogle_rt.config import ModelConfig
from mogle_rt.loading import load_mogle, load_transformer
from mogle_rt.modulation import ModulationTables, modulation_tables, time_embedding
from mogle_rt.mogle import Bank
from mogle_rt.sampling import Schedule
from mogle_rt.transformer import Layout, rope_table


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What one call of the pipeline asks of an engine.

    Attributes:
        mask_latents: [B, 20, N, 64], packed VAE latents of the palette picture and the 19 region planes.
        prompt_embeds: [B, T, J]. pooled_prompt_embeds: [B, P].
        guidance_scale: strength of the distilled guidance; without effect on models that take none.
        grid: rows and columns of image tokens, (H / 16, W / 16).
        condition_scale, position_delta, position_scale: see `Pipeline`.
    """

    mask_latents: Tensor
    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    guidance_scale: float
    grid: tuple[int, int]
    condition_scale: float = 1.0
    position_delta: tuple[int, int] = (0, 0)
    position_scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """All that a step reads beside its latents; no step changes it.

    Attributes:
        bank: expert outputs and the gate's constant input.
        time_table: [S, 64], the gate's time embeddings; None without a gate.
        text: [B, T, D], prompt embeddings after ``context_embedder``.
        modulation: AdaLN modulations of all steps.
        rope: complex64 [L, d / 2] of the joint sequence [text, image, condition].
        layout: row counts and switches.
    """

    bank: Bank
    time_table: Tensor | None
    text: Tensor
    modulation: ModulationTables
    rope: Tensor
    layout: Layout


def token_ids(grid: tuple[int, int]) -> Tensor:
    """Ids (0, row, column) of the image tokens: [N, 3]."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()


def condition_ids(ids: Tensor, position_delta: tuple[int, int], position_scale: float) -> Tensor:
    """Ids of the condition's tokens: moved, then scaled about the centre of a cell. [N, 3] -> [N, 3]."""
    ids = ids.clone()
    ids[:, 1] += position_delta[0]
    ids[:, 2] += position_delta[1]
    if position_scale != 1:
        ids[:, 1:] = ids[:, 1:] * position_scale + (position_scale - 1) / 2
    return ids


class TorchEngine:
    """Face-MoGLE's step in PyTorch.

    Args:
        bundle: the weights.
        device, dtype: where and in what to compute.
        model: the reference's switches.
    """

    def __init__(self, bundle: Bundle, device: torch.device, dtype: torch.dtype, model: ModelConfig) -> None:
        self.bundle, self.device, self.dtype, self.model = bundle, device, dtype, model
        self.config = bundle.config.transformer
        self.transformer = load_transformer(bundle, device, dtype)
        self.mogle = load_mogle(bundle, device, dtype, weight_is_scale=model.weight_is_scale)
        self.inputs: StepInputs | None = None

    def prepare(self, conditions: Conditions, schedule: Schedule) -> StepInputs:
        """Compute the step inputs of a run, and hold them for `step`."""
        c = conditions
        prompt_embeds = c.prompt_embeds.to(self.device, self.dtype)
        pooled = c.pooled_prompt_embeds.to(self.device, self.dtype)
        mask_latents = c.mask_latents.to(self.device, self.dtype)
        batch, image_tokens = mask_latents.shape[0], mask_latents.shape[2]
        ids = token_ids(c.grid)
        joint_ids = torch.cat(
            [
                torch.zeros(prompt_embeds.shape[1], 3),
                ids,
                condition_ids(ids, c.position_delta, c.position_scale),
            ]
        )
        self.inputs = StepInputs(
            bank=self.mogle.bank(mask_latents),
            time_table=self.mogle.time_table(schedule.timesteps.to(self.device)),
            text=self.transformer.context_embedder(prompt_embeds),
            modulation=self._modulation(schedule, c.guidance_scale, pooled.expand(batch, -1)),
            rope=rope_table(joint_ids.to(self.device), self.config.axes_dims_rope),
            layout=Layout(
                text=prompt_embeds.shape[1],
                image=image_tokens,
                condition=image_tokens,
                plan=AttentionPlan.of(self.model, c.condition_scale),
                latent_lora=self.model.latent_lora,
                add_cond_attn=self.model.add_cond_attn,
            ),
        )
        return self.inputs

    def _weights(self, name: str) -> Tensor:
        return self.bundle.load([name], self.device, self.dtype)

    def _modulation(self, schedule: Schedule, guidance_scale: float, pooled: Tensor) -> ModulationTables:
        guidance = None
        if self.config.guidance_embeds:
            guidance = torch.full((pooled.shape[0],), guidance_scale * 1000.0, device=self.device)
        # One more timestep than the loop has: 0, the condition's, which is constant.
        timesteps = F.pad(schedule.model_timesteps, (0, 1)).to(self.device)
        temb = time_embedding(timesteps, guidance, pooled, self._weights)
        return modulation_tables(self.config, temb[:-1], temb[-1], self._weights, latent_lora=self.model.latent_lora)

    def condition(self, latents: Tensor, k: int) -> Tensor:
        """Condition tokens of step k: [B, N, 64] -> [B, N, 64]."""
        inputs = self._prepared()
        time = None if inputs.time_table is None else inputs.time_table[k]
        return self.mogle(latents, inputs.bank, time)

    def velocity(self, latents: Tensor, condition: Tensor, k: int) -> Tensor:
        """The transformer's output in step k, for given condition tokens: [B, N, 64]."""
        inputs = self._prepared()
        return self.transformer(latents, condition, inputs.text, inputs.modulation.at(k), inputs.rope, inputs.layout)

    @torch.inference_mode()
    def step(self, latents: Tensor, k: int) -> Tensor:
        """Velocity at step k of the prepared run: [B, N, 64] -> [B, N, 64]."""
        return self.velocity(latents, self.condition(latents, k), k)

    def _prepared(self) -> StepInputs:
        if self.inputs is None:
            raise RuntimeError("prepare() must be called before step()")
        return self.inputs
