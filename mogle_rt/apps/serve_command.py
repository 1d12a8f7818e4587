"""The command ``serve``: answers requests for images, and serves the page to paint masks on."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from mogle_rt.apps.program import console, must_exist, parse_json, say
from mogle_rt.errors import CheckpointError, ConfigError, InputError

NEEDED = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")


def serve(
    checkpoint: Annotated[Path, typer.Argument(help="A bundle; demo is the one in the package.")],
    host: Annotated[
        str, typer.Option(help="The address to listen on; other than loopback only with a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port; 0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file of keys, one a line; a request must then hold one of them.")
    ] = None,
    queue: Annotated[int, typer.Option(help="Images that may wait; more are refused.")] = 32,
    max_batch: Annotated[
        int | None, typer.Option(help="Images drawn at once by a pipeline; default: 8 on a GPU, 1 on a CPU.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Pipelines that draw side by side, each with weights of its own; default: what suits the device."
        ),
    ] = None,
    max_pixels: Annotated[int, typer.Option(help="The most pixels of an image.")] = 1024 * 1024,
    max_steps: Annotated[int, typer.Option(help="The most denoising steps of an image.")] = 100,
    max_upload: Annotated[int, typer.Option(help="The most bytes of a request.")] = 16 << 20,
    grace: Annotated[float, typer.Option(help="Seconds to finish images when the server is to stop.")] = 30.0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N or mps; default: the best available.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bf16, fp16 or fp32; default: one that is fast on the device.")
    ] = None,
    kernels: Annotated[
        str | None,
        typer.Option(help="Operations that compute a step: triton or torch; default: what suits the device."),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="torch, or for an export: onnxruntime, tensorrt, tensorrt-rtx.")
    ] = "torch",
    engine_path: Annotated[Path | None, typer.Option(help="The export's folder; default: the bundle's folder.")] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(help="The most memory to use on the device, such as 8GB, for all workers. Default: what is free."),
    ] = None,
    fast: Annotated[
        str | None,
        typer.Option(
            help="Leave steps out, which changes the images: balanced, fast, or settings such as steps_mask=fast,order=1."
        ),
    ] = None,
    model_config: Annotated[str | None, typer.Option(help="The reference's switches as JSON.")] = None,
) -> None:
    """Serve images in the shape of OpenAI's API, and a page to paint masks on."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"the server needs {', '.join(missing)}: install them with pip install 'mogle-rt[serve]'")
    from mogle_rt.arguments import check_names
    from mogle_rt.bundle.shipped import bundle_path
    from mogle_rt.config import ModelConfig, dtype_name, parse_bytes
    from mogle_rt.fast.choice import said
    from mogle_rt.server.access import is_loopback, read_keys
    from mogle_rt.server.asked.requests import Limits
    from mogle_rt.server.running import listen, make_server

    for name, number in (
        ("queue", queue), ("max-batch", max_batch), ("workers", workers), ("max-pixels", max_pixels),
        ("max-steps", max_steps), ("max-upload", max_upload),
    ):  # fmt: skip
        if number is not None and number < 1:
            raise InputError(f"--{name} must be 1 or more, got {number}")
    if not 0 <= grace < 1e6:
        raise InputError(f"--grace must be 0 or more seconds, got {grace}")
    if not 0 <= port <= 65535:
        raise InputError(f"--port must be from 0 to 65535, got {port}")
    keys = [] if api_key_file is None else read_keys(api_key_file)
    if not keys and not is_loopback(host):
        raise ConfigError(
            f"--host {host} can be reached from other machines: give --api-key-file too, or take 127.0.0.1"
        )
    check_names(device=device, engine=engine, kernels=kernels)
    if fast is not None:
        said(fast)
    memory = None if max_memory is None else parse_bytes(max_memory)
    if memory is not None:
        workers = workers or 1
        memory //= workers
    options: dict[str, Any] = {
        "device": device,
        "dtype": None if dtype is None else dtype_name(dtype),
        "model_config": ModelConfig.of(parse_json(model_config)),
        "kernels": kernels,
        "engine": engine,
        "engine_path": engine_path,
        "max_memory": memory,
        "fast": fast,
    }
    must_exist(bundle_path(checkpoint), CheckpointError)
    listening = listen(host, port)
    with console.status(Text(f"loading {checkpoint} …")):
        from mogle_rt.start.quick_imports import import_models

        import_models()
        from mogle_rt.pipeline import Pipeline
        from mogle_rt.server.app import build_app
        from mogle_rt.server.drawing import Studio, pipelines

        pipes = pipelines(lambda: Pipeline(checkpoint, **options), workers)
    studio = Studio(pipes, places=queue, max_batch=max_batch)
    limits = Limits(pixels=max_pixels, steps=max_steps, upload=max_upload)
    app = build_app(studio, checkpoint.stem, keys=keys, limits=limits)
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("calls.prompts", "encoders.text"):  # their warnings quote prompts, which the log never holds
        logging.getLogger(f"mogle_rt.{name}").setLevel(logging.ERROR)
    address, actual = listening.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    studio.start()
    server = make_server(
        app, studio, grace=grace, ready=lambda: say(f"serving {checkpoint} at http://{shown}:{actual}")
    )
    server.run([listening])
