"""The command line: ``mogle-rt convert | generate | info | cost | examples``."""

from __future__ import annotations

import json
import secrets
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from mogle_rt import __version__
from mogle_rt.config import PATCH
from mogle_rt.errors import ConfigError, InputError, MogleError, OutputError

if TYPE_CHECKING:
    import torch

    from mogle_rt.apps.drawings import Existing
    from mogle_rt.cost.estimate import Cost
    from mogle_rt.cost.gpus import Gpu
    from mogle_rt.pipeline import Pipeline

app = typer.Typer(
    name="mogle-rt",
    help="Faces from a semantic mask and a prompt: an optimised runtime for Face-MoGLE.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console(stderr=True, highlight=False, emoji=False)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"mogle-rt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def convert(
    output: Annotated[Path, typer.Option("-o", "--output", help="Bundle to write, e.g. ckpt.safetensors.")],
    flux: Annotated[str | None, typer.Option(help="FLUX folder in diffusers' layout, or a hub id.")] = None,
    lora: Annotated[str | None, typer.Option(help="Branch LoRA (safetensors): a path, or a hub id.")] = None,
    mogle: Annotated[
        str | None, typer.Option(help="Experts and gate (.pt or safetensors): a path or a hub id.")
    ] = None,
    released: Annotated[
        bool, typer.Option("--released", help="Take the published files for what isn't given.")
    ] = False,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; default: as stored.")] = None,
    text_encoders: Annotated[
        bool, typer.Option(help="Include CLIP and T5; without them, prompts are embeddings.")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that is there already.")] = False,
) -> None:
    """Make the single-file bundle from the reference's files."""
    from mogle_rt.conversion.convert import convert as run
    from mogle_rt.conversion.sources import RELEASED_FLUX, RELEASED_LORA, RELEASED_MOGLE

    if released:
        flux, lora, mogle = flux or RELEASED_FLUX, lora or RELEASED_LORA, mogle or RELEASED_MOGLE
    missing = [name for name, value in (("--flux", flux), ("--lora", lora), ("--mogle", mogle)) if value is None]
    if missing or flux is None or lora is None or mogle is None:
        raise InputError(f"missing {', '.join(missing)}; or pass --released for the published files")
    if output.is_file() and not overwrite:
        raise OutputError(f"{output}: exists already; choose another name, or --overwrite")
    start = time.perf_counter()
    path = run(flux, lora, mogle, output, dtype=dtype, text_encoders=text_encoders)
    size = path.stat().st_size
    console.print(f"{path}: {_bytes(size)} in {time.perf_counter() - start:.1f} s", soft_wrap=True)


@app.command()
def info(
    checkpoint: Annotated[Path, typer.Argument(help="A bundle, or demo.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read the whole file and check its hash.")] = False,
) -> None:
    """Print what is in a bundle."""
    from mogle_rt.bundle.bundle import FORMAT_VERSION, PARTS, Bundle, parameter_count

    bundle = Bundle(checkpoint)
    t, m = bundle.config.transformer, bundle.config.mogle
    ablation = [word for word, absent in (("no gating", not m.has_gating), ("no experts", not m.has_expert)) if absent]
    ranks = sorted(set(bundle.lora_ranks().values()))
    rows: dict[str, str] = {
        "file": f"{bundle.path}, {_bytes(bundle.path.stat().st_size)}",
        "format": f"mogle_rt bundle, version {FORMAT_VERSION}",
        "architecture": f"FLUX, width {t.width} ({t.num_attention_heads} heads x {t.attention_head_dim}), "
        f"{t.num_layers} double and {t.num_single_layers} single blocks, "
        f"guidance {'embedded' if t.guidance_embeds else 'none'}",
        "LoRA rank": ", ".join(map(str, ranks)),
        "mixture": f"1 global and 19 region experts, hidden {m.expert_dim}" if m.has_expert else "identity experts",
        "ablation": ", ".join(ablation) or "none",
        "text encoders": "CLIP and T5" if bundle.has_text_encoders else "none: prompts must come as embeddings",
        "sha256": bundle.content_hash,
    }
    out = Console(soft_wrap=True, highlight=False, emoji=False)
    for name, value in rows.items():
        out.print(f"{name:>14}  {value}", markup=False)
    table = Table("part", "tensors", "parameters", "bytes", "dtype", box=None, pad_edge=False)
    for part in PARTS:
        tensors = {n: i for n, i in bundle.tensors.items() if n.startswith(f"{part}.")}
        if tensors:
            dtypes = ", ".join(sorted({str(i.dtype).removeprefix("torch.") for i in tensors.values()}))
            count = "-" if part.startswith("tokenizer") else f"{parameter_count(tensors):,}"
            size = sum(i.end - i.begin for i in tensors.values())
            table.add_row(part, str(len(tensors)), count, _bytes(size), dtypes)
    table.add_row("total", str(len(bundle.tensors)), f"{parameter_count(bundle.tensors):,}", "", "")
    out.print(table)
    if verify:
        size = sum(i.end - i.begin for i in bundle.tensors.values())
        with tqdm(total=size, unit="B", unit_scale=True, desc="verify", disable=None) as bar:
            bundle.verify(bar.update)
        out.print("verified: the contents match the hash")


@app.command()
def cost(
    checkpoint: Annotated[Path | None, typer.Argument(help="A bundle: its shapes are read, not its weights.")] = None,
    flux_dev: Annotated[bool, typer.Option("--flux-dev", help="FLUX.1-dev's shapes, without any file.")] = False,
    height: Annotated[int | None, typer.Option(help="Pixels, a multiple of 16; default: the bundle's, or 512.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, a multiple of 16; default: the bundle's, or 512.")] = None,
    batch: Annotated[int, typer.Option(help="Images computed at once.")] = 1,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 28,
    text_tokens: Annotated[
        int | None, typer.Option(help="T5 tokens of the prompt; default: the bundle's, or 512.")
    ] = None,
    classes: Annotated[int, typer.Option(help="Classes in each mask; absent ones share one picture.")] = 12,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; default: the bundle's, or bf16.")] = None,
    kernels: Annotated[str | None, typer.Option(help="'triton' or 'torch': operations of a step.")] = None,
    gpu: Annotated[str | None, typer.Option(help="A card, e.g. 'RTX 4090': its limits, and what fits.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: bytes, FLOPs, milliseconds.")] = False,
) -> None:
    """Count what a job takes, beside the reference's way of computing it. Needs neither weights nor a GPU."""
    from mogle_rt.cost.gpus import find_gpu

    if (checkpoint is None) != flux_dev:
        raise InputError("give a bundle or --flux-dev, one of them")
    card = None if gpu is None else find_gpu(gpu)

    import torch

    from mogle_rt.bundle.bundle import Bundle
    from mogle_rt.config import parse_dtype
    from mogle_rt.cost.estimate import estimate
    from mogle_rt.cost.job import Job
    from mogle_rt.ops import choice as ops

    options: dict[str, Any] = {"height": height, "width": width, "batch": batch, "steps": steps}
    options |= {"text_tokens": text_tokens, "classes": classes}
    asked = options | {"kernels": kernels, "dtype": None if dtype is None else parse_dtype(dtype)}
    given = {name: value for name, value in asked.items() if value is not None}
    job = Job(**given) if checkpoint is None else Job.of(Bundle(checkpoint), **given)
    result = estimate(job)
    ways = {"mogle_rt": result.engine, "reference": result.reference}
    limits = {name: _limits(card, way, job.dtype.itemsize) for name, way in ways.items()} if card else {}
    settings = {name: getattr(job, name) for name in options} | {
        "kernels": ops.choice(kernels, torch.device("meta")),
        "dtype": str(job.dtype).removeprefix("torch."),
        "image_tokens": job.tokens,
    }
    parts = {part: {"parameters": n, "bytes": n * job.dtype.itemsize} for part, n in result.parameters.items()}
    if as_json:
        report: dict[str, Any] = {"job": settings | {"pictures": job.pictures}, "parts": parts}
        report["cost"] = {name: way.to_dict() for name, way in ways.items()}
        report["gpu"] = vars(card) | {"limits": limits} if card else None
        typer.echo(json.dumps(report, indent=2))
        return

    out = Console(soft_wrap=True, highlight=False, emoji=False)
    out.print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items()), "\n", markup=False)
    table = Table("part", "parameters", "bytes", box=None, pad_edge=False)
    for part, sizes in parts.items():
        table.add_row(part, f"{sizes['parameters']:,}", _bytes(sizes["bytes"]))
    out.print(table, "")
    table = Table("", *ways, "ratio", box=None, pad_edge=False)
    a, b = ways.values()
    for label, mine, theirs, unit, form in (
        ("a step: TFLOP", a.step.flops, b.step.flops, 1e12, ",.2f"),
        ("  kernel launches", a.step.launches, b.step.launches, 1, ",.0f"),
        ("  GB read", a.step.read, b.step.read, 1e9, ",.1f"),
        ("  GB written", a.step.written, b.step.written, 1e9, ",.1f"),
        ("the run: TFLOP", a.flops, b.flops, 1e12, ",.1f"),
        (f"  encoding {job.pictures} or 20 pictures", a.encode.flops, b.encode.flops, 1e12, ",.1f"),
        ("  preparing", a.prepare.flops, b.prepare.flops, 1e12, ",.1f"),
        ("  decoding", a.decode.flops, b.decode.flops, 1e12, ",.1f"),
        ("memory: GiB of weights", a.resident, b.resident, 2**30, ",.1f"),
        ("  at the peak", a.peak, b.peak, 2**30, ",.1f"),
        ("  and with text encoders", a.peak_with_text, b.peak_with_text, 2**30, ",.1f"),
    ):
        ratio = f"{theirs / mine:.2f}" if mine and theirs else ""
        table.add_row(label, f"{mine / unit:{form}}", f"{theirs / unit:{form}}", ratio)
    if card:
        table.add_row(f"{card.name}, {card.memory:g} GiB:")
        for label, key in (("  ms a step to compute", "compute_ms"), ("  ms a step to move", "memory_ms")):
            least = [way[key] for way in limits.values()]
            table.add_row(label, *(f"{ms:,.1f}" for ms in least), f"{least[1] / least[0]:.2f}")
        for label, key in (("  fits", "fits"), ("  fits with text encoders", "fits_with_text")):
            table.add_row(label, *("yes" if way[key] else "no" for way in limits.values()))
    out.print(table)


