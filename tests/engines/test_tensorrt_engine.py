"""TensorRT-RTX engines are built for GPUs that this machine doesn't have. To run one needs a GPU of a supported kind."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch

from mogle_rt import ConfigError, DeviceError, Pipeline
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.config import ModelConfig
from mogle_rt.engines.engine_file import read_engine
from mogle_rt.engines.manifest import Manifest
from mogle_rt.engines.tensorrt_engine import PACKAGES
from mogle_rt.export.blocks import SelectedBlocks
from mogle_rt.export.exporter import ExportOptions, build_graph, export
from mogle_rt.export.tensorrt import (
    Profile,
    RefusedNodesError,
    Size,
    build_engine,
    build_plan,
    parse_targets,
    step_model,
)
from mogle_rt.export.weights import COPY_NAME, Weights
from tests.checkpoints import TINY, write_checkpoint
from tests.conftest import make_once
from tests.export.test_misuse import run
from tests.sparse_bundles import write_sparse_bundle

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

RTX = PACKAGES["tensorrt-rtx"]
SMALL = Profile(smallest=Size(32, 32), usual=Size(64, 64, 2), largest=Size(128, 128, 4), text_tokens=(1, 16, 64))


@pytest.fixture(scope="session")
def tiny_bundle(shared_folder: Path) -> Path:
    """A bundle with one block of each kind, in place of the other tests' one: building engines takes half the time."""
    config = replace(TINY, num_layers=1, num_single_layers=1)

    def make(path: Path) -> None:
        write_checkpoint(path.with_suffix(""), config).convert(path)

    return make_once(shared_folder / "tensorrt" / "tiny.safetensors", make)


@pytest.mark.parametrize(
    ("dtype", "weights", "graph", "opset"),
    [
        ("fp32", "embed", "step", 23),
        ("fp16", "copy", "step_scaled", 22),
    ],
)
def test_build(dtype: str, weights: str, graph: str, opset: int, tiny_bundle: Path, tmp_path: Path) -> None:
    folder = export(tiny_bundle, tmp_path, dtype=dtype, weights=weights, opset=opset)  # type: ignore[arg-type]
    bundle = Bundle(folder / COPY_NAME if weights == "copy" else tiny_bundle)
    seen: list[tuple[str, int, int]] = []

    def progress(phase: str, done: int, steps: int) -> None:
        seen.append((phase, done, steps))

    manifest = build_engine(
        bundle, folder, Manifest.read(folder), RTX, graph=graph, profile=SMALL, target="SM89", progress=progress
    )
    assert manifest == Manifest.read(folder)
    (engine,) = manifest.engines
    header, begin = read_engine(folder / engine.file)
    assert (header.graph, header.dtype, header.target, header.runtime) == (graph, dtype, "8.9", "tensorrt-rtx")
    assert header.profile["latents"] == ((1, 4, 64), (2, 16, 64), (4, 64, 64))
    assert header.profile["rope_cos"] == ((9, 8), (48, 8), (192, 8))
    assert (folder / engine.file).stat().st_size == begin + header.plan_bytes
    assert seen
    assert any(done == steps > 0 for _, done, steps in seen)


def test_command(tiny_bundle: Path, tmp_path: Path) -> None:
    """Several targets, streamed and linked weights, bfloat16 and fused attention in one command.

    On a machine without such a GPU, opening the engine says for which GPUs it was built.
    """
    shutil.copy(tiny_bundle, tmp_path / "tiny.safetensors")
    args = (
        tmp_path / "tiny.safetensors",
        "--no-verify",
        "--format",
        "tensorrt-rtx",
        "--target",
        "sm_86,120",
        "--dtype",
        "bf16",
    )
    done = run(*args, "--weight-streaming", "--min", "32x32", "--opt", "64x64", "--max", "64x96x2")
    assert done.code == 0, done.err
    assert done.err.count("all nodes taken") == 2
    engines = Manifest.read(tmp_path).engines
    assert [e.file for e in engines] == ["step.sm86.tensorrt-rtx.engine", "step.sm120.tensorrt-rtx.engine"]
    for engine, target in zip(engines, ("8.6", "12.0"), strict=True):
        header, _ = read_engine(tmp_path / engine.file)
        assert header.target == target
        assert header.weight_streaming
        assert not header.refittable
    with pytest.raises(DeviceError, match=r"runs on a CUDA GPU of compute capability 12.0 or 8.6, not on cpu"):
        Pipeline(tmp_path / "tiny.safetensors", device="cpu", engine="tensorrt-rtx")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU builds it")
