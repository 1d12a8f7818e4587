"""The transformer over some rows of the sequence, as a chain of sublayers over fixed buffers.

The sublayers update the residual stream x: x += gate * f(LayerNorm(x) * scale + shift). Each addition is done together
with the norm of the next sublayer.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mogle_rt.linear.layer import Product
from mogle_rt.linear.views import first_columns, flat
from mogle_rt.loop.buffers import Buffers
from mogle_rt.loop.reuse import KeptRows
from mogle_rt.loop.sublayers import DoubleAttention, DoubleMlp, LastSingle, NormArguments, Single, Sublayer
from mogle_rt.model.layout import Layout
from mogle_rt.model.modulation import StepModulation
from mogle_rt.model.transformer import Transformer
from mogle_rt.ops.contract import Ops


class Chain:
    """Computes the velocity from the tokens and from the text's rows of x, which must be there already.

    Args:
        transformer: the weights.
        modulation: of the present step, for the groups of the rows.
        b: the buffers of the rows, see `Buffers.without_condition`.
        rope: the rotary table of the whole sequence.
        layout: the rows, and the switches.
        ops: see `mogle_rt.ops.choice`.
        kept: what is kept of the condition's rows, for each block in order; None keeps nothing.
    """

    def __init__(
        self,
        transformer: Transformer,
        modulation: StepModulation,
        b: Buffers,
        rope: Tensor,
        layout: Layout,
        ops: Ops,
        kept: Sequence[KeptRows] | None,
    ) -> None:
        blocks, singles = transformer.blocks, transformer.single_blocks
        of_block = iter([None] * (len(blocks) + len(singles)) if kept is None else kept)
        self.links: list[Sublayer] = []
        for block, mod in zip(blocks, modulation.double, strict=True):
            self.links.append(DoubleAttention(block, mod, b, rope, layout, ops, next(of_block)))
            self.links.append(DoubleMlp(block, mod, b, layout, ops))
        for single, mod in zip(singles, modulation.single, strict=True):
            kind = LastSingle if single.last else Single
            self.links.append(kind(single, mod, b, rope, layout, ops, next(of_block)))
        scale, shift = modulation.out
        normed = first_columns(b.normed, layout.image, transformer.config.width)
        last = NormArguments(b.image, scale, shift, (layout.image,), normed)
        self._first_norm = ops.norm_modulate(*self.links[0].norm)
        norms = [link.norm for link in self.links[1:]] + [last]
        self._joints = [link.joined(norm) for link, norm in zip(self.links, norms, strict=True)]
        self._embed = Product(transformer.x_embedder, b.x[layout.text :], layout.streams_after_text)
        self._project_out = Product(transformer.proj_out, b.velocity, layout.image_stream)
        self._tokens, self._last_normed = flat(b.tokens), flat(last.out)

    def begin(self) -> None:
        """Embed the tokens, and compute the input of the first sublayer."""
        self._embed(self._tokens)
        self._first_norm()

    def run(self, links: range) -> None:
        """Compute these sublayers, by their places."""
        for place in links:
            self.links[place].run()
            self._joints[place]()

    def end(self) -> None:
        """Compute the velocity."""
        self._project_out(self._last_normed)