def _limits(card: Gpu, way: Cost, itemsize: int) -> dict[str, float]:
    """What a card's datasheet says of a job: the least time of a step, and whether it goes into memory."""
    return {
        "compute_ms": card.compute_ms(way.step.flops, itemsize),
        "memory_ms": card.memory_ms(way.step.moved),
        "fits": card.fits(way.peak),
        "fits_with_text": card.fits(way.peak_with_text),
    }


@app.command()
def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A bundle; demo is the one in the package.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Image (.png, .jpg), or a folder for several.")],
    mask: Annotated[
        list[Path] | None,
        typer.Option("--mask", "-m", help="Mask, folder of masks, or of one face's part files; repeatable."),
    ] = None,
    mask_order: Annotated[
        str,
        typer.Option(help="What a label map's numbers mean: celebamask, bisenet, farl, or names with commas between."),
    ] = "celebamask",
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
    height: Annotated[int | None, typer.Option(help="Pixels, a multiple of 16; default: of the mask's shape.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, a multiple of 16; default: of the mask's shape.")] = None,
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
    from mogle_rt.apps.drawings import batches, find_masks, plan

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
    order = mask_order.split(",") if "," in mask_order else mask_order
    shapes = {path: None if path is None else to_labels(path, order=order).shape for path in masks}
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
    for batch in batches(jobs, batch_size, shapes):
        images = pipe(
            [job.mask for job in batch if job.mask is not None] or None,
            [job.prompt for job in batch],
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=height,
            width=width,
            generator=[_generator(pipe, job.seed) for job in batch],
            condition_scale=condition_scale,
            mask_order=order,
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


@app.command()
def examples(
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder to write masks and prompts into.")
    ] = None,
) -> None:
    """List the example masks and prompts in the package, or write them into a folder."""
    from mogle_rt.bundle.shipped import examples as shipped
    from mogle_rt.bundle.shipped import write_examples

    if output is not None:
        for path in write_examples(output):
            typer.echo(path)
        return
    table = Table("name", "prompt", box=None, pad_edge=False)
    for example in shipped():
        table.add_row(example.name, example.prompt)
    Console(soft_wrap=True, highlight=False, emoji=False).print(table)


