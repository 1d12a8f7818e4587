"""One denoising step, as a straight line of operations over fixed buffers.

The residual stream x is a chain of sublayers, x += gate * f(LayerNorm(x) * scale + shift); each addition is done
together with the norm of the next sublayer. Everything that a run's shapes decide (views, rows, switches) is worked
out once, when a `Step` is made. Running it then reads and writes the same memory each time, waits for nothing and
branches on nothing: it can be captured in a CUDA graph, and one graph serves every step, as the step's number is
itself in a buffer. (On a CPU, where nothing is captured, a library may bring memory of its own for a product.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, is_dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mogle_rt.attention import scores_room
from mogle_rt.lora import LoraLinear, Product, first_columns, flat
from mogle_rt.modulation import ModulationTables
from mogle_rt.mogle import Bank, Fused, MixtureOfExperts
from mogle_rt.ops import Ops, Prepared
from mogle_rt.transformer import DoubleBlock, Layout, SingleBlock, Transformer


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """All that a step reads beside its latents; no step changes it.

    Attributes:
        mixture: expert outputs, or what the experts see; and the gate's constant input.
        time_table: [S, 64], the gate's time embeddings; None without a gate.
        text: [T, B, D], prompt embeddings after ``context_embedder``.
        modulation: AdaLN modulations of all steps.
        modulation_of: what they were made from: the model's timesteps [S], 1000 guidance_scale [], pooled prompts [B, P].
        rope: rotary table of the joint sequence [text, image, condition], [L, …] as `Ops.rope_buffer` makes it.
        sigma_steps: [S] float32, the next noise level minus this one, of every step.
    """

    mixture: Bank | Fused
    time_table: Tensor | None
    text: Tensor
    modulation: ModulationTables
    modulation_of: tuple[Tensor, Tensor, Tensor]
    rope: Tensor
    sigma_steps: Tensor


class Buffers:
    """What the steps of a run write.

    Attributes:
        tokens: [N + C, B, 64], latents, then condition tokens. latents, condition: its two parts.
        x: [L, B, D], the residual stream. image: its image rows. y: [L, B, D + Q], a sublayer's output.
        normed: [L, B, D + R], room for a sublayer's input; attention's result goes there, too, where that has been read
            and it isn't to lie in ``beside``. qkv: [L, B, 3 D]. hidden: [L, B, 4 D], inside MLPs. scratch: as
            hidden, in the memory of qkv: an activation is done before q, k and v come or after they are used.
        beside: [L, B, 5 D], in the memory of hidden, attention and MLP of single blocks; None except on a CPU, see
            `SingleOut`.
        scores: room for attention's, see `mogle_rt.attention.scores_room`.
        velocity: [N, B, 64].
        index: int64 [1], the step's number.
        clips: whether x is kept in fp16's range at the end of a block, as the reference does in fp16.
    """

    def __init__(self, transformer: Transformer, layout: Layout, batch: int) -> None:
        like, D = transformer.proj_out.bias, transformer.config.width
        C = transformer.config.in_channels
        lora = [m for m in transformer.modules() if isinstance(m, LoraLinear)]
        before = max((m.in_columns - D for m in lora if m.down_before is not None), default=0)
        after = max((m.rank for m in lora if m.up_after is not None), default=0)

        def rows(count: int, columns: int) -> Tensor:
            return like.new_empty(count, batch, columns)

        self.tokens = rows(layout.image + layout.condition, C)
        self.latents, self.condition = self.tokens.split([layout.image, layout.condition])
        self.x, self.y = rows(layout.total, D), rows(layout.total, D + after)
        self.normed, self.scratch = rows(layout.total, D + before), rows(layout.total, 4 * D)
        self.beside = rows(layout.total, 5 * D) if like.device.type == "cpu" else None
        inner = rows(layout.total, 4 * D) if self.beside is None else self.beside
        self.hidden = first_columns(inner, layout.total, 4 * D)
        self.qkv = self.scratch.view(-1)[: layout.total * batch * 3 * D].view(layout.total, batch, 3 * D)
        self.image = self.x[layout.image_rows]
        self.scores = scores_room(like, transformer.config.num_attention_heads, layout.total)
        self.velocity = rows(layout.image, C)
        self.clips = like.dtype == torch.float16
        self.index = torch.zeros(1, dtype=torch.int64, device=like.device)


class Norm(NamedTuple):
    """Arguments of `ops.norm_modulate`."""

    x: Tensor
    scale: Tensor
    shift: Tensor
    bounds: tuple[int, ...]
    out: Tensor
    lora_down: Tensor | None = None
    lora_from: int = 0


class Addition(NamedTuple):
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

    norm: Norm
    addition: Addition
    ops: Ops

    @abstractmethod
    def run(self) -> None:
        """From the norm's output to the addition's input."""

    def joined(self, following: Norm) -> Prepared:
        """Adds the result to the residual stream; then the norm of the next link, in the same pass where rows agree."""
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
    """[l * B, P * H * d] -> [l, B, P, H, d], of heads of ``size`` d."""
    return x.view(-1, batch, parts, x.shape[1] // parts // size, size)


class DoubleAttention(Sublayer):
    """Attention of a double block: q, k and v of text and of the rest, one attention, an output layer each."""

    def __init__(self, block: DoubleBlock, mod: Tensor, b: Buffers, rope: Tensor, layout: Layout, ops: Ops) -> None:
        self.ops, self.layout = ops, layout
        T, D, bounds, lora_from = layout.text, b.x.shape[-1], layout.double_bounds, layout.double_lora_from
        normed = first_columns(b.normed, layout.total, block.qkv.in_columns)
        y = first_columns(b.y, layout.total, block.out.out_columns)
        self.norm = Norm(b.x, mod[1], mod[0], bounds, normed, block.qkv.down_before, lora_from)
        self.addition = Addition(b.x, y, mod[2], bounds, block.out.up_after, lora_from)
        self.normed_text, self.normed_rest = flat(normed[:T, :, :D]), flat(normed[T:])
        self.context_qkv = Product(block.context_qkv, b.qkv[:T])
        self.project_qkv = Product(block.qkv, b.qkv[T:], lora_from - T)
        qkv = heads(flat(b.qkv), b.x.shape[1], 3, block.norm_qk.shape[-1])
        self.norm_rope = ops.qk_norm_rope(qkv, block.norm_qk, (T, layout.total), rope)
        attended = first_columns(b.normed, layout.total, D)  # free once q, k and v are there
        q, k, v = qkv.unbind(2)
        self.attend = ops.joint_attention(q, k, v, layout.condition_from, layout.plan, b.scores, attended)
        self.context_out = Product(block.context_out, y[:T])
        self.out = Product(block.out, y[T:], lora_from - T)
        self.text_rows = T * b.x.shape[1]
        self.shares_condition = layout.add_cond_attn and layout.condition > 0

    def run(self) -> None:
        self.context_qkv(self.normed_text)
        self.project_qkv(self.normed_rest)
        self.norm_rope()
        attention = flat(self.attend())
        self.context_out(attention[: self.text_rows])
        self.out(attention[self.text_rows :])
        if self.shares_condition:
            self._share_condition()

    def _share_condition(self) -> None:
        """The condition's gated output goes to the image too."""
        a, c = self.addition, self.layout.condition_from
        y = a.y[c:, :, : a.x.shape[-1]]
        if a.lora_up is not None:
            y = y + a.y[c:, :, a.x.shape[-1] :] @ a.lora_up
        a.x[self.layout.text : c].addcmul_(a.gate[2], y)


