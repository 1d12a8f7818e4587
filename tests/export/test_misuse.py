"""Errors of the exporter and of exported engines: one line each, which says what was wrong and what would be right."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from mogle_rt import CheckpointError, ConfigError, DeviceError, InputError, OutputError, Pipeline
from mogle_rt.apps import program
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.config import ModelConfig
from mogle_rt.engines.engine_file import EngineHeader, read_engine, write_engine
from mogle_rt.engines.exported import ORT_TYPES, ExportedGraphs, Session
from mogle_rt.engines.manifest import EngineSpec, Manifest
from mogle_rt.engines.tensorrt_engine import PACKAGES, Loaded, TensorRTEngine, check_profile
from mogle_rt.export import exporter
from mogle_rt.export.__main__ import app
from mogle_rt.export.exporter import export, tensor_spec
from mogle_rt.export.tensorrt import Profile, Size
from mogle_rt.installed import install_command
from tests.apps.test_cli import QUICK, Result
from tests.apps.test_cli import run as run_cli
from tests.checkpoints import Files, write_checkpoint
from tests.test_bad_input import assert_one_line, unchanged


def run(*args: object) -> Result:
    """Run ``python -m mogle_rt.export`` in this process."""
    out, err = io.StringIO(), io.StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with (
            mock.patch.object(sys, "argv", ["mogle_rt.export", *map(str, args)]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as caught,
        ):
            program.run_app(app)
    finally:
        signal.signal(signal.SIGTERM, handler)
    code = caught.value.code
    return Result(code if isinstance(code, int) else int(bool(code)), out.getvalue(), err.getvalue())


@pytest.fixture
def exported(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A folder with an export in float32 and a copy of the tiny bundle. Tests may damage both."""
    shutil.copy(tiny_bundle, tmp_path / "tiny.safetensors")
    return export(tmp_path / "tiny.safetensors", dtype="fp32")


def bundle_of(folder: Path) -> Bundle:
    return Bundle(folder / "tiny.safetensors")


def graphs_of(folder: Path) -> ExportedGraphs:
    return ExportedGraphs(folder, bundle_of(folder), ModelConfig(), torch.float32)


# What works


def test_command(tiny_bundle: Path, tmp_path: Path) -> None:
    done = run(tiny_bundle, "-o", tmp_path / "out", "--dtype", "fp32")
    assert done.code == 0, done.err
    assert done.out.split() == [str(tmp_path / "out")]
    assert "6 graphs" in done.err
    assert done.err.count(" ok") == 8
    verified = Manifest.read(tmp_path / "out").verified
    assert len(verified) == 8
    assert all(v["passed"] and v["rms"] <= v["tolerance"] for v in verified)
    again = run("--check", tmp_path / "out")
    assert again.code == 0, again.err
    assert again.err.count(" ok") == 8


@pytest.mark.quick
def test_generate_by_onnxruntime(exported: Path) -> None:
    common = (exported / "tiny.safetensors", "-p", "a face", "--seed", 3, *QUICK)
    for engine, file in (("torch", "a.png"), ("onnxruntime", "b.png")):
        done = run_cli("generate", *common, "--engine", engine, "-o", exported / file)
        assert done.code == 0, done.err
    a, b = (np.asarray(Image.open(exported / f)).astype(int) for f in ("a.png", "b.png"))
    assert abs(a - b).max() <= 1


def test_check_finds_a_wrong_graph(exported: Path) -> None:
    """Verification reports graphs that don't compute what the manifest says, and the command fails."""
    manifest = json.loads((exported / "manifest.json").read_text())
    manifest["model_config"]["add_cond_attn"] = True
    (exported / "manifest.json").write_text(json.dumps(manifest))
    done = run("--check", exported)
    assert done.code == 1
    assert done.err.count("FAILED") == 4
    assert "error: 4 of 8 comparisons failed; step, " in done.err.splitlines()[-1]


# Misuse of the command

