"""Jobs of many images on the command line: going on after an interrupt, several processes at one job, contact sheets,
and masks as a shell's patterns give them."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mogle_rt.apps import drawing as app
from mogle_rt.apps.several_values import repeated
from mogle_rt.jobs.record import NAME
from tests.apps.test_cli import QUICK, draw_mask, images_in, one_thread, pixels, run, seed_of

TAKES = {"-m", "--mask", "-o", "--steps"}


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("demo -m a b c -o x", "demo -m a -m b -m c -o x"),
        ("demo --mask a b --steps 3", "demo --mask a -m b --steps 3"),
        ("-m a b demo", "-m a -m b demo"),  # the last one is the bundle, if no other word can be it
        ("-o x -m a demo", "-o x -m a demo"),
        ("-m a b -o x demo", "-m a -m b -o x demo"),
        ("demo -m a b -m c d", "demo -m a -m b -m c -m d"),
        ("demo -m a --overwrite b", "demo -m a --overwrite b"),  # click then says that b is one argument too many
        ("demo -m a -- b", "demo -m a -- b"),
        ("demo -m", "demo -m"),
    ],
)
def test_a_shells_pattern_after_an_option(typed: str, read: str) -> None:
    assert repeated(typed.split(), ("-m", "--mask"), TAKES) == read.split()


def masks_in(folder: Path, count: int) -> list[Path]:
    return [draw_mask(folder / f"{i}.png", seed=i) for i in range(count)]


def test_masks_and_sheet(tiny_bundle: Path, tmp_path: Path) -> None:
    masks, sheet = masks_in(tmp_path / "masks", 2), tmp_path / "sheet.jpg"
    arguments = ("generate", tiny_bundle, "-m", *masks, "-o", tmp_path / "out/{stem}.jpg", "--sheet", sheet, *QUICK)
    with one_thread():
        result = run(*arguments)
        assert result.code == 0, result.err
        assert result.out.splitlines() == [str(tmp_path / "out" / f"{i}.jpg") for i in range(2)] + [str(sheet)]
        assert sheet.stat().st_size > 1000
        again = run(*arguments[: -len(QUICK)], *QUICK, "-o", tmp_path / "other")
        assert again.err == f"error: {sheet}: exists already; choose another name, --overwrite or --skip-existing\n"
        sheet.unlink()
        assert run(*arguments, "--skip-existing").err == "nothing to draw: all images are there already\n"
        assert sheet.exists()  # of images that were there already


def test_a_job_goes_on_without_its_seed(tiny_bundle: Path, tmp_path: Path) -> None:
    masks_in(tmp_path / "masks", 3)
    output = tmp_path / "out"
    arguments = ("generate", tiny_bundle, "-m", tmp_path / "masks", "-o", output, *QUICK)
    with one_thread():
        assert run(*arguments).code == 0
        whole = {path.name: pixels(path) for path in images_in(output)}
        images_in(output)[1].unlink()
        result = run(*arguments, "--skip-existing")
        assert result.code == 0, result.err
        assert {path.name: pixels(path) for path in images_in(output)} == whole
        draw_mask(tmp_path / "masks" / "0a.png", seed=9)  # a further one, which comes between the others
        assert run(*arguments, "--skip-existing").out.count("\n") == 1
        assert whole.items() < {path.name: pixels(path) for path in images_in(output)}.items()
        (added,) = set(images_in(output)) - {output / name for name in whole}
        assert seed_of(added) == max(seed_of(output / name) for name in whole) + 1

        images_in(output)[0].unlink()
        for change, message in (
            (("--steps", 3), "with steps 2, asked for is 3"),
            (("--guidance", 2), "with guidance 3.5, asked for is 2.0"),
            (("--model-config", '{"add_cond_attn": true}'), "with model_config"),
            (("-p", "a hat"), "was drawn for another prompt"),
        ):
            result = run(*arguments, "--skip-existing", *change)
            assert result.code == 1
            assert message in result.err
        draw_mask(tmp_path / "masks" / "2.png", seed=10)
        assert "2.png has changed since" in run(*arguments, "--skip-existing").err
        assert len(images_in(output)) == 3


def test_images_without_a_record_stay_and_are_told(tiny_bundle: Path, tmp_path: Path) -> None:
    masks_in(tmp_path / "masks", 2)
    arguments = ("generate", tiny_bundle, "-m", tmp_path / "masks", "-o", tmp_path / "out", "--seed", 1, *QUICK)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "0_1.png").write_text("of an earlier version")
    with one_thread():
        result = run(*arguments, "--skip-existing")
    assert result.err.startswith("of 1 images that are there no record tells what they were drawn from; they stay")
    assert (tmp_path / "out" / "0_1.png").read_text() == "of an earlier version"
    assert (tmp_path / "out" / "1_2.png").exists()


def test_one_image_leaves_no_record(tiny_bundle: Path, tmp_path: Path) -> None:
    with one_thread():
        assert run("generate", tiny_bundle, "-o", tmp_path / "out", *QUICK).code == 0
    assert not (tmp_path / "out" / NAME).exists()


def test_a_failure_before_the_first_image_leaves_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    masks_in(tmp_path / "masks", 2)
    bundle = tmp_path / "bundle.safetensors"
    shutil.copyfile(tiny_bundle, bundle)
    with bundle.open("r+b") as file:
        file.truncate(bundle.stat().st_size - 1)
    result = run("generate", bundle, "-m", tmp_path / "masks", "-o", tmp_path / "out", *QUICK)
    assert result.code == 1
    assert "cut short" in result.err
    assert not (tmp_path / "out").exists()


def test_an_interrupt_tells_how_to_go_on(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    masks_in(tmp_path / "masks", 2)
    arguments = ("generate", tiny_bundle, "-m", tmp_path / "masks", "-o", tmp_path / "out", *QUICK)
    draw = app._draw
    drawn: list[None] = []

    def interrupted(*given: object) -> None:
        if drawn:
            raise KeyboardInterrupt
        drawn.append(draw(*given))  # type: ignore[arg-type]

    monkeypatch.setattr(app, "_draw", interrupted)
    with one_thread():
        result = run(*arguments)
        assert result.code != 0
        assert "stopped; the same command with --skip-existing goes on\n" in result.err
        monkeypatch.setattr(app, "_draw", draw)
        assert run(*arguments, "--skip-existing").code == 0
    first, second = images_in(tmp_path / "out")
    assert seed_of(second) == seed_of(first) + 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_counts_all_images(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    masks_in(tmp_path / "masks", 3)
    shown = Terminal()
    monkeypatch.setattr("contextlib.redirect_stderr", lambda _: _replaced(monkeypatch, shown))
    with one_thread():
        run("generate", tiny_bundle, "-m", tmp_path / "masks", "-o", tmp_path / "out", *QUICK)
    assert re.search(r"images: 100%\S* *\|[^|]*\| 3/3 \[\d\d:\d\d<00:00", shown.getvalue())


class _replaced:  # noqa: N801
    """Standard error of a terminal."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> None:
        self.stream, self.before = stream, sys.stderr

    def __enter__(self) -> None:
        sys.stderr = self.stream

    def __exit__(self, *_: object) -> None:
        sys.stderr = self.before


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mogle_rt", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("how", ["shards", "alike"])
def test_two_processes_share_a_job(how: str, tiny_bundle: Path, tmp_path: Path) -> None:
    """Two processes start at once, without a seed. They draw the images of one job, and each image is drawn once."""
    masks_in(tmp_path / "masks", 8)
    arguments = ("generate", tiny_bundle, "-m", tmp_path / "masks", "-o", tmp_path / "out", *QUICK)
    options = [("--shard", "1/2"), ("--shard", "2/2")] if how == "shards" else [("--skip-existing",)] * 2
    processes = [start(*arguments, *option) for option in options]
    ended = [(*process.communicate(timeout=200), process.returncode) for process in processes]
    assert [code for *_, code in ended] == [0, 0], ended
    drawn = [out.split() for out, *_ in ended]
    assert sorted(drawn[0] + drawn[1]) == sorted(str(path) for path in images_in(tmp_path / "out"))
    assert {int(Path(path).stem.split("_")[0]) for path in drawn[0] + drawn[1]} == set(range(8))
    seeds = sorted(seed_of(path) for path in images_in(tmp_path / "out"))
    assert seeds == list(range(seeds[0], seeds[0] + 8))
