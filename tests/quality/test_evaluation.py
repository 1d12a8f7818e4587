"""A folder of images is measured: what belongs to what, figures, results in three forms, and one line for each mistake."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from typer.testing import CliRunner

from mogle_rt.apps.cli import app
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.bundle.shipped import write_examples
from mogle_rt.errors import CheckpointError, InputError, MogleError, OutputError
from mogle_rt.jobs.image_files import MASK, save_image
from mogle_rt.jobs.record import NAME as RECORD
from mogle_rt.jobs.settings_read import mask_text
from mogle_rt.masks import to_labels
from mogle_rt.quality.distances import frechet
from mogle_rt.quality.evaluation import evaluate
from mogle_rt.quality.judges.choice import Judges
from mogle_rt.quality.judges.demo import DemoJudge
from mogle_rt.quality.page import write_page
from mogle_rt.quality.pictures import read_picture
from mogle_rt.quality.regions import iou
from mogle_rt.quality.report import METRICS, Report
from mogle_rt.quality.rows import TABLE, find_rows
from tests.quality.judges import write_clip, write_face_network, write_images, write_masks, write_parser

DEMO = Judges(features="demo", parser="demo")
STEMS = ["a", "b", "c", "d"]


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Judges:
    """All of them small, with random weights, from files."""
    folder = tmp_path_factory.mktemp("judges")
    return Judges(
        features="demo",
        clip=str(write_clip(folder / "clip")),
        parser=str(write_parser(folder / "parser")),
        face=str(write_face_network(folder / "face.onnx")),
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two images each of four masks, with masks, captions and real images in folders of their own."""
    write_images(tmp_path / "out", [f"{stem}_{seed}.png" for stem in STEMS for seed in (1, 2)], 0)
    write_images(tmp_path / "real", [f"{stem}.png" for stem in STEMS], 1)
    write_masks(tmp_path / "masks", STEMS)
    (tmp_path / "captions").mkdir()
    for stem in STEMS:
        (tmp_path / "captions" / f"{stem}.txt").write_text(f"a man\na woman with red hair {stem}\n")
    return tmp_path


def measured(data: Path, **options: Any) -> Report:
    given: dict[str, Any] = {
        "against": data / "real", "masks": data / "masks", "captions": data / "captions", "judges": DEMO,
        "device": "cpu", "bootstrap": 20,
    }  # fmt: skip
    return evaluate(data / "out", **(given | options))


@pytest.mark.quick
def test_everything_is_measured_by_the_judges_that_are_given(data: Path, judges: Judges) -> None:
    report = measured(data, judges=judges)
    assert set(report.skipped) == {"reward", "colours"}  # not installed; of the demo alone
    assert set(report.figures) == {
        "fid", "kid", "cmmd", "clip", "miou", "accuracy", "identity", "diversity", "pixels", "faces",
    }  # fmt: skip
    for name, found in report.figures.items():
        low, high = found.figure.low, found.figure.high
        assert low is not None, name
        assert high is not None, name
        assert low <= found.figure.value <= high, name
    assert report.figures["identity"].judge == "faces, face.onnx"
    assert report.figures["clip"].judge.startswith("CLIP, ")
    assert report.figures["miou"].figure.count == 8


def test_figures_are_those_of_the_measures(data: Path) -> None:
    report = measured(data, metrics=["fid", "mask"])
    judge, names = DemoJudge(), sorted(path.name for path in (data / "out").iterdir())
    images = [read_picture(data / "out" / name) for name in names]
    real = [read_picture(data / "real" / f"{stem}.png") for stem in STEMS]
    want = frechet(judge.features(images), judge.features(real))
    assert report.figures["fid"].figure.value == pytest.approx(want, rel=1e-5)
    labels = [to_labels(data / "masks" / f"{name[0]}.png") for name in names]
    by_class = iou(np.stack(judge.labels(images)), np.stack(labels))
    assert report.figures["miou"].figure.value == pytest.approx(np.mean(list(by_class.values())))
    assert list(report.classes.values()) == pytest.approx(list(by_class.values()))
    assert any("few for 224 features" in note for note in report.notes)


def test_numbers_do_not_depend_on_the_batch(data: Path, judges: Judges) -> None:
    one, eight = (measured(data, judges=judges, batch_size=n, metrics=["fid", "clip", "mask"]) for n in (1, 8))
    for name, found in one.figures.items():
        assert found.figure.value == pytest.approx(eight.figures[name].figure.value, rel=1e-4), name


