"""A linear layer: a weight in some format, a bias, and low-rank branches beside the weight.

One product with the weight serves all rows. A branch adds x A B to the rows of some streams, in one of two ways. Either
it is computed in extra columns of the product's input or output: the weight is extended for it when it is loaded, and
if fused kernels write or use these columns, the branch needs no separate pass over memory. Or it is two small products
over its own rows, added in place. At most one branch uses extra columns; all others, including those that are added
later, are added in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from mogle_rt.linear.branches import LowRankBranch, Streams
from mogle_rt.linear.contract import Further, Multiply, Place, StoredLayer, WeightFormat
from mogle_rt.linear.views import flat
from mogle_rt.ops.gelu import gelu

Hold = Callable[[StoredLayer, Further], WeightFormat]


class Linear:
    """y = x Wᵀ + b for every row, plus x A B for the rows of each branch.

    Args:
        weight: W, extended if a branch uses extra columns.
        bias: [out_columns].
        branches: the branches that are added in place.
        before: the branch computed in extra columns of the input, or None. after: the same for the output.
    """

    def __init__(
        self,
        weight: WeightFormat,
        bias: Tensor,
        branches: Iterable[LowRankBranch] = (),
        *,
        before: LowRankBranch | None = None,
        after: LowRankBranch | None = None,
    ) -> None:
        self.weight, self.bias, self.branches = weight, bias, list(branches)
        self.before, self.after = before, after

    @classmethod
    def load(
        cls,
        stored: StoredLayer,
        weight_format: type[WeightFormat],
        branches: Sequence[LowRankBranch] = (),
        *,
        place: Place = Place.ALONE,
        fused: bool = False,
        padding: int = 0,
        parts: tuple[slice, ...] = (slice(None),),
        hold: Hold | None = None,
    ) -> Linear:
        """Read a layer and bring its weight into the format right away.

        Args:
            stored: where its weight and bias are stored.
            branches: the first is computed in extra columns if `WeightFormat.rides` says so.
            place, fused: see `WeightFormat.rides`.
            padding: the number of extra output columns that are filled with zeros. It is needed if another layer's
                output has that many extra columns and shares the buffer: cuBLAS adds the bias in its epilogue only if
                there are no gaps between the rows.
            parts: see `WeightFormat.load`.
            hold: makes the weight instead of ``weight_format``, for a weight that is streamed.
        """
        before = after = None
        if branches and weight_format.rides(place, branches[0].rank, fused=fused):
            riding, *branches = branches
            riding = riding.filled(contiguous=fused)
            before, after = (riding, None) if place is Place.AFTER_NORM else (None, riding)
        columns = None if before is None else before.up.t()
        rows = None if after is None else after.down.t()
        bias = stored.load("bias")
        if padding:
            rows = bias.new_zeros(padding, stored.shape[1])
        if rows is not None:
            bias = torch.cat([bias, bias.new_zeros(len(rows))])
        further = Further(columns, rows)
        weight = weight_format.load(stored, further, parts) if hold is None else hold(stored, further)
        return cls(weight, bias, branches, before=before, after=after)

    @property
    def in_columns(self) -> int:
        """The number of input columns, including a branch's extra columns."""
        return self.weight.shape[1]

    @property
    def out_columns(self) -> int:
        """The number of output columns, including extra columns."""
        return self.weight.shape[0]

    def _idle(self, branch: LowRankBranch | None, streams: Streams) -> bool:
        """Whether a branch's extra columns are left out, because a stream that it acts on is there without rows.

        (If the stream isn't named at all, they are computed and not used.)
        """
        without_rows = {name for name, count in streams if not count}
        if branch is None or not self.weight.narrows or not branch.streams & without_rows:
            return False
        return not branch.spans(streams)

    def in_columns_of(self, streams: Streams) -> int:
        """The number of input columns that a product for these streams needs."""
        return self.in_columns - (self.before.rank if self.before and self._idle(self.before, streams) else 0)

    def out_columns_of(self, streams: Streams) -> int:
        """The number of output columns that a product for these streams computes."""
        return self.out_columns - (self.after.rank if self.after and self._idle(self.after, streams) else 0)

    @property
    def nbytes(self) -> int:
        """Bytes held: weight, bias and branches."""
        riding = [b for b in (self.before, self.after) if b is not None]
        low_rank = sum(t.nbytes for b in (*self.branches, *riding) for t in (b.down, b.up))
        return self.weight.nbytes + self.bias.nbytes + low_rank

    def before_it(self, streams: Streams) -> tuple[Tensor | None, int]:
        """A, to compute the extra input columns, and the first position that needs them.

        Returns (None, 0) if there are no extra input columns.

        Args:
            streams: the streams of all rows of the input.
        """
        if self.before is None or self._idle(self.before, streams):
            return None, 0
        return self.before.down, self.before.tail_from(streams)

    def after_it(self, streams: Streams) -> tuple[Tensor | None, int]:
        """B, to use the extra output columns, and the first position that it applies to.

        Returns (None, 0) if no branch uses extra output columns.

        Args:
            streams: the streams of all rows of the output.
        """
        if self.after is None or self._idle(self.after, streams):
            return None, 0
        return self.after.up, self.after.tail_from(streams)


