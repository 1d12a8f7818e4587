"""Face-MoGLE computed the reference's way, long because one file is easier to compare with the reference.

The engine is timed against it. It consists of diffusers' and peft's own modules.

It is deliberately simple. It follows the public reference (arXiv 2509.00428, its code of September 2025) both in what it
computes and in how. Every step runs the twenty experts, embeds the text, builds the RoPE tables and projects all
modulations again. Text, image and condition go through each linear layer in separate calls. Where peft's LoRA must not act
on a stream, it is scaled to zero but still computed. Every attention switch, and condition_scale, is a dense (T+2N)^2 mask
that is built anew in each block. It makes one image at a time.

At FLUX.1-dev's size it was counted on the meta device: it launches, reads, writes and multiplies as much as the reference.

Shapes: H, W pixels; N = (H/16)(W/16) image tokens; T text tokens; D = heads * d the model's width; E = 20 experts.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self, TypedDict, Unpack

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, apply_rotary_emb
from diffusers.models.normalization import RMSNorm
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

EXPERTS = 20  # one for the whole mask, one for each of the 19 classes
PALETTE = bytes.fromhex(  # RGB of the CelebAMask-HQ classes, in label order
    "000000 cc0000 4c9900 cccc00 3333ff cc00cc 00ffff ffcccc 663300 ff0000"
    "66cc00 ffff00 000099 0000cc ff3399 00cccc 003300 ff9933 00cc00"
)
DOUBLE_LORA = ("norm1.linear", "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.2")
SINGLE_LORA = ("norm.linear", "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out")


@dataclass(frozen=True, kw_only=True)
class Switches:
    """The model's variants; the defaults are the released setting."""

    union_cond_attn: bool = True
    add_cond_attn: bool = False
    latent_lora: bool = False
    independent_condition: bool = False
    has_gating: bool = True
    has_expert: bool = True
    weight_is_scale: bool = False


class Placement(TypedDict, total=False):
    """How strongly and where the condition acts. What is left out has its default, which changes nothing."""

    condition_scale: float
    position_delta: tuple[int, int]
    position_scale: float


# ---------------------------------------------------------------------------------------------- experts and gate


class Expert(nn.Module):
    """A small MLP of 64 -> 32 -> 64 channels with a ReLU between."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)


class Gate(nn.Module):
    """Gives the experts' softmax weights for every token, from the mask, the noise and the timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.time_proj = Timesteps(64, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedding = TimestepEmbedding(64, 64)
        self.noise_proj = nn.Linear(64, 64)
        self.gate = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, EXPERTS))

    def forward(self, global_mask: Tensor, latents: Tensor, t: Tensor) -> Tensor:
        """(B, N, 64), (B, N, 64), (B,) with t in 0...1000 -> (B, N, E)."""
        time = self.timestep_embedding(self.time_proj(t).to(global_mask.dtype))  # (B, 64)
        time = time.unsqueeze(1).expand(-1, global_mask.shape[1], -1)
        return nn.functional.softmax(self.gate(global_mask + self.noise_proj(latents) + time), dim=2)


class MoGLE(nn.Module):
    """The mixture of one global and 19 local experts. The names in its state dict are those of the released file."""

    def __init__(self, switches: Switches) -> None:
        super().__init__()
        expert = Expert if switches.has_expert else nn.Identity
        self.global_expert = expert()
        self.local_experts = nn.ModuleList(expert() for _ in range(EXPERTS - 1))
        self.gating = Gate() if switches.has_gating else None
        self.weight_is_scale = switches.weight_is_scale

    def forward(self, mask_latents: Tensor, latents: Tensor, t: Tensor) -> Tensor:
        """(B, E, N, 64), (B, N, 64), (B,) with t in 0...1000 -> condition tokens (B, N, 64)."""
        weights: Tensor | None = None if self.gating is None else self.gating(mask_latents[:, 0], latents, t)
        local = [expert(mask_latents[:, 1 + i]) for i, expert in enumerate(self.local_experts)]
        outputs = torch.cat([self.global_expert(mask_latents[:, 0]).unsqueeze(1), torch.stack(local, dim=1)], dim=1)
        if weights is None:
            return outputs.sum(dim=1)
        if self.weight_is_scale:
            weights = weights.mean(dim=1, keepdim=True)  # (B, 1, E)
        return (outputs.permute(0, 2, 1, 3) * weights.unsqueeze(-1)).sum(dim=2)