def test_an_image_that_is_its_real_one_has_its_identity(data: Path, judges: Judges) -> None:
    for stem in STEMS:
        shutil.copy(data / "real" / f"{stem}.png", data / "out" / f"{stem}_1.png")
    values = measured(data, judges=judges, metrics=["identity"]).values["identity"]
    np.testing.assert_allclose(values[::2], 1, atol=1e-6)
    assert (values[1::2] < 0.999).all()


def test_equal_images_have_no_diversity(data: Path) -> None:
    several = measured(data, metrics=["diversity"]).figures
    assert several["diversity"].figure.value > 0.01
    assert several["pixels"].figure.value > 10
    for stem in STEMS:
        shutil.copy(data / "out" / f"{stem}_1.png", data / "out" / f"{stem}_2.png")
    equal = measured(data, metrics=["diversity"]).figures
    assert equal["pixels"].figure.value == 0
    assert equal["diversity"].figure.value == pytest.approx(0, abs=1e-9)


def test_a_folder_of_generate_tells_masks_and_prompts_itself(tmp_path: Path) -> None:
    """Images drawn by the command: masks and prompts are within them, and the demo's judge is taken by itself."""
    masks, out = tmp_path / "masks", tmp_path / "out"
    write_examples(masks)
    for path in sorted(masks.glob("*.png"))[2:]:
        path.unlink()
    drawn = CliRunner().invoke(
        app, ["generate", "demo", "-m", str(masks), "-n", "2", "--seed", "5", "--steps", "1", "-o", str(out),
              "--device", "cpu", "--sheet", str(out / "sheet.png")]
    )  # fmt: skip
    assert drawn.exit_code == 0, drawn.output
    report = evaluate(out, device="cpu", bootstrap=0)
    assert [row.seed for row in report.rows] == [5, 6, 7, 8]  # and the sheet isn't an image of the job
    assert report.notes == [f"1 pictures in {out} are left out, as no job drew them: sheet.png"]
    assert all(row.prompt for row in report.rows)
    assert report.figures["miou"].judge == "demo"
    assert report.figures["miou"].figure.low is None
    assert sum(count for _, count in report.colours.values()) > 4
    labels = np.stack([to_labels(masks / f"{row.group}.png") for row in report.rows])
    found = np.stack(DemoJudge().labels([read_picture(row.image) for row in report.rows]))
    assert report.figures["miou"].figure.value == pytest.approx(np.mean(list(iou(found, labels).values())))
    assert {"fid", "clip", "identity"} <= set(report.skipped)


def test_without_settings_in_the_images_their_names_and_the_record_tell(data: Path) -> None:
    lines = [{"job": 0, "seed": 1, "settings": {}, "masks": ["a.png"]}]
    lines += [{"image": f"a_{s}.png", "job": 0, "seed": s, "mask": "", "prompt": ""} for s in (1, 2)]
    (data / "out" / RECORD).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    rows = find_rows(data / "out", lambda _: None)
    assert [(row.name, row.seed, row.group) for row in rows] == [("a_1.png", 1, "a"), ("a_2.png", 2, "a")]


def write_table(folder: Path, **columns: list[Any]) -> None:
    names = sorted(path.name for path in folder.glob("*.png"))
    table: dict[str, list[Any]] = {
        "id": names, "image": names, "mask": [f"{name[0]}.png" for name in names], "prompt": ["a man"] * len(names),
        "seed": list(range(len(names))), "settings": ["{}"] * len(names), "hash": [""] * len(names),
        "seconds": [0.5] * len(names), "error": [None] * len(names),
    }  # fmt: skip
    parquet.write_table(pyarrow.table({n: v for n, v in (table | columns).items() if v}), folder / TABLE)


