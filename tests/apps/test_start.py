"""The first seconds of the program: what it prints before it loads large libraries, and what it doesn't load at all."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mogle_rt.start import quick_imports
from tests.apps.test_cli import QUICK, draw_mask, one_thread, run

HEAVY = ("torch", "diffusers", "transformers", "triton", "scipy", "onnxruntime", "ray")

# Runs commands one after the other in one process. After each it prints which large libraries have been imported so far,
# and the command's exit code.
PROBE = f"""
import json, sys
from mogle_rt.apps import cli
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    try:
        cli.main()
    except SystemExit as error:
        print([name for name in {HEAVY!r} if name in sys.modules], error.code, file=sys.stderr)
"""


def probe(*commands: tuple[object, ...]) -> list[str]:
    """For each command, the large libraries that were imported when it ended, and its exit code."""
    given = json.dumps([list(map(str, command)) for command in commands])
    done = subprocess.run([sys.executable, "-c", PROBE, given], capture_output=True, text=True, check=True, timeout=120)
    return [line for line in done.stderr.splitlines() if line.startswith("[")]


def test_help_examples_and_info_load_nothing_heavy() -> None:
    commands = (("--help",), ("generate", "--help"), ("export", "--help"), ("examples",), ("info", "demo"))
    assert probe(*commands) == ["[] 0"] * len(commands)


def test_mistakes_are_told_before_anything_heavy_is_loaded(tmp_path: Path) -> None:
    mask = draw_mask(tmp_path / "mask.png")
    (tmp_path / "file").write_text("")
    good = ("generate", "demo", "-m", mask, "-o", tmp_path / "x.png")
    convert = ("convert", "--lora", "owner/name", "--mogle", "owner/name", "-o", tmp_path / "b.safetensors")
    commands: tuple[tuple[object, ...], ...] = (
        ("generate", "demo", "-m", tmp_path / "absent.png", "-o", tmp_path / "x.png"),
        ("generate", tmp_path / "absent.safetensors", "-o", tmp_path / "x.png"),
        ("info", tmp_path / "absent.safetensors"),
        ("generate", "demo", "--embeds", tmp_path / "absent.safetensors", "-o", tmp_path / "x.png"),
        ("embed", "demo", "a face", "-o", tmp_path / "file" / "p.safetensors"),
        ("generate", "demo", "-m", mask, "-o", tmp_path / "file" / "x.png"),
        ("generate", "demo", "-m", mask, "-o", mask),
        (*good, "--steps", 0),
        (*good, "--height", 100),
        (*good, "--guidance", -1),
        (*good, "--seed", -1),
        (*good, "--dtype", "int8"),
        (*good, "--format", "gif"),
        (*good, "--device", "gpu"),
        (*good, "--kernels", "cuda"),
        (*good, "--engine", "onnx"),
        (*good, "--shard", "3/2"),
        (*good, "--sheet", tmp_path / "file" / "sheet.png"),
        (*good, "--overwrite", "--skip-existing"),
        (*good, "--model-config", '{"latent_loro": true}'),
        ("cost", tmp_path / "absent.safetensors"),
        ("cost", "--flux-dev", "--dtype", "int8"),
        ("cost", "--flux-dev", "--gpu", "RTX 1"),
        (*convert, "--flux", tmp_path / "absent"),
        (*convert, "--flux", mask),
        (*convert, "--flux", tmp_path),
        (*convert, "--flux", "owner/name", "--dtype", "int8"),
        (*convert, "--flux", "owner/name", "--weights", "int2"),
        (*convert, "--flux", "owner/name", "--transformer", tmp_path / "absent.gguf"),
        ("convert", "--released", "-o", tmp_path / "file" / "b.safetensors"),
        ("quantize", tmp_path / "absent.safetensors", "-o", tmp_path / "b.safetensors", "--weights", "int8"),
        ("quantize", "demo", "-o", tmp_path / "b.safetensors", "--weights", "int2"),
    )
    assert probe(*commands) == ["[] 1"] * len(commands)


def test_cost_counts_without_the_compiler() -> None:
    """It imports only PyTorch and what counts as the engine's modules, and gives what ordinary imports give."""
    code = (
        "import sys; from mogle_rt.apps import cli\n"
        "try: cli.main()\n"
        "except SystemExit as error: assert error.code == 0\n"
        "unused = {'torch._dynamo', 'torch._inductor', 'peft', 'accelerate', 'scipy', 'sklearn', 'tokenizers',\n"
        "          'transformers.modeling_utils', 'transformers.models.clip', 'transformers.models.t5', 'onnxruntime'}\n"
        "print(sorted(unused & set(sys.modules)), file=sys.stderr)\n"
        "import torch._dynamo\n"  # for whoever compiles afterwards, it is the real one
        "assert torch._dynamo.convert_frame\n"
    )
    arguments = ("cost", "demo", "--json", "--gpu", "RTX 4090")
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "[]\n"
    assert json.loads(done.stdout) == json.loads(run(*arguments).out)


