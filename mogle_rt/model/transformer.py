"""FLUX with a condition branch: its weights, block by block, and the layout of its rows (REFERENCE: the transformer).

Rows lie in the order [text, image, condition] of one sequence. In double blocks text has weights of its own, image and
condition share theirs; in single blocks all three do. The condition's rows are always the last, so the branch LoRA
acts on a tail of the rows, and one product with the base weights serves every stream. What is done with these
weights in a step, see `mogle_rt.loop.step`.
"""

from __future__ import annotations

from torch import nn

from mogle_rt.config import MLP_RATIO, TransformerConfig
from mogle_rt.kernels.inputs import padded_rank
from mogle_rt.linear.layers import Linear, LoraLinear, Ride
from mogle_rt.linear.views import empty_parameter


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
    """All weights of the stack but the modulation's, see `mogle_rt.model.modulation`.

    Args:
        config: FLUX's shape.
        ranks: LoRA rank of each stored layer, see `mogle_rt.bundle.schema.lora_modules`.
        riding: the LoRA of the blocks rides along in further columns, see `mogle_rt.linear.layers`; ranks are then filled
            up as kernels need them, see `mogle_rt.kernels.inputs.RANK_STEP`.
    """

    def __init__(self, config: TransformerConfig, ranks: dict[str, int], *, riding: bool = False) -> None:
        super().__init__()
        self.config, self.riding = config, riding
        D, C = config.width, config.in_channels

        def rank(*layers: str) -> int:
            total = sum(ranks[layer] for layer in layers)
            return padded_rank(total) if riding else total

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
