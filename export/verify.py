"""Checks exported graphs: random inputs go through them and through the torch engine, and the results are compared.

onnxruntime runs graphs in float32 and float16. Its CPU kernels don't take bfloat16, so ONNX's reference evaluator runs such
graphs. Graphs that are too large for the evaluator are built again in float32, with the same weights. Of a model that is too
large for memory, one double block and one single block are checked, each alone and at full width. The torch engine computes
in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from torch import Tensor

from mogle_rt import __version__
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.bundle.schema import transformer_tensors
from mogle_rt.bundle.source import TensorSource
from mogle_rt.config import NUM_EXPERTS, PATCH
from mogle_rt.encoders.vae import autoencoder, load_autoencoder, pack_latents, unpack_latents
from mogle_rt.engines.contract import Conditions
from mogle_rt.engines.exported import NO_ATTENTION, manifest_dtype
from mogle_rt.engines.manifest import Manifest, manifest_path
from mogle_rt.engines.torch_engine import TorchEngine
from mogle_rt.errors import CheckpointError
from mogle_rt.export.blocks import SelectedBlocks
from mogle_rt.export.comparisons import TOLERANCES, VAE_TOLERANCES, Comparison, compare
from mogle_rt.export.exporter import build_graph
from mogle_rt.export.run_graphs import CPU, Run, evaluate, options_of, run_built, run_exported, run_files
from mogle_rt.export.text import CLIP, TEXT_GRAPHS
from mogle_rt.export.verify_text import compare_text
from mogle_rt.export.weights import Weights, exported_names
from mogle_rt.loop.schedule import make_schedule

STEPS = 3
EVALUATED = 5_000_000  # the most parameters for which the reference evaluator is fast enough
WHOLE = 500_000_000  # the most parameters for which the whole model is run


@dataclass(frozen=True)
class Case:
    """The sizes of a random run: number of images, rows and columns of tokens, text tokens; and condition_scale."""

    batch: int
    grid: tuple[int, int]
    text: int
    scale: float = 1.0

    @property
    def title(self) -> str:
        size = f"{self.grid[1] * PATCH}x{self.grid[0] * PATCH}"
        scaled = f", condition_scale {self.scale:g}" if self.scale != 1 else ""
        return f"{size}, batch {self.batch}, {self.text} text tokens{scaled}"

    def conditions(self, bundle: TensorSource) -> Conditions:
        """Random conditions, the same in every run."""
        t, g = bundle.config.transformer, torch.Generator().manual_seed(7)
        tokens = math.prod(self.grid)
        return Conditions.from_mask_latents(
            torch.randn(self.batch, NUM_EXPERTS, tokens, t.in_channels, generator=g),
            prompt_embeds=torch.randn(self.batch, self.text, t.joint_attention_dim, generator=g),
            pooled_prompt_embeds=torch.randn(self.batch, t.pooled_projection_dim, generator=g),
            guidance_scale=3.5,
            grid=self.grid,
            condition_scale=self.scale,
            position_delta=(1, -2),
            position_scale=1.5,
        )

    def latents(self, bundle: TensorSource) -> Tensor:
        """Random noise [B, N, 64], the same in every run."""
        shape = self.batch, math.prod(self.grid), bundle.config.transformer.in_channels
        return torch.randn(shape, generator=torch.Generator().manual_seed(8))


CASES = (
    Case(1, (2, 3), 5),
    Case(2, (4, 2), 9),
    Case(1, (3, 3), 4, scale=0.6),
    Case(2, (2, 4), 7, scale=1.7),
)


def verify(
    bundle: Bundle, folder: Path, manifest: Manifest, progress: Callable[[str], None] | None = None
) -> list[Comparison]:
    """Compare an export with the torch engine, with diffusers' VAE and with transformers' text encoders.

    Args:
        bundle: the bundle that was exported.
        folder, manifest: the export.
        progress: is called with the name of each comparison before it is made.

    Raises:
        CheckpointError: the graphs can't be run themselves, and those built to be run instead differ from them.
    """
    model = manifest.model_config
    placed = bundle if manifest.weights.file is None else Bundle(folder / manifest.weights.file)
    if manifest_dtype(manifest) == torch.bfloat16 or _parameters(bundle) > WHOLE:
        _require_same_graphs(placed, folder, manifest)
    results = []
    for name, double, single in _parts(bundle):
        part, source = (SelectedBlocks(b, double=double, single=single) for b in (bundle, placed))
        run, by, computed = _runner(source, folder, manifest, whole=not name)
        prefix = f"step{name}, "
        outputs = []
        for case in CASES:
            if progress:
                progress(prefix + case.title)
            outputs.append(_step(part, case, run))
        del run
        tolerance = TOLERANCES[_coarsest(bundle, manifest, computed)]
        engine = TorchEngine(part, CPU, torch.float32, model)
        for case, output in zip(CASES, outputs, strict=True):
            expected = _torch_step(engine, part, case)
            results.append(compare(prefix + case.title, by, output, expected, tolerance))
        del engine
    if progress:
        progress("vae")
    run, by, computed = run_exported(placed, folder, manifest)
    results += _compare_vae(bundle, run, by, VAE_TOLERANCES[_coarsest(bundle, manifest, computed)])
    if set(TEXT_GRAPHS) <= set(manifest.graphs):

        def allowed(computed: torch.dtype) -> float:
            return TOLERANCES[_coarsest(bundle, manifest, computed)]

        results += compare_text(bundle, placed, folder, manifest, allowed, progress)
    return results


def check(
    path: str | Path, checkpoint: str | Path | None, progress: Callable[[str], None] | None = None
) -> list[Comparison]:
    """Verify an export again, after checking the contents of all its files.

    Args:
        path: its folder.
        checkpoint: the bundle; it is needed only if the weights were embedded.

    Raises:
        CheckpointError: a file is missing or was changed.
    """
    manifest, folder = Manifest.read(path), manifest_path(path).parent
    manifest.check_files(folder)
    if checkpoint is None:
        if manifest.weights.file is None:
            raise CheckpointError(f"{folder}: its weights are embedded; name the bundle {manifest.bundle.name} too")
        bundle = Bundle(folder / manifest.weights.file)
    else:
        bundle = Bundle(checkpoint)
        if bundle.content_hash not in (manifest.bundle.sha256, manifest.weights.sha256):
            raise CheckpointError(f"{folder}: was exported from another bundle than {checkpoint}")
    if progress:
        progress(f"contents of {bundle.path}")
    bundle.verify()
    manifest.check_graphs(bundle.config, folder)
    if manifest.weights.file is not None and not bundle.path.samefile(folder / manifest.weights.file):
        Bundle(folder / manifest.weights.file).verify()
    return verify(bundle, folder, manifest, progress)


# What is run


def _coarsest(bundle: TensorSource, manifest: Manifest, computed: torch.dtype) -> torch.dtype:
    """The dtype that rounds most: that of the arithmetic, or that to which weights were converted for the export."""
    dtype = manifest_dtype(manifest)
    rounded = manifest.weights.mode != "link" and any(
        bundle.tensors[name].dtype != dtype for name in exported_names(bundle, text_encoders=CLIP in manifest.graphs)
    )
    return max((computed, dtype) if rounded else (computed,), key=TOLERANCES.__getitem__)


def _parameters(bundle: TensorSource) -> int:
    shapes = transformer_tensors(bundle.config.transformer)
    return sum(math.prod(shape) for shape in shapes.values())


def _parts(bundle: TensorSource) -> Iterator[tuple[str, list[int], list[int]]]:
    """What is run: a title, and the numbers of double and single blocks.

    It is the whole model or, if that is very large, one block of each kind alone.
    """
    t = bundle.config.transformer
    if _parameters(bundle) <= WHOLE:
        yield "", list(range(t.num_layers)), list(range(t.num_single_layers))
        return
    if t.num_layers:
        yield " (double block 0 alone)", [0], []
    if t.num_single_layers:
        last = t.num_single_layers - 1
        yield f" (single block {last} alone)", [], [last]


def _require_same_graphs(placed: Bundle, folder: Path, manifest: Manifest) -> None:
    """Check that graphs built for verification equal the files to the byte. Other software versions may write others."""
    software = manifest.software
    if (software.get("mogle_rt"), software.get("onnx")) != (__version__, onnx.__version__):
        return
    dtype = manifest_dtype(manifest)
    weights = Weights(placed.tensors, manifest.weights.file, placed, dtype, "")
    for name, graph in manifest.graphs.items():
        model = build_graph(name, placed.config, weights, options_of(manifest, dtype))
        if model.SerializeToString() != (folder / graph.file).read_bytes():
            raise CheckpointError(f"{folder / graph.file}: is not the graph of this bundle and manifest; export again")


def _runner(source: TensorSource, folder: Path, manifest: Manifest, *, whole: bool) -> tuple[Run, str, torch.dtype]:
    """What runs the step's graphs, its name, and the dtype in which it computes.

    Args:
        source: the exported weights, or some blocks of them if not ``whole``.
    """
    dtype = manifest_dtype(manifest)
    if dtype == torch.bfloat16 and _parameters(source) <= EVALUATED:
        return evaluate(source, manifest, dtype), "reference evaluator", dtype
    if whole and dtype != torch.bfloat16:
        return run_files(folder, manifest), "onnxruntime", dtype
    return run_built(source, folder, manifest), "onnxruntime in float32", torch.float32


# Both sides


def _step(bundle: TensorSource, case: Case, run: Run) -> dict[str, Tensor]:
    """Run the graphs of the experts, the preparation and a step."""
    c, schedule = case.conditions(bundle), make_schedule(bundle.config.scheduler, STEPS, math.prod(case.grid))
    inputs: dict[str, Tensor] = {
        "mask_latents": c.masks.stacked(),
        "prompt_embeds": c.prompt_embeds,
        "pooled_prompt_embeds": c.pooled_prompt_embeds,
        "model_timesteps": schedule.model_timesteps,
        "timesteps": schedule.timesteps,
        "guidance": torch.tensor([c.guidance_scale * 1000]),
        "grid": torch.tensor(c.grid),
        "position_delta": torch.tensor(c.position_delta, dtype=torch.float32),
        "position_scale": torch.tensor([c.position_scale]),
        "log_condition_scale": torch.tensor([max(NO_ATTENTION, math.log(c.condition_scale))]),
        "latents": case.latents(bundle),
        "step": torch.tensor([1]),
    }
    inputs |= run("experts", inputs)
    inputs |= run("prepare", inputs)
    return run("step" if case.scale == 1 else "step_scaled", inputs)


def _torch_step(engine: TorchEngine, bundle: TensorSource, case: Case) -> dict[str, Tensor]:
    latents = case.latents(bundle)
    with torch.no_grad():
        engine.prepare(case.conditions(bundle), make_schedule(bundle.config.scheduler, STEPS, math.prod(case.grid)))
        condition = engine.condition(latents, 1)
        return {"condition": condition, "velocity": engine.velocity(latents, condition, 1)}


def _compare_vae(bundle: Bundle, run: Run, by: str, tolerance: float) -> list[Comparison]:
    """Compare encoder and decoder with diffusers' module."""
    vae = load_autoencoder(autoencoder(bundle.config.vae), bundle.part("vae", CPU, torch.float32), str(bundle.path))
    results = []
    g = torch.Generator().manual_seed(9)
    for count, (height, width) in ((1, (32, 48)), (2, (64, 32))):
        grid = height // PATCH, width // PATCH
        title = f"{width}x{height}, batch {count}"
        pictures = torch.randint(0, 256, (count, height, width, 3), generator=g, dtype=torch.uint8)
        latents = torch.randn(count, math.prod(grid), bundle.config.transformer.in_channels, generator=g)
        with torch.no_grad():
            x = pictures.permute(0, 3, 1, 2).float().contiguous() / 255 * 2 - 1
            mean = vae.encode(x).latent_dist.mode()
            encoded = pack_latents((mean - vae.config.shift_factor) * vae.config.scaling_factor)
            z = unpack_latents(latents, height, width) / vae.config.scaling_factor + vae.config.shift_factor
            image = (vae.decode(z).sample / 2 + 0.5).clamp(0, 1)
        outputs = run("vae_encoder", {"pictures": pictures})
        results.append(compare(f"vae_encoder, {title}", by, outputs, {"latents": encoded}, tolerance))
        outputs = run("vae_decoder", {"latents": latents, "grid": torch.tensor(grid)})
        results.append(compare(f"vae_decoder, {title}", by, outputs, {"images": image}, tolerance))
    return results
