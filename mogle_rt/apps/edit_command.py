"""The command ``edit``: draw a region of an image anew, and keep the rest."""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from mogle_rt.apps.program import (
    FACE,
    MODEL,
    OUTPUT,
    Device,
    Dtype,
    EnginePath,
    MaskOrder,
    MaxMemory,
    WhichEngine,
    must_exist,
    say,
)
from mogle_rt.errors import InputError, MaskError, OutputError

DEMO = Path("demo")


def edit(
    image: Annotated[Path, typer.Argument(help="The image to edit: .png or .jpg.")],
    mask: Annotated[
        Path | None,
        typer.Option("--mask", "-m", help="The mask of the result. Default: the old one.", rich_help_panel=FACE),
    ] = None,
    mask_before: Annotated[
        Path | None,
        typer.Option(
            help="The mask that belongs to the image. Default: the one that generate wrote into the image.",
            rich_help_panel=FACE,
        ),
    ] = None,
    mask_order: MaskOrder = "celebamask",
    regions: Annotated[
        str, typer.Option(help="Classes to draw anew even where the masks agree, as hair,hat.", rich_help_panel=FACE)
    ] = "",
    keep: Annotated[
        str, typer.Option(help="Classes that stay even beside a change, as nose,mouth.", rich_help_panel=FACE)
    ] = "",
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="What the result shows. Default: the image's own.", rich_help_panel=FACE),
    ] = None,
    strength: Annotated[
        float,
        typer.Option(
            help="How much noise the region starts with, up to 1: nothing of the image shows through.",
            rich_help_panel=FACE,
        ),
    ] = 1.0,
    margin: Annotated[
        int | None,
        typer.Option(
            help="Pixels by which the region is grown; default: 1/32 of the shorter side, at least 8.",
            rich_help_panel=FACE,
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Default: the image's own, else random.", rich_help_panel=FACE)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Default: the image's own, else 28.", rich_help_panel=FACE)] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Default: the image's own, else 3.5.", rich_help_panel=FACE)
    ] = None,
    condition_scale: Annotated[
        float | None, typer.Option(help="Default: the image's own, else 1.", rich_help_panel=FACE)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Default: the image's name with _edited.", rich_help_panel=OUTPUT),
    ] = None,
    sheet: Annotated[
        Path | None,
        typer.Option(help="Also write both masks and both images side by side: .png or .jpg.", rich_help_panel=OUTPUT),
    ] = None,
    metadata: Annotated[
        bool, typer.Option(help="Write prompt, seed and settings into the result.", rich_help_panel=OUTPUT)
    ] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing files.", rich_help_panel=OUTPUT)
    ] = False,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint", "-c", help="A bundle. Default: demo, if it drew the image.", rich_help_panel=MODEL
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
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
) -> None:
    """Draw a region of an image anew, and keep the rest pixel by pixel."""
    from mogle_rt.arguments import check_names, check_options
    from mogle_rt.config import dtype_name, parse_bytes
    from mogle_rt.fast.choice import said
    from mogle_rt.jobs.image_files import MASK, check_suffix, save_image, settings_of
    from mogle_rt.jobs.naming import check_writable
    from mogle_rt.jobs.settings_read import mask_text, read_settings
    from mogle_rt.masks.labels import colorize, resize

    start = time.perf_counter()
    must_exist(image, InputError)
    known = read_settings(image)
    order: Any = mask_order.split(",") if "," in mask_order else mask_order
    before = known.labels if mask_before is None else _labels(mask_before, order)
    if before is None:
        named = f" (it was drawn from a mask called {known.mask!r})" if known.mask else ""
        raise InputError(f"{image}: holds no mask{named}; give the mask that belongs to it with --mask-before")
    if mask is None and not regions:
        raise InputError("give the mask of the result with --mask, or classes to draw anew with --regions")
    after = before if mask is None else _labels(mask, order)
    call: dict[str, Any] = {
        "num_inference_steps": _first(steps, known.steps, 28),
        "guidance_scale": _first(guidance, known.guidance_scale, 3.5),
        "condition_scale": _first(condition_scale, known.condition_scale, 1.0),
    }
    check_options(strength=strength, **call)
    check_names(device=device, engine=engine)
    if fast is not None:
        said(fast)
    memory = None if max_memory is None else parse_bytes(max_memory)
    target = image.with_name(f"{image.stem}_edited.png") if output is None else output
    for path in filter(None, (target, sheet)):
        check_suffix(path)
        check_writable(path)
        if path.exists() and not overwrite:
            raise OutputError(f"{path}: exists already; choose another name, or --overwrite")
    bundle = _bundle_of(image, known.bundle_sha256, checkpoint)
    drawn_seed = _first(seed, known.seed, secrets.randbelow(1_000_000))
    text = _first(prompt, known.prompt, "")

    from mogle_rt.apps.drawing import load_pipeline, report

    loading = time.perf_counter()
    pipe = load_pipeline(
        bundle,
        device=device,
        dtype=None if dtype is None else dtype_name(dtype),
        model_config=known.model_config,
        engine=engine,
        engine_path=engine_path,
        max_memory=memory,
        fast=fast,
    )
    loaded = time.perf_counter() - loading
    from PIL import Image

    from mogle_rt.edits.images import to_pixels

    pixels = to_pixels(image)
    result = pipe.edit(
        pixels,
        before,
        after,
        text,
        strength,
        keep=keep or (),
        regions=regions or (),
        margin=margin,
        seed=drawn_seed,
        **call,
    ).images[0]
    assert isinstance(result, Image.Image)
    written = settings_of(
        pipe, result.size, prompt=text, seed=drawn_seed, mask=None if mask is None else mask.name, **call
    )
    written |= {"edited": image.name, "strength": strength, MASK: mask_text(after)}
    save_image(result, target, written if metadata else None)
    typer.echo(target)
    if sheet is not None:
        from mogle_rt.jobs.sheet import write_grid

        width, height = result.size
        old, new = (Image.fromarray(colorize(resize(labels, height, width))) for labels in (before, after))
        original = Image.fromarray((pixels[0].permute(1, 2, 0) * 255).round().byte().numpy())
        write_grid(sheet, [[(old, "mask before"), (original, "before"), (new, "mask after"), (result, "after")]])
        typer.echo(sheet)
    report(1, 0, drawn_seed, time.perf_counter() - start, {"load": loaded} | pipe.last_run.seconds)


def _labels(mask: Path, order: Any) -> Any:
    from mogle_rt.masks.labels import to_labels

    must_exist(mask, MaskError)
    return to_labels(mask, order=order)


def _first(*values: Any) -> Any:
    """The first value that is there."""
    return next(value for value in values if value is not None)


def _bundle_of(image: Path, drawn_by: str | None, checkpoint: Path | None) -> Path:
    """The bundle to draw with: the one that is named, or the demo if it drew the image.

    Raises:
        InputError: none is named, and the image was not drawn by the demo.
        CheckpointError: see `Bundle`.
    """
    from mogle_rt.bundle.bundle import Bundle

    content = Bundle(DEMO if checkpoint is None else checkpoint).content_hash
    if checkpoint is not None:
        if drawn_by is not None and drawn_by != content:
            say(f"warning: {image} was drawn by another bundle than {checkpoint}")
        return checkpoint
    if drawn_by != content:
        what = "does not say which bundle drew it" if drawn_by is None else "was drawn by another bundle than the demo"
        raise InputError(f"{image}: {what}; name the bundle with --checkpoint")
    return DEMO
