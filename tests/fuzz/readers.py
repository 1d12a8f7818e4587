"""All code that reads other people's files, each as a function that spoils such a file and then reads it."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from mogle_rt import Pipeline
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.config import ModelConfig
from mogle_rt.conversion.convert import gather
from mogle_rt.conversion.lora import read_adapter
from mogle_rt.conversion.mogle_file import read_mogle
from mogle_rt.conversion.single_file import read_transformer
from mogle_rt.conversion.writing.quantize import quantize
from mogle_rt.encoders.tokenizers import load_tokenizer, without_panic
from mogle_rt.engines.engine_file import EngineHeader, read_engine, write_engine
from mogle_rt.engines.exported import ExportedGraphs
from mogle_rt.export.exporter import export
from mogle_rt.jobs.captions import _entries, prompts_of
from mogle_rt.jobs.embeddings import EmbeddedPrompts, write_embeddings
from mogle_rt.jobs.plan import Drawing
from mogle_rt.jobs.record import NAME, JobRecord
from mogle_rt.masks import colorize, to_image, to_labels
from mogle_rt.model.loading import load_transformer
from tests.checkpoints import TINY, Files
from tests.fuzz.job_readers import job_readers
from tests.fuzz.mutators import as_json, bytes_spoiled, hostile_value, safetensors_spoiled, spoiled
from tests.fuzz.tokenizer_parts import tokenizer_parts

Attempt = Callable[[random.Random], object]
PROMPTS = ("", "a young woman with red hair", "ａ①ﬁ ﷺ 中文 \u200b é" + "ü" * 40)


def readers(files: Files, bundle: Path, folder: Path) -> dict[str, Attempt]:
    """Readers by their names.

    Args:
        files, bundle: a tiny checkpoint and its bundle. They are not changed.
        folder: where spoiled files are written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    exported = folder / "exported"
    exported.mkdir()
    export(bundle, exported, dtype="fp32", weights="copy")
    with_text = folder / "exported with text"
    with_text.mkdir()
    export(bundle, with_text, dtype="fp32", weights="link", text_encoders=True)
    return job_readers(bundle, folder) | {
        "bundle": functools.partial(_bundle, bundle.read_bytes(), folder / "bundle.safetensors"),
        "quantised bundle": functools.partial(_quantised, _few_bits(bundle, folder), folder / "small.safetensors"),
        "embeddings": functools.partial(_embeddings, _embeddings_file(folder), folder / "spoiled.safetensors"),
        "bundle, run": functools.partial(_bundle_run, bundle.read_bytes(), folder / "run.safetensors"),
        "tokenizer": functools.partial(_tokenizer, {p: Bundle(bundle).files(p) for p in ("tokenizer", "tokenizer_2")}),
        "parts of a tokenizer": functools.partial(
            tokenizer_parts, {p: Bundle(bundle).files(p) for p in ("tokenizer", "tokenizer_2")}
        ),
        "LoRA": functools.partial(_lora, files.lora.read_bytes(), folder / "lora"),
        "MoGLE": functools.partial(_mogle, files.mogle.read_bytes(), folder),
        "FLUX folder": functools.partial(_flux, files, folder / "flux"),
        "transformer in one file": functools.partial(
            _transformer, _single_file(files, folder), folder / "one.safetensors"
        ),
        "GGUF": functools.partial(_gguf, _gguf_file(files, folder), folder / "one.gguf"),
        "mask": functools.partial(_mask, list(_pictures()), folder),
        "prompts": functools.partial(_prompts, folder / "prompts"),
        "job record": functools.partial(_record, folder / "record"),
        "manifest": functools.partial(_manifest, exported, bundle, folder / "manifest"),
        "manifest with text encoders": functools.partial(_manifest, with_text, bundle, folder / "text manifest"),
        "graph": functools.partial(_graph, exported, bundle, folder / "graph"),
        "engine": functools.partial(_engine, _engine_file(folder), folder / "spoiled.engine"),
    }


def _config_spoiled(r: random.Random, header: Any) -> None:
    metadata = header["__metadata__"]
    if r.random() < 0.1:
        metadata[r.choice(sorted(metadata))] = r.choice(("", "\ud800", "1", "[]", "x" * 1000))
        return
    metadata["config"] = as_json(spoiled(json.loads(metadata["config"]), r), r).decode(errors="replace")


