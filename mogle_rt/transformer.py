"""FLUX with a condition branch, as one pass over one sequence (REFERENCE: the transformer).

Rows lie in the order [text, image, condition]. Double blocks hold text apart (it has its own weights) and image and
condition together; single blocks hold all three together. The condition's rows are always the last, so the branch
LoRA acts on a tail of the rows, and one product with the base weights serves every stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor, nn

from mogle_rt.attention import JOINT, AttentionPlan, joint_attention
from mogle_rt.config import MLP_RATIO, TransformerConfig
from mogle_rt.lora import LoraLinear, add_lora_, empty_parameter
from mogle_rt.modulation import SingleModulation, StepModulation
from mogle_rt.ops import LAYER_NORM_EPS, addcmul_, apply_rope, gelu_tanh, norm_modulate, qk_norm

ROPE_THETA = 10_000


@dataclass(frozen=True)
class Layout:
    """Row counts of a run and what follows from the switches.

    Attributes:
        text, image, condition: rows T, N and N (or 0 without a condition).
        plan: who attends to whom.
        latent_lora: the LoRA acts on image rows too, and on text rows where they are one sequence.
        add_cond_attn: the condition's gated attention output is added to the image rows.
    """

    text: int
    image: int
    condition: int
    plan: AttentionPlan = JOINT
    latent_lora: bool = False
    add_cond_attn: bool = False

    @property
    def condition_from(self) -> int:
        """First condition row of the joint sequence."""
        return self.text + self.image

    @property
    def total(self) -> int:
        """Rows of the joint sequence."""
        return self.text + self.image + self.condition

    @property
    def single_groups(self) -> tuple[slice, slice]:
        """Rows that share a modulation in single blocks: text and image, condition."""
        return slice(0, self.condition_from), slice(self.condition_from, self.total)

    @property
    def double_lora_from(self) -> int:
        """First row with LoRA among [image, condition]."""
        return 0 if self.latent_lora else self.image

    @property
    def single_lora_from(self) -> int:
        """First row with LoRA among [text, image, condition]."""
        return 0 if self.latent_lora else self.condition_from


def rope_table(ids: Tensor, axes_dims: tuple[int, ...]) -> Tensor:
    """Rotary embedding of token ids. ids: [L, 3] -> complex64 [L, 1, 1, d / 2], angles computed in float64."""
    precise = torch.float64 if ids.device.type != "mps" else torch.float32
    tables = [
        get_1d_rotary_pos_embed(dim, ids[:, axis].float(), theta=ROPE_THETA, use_real=False, freqs_dtype=precise)
        for axis, dim in enumerate(axes_dims)
    ]
    return torch.cat(tables, dim=-1).to(torch.complex64)[:, None, None]


def _groups(x: Tensor, groups: int) -> Tensor:
    """[B, G * N, D] -> [B, G, N, D]."""
    B, rows, D = x.shape
    return x.view(B, groups, rows // groups, D)


def _heads(x: Tensor, parts: int, heads: int) -> Tensor:
    """[B, L, P * H * d] -> [B, L, P, H, d]."""
    B, L, width = x.shape
    return x.view(B, L, parts, heads, width // (parts * heads))


class DoubleBlock(nn.Module):
    """Text apart, image and condition together; joint attention; an MLP each."""

    def __init__(self, config: TransformerConfig, ranks: dict[str, int]) -> None:
        super().__init__()
        D, d = config.width, config.attention_head_dim
        self.heads = config.num_attention_heads
        self.norm_qk = empty_parameter(2, 1, d)
        self.context_norm_qk = empty_parameter(2, 1, d)
        self.qkv = LoraLinear(D, 3 * D, ranks["qkv"])
        self.out = LoraLinear(D, D, ranks["out"])
        self.ff_in = nn.Linear(D, MLP_RATIO * D)
        self.ff_out = LoraLinear(MLP_RATIO * D, D, ranks["ff_out"])
        self.context_qkv = nn.Linear(D, 3 * D)
        self.context_out = nn.Linear(D, D)
        self.context_ff_in = nn.Linear(D, MLP_RATIO * D)
        self.context_ff_out = nn.Linear(MLP_RATIO * D, D)

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        mod: Sequence[Tensor],
        context_mod: Sequence[Tensor],
        rope: Tensor,
        layout: Layout,
    ) -> tuple[Tensor, Tensor]:
        """One block.

        Args:
            x: [B, G * N, D], image rows, then condition rows (G = 2), or image rows alone (G = 1).
            text: [B, T, D].
            mod: six of [B, G, 1, D]; context_mod: six of [B, 1, D]; see `StepModulation`.
            rope: complex [L, 1, 1, d / 2] of the joint sequence.

        Returns:
            x and text after the block.
        """
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = mod
        t_shift, t_scale, t_gate, t_mlp_shift, t_mlp_scale, t_mlp_gate = context_mod
        G, lora_from = shift.shape[1], layout.double_lora_from

        normed = norm_modulate(_groups(x, G), scale, shift).flatten(1, 2)
        qkv = _heads(self.qkv(normed, lora_from), 3, self.heads)
        text_qkv = _heads(self.context_qkv(norm_modulate(text, t_scale, t_shift)), 3, self.heads)
        B, d, T = x.shape[0], qkv.shape[-1], layout.text
        qk = x.new_empty(B, layout.total, 2, self.heads, d)
        qk_norm(text_qkv[:, :, :2], self.context_norm_qk, out=qk[:, :T])
        qk_norm(qkv[:, :, :2], self.norm_qk, out=qk[:, T:])
        q, k = apply_rope(qk, rope).unbind(2)
        v = torch.cat([text_qkv[:, :, 2], qkv[:, :, 2]], dim=1)
        attention = joint_attention(q, k, v, layout.condition_from, layout.plan)

        y = _groups(self.out(attention[:, layout.text :], lora_from), G)
        x = torch.addcmul(_groups(x, G), gate, y)
        if layout.add_cond_attn and G == 2:
            x[:, 0].addcmul_(gate[:, 1], y[:, 1])
        normed = norm_modulate(x, mlp_scale, mlp_shift).flatten(1, 2)
        y = self.ff_out(gelu_tanh(self.ff_in(normed)), lora_from)
        x = clip(torch.addcmul(x, mlp_gate, _groups(y, G)).flatten(1, 2))

        text = torch.addcmul(text, t_gate, self.context_out(attention[:, : layout.text]))
        normed = norm_modulate(text, t_mlp_scale, t_mlp_shift)
        y = self.context_ff_out(gelu_tanh(self.context_ff_in(normed)))
        return x, clip(torch.addcmul(text, t_mlp_gate, y))


class SingleBlock(nn.Module):
    """All streams in one sequence; attention and MLP side by side.

    The last block is asked for image rows only: it needs every row's k and v, but q, MLP and output of
    image rows alone.
    """

    def __init__(self, config: TransformerConfig, ranks: dict[str, int]) -> None:
        super().__init__()
        D = config.width
        self.heads = config.num_attention_heads
        self.norm_qk = empty_parameter(2, 1, config.attention_head_dim)
        self.qkv_mlp = LoraLinear(D, (3 + MLP_RATIO) * D, ranks["qkv_mlp"])
        self.out = LoraLinear((1 + MLP_RATIO) * D, D, ranks["out"])

    def forward(self, x: Tensor, mod: SingleModulation, rope: Tensor, layout: Layout) -> Tensor:
        """One block. x: [B, L, D], mod: see `SingleModulation`, rope: complex [L, 1, 1, d / 2] -> [B, L, D]."""
        normed = self._norm(x, mod, layout)
        fused = self.qkv_mlp(normed, layout.single_lora_from)
        D = x.shape[-1]
        qkv = _heads(fused[..., : 3 * D], 3, self.heads)
        q, k = apply_rope(qk_norm(qkv[:, :, :2], self.norm_qk), rope).unbind(2)
        attention = joint_attention(q, k, qkv[:, :, 2], layout.condition_from, layout.plan)
        y = self._project_out(attention, fused[..., 3 * D :], layout.single_lora_from)
        return clip(self._residual(x, y, mod, layout))

    def image_rows(self, x: Tensor, mod: SingleModulation, rope: Tensor, layout: Layout) -> Tensor:
        """The same for image rows alone: [B, L, D] -> [B, N, D]."""
        D, lora_from = x.shape[-1], layout.single_lora_from
        image = slice(layout.text, layout.condition_from)
        weight, bias = self.qkv_mlp.weight, self.qkv_mlp.bias
        down, up = self.qkv_mlp.lora_down, self.qkv_mlp.lora_up
        normed = self._norm(x, mod, layout)
        normed_image = normed[:, image].contiguous()

        kv = F.linear(normed, weight[D : 3 * D], bias[D : 3 * D])
        add_lora_(kv, normed, down, up[:, D : 3 * D], lora_from)
        q = F.linear(normed_image, weight[:D], bias[:D])
        mlp = F.linear(normed_image, weight[3 * D :], bias[3 * D :])
        image_lora_from = 0 if layout.latent_lora else layout.image
        add_lora_(q, normed_image, down, up[:, :D], image_lora_from)
        add_lora_(mlp, normed_image, down, up[:, 3 * D :], image_lora_from)

        k, v = _heads(kv, 2, self.heads).split(1, dim=2)
        q = apply_rope(qk_norm(_heads(q, 1, self.heads), self.norm_qk[:1]), rope[image])[:, :, 0]
        k = apply_rope(qk_norm(k, self.norm_qk[1:]), rope)[:, :, 0]
        # Image queries belong to "the rest" whatever is switched, so the condition's own queries are simply absent.
        attention = joint_attention(q, k, v[:, :, 0], layout.condition_from, layout.plan)
        y = self._project_out(attention, mlp, image_lora_from)
        return clip(torch.addcmul(x[:, image], mod[0][2], y))

    def _norm(self, x: Tensor, mod: SingleModulation, layout: Layout) -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)
        for (shift, scale, _), rows in zip(mod, layout.single_groups, strict=False):
            addcmul_(normed[:, rows], shift, scale)
        return normed

    def _project_out(self, attention: Tensor, mlp: Tensor, lora_from: int) -> Tensor:
        """out([attention, gelu(mlp)]); the activation is written straight beside the attention."""
        D = attention.shape[-1]
        joined = attention.new_empty(*attention.shape[:2], D + mlp.shape[-1])
        joined[..., :D] = attention
        gelu_tanh(mlp, out=joined[..., D:])
        return self.out(joined, lora_from)

    def _residual(self, x: Tensor, y: Tensor, mod: SingleModulation, layout: Layout) -> Tensor:
        """x + gate * y, into y's memory."""
        for (_, _, gate), rows in zip(mod, layout.single_groups, strict=False):
            addcmul_(y[:, rows], x[:, rows], gate)
        return y


