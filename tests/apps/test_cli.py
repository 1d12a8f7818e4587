"""The command line. Most tests call it in this process; a few run the real program."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

import mogle_rt
from mogle_rt import Pipeline, masks
from mogle_rt.apps import cli
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.jobs.image_files import save_image, xmp
from mogle_rt.jobs.settings_read import ImageSettings, read_settings
from tests.checkpoints import Files

QUICK = ("--steps", "2", "--height", "32", "--width", "48", "--device", "cpu", "--dtype", "fp32")
PNG_XMP = "XML:com.adobe.xmp"
AI_GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


@dataclass(frozen=True)
class Result:
    """What a run of the program printed, and its exit code."""

    code: int
    out: str
    err: str


def run(*args: object) -> Result:
    """Run the program in this process, in the way the console script does."""
    out, err = io.StringIO(), io.StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with (
            mock.patch.object(sys, "argv", ["mogle-rt", *map(str, args)]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as caught,
        ):
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, handler)
    code = caught.value.code
    return Result(code if isinstance(code, int) else int(bool(code)), out.getvalue(), err.getvalue())


def run_process(*args: object, **environment: str) -> Result:
    """Run the program in a process of its own, without a terminal."""
    done = subprocess.run(
        [sys.executable, "-m", "mogle_rt", *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        timeout=250,  # against a hang alone
    )
    return Result(done.returncode, done.stdout, done.stderr)


def draw_mask(path: Path, *, seed: int = 0) -> Path:
    """Write a mask of rectangles, in the form that the data sets have."""
    random = np.random.default_rng(seed)
    labels = np.zeros((32, 48), dtype=np.uint8)
    for c in random.integers(1, 19, 6):
        y, x = random.integers(0, 24), random.integers(0, 40)
        labels[y : y + 12, x : x + 16] = c
    path.parent.mkdir(parents=True, exist_ok=True)
    masks.to_image(labels).save(path)
    return path


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread. Tiny models gain nothing from more, which wait for one another on a busy machine."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    return draw_mask(tmp_path / "mask.png")


def parse_xmp(packet: bytes | str) -> tuple[list[str], list[dict[str, Any]]]:
    """The digital source types and the descriptions in an XMP packet, read by an XML parser."""
    text = packet.decode() if isinstance(packet, bytes) else packet
    root = ElementTree.fromstring(re.sub(r"<\?xpacket.*?\?>", "", text))
    kinds = root.findall(".//{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType")
    texts = root.findall(
        ".//{http://purl.org/dc/elements/1.1/}description//*[@{http://www.w3.org/XML/1998/namespace}lang]"
    )
    return [k.text or "" for k in kinds], [json.loads(t.text or "") for t in texts]


# convert


@pytest.mark.quick
def test_convert(tiny_files: Files, tiny_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "made" / "ckpt.safetensors"
    result = run(
        *("convert", "--flux", tiny_files.flux, "--lora", tiny_files.lora, "--mogle", tiny_files.mogle, "-o", output)
    )
    assert result.code == 0
    assert result.out == ""
    assert re.fullmatch(rf"{re.escape(str(output))}: 1\.\d MB in \d+\.\d s\n", result.err)
    assert output.read_bytes() == tiny_bundle.read_bytes()
    assert list(output.parent.iterdir()) == [output]


def test_convert_keeps_what_is_there(tiny_files: Files, tiny_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "ckpt.safetensors"
    output.write_text("another bundle, of 34 GB")
    args = ("--flux", tiny_files.flux, "--lora", tiny_files.lora, "--mogle", tiny_files.mogle, "-o", output)
    refused = run("convert", *args)
    assert (refused.code, refused.out) == (1, "")
    assert refused.err == f"error: {output}: exists already; choose another name, or --overwrite\n"
    assert output.read_text() == "another bundle, of 34 GB"
    assert run("convert", *args, "--overwrite").code == 0
    assert output.read_bytes() == tiny_bundle.read_bytes()


def test_convert_options(tiny_files: Files, tmp_path: Path) -> None:
    output = tmp_path / "ckpt.safetensors"
    args = ("--flux", tiny_files.flux, "--lora", tiny_files.lora, "--mogle", tiny_files.mogle, "-o", output)
    assert run("convert", *args, "--dtype", "bf16", "--no-text-encoders").code == 0
    bundle = Bundle(output)
    assert {i.dtype for i in bundle.tensors.values()} == {torch.bfloat16}
    assert not bundle.has_text_encoders


# info


@pytest.mark.quick
def test_info(tiny_bundle: Path) -> None:
    result = run("info", tiny_bundle)
    assert result.code == 0
    assert result.err == ""
    bundle = Bundle(tiny_bundle)
    values = dict(line.strip().split("  ", 1) for line in result.out.splitlines()[:9])
    assert values["file"] == f"{tiny_bundle}, {tiny_bundle.stat().st_size / 1e6:.1f} MB"
    assert values["format"] == "mogle_rt bundle, version 1"
    assert values["architecture"].startswith("FLUX, width 32 (2 heads x 16), 2 double and 2 single blocks, guidance")
    assert values["weights"].startswith("34 layers of the blocks in float32, ")
    assert values["LoRA rank"] == "4"
    assert values["mixture"] == "1 global and 19 region experts, hidden 32"
    assert values["ablation"] == "none"
    assert values["text encoders"] == "CLIP and T5"
    assert values["sha256"] == bundle.content_hash
    rows = {line.split()[0]: line.split()[1:] for line in result.out.splitlines()[10:]}
    for part in ("transformer", "lora", "mogle", "vae", "text_encoder", "text_encoder_2"):
        tensors = [i for n, i in bundle.tensors.items() if n.startswith(f"{part}.")]
        assert rows[part][:2] == [str(len(tensors)), f"{sum(i.numel for i in tensors):,}"]
        assert rows[part][-1] == "float32"
    assert rows["tokenizer"][-1] == "uint8"
    assert "verified" not in result.out


def test_info_of_an_ablated_bundle_without_text(tiny_files: Files, tmp_path: Path) -> None:
    state = torch.load(tiny_files.mogle, weights_only=True)
    torch.save({n: t for n, t in state.items() if not n.startswith("gating.")}, tmp_path / "mogle.pt")
    output = tmp_path / "ckpt.safetensors"
    mogle_rt.convert(tiny_files.flux, tiny_files.lora, tmp_path / "mogle.pt", output, text_encoders=False)
    out = run("info", output).out
    assert re.search(r"ablation  no gating$", out, re.MULTILINE)
    assert re.search(r"text encoders  none: prompts must come as embeddings, or be empty$", out, re.MULTILINE)


def test_info_verify(tiny_bundle: Path) -> None:
    result = run("info", tiny_bundle, "--verify")
    assert result.code == 0
    assert result.err == ""
    assert result.out.splitlines()[-1] == "verified: the contents match the hash"


# generate


@pytest.mark.quick
@pytest.mark.parametrize("name", ["face.png", "face.jpg", "face.JPEG"])
def test_generate(name: str, tiny_bundle: Path, mask: Path, tmp_path: Path) -> None:
    output = tmp_path / name
    prompt = 'a "smiling" <woman> & 5 > 3, ünïcode 😀\nsecond line'
    options = ("--guidance", "2.5", "--condition-scale", "0.7", "--model-config", '{"add_cond_attn": true}')
    result = run("generate", tiny_bundle, "-m", mask, "-p", prompt, "-o", output, "--seed", "7", *QUICK, *options)
    assert result.code == 0
    assert result.out == f"{output}\n"
    assert re.fullmatch(
        r"1 image in \d+\.\d\d s \(seed 7\): load \d.*s, text .*, mask .*, prepare .*, denoise .*, decode .* s\n",
        result.err,
    )
    settings = {
        "prompt": prompt,
        "seed": 7,
        "mask": "mask.png",
        "steps": 2,
        "guidance_scale": 2.5,
        "size": [48, 32],
        "condition_scale": 0.7,
        "dtype": "float32",
        "bundle_sha256": Bundle(tiny_bundle).content_hash,
        "software": f"mogle_rt {mogle_rt.__version__}",
    }
    switches = {"union_cond_attn": True, "add_cond_attn": True, "latent_lora": False}
    with Image.open(output) as image:
        image.load()
        assert image.mode == "RGB"
        assert image.size == (48, 32)
        if name == "face.png":
            assert image.format == "PNG"
            text = dict(image.text)  # type: ignore[attr-defined]
            packet = text.pop(PNG_XMP)
            found = {
                k: v if k in ("prompt", "mask", "dtype", "bundle_sha256", "software") else json.loads(v)
                for k, v in text.items()
            }
            assert found.pop("model_config").items() >= switches.items()
            assert found == settings
        else:
            assert image.format == "JPEG"
            packet = image.info["xmp"]
    kinds, (described,) = parse_xmp(packet)
    assert kinds == [AI_GENERATED]
    assert described.pop("model_config").items() >= switches.items()
    held = ImageSettings(mask_png=described.pop("mask_png")).labels
    assert held is not None
    assert np.array_equal(held, masks.to_labels(mask))
    assert described == settings
    read = read_settings(output)
    assert (read.prompt, read.seed, read.steps, read.guidance_scale) == (prompt, 7, 2, 2.5)
    assert read.labels is not None
    assert np.array_equal(read.labels, held)


def test_generate_draws_what_the_pipeline_draws(tiny_bundle: Path, mask: Path, tmp_path: Path) -> None:
    output = tmp_path / "face.png"
    run("generate", tiny_bundle, "-m", mask, "-p", "a face", "-o", output, "--seed", "11", *QUICK)
    pipe = Pipeline(tiny_bundle, device="cpu", dtype="fp32")
    generator = torch.Generator().manual_seed(11)
    expected = pipe(mask, "a face", 2, height=32, width=48, generator=generator, output_type="np").images
    with Image.open(output) as image:
        assert np.abs(np.asarray(image) / 255.0 - np.asarray(expected)[0]).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("name", ["face.png", "face.jpg"])
def test_no_metadata_leaves_only_the_mark(name: str, tiny_bundle: Path, mask: Path, tmp_path: Path) -> None:
    output = tmp_path / name
    result = run("generate", tiny_bundle, "-m", mask, "-p", "a secret", "-o", output, "--no-metadata", *QUICK)
    assert result.code == 0
    with Image.open(output) as image:
        image.load()
        if name == "face.png":
            assert set(image.text) == {PNG_XMP}  # type: ignore[attr-defined]
        packet = image.info["xmp" if name == "face.jpg" else PNG_XMP]
    assert parse_xmp(packet) == ([AI_GENERATED], [])
    data = output.read_bytes()
    assert b"secret" not in data
    assert Bundle(tiny_bundle).content_hash.encode() not in data


def test_the_same_seed_gives_the_same_bytes(tiny_bundle: Path, mask: Path, tmp_path: Path) -> None:
    a, b, c = (tmp_path / f"{x}.png" for x in "abc")
    for output, seed in ((a, 3), (b, 3), (c, 4)):
        assert run("generate", tiny_bundle, "-m", mask, "-p", "a face", "-o", output, "--seed", seed, *QUICK).code == 0
    assert a.read_bytes() == b.read_bytes()
    assert pixels(a) != pixels(c)


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def images_in(folder: Path) -> list[Path]:
    """The images of a folder. The record of their job is left out."""
    return sorted(path for path in folder.iterdir() if path.suffix in (".png", ".jpg"))


def seed_of(path: Path) -> int:
    with Image.open(path) as image:
        image.load()
        return int(image.text["seed"])  # type: ignore[attr-defined]


def test_without_a_seed_one_is_drawn_and_printed(tiny_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "face.png"
    result = run("generate", tiny_bundle, "-o", output, *QUICK)
    told = re.search(r"\(seed (\d+)\)", result.err)
    assert told
    assert int(told[1]) == seed_of(output)
    again = tmp_path / "again.png"
    run("generate", tiny_bundle, "-o", again, "--seed", told[1], *QUICK)
    assert again.read_bytes() == output.read_bytes()


def test_several_images_of_one_mask(tiny_bundle: Path, mask: Path, tmp_path: Path) -> None:
    result = run("generate", tiny_bundle, "-m", mask, "-o", tmp_path / "face.png", "-n", "3", "--seed", "5", *QUICK)
    made = [tmp_path / f"face_{i}.png" for i in (1, 2, 3)]
    assert result.out.splitlines() == [str(p) for p in made]
    assert [seed_of(p) for p in made] == [5, 6, 7]
    assert "3 images in" in result.err
    assert not (tmp_path / "face.png").exists()
    run("generate", tiny_bundle, "-m", mask, "-o", tmp_path / "alone.png", "--seed", "6", *QUICK)
    assert (tmp_path / "alone.png").read_bytes() == made[1].read_bytes()


def test_several_masks_into_a_folder(tiny_bundle: Path, tmp_path: Path) -> None:
    first, second = draw_mask(tmp_path / "a.png", seed=1), draw_mask(tmp_path / "b.png", seed=2)
    output = tmp_path / "new" / "faces"
    result = run("generate", tiny_bundle, "-m", first, "-m", second, "-o", output, "-n", "2", "--seed", "5", *QUICK)
    assert result.code == 0
    made = ["a_5.png", "a_6.png", "b_7.png", "b_8.png"]
    assert result.out.splitlines() == [str(output / n) for n in made]
    assert [p.name for p in images_in(output)] == made
    assert [seed_of(output / n) for n in made] == [5, 6, 7, 8]


def test_a_folder_of_masks_into_a_folder(tiny_bundle: Path, tmp_path: Path) -> None:
    folder, output = tmp_path / "masks", tmp_path / "faces"
    for i, name in enumerate(("c.png", "a.bmp", "b.gif")):
        draw_mask(folder / name, seed=i)
    (folder / "notes.txt").write_text("no mask")
    (folder / "._c.png").write_text("what macOS keeps beside a file")
    output.mkdir()
    result = run("generate", tiny_bundle, "-m", folder, "-o", output, "--seed", "0", *QUICK)
    assert result.code == 0
    assert [p.name for p in images_in(output)] == ["a_0.png", "b_1.png", "c_2.png"]
    alone = tmp_path / "alone.png"
    run("generate", tiny_bundle, "-m", folder / "b.gif", "-o", alone, "--seed", "1", *QUICK)
    assert alone.read_bytes() == (output / "b_1.png").read_bytes()


def test_computed_together_or_alone_the_images_are_the_same(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "masks"
    for i in range(3):
        draw_mask(folder / f"{i}.png", seed=i)
    for size in ("1", "2"):
        args = ("-m", folder, "-p", "a face", "-o", tmp_path / f"by_{size}", "--seed", "0", "--batch-size", size)
        assert run("generate", tiny_bundle, *args, *QUICK).code == 0
    for path in images_in(tmp_path / "by_1"):
        other = tmp_path / "by_2" / path.name
        difference = np.frombuffer(pixels(path), np.uint8).astype(int) - np.frombuffer(pixels(other), np.uint8)
        assert np.abs(difference).max() <= 1  # the batch adds in another order, and the result is rounded to 8 bits


def test_images_are_replaced_whole(tiny_bundle: Path, mask: Path, tmp_path: Path) -> None:
    output = tmp_path / "face.png"
    output.write_text("an older file")
    refused = run("generate", tiny_bundle, "-m", mask, "-o", output, *QUICK)
    assert refused.code == 1
    assert "face.png: exists already; choose another name, --overwrite or --skip-existing" in refused.err
    assert output.read_text() == "an older file"
    assert run("generate", tiny_bundle, "-m", mask, "-o", output, "--overwrite", *QUICK).code == 0
    assert pixels(output)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["face.png", "mask.png"]


def test_an_interrupted_job_goes_on(tiny_bundle: Path, mask: Path, tmp_path: Path) -> None:
    output = tmp_path / "faces"
    arguments = ("generate", tiny_bundle, "-m", mask, "-n", "3", "-o", output, "--seed", "5", *QUICK)
    assert run(*arguments).code == 0
    whole = {path.name: pixels(path) for path in images_in(output)}
    (output / "mask_6.png").unlink()
    before = (output / "mask_5.png").stat()
    result = run(*arguments, "--skip-existing")
    assert (result.code, result.out.split()) == (0, [str(output / "mask_6.png")])
    assert {path.name: pixels(path) for path in images_in(output)} == whole
    assert (output / "mask_5.png").stat() == before
    result = run(*arguments, "--skip-existing")
    assert (result.code, result.out, result.err) == (0, "", "nothing to draw: all images are there already\n")
    result = run(*arguments, "--skip-existing", "--overwrite")
    assert (result.code, result.err) == (1, "error: --overwrite and --skip-existing exclude each other\n")


def prompts_of(folder: Path) -> list[str]:
    """The prompts that stand in the images of a folder."""
    found = []
    for path in images_in(folder):
        with Image.open(path) as image:
            image.load()
            (settings,) = parse_xmp(image.text[PNG_XMP])[1]  # type: ignore[attr-defined]
            found.append(settings["prompt"])
    return found


def test_prompts_of_several_masks(tiny_bundle: Path, tmp_path: Path) -> None:
    """Prompts are one for all masks, or one for each, or lie beside the masks. Any other number is an error."""
    masks = [draw_mask(tmp_path / "masks" / f"{name}.png", seed=i) for i, name in enumerate("ab")]
    (tmp_path / "masks" / "b.txt").write_text("a man with grün hair\n", encoding="utf-8")
    for i, (given, expected) in enumerate(
        ((["one"], ["one", "one"]), (["one", "two"], ["one", "two"]), ([], ["", "a man with grün hair"]))
    ):
        output, options = tmp_path / str(i), [o for p in given for o in ("-p", p)]
        arguments = ("-m", masks[0], "-m", masks[1], "-o", output, "--seed", "0", "--batch-size", "2", *options)
        assert run("generate", tiny_bundle, *arguments, *QUICK).code == 0
        assert prompts_of(output) == expected
    alone = tmp_path / "alone.png"
    run("generate", tiny_bundle, "-m", masks[1], "-p", "two", "-o", alone, "--seed", "1", *QUICK)
    assert pixels(alone) == pixels(tmp_path / "1" / "b_1.png")
    result = run("generate", tiny_bundle, "-m", masks[0], "-p", "x", "-p", "y", "-o", tmp_path / "z.png", *QUICK)
    assert result.code == 1
    assert "--prompt must be given once or once for each of 1 masks, got 2" in result.err
    (tmp_path / "masks" / "a.txt").write_text("as Windows writes it", encoding="utf-8-sig")
    assert run("generate", tiny_bundle, "-m", masks[0], "-o", tmp_path / "marked", *QUICK).code == 0
    assert prompts_of(tmp_path / "marked") == ["as Windows writes it"]


def test_a_mask_whose_name_is_no_text(tiny_bundle: Path, tmp_path: Path) -> None:
    """Where a name's bytes are no text, the settings in the image hold them as JSON escapes."""
    named = tmp_path / os.fsdecode(b"m\xff.png")
    draw_mask(tmp_path / "m.png").rename(named)
    assert run("generate", tiny_bundle, "-m", named, "-o", tmp_path / "out", "--seed", "3", *QUICK).code == 0
    with Image.open(tmp_path / "out" / os.fsdecode(b"m\xff_3.png")) as image:
        image.load()
        (settings,) = parse_xmp(image.text[PNG_XMP])[1]  # type: ignore[attr-defined]
        assert settings["mask"] == named.name
        assert image.text["mask"] == "m\\udcff.png"  # type: ignore[attr-defined]


