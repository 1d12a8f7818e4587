"""From training to the bundle and back: writes a bundle from trained parts, and reads weights from one to train on."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import mogle_rt
from examples.demo_checkpoint.model import FaceMogle, Parts, to_parts
from mogle_rt.bundle.bundle import TEXT_PARTS, Bundle

SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


def export(model: FaceMogle, vae: Path, text: Path, output: Path) -> Path:
    """Write the parts in the layout of the published files, and convert these to a bundle in fp16.

    Args:
        vae: a diffusers folder. text: a folder with the four text parts.
    """
    return write_bundle(to_parts(model), model.config.to_dict(), vae, text, output)


def write_bundle(parts: Parts, config: dict[str, Any], vae: Path, text: Path, output: Path) -> Path:
    """The same, from tensors under their published names. config: the transformer's."""
    parts = {part: {n: t.contiguous() for n, t in named.items()} for part, named in parts.items()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        flux = folder / "flux"
        (flux / "transformer").mkdir(parents=True)
        (flux / "scheduler").mkdir()
        save_file(parts["transformer"], flux / "transformer/diffusion_pytorch_model.safetensors")
        config = {"_class_name": "FluxTransformer2DModel"} | config
        (flux / "transformer/config.json").write_text(json.dumps(config))
        (flux / "scheduler/scheduler_config.json").write_text(json.dumps(SCHEDULER))
        shutil.copytree(vae, flux / "vae")
        for part in TEXT_PARTS:
            shutil.copytree(text / part, flux / part)
        save_file({f"transformer.{n}": t for n, t in parts["lora"].items()}, folder / "lora.safetensors")
        torch.save(parts["mogle"], folder / "mogle.pt")
        output.parent.mkdir(parents=True, exist_ok=True)
        return mogle_rt.convert(
            flux, folder / "lora.safetensors", folder / "mogle.pt", output, dtype="fp16", progress=False
        )


def read_weights(bundle: Path | str) -> Parts:
    """A bundle's transformer, LoRA and mixture in float32, under their published names."""
    opened = Bundle(bundle)
    return {part: opened.part(part, torch.device("cpu"), torch.float32) for part in ("transformer", "lora", "mogle")}


def unpack(bundle: Path | str, folder: Path) -> None:
    """Write a bundle's VAE (``vae``) and text parts (``text/…``) as folders of a FLUX checkpoint, which training reads."""
    opened = Bundle(bundle)
    parts = {"vae": folder / "vae", **{part: folder / "text" / part for part in TEXT_PARTS}}
    configs = {
        "vae": ("config.json", opened.config.vae),
        "text_encoder": ("config.json", opened.config.text_encoder),
        "text_encoder_2": ("config.json", opened.config.text_encoder_2),
    }
    for part, target in parts.items():
        target.mkdir(parents=True, exist_ok=True)
        if part not in configs:
            for name, content in opened.files(part).items():
                (target / name).write_bytes(content)
            continue
        name, config = configs[part]
        (target / name).write_text(json.dumps(config))
        weights = "diffusion_pytorch_model.safetensors" if part == "vae" else "model.safetensors"
        tensors = {n: opened.tensor(f"{part}.{n}").clone() for n in opened.names(part)}
        save_file(tensors, target / weights, metadata={"format": "pt"})