def _bundle(data: bytes, path: Path, r: random.Random) -> None:
    path.write_bytes(safetensors_spoiled(data, r, functools.partial(_config_spoiled, r)))
    opened = Bundle(path)
    _ = opened.default_size, opened.default_text_tokens, opened.lora_ranks()
    opened.verify()


def _few_bits(bundle: Path, folder: Path) -> list[bytes]:
    written = []
    for weights in ("int8", "fp8", "int4"):
        path = folder / f"{weights}.safetensors"
        quantize(bundle, path, weights)
        written.append(path.read_bytes())
    return written


def _quantised(bundles: list[bytes], path: Path, r: random.Random) -> None:
    """Spoil what a bundle's header says of its weights' formats, open the bundle, and load the transformer."""
    data = r.choice(bundles)

    def describe(header: Any) -> None:
        metadata = header["__metadata__"]
        metadata["weights"] = as_json(spoiled(json.loads(metadata["weights"]), r), r).decode(errors="replace")

    path.write_bytes(safetensors_spoiled(data, r, describe))
    opened = Bundle(path)
    load_transformer(opened, torch.device("cpu"), torch.float32)


def _embeddings_file(folder: Path) -> bytes:
    path = folder / "embeddings.safetensors"
    write_embeddings(path, ["a", "b"], torch.zeros(2, 8, 16), torch.zeros(2, 16), "0" * 64)
    return path.read_bytes()


def _embeddings(data: bytes, path: Path, r: random.Random) -> None:
    def describe(header: Any) -> None:
        header["__metadata__"]["prompts"] = as_json(spoiled(["a", "b"], r), r).decode(errors="replace")

    path.write_bytes(safetensors_spoiled(data, r, describe))
    EmbeddedPrompts.read(path).prompts_of_masks(None, ["a"])


def _bundle_run(data: bytes, path: Path, r: random.Random) -> None:
    """If the spoiled bundle opens, draw one step of 32 x 32 pixels with it."""

    def in_a_part(header: Any) -> None:
        config = json.loads(header["__metadata__"]["config"])
        part = r.choice(("vae", "text_encoder", "text_encoder_2", "scheduler", "mogle"))
        config[part] = spoiled(config[part], r)
        header["__metadata__"]["config"] = as_json(config, r).decode(errors="replace")

    if r.random() < 0.3:  # weights and tokenizers
        begin = 8 + int.from_bytes(data[:8], "little")
        at = r.choice((r.randrange(begin, len(data)), r.randrange(len(data) - 20_000, len(data))))
        path.write_bytes(data[:at] + r.choice((b"\xff", b"\0", b"[", b"9")) * min(8, len(data) - at) + data[at + 8 :])
    else:
        path.write_bytes(safetensors_spoiled(data, r, in_a_part))
    pipe = Pipeline(path, device="cpu", dtype="fp32")
    pipe(None, "a hat", 1, height=32, width=32, max_sequence_length=8, generator=torch.Generator().manual_seed(0))


