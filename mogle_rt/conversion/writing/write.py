"""Stream tensors into a bundle; the weights of the blocks in a format of eight or four bits, where that is asked for."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mogle_rt.bundle import schema
from mogle_rt.bundle.bundle import BundleConfig
from mogle_rt.bundle.files import atomic_write
from mogle_rt.bundle.storage import WeightStorage, storage_named
from mogle_rt.conversion.tensors import SourceTensor
from mogle_rt.conversion.writing.bundle_writer import BundleWriter, require_finite
from mogle_rt.errors import CheckpointError
from mogle_rt.linear.quantised.rounding import quantised, signal_to_noise

# dB of a weight's signal over what rounding adds to it. A layer with less is kept as it is. Normal numbers reach 41, 31
# and 20 dB: they fall below these bounds only where a few numbers of a row are far larger than all others.
LEAST_SIGNAL_TO_NOISE = {"int8": 35.0, "fp8": 28.0, "int4": 18.0}


@dataclass
class WrittenWeights:
    """What became of the blocks' weights.

    Attributes:
        signal_to_noise: dB of every layer that is stored in the format, by its name.
        kept: the same of the layers that were kept as they were, because one of those that are multiplied together with
            them, or they themselves, lay below the bound.
    """

    signal_to_noise: dict[str, float] = field(default_factory=dict)
    kept: dict[str, float] = field(default_factory=dict)

    def describe(self, weights: str) -> list[str]:
        """Lines for people."""
        lines = []
        if self.signal_to_noise:
            worst = min(self.signal_to_noise, key=lambda layer: self.signal_to_noise[layer])
            median = statistics.median(self.signal_to_noise.values())
            lines.append(
                f"{len(self.signal_to_noise)} layers in {weights}: signal to noise {median:.1f} dB in the median, "
                f"{self.signal_to_noise[worst]:.1f} dB at worst ({worst})"
            )
        bound = LEAST_SIGNAL_TO_NOISE[weights]
        lines += [
            f"kept as it was: {layer} ({ratio:.1f} dB; it or a layer multiplied with it lies below {bound:g} dB)"
            for layer, ratio in self.kept.items()
        ]
        return lines


def write_bundle(
    output: Path,
    tensors: Mapping[str, SourceTensor],
    config: BundleConfig,
    *,
    dtype: torch.dtype | None = None,
    weights: str | None = None,
    progress: bool | None = None,
) -> WrittenWeights:
    """Stream ``tensors`` into a bundle, in their order. Files (uint8) keep their type and go last.

    Args:
        dtype: of all weights; None keeps each as stored.
        weights: the format of the blocks' weights, one of `mogle_rt.bundle.storage.STORAGES`; None writes them plainly.
        progress: True or False; None shows a bar on a terminal.

    Raises:
        CheckpointError: a weight is NaN or infinite, before or after the change of dtype.
        ConfigError: there is no such format, or it can't hold a weight of this shape.
        OutputError: the file can't be written.
    """
    ordered = sorted(tensors.items(), key=lambda item: item[1].dtype == torch.uint8)
    dtypes = {name: _stored_dtype(name, t.dtype, dtype) for name, t in ordered}
    storages = {} if weights is None else _storages(weights, tensors, config)
    stacks = {stack[0]: stack for stack in schema.block_stacks(config.transformer) if stack[0] in storages}
    names = [*tensors, *(f"transformer.{layer}.{kind}" for layer, s in storages.items() for kind in _kinds(s))]
    total = sum(math.prod(t.shape) * dtypes[name].itemsize for name, t in ordered)
    bar = tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        desc="convert" if weights is None else "quantise",
        disable=None if progress is None else not progress,
    )
    report, done = WrittenWeights(), set[str]()
    with atomic_write(output) as file, bar:
        writer = BundleWriter(file, config, names, storages, bar)
        for name, tensor in ordered:
            layer = name.removeprefix("transformer.").removesuffix(".weight")
            if name == f"transformer.{layer}.weight" and layer in stacks:
                stack = stacks[layer]
                done |= {f"transformer.{each}.weight" for each in stack}
                if _write_stack(writer, stack, tensors, storages, report):
                    plain = sum(math.prod(tensors[n].shape) * dtypes[n].itemsize for n in _weights(stack))
                    bar.update(plain - sum(storages[e].nbytes(_shape(tensors, e)) for e in stack))
                    continue
                for each in _weights(stack):
                    writer.add(each, dtypes[each], tensors[each].shape, tensors[each].chunks())
            elif name not in done:
                writer.add(name, dtypes[name], tensor.shape, tensor.chunks())
        writer.finish({layer: s for layer, s in storages.items() if layer in report.signal_to_noise})
    return report


def _write_stack(
    writer: BundleWriter,
    stack: Sequence[str],
    tensors: Mapping[str, SourceTensor],
    storages: Mapping[str, WeightStorage],
    report: WrittenWeights,
) -> bool:
    """Write the layers of a stack in their format, or don't, if one lies below the bound. Only one is held unrounded."""
    made: list[dict[str, Tensor]] = []
    ratios: dict[str, float] = {}
    for layer in stack:
        source = tensors[f"transformer.{layer}.weight"]
        matrix = source.load().float()
        require_finite(f"transformer.{layer}.weight", matrix, matrix)
        made.append(quantised(matrix, storages[layer]))
        ratios[layer] = signal_to_noise(matrix, made[-1], storages[layer])
        if min(ratios.values()) < LEAST_SIGNAL_TO_NOISE[storages[layer].name]:
            report.kept |= dict.fromkeys(stack, min(ratios.values()))
            return False
    report.signal_to_noise |= ratios
    for kind in made[0]:  # the same kinds of all layers side by side, so that one view covers them
        for layer, parts in zip(stack, made, strict=True):
            value = parts[kind]
            writer.add(f"transformer.{layer}.{kind}", value.dtype, tuple(value.shape), _flat_chunks(value))
    return True


def _flat_chunks(value: Tensor, at_once: int = 1 << 22) -> Iterator[Tensor]:
    yield from value.contiguous().view(-1).split(at_once)


def _storages(weights: str, tensors: Mapping[str, SourceTensor], config: BundleConfig) -> dict[str, WeightStorage]:
    """How each layer of the blocks is going to be stored."""
    storage = storage_named(weights)
    layers = [layer for stack in schema.block_stacks(config.transformer) for layer in stack]
    return {layer: storage.of(_shape(tensors, layer)) for layer in layers}


def _shape(tensors: Mapping[str, SourceTensor], layer: str) -> tuple[int, int]:
    out, inner = tensors[f"transformer.{layer}.weight"].shape
    return out, inner


def _weights(stack: Sequence[str]) -> list[str]:
    return [f"transformer.{layer}.weight" for layer in stack]


def _kinds(storage: WeightStorage) -> list[str]:
    return ["weight_scale", *(["weight_down", "weight_up"] if storage.name == "int4" else [])]


def _stored_dtype(name: str, source: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    if name.startswith("tokenizer"):
        return source
    if source not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise CheckpointError(f"tensor {name!r} is {source}; weights must be float32, float16, bfloat16 or float64")
    return wanted or (torch.float32 if source == torch.float64 else source)
