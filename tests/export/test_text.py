"""Exported text encoders: transformers' results, their tokens, padding, and what the manifest says of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mogle_rt import CheckpointError, OutputError
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.encoders.text import TextEncoders
from mogle_rt.engines.manifest import Manifest
from mogle_rt.engines.onnxruntime_import import import_onnxruntime
from mogle_rt.export import verify_text
from mogle_rt.export.exporter import GRAPHS, ExportOptions, build_graph, export
from mogle_rt.export.text import TEXT_GRAPHS, distance_buckets
from mogle_rt.export.verify import check
from mogle_rt.export.weights import Weights
from tests.checkpoints import Files, write_checkpoint
from tests.conftest import assert_close

CPU = torch.device("cpu")
PROMPTS = ["a young woman with long blond hair", "an old man, smiling, with a green hat and glasses", ""]


def exported(bundle: Path, folder: Path, **options: Any) -> Path:
    return export(bundle, folder, dtype=options.pop("dtype", "fp32"), text_encoders=True, **options)


def texts(folder: Path, bundle: Path) -> list[Any]:
    """The comparisons of text encoders, all of which passed."""
    results = [r for r in check(folder, bundle) if r.what.startswith("text_encoder")]
    assert results
    assert all(r.passed for r in results), results
    return results


@pytest.mark.parametrize(
    ("stored", "dtype", "options"),
    [
        (torch.float32, "fp32", {}),
        (torch.float32, "fp32", {"opset": 18}),
        (torch.float16, "fp32", {"weights": "copy"}),
        (torch.float16, "fp16", {"weights": "link"}),
        (torch.float16, "fp16", {"weights": "embed", "opset": 19}),
        (torch.bfloat16, "bf16", {}),
    ],
)
def test_encoders_equal_transformers(stored: torch.dtype, dtype: str, options: dict[str, Any], tmp_path: Path) -> None:
    bundle = write_checkpoint(tmp_path / "files", text_encoders=True, dtype=stored).convert(tmp_path / "b.safetensors")
    folder = exported(bundle, tmp_path, dtype=dtype, **options)  # beside the bundle, where the checker reads it
    results = texts(folder, bundle)
    assert [r.what.split(",")[0] for r in results] == ["text_encoder", "text_encoder_2", "text_encoder_2"]
    for name in TEXT_GRAPHS:
        onnx.checker.check_model(str(folder / f"{name}.onnx"), full_check=True)


def changed_files(change: Callable[[Path], None], source: Files, folder: Path) -> Path:
    shutil.copytree(source.folder, folder)
    change(folder / "flux")
    return Files(folder).convert(folder / "b.safetensors")


def older_clip(flux: Path) -> None:
    """The published names, the end token as older configurations have it, and exact GELU."""
    path = flux / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in load_file(path).items()}
    save_file(tensors, path)
    config = json.loads((flux / "text_encoder" / "config.json").read_text())
    (flux / "text_encoder" / "config.json").write_text(json.dumps(config | {"eos_token_id": 2, "hidden_act": "gelu"}))


def older_t5(flux: Path) -> None:
    """T5 before its version 1.1: plain ReLU; and few distances that are told apart."""
    path = flux / "text_encoder_2" / "model.safetensors"
    tensors = {name.replace("wi_0", "wi"): t for name, t in load_file(path).items() if "wi_1" not in name}
    few = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    save_file(tensors | {few: tensors[few][:12].contiguous()}, path)
    config = json.loads((flux / "text_encoder_2" / "config.json").read_text())
    config |= {"feed_forward_proj": "relu", "dense_act_fn": "relu", "is_gated_act": False}
    config |= {"relative_attention_num_buckets": 12, "relative_attention_max_distance": 40}
    (flux / "text_encoder_2" / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("change", [older_clip, older_t5])
def test_other_encoders(change: Callable[[Path], None], tiny_files: Files, tmp_path: Path) -> None:
    bundle = changed_files(change, tiny_files, tmp_path / "files")
    texts(exported(bundle, tmp_path / "out"), bundle)


@pytest.mark.quick
def test_prompts_by_graphs_alone(tiny_bundle: Path, tmp_path: Path) -> None:
    """The tokenizers' own library and onnxruntime give the embeddings that a pipeline makes, padding included."""
    from tokenizers import Tokenizer

    folder = exported(tiny_bundle, tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    prompts = [*PROMPTS, " ".join(["smiling"] * 100)]  # the last is cut by both tokenizers
    got: dict[str, Tensor] = {}
    lengths = []
    for tokenizer in manifest["tokenizers"]:
        graph = manifest["graphs"][tokenizer["graph"]]
        texts = Tokenizer.from_file(str(folder / tokenizer["file"])).encode_batch(prompts)
        ids = torch.tensor([text.ids for text in texts])
        lengths.append(ids.shape[1])
        session = import_onnxruntime().InferenceSession(folder / graph["file"])
        (result,) = session.run(None, {graph["inputs"][0]["name"]: ids.numpy()})
        got[graph["outputs"][0]["name"]] = torch.from_numpy(result)
    encoders = TextEncoders(Bundle(tiny_bundle), CPU, torch.float32)
    assert lengths == [77, 512]
    sequence, pooled = encoders.encode(prompts, lengths[1])
    assert_close(got["prompt_embeds"], sequence, rms=1e-5)
    assert_close(got["pooled_prompt_embeds"], pooled, rms=1e-5)
    short = [len(encoders.tokenizer(text).input_ids) for text in PROMPTS]
    assert max(short) < 77  # so that padding was there to be seen


def test_t5_reads_its_padding(tiny_bundle: Path, tmp_path: Path) -> None:
    """As diffusers' pipeline has it, without an attention mask: another length of padding gives other embeddings."""
    folder = exported(tiny_bundle, tmp_path)
    session = import_onnxruntime().InferenceSession(folder / "text_encoder_2.onnx")
    ids = torch.tensor([[5, 6, 7, 1, 0, 0, 0, 0]])
    long, short = (session.run(None, {"t5_ids": part.numpy()})[0] for part in (ids, ids[:, :5]))
    assert abs(long[:, :4] - short[:, :4]).max() > 1e-3


def test_buckets_are_transformers_own() -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    for count, furthest in ((32, 128), (12, 40), (4, 2), (64, 1000)):
        behind = T5Attention._relative_position_bucket(
            torch.arange(-furthest, 1).flip(0), num_buckets=count, max_distance=furthest
        )
        assert torch.equal(distance_buckets(count, furthest), behind)
    with pytest.raises(CheckpointError, match="relative_attention_max_distance must be more than 8, got 8"):
        distance_buckets(32, 8)


def test_manifest_lists_them(tiny_bundle: Path, tmp_path: Path) -> None:
    plain = Manifest.read(export(tiny_bundle, tmp_path / "plain", dtype="fp32"))
    assert (plain.format_version, set(plain.graphs), plain.tokenizers) == (1, set(GRAPHS), ())
    assert "mogle-rt embed" in "".join(plain.drive)
    folder = exported(tiny_bundle, tmp_path / "full")
    manifest = Manifest.read(folder)
    assert (manifest.format_version, set(manifest.graphs)) == (2, {*TEXT_GRAPHS, *GRAPHS})
    assert [(t.graph, t.file) for t in manifest.tokenizers] == [
        ("text_encoder", "tokenizer.json"),
        ("text_encoder_2", "tokenizer_2.json"),
    ]
    assert any("text_encoder_2(t5_ids) -> " in line for line in manifest.drive)
    manifest.check_files(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: was changed after the export"):
        manifest.check_files(folder)


def test_a_folder_of_the_first_version_is_read(tiny_bundle: Path, tmp_path: Path) -> None:
    """Earlier programs wrote manifests without a list of tokenizers."""
    folder = export(tiny_bundle, tmp_path, dtype="fp32")
    raw = json.loads((folder / "manifest.json").read_text())
    del raw["tokenizers"]
    (folder / "manifest.json").write_text(json.dumps(raw))
    assert Manifest.read(folder).tokenizers == ()
    (folder / "manifest.json").write_text(json.dumps(raw | {"format_version": 3}))
    with pytest.raises(CheckpointError, match="manifest version 3; this version reads 1 to 2"):
        Manifest.read(folder)


def test_they_go_when_they_are_not_exported_again(tiny_bundle: Path, tmp_path: Path) -> None:
    exported(tiny_bundle, tmp_path, weights="copy")
    export(tiny_bundle, tmp_path, dtype="fp32", weights="copy")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {*(f"{graph}.onnx" for graph in GRAPHS), "weights.safetensors", "manifest.json"}


def test_a_tokenizer_of_others_is_kept(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("mine")
    with pytest.raises(OutputError, match=r"tokenizer\.json: exists already, but not from an export"):
        exported(tiny_bundle, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_a_copy_has_them_only_if_they_are_exported(tiny_bundle: Path, tmp_path: Path) -> None:
    full = Bundle(exported(tiny_bundle, tmp_path / "full", weights="copy") / "weights.safetensors")
    assert full.has_text_encoders
    full.verify()
    plain = Bundle(export(tiny_bundle, tmp_path / "plain", dtype="fp32", weights="copy") / "weights.safetensors")
    assert not any(name.startswith(("text_encoder", "tokenizer")) for name in plain.tensors)


def test_no_encoders_to_export(tmp_path: Path) -> None:
    bundle = write_checkpoint(tmp_path / "files").convert(tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"b\.safetensors: holds no text encoders to export"):
        exported(bundle, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_an_activation_that_cannot_be_exported(tiny_bundle: Path) -> None:
    bundle = Bundle(tiny_bundle)
    config = replace(bundle.config, text_encoder={**(bundle.config.text_encoder or {}), "hidden_act": "mish"})
    weights = Weights(bundle.tensors, bundle.path.name, bundle, torch.float32, "")
    with pytest.raises(CheckpointError, match="text_encoder: the activation 'mish' can't be exported"):
        build_graph("text_encoder", config, weights, ExportOptions(dtype=torch.float32, text_encoders=True))


def test_of_a_very_large_t5_one_layer_is_run(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_text, "LARGEST_WHOLE", 0)
    names = [r.what.split(",")[0] for r in texts(exported(tiny_bundle, tmp_path), tiny_bundle)]
    assert names == ["text_encoder", *["text_encoder_2 (layer 0 alone)"] * 2]


@pytest.mark.parametrize("what", ["causal", "end", "distances", "scale"])
def test_planted_faults_are_caught(what: str, tiny_bundle: Path, tmp_path: Path) -> None:
    """The comparison fails when a graph computes something near to the encoder, but not the encoder."""
    folder = exported(tiny_bundle, tmp_path)
    graph = "text_encoder" if what in ("causal", "end") else "text_encoder_2"
    path = folder / f"{graph}.onnx"
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        if what == "causal" and node.op_type == "Trilu":
            node.attribute[0].i = 0
        if what == "end" and node.op_type == "ArgMax":
            node.attribute.append(onnx.helper.make_attribute("select_last_index", 1))
        if what == "distances" and node.op_type == "Greater":
            node.op_type = "Less"
        if what == "scale" and node.op_type == "Gelu":
            node.ClearField("attribute")
            node.attribute.append(onnx.helper.make_attribute("approximate", "none"))
    onnx.save(model, path)
    manifest = Manifest.read(folder)
    bundle = Bundle(tiny_bundle)
    results = verify_text.compare_text(bundle, bundle, folder, manifest, lambda _: 1e-5)
    assert not all(r.passed for r in results)