def test_the_table_of_batch_tells_what_images_are_of(data: Path) -> None:
    """Its rows without an image are told of, and names of files mean nothing."""
    for i, path in enumerate(sorted((data / "out").glob("*.png"))):
        path.rename(path.with_name(f"{path.name[0]}{'0123456789abcdef'[i]}.png"))
    names = sorted(path.name for path in (data / "out").glob("*.png"))
    write_table(data / "out", image=[*names[:-1], None], error=[None] * 7 + ["the mask can't be read"])
    said: list[str] = []
    report = measured(data, metrics=["mask", "diversity"], say=said.append, captions=None)
    assert said[0] == "1 of 8 rows have no image; the first one's error is \"the mask can't be read\""
    assert len(report.rows) == 7
    assert [row.mask.stem for row in report.rows if row.mask] == [name[0] for name in names[:-1]]
    assert report.rows[3].seconds == 0.5
    assert report.rows[3].prompt == "a man"


def test_results_are_json_and_a_page_of_its_own(data: Path, judges: Judges) -> None:
    (data / "captions" / "a.txt").write_text("<b>a man</b> & co")
    report = measured(data, judges=judges)
    report.write_json(data / "r.json")
    result = json.loads((data / "r.json").read_text())
    assert result["figures"]["miou"]["value"] == report.figures["miou"].figure.value
    assert len(result["rows"]) == 8
    assert result["rows"][0].keys() >= {"image", "mask", "prompt", "seed", "miou", "accuracy", "clip", "identity"}
    assert result["skipped"].keys() == report.skipped.keys()
    write_page(report, data / "r.html")
    page = (data / "r.html").read_text()
    assert "&lt;b&gt;a man&lt;/b&gt; &amp; co" in page
    assert "<b>" not in page
    assert not re.search(r"<script|(?:src|href)=\"(?!data:)", page)  # all of it is in the one file
    for title in ("Best by mask, mIoU", "Worst by mask, mIoU", "At random", "IoU by class"):
        assert title in page
    best = page.split("Best by")[1].split("Worst by")[0]
    order = [float(value) for value in re.findall(r"mask, mIoU (\d\.\d+)", best)]
    assert len(order) == 4
    assert order == sorted(order, reverse=True)
    assert order[0] == pytest.approx(np.nanmax(report.values["miou"]), abs=1e-3)


def test_rows_of_a_table_may_differ_in_other_options_alone(data: Path) -> None:
    write_table(data / "out", seed=[7] * 8)
    assert {row.seed for row in find_rows(data / "out", lambda _: None)} == {7}


def test_real_images_may_have_one_name_where_no_image_has_it(data: Path) -> None:
    for folder in ("x", "y"):
        write_images(data / "real" / folder, ["1.png"], 5)
    assert measured(data, metrics=["kid"]).figures["kid"].figure.count == 8


