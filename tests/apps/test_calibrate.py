"""``mogle-rt calibrate``: killed and gone on with, what it stores, wrong inputs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mogle_rt import FastConfig, Pipeline
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.fast.choice import read_stored, stored_path
from mogle_rt.quality.calibration import drawing
from mogle_rt.quality.calibration.results import NAME
from tests.apps.test_cli import QUICK, Result, draw_mask, one_thread, pixels, run

NAMES = ("steps_mask=1001,order=0", "steps_mask=1001,refresh_every=2", "max_change=100.0")
WAYS = [word for name in NAMES for word in ("--way", name)]


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(tiny_bundle, tmp_path / "own.safetensors"))


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    for i in range(2):
        draw_mask(tmp_path / "masks" / f"{i}.png", seed=i).with_suffix(".txt").write_text(f"face {i}")
    return tmp_path / "masks"


def drawn_in(folder: Path) -> dict[Path, bytes]:
    return {path: pixels(path) for path in sorted((folder / "images").glob("*/*.png"))}


def calibrate(bundle: Path, masks: Path, *others: object) -> Result:
    with one_thread():
        return run("calibrate", bundle, "--masks", masks, *QUICK, "--steps", 4, *WAYS, *others)


def test_killed_gone_on_with_stored_and_found(bundle: Path, masks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bundle.with_suffix(".calibration")
    add = drawing.Calibration._add
    done: list[object] = []

    def interrupted(self: drawing.Calibration, *given: Any) -> None:
        if len(done) == 5:  # five images of the first mask
            raise KeyboardInterrupt
        done.append(given)
        add(self, *given)

    monkeypatch.setattr(drawing.Calibration, "_add", interrupted)
    result = calibrate(bundle, masks)
    assert result.code != 0
    assert result.err.endswith("stopped; the same command goes on\n")
    assert not stored_path(bundle).exists()
    first = drawn_in(folder)
    assert len(first) == 5
    with (folder / NAME).open("a") as file:
        file.write('{"case": "a line that was not fini')

    monkeypatch.setattr(drawing.Calibration, "_add", add)
    result = calibrate(bundle, masks, "--max-drift", "balanced:psnr=0,worst=0")
    assert result.code == 0, result.err
    assert "2 cases, 4 ways and exact: 12 steps to compute" in result.err  # all of the second mask
    more = "2 cases, 5 ways and exact, now with fewer steps beside all of them: 14 steps to compute"
    assert more in result.err  # as many as max_change turned out to compute
    paths = [folder / "table.md", folder / "table.json", folder / "sheet.png", stored_path(bundle)]
    assert result.out.splitlines()[-4:] == [str(path) for path in paths]
    drawn = drawn_in(folder)
    assert len(drawn) == 12
    assert first.items() < drawn.items()

    table = json.loads((folder / "table.json").read_text())
    assert [way["name"] for way in table["ways"]] == ["exact", "3 steps", NAMES[2], "2 steps", *NAMES[:2]]
    assert [way["computed"] for way in table["ways"]] == [4, 3, 3, 2, 2, 2]
    assert table["ways"][0]["psnr"] == 120
    assert all(way["psnr"] < 100 and way["latents"] > 0 for way in table["ways"][1:])
    assert table["about"]["cases"] == 2
    stored = read_stored(Bundle(bundle))
    assert {name: FastConfig.from_mapping(way) for name, way in table["chosen"].items()} == stored
    again = calibrate(bundle, masks, "--max-drift", "balanced:psnr=0,worst=0")
    assert again.err == "nothing to draw: all images are there already\n"
    assert again.out == result.out


def test_what_is_stored_is_what_is_drawn_with(bundle: Path, masks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds that only fewer steps can meet, as everything else is left out; and bounds that nothing meets."""
    add = drawing.Calibration._add

    def timed(self: drawing.Calibration, case: Any, labels: Any, way: Any, image: Any, beside: float) -> None:
        add(
            self, case, labels, way, dataclasses.replace(image, seconds=float(image.computed)), 3.0
        )  # a step takes a second

    monkeypatch.setattr(drawing.Calibration, "_add", timed)
    bounds = ("--max-drift", "balanced:psnr=0,worst=0", "--max-drift", "fast:psnr=119,worst=119")
    with one_thread():
        arguments = ("--masks", masks, *QUICK, "--steps", 3, "--way", "most_steps=1", "--limit", 1)
        result = run("calibrate", bundle, *arguments, *bounds, "--text-only", "--condition-scale", 0.5)
    assert result.code == 0, result.err
    assert "1 of 2 masks are drawn; --limit N draws more" in result.err
    assert read_stored(Bundle(bundle)) == {"balanced": FastConfig(most_steps=1), "fast": FastConfig()}
    out = bundle.parent / "face.png"
    with one_thread():
        common = ("-m", masks / "0.png", "--seed", 3, *QUICK, "--steps", 3)
        for options, name in ((("--fast", "balanced"), "a"), (("--fast", "fast"), "b"), ((), "c")):
            assert run("generate", bundle, *common, *options, "-o", out.with_stem(name)).code == 0
        assert run("generate", bundle, *common[:-2], "--steps", 1, "-o", out.with_stem("d")).code == 0
    a, b, c, d = (pixels(out.with_stem(name)) for name in "abcd")
    assert a == d
    assert b == c
    assert a != c
    pipe = Pipeline(bundle, fast="balanced")
    assert pipe.fast == FastConfig(most_steps=1)


