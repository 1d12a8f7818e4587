"""The commands ``convert`` and ``quantize`` (make a bundle), ``info`` (print what it holds) and ``examples`` (masks)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from mogle_rt.apps.program import console, format_bytes, must_exist
from mogle_rt.errors import CheckpointError, InputError, OutputError

if TYPE_CHECKING:
    from mogle_rt.bundle.bundle import Bundle
    from mogle_rt.conversion.writing.write import WrittenWeights

WEIGHTS_HELP = "int8, fp8 or int4: stores the weights of FLUX's blocks in 8 or 4 bits."


def convert(
    output: Annotated[Path, typer.Option("-o", "--output", help="The bundle to write, e.g. ckpt.safetensors.")],
    flux: Annotated[str | None, typer.Option(help="A FLUX folder in diffusers' layout, or a hub id.")] = None,
    transformer: Annotated[
        str | None,
        typer.Option(help="FLUX's transformer in one file (safetensors or GGUF), instead of the folder's."),
    ] = None,
    lora: Annotated[
        str | None, typer.Option(help="Face-MoGLE's LoRA (safetensors or peft's folder): a path or a hub id.")
    ] = None,
    mogle: Annotated[
        str | None, typer.Option(help="Experts and gate (.pt or safetensors): a path or a hub id.")
    ] = None,
    released: Annotated[
        bool, typer.Option("--released", help="Use the published files for --flux, --lora and --mogle if not given.")
    ] = False,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; default: as stored.")] = None,
    text_encoders: Annotated[
        bool, typer.Option(help="Include CLIP and T5. Without them, prompts must be given as embeddings.")
    ] = True,
    weights: Annotated[str | None, typer.Option(help=WEIGHTS_HELP)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing bundle.")] = False,
) -> None:
    """Convert FLUX and Face-MoGLE's files into one file, a bundle."""
    from mogle_rt.bundle.storage import storage_named
    from mogle_rt.config import dtype_name
    from mogle_rt.conversion.hub import RELEASED_FLUX, RELEASED_LORA, RELEASED_MOGLE, check_flux_folder, find_here

    if released:
        flux, lora, mogle = flux or RELEASED_FLUX, lora or RELEASED_LORA, mogle or RELEASED_MOGLE
    missing = [name for name, value in (("--flux", flux), ("--lora", lora), ("--mogle", mogle)) if value is None]
    if missing or flux is None or lora is None or mogle is None:
        raise InputError(f"missing {', '.join(missing)}; or pass --released for the published files")
    _check_output(output, overwrite)
    if weights is not None:
        storage_named(weights)
    if dtype is not None:
        dtype_name(dtype)
    here = [None if spec is None else find_here(spec) for spec in (flux, transformer, lora, mogle)]
    if here[0] is not None:
        check_flux_folder(here[0])
    start = time.perf_counter()
    _load_libraries()
    from mogle_rt.conversion.convert import convert as run

    run(
        flux,
        lora,
        mogle,
        output,
        transformer=transformer,
        dtype=dtype,
        text_encoders=text_encoders,
        weights=weights,
        on_weights=lambda report: _print_weights(report, weights),
    )
    _print_written(output, start)


def quantize(
    checkpoint: Annotated[Path, typer.Argument(help="A bundle, or demo.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Bundle to write, e.g. small.safetensors.")],
    weights: Annotated[
        str,
        typer.Option(
            help=f"{WEIGHTS_HELP} auto takes the most exact that stays in the memory of this machine or --gpu."
        ),
    ],
    gpu: Annotated[str | None, typer.Option(help="With auto: a card that isn't here, e.g. 'RTX 4070'.")] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="With auto: the most memory to use there, such as 8GB; default: what is free.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that is there already.")] = False,
) -> None:
    """Make a smaller bundle, whose blocks' weights are stored in eight or four bits."""
    from mogle_rt.bundle.shipped import bundle_path
    from mogle_rt.bundle.storage import storage_named
    from mogle_rt.cost.gpus import find_gpu

    must_exist(bundle_path(checkpoint), CheckpointError)
    _check_output(output, overwrite)
    if weights != "auto":
        storage_named(weights)
        if gpu is not None or max_memory is not None:
            raise InputError("--gpu and --max-memory need --weights auto, which picks a format for them")
    elif gpu is not None:
        find_gpu(gpu)
    start = time.perf_counter()
    _load_libraries()
    if weights == "auto":
        weights = _chosen_weights(checkpoint, gpu, max_memory)
    from mogle_rt.conversion.writing.quantize import quantize as run

    _print_weights(run(checkpoint, output, weights), weights)
    _print_written(output, start)


def _chosen_weights(checkpoint: Path, gpu: str | None, max_memory: str | None) -> str:
    """The format for a card or this machine, which it prints with its plan of memory.

    Raises:
        InputError: the bundle needs none.
    """
    import torch

    from mogle_rt.bundle.bundle import Bundle
    from mogle_rt.config import parse_bytes
    from mogle_rt.cost.gpus import find_gpu
    from mogle_rt.cost.prediction import budget_of
    from mogle_rt.cost.weights import choose_weights
    from mogle_rt.memory.budget import budget_for
    from mogle_rt.memory.devices import choose_device, choose_dtype

    if gpu is None:
        device = choose_device(None)
        place, budget, dtype = f"this machine's {device}", budget_for(device, max_memory), choose_dtype(None, device)
    else:
        card = find_gpu(gpu)
        budget = budget_of(card, None if max_memory is None else parse_bytes(max_memory))
        place, device, dtype = card.name, torch.device("cuda"), torch.bfloat16
    chosen, plan = choose_weights(Bundle(checkpoint), device, dtype, budget)
    if chosen is None:
        raise InputError(
            f"auto: the weights of {checkpoint} stay in the memory of {place} as they are, so no format would help; ask "
            f"for one, such as int8, if the bundle is to be smaller"
        )
    console.print(f"{chosen} for {place}; {plan}", soft_wrap=True, markup=False)
    return chosen


