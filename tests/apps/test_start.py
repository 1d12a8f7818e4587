"""The first seconds of the program: what is said before the libraries are loaded, and what is not loaded at all."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.apps.test_cli import draw_mask, run_process

HEAVY = ("torch", "diffusers", "transformers")

# The command runs in this process; afterwards the heavy libraries that were imported are printed, and the exit code.
PROBE = f"""
import sys
from mogle_rt.apps import cli
try:
    cli.main()
except SystemExit as error:
    print([name for name in {HEAVY!r} if name in sys.modules], error.code)
"""


def probe(*args: object) -> str:
    """What a command imported of the heavy libraries, and its exit code."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *map(str, args)], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.splitlines()[-1]


def test_help_and_examples_load_nothing_heavy() -> None:
    for args in (("--help",), ("generate", "--help"), ("export", "--help"), ("examples",)):
        assert probe(*args) == "[] 0", args


def test_mistakes_are_told_before_anything_heavy_is_loaded(tmp_path: Path) -> None:
    mask = draw_mask(tmp_path / "mask.png")
    (tmp_path / "file").write_text("")
    good = ("generate", "demo", "-m", mask, "-o", tmp_path / "x.png")
    for args in (
        ("generate", "demo", "-m", tmp_path / "absent.png", "-o", tmp_path / "x.png"),
        ("generate", tmp_path / "absent.safetensors", "-o", tmp_path / "x.png"),
        ("generate", "demo", "-m", mask, "-o", tmp_path / "file" / "x.png"),
        ("generate", "demo", "-m", mask, "-o", mask),
        (*good, "--steps", 0),
        (*good, "--height", 100),
        (*good, "--guidance", -1),
        (*good, "--seed", -1),
        (*good, "--dtype", "int8"),
        (*good, "--format", "gif"),
        (*good, "--model-config", '{"latent_loro": true}'),
    ):
        assert probe(*args) == "[] 1", args


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal of its own")
def test_a_terminal_shows_at_once_that_it_loads(tmp_path: Path) -> None:
    """The first thing on the terminal is the line about loading, before any library could be loaded."""
    reader, writer = os.openpty()
    options = ["generate", "demo", "-o", str(tmp_path / "x.png"), "--steps", "1"]
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "mogle_rt",
        *options,
    ]  # a line for each import, when it is done
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=writer, env=os.environ | {"TERM": "xterm"})
    os.close(writer)
    imported = re.compile(rb"\| +torch\r\n")
    try:
        shown = b""
        while not imported.search(shown) and (part := os.read(reader, 4096)):
            shown += part
        assert b"loading demo" in imported.split(shown)[0]
    finally:
        process.kill()
        process.communicate()
        os.close(reader)


def test_the_program_leaves_out_what_it_never_uses(tmp_path: Path) -> None:
    """PyTorch's compiler, peft and the like are not imported for an image; and the image is the one of ordinary imports."""
    code = (
        "import sys\n"
        "from mogle_rt.apps import cli, quick_imports\n"
        "if sys.argv.pop(1) == 'ordinary': quick_imports.import_models = lambda: None\n"
        "try: cli.main()\n"
        "except SystemExit as error: assert error.code == 0\n"
        "print(sorted({'torch._dynamo', 'peft', 'accelerate', 'torch.distributed.fsdp'} & set(sys.modules)))\n"
        "import torch, torch._dynamo, accelerate\n"  # what was hidden can be imported afterwards
        "assert torch.distributed.is_available() and torch._dynamo.convert_frame\n"
    )
    made = {}
    for way in ("quick", "ordinary"):
        path = tmp_path / f"{way}.png"
        args = ("generate", "demo", "-p", "a woman", "-o", path, "--seed", "1", "--steps", "1")
        done = subprocess.run(
            [sys.executable, "-c", code, way, *map(str, args)], capture_output=True, text=True, check=False, timeout=200
        )
        assert done.returncode == 0, done.stderr
        made[way] = path.read_bytes(), done.stdout.splitlines()[-1]
    assert made["quick"][0] == made["ordinary"][0]
    assert made["quick"][1] == "[]"


def test_the_time_told_is_the_time_waited(tmp_path: Path) -> None:
    """The total is the wall time from the first check to the last file, of which loading is a part."""
    result = run_process("generate", "demo", "-o", tmp_path / "x.png", "--steps", "1", "--seed", "1")
    total, parts = result.err.split(" s (seed 1): ")
    stages = {name: float(value) for name, value, _ in (part.split() for part in parts.strip().split(", "))}
    assert float(total.removeprefix("1 image in ")) >= sum(stages.values()) - 0.05
    assert stages["load"] > 0.5  # the libraries are a part of it