def test_refit_needs_a_gpu(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = export(tiny_bundle, tmp_path, dtype="bf16")
    with pytest.raises(DeviceError, match="refittable engines on a machine with a GPU only; leave out --refit"):
        build_engine(Bundle(tiny_bundle), folder, Manifest.read(folder), RTX, profile=SMALL, target="SM89", refit=True)
    assert not list(folder.glob("*.engine"))


def test_refused_nodes_are_named(tiny_bundle: Path, tmp_path: Path) -> None:
    """The error names an operator that TensorRT doesn't know, and one that it knows but can't take in this form."""
    folder = export(tiny_bundle, tmp_path, dtype="bf16")
    bundle, manifest = Bundle(tiny_bundle), Manifest.read(folder)
    model = step_model(bundle, manifest, "step")
    for name, op in (("planted/unknown", "StringNormalizer"), ("planted/sequence", "SequenceLength")):
        source = "latents"
        if op == "SequenceLength":
            model.graph.node.append(
                onnx.helper.make_node("SequenceConstruct", [source], ["s"], name="planted/construct")
            )
            source = "s"
        model.graph.node.append(onnx.helper.make_node(op, [source], [f"{name}.out"], name=name))
        model.graph.output.append(onnx.helper.make_tensor_value_info(f"{name}.out", onnx.TensorProto.INT64, None))
    with pytest.raises(RefusedNodesError, match="tensorrt-rtx refuses 3 nodes: ") as caught:
        build_plan(model, folder, RTX, {}, target="SM89")
    refused = {name: op for name, op, _ in caught.value.nodes}
    assert refused == {
        "planted/unknown": "StringNormalizer",
        "planted/construct": "SequenceConstruct",
        "planted/sequence": "SequenceLength",
    }
    assert "planted/unknown (StringNormalizer)" in str(caught.value)


def test_no_node_of_float32_attention(tiny_bundle: Path, tmp_path: Path) -> None:
    """In float32 TensorRT-RTX refuses the fused operator, so single operations replace it. The last lines show that it
    still refuses it."""
    folder = export(tiny_bundle, tmp_path, dtype="fp32")
    bundle, manifest = Bundle(tiny_bundle), Manifest.read(folder)
    assert "Attention" not in {n.op_type for n in step_model(bundle, manifest, "step").graph.node}
    fused = onnx.load(folder / "step.onnx", load_external_data=False)
    assert "Attention" in {n.op_type for n in fused.graph.node}
    axes = [SMALL.axes(i) for i in range(3)]
    shapes = {t.name: [t.sizes(**a) for a in axes] for t in manifest.graphs["step"].inputs if t.name != "step"}
    with pytest.raises(ConfigError, match="Attention"):
        build_plan(fused, folder, RTX, shapes, target="SM89")


def test_targets() -> None:
    assert parse_targets("89, 8.6,sm_120,SM75", RTX) == ["SM89", "SM86", "SM120", "SM75"]


@pytest.mark.slow
def test_slice_of_full_width(tmp_path: Path) -> None:
    """An engine of FLUX.1-dev's first double and last single block, in bfloat16."""
    path = write_sparse_bundle(tmp_path / "flux_dev.safetensors")
    part = SelectedBlocks(Bundle(path), double=[0], single=[37])
    options = ExportOptions(dtype=torch.bfloat16, model=ModelConfig())
    weights = Weights(part.tensors, path.name, part, torch.bfloat16, "")
    model = build_graph("step", part.config, weights, options)
    profile = Profile()
    shapes = {}
    for value in model.graph.input:
        dims = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        if any(isinstance(d, str) for d in dims):
            shapes[value.name] = [[profile.axes(i).get(str(d), d) for d in dims] for i in range(3)]
    plan = build_plan(model, tmp_path, RTX, shapes, target="SM120")
    assert plan.nbytes > 300e6  # most of the 680 MB of weights; all are zeros here, and TensorRT keeps some once


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_run_on_a_gpu(tiny_bundle: Path, tmp_path: Path) -> None:
    """TensorRT-RTX draws the same image as PyTorch."""
    capability = "{}{}".format(*torch.cuda.get_device_capability())
    if f"SM{capability}" not in dir(RTX.load().ComputeCapability):
        pytest.skip(f"TensorRT-RTX doesn't build for compute capability {capability}")
    folder = export(tiny_bundle, tmp_path, dtype="fp16")
    build_engine(Bundle(tiny_bundle), folder, Manifest.read(folder), RTX, profile=SMALL, target=f"SM{capability}")
    images = [
        torch.as_tensor(
            Pipeline(tiny_bundle, "cuda", "fp16", engine=engine, engine_path=path)(  # type: ignore[arg-type]
                prompt="a face",
                num_inference_steps=4,
                height=64,
                width=64,
                max_sequence_length=32,
                generator=torch.Generator().manual_seed(0),
                output_type="pt",
            ).images
        )
        for engine, path in (("torch", None), ("tensorrt-rtx", folder))
    ]
    assert float((images[0] - images[1]).abs().max()) < 0.05
