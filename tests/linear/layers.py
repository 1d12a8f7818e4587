"""Random layers for tests: a source of tensors in memory, a layer that is loaded from it, and its result in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from mogle_rt.bundle.container import TensorInfo
from mogle_rt.bundle.source import TensorSource
from mogle_rt.bundle.storage import WeightStorage
from mogle_rt.cost.job import FLUX_BUNDLE
from mogle_rt.linear.branches import LowRankBranch, Streams
from mogle_rt.linear.contract import Place, StoredLayer, WeightFormat
from mogle_rt.linear.layer import Linear, Product

CPU = torch.device("cpu")
KERNELS = False  # whether layers are loaded for a step of fused kernels


class Held(TensorSource):
    """A source of tensors in memory, which notes which of them were released."""

    def __init__(self, tensors: Mapping[str, Tensor], storages: Mapping[str, WeightStorage] | None = None) -> None:
        infos = {name: TensorInfo(t.dtype, tuple(t.shape), 0, t.nbytes) for name, t in tensors.items()}
        super().__init__(FLUX_BUNDLE, infos, storages)
        self._held, self.released = tensors, list[str]()

    def load(self, names: Sequence[str], device: torch.device, dtype: torch.dtype | None) -> Tensor:
        return torch.cat([self._held[name] for name in names]).to(device, dtype)

    def release(self, names: Sequence[str]) -> None:
        self.released += names


@dataclass
class RandomLayer:
    """A layer of random numbers, which is loaded from two stored ones.

    Attributes:
        inner, outer: columns of its input and output.
        branches: ranks and streams of its branches.
    """

    inner: int
    outer: int
    branches: Sequence[tuple[int, str]] = ()
    seed: int = 0
    source: Held = field(init=False)

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g) * 0.3

        first = self.outer // 3
        self.weight, self.bias = draw(self.outer, self.inner), draw(self.outer)
        self.low_rank = [
            LowRankBranch(draw(rank, self.inner).t(), draw(self.outer, rank).t(), frozenset(streams.split()))
            for rank, streams in self.branches
        ]
        tensors: dict[str, Tensor] = {}
        for kind, whole in (("weight", self.weight), ("bias", self.bias)):
            tensors |= {f"a.{kind}": whole[:first].clone(), f"b.{kind}": whole[first:].clone()}
        self.source = Held(tensors)

    def load(
        self,
        weight_format: type[WeightFormat],
        place: Place = Place.ALONE,
        parts: tuple[slice, ...] = (slice(None),),
        *,
        fused: bool = False,
        padding: int = 0,
    ) -> Linear:
        stored = StoredLayer(self.source, ("a", "b"), CPU, torch.float32, kernels=KERNELS)
        branches = self.low_rank
        return Linear.load(stored, weight_format, branches, place=place, fused=fused, padding=padding, parts=parts)

    def exact(self, x: Tensor, streams: Streams, batch: int, *, gelu: bool = False) -> Tensor:
        """The layer's result in float64. x: [l * B, in]."""
        x = x.double()
        y = F.linear(x, self.weight.double(), self.bias.double())
        names = [name for name, count in streams for _ in range(count * batch)]
        for branch in self.low_rank:
            acts = torch.tensor([name in branch.streams for name in names], dtype=torch.bool)
            y[acts] += x[acts] @ branch.down.double() @ branch.up.double()
        return F.gelu(y, approximate="tanh") if gelu else y


def run(
    layer: Linear,
    x: Tensor,
    streams: Streams,
    batch: int,
    *,
    columns: slice = slice(None),
    split: tuple[int, ...] | None = None,
    gelu: bool = False,
    stays: bool = True,
) -> tuple[Tensor, Tensor]:
    """Call the layer's product twice, as steps do. Returns its result, and the buffer that was given for it.

    In a step, a norm writes the further columns of the input, and a residual reads those of the output. Both are
    computed here.
    """
    inner = x.shape[1]
    down, start = layer.before_it(streams)
    x = torch.cat([x, torch.zeros(len(x), layer.in_columns - inner)], dim=1)
    if down is not None:
        x[start * batch :, inner:] = x[start * batch :, :inner] @ down
    width = len(range(*columns.indices(layer.out_columns)))
    out = torch.full((len(x) // batch, batch, width), torch.nan)
    scratch = torch.full_like(out, torch.nan) if gelu else None
    product = Product(layer, out, streams, columns=columns, split=split, gelu_scratch=scratch, stays=stays)
    inputs = x.split(split, dim=1) if split else (x,)
    product(*inputs)
    y = product(*inputs)
    up, start = layer.after_it(streams)
    if up is None:
        return y, out
    y = y.clone()
    y[start * batch :, : up.shape[1]] += y[start * batch :, up.shape[1] :] @ up
    return y[:, : up.shape[1]], out
