"""Loads a bundle into the runtime's layers: stored layers are stacked, and each weight gets its format right away."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from mogle_rt.bundle import schema
from mogle_rt.bundle.schema import EXPERT_NAMES, Stacked
from mogle_rt.bundle.source import TensorSource
from mogle_rt.config import NUM_EXPERTS
from mogle_rt.kernels.inputs import padded_rank
from mogle_rt.linear.branches import LowRankBranch
from mogle_rt.linear.contract import Further, Place, StoredLayer, WeightFormat
from mogle_rt.linear.formats import format_named
from mogle_rt.linear.layer import Hold, Linear
from mogle_rt.linear.plain import PlainWeight
from mogle_rt.linear.quantised.base import QuantisedWeight
from mogle_rt.linear.scratch import Scratch
from mogle_rt.model.mixture import MixtureOfExperts
from mogle_rt.model.transformer import (
    AS_WIDE_AS,
    PLACES,
    Columns,
    DoubleBlock,
    SingleBlock,
    Transformer,
    WeightStream,
    parts_of,
    sublayers,
)


class LazyWeights:
    """Reads single tensors of a bundle on demand; see `mogle_rt.model.modulation.WeightReader`.

    Args:
        source: the bundle.
        device, dtype: where and in what they are wanted.

    Attributes:
        source: see above.
    """

    def __init__(self, source: TensorSource, device: torch.device, dtype: torch.dtype) -> None:
        self.source, self._device, self._dtype = source, device, dtype
        self._kept: dict[str, Tensor] | None = None

    def keep(self, kept: bool) -> None:
        """Choose whether tensors stay in memory once they are read."""
        if kept != (self._kept is not None):
            self._kept = {} if kept else None

    def __call__(self, name: str) -> Tensor:
        if self._kept is None:
            return self.source.load([name], self._device, self._dtype)
        if name not in self._kept:
            self._kept[name] = self.source.load([name], self._device, self._dtype)
        return self._kept[name]

    def expect(self, name: str) -> None:
        if self._kept is None or name not in self._kept:
            self.source.expect([name])

    def release(self, name: str) -> None:
        self.source.release([name])


class LayerStream(WeightStream, Protocol):
    """A stream of weights that layers can be loaded into."""

    def hold(self, place: int, leaf: int, stored: StoredLayer, further: Further) -> WeightFormat:
        """The weight of a layer, in the memory that streamed weights use in turn.

        Args:
            place: the index of its sublayer. leaf: the index of the layer in this sublayer.
        """


# Gets all sublayers in order, each as the plans of its layers, and makes a stream for some of them, or None.
MakeStream = Callable[[Sequence[Sequence["LayerPlan"]]], LayerStream | None]


def assign(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace the parameter ``name`` of a module by ``value``, which has the same shape."""
    owner = module.get_submodule(name.rpartition(".")[0])
    leaf = name.rpartition(".")[2]
    expected = getattr(owner, leaf).shape
    assert value.shape == expected, f"{name}: {tuple(value.shape)} is not {tuple(expected)}"
    setattr(owner, leaf, nn.Parameter(value, requires_grad=False))