# ----------------------------------------------------------------------------------------------- the transformer


@dataclass(frozen=True)
class Shared:
    """What all blocks of one step share."""

    temb: Tensor  # (1, D)
    cond_temb: Tensor  # (1, D)
    rotary: tuple[Tensor, Tensor]  # cos and sin (T+N, d) of text and image
    cond_rotary: tuple[Tensor, Tensor]  # (N, d)
    switches: Switches
    condition_scale: float


@contextmanager
def lora_on(active: bool, *layers: nn.Module) -> Iterator[None]:
    """Inside, the LoRA of `layers` acts only if `active`. Otherwise its scale is zero, but it costs the same."""
    tuners = [] if active else [layer for layer in layers if isinstance(layer, BaseTunerLayer)]
    before = [dict(tuner.scaling) for tuner in tuners]
    try:
        for tuner in tuners:
            tuner.scale_layer(0)
        yield
    finally:
        for tuner, scaling in zip(tuners, before, strict=True):
            tuner.scaling.update(scaling)


def attention_mask(q: Tensor, n: int, shared: Shared) -> Tensor | None:
    """The mask (S, S) for queries (B, heads, S, d), whose last `n` are the condition's; None if all tokens see all."""
    size, switches = (q.shape[2], q.shape[2]), shared.switches
    if shared.condition_scale != 1:  # comes before the switches, which the reference then ignores
        mask = torch.zeros(size, dtype=q.dtype, device=q.device)
        mask[-n:, :-n] = mask[:-n, -n:] = math.log(shared.condition_scale)
        return mask
    if switches.union_cond_attn and not switches.independent_condition:
        return None
    mask = torch.ones(size, dtype=torch.bool, device=q.device)
    mask[-n:, :-n] = False
    if not switches.union_cond_attn:
        mask[:-n, -n:] = False
    return mask


def joint_attention(attn: Any, hidden: Tensor, text: Tensor | None, cond: Tensor, shared: Shared) -> Tensor:
    """Attention among text, image and condition, without the output projection: (1, T+2N, D) in this order.

    In a double block, `hidden` (1, N, D) is the image, and `text` (1, T, D) is given separately. In a single block,
    `hidden` (1, T+N, D) is text and image. `cond` is (1, N, D).
    """

    def heads(x: Tensor) -> Tensor:  # (1, S, D) -> (1, heads, S, d)
        return x.view(x.shape[0], x.shape[1], attn.heads, -1).transpose(1, 2)

    with lora_on(shared.switches.latent_lora, attn.to_q, attn.to_k, attn.to_v):
        q, k, v = heads(attn.to_q(hidden)), heads(attn.to_k(hidden)), heads(attn.to_v(hidden))
    q, k = attn.norm_q(q), attn.norm_k(k)
    if text is not None:
        q = torch.cat([attn.norm_added_q(heads(attn.add_q_proj(text))), q], dim=2)
        k = torch.cat([attn.norm_added_k(heads(attn.add_k_proj(text))), k], dim=2)
        v = torch.cat([heads(attn.add_v_proj(text)), v], dim=2)
    q, k = apply_rotary_emb(q, shared.rotary), apply_rotary_emb(k, shared.rotary)

    cond_q, cond_k, cond_v = heads(attn.to_q(cond)), heads(attn.to_k(cond)), heads(attn.to_v(cond))
    cond_q = apply_rotary_emb(attn.norm_q(cond_q), shared.cond_rotary)
    cond_k = apply_rotary_emb(attn.norm_k(cond_k), shared.cond_rotary)

    q, k, v = torch.cat([q, cond_q], dim=2), torch.cat([k, cond_k], dim=2), torch.cat([v, cond_v], dim=2)
    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask(q, cond.shape[1], shared))
    return out.transpose(1, 2).reshape(out.shape[0], out.shape[2], -1)


