"""Exported graphs: the golden cases through onnxruntime, all sizes and switches, weights in other files, full size."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from mogle_rt import CheckpointError, InputError, OutputError, Pipeline
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.config import NUM_CLASSES, ModelConfig, MogleConfig
from mogle_rt.engines.exported import ExportedGraphs, Session, StepPreparation
from mogle_rt.engines.manifest import BundleSpec, Manifest
from mogle_rt.engines.onnx_engine import OnnxEngine
from mogle_rt.engines.onnxruntime_import import import_onnxruntime
from mogle_rt.engines.torch_engine import TorchEngine
from mogle_rt.engines.velocity import VelocityLoop
from mogle_rt.export.comparisons import Comparison, summary
from mogle_rt.export.exporter import GRAPHS, ExportOptions, build_graph, export
from mogle_rt.export.verify import CASES as SIZES
from mogle_rt.export.verify import STEPS, Case, _coarsest, check, verify
from mogle_rt.export.weights import COPY_NAME, Weights
from mogle_rt.loop.denoise import euler
from mogle_rt.loop.schedule import Schedule, make_schedule
from mogle_rt.masks import condition_picture
from tests.checkpoints import TINY, Files, write_checkpoint
from tests.conftest import CASES, GoldenCase, assert_close
from tests.sparse_bundles import write_sparse_bundle

CPU = torch.device("cpu")
VELOCITY, LATENTS = 1e-5, 1e-4  # relative RMS
Bundles = Callable[[str], Path]


def export_case(case: GoldenCase, bundle: Path, folder: Path, **options: Any) -> Path:
    """Export the case's bundle in float32, with the case's switches."""
    return export(bundle, folder, dtype="fp32", model_config=case.model, **options)


# The golden cases


@pytest.mark.parametrize("name", CASES)
def test_golden_steps(name: str, golden_bundle: Bundles, tmp_path: Path) -> None:
    case = GoldenCase.load(name)
    bundle = Bundle(golden_bundle(case.settings["checkpoint"]))
    folder = export_case(case, bundle.path, tmp_path)
    engine = OnnxEngine(ExportedGraphs(folder, bundle, case.model, torch.float32), CPU)
    height, width = case.size
    schedule = make_schedule(bundle.config.scheduler, case.settings["steps"], height * width // 256)
    engine.prepare(case.conditions, schedule)
    latents = case.tensors["noise"]
    compared = 0
    for k in range(len(schedule)):
        velocity = engine.step(latents, k)
        for key, value in ((f"noise_pred.{k}", velocity), (f"cond.{k}", engine.condition(latents, k))):
            if key in case.tensors:
                assert_close(value, case.tensors[key], rms=VELOCITY)
                compared += 1
        latents = euler(latents, velocity, schedule.sigmas[k], schedule.sigmas[k + 1])
    assert compared >= 2
    assert_close(latents, case.tensors["final_latents"], rms=LATENTS)


@pytest.mark.parametrize("name", ["base", "not_square", "condition_scale", "no_gating"])
def test_golden_images(name: str, golden_bundle: Bundles, tmp_path: Path) -> None:
    """Through the public call."""
    case = GoldenCase.load(name)
    bundle = golden_bundle(case.settings["checkpoint"])
    folder = export_case(case, bundle, tmp_path)
    pipe = Pipeline(bundle, device="cpu", model_config=case.model, engine="onnxruntime", engine_path=folder)
    assert pipe.dtype == torch.float32  # the export's
    images = pipe(
        case.tensors["labels"],
        prompt_embeds=case.tensors["prompt_embeds"],
        pooled_prompt_embeds=case.tensors["pooled_prompt_embeds"],
        latents=case.tensors["noise"],
        num_inference_steps=case.settings["steps"],
        height=case.size[0],
        width=case.size[1],
        output_type="pt",
        **case.placement,
    ).images
    assert isinstance(images, Tensor)
    assert_close(images, case.tensors["image"], rms=LATENTS)


@pytest.mark.parametrize("name", ["base", "no_guidance"])
def test_image_by_graphs_alone(name: str, golden_bundle: Bundles, tmp_path: Path) -> None:
    """The graphs are run as the manifest describes, with onnxruntime and numpy only."""
    case = GoldenCase.load(name)
    folder = export_case(case, golden_bundle(case.settings["checkpoint"]), tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())

    def run(graph: str, values: dict[str, Any]) -> dict[str, Any]:
        session = import_onnxruntime().InferenceSession(folder / manifest["graphs"][graph]["file"])
        spec = manifest["graphs"][graph]
        results = session.run(None, {t["name"]: values[t["name"]] for t in spec["inputs"]})
        return {t["name"]: value for t, value in zip(spec["outputs"], results, strict=True)}

    labels, scheduler = case.tensors["labels"].numpy().astype(np.uint8), manifest["schedule"]["scheduler"]
    pictures = np.stack([condition_picture(labels, i) for i in range(20)])
    values: dict[str, Any] = {"mask_latents": run("vae_encoder", {"pictures": pictures})["latents"][None]}
    grid = np.array(case.size) // 16
    s = np.linspace(1, 1 / case.settings["steps"], case.settings["steps"])
    span = scheduler["max_image_seq_len"] - scheduler["base_image_seq_len"]
    slope = (scheduler["max_shift"] - scheduler["base_shift"]) / span
    mu = scheduler["base_shift"] + slope * (grid.prod() - scheduler["base_image_seq_len"])
    sigmas = np.append(math.exp(mu) / (math.exp(mu) + (1 / s - 1)), 0).astype(np.float32)
    values |= {
        "prompt_embeds": case.tensors["prompt_embeds"].numpy(),
        "pooled_prompt_embeds": case.tensors["pooled_prompt_embeds"].numpy(),
        "timesteps": sigmas[:-1] * np.float32(1000),
        "model_timesteps": sigmas[:-1] * np.float32(1000) / np.float32(1000) * np.float32(1000),
        "guidance": np.array([1000 * case.placement["guidance_scale"]], np.float32),
        "grid": grid,
        "position_delta": np.zeros(2, np.float32),
        "position_scale": np.ones(1, np.float32),
        "latents": case.tensors["noise"].numpy(),
    }
    values |= run("experts", values)
    values |= run("prepare", values)
    for k in range(len(s)):
        velocity = run("step", values | {"step": np.array([k])})["velocity"]
        values["latents"] = values["latents"] + (sigmas[k + 1] - sigmas[k]) * velocity
    assert_close(torch.from_numpy(values["latents"]), case.tensors["final_latents"], rms=LATENTS)
    images = run("vae_decoder", values)["images"]
    assert_close(torch.from_numpy(images), case.tensors["image"], rms=LATENTS)


# Any size, switch, opset, dtype

SWITCHES: dict[str, dict[str, bool]] = {
    "released": {},
    "separate": {"union_cond_attn": False, "add_cond_attn": True},
    "independent": {"independent_condition": True, "weight_is_scale": True},
    "all LoRA": {"latent_lora": True, "add_cond_attn": True},
}


# ONNX has an operator for GELU from opset 20 on, and operators for attention, norms and rotations from opset 23 on.
OPSETS = [(switches, opset) for switches in SWITCHES for opset in (18, 23)] + [("released", 20), ("separate", 25)]


@pytest.mark.parametrize(("switches", "opset"), OPSETS)
def test_sizes_batches_and_text_lengths(switches: str, opset: int, tiny_bundle: Path, tmp_path: Path) -> None:
    """The same files serve four sizes, with and without condition_scale, and with moved and scaled conditions."""
    folder = export(tiny_bundle, tmp_path, dtype="fp32", opset=opset, model_config=SWITCHES[switches])
    bundle = Bundle(tiny_bundle)
    model = ModelConfig.from_mapping(SWITCHES[switches])
    exported = OnnxEngine(ExportedGraphs(folder, bundle, model, torch.float32), CPU)
    reference = TorchEngine(bundle, CPU, torch.float32, model)
    for case in (*SIZES, Case(3, (5, 1), 1), Case(1, (1, 1), 1, scale=0.0)):
        schedule = make_schedule(bundle.config.scheduler, STEPS, math.prod(case.grid))
        for engine in (exported, reference):
            engine.prepare(case.conditions(bundle), schedule)
        latents = case.latents(bundle)
        for k in (0, STEPS - 1):
            assert_close(exported.step(latents, k), reference.step(latents, k), rms=VELOCITY)


@pytest.mark.parametrize(
    ("blocks", "mogle", "guidance"),
    [
        ((1, 0), MogleConfig(), True),
        ((0, 1), MogleConfig(has_gating=False), False),
        ((1, 3), MogleConfig(has_expert=False), True),
        ((0, 2), MogleConfig(), True),
    ],
)
def test_models(blocks: tuple[int, int], mogle: MogleConfig, guidance: bool, tmp_path: Path) -> None:
    """Models without double or single blocks, gate, experts or guidance, with an odd number of heads, or other ranks."""
    config = replace(
        TINY, num_layers=blocks[0], num_single_layers=blocks[1], guidance_embeds=guidance, num_attention_heads=3
    )
    files = write_checkpoint(tmp_path / "files", config, mogle=mogle, rank=3, seed=5)
    bundle = Bundle(files.convert(tmp_path / "odd.safetensors"))
    folder = export(bundle.path)
    results = verify(bundle, folder, Manifest.read(folder))
    assert len(results) == 8
    assert all(r.passed for r in results), results


@pytest.mark.parametrize(
    ("stored", "dtype", "weights"),
    [
        (torch.float32, "fp16", "link"),
        (torch.float32, "bf16", "copy"),
        (torch.bfloat16, "bf16", "link"),
        (torch.bfloat16, "fp32", "link"),
        (torch.float16, "fp32", "embed"),
    ],
)
def test_dtypes(stored: torch.dtype, dtype: str, weights: Any, tmp_path: Path) -> None:
    """Weights are cast by the graph, or when they are copied or embedded. In each dtype the result is right."""
    bundle = Bundle(write_checkpoint(tmp_path / "files", dtype=stored).convert(tmp_path / "b.safetensors"))
    folder = export(bundle.path, tmp_path / "out", dtype=dtype, weights=weights)
    results = check(folder, bundle.path)
    assert all(r.passed for r in results), results
    by = {r.by for r in results if r.what.startswith("step")}
    assert by == {"reference evaluator" if dtype == "bf16" else "onnxruntime"}
    assert (folder / COPY_NAME).exists() == (weights == "copy")


def test_bfloat16_is_verified_on_the_files(tmp_path: Path) -> None:
    """Verification uses the copied weights and the written graphs, though a CPU can't run these graphs in bfloat16."""
    bundle = Bundle(write_checkpoint(tmp_path / "files").convert(tmp_path / "b.safetensors"))
    folder = export(bundle.path, tmp_path / "out", dtype="bf16", weights="copy")
    copied, manifest = Bundle(folder / COPY_NAME), Manifest.read(folder)
    info = copied.tensors["transformer.proj_out.weight"]
    with copied.path.open("r+b") as file:
        file.seek(info.begin)
        file.write(bytes(info.end - info.begin))
    failed = [r.what for r in verify(bundle, folder, manifest) if not r.passed]
    assert [what.split(",")[0] for what in failed] == 4 * ["step"]
    path = folder / "step.onnx"
    path.write_bytes(path.read_bytes().replace(b"mogle_rt", b"elgom_rt", 1))
    with pytest.raises(
        CheckpointError, match=r"step\.onnx: is not the graph of this bundle and manifest; export again"
    ):
        verify(bundle, folder, manifest)


