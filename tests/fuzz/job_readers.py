"""The code that reads what jobs are given and leave behind: tables, records, settings, requests. See `readers`."""

from __future__ import annotations

import asyncio
import base64
import csv
import functools
import io
import json
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from PIL import Image, PngImagePlugin
from pyarrow import parquet
from starlette.requests import Request

from mogle_rt import MogleError
from mogle_rt.batch.masks import check_masks
from mogle_rt.batch.rows import read_rows
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.bundle.shipped import examples
from mogle_rt.fast.choice import NAMED, read_stored, stored_path, write_stored
from mogle_rt.jobs.image_files import save_image
from mogle_rt.jobs.settings_read import mask_text, read_settings
from mogle_rt.masks import to_image
from mogle_rt.quality.calibration.results import KIND, Results
from mogle_rt.quality.calibration.results import NAME as CALIBRATION
from mogle_rt.quality.pictures import read_picture
from mogle_rt.quality.rows import TABLE, find_rows, size_of, with_captions, with_masks, with_real
from mogle_rt.server.asked.bodies import read_form, read_request
from mogle_rt.server.asked.edits import read_edit, read_image_settings
from mogle_rt.server.asked.masks import fitted, read_masks
from mogle_rt.server.asked.requests import EditRequest, GenerationRequest, ImagesRequest, Limits
from mogle_rt.server.refusals import Refusal
from tests.fuzz.mutators import TEXTS, as_json, bytes_spoiled, spoiled

Attempt = Callable[[random.Random], object]
LABELS = np.kron(np.arange(16, dtype=np.uint8).reshape(4, 4), np.ones((16, 16), dtype=np.uint8))


def job_readers(bundle: Path, folder: Path) -> dict[str, Attempt]:
    """Readers by their names.

    Args:
        bundle: a tiny one. It is not changed.
        folder: where spoiled files are written.
    """
    image = _image(folder / "face.png")
    return {
        "table of rows": functools.partial(_table, folder / "rows"),
        "settings in an image": functools.partial(_settings, image, folder / "spoiled.png"),
        "evaluated folder": functools.partial(_evaluated, image, folder / "evaluated"),
        "fast settings": functools.partial(_fast, _copy(bundle, folder / "fast.safetensors")),
        "calibration": functools.partial(_calibration, folder / "calibration"),
        "request": functools.partial(_request, image),
    }


def _copy(bundle: Path, path: Path) -> Bundle:
    shutil.copy(bundle, path)
    opened = Bundle(path)
    _ = opened.content_hash
    return opened


def _image(path: Path) -> bytes:
    """An image with its settings, as this package writes it."""
    save_image(Image.fromarray(np.zeros((64, 64, 3), dtype=np.uint8)), path, _SETTINGS)
    assert read_settings(path).labels is not None
    return path.read_bytes()


_SETTINGS: dict[str, Any] = {
    "software": "mogle_rt",
    "prompt": "a face",
    "seed": 7,
    "steps": 2,
    "guidance_scale": 3.5,
    "condition_scale": 1.0,
    "model_config": {"use_global": True},
    "bundle_sha256": "0" * 64,
    "mask": "a.png",
    "mask_png": mask_text(LABELS),
}
_ROWS: list[dict[str, Any]] = [
    {"mask": "a.png", "prompt": "a hat", "seed": 7, "id": "one", "height": 32, "guidance_scale": 2.5},
    {"mask": "a.png", "prompt": ["a", "b"], "seed": None, "id": None, "height": None, "guidance_scale": None},
    {"mask": None, "prompt": None, "seed": 2**40, "id": "three", "height": 48, "guidance_scale": 3.0},
]
_OTHER_COLUMNS = {
    "position_delta": [0, 8],
    "mask_order": "bisenet",
    "num_inference_steps": 2,
    "mask_posterior": "mean",
    "steps": 3,
    "extra": 1,
}


def _table(folder: Path, r: random.Random) -> None:
    folder.mkdir(exist_ok=True)
    to_image(LABELS).save(folder / "a.png")
    rows = [dict(row) for row in _ROWS]
    for row in rows:
        row.update({name: value for name, value in _OTHER_COLUMNS.items() if r.random() < 0.2})
    rows = spoiled(rows, r) if r.random() < 0.8 else rows
    kind = r.choice((".csv", ".jsonl", ".parquet"))
    path = folder / f"rows{kind}"
    if kind == ".jsonl" or not isinstance(rows, list) or not all(isinstance(row, dict) and row for row in rows):
        path = folder / "rows.jsonl"
        path.write_bytes(b"\n".join(as_json(row, r) for row in (rows if isinstance(rows, list) else [rows])) + b"\n")
    elif kind == ".csv":
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(rows[0] if rows else [])
        writer.writerows([[v if isinstance(v, str) else _dumped(v) for v in row.values()] for row in rows])
        path.write_text(text.getvalue(), encoding="utf-8", errors="surrogatepass")
    else:
        path.write_bytes(_parquet(rows, r, masks=True))
    if r.random() < 0.3:
        path.write_bytes(bytes_spoiled(path.read_bytes(), r))
    read = read_rows(path, 0, r.choice((1, 2)), lambda line: None)
    check_masks([row for row in read if row.error is None], "celebamask")


