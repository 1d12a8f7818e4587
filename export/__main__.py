"""``mogle-rt export ckpt.safetensors`` writes graphs and engines that other runtimes and languages can run.

``python -m mogle_rt.export`` is the same command.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mogle_rt.apps.program import HELP_OPTIONS, parse_json, run_app
from mogle_rt.errors import DeviceError, InputError
from mogle_rt.installed import install_command

if TYPE_CHECKING:
    from mogle_rt.bundle.bundle import Bundle
    from mogle_rt.engines.manifest import Manifest
    from mogle_rt.export.comparisons import Comparison

app = typer.Typer(
    name="mogle_rt.export",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=HELP_OPTIONS,
)
console = Console(stderr=True, highlight=False, emoji=False)
TABLE_WIDTH = 160  # columns, the same with and without a terminal
FORMATS = ("onnx", "tensorrt", "tensorrt-rtx")


@app.command()
def main(
    checkpoint: Annotated[Path | None, typer.Argument(help="A bundle.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder; default: the bundle's own, where every loader finds the weights."),
    ] = None,
    formats: Annotated[
        str, typer.Option("--format", help="onnx, tensorrt, tensorrt-rtx; several with commas.")
    ] = "onnx",
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; default: as stored. CPUs need fp32.")] = None,
    opset: Annotated[int, typer.Option(help="ONNX opset; fused attention needs 23 or newer.")] = 23,
    weights: Annotated[
        str,
        typer.Option(help="link: point into the bundle; copy: beside the graphs, in --dtype; embed: in the graphs."),
    ] = "link",
    smallest: Annotated[
        str | None,
        typer.Option("--min", help="TensorRT: smallest WIDTHxHEIGHT[xBATCH]; default: 256x256, or the model's size."),
    ] = None,
    usual: Annotated[
        str | None, typer.Option("--opt", help="TensorRT: the size to be fastest at; default: the model's.")
    ] = None,
    largest: Annotated[str, typer.Option("--max", help="TensorRT: largest size and batch.")] = "1024x1024x4",
    target: Annotated[
        str | None,
        typer.Option(help="TensorRT-RTX: compute capabilities to build for, e.g. 89,120; default: this GPU's."),
    ] = None,
    condition_scale: Annotated[
        bool, typer.Option("--condition-scale", help="TensorRT: also build an engine for other values than 1.")
    ] = False,
    weight_streaming: Annotated[
        bool, typer.Option("--weight-streaming", help="TensorRT: allow weights to stay in the host's memory.")
    ] = False,
    refit: Annotated[
        bool, typer.Option("--refit", help="TensorRT: allow weights to be exchanged later; needs a GPU.")
    ] = False,
    text_encoders: Annotated[
        bool, typer.Option("--text-encoders", help="Also export CLIP, T5 and their tokenizers.")
    ] = False,
    model_config: Annotated[str | None, typer.Option(help="The reference's switches as JSON.")] = None,
    verify: Annotated[bool, typer.Option(help="Run random inputs through the graphs and the torch engine.")] = True,
    check: Annotated[
        Path | None, typer.Option(help="Verify the export in this folder again, weights included.")
    ] = None,
) -> None:
    """Export a bundle to ONNX and TensorRT, without copying its weights."""
    chosen = [name.strip() for name in formats.split(",")]
    for name in chosen:
        if name not in FORMATS:
            raise InputError(f"--format must be of {', '.join(FORMATS)}, got {name!r}")
    switches = parse_json(model_config)
    _require_onnx()
    import mogle_rt.export.tensorrt as tensorrt
    from mogle_rt.bundle.bundle import Bundle
    from mogle_rt.engines.manifest import Manifest
    from mogle_rt.engines.tensorrt_engine import PACKAGES
    from mogle_rt.export.exporter import export
    from mogle_rt.export.verify import check as check_again

    if check is not None:
        results = check_again(check, checkpoint, _say)
        _report(results)
        return
    if checkpoint is None:
        raise InputError("name a bundle, or a folder with --check")
    bundle = Bundle(checkpoint)
    side = bundle.default_size
    profile = tensorrt.Profile(
        smallest=tensorrt.Size.parse(smallest or "{0}x{0}".format(min(256, side))),
        usual=tensorrt.Size.parse(usual or f"{side}x{side}"),
        largest=tensorrt.Size.parse(largest),
    )
    graphs = ("step", "step_scaled") if condition_scale else ("step",)
    engines = [  # a missing package or an unknown target is an error before anything is written
        (PACKAGES[name], one, graph)
        for name in chosen
        if name != "onnx"
        for one in tensorrt.parse_targets(target, PACKAGES[name])
        for graph in graphs
    ]

    start = time.perf_counter()
    folder = export(
        checkpoint,
        output,
        dtype=dtype,
        opset=opset,
        weights=weights,  # type: ignore[arg-type]
        model_config=switches,
        text_encoders=text_encoders,
        progress=_say,
    )
    manifest = Manifest.read(folder)
    written = sum((folder / g.file).stat().st_size for g in manifest.graphs.values())
    console.print(
        f"{folder}: {len(manifest.graphs)} graphs, {written / 1e6:.1f} MB, {manifest.dtype}, weights: "
        f"{manifest.weights.file or 'embedded'}, in {time.perf_counter() - start:.1f} s",
        soft_wrap=True,
        markup=False,
    )
    if verify:
        manifest = _verify(bundle, folder, manifest)
    source = bundle if manifest.weights.mode != "copy" else Bundle(folder / str(manifest.weights.file))
    for package, one, graph in engines:
        begun, title = time.perf_counter(), f"{package.name} {one}: {graph}"
        with console.status(title) as status:

            def show(phase: str, done: int, steps: int, _status: Any = status, _title: str = title) -> None:
                _status.update(f"{_title}: {phase} {done}/{steps}")

            manifest = tensorrt.build_engine(
                source,
                folder,
                manifest,
                package,
                graph=graph,
                profile=profile,
                target=one,
                weight_streaming=weight_streaming,
                refit=refit,
                progress=show,
            )
        path = folder / manifest.engines[-1].file
        console.print(
            f"{path}: {path.stat().st_size / 1e6:.1f} MB in {time.perf_counter() - begun:.1f} s; all nodes taken",
            soft_wrap=True,
            markup=False,
        )
    typer.echo(folder)


def _verify(bundle: Bundle, folder: Path, manifest: Manifest) -> Manifest:
    """Compare the export with the torch engine, write the result into the manifest, and print it."""
    from mogle_rt.export.comparisons import summary
    from mogle_rt.export.verify import verify as run

    results = run(bundle, folder, manifest, _say)
    manifest = replace(manifest, verified=summary(results))
    manifest.write(folder)
    _report(results)
    return manifest


def _report(results: list[Comparison]) -> None:
    """Print the errors as a table, and raise an error if a comparison failed."""
    from mogle_rt.export.comparisons import require

    table = Table("compared with PyTorch", "by", "RMS error", "largest", "allowed RMS", "", box=None, pad_edge=False)
    for r in results:
        verdict = "ok" if r.passed else "FAILED"
        table.add_row(r.what, r.by, f"{r.rms:.1e}", f"{r.largest:.1e}", f"{r.tolerance:.0e}", verdict)
    Console(stderr=True, width=TABLE_WIDTH, highlight=False, emoji=False).print(table)
    require(results)


def _say(what: str) -> None:
    if console.is_terminal:
        console.print(f"  {what}", markup=False)


def _require_onnx() -> None:
    """Raise an error if onnx or onnxruntime, which are an extra of the package, can't be imported."""
    from mogle_rt.engines.onnxruntime_import import import_onnxruntime

    for package, load in (("onnx", lambda: __import__("onnx")), ("onnxruntime", import_onnxruntime)):
        try:
            load()
        except ImportError as error:
            raise DeviceError(f"export needs the package {package} ({error}): {install_command('export')}") from None


if __name__ == "__main__":
    run_app(app)