def test_what_onnxruntime_lacks_in_bfloat16(tiny_bundle: Path) -> None:
    """In a bfloat16 graph these operators compute in float32. In float16 none of them is cast."""
    bundle, model = Bundle(tiny_bundle), ModelConfig(weight_is_scale=True)
    weights = Weights(bundle.tensors, "b.safetensors", bundle, torch.float32, "")
    for dtype, cast in ((torch.bfloat16, True), (torch.float16, False)):
        found = {}
        for name in ("step", "vae_decoder"):
            nodes = build_graph(name, bundle.config, weights, ExportOptions(dtype=dtype, model=model)).graph.node
            to = {n.output[0]: n.attribute[0].i for n in nodes if n.op_type == "Cast"}
            for node in nodes:
                if node.op_type in ("Resize", "ReduceMean") or (node.op_type == "Clip" and name == "vae_decoder"):
                    found[node.op_type] = to.get(node.input[0]) == onnx.TensorProto.FLOAT
        assert found == dict.fromkeys(("ReduceMean", "Resize", "Clip"), cast)


def test_same_prompt_is_prepared_once(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights that prepare a prompt are a quarter of the model, so they aren't read again for the same prompt."""
    bundle = Bundle(tiny_bundle)
    exported = ExportedGraphs(export(tiny_bundle, tmp_path, dtype="fp32"), bundle, ModelConfig(), torch.float32)
    prepare = StepPreparation(exported, CPU)
    opened, open_session = [], prepare.session

    def session(name: str) -> Session:
        opened.append(name)
        return open_session(name)

    monkeypatch.setattr(prepare, "session", session)
    conditions = SIZES[0].conditions(bundle)
    schedule = make_schedule(bundle.config.scheduler, STEPS, math.prod(SIZES[0].grid))
    first, again = prepare(conditions, schedule), prepare(conditions, schedule)
    assert opened == ["experts", "prepare", "experts"]
    assert first["text"] is again["text"]
    conditions.prompt_embeds.mul_(2)  # the caller's own tensor, changed
    assert not torch.equal(prepare(conditions, schedule)["text"], first["text"])
    prepare(replace(conditions, position_delta=(0, 1)), schedule)
    prepare(replace(conditions, position_delta=(0, 1)), make_schedule(bundle.config.scheduler, STEPS + 1, 6))
    assert opened[3:] == 3 * ["experts", "prepare"]


def test_latents_are_a_copy() -> None:
    class Still(VelocityLoop):
        def step(self, latents: Tensor, k: int) -> Tensor:
            return torch.zeros_like(latents)

    engine = Still()
    engine.follow(Schedule(torch.ones(2), torch.ones(1), torch.ones(1)), torch.device("cpu"))
    engine.start(torch.ones(1, 4, 64))
    engine.latents().zero_()
    assert torch.equal(engine.latents(), torch.ones(1, 4, 64))


def test_planted_faults_are_caught(tiny_bundle: Path, tmp_path: Path) -> None:
    """Verification notices exchanged weights, another switch and a wrong constant."""
    folder = export(tiny_bundle, tmp_path, dtype="fp32")
    bundle, manifest = Bundle(tiny_bundle), Manifest.read(folder)
    assert all(r.passed for r in verify(bundle, folder, manifest))

    def failures(change: Callable[[onnx.ModelProto], None], graph: str) -> int:
        path = folder / f"{graph}.onnx"
        whole = path.read_bytes()
        model = onnx.load_model_from_string(whole)
        change(model)
        path.write_bytes(model.SerializeToString())
        failed = [r for r in verify(bundle, folder, manifest) if not r.passed]
        path.write_bytes(whole)
        return len(failed)

    def exchange(model: onnx.ModelProto) -> None:
        a, b = (
            next(t for t in model.graph.initializer if t.name.endswith(f"transformer_blocks.1.attn.to_{x}.weight"))
            for x in "qv"
        )
        a.name, b.name = b.name, a.name

    def no_lora(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            if node.op_type == "Gemm" and any("lora_B" in name for name in node.input):
                node.input[0], node.input[1], node.input[2] = node.input[2], node.input[2], node.input[2]
                node.op_type = "Sum"
                del node.attribute[:]
                del node.input[1:]

    def epsilon(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            if node.op_type == "InstanceNormalization":
                node.attribute[0].f = 0.1

    assert failures(exchange, "step") == 2
    assert failures(no_lora, "step_scaled") == 2
    assert failures(no_lora, "prepare") == 4
    assert failures(epsilon, "vae_decoder") == 2


# The files


@pytest.mark.parametrize("opset", [18, 23])
def test_graphs_are_portable(opset: int, tiny_files: Any, tmp_path: Path) -> None:
    """ONNX's own checker accepts the graphs and infers all shapes. They have standard operators only, and every weight
    refers to its place in the bundle."""
    path = tiny_files.convert(tmp_path / "b.safetensors")
    folder = export(path, opset=opset)
    bundle = Bundle(path)
    used = set()
    for name in GRAPHS:
        file = folder / f"{name}.onnx"
        onnx.checker.check_model(str(file), full_check=True)
        onnx.load(file)  # onnx's loader reads the weights too
        model = onnx.load(file, load_external_data=False)
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        assert len(inferred.graph.value_info) > 0.9 * len(model.graph.node) - 2
        operators = {node.op_type for node in model.graph.node}
        assert {node.domain for node in model.graph.node} == {""}
        assert not {op for op in operators if "Sequence" in op}
        fused = {"Attention", "RMSNormalization", "RotaryEmbedding"} & operators
        if opset < 23:
            assert not fused
        elif name == "step":
            assert len(fused) == 3
        for tensor in model.graph.initializer:
            if tensor.name.startswith("const/"):
                assert len(tensor.raw_data) < 4096
                continue
            used.add(tensor.name)
            entry, info = {e.key: e.value for e in tensor.external_data}, bundle.tensors[tensor.name]
            assert entry == {
                "location": "b.safetensors",
                "offset": str(info.begin),
                "length": str(info.end - info.begin),
            }
            assert tuple(tensor.dims) == info.shape
    exported = {n for n in bundle.tensors if n.split(".")[0] in ("transformer", "lora", "mogle", "vae")}
    last = "lora.single_transformer_blocks.1."  # the last block makes no query, MLP or output of condition rows
    assert exported - used == {
        f"{last}{n}.lora_{x}.weight" for n in ("attn.to_q", "proj_mlp", "proj_out") for x in "AB"
    }


def test_manifest_describes_the_graphs(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = export(tiny_bundle, tmp_path)
    manifest = Manifest.read(folder)
    assert Manifest.read(folder / "manifest.json") == manifest
    assert set(manifest.graphs) == set(GRAPHS)
    for graph in manifest.graphs.values():
        session = import_onnxruntime().InferenceSession(folder / graph.file)
        for specs, values in ((graph.inputs, session.get_inputs()), (graph.outputs, session.get_outputs())):
            assert [(s.name, list(s.shape)) for s in specs] == [(v.name, list(v.shape)) for v in values]
    names = {t.name for t in manifest.graphs["step"].inputs}
    made = {t.name for n in ("experts", "prepare") for t in manifest.graphs[n].outputs}
    assert names - made == {"latents", "step"}
    rows = next(t for t in manifest.graphs["step"].inputs if t.name == "modulation").shape[2]
    assert rows == len(manifest.modulation_rows)
    assert manifest.schedule["scheduler"]["base_shift"] == 0.5
    assert [c["index"] for c in manifest.classes] == list(range(NUM_CLASSES))
    assert manifest.classes[1] == {"index": 1, "name": "skin", "color": [204, 0, 0]}
    assert manifest.bundle == BundleSpec(name=tiny_bundle.name, sha256=Bundle(tiny_bundle).content_hash)


def test_manifest_is_json_for_all(tiny_bundle: Path, tmp_path: Path) -> None:
    """NaN and infinity, which JSON doesn't have, are written as null."""
    folder = export(tiny_bundle, tmp_path)
    bad = Comparison(what="step", by="none", rms=math.nan, largest=math.inf, tolerance=1e-5)
    replace(Manifest.read(folder), verified=summary([bad])).write(folder)
    (verified,) = Manifest.read(folder).verified
    assert (verified["rms"], verified["largest"], verified["passed"]) == (None, None, False)
    assert not re.search(r"\b(NaN|Infinity)\b", (folder / "manifest.json").read_text())


def test_same_export_same_bytes(tiny_bundle: Path, tmp_path: Path) -> None:
    a, b = export(tiny_bundle, tmp_path / "a"), export(tiny_bundle, tmp_path / "b")
    for name in (*(f"{g}.onnx" for g in GRAPHS), "manifest.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes()


def test_embedded_weights_stand_alone(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = export(tiny_bundle, tmp_path / "out", weights="embed")
    assert sorted(p.name for p in folder.iterdir()) == sorted([*(f"{g}.onnx" for g in GRAPHS), "manifest.json"])
    onnx.checker.check_model(str(folder / "step.onnx"), full_check=True)
    with pytest.raises(CheckpointError, match="embedded; name the bundle"):
        check(folder, None)


@pytest.mark.quick
def test_copy_is_a_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = export(tiny_bundle, tmp_path / "out", weights="copy", dtype="fp16")
    copied, bundle = Bundle(folder / COPY_NAME), Bundle(tiny_bundle)
    copied.verify()
    assert not copied.has_text_encoders
    name = "transformer.transformer_blocks.0.attn.to_q.weight"
    assert torch.equal(copied.tensor(name), bundle.tensor(name).half())
    for path in (tiny_bundle, folder / COPY_NAME):
        pipe = Pipeline(path, device="cpu", engine="onnxruntime", engine_path=folder)
        assert pipe.dtype == torch.float16


def test_failed_export_leaves_no_link(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mogle_rt.export.exporter.write_graph", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(tiny_bundle, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_large_weights_cant_be_embedded(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mogle_rt.export.weights.EMBED_LIMIT", 1000)
    with pytest.raises(InputError, match="can't be embedded, because an ONNX file can't be larger than 2 GB"):
        export(tiny_bundle, tmp_path, weights="embed")


def test_a_link_to_another_file_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"x")
    (tmp_path / tiny_bundle.name).symlink_to(tmp_path / "other")
    with pytest.raises(OutputError, match="symbolic link, which no loader follows"):
        export(tiny_bundle, tmp_path)


@pytest.mark.parametrize("named", [False, True])
def test_a_bundle_that_is_a_link_into_a_cache(named: bool, tiny_bundle: Path, tmp_path: Path) -> None:
    """A hub's snapshot is such a link. The export lies beside the given name, and nothing in the cache changes."""
    cache, own = tmp_path / "blobs", tmp_path / "snapshot"
    cache.mkdir()
    own.mkdir()
    blob = cache / "0123456789abcdef"
    blob.write_bytes(tiny_bundle.read_bytes())
    (own / "ckpt.safetensors").symlink_to(blob)
    folder = export(own / "ckpt.safetensors", own if named else None)
    assert folder.resolve() == own.resolve()
    assert list(cache.iterdir()) == [blob]
    export(own / "ckpt.safetensors")  # again, over the first one
    pipe = Pipeline(own / "ckpt.safetensors", device="cpu", engine="onnxruntime")
    arguments: dict[str, Any] = {"num_inference_steps": 1, "height": 32, "width": 32, "output_type": "latent"}
    images: Any = [
        p(None, "a woman", generator=torch.Generator().manual_seed(0), **arguments).images
        for p in (pipe, Pipeline(tiny_bundle, device="cpu"))
    ]
    assert_close(images[0], images[1], rms=1e-5)
    assert blob.read_bytes() == tiny_bundle.read_bytes()


def test_no_cosine_of_float64(tiny_bundle: Path) -> None:
    """onnxruntime before 1.29 has no cosine of float64. Graphs up to opset 21 do without, so they open from 1.20 on."""
    bundle = Bundle(tiny_bundle)
    weights = Weights(bundle.tensors, "w.safetensors", bundle, torch.float32, "")
    model = build_graph("prepare", bundle.config, weights, ExportOptions(dtype=torch.float32, opset=21))
    doubles = {
        o
        for n in model.graph.node
        if n.op_type == "Cast" and n.attribute[0].i == onnx.TensorProto.DOUBLE
        for o in n.output
    }
    assert doubles  # angles are still computed in float64
    for node in model.graph.node:  # results stay float64 up to the next Cast
        if node.op_type != "Cast" and doubles & set(node.input):
            doubles |= set(node.output)
            assert node.op_type in ("Unsqueeze", "Mul", "Concat", "Add", "Sin"), node.op_type


def test_unknown_vae(tiny_bundle: Path) -> None:
    bundle = Bundle(tiny_bundle)
    config = replace(bundle.config, vae=dict(bundle.config.vae) | {"act_fn": "gelu"})
    weights = Weights(bundle.tensors, None, bundle, torch.float32, "")
    with pytest.raises(CheckpointError, match="act_fn must be silu to be exported, got 'gelu'"):
        build_graph("vae_decoder", config, weights, ExportOptions(dtype=torch.float32))


# FLUX.1-dev's own size

FULL_SIZE = """
import json, psutil, sys, time
import onnx, torch
from mogle_rt.start.quick_imports import import_models
import_models()  # as the command line does
import mogle_rt.pipeline, mogle_rt.export.exporter, mogle_rt.export.verify
from benchmarks.peak import peak

before, start = psutil.Process().memory_info().rss, time.perf_counter()
folder = mogle_rt.export.exporter.export(sys.argv[1])
done = {"seconds": time.perf_counter() - start, "bytes": peak() - before}
onnx.checker.check_model(str(folder / "step.onnx"), full_check=True)  # at small sizes all graphs are checked
print(json.dumps(done))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads its memory from /proc")
def test_full_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_sparse_bundle(tmp_path / "flux_dev.safetensors")
    command = [sys.executable, "-c", FULL_SIZE, str(path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    used = json.loads(done.stdout)
    written = sum(p.stat().st_size for p in tmp_path.iterdir() if p != path)
    with capsys.disabled():
        print(
            f"\nFLUX.1-dev to ONNX: {used['seconds']:.1f} s, {used['bytes'] / 1e6:.0f} MB, {written / 1e6:.1f} MB written"
        )
    assert used["bytes"] < 2e9
    assert written < 64e6
    model = onnx.load(tmp_path / "step.onnx", load_external_data=False)
    assert len([n for n in model.graph.node if n.op_type == "Attention"]) == 19 + 38
    assert path.stat().st_size > 23.8e9


@pytest.mark.parametrize(("dtype", "coarsest"), [("bf16", torch.float32), ("fp16", torch.float16)])
def test_tolerance_is_of_what_was_rounded(dtype: str, coarsest: torch.dtype, tiny_files: Files, tmp_path: Path) -> None:
    """The tolerance depends on the weights that were rounded. Those that were copied unchanged are exact."""
    bundle = Bundle(tiny_files.convert(tmp_path / "ckpt.safetensors", dtype="bf16"))
    assert any(info.dtype == torch.uint8 for info in bundle.tensors.values())
    folder = export(bundle.path, tmp_path / "out", weights="copy", dtype=dtype)
    assert _coarsest(bundle, Manifest.read(folder), torch.float32) == coarsest


def test_threads_rest_between_runs(tiny_bundle: Path, tmp_path: Path) -> None:
    """onnxruntime's threads must not spin while they wait, since they would take the processors from PyTorch's."""
    folder = export(tiny_bundle, tmp_path / "out")
    manifest = Manifest.read(folder)
    session = Session(folder, manifest.graphs["step"], torch.device("cpu"), manifest.weights.bytes).session
    assert session.get_session_options().get_session_config_entry("session.force_spinning_stop") == "1"
