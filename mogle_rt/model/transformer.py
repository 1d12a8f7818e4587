"""FLUX with a condition branch: its weights, block by block, and what each layer is made of (REFERENCE: the transformer).

Rows lie in the order [text, image, condition] of one sequence. In double blocks text has weights of its own, image and
condition share theirs; in single blocks all three do. The condition's rows are always the last, so the branch LoRA
acts on a tail of the rows, and one product with the base weights serves every stream. What is done with these
weights in a step, see `mogle_rt.loop.step`; how they are read, `mogle_rt.model.loading`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from mogle_rt.config import MLP_RATIO, TransformerConfig
from mogle_rt.linear.contract import Place
from mogle_rt.linear.layer import Linear


@dataclass(frozen=True)
class Columns:
    """Which columns of a single block's ``qkv_mlp`` are what."""

    q: slice
    kv: slice
    qkv: slice
    mlp: slice

    @classmethod
    def of(cls, config: TransformerConfig) -> Columns:
        """Those of a model."""
        D, M = config.width, MLP_RATIO * config.width
        return cls(q=slice(0, D), kv=slice(D, 3 * D), qkv=slice(0, 3 * D), mlp=slice(3 * D, 3 * D + M))


@dataclass
class DoubleBlock:
    """Text apart, image and condition together; joint attention; an MLP each.

    Attributes:
        norm_qk: [2, 2, d], RMSNorm weights of text and of the rest; of q and of k.
    """

    norm_qk: Tensor
    qkv: Linear
    out: Linear
    ff_in: Linear
    ff_out: Linear
    context_qkv: Linear
    context_out: Linear
    context_ff_in: Linear
    context_ff_out: Linear


@dataclass
class SingleBlock:
    """All streams in one sequence; attention and MLP side by side.

    Attributes:
        norm_qk: [1, 2, d], RMSNorm weights of q and of k.
        columns: of ``qkv_mlp``'s output.
        last: whether it is the last block, which needs q of fewer rows than k and v.
    """

    norm_qk: Tensor
    qkv_mlp: Linear
    out: Linear
    columns: Columns
    last: bool


@dataclass
class Transformer:
    """All weights of the stack that a step needs. (The modulation's it does not, see `mogle_rt.model.modulation`.)"""

    config: TransformerConfig
    x_embedder: Linear
    blocks: list[DoubleBlock]
    single_blocks: list[SingleBlock]
    proj_out: Linear

    def layers(self) -> Iterator[tuple[str, Linear]]:
        """Every layer with its name, such as "blocks.0.qkv"."""
        yield "x_embedder", self.x_embedder
        for stack, blocks in (("blocks", self.blocks), ("single_blocks", self.single_blocks)):
            for i, block in enumerate(blocks):
                for name, layer in vars(block).items():
                    if isinstance(layer, Linear):
                        yield f"{stack}.{i}.{name}", layer
        yield "proj_out", self.proj_out

    @property
    def most_before(self) -> int:
        """The most further columns of any layer's input."""
        return max((layer.before.rank for _, layer in self.layers() if layer.before is not None), default=0)

    @property
    def most_after(self) -> int:
        """The most further columns of any layer's output."""
        return max((layer.after.rank for _, layer in self.layers() if layer.after is not None), default=0)

    def bytes_by_format(self) -> dict[str, int]:
        """Bytes that layers hold, by the format of their weights."""
        held: dict[str, int] = {}
        for _, layer in self.layers():
            held[layer.weight.name] = held.get(layer.weight.name, 0) + layer.nbytes
        return held


# Where the layers of a block stand; others stand alone.
PLACES = {
    "qkv": Place.AFTER_NORM,
    "qkv_mlp": Place.AFTER_NORM,
    "out": Place.BEFORE_RESIDUAL,
    "ff_out": Place.BEFORE_RESIDUAL,
}
# Layers whose output lies in one buffer with another layer's, and has as many columns.
AS_WIDE_AS = {"context_out": "out", "context_ff_out": "ff_out"}


def parts_of(layer: str, config: TransformerConfig, *, last: bool) -> tuple[slice, ...]:
    """The columns of a layer that products ask for, see `WeightFormat.load`. last: of the last single block."""
    if layer != "qkv_mlp":
        return (slice(None),)
    columns = Columns.of(config)
    return (columns.q, columns.kv, columns.mlp) if last else (columns.qkv, columns.mlp)
