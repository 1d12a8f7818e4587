"""The command ``generate``: draws faces from masks and prompts into files."""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mogle_rt import __version__
from mogle_rt.apps.program import console, parse_json
from mogle_rt.config import PATCH
from mogle_rt.errors import InputError

if TYPE_CHECKING:
    import torch

    from mogle_rt.apps.drawings import Existing
    from mogle_rt.pipeline import Pipeline


def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A bundle; demo is the one in the package.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Image (.png, .jpg), or a folder for several.")],
    mask: Annotated[
        list[Path] | None, typer.Option("--mask", "-m", help="Mask or folder of masks; repeatable.")
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            "-p",
            help="What the face looks like: once for all masks, or once for each. Default: what the text file of the "
            "mask's name beside it says, if there is one.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 28,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 3.5,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the first image; the next have the next. Default: drawn.")
    ] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, a multiple of 16; default: the bundle's.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, a multiple of 16; default: the bundle's.")] = None,
    num_images: Annotated[int, typer.Option("--num-images", "-n", help="Images for each mask.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Images computed at once.")] = 1,
    condition_scale: Annotated[float, typer.Option(help="Strength of the mask; 1 is the model's own.")] = 1.0,
    model_config: Annotated[str | None, typer.Option(help="The reference's switches as JSON.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N or mps; default: the best there is.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; default: what the device does fast.")] = None,
    kernels: Annotated[
        str | None, typer.Option(help="'triton' or 'torch': operations of a step; default: what suits the device.")
    ] = None,
    engine: Annotated[str, typer.Option(help="torch; from an export: onnxruntime, tensorrt, tensorrt-rtx.")] = "torch",
    engine_path: Annotated[Path | None, typer.Option(help="The export's folder; default: the bundle's own.")] = None,
    metadata: Annotated[bool, typer.Option(help="Write prompt, seed and settings into the images.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace images that are there already.")] = False,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Draw only images that aren't there yet; goes with --seed.")
    ] = False,
) -> None:
    """Draw faces from masks and prompts."""
    from mogle_rt.apps.drawings import find_masks, plan

    if num_images < 1 or batch_size < 1:
        raise InputError(f"--num-images and --batch-size must be 1 or more, got {num_images} and {batch_size}")
    masks: list[Path | None] = list(find_masks(mask)) if mask else [None]
    if seed is None:
        seed = secrets.randbelow(2**31)
    most = 2**63 - len(masks) * num_images - 1
    if not 0 <= seed <= most:
        raise InputError(f"--seed must be from 0 to {most}, got {seed}")
    if overwrite and skip_existing:
        raise InputError("--overwrite and --skip-existing exclude each other")
    existing: Existing = "replace" if overwrite else "skip" if skip_existing else "refuse"
    jobs = plan(masks, prompt, num_images, seed, output, existing)
    if not jobs:
        console.print("nothing to draw: all images are there already")
        return
    switches = parse_json(model_config)

    from mogle_rt.apps.image_files import save_image
    from mogle_rt.arguments import check_options
    from mogle_rt.masks.labels import to_labels
    from mogle_rt.pipeline import Pipeline

    # What is wrong is told before the model is loaded.
    check_options(
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=PATCH if height is None else height,
        width=PATCH if width is None else width,
        condition_scale=condition_scale,
    )
    for path in masks:
        if path is not None:
            to_labels(path)
    start = time.perf_counter()
    pipe = Pipeline(
        checkpoint,
        device=device,
        dtype=dtype,
        model_config=switches,
        kernels=kernels,
        engine=engine,  # type: ignore[arg-type]
        engine_path=engine_path,
    )
    if not pipe.bundle.has_text_encoders:
        raise InputError(
            f"{checkpoint}: holds no text encoders, without which there are no prompts; convert it with them, or call "
            "mogle_rt.Pipeline with prompt_embeds"
        )
    seconds = {"load": time.perf_counter() - start}
    for i in range(0, len(jobs), batch_size):
        batch = jobs[i : i + batch_size]
        images = pipe(
            [job.mask for job in batch if job.mask is not None] or None,
            [job.prompt for job in batch],
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=height,
            width=width,
            generator=[_generator(pipe, job.seed) for job in batch],
            condition_scale=condition_scale,
        ).images
        for name, value in pipe.last_run.seconds.items():
            seconds[name] = seconds.get(name, 0.0) + value
        for job, image in zip(batch, images, strict=True):
            settings = {
                "prompt": job.prompt,
                "seed": job.seed,
                "mask": job.mask.name if job.mask else None,
                "steps": steps,
                "guidance_scale": guidance,
                "size": list(image.size),
                "condition_scale": condition_scale,
                "model_config": pipe.model_config.to_dict(),
                "dtype": str(pipe.dtype).removeprefix("torch."),
                "bundle_sha256": pipe.bundle.content_hash,
                "software": f"mogle_rt {__version__}",
            }
            save_image(image, job.path, settings if metadata else None)
            typer.echo(job.path)
    stages = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    count = "1 image" if len(jobs) == 1 else f"{len(jobs)} images"
    console.print(f"{count} in {sum(seconds.values()):.2f} s (seed {seed}): {stages}", soft_wrap=True)


def _generator(pipe: Pipeline, seed: int) -> torch.Generator:
    """On the CPU: a seed is the same noise on every device."""
    import torch

    return torch.Generator("cpu").manual_seed(seed)