def _dumped(value: Any) -> str:
    try:
        return "" if value is None else json.dumps(value)
    except (ValueError, RecursionError):
        return "[" * 100_000


def _parquet(rows: list[dict[str, Any]], r: random.Random, *, masks: bool) -> bytes:
    """Rows in columns of whatever types pyarrow finds for them; texts where it finds none. ``masks``: some hold files."""
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        cells = [row.get(name) for row in rows]
        try:
            columns[name] = pyarrow.array(_mask_files(cells, r) if masks and name == "mask" else cells)
        except (pyarrow.ArrowException, ValueError, TypeError, OverflowError):
            columns[name] = pyarrow.array([_dumped(cell) for cell in cells])
    out = io.BytesIO()
    try:
        parquet.write_table(pyarrow.table(columns), out)
    except (pyarrow.ArrowException, ValueError):
        parquet.write_table(pyarrow.table({"mask": ["a.png"], "prompt": [1]}), out)
    return out.getvalue()


def _mask_files(cells: list[Any], r: random.Random) -> list[Any]:
    """Masks as their bytes, as some data sets have them."""
    if r.random() < 0.5:
        return cells
    buffer = io.BytesIO()
    to_image(LABELS).save(buffer, "PNG")
    return [None if cell is None else bytes_spoiled(buffer.getvalue(), r) for cell in cells]


