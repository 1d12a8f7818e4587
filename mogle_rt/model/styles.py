"""LoRAs as styles on top of the model. They act on the rows that plain FLUX has, text and image, not on the condition.

A style is never merged into a weight. In a step, each adapted layer has one more low-rank branch, which holds all
active adapters next to one another. Its tensors have room for ranks up to a capacity. If adapters are exchanged and the
capacities stay the same, only the values in these tensors change and not their addresses, so a captured graph can still
be used. Layers that are used once per run (modulations and embedders) apply each adapter separately.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from mogle_rt.bundle import schema
from mogle_rt.bundle.schema import Stacked
from mogle_rt.config import TransformerConfig
from mogle_rt.conversion.lora import LowRank
from mogle_rt.errors import InputError
from mogle_rt.linear.branches import LowRankBranch
from mogle_rt.linear.layer import Linear
from mogle_rt.model.transformer import Transformer

SMALLEST_CAPACITY = 8
MOST_RANK = 1024  # the limit on the sum of all active adapters' ranks in one layer
STREAMS = frozenset({"text", "image"})

Shape = tuple[tuple[str, int], ...]  # the stored layers that have a branch in the steps, each with its capacity


def capacity_for(rank: int) -> int:
    """The capacity for a rank: the smallest of 0, 8, 16, 32, 64, … (doubling) that is enough."""
    return 0 if rank == 0 else max(SMALLEST_CAPACITY, 1 << (rank - 1).bit_length())


@dataclass
class StyledTransformer(Transformer):
    """The model's own weights, with a branch for styles beside each adapted layer.

    Attributes:
        branches: the branches for styles, by name of the runtime layer.
        version: the `Styles.version` that the branches hold; -1 before they are filled.
    """

    branches: dict[str, LowRankBranch] = field(default_factory=dict)
    version: int = -1


class Styles:
    """The loaded adapters, which of them are active, and with what weights.

    Args:
        config: the transformer's config.

    Attributes:
        version: 0 while no adapter acts, otherwise a number that is different for every state of the styles.
        shape: the layers of the steps that have a branch, with its capacity; () if there are none.
    """

    def __init__(self, config: TransformerConfig) -> None:
        alone = {name: Stacked((name,)) for name in ("x_embedder", "proj_out")}
        self._stacked = alone | dict(schema.in_blocks(config, schema.DOUBLE_STACKED, schema.SINGLE_STACKED))
        self._rows = {
            name.removesuffix(".weight"): shape[0]
            for name, shape in schema.transformer_tensors(config).items()
            if len(shape) == 2
        }
        self._adapters: dict[str, Mapping[str, LowRank]] = {}
        self._active: dict[str, float] = {}
        self._changes = self.version = 0
        self.shape: Shape = ()
        self._made: WeakValueDictionary[Shape, StyledTransformer] = WeakValueDictionary()

    @property
    def names(self) -> list[str]:
        """All loaded adapters, in the order in which they were loaded."""
        return list(self._adapters)

    @property
    def active(self) -> dict[str, float]:
        """The active adapters and their weights."""
        return dict(self._active)

    def load(self, name: str, branches: Mapping[str, LowRank], weight: float = 1.0) -> None:
        """Add an adapter. It acts from the next run on, together with those that are already active.

        Args:
            branches: the low-rank branches by stored layer, see `mogle_rt.conversion.lora.read_adapter`.

        Raises:
            InputError: the name is taken, the weight is not finite, or the ranks add up to more than `MOST_RANK`.
        """
        if name in self._adapters:
            raise InputError(f"adapter {name!r} is loaded already; unload it first, or give this one another name")
        adapters = self._adapters | {name: branches}
        self._activate(self._active | {name: _weight(weight)}, adapters)
        self._adapters = adapters

    def activate(self, names: Sequence[str], weights: Sequence[float]) -> None:
        """Activate these adapters with these weights, and deactivate all others.

        Raises:
            InputError: a name is unknown or given twice, the numbers of names and weights differ, a weight is not
                finite, or the ranks in a layer add up to more than `MOST_RANK`.
        """
        self._check_known(names)
        if len(set(names)) != len(names):
            raise InputError(f"every adapter can be named once, got {list(names)}")
        if len(weights) != len(names):
            raise InputError(f"{len(names)} adapters need as many weights (or one for all), got {len(weights)}")
        self._activate(dict(zip(names, map(_weight, weights), strict=True)), self._adapters)

    def remove(self, names: Sequence[str]) -> None:
        """Remove these adapters.

        Raises:
            InputError: a name is unknown.
        """
        self._check_known(names)
        adapters = {name: branches for name, branches in self._adapters.items() if name not in names}
        self._activate({name: weight for name, weight in self._active.items() if name in adapters}, adapters)
        self._adapters = adapters

    def _check_known(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self._adapters:
                loaded = ", ".join(map(repr, self._adapters)) or "none"
                raise InputError(f"there is no adapter {name!r}; loaded are: {loaded}")

    def _activate(self, active: dict[str, float], adapters: Mapping[str, Mapping[str, LowRank]]) -> None:
        ranks: dict[str, int] = {}
        for name, weight in active.items():
            for layer, branch in adapters[name].items() if weight else ():
                ranks[layer] = ranks.get(layer, 0) + len(branch.down)
        for layer, rank in ranks.items():
            if rank > MOST_RANK:
                raise InputError(
                    f"the active adapters' ranks in layer {layer!r} add up to {rank}, at most {MOST_RANK} are possible; "
                    "activate fewer adapters"
                )
        if list(active.items()) == list(self._active.items()):
            return
        self._active = active
        self._changes += 1
        self.version = self._changes if ranks else 0
        in_steps = [source for stacked in self._stacked.values() for source in stacked.sources]
        self.shape = tuple((layer, capacity_for(ranks[layer])) for layer in in_steps if layer in ranks)

    def _of(self, layer: str) -> Iterator[tuple[Tensor, Tensor]]:
        """A [R, in] and B [out, R] of each adapter that acts on a stored layer. B is times the adapter's weight."""
        for name, weight in self._active.items():
            branch = self._adapters[name].get(layer)
            if branch is not None and weight:
                yield branch.down, branch.up.to(torch.float32) * weight

    def change(self, layer: str, x: Tensor) -> Tensor | None:
        """What the active adapters add to the output of a stored layer that is used once per run.

        Args:
            layer: its name, such as "norm_out.linear". x: its input [..., in].

        Returns:
            [..., out] in the dtype of x, or None if no adapter acts on the layer.
        """
        total: Tensor | None = None
        for down, up in self._of(layer):
            change = x @ down.to(x).t() @ up.to(x).t()
            total = change if total is None else total + change
        return total

    def acts_within(self, prefix: str) -> bool:
        """Whether an active adapter acts on a stored layer whose name begins with ``prefix``."""
        return any(
            layer.startswith(prefix)
            for name, weight in self._active.items()
            for layer in (self._adapters[name] if weight else ())
        )

    def beside(self, transformer: Transformer) -> Transformer:
        """The transformer with branches of the present `shape`, which `fill` fills. Without branches, ``transformer``.

        As long as the result is referenced somewhere, the same object is returned for the same shape.
        """
        if not self.shape:
            return transformer
        made = self._made.get(self.shape)
        if made is None:
            made = self._made[self.shape] = self._styled(transformer)
        return made

    def forget_layers(self) -> None:
        """Drop the transformers that `beside` made, because the transformer itself is about to be loaded again."""
        self._made.clear()

    def _styled(self, base: Transformer) -> StyledTransformer:
        like, capacities = base.proj_out.bias, dict(self.shape)
        branches: dict[str, LowRankBranch] = {}

        def styled(name: str, layer: Linear) -> Linear:
            sources = self._stacked[name].sources
            rank = sum(capacities.get(source, 0) for source in sources)
            if not rank:
                return layer
            inner = layer.in_columns - (0 if layer.before is None else layer.before.rank)
            # In memory both are transposed, like the model's own LoRA, see `mogle_rt.model.loading.load_lora`.
            up = like.new_zeros(sum(self._rows[source] for source in sources), rank)
            branches[name] = LowRankBranch(like.new_zeros(rank, inner).t(), up.t(), STREAMS)
            return Linear(
                layer.weight, layer.bias, [*layer.branches, branches[name]], before=layer.before, after=layer.after
            )

        def block(name: str, own: Any) -> Any:
            layers = {leaf: layer for leaf, layer in vars(own).items() if isinstance(layer, Linear)}
            return replace(own, **{leaf: styled(f"{name}.{leaf}", layer) for leaf, layer in layers.items()})

        return StyledTransformer(
            config=base.config,
            x_embedder=styled("x_embedder", base.x_embedder),
            blocks=[block(f"blocks.{i}", own) for i, own in enumerate(base.blocks)],
            single_blocks=[block(f"single_blocks.{i}", own) for i, own in enumerate(base.single_blocks)],
            proj_out=styled("proj_out", base.proj_out),
            stream=base.stream,
            branches=branches,
        )

    def fill(self, transformer: Transformer) -> None:
        """Write the active adapters into the branches of a transformer that `beside` made for the present shape."""
        if not isinstance(transformer, StyledTransformer) or transformer.version == self.version:
            return
        capacities = dict(self.shape)
        for name, branch in transformer.branches.items():
            down, up = branch.down.t().zero_(), branch.up.t().zero_()
            rank = row = 0
            for source in self._stacked[name].sources:
                at, rows = rank, slice(row, row + self._rows[source])
                for a, b in self._of(source):
                    down[at : at + len(a)] = a.to(down)
                    up[rows, at : at + len(a)] = b.to(up)
                    at += len(a)
                rank, row = rank + capacities.get(source, 0), rows.stop
        transformer.version = self.version


def _weight(value: float) -> float:
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if not math.isfinite(weight):
        raise InputError(f"an adapter's weight must be a finite number, got {value!r}")
    return weight
