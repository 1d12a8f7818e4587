"""The command ``embed``: write prompts as embeddings, for machines where the text encoders have no room."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from mogle_rt.apps.program import console, say
from mogle_rt.errors import CheckpointError, InputError, OutputError


def embed(
    checkpoint: Annotated[Path, typer.Argument(help="A bundle with text encoders, or demo.")],
    prompts: Annotated[list[str] | None, typer.Argument(help="Texts.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write, e.g. prompts.safetensors.")] = Path(
        "prompts.safetensors"
    ),
    mask: Annotated[
        list[Path] | None, typer.Option("--mask", "-m", help="Also embed the texts that belong to these masks.")
    ] = None,
    caption: Annotated[int, typer.Option(help="Which line of a mask's text to use, from 1.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N or mps; default: the best there is.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; default: what the device does fast.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there already.")] = False,
) -> None:
    """Write prompts as embeddings, which `generate --embeds` draws without text encoders."""
    from mogle_rt.arguments import check_names, prompt_list
    from mogle_rt.bundle.bundle import Bundle
    from mogle_rt.config import dtype_name
    from mogle_rt.jobs.captions import prompts_of
    from mogle_rt.jobs.naming import check_writable
    from mogle_rt.jobs.plan import find_masks

    masks: list[Path | None] = list(find_masks(mask)) if mask else []
    texts = list(dict.fromkeys([*(prompts or []), *filter(None, prompts_of(None, masks, caption, say))]))
    if not texts:
        raise InputError("give a prompt at least, or masks with texts")
    prompt_list(texts, None, None)
    check_names(device=device)
    if dtype is not None:
        dtype_name(dtype)
    if output.exists() and not overwrite:
        raise OutputError(f"{output}: exists already; choose another name, or --overwrite")
    check_writable(output)
    bundle = Bundle(checkpoint)
    if not bundle.has_text_encoders:
        raise CheckpointError(f"{checkpoint}: holds no text encoders; take a bundle that was converted with them")

    with console.status(Text(f"loading {checkpoint} …")):
        from mogle_rt.start.quick_imports import import_models

        import_models()
        import torch

        from mogle_rt.calls.prompts import PromptEncoder
        from mogle_rt.encoders.cache import TensorCache
        from mogle_rt.jobs.embeddings import write_embeddings
        from mogle_rt.memory.devices import choose_device, choose_dtype

        where = choose_device(device)
        encoder = PromptEncoder(bundle, where, choose_dtype(dtype, where), TensorCache(0))
        with torch.no_grad():
            parts = [encoder([text], bundle.default_text_tokens) for text in texts]  # one at a time needs least memory
    sequence, pooled = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    write_embeddings(output, texts, sequence, pooled, bundle.content_hash)
    typer.echo(output)