def test_too_little_memory_on_a_cpu(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch raises a RuntimeError where a CPU's memory runs out."""

    def hungry(*_: Any, **__: Any) -> None:
        torch.empty(1 << 60)

    monkeypatch.setattr(Pipeline, "__call__", hungry)
    result = run("generate", tiny_bundle, "-o", tmp_path / "face.png", *QUICK)
    assert result.code == 1
    assert result.err.splitlines()[-1] == "error: not enough memory; try a smaller size or batch"


def test_batches_without_a_mask(tiny_bundle: Path, tmp_path: Path) -> None:
    args = ("-o", tmp_path / "faces", "-n", "3", "--batch-size", "2", "--seed", "1")
    assert run("generate", tiny_bundle, *args, *QUICK).code == 0
    assert [p.name for p in images_in(tmp_path / "faces")] == ["face_1.png", "face_2.png", "face_3.png"]


# Image files


def test_settings_of_any_text_are_valid_xml() -> None:
    settings = {"prompt": "".join(map(chr, [*range(1, 0x3000), 0xFFFD, 0xFFFE, 0xFFFF, 0x1F600]))}
    assert parse_xmp(xmp(settings)) == ([AI_GENERATED], [settings])


def test_settings_too_long_for_a_jpeg(tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 16))
    room = 65_504 - len(xmp({"prompt": ""}))  # what a JPEG segment has beside XMP's own name
    save_image(image, tmp_path / "most.jpg", {"prompt": "x" * room})
    with Image.open(tmp_path / "most.jpg") as read:
        assert parse_xmp(read.info["xmp"])[1] == [{"prompt": "x" * room}]
    with pytest.raises(mogle_rt.OutputError, match=r"more\.jpg: a JPEG can't hold settings of \d+ bytes; write a PNG"):
        save_image(image, tmp_path / "more.jpg", {"prompt": "x" * (room + 1)})
    assert not (tmp_path / "more.jpg").exists()
    save_image(image, tmp_path / "more.png", {"prompt": "x" * (room + 1)})
    assert (tmp_path / "more.png").exists()