WRONG: dict[str, tuple[tuple[object, ...], tuple[str, ...]]] = {
    "no bundle": ((), ("name a bundle",)),
    "missing file": (("nothing.safetensors",), ("nothing.safetensors", "no such file")),
    "old opset": (("BUNDLE", "--opset", 17), ("opset must be from 18 to 25, got 17",)),
    "new opset": (("BUNDLE", "--opset", 99), ("opset must be from 18 to 25, got 99",)),
    "format": (("BUNDLE", "--format", "coreml"), ("--format must be of onnx, tensorrt, tensorrt-rtx, got 'coreml'",)),
    "weights": (("BUNDLE", "--weights", "inline"), ("weights must be link, copy or embed, got 'inline'",)),
    "dtype": (("BUNDLE", "--dtype", "int8"), ("dtype must be bf16, fp16 or fp32, got int8",)),
    "size": (("BUNDLE", "--max", "1024"), ("must look like 512x512",)),
    "odd size": (("BUNDLE", "--opt", "500x512"), ("multiples of 16", "500x512")),
    "order": (("BUNDLE", "--min", "1024x1024", "--max", "512x512"), ("--min, --opt and --max must ascend",)),
    "no target": (("BUNDLE", "--format", "tensorrt-rtx"), ("no GPU here", "--target: 75, 80, 86, 89, 120, 121")),
    "target": (("BUNDLE", "--format", "tensorrt-rtx", "--target", "9.0"), ("75, 80, 86, 89, 120, 121", "got '90'")),
    "switch": (("BUNDLE", "--model-config", '{"add_cond": true}'), ("unknown option 'add_cond'", "add_cond_attn")),
    "switches": (("BUNDLE", "--model-config", "[1]"), ("--model-config must be a JSON object",)),
    "no export": (("--check", "."), ("manifest.json", "no such file; export first")),
    "no TensorRT": (("BUNDLE", "--format", "tensorrt"), ("tensorrt can't be loaded here", "pypi.nvidia.com")),
    "bf16 of old": (("BUNDLE", "--dtype", "bf16", "--opset", 21), ("bf16 needs opset 22 or newer, got 21",)),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_options(what: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if what in ("no target", "target"):
        pytest.importorskip("tensorrt_rtx")
    if what == "no TensorRT":
        monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args, words = WRONG[what]
    done = run(*(tiny_bundle if a == "BUNDLE" else a for a in args), *(["-o", "out"] if "BUNDLE" in args else []))
    assert_one_line(done, *words)
    assert list(tmp_path.glob("out/*")) == []


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_missing_package(package: str, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert_one_line(run(tiny_bundle), f"export needs the package {package}", install_command("export"))


def test_file_as_folder(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_one_line(run(tiny_bundle, "-o", tmp_path / "file"), "is a file, not a folder")


def test_folder_of_another_export(exported: Path, tmp_path: Path) -> None:
    other = shutil.copy(exported / "tiny.safetensors", exported / "other.safetensors")
    assert_one_line(run(other), "holds the export of tiny.safetensors; choose another folder with -o")


def test_folder_of_another_bundle_of_that_name(exported: Path, tmp_path: Path) -> None:
    (exported / "away").mkdir()
    (exported / "away" / "tiny.safetensors").write_bytes(b"something else")
    done = run(exported / "tiny.safetensors", "-o", exported / "away")
    assert_one_line(done, "is another file with the bundle's name")


def test_other_file_system(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr("mogle_rt.export.weights._clone", lambda *_: False)
    done = run(tiny_bundle, "-o", tmp_path / "out")
    assert_one_line(done, "can't be linked into it (Invalid cross-device link)", "weights copy")
    assert list((tmp_path / "out").iterdir()) == []


def test_copy_onto_the_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    """The bundle may have that name from the start, or be the copy that an earlier export made."""
    bundle = tmp_path / "weights.safetensors"
    shutil.copy(tiny_bundle, bundle)
    assert_one_line(run(bundle, "--weights", "copy"), "weights.safetensors: exists already, but not from an export")
    assert run(bundle, "--weights", "copy", "--no-verify", "-o", tmp_path / "out").code == 0
    copied = tmp_path / "out" / "weights.safetensors"
    assert_one_line(run(copied, "--weights", "copy"), "is the bundle itself; choose another folder")
    Bundle(bundle).verify()
    Bundle(copied).verify()


def test_a_bundle_of_the_copy_s_name_stays(tiny_bundle: Path, tmp_path: Path) -> None:
    """First a copy of the name is made, then this copy is exported with links. The graphs point into the file again."""
    (tmp_path / "source").mkdir()
    bundle, folder = tmp_path / "source" / "weights.safetensors", tmp_path / "out"
    shutil.copy(tiny_bundle, bundle)
    for options in ((bundle, "-o", folder, "--weights", "copy"), (folder / bundle.name, "--weights", "link")):
        assert run(*options, "--no-verify").code == 0
        Manifest.read(folder).check_files(folder)
    Bundle(folder / bundle.name).verify()


@pytest.mark.parametrize("name", ["weights.safetensors", "step.onnx"])
def test_files_of_others_are_kept(name: str, tiny_bundle: Path, tmp_path: Path) -> None:
    """An export replaces the files of an earlier export, but nobody else's."""
    (tmp_path / name).write_text("precious")
    done = run(tiny_bundle, "-o", tmp_path, "--weights", "copy", "--no-verify")
    assert_one_line(done, f"{name}: exists already, but not from an export; choose another folder with -o")
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "precious"
    (tmp_path / name).unlink()
    for _ in range(2):
        assert run(tiny_bundle, "-o", tmp_path, "--weights", "copy", "--no-verify").code == 0


@pytest.mark.parametrize(
    ("before", "then"),
    [
        ((), ("--opset", "21")),
        (("--weights", "copy"), ("--weights", "copy", "--dtype", "fp16")),
        (("--weights", "embed"), ("--weights", "copy")),
    ],
    ids=["graphs", "copies", "other weights"],
)
def test_a_failed_export_leaves_the_one_before(
    before: tuple[str, ...],
    then: tuple[str, ...],
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An export replaces all graphs and their weights, or nothing."""
    assert run(tiny_bundle, "-o", tmp_path, "--no-verify", *before).code == 0
    build = exporter.build_graph

    def failing(name: str, *args: Any, **options: Any) -> Any:
        if name == "step":
            raise OutputError("no more")
        return build(name, *args, **options)

    monkeypatch.setattr(exporter, "build_graph", failing)
    with unchanged(tmp_path):
        assert_one_line(run(tiny_bundle, "-o", tmp_path, "--no-verify", *then), "no more")
    Manifest.read(tmp_path).check_files(tmp_path)


@pytest.mark.parametrize("number", range(8))  # weights, six graphs, manifest
def test_a_full_disk_leaves_the_export_before(
    number: int, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any one of the files can't be written to its end."""
    assert run(tiny_bundle, "-o", tmp_path, "--no-verify", "--weights", "copy").code == 0
    fsync, calls = os.fsync, iter(range(100))

    def full(file: int) -> None:
        if next(calls) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    with unchanged(tmp_path):
        done = run(tiny_bundle, "-o", tmp_path, "--no-verify", "--weights", "copy", "--dtype", "fp16")
        name = "weights.safetensors" if number == 0 else "manifest.json" if number == 7 else ".onnx"
        assert_one_line(done, f"{name}: can't be written: No space left on device", str(tmp_path))
        assert ".part" not in done.err
    Manifest.read(tmp_path).check_files(tmp_path)


def test_a_copy_goes_when_no_graph_needs_it(tiny_bundle: Path, tmp_path: Path) -> None:
    """It is removed, so that the next export may write one again."""
    for weights in ("copy", "embed", "copy", "link", "copy"):
        assert run(tiny_bundle, "-o", tmp_path, "--no-verify", "--weights", weights).code == 0
        assert (tmp_path / "weights.safetensors").exists() == (weights == "copy")
        Manifest.read(tmp_path).check_files(tmp_path)


@pytest.mark.parametrize("weights", ["copy", "embed"])
def test_weights_that_a_dtype_cannot_hold(weights: str, tiny_files: Files, tmp_path: Path) -> None:
    files = Files(tmp_path / "sources")
    shutil.copytree(tiny_files.folder, files.folder)
    mogle = torch.load(files.mogle, weights_only=True)
    name = next(n for n, t in mogle.items() if t.ndim == 2)
    mogle[name][0, 0] = 1e6
    torch.save(mogle, files.mogle)
    bundle = files.convert(tmp_path / "large.safetensors")
    done = run(bundle, "-o", tmp_path / "out", "--dtype", "fp16", "--weights", weights, "--no-verify")
    assert_one_line(done, f"tensor 'mogle.{name}' holds NaN or infinite values once in torch.float16")
    assert not list((tmp_path / "out").iterdir())


def test_own_bundle_of_the_package(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter writes nothing into the package, and an engine doesn't look for the export in the working directory."""
    package = tmp_path / "package"
    package.mkdir()
    monkeypatch.setattr("mogle_rt.bundle.shipped.BUNDLE", Path(shutil.copy(exported / "tiny.safetensors", package)))
    monkeypatch.chdir(exported)
    assert_one_line(run("demo"), "tiny.safetensors: lies in the package; name a folder with -o")
    with pytest.raises(ConfigError, match="lies in the package; name the folder of its export with engine_path"):
        Pipeline("demo", device="cpu", engine="onnxruntime")
    assert run("demo", "-o", tmp_path / "out", "--no-verify").code == 0
    assert Pipeline("demo", device="cpu", engine="onnxruntime", engine_path=tmp_path / "out").dtype == torch.float32
    assert [p.name for p in package.iterdir()] == ["tiny.safetensors"]


def test_sizes_of_a_small_model(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default the profile includes the model's own size."""
    pytest.importorskip("tensorrt_rtx")
    seen = []

    def build(*args: Any, profile: Profile, **_: Any) -> Manifest:
        seen.append(profile)
        raise OutputError("enough")

    monkeypatch.setattr(Bundle, "default_size", 128)
    monkeypatch.setattr("mogle_rt.export.tensorrt.build_engine", build)
    run(tiny_bundle, "-o", tmp_path, "--no-verify", "--format", "tensorrt-rtx", "--target", "89")
    assert (seen[0].smallest, seen[0].usual, seen[0].largest) == (Size(128, 128), Size(128, 128), Size(1024, 1024, 4))


# Misuse of an export


def test_missing_bundle(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors: no such file$"):
        Pipeline(tmp_path / "nothing.safetensors", device="cpu", engine="onnxruntime")


def test_kernels_are_the_torch_engine_s(exported: Path) -> None:
    with pytest.raises(ConfigError, match="engine onnxruntime takes no kernels, got 'triton'; leave it out, or use"):
        Pipeline(exported / "tiny.safetensors", device="cpu", engine="onnxruntime", kernels="triton")


def test_bundle_moved_away(exported: Path, tiny_bundle: Path) -> None:
    (exported / "tiny.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"the graphs' weights are gone; put tiny.safetensors beside the graphs"):
        Pipeline(tiny_bundle, device="cpu", engine="onnxruntime", engine_path=exported)
    assert_one_line(run("--check", exported), "weights are gone")


def test_other_weights_of_that_name(exported: Path, tiny_bundle: Path) -> None:
    files = write_checkpoint(exported / "files", seed=3)
    files.convert(exported / "tiny.safetensors")
    with pytest.raises(CheckpointError, match="is not the file that the graphs point into"):
        Pipeline(tiny_bundle, device="cpu", engine="onnxruntime", engine_path=exported)


def test_tampered_weights(exported: Path) -> None:
    """One byte is changed, which opening can't notice, but --check does."""
    info = bundle_of(exported).tensors["transformer.proj_out.weight"]
    with (exported / "tiny.safetensors").open("r+b") as file:
        file.seek(info.begin + 2)
        file.write(b"\x55")
    assert_one_line(run("--check", exported), "its contents were changed: the hash in the header is another")


def test_tampered_graph(exported: Path) -> None:
    path = exported / "step.onnx"
    path.write_bytes(path.read_bytes() + b"\x00")
    with pytest.raises(CheckpointError, match=r"step\.onnx: was changed after the export"):
        graphs_of(exported)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"names this file, but it is gone"):
        graphs_of(exported)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff{", "can't be read as a manifest"),
        (b"[]", "not the manifest of a mogle_rt export"),
        (b'{"format": "mogle_rt export", "format_version": 99}', "manifest version 99; this version reads 1"),
        (b'{"format": "mogle_rt export", "format_version": 1}', "damaged manifest: manifest has no entry 'software'"),
    ],
)
def test_damaged_manifest(content: bytes, message: str, exported: Path) -> None:
    (exported / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        graphs_of(exported)


def changed(folder: Path, *way: str | int, to: object) -> None:
    """Write a value into the manifest, at the place to which these names and numbers lead."""
    raw = json.loads((folder / "manifest.json").read_text())
    place = raw
    for step in way[:-1]:
        place = place[step]
    place[way[-1]] = to
    (folder / "manifest.json").write_text(json.dumps(raw))


LIES: dict[str, tuple[tuple[str | int, ...], object, str]] = {
    "a number for a text": (("graphs", "step", "file"), 5, "manifest.graphs.step.file must be a text, got 5"),
    "null for a number": (("weights", "bytes"), None, "manifest.weights.bytes must be a whole number, got None"),
    "negative": (("weights", "bytes"), -1, "manifest.weights.bytes must be from 0 to .*, got -1"),
    "huge": (("opset",), 10**400, "manifest.opset must be from 1 to 100, got a number of more than 80 digits"),
    "a list for an object": (("graphs",), [], "manifest.graphs must be an object"),
    "another dtype": (("dtype",), "int4", "manifest.dtype must be one of fp32, fp16, bf16, got 'int4'"),
    "an absolute path": (("weights", "file"), "/etc/passwd", "must be the name of a file in the same folder"),
    "a path out": (("graphs", "step", "file"), "../step.onnx", "must be the name of a file in the same folder"),
    "a path on Windows": (("graphs", "step", "file"), "C:\\step.onnx", "must be the name of a file in the same folder"),
    "no hash": (("graphs", "step", "sha256"), "0" * 63, "must be a SHA-256"),
    "an unknown axis": (("graphs", "step", "inputs", 0, "shape", 0), "rows", "shape.0. must be a whole number"),
    "another switch": (("model_config", "union_cond_attn"), 1, "union_cond_attn must be true or false"),
    "an unknown entry": (("weights", "url"), "x", "manifest.weights has the unknown entry 'url'"),
    "another input": (("graphs", "step", "inputs", 0, "name"), "__class__", "no input '__class__'"),
    "an input twice": (("graphs", "step", "inputs", 0, "name"), "bank", "no input 'bank'"),
    "another size": (("graphs", "experts", "outputs", 0, "shape", 3), 2**30, r"no output 'bank' of FLOAT and shape"),
    "another type": (("graphs", "experts", "outputs", 0, "dtype"), "INT64", "no output 'bank' of INT64"),
    "no outputs": (("graphs", "step", "outputs"), [], "graph 'step' lacks the output 'velocity'"),
    "an unknown graph": (("graphs", "x\x1b[31m"), {"file": "step.onnx"}, "manifest.graphs.'x.*x1b.31m' has no entry"),
    "an escape in a text": (("dtype",), "\x1b]0;owned\x07\n", r"got '\\x1b\]0;owned\\x07\\n'"),
    "a long text": (("dtype",), "x" * 10**6, "got 'x{70,80}…$"),
    "an engine": (("engines",), [{"file": "a", "graph": "step", "header": {}}], "header has no entry 'runtime'"),
}


@pytest.mark.parametrize("name", LIES)
def test_lies_in_the_manifest(name: str, exported: Path) -> None:
    """Each lie gives an error of one line, and nothing is allocated or opened for it."""
    way, value, message = LIES[name]
    changed(exported, *way, to=value)
    with pytest.raises(CheckpointError, match=message) as caught:
        graphs_of(exported)
    assert str(caught.value).isprintable()


def test_a_link_out_of_the_folder(exported: Path, tmp_path: Path) -> None:
    """A graph that is a link to a file in another folder is refused, as it is by all other loaders."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (exported / "step.onnx").rename(elsewhere / "step.onnx")
    (exported / "step.onnx").symlink_to(elsewhere / "step.onnx")
    with pytest.raises(CheckpointError, match=r"step\.onnx: is a link to another folder"):
        graphs_of(exported)


def test_a_graph_that_the_manifest_does_not_describe(exported: Path) -> None:
    """Its hash is in the manifest, but its inputs have other names. The error comes on opening, before it is run."""
    model = onnx.load(exported / "step.onnx", load_external_data=False)
    for node in model.graph.node:
        for i, used in enumerate(node.input):
            node.input[i] = "time_tables" if used == "time_table" else used
    next(v for v in model.graph.input if v.name == "time_table").name = "time_tables"
    (exported / "step.onnx").write_bytes(model.SerializeToString())
    changed(exported, "graphs", "step", "sha256", to=hashlib.sha256(model.SerializeToString()).hexdigest())
    exports = graphs_of(exported)
    with pytest.raises(CheckpointError, match=r"is not the graph that the manifest describes: 'time_tables' of tensor"):
        Session(exported, exports.graph("step"), torch.device("cpu"), 0)


def test_another_bundle(exported: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "files", seed=3).convert(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"was exported from another bundle \(tiny.safetensors\) than .*other"):
        Pipeline(other, device="cpu", engine="onnxruntime", engine_path=exported)
    assert_one_line(run(other, "--check", exported), "was exported from another bundle")


def test_other_options(exported: Path) -> None:
    bundle = exported / "tiny.safetensors"

    def pipeline(**options: Any) -> Pipeline:
        return Pipeline(bundle, device="cpu", engine="onnxruntime", **options)

    with pytest.raises(ConfigError, match="was exported with latent_lora = False, but True is asked for; export with"):
        pipeline(model_config={"latent_lora": True})
    with pytest.raises(ConfigError, match="was exported in fp32, but float16 is asked for; export with that --dtype"):
        pipeline(dtype="fp16")


def test_unknown_engine(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="engine must be one of torch, onnxruntime, tensorrt, tensorrt-rtx, got 'tvm'"
    ):
        Pipeline(tiny_bundle, engine="tvm")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="engine torch takes no engine_path"):
        Pipeline(tiny_bundle, engine_path=tmp_path)
    with pytest.raises(CheckpointError, match="no such file; export first"):
        Pipeline(tiny_bundle, engine="onnxruntime", engine_path=tmp_path)
    done = run_cli("generate", tiny_bundle, "-o", tmp_path / "a.png", *QUICK, "--engine", "tvm")
    assert_one_line(done, "engine must be one of")


def test_bfloat16_on_a_cpu(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = export(tiny_bundle, tmp_path, dtype="bf16")
    with pytest.raises(DeviceError, match="CPU kernels don't support bf16; export with --dtype fp32"):
        Pipeline(tiny_bundle, device="cpu", engine="onnxruntime", engine_path=folder)


def test_missing_onnxruntime(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DeviceError, match=r"needs the package onnxruntime .*" + re.escape(install_command("export"))):
        Pipeline(exported / "tiny.safetensors", device="cpu", engine="onnxruntime")


@pytest.mark.skipif(torch.cuda.is_available(), reason="onnxruntime has its GPU here")
def test_silent_fall_back_is_an_error(exported: Path) -> None:
    """Without a GPU, onnxruntime-gpu takes the CPU and doesn't say so, and plain onnxruntime has no CUDA provider."""
    graphs = graphs_of(exported)
    with pytest.raises(DeviceError, match=r"fell back from CUDAExecutionProvider to CPU|has no CUDAExecutionProvider"):
        Session(exported, graphs.graph("step"), torch.device("cuda"), 0)


def test_no_device_of_onnxruntime(exported: Path) -> None:
    with pytest.raises(DeviceError, match="runs on cpu or cuda, not on mps"):
        Session(exported, graphs_of(exported).graph("step"), torch.device("mps"), 0)


def described(values: Any) -> list[Any]:
    """Inputs or outputs of a graph, in the form in which onnxruntime gives them."""
    found = []
    for spec in map(tensor_spec, values):
        found.append(SimpleNamespace(name=spec.name, type=ORT_TYPES[spec.dtype], shape=list(spec.shape)))
    return found


class FakeRuntime:
    """Stands for an onnxruntime that says that it has CUDA.

    Args:
        providers: those that a session gets.
        failure: if given, opening a file raises it.
        on_cpu: operators that a session runs on the CPU.
    """

    def __init__(self, providers: list[str], failure: Exception | None = None, on_cpu: tuple[str, ...] = ()) -> None:
        self.providers, self.failure, self.on_cpu = providers, failure, on_cpu
        self.asked: list[Any] = []
        self.entries: dict[str, str] = {}

    def get_available_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def set_default_logger_severity(self, severity: int) -> None:
        self.severity = severity

    def SessionOptions(self) -> Any:  # noqa: N802
        return SimpleNamespace(add_session_config_entry=self.entries.__setitem__)

    def InferenceSession(self, model: Any, _: Any = None, *, providers: list[Any], enable_fallback: int) -> Any:  # noqa: N802
        assert enable_fallback == 0
        self.asked.append(providers)
        if self.failure is not None and isinstance(model, str):
            raise self.failure
        nodes = [SimpleNamespace(name=f"block/{op}", op_type=op) for op in self.on_cpu]
        part = SimpleNamespace(ep_name="CPUExecutionProvider", get_nodes=lambda: nodes)
        graph = onnx.load(model, load_external_data=False).graph if isinstance(model, str) else onnx.GraphProto()
        return SimpleNamespace(
            get_providers=lambda: self.providers,
            get_provider_graph_assignment_info=lambda: [part],
            get_inputs=lambda: described(graph.input),
            get_outputs=lambda: described(graph.output),
        )


CUDA = ["CUDAExecutionProvider", "CPUExecutionProvider"]


def open_on_cuda(runtime: FakeRuntime, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    Session(folder, graphs_of(folder).graph("step"), torch.device("cuda", 1), 0)


def test_cuda_as_it_is_asked_for(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session has one provider, on the right GPU and without TF32. Shapes may be computed on the CPU."""
    runtime = FakeRuntime(CUDA, on_cpu=("Shape", "Concat"))
    open_on_cuda(runtime, exported, monkeypatch)
    assert runtime.asked == 2 * [[("CUDAExecutionProvider", {"device_id": "1", "use_tf32": "0"})]]
    assert runtime.entries["session.record_ep_graph_assignment_info"] == "1"
    assert runtime.severity == 2


def test_fall_back_is_an_error_before_the_graph_is_read(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = FakeRuntime(["CPUExecutionProvider"])
    with pytest.raises(DeviceError, match="fell back from CUDAExecutionProvider to CPUExecutionProvider on cuda:1: "):
        open_on_cuda(runtime, exported, monkeypatch)
    assert len(runtime.asked) == 1


def test_heavy_nodes_on_the_cpu_are_an_error(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = FakeRuntime(CUDA, on_cpu=("Shape", "Attention", "Gelu"))
    with pytest.raises(
        DeviceError, match=r"lacks block/Attention \(Attention\), block/Gelu \(Gelu\), which would run on the CPU"
    ):
        open_on_cuda(runtime, exported, monkeypatch)


class RuntimeException(Exception):  # noqa: N818
    """Named as onnxruntime's own."""


class InvalidGraph(Exception):  # noqa: N818
    """Named as onnxruntime's own."""


def test_whose_fault_a_failure_is(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory runs out, the error doesn't blame the graph."""
    with pytest.raises(DeviceError, match=r"step\.onnx: onnxruntime can't load it on cuda:1: .*Failed to allocate"):
        open_on_cuda(FakeRuntime(CUDA, RuntimeException("6 : BFCArena: Failed to allocate")), exported, monkeypatch)
    with pytest.raises(CheckpointError, match=r"step\.onnx: onnxruntime refuses it: 10 : node of unknown kind"):
        open_on_cuda(FakeRuntime(CUDA, InvalidGraph("10 : node of unknown kind")), exported, monkeypatch)


# Misuse of TensorRT engines, for which the contents of the plan don't matter

RTX = PACKAGES["tensorrt-rtx"]


def add_engine(folder: Path, **changes: Any) -> Path:
    """Write an engine file with a right header but without a real plan, and enter it into the manifest."""
    manifest = Manifest.read(folder)
    values: dict[str, Any] = {
        "runtime": "tensorrt-rtx",
        "runtime_version": "0.0",
        "target": "8.9",
        "graph": "step",
        "dtype": "fp32",
        "bundle_sha256": manifest.bundle.sha256,
        "graph_sha256": manifest.graphs["step"].sha256,
        "profile": {"latents": ((1, 4, 64), (1, 4, 64), (2, 16, 64))},
        "plan_bytes": 4,
    }
    header = EngineHeader(**values | changes)
    path = folder / "step.engine"
    write_engine(path, header, memoryview(b"plan"))
    spec = EngineSpec(file=path.name, graph="step", header=header)
    replace(manifest, engines=(spec,)).write(folder)
    return path


def test_engines_outlive_an_export(exported: Path) -> None:
    """Engines are kept as long as they fit the new export: it must have the same graph and the same weights."""
    bundle, file = exported / "tiny.safetensors", add_engine(exported).name
    export(bundle, dtype="fp32", weights="link")
    assert [e.file for e in Manifest.read(exported).engines] == [file]
    export(bundle, dtype="fp16")
    assert Manifest.read(exported).engines == ()
    add_engine(exported, bundle_sha256="0" * 64)
    export(bundle, dtype="fp16")
    assert Manifest.read(exported).engines == ()
    add_engine(exported).unlink()
    export(bundle, dtype="fp16")
    assert Manifest.read(exported).engines == ()


@pytest.mark.quick
@pytest.mark.parametrize("fault", ["stale", "damaged", "another GPU's, gone"])
def test_one_engine_does_not_block_another(fault: str, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine of step_scaled has a fault. That of step runs, and the error comes where the other one is needed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", SimpleNamespace(__version__="0.0"))
    monkeypatch.setattr("mogle_rt.engines.tensorrt_engine.load_onnxruntime", lambda *_: None)
    unfit = add_engine(exported, graph="step_scaled", target="12.0" if "GPU" in fault else "8.9")
    unfit = unfit.rename(exported / "unfit.engine")
    (spec,) = Manifest.read(exported).engines
    if fault == "damaged":
        unfit.write_bytes(b"")
    elif fault != "stale":  # it names step's hash
        unfit.unlink()
    add_engine(exported)
    manifest = Manifest.read(exported)
    replace(manifest, engines=(replace(spec, file=unfit.name, graph="step_scaled"), *manifest.engines)).write(exported)
    engine = TensorRTEngine(graphs_of(exported), torch.device("cuda"), RTX)
    assert engine.header("step").graph == "step"
    told = {
        "stale": "built from another export of the graph; build it again",
        "damaged": "unfit.engine: not an engine file",
        "another GPU's, gone": "holds no tensorrt-rtx engine of graph 'step_scaled'",
    }
    with pytest.raises(CheckpointError, match=told[fault]):
        engine.header("step_scaled")


def test_engine_header_comes_back(exported: Path) -> None:
    path = add_engine(exported)
    header, begin = read_engine(path)
    assert header.target == "8.9"
    assert header.profile["latents"][2] == (2, 16, 64)
    assert path.read_bytes()[begin:] == b"plan"


def test_no_engine(exported: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no tensorrt-rtx engine; build one: python -m mogle_rt.export"):
        Pipeline(exported / "tiny.safetensors", device="cpu", engine="tensorrt-rtx")


def test_engine_on_a_cpu(exported: Path) -> None:
    add_engine(exported)
    with pytest.raises(
        DeviceError, match=r"runs on a CUDA GPU of compute capability 8.9, not on cpu; use engine torch"
    ):
        Pipeline(exported / "tiny.safetensors", device="cpu", engine="tensorrt-rtx")


def test_engine_for_another_gpu(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_engine(exported)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (12, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "RTX 5090")
    with pytest.raises(DeviceError, match=r"built for compute capability 8.9, but RTX 5090 has 12.0; .*--target 120"):
        TensorRTEngine(graphs_of(exported), torch.device("cuda"), RTX)


def test_engine_of_another_version(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    add_engine(exported)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    with pytest.raises(
        DeviceError, match=rf"built by tensorrt-rtx 0.0, but {trt.__version__} is installed; build it again"
    ):
        TensorRTEngine(graphs_of(exported), torch.device("cuda"), RTX)


def test_missing_tensorrt_rtx(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_engine(exported)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(DeviceError, match=r"can't be loaded here .*" + re.escape(install_command("tensorrt-rtx"))):
        TensorRTEngine(graphs_of(exported), torch.device("cuda"), RTX)


def test_engine_of_another_graph(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    add_engine(exported, graph_sha256="0" * 64)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    with pytest.raises(CheckpointError, match="was built from another export of the graph; build it again"):
        TensorRTEngine(graphs_of(exported), torch.device("cuda"), RTX)


def test_tensorrt_says_no(exported: Path) -> None:
    """A missing context and a refused shape, address or launch give an error each. Inputs that the engine doesn't have
    are not bound."""
    context = mock.Mock()
    context.set_tensor_address.side_effect = lambda name, _: name != "latents"
    engine = SimpleNamespace(
        get_tensor_mode=lambda name: "none" if name == "unused" else "in", create_execution_context=lambda: None
    )
    trt = mock.Mock(TensorIOMode=SimpleNamespace(INPUT="in"))
    trt.Runtime.return_value.deserialize_cuda_engine.return_value = engine
    package = mock.Mock(load=lambda: trt)
    path = add_engine(exported)
    with pytest.raises(DeviceError, match="can't run the engine: too little memory"):
        Loaded.read("step", path, read_engine(path)[0], package)
    engine.create_execution_context = lambda: context
    loaded = Loaded.read("step", path, read_engine(path)[0], package)
    x = torch.zeros(1)
    loaded.bind({"unused": x, "text": x}, {"velocity": x})
    assert [call.args[0] for call in context.set_tensor_address.call_args_list] == ["text", "velocity"]
    with pytest.raises(DeviceError, match="TensorRT refuses the memory of latents"):
        loaded.bind({"latents": x}, {})
    context.set_input_shape.return_value = False
    with pytest.raises(DeviceError, match=r"TensorRT refuses text of shape \[1\]"):
        loaded.bind({"text": x}, {})
    context.execute_async_v3.return_value = False
    with pytest.raises(DeviceError, match="TensorRT failed to run the step"):
        loaded.run(0)


def test_damaged_engine(exported: Path) -> None:
    path = add_engine(exported)
    whole = path.read_bytes()
    for content, message in (
        (whole[:-1], "cut short"),
        (b"something else", "not an engine file of mogle_rt"),
        (whole[:16] + b"x" + whole[17:], "its header is not JSON"),
        (whole.replace(b'"format_version": 1', b'"format_version": 7'), "of another version; build it again"),
        (whole.replace(b'"target"', b'"garget"'), "damaged engine file"),
        (
            whole.replace(b'"plan_bytes": 4,', b'"plan_bytes":"",'),
            r"damaged .*: header\.plan_bytes must be a whole number",
        ),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            read_engine(path)
    path.unlink()
    with pytest.raises(CheckpointError, match="no such engine; build one"):
        read_engine(path)


def test_size_outside_the_profile(exported: Path) -> None:
    """The advice names what helps: --min and --max widen sizes and batches, but not the number of steps or text tokens."""
    header, _ = read_engine(
        add_engine(
            exported,
            profile={
                "latents": ((1, 4, 64), (1, 4, 64), (2, 16, 64)),
                "time_table": ((1, 64), (28, 64), (100, 64)),
                "text": ((1, 1, 32), (1, 24, 32), (2, 512, 32)),
            },
        )
    )
    graph = graphs_of(exported).graph("step")
    fitting = {"batch": 2, "tokens": 9, "text_tokens": 512, "steps": 100, "sequence": 530}
    check_profile(header, graph, fitting)
    for change, message in (
        ({"tokens": 17}, r"latents of shape \[2, 17, 64\] is outside the engine's profile, \[1, 4, 64\] to .*--max$"),
        ({"steps": 101}, "^101 steps, but the engine takes at most 100 steps$"),
        ({"text_tokens": 513}, "^513 text tokens, but the engine takes at most 512 text tokens$"),
    ):
        with pytest.raises(InputError, match=message):
            check_profile(header, graph, fitting | change)


# Packages


def test_help() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mogle_rt.export", "--help"], capture_output=True, text=True, check=True
    )
    assert "Export a bundle to ONNX and TensorRT" in done.stdout


def test_exporting_changes_nothing_else(tiny_files: Files, tmp_path: Path) -> None:
    """The bundle keeps its bytes and its time of change. An output folder that can't be made is an error."""
    bundle = tiny_files.convert(tmp_path / "b.safetensors")
    before = bundle.stat().st_mtime_ns, bundle.read_bytes()
    export(bundle)
    assert (bundle.stat().st_mtime_ns, bundle.read_bytes()) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="can't be made"):
        export(bundle, tmp_path / "file" / "inner")