def test_a_compiler_that_is_there_stays() -> None:
    """Within it and afterwards, for whoever has imported it before."""
    import torch._dynamo

    compiler = torch._dynamo
    with quick_imports.without_compiler(torch):
        assert sys.modules["torch._dynamo"] is compiler
    assert sys.modules["torch._dynamo"] is torch._dynamo is compiler


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal of its own")
def test_a_terminal_shows_at_once_that_it_loads(tmp_path: Path) -> None:
    """The line about loading is the first output on the terminal, and comes before any large library is imported."""
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


def test_an_image_without_a_terminal(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """stdout has a path, and stderr one line of times: no bars, and no warnings or notes of libraries.

    PyTorch's compiler, peft and others are not imported for it. The image equals the one that this process draws, which
    has imported everything in the ordinary way.
    """
    code = (
        "import sys\n"
        "from mogle_rt.apps import cli\n"
        "try: cli.main()\n"
        "except SystemExit as error: assert error.code == 0\n"
        "unused = {'torch._dynamo', 'peft', 'accelerate', 'torch.distributed.fsdp', 'sympy', 'gguf', 'jinja2',\n"
        "          'transformers.models.bert', 'diffusers.models.transformers.transformer_flux'}\n"
        "print(sorted(unused & set(sys.modules)))\n"
        "import torch, torch._dynamo, accelerate\n"  # what was hidden can be imported afterwards
        "assert torch.distributed.is_available() and torch._dynamo.convert_frame\n"
        "import diffusers, transformers\n"  # what was left out is there for whoever asks for it
        "from transformers import AutoImageProcessor, BertConfig\n"
        "from torch.fx.experimental.symbolic_shapes import ShapeEnv, guard_or_false\n"
        "assert BertConfig().hidden_size == 768 and 'AutoImageProcessor' in repr(AutoImageProcessor)\n"
        "assert diffusers.AutoencoderTiny and diffusers.models.autoencoders.AutoencoderKLWan\n"
        "assert diffusers.FluxTransformer2DModel and guard_or_false(ShapeEnv().create_unbacked_symint() == 3) is False\n"
    )
    mask = draw_mask(tmp_path / "mask.png")
    args = ("generate", str(tiny_bundle), "-m", str(mask), "-p", "a face", "--seed", "1", *QUICK, "-o")
    quick, ordinary = tmp_path / "quick.png", tmp_path / "ordinary.png"
    done = subprocess.run(
        [sys.executable, "-c", code, *args, str(quick)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{quick}\n[]\n"
    assert re.fullmatch(r"1 image in .* \(seed 1\): load .* s\n", done.stderr)
    # The total is the wall time from the first check to the last file, of which loading is a part.
    total, parts = done.stderr.split(" s (seed 1): ")
    stages = {name: float(value) for name, value, _ in (part.split() for part in parts.strip().split(", "))}
    assert float(total.removeprefix("1 image in ")) >= sum(stages.values()) - 0.05
    assert stages["load"] > 0.5  # the libraries are a part of it
    import torch._dynamo  # noqa: F401

    monkeypatch.setattr(quick_imports, "import_models", lambda: None)
    with one_thread():
        result = run(*args, ordinary)
    assert result.code == 0, result.err
    assert quick.read_bytes() == ordinary.read_bytes()
