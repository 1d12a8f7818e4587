"""What a step reads and writes: the inputs, which no step changes, and buffers at fixed addresses."""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields, is_dataclass

import torch
from torch import Tensor

from mogle_rt.config import TransformerConfig
from mogle_rt.linear.views import first_columns
from mogle_rt.loop.blend import Kept
from mogle_rt.model.layout import Layout
from mogle_rt.model.mixture import Bank, Fused
from mogle_rt.model.modulation import ModulationTables
from mogle_rt.model.transformer import Transformer
from mogle_rt.ops.attention import AttentionPlan, scores_shape


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """Everything that a step reads except its latents. No step changes it.

    Attributes:
        mixture: the experts' outputs or inputs, and the gate's constant input.
        time_table: [S, 64], the gate's time embeddings; None without a gate.
        text: [T, B, D], prompt embeddings after ``context_embedder``.
        modulation: AdaLN modulations of all steps.
        modulation_of: what the modulations were computed from: the model's timesteps [S], 1000 guidance_scale [],
            pooled prompts [B, P], and the version of the styles [], see `mogle_rt.model.styles.Styles`.
        rope: [L, …], rotary table of the joint sequence [text, image, condition], as made by `Ops.rope_buffer`.
        sigma_steps: [S] float32, for each step the next noise level minus its own.
        log_scale: float32 [1], log(condition_scale), see `AttentionPlan`.
        kept: what an edit keeps, [N, B, 64]; None in runs that are no edits, whose steps don't blend.

    S is the run's capacity for steps, see `mogle_rt.loop.schedule.step_capacity`. Rows beyond the actual number of
    steps are never read.
    """

    mixture: Bank | Fused
    time_table: Tensor | None
    text: Tensor
    modulation: ModulationTables
    modulation_of: tuple[Tensor, Tensor, Tensor, Tensor]
    rope: Tensor
    sigma_steps: Tensor
    log_scale: Tensor
    kept: Kept | None = None


class Buffers:
    """The tensors that the steps of a run write to.

    Attributes:
        tokens: [N + C, B, 64], the latents followed by the condition tokens. latents, condition: views of these parts.
        x: [L, B, D], the residual stream. image: its image rows. y: [L, B, D + Q], the output of a sublayer.
        normed: [L, B, D + R], the input of a sublayer. Once it has been read, attention writes its result there too,
            unless the result belongs in ``beside``.
        qkv: [L, B, 3 D]. joint: the same memory, which holds every row also where a step computes fewer.
        hidden: [L, B, 4 D], the hidden layer of MLPs.
        scratch: [L, B, 4 D], shares the memory of qkv, because GELU runs before q, k and v are written or after their
            last use.
        beside: [L, B, 5 D], attention and MLP of single blocks; shares the memory of hidden. None except on a CPU, see
            `SingleOut`.
        scores: scratch memory for attention scores, see `mogle_rt.ops.attention.scores_room`.
        velocity: [N, B, 64].
        index: int64 [1], the number of the step.
        clips: whether x is clipped to fp16's range at the end of a block, as the reference does in fp16.
        plan: which tokens attend to which, and how strongly; the strength is one of the inputs.
        nbytes: the size of all buffers in bytes.
    """

    def __init__(self, transformer: Transformer, layout: Layout, batch: int, log_scale: Tensor) -> None:
        self.plan = AttentionPlan(layout.visibility, log_scale)
        like, D = transformer.proj_out.bias, transformer.config.width
        sizes = buffer_shapes(
            transformer.config,
            layout,
            batch,
            device=like.device.type,
            dtype=like.dtype,
            most_before=transformer.most_before,
            most_after=transformer.most_after,
        )
        made = {name: like.new_empty(shape) for name, shape in sizes.items()}
        self.tokens, self.velocity, self.scores = made["tokens"], made["velocity"], made.get("scores")
        self.latents, self.condition = self.tokens.split([layout.image, layout.condition])
        self.x, self.y, self.normed, self.scratch = (made[name] for name in ("x", "y", "normed", "scratch"))
        self.beside = made.get("beside")
        self.hidden = first_columns(made["hidden"] if self.beside is None else self.beside, layout.total, 4 * D)
        self.qkv = self.scratch.view(-1)[: layout.total * batch * 3 * D].view(layout.total, batch, 3 * D)
        self.joint, self.image = self.qkv, self.x[layout.image_rows]
        self.clips = like.dtype == torch.float16
        self.index = torch.zeros(1, dtype=torch.int64, device=like.device)
        self.nbytes = sum(t.nbytes for t in (*made.values(), self.index))

    def without_condition(self, layout: Layout) -> Buffers:
        """The same memory for the rows of text and image alone. ``joint`` still holds q, k and v of every row."""
        own, rows = copy.copy(self), slice(layout.condition_from)
        own.x, own.y, own.normed, own.scratch = self.x[rows], self.y[rows], self.normed[rows], self.scratch[rows]
        own.hidden, own.qkv, own.tokens = self.hidden[rows], self.qkv[rows], self.latents
        own.beside = None if self.beside is None else self.beside[rows]
        return own


def buffer_shapes(
    config: TransformerConfig,
    layout: Layout,
    batch: int,
    *,
    device: str,
    dtype: torch.dtype,
    most_before: int,
    most_after: int,
) -> dict[str, tuple[int, ...]]:
    """The shapes of `Buffers` that have memory of their own, by name.

    Args:
        device: the kind of device.
        most_before, most_after: see `Transformer`.
    """
    D, L, C = config.width, layout.total, config.in_channels
    on_cpu = device == "cpu"
    scores = scores_shape(device, dtype, config.num_attention_heads, L)
    return {
        "tokens": (layout.image + layout.condition, batch, C),
        "x": (L, batch, D),
        "y": (L, batch, D + most_after),
        "normed": (L, batch, D + most_before),
        "scratch": (L, batch, 4 * D),
        **({"beside": (L, batch, 5 * D)} if on_cpu else {"hidden": (L, batch, 4 * D)}),
        **({} if scores is None else {"scores": scores}),
        "velocity": (layout.image, batch, C),
    }


def shape_and_place(x: Tensor) -> str:
    """Describe a tensor for a message."""
    return f"{list(x.shape)} {x.dtype} on {x.device}"


def tensors_of(values: object) -> list[Tensor]:
    """All tensors in nested dataclasses, tuples and lists, in order."""
    if isinstance(values, Tensor):
        return [values]
    if is_dataclass(values):
        values = [getattr(values, f.name) for f in fields(values)]
    return [t for v in values for t in tensors_of(v)] if isinstance(values, list | tuple) else []
