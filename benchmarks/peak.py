"""Measures the memory that loading takes: ``python -m benchmarks.peak engine|baseline FOLDER`` prints bytes as JSON.

It runs in a process of its own, because the system keeps one peak for each process. What the process holds after
everything was imported does not count.
"""

from __future__ import annotations

import json
import resource
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

PIXELS = 64  # small, so that weights dominate
TEXT = 32
STEPS = 28
GUIDANCE = 3.5


def peak() -> int:
    """The most bytes that this process has ever held in memory.

    On Linux this is VmHWM and not ru_maxrss, which a process inherits from the one that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def warm_up() -> None:
    """Use the libraries once, so that they take the memory that they keep for themselves."""
    x = torch.randn(64, 64)
    torch.nn.functional.conv2d((x @ x)[None, None], x[None, None, :3, :3])


def load_engine(folder: Path) -> Any:
    """Load the runtime's way, from one bundle."""
    from mogle_rt import Pipeline

    return Pipeline(folder / "bundle.safetensors", device="cpu", dtype="fp32")


def load_baseline(folder: Path) -> Any:
    """Load by diffusers and peft, from the files that the bundle was made of."""
    from benchmarks.baseline import Baseline

    return Baseline.from_files(folder / "flux", folder / "pytorch_lora_weights.safetensors", folder / "mogle.pt")


def stop(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> None:
    """The latents after the first step."""
    pipe.interrupt = True


def first_step(model: Any, labels: torch.Tensor, prompt: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """Encode a mask and make the first step, which uses every weight but the decoder's. Returns latents (1, N, 64)."""
    from benchmarks.baseline import Baseline, schedule

    if isinstance(model, Baseline):
        start = noise()
        timesteps, sigmas = schedule(STEPS, start.shape[1])
        mask = model.encode_mask(labels)
        return model.step(0, timesteps, sigmas, mask, start, prompt, pooled, GUIDANCE, PIXELS, PIXELS)
    return by_pipeline(model, labels, prompt, pooled, output_type="latent", callback_on_step_end=stop)


def first_image(model: Any, labels: torch.Tensor, prompt: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """Draw an image, (1, 3, H, W)."""
    from benchmarks.baseline import Baseline

    if isinstance(model, Baseline):
        image = model(labels, prompt, pooled, noise(), STEPS, GUIDANCE, height=PIXELS, width=PIXELS)["image"]
        assert isinstance(image, torch.Tensor)
        return image
    return by_pipeline(model, labels, prompt, pooled, output_type="pt")


def by_pipeline(
    pipe: Any, labels: torch.Tensor, prompt: torch.Tensor, pooled: torch.Tensor, **options: Any
) -> torch.Tensor:
    """Call the runtime. Returns its images or latents."""
    images = pipe(
        labels.numpy(),
        prompt_embeds=prompt,
        pooled_prompt_embeds=pooled,
        latents=noise(),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        height=PIXELS,
        width=PIXELS,
        **options,
    ).images
    assert isinstance(images, torch.Tensor)
    return images


def noise() -> torch.Tensor:
    """The noise to begin with, (1, N, 64)."""
    return torch.randn(1, (PIXELS // 16) ** 2, 64, generator=torch.Generator().manual_seed(0))


def step_inputs(joint: int, pooled: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Labels and text embeddings for `first_step` and `first_image`, for a model with these widths."""
    labels = torch.arange(PIXELS * PIXELS, dtype=torch.int64).view(PIXELS, PIXELS) // 512 % 19
    return labels.to(torch.uint8), torch.randn(1, TEXT, joint), torch.randn(1, pooled)


def main() -> None:
    """Load, make a step, and print what that took."""
    for module in ("benchmarks.baseline", "mogle_rt.pipeline"):  # imported now, so that they don't count
        import_module(module)
    which, folder = sys.argv[1], Path(sys.argv[2])
    load = load_engine if which == "engine" else load_baseline
    config = json.loads((folder / "flux" / "transformer" / "config.json").read_text())
    inputs = step_inputs(config["joint_attention_dim"], config["pooled_projection_dim"])
    with torch.no_grad():
        warm_up()
        start = psutil.Process().memory_info().rss
        model = load(folder)
        loaded = peak() - start
        first_step(model, *inputs)
    print(json.dumps({"loaded": loaded, "stepped": peak() - start}))


if __name__ == "__main__":
    main()
