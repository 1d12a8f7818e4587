"""The exporter's and the exported engines' errors: one line each that says what was wrong and what would be right."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from mogle_rt import CheckpointError, ConfigError, DeviceError, InputError, OutputError, Pipeline, cli
from mogle_rt.checkpoint import Bundle
from mogle_rt.config import ModelConfig
from mogle_rt.engine_file import EngineHeader, read_engine, write_engine
from mogle_rt.export.__main__ import app
from mogle_rt.export.exporter import export
from mogle_rt.manifest import EngineSpec, Manifest
from mogle_rt.onnx_engine import ExportedGraphs, Session
from mogle_rt.tensorrt_engine import PACKAGES, TensorRTEngine, check_profile
from tests.checkpoints import Files, write_checkpoint
from tests.test_bad_input import assert_one_line
from tests.test_cli import QUICK, Result
from tests.test_cli import run as run_cli


def run(*args: object) -> Result:
    """``python -m mogle_rt.export`` in this process."""
    out, err = io.StringIO(), io.StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with (
            mock.patch.object(sys, "argv", ["mogle_rt.export", *map(str, args)]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as caught,
        ):
            cli.run_app(app)
    finally:
        signal.signal(signal.SIGTERM, handler)
    code = caught.value.code
    return Result(code if isinstance(code, int) else int(bool(code)), out.getvalue(), err.getvalue())


@pytest.fixture
def exported(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A folder with an export in float32 and a copy of the tiny bundle, both to be harmed."""
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


def test_generate_by_onnxruntime(exported: Path) -> None:
    common = (exported / "tiny.safetensors", "-p", "a face", "--seed", 3, *QUICK)
    for engine, file in (("torch", "a.png"), ("onnxruntime", "b.png")):
        done = run_cli("generate", *common, "--engine", engine, "-o", exported / file)
        assert done.code == 0, done.err
    a, b = (np.asarray(Image.open(exported / f)).astype(int) for f in ("a.png", "b.png"))
    assert abs(a - b).max() <= 1