class DoubleMlp(Sublayer):
    """MLPs of a double block: text's and the rest's."""

    def __init__(self, block: DoubleBlock, mod: Tensor, b: Buffers, layout: Layout, ops: Ops) -> None:
        self.ops = ops
        T, D, bounds, lora_from = layout.text, b.x.shape[-1], layout.double_bounds, layout.double_lora_from
        normed = first_columns(b.normed, layout.total, D)
        y = first_columns(b.y, layout.total, block.ff_out.out_columns)
        self.norm = Norm(b.x, mod[4], mod[3], bounds, normed)
        self.addition = Addition(b.x, y, mod[5], bounds, block.ff_out.up_after, lora_from, b.clips)
        self.normed_text, self.normed_rest = flat(normed[:T]), flat(normed[T:])
        self.context_in = Product(block.context_ff_in, b.hidden[:T], gelu_scratch=b.scratch[:T], stays=False)
        self.ff_in = Product(block.ff_in, b.hidden[T:], gelu_scratch=b.scratch[T:], stays=False)
        self.context_out = Product(block.context_ff_out, y[:T])
        self.ff_out = Product(block.ff_out, y[T:], lora_from - T)

    def run(self) -> None:
        self.context_out(self.context_in(self.normed_text))
        self.ff_out(self.ff_in(self.normed_rest))


