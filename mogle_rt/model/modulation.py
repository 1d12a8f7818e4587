"""AdaLN modulations of all steps, computed before the loop (REFERENCE: norm1, norm1_context, norm, norm_out).

All timesteps are known in advance, so each modulation layer is one matrix product over (step, image). Its weight is
read, used and released, so that a quarter of the model's weights need not stay in memory. While one layer is computed,
the weight of the next is read from the disk. The condition's modulations belong to timestep 0 and are constant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

from mogle_rt.bundle.schema import SINUSOID_DIM
from mogle_rt.config import TransformerConfig


class WeightReader(Protocol):
    """Reads tensors by their full names in the bundle, on the device and in the dtype of the run."""

    def __call__(self, name: str) -> Tensor: ...

    def expect(self, name: str) -> None:
        """Say that this tensor is read next: it can be read from the disk in the meantime."""

    def release(self, name: str) -> None:
        """Allow the memory of this tensor to be freed."""


# (layer, input) -> what styles add to the layer's output, or None; see `mogle_rt.model.styles.Styles.change`.
Change = Callable[[str, Tensor], Tensor | None]


def no_change(layer: str, x: Tensor) -> None:
    """The `Change` without styles: nothing is added."""


@dataclass(frozen=True)
class StepModulation:
    """Modulations of one step, one row for each group of the sequence (see `mogle_rt.ops.torch_ops`).

    Scales include the 1: they are 1 + scale.

    Attributes:
        double: [L, 6, G, B, D], for each double block shift, scale and gate of attention, then of the MLP. The groups
            are text, image and, if there is one, condition.
        single: [L, 3, G, B, D], shift, scale and gate of each single block. The groups are text with image, and, if
            there is one, condition.
        out: [2, 1, B, D], scale and shift of the last norm.
    """

    double: Tensor
    single: Tensor
    out: Tensor

    @property
    def without_condition(self) -> StepModulation:
        """The same memory for the groups of text and image alone."""
        return StepModulation(self.double[:, :, :2], self.single[:, :, :1], self.out)


@dataclass(frozen=True)
class ModulationTables:
    """Modulations of all steps. The condition's are constant and held once. S is the capacity for steps."""

    double: Tensor  # [S, L, 6, 2, B, D], text and image rows of double blocks
    single: Tensor  # [S, L, 3, 1, B, D], text and image rows of single blocks
    out: Tensor  # [S, 2, 1, B, D]
    condition_double: Tensor | None  # [L, 6, 1, B, D]
    condition_single: Tensor | None  # [L, 3, 1, B, D]

    def clone(self) -> ModulationTables:
        """A copy in memory of its own."""
        copies: dict[str, Any] = {name: None if t is None else t.clone() for name, t in vars(self).items()}
        return ModulationTables(**copies)

    def buffers(self) -> StepModulation:
        """Buffers for the modulations of one step. The condition's rows, which no step changes, are filled in."""

        def with_condition(table: Tensor, condition: Tensor | None) -> Tensor:
            blocks, chunks, groups, batch, width = table.shape[1:]
            return table.new_empty(blocks, chunks, groups + (condition is not None), batch, width)

        buffers = StepModulation(
            double=with_condition(self.double, self.condition_double),
            single=with_condition(self.single, self.condition_single),
            out=self.out.new_empty(self.out.shape[1:]),
        )
        self.fill_condition(buffers)
        return buffers

    def fill_condition(self, into: StepModulation) -> None:
        """Write the condition's rows into the buffers of a step."""
        for condition, buffer in ((self.condition_double, into.double), (self.condition_single, into.single)):
            if condition is not None:
                buffer[:, :, -1:] = condition

    def select(self, step: Tensor, into: StepModulation) -> None:
        """Write the rows of a step into its buffers. step: int64 [1] on the device."""
        for table, buffer in ((self.double, into.double), (self.single, into.single), (self.out, into.out)):
            if table.numel():
                rows = buffer[:, :, : table.shape[3]] if buffer.dim() == 5 else buffer
                torch.index_select(table, 0, step, out=rows[None])


