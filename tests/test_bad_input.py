"""Bad input of every kind: a typed error of one line in Python, one line and code 1 on the command line, no file left."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import resource
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import constants as hub_constants
from huggingface_hub import errors as hub_errors
from PIL import Image
from safetensors.torch import load_file, save_file

import mogle_rt
from mogle_rt import (
    CheckpointError,
    ConfigError,
    DeviceError,
    DownloadError,
    InputError,
    MogleError,
    NumericalError,
    OutputError,
    Pipeline,
)
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.config import SchedulerConfig
from mogle_rt.conversion import convert as converter
from mogle_rt.conversion.writing.bundle_writer import BundleWriter
from mogle_rt.conversion.writing.write import write_bundle
from mogle_rt.jobs.image_files import save_image
from mogle_rt.loop.schedule import make_schedule
from mogle_rt.memory.devices import choose_device
from tests.apps.test_cli import QUICK, Result, draw_mask, run
from tests.checkpoints import Files

# Helpers


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder in a folder, with its size and its time of change."""
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


@contextlib.contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Check that the block makes, changes and removes nothing in the folder."""
    before = listing(folder)
    yield
    assert listing(folder) == before


def assert_one_line(result: Result, *words: str) -> None:
    """One `error: ` line on stderr that holds the words, and code 1."""
    assert "Traceback" not in result.out + result.err
    assert result.code == 1, result
    (line,) = result.err.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line, line


def assert_raises(kind: type[MogleError], call: Callable[[], object], *words: str) -> None:
    """The call raises that kind, with a message of one line that holds the words."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


Header = dict[str, Any]


def read_raw(path: Path) -> tuple[Header, bytes]:
    """Read a safetensors file as the format's definition says, without mogle_rt."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_raw(path: Path, header: object, data: bytes) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def edit_header(change: Callable[[Header], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        header, data = read_raw(path)
        change(header)
        write_raw(path, header, data)

    return damage


def edit_config(change: Callable[[Header], object]) -> Callable[[Path], None]:
    def damage(header: Header) -> None:
        config = json.loads(header["__metadata__"]["config"])
        change(config)
        header["__metadata__"]["config"] = json.dumps(config)

    return edit_header(damage)


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Write the file again with the safetensors package, whole, but with other contents."""

    def damage(path: Path) -> None:
        metadata, tensors = read_raw(path)[0].get("__metadata__"), load_file(path)
        change(tensors)
        save_file(tensors, path, metadata)

    return damage


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


WEIGHT = "transformer.single_transformer_blocks.1.proj_out.weight"  # [32, 160], the last of its kind

# Bundles


@dataclass(frozen=True)
class Case:
    """Damage that is done to a file or a folder, and the words that the error must have."""

    damage: Callable[[Any], object]
    words: tuple[str, ...]
    kind: type[MogleError] = CheckpointError
    options: dict[str, Any] = field(default_factory=dict)


