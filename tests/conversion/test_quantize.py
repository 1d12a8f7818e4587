"""Bundles with weights of few bits: how they are made, what the command reports, and what is refused."""

from __future__ import annotations

import json
import re
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import mogle_rt
from mogle_rt import CheckpointError, ConfigError, OutputError, Pipeline
from mogle_rt.bundle import storage as storages
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.bundle.schema import block_stacks
from mogle_rt.bundle.storage import Fp8Storage, Int4Storage, Int8Storage
from mogle_rt.conversion.writing import write
from mogle_rt.conversion.writing.quantize import quantize
from mogle_rt.linear.quantised.rounding import quantised, signal_to_noise
from tests.apps.test_cli import run
from tests.checkpoints import Files
from tests.conversion import test_convert
from tests.conversion.test_convert import FULL_WIDTH, memory_to_convert, write_sparse_checkpoint
from tests.linear.quantised import quantised_bundle

FEW_BITS = ("int8", "fp8", "int4")
LAYER = "transformer_blocks.0.attn.to_q"


def write_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the file's header, and leave its tensors as they are."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def edit_weights(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    def edit(header: dict[str, Any]) -> None:
        weights = json.loads(header["__metadata__"]["weights"])
        change(weights)
        header["__metadata__"]["weights"] = json.dumps(weights)

    return edit


@pytest.mark.parametrize("weights", FEW_BITS)
def test_demo_bundle(weights: str, tmp_path: Path) -> None:
    """Every layer of the blocks is quantised and all else is copied byte by byte; it draws without further options."""
    output = tmp_path / "small.safetensors"
    done = run("quantize", "demo", "-o", output, "--weights", weights)
    assert done.code == 0, done.err
    before, after = Bundle("demo"), Bundle(output)
    assert (before.format_version, after.format_version) == (1, 2)
    after.verify()
    assert re.search(rf"44 layers in {weights}: signal to noise [\d.]+ dB in the median, [\d.]+ dB at worst", done.err)
    assert f"{output}: " in done.err
    assert {s.name for s in after.storages.values()} == {weights}
    changed = {f"transformer.{layer}" for layer in after.storages}
    for name in before.tensors:
        if name.rpartition(".")[0] not in changed or name.endswith(".bias"):
            assert torch.equal(
                before.tensor(name).view(-1).view(torch.uint8), after.tensor(name).view(-1).view(torch.uint8)
            )
    for layer, stored in after.storages.items():
        exact = before.tensor(f"transformer.{layer}.weight").float()
        kinds = stored.kinds((exact.shape[0], exact.shape[1]))
        parts = {kind: after.tensor(f"transformer.{layer}.{kind}") for kind in kinds}
        assert signal_to_noise(exact, parts, stored) > write.LEAST_SIGNAL_TO_NOISE[weights]
    told = run("info", output)
    assert f"44 layers of the blocks in {weights}" in told.out
    assert "version 2" in told.out
    count = next(line for line in run("info", "demo").out.splitlines() if line.startswith("transformer")).split()[2]
    assert count in told.out  # as many parameters as before
    pipe = Pipeline(output, "cpu", "fp32")
    pipe(height=32, width=32, num_inference_steps=1, generator=torch.Generator().manual_seed(0))
    assert pipe.last_run.weights.startswith(f"{weights} (unpacked) ")