class KeptTables:
    """The modulations of the last runs, by what they were made from: their weights need not be read again.

    Args:
        limit: how many runs' are kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: list[tuple[tuple[Tensor, ...], ModulationTables]] = []

    def find(self, made_from: tuple[Tensor, ...]) -> ModulationTables | None:
        """The tables that were made from these tensors, or None."""
        for key, tables in self._kept:
            if all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(key, made_from, strict=True)):
                return tables.clone()  # a step writes other runs' over its own
        return None

    def keep(self, made_from: tuple[Tensor, ...], tables: ModulationTables) -> None:
        """Keep a copy of these tables in place of the oldest ones."""
        del self._kept[: max(0, len(self._kept) + 1 - self.limit)]
        if self.limit:
            self._kept.append((tuple(t.clone() for t in made_from), tables.clone()))


def _mlp(x: Tensor, name: str, weights: WeightReader, change: Change) -> Tensor:
    def linear(layer: str, x: Tensor) -> Tensor:
        stored = f"transformer.{name}.{layer}"
        y = F.linear(x, weights(f"{stored}.weight"), weights(f"{stored}.bias"))
        weights.release(f"{stored}.weight")
        more = change(f"{name}.{layer}", x)
        return y if more is None else y + more

    return linear("linear_2", F.silu(linear("linear_1", x)))


def _sinusoid(t: Tensor, dtype: torch.dtype) -> Tensor:
    return get_timestep_embedding(t, SINUSOID_DIM, flip_sin_to_cos=True, downscale_freq_shift=0).to(dtype)


def time_embedding(
    timesteps: Tensor,
    guidance: Tensor | None,
    pooled: Tensor,
    weights: WeightReader,
    change: Change = no_change,
) -> Tensor:
    """temb = MLP(t) + MLP(guidance) + MLP(pooled).

    Args:
        timesteps: [S], on the transformer's scale 0…1000.
        guidance: [B], guidance_scale times 1000, or None for models without guidance.
        pooled: [B, P], CLIP's pooled prompt embeddings.
        change: what styles add to the layers' outputs.

    Returns:
        [S, B, D] in ``pooled``'s dtype.
    """
    prefix = "time_text_embed"
    constant = _mlp(pooled, f"{prefix}.text_embedder", weights, change)
    if guidance is not None:
        constant = constant + _mlp(_sinusoid(guidance, pooled.dtype), f"{prefix}.guidance_embedder", weights, change)
    return _mlp(_sinusoid(timesteps, pooled.dtype), f"{prefix}.timestep_embedder", weights, change)[:, None] + constant


def modulation_tables(
    config: TransformerConfig,
    temb: Tensor,
    condition_temb: Tensor | None,
    weights: WeightReader,
    *,
    latent_lora: bool = False,
    capacity: int | None = None,
    change: Change = no_change,
) -> ModulationTables:
    """Compute all modulations of a run, layer by layer.

    Args:
        temb: [S, B, D], see `time_embedding`.
        condition_temb: [B, D], the same for timestep 0; None without a condition.
        weights: reads a tensor of the bundle, which is released after its layer.
        latent_lora: the condition branch's LoRA acts on the modulation of the image (in single blocks, of text and
            image) too.
        capacity: the number of steps that the tables have room for, at least S; None means S. Rows from S on are not
            set.
        change: what styles add to the layers' outputs. It applies to the steps' rows, not to the condition's.
    """
    steps, batch, width = temb.shape
    capacity = steps if capacity is None else capacity
    rows = F.silu(temb).reshape(steps * batch, width)
    # The condition's rows follow those of the steps, so that each weight is read once for both.
    all_rows = rows if condition_temb is None else torch.cat([rows, F.silu(condition_temb)])

    def table(count: int, chunks: int, groups: int, *leading: int) -> Tensor:
        return temb.new_empty(*leading, count, chunks, groups, batch, width)

    double = table(config.num_layers, 6, 2, capacity)
    single = table(config.num_single_layers, 3, 1, capacity)
    condition_double = None if condition_temb is None else table(config.num_layers, 6, 1)
    condition_single = None if condition_temb is None else table(config.num_single_layers, 3, 1)

    def fill(name: str, into: Tensor, condition_into: Tensor | None, *, lora: bool) -> None:
        """into: [S, chunks, B, D], condition_into: [chunks, B, D]."""
        x = rows if condition_into is None else all_rows
        y = F.linear(x, weights(f"transformer.{name}.weight"), weights(f"transformer.{name}.bias"))
        lora_from = 0 if lora else len(rows)
        if lora_from < len(x):
            down, up = weights(f"lora.{name}.lora_A.weight"), weights(f"lora.{name}.lora_B.weight")
            y[lora_from:].addmm_(x[lora_from:] @ down.t(), up.t())
        if (more := change(name, rows)) is not None:
            y[: len(rows)] += more
        for part, out in ((y[: len(rows)], into), (y[len(rows) :], condition_into)):
            if out is not None:
                out.copy_(part.view(*out.shape[:-3], batch, -1, width).transpose(-3, -2))
        weights.release(f"transformer.{name}.weight")

    out = temb.new_empty(capacity, 2, 1, batch, width)
    layers: list[tuple[str, Tensor, Tensor | None, bool]] = []  # the arguments of `fill`, in the order of reading
    for i in range(config.num_layers):
        constant = None if condition_double is None else condition_double[i, :, 0]
        layers.append((f"transformer_blocks.{i}.norm1.linear", double[:steps, i, :, 1], constant, latent_lora))
        layers.append((f"transformer_blocks.{i}.norm1_context.linear", double[:steps, i, :, 0], None, False))
    for i in range(config.num_single_layers):
        constant = None if condition_single is None else condition_single[i, :, 0]
        layers.append((f"single_transformer_blocks.{i}.norm.linear", single[:steps, i, :, 0], constant, latent_lora))
    layers.append(("norm_out.linear", out[:steps, :, 0], None, False))
    for number, (name, into, constant, lora) in enumerate(layers):
        for following, *_ in layers[number + 1 : number + 2]:
            weights.expect(f"transformer.{following}.weight")
        fill(name, into, constant, lora=lora)
    for t in (double, single, condition_double, condition_single):
        if t is not None:
            t[..., 1::3, :, :, :] += 1  # scale -> 1 + scale
    out[:, 0] += 1  # here the scale comes first
    return ModulationTables(double, single, out, condition_double, condition_single)
