"""FLUX with a condition branch: its weights, block by block, and the layout of its rows (REFERENCE: the transformer).

Rows lie in the order [text, image, condition] of one sequence. In double blocks text has weights of its own, image and
condition share theirs; in single blocks all three do. The condition's rows are always the last, so the branch LoRA
acts on a tail of the rows, and one product with the base weights serves every stream. What is done with these
weights in a step, see `mogle_rt.step`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor, nn

from mogle_rt.attention import JOINT, AttentionPlan
from mogle_rt.config import MLP_RATIO, TransformerConfig
from mogle_rt.lora import Linear, LoraLinear, Ride, empty_parameter

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
    def image_rows(self) -> slice:
        """Image rows of the joint sequence."""
        return slice(self.text, self.condition_from)

    @property
    def double_bounds(self) -> tuple[int, ...]:
        """Ends of the row groups that share a modulation in double blocks: text, image, condition."""
        return (self.text, self.condition_from) + ((self.total,) if self.condition else ())

    @property
    def single_bounds(self) -> tuple[int, ...]:
        """The same in single blocks: text and image, condition."""
        return (self.condition_from,) + ((self.total,) if self.condition else ())

    @property
    def double_lora_from(self) -> int:
        """First row with LoRA in double blocks."""
        return self.text if self.latent_lora else self.condition_from

    @property
    def single_lora_from(self) -> int:
        """First row with LoRA in single blocks."""
        return 0 if self.latent_lora else self.condition_from


def rope_table(ids: Tensor, axes_dims: tuple[int, ...]) -> Tensor:
    """Rotary embedding of token ids. ids: [L, 3] -> complex64 [L, d / 2], angles computed in float64."""
    precise = torch.float64 if ids.device.type != "mps" else torch.float32
    tables = [
        get_1d_rotary_pos_embed(dim, ids[:, axis].float(), theta=ROPE_THETA, use_real=False, freqs_dtype=precise)
        for axis, dim in enumerate(axes_dims)
    ]
    return torch.cat(tables, dim=-1).to(torch.complex64)


class DoubleBlock(nn.Module):
    """Text apart, image and condition together; joint attention; an MLP each."""

    def __init__(self, config: TransformerConfig, ranks: dict[str, int], riding: bool) -> None:
        super().__init__()
        D, M = config.width, MLP_RATIO * config.width
        before, after = (Ride.INPUT, Ride.OUTPUT) if riding else (Ride.NONE, Ride.NONE)
        self.norm_qk = empty_parameter(2, 2, config.attention_head_dim)  # text, and the rest; of q, and of k
        self.qkv = LoraLinear(D, 3 * D, ranks["qkv"], before, Ride.INPUT)
        self.out = LoraLinear(D, D, ranks["out"], after)
        self.ff_in = Linear(D, M)
        self.ff_out = LoraLinear(M, D, ranks["ff_out"], after)
        self.context_qkv = Linear(D, 3 * D)
        self.context_out = Linear(D, D, ranks["out"] if riding else 0)
        self.context_ff_in = Linear(D, M)
        self.context_ff_out = Linear(M, D, ranks["ff_out"] if riding else 0)


class SingleBlock(nn.Module):
    """All streams in one sequence; attention and MLP side by side.

    Attributes:
        q_columns, kv_columns, qkv_columns, mlp_columns: of ``qkv_mlp``'s output.
        last: whether it is the last block, which needs q of fewer rows than k and v.
    """

    def __init__(self, config: TransformerConfig, ranks: dict[str, int], riding: bool, last: bool) -> None:
        super().__init__()
        D, M = config.width, MLP_RATIO * config.width
        before, after = (Ride.INPUT, Ride.OUTPUT) if riding else (Ride.NONE, Ride.NONE)
        self.q_columns, self.kv_columns, self.qkv_columns = slice(0, D), slice(D, 3 * D), slice(0, 3 * D)
        self.mlp_columns, self.last = slice(3 * D, 3 * D + M), last
        parts = (self.q_columns, self.kv_columns) if last else (self.qkv_columns,)
        self.norm_qk = empty_parameter(1, 2, config.attention_head_dim)
        self.qkv_mlp = LoraLinear(D, 3 * D + M, ranks["qkv_mlp"], before, Ride.INPUT, (*parts, self.mlp_columns))
        self.out = LoraLinear(D + M, D, ranks["out"], after)


class Transformer(nn.Module):
    """All weights of the stack but the modulation's, see `mogle_rt.modulation`.

    Args:
        config: FLUX's shape.
        ranks: LoRA rank of each stored layer (see `mogle_rt.schema.lora_modules`).
        riding: the LoRA of the blocks rides along in further columns, see `mogle_rt.lora`; ranks are then rounded up
            to a multiple of 8, which keeps rows aligned.
    """

    def __init__(self, config: TransformerConfig, ranks: dict[str, int], *, riding: bool = False) -> None:
        super().__init__()
        self.config, self.riding = config, riding
        D, C = config.width, config.in_channels

        def rank(*layers: str) -> int:
            total = sum(ranks[layer] for layer in layers)
            return -(-total // 8) * 8 if riding else total

        def double_ranks(i: int) -> dict[str, int]:
            p = f"transformer_blocks.{i}"
            return {
                "qkv": rank(*(f"{p}.attn.to_{x}" for x in "qkv")),
                "out": rank(f"{p}.attn.to_out.0"),
                "ff_out": rank(f"{p}.ff.net.2"),
            }

        def single_ranks(i: int) -> dict[str, int]:
            p = f"single_transformer_blocks.{i}"
            return {
                "qkv_mlp": rank(*(f"{p}.attn.to_{x}" for x in "qkv"), f"{p}.proj_mlp"),
                "out": rank(f"{p}.proj_out"),
            }

        self.x_embedder = LoraLinear(C, D, ranks["x_embedder"])
        self.context_embedder = nn.Linear(config.joint_attention_dim, D, device="meta")
        self.blocks = nn.ModuleList(DoubleBlock(config, double_ranks(i), riding) for i in range(config.num_layers))
        count = config.num_single_layers
        self.single_blocks = nn.ModuleList(
            SingleBlock(config, single_ranks(i), riding, last=i == count - 1) for i in range(count)
        )
        self.proj_out = Linear(D, C)