def _check_output(output: Path, overwrite: bool) -> None:
    """Check that the bundle can be written, before anything else is done."""
    from mogle_rt.jobs.naming import check_writable

    if output.is_file() and not overwrite:
        raise OutputError(f"{output}: exists already; choose another name, or --overwrite")
    check_writable(output)


def _load_libraries() -> None:
    """Import what takes seconds, and say so meanwhile. All that can be checked without it was checked before."""
    with console.status("loading the libraries …"):
        from mogle_rt.start.quick_imports import import_models

        import_models()


def _print_weights(report: WrittenWeights, weights: str | None) -> None:
    for line in report.describe(weights) if weights else ():
        console.print(line, soft_wrap=True, markup=False)


def _print_written(output: Path, start: float) -> None:
    size = output.stat().st_size
    console.print(f"{output}: {format_bytes(size)} in {time.perf_counter() - start:.1f} s", soft_wrap=True)


def _text_encoders(bundle: Bundle) -> str:
    if bundle.has_text_encoders:
        return "CLIP and T5"
    alone = ", or be empty" if bundle.names("empty_prompt") else ""
    return f"none: prompts must come as embeddings{alone}"


def info(
    checkpoint: Annotated[Path, typer.Argument(help="A bundle, or demo.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read the whole file and check its hash.")] = False,
) -> None:
    """Print what a bundle holds."""
    from mogle_rt.bundle.bundle import PARTS, Bundle, parameter_count

    bundle = Bundle(checkpoint)
    t, m = bundle.config.transformer, bundle.config.mogle
    ablation = [word for word, absent in (("no gating", not m.has_gating), ("no experts", not m.has_expert)) if absent]
    ranks = sorted(set(bundle.lora_ranks().values()))
    rows: dict[str, str] = {
        "file": f"{bundle.path}, {format_bytes(bundle.path.stat().st_size)}",
        "format": f"mogle_rt bundle, version {bundle.format_version}",
        "architecture": f"FLUX, width {t.width} ({t.num_attention_heads} heads x {t.attention_head_dim}), "
        f"{t.num_layers} double and {t.num_single_layers} single blocks, "
        f"guidance {'embedded' if t.guidance_embeds else 'none'}",
        "weights": _weights_by_format(bundle),
        "LoRA rank": ", ".join(map(str, ranks)),
        "mixture": f"1 global and 19 region experts, hidden {m.expert_dim}" if m.has_expert else "identity experts",
        "ablation": ", ".join(ablation) or "none",
        "text encoders": _text_encoders(bundle),
        "sha256": bundle.content_hash,
    }
    out = Console(soft_wrap=True, highlight=False, emoji=False)
    for name, value in rows.items():
        out.print(f"{name:>14}  {value}", markup=False)
    table = Table("part", "tensors", "parameters", "bytes", "dtype", box=None, pad_edge=False)
    for part in PARTS:
        tensors = {n: i for n, i in bundle.tensors.items() if n.startswith(f"{part}.")}
        if tensors:
            dtypes = ", ".join(sorted({i.dtype_name for i in tensors.values()}))
            count = "-" if part.startswith("tokenizer") else f"{parameter_count(tensors, bundle.storages):,}"
            size = sum(i.end - i.begin for i in tensors.values())
            table.add_row(part, str(len(tensors)), count, format_bytes(size), dtypes)
    table.add_row("total", str(len(bundle.tensors)), f"{parameter_count(bundle.tensors, bundle.storages):,}", "", "")
    out.print(table)
    if verify:
        size = sum(i.end - i.begin for i in bundle.tensors.values())
        with tqdm(total=size, unit="B", unit_scale=True, desc="verify", disable=None) as bar:
            bundle.verify(bar.update)
        out.print("verified: the contents match the hash")


def _weights_by_format(bundle: Bundle) -> str:
    """How many layers of the blocks are stored in which format, and their bytes."""
    from mogle_rt.bundle.schema import block_stacks

    found: dict[str, list[int]] = {}
    for stack in block_stacks(bundle.config.transformer):
        for layer in stack:
            storage, plain = bundle.storages.get(layer), bundle.tensors[f"transformer.{layer}.weight"]
            name = plain.dtype_name if storage is None else storage.name
            size = plain.end - plain.begin if storage is None else storage.nbytes(storage.shape_of(plain.shape))
            count = found.setdefault(name, [0, 0])
            count[0], count[1] = count[0] + 1, count[1] + size
    parts = [f"{count} layers of the blocks in {name}, {format_bytes(size)}" for name, (count, size) in found.items()]
    return "; ".join(parts) or "no blocks"


def examples(
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The folder to write the masks and prompts into.")
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
