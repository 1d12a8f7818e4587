"""From a bundle to the runtime's modules: stacked layers filled from the stored ones, views of the file where possible."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mogle_rt.bundle import schema
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.bundle.schema import EXPERT_NAMES, Stacked
from mogle_rt.config import NUM_EXPERTS
from mogle_rt.linear.layers import Linear, LoraLinear, Ride
from mogle_rt.model.mixture import MixtureOfExperts
from mogle_rt.model.transformer import Transformer


@dataclass(frozen=True)
class LazyWeights:
    """Single tensors of a bundle, read when they are asked for; see `mogle_rt.model.modulation.Weights`."""

    bundle: Bundle
    device: torch.device
    dtype: torch.dtype

    def __call__(self, name: str) -> Tensor:
        return self.bundle.load([name], self.device, self.dtype)

    def release(self, name: str) -> None:
        self.bundle.release([name])


def assign(module: nn.Module, name: str, value: Tensor) -> None:
    """Put ``value`` in the place of a parameter of the same shape."""
    owner = module.get_submodule(name.rpartition(".")[0])
    leaf = name.rpartition(".")[2]
    expected = getattr(owner, leaf).shape
    assert value.shape == expected, f"{name}: {tuple(value.shape)} is not {tuple(expected)}"
    setattr(owner, leaf, nn.Parameter(value, requires_grad=False))


def load_transformer(bundle: Bundle, device: torch.device, dtype: torch.dtype, *, riding: bool = False) -> Transformer:
    """The transformer of a bundle, without the modulation layers (see `mogle_rt.model.modulation`).

    ``riding``: see `Transformer`. It costs a copy of the weights, which a GPU's are in any case.
    """
    config = bundle.config.transformer
    model = Transformer(config, bundle.lora_ranks(), riding=riding)

    def stack(names: Iterable[str]) -> Tensor:
        return bundle.load([f"transformer.{n}" for n in names], device, dtype)

    def fill(layer: str, stacked: Stacked) -> None:
        module = model.get_submodule(layer)
        weight, bias = (stack(f"{s}.{kind}" for s in stacked.sources) for kind in ("weight", "bias"))
        if isinstance(module, LoraLinear):
            down, up = load_lora(bundle, stacked.sources, device, dtype, rank=module.rank)
            if module.ride is not Ride.NONE:
                down, up = down.contiguous(), up.contiguous()  # kernels ask for it
            if module.ride is Ride.INPUT:
                weight = torch.cat([weight, up.t()], dim=1)
            elif module.ride is Ride.OUTPUT:
                weight, bias = torch.cat([weight, down.t()]), F.pad(bias, (0, module.rank))
            assign(model, f"{layer}.lora_down", down)
            assign(model, f"{layer}.lora_up", up)
        elif isinstance(module, Linear) and module.padding:
            weight, bias = F.pad(weight, (0, 0, 0, module.padding)), F.pad(bias, (0, module.padding))
        assign(model, f"{layer}.weight", weight)
        assign(model, f"{layer}.bias", bias)

    for name in schema.EMBEDDERS:
        fill(name, Stacked((name,)))
    for layer, stacked in schema.in_blocks(config, schema.DOUBLE_STACKED, schema.SINGLE_STACKED):
        fill(layer, stacked)
    for layer, stacked in schema.in_blocks(config, schema.DOUBLE_NORM_STACKED, schema.SINGLE_NORM_STACKED):
        value = stack(f"{s}.weight" for s in stacked.sources)
        assign(model, layer, value.view(-1, 2, config.attention_head_dim))
    return model.eval()


def load_lora(
    bundle: Bundle, sources: tuple[str, ...], device: torch.device, dtype: torch.dtype, *, rank: int
) -> tuple[Tensor, Tensor]:
    """LoRA of stored layers that are stacked into one: A side by side [in, R], B block-diagonal [R, out].

    Zeros fill them up to ``rank``. Both lie transposed, as [R, in] and [out, R], as files hold them (and are views of
    the file where nothing needs stacking): MKL takes a fifth of the time for a handful of columns that lie so.
    """
    downs, ups = ([bundle.load([f"lora.{s}.lora_{x}.weight"], device, dtype) for s in sources] for x in "AB")
    down, up = (downs[0], ups[0]) if len(sources) == 1 else (torch.cat(downs), torch.block_diag(*ups))
    missing = rank - len(down)
    if missing:
        down, up = F.pad(down, (0, 0, 0, missing)), F.pad(up, (0, missing))
    return down.t(), up.t()


def load_mogle(bundle: Bundle, device: torch.device, dtype: torch.dtype, *, weight_is_scale: bool) -> MixtureOfExperts:
    """Experts and gate of a bundle."""
    config = bundle.config.mogle
    model = MixtureOfExperts(config, weight_is_scale=weight_is_scale)
    if config.has_expert:
        for parameter, layer in (("expert_in", "net.0"), ("expert_out", "net.2")):
            weight = bundle.load([f"mogle.{e}.{layer}.weight" for e in EXPERT_NAMES], device, dtype)
            bias = bundle.load([f"mogle.{e}.{layer}.bias" for e in EXPERT_NAMES], device, dtype)
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
                assign(model, f"{layer}.{kind}", bundle.load([f"mogle.gating.{name}.{kind}"], device, dtype))
    return model.eval()