def _tokenizer(files: dict[str, dict[str, bytes]], r: random.Random) -> None:
    part = r.choice(sorted(files))
    held = dict(files[part])
    name = r.choice(sorted(held))
    if r.random() < 0.7 and name.endswith(".json"):
        values = json.loads(held[name])
        if r.random() < 0.3:
            table = bytes_spoiled(r.choice((_CHARSMAP, bytes(40))), r)
            import base64

            values["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}
        else:
            values = spoiled(values, r)
        held[name] = as_json(values, r)
    else:
        held[name] = bytes_spoiled(held[name], r)
    if r.random() < 0.1:
        held[r.choice(("special_tokens_map.json", "added_tokens.json", "spiece.model"))] = as_json(hostile_value(r), r)
    tokenizer = load_tokenizer(part, held)
    prompts = list(PROMPTS)
    without_panic(lambda: tokenizer(prompts, padding="max_length", truncation=True, max_length=16).input_ids, part)


def _lora(data: bytes, folder: Path, r: random.Random) -> None:
    folder.mkdir(exist_ok=True)
    settings = folder / "adapter_config.json"
    settings.unlink(missing_ok=True)
    path = folder / "pytorch_lora_weights.safetensors"
    own = {"r": 4, "lora_alpha": 4, "rank_pattern": {"x_embedder": 4}, "alpha_pattern": {r"blocks\.\d+": 8}}

    def describe(header: Any) -> None:
        said = as_json(spoiled({f"transformer.{k}": v for k, v in own.items()}, r), r)
        header["__metadata__"] = {"lora_adapter_metadata": said.decode(errors="replace")}

    if r.random() < 0.3:
        settings.write_bytes(as_json(spoiled(own, r), r))
        path.write_bytes(data)
    else:
        path.write_bytes(safetensors_spoiled(data, r, describe))
    read_adapter(path, TINY)


def _mogle(data: bytes, folder: Path, r: random.Random) -> None:
    path = folder / r.choice(("m.pt", "m.safetensors"))
    if path.suffix == ".pt" and r.random() < 0.4:  # an entry of the archive, with a right checksum
        spoilt = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(spoilt, "w") as new:
            chosen = r.choice(old.namelist())
            chosen = r.choice((chosen, next(n for n in old.namelist() if n.endswith("data.pkl"))))
            for name in old.namelist():
                entry = old.read(name)
                form = zipfile.ZIP_DEFLATED if r.random() < 0.01 else zipfile.ZIP_STORED
                new.writestr(name, bytes_spoiled(entry, r) if name == chosen else entry, form)
        path.write_bytes(spoilt.getvalue())
    elif path.suffix == ".pt":
        path.write_bytes(bytes_spoiled(data, r))
    else:
        save_file({n: t.contiguous() for n, t in torch.load(io.BytesIO(data), weights_only=True).items()}, path)
        path.write_bytes(safetensors_spoiled(path.read_bytes(), r))
    tensors, _ = read_mogle(path)
    for tensor in tensors.values():
        for chunk in tensor.chunks():
            _ = chunk.view(torch.uint8) if chunk.numel() else None


def _flux(files: Files, folder: Path, r: random.Random) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(files.flux, folder)
    path = r.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
    if path.suffix == ".json":
        path.write_bytes(as_json(spoiled(json.loads(path.read_text()), r), r))
    elif path.suffix == ".safetensors":
        path.write_bytes(safetensors_spoiled(path.read_bytes(), r))
    else:
        path.write_bytes(bytes_spoiled(path.read_bytes(), r))
    gather(folder, files.lora, files.mogle)


def _single_file(files: Files, folder: Path) -> bytes:
    path = files.flux / "transformer" / "diffusion_pytorch_model.safetensors"
    return path.read_bytes()


def _transformer(data: bytes, path: Path, r: random.Random) -> None:
    path.write_bytes(safetensors_spoiled(data, r))
    read_transformer(path, TINY)


def _gguf_file(files: Files, folder: Path) -> bytes:
    import gguf

    from mogle_rt.conversion.folders import read_folder

    path = folder / "whole.gguf"
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_array("sizes", [1, 2, 3])
    writer.add_string("name", "tiny")
    for name, tensor in list(read_folder(files.flux / "transformer").items()):
        writer.add_tensor(name, tensor.load().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def _gguf(data: bytes, path: Path, r: random.Random) -> None:
    head = data[: r.choice((64, 400, 4000, len(data)))]
    path.write_bytes(bytes_spoiled(head, r) + data[len(head) :])
    tensors, _ = read_transformer(path, TINY)
    for tensor in tensors.values():
        for _ in tensor.chunks():
            pass


def _pictures() -> Iterator[tuple[str, bytes]]:
    labels = np.kron(np.arange(16, dtype=np.uint8).reshape(4, 4), np.ones((16, 16), dtype=np.uint8))
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        for image in (to_image(labels), Image.fromarray(labels), Image.fromarray(colorize(labels))):
            if kind in ("JPEG", "WEBP") and image.mode == "P":
                continue
            out = io.BytesIO()
            image.save(out, kind)
            yield f".{kind.lower()}", out.getvalue()
    out = io.BytesIO()
    np.save(out, labels)
    yield ".npy", out.getvalue()


def _mask(pictures: list[tuple[str, bytes]], folder: Path, r: random.Random) -> None:
    suffix, data = r.choice(pictures)
    path = folder / f"mask{suffix}"
    path.write_bytes(bytes_spoiled(data, r))
    to_labels(path)


def _prompts(folder: Path, r: random.Random) -> None:
    for name in ("mask", "text"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    mask, beside, captions = folder / "mask" / f"{r.randrange(10**9)}.png", folder / "mask", folder / "text.json"
    mask.touch()
    text = beside / f"{mask.stem}.txt"
    captions.unlink(missing_ok=True)
    try:
        if r.random() < 0.5:
            text.write_bytes(bytes_spoiled("a face\n\nanother: é".encode() * r.choice((1, 1000)), r))
        else:
            captions.write_bytes(as_json(spoiled({f"{mask.stem}.jpg": ["a face", "another"]}, r), r))
        _entries.cache_clear()
        prompts_of(None, [mask], r.choice((1, 2)), lambda line: None)
    finally:
        mask.unlink()
        text.unlink(missing_ok=True)


_RECORD: tuple[dict[str, Any], ...] = (
    {"job": 0, "seed": 7, "settings": {"steps": 2, "size": [64, 64]}, "masks": ["a.png", "b.png"]},
    {
        "image": "a_7.png",
        "job": 0,
        "seed": 7,
        "mask": "0" * 64,
        "prompt": "a face",
        "options": {"height": 64},
        "seconds": 1.5,
    },
    {"job": 0, "more_masks": ["c.png"]},
)


def _record(folder: Path, r: random.Random) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "a_7.png").touch()
    spoilt = r.randrange(len(_RECORD))
    lines = [as_json(spoiled(v, r) if i == spoilt else v, r) for i, v in enumerate(_RECORD)]
    text = b"\n".join(lines) + b"\n"
    (folder / NAME).write_bytes(bytes_spoiled(text, r) if r.random() < 0.2 else text)
    with JobRecord(folder) as record:
        job = record.find(_RECORD[0]["settings"], None, 5, ["a.png"], share=r.random() < 0.5, hold_seed=True)
        drawing = Drawing(Path("a.png"), "a face", 7, folder / "a_7.png")
        record.check([drawing], job.settings, lambda _: "0" * 64)
        record.begin(job.settings, None, 5, ["a.png"], share=True, hold_seed=True)


def _manifest(exported: Path, bundle: Path, folder: Path, r: random.Random) -> None:
    if not folder.exists():
        shutil.copytree(exported, folder)
    raw = json.loads((exported / "manifest.json").read_text())
    (folder / "manifest.json").write_bytes(as_json(spoiled(raw, r), r))
    ExportedGraphs(folder, Bundle(bundle), ModelConfig(), torch.float32)


def _graph(exported: Path, bundle: Path, folder: Path, r: random.Random) -> None:
    """A spoiled graph whose hash is right in the manifest, as if somebody had forged both."""
    if not folder.exists():
        shutil.copytree(exported, folder)
    raw = json.loads((exported / "manifest.json").read_text())
    name = r.choice(("experts", "prepare", "step"))
    data = bytes_spoiled((exported / f"{name}.onnx").read_bytes(), r)
    (folder / f"{name}.onnx").write_bytes(data)
    raw["graphs"][name]["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(raw))
    try:
        pipe = Pipeline(bundle, device="cpu", engine="onnxruntime", engine_path=folder)
        pipe(None, "a hat", 1, height=32, width=32, max_sequence_length=8, generator=torch.Generator().manual_seed(0))
    finally:
        shutil.copy(exported / f"{name}.onnx", folder / f"{name}.onnx")


def _engine_file(folder: Path) -> bytes:
    header = EngineHeader(
        runtime="tensorrt-rtx",
        runtime_version="1.0",
        target="8.9",
        graph="step",
        dtype="fp32",
        bundle_sha256="0" * 64,
        graph_sha256="0" * 64,
        profile={"latents": ((1, 4, 64), (1, 4, 64), (2, 16, 64))},
        plan_bytes=4,
    )
    write_engine(folder / "whole.engine", header, memoryview(b"plan"))
    return (folder / "whole.engine").read_bytes()


def _engine(data: bytes, path: Path, r: random.Random) -> None:
    if r.random() < 0.3:
        path.write_bytes(bytes_spoiled(data, r))
    else:
        text = as_json(spoiled(json.loads(data[16:-4]), r), r)
        path.write_bytes(data[:8] + len(text).to_bytes(8, "little") + text + b"plan")
    read_engine(path)


# A normalisation in SentencePiece's compiled form, which turns the letter a into A.
_UNITS = np.full(256, 1 << 31, dtype="<u4")
_UNITS[[0, 96, 97]] = 0, 0, 1 << 10 | 1 << 8 | 97
_CHARSMAP = (1024).to_bytes(4, "little") + _UNITS.tobytes() + b"A\0"