def clip(x: Tensor) -> Tensor:
    """fp16 rows are kept finite, as in the reference."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


class Transformer(nn.Module):
    """The whole stack, on step inputs that were prepared once an image.

    Args:
        config: FLUX's shape.
        ranks: LoRA rank of each stored layer (see `mogle_rt.schema.lora_modules`).
    """

    def __init__(self, config: TransformerConfig, ranks: dict[str, int]) -> None:
        super().__init__()
        self.config = config
        D, C = config.width, config.in_channels

        def double_ranks(i: int) -> dict[str, int]:
            p = f"transformer_blocks.{i}"
            return {
                "qkv": sum(ranks[f"{p}.attn.to_{x}"] for x in "qkv"),
                "out": ranks[f"{p}.attn.to_out.0"],
                "ff_out": ranks[f"{p}.ff.net.2"],
            }

        def single_ranks(i: int) -> dict[str, int]:
            p = f"single_transformer_blocks.{i}"
            return {
                "qkv_mlp": sum(ranks[f"{p}.attn.to_{x}"] for x in "qkv") + ranks[f"{p}.proj_mlp"],
                "out": ranks[f"{p}.proj_out"],
            }

        self.x_embedder = LoraLinear(C, D, ranks["x_embedder"])
        self.context_embedder = nn.Linear(config.joint_attention_dim, D)
        self.blocks = nn.ModuleList(DoubleBlock(config, double_ranks(i)) for i in range(config.num_layers))
        self.single_blocks = nn.ModuleList(
            SingleBlock(config, single_ranks(i)) for i in range(config.num_single_layers)
        )
        self.proj_out = nn.Linear(D, C)

    def forward(
        self,
        latents: Tensor,
        condition: Tensor | None,
        text: Tensor,
        modulation: StepModulation,
        rope: Tensor,
        layout: Layout,
    ) -> Tensor:
        """Velocity of one step.

        Args:
            latents: [B, N, 64], packed noisy latents.
            condition: [B, N, 64], condition tokens of this step, or None.
            text: [B, T, D], prompt embeddings after ``context_embedder``.
            modulation: this step's, see `StepModulation`.
            rope: complex [L, 1, 1, d / 2], see `rope_table`.
            layout: rows and switches.

        Returns:
            [B, N, 64].
        """
        tokens = latents if condition is None else torch.cat([latents, condition], dim=1)
        x = self.x_embedder(tokens, layout.double_lora_from)
        for i, block in enumerate(self.blocks):
            x, text = block(x, text, modulation.double[i], modulation.context[i], rope, layout)
        if self.single_blocks:
            x = torch.cat([text, x], dim=1)
            for i, block in enumerate(self.single_blocks[:-1]):
                x = block(x, modulation.single[i], rope, layout)
            last = self.single_blocks[-1]
            assert isinstance(last, SingleBlock)
            image = last.image_rows(x, modulation.single[-1], rope, layout)
        else:
            image = x[:, : layout.image]
        return self.proj_out(norm_modulate(image, *modulation.out))
