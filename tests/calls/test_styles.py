"""LoRAs on a pipeline, by the methods that diffusers has for them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import Tensor

from mogle_rt import CheckpointError, ConfigError, InputError, Pipeline
from mogle_rt.engines.onnx_engine import OnnxEngine
from tests.conftest import relative_rms
from tests.model.test_styles import write_style

SIZE = 64


@pytest.fixture
def pipe(tiny_bundle: Path) -> Pipeline:
    pipe = Pipeline(tiny_bundle, device="cpu", dtype="fp32")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def styles(tmp_path: Path) -> list[Path]:
    return [write_style(tmp_path / f"{name}.safetensors", seed, 4) for seed, name in enumerate("ab", 1)]


def draw(pipe: Pipeline, **options: Any) -> Tensor:
    settings: dict[str, Any] = {"num_inference_steps": 2, "height": SIZE, "width": SIZE, "output_type": "latent"}
    generator = torch.Generator().manual_seed(0)
    images = pipe(None, "a man", generator=generator, **settings | options).images
    assert isinstance(images, Tensor)
    return images


def test_loaded_unloaded_and_loaded_again(pipe: Pipeline, styles: list[Path]) -> None:
    plain = draw(pipe)
    pipe.load_lora_weights(styles[0])
    styled = draw(pipe)
    assert relative_rms(styled, plain) > 1e-2
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), plain)
    pipe.load_lora_weights(styles[0])
    assert torch.equal(draw(pipe), styled)


@pytest.mark.quick
def test_several_adapters(pipe: Pipeline, styles: list[Path]) -> None:
    plain = draw(pipe)
    pipe.load_lora_weights(styles[0], adapter_name="a", weight=0.5)
    only_a = draw(pipe)
    pipe.load_lora_weights(str(styles[1]), adapter_name="b")
    assert pipe.get_active_adapters() == ["a", "b"]
    both = draw(pipe)
    pipe.set_adapters("a", 0.5)
    assert pipe.get_active_adapters() == ["a"]
    assert pipe.get_list_adapters() == {"transformer": ["a", "b"]}
    assert torch.equal(draw(pipe), only_a)
    pipe.set_adapters(["a", "b"], [0.5, 1.0])
    assert torch.equal(draw(pipe), both)
    pipe.set_adapters(["a", "b"])
    assert relative_rms(draw(pipe), both) > 1e-3
    for none in ([], ["a", "b"]):
        pipe.set_adapters(none, 0.0)
        assert torch.equal(draw(pipe), plain)
    pipe.delete_adapters("a")
    assert pipe.get_list_adapters() == {"transformer": ["b"]}
    pipe.unload_lora_weights()
    assert pipe.get_list_adapters() == {}


def test_names_by_default(pipe: Pipeline, styles: list[Path]) -> None:
    for path in styles:
        pipe.load_lora_weights(path)
    assert pipe.get_active_adapters() == ["default_0", "default_1"]
    pipe.delete_adapters(["default_0"])
    pipe.load_lora_weights(styles[0])
    assert pipe.get_active_adapters() == ["default_1", "default_0"]


def test_folders_and_scales(pipe: Pipeline, styles: list[Path], tmp_path: Path) -> None:
    """Loaded are a folder as peft saves it, with its scale (here 2), and a file that is named within a folder."""
    pipe.load_lora_weights(styles[0], weight=2.0)
    expected = draw(pipe)
    pipe.unload_lora_weights()
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(styles[0].read_bytes())
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "peft_type": "LORA"}))
    pipe.load_lora_weights(folder)
    assert torch.equal(draw(pipe), expected)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path, "a.safetensors", weight=2.0)
    assert torch.equal(draw(pipe), expected)


def test_from_the_hub(pipe: Pipeline, styles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default diffusers' file is fetched. peft's comes together with the settings that hold its scale."""
    repository, cache = tmp_path / "repository", tmp_path / "cache"
    for folder in (repository, cache):
        folder.mkdir()
    (repository / "pytorch_lora_weights.safetensors").write_bytes(styles[0].read_bytes())
    (repository / "adapter_model.safetensors").write_bytes(styles[0].read_bytes())
    (repository / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "peft_type": "LORA"}))

    def download(name: str, file: str) -> str:
        assert name == "someone/style"
        shutil.copyfile(repository / file, cache / file)
        return str(cache / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for file, weight in ((None, 1.0), ("adapter_model.safetensors", 2.0)):
        pipe.load_lora_weights(styles[0], weight=weight)
        expected = draw(pipe)
        pipe.unload_lora_weights()
        pipe.load_lora_weights("someone/style", file)
        assert torch.equal(draw(pipe), expected)
        pipe.unload_lora_weights()
        for found in cache.iterdir():
            found.unlink()


MISTAKES: list[tuple[Callable[[Pipeline, Path], None], type[Exception], str]] = [
    (lambda p, f: p.load_lora_weights(f, adapter_name="a"), InputError, "adapter 'a' is loaded already"),
    (lambda p, f: p.load_lora_weights(f, weight=float("nan")), InputError, "a finite number, got nan"),
    (lambda p, f: p.load_lora_weights(f.with_name("c.safetensors")), CheckpointError, "no such file"),
    (lambda p, f: p.set_adapters("c"), InputError, "there is no adapter 'c'; loaded are: 'a'"),
    (lambda p, f: p.set_adapters(["a", "a"]), InputError, "can be named once, got"),
    (lambda p, f: p.set_adapters("a", [1.0, 2.0]), InputError, "1 adapters need as many weights"),
    (lambda p, f: p.set_adapters("a", "strong"), InputError, "a finite number, got 'strong'"),  # type: ignore[arg-type]
    (lambda p, f: p.delete_adapters(["a", "c"]), InputError, "there is no adapter 'c'"),
]


@pytest.mark.parametrize(("mistake", "error", "message"), MISTAKES, ids=[message for *_, message in MISTAKES])
def test_mistakes_change_nothing(
    mistake: Callable[[Pipeline, Path], None],
    error: type[Exception],
    message: str,
    pipe: Pipeline,
    styles: list[Path],
) -> None:
    pipe.load_lora_weights(styles[0], adapter_name="a", weight=0.5)
    before = draw(pipe)
    with pytest.raises(error, match=message):
        mistake(pipe, styles[1])
    assert (pipe.get_active_adapters(), pipe.get_list_adapters()) == (["a"], {"transformer": ["a"]})
    assert torch.equal(draw(pipe), before)


def test_not_from_within_a_call(pipe: Pipeline, styles: list[Path]) -> None:
    def load(pipe: Pipeline, step: int, timestep: Tensor, tensors: dict[str, Any]) -> None:
        pipe.load_lora_weights(styles[0])

    with pytest.raises(InputError, match="can't be called from within its own call"):
        draw(pipe, callback_on_step_end=load)
    assert pipe.get_list_adapters() == {}


def test_exported_graphs_take_none(pipe: Pipeline, styles: list[Path]) -> None:
    pipe.engine = OnnxEngine.__new__(OnnxEngine)
    with pytest.raises(ConfigError, match=r'exported graph.*engine="torch"'):
        pipe.load_lora_weights(styles[0])
    assert (pipe.get_active_adapters(), pipe.get_list_adapters()) == ([], {})