@dataclass(frozen=True)
class LayerPlan:
    """A runtime layer before it is loaded.

    Attributes:
        stored: the stored layers that it is made of.
        rank: the rank of the stored LoRA, 0 if there is none. streams: the streams that the LoRA acts on.
        weight_format, place, parts, padding: see `Linear.load`.
        fused: see `mogle_rt.linear.contract.WeightFormat.rides`.
    """

    stored: StoredLayer
    rank: int
    streams: frozenset[str]
    weight_format: type[WeightFormat]
    place: Place
    fused: bool
    parts: tuple[slice, ...] = (slice(None),)
    padding: int = 0

    @property
    def rides(self) -> bool:
        """Whether the LoRA is computed in extra columns of the product with the weight."""
        return self.rank > 0 and self.weight_format.rides(self.place, self.rank, fused=self.fused)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the product, including the extra rows and columns for a LoRA or the padding."""
        out, inner = self.stored.shape
        rank = padded_rank(self.rank) if self.rides else 0
        after_norm = self.place is Place.AFTER_NORM
        return out + (self.padding or (0 if after_norm else rank)), inner + (rank if after_norm else 0)

    def load(self, hold: Hold | None = None) -> Linear:
        """Read the layer. hold: see `Linear.load`."""
        return Linear.load(
            self.stored,
            self.weight_format,
            [load_lora(self.stored, self.streams)] if self.rank else [],
            place=self.place,
            fused=self.fused,
            padding=self.padding,
            parts=self.parts,
            hold=hold,
        )


def plan_layers(
    source: TensorSource,
    device: torch.device,
    dtype: torch.dtype,
    *,
    weight_format: str = PlainWeight.name,
    fused: bool = False,
    latent_lora: bool = False,
) -> dict[str, LayerPlan]:
    """The plan of each layer of the transformer, by name. No weights are read.

    Args:
        source: the bundle.
        device, dtype: the device and dtype of the computation.
        weight_format: the format of the blocks' layers that are stored plainly. Layers that it can't hold are held in the
            plain format. All other layers are held in the format in which they are stored.
        fused: norms write the extra columns, and residuals use them, in the same pass, see `WeightFormat.rides`.
        latent_lora: the LoRA acts on the image rows too, and on the text rows in blocks where text and image are one
            sequence.

    Raises:
        ConfigError: there is no such format.
        CheckpointError: stored numbers or scales are not finite.
    """
    config, ranks, scratch = source.config.transformer, source.lora_ranks(), Scratch()
    preferred = format_named(weight_format)
    rest = frozenset({"condition", "image"}) if latent_lora else frozenset({"condition"})
    everything = rest | {"text"} if latent_lora else rest

    def stored_layer(stacked: Stacked) -> StoredLayer:
        names = tuple(f"transformer.{s}" for s in stacked.sources)
        return StoredLayer(source, names, device, dtype, scratch, kernels=fused)

    plans: dict[str, LayerPlan] = {}
    for name in ("x_embedder", "proj_out"):
        stored = stored_layer(Stacked((name,)))
        plans[name] = LayerPlan(stored, ranks.get(name, 0), rest, PlainWeight, Place.ALONE, fused)
    for name, stacked in schema.in_blocks(config, schema.DOUBLE_STACKED, schema.SINGLE_STACKED):
        block, _, leaf = name.rpartition(".")
        stored = stored_layer(stacked)
        plan = LayerPlan(
            stored=stored,
            rank=sum(ranks.get(s, 0) for s in stacked.sources),
            streams=everything if block.startswith("single") else rest,
            weight_format=_format_of(stored, preferred),
            place=PLACES.get(leaf, Place.ALONE),
            fused=fused,
            parts=parts_of(leaf, config, last=block == f"single_blocks.{config.num_single_layers - 1}"),
        )
        if leaf in AS_WIDE_AS:
            beside = plans[f"{block}.{AS_WIDE_AS[leaf]}"]
            if beside.rides:
                plan = replace(plan, padding=padded_rank(beside.rank))
        plans[name] = plan
    return plans


def load_transformer(
    source: TensorSource,
    device: torch.device,
    dtype: torch.dtype,
    *,
    weight_format: str = PlainWeight.name,
    fused: bool = False,
    latent_lora: bool = False,
    stream: MakeStream | None = None,
) -> Transformer:
    """The transformer of a bundle, without the layers that no step needs (modulation, text embedder).

    Args:
        source, device, dtype, weight_format, fused, latent_lora: see `plan_layers`.
        stream: makes the stream for the weights of some sublayers; None keeps all weights in memory.

    Raises:
        ConfigError: there is no such format.
    """
    config = source.config.transformer
    plans = plan_layers(source, device, dtype, weight_format=weight_format, fused=fused, latent_lora=latent_lora)
    streaming = None if stream is None else stream([[plans[n] for n in names] for names in sublayers(config)])
    holders: dict[str, Hold] = {}
    if streaming is not None:
        for place in streaming.numbers:
            names = sublayers(config)[place]
            holders |= {name: partial(streaming.hold, place, leaf) for leaf, name in enumerate(names)}

    # The largest weights are loaded first. A weight may be in memory twice while it is brought into its format, which
    # matters most at the end, when all others are loaded.
    loaded: dict[str, Linear] = {}
    for name, plan in sorted(plans.items(), key=lambda item: -math.prod(item[1].stored.shape)):
        loaded[name] = plan.load(holders.get(name))
    norms = {
        name: source.load([f"transformer.{s}.weight" for s in stacked.sources], device, dtype).view(
            -1, 2, config.attention_head_dim
        )
        for name, stacked in schema.in_blocks(config, schema.DOUBLE_NORM_STACKED, schema.SINGLE_NORM_STACKED)
    }

    count = config.num_single_layers
    return Transformer(
        config=config,
        x_embedder=loaded["x_embedder"],
        blocks=[
            DoubleBlock(
                norm_qk=norms[f"blocks.{i}.norm_qk"],
                **{leaf: loaded[f"blocks.{i}.{leaf}"] for leaf in schema.DOUBLE_STACKED},
            )
            for i in range(config.num_layers)
        ],
        single_blocks=[
            SingleBlock(
                norm_qk=norms[f"single_blocks.{i}.norm_qk"],
                **{leaf: loaded[f"single_blocks.{i}.{leaf}"] for leaf in schema.SINGLE_STACKED},
                columns=Columns.of(config),
                last=i == count - 1,
            )
            for i in range(count)
        ],
        proj_out=loaded["proj_out"],
        stream=streaming,
    )


def _format_of(stored: StoredLayer, preferred: type[WeightFormat]) -> type[WeightFormat]:
    """The format that a layer is held in: the one that it is stored in, or, of a plain one, the preferred."""
    if stored.storage is not None:
        return format_named(stored.storage.name)
    takes = preferred.takes(stored.shape, stored.device, stored.dtype) and not issubclass(preferred, QuantisedWeight)
    return preferred if takes else PlainWeight


def load_lora(stored: StoredLayer, streams: frozenset[str]) -> LowRankBranch:
    """The LoRA of stored layers that are stacked into one: A side by side [in, R], B block-diagonal [R, out].

    In memory both are transposed, [R, in] and [out, R], as in files (and are views of the file if nothing needs
    stacking). MKL multiplies matrices of few columns in a fifth of the time in this layout.

    Args:
        stored: the layers that the LoRA belongs to.
        streams: the streams that it acts on.
    """
    layers = [name.partition(".")[2] for name in stored.names]
    downs, ups = (
        [stored.source.load([f"lora.{layer}.lora_{x}.weight"], stored.device, stored.dtype) for layer in layers]
        for x in "AB"
    )
    down, up = (downs[0], ups[0]) if len(layers) == 1 else (torch.cat(downs), torch.block_diag(*ups))
    return LowRankBranch(down.t(), up.t(), streams)


def load_context_embedder(source: TensorSource, device: torch.device, dtype: torch.dtype) -> nn.Linear:
    """The layer that embeds prompts. It is used once per run, before the loop."""
    weight, bias = (source.load([f"transformer.context_embedder.{kind}"], device, dtype) for kind in ("weight", "bias"))
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    assign(layer, "weight", weight)
    assign(layer, "bias", bias)
    return layer.eval()


def load_mogle(
    source: TensorSource, device: torch.device, dtype: torch.dtype, *, weight_is_scale: bool
) -> MixtureOfExperts:
    """The experts and the gate of a bundle."""
    config = source.config.mogle
    model = MixtureOfExperts(config, weight_is_scale=weight_is_scale)
    if config.has_expert:
        for parameter, layer in (("expert_in", "net.0"), ("expert_out", "net.2")):
            weight = source.load([f"mogle.{e}.{layer}.weight" for e in EXPERT_NAMES], device, dtype)
            bias = source.load([f"mogle.{e}.{layer}.bias" for e in EXPERT_NAMES], device, dtype)
            assign(model, parameter, weight.view(NUM_EXPERTS, -1, weight.shape[-1]))
            assign(model, f"{parameter}_bias", bias.view(NUM_EXPERTS, -1))
    if config.has_gating:
        for layer, name in (
            ("time_in", "timestep_embedding.linear_1"),
            ("time_out", "timestep_embedding.linear_2"),
            ("noise_proj", "noise_proj"),
            ("gate_in", "gate.0"),
            ("gate_out", "gate.2"),
        ):
            for kind in ("weight", "bias"):
                assign(model, f"{layer}.{kind}", source.load([f"mogle.gating.{name}.{kind}"], device, dtype))
    return model.eval()