class SingleOut:
    """The output layer of a single block: of attention and MLP, side by side.

    On a CPU both lie in one buffer, for one product, which oneDNN takes. Elsewhere the MLP has a buffer of its own, as
    cuBLAS does GELU in its epilogue only where no gaps are left between the rows, and two products add up.

    Args:
        rows: positions whose output is wanted.
        y: its place. lora_from: as in `Product`.

    Attributes:
        attention: [l, B, D], where attention may go.
        hidden: [l, B, 4 D], where the MLP's activations go.
    """

    def __init__(self, block: SingleBlock, b: Buffers, rows: slice, y: Tensor, lora_from: int) -> None:
        D, self.in_one_product = b.x.shape[-1], b.beside is not None
        if b.beside is None:
            self.hidden = b.hidden[rows]
            self.attention = first_columns(b.normed, len(self.hidden), D)  # free once q, k and v are there
            self.inputs = flat(self.hidden)
            self.out = Product(block.out, y, lora_from, split=(D, 4 * D))
        else:
            self.attention, self.hidden = b.beside[rows].split([D, 4 * D], dim=-1)
            self.inputs = flat(b.beside[rows])
            self.out = Product(block.out, y, lora_from)

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

    def __init__(self, block: SingleBlock, mod: Tensor, b: Buffers, rope: Tensor, layout: Layout, ops: Ops) -> None:
        self.ops = ops
        bounds, lora_from = layout.single_bounds, layout.single_lora_from
        normed = first_columns(b.normed, layout.total, block.qkv_mlp.in_columns)
        y = first_columns(b.y, layout.total, block.out.out_columns)
        self.norm = Norm(b.x, mod[1], mod[0], bounds, normed, block.qkv_mlp.down_before, lora_from)
        self.addition = Addition(b.x, y, mod[2], bounds, block.out.up_after, lora_from, b.clips)
        self.normed = flat(normed)
        self.project_qkv = Product(block.qkv_mlp, b.qkv, lora_from, columns=block.qkv_columns)
        qkv = heads(flat(b.qkv), b.x.shape[1], 3, block.norm_qk.shape[-1])
        self.norm_rope = ops.qk_norm_rope(qkv, block.norm_qk, (layout.total,), rope)
        self.out = SingleOut(block, b, slice(None), y, lora_from)
        q, k, v = qkv.unbind(2)
        self.attend = ops.joint_attention(q, k, v, layout.condition_from, layout.plan, b.scores, self.out.attention)
        columns, hidden = block.mlp_columns, self.out.hidden
        self.project_mlp = Product(block.qkv_mlp, hidden, lora_from, columns=columns, gelu_scratch=b.scratch)

    def run(self) -> None:
        self.project_mlp(self.normed)
        self.project_qkv(self.normed)
        self.norm_rope()
        self.out(self.attend())


class LastSingle(Sublayer):
    """The last single block, whose output is wanted in image rows: it needs their q and MLP only, and every k and v."""

    def __init__(self, block: SingleBlock, mod: Tensor, b: Buffers, rope: Tensor, layout: Layout, ops: Ops) -> None:
        self.ops = ops
        D, lora_from = b.x.shape[-1], layout.single_lora_from
        image, image_lora_from = layout.image_rows, 0 if layout.latent_lora else layout.image
        normed = first_columns(b.normed, layout.total, block.qkv_mlp.in_columns)
        y = first_columns(b.y, layout.image, block.out.out_columns)
        self.norm = Norm(b.x, mod[1], mod[0], layout.single_bounds, normed, block.qkv_mlp.down_before, lora_from)
        self.addition = Addition(b.image, y, mod[2][:1], (layout.image,), block.out.up_after, image_lora_from, b.clips)
        self.normed, self.normed_image = flat(normed), flat(normed[image])
        kv = first_columns(b.qkv, layout.total, 2 * D)
        q = b.qkv.view(-1)[kv.numel() :][: b.image.numel()].view(b.image.shape)
        self.project_kv = Product(block.qkv_mlp, kv, lora_from, columns=block.kv_columns)
        self.project_q = Product(block.qkv_mlp, q, image_lora_from, columns=block.q_columns)
        batch, size = b.x.shape[1], block.norm_qk.shape[-1]
        q_heads, kv_heads = heads(flat(q), batch, 1, size), heads(flat(kv), batch, 2, size)
        self.norm_rope_q = ops.qk_norm_rope(q_heads, block.norm_qk[:, :1], (layout.image,), rope[image])
        self.norm_rope_k = ops.qk_norm_rope(kv_heads, block.norm_qk[:, 1:], (layout.total,), rope)
        self.out = SingleOut(block, b, image, y, image_lora_from)
        # Image queries belong to "the rest" whatever is switched: the condition's own queries are simply absent.
        q, (k, v) = q_heads[:, :, 0], kv_heads.unbind(2)
        self.attend = ops.joint_attention(q, k, v, layout.condition_from, layout.plan, b.scores, self.out.attention)
        self.project_mlp = Product(
            block.qkv_mlp, self.out.hidden, image_lora_from, columns=block.mlp_columns, gelu_scratch=b.scratch[image]
        )

    def run(self) -> None:
        self.project_mlp(self.normed_image)
        self.project_kv(self.normed)
        self.project_q(self.normed_image)
        self.norm_rope_q()
        self.norm_rope_k()
        self.out(self.attend())