class _Added:
    """A branch that is added in place, for inputs of one shape.

    Args:
        rows: the rows that it acts on. downs: A, split into one part for each input. up: B, [R, columns].
        out: where the result usually is; views of it are made once.
    """

    def __init__(self, rows: list[slice], downs: list[Tensor], up: Tensor, out: Tensor) -> None:
        self._rows, self._downs, self._up, self._out = rows, downs, up, out
        self._parts = self._parts_of(out)

    def _parts_of(self, y: Tensor) -> list[Tensor]:
        return [y[rows, : self._up.shape[1]] for rows in self._rows]

    def __call__(self, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        parts = self._parts if y is self._out else self._parts_of(y)
        for rows, part in zip(self._rows, parts, strict=True):
            low = torch.mm(inputs[0][rows], self._downs[0])
            for x, down in zip(inputs[1:], self._downs[1:], strict=True):
                low.addmm_(x[rows], down)
            part.addmm_(low, self._up)


class Product:
    """A layer for inputs of one shape, with its output buffer. Everything that depends on shapes is prepared once.

    Args:
        layer: its weight and branches are taken as they are now.
        out: [l, B, out_columns or fewer].
        streams: the streams of the l positions.
        columns: which columns of the layer's output to compute: all of them if a branch uses extra output columns. (If
            ``out`` has room for fewer, the extra ones are left out.)
        split: widths of the inputs that stand side by side; by default there is one input.
        gelu_scratch: if given, GELU (tanh form) is applied to the result, with this scratch memory of out's shape.
        stays: the result must be in ``out``. If False, it may be in memory that a library allocated.
    """

    def __init__(
        self,
        layer: Linear,
        out: Tensor,
        streams: Streams,
        *,
        columns: slice = slice(None),
        split: tuple[int, ...] | None = None,
        gelu_scratch: Tensor | None = None,
        stays: bool = True,
    ) -> None:
        assert sum(count for _, count in streams) == len(out), f"{streams} are not {len(out)} positions"
        self._out, self._stays, batch = flat(out), stays, out.shape[1]
        if columns == slice(None) and out.shape[2] < layer.out_columns:
            columns = slice(out.shape[2])
        self._added: list[_Added] = []
        for branch in layer.branches:
            if spans := branch.spans(streams):
                rows = [slice(span.start * batch, span.stop * batch) for span in spans]
                downs = list(branch.down.split(split)) if split else [branch.down]
                self._added.append(_Added(rows, downs, branch.up[:, columns], self._out))
        # The number of input columns without the extra ones of a branch.
        self._narrowed = None if layer.before is None else len(layer.before.down)
        self._multiply: Multiply
        self._multiply, gelu_done = layer.weight.product(
            self._out,
            layer.bias[columns],
            columns=columns,
            widths=split or (layer.in_columns_of(streams),),
            gelu=gelu_scratch is not None and not self._added,  # GELU comes after the branches
        )
        self._scratch = None if gelu_scratch is None or gelu_done else flat(gelu_scratch)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """inputs: [l * B, …]. Returns [l * B, columns]: ``out``, or possibly other memory if ``stays`` is False."""
        y = self._multiply(*inputs)
        if self._stays and self._scratch is None and y is not self._out:
            y = self._out.copy_(y)
        if self._added:
            if self._narrowed is not None:
                inputs = tuple(x[:, : self._narrowed] for x in inputs)
            for add in self._added:
                add(inputs, y)
        return y if self._scratch is None else gelu(y, self._scratch, self._out if self._stays else y)
