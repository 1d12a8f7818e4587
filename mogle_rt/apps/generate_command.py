"""The command ``generate``: draw faces from masks and prompts, and write them to files."""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from mogle_rt import __version__
from mogle_rt.apps.program import console, parse_json
from mogle_rt.errors import CheckpointError, InputError, MaskError, MogleError

if TYPE_CHECKING:
    from mogle_rt.apps.drawings import Drawing, Existing
    from mogle_rt.pipeline import Pipeline

SEEDS = 1_000_000  # random seeds are below this, so that they are short enough to type
FACE, OUTPUT, MODEL = "What is drawn", "Files", "How it is computed"


def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A bundle, or demo for the one in the package.")],
    mask: Annotated[
        list[Path] | None,
        typer.Option(
            "--mask",
            "-m",
            help="A mask, a folder of masks or of one face's part files, or a quoted pattern such as 'masks/*.png'. "
            "Can be given several times.",
            rich_help_panel=FACE,
        ),
    ] = None,
    mask_order: Annotated[
        str,
        typer.Option(
            help="What a label map's numbers mean: celebamask, bisenet, farl, or class names separated by commas.",
            rich_help_panel=FACE,
        ),
    ] = "celebamask",
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            "-p",
            help="What the face looks like. Give it once for all masks, or once for each mask. Default: the text that "
            "belongs to the mask, from a .txt file of its name beside it or in ../text, or its entry in ../text.json.",
            rich_help_panel=FACE,
        ),
    ] = None,
    caption: Annotated[
        int,
        typer.Option(
            help="Which line of a mask's text to use, from 1, if it has several (as MM-CelebA-HQ's ten captions).",
            rich_help_panel=FACE,
        ),
    ] = 1,
    num_images: Annotated[
        int, typer.Option("--num-images", "-n", help="Images for each mask.", rich_help_panel=FACE)
    ] = 1,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of the first image; each next image has the next seed. Default: random.", rich_help_panel=FACE
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.", rich_help_panel=FACE)] = 28,
    guidance: Annotated[float, typer.Option(help="Guidance scale.", rich_help_panel=FACE)] = 3.5,
    condition_scale: Annotated[
        float, typer.Option(help="Strength of the mask; 1 is as trained, 0 is none.", rich_help_panel=FACE)
    ] = 1.0,
    height: Annotated[
        int | None,
        typer.Option(help="Pixels, a multiple of 16; default: from the mask's aspect ratio.", rich_help_panel=FACE),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(help="Pixels, a multiple of 16; default: from the mask's aspect ratio.", rich_help_panel=FACE),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            help="An image (.png, .jpg), a folder, or a pattern of {stem} (the mask's name), {seed} and {number}.",
            rich_help_panel=OUTPUT,
        ),
    ] = Path("{stem}_{seed}"),
    suffix: Annotated[
        str | None,
        typer.Option("--format", help="png or jpg, if --output has no suffix; default: png.", rich_help_panel=OUTPUT),
    ] = None,
    metadata: Annotated[
        bool, typer.Option(help="Write prompt, seed and settings into the images.", rich_help_panel=OUTPUT)
    ] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing images.", rich_help_panel=OUTPUT)
    ] = False,
    skip_existing: Annotated[
        bool,
        typer.Option(
            "--skip-existing",
            help="Draw only images whose files don't exist yet; use it with --seed.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Images computed at once.", rich_help_panel=MODEL)] = 1,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, cuda:N or mps; default: the best available.", rich_help_panel=MODEL),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="bf16, fp16 or fp32; default: one that is fast on the device.", rich_help_panel=MODEL),
    ] = None,
    kernels: Annotated[
        str | None,
        typer.Option(
            help="Operations that compute a step: triton or torch; default: what suits the device.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(help="torch, or for an export: onnxruntime, tensorrt, tensorrt-rtx.", rich_help_panel=MODEL),
    ] = "torch",
    engine_path: Annotated[
        Path | None,
        typer.Option(help="The export's folder; default: the bundle's folder.", rich_help_panel=MODEL),
    ] = None,
    model_config: Annotated[
        str | None, typer.Option(help="The reference's switches as JSON.", rich_help_panel=MODEL)
    ] = None,
) -> None:
    """Draw faces from masks and prompts."""
    start = time.perf_counter()
    # First check everything that needs no large library, so that a mistake is reported at once.
    from mogle_rt.apps.drawings import batches, find_masks, plan, say_how_many_have_prompts
    from mogle_rt.arguments import check_options
    from mogle_rt.bundle.shipped import bundle_path
    from mogle_rt.config import PATCH, ModelConfig, dtype_name
    from mogle_rt.masks.labels import to_labels

    if num_images < 1 or batch_size < 1:
        raise InputError(f"--num-images and --batch-size must be 1 or more, got {num_images} and {batch_size}")
    masks: list[Path | None] = list(find_masks(mask)) if mask else [None]
    if seed is None:
        seed = secrets.randbelow(SEEDS)
    most = 2**63 - len(masks) * num_images - 1
    if not 0 <= seed <= most:
        raise InputError(f"--seed must be from 0 to {most}, got {seed}")
    if caption < 1:
        raise InputError(f"--caption must be 1 or more, got {caption}")
    if prompt is not None and caption != 1:
        raise InputError("--caption chooses among the texts of masks; leave it out if --prompt is given")
    if overwrite and skip_existing:
        raise InputError("--overwrite and --skip-existing exclude each other")
    existing: Existing = "replace" if overwrite else "skip" if skip_existing else "refuse"
    jobs = plan(masks, prompt, num_images, seed, output, existing, suffix, caption)
    if not jobs:
        console.print("nothing to draw: all images are there already")
        return
    switches = parse_json(model_config)
    ModelConfig.of(switches)
    if dtype is not None:
        dtype_name(dtype)
    check_options(
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=PATCH if height is None else height,
        width=PATCH if width is None else width,
        condition_scale=condition_scale,
    )
    _must_exist(bundle_path(checkpoint), CheckpointError)
    for path in filter(None, masks):
        _must_exist(path, MaskError)
    order = mask_order.split(",") if "," in mask_order else mask_order
    shapes = {path: None if path is None else to_labels(path, order=order).shape for path in masks}
    if prompt is None and len(masks) > 1:
        say_how_many_have_prompts(jobs)

    with console.status(Text(f"loading {checkpoint} …")):
        from mogle_rt.apps.quick_imports import import_models

        import_models()
        from mogle_rt.pipeline import Pipeline

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
            f"{checkpoint}: holds no text encoders, which generate needs for prompts; convert it with them, or call "
            "mogle_rt.Pipeline with prompt_embeds"
        )
    seconds = {"load": time.perf_counter() - start}
    settings = {
        "steps": steps,
        "guidance_scale": guidance,
        "condition_scale": condition_scale,
        "mask_order": order,
    }
    for batch in batches(jobs, batch_size, shapes):
        _draw(pipe, batch, settings, (height, width), metadata, seconds)
    stages = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    count = "1 image" if len(jobs) == 1 else f"{len(jobs)} images"
    total = time.perf_counter() - start
    console.print(f"{count} in {total:.2f} s (seed {seed}): {stages}", soft_wrap=True)


