"""Reading rows: what a table, a folder of masks or a data set becomes, and what is said of one that is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mogle_rt.batch import job
from mogle_rt.batch.masks import MaskReader, check_masks
from mogle_rt.batch.rows import DERIVED_SEEDS, Row, derived_seed, read_rows
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.config import ModelConfig
from mogle_rt.errors import MogleError
from mogle_rt.jobs.image_files import save_image
from mogle_rt.jobs.plan import Drawing
from mogle_rt.jobs.record import JobRecord, Settings, job_settings
from mogle_rt.parquet import ROWS_AT_ONCE
from tests.apps.test_cli import draw_mask

pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow, of the extra batch")
pytest.importorskip("ray", reason="needs Ray, of the extra batch")
from pyarrow import parquet  # noqa: E402

pytestmark = pytest.mark.quick


def read(source: Path, seed: int = 0, caption: int = 1) -> tuple[list[Row], list[str]]:
    """The rows, and the lines for the user."""
    lines: list[str] = []
    return read_rows(source, seed, caption, lines.append), lines


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as a table of the kind that the file's name says."""
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    else:
        lines = [",".join(rows[0])] + [",".join("" if v is None else str(v) for v in row.values()) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    return path


@pytest.fixture
def masks(tmp_path: Path) -> list[Path]:
    return [draw_mask(tmp_path / "masks" / f"{i}.png", seed=i) for i in range(3)]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_every_kind_of_table_gives_the_same_rows(suffix: str, tmp_path: Path, masks: list[Path]) -> None:
    given: list[dict[str, Any]] = [
        {"mask": "masks/0.png", "prompt": "a hat", "seed": 7, "height": 32, "guidance_scale": 2.5, "id": "007"},
        {"mask": "masks/1.png", "prompt": "über", "seed": None, "height": None, "guidance_scale": None, "id": None},
        {"mask": None, "prompt": None, "seed": 2**40, "height": 48, "guidance_scale": 3.0, "id": None},
    ]
    (first, second, third), lines = read(write(tmp_path / f"rows{suffix}", given))
    assert lines == []
    assert (first.id, first.seed, first.prompt) == ("007", 7, "a hat")
    assert first.options == (("guidance_scale", 2.5), ("height", 32))
    assert first.mask is not None
    assert first.mask.path.samefile(masks[0])
    assert second.prompt == "über"
    assert second.options == ()
    assert second.seed == derived_seed(second.id, 0) < DERIVED_SEEDS
    assert (third.mask, third.digest, third.prompt, third.seed) == (None, "", "", 2**40)
    assert [row.place for row in (first, second, third)] == ["row 1", "row 2", "row 3"]
    # The same rows in another order, beside another one, have the same ids and seeds.
    more = [given[1], {**given[1], "prompt": "another"}, given[0]]
    again, _ = read(write(tmp_path / f"more{suffix}", more))
    assert (again[0].id, again[0].seed) == (second.id, second.seed)
    assert again[1].id != second.id
    assert read(write(tmp_path / f"rows{suffix}", given), seed=1)[0][1].seed != second.seed


def test_equal_rows_are_several_images(tmp_path: Path, masks: list[Path]) -> None:
    row = {"mask": "masks/0.png", "prompt": "a hat"}
    rows, _ = read(write(tmp_path / "rows.jsonl", [row, row, {**row, "prompt": "b"}, row]))
    first = rows[0].id
    assert [row.id for row in rows] == [first, f"{first}-2", rows[2].id, f"{first}-3"]
    assert len({row.seed for row in rows}) == 4


def test_masks_within_a_parquet_file(tmp_path: Path) -> None:
    """As bytes, and as Hugging Face's data sets have pictures; read in any order, far more than are in memory at once."""
    paths = [draw_mask(tmp_path / f"{i}.png", seed=i) for i in range(5)]
    count = 3 * ROWS_AT_ONCE + 5
    contents = [paths[i % 5].read_bytes() for i in range(count)]
    plain = [{"mask": content, "prompt": str(i)} for i, content in enumerate(contents)]
    parquet.write_table(pyarrow.Table.from_pylist(plain), tmp_path / "rows.parquet", row_group_size=100)
    rows, _ = read(tmp_path / "rows.parquet")
    reader = MaskReader()
    for i in (0, 1, 150, 99, 100, count - 1, 64, 63):
        source = rows[i].mask
        assert source is not None
        assert reader(source) == contents[i]
    assert check_masks(rows, "celebamask") == {row.id: (32, 48) for row in rows}
    struct = [{"mask": {"bytes": paths[0].read_bytes(), "path": "x/0.png"}, "prompt": ""}]
    (row,), _ = read(write(tmp_path / "struct.parquet", struct))
    assert row.mask is not None
    assert row.mask.name == Path("0.png")
    assert reader(row.mask) == paths[0].read_bytes()


def test_a_folder_of_parquet_files(tmp_path: Path, masks: list[Path]) -> None:
    for name in ("b", "a"):
        write(tmp_path / f"{name}.parquet", [{"mask": "masks/0.png", "prompt": name}])
    rows, _ = read(tmp_path)
    assert [(row.prompt, row.place) for row in rows] == [("a", "a.parquet row 1"), ("b", "b.parquet row 1")]


def test_folders_of_masks(tmp_path: Path, masks: list[Path]) -> None:
    """Masks with texts beside them, and MM-CelebA-HQ's folders. Rows are called by their masks."""
    masks[1].with_suffix(".txt").write_text("one\ntwo\n")
    rows, lines = read(tmp_path / "masks")
    assert [(row.id, row.prompt) for row in rows] == [("0", ""), ("1", "one"), ("2", "")]
    assert lines[0].startswith("masks have up to 2 captions; number 1 is the prompt")
    assert lines[1] == "2 of 3 masks have no prompt, and are drawn from the mask alone"
    masks[1].with_suffix(".txt").unlink()

    data = tmp_path / "data"
    (data / "text").mkdir(parents=True)
    (tmp_path / "masks").rename(data / "mask")
    for i in range(3):
        (data / "text" / f"{i}.txt").write_text("".join(f"caption {n} of {i}\n" for n in range(1, 11)))
    rows, _ = read(data, caption=10)
    assert [(row.id, row.prompt) for row in rows] == [(str(i), f"caption 10 of {i}") for i in range(3)]
    rows, _ = read(data, caption=11)
    assert rows[0].error == f"--caption 11: {data / 'mask' / '0.png'} has 10 captions; give a number from 1 to 10"


def test_captions_in_a_cell(tmp_path: Path, masks: list[Path]) -> None:
    path = write(tmp_path / "rows.jsonl", [{"mask": "masks/0.png", "prompt": ["one", "two"]}])
    (row,), lines = read(path, caption=2)
    assert row.prompt == "two"
    assert lines == ["prompts have up to 2 captions; number 2 is taken, --caption N chooses another"]


def test_unknown_columns_are_told(tmp_path: Path, masks: list[Path]) -> None:
    path = write(tmp_path / "rows.csv", [{"mask": "masks/0.png", "prompt": "a", "image": "x.png", "split": "test"}])
    assert read(path)[1] == [f"{path}: columns that mean nothing here are left out: 'image', 'split'"]


WRONG_CELLS: list[tuple[dict[str, Any], str]] = [
    ({"mask": "masks/none.png"}, "none.png: no such file"),
    ({"mask": 5}, "mask must be a path or the bytes of a file, got 5"),
    ({"prompt": 5}, "prompt must be a text, or a list of captions, got 5"),
    ({"prompt": "x" * 100_001}, "a prompt can have at most 100,000 characters"),
    ({"prompt": ["one"], "id": "caption"}, ""),
    ({"seed": -1}, "seed must be a whole number from 0 to"),
    ({"seed": "x"}, "seed must be a whole number"),
    ({"id": "a/b"}, "id must be a text of at most 200 bytes that can name a file, got 'a/b'"),
    ({"height": 100}, "height must be a multiple of 16, got 100; the nearest is 96"),
    ({"height": True}, "height must be a whole number, got True"),
    ({"num_inference_steps": 2.5}, "num_inference_steps must be a whole number, got 2.5"),
    ({"guidance_scale": "much"}, "guidance_scale must be a number, got 'much'"),
    ({"mask_order": "mine"}, "order must be"),
    ({"position_delta": [1]}, "position_delta must be two numbers, as [0, 8], got [1]"),
    ({"mask_posterior": "median"}, "mask_posterior must be 'mean' or 'sample'"),
]


def test_a_wrong_row_is_a_row_with_an_error(tmp_path: Path, masks: list[Path]) -> None:
    rows = [{"mask": "masks/0.png", "prompt": f"row {i}", **cells} for i, (cells, _) in enumerate(WRONG_CELLS)]
    found, _ = read(write(tmp_path / "rows.jsonl", rows))
    for row, (cells, message) in zip(found, WRONG_CELLS, strict=True):
        assert (row.error is None) == (not message), cells
        assert message in (row.error or ""), cells
    assert len({row.id for row in found}) == len(found)


def test_options_of_rows_are_read(tmp_path: Path, masks: list[Path]) -> None:
    options = {
        "position_delta": "[0, 8]",
        "max_sequence_length": "77",
        "mask_posterior": "sample",
        "mask_order": "farl",
    }
    path = tmp_path / "rows.jsonl"
    (row,), _ = read(write(path, [{"mask": "masks/0.png", "prompt": "", **options, "width": 64.0}]))
    assert dict(row.options) == {**options, "position_delta": (0, 8), "max_sequence_length": 77, "width": 64}


HOLDER = """
import sys
from pathlib import Path
from mogle_rt.jobs.record import JobRecord
with JobRecord(Path(sys.argv[1])) as record:
    record.begin(dict(eval(sys.argv[2])), 0, 0, (), share=True, hold_seed=True)
    print(record.hold(), flush=True)
    sys.stdin.read()
"""


def settings_of(bundle: Path, steps: int) -> dict[str, Any]:
    """Of a job with no other options."""
    call = {"num_inference_steps": steps, "guidance_scale": 3.5, "condition_scale": 1.0, "height": None, "width": None}
    model = ModelConfig().to_dict()
    return job_settings(
        Bundle(bundle).content_hash, {**call, "mask_order": "celebamask"}, model_config=model, dtype=None
    )


class Case:
    """A job with something wrong about it: what is made in a folder, and what is asked for."""

    def __init__(self, make: Callable[[Path, Settings], object], message: str, **asked: Any) -> None:
        self.make, self.message, self.asked = make, message, asked


def table(name: str, content: str | bytes, message: str, **asked: Any) -> Case:
    """A job whose input is a file with this content."""
    data = content if isinstance(content, bytes) else content.encode()
    return Case(lambda folder, _: (folder / name).write_bytes(data), message, source=name, **asked)


GOOD = '{"mask": null, "prompt": "a", "id": "a"}\n'


def damaged(folder: Path, _: Settings) -> None:
    path = write(folder / "rows.parquet", [{"mask": "a", "prompt": "b"}] * 100)
    content = bytearray(path.read_bytes())
    content[8:40] = bytes(32)
    path.write_bytes(content)


def drawn_before(folder: Path, settings: Settings, prompt: str = "a", known: bool = True) -> None:
    """The folder of another job, with the image of the row in `GOOD`."""
    (folder / "rows.jsonl").write_text(GOOD)
    path = folder / "out" / f"a_{derived_seed('a', 0)}.png"
    path.parent.mkdir()
    save_image(Image.fromarray(np.zeros((16, 16, 3), np.uint8)), path)
    with JobRecord(path.parent) as record:
        made = record.begin(settings, 0, 0, (), share=True, hold_seed=True)
        if known:
            record.drawn(made, Drawing(None, prompt, derived_seed("a", 0), path), "")


def out_is_a_file(folder: Path, _: Settings) -> None:
    (folder / "rows.jsonl").write_text(GOOD)
    (folder / "out").write_text("")


def twins(folder: Path, _: Settings) -> None:
    (folder / "masks").mkdir()
    np.save(folder / "masks" / "0.npy", np.asarray(Image.open(draw_mask(folder / "masks" / "0.png"))))


CASES = {
    "no file": Case(lambda *_: None, "rows.jsonl: no such file or folder"),
    "no table": table("rows.txt", GOOD, "rows are read from .csv, .jsonl, .ndjson, .parquet, not '.txt'"),
    "no rows": table("rows.csv", "mask,prompt\n", "rows.csv: holds no rows"),
    "empty file": table("rows.jsonl", "", "rows.jsonl: holds no rows"),
    "no masks": table("rows.csv", "prompt,text\na,b\n", "has no column 'mask'; it has 'prompt', 'text'"),
    "no prompts": table("rows.jsonl", '{"mask": null}', "has no column 'prompt'; it has 'mask'"),
    "two columns": table("rows.csv", "mask,prompt,mask\na,b,c\n", "has two columns named 'mask'"),
    "cells": table("rows.csv", "mask,prompt\na,b\na,b,c\n", "line 3 has 3 cells, and the first line names 2 columns"),
    "quote": table("rows.csv", 'mask,prompt\n"a,b\n', "line 2 can't be read: unexpected end of data"),
    "latin": table("rows.csv", "mask,prompt\na,ü\n".encode("latin-1"), "must be UTF-8 text"),
    "json": table("rows.jsonl", GOOD + '{"mask": ', "line 2 can't be read as JSON"),
    "no object": table("rows.jsonl", GOOD + "[1]", "line 2 must hold a JSON object, holds [1]"),
    "no parquet": table("rows.parquet", GOOD, "can't be read as Parquet"),
    "damaged": Case(damaged, "rows.parquet: can't be read after row 0", source="rows.parquet"),
    "one id": table("rows.jsonl", GOOD + GOOD, "row 1 and row 2 have the same id 'a'; each needs one of its own"),
    "misspelt": table(
        "rows.jsonl",
        '{"mask": null, "prompt": "a", "guidance_scal": 2}',
        "there is no option 'guidance_scal'; rename the column to 'guidance_scale', or remove it",
    ),
    "of the command": table(
        "rows.jsonl",
        '{"mask": null, "prompt": "a", "steps": 2}',
        "can't be a column: the column is num_inference_steps",
    ),
    "tensors": table(
        "rows.jsonl", '{"mask": null, "prompt": "a", "latents": 2}', "'latents' can't be a column: the column seed"
    ),
    "all wrong": table(
        "rows.jsonl", '{"mask": "none", "prompt": "a"}', "none of 1 rows can be drawn; row 1: .*none: no such file"
    ),
    "no mask in it": Case(
        lambda folder, _: (folder / "masks").mkdir(), "masks: a folder without masks", source="masks"
    ),
    "twins": Case(twins, "0.npy and .*0.png have the same id '0'", source="masks"),
    "a file": Case(out_is_a_file, "out: is a file; the images need a folder"),
    "into itself": Case(twins, "holds the rows themselves; choose another folder", source="masks", output="masks"),
    "other bundle": Case(
        lambda f, s: drawn_before(f, {**s, "bundle": "ab" * 32}), "its images were drawn with bundle abababababab…"
    ),
    "other settings": Case(
        lambda f, s: drawn_before(f, {**s, "steps": 9}), "its images were drawn with steps 9, asked for is 2"
    ),
    "other prompt": Case(lambda f, s: drawn_before(f, s, prompt="b"), "was drawn for another prompt"),
    "unknown image": Case(
        lambda f, s: drawn_before(f, s, known=False), "is there, and no record tells what it was drawn from"
    ),
    "workers": table("rows.jsonl", GOOD, "num_workers must be 1 or more, got 0", num_workers=0),
    "batch": table("rows.jsonl", GOOD, "batch_size must be 1 or more, got -1", batch_size=-1),
    "batch's name": table("rows.jsonl", GOOD, "batch_size must be a whole number or auto, got 'big'", batch_size="big"),
    "seed": table("rows.jsonl", GOOD, "seed must be from 0 to", seed=-1),
    "gpus": table("rows.jsonl", GOOD, "num_gpus must be a number of 0 or more", num_gpus=float("nan")),
    "option": table("rows.jsonl", GOOD, "there is no option 'latents'", latents=1),
    "one gpu": table("rows.jsonl", GOOD, "device must be cpu, cuda or mps, got 'cuda:1'", device="cuda:1"),
    "format": table("rows.jsonl", GOOD, "--format must be png or jpg, got 'gif'", suffix="gif"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_job_is_told_in_one_line(
    name: str, tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before Ray is started, and nothing is written."""
    monkeypatch.setattr(job, "ray_session", lambda *_: pytest.fail("Ray was started"))
    case = CASES[name]
    case.make(tmp_path, settings_of(tiny_bundle, 2))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    asked = dict(case.asked)
    source, output = tmp_path / asked.pop("source", "rows.jsonl"), tmp_path / asked.pop("output", "out")
    with pytest.raises(MogleError, match=case.message if ".*" in case.message else re.escape(case.message)) as caught:
        job.run(tiny_bundle, source, output, num_inference_steps=2, say=lambda _: None, **asked)
    assert "\n" not in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_bundle_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(GOOD)
    with pytest.raises(MogleError, match=r"none\.safetensors: no such file"):
        job.run(tmp_path / "none.safetensors", tmp_path / "rows.jsonl", tmp_path / "out")


def test_one_job_in_a_folder(tmp_path: Path, tiny_bundle: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(GOOD)
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "out"), repr(settings_of(tiny_bundle, 28))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        try:
            assert other.stdout.readline() == "True\n"
            with pytest.raises(MogleError, match="another mogle-rt batch is at work in it; wait until it has ended"):
                job.run(tiny_bundle, tmp_path / "rows.jsonl", tmp_path / "out")
        finally:
            other.kill()
    assert os.listdir(tmp_path / "out") == ["mogle-rt-jobs.jsonl"]
