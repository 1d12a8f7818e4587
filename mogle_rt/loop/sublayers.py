"""The sublayers of a step, as links of a chain over fixed buffers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor

from mogle_rt.linear.branches import Streams
from mogle_rt.linear.layer import Product
from mogle_rt.linear.views import first_columns, flat
from mogle_rt.loop.buffers import Buffers
from mogle_rt.loop.reuse import KeptRows
from mogle_rt.model.layout import Layout
from mogle_rt.model.transformer import DoubleBlock, SingleBlock
from mogle_rt.ops.contract import Ops, Prepared


class NormArguments(NamedTuple):
    """Arguments of `ops.norm_modulate`."""

    x: Tensor
    scale: Tensor
    shift: Tensor
    bounds: tuple[int, ...]
    out: Tensor
    lora_down: Tensor | None = None
    lora_from: int = 0


class AdditionArguments(NamedTuple):
    """Arguments of `ops.residual`."""

    x: Tensor
    y: Tensor
    gate: Tensor
    bounds: tuple[int, ...]
    lora_up: Tensor | None = None
    lora_from: int = 0
    clip: bool = False


class Sublayer(ABC):
    """A link of the chain: `run` reads the output of ``norm`` and writes ``addition.y``."""

    norm: NormArguments
    addition: AdditionArguments
    ops: Ops

    @abstractmethod
    def run(self) -> None:
        """Compute the input of the addition from the output of the norm."""

    def joined(self, following: NormArguments) -> Prepared:
        """Prepare the addition to the residual stream and the next link's norm, in one pass if their rows agree."""
        a, n = self.addition, following
        if a.x is n.x and a.bounds == n.bounds:
            return self.ops.residual_norm_modulate(
                a.x,
                a.y,
                a.gate,
                n.scale,
                n.shift,
                n.bounds,
                n.out,
                n.lora_down,
                n.lora_from,
                a.lora_up,
                a.lora_from,
                a.clip,
            )
        add, norm = self.ops.residual(*a), self.ops.norm_modulate(*n)

        def both() -> None:
            add()
            norm()

        return both


