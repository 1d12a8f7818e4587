"""The weights of FLUX with a condition branch, block by block (REFERENCE: the transformer).

The rows of one sequence are in the order [text, image, condition]. In double blocks, text has its own weights, and
image and condition share theirs; in single blocks all three share them. The condition's rows are always the last, so
the branch's LoRA acts on the last rows, and one product with the base weights serves every stream.
`mogle_rt.model.loading` reads these weights, and `mogle_rt.loop.step` uses them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from mogle_rt.config import MLP_RATIO, TransformerConfig
from mogle_rt.linear.contract import Place
from mogle_rt.linear.layer import Linear


@dataclass(frozen=True)
class Columns:
    """The columns of the parts of a single block's ``qkv_mlp`` output."""

    q: slice
    kv: slice
    qkv: slice
    mlp: slice

    @classmethod
    def of(cls, config: TransformerConfig) -> Columns:
        """The columns for a model of this config."""
        D, M = config.width, MLP_RATIO * config.width
        return cls(q=slice(0, D), kv=slice(D, 3 * D), qkv=slice(0, 3 * D), mlp=slice(3 * D, 3 * D + M))


@dataclass
class DoubleBlock:
    """A block with joint attention, and separate layers for text (``context_*``) and for image and condition.

    Attributes:
        norm_qk: [2, 2, d], RMSNorm weights: first index text or the rest, second index q or k.
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
    """A block in which all streams share the layers, and attention and MLP are computed side by side.

    Attributes:
        norm_qk: [1, 2, d], RMSNorm weights of q and of k.
        columns: the columns of the parts of ``qkv_mlp``'s output.
        last: whether it is the last block, which needs q for fewer rows than k and v.
    """

    norm_qk: Tensor
    qkv_mlp: Linear
    out: Linear
    columns: Columns
    last: bool


class WeightStream(Protocol):
    """Brings the weights of streamed sublayers into memory, in the order in which a step uses them.

    Attributes:
        numbers: the streamed sublayers, numbered from 0, by their index among all sublayers (see `sublayers`).
        nbytes: bytes of the memory that they use in turn.
    """

    @property
    def numbers(self) -> Mapping[int, int]: ...

    @property
    def nbytes(self) -> int: ...

    def acquire(self, number: int) -> None:
        """Wait until the weights of a streamed sublayer are in memory. (On a GPU, its stream waits, not the caller.)"""

    def release(self, number: int) -> None:
        """Note that the sublayer was computed (on a GPU: queued), so that others may use its memory."""

    def restart(self) -> None:
        """Start again at the first sublayer, because an error or an interrupt has ended the step."""


@dataclass
class Transformer:
    """All of the transformer's weights that a step needs. (`mogle_rt.model.modulation` reads those of modulation.)"""

    config: TransformerConfig
    x_embedder: Linear
    blocks: list[DoubleBlock]
    single_blocks: list[SingleBlock]
    proj_out: Linear
    stream: WeightStream | None = None

    def layers(self) -> Iterator[tuple[str, Linear]]:
        """All layers, each with its name, such as "blocks.0.qkv"."""
        yield "x_embedder", self.x_embedder
        for stack, blocks in (("blocks", self.blocks), ("single_blocks", self.single_blocks)):
            for i, block in enumerate(blocks):
                for name, layer in vars(block).items():
                    if isinstance(layer, Linear):
                        yield f"{stack}.{i}.{name}", layer
        yield "proj_out", self.proj_out

    @property
    def streamed(self) -> Mapping[int, int]:
        """The streamed sublayers, see `WeightStream.numbers`."""
        return {} if self.stream is None else self.stream.numbers

    @property
    def most_before(self) -> int:
        """The largest number of extra input columns of any layer."""
        return max((layer.before.rank for _, layer in self.layers() if layer.before is not None), default=0)

    @property
    def most_after(self) -> int:
        """The largest number of extra output columns of any layer."""
        return max((layer.after.rank for _, layer in self.layers() if layer.after is not None), default=0)

    def bytes_by_format(self) -> dict[str, int]:
        """The bytes that layers hold, by format (and its way of multiplying). Streamed layers are left out."""
        held: dict[str, int] = {}
        streamed = {name for place in self.streamed for name in sublayers(self.config)[place]}
        for name, layer in self.layers():
            if name in streamed:
                continue
            weight = layer.weight
            kind = f"{weight.name} ({weight.path})" if weight.path else weight.name
            held[kind] = held.get(kind, 0) + layer.nbytes
        return held


# The places of layers in a block. All other layers are `Place.ALONE`.
PLACES = {
    "qkv": Place.AFTER_NORM,
    "qkv_mlp": Place.AFTER_NORM,
    "out": Place.BEFORE_RESIDUAL,
    "ff_out": Place.BEFORE_RESIDUAL,
}
# Layers that share an output buffer with another layer, and so have the same number of output columns.
AS_WIDE_AS = {"context_out": "out", "context_ff_out": "ff_out"}


def parts_of(layer: str, config: TransformerConfig, *, last: bool) -> tuple[slice, ...]:
    """The columns that a layer's products need, see `WeightFormat.load`. last: for the last single block."""
    if layer != "qkv_mlp":
        return (slice(None),)
    columns = Columns.of(config)
    return (columns.q, columns.kv, columns.mlp) if last else (columns.qkv, columns.mlp)


def sublayers(config: TransformerConfig) -> list[tuple[str, ...]]:
    """The names of the layers of each sublayer, in the order in which a step computes them.

    A double block has two sublayers, attention and MLP; a single block is one.
    """
    attention, mlp = (
        ("qkv", "out", "context_qkv", "context_out"),
        ("ff_in", "ff_out", "context_ff_in", "context_ff_out"),
    )
    double = [tuple(f"blocks.{i}.{n}" for n in names) for i in range(config.num_layers) for names in (attention, mlp)]
    single = [tuple(f"single_blocks.{i}.{n}" for n in ("qkv_mlp", "out")) for i in range(config.num_single_layers)]
    return double + single