def run(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    return done.exit_code, done.stdout, str(done.exception) if done.exception else ""


def test_the_command_prints_a_table_and_writes_files(data: Path) -> None:
    common = (data / "out", "--masks", data / "masks", "--parser", "demo", "--device", "cpu", "--bootstrap", 10)
    files = ("--json", data / "r.json", "--html", data / "r.html")
    code, text, error = run(*common, *files, "--metrics", "mask,faces")
    assert (code, error) == (0, "")
    assert re.search(r"mask, mIoU ↑ +0\.\d{3} +-?0\.\d{3} to 0\.\d{3} +8 +demo", text)
    assert "r.json" in text
    assert "r.html" in text
    assert run(*common, *files)[2].endswith("r.json: exists already; choose another name, or --overwrite")
    assert run(*common, *files, "--overwrite", "--metrics", "faces")[0] == 0
    assert set(json.loads((data / "r.json").read_text())["figures"]) == {"faces"}


def bad_calls(data: Path) -> list[tuple[dict[str, Any], type[MogleError], str]]:
    """Arguments that a person may give by mistake, and what the error says."""
    (data / "empty").mkdir()
    write_masks(data / "others", ["x"])
    write_images(data / "strangers", ["x.png", "y.png"], 3)
    write_images(data / "one", ["a.png"], 3)
    write_masks(data / "twins", ["a"])
    np.save(data / "twins" / "a.npy", np.zeros((4, 4), np.uint8))
    write_images(data / "mixed", ["a_1.png", "b_1.png"], 0)
    write_images(data / "mixed", ["c_1.png"], 0, side=48)
    write_images(data / "same", ["a_1.png"], 0)
    Image.open(data / "same" / "a_1.png").save(data / "same" / "a_1.jpg")
    write_images(data / "damaged", ["a_1.png"], 0)
    (data / "damaged" / "b_1.png").write_bytes(b"no picture")
    write_images(data / "cut", ["a_1.png", "b_1.png"], 0)
    (data / "cut" / "b_1.png").write_bytes((data / "cut" / "b_1.png").read_bytes()[:-30])
    write_images(data / "table", ["a_1.png"], 0)
    write_table(data / "table", prompt=[])
    write_images(data / "table2", ["a_1.png"], 0)
    write_table(data / "table2", image=["z.png"])
    spoiled: list[dict[str, list[Any]]] = [
        {"mask": [7]}, {"seed": [2.5]}, {"image": [str(data / "one" / "a.png")]}, {"image": ["a" * 300]},
    ]  # fmt: skip
    for number, column in enumerate(spoiled):
        write_images(data / f"spoiled{number}", ["a_1.png"], 0)
        write_table(data / f"spoiled{number}", **column)
    write_images(data / "table3", ["a_1.png"], 0)
    (data / "table3" / TABLE).write_bytes(b"PAR1 no table")
    bare: dict[str, Any] = {"against": None, "masks": None, "captions": None}
    return [
        ({"images": data / "absent"}, InputError, "absent: no such folder"),
        ({"images": data / "real" / "a.png"}, InputError, "must be a folder of images"),
        ({"images": data / "empty"}, InputError, "empty: holds no images"),
        ({"images": data / "mixed"}, InputError, r"2 have 32 x 32 pixels, c_1\.png has 48 x 48; evaluate them apart"),
        ({"images": data / "same"}, InputError, r"a_1\.jpg and a_1\.png: two images of one mask, prompt and seed"),
        ({"images": data / "damaged"}, InputError, r"b_1\.png: can't be read as an image"),
        ({"images": data / "cut", **bare}, InputError, r"b_1\.png: can't be read"),
        ({"images": data / "table"}, InputError, r"results\.parquet: has no column prompt"),
        ({"images": data / "spoiled0"}, InputError, r"results\.parquet: row 1\.mask must be a text, got 7"),
        ({"images": data / "spoiled1"}, InputError, r"results\.parquet: row 1\.seed must be a whole number"),
        ({"images": data / "spoiled2"}, InputError, r"names the image '.*, which isn't there"),
        ({"images": data / "spoiled3"}, InputError, r"names the image 'a{70,}…, which isn't there"),
        ({"images": data / "table2"}, InputError, r"names the image 'z\.png', which isn't there"),
        ({"images": data / "table3"}, InputError, "can't be read as Parquet"),
        ({"masks": data / "absent"}, InputError, "absent: no such folder of masks"),
        ({"masks": data / "empty"}, InputError, "a folder without masks"),
        (
            {"masks": data / "others"},
            InputError,
            r"holds no mask of any image; that of a_1\.png must be named a_1 or a",
        ),
        (
            {"masks": data / "twins"},
            InputError,
            r"a\.npy and \S+a\.png: two files of the name that belongs to a_1\.png",
        ),
        ({"captions": data / "absent"}, InputError, "no such folder of captions"),
        (
            {"captions": data / "empty"},
            InputError,
            "holds no caption of any image",
        ),
        ({"caption": 3}, InputError, "has 2 captions; give a number from 1 to 2"),
        ({"against": data / "absent"}, InputError, "absent: no such folder of images"),
        ({"against": data / "empty"}, InputError, "empty: holds no images"),
        ({"against": data / "out"}, InputError, "is the folder of the images themselves"),
        ({"metrics": ["beauty"]}, InputError, f"metrics are {', '.join(METRICS)}, got 'beauty'"),
        ({"metrics": []}, InputError, "no metric was given"),
        (
            {"metrics": ["fid"], "against": None},
            InputError,
            "fid needs real images; give a folder of them with --against",
        ),
        ({"metrics": ["fid"], "against": data / "one"}, InputError, "needs at least two images to compare with, got 1"),
        (
            {"metrics": ["identity"], "against": data / "strangers"},
            InputError,
            "that of a_1.png must be named a_1 or a",
        ),
        ({"metrics": ["mask"], "masks": None}, InputError, "give a folder of them with --masks"),
        ({"metrics": ["clip"], "captions": None}, InputError, "clip needs prompts"),
        ({"metrics": ["clip"]}, CheckpointError, "hf download openai/clip-vit-large-patch14-336"),
        ({"metrics": ["mask"], "judges": Judges()}, CheckpointError, "hf download jonathandinu/face-parsing"),
        ({"metrics": ["reward"]}, InputError, "reward needs the package image-reward"),
        ({"metrics": ["colours"], "judges": Judges(parser="owner/other")}, CheckpointError, "--parser owner/other"),
        ({"images": data / "one", "metrics": ["diversity"]}, InputError, "diversity needs several images of one mask"),
        ({"batch_size": 0}, InputError, "must be 1 or more, got 0"),
        ({"bootstrap": 1}, InputError, "bootstrap must be 0"),
        ({"mask_order": "mine"}, InputError, "order must be celebamask"),
        ({"device": "tpu"}, MogleError, "device must be cpu"),
        ({"judges": Judges(parser=str(data / "absent"))}, CheckpointError, "no such folder; give a folder of a model"),
        ({"judges": Judges(features=str(data / "no.pth"))}, CheckpointError, r"no\.pth: no such file"),
        ({"judges": Judges(features="o/n"), "metrics": ["diversity"]}, CheckpointError, "--features o/n: is not in"),
        ({**bare, "judges": Judges()}, InputError, "nothing could be measured; fid: fid needs"),
    ]


def test_each_mistake_has_one_line(data: Path) -> None:
    for arguments, kind, message in bad_calls(data):
        options: dict[str, Any] = {
            "images": data / "out", "against": data / "real", "masks": data / "masks", "captions": data / "captions",
            "judges": DEMO, "device": "cpu", "bootstrap": 0,
        } | arguments  # fmt: skip
        with pytest.raises(kind, match=message) as caught:
            evaluate(options.pop("images"), **options)
        assert "\n" not in str(caught.value), arguments


def test_mistakes_on_the_command_line_are_told_before_anything_is_measured(data: Path) -> None:
    (data / "map.json").write_text("[1]")
    for arguments, kind in (
        ((data / "absent",), InputError),
        ((data / "out", "--json", data / "masks" / "a.png" / "r.json"), OutputError),
        ((data / "out", "--seed", -1), InputError),
        ((data / "out", "--parser-classes", data / "map.json"), MogleError),
        ((data / "out", "--parser-classes", data / "absent.json"), MogleError),
    ):
        done = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
        assert isinstance(done.exception, kind), arguments
        assert done.stdout == ""


def test_images_of_one_mask_prompt_and_seed_are_told_by_their_settings(tmp_path: Path) -> None:
    """Two files of other names that say the same of themselves: one job was drawn twice, with other steps perhaps."""
    picture, labels = Image.new("RGB", (32, 32)), np.zeros((32, 32), np.uint8)
    settings = {"prompt": "a man", "seed": 3, "mask": "m.png", MASK: mask_text(labels), "software": "mogle_rt"}
    for name in ("x.png", "y.png"):
        save_image(picture, tmp_path / name, settings | {"steps": 1 if name == "x.png" else 2})
    with pytest.raises(InputError, match=r"x\.png and y\.png: two images of one mask, prompt and seed"):
        find_rows(tmp_path, lambda _: None)


def test_the_judge_of_the_demo_is_taken_for_its_own_images_alone(tmp_path: Path) -> None:
    settings = {"prompt": "a man with red hair", "seed": 3, "mask": None, "software": "mogle_rt"}
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3)).astype(np.uint8))
    for bundle, judge in ((Bundle("demo").content_hash, "demo"), ("0" * 64, None)):
        save_image(picture, tmp_path / "x.png", settings | {"bundle_sha256": bundle})
        if judge:
            report = evaluate(tmp_path, device="cpu", bootstrap=0)
            assert report.figures["faces"].judge == judge
            assert report.rows[0].group == "prompt: a man with red hair"
        else:
            with pytest.raises(InputError, match="nothing could be measured"):
                evaluate(tmp_path, device="cpu", bootstrap=0)


def test_features_are_seen_once_for_fid_and_kid(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    features = DemoJudge.features

    def counted(self: DemoJudge, pictures: list[Any]) -> torch.Tensor:
        seen.append(len(pictures))
        return features(self, pictures)

    monkeypatch.setattr(DemoJudge, "features", counted)
    measured(data, metrics=["fid", "kid"])
    assert sum(seen) == 8 + 4