def _must_exist(path: Path, error: type[MogleError]) -> None:
    """Check that a file exists. Its contents are checked later, when the libraries are loaded."""
    try:
        path.stat()  # not `exists`, which hides the error of too long a name from Python 3.14 on
    except (FileNotFoundError, NotADirectoryError):
        raise error(f"{path}: no such file") from None


def _draw(
    pipe: Pipeline,
    batch: list[Drawing],
    settings: dict[str, Any],
    size: tuple[int | None, int | None],
    metadata: bool,
    seconds: dict[str, float],
) -> None:
    """Draw one batch into its files, and add its times to ``seconds``."""
    import torch

    from mogle_rt.apps.image_files import save_image
    from mogle_rt.config import PATCH
    from mogle_rt.memory.threads import suitable_threads

    transformer, side = pipe.bundle.config.transformer, pipe.bundle.default_size
    height, width = size
    tokens = (height or side) // PATCH * ((width or side) // PATCH)
    rows = len(batch) * (2 * tokens + pipe.bundle.default_text_tokens)
    with suitable_threads(rows, transformer.width, pipe.device):
        images = pipe(
            [job.mask for job in batch if job.mask is not None] or None,
            [job.prompt for job in batch],
            num_inference_steps=settings["steps"],
            guidance_scale=settings["guidance_scale"],
            height=height,
            width=width,
            # The generators are on the CPU, so that a seed gives the same noise on every device.
            generator=[torch.Generator("cpu").manual_seed(job.seed) for job in batch],
            condition_scale=settings["condition_scale"],
            mask_order=settings["mask_order"],
        ).images
    for name, value in pipe.last_run.seconds.items():
        seconds[name] = seconds.get(name, 0.0) + value
    for job, image in zip(batch, images, strict=True):
        described = {
            "prompt": job.prompt,
            "seed": job.seed,
            "mask": job.mask.name if job.mask else None,
            "steps": settings["steps"],
            "guidance_scale": settings["guidance_scale"],
            "size": list(image.size),
            "condition_scale": settings["condition_scale"],
            "model_config": pipe.model_config.to_dict(),
            "dtype": str(pipe.dtype).removeprefix("torch."),
            "bundle_sha256": pipe.bundle.content_hash,
            "software": f"mogle_rt {__version__}",
        }
        save_image(image, job.path, described if metadata else None)
        typer.echo(job.path)