def test_a_prompt_that_no_jpeg_holds_is_refused_before_anything_is_drawn(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mogle_rt.pipeline, "Pipeline", lambda *_, **__: pytest.fail("it is loaded"))
    result = run("generate", tiny_bundle, "-p", "x" * 70_000, "-o", tmp_path / "face.jpg", *QUICK)
    assert result.code == 1
    assert "a JPEG can't hold settings of" in result.err
    result = run("generate", tiny_bundle, "-n", 10**12, "-o", tmp_path, *QUICK)
    assert "--num-images must be at most 1,000,000, got 1,000,000,000,000" in result.err


# Usage


@pytest.mark.parametrize(
    "args",
    [
        ("--nonsense",),
        ("nonsense",),
        ("info",),
        ("info", "a", "b"),
        ("generate", "ckpt.safetensors", "-o", "x.png", "--steps", "many"),
        ("generate", "ckpt.safetensors", "-o", "x.png", "--seed", "1.5"),
        ("convert", "--flux", "x"),
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_code_2(args: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*args)
    assert result.code == 2
    assert result.err.startswith("Usage: ")
    assert "Traceback" not in result.err
    assert list(tmp_path.iterdir()) == []


def test_help_and_version() -> None:
    top = run("--help")
    assert top.code == 0
    commands = [c.name or c.callback.__name__ for c in cli.app.registered_commands if c.callback]
    assert {"convert", "generate", "info"} <= set(commands)
    for command in commands:
        assert re.search(rf"│ {command} +[A-Z]", top.out)
        page = run(command, "-h")
        assert page.code == 0
        assert re.search(rf"Usage: .*{command} \[OPTIONS\]", page.out)
    assert run("--version").out == f"mogle-rt {mogle_rt.__version__}\n"


def test_export_is_a_command_beside_the_module(tmp_path: Path) -> None:
    """``mogle-rt export`` runs the same code as ``python -m mogle_rt.export``, with its options and its errors."""
    from mogle_rt.export.__main__ import app as module

    (alone,) = module.registered_commands
    (within,) = [c for c in cli.app.registered_commands if c.name == "export"]
    assert within.callback is alone.callback
    result = run("export", tmp_path / "absent.safetensors", "-o", tmp_path / "out")
    assert result == Result(1, "", f"error: {tmp_path / 'absent.safetensors'}: no such file\n")


# The real program


def test_the_module_is_the_program() -> None:
    result = run_process("--help")
    assert result.code == 0
    assert result.err == ""
    assert all(command in result.out for command in ("convert", "generate", "info"))


# Runs two commands in one process without a terminal, which imports the libraries in the ordinary way. A mark is printed
# between their outputs.
COMMANDS = """
import json, sys
from mogle_rt.apps import cli
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    try:
        cli.main()
    except SystemExit as error:
        print("exit code", error.code, file=sys.stderr, flush=True)
"""


def test_convert_is_quiet_without_a_terminal(tiny_files: Files, tmp_path: Path) -> None:
    """stderr has only our one line, of success or of an error. Libraries that write to it without Python add nothing."""
    args = ("--lora", tiny_files.lora, "--mogle", tiny_files.mogle, "-o", tmp_path / "ckpt.safetensors")
    commands = [["convert", "--flux", flux, *map(str, args)] for flux in ("nobody/no-such-model", str(tiny_files.flux))]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "absent")},
        timeout=250,  # against a hang alone
    )
    assert done.stdout == ""
    error, code, made, other_code = done.stderr.splitlines()
    assert re.fullmatch(r"error: .*nobody/no-such-model.*the hub can't be reached.*", error)
    assert made.startswith(f"{tmp_path / 'ckpt.safetensors'}: 1.")
    assert (code, other_code) == ("exit code 1", "exit code 0")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.safetensors"]


@pytest.mark.quick
def test_a_name_in_a_mistake_is_no_markup(tmp_path: Path) -> None:
    absent = tmp_path / ":smile:[red]ckpt[/].safetensors"
    result = run("generate", absent, "-o", tmp_path / "x.png")
    assert result == Result(1, "", f"error: {absent}: no such file\n")
    assert list(tmp_path.iterdir()) == []
