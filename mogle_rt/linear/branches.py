"""Low-rank branches: what stands beside a weight and adds x A B to some of the rows (LoRA, styles, an SVD branch).

Rows are named by the stream that they belong to, such as "text", "image" and "condition". A branch says which streams
it acts on; whoever multiplies says which streams the rows hold, and how many rows of each. So one branch serves every
layout of the rows, and which rows it acts on is data.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from mogle_rt.kernels.inputs import padded_rank

Streams = tuple[tuple[str, int], ...]  # the rows of an activation, in order: names and numbers of positions


@dataclass(frozen=True, eq=False)  # a branch is itself alone: tensors have no one answer to ==
class LowRankBranch:
    """y += x A B, for the rows of some streams.

    Attributes:
        down: A, [in, R]. up: B, [R, out]. (LoRA files hold their transposes.)
        streams: names of the streams that the branch acts on.
    """

    down: Tensor
    up: Tensor
    streams: Set[str]

    @property
    def rank(self) -> int:
        """R."""
        return self.down.shape[1]

    def spans(self, streams: Streams) -> list[slice]:
        """The positions that the branch acts on, as few slices as possible, in order."""
        spans: list[slice] = []
        position = 0
        for name, count in streams:
            if name in self.streams and count:
                if spans and spans[-1].stop == position:
                    spans[-1] = slice(spans[-1].start, position + count)
                else:
                    spans.append(slice(position, position + count))
            position += count
        return spans

    def tail_from(self, streams: Streams) -> int:
        """The first position that the branch acts on, if it acts on all that follow; their number if it acts on none.

        Raises:
            ValueError: the branch acts on rows that are not the last ones.
        """
        total, spans = sum(count for _, count in streams), self.spans(streams)
        if len(spans) > 1 or (spans and spans[0].stop != total):
            names = ", ".join(name for name, _ in streams)
            raise ValueError(
                f"a branch on {', '.join(sorted(self.streams))} can't ride along: of the rows ({names}) it must act on "
                f"the last ones"
            )
        return spans[0].start if spans else total

    def filled(self, *, contiguous: bool) -> LowRankBranch:
        """The same with its rank filled up to a multiple of `mogle_rt.kernels.inputs.RANK_STEP`.

        Args:
            contiguous: A and B lie row by row in memory, as fused kernels ask. Otherwise their transposes do, as in a
                file, and as MKL multiplies a handful of columns fastest.
        """
        more = padded_rank(self.rank) - self.rank
        down, up = F.pad(self.down.t(), (0, 0, 0, more)).t(), F.pad(self.up.t(), (0, more)).t()
        if contiguous:
            down, up = down.contiguous(), up.contiguous()
        return LowRankBranch(down, up, self.streams)
