"""Low-rank branches beside a weight, which add x A B to some of the rows (LoRA, styles, an SVD branch).

Rows are named by the stream that they belong to, such as "text", "image" and "condition". A branch names the streams
that it acts on. The caller of a product names the streams that its rows belong to, with the number of rows of each. So
one branch serves every layout of the rows.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from mogle_rt.kernels.inputs import padded_rank

Streams = tuple[tuple[str, int], ...]  # the rows of an activation, in order: stream names and numbers of positions


@dataclass(frozen=True, eq=False)  # compared by identity, because == of tensors is not a single bool
class LowRankBranch:
    """y += x A B for the rows of some streams.

    Attributes:
        down: A, [in, R]. up: B, [R, out]. (LoRA files hold the transposes of both.)
        streams: names of the streams that the branch acts on.
    """

    down: Tensor
    up: Tensor
    streams: Set[str]

    @property
    def rank(self) -> int:
        """R, the rank."""
        return self.down.shape[1]

    def spans(self, streams: Streams) -> list[slice]:
        """The positions that the branch acts on, in order, as few slices as possible."""
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
        """The first position that the branch acts on, or the number of positions if it acts on none.

        Raises:
            ValueError: the positions that the branch acts on are not the last ones.
        """
        total, spans = sum(count for _, count in streams), self.spans(streams)
        if len(spans) > 1 or (spans and spans[0].stop != total):
            names = ", ".join(name for name, _ in streams)
            raise ValueError(
                f"a branch on {', '.join(sorted(self.streams))} can't be computed in extra columns: "
                f"of the rows ({names}) it must act on the last ones"
            )
        return spans[0].start if spans else total

    def filled(self, *, contiguous: bool) -> LowRankBranch:
        """The same branch, its rank padded with zeros to a multiple of `mogle_rt.kernels.inputs.RANK_STEP`.

        Args:
            contiguous: A and B are contiguous (row-major), as fused kernels require. Otherwise their transposes are, as
                in a file; MKL multiplies matrices of few columns fastest in this layout.
        """
        more = padded_rank(self.rank) - self.rank
        down, up = F.pad(self.down.t(), (0, 0, 0, more)).t(), F.pad(self.up.t(), (0, more)).t()
        if contiguous:
            down, up = down.contiguous(), up.contiguous()
        return LowRankBranch(down, up, self.streams)
