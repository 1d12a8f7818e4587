"""Files that describe far more than they hold, or would keep a reader busy for ever, are refused before they are read."""

from __future__ import annotations

import json
import os
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mogle_rt import CheckpointError
from mogle_rt.conversion import convert as conversion
from mogle_rt.conversion.adapter_settings import adapter_settings
from mogle_rt.conversion.convert import gather
from mogle_rt.conversion.folders import LARGEST_JSON, read_json
from mogle_rt.conversion.lora import read_adapter
from mogle_rt.conversion.mogle_file import read_mogle
from mogle_rt.conversion.tensors import StoredTensor
from tests.checkpoints import TINY, Files

LAYER = "transformer_blocks.0.attn.to_q"


def settings_of(tmp_path: Path, **values: object) -> object:
    file = tmp_path / "adapter_model.safetensors"
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    return adapter_settings(file, {})


@pytest.mark.quick
@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(a|aa)+", "(.*)*x", "((a*))*", "(?:a?){40}", ".*.*.*x", r"([a-z]+\.)*x", r"(a\))+", "[(]?(a)*"],
)
def test_patterns_that_could_take_for_ever(pattern: str, tmp_path: Path) -> None:
    for name in ("alpha_pattern", "rank_pattern"):
        with pytest.raises(CheckpointError, match=r"at most 2 repeats .* of single characters can be in a pattern"):
            settings_of(tmp_path, **{name: {pattern: 8}})


@pytest.mark.quick
def test_too_many_patterns(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="at most 20 patterns can have any"):
        settings_of(tmp_path, alpha_pattern={f"a{i}.*": 1 for i in range(21)})
    with pytest.raises(CheckpointError, match="at most 3 groups"):
        settings_of(tmp_path, alpha_pattern={"(a|a)" * 40: 1})
    with pytest.raises(CheckpointError, match="more than 10,000 patterns"):
        settings_of(tmp_path, alpha_pattern={f"a{i}": 1 for i in range(10_001)})


@pytest.mark.quick
@pytest.mark.parametrize(
    "pattern", [LAYER, r"blocks\.\d+\.attn\.to_(q|k|v)", "transformer_blocks.0.*to_q", ".*[*+?]?to_q"]
)
def test_patterns_that_people_write(pattern: str, tmp_path: Path) -> None:
    settings = adapter_settings(Path("x"), {"lora_adapter_metadata": json.dumps({"alpha_pattern": {pattern: 8}})})
    assert settings.scale(LAYER if "blocks" not in pattern[:6] else "blocks.0.attn.to_q", 4, None, tmp_path) == 2


@pytest.mark.quick
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora_alpha": 10**400}, "lora_alpha must be a finite number"),
        ({"lora_alpha": True}, "lora_alpha must be a number, got True"),
        ({"r": 10**9}, "r must be from 1 to 16384"),
        ({"r": None, "rank_pattern": {"x": None}}, "a rank must be a whole number, got None"),
        ({"alpha_pattern": {"x": "y"}}, "an alpha must be a number, got 'y'"),
        ({"alpha_pattern": 5}, "is damaged"),
    ],
)
def test_numbers_of_an_adapter(values: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        settings_of(tmp_path, **values)


def test_a_lora_is_checked_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The header describes gigabytes, and the file is as large, but it is a hole on the disk."""
    path, rank = tmp_path / "lora.safetensors", 1 << 20
    size = rank * TINY.width * 2
    header = {
        f"{LAYER}.lora_A.weight": {"dtype": "BF16", "shape": [rank, TINY.width], "data_offsets": [0, size]},
        f"{LAYER}.lora_B.weight": {"dtype": "BF16", "shape": [TINY.width, rank], "data_offsets": [size, 2 * size]},
    }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + 2 * size)
    monkeypatch.setattr(StoredTensor, "chunks", lambda _: pytest.fail("it is read"))
    with pytest.raises(CheckpointError, match="has rank 1048576; at most 16384 is read"):
        read_adapter(path, TINY)


def test_a_compressed_pickle(tiny_files: Files, tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    with zipfile.ZipFile(tiny_files.mogle) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(CheckpointError, match="in it is compressed, which PyTorch never does"):
        read_mogle(path)


@pytest.mark.parametrize("shared", [False, True], ids=["repeated", "shared"])
def test_a_pickle_of_more_than_it_holds(shared: bool, tmp_path: Path) -> None:
    """In the pickle, one tensor repeats a single number, or many tensors share one memory."""
    memory = torch.zeros(1000)
    tensors = {f"gating.{i}": memory for i in range(99)} if shared else {"gating.x": torch.zeros(1).expand(1 << 33)}
    torch.save(tensors, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"its tensors would take .* bytes, but the file has only"):
        read_mogle(tmp_path / "m.pt")


def test_a_nested_tensor_in_a_pickle(tmp_path: Path) -> None:
    torch.save({"gating.x": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"dense one that holds its data|would run code"):
        read_mogle(tmp_path / "m.pt")


def test_negative_bits_in_a_pickle_are_resolved(tiny_files: Files, tmp_path: Path) -> None:
    state = torch.load(tiny_files.mogle)
    name = "gating.noise_proj.weight"
    negative = torch.complex(torch.zeros_like(state[name]), -state[name]).conj().imag
    assert negative.is_neg()
    torch.save(state | {name: negative}, tmp_path / "m.pt")
    tensors, _ = read_mogle(tmp_path / "m.pt")
    assert torch.equal(tensors[name].load(), state[name])


def test_experts_from_safetensors_are_not_read_at_once(
    tiny_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(torch.load(tiny_files.mogle), tmp_path / "m.safetensors")
    monkeypatch.setattr(StoredTensor, "chunks", lambda _: pytest.fail("it is read"))
    read_mogle(tmp_path / "m.safetensors")


def test_json_of_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.touch()
    os.truncate(path, LARGEST_JSON + 1)
    with pytest.raises(CheckpointError, match="not readable as JSON: it has more than 67,108,864 bytes"):
        read_json(path)


def test_a_large_file_beside_a_tokenizer_is_not_read(
    tiny_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Files(shutil.copytree(tiny_files.folder, tmp_path / "own"))
    large = files.flux / "tokenizer" / "zzz.txt"
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda p: pytest.fail("it is read") if p == large else read(p))
    large.touch()
    os.truncate(large, conversion.TOKENIZER_FILE_LIMIT + 1)
    tensors, _ = gather(files.flux, files.lora, files.mogle)
    assert "tokenizer.zzz.txt" not in tensors


def test_where_a_model_was_made_stays_there(tiny_files: Files, tmp_path: Path) -> None:
    """transformers writes the folder that a model was loaded from into its configuration; a bundle leaves it out."""
    files = Files(shutil.copytree(tiny_files.folder, tmp_path / "own"))
    path = files.flux / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_name_or_path": "/home/somebody/models/clip"}))
    _, config = gather(files.flux, files.lora, files.mogle)
    assert "somebody" not in json.dumps(config.to_dict())
