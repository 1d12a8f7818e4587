"""A layer's product on rows of one shape, into a buffer."""

from __future__ import annotations

import torch
from torch import Tensor

from mogle_rt.linear import onednn
from mogle_rt.linear.layers import Linear, LoraLinear, Ride
from mogle_rt.linear.views import flat
from mogle_rt.ops.gelu import gelu
from mogle_rt.torch_api.private import addmm_gelu


class Product:
    """A layer on rows of one shape, into a buffer. What shapes decide (which views, which rows) is worked out once.

    Args:
        layer: weights.
        out: [l, B, out_columns or fewer].
        lora_from: the first of the l rows with LoRA; for layers without LoRA it says nothing.
        columns: of the layer's output, those that are wanted (not where the branch rides in the output).
        split: widths of the inputs that stand side by side; by default there is one.
        gelu_scratch: the result goes through GELU (tanh form), for which this room, of out's shape, may be used.
        stays: the result is wanted in ``out``. Otherwise it may lie elsewhere, where a library brings its own memory.
    """

    def __init__(
        self,
        layer: Linear,
        out: Tensor,
        lora_from: int = 0,
        *,
        columns: slice = slice(None),
        split: tuple[int, ...] | None = None,
        gelu_scratch: Tensor | None = None,
        stays: bool = True,
    ) -> None:
        weight = layer.rows(columns)
        widths = split or (weight.shape[1],)
        self._bias, self._out, self._stays = layer.bias[columns].detach(), flat(out), stays
        by_onednn = len(widths) == 1 and onednn.serves(weight, len(self._out))
        self._for_onednn = weight if by_onednn else None
        self._weights = [] if by_onednn else [w.t() for w in weight.split(widths, dim=1)]
        self._scratch = None if gelu_scratch is None else flat(gelu_scratch)
        self._downs: list[Tensor] = []
        if isinstance(layer, LoraLinear) and layer.ride is Ride.NONE and lora_from < out.shape[0]:
            self._tail_from = lora_from * out.shape[1]
            self._tail = self._out[self._tail_from :]
            self._up = layer.lora_up[:, columns].detach()
            self._downs = list(layer.lora_down.detach().split(widths))
        # Where a library does GELU with the product, it is no pass of its own. It comes after the LoRA, if there is one.
        with_gelu = by_onednn or out.device.type in ("cuda", "meta")
        self._gelu_within = gelu_scratch is not None and with_gelu and not self._downs

    def __call__(self, *inputs: Tensor) -> Tensor:
        """inputs: [l * B, …]. Returns [l * B, columns]: ``out``, if it stays there, else that or memory of its own."""
        first, *others = inputs
        if self._for_onednn is not None:
            y = onednn.linear(first, self._for_onednn, self._bias, gelu=self._gelu_within)
        elif self._gelu_within:
            y = addmm_gelu(self._bias, first, self._weights[0], out=self._out)
        else:
            y = torch.addmm(self._bias, first, self._weights[0], out=self._out)
        for x, weight in zip(others, self._weights[1:], strict=True):
            y.addmm_(x, weight)
        scratch = None if self._gelu_within else self._scratch
        if self._stays and scratch is None and y is not self._out:
            y = self._out.copy_(y)
        if self._downs:
            low = torch.mm(first[self._tail_from :], self._downs[0])
            for x, down in zip(others, self._downs[1:], strict=True):
                low.addmm_(x[self._tail_from :], down)
            tail = self._tail if y is self._out else y[self._tail_from :]
            tail.addmm_(low, self._up)
        return y if scratch is None else gelu(y, scratch, self._out if self._stays else y)