def double_block(
    block: Any, hidden: Tensor, text: Tensor, cond: Tensor, shared: Shared
) -> tuple[Tensor, Tensor, Tensor]:
    """Image (1, N, D), text (1, T, D) and condition (1, N, D) -> the same three."""
    attn, latent_lora = block.attn, shared.switches.latent_lora
    with lora_on(latent_lora, block.norm1.linear):
        x, x_gate, x_mlp_shift, x_mlp_scale, x_mlp_gate = block.norm1(hidden, emb=shared.temb)
    t, t_gate, t_mlp_shift, t_mlp_scale, t_mlp_gate = block.norm1_context(text, emb=shared.temb)
    c, c_gate, c_mlp_shift, c_mlp_scale, c_mlp_gate = block.norm1(cond, emb=shared.cond_temb)

    out = joint_attention(attn, x, t, c, shared)
    t, x, c = out[:, : text.shape[1]], out[:, text.shape[1] : -cond.shape[1]], out[:, -cond.shape[1] :]
    with lora_on(latent_lora, attn.to_out[0]):
        x = attn.to_out[1](attn.to_out[0](x))
    t = attn.to_add_out(t)
    c = attn.to_out[1](attn.to_out[0](c))

    hidden = hidden + x_gate.unsqueeze(1) * x
    text = text + t_gate.unsqueeze(1) * t
    c = c_gate.unsqueeze(1) * c
    cond = cond + c
    if shared.switches.add_cond_attn:
        hidden += c

    x = block.norm2(hidden) * (1 + x_mlp_scale[:, None]) + x_mlp_shift[:, None]
    t = block.norm2_context(text) * (1 + t_mlp_scale[:, None]) + t_mlp_shift[:, None]
    c = block.norm2(cond) * (1 + c_mlp_scale[:, None]) + c_mlp_shift[:, None]
    with lora_on(latent_lora, block.ff.net[2]):
        hidden = hidden + x_mlp_gate.unsqueeze(1) * block.ff(x)
    text = text + t_mlp_gate.unsqueeze(1) * block.ff_context(t)
    cond = cond + c_mlp_gate.unsqueeze(1) * block.ff(c)
    return hidden, clip_half(text), cond


