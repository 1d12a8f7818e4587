"""The deployer's program in C++: built and run as docs/deploy.md says, its pixels are the pipeline's within one level.

It needs a compiler and the headers of onnxruntime, libpng and nlohmann's JSON library; without them the tests are skipped.
`CPLUS_INCLUDE_PATH` tells the compiler where else headers are.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mogle_rt import Pipeline
from mogle_rt.export.exporter import export
from mogle_rt.jobs.embeddings import write_embeddings
from mogle_rt.masks import to_image

SOURCE = Path(__file__).parents[2] / "examples" / "deploy_cpp" / "face.cpp"
HEADERS = ("onnxruntime_cxx_api.h", "nlohmann/json.hpp", "png.h")
PLACES = ("/usr/include/onnxruntime", "/usr/local/include/onnxruntime")  # where packages put onnxruntime's headers
SIZE, STEPS = (48, 32), 3  # width and height; steps
PROMPT = "an old man with a green hat"


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled program, linked with the library of the Python package onnxruntime."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("deploy")
    places = [f"-I{place}" for place in PLACES]
    (folder / "probe.cpp").write_text("".join(f"#include <{header}>\n" for header in HEADERS))
    probe = subprocess.run(
        [compiler, "-std=c++17", "-fsyntax-only", *places, str(folder / "probe.cpp")], capture_output=True, text=True
    )
    if probe.returncode:
        pytest.skip(f"a header is missing: {probe.stderr.strip().splitlines()[0]}")
    found = importlib.util.find_spec("onnxruntime")
    assert found is not None
    assert found.origin is not None
    libraries = sorted((Path(found.origin).parent / "capi").glob("libonnxruntime.so.*"))
    if not libraries:
        pytest.skip("the package onnxruntime has no library for this system's linker")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / name).symlink_to(libraries[0])
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", str(SOURCE), "-o", str(folder / "face")]
    command += [*places, f"-L{folder}", "-lonnxruntime", "-lpng", f"-Wl,-rpath,{folder}"]
    subprocess.run(command, check=True)
    return folder / "face"


@pytest.fixture
def work(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A folder with an export, a mask in colours, a prompt and noise."""
    export(tiny_bundle, tmp_path / "exported", dtype="fp32", weights="copy")
    labels = np.random.default_rng(0).integers(0, 19, (SIZE[1] // 8, SIZE[0] // 8)).repeat(8, 0).repeat(8, 1)
    to_image(labels.astype(np.uint8)).save(tmp_path / "mask.png")
    sequence, pooled = Pipeline(tiny_bundle, device="cpu").encode_prompt(PROMPT, max_sequence_length=16)[:2]
    write_embeddings(tmp_path / "prompt.safetensors", [PROMPT], sequence.float(), pooled.float(), "")
    tokens = SIZE[0] * SIZE[1] // 256
    save_file({"latents": torch.randn(1, tokens, 64)}, tmp_path / "noise.safetensors")
    return tmp_path


def face(program: Path, work: Path, *options: str, mask: str = "mask.png") -> subprocess.CompletedProcess[str]:
    command = [str(program), "exported", mask, "prompt.safetensors", "face.png", "--steps", str(STEPS), *options]
    return subprocess.run(command, cwd=work, capture_output=True, text=True)


def test_pixels_are_the_pipeline_s(program: Path, work: Path, tiny_bundle: Path) -> None:
    done = face(program, work, "--latents", "noise.safetensors", "--guidance", "2.5")
    assert (done.returncode, done.stdout) == (0, "face.png\n"), done.stderr
    image = Pipeline(tiny_bundle, device="cpu")(
        work / "mask.png",
        PROMPT,
        max_sequence_length=16,
        latents=load_file(work / "noise.safetensors")["latents"],
        num_inference_steps=STEPS,
        guidance_scale=2.5,
        width=SIZE[0],
        height=SIZE[1],
    ).images[0]
    expected, got = (np.asarray(picture).astype(int) for picture in (image, Image.open(work / "face.png")))
    assert got.shape == expected.shape == (SIZE[1], SIZE[0], 3)
    assert expected.std() > 10  # it isn't plain, so that equality says something
    assert abs(got - expected).max() <= 1


def test_seeds(program: Path, work: Path) -> None:
    pictures = []
    for seed in ("1", "1", "2"):
        assert face(program, work, "--seed", seed).returncode == 0
        pictures.append((work / "face.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_errors_are_one_line(program: Path, work: Path) -> None:
    Image.new("RGB", (40, 32)).save(work / "size.png")
    Image.new("RGB", SIZE, (1, 2, 3)).save(work / "colour.png")
    manifest = json.loads((work / "exported" / "manifest.json").read_text())
    cases = {
        "its sides must be multiples of 16": face(program, work, mask="size.png"),
        "whose colour is not that of a class": face(program, work, mask="colour.png"),
        "gone.png": face(program, work, mask="gone.png"),
        "unknown option --size": face(program, work, "--size", "3"),
        "holds no tensor latents": face(program, work, "--latents", "prompt.safetensors"),
    }
    (work / "exported" / "manifest.json").write_text(json.dumps(manifest | {"dtype": "fp16"}))
    cases["must be in fp32"] = face(program, work)
    for message, done in cases.items():
        assert done.returncode == 1
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert not (work / "face.png").exists()