def test_check_finds_a_wrong_graph(exported: Path) -> None:
    """Verification fails loudly where the graphs don't compute what the manifest says."""
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
    "no TensorRT": (("BUNDLE", "--format", "tensorrt"), ("tensorrt is not to be had here", "pypi.nvidia.com")),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_options(what: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if what in ("no target", "target"):
        pytest.importorskip("tensorrt_rtx")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args, words = WRONG[what]
    done = run(*(tiny_bundle if a == "BUNDLE" else a for a in args), *(["-o", "out"] if "BUNDLE" in args else []))
    assert_one_line(done, *words)
    assert list(tmp_path.glob("out/*")) == []


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_missing_package(package: str, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert_one_line(run(tiny_bundle), f"export needs the package {package}", "pip install 'mogle-rt[export]'")


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
    assert_one_line(done, "another file of the bundle's name is there")


def test_other_file_system(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr("mogle_rt.export.weights._clone", lambda *_: False)
    done = run(tiny_bundle, "-o", tmp_path / "out")
    assert_one_line(done, "can't be linked into it (Invalid cross-device link)", "weights copy")
    assert list((tmp_path / "out").iterdir()) == []


def test_copy_onto_the_bundle(exported: Path) -> None:
    bundle = exported / "weights.safetensors"
    (exported / "tiny.safetensors").rename(bundle)
    (exported / "manifest.json").unlink()
    assert_one_line(run(bundle, "--weights", "copy"), "is the bundle itself; choose another folder")
    Bundle(bundle).verify()


# Misuse of an export


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
    """One byte: too little to see on opening, not for --check."""
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
    with pytest.raises(CheckpointError, match=r"names this graph, but it is gone"):
        graphs_of(exported)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff{", "can't be read as a manifest"),
        (b"[]", "not the manifest of a mogle_rt export"),
        (b'{"format": "mogle_rt export", "format_version": 99}', "manifest version 99; this version reads 1"),
        (b'{"format": "mogle_rt export", "format_version": 1}', "damaged manifest: KeyError"),
    ],
)
def test_damaged_manifest(content: bytes, message: str, exported: Path) -> None:
    (exported / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        graphs_of(exported)


def test_another_bundle(exported: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "files", seed=3).convert(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"was exported from another bundle \(tiny.safetensors\) than .*other"):
        Pipeline(other, device="cpu", engine="onnxruntime", engine_path=exported)
    assert_one_line(run(other, "--check", exported), "was exported from another bundle")


def test_other_options(exported: Path) -> None:
    bundle = exported / "tiny.safetensors"

    def pipeline(**options: Any) -> Pipeline:
        return Pipeline(bundle, device="cpu", engine="onnxruntime", **options)

    with pytest.raises(ConfigError, match="was exported with latent_lora = False, asked for is True; export with"):
        pipeline(model_config={"latent_lora": True})
    with pytest.raises(ConfigError, match="was exported in fp32, asked for is float16; export with that --dtype"):
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
    with pytest.raises(DeviceError, match="CPU kernels don't take bf16; export with --dtype fp32"):
        Pipeline(tiny_bundle, device="cpu", engine="onnxruntime", engine_path=folder)


def test_missing_onnxruntime(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DeviceError, match=r"needs the package onnxruntime .*pip install 'mogle-rt\[export\]'"):
        Pipeline(exported / "tiny.safetensors", device="cpu", engine="onnxruntime")


@pytest.mark.skipif(torch.cuda.is_available(), reason="onnxruntime has its GPU here")
def test_silent_fall_back_is_told(exported: Path) -> None:
    """onnxruntime-gpu without a GPU says nothing and takes the CPU; onnxruntime has no such provider at all."""
    graphs = graphs_of(exported)
    with pytest.raises(DeviceError, match=r"fell back from CUDAExecutionProvider to CPU|has no CUDAExecutionProvider"):
        Session(exported, graphs.graph("step"), torch.device("cuda"), 0)


def test_no_device_of_onnxruntime(exported: Path) -> None:
    with pytest.raises(DeviceError, match="runs on cpu or cuda, not on mps"):
        Session(exported, graphs_of(exported).graph("step"), torch.device("mps"), 0)


# Misuse of TensorRT engines; what is in the plan doesn't matter to these

RTX = PACKAGES["tensorrt-rtx"]


def add_engine(folder: Path, **changes: Any) -> Path:
    """An engine file with a proper header and no proper plan, entered into the manifest."""
    manifest = Manifest.read(folder)
    values: dict[str, Any] = {
        "runtime": "tensorrt-rtx",
        "runtime_version": "0.0",
        "target": "8.9",
        "graph": "step",
        "dtype": "fp32",
        "bundle_sha256": manifest.bundle["sha256"],
        "graph_sha256": manifest.graphs["step"].sha256,
        "profile": {"latents": ((1, 4, 64), (1, 4, 64), (2, 16, 64))},
        "plan_bytes": 4,
    }
    header = EngineHeader(**values | changes)
    path = folder / "step.engine"
    write_engine(path, header, memoryview(b"plan"))
    spec = EngineSpec(file=path.name, graph="step", header=header.to_dict())
    replace(manifest, engines=(spec,)).write(folder)
    return path


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
    with pytest.raises(DeviceError, match=r"built for compute capability 8.9, RTX 5090 has 12.0; .*--target 120"):
        TensorRTEngine(graphs_of(exported), torch.device("cuda"), RTX)


def test_engine_of_another_version(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    add_engine(exported)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    with pytest.raises(
        DeviceError, match=rf"built by tensorrt-rtx 0.0, installed is {trt.__version__}; build it again"
    ):
        TensorRTEngine(graphs_of(exported), torch.device("cuda"), RTX)


def test_missing_tensorrt_rtx(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_engine(exported)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(
        DeviceError, match=r"tensorrt-rtx is not to be had here .*pip install 'mogle-rt\[tensorrt-rtx\]'"
    ):
        TensorRTEngine(graphs_of(exported), torch.device("cuda"), RTX)


def test_engine_of_another_graph(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    add_engine(exported, graph_sha256="0" * 64)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    with pytest.raises(CheckpointError, match="was built from another export of the graph; build it again"):
        TensorRTEngine(graphs_of(exported), torch.device("cuda"), RTX)


def test_damaged_engine(exported: Path) -> None:
    path = add_engine(exported)
    whole = path.read_bytes()
    for content, message in (
        (whole[:-1], "cut short"),
        (b"something else", "not an engine file of mogle_rt"),
        (whole[:16] + b"x" + whole[17:], "its header is not JSON"),
        (whole.replace(b'"format_version": 1', b'"format_version": 7'), "of another version; build it again"),
        (whole.replace(b'"target"', b'"garget"'), "damaged engine file"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            read_engine(path)
    path.unlink()
    with pytest.raises(CheckpointError, match="no such engine; build one"):
        read_engine(path)


def test_size_outside_the_profile(exported: Path) -> None:
    header, _ = read_engine(add_engine(exported))
    check_profile(header, {"latents": (2, 9, 64), "step": (1,)})
    with pytest.raises(
        InputError, match=r"latents of shape \[1, 17, 64\] is outside the engine's profile, \[1, 4, 64\] to"
    ):
        check_profile(header, {"latents": (1, 17, 64)})


# Packages


def test_nothing_of_this_is_needed() -> None:
    """Importing the runtime and making a pipeline class needs no extra."""
    code = (
        "import sys\n"
        "for name in ('onnx', 'onnxruntime', 'tensorrt', 'tensorrt_rtx'): sys.modules[name] = None\n"
        "import mogle_rt, mogle_rt.pipeline, mogle_rt.cli\n"
        "print(mogle_rt.Pipeline.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "Pipeline"


def test_exporting_changes_nothing_else(tiny_files: Files, tmp_path: Path) -> None:
    """The bundle keeps its bytes and its time; an -o that can't be made is told."""
    bundle = tiny_files.convert(tmp_path / "b.safetensors")
    before = bundle.stat().st_mtime_ns, bundle.read_bytes()
    export(bundle)
    assert (bundle.stat().st_mtime_ns, bundle.read_bytes()) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="can't be made"):
        export(bundle, tmp_path / "file" / "inner")