def _spoiled_image(data: bytes, r: random.Random) -> bytes:
    """The image with spoiled settings, or with spoiled bytes."""
    if r.random() < 0.3:
        return bytes_spoiled(data, r)
    told = spoiled(_SETTINGS, r)
    buffer = io.BytesIO()
    text = as_json(told, r).decode(errors="replace").replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    packet = f'<dc:description><rdf:Alt><rdf:li xml:lang="x-default">{text}</rdf:li>'
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", packet)
    Image.fromarray(np.zeros((64, 64, 3), dtype=np.uint8)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def _settings(image: bytes, path: Path, r: random.Random) -> None:
    path.write_bytes(_spoiled_image(image, r))
    _ = read_settings(path).labels


def _evaluated(image: bytes, folder: Path, r: random.Random) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("images", "masks", "captions"):
        (folder / name).mkdir(parents=True)
    images = folder / "images"
    for name in ("a_7.png", "b_7.png"):
        (images / name).write_bytes(_spoiled_image(image, r) if r.random() < 0.3 else image)
    to_image(LABELS).save(folder / "masks" / "a.png")
    (folder / "captions" / "a.txt").write_bytes(bytes_spoiled(b"a face\nanother", r))
    if r.random() < 0.7:
        lines: Any = [
            {
                "image": f"{stem}_7.png",
                "mask": f"{stem}.png",
                "prompt": "a face",
                "seed": n,
                "seconds": 1.5,
                "error": None,
            }
            for n, stem in enumerate("ab")
        ]
        lines = spoiled(lines, r)
        valid = isinstance(lines, list) and lines and all(isinstance(row, dict) and row for row in lines)
        data = _parquet(lines if valid else [{"image": "a_7.png"}], r, masks=False)
        (images / TABLE).write_bytes(bytes_spoiled(data, r) if r.random() < 0.3 else data)
    elif r.random() < 0.5:
        record = {"image": "a_7.png", "job": 0, "seed": 7, "mask": "0" * 64, "prompt": "a face", "options": {}}
        (images / "mogle-rt.jsonl").write_bytes(as_json(spoiled(record, r), r))
    rows = find_rows(images, lambda line: None)
    size_of(rows)
    rows = with_real(rows, images, lambda line: None)
    if r.random() < 0.5:
        rows = with_masks(rows, folder / "masks", lambda line: None)
        rows = with_captions(rows, folder / "captions", r.choice((1, 2)), lambda line: None)
    for row in rows:
        read_picture(row.image)
        row.labels("celebamask")


def _fast(bundle: Bundle, r: random.Random) -> None:
    path = stored_path(bundle.path)
    if not path.with_suffix(".whole").exists():
        write_stored(bundle, NAMED, {"psnr": 30.0}, path.with_suffix(".whole"))
    values = json.loads(path.with_suffix(".whole").read_text())
    path.write_bytes(as_json(spoiled(values, r), r))
    for config in read_stored(bundle).values():
        _ = str(config), config.steps_of(28), config.exact


_DRAWN: dict[str, Any] = {
    **{"case": "k", "way": "order=1", "seconds": 1.0, "beside": 1.0, "computed": 3, "condition": 3},
    **{"psnr": 30.0, "ssim": 0.9, "latents": 0.1, "mask": 0.5},
}


def _calibration(folder: Path, r: random.Random) -> None:
    folder.mkdir(exist_ok=True)
    lines: list[Any] = [{"kind": KIND, "settings": {"steps": 2, "seed": 1}}, _DRAWN, _DRAWN | {"way": ""}]
    at = r.randrange(len(lines))
    text = b"\n".join(as_json(spoiled(line, r) if i == at else line, r) for i, line in enumerate(lines))
    (folder / CALIBRATION).write_bytes(bytes_spoiled(text, r) if r.random() < 0.2 else text)
    Results(folder, {"steps": 2, "seed": 1})


LIMITS = Limits(pixels=256 * 256, steps=100, upload=1 << 20, mask_pixels=512 * 512)


def _request(image: bytes, r: random.Random) -> None:
    """All that the server does with a request before it is drawn. A refusal counts as one if it is one line."""
    try:
        asyncio.run(_answered(image, r))
    except Refusal as refusal:
        if not 400 <= refusal.status < 500:
            raise
        raise MogleError(refusal.body()["error"]["message"]) from None


async def _answered(image: bytes, r: random.Random) -> None:
    mask = examples()[0].mask.read_bytes()
    files = {"semantic_mask": mask}
    fields: dict[str, Any] = {"prompt": "a face", "seed": 7, "num_inference_steps": 2, "size": "64x64", "n": 1}
    edits = r.random() < 0.6
    if edits:
        files |= {"image": image, "semantic_mask_before": mask}
        fields |= {"strength": 0.9, "regions": "hair", "keep": "nose", "margin": 2}
    for name in list(files):
        kind = r.randrange(4)
        if kind == 0:
            files[name] = _spoiled_image(image, r) if name == "image" else bytes_spoiled(files[name], r)
        elif kind == 1 and name != "image":
            del files[name]
    if r.random() < 0.1:
        files["mask"] = r.choice((mask, image))
    as_form = r.random() < 0.5
    if not as_form:
        fields |= {name: base64.b64encode(data).decode() for name, data in files.items()}
    fields = spoiled(fields, r) if r.random() < 0.8 else fields
    if as_form:
        body, media = _form(fields if isinstance(fields, dict) else {"x": fields}, files, r)
    else:
        body, media = as_json(fields, r), "application/json"
    if r.random() < 0.1:
        body = bytes_spoiled(body, r)
    if r.random() < 0.05:
        media = r.choice(
            (*TEXTS, "multipart/form-data", "multipart/form-data; boundary=", "application/json;;=")
        ).strip()
    request = _received(body, media.encode(errors="replace"), r)
    if r.random() < 0.1:
        _, sent = await read_form(request, LIMITS, {"image": "image[]"})
        read_image_settings(sent.get("image", []), LIMITS)
        return
    kind_of: type[ImagesRequest] = EditRequest if edits else GenerationRequest
    asked, sent = await read_request(request, LIMITS, kind_of)
    asked.check(LIMITS, "demo")
    if isinstance(asked, EditRequest):
        read_edit(asked, sent, LIMITS, bundle="0" * 64)
    else:
        labels = read_masks(sent["semantic_mask"], asked.mask_order, LIMITS)[0] if sent else None
        fitted(labels, asked.height_and_width, 64)


def _form(fields: Mapping[str, Any], files: Mapping[str, bytes], r: random.Random) -> tuple[bytes, str]:
    parts = []
    for name, value in fields.items():
        text = value if isinstance(value, str) else _dumped(value)
        parts.append(f'Content-Disposition: form-data; name="{name}"\r\n\r\n{text}'.encode(errors="replace"))
    for name, data in files.items():
        said = r.choice(("mask.png", "../x", "00000_hair.png", r.choice(TEXTS)))
        head = f'Content-Disposition: form-data; name="{name}"; filename="{said}"\r\n\r\n'
        parts += [head.encode(errors="replace") + data] * r.choice((1, 1, 1, 2))
    boundary = r.choice((b"b", b"b" * 70, b"b'"))
    body = b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + boundary + b"--\r\n"
    return body, f"multipart/form-data; boundary={boundary.decode()}"


def _received(body: bytes, media: bytes, r: random.Random) -> Request:
    size = r.choice((1 << 20, 1000))
    chunks = [body[at : at + size] for at in range(0, len(body), size)] or [b""]

    async def receive() -> dict[str, Any]:
        if chunks:
            return {"type": "http.request", "body": chunks.pop(0), "more_body": bool(chunks)}
        return {"type": "http.disconnect"}

    headers = [(b"content-type", media)]
    if r.random() < 0.2:
        length = r.choice((len(body), 0, "x", -1, 10**30, r.choice(TEXTS)))
        headers.append((b"content-length", str(length).encode(errors="replace")))
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": headers}
    return Request(scope, receive)