class Step:
    """A step of runs of one shape. Its buffers are filled by `load`; then `advance` does step after step.

    Args:
        transformer, mogle: the weights.
        inputs: of the first run; later ones of the same shapes are copied over them.
        layout: rows and switches.
        ops: see `mogle_rt.ops`.
    """

    def __init__(
        self, transformer: Transformer, mogle: MixtureOfExperts, inputs: StepInputs, layout: Layout, ops: Ops
    ) -> None:
        self.mogle, self.inputs, self.ops = mogle, inputs, ops
        self.buffers = b = Buffers(transformer, layout, inputs.text.shape[1])
        self.modulation = inputs.modulation.buffers()
        self.time = None if inputs.time_table is None else inputs.time_table[:1].clone()
        self.sigma_step = inputs.sigma_steps[:1].clone()
        self.links: list[Sublayer] = []
        for block, mod in zip(transformer.blocks, self.modulation.double, strict=True):
            assert isinstance(block, DoubleBlock)
            self.links.append(DoubleAttention(block, mod, b, inputs.rope, layout, ops))
            self.links.append(DoubleMlp(block, mod, b, layout, ops))
        for block, mod in zip(transformer.single_blocks, self.modulation.single, strict=True):
            assert isinstance(block, SingleBlock)
            kind = LastSingle if block.last else Single
            self.links.append(kind(block, mod, b, inputs.rope, layout, ops))
        scale, shift = self.modulation.out
        normed = first_columns(b.normed, layout.image, transformer.config.width)
        last = Norm(b.image, scale, shift, (layout.image,), normed)
        self.first_norm = ops.norm_modulate(*self.links[0].norm)
        norms = [link.norm for link in self.links[1:]] + [last]
        self.joints = [link.joined(norm) for link, norm in zip(self.links, norms, strict=True)]
        self.embed = Product(transformer.x_embedder, b.x[layout.text :], layout.double_lora_from - layout.text)
        self.project_out = Product(transformer.proj_out, b.velocity)
        self.tokens, self.last_normed, self.x_text = flat(b.tokens), flat(last.out), b.x[: layout.text]

    def load(self, inputs: StepInputs) -> None:
        """Another run's inputs over the first one's: addresses stay.

        Raises:
            ValueError: a shape, dtype or device is another.
        """
        pairs = list(zip(tensors_of(self.inputs), tensors_of(inputs), strict=True))
        for mine, other in pairs:
            if (mine.shape, mine.dtype, mine.device) != (other.shape, other.dtype, other.device):
                raise ValueError(f"step inputs must be {describe(mine)} as in the first run, got {describe(other)}")
        for mine, other in pairs:
            if mine is not other:
                mine.copy_(other)
        self.inputs.modulation.fill_condition(self.modulation)

    def addresses(self) -> list[int]:
        """Where everything lies that the step reads or writes, weights aside."""
        held = (self.inputs, self.modulation, self.time, self.sigma_step, list(vars(self.buffers).values()))
        return [t.data_ptr() for t in tensors_of(held)]

    def seek(self, k: int) -> None:
        """Go to step k."""
        self.buffers.index.fill_(k)

    def select(self) -> None:
        """Fetch what belongs to the step that the index names."""
        index, inputs = self.buffers.index, self.inputs
        inputs.modulation.select(index, into=self.modulation)
        if inputs.time_table is not None:
            torch.index_select(inputs.time_table, 0, index, out=self.time)
        torch.index_select(inputs.sigma_steps, 0, index, out=self.sigma_step)

    def condition(self) -> None:
        """Latents -> condition tokens: gate and mix."""
        self.mogle(self.buffers.latents, self.inputs.mixture, self.time, self.buffers.condition, self.ops)

    def velocity(self) -> None:
        """Latents and condition tokens -> velocity: the transformer."""
        self.x_text.copy_(self.inputs.text)
        self.embed(self.tokens)
        self.first_norm()
        for link, join in zip(self.links, self.joints, strict=True):
            link.run()
            join()
        self.project_out(self.last_normed)

    def advance(self) -> None:
        """One step of the loop: x + (σ' - σ) v, and on to the next index."""
        self.select()
        self.condition()
        self.velocity()
        self.buffers.latents.addcmul_(self.buffers.velocity, self.sigma_step)
        self.buffers.index.add_(1)


def describe(x: Tensor) -> str:
    """For messages."""
    return f"{list(x.shape)} {x.dtype} on {x.device}"


def tensors_of(values: object) -> list[Tensor]:
    """All tensors of nested dataclasses and tuples, in order."""
    if isinstance(values, Tensor):
        return [values]
    if is_dataclass(values):
        values = [getattr(values, f.name) for f in fields(values)]
    return [t for v in values for t in tensors_of(v)] if isinstance(values, list | tuple) else []
