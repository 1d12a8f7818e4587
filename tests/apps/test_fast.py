"""``--fast`` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mogle_rt.bundle.bundle import Bundle
from mogle_rt.fast.choice import write_stored
from mogle_rt.fast.settings import FastConfig
from tests.apps.test_cli import QUICK, draw_mask, images_in, one_thread, pixels, run

pytestmark = pytest.mark.quick


def test_what_is_left_out_is_written_into_the_image(tiny_bundle: Path, tmp_path: Path) -> None:
    """And images of other settings are not taken for those of this job."""
    mask, out = draw_mask(tmp_path / "mask.png"), tmp_path / "out"
    arguments = ("generate", tiny_bundle, "-m", mask, "-n", 2, *QUICK, "--seed", 1, "--steps", 4, "-o")
    with one_thread():
        fast = run(*arguments, out, "--fast", "steps_mask=1001,order=0")
        assert fast.code == 0, fast.err
        exact = run(*arguments, tmp_path / "exact")
        assert exact.code == 0, exact.err
    first, plain = images_in(out)[0], images_in(tmp_path / "exact")[0]
    assert b'"fast": "steps_mask=1001,order=0"' in first.read_bytes()
    assert b'"fast"' not in plain.read_bytes()
    assert pixels(first) != pixels(plain)
    with one_thread():
        again = run(*arguments, out, "--skip-existing")
    assert again.code == 1
    assert "fast" in again.err
    with one_thread():
        again = run(*arguments, out, "--skip-existing", "--fast", "steps_mask=1001,order=0")
    assert again.err == "nothing to draw: all images are there already\n"


@pytest.mark.parametrize("command", ["generate", "serve"])
def test_wrong_names_are_one_line(command: str, tiny_bundle: Path, tmp_path: Path) -> None:
    result = run(command, tiny_bundle, "--fast", "quick")
    assert result.code == 1
    assert result.err == (
        "error: fast must be 'balanced', 'fast' or settings such as 'steps_mask=fast,order=1', got 'quick'\n"
    )


def test_a_file_of_another_bundle_is_one_line(tiny_bundle: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.safetensors"
    own.symlink_to(tiny_bundle)
    path = write_stored(Bundle(own), {"fast": FastConfig(steps_mask="10")})
    path.write_text(path.read_text().replace(Bundle(own).content_hash, "0" * 64))
    result = run("generate", own, *QUICK, "--fast", "fast", "-o", tmp_path / "out.png")
    assert result.code == 1
    assert result.err.startswith(f"error: {path}: was measured for another bundle than own.safetensors; run")
    assert not (tmp_path / "out.png").exists()


def test_cost_counts_what_is_left(tiny_bundle: Path) -> None:
    """And without weights; a run whose steps aren't known beforehand can't be counted."""
    whole, fast = (
        json.loads(run("cost", tiny_bundle, "--json", "--steps", 8, *options).out)["cost"]["mogle_rt"]
        for options in ((), ("--fast", "steps_mask=11101001,refresh_every=2"))
    )
    assert {kind: of["steps"] for kind, of in fast["course"].items()} == {"whole": 3, "kept": 2, "reused": 3}
    steps = sum(of["steps"] * of["flops"] for of in fast["course"].values())
    assert 3 < steps / whole["step"]["flops"] < 5
    assert fast["flops"] - whole["flops"] == steps - 8 * whole["step"]["flops"]
    assert "course" not in whole
    shown = run("cost", tiny_bundle, "--steps", 8, "--fast", "steps_mask=11101001,refresh_every=2").out
    for line in ("3 whole steps", "2 steps of text and image", "3 steps left out"):
        assert line in shown
    assert run("cost", tiny_bundle, "--fast", "max_change=0.1").err == (
        "error: with max_change the velocities decide which steps are computed: give a steps_mask to count\n"
    )
