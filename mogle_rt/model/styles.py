"""LoRAs as styles on top of the model: they act on the rows that plain FLUX has, text and image, never on the condition's.

A style is never merged into a weight. In a step it is one more low-rank branch of each layer that it adapts, in which
all active adapters stand beside one another: A stacked, B block by block. The branch's tensors have room for ranks up to
a capacity, and stay where they are while adapters of the same capacity are exchanged, so that a captured graph goes on
working: only the numbers in them change. Layers that are used once a run (modulations and embedders) take the adapters
as they are.
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
MOST_RANK = 1024  # of all active adapters together, in any one layer
STREAMS = frozenset({"text", "image"})

Shape = tuple[tuple[str, int], ...]  # the stored layers that the steps' branches belong to, each with its capacity


def capacity_for(rank: int) -> int:
    """The room that a rank gets: 0, 8, 16, 32, 64 and so on, doubling."""
    return 0 if rank == 0 else max(SMALLEST_CAPACITY, 1 << (rank - 1).bit_length())


@dataclass
class StyledTransformer(Transformer):
    """The model's own weights, with a style's branch beside each layer that is adapted.

    Attributes:
        branches: the style's, by the runtime layer.
        version: of the styles that the branches hold, see `Styles.version`; -1 before they hold any.
    """

    branches: dict[str, LowRankBranch] = field(default_factory=dict)
    version: int = -1


class Styles:
    """The adapters that are loaded, and which of them act, how strongly.

    Args:
        config: of the transformer.

    Attributes:
        version: 0 while no adapter acts, otherwise a number that no other state of the styles had.
        shape: which layers of the steps have a branch, of which capacity; () if none has.
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
        """The active adapters with their weights."""
        return dict(self._active)

    def load(self, name: str, branches: Mapping[str, LowRank], weight: float = 1.0) -> None:
        """Add an adapter, which acts from the next run on, beside those that are active already.

        Args:
            branches: by stored layer, see `mogle_rt.conversion.lora.read_adapter`.

        Raises:
            InputError: the name is taken, the weight is no finite number, or the ranks add up to more than `MOST_RANK`.
        """
        if name in self._adapters:
            raise InputError(f"adapter {name!r} is loaded already; unload it first, or give this one another name")
        adapters = self._adapters | {name: branches}
        self._activate(self._active | {name: _weight(weight)}, adapters)
        self._adapters = adapters

    def activate(self, names: Sequence[str], weights: Sequence[float]) -> None:
        """Let these adapters act, with these weights, and no others.

        Raises:
            InputError: a name is unknown or there twice, a weight is no finite number, or the ranks add up to more than
                `MOST_RANK`.
        """
        self._check_known(names)
        if len(set(names)) != len(names):
            raise InputError(f"every adapter can be named once, got {list(names)}")
        if len(weights) != len(names):
            raise InputError(f"{len(names)} adapters need as many weights (or one for all), got {len(weights)}")
        self._activate(dict(zip(names, map(_weight, weights), strict=True)), self._adapters)

    def remove(self, names: Sequence[str]) -> None:
        """Forget these adapters.

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
        """A [R, in] and B [out, R] of each adapter that acts on a stored layer; B with the adapter's weight."""
        for name, weight in self._active.items():
            branch = self._adapters[name].get(layer)
            if branch is not None and weight:
                yield branch.down, branch.up.to(torch.float32) * weight

    def change(self, layer: str, x: Tensor) -> Tensor | None:
        """What the active adapters add to the output of a stored layer that is used once a run; None for nothing.

        Args:
            layer: as "norm_out.linear". x: its input [..., in].

        Returns:
            [..., out] in x's dtype.
        """
        total: Tensor | None = None
        for down, up in self._of(layer):
            change = x @ down.to(x).t() @ up.to(x).t()
            total = change if total is None else total + change
        return total

    def acts_within(self, prefix: str) -> bool:
        """Whether an active adapter acts on a stored layer whose name begins so."""
        return any(
            layer.startswith(prefix)
            for name, weight in self._active.items()
            for layer in (self._adapters[name] if weight else ())
        )

    def beside(self, transformer: Transformer) -> Transformer:
        """The transformer with branches of the present shape, to be filled by `fill`; itself where there are none.

        As long as anything holds the result, the same one is returned for the same shape.
        """
        if not self.shape:
            return transformer
        made = self._made.get(self.shape)
        if made is None:
            made = self._made[self.shape] = self._styled(transformer)
        return made

    def _styled(self, base: Transformer) -> StyledTransformer:
        like, capacities = base.proj_out.bias, dict(self.shape)
        branches: dict[str, LowRankBranch] = {}

        def styled(name: str, layer: Linear) -> Linear:
            sources = self._stacked[name].sources
            rank = sum(capacities.get(source, 0) for source in sources)
            if not rank:
                return layer
            inner = layer.in_columns - (0 if layer.before is None else layer.before.rank)
            # Both lie transposed, as the model's own LoRA does, see `mogle_rt.model.loading.load_lora`.
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
            branches=branches,
        )

    def fill(self, transformer: Transformer) -> None:
        """Write the active adapters into a transformer's branches, which `beside` made for the present shape."""
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
