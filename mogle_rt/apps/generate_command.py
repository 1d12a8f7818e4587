"""The command ``generate``: draw faces from masks and prompts, and write them to files."""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import Annotated

import typer

from mogle_rt.apps.program import (
    FACE,
    MODEL,
    OUTPUT,
    ConditionScale,
    Device,
    Dtype,
    EnginePath,
    Guidance,
    Kernels,
    MaskOrder,
    MaxMemory,
    Metadata,
    Pixels,
    Steps,
    Switches,
    WhichEngine,
    must_exist,
    parse_json,
    say,
    tell_details,
)
from mogle_rt.errors import InputError, MaskError

MOST_IMAGES = 1_000_000  # of a mask; all are listed before the first is drawn
SEEDS = 1_000_000  # random seeds are below this, so that they are short enough to type


def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A bundle, or demo for the one in the package.")],
    mask: Annotated[
        list[Path] | None,
        typer.Option(
            "--mask",
            "-m",
            help="Masks: files, folders of masks or of one face's part files, or patterns such as masks/*.png, quoted or "
            "not. Several can follow, and the option can be given several times.",
            rich_help_panel=FACE,
        ),
    ] = None,
    mask_order: MaskOrder = "celebamask",
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
    embeds: Annotated[
        Path | None,
        typer.Option(
            help="Prompts as embeddings, a file of mogle-rt embed: no text encoders are loaded.", rich_help_panel=FACE
        ),
    ] = None,
    num_images: Annotated[
        int, typer.Option("--num-images", "-n", help="Images for each mask.", rich_help_panel=FACE)
    ] = 1,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of the first image; each next image has the next seed. Default: random.", rich_help_panel=FACE
        ),
    ] = None,
    steps: Steps = 28,
    guidance: Guidance = 3.5,
    condition_scale: ConditionScale = 1.0,
    height: Pixels = None,
    width: Pixels = None,
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
    metadata: Metadata = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing images.", rich_help_panel=OUTPUT)
    ] = False,
    skip_existing: Annotated[
        bool,
        typer.Option(
            "--skip-existing",
            help="Draw only images whose files don't exist yet. An interrupted job goes on, in several processes if you "
            "like.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    part: Annotated[
        str | None,
        typer.Option(
            "--shard",
            help="I/N, as 1/2: draw part I of N of all images; the others are for other processes.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    sheet: Annotated[
        Path | None,
        typer.Option(help="Also write a contact sheet: masks and images in one .png or .jpg.", rich_help_panel=OUTPUT),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images computed at once.", rich_help_panel=MODEL)] = 1,
    device: Device = None,
    dtype: Dtype = None,
    kernels: Kernels = None,
    engine: WhichEngine = "torch",
    engine_path: EnginePath = None,
    max_memory: MaxMemory = None,
    fast: Annotated[
        str | None,
        typer.Option(
            help="Leave steps out, which changes the images: balanced, fast, or settings such as steps_mask=fast,order=1.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Say what is held in memory and how steps run.", rich_help_panel=MODEL),
    ] = False,
    model_config: Switches = None,
) -> None:
    """Draw faces from masks and prompts."""
    start = time.perf_counter()
    # First check everything that needs no large library, so that a mistake is reported at once.
    from mogle_rt.apps.drawing import Request, draw
    from mogle_rt.arguments import check_names, check_options
    from mogle_rt.config import PATCH, ModelConfig, dtype_name, parse_bytes
    from mogle_rt.fast.choice import said
    from mogle_rt.jobs.captions import prompts_of
    from mogle_rt.jobs.embeddings import EmbeddedPrompts
    from mogle_rt.jobs.naming import Naming
    from mogle_rt.jobs.plan import find_masks

    if num_images < 1 or batch_size < 1:
        raise InputError(f"--num-images and --batch-size must be 1 or more, got {num_images} and {batch_size}")
    if num_images > MOST_IMAGES:
        raise InputError(f"--num-images must be at most {MOST_IMAGES:,}, got {num_images:,}")
    masks: list[Path | None] = list(find_masks(mask)) if mask else [None]
    most = 2**63 - len(masks) * num_images - 1
    if seed is not None and not 0 <= seed <= most:
        raise InputError(f"--seed must be from 0 to {most}, got {seed}")
    if caption < 1:
        raise InputError(f"--caption must be 1 or more, got {caption}")
    if prompt is not None and caption != 1:
        raise InputError("--caption chooses among the texts of masks; leave it out if --prompt is given")
    if overwrite and skip_existing:
        raise InputError("--overwrite and --skip-existing exclude each other")
    prompts = prompts_of(prompt, masks, caption, say)
    if verbose:
        tell_details()
    memory = None if max_memory is None else parse_bytes(max_memory)
    embedded = None if embeds is None else EmbeddedPrompts.read(embeds)
    if embedded is not None:
        prompts = embedded.prompts_of_masks(None if prompt is None else prompts, prompts)
    naming = Naming(output, suffix, masks=len(masks), several_images=num_images > 1)
    switches = ModelConfig.of(parse_json(model_config))
    check_names(device=device, engine=engine, kernels=kernels)
    if fast is not None:
        said(fast)
    check_options(
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=PATCH if height is None else height,
        width=PATCH if width is None else width,
        condition_scale=condition_scale,
    )
    for path in filter(None, masks):
        must_exist(path, MaskError)
    draw(
        Request(
            checkpoint=checkpoint,
            masks=masks,
            prompts=prompts,
            prompts_found=prompt is None and embeds is None,
            embeds=embedded,
            num_images=num_images,
            seed=seed,
            drawn_seed=secrets.randbelow(SEEDS),
            naming=naming,
            existing="replace" if overwrite else "skip" if skip_existing else "refuse",
            part=part,
            sheet=sheet,
            metadata=metadata,
            batch_size=batch_size,
            model={
                "device": device,
                "dtype": None if dtype is None else dtype_name(dtype),
                "model_config": switches,
                "kernels": kernels,
                "engine": engine,
                "engine_path": engine_path,
                "max_memory": memory,
                "fast": fast,
            },
            call={
                "num_inference_steps": steps,
                "guidance_scale": guidance,
                "condition_scale": condition_scale,
                "height": height,
                "width": width,
                "mask_order": mask_order.split(",") if "," in mask_order else mask_order,
            },
        ),
        start,
    )