def test_other_settings_are_not_mixed(bundle: Path, masks: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with one_thread():
        arguments = ("calibrate", bundle, "-m", masks, *QUICK, "--way", "most_steps=1", "--limit", 1, "-o", out)
        result = run(*arguments)
        assert result.code == 0, result.err
        assert result.out.splitlines()[-1] == str(out / "own.fast.json")
        assert result.err.endswith("put it there, or give the settings themselves\n")
        assert not stored_path(bundle).exists()
        other = run(*arguments, "--guidance", 2)
    assert other.code == 1
    assert other.err.endswith(
        f"error: {out}: was calibrated with guidance 3.5, asked for is 2.0; give the same settings to go on, or another "
        "folder with -o\n"
    )
    (out / NAME).write_text('{"kind": "of another program"}\n')
    with one_thread():
        other = run(*arguments)
    assert other.err.endswith(f"error: {out / NAME}: line 1 is not of a calibration; remove the file, or choose another "
                              "folder with -o\n")  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--limit", 0), "--limit must be 1 or more, got 0"),
        (("--seed", -1), "--seed must be from 0 to 4611686018427387904, got -1"),
        (("--max-drift", "psnr=3"), "--max-drift must be balanced or fast with bounds, such as "
         "'balanced:psnr=35,worst=30', got 'psnr=3'"),
        (("--way", "quick"), "fast must be settings such as 'steps_mask=fast,order=1', got 'quick'"),
        (("--steps", 1), "with 1 steps there is nothing to leave out; give more with --steps"),
        (("--masks", "nowhere.png"), "nowhere.png: no such file"),
    ],
)  # fmt: skip
def test_wrong_inputs_are_one_line(options: tuple[object, ...], message: str, bundle: Path, masks: Path) -> None:
    result = run("calibrate", bundle, "-m", masks, "--device", "cpu", *options)
    assert (result.code, result.err) == (1, f"error: {message}\n")
    assert {path.name for path in bundle.parent.iterdir()} == {"own.safetensors", "masks"}


def test_where_results_can_not_go(bundle: Path, masks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package stays as it is; a folder that can't be written to is told at once."""
    demo = run("calibrate", "demo", "-m", masks)
    assert demo.err == (
        "error: demo lies inside the package, which stays as it is; give a folder for the results with -o\n"
    )
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != bundle.parent)
    result = run("calibrate", bundle, "-m", masks)
    assert result.code == 1
    assert result.err.startswith(f"error: {bundle.parent / 'own.calibration'}")
    assert result.err.endswith(f"no permission in {bundle.parent}; give another folder for the results with -o\n")
    file = tmp_path / "masks" / "0.txt"
    assert run("calibrate", bundle, "-m", masks, "-o", file).err == (
        f"error: {file}: is a file; give another folder for the results with -o\n"
    )