BUNDLES = {
    "absent": Case(Path.unlink, ("no such file",)),
    "a_folder": Case(lambda p: (p.unlink(), p.mkdir()), ("is a folder; name the file in it",)),
    "empty": Case(lambda p: p.write_bytes(b""), ("not a safetensors file, or cut short (0 bytes)",)),
    "a_text": Case(lambda p: p.write_text("not a bundle at all"), ("not a safetensors file",)),
    "a_pickle": Case(lambda p: torch.save({"a": torch.ones(3)}, p), ("not a safetensors file",)),
    "cut_in_the_data": Case(lambda p: os.truncate(p, p.stat().st_size // 2), ("cut short",)),
    "cut_in_the_header": Case(lambda p: os.truncate(p, 1000), ("cut short (1000 bytes)",)),
    "cut_by_one_byte": Case(lambda p: os.truncate(p, p.stat().st_size - 1), ("cut short",)),
    "one_byte_more": Case(lambda p: p.write_bytes(p.read_bytes() + b"!"), ("too long",)),
    "huge_header": Case(lambda p: p.write_bytes(struct.pack("<Q", 1 << 60) + bytes(99)), ("not a safetensors file",)),
    "header_not_json": Case(lambda p: write_raw(p, b"{" * 99, b""), ("header is not a JSON object",)),
    "header_not_utf8": Case(lambda p: write_raw(p, b"\xff\xfe{}", b""), ("header is not a JSON object",)),
    "header_a_list": Case(lambda p: write_raw(p, [1, 2], b""), ("header is not a JSON object",)),
    "header_too_deep": Case(lambda p: write_raw(p, b"[" * 300_000, b""), ("header is not a JSON object",)),
    "entry_without_shape": Case(edit_header(lambda h: h[WEIGHT].pop("shape")), (WEIGHT, "malformed")),
    "entry_beyond_all_sizes": Case(
        edit_header(lambda h: h[WEIGHT].update(shape=[0, 2**70], data_offsets=[0, 0])), (WEIGHT, "malformed")
    ),
    "entry_not_an_object": Case(edit_header(lambda h: h.update({WEIGHT: 5})), (WEIGHT, "malformed")),
    "shape_of_texts": Case(edit_header(lambda h: h[WEIGHT].update(shape="32")), (WEIGHT, "malformed")),
    "shape_negative": Case(edit_header(lambda h: h[WEIGHT].update(shape=[-32, -160])), (WEIGHT, "malformed")),
    "dtype_unknown": Case(edit_header(lambda h: h[WEIGHT].update(dtype="F4")), (WEIGHT, "dtype 'F4'")),
    "dtype_a_list": Case(edit_header(lambda h: h[WEIGHT].update(dtype=["F32"])), (WEIGHT, "dtype ['F32']")),
    "dtype_of_other_size": Case(edit_header(lambda h: h[WEIGHT].update(dtype="F16")), (WEIGHT, "F16", "20480 bytes")),
    "dtype_no_weight": Case(edit_header(lambda h: h[WEIGHT].update(dtype="I32")), (WEIGHT, "torch.int32")),
    "offsets_beyond": Case(
        edit_header(lambda h: h[WEIGHT].update(data_offsets=[10**12, 10**12 + 20480])), ("neighbour",)
    ),
    "offsets_overlapping": Case(edit_header(lambda h: h[WEIGHT].update(data_offsets=[0, 20480])), ("neighbour",)),
    "metadata_of_numbers": Case(edit_header(lambda h: h["__metadata__"].update(format=1)), ("metadata must be texts",)),
    "no_bundle": Case(
        lambda p: save_file({"a": torch.ones(2)}, p), ("not a mogle_rt bundle", "make one with `mogle-rt convert`")
    ),
    "newer_format": Case(
        edit_header(lambda h: h["__metadata__"].update(format_version="3")), ("format '3'", "this version reads 1 to 2")
    ),
    "no_format_version": Case(edit_header(lambda h: h["__metadata__"].pop("format_version")), ("format ''",)),
    "config_not_json": Case(edit_header(lambda h: h["__metadata__"].update(config="{]")), ("configuration", "damaged")),
    "config_absent": Case(edit_header(lambda h: h["__metadata__"].pop("config")), ("configuration", "damaged")),
    "config_a_list": Case(edit_header(lambda h: h["__metadata__"].update(config="[]")), ("configuration", "damaged")),
    "config_too_deep": Case(
        edit_header(lambda h: h["__metadata__"].update(config="[" * 300_000)), ("configuration", "damaged")
    ),
    "config_key_unknown": Case(
        edit_config(lambda c: c["transformer"].update(num_layer=3)), ("'num_layer'", "did you mean 'num_layers'?")
    ),
    "config_part_unknown": Case(edit_config(lambda c: c.update(decoder={})), ("unknown option 'decoder'",)),
    "config_part_missing": Case(edit_config(lambda c: c.pop("vae")), ("missing vae",)),
    "config_key_missing": Case(edit_config(lambda c: c["transformer"].pop("num_layers")), ("missing num_layers",)),
    "config_value_negative": Case(
        edit_config(lambda c: c["transformer"].update(num_attention_heads=-2)), ("num_attention_heads", "-2")
    ),
    "config_value_a_text": Case(edit_config(lambda c: c["mogle"].update(has_gating="no")), ("has_gating", "'no'")),
    "config_axes_a_number": Case(edit_config(lambda c: c["transformer"].update(axes_dims_rope=16)), ("got 16",)),
    "config_axes_of_other_sum": Case(
        edit_config(lambda c: c["transformer"].update(axes_dims_rope=[4, 4, 4])), ("[4, 4, 4]", "12", "16")
    ),
    "config_schedule_unknown": Case(
        edit_config(lambda c: c["scheduler"].update(use_karras_sigmas=True)), ("use_karras_sigmas",)
    ),
    "config_schedule_a_text": Case(edit_config(lambda c: c["scheduler"].update(shift="3")), ("shift", "'3'")),
    "config_schedule_of_no_range": Case(
        edit_config(lambda c: c["scheduler"].update(max_image_seq_len=256)), ("must differ", "256")
    ),
    "config_vae_not_a_mapping": Case(edit_config(lambda c: c.update(vae="AutoencoderKL")), ("vae", "str")),
    "config_vae_of_other_channels": Case(
        edit_config(lambda c: c["vae"].update(latent_channels=4)), ("latent_channels is 16", "64")
    ),
    "config_clip_of_other_width": Case(
        edit_config(lambda c: c["text_encoder"].update(hidden_size=99)), ("hidden_size is 99", "is 16")
    ),
    "config_t5_of_other_width": Case(
        edit_config(lambda c: c["text_encoder_2"].update(d_model=99)), ("d_model is 99", "is 24")
    ),
    "config_of_a_billion_layers": Case(
        edit_config(lambda c: c["transformer"].update(num_layers=10**9)),
        ("num_layers must be from 0 to 1000, got 1000000000",),
    ),
    "config_of_no_block": Case(
        edit_config(lambda c: c["transformer"].update(num_layers=0, num_single_layers=0)), ("there must be a block",)
    ),
    "config_of_a_number_beyond_floats": Case(
        edit_config(lambda c: c["scheduler"].update(max_shift=10**400)), ("max_shift must be a finite number",)
    ),
    "config_of_a_count_beyond_all": Case(
        edit_config(lambda c: c["scheduler"].update(num_train_timesteps=10**400)),
        ("num_train_timesteps must be from 1 to",),
    ),
    "vae_config_of_another_class": Case(
        edit_config(lambda c: c["vae"].update(down_block_types=["Nonsense"] * 4)), ("vae", "EncoderBlock2D", "Nonsense")
    ),
    "vae_config_of_no_groups": Case(
        edit_config(lambda c: c["vae"].update(norm_num_groups=0)), ("vae: norm_num_groups must be from 1", "got 0")
    ),
    "vae_config_without_scale": Case(
        edit_config(lambda c: c["vae"].update(scaling_factor="big")), ("scaling_factor", "'big'")
    ),
    "vae_config_of_a_million_layers": Case(
        edit_config(lambda c: c["vae"].update(layers_per_block=10**6)), ("layers_per_block must be from 1 to 32",)
    ),
    "t5_config_value_a_text": Case(
        edit_config(lambda c: c["text_encoder_2"].update(num_layers="two")), ("text_encoder_2", "num_layers", "two")
    ),
    "config_of_more_layers": Case(
        edit_config(lambda c: c["transformer"].update(num_layers=3)), ("missing tensor 'transformer_blocks.2.",)
    ),
    "tensor_missing": Case(edit_tensors(lambda t: t.pop(WEIGHT)), ("missing tensor 'single_transformer_blocks.1.",)),
    "tensor_unexpected": Case(
        edit_tensors(lambda t: t.update({"transformer.extra": torch.ones(1)})), ("unexpected tensor 'extra'",)
    ),
    "part_unexpected": Case(
        edit_tensors(lambda t: t.update({"decoder.x": torch.ones(1)})), ("unexpected tensor 'decoder.x'",)
    ),
    "tensor_of_other_shape": Case(
        edit_tensors(lambda t: t.update({WEIGHT: torch.ones(32, 161)})), ("[32, 161], expected [32, 160]",)
    ),
    "tensor_of_other_dtype": Case(
        edit_tensors(lambda t: t.update({WEIGHT: torch.ones(32, 160, dtype=torch.int64)})), (WEIGHT, "torch.int64")
    ),
    "weights_of_bytes": Case(
        edit_tensors(lambda t: t.update({WEIGHT: torch.ones(32, 160, dtype=torch.uint8)})), (WEIGHT, "torch.uint8")
    ),
    "expert_missing": Case(
        edit_tensors(lambda t: t.pop("mogle.local_experts.18.net.2.bias")), ("missing tensor 'local_experts.18",)
    ),
    "lora_missing": Case(
        edit_tensors(lambda t: [t.pop(f"lora.x_embedder.lora_{x}.weight") for x in "AB"]), ("LoRA", "'x_embedder'")
    ),
    "lora_half_missing": Case(
        edit_tensors(lambda t: t.pop("lora.x_embedder.lora_B.weight")), ("missing tensor 'x_embedder.lora_B.weight'",)
    ),
    "lora_unexpected": Case(
        edit_tensors(lambda t: t.update({"lora.norm_out.linear.lora_A.weight": torch.ones(4, 32)})), ("unexpected",)
    ),
    "lora_ranks_differ": Case(
        edit_tensors(lambda t: t.update({"lora.x_embedder.lora_A.weight": torch.ones(5, 64)})), ("[32, 4]", "[32, 5]")
    ),
}


@pytest.mark.parametrize("name", BUNDLES)
def test_bad_bundles(name: str, tiny_bundle: Path, tmp_path: Path) -> None:
    case, path = BUNDLES[name], tmp_path / "ckpt.safetensors"
    shutil.copy(tiny_bundle, path)
    case.damage(path)
    with unchanged(tmp_path):
        assert_raises(case.kind, lambda: Bundle(path), str(path), *case.words)
        assert_raises(case.kind, lambda: Pipeline(path, device="cpu"), str(path), *case.words)
        assert_one_line(run("info", path), str(path), *case.words)
        assert_one_line(run("generate", path, "-o", tmp_path / "face.png", *QUICK), str(path), *case.words)


# Bundles that open, but can't be run


def as_bytes(content: bytes) -> torch.Tensor:
    """A file as a bundle holds it."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def spoil(name: str, value: float) -> Callable[[Path], None]:
    return edit_tensors(lambda t: t[name].view(-1)[:1].fill_(value))


RUNS = {
    "vae_tensor_missing": Case(
        edit_tensors(lambda t: t.pop("vae.decoder.conv_in.weight")),
        ("(vae)", "missing tensor 'decoder.conv_in.weight'"),
    ),
    "vae_tensor_of_other_shape": Case(
        edit_tensors(lambda t: t.update({"vae.decoder.conv_in.bias": torch.ones(3)})), ("(vae)", "[3], expected [16]")
    ),
    "vae_tensor_unexpected": Case(
        edit_tensors(lambda t: t.update({"vae.extra": torch.ones(3)})), ("(vae)", "unexpected tensor 'extra'")
    ),
    "vae_config_of_three_blocks": Case(
        edit_config(lambda c: c["vae"].update({k: v[1:] for k, v in c["vae"].items() if isinstance(v, list)})),
        ("vae", "four blocks", "3"),
    ),
    "vae_config_without_shift": Case(
        edit_config(lambda c: c["vae"].pop("shift_factor")), ("vae: shift_factor must be a number, got none",)
    ),
    "clip_tensor_missing": Case(
        edit_tensors(lambda t: t.pop("text_encoder.final_layer_norm.weight")),
        ("text_encoder", "final_layer_norm.weight"),
    ),
    "t5_config_of_another_model": Case(
        edit_config(lambda c: c["text_encoder_2"].update(model_type="bert")), ("text_encoder_2", "'t5'", "'bert'")
    ),
    "text_encoder_without_config": Case(
        edit_config(lambda c: c.update(text_encoder=None)), ("holds no text encoders",)
    ),
    "tokenizer_damaged": Case(
        edit_tensors(lambda t: t["tokenizer_2.tokenizer.json"].fill_(ord("!"))), ("tokenizer_2", "can't be read")
    ),
    "tokenizer_file_of_no_name": Case(
        edit_tensors(lambda t: t.update({"tokenizer...": torch.ones(3, dtype=torch.uint8)})),
        ("tokenizer", "can't be read"),
    ),
    "tokenizer_config_a_list": Case(
        edit_tensors(lambda t: t.update({"tokenizer_2.tokenizer_config.json": as_bytes(b"[]")})),
        ("tokenizer_2", "can't be read"),
    ),
    "tokenizer_length_a_text": Case(
        edit_tensors(
            lambda t: t.update({"tokenizer_2.tokenizer_config.json": as_bytes(b'{"model_max_length": "long"}')})
        ),
        ("tokenizer_2", "model_max_length must be a number, got 'long'"),
    ),
    "nan_in_the_decoder": Case(
        spoil("vae.decoder.conv_out.bias", float("nan")), ("the decoded image holds NaN or infinity",), NumericalError
    ),
    "nan_in_the_transformer": Case(
        spoil("transformer.proj_out.weight", float("nan")), ("latents became NaN or infinite",), NumericalError
    ),
    "infinity_in_a_lora": Case(
        spoil("lora.x_embedder.lora_B.weight", float("inf")), ("latents became NaN or infinite",), NumericalError
    ),
    "nan_in_an_expert": Case(
        spoil("mogle.global_expert.net.2.bias", float("nan")), ("latents became NaN or infinite",), NumericalError
    ),
    "nan_in_the_modulation": Case(
        spoil("transformer.norm_out.linear.bias", float("nan")), ("latents became NaN or infinite",), NumericalError
    ),
    "nan_in_the_encoder": Case(
        spoil("vae.encoder.conv_in.weight", float("nan")), ("latents became NaN or infinite",), NumericalError
    ),
    "nan_in_t5": Case(
        spoil("text_encoder_2.encoder.final_layer_norm.weight", float("nan")), ("NaN or infinite",), NumericalError
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_bundles_that_cannot_be_run(name: str, tiny_bundle: Path, tmp_path: Path) -> None:
    case, path = RUNS[name], tmp_path / "ckpt.safetensors"
    shutil.copy(tiny_bundle, path)
    case.damage(path)
    Bundle(path)  # the header is in order, so the bundle opens

    def generate() -> None:
        Pipeline(path, device="cpu", dtype="fp32")(None, "a face", 2, height=32, width=32)

    with unchanged(tmp_path):
        assert_raises(case.kind, generate, *case.words)
        result = run("generate", path, "-p", "a face", "-o", tmp_path / "face.png", *QUICK)
        assert_one_line(result, *case.words)


def exchange(header: Header) -> None:
    """Exchange two tensors of one shape: the header stays in order, but it is another model."""
    q, k = ("transformer.transformer_blocks.0.attn.to_" + x + ".weight" for x in "qk")
    header[q], header[k] = header[k], header[q]


def flip_last_bit(path: Path) -> None:
    header, data = read_raw(path)
    write_raw(path, header, data[:-1] + bytes([data[-1] ^ 1]))


TAMPERED = {
    "last_bit_of_the_data": flip_last_bit,
    "a_weight": spoil(WEIGHT, 1.0),
    "names_exchanged": edit_header(exchange),
    "dtype_of_the_same_size": edit_header(lambda h: h[WEIGHT].update(dtype="BF16")),
    "config": edit_config(lambda c: c["scheduler"].update(shift=2.0)),
    "hash_removed": edit_header(lambda h: h["__metadata__"].pop("sha256")),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", TAMPERED)
def test_tampering_is_found(name: str, tiny_files: Files, tmp_path: Path) -> None:
    path = tiny_files.convert(tmp_path / "ckpt.safetensors", dtype="fp16", text_encoders=False)
    Bundle(path).verify()
    TAMPERED[name](path)
    with unchanged(tmp_path):
        bundle = Bundle(path)  # the header's form shows nothing of it
        assert_raises(CheckpointError, bundle.verify, str(path), "contents were changed")
        assert_one_line(run("info", path, "--verify"), str(path), "contents were changed")


# What convert reads


@dataclass
class Marker:
    """Unpickled carelessly, it makes a file."""

    path: str

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(self.path),))


def write_sharded(folder: Path) -> Path:
    """The folder's single file as two shards with an index. Returns the index."""
    (single,) = folder.glob("*.safetensors")
    tensors = load_file(single)
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, part in halves.items():
        save_file({n: tensors[n] for n in part}, folder / shard)
    single.unlink()
    index = folder / f"{single.name}.index.json"
    index.write_text(json.dumps({"weight_map": {n: shard for shard, part in halves.items() for n in part}}))
    return index


def edit_weight_map(change: Callable[[dict[str, Any]], object]) -> Callable[[Files], None]:
    def damage(files: Files) -> None:
        index = write_sharded(files.flux / "transformer")
        content = json.loads(index.read_text())
        change(content)
        index.write_text(json.dumps(content))

    return damage


def part(name: str) -> Callable[[Files], Path]:
    """A function from a checkpoint's files to those of one part's weights."""
    if name in ("vae", "transformer"):
        return lambda files: files.flux / name / "diffusion_pytorch_model.safetensors"
    return lambda files: files.lora if name == "lora" else files.flux / name / "model.safetensors"


def tensors_of(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Files], None]:
    return lambda files: edit_tensors(change)(part(name)(files))


def pickle_of(change: Callable[[dict[str, Any]], Any]) -> Callable[[Files], None]:
    def damage(files: Files) -> None:
        state = torch.load(files.mogle, weights_only=True)
        changed = change(state)
        torch.save(state if changed is None else changed, files.mogle)

    return damage


def lora_metadata(text: str) -> Callable[[Files], None]:
    return lambda files: save_file(load_file(files.lora), files.lora, {"lora_adapter_metadata": text})


X, LORA_A, LORA_B = "x_embedder.weight", "transformer.x_embedder.lora_A.weight", "transformer.x_embedder.lora_B.weight"

SOURCES = {
    "no_transformer_folder": Case(
        lambda f: shutil.rmtree(f.flux / "transformer"), ("transformer/config.json", "no such file")
    ),
    "no_scheduler": Case(lambda f: shutil.rmtree(f.flux / "scheduler"), ("scheduler_config.json", "no such file")),
    "no_vae": Case(lambda f: shutil.rmtree(f.flux / "vae"), ("vae/config.json", "no such file")),
    "flux_a_file": Case(
        lambda f: f.flux.rename(f.folder / "x").with_name("flux").touch(),
        ("flux: is a file", "--transformer"),
    ),
    "config_not_json": Case(lambda f: (f.flux / "vae/config.json").write_text("{,"), ("vae/config.json", "JSON")),
    "config_too_deep": Case(
        lambda f: (f.flux / "vae/config.json").write_text("[" * 300_000), ("vae/config.json", "JSON")
    ),
    "config_a_list": Case(lambda f: (f.flux / "vae/config.json").write_text("[]"), ("must hold a JSON object", "list")),
    "config_not_utf8": Case(
        lambda f: (f.flux / "vae/config.json").write_bytes(b"\xff\xfe{}"), ("vae/config.json", "JSON")
    ),
    "config_key_unknown": Case(
        lambda f: edit_json(f.flux / "transformer/config.json", heads=2),
        ("unknown option 'heads'", "known: num_layers"),
    ),
    "config_axes_not_numbers": Case(
        lambda f: edit_json(f.flux / "transformer/config.json", axes_dims_rope=["a", "b", "c"]), ("['a', 'b', 'c']",)
    ),
    "config_schedule_a_text": Case(
        lambda f: edit_json(f.flux / "scheduler/scheduler_config.json", base_shift="low"), ("base_shift", "'low'")
    ),
    "config_schedule_null": Case(
        lambda f: edit_json(f.flux / "scheduler/scheduler_config.json", max_shift=None), ("max_shift", "None")
    ),
    "config_of_a_small_vae": Case(
        lambda f: edit_json(f.flux / "vae/config.json", latent_channels=-1),
        ("vae: latent_channels must be from 1 to", "got -1"),
    ),
    "config_of_clip_a_text": Case(
        lambda f: edit_json(f.flux / "text_encoder/config.json", hidden_size="x"), ("text_encoder", "hidden_size")
    ),
    "config_of_clip_no_heads": Case(
        lambda f: edit_json(f.flux / "text_encoder/config.json", num_attention_heads=0),
        ("text_encoder: num_attention_heads must be from 1 to", "got 0"),
    ),
    "no_weights": Case(lambda f: part("vae")(f).unlink(), ("vae", "no .safetensors files and no index")),
    "two_files_of_weights": Case(
        lambda f: shutil.copy(part("vae")(f), f.flux / "vae/other.safetensors"),
        ("vae", "2 .safetensors files and no index"),
    ),
    "weights_cut_short": Case(lambda f: os.truncate(part("vae")(f), 5000), ("vae", "cut short")),
    "weights_a_pickle": Case(
        lambda f: torch.save({}, part("transformer")(f)), ("transformer", "not a safetensors file")
    ),
    "tensor_missing": Case(tensors_of("transformer", lambda t: t.pop(X)), (f"missing tensor '{X}' of shape [32, 64]",)),
    "tensor_unexpected": Case(
        tensors_of("transformer", lambda t: t.update(extra=torch.ones(1))), ("unexpected tensor 'extra'",)
    ),
    "tensor_of_other_shape": Case(
        tensors_of("transformer", lambda t: t.update({X: torch.ones(32, 65)})), (X, "[32, 65], expected [32, 64]")
    ),
    "tensor_of_integers": Case(
        tensors_of("transformer", lambda t: t.update({X: t[X].long()})), (f"transformer.{X}", "torch.int64")
    ),
    "tensor_of_bytes": Case(
        tensors_of("transformer", lambda t: t.update({X: t[X].byte()})), (f"transformer.{X}", "torch.uint8")
    ),
    "tensor_of_float8": Case(
        tensors_of("transformer", lambda t: t.update({X: t[X].to(torch.float8_e4m3fn)})), (X, "float8_e4m3fn")
    ),
    "nan": Case(tensors_of("transformer", lambda t: t[X][3, 5:6].fill_(float("nan"))), (X, "NaN or infinite values")),
    "infinity": Case(
        tensors_of("vae", lambda t: t["encoder.conv_in.bias"][:1].fill_(-torch.inf)), ("vae.encoder.conv_in.bias",)
    ),
    "nan_and_another_dtype": Case(
        tensors_of("transformer", lambda t: t[X][3, 5:6].fill_(float("nan"))), (X, "NaN"), options={"dtype": "bf16"}
    ),
    "overflow_in_fp16": Case(
        tensors_of("transformer", lambda t: t[X][3, 5:6].fill_(70_000)),
        (X, "once in torch.float16"),
        options={"dtype": "fp16"},
    ),
    "overflow_in_fp32": Case(
        tensors_of("transformer", lambda t: t.update({X: t[X].double() * 1e300})), (X, "once in torch.float32")
    ),
    "vae_tensor_missing": Case(
        tensors_of("vae", lambda t: t.pop("decoder.conv_in.weight")), ("vae", "missing tensor 'decoder.conv_in.weight'")
    ),
    "clip_tensor_missing": Case(
        tensors_of("text_encoder", lambda t: [t.pop(n) for n in list(t) if n.endswith("final_layer_norm.bias")]),
        ("text_encoder", "missing tensor", "final_layer_norm.bias"),
    ),
    "clip_of_other_width": Case(
        lambda f: edit_json(f.flux / "transformer/config.json", pooled_projection_dim=17), ("text_embedder", "[32, 17]")
    ),
    "no_tokenizer": Case(lambda f: shutil.rmtree(f.flux / "tokenizer_2"), ("tokenizer_2", "no such folder")),
    "empty_tokenizer": Case(
        lambda f: [p.unlink() for p in (f.flux / "tokenizer").iterdir()], ("tokenizer", "holds no tokenizer files")
    ),
    "second_encoder_missing": Case(
        lambda f: shutil.rmtree(f.flux / "text_encoder_2"), ("text_encoder_2", "no such file")
    ),
    "shard_missing": Case(
        lambda f: (
            write_sharded(f.flux / "transformer"),
            (f.flux / "transformer/model-00002-of-00002.safetensors").unlink(),
        ),
        ("model-00002-of-00002.safetensors", "no such file"),
    ),
    "index_not_json": Case(
        lambda f: write_sharded(f.flux / "transformer").write_text("not json"), ("index.json", "not readable as JSON")
    ),
    "index_without_map": Case(edit_weight_map(lambda c: c.pop("weight_map")), ("index.json", "no weight_map")),
    "index_of_numbers": Case(
        edit_weight_map(lambda c: c["weight_map"].update({X: 1})), ("index.json", "no weight_map")
    ),
    "index_of_another_shard": Case(
        edit_weight_map(
            lambda c: c["weight_map"].update({X: next(v for v in c["weight_map"].values() if v != c["weight_map"][X])})
        ),
        (f"missing tensor '{X}', which the index says is here",),
    ),
    "index_without_a_tensor": Case(edit_weight_map(lambda c: c["weight_map"].pop(X)), (f"missing tensor '{X}'",)),
    "index_that_climbs_out": Case(
        edit_weight_map(lambda c: c["weight_map"].update({X: "../../../../etc/passwd"})), ("passwd", "no such file")
    ),
    "lora_absent": Case(lambda f: f.lora.unlink(), ("pytorch_lora_weights.safetensors: no such file or folder",)),
    "lora_half_missing": Case(
        tensors_of("lora", lambda t: t.pop(LORA_B)), ("'x_embedder' has only a part of its LoRA (A)",)
    ),
    "lora_layer_missing": Case(
        tensors_of("lora", lambda t: [t.pop(LORA_A), t.pop(LORA_B)]), ("missing LoRA of layer 'x_embedder'",)
    ),
    "lora_of_an_unknown_layer": Case(
        tensors_of("lora", lambda t: t.update({n.replace("x_emb", "y_emb"): t[n].clone() for n in (LORA_A, LORA_B)})),
        ("unexpected LoRA of layer 'y_embedder'",),
    ),
    "lora_key_unknown": Case(
        tensors_of("lora", lambda t: t.update({"x_embedder.lora_C.weight": torch.ones(1)})),
        ("'x_embedder.lora_C.weight'",),
    ),
    "lora_twice": Case(
        tensors_of("lora", lambda t: t.update({"x_embedder.lora_down.weight": t[LORA_A].clone()})),
        ("twice", "x_embedder"),
    ),
    "lora_ranks_differ": Case(
        tensors_of("lora", lambda t: t.update({LORA_A: torch.ones(5, 64)})), ("[5, 64] and [32, 4] don't fit",)
    ),
    "lora_of_rank_0": Case(
        tensors_of("lora", lambda t: t.update({LORA_A: torch.ones(0, 64), LORA_B: torch.ones(32, 0)})), ("[0, 64]",)
    ),
    "lora_of_other_width": Case(
        tensors_of("lora", lambda t: t.update({LORA_A: torch.ones(4, 65)})),
        ("goes from 65 to 32 channels, the layer from 64 to 32",),
    ),
    "lora_of_one_dimension": Case(
        tensors_of("lora", lambda t: t.update({LORA_A: torch.ones(4)})), ("[4] and [32, 4] don't fit",)
    ),
    "lora_alpha_of_two": Case(
        tensors_of("lora", lambda t: t.update({"x_embedder.alpha": torch.ones(2)})), ("alpha of 'x_embedder'", "[2]")
    ),
    "lora_alpha_nan": Case(
        tensors_of("lora", lambda t: t.update({"x_embedder.alpha": torch.tensor(torch.nan)})),
        ("scale of 'x_embedder'", "nan"),
    ),
    "lora_metadata_not_json": Case(lora_metadata("{"), ("lora_adapter_metadata is damaged",)),
    "lora_metadata_a_list": Case(lora_metadata("[1]"), ("lora_adapter_metadata is damaged",)),
    "lora_metadata_alpha_a_text": Case(lora_metadata('{"lora_alpha": "x"}'), ("lora_adapter_metadata is damaged",)),
    "lora_metadata_bad_pattern": Case(
        lora_metadata('{"alpha_pattern": {"(": 1}}'), ("lora_adapter_metadata is damaged",)
    ),
    "lora_metadata_patterns_a_list": Case(
        lora_metadata('{"alpha_pattern": [1]}'), ("lora_adapter_metadata is damaged",)
    ),
    "mogle_absent": Case(lambda f: f.mogle.unlink(), ("mogle.pt: no such file or folder",)),
    "mogle_empty": Case(lambda f: f.mogle.write_bytes(b""), ("mogle.pt", "not a PyTorch file, damaged or cut short")),
    "mogle_a_text": Case(
        lambda f: f.mogle.write_text("hello"), ("mogle.pt", "not a PyTorch file, damaged or cut short")
    ),
    "mogle_a_folder": Case(
        lambda f: [step(f.mogle) for step in (Path.unlink, Path.mkdir)], ("mogle.pt", "is a folder; name the file")
    ),
    "mogle_cut_short": Case(
        lambda f: os.truncate(f.mogle, 20_000), ("mogle.pt", "not a PyTorch file, damaged or cut short")
    ),
    "mogle_a_list": Case(pickle_of(lambda s: list(s.values())), ("must hold a state dict of tensors, holds list",)),
    "mogle_a_tensor": Case(pickle_of(lambda s: torch.ones(3)), ("must hold a state dict of tensors, holds Tensor",)),
    "mogle_wrapped": Case(pickle_of(lambda s: {"state_dict": s}), ("'state_dict' is dict",)),
    "mogle_of_numbers": Case(pickle_of(lambda s: {"global_expert.net.0.weight": 3}), ("is int",)),
    "mogle_a_plain_pickle": Case(lambda f: f.mogle.write_bytes(pickle.dumps({"a": [1]})), ("mogle.pt", "refused")),
    "mogle_of_other_things": Case(pickle_of(lambda s: {"a": torch.ones(3)}), ("neither experts nor a gate",)),
    "mogle_tensor_missing": Case(
        pickle_of(lambda s: {n: t for n, t in s.items() if n != "gating.gate.2.bias"}),
        ("missing tensor 'gating.gate.2.bias' of shape [20]",),
    ),
    "mogle_sparse": Case(
        pickle_of(lambda s: {n: t.to_sparse() if t.ndim == 2 else t for n, t in s.items()}), ("must be a dense one",)
    ),
    "mogle_on_meta": Case(pickle_of(lambda s: {n: t.to("meta") for n, t in s.items()}), ("must be a dense one",)),
    "mogle_of_float8": Case(
        pickle_of(lambda s: {n: t.to(torch.float8_e5m2) for n, t in s.items()}), ("mogle.", "torch.float8_e5m2")
    ),
    "mogle_of_another_size": Case(
        pickle_of(
            lambda s: {
                n: t[..., :60].clone() if n.endswith(("net.0.weight", "proj.weight")) else t for n, t in s.items()
            }
        ),
        ("mogle.pt", "60 channels"),
    ),
    "mogle_of_no_channels": Case(
        pickle_of(lambda s: {"global_expert.net.0.weight": torch.ones(0, 64)}), ("mogle.pt", "expert_dim", "got 0")
    ),
}


def convert_args(files: Files, output: Path) -> tuple[object, ...]:
    sources = ("--flux", files.flux, "--lora", files.lora, "--mogle", files.mogle)
    return ("convert", *sources, "-o", output, "--overwrite")


@pytest.mark.parametrize("name", SOURCES)
def test_bad_sources(name: str, tiny_files: Files, tmp_path: Path) -> None:
    case, files = SOURCES[name], Files(tmp_path / "sources")
    shutil.copytree(tiny_files.folder, files.folder)
    case.damage(files)
    output = tmp_path / "ckpt.safetensors"
    with unchanged(tmp_path):
        assert_raises(case.kind, lambda: files.convert(output, **case.options), *case.words)
    output.write_text("an older bundle")
    with unchanged(tmp_path):
        dtype = ("--dtype", case.options["dtype"]) if case.options else ()
        assert_one_line(run(*convert_args(files, output), *dtype), *case.words)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_pickle_that_would_run_code(legacy: bool, tiny_files: Files, tmp_path: Path) -> None:
    marker, evil = tmp_path / "marker", tmp_path / "mogle.pt"
    state = torch.load(tiny_files.mogle, weights_only=True)
    torch.save(state | {"extra": Marker(str(marker))}, evil, _use_new_zipfile_serialization=not legacy)
    torch.load(evil, weights_only=False)
    assert marker.exists()  # the pickle works: careless loading runs its code
    marker.unlink()
    output = tmp_path / "ckpt.safetensors"
    with unchanged(tmp_path):
        assert_raises(
            CheckpointError,
            lambda: mogle_rt.convert(tiny_files.flux, tiny_files.lora, evil, output),
            *(str(evil), "refused", "would run code"),
        )
        args = ("--flux", tiny_files.flux, "--lora", tiny_files.lora, "--mogle", evil, "-o", output)
        assert_one_line(run("convert", *args), str(evil), "refused", "would run code")


NO_PATHS = {
    "absent": ("/no/such/folder", "no such file or folder, nor a hub id like black-forest-labs/FLUX.1-dev"),
    "one_word": ("flux", "no such file or folder, nor a hub id"),
    "too_long": ("x" * 300, "File name too long"),
    "home_of_nobody": ("~nobody-at-all/flux", "home directory"),
    "a_file": ("flux.gguf", "flux.gguf: no such file or folder"),
    "no_hub_id": ("a/b..c", "no such file or folder, nor a hub id"),
    "hub_id_too_long": ("a/" + "b" * 200, "no such file or folder, nor a hub id"),
    "climbing_out": ("a/b/c/../../d", "a/b/c/../../d: not a local path, and the hub answered: "),
    "offline": ("nobody/no-such-model", "the hub can't be reached; download it elsewhere and pass its path"),
    "file_offline": ("nobody/no-such-model/x.safetensors", "the hub can't be reached"),
}


@pytest.fixture
def offline(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the hub's library an empty cache, and no network."""
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("option", ["flux", "lora", "mogle"])
@pytest.mark.parametrize("name", NO_PATHS)
def test_paths_that_lead_nowhere(name: str, option: str, tiny_files: Files, tmp_path: Path) -> None:
    spec, words = NO_PATHS[name]
    paths: dict[str, Any] = {n: getattr(tiny_files, n) for n in ("flux", "lora", "mogle")} | {option: spec}
    output = tmp_path / "ckpt.safetensors"
    with unchanged(tmp_path):
        assert_raises(
            DownloadError if "offline" in name else CheckpointError,
            lambda: mogle_rt.convert(**paths, output=output),
            *(spec, words),
        )
        options = [x for n, value in paths.items() for x in (f"--{n}", value)]
        assert_one_line(run("convert", *options, "-o", output), spec, words)


@pytest.mark.usefixtures("offline")
def test_released_files_offline(tmp_path: Path) -> None:
    with unchanged(tmp_path):
        result = run("convert", "--released", "-o", tmp_path / "ckpt.safetensors")
        assert_one_line(result, "black-forest-labs/FLUX.1-dev", "the hub can't be reached")


ANSWER: Any = SimpleNamespace(headers={}, request=None)  # all that the hub's errors read of an HTTP response


HUB_ERRORS: dict[str, tuple[Exception, str]] = {
    "gated": (
        hub_errors.GatedRepoError("no\naccess", response=ANSWER),
        "access is gated; accept its licence on the model's page and log in with `hf auth login`",
    ),
    "unknown": (hub_errors.RepositoryNotFoundError("?", response=ANSWER), "no such repository on the hub"),
    "no_such_file": (hub_errors.EntryNotFoundError("?"), "the repository has no file"),
    "not_cached": (hub_errors.LocalEntryNotFoundError("a\nb"), "the hub can't be reached"),
    "server": (hub_errors.HfHubHTTPError("500 broken\nmore", response=ANSWER), "the hub answered: 500 broken"),
    "disk": (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
}


@pytest.mark.parametrize("name", HUB_ERRORS)
def test_what_the_hub_answers(name: str, tiny_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error, words = HUB_ERRORS[name]

    def refuse(*args: object, **options: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    for option in ("flux", "lora"):
        paths: dict[str, Any] = {n: getattr(tiny_files, n) for n in ("flux", "lora", "mogle")}
        paths |= {option: "someone/something"}
        with unchanged(tmp_path):
            assert_raises(
                DownloadError,
                lambda paths=paths: mogle_rt.convert(**paths, output=tmp_path / "x.safetensors"),  # type: ignore[misc]
                *("someone/something", words),
            )


# What a call is given


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> Pipeline:
    return Pipeline(tiny_bundle, device="cpu", dtype="fp32")


BLACK = np.zeros((32, 32), dtype=np.uint8)
EMBEDS, POOLED = torch.zeros(1, 5, 24), torch.zeros(1, 16)
GENERATOR = torch.Generator()


@dataclass(frozen=True)
class Call:
    """Arguments of a call of the pipeline, and the words that the error must have."""

    options: dict[str, Any]
    words: tuple[str, ...]
    kind: type[MogleError] = InputError


CALLS = {
    "no_prompts": Call({"prompt": []}, ("the list of prompts is empty",)),
    "no_masks": Call({"mask": []}, ("the list of masks is empty",)),
    "masks_and_prompts": Call({"mask": [BLACK] * 3, "prompt": ["a", "b"]}, ("3 masks and 2 prompts", "one of either")),
    "masks_and_embeds": Call(
        {"mask": [BLACK] * 2, "prompt_embeds": torch.zeros(3, 5, 24), "pooled_prompt_embeds": torch.zeros(3, 16)},
        ("2 masks and 3 prompts",),
    ),
    "prompt_a_number": Call({"prompt": [3]}, ("prompt must be a text or a list of texts, got int",)),
    "mask_of_class_19": Call({"mask": BLACK + 19}, ("holds 19", "classes are 0 (background) to 18 (cloth)")),
    "mask_a_number": Call({"mask": 3}, ("a mask must be a path", "got int")),
    "second_mask_bad": Call({"mask": [BLACK, BLACK + 77]}, ("mask 1", "holds 77")),
    "zero_steps": Call({"num_inference_steps": 0}, ("num_inference_steps must be a positive integer, got 0",)),
    "negative_steps": Call({"num_inference_steps": -3}, ("num_inference_steps", "got -3")),
    "steps_without_end": Call({"num_inference_steps": 10**30}, ("num_inference_steps can be at most 10000, got 1000",)),
    "half_a_step": Call({"num_inference_steps": 1.5}, ("num_inference_steps", "got 1.5")),
    "steps_a_text": Call({"num_inference_steps": "4"}, ("num_inference_steps", "got '4'")),
    "height": Call({"height": 100}, ("height must be a multiple of 16, got 100; the nearest is 96",)),
    "width": Call({"width": 600}, ("width must be a multiple of 16, got 600; the nearest is",)),
    "tiny_height": Call({"height": 3}, ("got 3; the nearest is 16",)),
    "negative_width": Call({"width": -64}, ("got -64; the nearest is 16",)),
    "height_beyond_memory": Call({"height": 16 * 10**20}, ("height can be at most", "got 16000")),
    "guidance_beyond_floats": Call({"guidance_scale": 10**400}, ("guidance_scale must be a finite number", "got 1000")),
    "position_delta_beyond_floats": Call({"position_delta": (10**400, 0)}, ("position_delta must be two numbers",)),
    "prompt_of_half_a_pair": Call({"prompt": "a\ud800"}, ("prompt must be UTF-8 text, got 'a\\ud800'",)),
    "embeds_a_list": Call(
        {"prompt_embeds": [1], "pooled_prompt_embeds": [1]}, ("prompt_embeds must be a tensor, got list",)
    ),
    "embeds_of_no_dimension": Call(
        {"prompt_embeds": torch.tensor(1.0), "pooled_prompt_embeds": POOLED},
        ("prompt_embeds must have shape", "got []"),
    ),
    "pooled_a_list": Call(
        {"prompt_embeds": EMBEDS, "pooled_prompt_embeds": [1]}, ("pooled_prompt_embeds must be a tensor, got list",)
    ),
    "one_hot_mask": Call(
        {"mask": torch.eye(19)[:, :, None].expand(-1, -1, 5)}, ("is one-hot; give its class numbers",)
    ),
    "callback_inputs_none": Call({"callback_on_step_end_tensor_inputs": None}, ("can be ['latents'] only, got None",)),
    "height_a_fraction": Call({"height": 64.0}, ("height", "got 64.0; the nearest is 64")),
    "no_images": Call({"num_images_per_prompt": 0}, ("num_images_per_prompt", "got 0")),
    "sequence_too_long": Call({"max_sequence_length": 513}, ("max_sequence_length can be at most 512, got 513",)),
    "no_sequence": Call({"max_sequence_length": 0}, ("max_sequence_length", "got 0")),
    "guidance_nan": Call({"guidance_scale": float("nan")}, ("guidance_scale", "got nan")),
    "guidance_negative": Call({"guidance_scale": -1.0}, ("guidance_scale", "got -1.0")),
    "condition_scale_infinite": Call({"condition_scale": float("inf")}, ("condition_scale", "got inf")),
    "position_scale_zero": Call({"position_scale": 0.0}, ("position_scale must be a positive number, got 0.0",)),
    "position_delta_of_three": Call({"position_delta": (1, 2, 3)}, ("position_delta", "(1, 2, 3)")),
    "output_type": Call({"output_type": "jpeg"}, ("output_type must be 'pil', 'np', 'pt' or 'latent', got 'jpeg'",)),
    "mask_posterior": Call({"mask_posterior": "mode"}, ("mask_posterior must be 'mean' or 'sample', got 'mode'",)),
    "latents_of_another_shape": Call(
        {"latents": torch.zeros(1, 5, 64)}, ("latents must have shape [1, 4, 64], got [1, 5, 64]",)
    ),
    "latents_of_integers": Call({"latents": torch.zeros(1, 4, 64).long()}, ("latents must be floating point", "int64")),
    "latents_in_eight_bits": Call(
        {"latents": torch.zeros(1, 4, 64).to(torch.float8_e4m3fn)}, ("must be floating point of 16, 32 or 64", "float8")
    ),
    "latents_sparse": Call(
        {"latents": torch.zeros(1, 4, 64).to_sparse()}, ("latents must be a dense tensor", "sparse")
    ),
    "latents_meta": Call({"latents": torch.zeros(1, 4, 64, device="meta")}, ("latents must be a dense tensor", "meta")),
    "latents_nested": Call(
        {"latents": torch.nested.nested_tensor([torch.zeros(4, 64)], layout=torch.jagged)}, ("dense tensor", "nested")
    ),
    "prompt_of_megabytes": Call({"prompt": "x" * 10**7}, ("at most 100,000 characters, got 10,000,000",)),
    "latents_an_array": Call({"latents": np.zeros((1, 4, 64))}, ("latents must be a tensor, got ndarray",)),
    "latents_with_nan": Call({"latents": torch.full((1, 4, 64), torch.nan)}, ("latents holds NaN",), NumericalError),
    "latents_with_infinity": Call(
        {"latents": torch.full((1, 4, 64), torch.inf)}, ("latents holds NaN or inf",), NumericalError
    ),
    "embeds_without_pooled": Call({"prompt_embeds": EMBEDS}, ("prompt_embeds and pooled_prompt_embeds go together",)),
    "pooled_without_embeds": Call(
        {"pooled_prompt_embeds": POOLED}, ("prompt_embeds and pooled_prompt_embeds go together",)
    ),
    "prompt_and_embeds": Call(
        {"prompt": "a", "prompt_embeds": EMBEDS, "pooled_prompt_embeds": POOLED},
        ("a prompt or prompt_embeds, not both",),
    ),
    "embeds_of_another_width": Call(
        {"prompt_embeds": torch.zeros(1, 5, 25), "pooled_prompt_embeds": POOLED},
        ("prompt_embeds must have shape [any, any, 24], got [1, 5, 25]",),
    ),
    "pooled_of_another_width": Call(
        {"prompt_embeds": EMBEDS, "pooled_prompt_embeds": torch.zeros(1, 17)},
        ("pooled_prompt_embeds must have shape [1, 16], got [1, 17]",),
    ),
    "pooled_of_another_batch": Call(
        {"prompt_embeds": EMBEDS, "pooled_prompt_embeds": torch.zeros(2, 16)},
        ("pooled_prompt_embeds must have shape [1, 16], got [2, 16]",),
    ),
    "embeds_with_nan": Call(
        {"prompt_embeds": EMBEDS + torch.nan, "pooled_prompt_embeds": POOLED},
        ("prompt_embeds holds NaN",),
        NumericalError,
    ),
    "embeds_of_nobody": Call(
        {"prompt_embeds": EMBEDS[:0], "pooled_prompt_embeds": POOLED[:0]}, ("give at least one prompt", "got 0 and 1")
    ),
    "generators": Call({"mask": [BLACK] * 3, "generator": [GENERATOR] * 2}, ("a list of 3 (one per image)",)),
    "generators_for_images": Call({"num_images_per_prompt": 2, "generator": [GENERATOR]}, ("a list of 2",)),
    "generators_of_seeds": Call({"generator": [42]}, ("generator must be one torch.Generator or a list of 1",)),
    "generator_of_a_seed": Call({"generator": 42}, ("generator must be one torch.Generator or a list of 1", "42")),
    "prompt_of_a_number": Call({"prompt": 5}, ("prompt must be a text or a list of texts, got int",)),
    "size_of_a_text": Call({"height": "128"}, ("height must be a multiple of 16, got '128'",)),
    "callback_of_a_number": Call({"callback_on_step_end": 5}, ("callback_on_step_end must be a function, got 5",)),
    "callback_inputs": Call({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, ("can be ['latents'] only",)),
    "callback_of_another_shape": Call(
        {"callback_on_step_end": lambda *_: {"latents": torch.zeros(1, 3, 64)}},
        ("latents from callback_on_step_end must have shape [1, 4, 64], got [1, 3, 64]",),
    ),
    "callback_of_nan": Call(
        {"callback_on_step_end": lambda *_: {"latents": torch.full((1, 4, 64), torch.nan)}},
        ("latents from callback_on_step_end holds NaN",),
        NumericalError,
    ),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", CALLS)
def test_bad_calls(name: str, pipe: Pipeline) -> None:
    call = CALLS[name]
    options = {"mask": None, "prompt": None, "num_inference_steps": 2, "height": 32, "width": 32}
    if "prompt_embeds" in call.options or "pooled_prompt_embeds" in call.options:
        del options["prompt"]
    assert_raises(call.kind, lambda: pipe(**options | call.options), *call.words)
    pipe(None, None, 1, height=16, width=16)  # the next call works


def test_a_size_beyond_the_schedule() -> None:
    flux = SchedulerConfig(shift=3.0, use_dynamic_shifting=True)
    assert_raises(
        InputError, lambda: make_schedule(flux, 4, 10**7), "10000000 image tokens are too many for the schedule"
    )
    assert make_schedule(flux, 4, 10**6).sigmas.isfinite().all()


def test_a_prompt_for_a_bundle_without_text_encoders(tiny_files: Files, tmp_path: Path) -> None:
    path = tiny_files.convert(tmp_path / "ckpt.safetensors", text_encoders=False)
    words = f"{path}: holds no text encoders"
    with unchanged(tmp_path):
        pipe = Pipeline(path, device="cpu", dtype="fp32")
        advice = (
            "; pass prompt_embeds and pooled_prompt_embeds instead of a prompt, or no prompt, to draw from the mask "
        )
        advice += "alone"
        assert_raises(CheckpointError, lambda: pipe(None, "a face", 2, height=32, width=32), words + advice)
        result = run("generate", path, "-p", "a face", "-o", tmp_path / "x.png", *QUICK)
        assert_one_line(result, words, "convert it with them", "or give --embeds", "it draws from masks alone")
        result = run("embed", path, "a face", "-o", tmp_path / "x.safetensors")
        assert_one_line(result, words, "take a bundle that was converted with them")


NO_DEVICES = ("gpu", "cuda:x", "cuda:-1", "vulkan", "meta", "xpu", "", True, -1, 256, "cuda:200", ["cpu"])
OPTIONS: dict[str, tuple[dict[str, Any], type[MogleError], tuple[str, ...]]] = {
    "dtype": ({"dtype": "fp8"}, ConfigError, ("dtype must be bf16, fp16 or fp32, got fp8",)),
    "dtype_of_integers": ({"dtype": torch.int8}, ConfigError, ("dtype must be bf16, fp16 or fp32, got torch.int8",)),
    "model_config_key": (
        {"model_config": {"add_cond_atn": True}},
        ConfigError,
        ("model_config: unknown option 'add_cond_atn'; did you mean 'add_cond_attn'?",),
    ),
    "model_config_keys": (
        {"model_config": {"guidance": 3}},
        ConfigError,
        ("unknown option 'guidance'; known: union_cond_attn, add_cond_attn, latent_lora",),
    ),
    "model_config_value": (
        {"model_config": {"latent_lora": 1}},
        ConfigError,
        ("latent_lora must be true or false, got 1",),
    ),
    "cache_of_no_size": ({"cache_bytes": None}, ConfigError, ("a cache's size must be 0 bytes or more, got None",)),
    "cache_of_a_text": ({"cache_bytes": "1G"}, ConfigError, ("a cache's size must be 0 bytes or more, got '1G'",)),
    "model_config_a_list": ({"model_config": ["latent_lora"]}, ConfigError, ("must be a mapping", "got list")),
    **{
        f"device_{device!r}": (
            {"device": device},
            DeviceError,
            ("device must be cpu, cuda, cuda:N or mps, got", repr(device)),
        )
        for device in NO_DEVICES
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_options(name: str, tiny_bundle: Path) -> None:
    options, kind, words = OPTIONS[name]
    assert_raises(kind, lambda: Pipeline(tiny_bundle, **options), *words)


@pytest.mark.parametrize("checkpoint", [None, 5])
def test_a_checkpoint_that_is_no_path(checkpoint: Any) -> None:
    assert_raises(CheckpointError, lambda: Pipeline(checkpoint), "a checkpoint must be a path, or 'demo', got")


def test_devices_that_are_not_there(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert_raises(DeviceError, lambda: choose_device(3), "cuda:3 was asked", "sees 0 CUDA GPUs", "use cpu")
    for device, words in (("cuda", "PyTorch sees 0 CUDA GPUs"), ("cuda:3", "cuda:3 was asked"), ("mps", "has none")):
        assert_raises(DeviceError, lambda device=device: choose_device(device), words, "use cpu")  # type: ignore[misc]
        with unchanged(tmp_path):
            args = ("generate", tiny_bundle, "-o", tmp_path / "x.png", *QUICK, "--device", device)
            assert_one_line(run(*args), words, "use cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == choose_device(1) == torch.device("cuda:1")
    assert_raises(DeviceError, lambda: choose_device("cuda:2"), "cuda:2", "sees 2 CUDA GPUs")
    assert_raises(DeviceError, lambda: choose_device(torch.device("cuda:200")), "sees 2 CUDA GPUs")


# What the command line is given


def bad_png(folder: Path) -> Path:
    path = draw_mask(folder / "cut.png")
    os.truncate(path, path.stat().st_size - 40)
    return path


def photograph(folder: Path) -> Path:
    path = folder / "photograph.png"
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    Image.fromarray(noise).save(path)
    return path


def folder_without_masks(folder: Path) -> Path:
    path = folder / "pictures"
    path.mkdir()
    (path / "notes.txt").touch()
    return path


def touched(path: Path) -> Path:
    path.touch()
    return path


def with_text(mask: Path, content: bytes) -> Path:
    mask.with_suffix(".txt").write_bytes(content)
    return mask


Args = Callable[[Path], tuple[object, ...]]
COMMANDS: dict[str, tuple[Args, tuple[str, ...]]] = {
    "zero_steps": (lambda d: ("--steps", 0), ("num_inference_steps must be a positive integer, got 0",)),
    "height": (lambda d: ("--height", 500), ("height must be a multiple of 16, got 500; the nearest is 496",)),
    "width": (lambda d: ("--width", 0), ("width must be a multiple of 16, got 0; the nearest is 16",)),
    "guidance": (lambda d: ("--guidance", "nan"), ("guidance_scale", "got nan")),
    "condition_scale": (lambda d: ("--condition-scale", -1), ("condition_scale", "got -1.0")),
    "no_images": (lambda d: ("-n", 0), ("--num-images and --batch-size must be 1 or more, got 0 and 1",)),
    "no_batch": (lambda d: ("--batch-size", -2), ("--num-images and --batch-size must be 1 or more, got 1 and -2",)),
    "negative_seed": (lambda d: ("--seed", -1), ("--seed must be from 0", "got -1")),
    "huge_seed": (lambda d: ("--seed", 2**63), ("--seed must be from 0", f"got {2**63}")),
    "device": (lambda d: ("--device", "toaster"), ("device must be cpu, cuda, cuda:N or mps, got 'toaster'",)),
    "dtype": (lambda d: ("--dtype", "fp8"), ("dtype must be bf16, fp16 or fp32, got fp8",)),
    "model_config_not_json": (lambda d: ("--model-config", "{x"), ("must be a JSON object", "got '{x'")),
    "model_config_a_list": (lambda d: ("--model-config", "[1]"), ("must be a JSON object", "got '[1]'")),
    "model_config_too_deep": (lambda d: ("--model-config", "[" * 100_000), ("must be a JSON object",)),
    "model_config_key": (lambda d: ("--model-config", '{"lora": true}'), ("unknown option 'lora'", "latent_lora")),
    "model_config_value": (lambda d: ("--model-config", '{"latent_lora": 1}'), ("must be true or false, got 1",)),
    "prompt_of_bytes": (lambda d: ("-p", "caf\udce9"), ("--prompt must be UTF-8 text", "caf\\udce9")),
    "absent_mask": (lambda d: ("-m", d / "absent.png"), ("absent.png: no such file",)),
    "mask_name_too_long": (lambda d: ("-m", d / ("x" * 300)), ("File name too long",)),
    "damaged_mask": (lambda d: ("-m", bad_png(d)), ("cut.png: can't be read",)),
    "no_mask": (lambda d: ("-m", photograph(d)), ("photograph.png: pixel (x=0, y=0) has colour", "not a class colour")),
    "folder_without_masks": (lambda d: ("-m", folder_without_masks(d)), ("pictures: a folder without masks (.bmp, ",)),
    "masks_into_a_file": (
        lambda d: ("-m", draw_mask(d / "a.png"), "-m", draw_mask(d / "b.png")),
        ("face.png: 2 masks need a folder as output, not a file",),
    ),
    "output_of_another_kind": (
        lambda d: ("-o", d / "x.gif"),
        ("x.gif: images are written as .png, .jpg, .jpeg, not '.gif'",),
    ),
    "output_below_a_file": (
        lambda d: ("-o", touched(d / "file") / "x.png"),
        ("file/x.png: can't be written", "file is a file, not a folder"),
    ),
    "output_deep_below_a_file": (
        lambda d: ("-o", touched(d / "file") / "a" / "b" / "x.png"),
        ("b/x.png: can't be written", "file is a file, not a folder"),
    ),
    "output_folder_a_file": (lambda d: ("-o", touched(d / "file")), ("file is a file, not a folder",)),
    "output_name_too_long": (lambda d: ("-o", d / ("x" * 300 + ".png")), ("File name too long",)),
    "output_the_mask": (
        lambda d: ("-m", draw_mask(d / "same.png"), "-o", d / "same.png"),
        ("same.png: is a mask itself; choose another name",),
    ),
    "output_another_mask": (
        lambda d: ("-m", draw_mask(d / "a.png"), "-m", draw_mask(d / "a_7.png"), "-o", d, "--seed", 7, "--overwrite"),
        ("a_7.png: is a mask itself; choose another name",),
    ),
    "text_beside_a_mask": (
        lambda d: ("-m", with_text(draw_mask(d / "a.png"), b"caf\xe9")),
        ("a.txt: must be UTF-8 text",),
    ),
    "steps_without_end": (lambda d: ("--steps", 10**30), ("num_inference_steps can be at most 10000, got 1000",)),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", COMMANDS)
def test_bad_commands(name: str, tiny_bundle: Path, tmp_path: Path) -> None:
    make, words = COMMANDS[name]
    args = make(tmp_path)
    with unchanged(tmp_path):
        assert_one_line(run("generate", tiny_bundle, "-o", tmp_path / "face.png", *QUICK, *args), *words)


def test_convert_without_sources(tmp_path: Path) -> None:
    with unchanged(tmp_path):
        result = run("convert", "-o", tmp_path / "x", "--lora", "x")
        assert_one_line(result, "missing --flux, --mogle; or pass --released for the published files")


def test_convert_to_an_unknown_dtype(tiny_files: Files, tmp_path: Path) -> None:
    output = tmp_path / "ckpt.safetensors"
    words = ("dtype must be bf16, fp16 or fp32, got int8",)
    with unchanged(tmp_path):
        assert_raises(ConfigError, lambda: tiny_files.convert(output, dtype="int8"), *words)
        assert_one_line(run(*convert_args(tiny_files, output), "--dtype", "int8"), *words)


# What can't be written

NO_OUTPUTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a_folder": (lambda d: d, "is a folder; a file name is needed"),
    "this_folder": (lambda d: Path(), "is a folder; a file name is needed"),
    "the_root": (lambda d: Path("/"), "is a folder; a file name is needed"),
    "below_a_file": (lambda d: d / "file" / "x", "file is a file, not a folder"),
    "deep_below_a_file": (lambda d: d / "file" / "a" / "x", "file is a file, not a folder"),
    "name_too_long": (lambda d: d / ("x" * 256), "File name too long"),
    "no_such_world": (lambda d: Path("/proc/nothing/here/x"), "No such file or directory"),
    "a_device": (lambda d: d / "pipe", "is a device or pipe; only ordinary files can be replaced"),
}


@pytest.mark.parametrize("name", NO_OUTPUTS)
def test_bundles_that_cannot_be_written(
    name: str, tiny_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, words = NO_OUTPUTS[name]
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    output = make(tmp_path)
    with unchanged(tmp_path):
        assert_raises(OutputError, lambda: tiny_files.convert(output), f"{output}: ", words)
        assert_one_line(run(*convert_args(tiny_files, output)), f"{output}: ", words)


@pytest.mark.parametrize(
    "source",
    [
        lambda f: f.lora,
        lambda f: f.mogle,
        lambda f: next((f.flux / "transformer").glob("*.safetensors")),
        lambda f: f.flux / "vae" / "config.json",
    ],
)
def test_a_source_is_not_overwritten(source: Callable[[Files], Path], tiny_files: Files, tmp_path: Path) -> None:
    files = Files(tmp_path / "sources")
    shutil.copytree(tiny_files.folder, files.folder)
    output = source(files)
    with unchanged(tmp_path):
        assert_raises(OutputError, lambda: files.convert(output), str(output), "is one of the files to convert")
        assert_one_line(run(*convert_args(files, output)), str(output), "is one of the files to convert")


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let writes beyond this size fail, as on a full disk, with the system's own error from a real write."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


def no_space(*args: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


FAILING_DISKS: dict[str, tuple[Callable[[pytest.MonkeyPatch], contextlib.AbstractContextManager[object]], str]] = {
    "while_writing": (lambda m: file_size_limit(300_000), "File too large"),
    "at_a_tensor": (
        lambda m: contextlib.nullcontext(m.setattr(BundleWriter, "_write_chunk", no_space)),
        "No space left on device",
    ),
    "at_the_end": (lambda m: contextlib.nullcontext(m.setattr(os, "fsync", no_space)), "No space left on device"),
    "at_the_renaming": (
        lambda m: contextlib.nullcontext(m.setattr(Path, "replace", no_space)),
        "No space left on device",
    ),
}


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize("name", FAILING_DISKS)
def test_a_full_disk(
    name: str, existing: bool, tiny_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail, words = FAILING_DISKS[name]
    output = tmp_path / "ckpt.safetensors"
    if existing:
        output.write_text("an older bundle")
    with unchanged(tmp_path), fail(monkeypatch):
        assert_raises(OutputError, lambda: tiny_files.convert(output), f"{output}: can't be written: {words}")
        assert_one_line(run(*convert_args(tiny_files, output)), f"{output}: can't be written: {words}")


def test_a_full_disk_for_an_image(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "face.png"
    output.write_text("an older image")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3)).astype(np.uint8))
    with unchanged(tmp_path):
        with file_size_limit(10_000):
            assert_raises(OutputError, lambda: save_image(noise, output), f"{output}: can't be written: File too large")
        monkeypatch.setattr(os, "fsync", no_space)
        result = run("generate", tiny_bundle, "-o", output, "--overwrite", *QUICK)
        assert_one_line(result, f"{output}: can't be written: No space left on device")


def test_a_source_that_vanishes_meanwhile(tiny_files: Files, tmp_path: Path) -> None:
    files, output = Files(tmp_path / "sources"), tmp_path / "ckpt.safetensors"
    shutil.copytree(tiny_files.folder, files.folder)
    tensors, config = converter.gather(files.flux, files.lora, files.mogle)
    gone = part("vae")(files)
    gone.unlink()
    with unchanged(tmp_path):
        assert_raises(
            CheckpointError,
            lambda: write_bundle(output, tensors, config),
            f"{gone}: can't be read: No such file",
        )


def test_a_source_that_shrinks_meanwhile(tiny_files: Files, tmp_path: Path) -> None:
    files, output = Files(tmp_path / "sources"), tmp_path / "ckpt.safetensors"
    shutil.copytree(tiny_files.folder, files.folder)
    tensors, config = converter.gather(files.flux, files.lora, files.mogle)
    shrunk = part("transformer")(files)
    os.truncate(shrunk, shrunk.stat().st_size // 2)
    with unchanged(tmp_path):
        assert_raises(
            CheckpointError,
            lambda: write_bundle(output, tensors, config),
            f"{shrunk}: cut short while it was read",
        )


# Interruptions


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_an_interrupted_convert(
    existing: bool, tiny_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "ckpt.safetensors"
    if existing:
        output.write_text("an older bundle")
    write, calls = BundleWriter._write_chunk, 0

    def interrupt(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls % 50 == 0:
            assert any(p.name.endswith(".part") for p in tmp_path.iterdir())  # it was under way
            raise KeyboardInterrupt
        write(*args)

    monkeypatch.setattr(BundleWriter, "_write_chunk", interrupt)
    with unchanged(tmp_path):
        with pytest.raises(KeyboardInterrupt):
            tiny_files.convert(output)
        assert calls == 50
        result = run(*convert_args(tiny_files, output))
        assert calls == 100
    assert result.code == 128 + signal.SIGINT
    assert "Traceback" not in result.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["interrupt", "terminate"])
def test_a_convert_that_is_told_to_stop(
    number: signal.Signals, tiny_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command gets a real signal in the middle of writing. The test process ignores this signal, so the program
    can only end by its own handling of it."""
    output = tmp_path / "ckpt.safetensors"
    output.write_text("an older bundle")
    write, calls = BundleWriter._write_chunk, 0

    def write_and_signal(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 50:
            assert any(p.name.endswith(".part") for p in tmp_path.iterdir())  # it was under way
            os.kill(os.getpid(), number)
        write(*args)

    monkeypatch.setattr(BundleWriter, "_write_chunk", write_and_signal)
    before = signal.getsignal(number)
    if number == signal.SIGTERM:
        signal.signal(number, signal.SIG_IGN)
    try:
        with unchanged(tmp_path):
            result = run(*convert_args(tiny_files, output))
    finally:
        signal.signal(number, before)
    assert calls == 50
    assert result.code == 128 + number
    assert "Traceback" not in result.err