def _generator(pipe: Pipeline, seed: int) -> torch.Generator:
    """On the CPU: a seed is the same noise on every device."""
    import torch

    return torch.Generator("cpu").manual_seed(seed)


def parse_json(text: str | None) -> dict[str, Any] | None:
    """The value of --model-config."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"--model-config must be a JSON object like '{{\"add_cond_attn\": true}}', got {text[:80]!r}")
    return value


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    raise AssertionError


def _terminate(signum: int, frame: object) -> NoReturn:
    raise SystemExit(128 + signum)  # unwinds, so that half-written files are removed


def main() -> None:
    """Entry point."""
    run_app(app)


def run_app(program: typer.Typer) -> None:
    """Run a program: errors are one line and a non-zero exit, never a traceback."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            program()
    except MogleError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except MemoryError:
        _fail("not enough memory; try a smaller size or batch")
    except RuntimeError as error:
        if "DefaultCPUAllocator" in str(error):
            _fail("not enough memory; try a smaller size or batch")
        if type(error).__name__ != "OutOfMemoryError":
            raise
        _fail(f"not enough GPU memory; try a smaller size or batch, or --device cpu ({str(error).splitlines()[0]})")


def _warn(message: Warning | str, *_: object) -> None:
    """In one line, without the place in the code."""
    console.print(f"warning: {' '.join(str(message).split())}", markup=False, soft_wrap=True)


def _fail(message: str) -> NoReturn:
    line = " ".join(message.split())
    console.print(f"error: {line}", markup=False, soft_wrap=True)
    sys.exit(1)