def test_the_same_bytes_twice(tmp_path: Path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for path in (first, second):
        quantize("demo", path, "int4", progress=False)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("weights", FEW_BITS)
def test_convert_gives_what_quantize_gives(weights: str, tiny_files: Files, tiny_bundle: Path, tmp_path: Path) -> None:
    converted = tmp_path / "converted.safetensors"
    done = run(
        "convert",
        *("--flux", tiny_files.flux, "--lora", tiny_files.lora, "--mogle", tiny_files.mogle),
        *("-o", converted, "--weights", weights),
    )
    assert done.code == 0, done.err
    quantize(tiny_bundle, tmp_path / "quantised.safetensors", weights, progress=False)
    assert converted.read_bytes() == (tmp_path / "quantised.safetensors").read_bytes()


def test_a_layer_below_the_bound_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer, and those that are multiplied together with it, stay plain, and a message names each of them. All
    others are quantised."""
    every = quantize("demo", tmp_path / "every.safetensors", "int8", progress=False).signal_to_noise
    stacks = list(block_stacks(Bundle("demo").config.transformer))
    lowest = {stack: min(every[layer] for layer in stack) for stack in stacks}
    bound = sorted(lowest.values())[len(stacks) // 2] - 1e-6
    monkeypatch.setitem(write.LEAST_SIGNAL_TO_NOISE, "int8", bound)
    output = tmp_path / "some.safetensors"
    done = run("quantize", "demo", "-o", output, "--weights", "int8")
    named = set(re.findall(r"kept as it was: (\S+) \([\d.]+ dB; it or a layer multiplied with it lies below", done.err))
    assert named == {layer for stack, ratio in lowest.items() if ratio < bound for layer in stack}
    assert 0 < len(named) < len(every)
    before, after = Bundle("demo"), Bundle(output)
    after.verify()
    assert set(after.storages) == set(every) - named
    for layer in named:
        name = f"transformer.{layer}.weight"
        assert torch.equal(before.tensor(name), after.tensor(name))
    pipe = Pipeline(output, "cpu", "fp32")
    pipe(height=32, width=32, num_inference_steps=1, generator=torch.Generator().manual_seed(0))
    assert re.search(r"packed .*, int8 \(unpacked\) .*, plain ", pipe.last_run.weights)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads its memory from /proc")
def test_large_layers_in_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Layers are quantised one at a time, so FLUX.1-dev's largest one decides how much memory is needed: less than 2 GB.

    A single block has the largest layer. (Int4 takes longer, so it isn't run here; it stayed below the same bound.)
    """
    monkeypatch.setattr(test_convert, "FULL_WIDTH", replace(FULL_WIDTH, num_layers=0, num_single_layers=1))
    files, output = write_sparse_checkpoint(tmp_path / "sources"), tmp_path / "small.safetensors"
    assert memory_to_convert(files, output, capsys, weights="int8") < 1.5e9


def test_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    small = quantised_bundle(tiny_bundle, tmp_path / "small.safetensors", "int8")
    with pytest.raises(CheckpointError, match="its weights are stored in int8 already; quantise the original bundle"):
        quantize(small, tmp_path / "again.safetensors", "int4")
    with pytest.raises(ConfigError, match="weights must be one of int8, fp8, int4, got 'int3'"):
        quantize(tiny_bundle, tmp_path / "again.safetensors", "int3")
    with pytest.raises(OutputError, match="is the bundle to read"):
        quantize(tiny_bundle, tiny_bundle, "int8")
    done = run("quantize", tiny_bundle, "-o", small, "--weights", "int8")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "exists already" in done.err
    done = run("export", small, "-o", tmp_path / "exported")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "weights in int8 can't be exported; export the bundle that they were made from" in done.err
    assert not (tmp_path / "exported").exists()


def test_nan_is_refused(tiny_files: Files, tmp_path: Path) -> None:
    bundle, output = tiny_files.convert(tmp_path / "ckpt.safetensors"), tmp_path / "small.safetensors"
    raw = bytearray(bundle.read_bytes())
    info = Bundle(bundle).tensors[f"transformer.{LAYER}.weight"]
    torch.frombuffer(raw, dtype=torch.float32, count=1, offset=info.begin)[0] = torch.nan
    bundle.write_bytes(raw)
    for weights in FEW_BITS:
        done = run("quantize", bundle, "-o", output, "--weights", weights)
        assert (done.code, done.err.count("\n")) == (1, 1)
        assert f"tensor 'transformer.{LAYER}.weight' holds NaN or infinite values" in done.err
    assert list(tmp_path.iterdir()) == [bundle]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda h: h.pop(f"transformer.{LAYER}.weight_scale"), "does not follow its neighbour"),
        (lambda h: h["__metadata__"].update(weights="{]"), "the header of weight formats is damaged"),
        (lambda h: h["__metadata__"].update(weights="[]"), "the header of weight formats is damaged"),
        (lambda h: h["__metadata__"].pop("weights"), f"unexpected tensor '{LAYER}.weight_scale'|can't be torch.int8"),
        (edit_weights(lambda w: w.pop(LAYER)), "must be stored in one format"),
        (edit_weights(lambda w: w.update({LAYER: 5})), f"layer '{LAYER}' names no format"),
        (edit_weights(lambda w: w[LAYER].update(format="int2")), "'int2'; this version reads int8, fp8, int4"),
        (edit_weights(lambda w: w[LAYER].update(rotation=3)), "rotation must be 1, 4, 16, 64 or 256, got 3"),
        (edit_weights(lambda w: w[LAYER].update(rotation=64.0)), "rotation must be a whole number, got 64.0"),
        (
            edit_weights(lambda w: [e.update(rotation=256) for e in w.values()]),
            "doesn't divide the weight's 32 columns",
        ),
        (edit_weights(lambda w: w[LAYER].update(group=64)), "unknown option 'group'"),
        (edit_weights(lambda w: w.update(proj_out=w[LAYER])), "'proj_out' can't be stored in a weight format"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_files(change: Callable[[dict[str, Any]], object], told: str, tiny_bundle: Path, tmp_path: Path) -> None:
    path = quantised_bundle(tiny_bundle, tmp_path / "bad.safetensors", "int8")
    write_header(path, change)
    done = run("info", path)
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert re.search(told, done.err), done.err


@pytest.mark.quick
def test_missing_scales(tiny_bundle: Path, tmp_path: Path) -> None:
    path = quantised_bundle(tiny_bundle, tmp_path / "bad.safetensors", "fp8")
    name = f"transformer.{LAYER}.weight_scale"
    write_header(path, lambda h: h.update({"lora.nothing": h.pop(name)}))
    with pytest.raises(CheckpointError, match=f"missing tensor '{LAYER}.weight_scale' of shape"):
        Bundle(path)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("of", "told"),
    [
        (lambda: Int4Storage(group=7), "group must be an even number from 2, got 7"),
        (lambda: Int4Storage(rank=-1), "rank must be 0 or more, got -1"),
        (lambda: Int4Storage(group=True), "group must be a whole number, got True"),
        (lambda: Int4Storage(group=64).kinds((4, 96)), "group 64 doesn't divide the weight's 96 columns"),
        (lambda: Int4Storage.of((4, 9)), r"int4 needs an even number of columns, got a weight of shape \[4, 9\]"),
        (lambda: Int8Storage(rotation=2), "rotation must be 1, 4, 16, 64 or 256, got 2"),
    ],
)
def test_bad_storages(of: Callable[[], object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        of()


@pytest.mark.quick
def test_storages_are_written_and_read() -> None:
    every = {"a": Int8Storage(rotation=16), "b": Fp8Storage(), "c": Int4Storage(group=32, rank=4)}
    assert storages.parse(storages.written(every), what="") == every
    assert storages.written({}) == ""
    assert storages.parse("", what="") == {}


@pytest.mark.quick
def test_contents_that_were_changed(tiny_bundle: Path, tmp_path: Path) -> None:
    """The hash of a bundle's contents depends on what its header says of formats, too."""
    path = quantised_bundle(tiny_bundle, tmp_path / "small.safetensors", "int4")
    Bundle(path).verify()
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["weights"])[LAYER]["format"] == "int4"
    write_header(path, lambda h: h["__metadata__"].update(weights=h["__metadata__"]["weights"] + " "))
    with pytest.raises(CheckpointError, match="its contents were changed"):
        Bundle(path).verify()


def test_styles_leave_the_bytes_alone(tiny_bundle: Path, tmp_path: Path) -> None:
    """A LoRA is never merged: after it is unloaded, everything is as it was, to the last bit."""
    path = quantised_bundle(tiny_bundle, tmp_path / "small.safetensors", "int8")
    pipe = Pipeline(path, "cpu", "fp32")

    def draw() -> torch.Tensor:
        g = torch.Generator().manual_seed(0)
        images = pipe(height=32, width=32, num_inference_steps=2, generator=g, output_type="latent").images
        assert isinstance(images, torch.Tensor)
        return images

    before, content = draw(), path.read_bytes()
    layer = "transformer.transformer_blocks.0.attn.to_q"
    width = pipe.bundle.config.transformer.width
    state = {f"{layer}.lora_A.weight": torch.randn(4, width), f"{layer}.lora_B.weight": torch.randn(width, 4)}
    save_file(state, tmp_path / "style.safetensors")
    pipe.load_lora_weights(tmp_path / "style.safetensors", adapter_name="style")
    assert not torch.equal(draw(), before)
    pipe.unload_lora_weights()
    assert torch.equal(draw(), before)
    assert path.read_bytes() == content


def test_python_api(tiny_files: Files, tmp_path: Path) -> None:
    reports: list[write.WrittenWeights] = []
    mogle_rt.convert(
        tiny_files.flux,
        tiny_files.lora,
        tiny_files.mogle,
        tmp_path / "a.safetensors",
        weights="int8",
        on_weights=reports.append,
        progress=False,
    )
    (report,) = reports
    assert set(report.signal_to_noise) == set(Bundle(tmp_path / "a.safetensors").storages)
    weight = Bundle(tmp_path / "a.safetensors")
    storage = weight.storages[LAYER]
    exact = torch.randn(32, 32)
    assert signal_to_noise(exact, quantised(exact, storage), storage) > 30


@pytest.mark.quick
def test_auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command picks a format for a card and says why; it refuses to make a bundle that would be of no use."""
    small, expected = tmp_path / "small.safetensors", tmp_path / "expected.safetensors"
    auto = ("quantize", "demo", "-o", str(small), "--weights", "auto", "--gpu", "RTX 4070")
    refused = run(*auto)
    assert (refused.code, small.exists()) == (1, False)
    assert "auto: the weights of demo stay in the memory of RTX 4070 as they are" in refused.err
    monkeypatch.setattr("mogle_rt.cost.weights.CANDIDATES", ("int8", "int4"))  # the demo is small for any card
    made = run(*auto)
    assert made.code == 0
    assert "int8 for RTX 4070; plan: 1." in made.err
    quantize("demo", expected, "int8", progress=False)
    assert small.read_bytes() == expected.read_bytes()
    refused = run(*auto[:5], "int8", "--max-memory", "8GB", "--overwrite")
    assert refused.code == 1
    assert "--gpu and --max-memory need --weights auto" in refused.err