def single_block(block: Any, hidden: Tensor, cond: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
    """Text and image as one sequence (1, T+N, D), and condition (1, N, D) -> the same two."""
    latent_lora = shared.switches.latent_lora
    with lora_on(latent_lora, block.norm.linear, block.proj_mlp):
        x, x_gate = block.norm(hidden, emb=shared.temb)
        x_mlp = block.act_mlp(block.proj_mlp(x))
    c, c_gate = block.norm(cond, emb=shared.cond_temb)
    c_mlp = block.act_mlp(block.proj_mlp(c))

    out = joint_attention(block.attn, x, None, c, shared)
    x, c = out[:, : -cond.shape[1]], out[:, -cond.shape[1] :]
    with lora_on(latent_lora, block.proj_out):
        hidden = hidden + x_gate.unsqueeze(1) * block.proj_out(torch.cat([x, x_mlp], dim=2))
    cond = cond + c_gate.unsqueeze(1) * block.proj_out(torch.cat([c, c_mlp], dim=2))
    return clip_half(hidden), cond


def clip_half(x: Tensor) -> Tensor:
    """Clip float16 values as the reference does, because no other dtype can overflow here."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


# ------------------------------------------------------------------------------------------ tokens and schedule


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, (h/2)(w/2), 4C): each cell of 2x2 becomes a token, in which the channel varies slowest."""
    b, c, h, w = latents.shape
    cells = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(b, (h // 2) * (w // 2), 4 * c)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, N, 4C) -> (B, C, H/8, W/8)."""
    b, _, c = tokens.shape
    cells = tokens.view(b, height // 16, width // 16, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(b, c // 4, height // 8, width // 8)


@lru_cache(maxsize=16)  # the reference makes them once per image, so they are not part of a step
def token_ids(height: int, width: int, delta: tuple[int, int], scale: float, text: int, device: torch.device) -> Tensor:
    """Position ids (text + N, 3): zeros for the text, then for each token 0, its row and its column, moved and scaled."""
    ids = torch.zeros(height // 16, width // 16, 3)
    ids[..., 1] = torch.arange(height // 16)[:, None] + delta[0]
    ids[..., 2] = torch.arange(width // 16)[None, :] + delta[1]
    if scale != 1:
        ids[..., 1:] = ids[..., 1:] * scale + (scale - 1) / 2
    return torch.cat([torch.zeros(text, 3), ids.view(-1, 3)]).to(device)


def schedule(steps: int, n: int) -> tuple[Tensor, Tensor]:
    """Timesteps (steps,) in 0...1000 and sigmas (steps + 1,) for `n` image tokens, float32.

    This is not the scheduler of today's diffusers, which rounds to float32 before the shift. Release 0.31 rounds after it,
    and the gate's result depends on the last bit of a timestep.
    """
    slope = (1.15 - 0.5) / (4096 - 256)
    shift = math.exp(n * slope + (0.5 - slope * 256))
    sigmas = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    sigmas = (shift / (shift + (1 / sigmas - 1))).float()
    return sigmas * 1000, torch.cat([sigmas, torch.zeros(1)])


# ----------------------------------------------------------------------------------------------------- the model


class Baseline:
    """Face-MoGLE as the reference runs it, with a batch of 1 and without autograd."""

    def __init__(
        self, transformer: FluxTransformer2DModel, mogle: MoGLE, vae: AutoencoderKL | None, switches: Switches
    ) -> None:
        # diffusers 0.31 normalises q and k with this module, which takes several operations; later releases use PyTorch's.
        for attn in [module for name, module in transformer.named_modules() if name.endswith(".attn")]:
            for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
                if (norm := getattr(attn, name, None)) is not None:
                    plain = RMSNorm(norm.weight.shape[0], eps=norm.eps)
                    plain.weight = norm.weight
                    setattr(attn, name, plain)
        self.transformer: Any = transformer.eval()
        self.mogle = mogle.eval()
        self.vae: Any = None if vae is None else vae.eval()
        self.switches = switches

    @classmethod
    def from_files(
        cls,
        flux_dir: str | Path,
        lora_file: str | Path,
        mogle_file: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        **switches: bool,
    ) -> Self:
        """Load the three checkpoints in the form in which the reference reads them. `switches` are fields of `Switches`."""
        chosen = Switches(**switches)
        transformer = FluxTransformer2DModel.from_pretrained(flux_dir, subfolder="transformer", torch_dtype=dtype)
        lora = Path(lora_file)
        transformer.load_lora_adapter(lora.parent, weight_name=lora.name, prefix="transformer", adapter_name="default")
        vae = AutoencoderKL.from_pretrained(flux_dir, subfolder="vae", torch_dtype=dtype)
        mogle = MoGLE(chosen)
        mogle.load_state_dict(torch.load(mogle_file, map_location="cpu", weights_only=True))
        return cls(transformer, mogle.to(dtype), vae, chosen)

    @classmethod
    def random(
        cls,
        transformer_config: Mapping[str, Any],
        vae_config: Mapping[str, Any] | None = None,
        seed: int = 0,
        *,
        rank: int = 4,
        **switches: bool,
    ) -> Self:
        """Random float32 weights of any width, including the LoRA's B. The configs are those of diffusers' classes."""
        chosen = Switches(**switches)
        with torch.device("meta"):  # on the meta device, as diffusers' own initialisation takes very long
            transformer = FluxTransformer2DModel.from_config(transformer_config)
            vae = None if vae_config is None else AutoencoderKL.from_config(vae_config)
            mogle = MoGLE(chosen)
            doubles, singles = len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)
            layers = ["x_embedder"]
            layers += [f"transformer_blocks.{i}.{layer}" for i in range(doubles) for layer in DOUBLE_LORA]
            layers += [f"single_transformer_blocks.{i}.{layer}" for i in range(singles) for layer in SINGLE_LORA]
            transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))
        pool = torch.rand(4_000_037, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        for module in (transformer, mogle, vae):
            if module is not None:
                randomise(module.to_empty(device="cpu"), pool)
        return cls(transformer, mogle, vae, chosen)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move or cast all modules in place."""
        for module in (self.transformer, self.mogle, self.vae):
            if module is not None:
                module.to(device=device, dtype=dtype)
        return self

    @torch.no_grad()
    def encode_mask(self, labels: Tensor, *, at_once: int = 1) -> Tensor:
        """Labels (H, W) uint8 -> packed latents (1, E, N, 64) of the 20 pictures, `at_once` of them in one VAE call.

        The reference draws a sample of the posterior. This takes its mean, because a benchmark must be repeatable.
        """
        palette = torch.tensor(list(PALETTE), device=labels.device).view(EXPERTS - 1, 3)
        whole = palette[labels.long()].permute(2, 0, 1).float() / 255
        regions = [(labels == i).float().expand(3, -1, -1) for i in range(EXPERTS - 1)]
        pictures = (2 * torch.stack([whole, *regions]) - 1).to(self.vae.dtype)  # (E, 3, H, W)
        parts = [pictures[i : i + at_once] for i in range(0, EXPERTS, at_once)]
        latents = torch.cat([self.vae.encode(part).latent_dist.mode() for part in parts])
        return pack((latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor).unsqueeze(0)

    @torch.no_grad()
    def condition(self, mask_latents: Tensor, latents: Tensor, t: Tensor) -> Tensor:
        """The experts and the gate of a step: (1, E, N, 64), (1, N, 64), t (1,) in 0...1000 -> (1, N, 64)."""
        return self.mogle(mask_latents, latents, t)

    @torch.no_grad()
    def velocity(
        self,
        latents: Tensor,
        cond: Tensor,
        prompt_embeds: Tensor,
        pooled: Tensor,
        t: Tensor,
        guidance: float,
        height: int,
        width: int,
        condition_scale: float = 1.0,
        position_delta: tuple[int, int] = (0, 0),
        position_scale: float = 1.0,
    ) -> Tensor:
        """The transformer: latents and condition (1, N, 64), text (1, T, .) and (1, .), t (1,) in 0...1000 ->
        (1, N, 64)."""
        model = self.transformer
        with lora_on(self.switches.latent_lora, model.x_embedder):
            hidden = model.x_embedder(latents)
        cond = model.x_embedder(cond)

        # The pipeline divides and the model multiplies again. This changes the last bit, and with it the result.
        time = (t.to(hidden.dtype) / 1000) * 1000
        guide = (torch.tensor([guidance], device=time.device).to(time) * 1000,) if model.config.guidance_embeds else ()
        temb = model.time_text_embed(time, *guide, pooled)
        cond_temb = model.time_text_embed(torch.zeros_like(time), *guide, pooled)
        text = model.context_embedder(prompt_embeds)

        rotary = model.pos_embed(token_ids(height, width, (0, 0), 1.0, text.shape[1], text.device))
        cond_ids = token_ids(height, width, position_delta, position_scale, 0, text.device)
        shared = Shared(temb, cond_temb, rotary, model.pos_embed(cond_ids), self.switches, condition_scale)
        for block in model.transformer_blocks:
            hidden, text, cond = double_block(block, hidden, text, cond, shared)
        hidden = torch.cat([text, hidden], dim=1)
        for block in model.single_transformer_blocks:
            hidden, cond = single_block(block, hidden, cond, shared)
        return model.proj_out(model.norm_out(hidden[:, text.shape[1] :], temb))

    def step(
        self,
        k: int,
        timesteps: Tensor,
        sigmas: Tensor,
        mask_latents: Tensor,
        latents: Tensor,
        prompt_embeds: Tensor,
        pooled: Tensor,
        guidance: float,
        height: int,
        width: int,
        trace: dict[str, Tensor] | None = None,
        **placement: Unpack[Placement],
    ) -> Tensor:
        """Step `k` of a `schedule`, from latents to latents (1, N, 64).

        If `trace` is given, inputs and results of the step are put into it: `t.K`, `latents.K`, `cond.K`, `noise_pred.K`.
        """
        t = timesteps[k].expand(1)
        cond = self.condition(mask_latents, latents, t)
        pred = self.velocity(latents, cond, prompt_embeds, pooled, t, guidance, height, width, **placement)
        if trace is not None:
            trace |= {f"t.{k}": t, f"latents.{k}": latents, f"cond.{k}": cond, f"noise_pred.{k}": pred}
        return (latents.float() + (sigmas[k + 1] - sigmas[k]) * pred).to(pred.dtype)

    @torch.no_grad()
    def decode(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Packed latents (1, N, 64) -> picture (1, 3, H, W) in [0, 1]."""
        z = unpack(latents, height, width) / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return (self.vae.decode(z, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)

    def __call__(
        self,
        mask: Tensor,
        prompt_embeds: Tensor,
        pooled: Tensor,
        noise: Tensor,
        steps: int = 28,
        guidance: float = 3.5,
        *,
        height: int,
        width: int,
        **placement: Unpack[Placement],
    ) -> dict[str, Tensor]:
        """A whole image from `mask`, which is labels (H, W) uint8 or mask latents (1, E, N, 64), and noise (1, N, 64).

        Returns the trace of every step, `mask_latents`, `final_latents` and, if there is a VAE, `image`.
        """
        mask_latents = self.encode_mask(mask) if mask.dim() == 2 else mask
        trace = {"mask_latents": mask_latents}
        timesteps, sigmas = (x.to(noise.device) for x in schedule(steps, noise.shape[1]))
        latents, text = noise, (prompt_embeds, pooled)
        for k in range(steps):
            now = (k, timesteps, sigmas, mask_latents, latents)
            latents = self.step(*now, *text, guidance, height, width, trace, **placement)
        trace["final_latents"] = latents
        if self.vae is not None:
            trace["image"] = self.decode(latents, height, width)
        return trace


@torch.no_grad()
def randomise(module: nn.Module, pool: Tensor) -> None:
    """Fill the weights with the numbers of `pool`, which are in [-1, 1), again and again.

    That takes a third of the time of drawing all numbers. The pool has an odd length, so the rows of a weight don't repeat.
    Weights have a gain of about one and scales are near one, so outputs stay finite at any depth. The LoRA is large enough
    to matter.
    """
    start = 0  # goes on from weight to weight, because q, k and v must differ
    for name, weight in module.named_parameters():
        flat, done = weight.view(-1), 0
        while done < len(flat):
            part = pool[start : start + len(flat) - done]
            flat[done : done + len(part)] = part
            done, start = done + len(part), (start + len(part)) % len(pool)
        if weight.dim() > 1:
            weight.mul_(1 if ".lora_B." in name else 1 / math.sqrt(weight[0].numel()))
        else:
            weight.mul_(0.02).add_(1 if name.endswith("weight") else 0)