def heads(x: Tensor, batch: int, parts: int, size: int) -> Tensor:
    """[l * B, P * H * d] -> [l, B, P, H, d], where d is ``size``, the width of a head."""
    return x.view(-1, batch, parts, x.shape[1] // parts // size, size)


class Exchange:
    """Keeps the condition's keys and values for later steps, or puts back those that were kept, if this step has none.

    Args:
        keys_values: [L, B, 2 D], of all rows.
        kept: None does nothing.
    """

    def __init__(self, keys_values: Tensor, layout: Layout, kept: KeptRows | None) -> None:
        self._copies: tuple[Tensor, Tensor] | None = None  # to, from
        if kept is not None:
            present = keys_values[layout.condition_from :]
            self._copies = (kept.keys_values, present) if layout.condition else (present, kept.keys_values)

    def __call__(self) -> None:
        if self._copies is not None:
            to, source = self._copies
            to.copy_(source)


class DoubleAttention(Sublayer):
    """Attention of a double block: text and the rest have their own qkv and output layers and are attended jointly."""

    def __init__(
        self,
        block: DoubleBlock,
        mod: Tensor,
        b: Buffers,
        rope: Tensor,
        layout: Layout,
        ops: Ops,
        kept: KeptRows | None = None,
    ) -> None:
        self.ops, self.layout = ops, layout
        T, D, bounds = layout.text, b.x.shape[-1], layout.double_bounds
        text, rest = layout.text_stream, layout.streams_after_text
        normed = first_columns(b.normed, layout.total, block.qkv.in_columns_of(layout.streams))
        y = first_columns(b.y, layout.total, block.out.out_columns_of(layout.streams))
        self.norm = NormArguments(b.x, mod[1], mod[0], bounds, normed, *block.qkv.before_it(layout.streams))
        self.addition = AdditionArguments(b.x, y, mod[2], bounds, *block.out.after_it(layout.streams))
        self.normed_text, self.normed_rest = flat(normed[:T, :, :D]), flat(normed[T:])
        self.context_qkv = Product(block.context_qkv, b.qkv[:T], text)
        self.project_qkv = Product(block.qkv, b.qkv[T:], rest)
        qkv = heads(flat(b.qkv), b.x.shape[1], 3, block.norm_qk.shape[-1])
        self.norm_rope = ops.qk_norm_rope(qkv, block.norm_qk, (T, layout.total), rope[: layout.total])
        self.exchange = Exchange(b.joint[..., D:], layout, kept)
        attended = first_columns(b.normed, layout.total, D)  # this memory is free once q, k and v are computed
        q, (_, k, v) = qkv[:, :, 0], heads(flat(b.joint), b.x.shape[1], 3, block.norm_qk.shape[-1]).unbind(2)
        self.attend = ops.joint_attention(q, k, v, layout.condition_from, b.plan, b.scores, attended)
        self.context_out = Product(block.context_out, y[:T], text)
        self.out = Product(block.out, y[T:], rest)
        self.text_rows = T * b.x.shape[1]
        self.shares_condition, self.kept = layout.add_cond_attn, kept

    def run(self) -> None:
        self.context_qkv(self.normed_text)
        self.project_qkv(self.normed_rest)
        self.norm_rope()
        self.exchange()
        attention = flat(self.attend())
        self.context_out(attention[: self.text_rows])
        self.out(attention[self.text_rows :])
        if self.shares_condition:
            self._share_condition()

    def _share_condition(self) -> None:
        """Add the condition's gated output to the image rows too; if this step has none, the one that was kept."""
        a, c, kept = self.addition, self.layout.condition_from, self.kept
        if self.layout.condition:
            y, gate = a.y[c:, :, : a.x.shape[-1]], a.gate[2]
            if a.lora_up is not None:
                y = y + a.y[c:, :, a.x.shape[-1] :] @ a.lora_up
            if kept is not None and kept.shared is not None:
                kept.shared.copy_(y)
        elif kept is not None and kept.shared is not None and kept.gate is not None:
            y, gate = kept.shared, kept.gate
        else:
            return
        a.x[self.layout.text : c].addcmul_(gate, y)


class DoubleMlp(Sublayer):
    """The two MLPs of a double block: one for text, one for the rest."""

    def __init__(self, block: DoubleBlock, mod: Tensor, b: Buffers, layout: Layout, ops: Ops) -> None:
        self.ops = ops
        T, D, bounds = layout.text, b.x.shape[-1], layout.double_bounds
        text, rest = layout.text_stream, layout.streams_after_text
        normed = first_columns(b.normed, layout.total, D)
        y = first_columns(b.y, layout.total, block.ff_out.out_columns_of(layout.streams))
        self.norm = NormArguments(b.x, mod[4], mod[3], bounds, normed)
        self.addition = AdditionArguments(b.x, y, mod[5], bounds, *block.ff_out.after_it(layout.streams), b.clips)
        self.normed_text, self.normed_rest = flat(normed[:T]), flat(normed[T:])
        self.context_in = Product(block.context_ff_in, b.hidden[:T], text, gelu_scratch=b.scratch[:T], stays=False)
        self.ff_in = Product(block.ff_in, b.hidden[T:], rest, gelu_scratch=b.scratch[T:], stays=False)
        self.context_out = Product(block.context_ff_out, y[:T], text)
        self.ff_out = Product(block.ff_out, y[T:], rest)

    def run(self) -> None:
        self.context_out(self.context_in(self.normed_text))
        self.ff_out(self.ff_in(self.normed_rest))


class SingleOut:
    """The output layer of a single block, whose input is attention and MLP side by side.

    On a CPU both lie in one buffer, so that oneDNN computes one product. On other devices the MLP has its own buffer,
    because cuBLAS computes GELU in its epilogue only if there are no gaps between the rows, and two products are added.

    Args:
        rows: the positions whose output is needed.
        y: where the output is written.
        streams: the streams of these positions.

    Attributes:
        attention: [l, B, D], where attention may write its result.
        hidden: [l, B, 4 D], where the MLP writes its activations.
    """

    def __init__(self, block: SingleBlock, b: Buffers, rows: slice, y: Tensor, streams: Streams) -> None:
        D, self.in_one_product = b.x.shape[-1], b.beside is not None
        if b.beside is None:
            self.hidden = b.hidden[rows]
            self.attention = first_columns(b.normed, len(self.hidden), D)  # free once q, k and v are computed
            self.inputs = flat(self.hidden)
            self.out = Product(block.out, y, streams, split=(D, 4 * D))
        else:
            self.attention, self.hidden = b.beside[rows].split([D, 4 * D], dim=-1)
            self.inputs = flat(b.beside[rows])
            self.out = Product(block.out, y, streams)

    def __call__(self, attention: Tensor) -> None:
        """attention: [l, B, D]."""
        if not self.in_one_product:
            self.out(flat(attention), self.inputs)
            return
        if attention is not self.attention:
            self.attention.copy_(attention)
        self.out(self.inputs)


class Single(Sublayer):
    """A single block: attention and MLP side by side."""

    def __init__(
        self,
        block: SingleBlock,
        mod: Tensor,
        b: Buffers,
        rope: Tensor,
        layout: Layout,
        ops: Ops,
        kept: KeptRows | None = None,
    ) -> None:
        self.ops = ops
        bounds, streams = layout.single_bounds, layout.streams
        normed = first_columns(b.normed, layout.total, block.qkv_mlp.in_columns_of(streams))
        y = first_columns(b.y, layout.total, block.out.out_columns_of(streams))
        self.norm = NormArguments(b.x, mod[1], mod[0], bounds, normed, *block.qkv_mlp.before_it(streams))
        self.addition = AdditionArguments(b.x, y, mod[2], bounds, *block.out.after_it(streams), b.clips)
        self.normed = flat(normed)
        self.project_qkv = Product(block.qkv_mlp, b.qkv, streams, columns=block.columns.qkv)
        qkv = heads(flat(b.qkv), b.x.shape[1], 3, block.norm_qk.shape[-1])
        self.norm_rope = ops.qk_norm_rope(qkv, block.norm_qk, (layout.total,), rope[: layout.total])
        self.exchange = Exchange(b.joint[..., b.x.shape[-1] :], layout, kept)
        self.out = SingleOut(block, b, slice(None), y, streams)
        q, (_, k, v) = qkv[:, :, 0], heads(flat(b.joint), b.x.shape[1], 3, block.norm_qk.shape[-1]).unbind(2)
        self.attend = ops.joint_attention(q, k, v, layout.condition_from, b.plan, b.scores, self.out.attention)
        columns, hidden = block.columns.mlp, self.out.hidden
        self.project_mlp = Product(block.qkv_mlp, hidden, streams, columns=columns, gelu_scratch=b.scratch)

    def run(self) -> None:
        self.project_mlp(self.normed)
        self.project_qkv(self.normed)
        self.norm_rope()
        self.exchange()
        self.out(self.attend())


class LastSingle(Sublayer):
    """The last single block. Only its image rows are needed, so q and MLP are computed for these, k and v for all."""

    def __init__(
        self,
        block: SingleBlock,
        mod: Tensor,
        b: Buffers,
        rope: Tensor,
        layout: Layout,
        ops: Ops,
        kept: KeptRows | None = None,
    ) -> None:
        self.ops = ops
        D, streams, columns = b.x.shape[-1], layout.streams, block.columns
        image, image_stream = layout.image_rows, layout.image_stream
        normed = first_columns(b.normed, layout.total, block.qkv_mlp.in_columns_of(streams))
        y = first_columns(b.y, layout.image, block.out.out_columns_of(image_stream))
        self.norm = NormArguments(b.x, mod[1], mod[0], layout.single_bounds, normed, *block.qkv_mlp.before_it(streams))
        gate, up = mod[2][:1], block.out.after_it(image_stream)
        self.addition = AdditionArguments(b.image, y, gate, (layout.image,), *up, b.clips)
        self.normed, self.normed_image = flat(normed), flat(normed[image])
        joint_kv = first_columns(b.joint, len(b.joint), 2 * D)
        kv = joint_kv[: layout.total]
        q = b.joint.view(-1)[joint_kv.numel() :][: b.image.numel()].view(b.image.shape)
        self.project_kv = Product(block.qkv_mlp, kv, streams, columns=columns.kv)
        self.project_q = Product(block.qkv_mlp, q, image_stream, columns=columns.q)
        batch, size = b.x.shape[1], block.norm_qk.shape[-1]
        q_heads, kv_heads = heads(flat(q), batch, 1, size), heads(flat(kv), batch, 2, size)
        self.norm_rope_q = ops.qk_norm_rope(q_heads, block.norm_qk[:, :1], (layout.image,), rope[image])
        self.norm_rope_k = ops.qk_norm_rope(kv_heads, block.norm_qk[:, 1:], (layout.total,), rope[: layout.total])
        self.exchange = Exchange(joint_kv, layout, kept)
        self.out = SingleOut(block, b, image, y, image_stream)
        # Image queries belong to "the rest" under every switch. The condition's own queries are left out.
        q, (k, v) = q_heads[:, :, 0], heads(flat(joint_kv), batch, 2, size).unbind(2)
        self.attend = ops.joint_attention(q, k, v, layout.condition_from, b.plan, b.scores, self.out.attention)
        self.project_mlp = Product(
            block.qkv_mlp, self.out.hidden, image_stream, columns=columns.mlp, gelu_scratch=b.scratch[image]
        )

    def run(self) -> None:
        self.project_mlp(self.normed_image)
        self.project_kv(self.normed)
        self.project_q(self.normed_image)
        self.norm_rope_q()
        self.norm_rope_k()
        self.exchange()
        self.out(self.attend())
